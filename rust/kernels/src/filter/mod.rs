//! A provable filter: most pairs of rows are told apart by 8-bit codes, without their distance.
//!
//! # The map
//!
//! ```text
//! w = x − mean
//! z = Qᵀw                 P leading coordinates in an orthonormal basis fitted on the bank (PCA)
//! r = ‖w‖² − ‖z‖² rooted  the length of what the basis leaves out
//! t = H [z, r − shift]    K = P + 1 coordinates, mixed by signs and Walsh–Hadamard butterflies
//! X = round(t / step)     K codes within ±limit; one step for all rows
//! ```
//!
//! For exact arithmetic, by orthogonality and Cauchy–Schwarz,
//!
//! ```text
//! ‖x − y‖² = ‖z_x − z_y‖² + ‖rest_x − rest_y‖² ≥ ‖z_x − z_y‖² + (r_x − r_y)² = ‖t_x − t_y‖²       (1)
//! ```
//!
//! H is orthogonal, so it changes no distance; it gives all coordinates a like variance, which one
//! step for all needs. Where nothing is gained from a basis (P ≥ columns) Q is the identity, r is 0,
//! and (1) is an equality.
//!
//! # The bound
//!
//! Let t* be the exact image, t the computed one, and |t − t*| ≤ a (below). A bank row y keeps one
//! ε ≥ ‖t* − step·Y‖, all its errors in one number: rounding to codes, clipping, a. A query
//! keeps its parts: c = t clipped to ±limit·step, e = ‖c − step·X‖, out = ‖t − c‖, and a. The decoded
//! row step·Y lies in the box to which c is the nearest point from t, so a query outside the box is
//! farther from it than c is, by Pythagoras' inequality for convex sets:
//!
//! ```text
//! ‖x − y‖ ≥ ‖t*_x − t*_y‖ ≥ ‖t_x − step·Y‖ − a − ε_y
//!         ≥ √(‖c − step·Y‖² + out²) − a − ε_y
//!         ≥ √(max(0, step·‖X − Y‖ − e)² + out²) − a − ε_y                                          (2)
//! ```
//!
//! So a pair with ‖x − y‖ ≤ τ has step·‖X − Y‖ ≤ T := e + √(max(0, (τ + a + E)² − out²)), E the
//! largest ε of the rows considered. With ‖X − Y‖² = |X|² + |Y|² − 2 X·Y, all integers,
//!
//! ```text
//! the pair may be near only if  X·Y − |Y|²/2 ≥ (|X|² − (T / step)²) / 2                            (3)
//! ```
//!
//! The left side is computed exactly in i32, |Y|²/2 rounded down, the right side in f64 and rounded
//! down: both roundings keep more pairs, none lose one. `τ` carries [`SLACK`], which covers the f64
//! rounding of the canonical distance and of (3). Pairs at exactly τ are kept: ties are decided by
//! distances, not here.
//!
//! # Rounding errors: what `a` covers
//!
//! u = 2⁻²⁴. All in units of length, of one row:
//! - w is a rounded difference: ‖δw‖ ≤ u‖w‖.
//! - z: columns of Q as stored in f32 obey `‖QᵀQ − I‖ ≤ η`, measured in f64; the polar factor of Q is an
//!   exactly orthonormal basis within η of it, so this costs η‖w‖. Sums of `CHAIN` products are added
//!   up per chunk, so a coordinate errs by at most (CHAIN + chunks + 1)·u·‖q‖‖w‖, and z by √P times it.
//! - r: with e the error of z, |r² − r*²| ≤ g := 2‖z‖e + e² + the errors of two sums of squares, hence
//!   |r − r*| ≤ min(√g, g/r).
//! - H: each butterfly rounds once; log₂ of the block of them and the final scaling cost
//!   (log₂ block + 2)·u·‖t‖.
//!
//! - Sums of n squares in f32, for ‖w‖, ‖z‖, e, out and ε, err by (n/16 + 24)·u of themselves; half of that
//!   is the share of a length. Underflow may take 10⁻¹⁶ from one.
//!
//! The f64 sums of the canonical distance are covered by [`SLACK`].

mod basis;
mod codes;
mod gemm;
mod probe;
mod search;

use basis::{Basis, mean, sample};
pub use codes::{Block, Codes, GROUPS, QUERIES, TILE, maxima, products};
pub use probe::{Coded, Plan};
pub use search::{STRETCH, Scratch, Search, Second};

use crate::error::Error;
use crate::matrix::{Matrix, zeroed};
use crate::random::splitmix64;
use crate::simd::{LANES, Level, Operation, Simd};
use crate::threads::Context;
use gemm::multiply;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Factor on lengths that covers f64 rounding anywhere in the bound: rows have fewer than 10⁶ columns,
/// so sums of squares are right to 10⁻¹⁰.
pub const SLACK: f64 = 1.0 + 1e-9;

/// What underflow of f32 operations can take from a length: 16 384 squares of 10⁻³⁸, rooted, and to spare.
const UNDERFLOW: f64 = 1e-16;

/// The width of codes is a multiple of this.
pub const STEP: usize = 64;

/// Codes wider than this could overflow the i32 of a product, or reach the products of padding rows.
pub const WIDEST: usize = 16_384;

/// Rows encoded at a time: their images stay in the second-level cache.
const BATCH: usize = 48;

/// How many deviations of the coordinates the codes span; rows beyond are clipped, and know it.
const SPAN: f64 = 4.5;

/// The map from rows to codes.
#[derive(Clone, Debug)]
pub struct Encoder {
    mean: Vec<f32>,
    /// None: the identity, and no residual.
    basis: Option<Basis>,
    width: usize,
    /// Length of the Walsh–Hadamard blocks: the largest power of two that divides the width.
    block: usize,
    signs: Vec<f32>,
    shift: f32,
    step: f32,
    /// `SLACK / step`.
    per_code: f64,
    limit: i32,
}

/// What is known of an encoded row beside its codes; the names are those of the file's header. Errors are
/// rounded up to f32, `clipped` down.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measures {
    /// |X|².
    pub norm: i32,
    /// ΣX.
    pub sum: i32,
    /// a, of the computed image.
    pub computed: f32,
    /// e, of rounding to codes.
    pub rounded: f32,
    /// out, of clipping.
    pub clipped: f32,
    /// ε, all of them together.
    pub total: f32,
}

/// At least `value`, in f32.
#[inline(always)]
fn at_least(value: f64) -> f32 {
    (value as f32).next_up()
}

/// At most `value`, and not negative, in f32.
#[inline(always)]
fn at_most(value: f64) -> f32 {
    (value as f32).next_down().max(0.0)
}

impl Encoder {
    /// A map of `width` codes (a multiple of [`STEP`]) in the basis, scaled to the rows of a bank. No
    /// basis keeps all columns, at [`Encoder::full_width`].
    pub fn new(context: &Context<'_>, rows: Matrix<'_>, mean: Vec<f32>, basis: Option<Basis>, width: usize) -> Self {
        let signs = (0..width as u64).map(|i| if splitmix64(i) & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let limit = Self::limit_of(context.level());
        let block = 1 << width.trailing_zeros();
        let mut encoder = Self { mean, basis, width, block, signs, shift: 0.0, step: 1.0, per_code: 1.0, limit };
        encoder.scale(context, rows);
        encoder
    }

    /// Fits a basis and a map of `width` codes to the rows of a bank.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub fn fit(context: &Context<'_>, rows: Matrix<'_>, width: usize) -> Result<Self, Error> {
        let mean = mean(rows);
        let narrow = width < Self::full_width(rows.cols());
        let basis = if narrow { Some(Basis::fit(context, rows, &mean, width)?) } else { None };
        Ok(Self::new(context, rows, mean, basis, width))
    }

    /// The width at which all of `cols` columns are kept.
    pub fn full_width(cols: usize) -> usize {
        cols.next_multiple_of(STEP)
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.mean.len()
    }

    /// Codes of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Largest magnitude of a code.
    pub fn limit(&self) -> i32 {
        self.limit
    }

    /// The largest codes that a level multiplies.
    pub fn limit_of(level: Level) -> i32 {
        level.run(CodeLimit)
    }

    /// Encodes the named rows, in parallel.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub fn encode(&self, context: &Context<'_>, rows: Matrix<'_>, named: &[u32]) -> Result<Encoded, Error> {
        let width = self.width;
        let mut encoded = Encoded::zeroed(named.len(), width)?;
        let level = context.level();
        let outputs = encoded.codes.chunks_mut(BATCH * width).zip(encoded.measures.chunks_mut(BATCH));
        context.for_each(
            named.chunks(BATCH).zip(outputs),
            || (),
            |(), (named, (codes, measures))| {
                let rows: Vec<&[f32]> = named.iter().map(|&row| rows.row(row as usize)).collect();
                level.run(Encode { encoder: self, rows: &rows, codes, measures });
            },
        )?;
        Ok(encoded)
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        4 * (self.mean.len() + self.signs.len()) + self.basis.as_ref().map_or(0, Basis::nbytes)
    }

    /// Chooses the shift of r and the step from a sample of the rows.
    fn scale(&mut self, context: &Context<'_>, rows: Matrix<'_>) {
        let sample: Vec<&[f32]> = sample(rows.rows(), 512).map(|row| rows.row(row)).collect();
        let mut images = vec![0.0; sample.len() * self.width];
        let mut run = |encoder: &Self| -> f64 {
            let batches = sample.chunks(BATCH).zip(images.chunks_mut(BATCH * self.width));
            let residuals = batches.map(|(rows, images)| {
                let measures = &mut [Measures::default(); BATCH][..rows.len()];
                context.level().run(Images { encoder, rows, out: images, measures })
            });
            residuals.sum()
        };
        if self.basis.is_some() {
            self.shift = (run(self) / sample.len() as f64) as f32;
        }
        run(self);
        let square = |&t: &f32| f64::from(t) * f64::from(t);
        let deviation = (images.iter().map(square).sum::<f64>() / images.len() as f64).sqrt();
        let largest = images.iter().fold(0.0_f32, |largest, t| largest.max(t.abs()));
        let span = (SPAN * deviation).min(f64::from(largest)) as f32 / self.limit as f32;
        // Sixteen bits of mantissa, so that step times a code is exact in f32.
        let short = f32::from_bits((span.max(1e-30).to_bits() + 0xff) & !0xff);
        self.step = short;
        self.per_code = SLACK / f64::from(short);
    }

    /// What (3) needs to know of a query whose near rows are those within `tau`.
    #[inline(always)]
    pub fn near(&self, query: &Measures, tau: f64) -> Near {
        let clipped = f64::from(query.clipped);
        Near {
            tau: tau * SLACK + f64::from(query.computed),
            clipped: clipped * clipped,
            rounded: f64::from(query.rounded),
            norm: f64::from(query.norm),
            per_code: self.per_code,
        }
    }
}

/// A query and its τ: the right side of (3), but for ε.
#[derive(Clone, Copy, Debug)]
pub struct Near {
    tau: f64,
    clipped: f64,
    rounded: f64,
    norm: f64,
    per_code: f64,
}

impl Near {
    /// The right side of (3) for rows that err by at most `error`: a pair may be near only if its product
    /// is at least this.
    #[inline(always)]
    pub fn threshold(&self, error: f64) -> i32 {
        let near = self.tau + error;
        let reach = (self.rounded + (near * near - self.clipped).max(0.0).sqrt()) * self.per_code;
        // The conversion saturates: far below every product, or just above the padding's.
        ((self.norm - reach * reach) * 0.5).floor() as i32
    }
}

/// The level's largest code.
struct CodeLimit;

impl Operation for CodeLimit {
    type Output = i32;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> i32 {
        S::CODE_LIMIT
    }
}

/// The images t of some rows, and `computed` of their measures. Returns the sum of r.
struct Images<'a> {
    encoder: &'a Encoder,
    rows: &'a [&'a [f32]],
    out: &'a mut [f32],
    measures: &'a mut [Measures],
}

impl Operation for Images<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        images(simd, self.encoder, self.rows, self.out, self.measures)
    }
}

#[inline(always)]
fn images<S: Simd>(simd: S, encoder: &Encoder, rows: &[&[f32]], images: &mut [f32], measures: &mut [Measures]) -> f64 {
    let (cols, width) = (encoder.mean.len(), encoder.width);
    let mut centred = vec![0.0_f32; rows.len() * cols];
    for (row, centred) in rows.iter().zip(centred.chunks_exact_mut(cols)) {
        for ((w, &x), &mean) in centred.iter_mut().zip(*row).zip(&encoder.mean) {
            *w = x - mean;
        }
    }
    if let Some(basis) = &encoder.basis {
        multiply(simd, &centred, cols, basis.panels(), images);
    } else {
        for (image, centred) in images.chunks_exact_mut(width).zip(centred.chunks_exact(cols)) {
            image[..cols].copy_from_slice(centred);
            image[cols..].fill(0.0);
        }
    }
    let mut scratch = vec![0.0; width];
    let mut residuals = 0.0;
    let centred = centred.chunks_exact(cols);
    for ((centred, image), measures) in centred.zip(images.chunks_exact_mut(width)).zip(measures) {
        let squared = squares(simd, centred);
        let length = squared.sqrt();
        let mut error = U * length;
        if let Some(basis) = &encoder.basis {
            let prefix = squares(simd, image);
            error += basis.error * length;
            let residual = (squared - prefix).max(0.0).sqrt();
            let gap = 2.0 * prefix.sqrt() * error + error * error + 2.0 * chain(cols) * squared;
            let gap = if residual > 0.0 { gap.sqrt().min(gap / residual) } else { gap.sqrt() };
            image[width - 1] = (residual - f64::from(encoder.shift)) as f32;
            error = error.hypot(gap + U * (residual + f64::from(encoder.shift.abs())));
            residuals += residual;
        }
        let image_length = length + f64::from(encoder.shift.abs());
        error += (f64::from(encoder.block.trailing_zeros()) + 2.0) * U * image_length;
        mix(simd, image, &encoder.signs, encoder.block, &mut scratch);
        measures.computed = at_least(error * (1.0 + 2.0 * chain(cols)) + UNDERFLOW);
    }
    residuals
}

/// Bound of the relative error of [`squares`] over `len` values.
fn chain(len: usize) -> f64 {
    ((len / LANES) as f64 + 24.0) * U
}

/// The sum of squares, in f32 lanes: the length it gives is right to [`chain`] and [`UNDERFLOW`].
#[inline(always)]
fn squares<S: Simd>(simd: S, values: &[f32]) -> f64 {
    let (groups, rest) = values.as_chunks::<LANES>();
    let mut sums = [simd.splat_f32(0.0); 2];
    for (i, group) in groups.iter().enumerate() {
        let x = simd.load_f32(group);
        sums[i % 2] = simd.multiply_add(sums[i % 2], x, x);
    }
    let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    added(simd, sums[0]) + added(simd, sums[1]) + rest
}

/// What a lane is multiplied by in butterflies whose pairs lie 1, 2, 4 and 8 apart.
const SIGNS: [[f32; LANES]; 4] = {
    let mut signs = [[1.0; LANES]; 4];
    let mut i = 0;
    while i < 4 * LANES {
        let (level, lane) = (i / LANES, i % LANES);
        if lane & (1 << level) != 0 {
            signs[level][lane] = -1.0;
        }
        i += 1;
    }
    signs
};

/// H of the header: signs, then orthonormal Walsh–Hadamard butterflies over blocks. Neighbouring
/// coordinates go to different blocks, so that all blocks get a like share of the variance.
#[inline(always)]
fn mix<S: Simd>(simd: S, image: &mut [f32], signs: &[f32], block: usize, scratch: &mut [f32]) {
    match image.len() / block {
        // Constant strides are vectorized.
        1 => deal::<1>(image, signs, block, 1, scratch),
        3 => deal::<3>(image, signs, block, 3, scratch),
        blocks => deal::<0>(image, signs, block, blocks, scratch),
    }
    let (one, minus) = (simd.splat_f32(1.0), simd.splat_f32(-1.0));
    let [s1, s2, s4, s8] = SIGNS;
    let (s1, s2) = (simd.load_f32(&s1), simd.load_f32(&s2));
    let (s4, s8) = (simd.load_f32(&s4), simd.load_f32(&s8));
    let values: &mut [[f32; LANES]] = scratch.as_chunks_mut().0;
    for lanes in &mut *values {
        let v = simd.load_f32(lanes);
        let v = simd.multiply_add(simd.swap::<1>(v), v, s1);
        let v = simd.multiply_add(simd.swap::<2>(v), v, s2);
        let v = simd.multiply_add(simd.swap::<4>(v), v, s4);
        simd.store_f32(simd.multiply_add(simd.swap::<8>(v), v, s8), lanes);
    }
    let mut half = 1;
    while half < block / LANES {
        for pairs in values.chunks_exact_mut(2 * half) {
            let (low, high) = pairs.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(high) {
                let (a, b) = (simd.load_f32(low), simd.load_f32(high));
                simd.store_f32(simd.multiply_add(a, b, one), low);
                simd.store_f32(simd.multiply_add(a, b, minus), high);
            }
        }
        half *= 2;
    }
    let scale = (1.0 / (block as f64).sqrt()) as f32;
    for (value, mixed) in image.iter_mut().zip(&*scratch) {
        *value = mixed * scale;
    }
}

/// Deals an image with its signs out to blocks. `BLOCKS` is `blocks`, or 0 where that is not a constant.
#[inline(always)]
fn deal<const BLOCKS: usize>(image: &[f32], signs: &[f32], block: usize, blocks: usize, out: &mut [f32]) {
    let blocks = if BLOCKS > 0 { BLOCKS } else { blocks };
    let (image, signs, out) = (&image[..block * blocks], &signs[..block * blocks], &mut out[..block * blocks]);
    for j in 0..block {
        for b in 0..blocks {
            out[b * block + j] = image[j * blocks + b] * signs[j * blocks + b];
        }
    }
}

/// The codes of an image, and the measures that come with them.
#[inline(always)]
fn quantize<S: Simd>(simd: S, encoder: &Encoder, image: &[f32], codes: &mut [i8], measures: &mut Measures) {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the lowest bits.
    let magic = simd.splat_f32(12_582_912.0);
    let (one, minus) = (simd.splat_f32(1.0), simd.splat_f32(-1.0));
    let (limit, step) = (encoder.limit as f32, encoder.step);
    let inverse = simd.splat_f32(1.0 / step);
    let to_length = simd.splat_f32(-step);
    let [mut sum, mut norm, mut rounded, mut clipped, mut total] = [simd.splat_f32(0.0); 5];
    for (t, codes) in image.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0) {
        let t = simd.load_f32(t);
        let shifted =
            simd.multiply_add(magic, simd.clamp(simd.multiply_add(simd.splat_f32(0.0), t, inverse), limit), one);
        let code = simd.multiply_add(shifted, magic, minus);
        let inside = simd.clamp(t, limit * step);
        let outside = simd.multiply_add(t, inside, minus);
        let fine = simd.multiply_add(inside, code, to_length);
        let wrong = simd.multiply_add(t, code, to_length);
        // Exact: a lane adds up at most 1024 squares of 127.
        sum = simd.multiply_add(sum, code, one);
        norm = simd.multiply_add(norm, code, code);
        rounded = simd.multiply_add(rounded, fine, fine);
        clipped = simd.multiply_add(clipped, outside, outside);
        total = simd.multiply_add(total, wrong, wrong);
        let mut lanes = [0.0; LANES];
        simd.store_f32(shifted, &mut lanes);
        for (code, lane) in codes.iter_mut().zip(lanes) {
            *code = lane.to_bits() as i8;
        }
    }
    let more = 1.0 + 2.0 * chain(image.len());
    *measures = Measures {
        norm: added(simd, norm) as i32,
        sum: added(simd, sum) as i32,
        computed: measures.computed,
        rounded: at_least(added(simd, rounded).sqrt() * more + UNDERFLOW),
        clipped: at_most(added(simd, clipped).sqrt() / more - UNDERFLOW),
        total: at_least(added(simd, total).sqrt() * more + UNDERFLOW + f64::from(measures.computed)),
    };
}

/// The lanes added up, in f64.
#[inline(always)]
fn added<S: Simd>(simd: S, lanes: S::F32) -> f64 {
    let mut values = [0.0; LANES];
    simd.store_f32(lanes, &mut values);
    values.into_iter().map(f64::from).sum()
}

/// Encodes rows: their codes, row after row, and their measures.
pub(crate) struct Encode<'a> {
    /// The map.
    pub encoder: &'a Encoder,
    /// The rows, [`BATCH`] of them at most for the cache's sake.
    pub rows: &'a [&'a [f32]],
    /// `rows × width` codes.
    pub codes: &'a mut [i8],
    /// One for each row.
    pub measures: &'a mut [Measures],
}

impl Operation for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.encoder.width;
        let mut computed = vec![0.0; self.rows.len() * width];
        images(simd, self.encoder, self.rows, &mut computed, self.measures);
        let codes = self.codes.chunks_exact_mut(width);
        for ((image, codes), measures) in computed.chunks_exact(width).zip(codes).zip(self.measures) {
            quantize(simd, self.encoder, image, codes, measures);
        }
    }
}

/// Rows with their codes.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    codes: Vec<i8>,
    width: usize,
    /// One for each row.
    pub measures: Vec<Measures>,
}

impl Encoded {
    /// Encodes rows in the place of those before.
    #[inline(always)]
    pub fn refill<S: Simd>(&mut self, simd: S, encoder: &Encoder, rows: &[&[f32]]) {
        self.measures.clear();
        self.measures.resize(rows.len(), Measures::default());
        self.codes.resize(rows.len() * encoder.width, 0);
        self.width = encoder.width;
        Encode { encoder, rows, codes: &mut self.codes, measures: &mut self.measures }.run(simd);
    }

    /// Room for `rows` rows of `width` codes.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn zeroed(rows: usize, width: usize) -> Result<Self, Error> {
        Ok(Self { codes: zeroed(&[rows, width])?, width, measures: zeroed(&[rows])? })
    }

    /// The codes of a row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.width..][..self.width]
    }

    /// The rows by rising ε, in steps of an eighth: within a step they keep their order.
    pub fn by_error(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.measures.len() as u32).collect();
        order.sort_by_cached_key(|&row| (8.0 * self.measures[row as usize].total.log2()) as i32);
        order
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.codes.len() + size_of_val(&*self.measures)
    }
}

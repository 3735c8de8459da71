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
//! - r: with e the error of z, |r² − r*²| ≤ g := 2‖z‖e + e² + 10⁻¹²‖w‖², hence |r − r*| ≤ min(√g, g/r).
//! - H: each butterfly rounds once; log₂ of the block of them and the final scaling cost
//!   (log₂ block + 2)·u·‖t‖.
//!
//! Sums of squares are taken in f64 by the canonical distance; the factor [`SLACK`] covers them too.

mod basis;
mod codes;
mod gemm;
mod search;

pub use basis::{Basis, mean, sample};
pub use codes::{Block, Codes, GROUPS, QUERIES, TILE, bound, maxima, products};
pub use search::{STRETCH, Scratch, Search};

use crate::distance::pair;
use crate::error::Error;
use crate::matrix::{Matrix, zeroed};
use crate::random::splitmix64;
use crate::simd::{Level, Operation, Simd};
use crate::threads::Context;
use gemm::multiply;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Factor on lengths that covers f64 rounding anywhere in the bound: rows have fewer than 10⁶ columns,
/// so sums of squares are right to 10⁻¹⁰.
pub const SLACK: f64 = 1.0 + 1e-9;

/// What underflow of any f32 operation above can add to a length.
const UNDERFLOW: f64 = 1e-37;

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
    limit: i32,
}

/// What is known of an encoded row beside its codes; the names are those of the file's header.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measures {
    /// |X|².
    pub norm: i32,
    /// ΣX.
    pub sum: i32,
    /// a, of the computed image.
    pub computed: f64,
    /// e, of rounding to codes.
    pub rounded: f64,
    /// out, of clipping.
    pub clipped: f64,
    /// ε, all of them together.
    pub total: f64,
    /// r, the length that the basis leaves out.
    residual: f64,
}

impl Encoder {
    /// A map of `width` codes (a multiple of [`STEP`]) in the basis, scaled to the rows of a bank. No
    /// basis keeps all columns, at [`Encoder::full_width`].
    pub fn new(context: &Context<'_>, rows: Matrix<'_>, mean: Vec<f32>, basis: Option<Basis>, width: usize) -> Self {
        let signs = (0..width as u64).map(|i| if splitmix64(i) & 1 == 0 { 1.0 } else { -1.0 }).collect();
        let limit = Self::limit_of(context.level());
        let block = 1 << width.trailing_zeros();
        let mut encoder = Self { mean, basis, width, block, signs, shift: 0.0, step: 1.0, limit };
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
        let mut encoded = Encoded { codes: zeroed(&[named.len(), width])?, width, measures: zeroed(&[named.len()])? };
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
        let mut run = |encoder: &Self| {
            let mut measures = vec![Measures::default(); sample.len()];
            let batches = sample.chunks(BATCH).zip(images.chunks_mut(BATCH * self.width));
            for ((rows, images), measures) in batches.zip(measures.chunks_mut(BATCH)) {
                context.level().run(Images { encoder, rows, out: images, measures });
            }
            measures
        };
        let measures = run(self);
        let residuals: f64 = measures.iter().map(|measures| measures.residual).sum();
        let shift = (residuals / sample.len() as f64) as f32;
        run(&Self { shift, ..self.clone() });
        self.shift = shift;
        let square = |&t: &f32| f64::from(t) * f64::from(t);
        let deviation = (images.iter().map(square).sum::<f64>() / images.len() as f64).sqrt();
        let largest = images.iter().fold(0.0_f32, |largest, t| largest.max(t.abs()));
        let span = (SPAN * deviation).min(f64::from(largest)) as f32 / self.limit as f32;
        // Sixteen bits of mantissa, so that step times a code is exact in f32.
        let short = f32::from_bits((span.max(1e-30).to_bits() + 0xff) & !0xff);
        self.step = short;
    }

    /// T / step of the header, squared: the squared distance of codes up to which a pair may be near.
    ///
    /// `tau` is the distance that counts as near, `error` the largest ε of the rows considered.
    #[inline(always)]
    fn reach(&self, query: &Measures, tau: f64, error: f64) -> f64 {
        let near = tau * SLACK + query.computed + error;
        let inside = (near * near - query.clipped * query.clipped).max(0.0).sqrt();
        let reach = (query.rounded + inside) * SLACK / f64::from(self.step);
        reach * reach
    }

    /// The right side of (3): a pair may be near only if its product is at least this.
    #[inline(always)]
    pub fn threshold(&self, query: &Measures, tau: f64, error: f64) -> i32 {
        // The conversion saturates: far below every product, or just above the padding's.
        ((f64::from(query.norm) - self.reach(query, tau, error)) * 0.5).floor() as i32
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

/// The images t of some rows, and their measures up to `computed`.
struct Images<'a> {
    encoder: &'a Encoder,
    rows: &'a [&'a [f32]],
    out: &'a mut [f32],
    measures: &'a mut [Measures],
}

impl Operation for Images<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        images(simd, self.encoder, self.rows, self.out, self.measures);
    }
}

#[inline(always)]
fn images<S: Simd>(simd: S, encoder: &Encoder, rows: &[&[f32]], images: &mut [f32], measures: &mut [Measures]) {
    let (cols, width) = (encoder.mean.len(), encoder.width);
    let mut centred = vec![0.0_f32; rows.len() * cols];
    for (row, centred) in rows.iter().zip(centred.chunks_exact_mut(cols)) {
        for ((w, &x), &mean) in centred.iter_mut().zip(*row).zip(&encoder.mean) {
            *w = x - mean;
        }
    }
    if let Some(basis) = &encoder.basis {
        multiply(simd, &centred, cols, basis.columns(), width, images);
    } else {
        for (image, centred) in images.chunks_exact_mut(width).zip(centred.chunks_exact(cols)) {
            image[..cols].copy_from_slice(centred);
            image[cols..].fill(0.0);
        }
    }
    let zeros = vec![0.0; width];
    let mut scratch = vec![0.0; width];
    for ((row, image), measures) in rows.iter().zip(images.chunks_exact_mut(width)).zip(measures) {
        let squared = pair(simd, row, &encoder.mean);
        let length = squared.sqrt();
        let mut error = U * length;
        if let Some(basis) = &encoder.basis {
            let prefix = pair(simd, image, &zeros);
            error += basis.error * length;
            let residual = (squared - prefix).max(0.0).sqrt();
            let gap = 2.0 * prefix.sqrt() * error + error * error + 1e-12 * squared;
            let gap = if residual > 0.0 { gap.sqrt().min(gap / residual) } else { gap.sqrt() };
            image[width - 1] = (residual - f64::from(encoder.shift)) as f32;
            error = error.hypot(gap + U * (residual + f64::from(encoder.shift.abs())));
            measures.residual = residual;
        }
        let image_length = pair(simd, image, &zeros).sqrt();
        error += (f64::from(encoder.block.trailing_zeros()) + 2.0) * U * image_length;
        mix(image, &encoder.signs, encoder.block, &mut scratch);
        measures.computed = error * SLACK + UNDERFLOW * (cols as f64);
    }
}

/// H of the header: signs, then orthonormal Walsh–Hadamard butterflies over blocks. Neighbouring
/// coordinates go to different blocks, so that all blocks get a like share of the variance.
#[inline(always)]
fn mix(image: &mut [f32], signs: &[f32], block: usize, scratch: &mut [f32]) {
    let blocks = image.len() / block;
    for (i, (value, sign)) in image.iter().zip(signs).enumerate() {
        scratch[(i % blocks) * block + i / blocks] = value * sign;
    }
    let mut half = 1;
    while half < block {
        for pairs in scratch.chunks_exact_mut(2 * half) {
            let (low, high) = pairs.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = (1.0 / (block as f64).sqrt()) as f32;
    for (value, mixed) in image.iter_mut().zip(&*scratch) {
        *value = mixed * scale;
    }
}

/// The codes of an image, and the measures that come with them.
#[inline(always)]
fn quantize<S: Simd>(simd: S, encoder: &Encoder, image: &[f32], codes: &mut [i8], measures: &mut Measures) {
    let (limit, step) = (encoder.limit as f32, encoder.step);
    let edge = limit * step;
    let inverse = 1.0 / step;
    let mut clipped = vec![0.0_f32; image.len()];
    let mut decoded = vec![0.0_f32; image.len()];
    let (mut norm, mut sum) = (0, 0);
    for (i, &t) in image.iter().enumerate() {
        // Adding and subtracting 1.5·2²³ rounds to the nearest integer.
        let code = (t * inverse).clamp(-limit, limit) + 12_582_912.0 - 12_582_912.0;
        codes[i] = code as i8;
        clipped[i] = t.clamp(-edge, edge);
        decoded[i] = code * step;
        norm += code as i32 * code as i32;
        sum += code as i32;
    }
    measures.norm = norm;
    measures.sum = sum;
    measures.rounded = pair(simd, &clipped, &decoded).sqrt();
    measures.clipped = pair(simd, image, &clipped).sqrt();
    measures.total = (pair(simd, image, &decoded).sqrt() + measures.computed) * SLACK;
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
#[derive(Clone, Debug)]
pub struct Encoded {
    codes: Vec<i8>,
    width: usize,
    /// One for each row.
    pub measures: Vec<Measures>,
}

impl Encoded {
    /// The codes of a row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.width..][..self.width]
    }

    /// The rows by rising ε, in steps of an eighth: within a step they keep their order.
    pub fn by_error(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.measures.len() as u32).collect();
        order.sort_by_cached_key(|&row| (8.0 * self.measures[row as usize].total.max(1e-300).log2()) as i32);
        order
    }
}

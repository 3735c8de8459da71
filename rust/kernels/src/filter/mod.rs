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
//! - H: each butterfly rounds once; log₂ of the block of them and the signs, which carry the scale, cost
//!   (log₂ block + 2)·u·‖t‖.
//!
//! - Sums of n squares in f32, for ‖w‖, ‖z‖, e, out and ε, err by (n/16 + 24)·u of themselves; half of that
//!   is the share of a length. Underflow may take 10⁻¹⁶ from one.
//!
//! The f64 sums of the canonical distance are covered by [`SLACK`].

mod basis;
mod codes;
mod encode;
mod gemm;
mod probe;
mod search;

use basis::{Basis, sample};
pub(crate) use codes::{Block, Codes, GROUPS, QUERIES, TILE, maxima, products};
pub(crate) use probe::{Coded, Plan};
pub(crate) use search::{STRETCH, Scratch, Search, Second};

use crate::context::Context;
use crate::error::Error;
use crate::math::log2f;
use crate::matrix::{Matrix, zeroed};
use crate::random::splitmix64;
use crate::simd::{Operation, Simd};
pub(crate) use encode::Workspace;
use encode::{Encode, Imagine};

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Factor on lengths that covers f64 rounding anywhere in the bound: rows have fewer than 10⁶ columns,
/// so sums of squares are right to 10⁻¹⁰.
pub(crate) const SLACK: f64 = 1.0 + 1e-9;

/// The width of codes is a multiple of this.
pub(crate) const STEP: usize = 64;

/// Codes wider than this could overflow the i32 of a product, or reach the products of padding rows.
pub(crate) const WIDEST: usize = 16_384;

/// Rows encoded at a time: they stay in the second-level cache.
const BATCH: usize = 48;

/// How many deviations of the coordinates the codes span; rows beyond are clipped, and know it.
const SPAN: f64 = 4.5;

/// The map from rows to codes.
#[derive(Clone, Debug)]
pub(crate) struct Encoder {
    mean: Vec<f32>,
    /// None: the identity, and no residual.
    basis: Option<Basis>,
    width: usize,
    /// Length of the Walsh–Hadamard blocks: the largest power of two that divides the width.
    block: usize,
    /// Random, times the scale that makes the butterflies orthonormal.
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
pub(crate) struct Measures {
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

impl Encoder {
    /// A map of `width` codes (a multiple of [`STEP`]) in the basis, scaled to the rows of a bank. No
    /// basis keeps all columns, at [`Encoder::full_width`].
    pub(crate) fn new(
        context: &Context<'_>,
        rows: Matrix<'_>,
        mean: Vec<f32>,
        basis: Option<Basis>,
        width: usize,
    ) -> Self {
        let limit = context.level().code_limit();
        let block = 1_usize << width.trailing_zeros();
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        let signs = (0..width as u64).map(|i| if splitmix64(i) & 1 == 0 { scale } else { -scale }).collect();
        let mut encoder = Self { mean, basis, width, block, signs, shift: 0.0, step: 1.0, per_code: 1.0, limit };
        encoder.scale(context, rows);
        encoder
    }

    /// Fits a basis and a map of `width` codes to the rows of a bank.
    #[cfg(test)]
    pub(crate) fn fit(context: &Context<'_>, rows: Matrix<'_>, width: usize) -> Self {
        let mean = basis::mean(rows);
        let narrow = width < Self::full_width(rows.cols());
        let basis = narrow.then(|| Basis::fit(context, rows, &mean, width).unwrap());
        Self::new(context, rows, mean, basis, width)
    }

    /// The width at which all of `cols` columns are kept.
    pub(crate) fn full_width(cols: usize) -> usize {
        cols.next_multiple_of(STEP)
    }

    /// Codes of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Largest magnitude of a code.
    pub(crate) fn limit(&self) -> i32 {
        self.limit
    }

    /// Encodes the named rows, in parallel.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn encode(&self, context: &Context<'_>, rows: Matrix<'_>, named: &[u32]) -> Result<Encoded, Error> {
        let width = self.width;
        let count = named.len();
        let mut encoded = Encoded { codes: zeroed(&[count, width])?, width, measures: zeroed(&[count])? };
        let level = context.level();
        let outputs = encoded.codes.chunks_mut(BATCH * width).zip(encoded.measures.chunks_mut(BATCH));
        context.for_each(
            named.chunks(BATCH).zip(outputs),
            Workspace::default,
            |workspace, (named, (codes, measures))| {
                let rows: Vec<&[f32]> = named.iter().map(|&row| rows.row(row as usize)).collect();
                level.run(Encode { encoder: self, rows: &rows, codes, measures, workspace });
            },
        )?;
        Ok(encoded)
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        4 * (self.mean.len() + self.signs.len()) + self.basis.as_ref().map_or(0, Basis::nbytes)
    }

    /// Chooses the shift of r and the step from a sample of the rows.
    fn scale(&mut self, context: &Context<'_>, rows: Matrix<'_>) {
        let sample: Vec<&[f32]> = sample(rows.rows(), 512).map(|row| rows.row(row)).collect();
        let mut images = vec![0.0; sample.len() * self.width];
        let mut run = |encoder: &Self| -> f64 {
            let batches = sample.chunks(BATCH).zip(images.chunks_mut(BATCH * self.width));
            let residuals = batches.map(|(rows, images)| context.level().run(Imagine { encoder, rows, out: images }));
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
    pub(crate) fn near(&self, query: &Measures, tau: f64) -> Near {
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
pub(crate) struct Near {
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
    pub(crate) fn threshold(&self, error: f64) -> i32 {
        let near = self.tau + error;
        // Few queries are clipped, and a root takes as long as all the rest.
        let far = if self.clipped == 0.0 { near } else { (near * near - self.clipped).max(0.0).sqrt() };
        let reach = (self.rounded + far) * self.per_code;
        // The conversion saturates: far below every product, or just above the padding's.
        ((self.norm - reach * reach) * 0.5).floor() as i32
    }
}

/// Rows with their codes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoded {
    codes: Vec<i8>,
    width: usize,
    /// One for each row.
    pub measures: Vec<Measures>,
}

impl Encoded {
    /// Encodes rows in the place of those before.
    #[inline(always)]
    pub(crate) fn refill<S: Simd>(&mut self, simd: S, encoder: &Encoder, rows: &[&[f32]], workspace: &mut Workspace) {
        self.measures.clear();
        self.measures.resize(rows.len(), Measures::default());
        self.codes.resize(rows.len() * encoder.width, 0);
        self.width = encoder.width;
        Encode { encoder, rows, codes: &mut self.codes, measures: &mut self.measures, workspace }.run(simd);
    }

    /// The codes of a row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.width..][..self.width]
    }

    /// The rows by rising ε, in steps of an eighth: within a step they keep their order.
    pub(crate) fn by_error(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.measures.len() as u32).collect();
        order.sort_by_cached_key(|&row| (8.0 * log2f(self.measures[row as usize].total)) as i32);
        order
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        self.codes.len() + size_of_val(&*self.measures)
    }
}

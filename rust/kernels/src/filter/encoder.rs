//! The map from rows to codes, its stages, and what is known of an encoded row.

use super::basis::{self, Basis, sample};
use super::encode::{ComputeImages, Encode, EncodeScratch};
use super::{SLACK, SPAN, STEP};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::{Matrix, zeroed};
use crate::random::splitmix64;
use crate::simd::{LANES, Simd};

/// Rows encoded at a time: they stay in the second-level cache.
pub(super) const BATCH_ROWS: usize = 48;

/// Rows whose images set the scale of a stage.
const SCALE_ROWS: usize = 512;

/// A query is encoded by a coarser step where clipping costs this many times what rounding does.
const CLIPPED_SHARE: f32 = 2.0;

/// The map from rows to codes of several widths, one a stage.
#[derive(Clone, Debug)]
pub(crate) struct Encoder {
    pub(super) mean: Vec<f32>,
    /// For the stages that do not keep all columns.
    pub(super) basis: Option<Basis>,
    stages: Vec<Stage>,
}

/// What is made of a rotated row: codes of one width.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    width: usize,
    /// Whether all columns are kept as they are, and nothing is left out.
    pub(super) whole: bool,
    /// Length of the Walsh–Hadamard blocks: the largest power of two that divides the width.
    pub(super) block: usize,
    /// Random, times the scale that makes the butterflies orthonormal.
    pub(super) signs: Vec<f32>,
    pub(super) shift: f32,
    pub(super) step: f32,
    /// `SLACK / step`.
    per_code: f64,
    pub(super) limit: i32,
    /// The largest [`Measures::coarser`]: beyond, products could overflow.
    pub(super) coarsest: u32,
}

/// What is known of an encoded row beside its codes; the names are those of the folder's header. Errors are
/// rounded up to f32, `clipped` down.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measures {
    /// |X|².
    pub norm: i32,
    /// ΣX.
    pub sum: i32,
    /// s: the codes are multiples of 2ˢ steps; 0 for rows of a bank.
    pub coarser: u32,
    /// a, of the computed image.
    pub computed: f32,
    /// e, of rounding to codes.
    pub rounded: f32,
    /// out, of clipping.
    pub clipped: f32,
    /// ε, all of them together.
    pub epsilon: f32,
}

impl Encoder {
    /// The map of the given widths, fitted and scaled to the rows of a bank. Widths are multiples of [`LANES`], in
    /// rising order; one that reaches [`Encoder::whole_width`] keeps all columns. Where no basis is worth a try, the
    /// narrower ones are left out.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(crate) fn fit(context: &Context<'_>, rows: Matrix<'_>, widths: &[usize]) -> Result<Self, Error> {
        let whole = Self::whole_width(rows.cols());
        let mean = basis::mean(rows);
        let widest = widths.iter().copied().filter(|&width| width < whole).max();
        let basis = match widest {
            Some(width) => Basis::fit(context, rows, &mean, width.next_multiple_of(STEP))?,
            None => None,
        };
        let mut encoder = Self { mean, basis, stages: Vec::with_capacity(widths.len()) };
        for &width in widths {
            if width >= whole || encoder.basis.is_some() {
                let stage = encoder.scaled(context, rows, width);
                encoder.stages.push(stage);
            }
        }
        Ok(encoder)
    }

    /// The width at which all of `cols` columns are kept.
    pub(crate) fn whole_width(cols: usize) -> usize {
        cols.next_multiple_of(STEP)
    }

    /// The stages, by rising width.
    pub(crate) fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// The same map without the stages that `keep` does not name.
    pub(crate) fn with_stages(mut self, keep: &[usize]) -> Self {
        self.stages = keep.iter().map(|&stage| self.stages[stage].clone()).collect();
        let narrow = self.stages.iter().filter(|stage| !stage.whole);
        let widest = narrow.map(|stage| stage.width.next_multiple_of(STEP)).max();
        self.basis = self.basis.and_then(|basis| widest.map(|width| basis.narrowed(width)));
        self
    }

    /// Encodes all rows, in parallel: their codes and measures, stage by stage.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn encode(&self, context: &Context<'_>, rows: Matrix<'_>) -> Result<Vec<Encoded>, Error> {
        self.encode_and_rotate(context, rows, 0).map(|(encoded, _)| encoded)
    }

    /// As [`Encoder::encode`], and the first `dims` coordinates of each rotated row.
    ///
    /// # Errors
    /// As [`Encoder::encode`].
    pub(super) fn encode_and_rotate(
        &self,
        context: &Context<'_>,
        rows: Matrix<'_>,
        dims: usize,
    ) -> Result<(Vec<Encoded>, Vec<f32>), Error> {
        let mut encoded = Vec::with_capacity(self.stages.len());
        for stage in &self.stages {
            encoded.push(Encoded::zeroed(stage.width, rows.rows())?);
        }
        let mut leading = zeroed(&[rows.rows(), dims])?;
        let batches = rows.rows().div_ceil(BATCH_ROWS);
        let mut outputs: Vec<Vec<EncodedPart<'_>>> =
            (0..batches).map(|_| Vec::with_capacity(self.stages.len())).collect();
        for encoded in &mut encoded {
            let codes = encoded.codes.chunks_mut(BATCH_ROWS * encoded.width);
            let each = codes.zip(encoded.measures.chunks_mut(BATCH_ROWS)).zip(&mut outputs);
            each.for_each(|((codes, measures), outputs)| outputs.push(EncodedPart { codes, measures }));
        }
        let mut leading_parts = leading.chunks_mut((BATCH_ROWS * dims).max(1));
        let items: Vec<_> = (0..batches)
            .zip(outputs)
            .map(|(batch, outputs)| (batch, outputs, leading_parts.next().unwrap_or_default()))
            .collect();
        let level = context.level();
        context.for_each(items.into_iter(), EncodeScratch::default, |scratch, (batch, mut outputs, leading)| {
            let batch = batch * BATCH_ROWS..rows.rows().min((batch + 1) * BATCH_ROWS);
            let rows: Vec<&[f32]> = batch.map(|row| rows.row(row)).collect();
            level.run(Encode { encoder: self, rows: &rows, outputs: &mut outputs, leading, coarser: false, scratch });
        })?;
        Ok((encoded, leading))
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        let signs: usize = self.stages.iter().map(|stage| stage.signs.len()).sum();
        4 * (self.mean.len() + signs) + self.basis.as_ref().map_or(0, Basis::nbytes)
    }

    /// A stage whose shift of r and step are those of a sample of the rows.
    fn scaled(&self, context: &Context<'_>, rows: Matrix<'_>, width: usize) -> Stage {
        let limit = context.level().code_limit();
        let block = 1_usize << width.trailing_zeros();
        let scale = (1.0 / (block as f64).sqrt()) as f32;
        let signs = (0..width as u64).map(|i| if splitmix64(i) & 1 == 0 { scale } else { -scale }).collect();
        let whole = width >= Self::whole_width(rows.cols());
        // A product, rows offset, stays within 2²⁸ after it is multiplied by 2ˢ: far above those of padding.
        let largest = (limit + context.level().code_offset()) as usize * limit as usize * width;
        let coarsest = ((1_usize << 28) / largest).max(1).ilog2();
        let mut stage = Stage { width, whole, block, signs, shift: 0.0, step: 1.0, per_code: 1.0, limit, coarsest };
        let sample: Vec<&[f32]> = sample(rows.rows(), SCALE_ROWS).map(|row| rows.row(row)).collect();
        let mut images = vec![0.0; sample.len() * width];
        let mut compute = |stage: &Stage| -> f64 {
            let batches = sample.chunks(BATCH_ROWS).zip(images.chunks_mut(BATCH_ROWS * width));
            let compute = |(rows, images)| context.level().run(ComputeImages { encoder: self, stage, rows, images });
            batches.map(compute).sum()
        };
        if !whole {
            stage.shift = (compute(&stage) / sample.len() as f64) as f32;
        }
        compute(&stage);
        let square = |&t: &f32| f64::from(t) * f64::from(t);
        let deviation = (images.iter().map(square).sum::<f64>() / images.len() as f64).sqrt();
        let largest = images.iter().fold(0.0_f32, |largest, t| largest.max(t.abs()));
        let span = (SPAN * deviation).min(f64::from(largest)) as f32 / limit as f32;
        // Sixteen bits of mantissa, so that step times a code is exact in f32.
        let short = f32::from_bits((span.max(1e-30).to_bits() + 0xff) & !0xff);
        stage.step = short;
        stage.per_code = SLACK / f64::from(short);
        stage
    }
}

impl Stage {
    /// Codes of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Largest magnitude of a code.
    pub(crate) fn limit(&self) -> i32 {
        self.limit
    }

    /// What (3) needs to know of a query whose near rows are those within `tau`.
    #[inline(always)]
    pub(crate) fn bound(&self, query: &Measures, tau: f64) -> Bound {
        let clipped = f64::from(query.clipped);
        Bound {
            tau: tau * SLACK + f64::from(query.computed),
            clipped: clipped * clipped,
            rounded: f64::from(query.rounded),
            norm: f64::from(query.norm) * f64::from(1_u32 << (2 * query.coarser)),
            per_code: self.per_code,
        }
    }

    /// By how much the codes of a query must be coarser for none to be clipped, as far as products allow.
    #[inline(always)]
    pub(super) fn coarser(&self, measures: &Measures, image: &[f32]) -> u32 {
        if measures.clipped <= CLIPPED_SHARE * measures.rounded {
            return 0;
        }
        let largest = image.iter().fold(0.0_f32, |largest, t| largest.max(t.abs()));
        let mut span = self.limit as f32 * self.step;
        let mut coarser = 0;
        while span < largest && coarser < self.coarsest {
            span *= 2.0;
            coarser += 1;
        }
        coarser
    }
}

/// A query and its τ: the right side of (3), but for ε.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    tau: f64,
    clipped: f64,
    rounded: f64,
    norm: f64,
    per_code: f64,
}

impl Bound {
    /// The right side of (3) for rows that err by at most `epsilon`: a pair may be near only if its product
    /// is at least this.
    #[inline(always)]
    pub(crate) fn threshold(&self, epsilon: f64) -> i32 {
        let near = self.tau + epsilon;
        // Few queries are clipped, and a root takes as long as all the rest.
        let far = if self.clipped == 0.0 { near } else { (near * near - self.clipped).max(0.0).sqrt() };
        let reach = (self.rounded + far) * self.per_code;
        // Products are integers, so what reaches a bound reaches the integer above it. The conversion saturates: below
        // every product, or above.
        ((self.norm - reach * reach) * 0.5).ceil() as i32
    }
}

/// Rows with their codes of one stage.
#[derive(Clone, Debug, Default)]
pub(crate) struct Encoded {
    pub(super) codes: Vec<i8>,
    pub(super) width: usize,
    /// One for each row.
    pub measures: Vec<Measures>,
}

/// Where the codes and measures of some rows go.
#[derive(Debug)]
pub(crate) struct EncodedPart<'a> {
    /// Row after row.
    pub codes: &'a mut [i8],
    /// One for each row.
    pub measures: &'a mut [Measures],
}

impl Encoded {
    /// Room for `count` rows.
    pub(super) fn zeroed(width: usize, count: usize) -> Result<Self, Error> {
        Ok(Self { codes: zeroed(&[count, width])?, width, measures: zeroed(&[count])? })
    }

    /// The codes of a row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[i8] {
        &self.codes[row * self.width..][..self.width]
    }
}

/// The shifted product of two encoded rows: X·Y − ⌊|Y|²/2⌋.
#[inline(always)]
pub(crate) fn shifted_dot<S: Simd>(simd: S, x: &[i8], (y, measures): (&[i8], &Measures)) -> i32 {
    let (x, y): (&[[i8; 64]], &[[i8; 64]]) = (x.as_chunks().0, y.as_chunks().0);
    let mut lanes = simd.splat_i32(0);
    for (x, y) in x.iter().zip(y) {
        let mut offset = *x;
        for code in &mut offset {
            *code = code.wrapping_add(S::CODE_OFFSET as u8 as i8);
        }
        lanes = simd.dot(lanes, simd.load_codes(&offset), simd.load_codes(y));
    }
    simd.sum_i32(lanes) - (measures.norm >> 1) - S::CODE_OFFSET * measures.sum
}

const _: () = assert!(STEP.is_multiple_of(LANES));

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    /// A stage of 16 codes of half a unit each.
    fn stage() -> Stage {
        let values: Vec<f32> = (0..300 * 90).map(|i| ((i % 90 * (i / 90 + 1)) as f32).sin()).collect();
        let rows = Matrix::new("features", &values, 300, 90).unwrap();
        let encoder = Encoder::fit(&Context::new(Level::Scalar, 1), rows, &[16, 128]).unwrap();
        Stage { step: 0.5, per_code: SLACK / 0.5, ..encoder.stages()[0].clone() }
    }

    #[test]
    fn a_query_is_coarser_by_as_little_as_keeps_it_from_clipping() {
        let stage = stage();
        let clipped = Measures { rounded: 0.5, clipped: 1.5, ..Measures::default() };
        for coarser in 0..stage.coarsest + 3 {
            let span = stage.limit as f32 * stage.step * (1_u64 << coarser) as f32;
            for (sign, at) in [(1.0, 0), (-1.0, 15)] {
                let mut image = [0.0; 16];
                image[at] = sign * span;
                assert_eq!(stage.coarser(&clipped, &image), coarser.min(stage.coarsest));
                image[at] = sign * span.next_up();
                assert_eq!(stage.coarser(&clipped, &image), (coarser + 1).min(stage.coarsest));
                // What is clipped is as little as rounding costs.
                let few = Measures { rounded: 0.5, clipped: 1.0, ..Measures::default() };
                assert_eq!(stage.coarser(&few, &image), 0);
            }
        }
        assert!(stage.coarsest > 2);
    }

    #[test]
    fn thresholds_are_those_of_the_proof() {
        let stage = stage();
        let query =
            Measures { norm: 1000, coarser: 2, computed: 0.25, rounded: 1.5, clipped: 3.0, ..Measures::default() };
        // (4² · 1000 − ((1.5 + √((4 + 0.25 + 0.75)² − 3²)) / 0.5)²) / 2, rounded up.
        assert_eq!(stage.bound(&query, 4.0).threshold(0.75), 7940);
        // Not clipped.
        let inside = Measures { clipped: 0.0, ..query };
        assert_eq!(stage.bound(&inside, 4.0).threshold(0.75), 7916);
        // Farther out than anything near can be.
        assert_eq!(stage.bound(&query, 1.0).threshold(0.5), 7996);
        // Nearly everything is near, or nothing is.
        assert_eq!(stage.bound(&query, f64::INFINITY).threshold(0.0), i32::MIN);
        assert_eq!(stage.bound(&query, 1e9).threshold(0.0), i32::MIN);
    }

    #[test]
    fn a_threshold_has_slack_for_the_rounding_of_two_lengths() {
        let stage = stage();
        let query = Measures { norm: 100_000, ..Measures::default() };
        // 300 steps, but for what a distance and a bound may lose: the product of a pair there is 5000.
        for lost in [0.0, 1e-9, 1.9e-9] {
            assert_eq!(stage.bound(&query, 150.0 * (1.0 - lost)).threshold(0.0), 5000);
        }
        assert_eq!(stage.bound(&query, 150.0 * (1.0 - 2.1e-9)).threshold(0.0), 5001);
    }
}

//! The codes of a bank's rows: stages of rising width over one order of rows.

use super::codes::{Codes, TILE};
use super::encoder::{Encoded, Encoder};
use super::{SMALLEST, tree};
use crate::context::Context;
use crate::error::Error;
use crate::math::log2f;
use crate::matrix::Matrix;
use crate::simd::LANES;
use crate::top_k::Wanted;

/// Leading coordinates by which rows are ordered.
const ORDER_DIMS: usize = 16;

/// Rows whose codes err more than most, by this factor in any stage, come last: they would spoil the bounds of the
/// tiles they share.
const UNUSUAL: f32 = 1.2;

/// Tiles of a stage share a threshold where their ε lie in the same step; there are so many steps to a factor of two.
const CLASSES_PER_OCTAVE: f64 = 8.0;

/// A search needs so many tiles for each wanted row, or goes without codes: the first thresholds would come from most of
/// the bank. Few rows are worth codes sooner, but for noise (`benches/NOTES.md`). Tests search any bank through its codes.
const TILES_A_ROW: usize = if cfg!(test) { 0 } else { 4 };
const TILES_A_ROW_OF_FEW: usize = if cfg!(test) { 0 } else { 1 };
const FEW_ROWS: usize = 64;

/// Among fewer rows a search goes without codes: those of the queries would cost more than distances.
const FEWEST_ROWS: usize = if cfg!(test) { 1 } else { SMALLEST };

/// The first thresholds come from tiles whose centroids are nearest by codes at least this wide.
const CENTROID_WIDTH: usize = 32;

/// Encoded rows of a bank.
#[derive(Clone, Debug)]
pub(crate) struct Cascade {
    pub(super) encoder: Encoder,
    /// By rising width.
    pub(super) stages: Vec<StageCodes>,
    /// The row in each slot of the codes.
    pub(super) order: Vec<u32>,
    /// Of each tile, by the codes of one stage.
    pub(super) centroids: Codes,
    pub(super) centroid_stage: usize,
}

/// The codes of one stage.
#[derive(Clone, Debug)]
pub(super) struct StageCodes {
    pub(super) codes: Codes,
    /// The class of each tile.
    pub(super) class: Vec<u8>,
    /// The largest ε of each class.
    pub(super) epsilons: Vec<f64>,
}

impl Cascade {
    /// Encodes the rows of a bank by codes of the given widths; `None` where [`Encoder::fit`] leaves none of them.
    /// The rows of each group, of which `ends` are the ends, have the slots of their numbers.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn new(
        context: &Context<'_>,
        rows: Matrix<'_>,
        ends: &[usize],
        widths: &[usize],
    ) -> Result<Option<Self>, Error> {
        let encoder = Encoder::fit(context, rows, widths)?;
        if encoder.stages().is_empty() {
            return Ok(None);
        }
        let dims = ORDER_DIMS.min(rows.cols().next_multiple_of(LANES));
        let (encoded, leading) = encoder.encode_and_rotate(context, rows, dims)?;
        let mut order = tree::order(context, &leading, dims, TILE, ends)?;
        drop(leading);
        context.poll()?;
        put_unusual_last(&mut order, &encoded, ends);
        let offset = context.level().code_offset();
        let mut stages: Vec<Result<StageCodes, Error>> = Vec::with_capacity(encoded.len());
        stages.resize_with(encoded.len(), || Err(Error::Cancelled));
        // The widest takes longest, so it comes first; the others find room in the memory that it leaves.
        context.for_each_long(
            stages.iter_mut().zip(encoded).rev(),
            || (),
            |(), (stage, encoded), pulse| {
                *stage = Codes::new(&encoded, &order, offset, Some(pulse)).map(StageCodes::new);
            },
        )?;
        let stages = stages.into_iter().collect::<Result<Vec<_>, _>>()?;
        context.poll()?;
        Ok(Some(Self::of_stages(encoder, stages, order)))
    }

    fn of_stages(encoder: Encoder, stages: Vec<StageCodes>, order: Vec<u32>) -> Self {
        let wide = stages.iter().position(|stage| stage.codes.width() >= CENTROID_WIDTH);
        let centroid_stage = wide.unwrap_or(stages.len() - 1);
        let centroids = stages[centroid_stage].codes.centroids();
        Self { encoder, stages, order, centroids, centroid_stage }
    }

    /// The same without the stages that `keep` does not name.
    pub(super) fn with_stages(self, keep: &[usize]) -> Self {
        let Self { encoder, stages, order, .. } = self;
        let named = stages.into_iter().enumerate().filter(|(stage, _)| keep.contains(stage));
        Self::of_stages(encoder.with_stages(keep), named.map(|(_, stage)| stage).collect(), order)
    }

    /// The map alone.
    pub(super) fn into_encoder(self) -> Encoder {
        self.encoder
    }

    /// Tiles of rows.
    pub(super) fn tiles(&self) -> usize {
        self.stages[0].codes.tiles()
    }

    /// Whether a search among so many `rows` should use the codes: the first thresholds for `k` rows come from the rows
    /// of the best tiles, and the level must be the kind that they were made for.
    pub(crate) fn serves(&self, context: &Context<'_>, wanted: Wanted, rows: usize) -> bool {
        let codes = &self.stages[0].codes;
        let level = context.level();
        let made_for = self.encoder.stages()[0].limit() == level.code_limit() && codes.offset() == level.code_offset();
        let enough = match wanted {
            Wanted::Nearest(k) => {
                let tiles_a_row = if k <= FEW_ROWS { TILES_A_ROW_OF_FEW } else { TILES_A_ROW };
                tiles_a_row * k <= rows.div_ceil(TILE)
            }
            Wanted::Within(_) => true,
        };
        enough && made_for && rows >= FEWEST_ROWS
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        let stages = self.stages.iter().map(|stage| stage.codes.nbytes() + stage.class.len());
        self.encoder.nbytes() + stages.sum::<usize>() + 4 * self.order.len() + self.centroids.nbytes()
    }
}

impl StageCodes {
    fn new(codes: Codes) -> Self {
        let tiles = 0..codes.tiles();
        let least = tiles.clone().map(|tile| codes.epsilon(tile)).fold(f64::INFINITY, f64::min);
        let step = |tile| (CLASSES_PER_OCTAVE * f64::from(log2f((codes.epsilon(tile) / least) as f32))) as u32;
        let mut steps: Vec<u32> = tiles.clone().map(step).collect();
        steps.sort_unstable();
        steps.dedup();
        steps.truncate(usize::from(u8::MAX));
        let class = |tile| steps.partition_point(|&each| each < step(tile)).min(steps.len() - 1) as u8;
        let class: Vec<u8> = tiles.clone().map(class).collect();
        let mut epsilons = vec![0.0_f64; steps.len()];
        for (tile, &class) in class.iter().enumerate() {
            let epsilon = &mut epsilons[usize::from(class)];
            *epsilon = epsilon.max(codes.epsilon(tile));
        }
        Self { codes, class, epsilons }
    }
}

/// Puts rows with unusual errors last in their group, in steps of a quarter octave; within a step they keep their order.
fn put_unusual_last(order: &mut [u32], encoded: &[Encoded], ends: &[usize]) {
    let medians = encoded.iter().map(|encoded| {
        let mut epsilons: Vec<f32> = encoded.measures.iter().map(|measures| measures.epsilon).collect();
        *epsilons.select_nth_unstable_by(order.len() / 2, f32::total_cmp).1
    });
    let medians: Vec<f32> = medians.collect();
    let step = |&row: &u32| {
        let excess = encoded.iter().zip(&medians);
        let excess = excess.map(|(encoded, median)| encoded.measures[row as usize].epsilon / median);
        (4.0 * log2f(excess.fold(0.0, f32::max) / UNUSUAL)).max(0.0).ceil() as u32
    };
    let mut start = 0;
    for &end in ends {
        order[start..end].sort_by_cached_key(step);
        start = end;
    }
}

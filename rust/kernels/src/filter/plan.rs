//! Chooses how rows are searched: without codes, or through codes of which widths.
//!
//! Narrow codes are multiplied faster, wide ones leave fewer rows to look at, and what pays depends on the data:
//! features of a network live in few dimensions, noise in all. So the probe tries. Its queries are some rows, the
//! middles of some pairs of rows, which lie among the rows rather than at their rim as patches of new images do, and
//! middles pushed out of the rows' subspace, as the patches of defects are. It searches them through codes of all
//! candidate widths, counts the tiles and rows that each width leaves at [`NEARNESS`] times their distances, and
//! takes the cheapest way by this count:
//!
//! ```text
//! nanoseconds of a query  =  tiles · Σ over stages (share left by the stage before · (PAIR + 16·width·PRODUCT))
//!                         +  rows left by the last stage · (columns·DISTANCE + FAR)
//!                         +  columns·(width of the basis)·ROTATE + (all widths)·MIX
//! without codes           =  rows·columns·PLAIN
//! ```
//!
//! with `FIRST_PAIR` for `PAIR` in the first stage.
//!
//! A selection compares the rows with each other, most of which find a near pick at once: its queries are some rows, at
//! their distances, and
//!
//! ```text
//! nanoseconds of a row    =  SEEN · picks · width·PRODUCT
//!                         +  SEEN · picks · (share left)·(PAIR + 16·width·PRODUCT + (all columns)·FETCH)
//!                         +  SEEN · picks · (share left by codes of all columns)·(columns·DISTANCE + FAR)
//!                         +  columns·(width of the basis)·ROTATE + (all widths)·MIX
//! without codes           =  SEEN · picks·columns·PLAIN
//! ```
//!
//! The choice decides speed, never answers.

use super::basis::sample;
use super::cascade::Cascade;
use super::codes::TILE;
use super::encode::EncodeScratch;
use super::encoder::{Encoded, Encoder};
use super::products::{Sink, tile_products};
use super::seeds::coded_queries;
use super::{STEP, WIDEST};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::random::splitmix64;
use crate::runs::Runs;
use crate::simd::{LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};

/// Fewer rows are searched without codes.
pub(super) const SMALLEST: usize = 256;

/// Widths that are tried, beside that of all columns. Wider ones cost more to rotate by than they save
/// (`benches/NOTES.md`).
const WIDTHS: [usize; 4] = [16, 32, 64, 128];

/// Queries of each kind.
const PROBES: usize = 16;

/// Tiles on which shares are counted.
const SAMPLE_TILES: usize = 128;

/// How near a query is taken to be, in distances to its nearest row: new images are often farther.
const NEARNESS: [f64; 2] = [1.0, 1.05];

/// The share of the picks that a selection compares a row with: of features of networks 0.5 to 1.
const SEEN: f64 = 0.75;

/// Rows that a selection's probe searches: as many as there will be picks, or these.
const SELECTION_ROWS: usize = 16_384;

// Measured at AVX-512 VNNI, in nanoseconds. At other levels, what is not a product of codes keeps about the same
// proportions.

/// Of a query and a tile: fetching, comparing, listing; and in the first stage, where all queries come in turn.
const PAIR: f64 = 1.5;
const FIRST_PAIR: f64 = 0.4;
/// Of a product of two codes, times [`Simd::DOT_COST`]; by a matrix unit, this share of it.
const PRODUCT: f64 = 0.0038;
const UNIT_SHARE: f64 = 0.3;
/// Of a product of two f32 when a query is rotated; of a coordinate that is mixed and rounded.
const ROTATE: f64 = 0.021;
const MIX: f64 = 2.0;
/// Of fetching a whole code of a row, and its product, where a selection looks rows up one by one.
const FETCH: f64 = 0.045;
/// Of a squared difference in f64, its row streaming by or from anywhere; of fetching that row.
const PLAIN: f64 = 0.135;
const DISTANCE: f64 = 0.25;
const FAR: f64 = 100.0;

/// What a row takes beside its codes: half its norm in each stage; its number, and a share of its tile's centroid, ε
/// and classes.
const PER_STAGE: usize = 4;
const PER_ROW: usize = 8;

impl Cascade {
    /// The cascade for `rows` in groups with these `ends`; `None` for a search without codes. `budget` is what the codes
    /// of a row may take, in bytes: without room for any there is none.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn choose(
        context: &Context<'_>,
        rows: Matrix<'_>,
        ends: &[usize],
        budget: usize,
    ) -> Result<Option<Self>, Error> {
        let affordable = |widths: &[usize]| {
            let widest = widths.iter().copied().filter(|&width| width < Encoder::whole_width(rows.cols())).max();
            let of_map = 4 * (rows.cols() * (widest.unwrap_or(0) + 1) + widths.iter().sum::<usize>());
            let centroid = widths.iter().copied().find(|&width| width >= 32).unwrap_or(0) / TILE;
            let of_row = widths.iter().map(|width| width + PER_STAGE).sum::<usize>() + PER_ROW + centroid;
            of_row * rows.rows() + of_map <= budget.saturating_mul(rows.rows())
        };
        let mut widths = candidates(context, rows);
        widths.retain(|&width| affordable(&[width]));
        if widths.is_empty() {
            return Ok(None);
        }
        let Some(cascade) = Self::new(context, rows, ends, &widths)? else { return Ok(None) };
        let widths: Vec<usize> = cascade.stages.iter().map(|stage| stage.codes.width()).collect();
        let mut queries = some_rows(rows);
        queries.extend(middles(rows));
        let shares = Shares::count(context, &cascade, rows, &queries)?;
        let costs = Costs::new(context, rows);
        let mut cheapest = costs.without_codes(rows.rows() as f64);
        let mut chosen = Vec::new();
        for subset in 1..1_usize << widths.len() {
            let keep: Vec<usize> = (0..widths.len()).filter(|stage| subset >> stage & 1 == 1).collect();
            let kept: Vec<usize> = keep.iter().map(|&stage| widths[stage]).collect();
            let cost = costs.of_cascade(&cascade, &shares, &keep);
            if affordable(&kept) && cost < cheapest {
                (cheapest, chosen) = (cost, keep);
            }
        }
        Ok(if chosen.is_empty() { None } else { Some(cascade.with_stages(&chosen)) })
    }
}

/// The codes of all rows of a selection.
#[derive(Clone, Debug)]
pub(crate) struct SelectionPlan {
    /// Their map: codes whose products are taken with many rows and, where they pay, those of all columns.
    pub encoder: Encoder,
    /// The codes, stage by stage.
    pub encoded: Vec<Encoded>,
}

impl SelectionPlan {
    /// The codes for a selection of `picks` of the rows; `None` where it is faster without.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn choose(context: &Context<'_>, rows: Matrix<'_>, picks: usize) -> Result<Option<Self>, Error> {
        let mut widths = candidates(context, rows);
        widths.retain(|&width| width >= STEP);
        if widths.is_empty() {
            return Ok(None);
        }
        let few: Vec<f32> = sample(rows.rows(), picks.clamp(SMALLEST, SELECTION_ROWS))
            .flat_map(|row| rows.row(row).iter().copied())
            .collect();
        let few = Matrix::trusted(&few, few.len() / rows.cols(), rows.cols());
        let Some(cascade) = Cascade::new(context, few, &[few.rows()], &widths)? else { return Ok(None) };
        let widths: Vec<usize> = cascade.stages.iter().map(|stage| stage.codes.width()).collect();
        let whole = widths.len() - 1;
        let shares = Shares::count(context, &cascade, few, &some_rows(few))?;
        let costs = Costs::new(context, rows);
        let seen = SEEN * picks as f64;
        let mut cheapest = costs.without_codes(seen);
        let mut chosen = Vec::new();
        for stage in 0..widths.len() {
            let cost = costs.of_selection(&shares, seen, (stage, widths[stage]), (whole, widths[whole]));
            if cost < cheapest {
                cheapest = cost;
                chosen = if stage == whole { vec![whole] } else { vec![stage, whole] };
            }
        }
        if chosen.is_empty() {
            return Ok(None);
        }
        let encoder = cascade.into_encoder().with_stages(&chosen);
        let encoded = encoder.encode(context, rows)?;
        Ok(Some(Self { encoder, encoded }))
    }
}

/// The widths worth a try, by rising width; none where no codes can be.
fn candidates(context: &Context<'_>, rows: Matrix<'_>) -> Vec<usize> {
    let (cols, whole) = (rows.cols(), Encoder::whole_width(rows.cols()));
    let product = PRODUCT * context.level().dot_cost();
    // Where the narrowest codes alone take longer than distances, nothing need be tried.
    let least = LANES as f64 * product + PAIR / TILE as f64;
    if rows.rows() < SMALLEST || whole > WIDEST || least >= cols as f64 * PLAIN {
        return Vec::new();
    }
    WIDTHS.into_iter().filter(|&width| width < whole).chain([whole]).collect()
}

/// Rows as queries.
fn some_rows(rows: Matrix<'_>) -> Vec<f32> {
    sample(rows.rows(), PROBES).flat_map(|row| rows.row(row).iter().copied()).collect()
}

/// Middles of pairs of rows, and middles pushed out of the subspace of the rows: every column moved by as much as the
/// columns vary on the whole.
fn middles(rows: Matrix<'_>) -> Vec<f32> {
    let cols = rows.cols();
    let mut queries = Vec::with_capacity(2 * PROBES * cols);
    let mut lengths = 0.0;
    for i in 0..2 * PROBES as u64 {
        let [a, b] = [2 * i, 2 * i + 1].map(|i| rows.row((splitmix64(i) % rows.rows() as u64) as usize));
        lengths += a.iter().zip(b).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
        queries.extend(a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)));
    }
    // Half of two rows' distance, spread over the columns: as far as the patches of defects were.
    let push = 0.5 * (lengths / (2 * PROBES * cols) as f64).sqrt() as f32;
    for (i, value) in queries[PROBES * cols..].iter_mut().enumerate() {
        *value += if splitmix64(i as u64) & 1 == 0 { push } else { -push };
    }
    queries
}

/// What each stage leaves, of all tiles and rows, for each [`NEARNESS`].
struct Shares {
    tiles: Vec<[f64; NEARNESS.len()]>,
    rows: Vec<[f64; NEARNESS.len()]>,
}

impl Shares {
    /// The first [`PROBES`] of the queries are rows.
    fn count(context: &Context<'_>, cascade: &Cascade, rows: Matrix<'_>, queries: &[f32]) -> Result<Self, Error> {
        let queries: Vec<&[f32]> = queries.chunks_exact(rows.cols()).collect();
        let wanted = Wanted::Nearest(2.min(rows.rows()));
        let best = cascade.search(context, rows, &Runs::all(rows.rows()), &queries, wanted)?;
        // The nearest row of a row is itself.
        let near = |(query, mut best): (usize, TopK)| {
            let sorted = best.sorted();
            sorted[usize::from(query < PROBES).min(sorted.len() - 1)].0.sqrt()
        };
        let near: Vec<f64> = best.into_iter().enumerate().map(near).collect();
        Ok(context.level().run(Count { cascade, queries: &queries, near: &near }))
    }
}

struct Count<'a> {
    cascade: &'a Cascade,
    queries: &'a [&'a [f32]],
    near: &'a [f64],
}

impl Operation for Count<'_> {
    type Output = Shares;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Shares {
        let Self { cascade, queries, near } = self;
        let coded = coded_queries(simd, cascade, queries, &mut EncodeScratch::default());
        let all: Vec<u16> = (0..queries.len() as u16).collect();
        let mut shares = Shares { tiles: Vec::new(), rows: Vec::new() };
        for (i, stage) in cascade.stages.iter().enumerate() {
            let (mut tiles, mut rows) = ([0.0; NEARNESS.len()], [0.0; NEARNESS.len()]);
            let mut pairs = 0;
            for tile in sample(stage.codes.tiles(), SAMPLE_TILES) {
                for (at, nearness) in NEARNESS.into_iter().enumerate() {
                    let offset = stage.codes.offset();
                    let threshold = |query: usize| {
                        let bound =
                            cascade.encoder.stages()[i].bound(&coded[i].measures()[query], nearness * near[query]);
                        coded[i].offset_threshold(query, &bound, stage.codes.epsilon(tile), offset)
                    };
                    let thresholds: Vec<i32> = (0..queries.len()).map(threshold).collect();
                    let mut sink = Counts { thresholds: &thresholds, tiles: 0, rows: 0 };
                    tile_products(simd, &stage.codes, tile, &coded[i], &all, &mut sink);
                    tiles[at] += f64::from(sink.tiles);
                    rows[at] += f64::from(sink.rows);
                }
                pairs += queries.len();
            }
            shares.tiles.push(tiles.map(|count| count / pairs as f64));
            shares.rows.push(rows.map(|count| count / (TILE * pairs) as f64));
        }
        shares
    }
}

/// Counts the tiles and rows whose products reach the thresholds.
struct Counts<'a> {
    thresholds: &'a [i32],
    tiles: u32,
    rows: u32,
}

impl Sink for Counts<'_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, _: usize, query: usize, products: S::I32) {
        let reached = simd.at_least(products, simd.splat_i32(self.thresholds[query]));
        self.tiles += u32::from(reached != 0);
        self.rows += reached.count_ones();
    }
}

/// The model in this file's header.
struct Costs {
    cols: f64,
    product: f64,
    has_unit: bool,
}

impl Costs {
    fn new(context: &Context<'_>, rows: Matrix<'_>) -> Self {
        let level = context.level();
        let product = PRODUCT * level.dot_cost();
        Self { cols: rows.cols() as f64, product, has_unit: level.has_matrix_unit() }
    }

    fn without_codes(&self, rows: f64) -> f64 {
        rows * self.cols * PLAIN
    }

    /// Every way ends in register blocks of distances where little is ruled out.
    fn mean(&self, rows: usize, costs: [f64; NEARNESS.len()]) -> f64 {
        let most = self.without_codes(rows as f64);
        costs.iter().map(|&cost| cost.min(most)).sum::<f64>() / NEARNESS.len() as f64
    }

    /// Encoding a query for stages of these widths.
    fn of_codes(&self, widths: impl Iterator<Item = usize> + Clone) -> f64 {
        let narrow = widths.clone().filter(|&width| (width as f64) < self.cols);
        let basis = narrow.max().unwrap_or(0).next_multiple_of(STEP) as f64;
        self.cols * basis * ROTATE + widths.sum::<usize>() as f64 * MIX
    }

    fn of_cascade(&self, cascade: &Cascade, shares: &Shares, keep: &[usize]) -> f64 {
        let (tiles, rows) = (cascade.tiles() as f64, cascade.order.len());
        let width = |stage: usize| cascade.stages[stage].codes.width();
        let mut before = [1.0; NEARNESS.len()];
        let mut costs = [0.0; NEARNESS.len()];
        for (i, &stage) in keep.iter().enumerate() {
            let by_unit = self.has_unit && i == 0 && width(stage).is_multiple_of(STEP);
            let product = self.product * if by_unit { UNIT_SHARE } else { 1.0 };
            let pair = if i == 0 { FIRST_PAIR } else { PAIR } + (TILE * width(stage)) as f64 * product;
            for (cost, (before, left)) in costs.iter_mut().zip(before.iter_mut().zip(shares.tiles[stage])) {
                *cost += tiles * *before * pair;
                *before = left;
            }
        }
        let left = keep.last().map_or([1.0; NEARNESS.len()], |&stage| shares.rows[stage]);
        for (cost, left) in costs.iter_mut().zip(left) {
            *cost += left * rows as f64 * (self.cols * DISTANCE + FAR);
        }
        self.mean(rows, costs) + self.of_codes(keep.iter().map(|&stage| width(stage)))
    }

    fn of_selection(
        &self,
        shares: &Shares,
        seen: f64,
        (stage, width): (usize, usize),
        (whole, whole_width): (usize, usize),
    ) -> f64 {
        // At the rows' distances.
        let left = |stage: usize| shares.rows[stage][0] * seen;
        let mut cost = left(whole) * (self.cols * DISTANCE + FAR);
        if stage != whole {
            cost += left(stage) * (PAIR + (TILE * width) as f64 * self.product + whole_width as f64 * FETCH);
        }
        let product = self.product * if self.has_unit { UNIT_SHARE } else { 1.0 };
        let widths = [width, if stage == whole { 0 } else { whole_width }];
        seen * width as f64 * product + cost.min(self.without_codes(seen)) + self.of_codes(widths.into_iter())
    }
}

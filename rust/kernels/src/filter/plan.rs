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
use super::{SMALLEST, STEP, WIDEST};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::random::splitmix64;
use crate::runs::Runs;
use crate::simd::{LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};

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

/// Rows that a selection's probe searches: as many as there will be picks, but at most these.
const SELECTION_ROWS: usize = 16_384;

// Costs in nanoseconds, fitted to searches at AVX-512 VNNI (`benches/NOTES.md`). At other levels, all but products of
// codes keep about the same proportions.
//
// | constant   | cost of                                                                        |
// |------------|--------------------------------------------------------------------------------|
// | FIRST_PAIR | a query and a tile in the first stage, where all queries come in turn          |
// | PAIR       | a query and a tile in a later stage: fetching, comparing, listing              |
// | PRODUCT    | a product of two codes, times `Simd::DOT_COST`                                 |
// | UNIT_SHARE | by a matrix unit, this share of it                                             |
// | ROTATE     | a product of two f32 when a row is rotated                                     |
// | MIX        | mixing and rounding a coordinate                                               |
// | FETCH      | fetching and multiplying a code of a row that may lie anywhere                 |
// | PLAIN      | a squared difference in f64, rows streaming by                                 |
// | DISTANCE   | the same, rows from anywhere                                                   |
// | FAR        | besides, fetching such a row                                                   |
const FIRST_PAIR: f64 = 0.4;
const PAIR: f64 = 1.5;
const PRODUCT: f64 = 0.0038;
const UNIT_SHARE: f64 = 0.3;
const ROTATE: f64 = 0.021;
const MIX: f64 = 2.0;
const FETCH: f64 = 0.045;
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

/// Middles of pairs of rows, and middles pushed out of the subspace of the rows: every column moved up or down by half of
/// what the columns of two rows differ by, on the whole.
fn middles(rows: Matrix<'_>) -> Vec<f32> {
    let cols = rows.cols();
    let mut queries = Vec::with_capacity(2 * PROBES * cols);
    let mut lengths = 0.0;
    for i in 0..2 * PROBES as u64 {
        let [a, b] = [2 * i, 2 * i + 1].map(|i| rows.row((splitmix64(i) % rows.rows() as u64) as usize));
        lengths += a.iter().zip(b).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
        queries.extend(a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)));
    }
    // As far as the patches of defects were.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::encoder::Stage;
    use crate::random::{features, uniform};
    use crate::simd::Level;

    const ROWS: usize = 1500;
    const COLS: usize = 200;

    fn noise() -> Vec<f32> {
        (0..ROWS * COLS).map(|i| (0..12).map(|j| uniform((12 * i + j) as u64)).sum()).collect()
    }

    fn widths(encoder: &Encoder) -> Vec<usize> {
        encoder.stages().iter().map(Stage::width).collect()
    }

    fn chosen(level: Level, values: &[f32], budget: usize) -> Option<Vec<usize>> {
        let rows = Matrix::new("features", values, ROWS, COLS).unwrap();
        Cascade::choose(&Context::new(level, 1), rows, &[ROWS], budget).unwrap().map(|cascade| widths(&cascade.encoder))
    }

    #[test]
    fn features_are_searched_by_narrow_codes_and_noise_by_none() {
        let whole = Encoder::whole_width(COLS);
        for level in Level::available() {
            let of_features = chosen(level, &features(ROWS, COLS), usize::MAX).unwrap();
            assert!(of_features[0] < whole, "{level}: {of_features:?}");
            // Where all directions are alike, only codes of all columns could tell rows apart.
            let of_noise = chosen(level, &noise(), usize::MAX);
            assert!(of_noise.as_ref().is_none_or(|widths| *widths == [whole]), "{level}: {of_noise:?}");
        }
    }

    #[test]
    fn codes_keep_to_their_budget() {
        for level in Level::available() {
            assert_eq!(chosen(level, &features(ROWS, COLS), 16), None, "{level}");
            let narrow = chosen(level, &features(ROWS, COLS), 100).unwrap();
            assert!(narrow.iter().sum::<usize>() < 100, "{level}: {narrow:?}");
        }
    }

    #[test]
    fn features_are_selected_by_narrow_codes_and_noise_by_none() {
        let whole = Encoder::whole_width(COLS);
        for level in Level::available() {
            let chosen = |values: &[f32], picks| {
                let rows = Matrix::new("features", values, ROWS, COLS).unwrap();
                let plan = SelectionPlan::choose(&Context::new(level, 1), rows, picks).unwrap();
                plan.map(|plan| widths(&plan.encoder))
            };
            assert_eq!(chosen(&features(ROWS, COLS), 1000), Some(vec![64, whole]), "{level}");
            let of_noise = chosen(&noise(), 1000);
            assert!(of_noise.as_ref().is_none_or(|widths| *widths == [whole]), "{level}: {of_noise:?}");
            // Encoding the rows would take longer than their distances to so few.
            assert_eq!(chosen(&features(ROWS, COLS), 2), None, "{level}");
        }
    }

    #[test]
    fn probes_lie_among_the_rows_and_outside_their_subspace() {
        let values = features(ROWS, COLS);
        let rows = Matrix::new("features", &values, ROWS, COLS).unwrap();
        let queries = middles(rows);
        assert_eq!(queries.len(), 2 * PROBES * COLS);
        let differ = |i: u64| {
            let [a, b] = [2 * i, 2 * i + 1].map(|i| rows.row((splitmix64(i) % ROWS as u64) as usize));
            a.iter().zip(b).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>() / COLS as f64
        };
        let push = 0.5 * ((0..2 * PROBES as u64).map(differ).sum::<f64>() / (2 * PROBES) as f64).sqrt();
        for (i, query) in queries.chunks_exact(COLS).enumerate() {
            let [a, b] = [2 * i, 2 * i + 1].map(|i| rows.row((splitmix64(i as u64) % ROWS as u64) as usize));
            for (j, query) in query.iter().enumerate() {
                let moved = f64::from((query - 0.5 * (a[j] + b[j])).abs());
                let expected = if i < PROBES { 0.0 } else { push };
                assert!((moved - expected).abs() < 1e-5, "{i}: moved by {moved}, not {expected}");
            }
        }
    }
}

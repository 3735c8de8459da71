//! Chooses how rows are searched: without codes, or with codes of which width, and a second filter or none.
//!
//! Narrow codes are multiplied faster, wide ones leave fewer rows to look at, and which of the two wins
//! depends on the data: features of a network live in few dimensions, noise in all. So the probe tries.
//! Its queries are some rows, and the middles of some pairs of rows, which lie among the rows rather than
//! at their rim, as patches of new images do. It finds their distances to the nearest (other) row through
//! codes of all columns; for each width it encodes a sample and counts the share of rows that the codes
//! would leave at [`NEARNESS`] times that distance. Codes of all columns serve as the second filter after
//! narrower ones. The cheapest way by this count is taken:
//!
//! ```text
//! nanoseconds of a query  =  rows·width·PRODUCT  +  columns·(width + MIX)·ROTATE
//!                         +  left by the codes·(16·width·REREAD + TILE + columns·FETCH)
//!                         +  left by the second filter·(columns·DISTANCE + FAR)
//! without codes           =  rows·columns·PLAIN
//! ```
//!
//! The choice decides speed, never answers.

use super::basis::{Basis, mean, sample};
use super::codes::product;
use super::{Codes, Encoded, Encoder, Measures, QUERIES, STEP, Scratch, Search, WIDEST, Workspace};
use crate::best::Best;
use crate::context::Context;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::random::splitmix64;
use crate::simd::{Operation, Simd};

/// Fewer rows are searched without codes.
const SMALLEST: usize = 256;

/// Queries of each kind: together one block.
const PROBES: usize = QUERIES / 2;

/// Rows among which their nearest is sought.
const NEIGHBOURS: usize = 32_768;

/// Rows on which shares are counted.
const SAMPLE: usize = 2048;

/// How near a query is taken to be, in distances to its nearest row: new images are often farther.
const NEARNESS: [f64; 2] = [1.0, 1.05];

// Measured at AVX-512 VNNI. At other levels, what is not a product of codes keeps about the same proportions.

/// Nanoseconds of a product of two codes, times [`Simd::DOT_COST`], and of one of a tile that is multiplied again.
const PRODUCT: f64 = 0.0038;
const REREAD: f64 = 0.002;
/// Of a product of two f32 when a query is rotated; encoding by all columns costs as [`MIX`] such widths.
const ROTATE: f64 = 0.021;
const MIX: usize = 32;
/// Of the sums of a tile's products; of fetching a wide code of a row, and its product.
const TILE: f64 = 8.0;
const FETCH: f64 = 0.045;
/// Of a squared difference in f64, its row streaming by or from anywhere; of fetching that row.
const PLAIN: f64 = 0.135;
const DISTANCE: f64 = 0.25;
const FAR: f64 = 100.0;

/// What a row takes beside its codes: in the tiles its norm, sum, error, place and share of the tile's error;
/// in the second filter its measures.
const PER_ROW: usize = 17;
const PER_SECOND: usize = size_of::<Measures>();

/// Encoded rows, and the map that encoded them.
#[derive(Clone, Debug)]
pub(crate) struct Coded {
    /// The map.
    pub encoder: Encoder,
    /// The rows.
    pub rows: Encoded,
}

/// How rows are searched.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// The codes of which every row's are multiplied.
    pub first: Coded,
    /// The second filter.
    pub second: Option<Coded>,
}

impl Coded {
    /// Encodes all rows.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn new(context: &Context<'_>, rows: Matrix<'_>, encoder: Encoder) -> Result<Self, Error> {
        let all: Vec<u32> = (0..rows.rows() as u32).collect();
        Ok(Self { rows: encoder.encode(context, rows, &all)?, encoder })
    }

    /// Whether the codes prove two rows farther apart than `tau`.
    #[inline(always)]
    pub(crate) fn rules_out<S: Simd>(&self, simd: S, x: usize, y: usize, tau: f64) -> bool {
        let (query, row) = (&self.rows.measures[x], &self.rows.measures[y]);
        let threshold = self.encoder.near(query, tau).threshold(f64::from(row.total));
        product(simd, self.rows.row(x), (self.rows.row(y), row)) < threshold
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        self.encoder.nbytes() + self.rows.nbytes()
    }
}

impl Plan {
    /// The plan for `rows`, of which a search will go through `bank` rows like them; `None` for a search
    /// without codes. `budget` is what the codes of a row may take, in bytes; without
    /// room for the second filter there is none, and without room for any codes there is no plan.
    ///
    /// # Errors
    /// [`Error::Cancelled`], [`Error::OutOfMemory`].
    pub(crate) fn choose(
        context: &Context<'_>,
        rows: Matrix<'_>,
        bank: usize,
        budget: usize,
    ) -> Result<Option<Self>, Error> {
        let cols = rows.cols();
        let full = Encoder::full_width(cols);
        let product = PRODUCT * context.level().dot_cost();
        // Where the narrowest codes alone take longer than distances, nothing need be tried.
        if rows.rows() < SMALLEST || full > WIDEST || STEP as f64 * product >= cols as f64 * PLAIN {
            return Ok(None);
        }
        let mean = mean(rows);
        let wide = Coded::new(context, rows, Encoder::new(context, rows, mean.clone(), None, full))?;
        let probe = Probe::new(context, rows, bank, &wide)?;
        let left = |encoder: &Encoder| -> Result<[f64; NEARNESS.len()], Error> {
            let coded = &encoder.encode(context, rows, &probe.sample)?;
            Ok(context.level().run(Count { encoder, coded, probe: &probe }).map(|share| share * bank as f64))
        };
        let distance = cols as f64 * DISTANCE + FAR;
        let last = left(&wide.encoder)?.map(|left| left * distance);
        // Every way ends in tiles of distances where little is ruled out.
        let all = bank as f64 * cols as f64 * PLAIN;
        let mean_of =
            |costs: [f64; NEARNESS.len()]| costs.map(|cost| cost.min(all)).iter().sum::<f64>() / NEARNESS.len() as f64;
        let affordable = |width: usize, second: bool| {
            let of_row = width + PER_ROW + if second { full + PER_SECOND } else { 0 };
            let basis = if width < full { width } else { 0 };
            let of_maps = 4 * (cols * (basis + 2) + width + full);
            of_row * rows.rows() + of_maps <= budget.saturating_mul(rows.rows())
        };
        let mut cheapest = all;
        if affordable(full, false) {
            let cost = (bank * full) as f64 * product + (cols * MIX) as f64 * ROTATE + mean_of(last);
            cheapest = cheapest.min(cost);
        }
        let mut narrow = None;
        // A wide basis takes longer to fit, and is only worth a try where the widest narrow one was.
        for widths in [[1, 2], [3, 4]] {
            let fits = |&width: &usize| width < full && affordable(width, false);
            let widths: Vec<usize> = widths.iter().map(|steps| steps * STEP).filter(fits).collect();
            let Some(&widest) = widths.last() else { break };
            let basis = Basis::fit(context, rows, &mean, widest)?;
            for width in widths {
                let encoder = Encoder::new(context, rows, mean.clone(), Some(basis.narrowed(width)), width);
                let left = left(&encoder)?;
                let tile = TILE + (16 * width) as f64 * REREAD;
                let (encoding, looking) = if affordable(width, true) {
                    let again = tile + full as f64 * FETCH;
                    (width + MIX, std::array::from_fn(|i| left[i] * again + last[i]))
                } else {
                    (width, left.map(|left| left * (tile + distance)))
                };
                let cost = (bank * width) as f64 * product + (cols * encoding) as f64 * ROTATE + mean_of(looking);
                if cost < cheapest {
                    cheapest = cost;
                    narrow = Some(encoder);
                }
            }
            if narrow.as_ref().is_none_or(|encoder| encoder.width() < widest) {
                break;
            }
        }
        Ok(match narrow {
            Some(encoder) => {
                let second = affordable(encoder.width(), true).then_some(wide);
                Some(Self { first: Coded::new(context, rows, encoder)?, second })
            }
            None => (cheapest < all).then_some(Self { first: wide, second: None }),
        })
    }

    /// A plan of codes of the given width, for tests of all widths on all data.
    #[cfg(test)]
    pub(crate) fn of_width(context: &Context<'_>, rows: Matrix<'_>, width: usize, second: bool) -> Self {
        let coded = |width| Coded::new(context, rows, Encoder::fit(context, rows, width)).unwrap();
        Self { first: coded(width), second: second.then(|| coded(Encoder::full_width(rows.cols()))) }
    }
}

/// Queries, how near their nearest rows are, and a sample of rows.
struct Probe {
    cols: usize,
    /// Rows first, then the middles of pairs.
    queries: Vec<f32>,
    /// The rows among the queries.
    rows: Vec<u32>,
    near: Vec<f64>,
    sample: Vec<u32>,
}

impl Probe {
    fn new(context: &Context<'_>, rows: Matrix<'_>, bank: usize, wide: &Coded) -> Result<Self, Error> {
        let named = |count: usize| sample(rows.rows(), count).map(|row| row as u32).collect::<Vec<u32>>();
        let among = named(NEIGHBOURS.min(bank).max(2));
        let picked: Vec<u32> = sample(among.len(), PROBES).map(|place| among[place]).collect();
        let mut queries = Vec::with_capacity(2 * PROBES * rows.cols());
        for &row in &picked {
            queries.extend_from_slice(rows.row(row as usize));
        }
        for i in 0..PROBES as u64 {
            let [a, b] = [2 * i, 2 * i + 1].map(|i| rows.row((splitmix64(i) % rows.rows() as u64) as usize));
            queries.extend(a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)));
        }
        let mut probe = Self { cols: rows.cols(), queries, rows: picked, near: Vec::new(), sample: named(SAMPLE) };
        let codes = Codes::new(&wide.rows, &among)?;
        probe.near = context.level().run(Nearest { rows, wide, codes: &codes, among: &among, probe: &probe });
        context.poll()?;
        Ok(probe)
    }

    fn queries(&self) -> Vec<&[f32]> {
        self.queries.chunks_exact(self.cols).collect()
    }
}

/// The distance of each query to its nearest row.
struct Nearest<'a> {
    rows: Matrix<'a>,
    wide: &'a Coded,
    codes: &'a Codes,
    among: &'a [u32],
    probe: &'a Probe,
}

impl Operation for Nearest<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f64> {
        let queries = self.probe.queries();
        let rows = self.probe.rows.len();
        // The nearest row of a row is itself.
        let mut best: Vec<Best> = (0..queries.len()).map(|query| Best::new(if query < rows { 2 } else { 1 })).collect();
        let mut scratch = Scratch::new(self.wide.encoder.width());
        scratch.block.encode(simd, &self.wide.encoder, &queries, &mut Workspace::default());
        let search = Search {
            encoder: &self.wide.encoder,
            second: None,
            codes: self.codes,
            order: self.among,
            features: self.rows,
            tiles: 0..self.codes.tiles(),
            queries: &queries,
            best: &mut best,
            enough: 0.0,
            pulse: None,
        };
        search.run(simd, &mut scratch);
        best.into_iter().map(|best| best.worst().sqrt()).collect()
    }
}

/// The share of pairs of a query and a sampled row that codes leave, for each [`NEARNESS`].
struct Count<'a> {
    encoder: &'a Encoder,
    /// The sample, encoded.
    coded: &'a Encoded,
    probe: &'a Probe,
}

impl Operation for Count<'_> {
    type Output = [f64; NEARNESS.len()];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f64; NEARNESS.len()] {
        let Count { encoder, coded, probe } = self;
        let queries = probe.queries();
        let mut encoded = Encoded::default();
        encoded.refill(simd, encoder, &queries, &mut Workspace::default());
        let mut left = [0_usize; NEARNESS.len()];
        for (query, &near) in probe.near.iter().enumerate() {
            let near = NEARNESS.map(|nearness| encoder.near(&encoded.measures[query], nearness * near));
            for (i, row) in probe.sample.iter().enumerate() {
                if probe.rows.get(query) == Some(row) {
                    continue;
                }
                let measures = &coded.measures[i];
                let product = product(simd, encoded.row(query), (coded.row(i), measures));
                for (left, near) in left.iter_mut().zip(&near) {
                    *left += usize::from(product >= near.threshold(f64::from(measures.total)));
                }
            }
        }
        let pairs = (queries.len() * probe.sample.len()) as f64;
        left.map(|left| left as f64 / pairs)
    }
}

//! Encoded rows in tiles of sixteen, and encoded queries.
//!
//! A tile is stored in lanes: four codes of each of its sixteen rows to a vector. Queries are stored one after another.
//!
//! A product is 2ˢ·X·Y − ⌊|Y|²/2⌋, the left side of (3) in the header of this folder, and what the offset of the
//! rows adds to it: [`CodedQueries::offset_threshold`] adds the same to the right side.

use super::encoder::{Bound, Encoded, EncodedPart, Measures};
use crate::context::Pulse;
use crate::error::Error;
use crate::matrix::reserved;
use crate::simd::{Aligned, LANES};

/// Rows of a tile.
pub(crate) const TILE: usize = 16;

/// The products of a padding row start from here, so low that no threshold but the lowest admits them.
pub(super) const NEVER: i32 = i32::MIN / 2;

/// Tiles that are filled between two questions whether to go on: some milliseconds at most.
const PULSE_TILES: usize = 1024;

/// Bytes of a line of the cache.
const LINE: usize = align_of::<Aligned<()>>();

/// The matrix unit multiplies queries by so many.
pub(super) const UNIT_QUERIES: usize = 2 * LANES;

/// Encoded rows in tiles.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    /// `width / 4` vectors a tile.
    lanes: Vec<Aligned<[i8; 64]>>,
    width: usize,
    rows: usize,
    /// `Simd::CODE_OFFSET` of the level that searches them.
    offset: i32,
    /// −⌊|Y|²/2⌋ of each row.
    halves: Vec<Aligned<[i32; TILE]>>,
    /// The largest ε of each tile.
    epsilons: Vec<f32>,
}

impl Codes {
    /// No rows yet.
    pub(crate) fn empty(width: usize, offset: i32) -> Self {
        Self { lanes: Vec::new(), width, rows: 0, offset, halves: Vec::new(), epsilons: Vec::new() }
    }

    /// The rows of `encoded` in the given order. Many rows take long: `pulse` is asked meanwhile.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub(crate) fn new(encoded: &Encoded, order: &[u32], offset: i32, pulse: Option<&Pulse<'_>>) -> Result<Self, Error> {
        let tiles = order.len().div_ceil(TILE);
        let mut codes = Self {
            lanes: reserved(&[tiles, encoded.width / 4])?,
            halves: reserved(&[tiles])?,
            epsilons: reserved(&[tiles])?,
            ..Self::empty(encoded.width, offset)
        };
        let (tiles, rest) = order.as_chunks::<TILE>();
        for tiles in tiles.chunks(PULSE_TILES) {
            if pulse.is_some_and(Pulse::stopped) {
                return Err(Error::Cancelled);
            }
            for tile in tiles {
                codes.push_tile(encoded, tile);
            }
        }
        for &row in rest {
            codes.push(encoded.row(row as usize), &encoded.measures[row as usize]);
        }
        Ok(codes)
    }

    /// Appends sixteen rows to whole tiles: each vector is written once.
    fn push_tile(&mut self, encoded: &Encoded, rows: &[u32; TILE]) {
        let four: [&[[i8; 4]]; TILE] = rows.map(|row| encoded.row(row as usize).as_chunks().0);
        let four = four.map(|row| &row[..self.width / 4]);
        for k in 0..self.width / 4 {
            let mut vector = [0; 64];
            for (to, row) in vector.as_chunks_mut::<4>().0.iter_mut().zip(&four) {
                *to = row[k];
            }
            self.lanes.push(Aligned(vector.map(|code| (i32::from(code) + self.offset) as i8)));
        }
        let measures = rows.map(|row| &encoded.measures[row as usize]);
        self.halves.push(Aligned(measures.map(|measures| -(measures.norm >> 1))));
        self.epsilons.push(measures.iter().fold(0.0, |epsilon, measures| measures.epsilon.max(epsilon)));
        self.rows += TILE;
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, row: &[i8], measures: &Measures) {
        let (tile, lane) = (self.rows / TILE, self.rows % TILE);
        if lane == 0 {
            self.lanes.resize((tile + 1) * self.width / 4, Aligned([self.offset as u8 as i8; 64]));
            self.halves.push(Aligned([NEVER; TILE]));
            self.epsilons.push(0.0);
        }
        let offset = self.offset;
        let vectors = &mut self.lanes[tile * self.width / 4..];
        for (vector, &four) in vectors.iter_mut().zip(row.as_chunks::<4>().0) {
            // Four codes at once: a store of 32 bits.
            vector.0.as_chunks_mut::<4>().0[lane] = four.map(|code| (i32::from(code) + offset) as i8);
        }
        self.halves[tile].0[lane] = -(measures.norm >> 1);
        self.epsilons[tile] = self.epsilons[tile].max(measures.epsilon);
        self.rows += 1;
    }

    /// Number of rows, padding not counted.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of tiles.
    pub(crate) fn tiles(&self) -> usize {
        self.halves.len()
    }

    /// Codes of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// `Simd::CODE_OFFSET` of the level that searches them.
    pub(crate) fn offset(&self) -> i32 {
        self.offset
    }

    /// The largest ε of a tile.
    #[inline(always)]
    pub(crate) fn epsilon(&self, tile: usize) -> f64 {
        f64::from(self.epsilons[tile])
    }

    /// The mean codes of each tile, as rows: which tiles are promising, no bound needs to know exactly.
    pub(super) fn centroids(&self) -> Self {
        let mut centroids = Self::empty(self.width, self.offset);
        let mut codes = vec![0_i8; self.width];
        for tile in 0..self.tiles() {
            let count = (self.rows - tile * TILE).min(TILE);
            for (vector, codes) in self.tile(tile).iter().zip(codes.as_chunks_mut::<4>().0) {
                for (at, code) in codes.iter_mut().enumerate() {
                    let of = |lane: usize| i32::from((i32::from(vector.0[4 * lane + at]) - self.offset) as i8);
                    *code = ((0..count).map(of).sum::<i32>() / count as i32) as i8;
                }
            }
            let norm = codes.iter().map(|&code| i32::from(code) * i32::from(code)).sum();
            centroids.push(&codes, &Measures { norm, ..Measures::default() });
        }
        centroids
    }

    /// The rows of the given numbers, in that order.
    pub(super) fn picked(&self, rows: impl Iterator<Item = usize>) -> Self {
        let mut picked = Self::empty(self.width, self.offset);
        let mut codes = vec![0_i8; self.width];
        for row in rows {
            let (tile, lane) = (row / TILE, row % TILE);
            for (vector, codes) in self.tile(tile).iter().zip(codes.as_chunks_mut::<4>().0) {
                let four = vector.0.as_chunks::<4>().0[lane];
                *codes = four.map(|code| (i32::from(code) - self.offset) as i8);
            }
            picked.push(&codes, &Measures { norm: -2 * self.halves[tile].0[lane], ..Measures::default() });
        }
        picked
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        size_of_val(&*self.lanes) + size_of_val(&*self.halves) + size_of_val(&*self.epsilons)
    }

    /// −⌊|Y|²/2⌋ of each row of a tile.
    #[inline(always)]
    pub(super) fn halves(&self, tile: usize) -> &[i32; TILE] {
        &self.halves[tile].0
    }

    /// The vectors of a tile.
    #[inline(always)]
    pub(super) fn tile(&self, tile: usize) -> &[Aligned<[i8; 64]>] {
        &self.lanes[tile * self.width / 4..][..self.width / 4]
    }
}

/// Queries that there is room for.
fn padded(count: usize) -> usize {
    count.next_multiple_of(UNIT_QUERIES)
}

/// Queries with their codes of one stage.
#[derive(Debug, Default)]
pub(crate) struct CodedQueries {
    /// From a line of the cache on, query after query, and zeros up to a multiple of [`UNIT_QUERIES`].
    codes: Vec<i8>,
    begin: usize,
    width: usize,
    /// One for each query.
    measures: Vec<Measures>,
    /// [`Measures::coarser`] of each, and zeros, and whether any is above 0.
    steps: Vec<u32>,
    coarser: bool,
}

impl CodedQueries {
    /// Takes queries from what was encoded.
    pub(crate) fn gather(&mut self, encoded: &Encoded, queries: impl Iterator<Item = usize> + Clone) {
        self.width = encoded.width;
        self.measures.clear();
        self.measures.extend(queries.clone().map(|query| encoded.measures[query]));
        self.finish(queries.map(|query| encoded.row(query)));
    }

    /// Room for so many, which [`CodedQueries::part`] hands out.
    pub(super) fn with_room(width: usize, count: usize) -> Self {
        let codes = vec![0; LINE + padded(count) * width];
        let begin = codes.as_ptr().align_offset(LINE).min(LINE);
        Self { codes, begin, width, measures: vec![Measures::default(); count], ..Self::default() }
    }

    /// Where some queries are to be encoded.
    pub(super) fn part(&mut self, first: usize, count: usize) -> EncodedPart<'_> {
        EncodedPart {
            codes: &mut self.codes[self.begin + first * self.width..][..count * self.width],
            measures: &mut self.measures[first..][..count],
        }
    }

    /// After all are encoded.
    pub(super) fn encoded(mut self) -> Self {
        self.take_steps();
        self
    }

    /// The queries of some others, in turn.
    pub(super) fn joined<'a>(others: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let mut queries = Self::default();
        for other in others.clone() {
            queries.width = other.width;
            queries.measures.extend_from_slice(&other.measures);
        }
        queries.finish(others.flat_map(|other| (0..other.len()).map(|query| other.row(query).as_flattened())));
        queries
    }

    fn finish<'a>(&mut self, rows: impl Iterator<Item = &'a [i8]>) {
        let size = padded(self.measures.len()) * self.width;
        self.codes.clear();
        self.codes.reserve(LINE + size);
        self.begin = self.codes.as_ptr().align_offset(LINE).min(LINE);
        self.codes.resize(self.begin, 0);
        rows.for_each(|row| self.codes.extend_from_slice(row));
        self.codes.resize(self.begin + size, 0);
        self.take_steps();
    }

    fn take_steps(&mut self) {
        self.steps.clear();
        self.steps.extend(self.measures.iter().map(|measures| measures.coarser));
        self.steps.resize(padded(self.measures.len()), 0);
        self.coarser = self.measures.iter().any(|measures| measures.coarser > 0);
    }

    /// Number of queries.
    pub(crate) fn len(&self) -> usize {
        self.measures.len()
    }

    /// One for each query.
    pub(crate) fn measures(&self) -> &[Measures] {
        &self.measures
    }

    /// What a product of the query as computed, the offset of rows in it, must reach.
    #[inline(always)]
    pub(crate) fn offset_threshold(&self, query: usize, bound: &Bound, epsilon: f64, offset: i32) -> i32 {
        bound.threshold(epsilon).saturating_add(self.offset_part(query, offset))
    }

    /// What the offset of rows adds to the products of a query.
    #[inline(always)]
    pub(crate) fn offset_part(&self, query: usize, offset: i32) -> i32 {
        let measures = &self.measures[query];
        (offset * measures.sum) << measures.coarser
    }

    /// Query after query, and zeros up to a multiple of [`UNIT_QUERIES`].
    #[inline(always)]
    pub(super) fn codes(&self) -> &[i8] {
        &self.codes[self.begin..]
    }

    /// [`Measures::coarser`] of each, and zeros.
    #[inline(always)]
    pub(super) fn steps(&self) -> &[u32] {
        &self.steps
    }

    /// Whether the codes of any are coarser than the rows'.
    #[inline(always)]
    pub(super) fn are_coarser(&self) -> bool {
        self.coarser
    }

    /// The codes of a query, four at a time.
    #[inline(always)]
    pub(super) fn row(&self, query: usize) -> &[[i8; 4]] {
        self.codes()[query * self.width..][..self.width].as_chunks().0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_centroid_of_a_tile_is_the_mean_of_its_codes() {
        let codes: Vec<i8> = (0..20 * 16).map(|i| (i * 37 % 127 - 63) as i8).collect();
        let measures = vec![Measures::default(); 20];
        let encoded = Encoded { codes, width: 16, measures };
        let order: Vec<u32> = (0..20).collect();
        for offset in [0, 64, 128] {
            let centroids = Codes::new(&encoded, &order, offset, None).unwrap().centroids();
            assert_eq!(centroids.rows(), 2);
            for (tile, rows) in [0..16, 16..20].into_iter().enumerate() {
                for column in 0..16 {
                    let sum: i32 = rows.clone().map(|row| i32::from(encoded.row(row)[column])).sum();
                    let code = centroids.lanes[column / 4].0[4 * tile + column % 4];
                    let code = (i32::from(code) - offset) as i8;
                    assert_eq!(i32::from(code), sum / rows.len() as i32, "tile {tile}, column {column}");
                }
            }
        }
    }

    #[test]
    fn picked_rows_are_as_if_they_had_been_pushed_alone() {
        let codes: Vec<i8> = (0..40 * 16).map(|i| (i * 37 % 127 - 63) as i8).collect();
        let norm = |row: usize| codes[row * 16..][..16].iter().map(|&code| i32::from(code).pow(2)).sum();
        let measures = (0..40).map(|row| Measures { norm: norm(row), ..Measures::default() }).collect();
        let encoded = Encoded { codes: codes.clone(), width: 16, measures };
        let (all, some): (Vec<u32>, Vec<u32>) = ((0..40).collect(), vec![39, 3, 16, 17, 0]);
        for offset in [0, 64, 128] {
            let picked = Codes::new(&encoded, &all, offset, None).unwrap().picked(some.iter().map(|&row| row as usize));
            let pushed = Codes::new(&encoded, &some, offset, None).unwrap();
            assert_eq!(format!("{picked:?}"), format!("{pushed:?}"));
        }
    }

    #[test]
    fn the_offset_of_rows_adds_its_share_of_a_query() {
        let (x, y) = ([3_i8, -7, 100, 2], [-5_i8, 9, 11, -128]);
        for (coarser, offset) in [(0, 64), (3, 64), (5, 128), (2, 0)] {
            let measures = vec![Measures { sum: 98, coarser, ..Measures::default() }];
            let mut query = CodedQueries::default();
            query.gather(&Encoded { codes: x.to_vec(), width: 4, measures }, 0..1);
            let product = |offset: i32| -> i32 {
                x.iter().zip(y).map(|(&x, y)| (i32::from(x) << coarser) * (i32::from(y) + offset)).sum()
            };
            assert_eq!(query.offset_part(0, offset), product(offset) - product(0));
        }
    }
}

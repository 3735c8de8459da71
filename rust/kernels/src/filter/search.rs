//! Search through the codes, one block of queries at a time.
//!
//! ```text
//! encode the block
//! for each stretch of the bank
//!   largest product of every query with every tile                     8-bit products, most of the work
//!   per query: the best rows of its best tiles get their distances     a first, tight τ
//!   tiles whose largest product reaches a query's threshold            vector compares
//!     recompute their sixteen products, list the rows that reach it
//!   per query: listed rows by falling product (rising bound)
//!     skip what τ has ruled out meanwhile, else the distance
//! ```
//!
//! *First thresholds.* The row with the largest product is the nearest in the codes' metric, and its
//! distance is within a percent or so of the smallest: a threshold taken from it keeps few rows. For
//! k > 1 the best rows of the k best tiles serve; they are k different rows, so none of the k nearest
//! is farther than the farthest of them.
//!
//! *Order.* A stretch is as long as its product maxima stay in the second-level cache. Later stretches
//! begin with the τ of earlier ones.

use super::{Block, Codes, Encoder, GROUPS, QUERIES, TILE, maxima, products};
use crate::best::Best;
use crate::distance::pair;
use crate::matrix::Matrix;
use crate::simd::{LANES, Simd};
use std::ops::Range;

/// Tiles of a stretch.
pub const STRETCH: usize = 1024;

/// Tiles that share a threshold: that of the largest error among them.
const CHUNK: usize = 32;

/// One product maximum per query of a block.
type Maxima = [[i32; LANES]; GROUPS];

/// What a thread keeps from block to block.
pub struct Scratch {
    /// The encoded queries: filled before a search.
    pub block: Block,
    largest: Vec<Maxima>,
    chunks: Vec<Maxima>,
    tiles: Vec<Vec<u32>>,
    candidates: Vec<(i32, u32)>,
}

impl Scratch {
    /// For codes of `width`.
    pub fn new(width: usize) -> Self {
        Self {
            block: Block::new(width),
            largest: vec![[[0; LANES]; GROUPS]; STRETCH],
            chunks: vec![[[0; LANES]; GROUPS]; STRETCH / CHUNK],
            tiles: vec![Vec::new(); QUERIES],
            candidates: Vec::new(),
        }
    }
}

/// Some tiles against the queries of one block.
pub struct Search<'a> {
    /// The map of both sides' codes.
    pub encoder: &'a Encoder,
    /// The codes searched.
    pub codes: &'a Codes,
    /// The row of `features` at each place of the codes.
    pub order: &'a [u32],
    /// The rows themselves.
    pub features: Matrix<'a>,
    /// The tiles searched.
    pub tiles: Range<usize>,
    /// The queries whose codes are in the scratch's block.
    pub queries: &'a [&'a [f32]],
    /// One for each query: what is known before, and after, the search.
    pub best: &'a mut [Best],
}

impl Search<'_> {
    /// Runs the search.
    #[inline(always)]
    pub fn run<S: Simd>(mut self, simd: S, scratch: &mut Scratch) {
        for first in self.tiles.clone().step_by(STRETCH) {
            let count = STRETCH.min(self.tiles.end - first);
            maxima(simd, self.codes, &scratch.block, first, &mut scratch.largest[..count]);
            per_chunk(simd, &scratch.largest[..count], &mut scratch.chunks);
            for query in 0..self.queries.len() {
                self.seed(simd, scratch, query, first, count);
            }
            self.list_tiles(simd, scratch, first, count);
            for query in 0..self.queries.len() {
                self.settle(simd, scratch, query);
            }
        }
    }

    /// Offers the best rows of the query's best tiles of the stretch: k of them, or, once k rows are
    /// known, the very best alone.
    #[inline(always)]
    fn seed<S: Simd>(&mut self, simd: S, scratch: &mut Scratch, query: usize, first: usize, count: usize) {
        let (group, lane) = (query / LANES, query % LANES);
        let of = |maxima: &Maxima| maxima[group][lane];
        let wanted = self.best[query].wanted();
        let tops = &mut scratch.candidates;
        tops.clear();
        if wanted == 1 {
            let chunks = &scratch.chunks[..count.div_ceil(CHUNK)];
            let chunk = (0..chunks.len()).max_by_key(|&chunk| of(&chunks[chunk])).unwrap_or(0);
            let tiles = chunk * CHUNK..count.min((chunk + 1) * CHUNK);
            let tile = tiles.max_by_key(|&tile| of(&scratch.largest[tile])).unwrap_or(0);
            tops.push((of(&scratch.largest[tile]), tile as u32));
        } else {
            tops.extend(scratch.largest[..count].iter().enumerate().map(|(tile, maxima)| (of(maxima), tile as u32)));
            if wanted < tops.len() {
                tops.select_nth_unstable_by_key(wanted - 1, |&(top, _)| std::cmp::Reverse(top));
                tops.truncate(wanted);
            }
        }
        for i in 0..scratch.candidates.len() {
            let (top, tile) = scratch.candidates[i];
            let tile = first + tile as usize;
            if top >= self.threshold(scratch, query, tile) {
                let products = products(simd, self.codes, &scratch.block, tile, query);
                let row = products.iter().position(|&product| product == top).unwrap_or(0);
                self.measure(simd, query, tile * TILE + row);
            }
        }
    }

    /// What a product with a row of the tile must reach, for all that is known of the query now.
    #[inline(always)]
    fn threshold(&self, scratch: &Scratch, query: usize, tile: usize) -> i32 {
        let measures = &scratch.block.measures[query];
        self.encoder.threshold(measures, self.best[query].worst().sqrt(), self.codes.error(tile))
    }

    /// Lists, per query, the tiles of the stretch that may hold a near row.
    #[inline(always)]
    fn list_tiles<S: Simd>(&self, simd: S, scratch: &mut Scratch, first: usize, count: usize) {
        for tiles in &mut scratch.tiles {
            tiles.clear();
        }
        for (chunk, tiles) in scratch.largest[..count].chunks(CHUNK).enumerate() {
            let start = first + chunk * CHUNK;
            let error = (start..start + tiles.len()).fold(0.0_f64, |error, tile| error.max(self.codes.error(tile)));
            let mut thresholds = [[i32::MAX; LANES]; GROUPS];
            let queries = scratch.block.measures.iter().zip(&*self.best);
            for (threshold, (measures, best)) in thresholds.as_flattened_mut().iter_mut().zip(queries) {
                *threshold = self.encoder.threshold(measures, best.worst().sqrt(), error);
            }
            for (group, thresholds) in thresholds.iter().enumerate() {
                let thresholds = simd.load_i32(thresholds);
                if simd.at_least(simd.load_i32(&scratch.chunks[chunk][group]), thresholds) == 0 {
                    continue;
                }
                for (tile, largest) in tiles.iter().enumerate() {
                    let mut reached = simd.at_least(simd.load_i32(&largest[group]), thresholds);
                    while reached != 0 {
                        let query = group * LANES + reached.trailing_zeros() as usize;
                        scratch.tiles[query].push((start + tile) as u32);
                        reached &= reached - 1;
                    }
                }
            }
        }
    }

    /// Gives the rows of the listed tiles that may be near their distances, most promising first.
    #[inline(always)]
    fn settle<S: Simd>(&mut self, simd: S, scratch: &mut Scratch, query: usize) {
        scratch.candidates.clear();
        for i in 0..scratch.tiles[query].len() {
            let tile = scratch.tiles[query][i] as usize;
            let threshold = self.threshold(scratch, query, tile);
            let products = products(simd, self.codes, &scratch.block, tile, query);
            let places = (tile * TILE..self.codes.rows()).zip(products);
            let near = places.filter(|&(_, product)| product >= threshold);
            scratch.candidates.extend(near.map(|(place, product)| (product, place as u32)));
        }
        scratch.candidates.sort_unstable_by_key(|&(product, _)| std::cmp::Reverse(product));
        for i in 0..scratch.candidates.len() {
            let (product, place) = scratch.candidates[i];
            if product >= self.threshold(scratch, query, place as usize / TILE) {
                self.measure(simd, query, place as usize);
            }
        }
    }

    /// Offers the row at a place of the codes.
    #[inline(always)]
    fn measure<S: Simd>(&mut self, simd: S, query: usize, place: usize) {
        let row = self.order[place] as usize;
        self.best[query].offer(pair(simd, self.queries[query], self.features.row(row)), row);
    }
}

/// The largest maxima of each chunk.
#[inline(always)]
fn per_chunk<S: Simd>(simd: S, largest: &[Maxima], chunks: &mut [Maxima]) {
    for (tiles, chunk) in largest.chunks(CHUNK).zip(chunks) {
        for (group, chunk) in chunk.iter_mut().enumerate() {
            let mut top = simd.load_i32(&tiles[0][group]);
            for tile in &tiles[1..] {
                top = simd.max_i32(top, simd.load_i32(&tile[group]));
            }
            simd.store_i32(top, chunk);
        }
    }
}

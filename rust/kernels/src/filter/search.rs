//! Search through the codes, one block of queries at a time.
//!
//! ```text
//! for each stretch of the bank
//!   largest product of every query with every tile                     8-bit products, most of the work
//!   per query: the best rows of its best tiles get their distances     a first, tight τ
//!   tiles whose largest product reaches a query's threshold            vector compares
//!     recompute their sixteen products, list the rows that reach it
//!   per query, a batch of listed rows at a time, largest products first
//!     drop what the wide codes rule out                                a second filter, where there is one
//!     by falling product (rising bound): skip what τ has ruled out meanwhile, else the distance
//!   queries of which too much was left: all distances                  register tiles
//! ```
//!
//! *First thresholds.* The row with the largest product is the nearest in the codes' metric, and its
//! distance is within a percent or so of the smallest: a threshold taken from it keeps few rows. For
//! k > 1 the best rows of the best tiles serve; they are k different rows or more, so none of the k
//! nearest is farther than the k-th of them.
//!
//! *Second filter.* Narrow codes are cheap for all rows and leave some in a hundred, whose distances
//! would take longer than the products: each comes from another place of memory. Codes of all columns
//! are a quarter of a row, and leave two or three rows a query.
//!
//! *Data that codes cannot tell apart*, such as a query far from rows that are near each other, cost little
//! more than a search without codes: where too many rows were listed or measured for a query, it joins the
//! others like it, and the stretch is measured in register tiles.
//!
//! *Order.* A stretch is as long as its product maxima stay in the second-level cache. Later stretches
//! begin with the τ of earlier ones.

use super::codes::product;
use super::{Block, Codes, Encoded, Encoder, GROUPS, Near, QUERIES, TILE, maxima, products};
use crate::best::Best;
use crate::context::Pulse;
use crate::distance::{Element, every_distance, pair};
use crate::matrix::Matrix;
use crate::simd::{LANES, Simd};
use std::cmp::Reverse;
use std::ops::Range;

/// Tiles of a stretch. Tests see several in small sets.
pub(crate) const STRETCH: usize = if cfg!(test) { 40 } else { 1024 };

/// Tiles that share a threshold: that of the largest error among them.
const CHUNK: usize = 32;

/// Listed rows that are looked at together.
const BATCH: usize = 32;

/// Values of the next row that are asked for while a row is measured: the CPU finds the rest itself.
const AHEAD: usize = 1024;

/// Listed or measured rows beyond which a query's stretch is measured whole.
const DENSE: usize = STRETCH * TILE / 4;

/// One product maximum per query of a block.
type Maxima = [[i32; LANES]; GROUPS];

/// What a thread keeps from block to block.
pub(crate) struct Scratch {
    /// The encoded queries: filled before a search.
    pub block: Block,
    largest: Vec<Maxima>,
    chunks: Vec<Maxima>,
    /// Per query the listed rows: product and place.
    listed: Vec<Vec<(i32, u32)>>,
    batch: Vec<(i32, u32)>,
    /// Distances taken so far.
    pub measured: usize,
    /// The queries, as bits, that a search left once they had enough.
    pub settled: u64,
}

/// Wide codes of the same rows and queries: the second filter.
#[derive(Clone, Copy)]
pub(crate) struct Second<'a> {
    /// Their map.
    pub encoder: &'a Encoder,
    /// The codes of all rows of `features`.
    pub rows: &'a Encoded,
    /// Encoded rows, the queries among them.
    pub queries: &'a Encoded,
    /// Where in `queries` each query is.
    pub names: &'a [u32],
}

impl Scratch {
    /// For codes of `width`.
    pub(crate) fn new(width: usize) -> Self {
        Self {
            block: Block::new(width),
            largest: Vec::new(),
            chunks: Vec::new(),
            listed: vec![Vec::new(); QUERIES],
            batch: Vec::new(),
            measured: 0,
            settled: 0,
        }
    }

    /// Room for the maxima of `tiles` tiles.
    fn make_room(&mut self, tiles: usize) {
        if self.largest.len() < tiles {
            self.largest.resize(tiles, [[0; LANES]; GROUPS]);
            self.chunks.resize(tiles.div_ceil(CHUNK), [[0; LANES]; GROUPS]);
        }
    }
}

/// Some tiles against the queries of one block.
pub(crate) struct Search<'a, E = f32> {
    /// The map of both sides' codes.
    pub encoder: &'a Encoder,
    /// The second filter, where there is one.
    pub second: Option<Second<'a>>,
    /// The codes searched.
    pub codes: &'a Codes,
    /// The row of `features` at each place of the codes.
    pub order: &'a [u32],
    /// The rows themselves.
    pub features: Matrix<'a, E>,
    /// The tiles searched.
    pub tiles: Range<usize>,
    /// The queries whose codes are in the scratch's block.
    pub queries: &'a [&'a [f32]],
    /// One for each query: what is known before, and after, the search.
    pub best: &'a mut [Best],
    /// A query whose [`Best::worst`] falls below this D2 is searched no further; 0 for a whole search.
    pub enough: f64,
    /// Whether to go on.
    pub pulse: Option<&'a Pulse<'a>>,
}

impl<E: Element> Search<'_, E> {
    /// Runs the search.
    #[inline(always)]
    pub(crate) fn run<S: Simd>(mut self, simd: S, scratch: &mut Scratch) {
        scratch.settled = 0;
        for first in self.tiles.clone().step_by(STRETCH) {
            if self.pulse.is_some_and(Pulse::stopped) {
                return;
            }
            let count = STRETCH.min(self.tiles.end - first);
            scratch.make_room(count);
            maxima(simd, self.codes, &scratch.block, first, &mut scratch.largest[..count]);
            per_chunk(simd, &scratch.largest[..count], &mut scratch.chunks);
            for query in 0..self.queries.len() {
                if scratch.settled >> query & 1 == 0 {
                    self.seed(simd, scratch, query, first, count);
                    scratch.settled |= u64::from(self.best[query].worst() < self.enough) << query;
                }
            }
            if scratch.settled.count_ones() as usize == self.queries.len() {
                return;
            }
            let near = self.nears(scratch);
            self.list(simd, scratch, &near, first, count);
            let mut dense = Vec::new();
            for query in 0..self.queries.len() {
                if scratch.settled >> query & 1 == 0 && !self.settle(simd, scratch, query) {
                    dense.push(query);
                }
            }
            if !dense.is_empty() {
                let queries: Vec<&[f32]> = dense.iter().map(|&query| self.queries[query]).collect();
                let places = first * TILE..self.codes.rows().min((first + count) * TILE);
                scratch.measured += dense.len() * places.len();
                let rows = self.order[places].iter().map(|&row| row as usize);
                every_distance(simd, &queries, self.features, &rows, |query, squared, row| {
                    self.best[dense[query]].offer(squared, row);
                });
            }
        }
    }

    /// Offers the best rows of the query's best tiles of the stretch: the k best by the last filter of 2 k
    /// tiles, or, once k rows are known, the very best alone.
    #[inline(always)]
    fn seed<S: Simd>(&mut self, simd: S, scratch: &mut Scratch, query: usize, first: usize, count: usize) {
        let (group, lane) = (query / LANES, query % LANES);
        let of = |maxima: &Maxima| maxima[group][lane];
        let wanted = self.best[query].wanted();
        let tops = &mut scratch.batch;
        tops.clear();
        if wanted == 1 {
            let chunks = &scratch.chunks[..count.div_ceil(CHUNK)];
            let chunk = (0..chunks.len()).max_by_key(|&chunk| of(&chunks[chunk])).unwrap_or(0);
            let tiles = chunk * CHUNK..count.min((chunk + 1) * CHUNK);
            let tile = tiles.max_by_key(|&tile| of(&scratch.largest[tile])).unwrap_or(0);
            tops.push((of(&scratch.largest[tile]), tile as u32));
        } else {
            tops.extend(scratch.largest[..count].iter().enumerate().map(|(tile, maxima)| (of(maxima), tile as u32)));
            if 2 * wanted < tops.len() {
                tops.select_nth_unstable_by_key(2 * wanted - 1, |&(top, _)| Reverse(top));
                tops.truncate(2 * wanted);
            }
        }
        let near = self.near(scratch, query);
        let mut kept = 0;
        for i in 0..scratch.batch.len() {
            let (top, tile) = scratch.batch[i];
            let tile = first + tile as usize;
            if top >= near.threshold(self.codes.error(tile)) {
                let products = products(simd, self.codes, &scratch.block, tile, query);
                let row = simd.at_least(products, simd.splat_i32(top)).trailing_zeros() as usize;
                scratch.batch[kept] = (top, (tile * TILE + row) as u32);
                kept += 1;
            }
        }
        scratch.batch.truncate(kept);
        if wanted > 1 {
            self.sift(simd, &mut scratch.batch, query);
            scratch.batch.sort_unstable_by_key(|&(product, _)| Reverse(product));
        }
        for &(_, place) in scratch.batch.iter().take(wanted) {
            self.measure(simd, query, place as usize);
        }
        scratch.measured += wanted.min(scratch.batch.len());
    }

    /// A query and all that is known of it now.
    #[inline(always)]
    fn near(&self, scratch: &Scratch, query: usize) -> Near {
        self.encoder.near(&scratch.block.measures[query], self.tau(query))
    }

    /// How far the farthest of a query's nearest rows is, so far.
    #[inline(always)]
    fn tau(&self, query: usize) -> f64 {
        self.best[query].worst().sqrt()
    }

    /// All queries, and all that is known of them now.
    #[inline(always)]
    fn nears(&self, scratch: &Scratch) -> [Near; QUERIES] {
        let mut near = [self.near(scratch, 0); QUERIES];
        for (query, near) in near.iter_mut().enumerate().take(self.queries.len()).skip(1) {
            *near = self.near(scratch, query);
        }
        near
    }

    /// Lists, per query, the rows of the stretch that may be near.
    #[inline(always)]
    fn list<S: Simd>(&self, simd: S, scratch: &mut Scratch, near: &[Near; QUERIES], first: usize, count: usize) {
        let Scratch { block, largest, chunks, listed, settled, .. } = scratch;
        listed.iter_mut().for_each(Vec::clear);
        let last = self.queries.len() - 1;
        for (chunk, tiles) in largest[..count].chunks(CHUNK).enumerate() {
            let start = first + chunk * CHUNK;
            let error = (start..start + tiles.len()).fold(0.0_f64, |error, tile| error.max(self.codes.error(tile)));
            let mut thresholds = [[i32::MAX; LANES]; GROUPS];
            for (query, threshold) in thresholds.as_flattened_mut()[..self.queries.len()].iter_mut().enumerate() {
                if *settled >> query & 1 == 0 {
                    *threshold = near[query].threshold(error);
                }
            }
            let groups = last / LANES + 1;
            let mut any = 0;
            for group in 0..groups {
                any |= simd.at_least(simd.load_i32(&chunks[chunk][group]), simd.load_i32(&thresholds[group]));
            }
            if any == 0 {
                continue;
            }
            for (i, largest) in tiles.iter().enumerate() {
                for group in 0..groups {
                    let mut reached = simd.at_least(simd.load_i32(&largest[group]), simd.load_i32(&thresholds[group]));
                    while reached != 0 {
                        let lane = reached.trailing_zeros() as usize;
                        reached &= reached - 1;
                        let (query, tile) = (group * LANES + lane, start + i);
                        // The picks of a coreset err more from round to round, so a chunk's threshold alone
                        // would list twenty times as many tiles.
                        let threshold = near[query].threshold(self.codes.error(tile));
                        if largest[group][lane] >= threshold && listed[query].len() <= DENSE {
                            self.list_tile(simd, block, (query, tile), threshold, &near[query], &mut listed[query]);
                        }
                    }
                }
            }
        }
    }

    /// Lists the rows of a tile that may be near a query; `threshold` is the tile's.
    #[inline(always)]
    fn list_tile<S: Simd>(
        &self,
        simd: S,
        block: &Block,
        (query, tile): (usize, usize),
        threshold: i32,
        near: &Near,
        listed: &mut Vec<(i32, u32)>,
    ) {
        let products = products(simd, self.codes, block, tile, query);
        let mut reached = simd.at_least(products, simd.splat_i32(threshold));
        let mut each = [0; TILE];
        simd.store_i32(products, &mut each);
        while reached != 0 {
            let row = reached.trailing_zeros() as usize;
            reached &= reached - 1;
            let place = tile * TILE + row;
            if place < self.codes.rows() && each[row] >= near.threshold(self.codes.row_error(place)) {
                listed.push((each[row], place as u32));
            }
        }
    }

    /// Gives the listed rows of a query that may be near their distances, most promising first. Returns
    /// whether it got through them; where there are too many, it leaves the rest.
    #[inline(always)]
    fn settle<S: Simd>(&mut self, simd: S, scratch: &mut Scratch, query: usize) -> bool {
        if scratch.listed[query].len() > DENSE {
            return false;
        }
        scratch.listed[query].sort_unstable_by_key(|&(product, _)| Reverse(product));
        let mut measured = 0;
        for first in (0..scratch.listed[query].len()).step_by(BATCH) {
            let Scratch { listed, batch, .. } = scratch;
            batch.clear();
            batch.extend(listed[query][first..].iter().take(BATCH));
            if self.second.is_some() {
                self.sift(simd, batch, query);
                batch.sort_unstable_by_key(|&(product, _)| Reverse(product));
            }
            for i in 0..scratch.batch.len() {
                let (product, place) = scratch.batch[i];
                if let Some(&(_, next)) = scratch.batch.get(i + 1) {
                    let row = self.features.row(self.order[next as usize] as usize);
                    simd.prefetch(&row[..row.len().min(AHEAD)]);
                }
                if product >= self.last_threshold(scratch, query, place as usize) {
                    self.measure(simd, query, place as usize);
                    measured += 1;
                }
            }
            if measured > DENSE {
                break;
            }
        }
        scratch.measured += measured;
        measured <= DENSE
    }

    /// Drops the rows that the wide codes rule out; the others take their products.
    #[inline(always)]
    fn sift<S: Simd>(&self, simd: S, batch: &mut Vec<(i32, u32)>, query: usize) {
        let Some(Second { encoder, rows, queries, names }) = self.second else { return };
        for &(_, place) in &*batch {
            simd.prefetch(rows.row(self.order[place as usize] as usize));
        }
        let name = names[query] as usize;
        let near = encoder.near(&queries.measures[name], self.tau(query));
        let mut kept = 0;
        for i in 0..batch.len() {
            let place = batch[i].1;
            let row = self.order[place as usize] as usize;
            let measures = &rows.measures[row];
            let product = product(simd, queries.row(name), (rows.row(row), measures));
            batch[kept] = (product, place);
            kept += usize::from(product >= near.threshold(f64::from(measures.total)));
        }
        batch.truncate(kept);
    }

    /// What the product of a candidate must reach, by the last filter.
    #[inline(always)]
    fn last_threshold(&self, scratch: &Scratch, query: usize, place: usize) -> i32 {
        let Some(Second { encoder, rows, queries, names }) = self.second else {
            return self.near(scratch, query).threshold(self.codes.row_error(place));
        };
        let error = f64::from(rows.measures[self.order[place] as usize].total);
        encoder.near(&queries.measures[names[query] as usize], self.tau(query)).threshold(error)
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

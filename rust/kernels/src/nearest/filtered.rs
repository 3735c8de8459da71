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

use super::{Best, Filter, MemoryBank};
use crate::distance::{Wide, tile as distances};
use crate::filter::{Block, Encoder, GROUPS, QUERIES, TILE, maxima, products};
use crate::simd::{LANES, Operation, Simd};

/// Tiles of a stretch.
pub const STRETCH: usize = 1024;

/// Tiles that share a threshold: that of the largest error among them.
const CHUNK: usize = 32;

/// One product maximum per query of a block.
type Maxima = [[i32; LANES]; GROUPS];

/// What a thread keeps from block to block.
pub struct Scratch {
    block: Block,
    wide: Wide,
    largest: Vec<Maxima>,
    chunks: Vec<Maxima>,
    tiles: Vec<Vec<u32>>,
    candidates: Vec<(i32, u32)>,
}

impl Scratch {
    pub fn new(encoder: &Encoder) -> Self {
        Self {
            block: Block::new(encoder.width()),
            wide: Wide::with_capacity(QUERIES, encoder.cols()),
            largest: vec![[[0; LANES]; GROUPS]; STRETCH],
            chunks: vec![[[0; LANES]; GROUPS]; STRETCH / CHUNK],
            tiles: vec![Vec::new(); QUERIES],
            candidates: Vec::new(),
        }
    }
}

/// A bank's codes against the queries of one block.
pub struct Search<'a> {
    pub bank: &'a MemoryBank,
    pub filter: &'a Filter,
    pub queries: &'a [&'a [f32]],
    pub scratch: &'a mut Scratch,
    pub best: &'a mut [Best],
}

impl Operation for Search<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Search { bank, filter, queries, scratch, best } = self;
        let Filter { encoder, codes, .. } = filter;
        scratch.block.encode(simd, encoder, queries);
        scratch.wide.clear();
        queries.iter().for_each(|query| scratch.wide.push(query));
        for first in (0..codes.tiles()).step_by(STRETCH) {
            let count = STRETCH.min(codes.tiles() - first);
            maxima(simd, codes, &scratch.block, first, &mut scratch.largest[..count]);
            per_chunk(simd, &scratch.largest[..count], &mut scratch.chunks);
            for (query, best) in best.iter_mut().enumerate() {
                seed(simd, bank, filter, scratch, query, first, count, best);
            }
            list_tiles(simd, filter, scratch, first, count, best);
            for (query, best) in best.iter_mut().enumerate() {
                settle(simd, bank, filter, scratch, query, best);
            }
        }
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

/// Offers the best rows of the query's best tiles of the stretch: k of them, or, once k rows are known,
/// the very best alone.
#[allow(clippy::too_many_arguments, reason = "the parts of one search")]
#[inline(always)]
fn seed<S: Simd>(
    simd: S,
    bank: &MemoryBank,
    filter: &Filter,
    scratch: &mut Scratch,
    query: usize,
    first: usize,
    count: usize,
    best: &mut Best,
) {
    let (group, lane) = (query / LANES, query % LANES);
    let of = |maxima: &Maxima| maxima[group][lane];
    let wanted = if best.worst == f64::INFINITY { best.k } else { 1 };
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
    for &(top, tile) in &*tops {
        let tile = first + tile as usize;
        let products = products(simd, &filter.codes, &scratch.block, tile, query);
        let row = products.iter().position(|&product| product == top).unwrap_or(0);
        measure(simd, bank, filter, &scratch.wide, query, tile * TILE + row, best);
    }
}

/// Lists, per query, the tiles of the stretch that may hold a near row.
#[inline(always)]
fn list_tiles<S: Simd>(simd: S, filter: &Filter, scratch: &mut Scratch, first: usize, count: usize, best: &[Best]) {
    scratch.tiles.iter_mut().for_each(Vec::clear);
    let roots: Vec<f64> = best.iter().map(|best| best.worst.sqrt()).collect();
    for (chunk, tiles) in scratch.largest[..count].chunks(CHUNK).enumerate() {
        let start = first + chunk * CHUNK;
        let error = (start..start + tiles.len()).fold(0.0_f64, |error, tile| error.max(filter.codes.error(tile)));
        let mut thresholds = [[i32::MAX; LANES]; GROUPS];
        let measures = scratch.block.measures.iter();
        for (threshold, (measures, &root)) in thresholds.as_flattened_mut().iter_mut().zip(measures.zip(&roots)) {
            *threshold = filter.encoder.threshold(measures, root, error);
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
fn settle<S: Simd>(simd: S, bank: &MemoryBank, filter: &Filter, scratch: &mut Scratch, query: usize, best: &mut Best) {
    let Filter { encoder, codes, order } = filter;
    let measures = &scratch.block.measures[query];
    let root = best.worst.sqrt();
    scratch.candidates.clear();
    for &tile in &scratch.tiles[query] {
        let threshold = encoder.threshold(measures, root, codes.error(tile as usize));
        let products = products(simd, codes, &scratch.block, tile as usize, query);
        let places = (tile * TILE as u32..).zip(products).take(order.len() - tile as usize * TILE);
        let near = places.filter(|&(_, product)| product >= threshold);
        scratch.candidates.extend(near.map(|(place, product)| (product, place)));
    }
    scratch.candidates.sort_unstable_by_key(|&(product, _)| std::cmp::Reverse(product));
    for &(product, place) in &scratch.candidates {
        let place = place as usize;
        if product >= encoder.threshold(measures, best.worst.sqrt(), codes.error(place / TILE)) {
            measure(simd, bank, filter, &scratch.wide, query, place, best);
        }
    }
}

/// Offers the row at a place of the codes.
#[inline(always)]
fn measure<S: Simd>(
    simd: S,
    bank: &MemoryBank,
    filter: &Filter,
    wide: &Wide,
    query: usize,
    place: usize,
    best: &mut Best,
) {
    let row = filter.order[place] as usize;
    let [[squared]] = distances(simd, [wide.row(query)], [bank.row(row)]);
    best.offer(squared, row);
}

//! Search through the stages of a cascade.
//!
//! ```text
//! for each block of queries                                                          `Prepare`
//!   codes of every stage
//!   the tiles whose centroids have the largest products; their best rows get a distance      a first, tight τ
//! for each part of the bank, for each block                                          `Scan`
//!   for each tile
//!     products by the narrowest codes with all queries                               most of the work
//!     products by wider and wider codes with the queries that reach their thresholds
//!     the last stage lists rows
//!   now and then: the listed rows get their distances, which lower τ
//! ```
//!
//! *First thresholds.* The best row of the nearest tiles is within a percent of the nearest (`benches/NOTES.md`), so
//! hardly anything is gained by the order in which the bank is gone through: parts of it can be searched at the same
//! time, each with its own τ, which only falls. For k > 1 the k best rows serve: none of the k nearest is farther
//! than the k-th of them. A search for all rows within a distance has its τ already.
//!
//! *Few queries reach the wider codes* of a tile, and each costs there what it would cost alone: products are taken
//! query by query, sixteen rows at a time.
//!
//! *Data that codes cannot tell apart*, such as a query far from rows that are near each other, cost little more than
//! a search without codes: where too many rows of a window are listed for a query, it joins the others like it,
//! and the window is measured in register blocks.

use super::cascade::Cascade;
use super::codes::{CodedQueries, TILE, UNIT_QUERIES};
use super::encode::EncodeScratch;
use super::products::{NARROW, Sink, UnitProducts, all_products, for_each_reached, narrow_survivors, tile_products};
use super::seeds::{Prepare, Promising, Tops};
use super::thresholds::Thresholds;
use crate::context::{Context, Pulse};
use crate::distance::{Element, every_distance, pair};
use crate::error::Error;
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::simd::{Aligned, LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most queries of a block: their codes stay in the second-level cache beside those of some tiles. Tests see
/// several in small sets.
const BLOCK_QUERIES: usize = if cfg!(test) { 48 } else { 1024 };

/// The least queries of a block, where there are as many.
const LEAST_QUERIES: usize = if cfg!(test) { 4 } else { 32 };

/// Queries that are prepared before any is searched: their codes take some megabytes.
pub(crate) const WAVE_QUERIES: usize = 8 * BLOCK_QUERIES;

/// Parts of the bank and blocks of queries, multiplied, that are enough for each thread: the last one to end keeps
/// the others waiting for a fraction of its work.
const ITEMS_PER_THREAD: usize = 8;

/// Pieces, and the most tiles, between two looks at what was listed. Tests see several in small sets.
const WINDOW_PIECES: usize = if cfg!(test) { 1 } else { 8 };
const WINDOW_TILES: usize = WINDOW_PIECES * TOGETHER;

/// Listed rows of a window beyond which it is measured whole for a query.
const DENSE: u32 = (WINDOW_TILES * TILE / 4) as u32;

/// Queries that are measured against a whole window between two questions whether to go on.
const DENSE_QUERIES: usize = 64;

/// Listed rows ahead of the one that is measured whose values are asked for, and how many of them: the CPU finds the
/// rest itself.
pub(super) const AHEAD: usize = 2;
const AHEAD_VALUES: usize = 1024;

/// The most tiles of a piece, which go through the first stage together.
const TOGETHER: usize = 8;

/// Thresholds and what is left have room for whole groups of queries, which are multiplied together.
const GROUP: usize = UNIT_QUERIES;

/// Queries with their codes and what is known of their nearest rows.
#[derive(Debug)]
pub(super) struct Block<'a> {
    pub(super) queries: Vec<&'a [f32]>,
    /// One for each stage.
    pub(super) coded: Vec<CodedQueries>,
    pub(super) best: Vec<TopK>,
    pub(super) thresholds: Thresholds,
}

impl Block<'_> {
    /// Some blocks as one.
    fn joined(mut blocks: Vec<Self>) -> Option<Self> {
        if blocks.len() < 2 {
            return blocks.pop();
        }
        let stages = 0..blocks[0].coded.len();
        let coded = stages.map(|stage| CodedQueries::joined(blocks.iter().map(|block| &block.coded[stage]))).collect();
        let thresholds = Thresholds::joined(&blocks);
        let (mut queries, mut best) = (Vec::new(), Vec::new());
        for block in blocks {
            queries.extend(block.queries);
            best.extend(block.best);
        }
        Some(Self { queries, coded, best, thresholds })
    }

    /// Takes in the rows of a part of the bank.
    fn take(&mut self, found: Vec<Found>) {
        for Found { query, row, squared } in found {
            self.best[query as usize].offer(squared, row as usize);
        }
    }
}

/// One of the wanted rows of a part of the bank.
#[derive(Clone, Copy, Debug)]
struct Found {
    query: u32,
    row: u32,
    squared: f64,
}

impl Cascade {
    /// The wanted ones among `rows` of each query, [`WAVE_QUERIES`] at most. Of a group, all or none: only then do they
    /// have the slots of their numbers.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(crate) fn search<E: Element>(
        &self,
        context: &Context<'_>,
        features: Matrix<'_, E>,
        rows: &Runs,
        queries: &[&[f32]],
        wanted: Wanted,
    ) -> Result<Vec<TopK>, Error> {
        if queries.is_empty() {
            return Ok(Vec::new());
        }
        let (level, threads) = (context.level(), context.threads());
        let slots = rows.pieces(TILE, TOGETHER);
        let most_parts = (slots.len() / WINDOW_PIECES).max(1);
        let items = if threads == 1 { 1 } else { ITEMS_PER_THREAD * threads };
        // A bank of few parts is shared out by queries.
        let few = (items / most_parts).min(queries.len() / LEAST_QUERIES);
        let count = queries.len().div_ceil(BLOCK_QUERIES).max(few);
        // Whole groups of queries that are multiplied together.
        let size = queries.len().div_ceil(count).next_multiple_of(LANES);
        let (blocks, promising) = (queries.len().div_ceil(size), Promising::new(self, rows));
        let prepare = |scratch: &mut Scratch, queries| -> Block<'_> {
            level.run(Prepare { cascade: self, features, promising: &promising, queries, wanted, scratch })
        };
        let parts = items.div_ceil(blocks).min(most_parts);
        if parts == 1 {
            // What is prepared is searched at once, from the cache.
            let mut best: Vec<Vec<TopK>> = vec![Vec::new(); blocks];
            let items = best.iter_mut().zip(queries.chunks(size));
            context.for_each_long(items, Scratch::default, |scratch, (best, queries), pulse| {
                let (mut block, mut found) = (prepare(scratch, queries), Vec::new());
                let (pieces, shared) = (&slots[..], &[][..]);
                let cascade = self;
                level.run(Scan { cascade, features, block: &block, pieces, shared, found: &mut found, scratch, pulse });
                block.take(found);
                *best = block.best;
            })?;
            return Ok(best.into_iter().flatten().collect());
        }
        // Few blocks are prepared in pieces, for all threads to have some.
        let piece = size.div_ceil(threads.div_ceil(blocks)).next_multiple_of(LANES);
        let pieces: Vec<&[&[f32]]> = queries.chunks(size).flat_map(|block| block.chunks(piece)).collect();
        let mut prepared: Vec<Option<Block<'_>>> = pieces.iter().map(|_| None).collect();
        context.for_each(prepared.iter_mut().zip(pieces), Scratch::default, |scratch, (block, queries)| {
            *block = Some(prepare(scratch, queries));
        })?;
        let in_turn = prepared.chunks_mut(size.div_ceil(piece));
        let mut blocks: Vec<Block<'_>> =
            in_turn.filter_map(|pieces| Block::joined(pieces.iter_mut().filter_map(Option::take).collect())).collect();
        let part = |part: usize| &slots[slots.len() * part / parts..slots.len() * (part + 1) / parts];
        let items = (0..parts).flat_map(|at| blocks.iter().enumerate().map(move |(block, _)| (block, part(at))));
        let mut items: Vec<Item<'_>> = items.map(|(block, pieces)| Item { block, pieces, found: Vec::new() }).collect();
        let shared: Vec<Vec<AtomicU64>> =
            blocks.iter().map(|block| block.best.iter().map(shared_worst).collect()).collect();
        context.for_each_long(items.iter_mut(), Scratch::default, |scratch, item, pulse| {
            let Item { block, pieces, found } = item;
            let (block, shared) = (&blocks[*block], &shared[*block][..]);
            level.run(Scan { cascade: self, features, block, pieces, shared, found, scratch, pulse });
        })?;
        for Item { block, found, .. } in items {
            blocks[block].take(found);
        }
        Ok(blocks.into_iter().flat_map(|block| block.best).collect())
    }
}

/// A block of queries against some pieces of the bank.
struct Item<'a> {
    block: usize,
    pieces: &'a [Range<usize>],
    found: Vec<Found>,
}

/// The D2 within which the wanted rows of a query are known to lie, for the threads that scan other parts of the bank.
/// D2 is never negative, so its bits are in the order of its values.
fn shared_worst(best: &TopK) -> AtomicU64 {
    AtomicU64::new(best.worst().to_bits())
}

/// What a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) encode: EncodeScratch,
    /// All queries of the block.
    pub(super) all: Vec<u16>,
    /// The best rows of a query, once anything is found for it.
    best: Vec<TopK>,
    /// The D2 that the thresholds of a query are for: the worst of its best rows, here or in any part of the bank.
    within: Vec<f64>,
    /// Whether anything was found for a query.
    changed: Vec<bool>,
    thresholds: Thresholds,
    /// The queries that are left at each tile, and after the next stage.
    left: [Vec<u16>; TOGETHER],
    next: Vec<u16>,
    /// Rows of the window that may be near, and how many of each query.
    listed: Vec<Listed>,
    counts: Vec<u32>,
    /// The largest product listed for each query.
    largest: Vec<i32>,
    /// The tiles or rows of largest products: product, and slot.
    pub(super) tops: Tops,
    pub(super) floors: Vec<i32>,
    pub(super) maxima: Vec<[Aligned<[i32; LANES]>; 2]>,
    pub(super) rows: Vec<(i32, u32)>,
    /// Queries, and rows that are to give them their first thresholds.
    pub(super) best_rows: Vec<(u32, u32)>,
}

impl Scratch {
    /// Puts the listed row of the largest product of each query before the others: it is likely the nearest, and then
    /// they need not be measured.
    fn put_likely_first(&mut self) {
        let Self { listed, counts, largest, .. } = self;
        largest.clear();
        largest.resize(counts.len(), i32::MIN);
        for &Listed { product, query, .. } in &*listed {
            let largest = &mut largest[usize::from(query)];
            *largest = product.max(*largest);
        }
        let mut likely = 0;
        for i in 0..listed.len() {
            if listed[i].product == largest[usize::from(listed[i].query)] {
                listed.swap(likely, i);
                likely += 1;
            }
        }
    }
}

/// A row that may be near a query.
#[derive(Clone, Copy, Debug)]
struct Listed {
    product: i32,
    slot: u32,
    query: u16,
}

/// 0, 1, 2 …
pub(super) fn number(all: &mut Vec<u16>, count: usize) {
    all.clear();
    all.extend(0..count as u16);
}

/// Asks for the values of a row that is to be measured.
#[inline(always)]
pub(super) fn fetch<S: Simd, E: Element>(simd: S, row: &[E]) {
    simd.prefetch(&row[..row.len().min(AHEAD_VALUES)]);
}

/// Some tiles against the queries of a block.
struct Scan<'a, 'q, E> {
    cascade: &'a Cascade,
    features: Matrix<'a, E>,
    block: &'a Block<'q>,
    /// Slots, [`TOGETHER`] tiles at most.
    pieces: &'a [Range<usize>],
    /// What all parts of the bank have found, see [`shared_worst`]; empty where there is one.
    shared: &'a [AtomicU64],
    found: &'a mut Vec<Found>,
    scratch: &'a mut Scratch,
    pulse: &'a Pulse<'a>,
}

impl<E: Element> Operation for Scan<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        self.begin();
        for window in self.pieces.chunks(WINDOW_PIECES) {
            if self.pulse.stopped() {
                return;
            }
            self.take_shared();
            {
                let unit = simd.matrix_unit();
                for slots in window {
                    self.list(simd, &unit, slots.clone());
                }
            }
            self.measure_listed(simd);
            self.measure_dense(simd, window);
        }
        let Scratch { best, changed, .. } = self.scratch;
        for (query, best) in best.iter_mut().enumerate().filter(|&(query, _)| changed[query]) {
            let found = best.sorted().iter();
            self.found.extend(found.map(|&(squared, row)| Found { query: query as u32, row: row as u32, squared }));
        }
    }
}

impl<E: Element> Scan<'_, '_, E> {
    /// Readies the scratch for the block.
    fn begin(&mut self) {
        let Self { block, scratch, .. } = self;
        let count = block.queries.len();
        number(&mut scratch.all, count);
        scratch.left.iter_mut().for_each(|left| left.resize(count.next_multiple_of(GROUP), 0));
        scratch.next.resize(count.next_multiple_of(GROUP), 0);
        scratch.counts.clear();
        scratch.counts.resize(count, 0);
        scratch.listed.clear();
        scratch.best.resize(count, TopK::new(Wanted::Nearest(1)));
        scratch.within.clear();
        scratch.within.extend(block.best.iter().map(TopK::worst));
        scratch.changed.clear();
        scratch.changed.resize(count, false);
        scratch.thresholds.0.clone_from(&block.thresholds.0);
    }

    /// Lowers the thresholds of queries that have nearer rows in another part of the bank. When that is seen changes
    /// what is measured, never what is found.
    fn take_shared(&mut self) {
        for (query, shared) in self.shared.iter().enumerate() {
            let known = f64::from_bits(shared.load(Ordering::Relaxed));
            if known < self.scratch.within[query] {
                self.scratch.within[query] = known;
                self.scratch.thresholds.set(self.cascade, &self.block.coded, query, known);
            }
        }
    }

    /// Lists the rows in the slots of a piece that may be near.
    #[inline(always)]
    fn list<S: Simd>(&mut self, simd: S, unit: &S::MatrixUnit, slots: Range<usize>) {
        let tiles = slots.start / TILE..slots.end.div_ceil(TILE);
        let Self { cascade, block, scratch, .. } = self;
        let Scratch { all, thresholds: Thresholds(thresholds), left, next, listed, counts, .. } = &mut **scratch;
        let last = cascade.stages.len() - 1;
        let class = |stage: usize, tile: usize| usize::from(cascade.stages[stage].class[tile]);
        let codes = &cascade.stages[0].codes;
        let of = std::array::from_fn(|i| &thresholds[0][class(0, (tiles.start + i).min(tiles.end - 1))][..]);
        if last == 0 {
            let mut sink = Lists { thresholds: of, first: tiles.start, slots, listed, counts };
            all_products(simd, unit, codes, tiles, &block.coded[0], all, &mut sink);
            return;
        }
        let mut survived = [0; TOGETHER];
        let width = codes.width();
        if width < NARROW || width == NARROW && S::MANY_REGISTERS && !S::HAS_MATRIX_UNIT {
            for (i, tile) in tiles.clone().enumerate() {
                let (queries, of, left) = (&block.coded[0], of[i], &mut left[i]);
                survived[i] = match width {
                    16 => narrow_survivors::<S, 4>(simd, codes, tile, queries, of, left),
                    32 => narrow_survivors::<S, 8>(simd, codes, tile, queries, of, left),
                    _ => narrow_survivors::<S, 16>(simd, codes, tile, queries, of, left),
                };
            }
        } else {
            let left = left.each_mut().map(|left| &mut left[..]);
            let mut sink = Survivors { thresholds: of, left, counts: [0; TOGETHER] };
            all_products(simd, unit, codes, tiles.clone(), &block.coded[0], all, &mut sink);
            survived = sink.counts;
        }
        for (i, tile) in tiles.enumerate() {
            let mut count = survived[i];
            for stage in 1..last {
                if count == 0 {
                    break;
                }
                let of = &thresholds[stage][class(stage, tile)][..];
                let mut sink = Survivors { thresholds: [of], left: [next], counts: [0] };
                let codes = &cascade.stages[stage].codes;
                tile_products(simd, codes, tile, &block.coded[stage], &left[i][..count], &mut sink);
                count = sink.counts[0];
                std::mem::swap(&mut left[i], next);
            }
            if count > 0 {
                let of = &thresholds[last][class(last, tile)][..];
                let codes = &cascade.stages[last].codes;
                let mut sink = Lists { thresholds: [of], first: tile, slots: slots.clone(), listed, counts };
                tile_products(simd, codes, tile, &block.coded[last], &left[i][..count], &mut sink);
            }
        }
    }

    /// Gives the listed rows that may still be near their distances.
    #[inline(always)]
    fn measure_listed<S: Simd>(&mut self, simd: S) {
        let last = self.cascade.stages.len() - 1;
        self.scratch.put_likely_first();
        for i in 0..self.scratch.listed.len() {
            if let Some(next) = self.scratch.listed.get(i + AHEAD) {
                fetch(simd, self.features.row(self.cascade.order[next.slot as usize] as usize));
            }
            let Listed { product, slot, query } = self.scratch.listed[i];
            let (slot, query) = (slot as usize, usize::from(query));
            let class = usize::from(self.cascade.stages[last].class[slot / TILE]);
            // τ may have fallen since.
            let near = product >= self.scratch.thresholds.0[last][class][query];
            if near && self.scratch.counts[query] <= DENSE {
                let row = self.cascade.order[slot] as usize;
                let squared = pair(simd, self.block.queries[query], self.features.row(row));
                self.offer(query, squared, row);
            }
        }
        self.scratch.listed.clear();
    }

    /// Takes in a distance.
    #[inline(always)]
    fn offer(&mut self, query: usize, squared: f64, row: usize) {
        if squared <= self.scratch.within[query] {
            let best = &mut self.scratch.best[query];
            if !self.scratch.changed[query] {
                self.scratch.changed[query] = true;
                best.clone_from(&self.block.best[query]);
            }
            best.offer(squared, row);
            let closer = best.worst();
            if closer < self.scratch.within[query] {
                self.scratch.within[query] = closer;
                self.scratch.thresholds.set(self.cascade, &self.block.coded, query, closer);
                if let Some(shared) = self.shared.get(query) {
                    shared.fetch_min(closer.to_bits(), Ordering::Relaxed);
                }
            }
        }
    }

    /// Gives all rows of the window their distances to the queries of which too many were listed, and forgets how
    /// many there were.
    #[inline(always)]
    fn measure_dense<S: Simd>(&mut self, simd: S, window: &[Range<usize>]) {
        let mut dense = Vec::new();
        for (query, count) in self.scratch.counts.iter_mut().enumerate() {
            if *count > DENSE {
                dense.push(query);
            }
            *count = 0;
        }
        let order = &self.cascade.order;
        let rows = window.iter().flat_map(|slots| &order[slots.clone()]).map(|&row| row as usize);
        for dense in dense.chunks(DENSE_QUERIES) {
            if self.pulse.stopped() {
                return;
            }
            let queries: Vec<&[f32]> = dense.iter().map(|&query| self.block.queries[query]).collect();
            every_distance(simd, &queries, self.features, &rows, |at, squared, row| {
                self.offer(dense[at], squared, row);
            });
        }
    }
}

/// Keeps the queries that have a row in the tile whose product reaches their threshold.
struct Survivors<'a, const TILES: usize> {
    thresholds: [&'a [i32]; TILES],
    left: [&'a mut [u16]; TILES],
    counts: [usize; TILES],
}

impl<const TILES: usize> Sink for Survivors<'_, TILES> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
        let reached = simd.at_least(products, simd.splat_i32(self.thresholds[tile][query]));
        // Written always, counted where it belongs: a branch would often be guessed wrong.
        self.left[tile][self.counts[tile]] = query as u16;
        self.counts[tile] += usize::from(reached != 0);
    }

    #[inline(always)]
    fn take_sixteen<S: Simd, const COARSER: bool>(
        &mut self,
        simd: S,
        tile: usize,
        first: usize,
        products: &UnitProducts<'_, S, COARSER>,
    ) {
        // Counted in a register: in memory, each query would wait for the count of the one before.
        let mut count = self.counts[tile];
        let thresholds: &[i32; LANES] = self.thresholds[tile][first..].first_chunk().unwrap();
        let left = &mut *self.left[tile];
        for (i, &threshold) in thresholds.iter().enumerate() {
            let reached = simd.at_least(products.of(simd, i), simd.splat_i32(threshold));
            left[count] = (first + i) as u16;
            count += usize::from(reached != 0);
        }
        self.counts[tile] = count;
    }
}

/// Lists the rows whose products reach the thresholds of queries.
struct Lists<'a, const TILES: usize> {
    thresholds: [&'a [i32]; TILES],
    first: usize,
    /// The others are padding, or those of other groups.
    slots: Range<usize>,
    listed: &'a mut Vec<Listed>,
    counts: &'a mut [u32],
}

impl<const TILES: usize> Sink for Lists<'_, TILES> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
        let reached = simd.at_least(products, simd.splat_i32(self.thresholds[tile][query]));
        for_each_reached(simd, products, reached, |lane, product| {
            let slot = (self.first + tile) * TILE + lane;
            if self.slots.contains(&slot) && self.counts[query] <= DENSE {
                self.counts[query] += 1;
                self.listed.push(Listed { product, slot: slot as u32, query: query as u16 });
            }
        });
    }
}

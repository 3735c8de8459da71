//! Some parts of the bank against a block of queries.
//!
//! *Few queries reach the wider codes* of a tile, and each costs there what it would cost alone: products are taken
//! query by query, sixteen rows at a time.
//!
//! *Data that codes cannot tell apart*, such as a query far from rows that are near each other, cost little more than
//! a search without codes: where too many rows of a window are listed for some queries, these queries are
//! measured against the whole window in register blocks.

use super::block::{Block, Found, number};
use super::cascade::Cascade;
use super::codes::{TILE, UNIT_QUERIES};
use super::products::{NARROW, Sink, UnitProducts, all_products, for_each_reached, narrow_survivors, tile_products};
use super::thresholds::Thresholds;
use crate::context::Pulse;
use crate::distance::{AHEAD, Element, every_distance, fetch, pair};
use crate::matrix::Matrix;
use crate::simd::{LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pieces, and the most tiles, of a window, after which the listed rows get their distances. Tests see several in small
/// sets.
pub(super) const WINDOW_PIECES: usize = if cfg!(test) { 1 } else { 8 };
const WINDOW_TILES: usize = WINDOW_PIECES * TOGETHER;

/// Listed rows of a window beyond which it is measured whole for a query.
const DENSE: u32 = (WINDOW_TILES * TILE / 4) as u32;

/// Queries that are measured against a whole window between two questions whether to go on.
const DENSE_QUERIES: usize = 64;

/// The most tiles of a piece, which go through the first stage together.
pub(super) const TOGETHER: usize = 8;

/// Queries that a matrix unit multiplies together: `left` has room for whole groups of them.
const GROUP: usize = UNIT_QUERIES;

/// What a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct ScanScratch {
    /// All queries of the block.
    all: Vec<u16>,
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
}

impl ScanScratch {
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

/// Some tiles against the queries of a block.
pub(super) struct Scan<'a, 'q, E> {
    pub(super) cascade: &'a Cascade,
    pub(super) features: Matrix<'a, E>,
    pub(super) block: &'a Block<'q>,
    /// Slots, [`TOGETHER`] tiles at most.
    pub(super) pieces: &'a [Range<usize>],
    /// By query, what all parts of the bank know of its near rows (`shared_worst`); empty where the bank is one part.
    pub(super) shared: &'a [AtomicU64],
    pub(super) found: &'a mut Vec<Found>,
    pub(super) scratch: &'a mut ScanScratch,
    pub(super) pulse: &'a Pulse<'a>,
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
        let ScanScratch { best, changed, .. } = self.scratch;
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
        let ScanScratch { all, thresholds: Thresholds(thresholds), left, next, listed, counts, .. } = &mut **scratch;
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

//! Brings rows up to date: a search for the nearest among the picks that they have not seen.
//!
//! ```text
//! for each stretch of the picks' codes
//!   the pick of the largest product of each row      the nearest in the codes' metric
//!   where it may be near: its distance; a row that falls below the boundary stops here, and most do
//!   the others: every pick of the stretch whose product reaches the threshold, which is now tighter
//! ```
//!
//! The second look takes products again, of few rows: keeping those of the first costs more.

use super::{Ranked, Selection, SelectionCodes};
use crate::context::Pulse;
use crate::distance::{AHEAD, every_distance, fetch, pair};
use crate::filter::{Bound, CodedQueries, Codes, Sink, TILE, all_products, for_each_reached, tile_products};
use crate::simd::{Operation, Simd};
use std::cmp::Reverse;
use std::ops::Range;

/// The most rows of an item: their state is a bit each of a word.
pub(super) const REFRESHED: usize = 64;

/// Without codes, picks between two looks at which rows have fallen below the boundary: few, since most rows
/// fall early, but enough that a row is read for many distances.
const CHUNK_PICKS: usize = 128;

/// Tiles of a stretch: the first thresholds come early, and few stretches have a second look at them. Tests see
/// several in small sets.
const STRETCH_TILES: usize = if cfg!(test) { 8 } else { 1024 };

/// Tiles that share a threshold: picks err more from round to round.
const CHUNK_TILES: usize = if cfg!(test) { 2 } else { 16 };

/// Listed picks of a stretch beyond which a row is measured against all of them.
const DENSE: usize = STRETCH_TILES * TILE / 4;

/// Lowers the values of some rows, of which the first has seen the fewest picks, by the distances to the
/// picks that it has not seen. In the answer, bit i is set where row i stopped early, because its value fell below
/// `stop_below`: it has not seen all picks.
pub(super) struct Refresh<'a> {
    pub selection: &'a Selection<'a>,
    pub rows: &'a mut [Ranked],
    pub stop_below: f64,
    pub scratch: &'a mut RefreshScratch,
    pub pulse: &'a Pulse<'a>,
}

/// What a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct RefreshScratch {
    queries: CodedQueries,
    /// The rows that have not stopped, and those that look again.
    open: Vec<u16>,
    again: Vec<u16>,
    /// By row: what is known of its near picks, what a product must reach for that, and the largest that did, with its
    /// slot.
    bounds: Vec<Bound>,
    thresholds: Vec<i32>,
    largest: Vec<Option<(i32, usize)>>,
    /// Product, row and slot.
    listed: Vec<(i32, u16, u32)>,
}

impl Operation for Refresh<'_> {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> u64 {
        match &self.selection.codes {
            Some(codes) => self.by_codes(simd, codes),
            None => self.by_distances(simd),
        }
    }
}

impl Refresh<'_> {
    #[inline(always)]
    fn by_codes<S: Simd>(&mut self, simd: S, codes: &SelectionCodes) -> u64 {
        let picks = &codes.picks;
        let count = self.rows.len();
        self.scratch.queries.gather(&codes.plan.encoded[0], self.rows.iter().map(|row| row.index));
        self.scratch.open.clear();
        self.scratch.open.extend(0..count as u16);
        self.scratch.bounds.clear();
        for row in 0..count {
            let bound = self.bound(codes, row);
            self.scratch.bounds.push(bound);
        }
        let (mut stopped, mut measured) = (0, 0);
        let seen = self.selection.seen[self.rows[0].index] as usize;
        // The first tile may hold picks seen before: they lower nothing again.
        for first in (seen / TILE..picks.tiles()).step_by(STRETCH_TILES) {
            if self.scratch.open.is_empty() || self.pulse.stopped() {
                break;
            }
            let stretch = first..picks.tiles().min(first + STRETCH_TILES);
            self.find_largest(simd, codes, stretch.clone());
            self.scratch.again.clear();
            for at in 0..self.scratch.open.len() {
                if let Some(&next) = self.scratch.open.get(at + AHEAD) {
                    self.fetch(simd, usize::from(next));
                }
                let row = self.scratch.open[at];
                let Some((_, slot)) = self.scratch.largest[usize::from(row)] else { continue };
                measured += 1;
                self.lower(simd, codes, usize::from(row), slot);
                if self.rows[usize::from(row)].value < self.stop_below {
                    stopped |= 1 << row;
                } else {
                    self.scratch.again.push(row);
                }
            }
            self.scratch.open.retain(|row| stopped >> row & 1 == 0);
            if !self.scratch.again.is_empty() {
                measured += self.look_again(simd, codes, stretch);
            }
        }
        self.selection.add_distances(measured);
        stopped
    }

    /// What is known of the picks near a row.
    #[inline(always)]
    fn bound(&self, codes: &SelectionCodes, row: usize) -> Bound {
        codes.plan.encoder.stages()[0].bound(&self.scratch.queries.measures()[row], self.rows[row].value.sqrt())
    }

    /// What the products of a row must reach for picks that err by at most `epsilon`.
    #[inline(always)]
    fn threshold(&self, codes: &SelectionCodes, row: usize, epsilon: f64) -> i32 {
        self.scratch.queries.offset_threshold(row, &self.scratch.bounds[row], epsilon, codes.picks.offset())
    }

    /// The largest product of each open row with the picks of a stretch, where it reaches the threshold of its chunk.
    #[inline(always)]
    fn find_largest<S: Simd>(&mut self, simd: S, codes: &SelectionCodes, stretch: Range<usize>) {
        let count = self.rows.len();
        self.scratch.thresholds.clear();
        self.scratch.thresholds.resize(count, i32::MAX);
        self.scratch.largest.clear();
        self.scratch.largest.resize(count, None);
        let unit = simd.matrix_unit();
        for chunk in chunks(stretch) {
            let epsilon = largest_epsilon(&codes.picks, chunk.clone());
            for at in 0..self.scratch.open.len() {
                let row = usize::from(self.scratch.open[at]);
                let above = self.scratch.largest[row].map_or(i32::MIN, |(product, _)| product.saturating_add(1));
                self.scratch.thresholds[row] = self.threshold(codes, row, epsilon).max(above);
            }
            let RefreshScratch { queries, open, thresholds, largest, .. } = &mut *self.scratch;
            let mut sink = Largest { first: chunk.start, thresholds, found: largest };
            all_products(simd, &unit, &codes.picks, chunk, queries, open, &mut sink);
        }
    }

    /// Measures all picks of a stretch that may be nearer to the rows that look again. Returns how many distances
    /// were taken.
    #[inline(always)]
    fn look_again<S: Simd>(&mut self, simd: S, codes: &SelectionCodes, stretch: Range<usize>) -> usize {
        let picks = &codes.picks;
        self.scratch.listed.clear();
        let most = DENSE * self.scratch.again.len();
        for chunk in chunks(stretch.clone()) {
            let epsilon = largest_epsilon(picks, chunk.clone());
            for at in 0..self.scratch.again.len() {
                let row = usize::from(self.scratch.again[at]);
                self.scratch.thresholds[row] = self.threshold(codes, row, epsilon);
            }
            let RefreshScratch { queries, again, bounds, thresholds, listed, .. } = &mut *self.scratch;
            for tile in chunk {
                let (selection, tile_epsilon) = (self.selection, picks.epsilon(tile));
                let mut sink = Lists { selection, codes, queries, bounds, thresholds, tile, tile_epsilon, listed };
                tile_products(simd, picks, tile, queries, again, &mut sink);
            }
            if self.scratch.listed.len() > most {
                return self.measure_all(simd, stretch.start * TILE..picks.rows().min(stretch.end * TILE));
            }
        }
        // The largest products first: after them few reach their thresholds.
        self.scratch.listed.sort_unstable_by_key(|&(product, ..)| Reverse(product));
        let mut measured = 0;
        for at in 0..self.scratch.listed.len() {
            let (product, row, slot) = self.scratch.listed[at];
            let row = usize::from(row);
            let pick = self.selection.picks[slot as usize] as usize;
            let epsilon = f64::from(codes.plan.encoded[0].measures[pick].epsilon);
            let Ranked { value, index } = self.rows[row];
            if product >= self.threshold(codes, row, epsilon)
                && !codes.rules_out(simd, index, pick, value.max(0.0).sqrt())
            {
                measured += 1;
                self.lower(simd, codes, row, slot as usize);
            }
        }
        measured
    }

    /// Gives the rows that look again their distances to all picks of some slots. Returns how many were taken.
    #[inline(always)]
    fn measure_all<S: Simd>(&mut self, simd: S, slots: Range<usize>) -> usize {
        let Self { selection, rows, scratch, .. } = self;
        let again = &scratch.again;
        let queries: Vec<&[f32]> =
            again.iter().map(|&row| selection.features.row(rows[usize::from(row)].index)).collect();
        let picks = selection.picks[slots.clone()].iter().map(|&pick| pick as usize);
        every_distance(simd, &queries, selection.features, &picks, |at, squared, _| {
            let row = &mut rows[usize::from(again[at])];
            row.value = row.value.min(squared);
        });
        again.len() * slots.len()
    }

    /// Asks for what the distance of a row to the pick of its largest product will read.
    #[inline(always)]
    fn fetch<S: Simd>(&self, simd: S, row: usize) {
        if let Some((_, slot)) = self.scratch.largest[row] {
            let features = &self.selection.features;
            fetch(simd, features.row(self.rows[row].index));
            fetch(simd, features.row(self.selection.picks[slot] as usize));
        }
    }

    /// Lowers the value of a row by its distance to the pick in a slot.
    #[inline(always)]
    fn lower<S: Simd>(&mut self, simd: S, codes: &SelectionCodes, row: usize, slot: usize) {
        let Ranked { value, index } = self.rows[row];
        let features = &self.selection.features;
        let squared = pair(simd, features.row(index), features.row(self.selection.picks[slot] as usize));
        if squared < value {
            self.rows[row].value = squared;
            self.scratch.bounds[row] = self.bound(codes, row);
        }
    }

    #[inline(always)]
    fn by_distances<S: Simd>(&mut self, simd: S) -> u64 {
        let Self { selection, rows, stop_below, pulse, .. } = self;
        let seen = selection.seen[rows[0].index] as usize;
        let mut stopped = 0;
        // The latest picks first: none of these rows has seen them.
        for picks in selection.picks[seen..].rchunks(CHUNK_PICKS) {
            for (i, row) in rows.iter().enumerate() {
                stopped |= u64::from(row.value < *stop_below) << i;
            }
            let open: Vec<usize> = (0..rows.len()).filter(|row| stopped >> row & 1 == 0).collect();
            if open.is_empty() || pulse.stopped() {
                break;
            }
            let queries: Vec<&[f32]> = open.iter().map(|&row| selection.features.row(rows[row].index)).collect();
            selection.add_distances(queries.len() * picks.len());
            let picks = picks.iter().map(|&pick| pick as usize);
            let mut lowest: Vec<f64> = open.iter().map(|&row| rows[row].value).collect();
            every_distance(simd, &queries, selection.features, &picks, |row, squared, _| {
                lowest[row] = if squared < lowest[row] { squared } else { lowest[row] };
            });
            for (&row, lowest) in open.iter().zip(lowest) {
                rows[row].value = lowest;
            }
        }
        stopped
    }
}

/// The chunks of a stretch.
fn chunks(stretch: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    stretch.clone().step_by(CHUNK_TILES).map(move |first| first..stretch.end.min(first + CHUNK_TILES))
}

/// The largest ε of some tiles.
fn largest_epsilon(codes: &Codes, tiles: Range<usize>) -> f64 {
    tiles.fold(0.0, |epsilon, tile| codes.epsilon(tile).max(epsilon))
}

/// Keeps the largest product of each query that reaches its threshold, which it raises.
struct Largest<'a> {
    first: usize,
    thresholds: &'a mut [i32],
    found: &'a mut [Option<(i32, usize)>],
}

impl Sink for Largest<'_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
        let reached = simd.at_least(products, simd.splat_i32(self.thresholds[query]));
        // The threshold of a row that has stopped is the largest there is.
        if reached == 0 || self.thresholds[query] == i32::MAX {
            return;
        }
        for_each_reached(simd, products, reached, |lane, product| {
            if product >= self.thresholds[query] {
                self.thresholds[query] = product.saturating_add(1);
                self.found[query] = Some((product, (self.first + tile) * TILE + lane));
            }
        });
    }
}

/// Lists the picks of a tile whose products reach the thresholds of rows.
struct Lists<'a, 'b> {
    selection: &'a Selection<'b>,
    codes: &'a SelectionCodes,
    queries: &'a CodedQueries,
    bounds: &'a [Bound],
    /// Those of the chunk.
    thresholds: &'a [i32],
    tile: usize,
    tile_epsilon: f64,
    listed: &'a mut Vec<(i32, u16, u32)>,
}

impl Sink for Lists<'_, '_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, _: usize, query: usize, products: S::I32) {
        if simd.at_least(products, simd.splat_i32(self.thresholds[query])) == 0 {
            return;
        }
        let SelectionCodes { plan, picks } = self.codes;
        let threshold = |epsilon| self.queries.offset_threshold(query, &self.bounds[query], epsilon, picks.offset());
        let reached = simd.at_least(products, simd.splat_i32(threshold(self.tile_epsilon)));
        for_each_reached(simd, products, reached, |lane, product| {
            let slot = self.tile * TILE + lane;
            // What lies beyond is padding.
            let Some(&pick) = self.selection.picks[..picks.rows()].get(slot) else { return };
            if product >= threshold(f64::from(plan.encoded[0].measures[pick as usize].epsilon)) {
                self.listed.push((product, query as u16, slot as u32));
            }
        });
    }
}

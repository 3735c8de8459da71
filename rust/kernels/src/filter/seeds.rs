//! The first thresholds of a search: the distances of the best rows of the tiles whose centroids are nearest.

use super::block::{Block, number};
use super::cascade::Cascade;
use super::codes::{CodedQueries, Codes, TILE};
use super::encode::{Encode, EncodeScratch};
use super::encoder::{BATCH_ROWS, EncodedPart};
use super::products::{Sink, all_products, for_each_reached, one_product};
use super::thresholds::Thresholds;
use crate::distance::{AHEAD, Element, fetch, pair};
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::simd::{Aligned, LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::ops::Range;

/// The most tiles whose rows give the first thresholds, and the least number of tiles for each of them: more bring the
/// thresholds hardly nearer (`benches/NOTES.md`).
const SEED_TILES: usize = 16;
const TILES_PER_SEED: usize = 64;

/// The rows of those tiles are compared by codes at least this wide.
const SEED_WIDTH: usize = 64;

/// The first floors come from two tiles of centroids in every so many.
const SAMPLED: usize = 8;

/// How many times the wanted centroids are listed before all but the best are struck out.
const ROOM: usize = 4;

/// A product below all but those of padding.
const LOWEST: i32 = i32::MIN / 4;

/// The tiles that are searched, by their centroids.
pub(super) struct Promising<'a> {
    centroids: Cow<'a, Codes>,
    /// The slots of each that are searched, where not all are.
    slots: Option<Vec<Range<usize>>>,
}

impl<'a> Promising<'a> {
    pub(super) fn new(cascade: &'a Cascade, rows: &Runs) -> Self {
        if rows.len() == cascade.order.len() {
            return Self { centroids: Cow::Borrowed(&cascade.centroids), slots: None };
        }
        let slots = rows.pieces(TILE, 1);
        let centroids = cascade.centroids.picked(slots.iter().map(|slots| slots.start / TILE));
        Self { centroids: Cow::Owned(centroids), slots: Some(slots) }
    }

    /// Those of a tile that are searched.
    #[inline(always)]
    fn slots(&self, tile: usize, rows: usize) -> Range<usize> {
        match &self.slots {
            Some(slots) => slots[tile].clone(),
            None => tile * TILE..rows.min((tile + 1) * TILE),
        }
    }
}

/// What a thread keeps from item to item.
#[derive(Debug, Default)]
pub(super) struct SeedScratch {
    encode: EncodeScratch,
    /// All queries of the block.
    all: Vec<u16>,
    /// The tiles of largest products.
    tops: Tops,
    floors: Vec<i32>,
    maxima: Vec<[Aligned<[i32; LANES]>; 2]>,
    /// The rows of largest products of a query: product, and slot.
    rows: Vec<(i32, u32)>,
    /// Queries, and rows that are to give them their first thresholds.
    best_rows: Vec<(u32, u32)>,
}

/// Encodes queries and finds their first thresholds.
pub(super) struct Prepare<'a, 'q, E> {
    pub cascade: &'a Cascade,
    pub features: Matrix<'a, E>,
    pub promising: &'a Promising<'a>,
    pub queries: &'a [&'q [f32]],
    pub wanted: Wanted,
    pub scratch: &'a mut SeedScratch,
}

impl<'q, E: Element> Operation for Prepare<'_, 'q, E> {
    type Output = Block<'q>;

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) -> Block<'q> {
        let coded = coded_queries(simd, self.cascade, self.queries, &mut self.scratch.encode);
        let mut best = vec![TopK::new(self.wanted); self.queries.len()];
        if let Wanted::Nearest(k) = self.wanted {
            self.offer_seeds(simd, k, &coded, &mut best);
        }
        let thresholds = Thresholds::new(self.cascade, &coded, &best);
        Block { queries: self.queries.to_vec(), coded, best, thresholds }
    }
}

impl<E: Element> Prepare<'_, '_, E> {
    /// Gives the best rows of the nearest tiles their distances.
    #[inline(always)]
    fn offer_seeds<S: Simd>(&mut self, simd: S, k: usize, coded: &[CodedQueries], best: &mut [TopK]) {
        let Self { cascade, features, promising, queries, scratch, .. } = self;
        let share = (promising.centroids.rows() / TILES_PER_SEED).clamp(1, SEED_TILES);
        // The last tile may have few rows.
        let wanted = share.max(if k == 1 { 1 } else { 1 + (2 * k).div_ceil(TILE) });
        let SeedScratch { all, tops, floors, maxima, rows, best_rows, .. } = &mut **scratch;
        number(all, queries.len());
        tops.clear(queries.len(), wanted);
        floors.clear();
        floors.resize(queries.len(), LOWEST);
        let (centroids, of_stage) = (&*promising.centroids, &coded[cascade.centroid_stage]);
        {
            let unit = simd.matrix_unit();
            // Among few centroids, floors come with the first ones.
            if wanted <= 2 * LANES && centroids.tiles() > 2 * SAMPLED {
                maxima.clear();
                maxima.resize(queries.len(), [Aligned([LOWEST; LANES]); 2]);
                for first in (0..centroids.tiles()).step_by(SAMPLED) {
                    let tiles = first..centroids.tiles().min(first + 2);
                    all_products(simd, &unit, centroids, tiles, of_stage, all, &mut Maxima(maxima));
                }
                for (floor, [largest, second]) in floors.iter_mut().zip(maxima) {
                    let mut both = [largest.0, second.0];
                    *floor = *both.as_flattened_mut().select_nth_unstable(2 * LANES - wanted).1;
                }
            }
            let mut sink = Largest { tops, floors };
            all_products(simd, &unit, centroids, 0..centroids.tiles(), of_stage, all, &mut sink);
        }
        let stages = &cascade.stages;
        let stage = stages.iter().position(|stage| stage.codes.width() >= SEED_WIDTH).unwrap_or(stages.len() - 1);
        let codes = &stages[stage].codes;
        best_rows.clear();
        for query in 0..queries.len() {
            rows.clear();
            let mut floor = i32::MIN;
            for &(_, tile) in tops.largest(query) {
                let slots = promising.slots(tile as usize, codes.rows());
                let products = one_product(simd, codes, slots.start / TILE, &coded[stage], query);
                if k == 1 && slots.len() == TILE {
                    floor = floor.max(largest_of(simd, products));
                }
                let reached = simd.at_least(products, simd.splat_i32(floor));
                let first = slots.start / TILE * TILE;
                for_each_reached(simd, products, reached, |lane, product| {
                    if slots.contains(&(first + lane)) {
                        rows.push((product, (first + lane) as u32));
                    }
                });
                if rows.len() >= ROOM * k {
                    put_largest_first(rows, k);
                    rows.truncate(k);
                    floor = least(rows);
                }
            }
            put_largest_first(rows, k);
            rows.truncate(k);
            best_rows.extend(rows.iter().map(|&(_, slot)| (query as u32, cascade.order[slot as usize])));
        }
        for (i, &(query, row)) in best_rows.iter().enumerate() {
            if let Some(&(_, next)) = best_rows.get(i + AHEAD) {
                fetch(simd, features.row(next as usize));
            }
            let (query, row) = (query as usize, row as usize);
            best[query].offer(pair(simd, queries[query], features.row(row)), row);
        }
    }
}

/// The codes of queries, stage by stage.
#[inline(always)]
pub(super) fn coded_queries<S: Simd>(
    simd: S,
    cascade: &Cascade,
    queries: &[&[f32]],
    scratch: &mut EncodeScratch,
) -> Vec<CodedQueries> {
    let stages = cascade.encoder.stages();
    let mut coded: Vec<CodedQueries> = Vec::with_capacity(stages.len());
    for stage in stages {
        coded.push(CodedQueries::with_room(stage.width(), queries.len()));
    }
    for first in (0..queries.len()).step_by(BATCH_ROWS) {
        let rows = &queries[first..queries.len().min(first + BATCH_ROWS)];
        let mut outputs: Vec<EncodedPart<'_>> = Vec::with_capacity(stages.len());
        for coded in &mut coded {
            outputs.push(coded.part(first, rows.len()));
        }
        Encode { encoder: &cascade.encoder, rows, outputs: &mut outputs, leading: &mut [], coarser: true, scratch }
            .run(simd);
    }
    coded.into_iter().map(CodedQueries::encoded).collect()
}

/// Puts the `wanted` largest of a list before the others, in any order.
fn put_largest_first(list: &mut [(i32, u32)], wanted: usize) {
    if wanted < list.len() {
        list.select_nth_unstable_by_key(wanted - 1, |&(product, _)| Reverse(product));
    }
}

/// The largest of sixteen products.
#[inline(always)]
fn largest_of<S: Simd>(simd: S, products: S::I32) -> i32 {
    let mut each = [0; LANES];
    simd.store_i32(products, &mut each);
    each.into_iter().fold(i32::MIN, i32::max)
}

/// The smallest product of a list.
fn least(list: &[(i32, u32)]) -> i32 {
    list.iter().fold(i32::MAX, |least, &(product, _)| least.min(product))
}

/// Tiles of large products for each query, and those products.
#[derive(Debug, Default)]
struct Tops {
    wanted: usize,
    /// So many of each query at most.
    room: usize,
    listed: Vec<(i32, u32)>,
    counts: Vec<usize>,
}

impl Tops {
    /// None yet of so many queries.
    fn clear(&mut self, queries: usize, wanted: usize) {
        self.wanted = wanted;
        self.room = ROOM * wanted + LANES;
        self.listed.resize(queries * self.room, (0, 0));
        self.counts.clear();
        self.counts.resize(queries, 0);
    }

    #[inline(always)]
    fn push(&mut self, query: usize, top: (i32, u32)) {
        self.listed[query * self.room + self.counts[query]] = top;
        self.counts[query] += 1;
    }

    /// The `wanted` ones of a query with the largest products, in any order; the others are forgotten.
    fn largest(&mut self, query: usize) -> &[(i32, u32)] {
        let listed = &mut self.listed[query * self.room..][..self.counts[query]];
        put_largest_first(listed, self.wanted);
        self.counts[query] = self.counts[query].min(self.wanted);
        &listed[..self.counts[query]]
    }
}

/// Keeps the two largest products of each query in each lane.
struct Maxima<'a>(&'a mut [[Aligned<[i32; LANES]>; 2]]);

impl Sink for Maxima<'_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, _: usize, query: usize, products: S::I32) {
        let mut each = [0; LANES];
        simd.store_i32(products, &mut each);
        let [largest, second] = &mut self.0[query];
        for ((largest, second), product) in largest.0.iter_mut().zip(&mut second.0).zip(each) {
            *second = (*second).max(product.min(*largest));
            *largest = (*largest).max(product);
        }
    }
}

/// Keeps the slots of the largest products of each query.
struct Largest<'a> {
    tops: &'a mut Tops,
    /// Below these products there are enough.
    floors: &'a mut [i32],
}

impl Sink for Largest<'_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
        let mut reached = simd.at_least(products, simd.splat_i32(self.floors[query]));
        if reached == 0 {
            return;
        }
        if self.tops.wanted == 1 {
            self.floors[query] = largest_of(simd, products);
            reached = simd.at_least(products, simd.splat_i32(self.floors[query]));
        }
        for_each_reached(simd, products, reached, |lane, product| {
            self.tops.push(query, (product, (tile * TILE + lane) as u32));
        });
        if self.tops.counts[query] >= ROOM * self.tops.wanted {
            self.floors[query] = least(self.tops.largest(query));
        }
    }
}

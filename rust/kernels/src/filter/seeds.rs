//! The first thresholds of a search: the distances of the best rows of the tiles whose centroids are nearest.

use super::cascade::Cascade;
use super::codes::{CodedQueries, Codes, TILE};
use super::encode::{Encode, EncodeScratch};
use super::encoder::{BATCH_ROWS, Encoded, EncodedPart};
use super::products::{Sink, all_products, for_each_reached, one_product};
use super::search::{Block, Scratch, number};
use super::thresholds::Thresholds;
use crate::distance::{Element, pair};
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::simd::{Aligned, LANES, Operation, Simd};
use crate::top_k::{TopK, Wanted};
use std::borrow::Cow;
use std::cmp::Reverse;
use std::ops::Range;

/// Tiles whose rows give the first thresholds: more bring them hardly nearer (`benches/NOTES.md`).
const SEED_TILES: usize = 16;

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

/// Encodes queries and finds their first thresholds.
pub(super) struct Prepare<'a, 'q, E> {
    pub cascade: &'a Cascade,
    pub features: Matrix<'a, E>,
    pub promising: &'a Promising<'a>,
    pub queries: &'a [&'q [f32]],
    pub wanted: Wanted,
    pub scratch: &'a mut Scratch,
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
        let wanted = SEED_TILES.max(1 + (2 * k).div_ceil(TILE));
        let Scratch { all, tops, floors, maxima, rows, .. } = &mut **scratch;
        number(all, queries.len());
        tops.resize(queries.len(), Vec::new());
        tops.iter_mut().for_each(Vec::clear);
        floors.clear();
        floors.resize(queries.len(), LOWEST);
        let (centroids, of_stage) = (&*promising.centroids, &coded[cascade.centroid_stage]);
        {
            let unit = simd.matrix_unit();
            if wanted <= 2 * LANES {
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
            let mut sink = Largest { wanted, tops, floors };
            all_products(simd, &unit, centroids, 0..centroids.tiles(), of_stage, all, &mut sink);
        }
        let stages = &cascade.stages;
        let stage = stages.iter().position(|stage| stage.codes.width() >= SEED_WIDTH).unwrap_or(stages.len() - 1);
        let codes = &stages[stage].codes;
        for (query, tops) in tops.iter_mut().enumerate() {
            keep_largest(tops, wanted);
            rows.clear();
            for &(_, tile) in &*tops {
                let slots = promising.slots(tile as usize, codes.rows());
                let mut products = [0; LANES];
                simd.store_i32(one_product(simd, codes, slots.start / TILE, &coded[stage], query), &mut products);
                let there = products[slots.start % TILE..].iter().zip(slots);
                rows.extend(there.map(|(&product, slot)| (product, slot as u32)));
            }
            keep_largest(rows, k);
            for &(_, slot) in &*rows {
                let row = cascade.order[slot as usize] as usize;
                best[query].offer(pair(simd, queries[query], features.row(row)), row);
            }
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
    let mut encoded: Vec<Encoded> = Vec::with_capacity(stages.len());
    for stage in stages {
        encoded.push(Encoded::of_queries(stage.width(), queries.len()));
    }
    for first in (0..queries.len()).step_by(BATCH_ROWS) {
        let rows = &queries[first..queries.len().min(first + BATCH_ROWS)];
        let mut outputs: Vec<EncodedPart<'_>> = Vec::with_capacity(stages.len());
        for encoded in &mut encoded {
            outputs.push(encoded.part(first, rows.len()));
        }
        Encode { encoder: &cascade.encoder, rows, outputs: &mut outputs, leading: &mut [], coarser: true, scratch }
            .run(simd);
    }
    encoded.into_iter().map(CodedQueries::new).collect()
}

/// Cuts a list to the `wanted` largest, in any order.
fn keep_largest(tops: &mut Vec<(i32, u32)>, wanted: usize) {
    if wanted < tops.len() {
        tops.select_nth_unstable_by_key(wanted - 1, |&(product, _)| Reverse(product));
        tops.truncate(wanted);
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
    wanted: usize,
    tops: &'a mut [Vec<(i32, u32)>],
    /// Below these products there are enough.
    floors: &'a mut [i32],
}

impl Sink for Largest<'_> {
    #[inline(always)]
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
        let reached = simd.at_least(products, simd.splat_i32(self.floors[query]));
        if reached == 0 {
            return;
        }
        let tops = &mut self.tops[query];
        for_each_reached(simd, products, reached, |lane, product| tops.push((product, (tile * TILE + lane) as u32)));
        if tops.len() >= ROOM * self.wanted {
            keep_largest(tops, self.wanted);
            self.floors[query] = tops.iter().fold(i32::MAX, |least, &(product, _)| least.min(product));
        }
    }
}

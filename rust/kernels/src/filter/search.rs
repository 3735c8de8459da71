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
//! *First thresholds.* The best row of the nearest tiles is as near as the nearest to a percent or two on the mean, and
//! to a tenth nearly always (`benches/NOTES.md`), so hardly anything is gained by the order in which the bank is gone
//! through: parts of it can be searched at the same time, each with its own τ, which only falls. For k > 1 the k best
//! rows serve: none of the k nearest is farther than the k-th of them. A search for all rows within a distance has its
//! τ already.

use super::block::{Block, Found};
use super::cascade::Cascade;
use super::codes::TILE;
use super::scan::{Scan, ScanScratch, TOGETHER, WINDOW_PIECES};
use super::seeds::{Prepare, Promising, SeedScratch};
use crate::context::Context;
use crate::distance::Element;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::simd::LANES;
use crate::top_k::{TopK, Wanted};
use std::ops::Range;
use std::sync::atomic::AtomicU64;

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

/// What a thread keeps from item to item.
#[derive(Debug, Default)]
struct Scratch {
    seeds: SeedScratch,
    scan: ScanScratch,
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
        let prepare = |scratch: &mut SeedScratch, queries| -> Block<'_> {
            level.run(Prepare { cascade: self, features, promising: &promising, queries, wanted, scratch })
        };
        let parts = items.div_ceil(blocks).min(most_parts);
        if parts == 1 {
            // What is prepared is searched at once, from the cache.
            let mut best: Vec<Vec<TopK>> = vec![Vec::new(); blocks];
            let items = best.iter_mut().zip(queries.chunks(size));
            context.for_each_long(items, Scratch::default, |scratch, (best, queries), pulse| {
                let (mut block, mut found) = (prepare(&mut scratch.seeds, queries), Vec::new());
                let (pieces, shared, scratch) = (&slots[..], &[][..], &mut scratch.scan);
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
        context.for_each(prepared.iter_mut().zip(pieces), SeedScratch::default, |scratch, (block, queries)| {
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
        context.for_each_long(items.iter_mut(), ScanScratch::default, |scratch, item, pulse| {
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

//! Search without codes: every distance, in register tiles.
//!
//! ```text
//! for each group of rows
//!   for each group of the block's queries (widened to f64 once)
//!     tile: D2 of the queries × the rows, sums in registers
//!     per query: offer the rows
//! ```
//!
//! A block holds few queries, so that their f64 copies stay in the first-level cache while the bank
//! streams by.

use super::MemoryBank;
use crate::best::Best;
use crate::distance::{Wide, tile};
use crate::simd::{Operation, Simd};

/// Queries of a block.
pub const BLOCK: usize = 8;

/// All rows against the queries of one block.
pub struct Search<'a> {
    /// The rows.
    pub bank: &'a MemoryBank,
    /// The queries.
    pub queries: &'a [&'a [f32]],
    /// One for each query.
    pub best: &'a mut [Best],
}

impl Operation for Search<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::MANY_REGISTERS { search::<S, 4, 2>(simd, self) } else { search::<S, 2, 1>(simd, self) }
    }
}

#[inline(always)]
fn search<S: Simd, const Q: usize, const R: usize>(simd: S, Search { bank, queries, best }: Search<'_>) {
    let mut wide = Wide::with_capacity(queries.len(), bank.cols());
    for query in queries {
        wide.push(query);
    }
    for first in (0..bank.rows()).step_by(R) {
        // A short last group repeats its last row; the repeats are not offered.
        let rows = std::array::from_fn(|r| bank.row((first + r).min(bank.rows() - 1)));
        let offered = R.min(bank.rows() - first);
        for (group, best) in best.chunks_mut(Q).enumerate() {
            let last = best.len() - 1;
            let queries = std::array::from_fn(|q| wide.row(group * Q + q.min(last)));
            let squared: [[f64; R]; Q] = tile(simd, queries, rows);
            for (best, squared) in best.iter_mut().zip(squared) {
                for (r, &squared) in squared.iter().enumerate().take(offered) {
                    best.offer(squared, first + r);
                }
            }
        }
    }
}

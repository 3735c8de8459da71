//! Search without codes: every distance.

use crate::context::{Context, Pulse};
use crate::distance::{Element, STREAMED_QUERIES, every_distance};
use crate::error::Error;
use crate::matrix::Matrix;
use crate::simd::{Operation, Simd};
use crate::top_k::{TopK, Wanted};
use std::ops::Range;

/// Rows between two questions whether to go on.
const STRETCH_ROWS: usize = 4096;

/// Rows that are worth an item of their own, where few queries share the bank.
const LEAST_ROWS: usize = 64;

/// The wanted rows of each query.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn search<E: Element>(
    context: &Context<'_>,
    features: Matrix<'_, E>,
    queries: &[&[f32]],
    wanted: Wanted,
) -> Result<Vec<TopK>, Error> {
    let (rows, level) = (features.rows(), context.level());
    let blocks = queries.len().div_ceil(STREAMED_QUERIES);
    // Few queries: the threads share the bank. Else they share the queries.
    let few = (1..context.threads()).contains(&blocks);
    let parts = if few { context.threads().min(rows / LEAST_ROWS).max(1) } else { 1 };
    let mut best = vec![TopK::new(wanted); parts * queries.len()];
    let shares = best.chunks_mut(queries.len().max(1)).enumerate();
    let items: Vec<_> = shares
        .flat_map(|(part, best)| {
            let blocks = queries.chunks(STREAMED_QUERIES).zip(best.chunks_mut(STREAMED_QUERIES));
            blocks.map(move |(queries, best)| (rows * part / parts..rows * (part + 1) / parts, queries, best))
        })
        .collect();
    context.for_each_long(
        items.into_iter(),
        || (),
        |(), (rows, queries, best), pulse| {
            level.run(Search { features, queries, rows, best, pulse });
        },
    )?;
    let others = best.split_off(queries.len());
    for (i, other) in others.iter().enumerate() {
        best[i % queries.len()].absorb(other);
    }
    Ok(best)
}

/// Some rows against the queries of one block.
struct Search<'a, E> {
    features: Matrix<'a, E>,
    queries: &'a [&'a [f32]],
    rows: Range<usize>,
    /// One for each query.
    best: &'a mut [TopK],
    pulse: &'a Pulse<'a>,
}

impl<E: Element> Operation for Search<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for first in self.rows.clone().step_by(STRETCH_ROWS) {
            if self.pulse.stopped() {
                return;
            }
            let rows = first..self.rows.end.min(first + STRETCH_ROWS);
            every_distance(simd, self.queries, self.features, &rows, |query, squared, row| {
                self.best[query].offer(squared, row);
            });
        }
    }
}

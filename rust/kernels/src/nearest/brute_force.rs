//! Search without codes: every distance.

use crate::context::{Context, Pulse};
use crate::distance::{Element, STREAMED_QUERIES, every_distance};
use crate::error::Error;
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::simd::{Operation, Simd};
use crate::top_k::{TopK, Wanted};

/// Rows between two questions whether to go on.
const STRETCH_ROWS: usize = 4096;

/// Rows that are worth an item of their own, where few queries share the bank.
const LEAST_ROWS: usize = 64;

/// The wanted ones among `rows` of each query.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn search<E: Element>(
    context: &Context<'_>,
    features: Matrix<'_, E>,
    rows: &Runs,
    queries: &[&[f32]],
    wanted: Wanted,
) -> Result<Vec<TopK>, Error> {
    let level = context.level();
    let blocks = queries.len().div_ceil(STREAMED_QUERIES);
    // Few queries: the threads share the bank. Else they share the queries.
    let few = (1..context.threads()).contains(&blocks);
    let parts = if few { context.threads().min(rows.len() / LEAST_ROWS).max(1) } else { 1 };
    let parts: Vec<Vec<Runs>> =
        rows.parts(rows.len().div_ceil(parts)).iter().map(|part| part.parts(STRETCH_ROWS)).collect();
    let mut best = vec![TopK::new(wanted); parts.len() * queries.len()];
    let shares = best.chunks_mut(queries.len().max(1)).zip(&parts);
    let items: Vec<_> = shares
        .flat_map(|(best, stretches)| {
            let blocks = queries.chunks(STREAMED_QUERIES).zip(best.chunks_mut(STREAMED_QUERIES));
            blocks.map(move |(queries, best)| (stretches, queries, best))
        })
        .collect();
    context.for_each_long(
        items.into_iter(),
        || (),
        |(), (stretches, queries, best), pulse| {
            level.run(Search { features, queries, stretches, best, pulse });
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
    stretches: &'a [Runs],
    /// One for each query.
    best: &'a mut [TopK],
    pulse: &'a Pulse<'a>,
}

impl<E: Element> Operation for Search<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for rows in self.stretches {
            if self.pulse.stopped() {
                return;
            }
            every_distance(simd, self.queries, self.features, &rows.iter(), |query, squared, row| {
                self.best[query].offer(squared, row);
            });
        }
    }
}

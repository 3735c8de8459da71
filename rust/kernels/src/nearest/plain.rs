//! Search without codes: every distance.

use crate::best::Best;
use crate::context::Pulse;
use crate::distance::{Element, every_distance};
use crate::matrix::Matrix;
use crate::simd::{Operation, Simd};
use std::ops::Range;

/// Rows between two questions whether to go on.
const STRETCH: usize = 4096;

/// Some rows against the queries of one block.
pub(super) struct Search<'a, E> {
    /// The rows of the bank.
    pub features: Matrix<'a, E>,
    /// The queries.
    pub queries: &'a [&'a [f32]],
    /// The rows searched.
    pub rows: Range<usize>,
    /// One for each query.
    pub best: &'a mut [Best],
    /// Whether to go on.
    pub pulse: &'a Pulse<'a>,
}

impl<E: Element> Operation for Search<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for first in self.rows.clone().step_by(STRETCH) {
            if self.pulse.stopped() {
                return;
            }
            let rows = first..self.rows.end.min(first + STRETCH);
            every_distance(simd, self.queries, self.features, &rows, |query, squared, row| {
                self.best[query].offer(squared, row);
            });
        }
    }
}

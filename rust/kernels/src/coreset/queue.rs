//! The rows that are no candidates, handed out from the largest bound down.
//!
//! A round asks for the few largest of many rows. A heap of all of them lies far outside the caches, and most of what
//! it keeps in order is never asked for: so only the rows from a cut on lie in a heap, and the rest in no order. Where
//! the heap runs empty, the largest of the rest become the next one.

use super::{CANDIDATES, Ranked};
use crate::error::Error;
use crate::matrix::reserved;
use std::collections::BinaryHeap;

/// One in so many of the rest goes into the heap: a larger heap would leave the cache, a smaller one be filled more often
/// (`benches/NOTES.md`).
const ONE_IN: usize = 16;

/// Fewer rows are not worth a look through the rest.
const LEAST: usize = 2 * CANDIDATES;

/// Rows, the largest first.
pub(super) struct Queue {
    /// The rows at or above the cut.
    heap: BinaryHeap<Ranked>,
    cut: Ranked,
    /// The rows below it.
    rest: Vec<Ranked>,
}

impl Queue {
    /// A queue of every row of `value`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn new(value: Vec<f64>) -> Result<Self, Error> {
        let mut rest = reserved(&[value.len()])?;
        rest.extend(value.into_iter().enumerate().map(|(index, value)| Ranked { value, index }));
        Ok(Self { heap: BinaryHeap::new(), cut: Ranked { value: f64::INFINITY, index: 0 }, rest })
    }

    /// Takes in a row.
    pub(super) fn push(&mut self, row: Ranked) {
        if row >= self.cut { self.heap.push(row) } else { self.rest.push(row) }
    }

    /// Takes out the largest row.
    pub(super) fn pop(&mut self) -> Option<Ranked> {
        if self.heap.is_empty() && !self.rest.is_empty() {
            let count = (self.rest.len() / ONE_IN).max(LEAST).min(self.rest.len());
            let first = self.rest.len() - count;
            let (_, cut, _) = self.rest.select_nth_unstable(first);
            self.cut = *cut;
            self.heap.extend(self.rest.drain(first..));
        }
        self.heap.pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn hands_out_rows_as_one_heap_would(
            values in prop::collection::vec(0_u8..40, 1..3000),
            rounds in prop::collection::vec((1_usize..400, 0_u8..4), 1..40),
        ) {
            let mut queue = Queue::new(values.iter().map(|&value| f64::from(value)).collect()).unwrap();
            let mut heap: BinaryHeap<Ranked> =
                values.iter().enumerate().map(|(index, &value)| Ranked { value: f64::from(value), index }).collect();
            for (count, divisor) in rounds {
                let taken: Vec<Ranked> = (0..count).map_while(|_| queue.pop()).collect();
                let expected: Vec<Ranked> = (0..count).map_while(|_| heap.pop()).collect();
                prop_assert_eq!(&taken, &expected);
                // Some go back with a lower value, as rows that were brought up to date, and some as they were.
                for row in taken.into_iter().filter(|row| row.index % 3 < 2) {
                    let value = if divisor == 0 || row.index % 3 == 0 { row.value } else { row.value / f64::from(divisor) };
                    let row = Ranked { value, ..row };
                    queue.push(row);
                    heap.push(row);
                }
            }
            let rest: Vec<Ranked> = std::iter::from_fn(|| queue.pop()).collect();
            prop_assert_eq!(rest, std::iter::from_fn(|| heap.pop()).collect::<Vec<_>>());
        }
    }
}

//! The fresh rows from which the next picks come.

use super::{Filter, PICKED, Ranked, Selection};
use crate::distance::pair;
use crate::simd::{Operation, Simd};

/// Rows that have seen every pick.
pub struct Pool {
    rows: Vec<Ranked>,
}

impl Pool {
    /// A pool of fresh rows.
    pub fn new(rows: Vec<Ranked>) -> Self {
        Self { rows }
    }

    /// The rows with their values.
    pub fn rows(&self) -> &[Ranked] {
        &self.rows
    }

    /// The next pick, if it is in the pool.
    pub fn best(&self) -> Option<Ranked> {
        self.rows.iter().copied().reduce(|best, row| if row.beats(best) { row } else { best })
    }
}

/// Lowers the values of the pool by the distances to a pick.
pub struct Update<'a, 'b> {
    pub pool: &'a mut Pool,
    pub selection: &'a Selection<'b>,
    pub pick: usize,
}

impl Operation for Update<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Update { pool, selection, pick } = self;
        let features = selection.features;
        for row in &mut pool.rows {
            if row.index == pick {
                row.value = PICKED;
            } else if row.value > 0.0 {
                let tau = row.value.sqrt();
                let mut far = false;
                if let Some(Filter { first, second, .. }) = &selection.codes {
                    far = first.rules_out(simd, row.index, pick, tau);
                    if let Some(second) = second {
                        far = far || second.rules_out(simd, row.index, pick, tau);
                    }
                }
                if !far {
                    row.value = row.value.min(pair(simd, features.row(row.index), features.row(pick)));
                }
            }
        }
    }
}

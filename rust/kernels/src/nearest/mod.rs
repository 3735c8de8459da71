//! The memory bank and its exact k-nearest search.
//!
//! For every query the k rows with the smallest (D2, index), D2 being the canonical distance of
//! [`crate::distance`]:
//!
//! ```text
//! for each block of queries (one work item, widened to f64 once)
//!   for each pair of rows
//!     tile: D2 of the block's queries × the rows, sums in registers
//!     per query: insert where D2 is below the worst of the k kept
//! ```
//!
//! A block holds few queries, so that its f64 copies stay in the first-level cache while the bank
//! streams by. Rows come in rising index and only a smaller D2 displaces a kept one: ties go to the
//! lowest index. The matrix of queries × rows is never written; beyond the answer a call needs
//! [`BLOCK`] wide queries and k candidates per query and thread.

use crate::distance::{Wide, euclidean, tile};
use crate::error::Error;
use crate::matrix::{Matrix, reserved, zeroed};
use crate::simd::{Level, Operation, Simd};
use crate::threads::Context;

/// Queries of a work item.
const BLOCK: usize = 8;

/// An immutable set of feature rows that answers nearest-neighbour queries.
#[derive(Clone, Debug)]
pub struct MemoryBank {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
}

/// What [`MemoryBank::kneighbors`] answers, row-major (queries × k).
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbors {
    /// Euclidean distances, ascending.
    pub distances: Vec<f32>,
    /// Row indices in the bank; among equal D2 the lowest come first.
    pub indices: Vec<i64>,
}

impl MemoryBank {
    /// A bank of the rows of `features`, copied.
    ///
    /// # Errors
    /// [`Error::Empty`] when there are no rows, [`Error::OutOfMemory`].
    pub fn new(features: Matrix<'_>) -> Result<Self, Error> {
        if features.rows() == 0 {
            return Err(Error::Empty { name: "features", expected: "a memory bank needs at least one row" });
        }
        let mut data = reserved(&[features.rows(), features.cols()])?;
        data.extend_from_slice(features.data());
        Ok(Self { data, rows: features.rows(), cols: features.cols() })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `index`.
    #[inline(always)]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.data[index * self.cols..][..self.cols]
    }

    /// All rows.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }

    /// The `k` rows with the smallest (D2, index) for each query.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the widths differ or `k` is not in `1..=rows`, [`Error::Cancelled`].
    pub fn kneighbors(&self, context: &Context<'_>, queries: Matrix<'_>, k: usize) -> Result<Neighbors, Error> {
        if queries.cols() != self.cols {
            let expected = format!("{} values wide, as the rows of the memory bank", self.cols);
            return Err(Error::invalid("queries", expected, queries.cols()));
        }
        if k == 0 || k > self.rows {
            return Err(Error::invalid("k", format!("between 1 and the {} rows of the memory bank", self.rows), k));
        }
        let size = [queries.rows(), k];
        let mut found = Neighbors { distances: zeroed(&size)?, indices: zeroed(&size)? };
        let level = context.level();
        let blocks = queries.data().chunks(BLOCK * self.cols);
        let outputs = found.distances.chunks_mut(BLOCK * k).zip(found.indices.chunks_mut(BLOCK * k));
        context.for_each(
            blocks.zip(outputs),
            || Wide::with_capacity(BLOCK, self.cols),
            |wide, (block, (distances, indices))| {
                search(level, self, block, wide, k, distances, indices);
            },
        )?;
        Ok(found)
    }
}

/// Answers one block of queries.
fn search(
    level: Level,
    bank: &MemoryBank,
    block: &[f32],
    wide: &mut Wide,
    k: usize,
    distances: &mut [f32],
    indices: &mut [i64],
) {
    wide.clear();
    block.chunks_exact(bank.cols).for_each(|query| wide.push(query));
    let mut best = vec![Best::new(k); block.len() / bank.cols];
    level.run(Scan { bank, wide, best: &mut best });
    for (i, (squared, index)) in best.iter().flat_map(|best| &best.kept).enumerate() {
        distances[i] = euclidean(*squared);
        indices[i] = *index as i64;
    }
}

/// The k smallest (D2, index) seen so far, ascending.
#[derive(Clone)]
struct Best {
    kept: Vec<(f64, usize)>,
    worst: f64,
    k: usize,
}

impl Best {
    fn new(k: usize) -> Self {
        Self { kept: Vec::with_capacity(k), worst: f64::INFINITY, k }
    }

    /// Rows come in rising index, hence a row equal to a kept one goes behind it.
    #[inline(always)]
    fn offer(&mut self, squared: f64, index: usize) {
        if squared < self.worst {
            self.insert(squared, index);
        }
    }

    #[inline(never)]
    fn insert(&mut self, squared: f64, index: usize) {
        if self.kept.len() == self.k {
            self.kept.pop();
        }
        let at = self.kept.partition_point(|kept| kept.0 <= squared);
        self.kept.insert(at, (squared, index));
        if self.kept.len() == self.k {
            self.worst = self.kept[self.k - 1].0;
        }
    }
}

/// All rows against the queries of one block.
struct Scan<'a> {
    bank: &'a MemoryBank,
    wide: &'a Wide,
    best: &'a mut [Best],
}

impl Operation for Scan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if S::MANY_REGISTERS { scan::<S, 4, 2>(simd, self) } else { scan::<S, 2, 1>(simd, self) }
    }
}

#[inline(always)]
fn scan<S: Simd, const Q: usize, const R: usize>(simd: S, Scan { bank, wide, best }: Scan<'_>) {
    for first in (0..bank.rows).step_by(R) {
        // A short last group repeats its last row; the repeats are not offered.
        let rows = std::array::from_fn(|r| bank.row((first + r).min(bank.rows - 1)));
        let offered = R.min(bank.rows - first);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use proptest::prelude::*;

    fn check(queries: Matrix<'_>, rows: Matrix<'_>, k: usize) {
        let bank = MemoryBank::new(rows).unwrap();
        let expected = naive::nearest(queries, rows, k);
        for level in Level::available() {
            for threads in [1, 2, 7] {
                let found = bank.kneighbors(&Context::new(level, threads), queries, k).unwrap();
                assert_eq!(found.indices, expected.indices, "{level}, {threads} threads");
                assert_eq!(found.distances, expected.distances, "{level}, {threads} threads");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_naive_search(
            n in 1_usize..40, m in 0_usize..20, cols in 1_usize..40, k in 1_usize..6,
            values in prop::collection::vec(-2.0_f32..2.0, 60 * 40),
        ) {
            let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
            let queries = Matrix::new("queries", &values[n * cols..][..m * cols], m, cols).unwrap();
            check(queries, rows, k.min(n));
        }

        #[test]
        fn ties_go_to_the_lowest_index(
            n in 2_usize..60, cols in 1_usize..4, k in 1_usize..9,
            values in prop::collection::vec(0_i8..3, 70 * 4),
        ) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
            let queries = Matrix::new("queries", &values[n * cols..][..9 * cols], 9, cols).unwrap();
            check(queries, rows, k.min(n));
        }
    }

    #[test]
    fn a_row_of_the_bank_is_its_own_nearest() {
        let values: Vec<f32> = (0..300_u16).map(|i| (f32::from(i) * 0.37).sin() + 1e6).collect();
        let rows = Matrix::new("features", &values, 100, 3).unwrap();
        let found = MemoryBank::new(rows).unwrap().kneighbors(&Context::new(Level::detect(), 2), rows, 1).unwrap();
        assert!(found.distances.iter().all(|&distance| distance == 0.0));
    }

    #[test]
    fn bad_arguments_are_named() {
        let rows = Matrix::new("features", &[0.0; 6], 2, 3).unwrap();
        let bank = MemoryBank::new(rows).unwrap();
        let context = Context::new(Level::Scalar, 1);
        let narrow = Matrix::new("queries", &[0.0; 4], 2, 2).unwrap();
        let error = bank.kneighbors(&context, narrow, 1).unwrap_err().to_string();
        assert_eq!(error, "queries must be 3 values wide, as the rows of the memory bank; got 2");
        for k in [0, 3] {
            let error = bank.kneighbors(&context, rows, k).unwrap_err().to_string();
            assert_eq!(error, format!("k must be between 1 and the 2 rows of the memory bank; got {k}"));
        }
        assert!(MemoryBank::new(Matrix::new("features", &[], 0, 3).unwrap()).is_err());
    }
}

//! The canonical distance: the arithmetic that defines "exact".
//!
//! ```text
//! D2(x, y) = Σ (x_i − y_i)²
//!
//! each x_i, y_i converted to f64 (exact)
//! lane i mod 16 adds (x_i − y_i)² for rising i; subtraction, product and sum rounded one by one
//! the lanes are folded in halves: 16 → 8 → 4 → 2 → 1
//! ```
//!
//! One fixed order of additions gives one result, whatever the SIMD level, thread, tile or batch.
//! Differences are squared (never ‖x‖² + ‖y‖² − 2 x·y, which cancels), so the relative error is at
//! most (d/16 + 8)·2⁻⁵³, D2(x, x) is 0 and D2(x, y) = D2(y, x). Nothing overflows: the largest
//! float32 squared is 10⁷⁷.
//!
//! Answers are ordered by (D2, index). The distance that users see is `sqrt(D2)` rounded to float32.
//!
//! Rows are kept padded with zeros to a multiple of 16 ([`Padded`]): a padded column adds
//! (0 − 0)² = +0, which changes no bit of a sum of squares.

use crate::error::Error;
use crate::matrix::{Matrix, checked_len};
use crate::simd::{LANES, Operation, Simd};

/// Rows padded with zeros to a multiple of [`LANES`] columns: a private copy in the shape that the
/// kernels read.
#[derive(Clone, Debug)]
pub struct Padded<T> {
    data: Vec<T>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<T: Copy + Default + From<f32>> Padded<T> {
    /// Copies the rows of a matrix.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when the padded size does not fit.
    pub fn new(matrix: Matrix<'_>) -> Result<Self, Error> {
        let stride = matrix.cols().next_multiple_of(LANES);
        let mut data = Vec::with_capacity(checked_len(&[matrix.rows(), stride])?);
        for row in matrix.data().chunks_exact(matrix.cols()) {
            data.extend(row.iter().map(|&value| T::from(value)));
            data.resize(data.len() + stride - matrix.cols(), T::default());
        }
        Ok(Self { data, rows: matrix.rows(), cols: matrix.cols(), stride })
    }
}

impl<T> Padded<T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row, padding not counted.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `index` in groups of [`LANES`].
    #[inline(always)]
    pub fn row(&self, index: usize) -> &[[T; LANES]] {
        self.data[index * self.stride..][..self.stride].as_chunks().0
    }

    /// The values of row `index`, without the padding.
    pub fn values(&self, index: usize) -> &[T] {
        &self.data[index * self.stride..][..self.cols]
    }

    /// Bytes held.
    pub fn nbytes(&self) -> usize {
        self.data.capacity() * size_of::<T>()
    }
}

/// D2 between each of `Q` rows in f64 and each of `R` rows in f32, all padded to the same length.
///
/// The tile keeps `Q·R` sums in registers, so that a row is widened once for `Q` pairs and enough
/// independent additions are in flight to hide their latency.
#[inline(always)]
pub fn tile<S: Simd, const Q: usize, const R: usize>(
    simd: S,
    queries: [&[[f64; LANES]]; Q],
    rows: [&[[f32; LANES]]; R],
) -> [[f64; R]; Q] {
    let groups = rows[0].len();
    // Slices of one length let the loop below run without bounds checks.
    let queries = queries.map(|query| &query[..groups]);
    let rows = rows.map(|row| &row[..groups]);
    let mut sums = [[simd.zero(); R]; Q];
    for group in 0..groups {
        let wide = rows.map(|row| simd.widen(&row[group]));
        for (q, query) in queries.iter().enumerate() {
            let x = simd.load(&query[group]);
            for (r, &y) in wide.iter().enumerate() {
                sums[q][r] = simd.add_squared_difference(sums[q][r], x, y);
            }
        }
    }
    sums.map(|sums| sums.map(|sum| simd.fold(sum)))
}

/// D2 between two rows in f32, padded to the same length.
#[inline(always)]
pub fn pair<S: Simd>(simd: S, x: &[[f32; LANES]], y: &[[f32; LANES]]) -> f64 {
    let mut sum = simd.zero();
    for (x, y) in x.iter().zip(y) {
        sum = simd.add_squared_difference(sum, simd.widen(x), simd.widen(y));
    }
    simd.fold(sum)
}

/// The distance that users see: the root of D2, rounded to float32.
pub fn euclidean(squared: f64) -> f32 {
    squared.sqrt() as f32
}

/// [`pair`] as an operation, for single distances.
pub struct Pair<'a>(pub &'a [[f32; LANES]], pub &'a [[f32; LANES]]);

impl Operation for Pair<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        pair(simd, self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    /// A value of any magnitude that the matrices accept, denormals and zeros included.
    pub fn any_value() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -10.0_f32..10.0,
            1 => Just(0.0_f32),
            1 => -1e16_f32..1e16,
            1 => (0_u32..0x0080_0000).prop_map(f32::from_bits),
        ]
    }

    struct Tile<'a>(&'a Padded<f64>, &'a Padded<f32>);

    impl Operation for Tile<'_> {
        type Output = [[f64; 2]; 3];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            tile(simd, [self.0.row(0), self.0.row(1), self.0.row(2)], [self.1.row(0), self.1.row(1)])
        }
    }

    proptest! {
        #[test]
        fn every_level_returns_the_bits_of_the_definition(
            cols in 1_usize..70, values in prop::collection::vec(any_value(), 5 * 70)
        ) {
            let queries = Matrix::finite("x", &values[..3 * cols], 3, cols).unwrap();
            let rows = Matrix::finite("y", &values[3 * cols..][..2 * cols], 2, cols).unwrap();
            let (wide, narrow) = (Padded::new(queries).unwrap(), Padded::new(queries).unwrap());
            let packed = Padded::new(rows).unwrap();
            for level in Level::available() {
                let found = level.run(Tile(&wide, &packed));
                for q in 0..3 {
                    for r in 0..2 {
                        let expected = naive::squared_distance(queries.row(q), rows.row(r));
                        prop_assert_eq!(found[q][r].to_bits(), expected.to_bits(), "{} {} {}", level, q, r);
                        let single = level.run(Pair(narrow.row(q), packed.row(r)));
                        prop_assert_eq!(single.to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    #[test]
    fn the_definition_is_the_sum_of_squares() {
        let x: Vec<f32> = (0..37_u16).map(f32::from).collect();
        let y = vec![1.0; 37];
        let expected: f64 = (0..37).map(|i| f64::from((i - 1) * (i - 1))).sum();
        assert_eq!(naive::squared_distance(&x, &y), expected);
    }

    #[test]
    fn a_large_offset_does_not_cancel() {
        let x = [1e6_f32 + 0.5; 20];
        let y = [1e6_f32; 20];
        assert_eq!(naive::squared_distance(&x, &y), 5.0);
    }
}

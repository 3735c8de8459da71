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
//! One fixed order of additions gives one result, whatever the SIMD level, the thread or the other rows that
//! are measured at the same time.
//! Differences are squared (never ‖x‖² + ‖y‖² − 2 x·y, which cancels), so the relative error is at
//! most (d/16 + 8)·2⁻⁵³, D2(x, x) is 0 and D2(x, y) = D2(y, x). Nothing overflows: the largest
//! float32 squared is 10⁷⁷.
//!
//! Answers are ordered by (D2, index). The distance that users see is `sqrt(D2)` rounded to float32.
//!
//! The columns past the last full group of 16 are filled up with zeros: a zero column adds
//! (0 − 0)² = +0, which changes no bit of a sum of squares.

use crate::half::Half;
use crate::matrix::Matrix;
use crate::simd::{LANES, Operation, Simd};

/// What rows are stored as: values that are f64 exactly.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// Sixteen values in f64.
    fn widen<S: Simd>(simd: S, values: &[Self; LANES]) -> S::F64;

    /// This value in f64.
    fn to_f64(self) -> f64;
}

impl Element for f32 {
    #[inline(always)]
    fn widen<S: Simd>(simd: S, values: &[Self; LANES]) -> S::F64 {
        simd.widen(values)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Element for Half {
    #[inline(always)]
    fn widen<S: Simd>(simd: S, values: &[Self; LANES]) -> S::F64 {
        simd.widen_half(values)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }
}

/// Rows in f64, filled up with zeros to a multiple of [`LANES`] columns: the side of a
/// [`register_block`] that is read many times, widened once.
#[derive(Clone, Debug)]
pub(crate) struct Wide {
    data: Vec<[f64; LANES]>,
    groups: usize,
}

impl Wide {
    /// Room for `rows` rows of `cols` values; none yet.
    pub(crate) fn with_capacity(rows: usize, cols: usize) -> Self {
        let groups = cols.div_ceil(LANES);
        Self { data: Vec::with_capacity(rows * groups), groups }
    }

    /// All rows of a matrix.
    #[cfg(test)]
    pub(crate) fn new(matrix: Matrix<'_>) -> Self {
        let mut wide = Self::with_capacity(matrix.rows(), matrix.cols());
        (0..matrix.rows()).for_each(|row| wide.push(matrix.row(row)));
        wide
    }

    /// Appends a row.
    pub(crate) fn push(&mut self, row: &[f32]) {
        let (groups, rest) = row.as_chunks();
        self.data.extend(groups.iter().map(|group: &[f32; LANES]| group.map(f64::from)));
        if !rest.is_empty() {
            self.data.push(filled(rest).map(f64::from));
        }
    }

    /// Row `index`, in groups.
    #[inline(always)]
    pub(crate) fn row(&self, index: usize) -> &[[f64; LANES]] {
        &self.data[index * self.groups..][..self.groups]
    }
}

/// The last, partial group of a row.
#[inline(always)]
fn filled<E: Element>(rest: &[E]) -> [E; LANES] {
    let mut group = [E::default(); LANES];
    group[..rest.len()].copy_from_slice(rest);
    group
}

/// D2 between each of `Q` wide rows and each of `R` rows.
///
/// The `Q·R` sums stay in registers, so that a row is widened once for `Q` pairs and enough independent
/// additions are in flight to hide their latency.
#[inline(always)]
pub(crate) fn register_block<S: Simd, E: Element, const Q: usize, const R: usize>(
    simd: S,
    queries: [&[[f64; LANES]]; Q],
    rows: [&[E]; R],
) -> [[f64; R]; Q] {
    // Loops instead of closures over arrays: those are not always inlined, and then not compiled for
    // the level. Slices of one length let the loop run without bounds checks.
    let full = rows[0].len() / LANES;
    let mut groups: [&[[E; LANES]]; R] = [&[]; R];
    let mut rests: [&[E]; R] = [&[]; R];
    for r in 0..R {
        let (whole, rest) = rows[r].as_chunks();
        (groups[r], rests[r]) = (&whole[..full], rest);
    }
    let mut bodies: [&[[f64; LANES]]; Q] = [&[]; Q];
    for q in 0..Q {
        bodies[q] = &queries[q][..full];
    }
    let mut sums = [[simd.zero(); R]; Q];
    let mut wide = [simd.zero(); R];
    for group in 0..full {
        for (wide, row) in wide.iter_mut().zip(&groups) {
            *wide = E::widen(simd, &row[group]);
        }
        for (sums, query) in sums.iter_mut().zip(&bodies) {
            let x = simd.load(&query[group]);
            for (sum, &y) in sums.iter_mut().zip(&wide) {
                *sum = simd.add_squared_difference(*sum, x, y);
            }
        }
    }
    if !rests[0].is_empty() {
        for (wide, rest) in wide.iter_mut().zip(&rests) {
            *wide = E::widen(simd, &filled(rest));
        }
        for (sums, query) in sums.iter_mut().zip(queries) {
            let x = simd.load(&query[full]);
            for (sum, &y) in sums.iter_mut().zip(&wide) {
                *sum = simd.add_squared_difference(*sum, x, y);
            }
        }
    }
    let mut squared = [[0.0; R]; Q];
    for (squared, sums) in squared.iter_mut().zip(&sums) {
        for (squared, &sum) in squared.iter_mut().zip(sums) {
            *squared = simd.fold(sum);
        }
    }
    squared
}

/// Rows ahead of the one that is measured whose values are asked for, and how many of them: the CPU finds the rest
/// itself.
pub(crate) const AHEAD: usize = 2;
const AHEAD_VALUES: usize = 1024;

/// Asks for the values of a row that is to be measured.
#[inline(always)]
pub(crate) fn fetch<S: Simd, E: Element>(simd: S, row: &[E]) {
    simd.prefetch(&row[..row.len().min(AHEAD_VALUES)]);
}

/// D2 between two rows.
#[inline(always)]
pub(crate) fn pair<S: Simd, E: Element>(simd: S, x: &[f32], y: &[E]) -> f64 {
    if x.len() <= NARROW_COLS {
        return narrow::<NARROW_COLS>(&few(x), &few(y));
    }
    let (x, x_rest) = x.as_chunks::<LANES>();
    let (y, y_rest) = y.as_chunks::<LANES>();
    let mut sum = simd.zero();
    for (x, y) in x.iter().zip(y) {
        sum = simd.add_squared_difference(sum, simd.widen(x), E::widen(simd, y));
    }
    if !x_rest.is_empty() {
        sum = simd.add_squared_difference(sum, simd.widen(&filled(x_rest)), E::widen(simd, &filled(y_rest)));
    }
    simd.fold(sum)
}

/// Offers `best(query, D2, row)` every pair of a query and one of the given rows.
///
/// Queries are widened once; a few at a time, so that their f64 copies stay in the first-level cache while
/// the rows stream by.
#[inline(always)]
pub(crate) fn every_distance<S: Simd, E: Element>(
    simd: S,
    queries: &[&[f32]],
    features: Matrix<'_, E>,
    rows: &(impl Iterator<Item = usize> + Clone),
    mut best: impl FnMut(usize, f64, usize),
) {
    match features.cols() {
        1 => return every_narrow_distance::<E, 1>(queries, features, rows.clone(), best),
        2 => return every_narrow_distance::<E, 2>(queries, features, rows.clone(), best),
        ..=NARROW_COLS => return every_narrow_distance::<E, NARROW_COLS>(queries, features, rows.clone(), best),
        _ => {}
    }
    for first in (0..queries.len()).step_by(STREAMED_QUERIES) {
        let queries = &queries[first..queries.len().min(first + STREAMED_QUERIES)];
        let best = |query, squared, row| best(first + query, squared, row);
        // Sixteen lanes of f64 fill two registers of 512 bits or four of 256. Of 32 wide registers the sums of 4·2
        // pairs take 16, the rows 4, a query 2; of 16 narrow ones the sums of 2 pairs take 8, a row 4, a query 4.
        if S::MANY_REGISTERS {
            every_distance_in_blocks::<S, E, 4, 2>(simd, queries, features, rows.clone(), best);
        } else {
            every_distance_in_blocks::<S, E, 2, 1>(simd, queries, features, rows.clone(), best);
        }
    }
}

/// Queries that stay in the first-level cache while rows stream by: at 512 columns, widened, they fill 32 KiB.
pub(crate) const STREAMED_QUERIES: usize = 8;

/// Up to this many columns a scalar sum is faster than sixteen lanes plus their fold.
const NARROW_COLS: usize = 4;

/// [`every_distance`] for rows of at most `D` columns.
#[inline(always)]
fn every_narrow_distance<E: Element, const D: usize>(
    queries: &[&[f32]],
    features: Matrix<'_, E>,
    rows: impl Iterator<Item = usize>,
    mut best: impl FnMut(usize, f64, usize),
) {
    let queries: Vec<[f64; D]> = queries.iter().map(|query| few(query)).collect();
    // Not by `for`: rows of several runs are then asked for one by one, which a pair of two columns feels.
    rows.for_each(|row| {
        let y = few(features.row(row));
        for (query, x) in queries.iter().enumerate() {
            best(query, narrow(x, &y), row);
        }
    });
}

/// D2 of rows of at most `D` columns, `D` being at most [`NARROW_COLS`].
#[inline(always)]
fn narrow<const D: usize>(x: &[f64; D], y: &[f64; D]) -> f64 {
    let mut squares = [0.0; NARROW_COLS];
    for i in 0..D {
        squares[i] = (x[i] - y[i]) * (x[i] - y[i]);
    }
    // The lanes folded in halves; the others hold zeros.
    (squares[0] + squares[2]) + (squares[1] + squares[3])
}

/// At most `D` values in f64, and zeros.
#[inline(always)]
fn few<E: Element, const D: usize>(values: &[E]) -> [f64; D] {
    let mut wide = [0.0; D];
    for (wide, value) in wide.iter_mut().zip(values) {
        *wide = value.to_f64();
    }
    wide
}

#[inline(always)]
fn every_distance_in_blocks<S: Simd, E: Element, const Q: usize, const R: usize>(
    simd: S,
    queries: &[&[f32]],
    features: Matrix<'_, E>,
    mut rows: impl Iterator<Item = usize>,
    mut best: impl FnMut(usize, f64, usize),
) {
    let mut wide = Wide::with_capacity(queries.len(), features.cols());
    for query in queries {
        wide.push(query);
    }
    while let Some(row) = rows.next() {
        // A short last group repeats its first row; the repeats are not offered.
        let mut group = [row; R];
        let mut offered = 1;
        while offered < R {
            let Some(row) = rows.next() else { break };
            group[offered] = row;
            offered += 1;
        }
        let mut others: [&[E]; R] = [&[]; R];
        for (other, &row) in others.iter_mut().zip(&group) {
            *other = features.row(row);
        }
        for first in (0..queries.len()).step_by(Q) {
            let last = queries.len() - 1 - first;
            let mut several: [&[[f64; LANES]]; Q] = [&[]; Q];
            for (q, query) in several.iter_mut().enumerate() {
                *query = wide.row(first + q.min(last));
            }
            let squared: [[f64; R]; Q] = register_block(simd, several, others);
            for (q, squared) in squared.iter().enumerate().take(last + 1) {
                for (&squared, &row) in squared.iter().zip(&group[..offered]) {
                    best(first + q, squared, row);
                }
            }
        }
    }
}

/// What users see of a D2, rounded to float32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distance {
    /// Its root.
    Euclidean,
    /// D2 itself. (The root is rounded: squaring it does not give this back.)
    Squared,
}

impl Distance {
    /// The distance that a D2 stands for.
    pub(crate) fn of(self, squared: f64) -> f32 {
        match self {
            Self::Euclidean => squared.sqrt() as f32,
            Self::Squared => squared as f32,
        }
    }

    /// The largest D2 whose distance, in f64, is at most `radius`.
    pub(crate) fn largest_within(self, radius: f64) -> f64 {
        if self == Self::Squared {
            return radius;
        }
        // The square is rounded, and so is the root: some neighbours of it may have a root that is just small enough.
        let mut largest = radius * radius;
        while largest.sqrt() > radius {
            largest = largest.next_down();
        }
        while largest < f64::INFINITY && largest.next_up().sqrt() <= radius {
            largest = largest.next_up();
        }
        largest
    }
}

/// [`pair`] as an operation, for single distances.
pub(crate) struct Pair<'a, E = f32>(pub &'a [f32], pub &'a [E]);

impl<E: Element> Operation for Pair<'_, E> {
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
    pub(super) fn any_value() -> impl Strategy<Value = f32> {
        prop_oneof![
            4 => -10.0_f32..10.0,
            1 => Just(0.0_f32),
            1 => -1e16_f32..1e16,
            1 => (0_u32..0x0080_0000).prop_map(f32::from_bits),
        ]
    }

    struct RegisterBlock<'a>(&'a Wide, Matrix<'a>);

    impl Operation for RegisterBlock<'_> {
        type Output = [[f64; 2]; 3];

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            register_block(simd, [self.0.row(0), self.0.row(1), self.0.row(2)], [self.1.row(0), self.1.row(1)])
        }
    }

    proptest! {
        #[test]
        fn every_level_returns_the_bits_of_the_definition(
            cols in 1_usize..70, values in prop::collection::vec(any_value(), 5 * 70)
        ) {
            let queries = Matrix::finite("x", &values[..3 * cols], 3, cols).unwrap();
            let rows = Matrix::finite("y", &values[3 * cols..][..2 * cols], 2, cols).unwrap();
            let wide = Wide::new(queries);
            for level in Level::available() {
                let found = level.run(RegisterBlock(&wide, rows));
                for (q, found) in found.iter().enumerate() {
                    for (r, found) in found.iter().enumerate() {
                        let expected = naive::squared_distance(queries.row(q), rows.row(r));
                        prop_assert_eq!(found.to_bits(), expected.to_bits(), "{} {} {}", level, q, r);
                        let single = level.run(Pair(queries.row(q), rows.row(r)));
                        prop_assert_eq!(single.to_bits(), expected.to_bits(), "{}", level);
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

    #[test]
    fn the_largest_square_within_a_radius_is_exact() {
        for radius in [0.0, 1e-200, 1e-161, 0.1, 1.0, 2.0_f64.sqrt(), 1e9 + 0.3, 1e200, f64::MAX] {
            let largest = Distance::Euclidean.largest_within(radius);
            assert!(largest.sqrt() <= radius && largest.next_up().sqrt() > radius, "{radius:e} {largest:e}");
        }
        assert_eq!(Distance::Euclidean.largest_within(f64::INFINITY), f64::INFINITY);
        assert_eq!(Distance::Squared.largest_within(0.3), 0.3);
    }
}

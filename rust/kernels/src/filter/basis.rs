//! An orthonormal basis of the leading principal subspace of a bank's rows.
//!
//! Subspace iteration on a sample: Q ← orth(Sᵀ(S·Q)), three times from a seeded start. The individual
//! directions do not matter, since the codes mix them; only their span does, and three rounds find it
//! well enough. Nothing here needs to be exact but [`Basis::error`], which is measured on the result.

use super::U;
use super::gemm::{CHAIN, PANEL, multiply, panels};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::random::uniform;
use crate::simd::{Operation, Simd};

/// Rows that a basis is fitted to.
const SAMPLE: usize = 2048;

/// Rounds of subspace iteration.
const ROUNDS: usize = 3;

/// A basis that keeps less of the variance makes no bound worth a try: on noise, whose rows live in all directions.
const LEAST_SHARE: f64 = 0.4;

/// Q, one row per column of the data, `width` wide: `width − 1` directions and a last column of zeros. A stage
/// keeps the first of them, and puts the residual in the place of its last.
#[derive(Clone, Debug)]
pub(crate) struct Basis {
    panels: Vec<[f32; PANEL]>,
    cols: usize,
    /// Bound of the error of z per unit of ‖w‖: rounding of the product and defect of the basis.
    pub error: f64,
}

/// Indices of at most `count` of `rows` rows, evenly spread.
pub(super) fn sample(rows: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(rows);
    (0..count).map(move |i| i * rows / count)
}

/// Mean of a sample of the rows. Any vector would do; near the mean, lengths are short.
pub(super) fn mean(rows: Matrix<'_>) -> Vec<f32> {
    let mut sums = vec![0.0_f64; rows.cols()];
    let mut count = 0.0;
    for row in sample(rows.rows(), 4 * SAMPLE) {
        sums.iter_mut().zip(rows.row(row)).for_each(|(sum, &value)| *sum += f64::from(value));
        count += 1.0;
    }
    sums.into_iter().map(|sum| (sum / count) as f32).collect()
}

impl Basis {
    /// The basis of `width − 1` directions; `None` where its first [`PANEL`] columns would keep less than
    /// [`LEAST_SHARE`] of the variance.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub(crate) fn fit(
        context: &Context<'_>,
        rows: Matrix<'_>,
        mean: &[f32],
        width: usize,
    ) -> Result<Option<Self>, Error> {
        let cols = rows.cols();
        let chosen: Vec<usize> = sample(rows.rows(), SAMPLE).collect();
        let count = chosen.len();
        let mut centred = vec![0.0; count * cols];
        let mut transposed = vec![0.0; count * cols];
        for (i, row) in chosen.into_iter().enumerate() {
            for (j, (&x, &mean)) in rows.row(row).iter().zip(mean).enumerate() {
                centred[i * cols + j] = x - mean;
                transposed[j * count + i] = x - mean;
            }
        }
        let mut columns: Vec<f32> = (0..(cols * width) as u64).map(uniform).collect();
        let mut images = vec![0.0; count * width];
        let mut defect = 0.0;
        for round in 1..=ROUNDS {
            matrix_product(context, &centred, cols, &panels(&columns, width), &mut images)?;
            // From the second round on the columns are orthonormal, and the images' squares are shares of the variance.
            if round == 2 && share(&images, width, &centred) < LEAST_SHARE {
                return Ok(None);
            }
            matrix_product(context, &transposed, count, &panels(&images, width), &mut columns)?;
            defect = context.level().run(Orthonormalize { columns: &mut columns, width, last: round == ROUNDS });
            context.poll()?;
        }
        Ok(Some(Self { panels: panels(&columns, width), cols, error: error_bound(cols, width, defect) }))
    }

    /// The first `width` columns.
    #[must_use]
    pub(crate) fn narrowed(&self, width: usize) -> Self {
        // A part of the directions errs no more than all of them.
        Self { panels: self.panels[..width / PANEL * self.cols].to_vec(), ..*self }
    }

    /// Columns of Q.
    pub(crate) fn width(&self) -> usize {
        self.panels.len() / self.cols * PANEL
    }

    /// Q, in panels.
    pub(crate) fn panels(&self) -> &[[f32; PANEL]] {
        &self.panels
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        size_of_val(&*self.panels)
    }
}

/// [`Basis::error`] of a basis with this defect.
fn error_bound(cols: usize, width: usize, defect: f64) -> f64 {
    let chains = cols.div_ceil(CHAIN) + CHAIN + 2;
    let rounding = chains as f64 * U * ((width - 1) as f64).sqrt() * (1.0 + defect);
    (rounding + defect) * 1.01
}

/// The share of the variance of centred rows that the first columns of their images hold.
fn share(images: &[f32], width: usize, centred: &[f32]) -> f64 {
    let square = |&value: &f32| f64::from(value) * f64::from(value);
    let kept: f64 = images.chunks_exact(width).flat_map(|image| &image[..PANEL.min(width)]).map(square).sum();
    let all: f64 = centred.iter().map(square).sum();
    kept / all.max(f64::MIN_POSITIVE)
}

/// A product on all threads.
fn matrix_product(
    context: &Context<'_>,
    a: &[f32],
    depth: usize,
    b: &[[f32; PANEL]],
    out: &mut [f32],
) -> Result<(), Error> {
    struct Multiply<'a>(&'a [f32], usize, &'a [[f32; PANEL]], &'a mut [f32]);
    impl Operation for Multiply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            multiply(simd, self.0, self.1, self.2, self.3);
        }
    }
    let level = context.level();
    let width = b.len() / depth * PANEL;
    let items = a.chunks(48 * depth).zip(out.chunks_mut(48 * width));
    context.for_each(items, || (), |(), (a, out)| level.run(Multiply(a, depth, b, out)))
}

/// The columns of a row-major matrix in f64, the last left out.
fn by_column(columns: &[f32], width: usize) -> Vec<Vec<f64>> {
    (0..width - 1).map(|j| columns.iter().skip(j).step_by(width).map(|&value| f64::from(value)).collect()).collect()
}

/// Sum of products in sixteen lanes, for the compiler to vectorize.
#[inline(always)]
fn inner(x: &[f64], y: &[f64]) -> f64 {
    let (x_groups, x_rest) = x.as_chunks::<16>();
    let (y_groups, y_rest) = y.as_chunks::<16>();
    let mut lanes = [0.0; 16];
    for (x, y) in x_groups.iter().zip(y_groups) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f64>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f64>()
}

/// Gram–Schmidt in f64, twice per column in the last round. A column that lies in the span of those before it becomes
/// zero: normalizing what is left of it would make a direction out of rounding errors.
///
/// Returns, in the last round, a bound of the Frobenius norm of `QᵀQ − I`, Q as stored in f32, columns of
/// zeros left out.
struct Orthonormalize<'a> {
    columns: &'a mut [f32],
    width: usize,
    last: bool,
}

impl Operation for Orthonormalize<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut columns = by_column(self.columns, self.width);
        for j in 0..columns.len() {
            let (before, rest) = columns.split_at_mut(j);
            let column = &mut rest[0];
            let original = inner(column, column);
            for _ in 0..=usize::from(self.last) {
                for other in &*before {
                    let share = inner(column, other);
                    column.iter_mut().zip(other).for_each(|(x, y)| *x -= share * y);
                }
            }
            let left = inner(column, column);
            let scale = if left > 1e-10 * original && original > 0.0 { 1.0 / left.sqrt() } else { 0.0 };
            for x in column.iter_mut() {
                *x *= scale;
            }
        }
        for (i, row) in self.columns.chunks_exact_mut(self.width).enumerate() {
            for (value, column) in row.iter_mut().zip(&columns) {
                *value = column[i] as f32;
            }
            row[self.width - 1] = 0.0;
        }
        if !self.last {
            return 0.0;
        }
        let columns = by_column(self.columns, self.width);
        let mut sum = 0.0;
        for (j, column) in columns.iter().enumerate() {
            let own = inner(column, column);
            if own > 0.0 {
                sum += (own - 1.0) * (own - 1.0);
                let others = columns[..j].iter().map(|other| inner(column, other));
                sum += others.map(|product| 2.0 * product * product).sum::<f64>();
            }
        }
        sum.sqrt() * (1.0 + 1e-6) + 1e-12
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    #[test]
    fn the_error_of_a_basis_is_that_of_its_products_and_of_its_columns() {
        let cols = 100;
        for directions in [5, 90] {
            let uniform = |i: usize| uniform(i as u64);
            let inside = |row: usize, column: usize| -> f32 {
                (0..directions).map(|i| uniform(10_000 + row * directions + i) * uniform(i * cols + column)).sum()
            };
            let values: Vec<f32> = (0..200 * cols).map(|i| inside(i / cols, i % cols)).collect();
            let rows = Matrix::new("features", &values, 200, cols).unwrap();
            for level in Level::available() {
                let context = Context::new(level, 1);
                let basis = Basis::fit(&context, rows, &mean(rows), 64).unwrap().unwrap();
                let columns: Vec<Vec<f64>> =
                    (0..63).map(|j| basis.panels().iter().map(|row| f64::from(row[j])).collect()).collect();
                let there: Vec<&Vec<f64>> = columns.iter().filter(|column| column.iter().any(|&x| x != 0.0)).collect();
                assert_eq!(there.len(), directions.min(63), "{level}");
                let mut defect = 0.0_f64;
                for (i, x) in there.iter().enumerate() {
                    for (j, y) in there.iter().enumerate() {
                        let product: f64 = x.iter().zip(*y).map(|(x, y)| x * y).sum();
                        defect = defect.hypot(product - f64::from(u8::from(i == j)));
                    }
                }
                // Two chunks of products, each summed in a chain, joined and added to the zero they begin with.
                let rounding = (2 + CHAIN + 2) as f64 * U * 63.0_f64.sqrt();
                let proved = |defect: f64| 1.01 * (rounding * (1.0 + defect) + defect);
                assert!((basis.error / proved(defect) - 1.0).abs() < 1e-6, "{level}: {} for {defect}", basis.error);
                assert!((error_bound(cols, 64, 0.25) / proved(0.25) - 1.0).abs() < 1e-12);
            }
        }
    }
}

//! Random linear projections ψ of the paper's section 3.3: an option for parity with other
//! implementations. The selection here affords the full dimension.
//!
//! Both kinds keep squared distances in expectation. Entries are drawn from a counter-based
//! generator, so entry (i, j) depends on nothing but the seed and its position.

use crate::context::Context;
use crate::error::Error;
use crate::math::{cos, ln};
use crate::matrix::{Matrix, checked_len, zeroed};
use crate::random::splitmix64;
use crate::simd::{LANES, Operation, Simd};

/// How the entries of the projection are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// ±√(s / width) with probability 1/(2s) each, else 0, s = √columns (Li, Hastie and Church 2006).
    Sparse,
    /// Normal with variance 1 / width.
    Gaussian,
}

impl Projection {
    /// The matrix of `cols × width` entries, row-major.
    fn entries(self, cols: usize, width: usize, seed: u64) -> Result<Vec<f32>, Error> {
        let len = checked_len(&[cols, width])? as u64;
        let uniform = |counter: u64| {
            let bits = splitmix64(splitmix64(seed).wrapping_add(counter));
            ((bits >> 11) as f64 + 0.5) * (f64::EPSILON / 2.0)
        };
        let sparsity = (cols as f64).sqrt();
        let step = (sparsity / width as f64).sqrt();
        let entry = |i: u64| match self {
            Self::Sparse => match uniform(i) * 2.0 * sparsity {
                u if u < 1.0 => step,
                u if u < 2.0 => -step,
                _ => 0.0,
            },
            // Box and Muller.
            Self::Gaussian => {
                let radius = (-2.0 * ln(uniform(2 * i))).sqrt();
                radius * cos(std::f64::consts::TAU * uniform(2 * i + 1)) / (width as f64).sqrt()
            }
        };
        Ok((0..len).map(|i| entry(i) as f32).collect())
    }
}

/// `features` times a random matrix: rows × `width`, row-major. Sums are taken in f64 in column order.
///
/// # Errors
/// [`Error::Invalid`] when `width` is 0, [`Error::TooLarge`], [`Error::Cancelled`].
pub fn project(
    context: &Context<'_>,
    features: Matrix<'_>,
    width: usize,
    kind: Projection,
    seed: u64,
) -> Result<Vec<f32>, Error> {
    if width == 0 {
        return Err(Error::invalid("projection", "a width of at least 1", width));
    }
    let mut projected = zeroed(&[features.rows(), width])?;
    let entries = kind.entries(features.cols(), width, seed)?;
    let entries = match kind {
        Projection::Sparse => Entries::Sparse(entries.chunks_exact(width).map(nonzero).collect()),
        Projection::Gaussian => Entries::Dense(panels(&entries, width)),
    };
    let level = context.level();
    let scratch = || (Vec::new(), vec![[0.0; LANES]; width.next_multiple_of(PANEL_WIDTH)]);
    context.for_each(
        projected.chunks_mut(LANES * width).enumerate(),
        scratch,
        |(values, sums), (block, projected)| {
            let rows = features.slice(block * LANES, projected.len() / width);
            level.run(RowBlock { rows, entries: &entries, values, sums, projected });
        },
    )?;
    Ok(projected)
}

/// The entries of a projection, in the order in which they are read.
enum Entries {
    /// For each column of the features its entries that are not 0, as (output column, entry): adding 0 to a sum
    /// changes no bit of it.
    Sparse(Vec<Vec<(u32, f64)>>),
    /// All entries, [`PANEL_WIDTH`] output columns after another.
    Dense(Vec<[f64; PANEL_WIDTH]>),
}

/// Output columns whose sums stay in registers: at sixteen f64 each, 8 registers of 512 bits. Left to the compiler,
/// as loops over arrays, the sums went through memory, which took several times as long (`benches/NOTES.md`).
const PANEL_WIDTH: usize = 4;

/// The entries of a row that are not 0, as (output column, entry).
fn nonzero(entries: &[f32]) -> Vec<(u32, f64)> {
    let kept = (0..).zip(entries).filter(|&(_, &entry)| entry != 0.0);
    kept.map(|(output, &entry)| (output, f64::from(entry))).collect()
}

/// The first [`PANEL_WIDTH`] output columns for all columns of the features, then the next, filled up with zeros.
fn panels(entries: &[f32], width: usize) -> Vec<[f64; PANEL_WIDTH]> {
    let mut panels = Vec::with_capacity(entries.len().div_ceil(PANEL_WIDTH));
    for first in (0..width).step_by(PANEL_WIDTH) {
        panels.extend(entries.chunks_exact(width).map(|row| {
            let mut panel = [0.0; PANEL_WIDTH];
            panel.iter_mut().zip(&row[first..]).for_each(|(wide, &entry)| *wide = f64::from(entry));
            panel
        }));
    }
    panels
}

/// The values of a column, in f64, those of absent rows 0.
#[inline(always)]
fn gathered(rows: Matrix<'_>, column: usize) -> [f64; LANES] {
    let mut values = [0.0; LANES];
    for (row, value) in values.iter_mut().enumerate().take(rows.rows()) {
        *value = f64::from(rows.row(row)[column]);
    }
    values
}

/// Projects up to [`LANES`] rows, which lie in the lanes: an entry, whatever its output column, then is one
/// vector's work.
struct RowBlock<'a> {
    rows: Matrix<'a>,
    entries: &'a Entries,
    /// The rows in f64, transposed: for dense entries, which read them again for every panel.
    values: &'a mut Vec<[f64; LANES]>,
    sums: &'a mut [[f64; LANES]],
    projected: &'a mut [f32],
}

impl Operation for RowBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { rows, entries, values, sums, projected } = self;
        match entries {
            Entries::Sparse(columns) => {
                sums.fill([0.0; LANES]);
                for (column, entries) in columns.iter().enumerate() {
                    let values = gathered(rows, column);
                    for &(output, entry) in entries {
                        for (sum, value) in sums[output as usize].iter_mut().zip(&values) {
                            *sum += value * entry;
                        }
                    }
                }
            }
            Entries::Dense(panels) => {
                values.clear();
                for column in 0..rows.cols() {
                    values.push(gathered(rows, column));
                }
                for (panel, sums) in panels.chunks_exact(values.len()).zip(sums.as_chunks_mut::<PANEL_WIDTH>().0) {
                    let mut kept = [simd.zero(); PANEL_WIDTH];
                    for (values, entries) in values.iter().zip(panel) {
                        let values = simd.load(values);
                        for (kept, &entry) in kept.iter_mut().zip(entries) {
                            *kept = simd.add_product(*kept, values, simd.splat(entry));
                        }
                    }
                    for (kept, sums) in kept.into_iter().zip(sums) {
                        simd.store(kept, sums);
                    }
                }
            }
        }
        let width = projected.len() / rows.rows();
        for (row, projected) in projected.chunks_exact_mut(width).enumerate() {
            for (value, sums) in projected.iter_mut().zip(&*sums) {
                *value = sums[row] as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    /// Mean over many rows of ‖ψx‖² / ‖x‖².
    fn length_ratio(kind: Projection) -> f64 {
        let (rows, cols, width) = (200, 100, 64);
        let values: Vec<f32> = (0..rows * cols).map(|i| ((i * i) as f32 * 0.013).sin()).collect();
        let features = Matrix::new("features", &values, rows, cols).unwrap();
        let projected = project(&Context::new(Level::detect(), 2), features, width, kind, 5).unwrap();
        let square = |row: &[f32]| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
        (0..rows).map(|i| square(&projected[i * width..][..width]) / square(features.row(i))).sum::<f64>() / rows as f64
    }

    #[test]
    fn squared_lengths_are_kept_on_average() {
        for kind in [Projection::Sparse, Projection::Gaussian] {
            let ratio = length_ratio(kind);
            assert!((0.9..1.1).contains(&ratio), "{kind:?}: {ratio}");
        }
    }

    #[test]
    fn sums_are_those_of_the_definition_at_every_level() {
        let values: Vec<f32> = (0..39 * 50).map(|i| ((i * 7919 % 1000) as f32 * 0.01).sin()).collect();
        let features = Matrix::new("features", &values, 39, 50).unwrap();
        for kind in [Projection::Sparse, Projection::Gaussian] {
            let entries = kind.entries(50, 33, 3).unwrap();
            let sum = |row: usize, output: usize| {
                let products = (0..50).map(|i| f64::from(values[row * 50 + i]) * f64::from(entries[i * 33 + output]));
                products.fold(0.0, |sum, product| sum + product) as f32
            };
            let expected: Vec<f32> = (0..39 * 33).map(|i| sum(i / 33, i % 33)).collect();
            for level in Level::available() {
                assert_eq!(project(&Context::new(level, 2), features, 33, kind, 3).unwrap(), expected, "{level}");
            }
        }
    }

    #[test]
    fn the_seed_decides() {
        let values: Vec<f32> = (0..50_u16).map(f32::from).collect();
        let features = Matrix::new("features", &values, 5, 10).unwrap();
        let run = |threads, seed| {
            project(&Context::new(Level::Scalar, threads), features, 7, Projection::Gaussian, seed).unwrap()
        };
        assert_eq!(run(1, 0), run(3, 0));
        assert_ne!(run(1, 0), run(1, 1));
        assert!(project(&Context::new(Level::Scalar, 1), features, 0, Projection::Sparse, 0).is_err());
    }
}

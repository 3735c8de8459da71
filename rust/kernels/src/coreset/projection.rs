//! Random linear projections ψ of the paper's section 3.3: an option for parity with other
//! implementations. The selection here affords the full dimension.
//!
//! Both kinds keep squared distances in expectation. Entries are drawn from a counter-based
//! generator, so entry (i, j) depends on the seed and its position only.

use crate::error::Error;
use crate::matrix::{Matrix, checked_len, zeroed};
use crate::random::splitmix64;
use crate::simd::{Operation, Simd};
use crate::threads::Context;

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
            ((bits >> 11) as f64 + 0.5) * 2.0_f64.powi(-53)
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
                let radius = (-2.0 * uniform(2 * i).ln()).sqrt();
                radius * (std::f64::consts::TAU * uniform(2 * i + 1)).cos() / (width as f64).sqrt()
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
    let columns: Vec<Vec<(u32, f64)>> = match kind {
        // Most entries are 0, and adding 0 to a sum changes no bit of it.
        Projection::Sparse => entries.chunks_exact(width).map(nonzero).collect(),
        Projection::Gaussian => Vec::new(),
    };
    let level = context.level();
    context.for_each(
        projected.chunks_mut(width).enumerate(),
        || vec![0.0_f64; width],
        |sums, (row, projected)| {
            sums.fill(0.0);
            let row = features.row(row);
            match kind {
                Projection::Sparse => add_nonzero(row, &columns, sums),
                Projection::Gaussian => level.run(AddAll { row, entries: &entries, sums }),
            }
            for (projected, &sum) in projected.iter_mut().zip(&*sums) {
                *projected = sum as f32;
            }
        },
    )?;
    Ok(projected)
}

/// The places and values of a row of entries that are not 0.
fn nonzero(entries: &[f32]) -> Vec<(u32, f64)> {
    let places = (0..).zip(entries).filter(|&(_, &entry)| entry != 0.0);
    places.map(|(place, &entry)| (place, f64::from(entry))).collect()
}

fn add_nonzero(row: &[f32], columns: &[Vec<(u32, f64)>], sums: &mut [f64]) {
    for (&value, column) in row.iter().zip(columns) {
        let value = f64::from(value);
        for &(place, entry) in column {
            sums[place as usize] += value * entry;
        }
    }
}

/// Adds a row's products with all entries.
struct AddAll<'a> {
    row: &'a [f32],
    entries: &'a [f32],
    sums: &'a mut [f64],
}

impl Operation for AddAll<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (&value, entries) in self.row.iter().zip(self.entries.chunks_exact(self.sums.len())) {
            for (sum, &entry) in self.sums.iter_mut().zip(entries) {
                *sum += f64::from(value) * f64::from(entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    /// Mean over many rows of ‖ψx‖² / ‖x‖².
    fn stretch(kind: Projection) -> f64 {
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
            let stretch = stretch(kind);
            assert!((0.9..1.1).contains(&stretch), "{kind:?}: {stretch}");
        }
    }

    #[test]
    fn sums_are_those_of_the_definition_at_every_level() {
        let values: Vec<f32> = (0..9 * 50).map(|i| ((i * 7919 % 1000) as f32 * 0.01).sin()).collect();
        let features = Matrix::new("features", &values, 9, 50).unwrap();
        for kind in [Projection::Sparse, Projection::Gaussian] {
            let entries = kind.entries(50, 33, 3).unwrap();
            let sum = |row: usize, place: usize| {
                let products = (0..50).map(|i| f64::from(values[row * 50 + i]) * f64::from(entries[i * 33 + place]));
                products.fold(0.0, |sum, product| sum + product) as f32
            };
            let expected: Vec<f32> = (0..9 * 33).map(|i| sum(i / 33, i % 33)).collect();
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

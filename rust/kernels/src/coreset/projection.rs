//! Random linear projections ψ of the paper's section 3.3: an option for parity with other
//! implementations. The selection here affords the full dimension.
//!
//! Both kinds keep squared distances in expectation. Entries are drawn from a counter-based
//! generator, so entry (i, j) depends on the seed and its position only.

use crate::error::Error;
use crate::matrix::{Matrix, checked_len, zeroed};
use crate::random::splitmix64;
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
    context.for_each(
        projected.chunks_mut(width).enumerate(),
        || vec![0.0_f64; width],
        |sums, (row, projected)| {
            sums.fill(0.0);
            for (&value, entries) in features.row(row).iter().zip(entries.chunks_exact(width)) {
                for (sum, &entry) in sums.iter_mut().zip(entries) {
                    *sum += f64::from(value) * f64::from(entry);
                }
            }
            for (projected, &sum) in projected.iter_mut().zip(&*sums) {
                *projected = sum as f32;
            }
        },
    )?;
    Ok(projected)
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

//! A Gaussian at each position of a grid, and Mahalanobis distances to it: what `PaDiM` scores patches by. With one
//! position it is the Gaussian of whole images that Mahalanobis-AD scores by.
//!
//! ```text
//! accumulate    t = x − shift;  S_i += t_i;  P_ij += t_i·t_j for i ≥ j                   image after image
//! factorize     m = S/n;  mean_i = shift_i + m_i
//!               A_ij = scale·(P_ij − S_i·m_j), + epsilon where i = j
//!               A_ij −= L_ik·L_jk for rising k < j;  L_jj = √A_jj;  L_ij = A_ij·(1/L_jj)
//! mahalanobis   z = x − mean;  z_i −= L_ij·y_j for rising j < i;  y_i = z_i·(1/L_ii)
//!               √(Σ y_i²), added up for rising i
//! ```
//!
//! All in f64, every operation rounded by itself (none is fused), and each element takes its operations in the order
//! above. So the bits are the same at every SIMD level, for any number of threads and however images are dealt out to
//! batches: lanes hold elements, or images, never parts of one sum.
//!
//! Triangles are packed (`packed.rs`) in the memory of the caller, who saves them as they are; besides, a thread holds
//! one position at a time. Work is cut into tiles of [`LANES`] by [`LANES`] elements, all by one loop (`products.rs`);
//! but few images are measured column by column, as the triangle lies in memory (`columns.rs`).
//!
//! [`LANES`]: crate::simd::LANES

mod accumulate;
mod columns;
mod factorize;
mod mahalanobis;
mod packed;
mod products;
#[cfg(test)]
mod tests;

pub use accumulate::accumulate;
pub use factorize::{Options, factorize};
pub use mahalanobis::mahalanobis;

use crate::error::Error;
use crate::matrix::{Matrix, checked_len};

/// Values of triangles that a thread takes at a time: some tens of microseconds of work.
const ITEM_VALUES: usize = 1 << 14;

/// Positions that a thread takes at a time.
fn positions_at_once(channels: usize) -> usize {
    (ITEM_VALUES / packed::packed_len(channels)).max(1)
}

/// Sizes that fit together.
#[derive(Clone, Copy)]
struct Shape {
    positions: usize,
    channels: usize,
}

impl Shape {
    /// Checks the lengths of a (positions, channels) array, whose name comes with it, and of the packed triangles.
    fn new(
        positions: usize,
        channels: usize,
        (name, len): (&'static str, usize),
        packed: usize,
    ) -> Result<Self, Error> {
        if positions == 0 || channels == 0 {
            return Err(Error::Empty { name, expected: "a Gaussian has at least one position and one channel" });
        }
        let expected = checked_len(&[positions, channels])?;
        if len != expected {
            return Err(Error::invalid(name, format!("{positions} x {channels} values"), len));
        }
        checked_len(&[channels, channels + 1])?;
        let triangle = packed::packed_len(channels);
        if packed != checked_len(&[positions, triangle])? {
            return Err(Error::invalid("packed", format!("{positions} x {triangle} values"), packed));
        }
        Ok(Self { positions, channels })
    }

    /// The number of images in `features`, checked.
    fn check_images(self, features: Matrix<'_>) -> Result<usize, Error> {
        let Self { positions, channels } = self;
        let (rows, cols) = (features.rows(), features.cols());
        if cols != channels || !rows.is_multiple_of(positions) {
            let expected = format!("a multiple of {positions} rows of {channels} values");
            return Err(Error::invalid("features", expected, format!("{rows} rows of {cols}")));
        }
        Ok(rows / positions)
    }
}

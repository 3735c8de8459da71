//! 8-bit images as the backbone sees them: Pillow's bilinear resize, to the bit, whatever Pillow is installed.
//!
//! Releases of Pillow differ in pixels by a level, and so did scores. What is computed here is what Pillow 13.0 gives
//! on x86-64, for `Image.resize(size, Resampling.BILINEAR)` of images with any number of 8-bit channels, each of which
//! is resized alone:
//!
//! ```text
//! a weight of every source position along each axis, 22 bits behind the point      weights.rs
//! two passes, rows from rows and columns from columns; between them 8 bits again    passes.rs
//!     rows come first where there are more of them than are wanted, h > H, and 2(w − W) < h − H; else columns
//! ```
//!
//! The bytes between the passes are rounded, so their order is part of the definition. A pass that changes no length
//! has the weights 1 and 0, which change no byte. Sums are of integers: each level has the same bits.
//!
//! Of a crop only what it shows is computed.

mod passes;
#[cfg(test)]
mod tests;
mod weights;

use crate::context::Context;
use crate::error::Error;
use crate::geometry::Geometry;
use crate::matrix::{check_len, zeroed};
use passes::{across, down};
use weights::Weights;

/// Writes the crop of the resized image, (rows, columns, channels) as `pixels` are. What `out` held is not read.
///
/// # Errors
/// [`Error::Invalid`] when a size is 0, the crop does not lie within the resized image or a length does not fit;
/// [`Error::TooLarge`], [`Error::OutOfMemory`], [`Error::Cancelled`]. `out` then holds anything.
///
/// ```
/// use patchcore_kernels::{context::Context, geometry::Geometry, resize::resize, simd::Level};
///
/// // One row of eight grey pixels, halved: weights are 1/8, 3/8, 3/8 and 1/8, at the edge 3/7, 3/7 and 1/7.
/// let geometry = Geometry { image: [1, 8], resized: [1, 4], offset: [0, 0], crop: [1, 4] };
/// let mut out = [0; 4];
/// resize(&Context::new(Level::detect(), 1), &[0, 0, 0, 0, 80, 80, 80, 80], 1, geometry, &mut out)?;
/// assert_eq!(out, [0, 10, 70, 80]);
/// # Ok::<(), patchcore_kernels::error::Error>(())
/// ```
pub fn resize(
    context: &Context<'_>,
    pixels: &[u8],
    channels: usize,
    geometry: Geometry,
    out: &mut [u8],
) -> Result<(), Error> {
    geometry.check()?;
    let Geometry { image, resized, offset, crop } = geometry;
    if channels == 0 {
        return Err(Error::invalid("channels", "at least 1", channels));
    }
    check_len("pixels", pixels.len(), &[image[0], image[1], channels])?;
    check_len("out", out.len(), &[crop[0], crop[1], channels])?;
    let stride = image[1] * channels;
    if image == resized {
        for (row, out) in pixels.chunks_exact(stride).skip(offset[0]).zip(out.chunks_exact_mut(crop[1] * channels)) {
            out.copy_from_slice(&row[offset[1] * channels..][..out.len()]);
        }
        return Ok(());
    }
    let weights = |axis: usize| Weights::new(image[axis], resized[axis], offset[axis]..offset[axis] + crop[axis]);
    let (by_row, by_column) = (weights(0)?, weights(1)?);
    let (rows, columns) = (by_row.sources(), by_column.sources());
    if rows_first(geometry) {
        let mut between = zeroed(&[crop[0], columns.len(), channels])?;
        down(context, &pixels[columns.start * channels..], stride, &by_row, &mut between)?;
        across(context, &between, channels, &by_column.without(columns.start), out)
    } else {
        let mut between = zeroed(&[rows.len(), crop[1], channels])?;
        across(context, &pixels[rows.start * stride..rows.end * stride], channels, &by_column, &mut between)?;
        down(context, &between, crop[1] * channels, &by_row.without(rows.start), out)
    }
}

/// Whether rows are computed from rows before columns from columns.
fn rows_first(geometry: Geometry) -> bool {
    let [fewer_rows, fewer_columns] = [0, 1].map(|axis| geometry.image[axis] as i128 - geometry.resized[axis] as i128);
    fewer_rows > 0 && 2 * fewer_columns < fewer_rows
}

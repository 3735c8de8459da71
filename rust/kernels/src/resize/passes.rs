//! The two passes of a resize: rows from rows, and columns from columns.
//!
//! A pass is a weighted mean of rows, sixteen bytes of them at a time. For columns, sixteen rows are transposed: what
//! was a column is a row of sixteen bytes for each channel then, and the means of those are transposed back.

use super::weights::{BITS, Weights};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::zeroed;
use crate::simd::{LANES, Operation, Simd};

/// Half of a unit: what is cut off behind the point then rounds.
const HALF: i32 = 1 << (BITS - 1);

/// Sixteen bytes of sixteen rows.
type Tile = [[u8; LANES]; LANES];

/// Tiles that are read together: 64 bytes of a row, as the cache has them.
const TOGETHER: usize = 4;

/// Rows of `out` out of the first bytes of rows of `source`, which begin `stride` bytes apart.
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::Cancelled`].
pub(super) fn down(
    context: &Context<'_>,
    source: &[u8],
    stride: usize,
    weights: &Weights,
    out: &mut [u8],
) -> Result<(), Error> {
    let weights: Vec<_> = weights.iter().collect();
    let width = out.len() / weights.len();
    for (weights, out) in weights.chunks(LANES).zip(out.chunks_mut(LANES * width)) {
        context.level().run(Down { source, stride, weights, width, out });
        context.poll()?;
    }
    Ok(())
}

/// Rows of `out` out of as many rows of `source`, whose pixels have `channels` bytes.
///
/// # Errors
/// [`Error::OutOfMemory`], [`Error::Cancelled`].
pub(super) fn across(
    context: &Context<'_>,
    source: &[u8],
    channels: usize,
    weights: &Weights,
    out: &mut [u8],
) -> Result<(), Error> {
    let width = channels * weights.iter().len();
    let stride = source.len() / (out.len() / width);
    let mut tiles = zeroed(&[stride.div_ceil(LANES)])?;
    let mut means = zeroed(&[width.div_ceil(LANES)])?;
    for (source, out) in source.chunks(LANES * stride).zip(out.chunks_mut(LANES * width)) {
        let (tiles, means) = (&mut *tiles, &mut *means);
        context.level().run(Across { source, stride, channels, weights, tiles, means, width, out });
        context.poll()?;
    }
    Ok(())
}

/// Some rows of [`down`].
struct Down<'a> {
    source: &'a [u8],
    stride: usize,
    weights: &'a [(usize, &'a [i32])],
    width: usize,
    out: &'a mut [u8],
}

impl Operation for Down<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (&(first, weights), out) in self.weights.iter().zip(self.out.chunks_exact_mut(self.width)) {
            mean_row(simd, &self.source[first * self.stride..], self.stride, weights, out);
        }
    }
}

/// Up to sixteen rows of [`across`]; tiles and means are scratch.
struct Across<'a> {
    source: &'a [u8],
    stride: usize,
    channels: usize,
    weights: &'a Weights,
    tiles: &'a mut [Tile],
    means: &'a mut [Tile],
    width: usize,
    out: &'a mut [u8],
}

impl Operation for Across<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (at, tiles) in self.tiles.chunks_mut(TOGETHER).enumerate() {
            // Where there are fewer than sixteen rows, the lanes of the others hold what they held.
            for (r, row) in self.source.chunks_exact(self.stride).enumerate() {
                let (whole, rest) = row[TOGETHER * LANES * at..].as_chunks::<LANES>();
                let mut lines = tiles.iter_mut().map(|tile| &mut tile[r]);
                for (bytes, line) in whole.iter().zip(lines.by_ref()) {
                    *line = *bytes;
                }
                if let Some(line) = lines.next() {
                    line[..rest.len()].copy_from_slice(rest);
                }
            }
            for tile in tiles {
                *tile = transposed(simd, *tile);
            }
        }
        let columns = self.tiles.as_flattened().as_flattened();
        let stride = LANES * self.channels;
        let means = self.means.as_flattened_mut().as_flattened_mut();
        for ((first, weights), mean) in self.weights.iter().zip(means.chunks_exact_mut(stride)) {
            mean_row(simd, &columns[first * stride..], stride, weights, mean);
        }
        for (at, tile) in self.means.iter().enumerate() {
            for (line, row) in transposed(simd, *tile).iter().zip(self.out.chunks_exact_mut(self.width)) {
                let row = &mut row[LANES * at..];
                match row.first_chunk_mut() {
                    Some(bytes) => *bytes = *line,
                    None => row.copy_from_slice(&line[..row.len()]),
                }
            }
        }
    }
}

/// The weighted mean of rows that begin `stride` bytes apart, as far as `out` is long.
#[inline(always)]
fn mean_row<S: Simd>(simd: S, rows: &[u8], stride: usize, weights: &[i32], out: &mut [u8]) {
    /// The colours of a pixel of sixteen rows.
    const WIDE: usize = 3;
    let width = out.len();
    if width < LANES {
        for (at, out) in out.iter_mut().enumerate() {
            let bytes = rows[at..].iter().step_by(stride);
            let sum = bytes.zip(weights).fold(HALF, |sum, (&byte, weight)| sum + i32::from(byte) * weight);
            *out = (sum >> BITS).min(255) as u8;
        }
        return;
    }
    let mut at = 0;
    while at + WIDE * LANES <= width {
        mean_bytes::<S, WIDE>(simd, &rows[at..], stride, weights, &mut out[at..]);
        at += WIDE * LANES;
    }
    while at < width {
        let begin = at.min(width - LANES); // the last may overlap those before it
        mean_bytes::<S, 1>(simd, &rows[begin..], stride, weights, &mut out[begin..]);
        at += LANES;
    }
}

/// The first `N` times sixteen bytes of [`mean_row`].
#[inline(always)]
fn mean_bytes<S: Simd, const N: usize>(simd: S, rows: &[u8], stride: usize, weights: &[i32], out: &mut [u8]) {
    let mut sums = [simd.splat_i32(HALF); N];
    for (i, &weight) in weights.iter().enumerate() {
        let weight = simd.splat_i32(weight);
        let bytes = rows[i * stride..].as_chunks().0;
        for (sum, bytes) in sums.iter_mut().zip(&bytes[..N]) {
            *sum = simd.add_product_i32(*sum, simd.load_u8(bytes), weight);
        }
    }
    for (sum, out) in sums.into_iter().zip(out.as_chunks_mut().0) {
        simd.store_u8(simd.shift_right(sum, BITS), out);
    }
}

/// Byte j of line i from byte i of line j.
#[inline(always)]
fn transposed<S: Simd>(simd: S, mut tile: Tile) -> Tile {
    // Each time, the four bits that number a line and the four that number a byte of it turn by one.
    for _ in 0..4 {
        let lines = tile;
        for (i, pair) in tile.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *pair = simd.interleave(lines[i], lines[i + LANES / 2]);
        }
    }
    tile
}

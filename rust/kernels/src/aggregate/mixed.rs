//! Pooling where columns cut channels between taps: any width.
//!
//! A column is a weighted sum of runs of the values channel·p² + tap. The p rows that a grid row
//! covers are transposed and zero-padded, so that `plane(row, channel)` holds the positions side by
//! side; the value of (channel, tap) at sixteen neighbouring patches is then one unaligned load from
//! the plane, shifted by the tap's column. Sixteen columns × sixteen patches are computed at a time
//! and written back transposed. Rows stay transposed while the neighbourhood moves over them.

use super::plan::{Layer, Run};

/// Side of a square: the patches that lie in the lanes of a vector, and the columns computed before they are
/// transposed back. Sixteen f32 fill the widest vector.
const SIDE: usize = 16;

/// Transposed rows.
#[derive(Default)]
pub(super) struct Scratch {
    /// Row y, counted with padding, lies in slot y mod p.
    planes: Vec<f32>,
    /// The row that each slot holds.
    held: Vec<Option<usize>>,
    /// Where the taps of the current grid row lie.
    taps: Vec<usize>,
}

impl Scratch {
    /// Makes every slot free: another layer or image follows.
    pub(super) fn forget(&mut self) {
        self.held.clear();
    }
}

/// Reduces grid row `y`, as [`super::grid_rows`] does where pooling is uniform: position x goes to
/// `out[x·step ..][.. columns]`.
#[inline(always)]
pub(super) fn reduce_row(
    layer: &Layer<'_>,
    runs: &[Run],
    image: usize,
    y: usize,
    out: &mut [f32],
    step: usize,
    scratch: &mut Scratch,
) {
    let (p, stride) = (layer.patch_size, layer.stride);
    let channels = layer.map.shape[3];
    // Lanes past the grid's end read within the plane; what they hold is not written.
    let plane_len = (layer.grid.1.next_multiple_of(SIDE) - 1) * stride + p;
    scratch.planes.resize(p * channels * plane_len, 0.0);
    scratch.held.resize(p, None);
    for row in y * stride..y * stride + p {
        if scratch.held[row % p] != Some(row) {
            let planes = &mut scratch.planes[row % p * channels * plane_len..][..channels * plane_len];
            transpose_row(layer, image, row, planes, plane_len);
            scratch.held[row % p] = Some(row);
        }
    }
    // Where the value of (channel 0, tap) of patch 0 lies.
    scratch.taps.clear();
    scratch.taps.extend((0..p * p).map(|tap| (y * stride + tap / p) % p * channels * plane_len + tap % p));
    let Scratch { planes, taps, .. } = scratch;
    for x in (0..layer.grid.1).step_by(SIDE) {
        for runs in runs.chunk_by(|a, b| a.column / SIDE == b.column / SIDE) {
            let mut square = [[0.0; SIDE]; SIDE];
            for run in runs {
                let sum = add_run(run, planes, taps, plane_len, x * stride, stride);
                for (total, sum) in square[run.column % SIDE].iter_mut().zip(sum) {
                    *total += sum * run.weight as f32;
                }
            }
            let first = runs[0].column / SIDE * SIDE;
            let count = SIDE.min(layer.columns.len() - first);
            for (lane, out) in out[x * step..].chunks_mut(step).take(SIDE.min(layer.grid.1 - x)).enumerate() {
                for (out, column) in out[first..first + count].iter_mut().zip(&square) {
                    *out = column[lane];
                }
            }
        }
    }
}

/// The sum of a run at sixteen patches, channel by channel so that long runs stay accurate.
#[inline(always)]
fn add_run(run: &Run, planes: &[f32], taps: &[usize], plane_len: usize, x: usize, stride: usize) -> [f32; SIDE] {
    let mut total = [0.0; SIDE];
    let area = taps.len();
    for channel in run.values.start / area..run.values.end.div_ceil(area) {
        let mut sum = [0.0; SIDE];
        let first = channel * area;
        let covered = run.values.start.max(first) - first..run.values.end.min(first + area) - first;
        for tap in &taps[covered] {
            let at = channel * plane_len + tap + x;
            if stride == 1 {
                let values = &planes[at..at + SIDE];
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            } else {
                let values = planes[at..].iter().step_by(stride);
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
        total.iter_mut().zip(sum).for_each(|(total, sum)| *total += sum);
    }
    total
}

/// Writes row `row`, counted with padding, channel by channel with zeros left and right.
#[inline(always)]
fn transpose_row(layer: &Layer<'_>, image: usize, row: usize, planes: &mut [f32], plane_len: usize) {
    planes.fill(0.0);
    let [_, height, _, channels] = layer.map.shape;
    let padding = layer.padding();
    if (padding..padding + height).contains(&row) {
        let values = layer.map.row(image, row - padding);
        for (x, position) in values.chunks_exact(channels).take(plane_len - padding).enumerate() {
            for (plane, &value) in planes.chunks_exact_mut(plane_len).zip(position) {
                plane[padding + x] = value;
            }
        }
    }
}

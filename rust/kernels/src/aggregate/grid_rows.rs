//! The body of the aggregation: some grid rows of one image.

use std::ops::Range;

use super::mixed;
use super::plan::{Layer, Pooling};
use crate::matrix::is_good;
use crate::resample::Between;
use crate::simd::{Operation, Simd};

/// What a thread keeps from item to item.
#[derive(Default)]
pub(super) struct Scratch {
    /// Sums over p rows at one position, before channels are grouped.
    column: Vec<f32>,
    /// Such sums at the last positions, grouped: a power of two of them, p at least, so that a mask finds
    /// those of a position.
    ring: Vec<f32>,
    /// Reduced rows of a deeper layer.
    reduced: Vec<f32>,
    /// A row interpolated between two of them.
    interpolated: Vec<f32>,
    /// What the layer before wrote to the column that it shares with this one.
    shared: Vec<f32>,
    mixed: mixed::Scratch,
}

/// Computes the features of some grid rows of one image. Answers whether all values read were finite and at
/// most [`LIMIT`](crate::matrix::LIMIT) in magnitude.
pub(super) struct GridRows<'a> {
    pub layers: &'a [Layer<'a>],
    pub grid: (usize, usize),
    pub width: usize,
    pub image: usize,
    pub rows: Range<usize>,
    pub out: &'a mut [f32],
    pub scratch: &'a mut Scratch,
}

impl Operation for GridRows<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) -> bool {
        let Self { layers, grid, width, image, rows, out, scratch } = self;
        let mut good = true;
        for layer in layers {
            let height = layer.map.shape[1];
            for y in height * rows.start / grid.0..height * rows.end / grid.0 {
                good &= all_good(layer.map.row(image, y));
            }
            scratch.shared.clear();
            if layer.shared {
                scratch.shared.extend(out.chunks_exact(width).map(|feature| feature[layer.columns.start]));
            }
            scratch.mixed.forget();
            if let Some(sources) = &layer.sources {
                interpolate(layer, sources, image, rows.clone(), out, width, scratch);
            } else {
                for (y, out) in rows.clone().zip(out.chunks_exact_mut(grid.1 * width)) {
                    reduce_row(layer, image, y, &mut out[layer.columns.start..], width, scratch);
                }
            }
            for (feature, before) in out.chunks_exact_mut(width).zip(&scratch.shared) {
                feature[layer.columns.start] += before;
            }
        }
        good
    }
}

/// Whether every value is finite and at most [`LIMIT`](crate::matrix::LIMIT) in magnitude.
#[inline(always)]
fn all_good(values: &[f32]) -> bool {
    values.iter().fold(true, |all, &value| all & is_good(value))
}

/// Reduces the rows of a deeper layer that some grid rows need and interpolates between them.
#[inline(always)]
fn interpolate(
    layer: &Layer<'_>,
    (row_sources, column_sources): &(Vec<Between>, Vec<Between>),
    image: usize,
    rows: Range<usize>,
    out: &mut [f32],
    width: usize,
    scratch: &mut Scratch,
) {
    let columns = layer.columns.len();
    let row_len = layer.grid.1 * columns;
    let first = row_sources[rows.start].low;
    let mut reduced = std::mem::take(&mut scratch.reduced);
    let mut interpolated = std::mem::take(&mut scratch.interpolated);
    let kept = aligned(&mut reduced, (row_sources[rows.end - 1].high + 1 - first) * row_len);
    for (y, row) in (first..).zip(kept.chunks_exact_mut(row_len)) {
        reduce_row(layer, image, y, row, columns, scratch);
    }
    let blended = aligned(&mut interpolated, row_len);
    for (source, out) in row_sources[rows].iter().zip(out.chunks_exact_mut(column_sources.len() * width)) {
        let row = |y: usize| &kept[(y - first) * row_len..][..row_len];
        blend(blended, row(source.low), row(source.high), source.weight);
        for (source, feature) in column_sources.iter().zip(out.chunks_exact_mut(width)) {
            let position = |x: usize| &blended[x * columns..][..columns];
            blend(&mut feature[layer.columns.clone()], position(source.low), position(source.high), source.weight);
        }
    }
    scratch.reduced = reduced;
    scratch.interpolated = interpolated;
}

/// A slice of `len` values that begins at a multiple of 64 bytes, so that vector loads do not straddle cache
/// lines: measured in `benches/NOTES.md`.
#[inline(always)]
fn aligned(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    const LINE: usize = 64;
    buffer.resize(len + LINE / size_of::<f32>(), 0.0);
    let start = buffer.as_ptr().align_offset(LINE).min(buffer.len() - len);
    &mut buffer[start..][..len]
}

/// `out = (1 − weight)·low + weight·high`.
#[inline(always)]
fn blend(out: &mut [f32], low: &[f32], high: &[f32], weight: f64) {
    let (rest, weight) = ((1.0 - weight) as f32, weight as f32);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = rest * low + weight * high;
    }
}

/// Reduces row `y` of the layer's own grid: position x goes to `out[x·step ..][.. columns]`.
#[inline(always)]
fn reduce_row(layer: &Layer<'_>, image: usize, y: usize, out: &mut [f32], step: usize, scratch: &mut Scratch) {
    let (group, weight, extras) = match &layer.pooling {
        Pooling::Mixed(runs) => return mixed::reduce_row(layer, runs, image, y, out, step, &mut scratch.mixed),
        Pooling::Uniform { group, weight, extras } => (*group, *weight, extras),
    };
    let [_, height, width, channels] = layer.map.shape;
    let columns = layer.columns.len();
    let rows = layer.covered(y, height);
    let mask = layer.patch_size.next_power_of_two() - 1;
    let Scratch { column, ring, .. } = scratch;
    let column = aligned(column, channels);
    let ring = aligned(ring, (mask + 1) * columns);
    let mut next = 0;
    for x in 0..layer.grid.1 {
        let covered = layer.covered(x, width);
        for x in next.max(covered.start)..covered.end {
            let sum = &mut ring[(x & mask) * columns..][..columns];
            let part = |i: usize| &layer.map.row(image, rows.start + i)[x * channels..][..channels];
            if group == 1 {
                add_up(sum, rows.len(), part, 1.0);
            } else {
                add_up(column, rows.len(), part, 1.0);
                add_groups(sum, column, group);
            }
        }
        next = covered.end;
        let out = &mut out[x * step..][..columns];
        add_up(out, covered.len(), |i| &ring[((covered.start + i) & mask) * columns..][..columns], weight);
        for extra in extras {
            let at = |at: usize, tap: usize| (at * layer.stride + tap).wrapping_sub(layer.padding());
            let (y, x) = (at(y, extra.row), at(x, extra.column));
            if y < height && x < width {
                let values = &layer.map.row(image, y)[x * channels..][..channels];
                add_extra(out, &values[extra.channel..], group, extra.weight);
            }
        }
    }
}

/// `out = (part(0) + … + part(count − 1))·scale`, added in that order.
#[inline(always)]
fn add_up<'a>(out: &mut [f32], count: usize, part: impl Fn(usize) -> &'a [f32], scale: f32) {
    let len = out.len();
    let a = &part(0)[..len];
    if count == 1 {
        for i in 0..len {
            out[i] = a[i] * scale;
        }
        return;
    }
    let b = &part(1)[..len];
    if count == 2 {
        for i in 0..len {
            out[i] = (a[i] + b[i]) * scale;
        }
        return;
    }
    let c = &part(2)[..len];
    if count == 3 {
        for i in 0..len {
            out[i] = (a[i] + b[i] + c[i]) * scale;
        }
        return;
    }
    for i in 0..len {
        out[i] = a[i] + b[i] + c[i];
    }
    for part in (3..count).map(part) {
        out.iter_mut().zip(part).for_each(|(out, value)| *out += value);
    }
    for out in out {
        *out *= scale;
    }
}

/// The sums of `group` neighbouring channels.
#[inline(always)]
fn add_groups(out: &mut [f32], values: &[f32], group: usize) {
    if group == 2 {
        for (out, [a, b]) in out.iter_mut().zip(values.as_chunks::<2>().0) {
            *out = a + b;
        }
        return;
    }
    for (out, values) in out.iter_mut().zip(values.chunks_exact(group)) {
        *out = values.iter().fold(0.0, |sum, value| sum + value);
    }
}

/// Adds `weight` times the first of every `group` values.
#[inline(always)]
fn add_extra(out: &mut [f32], values: &[f32], group: usize, weight: f32) {
    if group == 1 {
        out.iter_mut().zip(values).for_each(|(out, value)| *out += weight * value);
    } else {
        out.iter_mut().zip(values.iter().step_by(group)).for_each(|(out, value)| *out += weight * value);
    }
}

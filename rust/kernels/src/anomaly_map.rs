//! Anomaly maps: patch scores upsampled to the image and smoothed.
//!
//! Upsampling (bilinear with `align_corners=False`, or torch's nearest) and the Gaussian that follows
//! act on each axis alone and are linear, border included. So there is one small matrix per axis,
//!
//! ```text
//! A = G·U        U: upsampling (to × from), G: Gaussian of radius ⌊4σ + ½⌋ with its border (to × to)
//! map = A_y · scores · A_xᵀ
//! ```
//!
//! which is banded: a pixel depends on the few patches within the radius. The image is never blurred
//! at full size.
//!
//! ```text
//! per call: both A in f64, then rounded to float32
//! for each (map, some pixel rows), dealt to the threads:
//!   for each row of scores that these need: spread its values over x        (columns of A_x)
//!   for each pixel row: the weighted sum of some of these rows                    (a row of A_y)
//! ```
//!
//! Sums are float32 and run from the first patch to the last, so the bits depend on nothing but the
//! scores and the options; weights are positive and sum to 1, so the error is a few 10⁻⁷ of the largest score.

use std::ops::Range;

use crate::context::Context;
use crate::error::Error;
use crate::math::exp;
use crate::matrix::{checked_len, reserved};
use crate::resample;
use crate::simd::{Operation, Simd};

/// Pixels of a row that are summed in registers at a time: two vectors of 512 bits or four of 256, so that
/// additions to one need not wait for those to another.
const STRIP_PIXELS: usize = 32;

/// Pixels of an item: some tens of microseconds of work, so that dealing it to a thread pays.
const ITEM_PIXELS: usize = 1 << 16;

/// Largest σ, in pixels: a map smoothed more than that is flat, and the weights of every pixel are kept.
const MAX_SIGMA: f64 = 1000.0;

/// How patch scores become pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upsampling {
    /// torch's `bilinear` with `align_corners=False`.
    Bilinear,
    /// torch's `nearest`.
    Nearest,
}

/// What the Gaussian reads beyond the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Border {
    /// d c b a | a b c d | d c b a: scipy's `reflect`.
    Symmetric,
    /// d c b | a b c d | c b a: torch's `reflect`.
    Reflect,
}

/// Size and smoothing of anomaly maps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Rows of a map.
    pub height: usize,
    /// Columns of a map.
    pub width: usize,
    /// Standard deviation of the Gaussian in pixels; 0 does not smooth.
    pub sigma: f64,
    /// How patch scores become pixels.
    pub upsampling: Upsampling,
    /// What the Gaussian reads beyond the edge.
    pub border: Border,
}

/// Writes the map of each of `shape[0]` images with `shape[1] × shape[2]` patch scores. What `out` held
/// is not read.
///
/// # Errors
/// [`Error::Empty`] when a grid holds no patch, [`Error::Invalid`] when a length does not fit, a size is
/// 0, σ is not in 0..=1000 or a score is not finite; [`Error::Cancelled`]. `out` then holds anything.
///
/// ```
/// use patchcore_kernels::anomaly_map::{Border, Options, Upsampling, anomaly_maps};
/// use patchcore_kernels::{context::Context, simd::Level};
///
/// let (upsampling, border) = (Upsampling::Bilinear, Border::Symmetric);
/// let options = Options { height: 1, width: 4, sigma: 0.0, upsampling, border };
/// let mut map = [0.0; 4];
/// anomaly_maps(&Context::new(Level::detect(), 1), &[0.0, 1.0], [1, 1, 2], options, &mut map)?;
/// assert_eq!(map, [0.0, 0.25, 0.75, 1.0]);
/// # Ok::<(), patchcore_kernels::error::Error>(())
/// ```
pub fn anomaly_maps(
    context: &Context<'_>,
    scores: &[f32],
    shape: [usize; 3],
    options: Options,
    out: &mut [f32],
) -> Result<(), Error> {
    check(scores, shape, options, out)?;
    let [_, rows, columns] = shape;
    let Options { height, width, .. } = options;
    let vertical = Bands::new(rows, height, options);
    let horizontal = Bands::new(columns, width, options).transposed(columns);
    let count = (ITEM_PIXELS / width).clamp(1, height);
    let mut items = reserved(&[shape[0], height.div_ceil(count)])?;
    for (scores, map) in scores.chunks_exact(rows * columns).zip(out.chunks_exact_mut(height * width)) {
        for (index, out) in map.chunks_mut(count * width).enumerate() {
            let rows = index * count..index * count + out.len() / width;
            items.push(PixelRows { vertical: &vertical, horizontal: &horizontal, scores, rows, width, out });
        }
    }
    let level = context.level();
    context.for_each(items.into_iter(), Vec::new, |spread, pixel_rows| level.run(Draw { pixel_rows, spread }))
}

fn check(scores: &[f32], [images, rows, columns]: [usize; 3], options: Options, out: &[f32]) -> Result<(), Error> {
    if rows == 0 || columns == 0 {
        return Err(Error::Empty { name: "scores", expected: "a grid of at least one patch per image" });
    }
    for (name, size) in [("height", options.height), ("width", options.width)] {
        if size == 0 {
            return Err(Error::invalid(name, "at least 1", 0));
        }
    }
    if !(0.0..=MAX_SIGMA).contains(&options.sigma) {
        return Err(Error::invalid("sigma", format!("from 0 to {MAX_SIGMA} pixels"), options.sigma));
    }
    if scores.len() != checked_len(&[images, rows, columns])? {
        return Err(Error::invalid("scores", format!("{images} x {rows} x {columns} values"), scores.len()));
    }
    let len = checked_len(&[images, options.height, options.width])?;
    if out.len() != len {
        return Err(Error::invalid("out", format!("{len} values"), out.len()));
    }
    if let Some(at) = scores.iter().position(|score| !score.is_finite()) {
        let place = format!("image {}, row {}, column {}", at / columns / rows, at / columns % rows, at % columns);
        let got = format!("{} in {place}", scores[at].to_string().to_lowercase());
        return Err(Error::invalid("scores", "finite", got));
    }
    Ok(())
}

/// A banded matrix: every row has one contiguous range of columns that are not 0.
struct Bands {
    columns: Vec<Range<usize>>,
    /// Where the weights of each row begin.
    starts: Vec<usize>,
    weights: Vec<f32>,
}

impl Bands {
    /// A = G·U of the module's text: `to` rows, `from` columns.
    fn new(from: usize, to: usize, options: Options) -> Self {
        let sources: Vec<(usize, usize, f64)> = match options.upsampling {
            Upsampling::Bilinear => resample::linear(from, to).iter().map(|s| (s.low, s.high, s.weight)).collect(),
            Upsampling::Nearest => resample::nearest(from, to).into_iter().map(|at| (at, at, 0.0)).collect(),
        };
        let kernel = gaussian(options.sigma);
        let radius = kernel.len() / 2;
        // The sources of every pixel from `radius` before the first to `radius` after the last.
        let extended: Vec<_> =
            (0..to + 2 * radius).map(|at| sources[mirrored(at, radius, to, options.border)]).collect();
        let mut row = vec![0.0_f64; from];
        let mut bands = Self { columns: Vec::with_capacity(to), starts: Vec::with_capacity(to), weights: Vec::new() };
        for window in extended.windows(kernel.len()) {
            let mut columns = window[0].0..window[0].1 + 1;
            for (&(low, high, share), &weight) in window.iter().zip(&kernel) {
                row[low] += weight * (1.0 - share);
                row[high] += weight * share;
                columns = hull(&columns, &(low..high + 1));
            }
            bands.push(columns.clone(), row[columns.clone()].iter().map(|&weight| weight as f32));
            row[columns].fill(0.0);
        }
        bands
    }

    fn push(&mut self, columns: Range<usize>, weights: impl Iterator<Item = f32>) {
        self.columns.push(columns);
        self.starts.push(self.weights.len());
        self.weights.extend(weights);
    }

    /// The range of columns of a row, and its weights.
    #[inline(always)]
    fn row(&self, index: usize) -> (Range<usize>, &[f32]) {
        let columns = self.columns[index].clone();
        (columns.clone(), &self.weights[self.starts[index]..][..columns.len()])
    }

    fn transposed(&self, columns: usize) -> Self {
        let mut ranges = vec![0..0; columns];
        for (row, range) in self.columns.iter().enumerate() {
            for range in &mut ranges[range.clone()] {
                *range = hull(range, &(row..row + 1));
            }
        }
        let mut bands = Self { columns: Vec::new(), starts: Vec::new(), weights: Vec::new() };
        for (column, range) in ranges.into_iter().enumerate() {
            let weight = |row: usize| {
                let (columns, weights) = self.row(row);
                if columns.contains(&column) { weights[column - columns.start] } else { 0.0 }
            };
            bands.push(range.clone(), range.map(weight));
        }
        bands
    }
}

/// The smallest range that holds both; an empty one holds nothing.
#[inline(always)]
fn hull(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    if a.is_empty() { b.clone() } else { a.start.min(b.start)..a.end.max(b.end) }
}

/// The weights of the Gaussian, ⌊4σ + ½⌋ to either side, which sum to 1.
fn gaussian(sigma: f64) -> Vec<f64> {
    let radius = (4.0 * sigma + 0.5) as usize;
    let weight = |i: usize| {
        let deviations = if i == radius { 0.0 } else { i.abs_diff(radius) as f64 / sigma };
        exp(-0.5 * (deviations * deviations))
    };
    let weights: Vec<f64> = (0..=2 * radius).map(weight).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// The pixel of `0..len` that stands for pixel `at − before`, which may lie beyond the edges.
fn mirrored(at: usize, before: usize, len: usize, border: Border) -> usize {
    // `period`: pixels after which the mirrored line repeats. `sum`: a pixel and its mirror image add up to it.
    let (period, sum) = match border {
        Border::Symmetric => (2 * len, 2 * len - 1),
        Border::Reflect => ((2 * len - 2).max(1), 2 * len - 2),
    };
    let at = (at + period - before % period) % period;
    if at < len { at } else { sum - at }
}

/// Some rows of one map.
struct PixelRows<'a> {
    vertical: &'a Bands,
    /// Transposed: a row per column of the scores.
    horizontal: &'a Bands,
    /// The scores of the image.
    scores: &'a [f32],
    rows: Range<usize>,
    width: usize,
    out: &'a mut [f32],
}

/// Computes some rows of a map.
struct Draw<'a, 'b> {
    pixel_rows: PixelRows<'a>,
    /// The thread's scratch: rows of scores, spread over x.
    spread: &'b mut Vec<f32>,
}

impl Operation for Draw<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let PixelRows { vertical, horizontal, scores, rows, width, out } = self.pixel_rows;
        let columns = horizontal.columns.len();
        let needed = vertical.columns[rows.clone()].iter().fold(0..0, |all, range| hull(&all, range));
        let stride = width.next_multiple_of(STRIP_PIXELS);
        let spread = self.spread;
        spread.clear();
        spread.resize(needed.len() * stride, 0.0);
        for (row, pixels) in needed.clone().zip(spread.chunks_exact_mut(stride)) {
            for (column, &score) in scores[row * columns..][..columns].iter().enumerate() {
                let (range, weights) = horizontal.row(column);
                for (pixel, weight) in pixels[range].iter_mut().zip(weights) {
                    *pixel += score * weight;
                }
            }
        }
        for (y, out) in rows.zip(out.chunks_exact_mut(width)) {
            let (range, weights) = vertical.row(y);
            let from = &spread[(range.start - needed.start) * stride..];
            for (x, out) in (0..width).step_by(STRIP_PIXELS).zip(out.chunks_mut(STRIP_PIXELS)) {
                let mut sums = [0.0; STRIP_PIXELS];
                for (row, &weight) in from.chunks_exact(stride).zip(weights) {
                    let pixels = &row[x..x + STRIP_PIXELS];
                    for (sum, pixel) in sums.iter_mut().zip(pixels) {
                        *sum += weight * pixel;
                    }
                }
                out.copy_from_slice(&sums[..out.len()]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn draw(context: &Context<'_>, scores: &[f32], shape: [usize; 3], options: Options) -> Vec<f32> {
        let mut out = vec![f32::NAN; shape[0] * options.height * options.width];
        anomaly_maps(context, scores, shape, options, &mut out).unwrap();
        out
    }

    /// Asserts that every level and number of threads gives the same bits, close to the definition.
    fn agrees(scores: &[f32], shape: [usize; 3], options: Options) {
        let expected = naive::anomaly_maps(scores, shape, options);
        let found = draw(&Context::new(Level::Scalar, 1), scores, shape, options);
        assert_eq!(found.len(), expected.len());
        let largest = scores.iter().fold(0.0_f32, |largest, score| largest.max(score.abs()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= 1e-6 * f64::from(largest), "{shape:?} {options:?} [{i}]: {found} {expected}");
        }
        for level in Level::available() {
            for threads in [1, 2, 7] {
                let other = draw(&Context::new(level, threads), scores, shape, options);
                assert!(found.iter().map(|v| v.to_bits()).eq(other.iter().map(|v| v.to_bits())), "{level} {threads}");
            }
        }
        let alone = scores.chunks_exact(shape[1] * shape[2]);
        let alone = alone.flat_map(|s| draw(&Context::new(Level::detect(), 2), s, [1, shape[1], shape[2]], options));
        assert!(found.iter().copied().eq(alone));
    }

    proptest! {
        #[test]
        fn maps_agree_with_the_definition(
            shape in prop::array::uniform3(1_usize..7), height in 1_usize..40, width in 1_usize..80,
            sigma in prop_oneof![Just(0.0), 0.05..6.0], nearest in any::<bool>(), reflect in any::<bool>(),
            scores in prop::collection::vec(-3.0_f32..50.0, 7 * 7 * 7),
        ) {
            let upsampling = if nearest { Upsampling::Nearest } else { Upsampling::Bilinear };
            let border = if reflect { Border::Reflect } else { Border::Symmetric };
            let options = Options { height, width, sigma, upsampling, border };
            agrees(&scores[..shape.iter().product()], shape, options);
        }
    }

    #[test]
    fn maps_of_images_agree_with_the_definition() {
        let scores: Vec<f32> = (0..2 * 28 * 28).map(|i| (i * 7919 % 1009) as f32).collect();
        let options = |height, width, upsampling, border| Options { height, width, sigma: 4.0, upsampling, border };
        agrees(&scores, [2, 28, 28], options(224, 224, Upsampling::Bilinear, Border::Symmetric));
        agrees(&scores, [2, 28, 28], options(256, 256, Upsampling::Nearest, Border::Reflect));
        agrees(&scores, [1, 14, 112], options(50, 4000, Upsampling::Bilinear, Border::Reflect));
    }

    #[test]
    fn a_constant_stays() {
        for border in [Border::Symmetric, Border::Reflect] {
            for (height, width) in [(1, 1), (3, 224), (17, 2)] {
                let options = Options { height, width, sigma: 4.0, upsampling: Upsampling::Bilinear, border };
                let map = draw(&Context::new(Level::detect(), 2), &[2.5; 4], [1, 2, 2], options);
                assert!(map.iter().all(|value| (value - 2.5).abs() < 2e-6));
            }
        }
    }

    #[test]
    fn borders_mirror() {
        let at = |border| (0..13).map(|i| mirrored(i, 5, 3, border)).collect::<Vec<_>>();
        assert_eq!(at(Border::Symmetric), [1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0, 1]);
        assert_eq!(at(Border::Reflect), [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]);
        assert!((0..9).all(|i| mirrored(i, 4, 1, Border::Reflect) == 0 && mirrored(i, 4, 1, Border::Symmetric) == 0));
    }

    #[test]
    fn wrong_arguments_are_named() {
        let good =
            Options { height: 4, width: 4, sigma: 4.0, upsampling: Upsampling::Nearest, border: Border::Reflect };
        let message = |scores: &[f32], shape, options, out: usize| {
            let context = Context::new(Level::detect(), 1);
            anomaly_maps(&context, scores, shape, options, &mut vec![0.0; out]).unwrap_err().to_string()
        };
        assert!(message(&[], [1, 0, 2], good, 16).starts_with("scores is empty"));
        assert!(message(&[0.0; 3], [1, 2, 2], good, 16).starts_with("scores must be 1 x 2 x 2 values"));
        assert!(message(&[0.0; 4], [1, 2, 2], good, 15).starts_with("out must be 16 values"));
        assert!(message(&[0.0; 4], [1, 2, 2], Options { height: 0, ..good }, 0).starts_with("height"));
        assert!(message(&[0.0; 4], [1, 2, 2], Options { width: 0, ..good }, 0).starts_with("width"));
        for sigma in [-1.0, f64::NAN, f64::INFINITY, 1001.0] {
            assert!(message(&[0.0; 4], [1, 2, 2], Options { sigma, ..good }, 16).starts_with("sigma must be from 0"));
        }
        let bad = [0.0, 0.0, f32::INFINITY, 0.0];
        assert!(message(&bad, [1, 2, 2], good, 16).ends_with("got inf in image 0, row 1, column 0"));
    }
}

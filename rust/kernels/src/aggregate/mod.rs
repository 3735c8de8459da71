//! Local neighbourhood aggregation (§3.1 of the paper): backbone maps → patch features.
//!
//! A position of a layer's map takes in its p × p neighbourhood (zero padding of ⌊(p−1)/2⌋, stride s),
//! deeper layers are interpolated bilinearly to the grid of the first, and the layers are joined:
//!
//! ```text
//! concatenation      feature = [ mean₀ | mean₁ | … ]
//!   meanₗ = the p × p mean of layer l, padding counted, interpolated
//!
//! width W            feature = adaptive([ u₀ | u₁ | … ])
//!   vₗ = the C = c·p² values of the neighbourhood, index channel·p² + tap, interpolated
//!   uₗ = adaptive(vₗ)
//!   adaptive(v)[k] = mean of v[⌊kC/W⌋ .. ⌈(k+1)C/W⌉], for v of any length C
//! ```
//!
//! All of it is linear, so the order can be chosen: the channels are reduced on the layer's own grid
//! first, and only the reduced values are interpolated. A column of the result has, per layer, one
//! fixed set of weights over (channel, tap). Two cases:
//!
//! 1. **Uniform.** Every column of the layer has the same weights, over its own g channels. That holds
//!    for the concatenation (g = 1) and wherever W is a multiple of the number of layers and divides
//!    c·layers, as with 512 + 1024 channels and W = 1024: there layer 0 gets the weights 1/10 with 2/10
//!    in the centre, layer 1 the mean of two channels' 3 × 3 means. Computed as a box sum times the
//!    smallest weight, and for each tap that weighs more the difference. Box sums are separable: the
//!    sums of p rows lie in a ring of p columns, channels in the lanes, and each position adds p of them.
//! 2. **Mixed.** Columns cut channels between taps, as with W = 384. The rows are transposed, so that
//!    positions lie in the lanes, and a column is the weighted sum of some shifted rows (`mixed.rs`).
//!
//! ```text
//! for each (image, some grid rows), dealt to the threads:
//!   for each layer:
//!     check its input rows                                  which also brings them into the cache
//!     first layer:   reduce row by row into the output
//!     deeper layer:  reduce the few rows that these need; interpolate between two rows, then
//!                    between two positions, into the output
//! ```
//!
//! Every value is computed in float32 in one order of additions that depends on the options and the
//! position only (rows, channels, columns, then taps), nothing is fused, and every item owns its rows of
//! the output: the bits do not depend on level, threads or batch. Relative to the sum of magnitudes the
//! error is a few 10⁻⁷.

mod grid_rows;
mod mixed;
mod plan;

use std::sync::atomic::{AtomicBool, Ordering};

use crate::context::Context;
use crate::error::Error;
use crate::matrix::{LIMIT, checked_len, is_good, zeroed};

use grid_rows::{GridRows, Scratch};
use plan::{Layer, own_grid, plan};

/// The output of one backbone layer: images of `height × width` positions of `channels` values each,
/// channels last.
#[derive(Clone, Copy, Debug)]
pub struct MapView<'a> {
    data: &'a [f32],
    shape: [usize; 4],
}

impl<'a> MapView<'a> {
    /// A view of `data` as (images, height, width, channels).
    ///
    /// # Errors
    /// [`Error::Invalid`] when the length is another, [`Error::Empty`] when an image holds nothing.
    pub fn new(data: &'a [f32], shape: [usize; 4]) -> Result<Self, Error> {
        if shape[1..].contains(&0) {
            return Err(Error::Empty { name: "maps", expected: "height, width and channels of at least 1" });
        }
        if data.len() != checked_len(&shape)? {
            let [n, h, w, c] = shape;
            return Err(Error::invalid("maps", format!("{n} x {h} x {w} x {c} values"), data.len()));
        }
        Ok(Self { data, shape })
    }

    /// Values of an image.
    fn image_len(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Row `y` of an image: `width × channels` values.
    #[inline(always)]
    fn row(&self, image: usize, y: usize) -> &'a [f32] {
        let [_, height, width, channels] = self.shape;
        &self.data[(image * height + y) * width * channels..][..width * channels]
    }
}

/// Largest side of a neighbourhood: the maps of backbones are rarely wider, and tables over its taps, some 4 000,
/// stay small.
const MAX_PATCH_SIZE: usize = 63;

/// Values, read and written, that make an item worth a thread: some 50 µs, so that waking the thread pays. Tests
/// cut smaller maps too.
const ITEM_VALUES: usize = if cfg!(test) { 100 } else { 200_000 };

/// How neighbourhoods become features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Side p of the neighbourhood.
    pub patch_size: usize,
    /// Distance between neighbouring patches.
    pub stride: usize,
    /// Width of the features: adaptive pooling to that many values, or None for the concatenated means.
    pub width: Option<usize>,
}

/// The patch features of `maps`, one map per layer, and the grid (rows, columns) of patches per image.
///
/// A feature is a row of the result; patches follow each other row by row, image by image.
///
/// # Errors
/// As [`Aggregation::new`] and [`Aggregation::run`].
///
/// ```
/// use patchcore_kernels::aggregate::{MapView, Options, aggregate};
/// use patchcore_kernels::{context::Context, simd::Level};
///
/// let map = MapView::new(&[9.0; 3 * 3], [1, 3, 3, 1])?;
/// let options = Options { patch_size: 3, stride: 1, width: None };
/// let (features, grid) = aggregate(&Context::new(Level::detect(), 1), &[map], options)?;
/// assert_eq!(grid, (3, 3));
/// assert_eq!(features, [4.0, 6.0, 4.0, 6.0, 9.0, 6.0, 4.0, 6.0, 4.0]);
/// # Ok::<(), patchcore_kernels::error::Error>(())
/// ```
pub fn aggregate(
    context: &Context<'_>,
    maps: &[MapView<'_>],
    options: Options,
) -> Result<(Vec<f32>, (usize, usize)), Error> {
    let aggregation = Aggregation::new(maps, options)?;
    let (patches, width) = aggregation.shape();
    let mut out = zeroed(&[patches, width])?;
    aggregation.run(context, &mut out)?;
    Ok((out, aggregation.grid()))
}

/// An aggregation whose arguments are checked and whose result has a known shape.
#[derive(Debug)]
pub struct Aggregation<'a> {
    layers: Vec<Layer<'a>>,
    images: usize,
    grid: (usize, usize),
    width: usize,
}

impl<'a> Aggregation<'a> {
    /// Checks the shapes of `maps`, one map per layer.
    ///
    /// # Errors
    /// [`Error::Empty`] without maps, [`Error::Invalid`] when an option is out of range, layers differ in
    /// their number of images or a neighbourhood is larger than a padded map, [`Error::TooLarge`].
    pub fn new(maps: &[MapView<'a>], options: Options) -> Result<Self, Error> {
        let Some(first) = maps.first() else {
            return Err(Error::Empty { name: "maps", expected: "one map per layer" });
        };
        if !(1..=MAX_PATCH_SIZE).contains(&options.patch_size) {
            return Err(Error::invalid("patch_size", format!("from 1 to {MAX_PATCH_SIZE}"), options.patch_size));
        }
        if options.stride == 0 {
            return Err(Error::invalid("stride", "at least 1", 0));
        }
        if options.width == Some(0) {
            return Err(Error::invalid("width", "at least 1, or None for the concatenation", 0));
        }
        let images = first.shape[0];
        for (layer, map) in maps.iter().enumerate() {
            if map.shape[0] != images {
                let got = format!("{images} in maps[0] and {} in maps[{layer}]", map.shape[0]);
                return Err(Error::invalid("maps", "of the same number of images in every layer", got));
            }
        }
        let grid = own_grid(0, first, options)?;
        let width = options.width.unwrap_or(maps.iter().map(|map| map.shape[3]).sum());
        checked_len(&[images.max(1), grid.0, grid.1, width])?;
        Ok(Self { layers: plan(maps, options, grid)?, images, grid, width })
    }

    /// Rows and columns of the result: patches of all images, and the width of a feature.
    pub fn shape(&self) -> (usize, usize) {
        (self.images * self.grid.0 * self.grid.1, self.width)
    }

    /// Rows and columns of patches per image.
    pub fn grid(&self) -> (usize, usize) {
        self.grid
    }

    /// Writes the features, patch after patch. What `out` held is not read.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `out` has another length, or a value of the maps is not finite or beyond
    /// [`LIMIT`]; [`Error::Cancelled`]. `out` then holds anything.
    pub fn run(&self, context: &Context<'_>, out: &mut [f32]) -> Result<(), Error> {
        let Self { layers, images, grid, width } = self;
        let row_len = grid.1 * width;
        if out.len() != images * grid.0 * row_len {
            return Err(Error::invalid("out", format!("{} values", images * grid.0 * row_len), out.len()));
        }
        // Enough items that the threads end together, none that takes less time than waking a thread.
        let work = grid.0 * row_len + layers.iter().map(|layer| layer.map.image_len()).sum::<usize>();
        let parts = (4 * context.threads()).div_ceil((*images).max(1)).min(work / ITEM_VALUES);
        let parts = if context.threads() == 1 { 1 } else { parts.max(1) };
        let rows = grid.0.div_ceil(parts);
        let mut items = Vec::new();
        for (image, features) in out.chunks_mut(grid.0 * row_len).enumerate() {
            for (part, out) in features.chunks_mut(rows * row_len).enumerate() {
                items.push((image, part * rows..part * rows + out.len() / row_len, out));
            }
        }
        let (level, bad) = (context.level(), AtomicBool::new(false));
        context.for_each(items.into_iter(), Scratch::default, |scratch, (image, rows, out)| {
            if !level.run(GridRows { layers, grid: *grid, width: *width, image, rows, out, scratch }) {
                bad.store(true, Ordering::Relaxed);
            }
        })?;
        if bad.into_inner() { Err(first_bad(layers)) } else { Ok(()) }
    }
}

/// The error that names the first value that is not finite or too large.
fn first_bad(layers: &[Layer<'_>]) -> Error {
    let found = layers.iter().enumerate().find_map(|(layer, Layer { map, .. })| {
        let at = map.data.iter().position(|&value| !is_good(value))?;
        let [_, h, w, c] = map.shape;
        let place =
            format!("image {}, row {}, column {}, channel {}", at / c / w / h, at / c / w % h, at / c % w, at % c);
        Some(format!("{} in maps[{layer}] at {place}", map.data[at].to_string().to_lowercase()))
    });
    Error::invalid("maps", format!("finite and at most {LIMIT:e} in magnitude"), found.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    /// Values of both signs in which every position differs.
    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 2_654_435 + seed * 97) % 10_007) as f32 / 5_000.0 - 1.0).collect()
    }

    fn maps<'a>(shapes: &[[usize; 4]], data: &'a [Vec<f32>]) -> Vec<MapView<'a>> {
        shapes.iter().zip(data).map(|(&shape, data)| MapView::new(data, shape).unwrap()).collect()
    }

    /// Asserts that every level, number of threads and split of the batch gives the same bits, close to
    /// the definition.
    fn agrees(shapes: &[[usize; 4]], options: Options) {
        let data: Vec<_> = shapes.iter().enumerate().map(|(i, s)| values(s.iter().product(), i)).collect();
        let twin: Vec<_> = data.iter().zip(shapes).map(|(data, &shape)| (data.as_slice(), shape)).collect();
        let (expected, grid) = naive::aggregate(&twin, options.patch_size, options.stride, options.width);
        let views = maps(shapes, &data);
        let (found, found_grid) = aggregate(&Context::new(Level::Scalar, 1), &views, options).unwrap();
        assert_eq!((grid, expected.len()), (found_grid, found.len()));
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert!((f64::from(*found) - expected).abs() <= 1e-6, "{shapes:?} {options:?} [{i}]: {found} {expected}");
        }
        for level in Level::available() {
            for threads in [1, 2, 7] {
                let (other, _) = aggregate(&Context::new(level, threads), &views, options).unwrap();
                assert!(found.iter().map(|v| v.to_bits()).eq(other.iter().map(|v| v.to_bits())), "{level} {threads}");
            }
        }
        let mut alone = Vec::new();
        for image in 0..shapes[0][0] {
            let one = |(data, shape): (&'_ Vec<f32>, &[usize; 4])| {
                let len = data.len() / shape[0];
                data[image * len..][..len].to_vec()
            };
            let data: Vec<_> = data.iter().zip(shapes).map(one).collect();
            let shapes: Vec<_> = shapes.iter().map(|&[_, h, w, c]| [1, h, w, c]).collect();
            alone.extend(aggregate(&Context::new(Level::detect(), 2), &maps(&shapes, &data), options).unwrap().0);
        }
        assert_eq!(found, alone);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn any_shape_agrees_with_the_definition(
            n in 1_usize..3, patch_size in 1_usize..6, stride in 1_usize..4, width in prop::option::of(1_usize..40),
            layers in prop::collection::vec((1_usize..9, 1_usize..9, 1_usize..21), 1..4),
        ) {
            let shapes: Vec<_> = layers.iter().map(|&(h, w, c)| [n, h, w, c]).collect();
            let fits = |&(h, w, _): &(usize, usize, usize)| h.min(w) + (patch_size - 1) / 2 * 2 >= patch_size;
            prop_assume!(layers.iter().all(fits));
            agrees(&shapes, Options { patch_size, stride, width });
        }
    }

    #[test]
    fn the_sizes_of_real_backbones_agree_with_the_definition() {
        let options = Options { patch_size: 3, stride: 1, width: None };
        agrees(&[[2, 8, 8, 40], [2, 4, 4, 112], [2, 2, 2, 192]], options);
        for width in [512, 1024, 384, 2048] {
            agrees(&[[1, 6, 6, 512], [1, 3, 3, 1024]], Options { width: Some(width), ..options });
        }
        agrees(&[[1, 4, 4, 256], [1, 2, 2, 512], [1, 1, 1, 1024]], Options { width: Some(768), ..options });
        agrees(&[[1, 40, 37, 3], [1, 20, 18, 5]], Options { width: Some(7), ..options });
        agrees(&[[1, 5, 4, 3]], Options { patch_size: 2, stride: usize::MAX / 4, width: Some(7) });
    }

    #[test]
    fn a_pair_of_layers_has_the_closed_form() {
        let shapes = [[1, 5, 5, 512], [1, 5, 5, 1024]];
        let data: Vec<_> = shapes.iter().enumerate().map(|(i, s)| values(s.iter().product(), i)).collect();
        let options = Options { patch_size: 3, stride: 1, width: Some(1024) };
        let (found, _) = aggregate(&Context::new(Level::detect(), 1), &maps(&shapes, &data), options).unwrap();
        let at =
            |layer: usize, y: usize, x: usize, c: usize| f64::from(data[layer][(y * 5 + x) * shapes[layer][3] + c]);
        let box_sum = |layer, c| (1..4).flat_map(|y| (1..4).map(move |x| at(layer, y, x, c))).sum::<f64>();
        for c in 0..512 {
            let patch = |column| f64::from(found[(2 * 5 + 2) * 1024 + column]);
            assert!((patch(c) - (box_sum(0, c) + at(0, 2, 2, c)) / 10.0).abs() < 1e-6);
            assert!((patch(512 + c) - (box_sum(1, 2 * c) + box_sum(1, 2 * c + 1)) / 18.0).abs() < 1e-6);
        }
    }

    #[test]
    fn bad_values_are_named() {
        let context = Context::new(Level::detect(), 2);
        let shapes = [[2, 6, 6, 3], [2, 3, 3, 5]];
        for (value, name) in [(f32::NAN, "nan"), (f32::NEG_INFINITY, "-inf"), (2e16, "20000000000000000")] {
            // A stride that leaves positions out still checks them.
            for stride in [1, 5] {
                let mut data = shapes.map(|shape: [usize; 4]| values(shape.iter().product(), 0)).to_vec();
                data[1][9 * 5 + (2 * 3 + 1) * 5 + 4] = value;
                let options = Options { patch_size: 3, stride, width: None };
                let error = aggregate(&context, &maps(&shapes, &data), options).unwrap_err().to_string();
                assert!(
                    error.ends_with(&format!("{name} in maps[1] at image 1, row 2, column 1, channel 4")),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let context = Context::new(Level::detect(), 1);
        let data = vec![0.0; 48];
        let map = MapView::new(&data, [2, 2, 3, 4]).unwrap();
        let message = |maps: &[MapView<'_>], patch_size, stride, width| {
            aggregate(&context, maps, Options { patch_size, stride, width }).unwrap_err().to_string()
        };
        assert!(message(&[], 3, 1, None).starts_with("maps is empty"));
        assert!(message(&[map], 0, 1, None).starts_with("patch_size must be from 1"));
        assert!(message(&[map], 3, 0, None).starts_with("stride must be at least 1"));
        assert!(message(&[map], 3, 1, Some(0)).starts_with("width must be at least 1"));
        let flat = MapView::new(&data, [2, 1, 6, 4]).unwrap();
        assert!(message(&[flat], 4, 1, None).contains("lower patch_size; got 1 x 6 in maps[0]"));
        assert!(message(&[map], 3, 1, Some(usize::MAX / 4)).contains("does not fit"));
        let one = MapView::new(&data[..24], [1, 2, 3, 4]).unwrap();
        assert!(message(&[map, one], 3, 1, None).contains("got 2 in maps[0] and 1 in maps[1]"));
        assert!(MapView::new(&data, [2, 2, 3, 5]).unwrap_err().to_string().contains("2 x 2 x 3 x 5 values; got 48"));
        assert!(matches!(MapView::new(&[], [1, 0, 3, 5]), Err(Error::Empty { .. })));
        let none = MapView::new(&[], [0, 2, 3, 4]).unwrap();
        let options = Options { patch_size: 3, stride: 1, width: Some(9) };
        assert_eq!(aggregate(&context, &[none], options), Ok((vec![], (2, 3))));
        assert!(Aggregation::new(&[one], options).unwrap().run(&context, &mut [0.0; 7]).is_err());
    }
}

//! What an aggregation knows before it reads a value: grids, columns and weights of every layer.

use std::ops::Range;

use super::{MapView, Options};
use crate::error::Error;
use crate::matrix::checked_len;
use crate::resample::{self, Between};

/// What is known of a layer before a value is read.
#[derive(Debug)]
pub(super) struct Layer<'a> {
    pub map: MapView<'a>,
    pub grid: (usize, usize),
    pub patch_size: usize,
    pub stride: usize,
    /// The columns of the result that this layer adds to.
    pub columns: Range<usize>,
    /// Whether the layer before adds to the first of them too.
    pub shared: bool,
    pub pooling: Pooling,
    /// Sources of the rows and columns of the first layer's grid, or None when the grids are the same.
    pub sources: Option<(Vec<Between>, Vec<Between>)>,
}

/// How a layer's channels and taps become columns.
#[derive(Debug)]
pub(super) enum Pooling {
    /// `weight` for each tap of `group` channels, and the differences of the taps that weigh more.
    Uniform { group: usize, weight: f32, extras: Vec<Extra> },
    /// See [`super::mixed`].
    Mixed(Vec<Run>),
}

/// A tap with a weight of its own.
#[derive(Debug)]
pub(super) struct Extra {
    pub channel: usize,
    pub row: usize,
    pub column: usize,
    pub weight: f32,
}

/// The plan of every layer.
pub(super) fn plan<'a>(maps: &[MapView<'a>], options: Options, first: (usize, usize)) -> Result<Vec<Layer<'a>>, Error> {
    let Options { patch_size, stride, width } = options;
    let area = patch_size * patch_size;
    let mut joined = 0;
    let mut layers = Vec::with_capacity(maps.len());
    for (index, &map) in maps.iter().enumerate() {
        let channels = map.shape[3];
        let (columns, shared, pooling) = match width {
            None => {
                let weight = (1.0 / area as f64) as f32;
                (joined..joined + channels, false, Pooling::Uniform { group: 1, weight, extras: Vec::new() })
            }
            Some(width) => {
                checked_len(&[channels, area, width, maps.len()])?;
                let columns = index * width / maps.len()..((index + 1) * width).div_ceil(maps.len());
                let whole = width.is_multiple_of(maps.len()) && (channels * maps.len()).is_multiple_of(width);
                let runs = |columns| runs(channels * area, width, (index, maps.len()), columns);
                let pooling = if whole {
                    uniform(channels * maps.len() / width, &runs(columns.start..columns.start + 1), patch_size)
                } else {
                    Pooling::Mixed(runs(columns.clone()))
                };
                (columns, !(index * width).is_multiple_of(maps.len()), pooling)
            }
        };
        joined += channels;
        let grid = own_grid(index, &map, options)?;
        let sources = (grid != first).then(|| (resample::linear(grid.0, first.0), resample::linear(grid.1, first.1)));
        // A stride beyond the map moves no patch; clamped, it overflows nothing.
        let stride = stride.min(map.shape[1].max(map.shape[2]) + patch_size);
        layers.push(Layer { map, grid, patch_size, stride, columns, shared, pooling, sources });
    }
    Ok(layers)
}

/// The uniform pooling whose first column is the sum of `runs`, over `group` channels.
fn uniform(group: usize, runs: &[Run], patch_size: usize) -> Pooling {
    let area = patch_size * patch_size;
    let mut weights = vec![0.0; group * area];
    for run in runs {
        weights[run.values.clone()].iter_mut().for_each(|weight| *weight += run.weight);
    }
    let least = weights.iter().copied().fold(f64::INFINITY, f64::min);
    let extra = |(at, weight): (usize, &f64)| Extra {
        channel: at / area,
        row: at % area / patch_size,
        column: at % patch_size,
        weight: (weight - least) as f32,
    };
    let extras = weights.iter().enumerate().filter(|&(_, &weight)| weight > least).map(extra).collect();
    Pooling::Uniform { group, weight: least as f32, extras }
}

/// A run of the values channel·p² + tap that adds to a column with one weight.
#[derive(Clone, Debug)]
pub(super) struct Run {
    /// Counted from the layer's first column.
    pub column: usize,
    /// The values.
    pub values: Range<usize>,
    /// The weight of each.
    pub weight: f64,
}

/// The runs, by rising column, that layer `index` of `layers` adds to `columns` of a result of `width`
/// columns: `values` values averaged to `width`, joined with the other layers', averaged to `width`.
fn runs(values: usize, width: usize, (index, layers): (usize, usize), columns: Range<usize>) -> Vec<Run> {
    let mut runs = Vec::with_capacity(columns.len() * layers);
    let first = columns.start;
    let own = index * width..(index + 1) * width;
    for column in columns {
        for joined in own.start.max(column * layers)..own.end.min((column + 1) * layers) {
            let k = joined - own.start;
            let values = k * values / width..((k + 1) * values).div_ceil(width);
            let weight = 1.0 / (layers * values.len()) as f64;
            runs.push(Run { column: column - first, values, weight });
        }
    }
    runs
}

impl Layer<'_> {
    /// The part of `0..len` that the neighbourhood at grid position `at` covers.
    #[inline(always)]
    pub(super) fn covered(&self, at: usize, len: usize) -> Range<usize> {
        let end = at * self.stride + self.patch_size - self.padding();
        (at * self.stride).saturating_sub(self.padding())..end.min(len)
    }

    #[inline(always)]
    pub(super) fn padding(&self) -> usize {
        (self.patch_size - 1) / 2
    }
}

/// The grid of patches on a layer's own map.
pub(super) fn own_grid(layer: usize, map: &MapView<'_>, options: Options) -> Result<(usize, usize), Error> {
    let Options { patch_size, stride, .. } = options;
    let [_, height, width, _] = map.shape;
    let padding = 2 * ((patch_size - 1) / 2);
    if height.min(width) + padding < patch_size {
        let got =
            format!("{height} x {width} in maps[{layer}] with a padding of {padding} for patches of {patch_size}");
        return Err(Error::invalid("maps", "at least as high and wide as a patch; lower patch_size", got));
    }
    Ok(((height + padding - patch_size) / stride + 1, (width + padding - patch_size) / stride + 1))
}

//! Distances to the mean, by forward substitution.

use super::columns::by_columns;
use super::packed::{blocks, origin, packed_len, piece};
use super::products::{add_all, solve};
use super::{Shape, positions_at_once};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::{Matrix, zeroed};
use crate::simd::{LANES, Operation, Simd};

/// Up to so many images take the factors column by column, as they lie in memory; more are worth panels.
const FEW: usize = LANES;

/// The Mahalanobis distance of each position of each image, image after image.
///
/// `features` has a row for each position of each image, as for [`super::accumulate`]; `mean` is (positions, d),
/// `packed` the factors, both as [`super::factorize`] leaves them. The factors pass through memory once; what an
/// image gets does not depend on the others.
///
/// # Errors
/// [`Error::Empty`] and [`Error::Invalid`] for sizes that do not fit together, [`Error::OutOfMemory`],
/// [`Error::Cancelled`].
pub fn mahalanobis(
    context: &Context<'_>,
    features: Matrix<'_>,
    mean: &[f64],
    packed: &[f64],
) -> Result<Vec<f64>, Error> {
    let d = features.cols();
    let shape = Shape::new(mean.len() / d, d, ("mean", mean.len()), packed.len())?;
    let images = shape.check_images(features)?;
    if images == 0 {
        return Ok(Vec::new());
    }
    let count = positions_at_once(d);
    let level = context.level();
    let mut by_position = zeroed(&[shape.positions, images])?;
    let items = by_position.chunks_mut(count * images).enumerate();
    context.for_each(items, Scratch::default, |scratch, (item, out)| {
        level.run(Measure { features, mean, packed, first: item * count, out, scratch });
    })?;
    let mut distances = zeroed(&[images, shape.positions])?;
    for (position, row) in by_position.chunks_exact(images).enumerate() {
        for (image, &distance) in row.iter().enumerate() {
            distances[image * shape.positions + position] = distance;
        }
    }
    Ok(distances)
}

/// What a thread keeps from position to position. More than [`FEW`] images are in groups of [`LANES`], a lane each.
#[derive(Default)]
struct Scratch {
    /// z of the module's text: of few images by image and block of channels, else by block and image.
    z: Vec<[f64; LANES]>,
    /// y of a panel, by group and channel.
    y: Vec<[[f64; LANES]; LANES]>,
    /// Sums of squares, by group.
    squares: Vec<[f64; LANES]>,
}

/// Measures all images at some positions.
struct Measure<'a, 'b> {
    features: Matrix<'a>,
    mean: &'a [f64],
    packed: &'a [f64],
    /// The first of the positions.
    first: usize,
    /// Distances, by position and image.
    out: &'a mut [f64],
    scratch: &'b mut Scratch,
}

impl Operation for Measure<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let d = self.features.cols();
        let positions = self.mean.len() / d;
        let images = self.features.rows() / positions;
        let Scratch { z, y, squares } = self.scratch;
        for (position, out) in (self.first..).zip(self.out.chunks_exact_mut(images)) {
            let packed = &self.packed[position * packed_len(d)..][..packed_len(d)];
            z.clear();
            z.resize(blocks(d) * images, [0.0; LANES]);
            let (of_block, of_image) = if images <= FEW { (1, blocks(d)) } else { (images, 1) };
            for image in 0..images {
                let row = self.features.row(image * positions + position).chunks(LANES);
                let mean = self.mean[position * d..][..d].chunks(LANES);
                for (block, (row, mean)) in row.zip(mean).enumerate() {
                    for ((z, x), mean) in z[block * of_block + image * of_image].iter_mut().zip(row).zip(mean) {
                        *z = f64::from(*x) - mean;
                    }
                }
            }
            squares.clear();
            squares.resize(images.div_ceil(LANES), [0.0; LANES]);
            if images <= FEW {
                by_columns(simd, packed, d, z, &mut squares.as_flattened_mut()[..images]);
            } else {
                by_panels(simd, packed, d, z, y, squares);
            }
            for (out, squares) in out.iter_mut().zip(squares.as_flattened()) {
                *out = squares.sqrt();
            }
        }
    }
}

/// Sums of squares of y, from `z` by block of channels and image: a panel of columns at a time, for all images.
#[inline(always)]
fn by_panels<S: Simd>(
    simd: S,
    packed: &[f64],
    d: usize,
    z: &mut [[f64; LANES]],
    y: &mut Vec<[[f64; LANES]; LANES]>,
    squares: &mut [[f64; LANES]],
) {
    let images = z.len() / blocks(d);
    y.clear();
    y.resize(images.div_ceil(LANES), [[0.0; LANES]; LANES]);
    for panel in 0..blocks(d) {
        let (before, after) = z.split_at_mut((panel + 1) * images);
        solve_panel(simd, packed, d, panel, &before[panel * images..], y, squares);
        let mut origins = [0; LANES];
        for (column, at) in (panel * LANES..).zip(&mut origins).take(d - panel * LANES) {
            *at = origin(d, column);
        }
        for (block, z) in (panel + 1..).zip(after.chunks_exact_mut(images)) {
            let groups = z.chunks_mut(LANES).zip(&*y);
            // A row that ends early goes on with the next column's, in lanes that nobody reads; near the end of
            // the triangle there may be none.
            if origins[LANES - 1] + (block + 1) * LANES <= packed.len() {
                let row = |&at: &usize| packed[at + block * LANES..].first_chunk().expect("a whole row");
                for (z, y) in groups {
                    add_all::<S, true>(simd, z, origins.iter().map(row), y);
                }
            } else {
                let mut rows = [[0.0; LANES]; LANES];
                for (column, row) in (panel * LANES..).zip(&mut rows) {
                    *row = *piece(packed, d, block, column, &mut [0.0; LANES]);
                }
                for (z, y) in groups {
                    add_all::<S, true>(simd, z, rows.iter(), y);
                }
            }
        }
    }
}

/// y of the channels of one panel, of which `z` lacks only the products within the panel.
#[inline(always)]
fn solve_panel<S: Simd>(
    simd: S,
    packed: &[f64],
    d: usize,
    panel: usize,
    z: &[[f64; LANES]],
    y: &mut [[[f64; LANES]; LANES]],
    squares: &mut [[f64; LANES]],
) {
    let width = LANES.min(d - panel * LANES);
    let mut diagonal = [[0.0; LANES]; LANES];
    let mut inverse = [0.0; LANES];
    for c in 0..width {
        let column = panel * LANES + c;
        let at = origin(d, column) + panel * LANES;
        let whole = packed[at..].first_chunk().copied();
        diagonal[c] = whole.unwrap_or_else(|| *piece(packed, d, panel, column, &mut [0.0; LANES]));
        inverse[c] = 1.0 / diagonal[c][c];
    }
    for ((z, y), squares) in z.chunks(LANES).zip(y).zip(squares) {
        for (image, z) in z.iter().enumerate() {
            for (y, z) in y.iter_mut().zip(z) {
                y[image] = *z;
            }
        }
        solve(simd, &mut y[..width], &diagonal, &inverse);
        for y in &y[..width] {
            for (square, y) in squares.iter_mut().zip(y) {
                *square += y * y;
            }
        }
    }
}

//! From sums to means, covariances and their Cholesky factors.

use std::sync::{Mutex, PoisonError};

use super::packed::{blocks, packed_len, piece, store};
use super::products::{add_products, add_to, solve};
use super::{Shape, positions_at_once};
use crate::context::{Context, Pulse};
use crate::error::Error;
use crate::matrix::Matrix;
use crate::simd::{LANES, Operation, Simd};

/// Positions of a thread between two reports of progress.
const REPORTED: usize = 32;

/// How sums become covariances.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many images were accumulated.
    pub images: usize,
    /// What sums of products about the mean are multiplied by: 1/(images − 1) for the unbiased covariance, 0 for
    /// none.
    pub scale: f64,
    /// What is added to the diagonal.
    pub epsilon: f64,
}

/// Turns the sums of [`super::accumulate`] into means, and the sums of products into Cholesky factors of the
/// covariances, in place.
///
/// # Errors
/// [`Error::Empty`] and [`Error::Invalid`] for sizes that do not fit together; [`Error::Invalid`] naming the first
/// position whose covariance is not positive definite, [`Error::Cancelled`]: part of `sums` and `packed` is then no
/// longer what it was.
pub fn factorize(
    context: &Context<'_>,
    shift: Matrix<'_>,
    sums: &mut [f64],
    packed: &mut [f64],
    options: Options,
) -> Result<(), Error> {
    let shape = Shape::new(shift.rows(), shift.cols(), ("sums", sums.len()), packed.len())?;
    if options.images == 0 {
        return Err(Error::Empty { name: "images", expected: "a mean needs at least one image" });
    }
    let d = shape.channels;
    let count = positions_at_once(d);
    let level = context.level();
    let step = REPORTED.max(count) * context.threads();
    let failed: Mutex<Option<Failure>> = Mutex::new(None);
    let parts = packed.chunks_mut(step * packed_len(d)).zip(sums.chunks_mut(step * d));
    for (part, (packed, sums)) in parts.enumerate() {
        context.set_progress(part * step, shape.positions);
        let items = packed.chunks_mut(count * packed_len(d)).zip(sums.chunks_mut(count * d)).enumerate();
        context.for_each_long(items, Scratch::default, |scratch, (item, (packed, sums)), pulse| {
            let first = part * step + item * count;
            let found = level.run(Factorize { shift, first, sums, packed, options, scratch, pulse });
            if let Some(failure) = found {
                // Items are begun in order, and all that were begun are ended: the first failure is always found.
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|other| failure.position < other.position) {
                    *failed = Some(failure);
                }
            }
        })?;
        if let Some(Failure { position, channel, pivot }) = failed.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            return Err(Error::invalid(
                "epsilon",
                "large enough to make every covariance positive definite, beside features of this size",
                format!(
                    "{:e}, with which that of position {position} is not: the pivot of channel {channel} is {pivot:e}",
                    options.epsilon
                ),
            ));
        }
    }
    Ok(())
}

/// A covariance that is not positive definite.
struct Failure {
    position: usize,
    channel: usize,
    pivot: f64,
}

/// What a thread keeps from position to position.
#[derive(Default)]
struct Scratch {
    /// The triangle in tiles: for each block of rows, its part of the columns up to the block's last row.
    tiles: Vec<[f64; LANES]>,
    /// Sums and means, filled up with zeros to whole blocks.
    sums: Vec<[f64; LANES]>,
    means: Vec<f64>,
}

/// Where the columns of a block of rows begin among the tiles.
#[inline(always)]
fn start(block: usize) -> usize {
    LANES * block * (block + 1) / 2
}

/// Factorizes some positions, or returns the first that fails.
struct Factorize<'a, 'b> {
    shift: Matrix<'a>,
    /// The first of the positions.
    first: usize,
    sums: &'a mut [f64],
    packed: &'a mut [f64],
    options: Options,
    scratch: &'b mut Scratch,
    pulse: &'b Pulse<'b>,
}

impl Operation for Factorize<'_, '_> {
    type Output = Option<Failure>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Option<Failure> {
        let d = self.shift.cols();
        let scratch = self.scratch;
        let positions = self.packed.chunks_exact_mut(packed_len(d)).zip(self.sums.chunks_exact_mut(d));
        for (position, (packed, sums)) in (self.first..).zip(positions) {
            covariance(packed, sums, self.options, scratch);
            for panel in 0..blocks(d) {
                if self.pulse.stopped() {
                    return None;
                }
                let width = LANES.min(d - panel * LANES);
                let least = least_pivot(d);
                if let Err((column, pivot)) = eliminate(simd, &mut scratch.tiles, panel, width, blocks(d), least) {
                    return Some(Failure { position, channel: panel * LANES + column, pivot });
                }
            }
            for column in 0..d {
                for block in column / LANES..blocks(d) {
                    store(packed, d, block, column, &scratch.tiles[start(block) + column]);
                }
            }
            for ((sum, mean), shift) in sums.iter_mut().zip(&scratch.means).zip(self.shift.row(position)) {
                *sum = f64::from(*shift) + mean;
            }
        }
        None
    }
}

/// Fills the tiles with a covariance, from sums of products.
#[inline(always)]
fn covariance(packed: &[f64], sums: &[f64], options: Options, scratch: &mut Scratch) {
    let Scratch { tiles, sums: padded, means } = scratch;
    let d = sums.len();
    padded.clear();
    padded.resize(blocks(d), [0.0; LANES]);
    padded.as_flattened_mut()[..d].copy_from_slice(sums);
    means.clear();
    means.extend(padded.as_flattened().iter().map(|sum| sum / options.images as f64));
    tiles.clear();
    for (block, sums) in padded.iter().enumerate() {
        for (column, mean) in means[..(block + 1) * LANES].iter().enumerate() {
            let mut tile = *piece(packed, d, block, column, &mut [0.0; LANES]);
            for (value, sum) in tile.iter_mut().zip(sums) {
                *value = options.scale * (*value - sum * mean);
            }
            if column >= block * LANES {
                tile[column - block * LANES] += options.epsilon;
            }
            tiles.push(tile);
        }
    }
}

/// The share of its variance that a channel must keep beside those before it: less is nothing but rounding.
fn least_pivot(channels: usize) -> f64 {
    channels as f64 * f64::EPSILON
}

/// Makes the columns of one panel those of the factor, given all before; else the column that fails, and its pivot.
#[inline(always)]
fn eliminate<S: Simd>(
    simd: S,
    tiles: &mut [[f64; LANES]],
    panel: usize,
    width: usize,
    blocks: usize,
    least: f64,
) -> Result<(), (usize, f64)> {
    let columns = panel * LANES;
    let (above, below) = tiles.split_at_mut(start(panel + 1));
    let (before, diagonal) = above[start(panel)..].split_at_mut(columns);
    let diagonal = &mut diagonal[..width];
    let variances: [f64; LANES] = std::array::from_fn(|c| diagonal.get(c).map_or(0.0, |column| column[c]));
    add_products::<S, true>(simd, diagonal, before, before);
    let mut inverse = [0.0; LANES];
    for c in 0..width {
        let (done, column) = diagonal.split_at_mut(c);
        add_to::<S, 1, true>(simd, column, done.iter(), done, c);
        let pivot = column[0][c];
        if !(pivot > least * variances[c] && pivot.is_finite()) {
            return Err((c, pivot));
        }
        let root = pivot.sqrt();
        inverse[c] = 1.0 / root;
        for value in &mut column[0] {
            *value *= inverse[c];
        }
        column[0][c] = root;
    }
    for block in panel + 1..blocks {
        let from = start(block) - start(panel + 1);
        let (rows, rest) = below[from..].split_at_mut(columns);
        let target = &mut rest[..LANES];
        add_products::<S, true>(simd, target, rows, before);
        solve(simd, target, diagonal, &inverse);
    }
    Ok(())
}

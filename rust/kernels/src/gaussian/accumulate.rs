//! Sums and sums of products of a batch of images.

use super::packed::{blocks, packed_len, piece, store};
use super::products::add_products;
use super::{Shape, positions_at_once};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::Matrix;
use crate::simd::{LANES, Operation, Simd};

/// Adds a batch of images to the sums of each position: their differences from `shift` to `sums`, the products of
/// these to `packed`.
///
/// `features` has a row for each position of each image, image after image; `shift` a row for each position: values
/// near the mean, as those of the first image are, so that little cancels later. `sums` is (positions, d), `packed`
/// the (positions, d(d + 1)/2) lower triangles of the sums of products, column after column; both begin at zero.
///
/// An element takes the products of the images in their order, so how images are dealt out to batches changes no bit.
/// The triangles pass through memory once a batch.
///
/// # Errors
/// [`Error::Empty`] and [`Error::Invalid`] for sizes that do not fit together, [`Error::Cancelled`]; part of the
/// images have then been added.
pub fn accumulate(
    context: &Context<'_>,
    features: Matrix<'_>,
    shift: Matrix<'_>,
    sums: &mut [f64],
    packed: &mut [f64],
) -> Result<(), Error> {
    let shape = Shape::new(shift.rows(), shift.cols(), ("sums", sums.len()), packed.len())?;
    if shape.check_images(features)? == 0 {
        return Ok(());
    }
    let d = shape.channels;
    let count = positions_at_once(d);
    let items = packed.chunks_mut(count * packed_len(d)).zip(sums.chunks_mut(count * d)).enumerate();
    let level = context.level();
    context.for_each(items, Vec::new, |differences, (item, (packed, sums))| {
        level.run(Accumulate { features, shift, first: item * count, sums, packed, differences });
    })
}

/// Accumulates some positions.
struct Accumulate<'a, 'b> {
    features: Matrix<'a>,
    shift: Matrix<'a>,
    /// The first of the positions.
    first: usize,
    sums: &'a mut [f64],
    packed: &'a mut [f64],
    /// The thread's scratch: the differences of a position, by block of channels and image.
    differences: &'b mut Vec<[f64; LANES]>,
}

impl Operation for Accumulate<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let d = self.shift.cols();
        let images = self.features.rows() / self.shift.rows();
        let differences = self.differences;
        differences.clear();
        differences.resize(blocks(d) * images, [0.0; LANES]);
        let positions = self.packed.chunks_exact_mut(packed_len(d)).zip(self.sums.chunks_exact_mut(d));
        for (position, (packed, sums)) in (self.first..).zip(positions) {
            for image in 0..images {
                let row = self.features.row(image * self.shift.rows() + position).chunks(LANES);
                let shift = self.shift.row(position).chunks(LANES);
                for (block, (row, shift)) in row.zip(shift).enumerate() {
                    let differences = &mut differences[block * images + image];
                    for ((difference, x), shift) in differences.iter_mut().zip(row).zip(shift) {
                        *difference = f64::from(*x) - f64::from(*shift);
                    }
                }
            }
            for (sums, differences) in sums.chunks_mut(LANES).zip(differences.chunks_exact(images)) {
                for differences in differences {
                    for (sum, difference) in sums.iter_mut().zip(differences) {
                        *sum += difference;
                    }
                }
            }
            for panel in 0..blocks(d) {
                let factors = &differences[panel * images..][..images];
                for block in panel..blocks(d) {
                    let rows = &differences[block * images..][..images];
                    let mut tile = [[0.0; LANES]; LANES];
                    let tile = &mut tile[..LANES.min(d - panel * LANES)];
                    for (column, values) in (panel * LANES..).zip(tile.iter_mut()) {
                        *values = *piece(packed, d, block, column, &mut [0.0; LANES]);
                    }
                    add_products::<S, false>(simd, tile, rows, factors);
                    for (column, values) in (panel * LANES..).zip(&*tile) {
                        store(packed, d, block, column, values);
                    }
                }
            }
        }
    }
}

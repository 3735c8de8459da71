//! Forward substitution for few images: the factor is read once from one end to the other, as it lies.

use super::packed::{blocks, origin, piece};
use crate::simd::{LANES, Simd};

/// Adds the squares of y to `squares`, by image, from `z`, by image and block of channels.
///
/// Lanes hold channels. Those above a column's diagonal are done, and those below the last channel are none: they take
/// whatever stands there in memory, and nobody reads them.
#[inline(always)]
pub(super) fn by_columns<S: Simd>(simd: S, packed: &[f64], d: usize, z: &mut [[f64; LANES]], squares: &mut [f64]) {
    let blocks = blocks(d);
    for column in 0..d {
        let (first, start) = (column / LANES, origin(d, column));
        let inverse = 1.0 / packed[start + column];
        let whole = packed.get(start + first * LANES..start + blocks * LANES);
        for (z, square) in z.chunks_exact_mut(blocks).zip(&mut *squares) {
            let z = &mut z[first..];
            let y = z[0][column % LANES] * inverse;
            *square += y * y;
            let factor = simd.splat(-y);
            if let Some(rows) = whole {
                for (z, row) in z.iter_mut().zip(rows.as_chunks().0) {
                    simd.store(simd.add_product(simd.load(z), simd.load(row), factor), z);
                }
            } else {
                for (block, z) in (first..).zip(z) {
                    let row = *piece(packed, d, block, column, &mut [0.0; LANES]);
                    simd.store(simd.add_product(simd.load(z), simd.load(&row), factor), z);
                }
            }
        }
    }
}

//! The lower triangle of a matrix, column after column, each from its diagonal down: what LAPACK calls packed, and
//! `numpy.triu_indices` lists. Kernels take it in blocks of [`LANES`] rows, from row 0 on.

use std::ops::Range;

use crate::simd::LANES;

/// Values in the triangle of a matrix of `size` rows.
pub(super) fn packed_len(size: usize) -> usize {
    size * (size + 1) / 2
}

/// Blocks of rows of such a matrix; the last may be shorter.
pub(super) fn blocks(size: usize) -> usize {
    size.div_ceil(LANES)
}

/// Where the value in row r of a column stands, less r.
#[inline(always)]
pub(super) fn origin(size: usize, column: usize) -> usize {
    column * (2 * size - column - 1) / 2
}

/// The rows of a block that `column` has.
#[inline(always)]
fn rows_of(size: usize, block: usize, column: usize) -> Range<usize> {
    let end = size.min((block + 1) * LANES);
    (block * LANES).max(column).min(end)..end
}

/// The values of `column` in a block of rows: where they stand, or a copy with zeros where it has none.
#[inline(always)]
pub(super) fn piece<'a>(
    packed: &'a [f64],
    size: usize,
    block: usize,
    column: usize,
    copy: &'a mut [f64; LANES],
) -> &'a [f64; LANES] {
    let rows = rows_of(size, block, column);
    if rows.len() == LANES
        && let Some(whole) = packed[origin(size, column) + rows.start..].first_chunk()
    {
        return whole;
    }
    *copy = [0.0; LANES];
    if !rows.is_empty() {
        let values = &packed[origin(size, column)..][rows.clone()];
        copy[rows.start - block * LANES..][..rows.len()].copy_from_slice(values);
    }
    copy
}

/// Writes the values of `column` in a block of rows.
#[inline(always)]
pub(super) fn store(packed: &mut [f64], size: usize, block: usize, column: usize, piece: &[f64; LANES]) {
    let rows = rows_of(size, block, column);
    if rows.is_empty() {
        return;
    }
    let values = &mut packed[origin(size, column)..][rows.clone()];
    if let Some(whole) = values.first_chunk_mut() {
        *whole = *piece;
    } else {
        values.copy_from_slice(&piece[rows.start - block * LANES..][..rows.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_those_of_the_triangle() {
        for size in [1, 2, 15, 16, 17, 40] {
            let packed: Vec<f64> = (0..packed_len(size)).map(|i| 1.0 + i as f64).collect();
            let mut rebuilt = vec![0.0; packed.len()];
            let mut at = 0;
            for column in 0..blocks(size) * LANES {
                for block in 0..blocks(size) {
                    let mut copy = [f64::NAN; LANES];
                    let found = *piece(&packed, size, block, column, &mut copy);
                    for (row, found) in (block * LANES..).zip(found) {
                        let inside = column <= row && row < size;
                        assert_eq!(found, if inside { 1.0 + at as f64 } else { 0.0 }, "{size} {row} {column}");
                        at += usize::from(inside);
                    }
                    store(&mut rebuilt, size, block, column, &found);
                }
            }
            assert_eq!(rebuilt, packed);
        }
    }
}

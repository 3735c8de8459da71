//! The one inner loop of this folder: products of rows of lanes, added to or subtracted from sums that stay in
//! registers. A multiplication and an addition, each rounded; a sum takes its products in order.

use crate::simd::{LANES, Simd};

/// Products that a sum takes before the next sums have their turn: rows and factors, 8 KiB each, stay in the
/// first-level cache.
const DEPTH: usize = 64;

/// `sums[c][lane] += rows[k][lane]·factors[k][c]` for rising k, or `-=` where `SUBTRACT`.
///
/// There are at most [`LANES`] sums.
#[inline(always)]
pub(super) fn add_products<S: Simd, const SUBTRACT: bool>(
    simd: S,
    sums: &mut [[f64; LANES]],
    rows: &[[f64; LANES]],
    factors: &[[f64; LANES]],
) {
    for (rows, factors) in rows.chunks(DEPTH).zip(factors.chunks(DEPTH)) {
        add_all::<S, SUBTRACT>(simd, sums, rows.iter(), factors);
    }
}

/// [`add_products`] of few rows, wherever they stand.
#[inline(always)]
pub(super) fn add_all<'a, S: Simd, const SUBTRACT: bool>(
    simd: S,
    sums: &mut [[f64; LANES]],
    rows: impl Iterator<Item = &'a [f64; LANES]> + Clone,
    factors: &[[f64; LANES]],
) {
    let mut first = 0;
    if S::MANY_REGISTERS {
        while sums.len() - first >= 8 {
            add_to::<S, 8, SUBTRACT>(simd, &mut sums[first..], rows.clone(), factors, first);
            first += 8;
        }
        if sums.len() - first >= 4 {
            add_to::<S, 4, SUBTRACT>(simd, &mut sums[first..], rows.clone(), factors, first);
            first += 4;
        }
    }
    while sums.len() - first >= 2 {
        add_to::<S, 2, SUBTRACT>(simd, &mut sums[first..], rows.clone(), factors, first);
        first += 2;
    }
    if sums.len() > first {
        add_to::<S, 1, SUBTRACT>(simd, &mut sums[first..], rows, factors, first);
    }
}

/// Solves x·Lᵀ = b, lane by lane, for the `columns` of x: each becomes (column − those before times what stands in
/// its row of L) times the `inverse` of the diagonal. `diagonal[j][c]` is L in row c, column j.
#[inline(always)]
pub(super) fn solve<S: Simd>(simd: S, columns: &mut [[f64; LANES]], diagonal: &[[f64; LANES]], inverse: &[f64; LANES]) {
    for (c, inverse) in inverse.iter().enumerate().take(columns.len()) {
        let (solved, column) = columns.split_at_mut(c);
        add_to::<S, 1, true>(simd, column, solved.iter(), diagonal, c);
        for value in &mut column[0] {
            *value *= inverse;
        }
    }
}

/// [`add_products`] for the first `C` of the sums, which are sums `first..` of the factors.
#[inline(always)]
pub(super) fn add_to<'a, S: Simd, const C: usize, const SUBTRACT: bool>(
    simd: S,
    sums: &mut [[f64; LANES]],
    rows: impl Iterator<Item = &'a [f64; LANES]>,
    factors: &[[f64; LANES]],
    first: usize,
) {
    // Once instead of at every product.
    assert!(first <= LANES - C, "a row has a factor for each sum");
    let mut lanes = [simd.zero(); C];
    for (lanes, sum) in lanes.iter_mut().zip(&*sums) {
        *lanes = simd.load(sum);
    }
    for (row, factors) in rows.zip(factors) {
        let row = simd.load(row);
        for (c, lanes) in lanes.iter_mut().enumerate() {
            let factor = factors[first + c];
            *lanes = simd.add_product(*lanes, row, simd.splat(if SUBTRACT { -factor } else { factor }));
        }
    }
    for (lanes, sum) in lanes.iter().zip(sums) {
        simd.store(*lanes, sum);
    }
}

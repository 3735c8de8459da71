//! A small float32 matrix product: C = A·B, with short chains of additions.

use crate::simd::{LANES, Simd};

/// Products added up in one chain before the sum joins the result: the rounding error of a result grows
/// with the chain and the number of chains, not with their product.
pub(super) const CHAIN: usize = 64;

/// Columns of B that lie together: a chain of them stays in the first-level cache while all rows of A
/// pass by.
pub(super) const PANEL: usize = 64;

/// A `depth × width` matrix in panels: the first [`PANEL`] columns of all rows, then the next. `width` is
/// a multiple of [`PANEL`].
pub(super) fn panels(matrix: &[f32], width: usize) -> Vec<[f32; PANEL]> {
    let rows = || matrix.chunks_exact(width);
    (0..width / PANEL).flat_map(|panel| rows().map(move |row| row.as_chunks().0[panel])).collect()
}

/// `out` (rows × width) = `a` (rows × `depth`) times `b` (`depth` × width, in [`panels`]), `a` and `out`
/// row-major. Every result errs by at most
/// (`CHAIN` + depth/`CHAIN` + 1)·2⁻²⁴·‖row of a‖·‖column of b‖.
#[inline(always)]
pub(super) fn multiply<S: Simd>(simd: S, a: &[f32], depth: usize, b: &[[f32; PANEL]], out: &mut [f32]) {
    if S::MANY_REGISTERS {
        tiles::<S, 6, 4>(simd, a, depth, b, out);
    } else {
        tiles::<S, 6, 1>(simd, a, depth, b, out);
    }
}

#[inline(always)]
fn tiles<S: Simd, const R: usize, const C: usize>(
    simd: S,
    a: &[f32],
    depth: usize,
    b: &[[f32; PANEL]],
    out: &mut [f32],
) {
    let width = b.len() / depth * PANEL;
    let one = simd.splat_f32(1.0);
    out.fill(0.0);
    for (panel, b) in b.chunks_exact(depth).enumerate() {
        for (chain, b) in b.chunks(CHAIN).enumerate() {
            for (a, out) in a.chunks(R * depth).zip(out.chunks_mut(R * width)) {
                let rows = out.len() / width;
                // A short last group computes its last row again.
                let mut short: [&[f32]; R] = [&[]; R];
                for (r, short) in short.iter_mut().enumerate() {
                    *short = &a[r.min(rows - 1) * depth + chain * CHAIN..][..b.len()];
                }
                for column in (0..PANEL / LANES).step_by(C) {
                    let mut sums = [[simd.splat_f32(0.0); C]; R];
                    for (k, b) in b.iter().enumerate() {
                        let b: &[[f32; LANES]] = b.as_chunks().0;
                        let mut y = [simd.splat_f32(0.0); C];
                        for (c, y) in y.iter_mut().enumerate() {
                            *y = simd.load_f32(&b[column + c]);
                        }
                        for (sums, a) in sums.iter_mut().zip(&short) {
                            let x = simd.splat_f32(a[k]);
                            for (sum, &y) in sums.iter_mut().zip(&y) {
                                *sum = simd.multiply_add(*sum, x, y);
                            }
                        }
                    }
                    for (sums, out) in sums.iter().zip(out.chunks_exact_mut(width)) {
                        let out: &mut [[f32; LANES]] = out[panel * PANEL..][..PANEL].as_chunks_mut().0;
                        for (sum, out) in sums.iter().zip(&mut out[column..column + C]) {
                            simd.store_f32(simd.multiply_add(*sum, simd.load_f32(out), one), out);
                        }
                    }
                }
            }
        }
    }
}

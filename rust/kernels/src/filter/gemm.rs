//! A small float32 matrix product: C = A·B, with short chains of additions.

use crate::simd::{LANES, Simd};

/// Products added up in one chain before the sum joins the result: the rounding error of a result grows
/// with the chain and the number of chains, not with their product.
pub const CHAIN: usize = 64;

/// `out` (rows × `width`) = `a` (rows × `depth`) times `b` (`depth` × `width`), all row-major, `width` a
/// multiple of 64. Every result errs by at most (`CHAIN` + depth/`CHAIN` + 1)·2⁻²⁴·‖row of a‖·‖column of b‖.
#[inline(always)]
pub fn multiply<S: Simd>(simd: S, a: &[f32], depth: usize, b: &[f32], width: usize, out: &mut [f32]) {
    if S::MANY_REGISTERS {
        tiles::<S, 6, 4>(simd, a, depth, b, width, out);
    } else {
        tiles::<S, 2, 2>(simd, a, depth, b, width, out);
    }
}

#[inline(always)]
fn tiles<S: Simd, const R: usize, const C: usize>(
    simd: S,
    a: &[f32],
    depth: usize,
    b: &[f32],
    width: usize,
    out: &mut [f32],
) {
    out.fill(0.0);
    let b: &[[f32; LANES]] = b.as_chunks().0;
    let per_row = width / LANES;
    for (a, out) in a.chunks(R * depth).zip(out.chunks_mut(R * width)) {
        let rows = out.len() / width;
        // A short last group computes its last row again.
        let a: [&[f32]; R] = std::array::from_fn(|r| &a[r.min(rows - 1) * depth..][..depth]);
        for column in (0..per_row).step_by(C) {
            for chain in (0..depth).step_by(CHAIN) {
                let mut sums = [[simd.splat_f32(0.0); C]; R];
                for k in chain..depth.min(chain + CHAIN) {
                    let b: [_; C] = std::array::from_fn(|c| simd.load_f32(&b[k * per_row + column + c]));
                    for (sums, a) in sums.iter_mut().zip(a) {
                        let x = simd.splat_f32(a[k]);
                        for (sum, &y) in sums.iter_mut().zip(&b) {
                            *sum = simd.multiply_add(*sum, x, y);
                        }
                    }
                }
                for (sums, out) in sums.iter().zip(out.chunks_exact_mut(width)) {
                    let out: &mut [[f32; LANES]] = out.as_chunks_mut().0;
                    for (sum, out) in sums.iter().zip(&mut out[column..column + C]) {
                        let one = simd.splat_f32(1.0);
                        simd.store_f32(simd.multiply_add(*sum, simd.load_f32(out), one), out);
                    }
                }
            }
        }
    }
}

//! Rows to codes: the arithmetic of the map in the header of this folder, and of its errors.

use super::gemm::multiply;
use super::{Encoder, Measures, U};
use crate::simd::{LANES, Operation, Simd};

/// What underflow of f32 operations can take from a length: 16 384 squares of 10⁻³⁸, rooted, and to spare.
const UNDERFLOW: f64 = 1e-16;

/// At least `value`, in f32.
#[inline(always)]
fn at_least(value: f64) -> f32 {
    (value as f32).next_up()
}

/// At most `value`, and not negative, in f32.
#[inline(always)]
fn at_most(value: f64) -> f32 {
    (value as f32).next_down().max(0.0)
}

/// The images t of some rows, and `computed` of their measures. Returns the sum of r.
pub struct Images<'a> {
    /// The map.
    pub encoder: &'a Encoder,
    /// The rows.
    pub rows: &'a [&'a [f32]],
    /// `rows × width` values.
    pub out: &'a mut [f32],
    /// One for each row.
    pub measures: &'a mut [Measures],
}

impl Operation for Images<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        images(simd, self.encoder, self.rows, self.out, self.measures)
    }
}

#[inline(always)]
fn images<S: Simd>(simd: S, encoder: &Encoder, rows: &[&[f32]], images: &mut [f32], measures: &mut [Measures]) -> f64 {
    let (cols, width) = (encoder.mean.len(), encoder.width);
    let mut centred = vec![0.0_f32; rows.len() * cols];
    for (row, centred) in rows.iter().zip(centred.chunks_exact_mut(cols)) {
        for ((w, &x), &mean) in centred.iter_mut().zip(*row).zip(&encoder.mean) {
            *w = x - mean;
        }
    }
    if let Some(basis) = &encoder.basis {
        multiply(simd, &centred, cols, basis.panels(), images);
    } else {
        for (image, centred) in images.chunks_exact_mut(width).zip(centred.chunks_exact(cols)) {
            image[..cols].copy_from_slice(centred);
            image[cols..].fill(0.0);
        }
    }
    let mut scratch = vec![0.0; width];
    let mut residuals = 0.0;
    let centred = centred.chunks_exact(cols);
    for ((centred, image), measures) in centred.zip(images.chunks_exact_mut(width)).zip(measures) {
        let squared = squares(simd, centred);
        let length = squared.sqrt();
        let mut error = U * length;
        if let Some(basis) = &encoder.basis {
            let prefix = squares(simd, image);
            error += basis.error * length;
            let residual = (squared - prefix).max(0.0).sqrt();
            let gap = 2.0 * prefix.sqrt() * error + error * error + 2.0 * chain(cols) * squared;
            let gap = if residual > 0.0 { gap.sqrt().min(gap / residual) } else { gap.sqrt() };
            image[width - 1] = (residual - f64::from(encoder.shift)) as f32;
            error = error.hypot(gap + U * (residual + f64::from(encoder.shift.abs())));
            residuals += residual;
        }
        let image_length = length + f64::from(encoder.shift.abs());
        error += (f64::from(encoder.block.trailing_zeros()) + 2.0) * U * image_length;
        mix(simd, image, &encoder.signs, encoder.block, &mut scratch);
        measures.computed = at_least(error * (1.0 + 2.0 * chain(cols)) + UNDERFLOW);
    }
    residuals
}

/// Bound of the relative error of [`squares`] over `len` values.
fn chain(len: usize) -> f64 {
    ((len / LANES) as f64 + 24.0) * U
}

/// The sum of squares, in f32 lanes: the length it gives is right to [`chain`] and [`UNDERFLOW`].
#[inline(always)]
fn squares<S: Simd>(simd: S, values: &[f32]) -> f64 {
    let (groups, rest) = values.as_chunks::<LANES>();
    let mut sums = [simd.splat_f32(0.0); 2];
    for (i, group) in groups.iter().enumerate() {
        let x = simd.load_f32(group);
        sums[i % 2] = simd.multiply_add(sums[i % 2], x, x);
    }
    let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    added(simd, sums[0]) + added(simd, sums[1]) + rest
}

/// What a lane is multiplied by in butterflies whose pairs lie 1, 2, 4 and 8 apart.
const SIGNS: [[f32; LANES]; 4] = {
    let mut signs = [[1.0; LANES]; 4];
    let mut i = 0;
    while i < 4 * LANES {
        let (level, lane) = (i / LANES, i % LANES);
        if lane & (1 << level) != 0 {
            signs[level][lane] = -1.0;
        }
        i += 1;
    }
    signs
};

/// H of the header: signs, then orthonormal Walsh–Hadamard butterflies over blocks. Neighbouring
/// coordinates go to different blocks, so that all blocks get a like share of the variance.
#[inline(always)]
fn mix<S: Simd>(simd: S, image: &mut [f32], signs: &[f32], block: usize, scratch: &mut [f32]) {
    match image.len() / block {
        // Constant strides are vectorized.
        1 => deal::<1>(image, signs, block, 1, scratch),
        3 => deal::<3>(image, signs, block, 3, scratch),
        blocks => deal::<0>(image, signs, block, blocks, scratch),
    }
    let (one, minus) = (simd.splat_f32(1.0), simd.splat_f32(-1.0));
    let [s1, s2, s4, s8] = SIGNS;
    let (s1, s2) = (simd.load_f32(&s1), simd.load_f32(&s2));
    let (s4, s8) = (simd.load_f32(&s4), simd.load_f32(&s8));
    let values: &mut [[f32; LANES]] = scratch.as_chunks_mut().0;
    for lanes in &mut *values {
        let v = simd.load_f32(lanes);
        let v = simd.multiply_add(simd.swap::<1>(v), v, s1);
        let v = simd.multiply_add(simd.swap::<2>(v), v, s2);
        let v = simd.multiply_add(simd.swap::<4>(v), v, s4);
        simd.store_f32(simd.multiply_add(simd.swap::<8>(v), v, s8), lanes);
    }
    let mut half = 1;
    while half < block / LANES {
        for pairs in values.chunks_exact_mut(2 * half) {
            let (low, high) = pairs.split_at_mut(half);
            for (low, high) in low.iter_mut().zip(high) {
                let (a, b) = (simd.load_f32(low), simd.load_f32(high));
                simd.store_f32(simd.multiply_add(a, b, one), low);
                simd.store_f32(simd.multiply_add(a, b, minus), high);
            }
        }
        half *= 2;
    }
    let scale = (1.0 / (block as f64).sqrt()) as f32;
    for (value, mixed) in image.iter_mut().zip(&*scratch) {
        *value = mixed * scale;
    }
}

/// Deals an image with its signs out to blocks. `BLOCKS` is `blocks`, or 0 where that is not a constant.
#[inline(always)]
fn deal<const BLOCKS: usize>(image: &[f32], signs: &[f32], block: usize, blocks: usize, out: &mut [f32]) {
    let blocks = if BLOCKS > 0 { BLOCKS } else { blocks };
    let (image, signs, out) = (&image[..block * blocks], &signs[..block * blocks], &mut out[..block * blocks]);
    for j in 0..block {
        for b in 0..blocks {
            out[b * block + j] = image[j * blocks + b] * signs[j * blocks + b];
        }
    }
}

/// The codes of an image, and the measures that come with them.
#[inline(always)]
fn quantize<S: Simd>(simd: S, encoder: &Encoder, image: &[f32], codes: &mut [i8], measures: &mut Measures) {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the lowest bits.
    let magic = simd.splat_f32(12_582_912.0);
    let (one, minus) = (simd.splat_f32(1.0), simd.splat_f32(-1.0));
    let (limit, step) = (encoder.limit as f32, encoder.step);
    let inverse = simd.splat_f32(1.0 / step);
    let to_length = simd.splat_f32(-step);
    let [mut sum, mut norm, mut rounded, mut clipped, mut total] = [simd.splat_f32(0.0); 5];
    for (t, codes) in image.as_chunks::<LANES>().0.iter().zip(codes.as_chunks_mut::<LANES>().0) {
        let t = simd.load_f32(t);
        let shifted =
            simd.multiply_add(magic, simd.clamp(simd.multiply_add(simd.splat_f32(0.0), t, inverse), limit), one);
        let code = simd.multiply_add(shifted, magic, minus);
        let inside = simd.clamp(t, limit * step);
        let outside = simd.multiply_add(t, inside, minus);
        let fine = simd.multiply_add(inside, code, to_length);
        let wrong = simd.multiply_add(t, code, to_length);
        // Exact: a lane adds up at most 1024 squares of 127.
        sum = simd.multiply_add(sum, code, one);
        norm = simd.multiply_add(norm, code, code);
        rounded = simd.multiply_add(rounded, fine, fine);
        clipped = simd.multiply_add(clipped, outside, outside);
        total = simd.multiply_add(total, wrong, wrong);
        let mut lanes = [0.0; LANES];
        simd.store_f32(shifted, &mut lanes);
        for (code, lane) in codes.iter_mut().zip(lanes) {
            *code = lane.to_bits() as i8;
        }
    }
    let more = 1.0 + 2.0 * chain(image.len());
    *measures = Measures {
        norm: added(simd, norm) as i32,
        sum: added(simd, sum) as i32,
        computed: measures.computed,
        rounded: at_least(added(simd, rounded).sqrt() * more + UNDERFLOW),
        clipped: at_most(added(simd, clipped).sqrt() / more - UNDERFLOW),
        total: at_least(added(simd, total).sqrt() * more + UNDERFLOW + f64::from(measures.computed)),
    };
}

/// The lanes added up, in f64.
#[inline(always)]
fn added<S: Simd>(simd: S, lanes: S::F32) -> f64 {
    let mut values = [0.0; LANES];
    simd.store_f32(lanes, &mut values);
    values.into_iter().map(f64::from).sum()
}

/// Encodes rows: their codes, row after row, and their measures.
pub struct Encode<'a> {
    /// The map.
    pub encoder: &'a Encoder,
    /// The rows, few enough that their images stay in the cache.
    pub rows: &'a [&'a [f32]],
    /// `rows × width` codes.
    pub codes: &'a mut [i8],
    /// One for each row.
    pub measures: &'a mut [Measures],
}

impl Operation for Encode<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.encoder.width;
        let mut computed = vec![0.0; self.rows.len() * width];
        images(simd, self.encoder, self.rows, &mut computed, self.measures);
        let codes = self.codes.chunks_exact_mut(width);
        for ((image, codes), measures) in computed.chunks_exact(width).zip(codes).zip(self.measures) {
            quantize(simd, self.encoder, image, codes, measures);
        }
    }
}

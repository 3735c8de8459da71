//! Rows to codes: the arithmetic of the map in the header of this folder, and of its errors.

use super::U;
use super::encoder::{EncodedPart, Encoder, Measures, Stage};
use super::gemm::multiply;
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

/// What encoding needs beside its input and output, kept from call to call: memory that is asked for anew
/// costs more than the codes.
#[derive(Debug, Default)]
pub(crate) struct EncodeScratch {
    /// w of every row, its ‖w‖², and z where there is a basis.
    centred: Vec<f32>,
    squared: Vec<f64>,
    leading: Vec<f32>,
    /// An image before it is mixed, and after.
    plain: Vec<f32>,
    image: Vec<f32>,
}

impl EncodeScratch {
    /// Centres and rotates some rows.
    #[inline(always)]
    fn rotate<S: Simd>(&mut self, simd: S, encoder: &Encoder, rows: &[&[f32]]) {
        let cols = encoder.mean.len();
        self.centred.resize(rows.len() * cols, 0.0);
        self.squared.clear();
        for (row, centred) in rows.iter().zip(self.centred.chunks_exact_mut(cols)) {
            subtract(row, &encoder.mean, centred);
            self.squared.push(squares(simd, centred));
        }
        if let Some(basis) = &encoder.basis {
            self.leading.resize(rows.len() * basis.width(), 0.0);
            multiply(simd, &self.centred[..rows.len() * cols], cols, basis.panels(), &mut self.leading);
        }
    }

    /// Copies the first coordinates of the rotated rows, as many of each as there is room for, and there are.
    fn copy_leading(&self, encoder: &Encoder, leading: &mut [f32], rows: usize) {
        let (from, width) = match &encoder.basis {
            Some(basis) => (&self.leading, basis.width()),
            None => (&self.centred, encoder.mean.len()),
        };
        let dims = leading.len() / rows;
        let copied = dims.min(width);
        for (row, to) in leading.chunks_exact_mut(dims.max(1)).enumerate() {
            to[..copied].copy_from_slice(&from[row * width..][..copied]);
        }
    }

    /// Leaves the image of a rotated row in `self.image`. Returns its r, and a.
    #[inline(always)]
    fn compute_image<S: Simd>(&mut self, simd: S, encoder: &Encoder, stage: &Stage, row: usize) -> (f64, f32) {
        let Self { centred, squared, leading, plain, image } = self;
        let (cols, width) = (encoder.mean.len(), stage.width());
        image.resize(width, 0.0);
        let length = squared[row].sqrt();
        let (plain, mut error, residual): (&[f32], _, _) = match &encoder.basis {
            Some(basis) if !stage.whole => {
                plain.clear();
                plain.extend_from_slice(&leading[row * basis.width()..][..width]);
                // The place of r: a wider stage has a direction there.
                plain[width - 1] = 0.0;
                let prefix = squares(simd, plain);
                let error = (U + basis.error) * length;
                let residual = (squared[row] - prefix).max(0.0).sqrt();
                let gap = 2.0 * prefix.sqrt() * error + error * error + 2.0 * chain(cols) * squared[row];
                let gap = if residual > 0.0 { gap.sqrt().min(gap / residual) } else { gap.sqrt() };
                plain[width - 1] = (residual - f64::from(stage.shift)) as f32;
                let last = gap + U * (residual + f64::from(stage.shift.abs()));
                (plain, (error * error + last * last).sqrt(), residual)
            }
            _ => {
                let mut whole = &centred[row * cols..][..cols];
                if cols < width {
                    plain.clear();
                    plain.extend_from_slice(whole);
                    plain.resize(width, 0.0);
                    whole = plain;
                }
                (whole, U * length, 0.0)
            }
        };
        let image_length = length + f64::from(stage.shift.abs());
        error += (f64::from(stage.block.trailing_zeros()) + 2.0) * U * image_length;
        mix(simd, stage, plain, image);
        (residual, at_least(error * (1.0 + 2.0 * chain(cols)) + UNDERFLOW))
    }
}

/// x − y.
#[inline(always)]
fn subtract(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
        *out = x - y;
    }
}

/// The images t of some rows. Returns the sum of r.
pub(super) struct ComputeImages<'a> {
    pub encoder: &'a Encoder,
    pub stage: &'a Stage,
    pub rows: &'a [&'a [f32]],
    /// `rows × width` values.
    pub images: &'a mut [f32],
}

impl Operation for ComputeImages<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f64 {
        let mut scratch = EncodeScratch::default();
        scratch.rotate(simd, self.encoder, self.rows);
        let mut residuals = 0.0;
        for (row, out) in self.images.chunks_exact_mut(self.stage.width()).enumerate() {
            residuals += scratch.compute_image(simd, self.encoder, self.stage, row).0;
            out.copy_from_slice(&scratch.image);
        }
        residuals
    }
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

/// H of the header: signs, then Walsh–Hadamard butterflies over blocks; the signs carry the scale that
/// makes them orthonormal. Vectors of lanes go to the blocks in turn, so that all blocks get a like share of
/// the variance.
#[inline(always)]
fn mix<S: Simd>(simd: S, stage: &Stage, plain: &[f32], image: &mut [f32]) {
    let one = simd.splat_f32(1.0);
    let minus = simd.splat_f32(-1.0);
    let zero = simd.splat_f32(0.0);
    let [s1, s2, s4, s8] = SIGNS;
    let (s1, s2) = (simd.load_f32(&s1), simd.load_f32(&s2));
    let (s4, s8) = (simd.load_f32(&s4), simd.load_f32(&s8));
    let (plain, signs): (&[[f32; LANES]], &[[f32; LANES]]) = (plain.as_chunks().0, stage.signs.as_chunks().0);
    let image: &mut [[f32; LANES]] = image.as_chunks_mut().0;
    let per_block = stage.block / LANES;
    let blocks = image.len() / per_block;
    for (b, block) in image.chunks_exact_mut(per_block).enumerate() {
        for (i, lanes) in block.iter_mut().enumerate() {
            let from = i * blocks + b;
            let v = simd.multiply_add(zero, simd.load_f32(&plain[from]), simd.load_f32(&signs[from]));
            let v = simd.multiply_add(simd.swap::<1>(v), v, s1);
            let v = simd.multiply_add(simd.swap::<2>(v), v, s2);
            let v = simd.multiply_add(simd.swap::<4>(v), v, s4);
            simd.store_f32(simd.multiply_add(simd.swap::<8>(v), v, s8), lanes);
        }
        let mut half = 1;
        while half < per_block {
            for pairs in block.chunks_exact_mut(2 * half) {
                let (low, high) = pairs.split_at_mut(half);
                for (low, high) in low.iter_mut().zip(high) {
                    let (a, b) = (simd.load_f32(low), simd.load_f32(high));
                    simd.store_f32(simd.multiply_add(a, b, one), low);
                    simd.store_f32(simd.multiply_add(a, b, minus), high);
                }
            }
            half *= 2;
        }
    }
}

/// The codes of an image, multiples of 2ˢ steps for an s of `coarser`, and the measures that come with them.
#[inline(always)]
fn quantize<S: Simd>(simd: S, stage: &Stage, image: &[f32], codes: &mut [i8], computed: f32, coarser: u32) -> Measures {
    // Adding 1.5·2²³ rounds to the nearest integer and leaves it in the lowest bits.
    let magic = simd.splat_f32(12_582_912.0);
    let (one, minus) = (simd.splat_f32(1.0), simd.splat_f32(-1.0));
    // Exact: a power of two.
    let (limit, step) = (stage.limit as f32, stage.step * (1_u32 << coarser) as f32);
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
    Measures {
        norm: added(simd, norm) as i32,
        sum: added(simd, sum) as i32,
        coarser,
        computed,
        rounded: at_least(added(simd, rounded).sqrt() * more + UNDERFLOW),
        clipped: at_most(added(simd, clipped).sqrt() / more - UNDERFLOW),
        epsilon: at_least(added(simd, total).sqrt() * more + UNDERFLOW + f64::from(computed)),
    }
}

/// The lanes added up, in f64.
#[inline(always)]
fn added<S: Simd>(simd: S, lanes: S::F32) -> f64 {
    let mut values = [0.0; LANES];
    simd.store_f32(lanes, &mut values);
    values.into_iter().map(f64::from).sum()
}

/// Encodes rows: their codes, row after row, and their measures, stage by stage.
pub(super) struct Encode<'a, 'b> {
    pub encoder: &'a Encoder,
    /// Few enough that they stay in the cache.
    pub rows: &'a [&'a [f32]],
    /// One for each stage.
    pub outputs: &'a mut [EncodedPart<'b>],
    /// Where the leading coordinates of the rotated rows go: of each as many as there is room for, and there are.
    pub leading: &'a mut [f32],
    /// Whether codes may be coarser than the bank's, so that they need not be clipped: for queries.
    pub coarser: bool,
    pub scratch: &'a mut EncodeScratch,
}

impl Operation for Encode<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { encoder, rows, outputs, leading, coarser, scratch } = self;
        scratch.rotate(simd, encoder, rows);
        scratch.copy_leading(encoder, leading, rows.len());
        for (stage, output) in encoder.stages().iter().zip(outputs) {
            let codes = output.codes.chunks_exact_mut(stage.width());
            for (row, (codes, measures)) in codes.zip(&mut *output.measures).enumerate() {
                let (_, computed) = scratch.compute_image(simd, encoder, stage, row);
                *measures = quantize(simd, stage, &scratch.image, codes, computed, 0);
                let steps = if coarser { stage.coarser(measures, &scratch.image) } else { 0 };
                if steps > 0 {
                    *measures = quantize(simd, stage, &scratch.image, codes, computed, steps);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Stored errors against the true ones, and against what the header of this folder proves, both in f64.

use super::*;
use crate::context::Context;
use crate::filter::gemm::PANEL;
use crate::matrix::Matrix;
use crate::random::uniform;
use crate::simd::Level;

/// By what share of itself a length that is summed up in f32 may differ from the true one, in these tests.
const BLUR: f64 = 1e-6;

/// The images of some rows: t, r and a.
struct Images<'a>(&'a Encoder, &'a Stage, &'a [&'a [f32]]);

impl Operation for Images<'_> {
    type Output = Vec<(Vec<f32>, f64, f64)>;

    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Self(encoder, stage, rows) = self;
        let mut scratch = EncodeScratch::default();
        scratch.rotate(simd, encoder, rows);
        let mut image = |row| {
            let (residual, computed) = scratch.compute_image(simd, encoder, stage, row);
            (scratch.image.clone(), residual, f64::from(computed))
        };
        (0..rows.len()).map(&mut image).collect()
    }
}

fn length(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().map(|value| value * value).sum::<f64>().sqrt()
}

fn inner(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// The directions of a stage: the polar factor of the stored ones, by Newton's iteration.
fn directions(encoder: &Encoder, stage: &Stage) -> Vec<Vec<f64>> {
    let (basis, cols) = (encoder.basis.as_ref().unwrap(), encoder.mean.len());
    let column = |j: usize| -> Vec<f64> {
        let panel = &basis.panels()[j / PANEL * cols..][..cols];
        panel.iter().map(|row| f64::from(row[j % PANEL])).collect()
    };
    let mut q: Vec<Vec<f64>> = (0..stage.width() - 1).map(column).collect();
    for _ in 0..2 {
        let polar = |x: &Vec<f64>| {
            let mut next: Vec<f64> = x.iter().map(|x| 1.5 * x).collect();
            for y in &q {
                let share = 0.5 * inner(x, y);
                next.iter_mut().zip(y).for_each(|(next, y)| *next -= share * y);
            }
            next
        };
        q = q.iter().map(polar).collect();
    }
    q
}

/// The exact w, z and image t* of a row, by the definitions in the header of this folder.
fn exact(encoder: &Encoder, stage: &Stage, row: &[f32], q: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let w: Vec<f64> = row.iter().zip(&encoder.mean).map(|(&x, &mean)| f64::from(x) - f64::from(mean)).collect();
    let z: Vec<f64> = q.iter().map(|q| inner(q, &w)).collect();
    let mut plain = if stage.whole { w.clone() } else { z.clone() };
    plain.resize(stage.width(), 0.0);
    if !stage.whole {
        let rest = (0..w.len()).map(|i| w[i] - q.iter().zip(&z).map(|(q, z)| z * q[i]).sum::<f64>());
        plain[stage.width() - 1] = length(rest) - f64::from(stage.shift);
    }
    let blocks = stage.width() / stage.block;
    let place = |b: usize, i: usize| (i / LANES * blocks + b) * LANES + i % LANES;
    let value = |at: usize| {
        let (b, i) = (at / stage.block, at % stage.block);
        let term = |j: usize| {
            let odd = (i & j).count_ones() % 2 == 1;
            plain[place(b, j)] * f64::from(stage.signs[place(b, j)].signum()) * if odd { -1.0 } else { 1.0 }
        };
        (0..stage.block).map(term).sum::<f64>() / (stage.block as f64).sqrt()
    };
    let image = (0..stage.width()).map(value).collect();
    (w, z, image)
}

/// a as the header of this folder proves it. `r` is the computed one.
fn proved(encoder: &Encoder, stage: &Stage, w: f64, z: f64, r: f64) -> f64 {
    let squares = (encoder.mean.len() / 16 + 24) as f64 * U;
    let shift = f64::from(stage.shift.abs());
    let plain = match &encoder.basis {
        Some(basis) if !stage.whole => {
            let e = (U + basis.error) * w;
            let g = 2.0 * z * e + e.powi(2) + 2.0 * squares * w.powi(2);
            let of_r = if r * r > g { g / r } else { g.sqrt() };
            e.hypot(of_r + U * (r + shift))
        }
        _ => U * w,
    };
    let mixing = ((stage.block as f64).log2() + 2.0) * U * (w + shift);
    // Lengths are measured in f32.
    (plain + mixing) * (1.0 + 2.0 * squares) + UNDERFLOW
}

/// Rows of a few directions and some noise; some have none, and some lie far beyond the others.
fn rows(cols: usize, noise: f32) -> Vec<f32> {
    let uniform = |i: usize| uniform(i as u64);
    let value = |row: usize, column: usize| {
        let inside: f32 = (0..5).map(|i| uniform(1000 + 5 * row + i) * uniform(i * cols + column)).sum();
        let outside = noise * uniform(1_000_000 + row * cols + column);
        match row % 8 {
            0 => inside,
            1 => 100.0 * (inside + outside),
            _ => inside + outside,
        }
    };
    (0..300 * cols).map(|i| value(i / cols, i % cols)).collect()
}

#[test]
fn the_error_of_an_image_is_covered_and_is_what_the_proof_says() {
    for (cols, noise) in [(20, 0.1), (100, 0.5), (100, 0.01), (300, 2.0)] {
        let values = rows(cols, noise);
        let bank = Matrix::new("features", &values, 300, cols).unwrap();
        for level in Level::available() {
            let whole = Encoder::whole_width(cols);
            let widths: Vec<usize> = [16, 48, 64].into_iter().filter(|&width| width < whole).chain([whole]).collect();
            let encoder = Encoder::fit(&Context::new(level, 1), bank, &widths).unwrap();
            for stage in encoder.stages() {
                let q = if stage.whole { Vec::new() } else { directions(&encoder, stage) };
                let some: Vec<&[f32]> = (0..40).map(|row| bank.row(row)).chain([&encoder.mean[..]]).collect();
                let images = level.run(Images(&encoder, stage, &some));
                for (row, (image, residual, computed)) in some.iter().zip(images) {
                    let (w, z, exact) = exact(&encoder, stage, row, &q);
                    let error = length(exact.iter().zip(&image).map(|(exact, &t)| exact - f64::from(t)));
                    assert!(error <= computed, "{level}, {cols}: {error} of {computed}");
                    // Of r, the proof supposes far more than happens; where there is none, not much.
                    assert!(!stage.whole || computed <= 16.0 * error + 2.0 * UNDERFLOW, "{level}, {cols}: {error}");
                    let proved = proved(&encoder, stage, length(w), length(z), residual);
                    assert!((computed / proved - 1.0).abs() < BLUR, "{level}, {cols}: {computed} for {proved}");
                }
            }
        }
    }
}

/// The codes of an image and what is known of them.
struct Quantized<'a>(&'a Stage, &'a [f32], f32, u32);

impl Operation for Quantized<'_> {
    type Output = (Vec<i8>, Measures);

    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Self(stage, image, computed, coarser) = self;
        let mut codes = vec![0; stage.width()];
        let measures = quantize(simd, stage, image, &mut codes, computed, coarser);
        (codes, measures)
    }
}

#[test]
fn the_errors_of_codes_are_their_distances_to_the_image() {
    let values = rows(100, 0.5);
    let bank = Matrix::new("features", &values, 300, 100).unwrap();
    for level in Level::available() {
        let encoder = Encoder::fit(&Context::new(level, 1), bank, &[16, 64, 128]).unwrap();
        for stage in encoder.stages() {
            let some: Vec<&[f32]> = (0..40).map(|row| bank.row(row)).collect();
            let mut images = level.run(Images(&encoder, stage, &some));
            images.push((vec![0.0; stage.width()], 0.0, 0.0));
            let more = 1.0 + 2.0 * (stage.width() / 16 + 24) as f64 * U;
            for (coarser, (image, _, computed)) in (0..=stage.coarsest).flat_map(|s| images.iter().map(move |i| (s, i)))
            {
                let (codes, measures) = level.run(Quantized(stage, image, *computed as f32, coarser));
                let step = f64::from(stage.step) * f64::from(1 << coarser);
                let reach = step * f64::from(stage.limit);
                let t = || image.iter().map(|&t| f64::from(t));
                let decoded = || codes.iter().map(|&code| step * f64::from(code));
                let fine = || t().map(|t| t.clamp(-reach, reach)).zip(decoded()).map(|(c, code)| c - code);
                assert!(fine().all(|wrong| wrong.abs() <= 0.5 * step * (1.0 + BLUR)), "{level}");
                assert_eq!(measures.norm, codes.iter().map(|&code| i32::from(code).pow(2)).sum());
                assert_eq!(measures.sum, codes.iter().map(|&code| i32::from(code)).sum());
                assert_eq!((measures.coarser, f64::from(measures.computed)), (coarser, *computed));
                let near = |stored: f32, expected: f64| {
                    assert!(
                        (f64::from(stored) - expected).abs() <= BLUR * expected,
                        "{level}: {stored} for {expected}"
                    );
                };
                near(measures.rounded, length(fine()) * more + UNDERFLOW);
                near(
                    measures.epsilon,
                    length(t().zip(decoded()).map(|(t, code)| t - code)) * more + UNDERFLOW + computed,
                );
                near(measures.clipped, (length(t().map(|t| t - t.clamp(-reach, reach))) / more - UNDERFLOW).max(0.0));
            }
        }
    }
}

#[test]
fn lengths_are_stored_on_the_safe_side() {
    let half_ulp = 2.0_f64.powi(-24);
    for value in [1.0, 1.0 + half_ulp, 1.0 + 3.0 * half_ulp, 1.0 - 0.5 * half_ulp, 0.3, 1e-30, 1e30] {
        for value in [value, value * (1.0 + 1e-12), value * (1.0 - 1e-12)] {
            let (above, below) = (f64::from(at_least(value)), f64::from(at_most(value)));
            assert!(value <= above && above <= value * (1.0 + 4.0 * half_ulp), "{value}: {above}");
            assert!(value >= below && below >= value * (1.0 - 4.0 * half_ulp), "{value}: {below}");
        }
    }
    assert_eq!((at_most(0.0), at_most(-1.0)), (0.0, 0.0));
    assert!(at_least(0.0) > 0.0);
}

#[test]
fn what_underflow_may_have_made_is_not_counted_as_clipped() {
    let values = rows(100, 0.5);
    let bank = Matrix::new("features", &values, 300, 100).unwrap();
    for level in Level::available() {
        let encoder = Encoder::fit(&Context::new(level, 1), bank, &[16]).unwrap();
        for (step, clipped) in [(2.0_f32.powi(-54), false), (2.0_f32.powi(-50), true)] {
            let mut stage = encoder.stages()[0].clone();
            stage.step = step;
            let mut image = [0.0; 16];
            // One step beyond the last code.
            image[3] = step * (stage.limit + 1) as f32;
            let (codes, measures) = level.run(Quantized(&stage, &image, 0.0, 0));
            assert_eq!(i32::from(codes[3]), stage.limit);
            assert_eq!(measures.clipped > 0.0, clipped, "{level}: {measures:?}");
            assert!(f64::from(measures.epsilon) >= f64::from(step) + UNDERFLOW, "{level}: {measures:?}");
            assert!(f64::from(measures.clipped) <= f64::from(step) - UNDERFLOW || !clipped, "{level}: {measures:?}");
        }
    }
}

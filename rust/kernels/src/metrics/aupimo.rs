//! AUPIMO: per-image overlap at very low false positive rates of normal images (Bertoldo et al., AUPIMO: Redefining
//! Visual Anomaly Detection Benchmarks with High Speed and Low Tolerance, BMVC 2024).
//!
//! At a threshold t, the shared false positive rate is the mean, over the normal images, of the fraction of an image's
//! pixels whose score is at least t. The true positive rate of an anomalous image is the same fraction of its anomalous
//! pixels; its normal pixels count nowhere. The value of an image is the mean of its true positive rate over the
//! logarithm of the shared rate, from the lower limit l to the upper one u:
//!
//! ```text
//!   1 / ln(u/l) · ∫ TPR(F) dF/F, F from l to u
//! ```
//!
//! Every distinct score is a threshold. Between two of them the curve of TPR over F is a straight line, as those of ROC
//! and of PRO: it slopes only where scores of both kinds tie, as if the ties were broken at random.
//!
//! As in `pro.rs`, sums are swapped: the value is the mean over the anomalous pixels of an image of one pixel's own, its
//! *share*. A pixel above which the rate is A, and at or above which it is B, is found gradually from A to B. With a and
//! b, which are A and B clamped to the limits:
//!
//! ```text
//!   share = (((b - a) - A ln(b/a)) / (B - A) + ln(u/b)) / ln(u/l)         the first term is 0 where A = B
//! ```

use super::Samples;
use super::radix::sort;
use super::rank::{Classes, Score, gather, steps};
use super::samples::{count, split};
use crate::context::Context;
use crate::error::Error;
use crate::math::{ln, ln_1p};
use crate::matrix::reserved;

/// The value of every image, in 0 to 1; NaN where no pixel is anomalous.
///
/// # Errors
/// [`Error::Invalid`] when `fpr_limits` are not two rates of which the second is larger, no pixel is anomalous, no image
/// is normal, or the lower limit is less than one pixel of the normal images.
pub fn aupimo<S: Score>(pixels: &Samples<S>, fpr_limits: [f64; 2], context: &Context) -> Result<Vec<f64>, Error> {
    let [lower, upper] = fpr_limits;
    if !(lower > 0.0 && lower < upper && upper <= 1.0) {
        let got = format!("{lower} and {upper}");
        return Err(Error::invalid("fpr_limits", "two false positive rates, 0 < lower < upper <= 1", got));
    }
    let sizes = pixels.require_sizes("AUPIMO")?;
    pixels.require(false, "AUPIMO")?;
    let count_classes = |mask| [0, 1].map(|label| count(mask, label));
    let counts: Vec<[usize; 2]> = split(pixels.labels, sizes).map(count_classes).collect();
    let normal_images = counts.iter().filter(|&&[normals, anomalies]| normals > 0 && anomalies == 0);
    let images = normal_images.clone().count();
    let Some(&[largest, _]) = normal_images.max() else {
        let expected = "without an anomalous pixel in at least one image, for AUPIMO takes false positive rates of \
                        normal images alone";
        return Err(Error::invalid("masks", expected, format!("0 normal of {} images", counts.len())));
    };
    // The rate of one pixel in one of the largest normal images.
    let one = 1.0 / (images as f64 * largest as f64);
    if lower < one {
        let pixels = images * largest;
        let expected = format!("at least 1/{pixels}, one pixel in one of {images} normal images of {largest} pixels");
        let got = format!("{lower:e}. Take more normal images or a higher limit");
        return Err(Error::invalid("fpr_limits[0]", expected, got));
    }

    // Normal pixels of anomalous images count nowhere.
    let mut labels: Vec<u8> = reserved(&[pixels.labels.len()])?;
    let mut starts = Vec::with_capacity(counts.len());
    for (mask, &[_, anomalies]) in split(pixels.labels, sizes).zip(&counts) {
        starts.push(labels.len());
        labels.extend(mask.iter().map(|&label| if label == 0 && anomalies > 0 { 2 } else { label }));
    }
    let of_image = |pixel, key: S::Key| (key, starts.partition_point(|&start| start <= pixel) as u32 - 1);
    let wanted = (upper / one) as usize + 1;
    let Classes { anomalous, normal } = gather(&labels, pixels.scores, wanted, of_image, context)?;
    drop(labels);
    let key_of = |(key, _): (S::Key, u32)| key.into();
    let (anomalous, normal) = (sort(anomalous, key_of, context)?, sort(normal, key_of, context)?);

    // The rate after each normal pixel. Counted in pixels of the largest image: exact where all are of one size.
    let mut found = 0.0;
    let mut rates: Vec<f64> = reserved(&[normal.len() + 1])?;
    rates.push(0.0);
    for &(_, image) in &normal {
        found += largest as f64 / counts[image as usize][0] as f64;
        rates.push(found * one);
    }
    let keys: Vec<S::Key> = normal.into_iter().map(|(key, _)| key).collect();

    let mut shares = vec![0.0; counts.len()];
    for step in steps(&anomalous, &keys, key_of) {
        let share = share(rates[step.normals.start], rates[step.normals.end], fpr_limits);
        for &(_, image) in &anomalous[step.anomalies] {
            shares[image as usize] += share;
        }
    }
    // 0 / 0 is NaN.
    Ok(shares.iter().zip(&counts).map(|(share, &[_, anomalies])| share / anomalies as f64).collect())
}

/// The part of the logarithm of the rates between the limits during which a pixel counts as found, if it is found
/// gradually between the rates `above` and `reached`.
fn share(above: f64, reached: f64, [lower, upper]: [f64; 2]) -> f64 {
    let (start, end) = (above.clamp(lower, upper), reached.clamp(lower, upper));
    let gradually =
        if end > start { ((end - start) - above * ln_1p((end - start) / start)) / (reached - above) } else { 0.0 };
    ((gradually + ln(upper / end)) / ln(upper / lower)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    const LIMITS: [f64; 2] = [0.1, 0.4];

    fn of(
        masks: &[u8],
        maps: &[f32],
        sizes: &[[usize; 2]],
        limits: [f64; 2],
        threads: usize,
    ) -> Result<Vec<f64>, Error> {
        let context = Context::new(Level::Scalar, threads);
        aupimo(&Samples::pixels(masks, maps, sizes, &context)?, limits, &context)
    }

    #[test]
    fn by_hand() {
        // One normal image of ten pixels. Of the anomalous ones, 9.5 is found from the rate 0.1 on, 8.5 from 0.2 on: half
        // of the way from 0.1 to 0.4 in logarithms. The normal pixel of their image, 20, counts nowhere.
        let normal = [10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0];
        let value = |anomalous: [f32; 2]| {
            let maps = [&normal[..], &[anomalous[0], 20.0, anomalous[1]]].concat();
            let masks = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1];
            let values = of(&masks, &maps, &[[2, 5], [1, 3]], LIMITS, 1).unwrap();
            assert!(values[0].is_nan());
            values[1]
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-15, "{found} {expected}");
        near(value([11.0, 9.5]), 1.0);
        near(value([11.0, 8.5]), 0.75);
        near(value([8.5, 6.5]), 0.25);
        near(value([0.0, -1.0]), 0.0);
        // 8 ties with a normal pixel: found gradually from 0.2 to 0.3, so of ln 4 it has (0.1 - 0.2 ln 1.5) / 0.1 + ln(4/3).
        near(value([11.0, 8.0]), 0.5 + (1.0 - 2.0 * ln(1.5) + ln(4.0 / 3.0)) / ln(4.0) / 2.0);
    }

    #[test]
    fn every_normal_image_has_equal_weight_and_ignored_pixels_none() {
        // Rates: 6.0 is one of two pixels of one image of two; 5.0 one of four of the other.
        let (masks, sizes) = ([0, 0, 2, 0, 0, 0, 0, 2, 1, 0], [[1, 3], [1, 5], [2, 1]]);
        let maps = [6.0, 0.0, 99.0, 5.0, 0.0, 0.0, 0.0, 99.0, 5.5, 9.0];
        let value = of(&masks, &maps, &sizes, [0.125, 1.0], 1).unwrap()[2];
        assert!((value - ln(4.0) / ln(8.0)).abs() < 1e-15, "{value}");
    }

    #[test]
    fn refuses_what_has_no_aupimo() {
        let message = |masks: &[u8], limits| of(masks, &[0.5; 8], &[[2, 2]; 2], limits, 1).unwrap_err().to_string();
        let masks = [0, 0, 0, 0, 1, 0, 0, 0];
        for limits in [[0.0, 0.5], [0.5, 0.5], [0.5, 0.25], [0.5, 1.5], [f64::NAN, 0.5], [0.5, f64::NAN]] {
            assert!(message(&masks, limits).starts_with("fpr_limits must be two false positive rates"), "{limits:?}");
        }
        assert_eq!(
            message(&masks, [0.2, 0.5]),
            "fpr_limits[0] must be at least 1/4, one pixel in one of 1 normal images of 4 pixels; got 2e-1. \
             Take more normal images or a higher limit"
        );
        assert!(of(&masks, &[0.5; 8], &[[2, 2]; 2], [0.25, 0.5], 1).is_ok());
        assert!(message(&[0; 8], LIMITS).starts_with("masks must be 1 (anomalous) at least once, for AUPIMO"));
        for masks in [[1, 0, 0, 0, 1, 0, 0, 0], [2, 2, 2, 2, 1, 0, 0, 0]] {
            assert!(message(&masks, LIMITS).ends_with("normal images alone; got 0 normal of 2 images"));
        }
    }

    proptest! {
        #[test]
        fn equal_to_every_threshold(
            pixels in prop::collection::vec((prop_oneof![5 => Just(0), 2 => Just(1), 1 => Just(2_u8)], -9_i8..9), 2..99),
            sizes in prop::collection::vec([1_usize..8, 1_usize..8], 2..6),
            limits in [0.02..0.3, 0.31..1.0],
        ) {
            let total = sizes.iter().map(|[height, width]| height * width).sum();
            let pixels: Vec<(u8, i8)> = pixels.iter().copied().cycle().take(total).collect();
            let mut masks: Vec<u8> = pixels.iter().map(|pixel| pixel.0).collect();
            // One image at least is normal.
            masks[..sizes[0][0] * sizes[0][1]].iter_mut().for_each(|label| *label &= 2);
            let maps: Vec<f32> = pixels.iter().map(|pixel| f32::from(pixel.1) / 7.0).collect();
            let Ok(found) = of(&masks, &maps, &sizes, limits, 1) else { return Err(TestCaseError::reject("undefined")) };
            for (found, expected) in found.iter().zip(naive::aupimo(&masks, &maps, &sizes, limits)) {
                prop_assert!((found - expected).abs() < 1e-12 || found.is_nan() && expected.is_nan());
                prop_assert!(found.is_nan() || (0.0..=1.0).contains(found));
            }
            let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
            let found = bits(found);
            prop_assert_eq!(bits(of(&masks, &maps, &sizes, limits, 3).unwrap()), &found[..]);
            let wide: Vec<f64> = maps.iter().map(|&score| score.into()).collect();
            let context = Context::new(Level::Scalar, 1);
            let samples = Samples::pixels(&masks, &wide, &sizes, &context).unwrap();
            prop_assert_eq!(bits(aupimo(&samples, limits, &context).unwrap()), &found[..]);
        }
    }
}

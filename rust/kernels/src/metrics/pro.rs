//! PRO: the per-region overlap, averaged over false positive rates.
//!
//! PRO(t) is the mean, over all anomalous regions, of the fraction of a region whose score is at least t;
//! FPR(t) is the same fraction of all normal pixels; pixels that are left out
//! are in neither. The metric is the area under PRO over FPR from (0, 0)
//! to the limit, by trapezoids between every two thresholds, divided by the limit.
//!
//! Sums may be swapped: the area is the mean over regions of the mean over a region's pixels of one pixel's
//! own area, its *share*. A pixel with a normal pixels above it and b at or above it is found at rate b/n
//! and, on the line between the two thresholds, gradually from a/n on. With l = limit · n:
//!
//! ```text
//!   share = 1 - (a + b) / 2l                b <= l
//!           (l - a)² / 2l(b - a)        a < l < b      the line ends at the limit
//!           0                               otherwise
//! ```
//!
//! So only a and b of every anomalous pixel are needed, and of the normal pixels only those that reach the
//! limit are sorted. Shares are at most 1, hence so is every sum of them over its count, rounded or not.

use super::Samples;
use super::radix::sort;
use super::rank::{Classes, Score, gather, steps};
use super::regions::regions;
use crate::context::Context;
use crate::error::Error;

/// PRO up to `fpr_limit`, in 0 to 1; 8-connected regions, all of equal weight.
///
/// # Errors
/// [`Error::Invalid`] when `fpr_limit` lies outside (0, 1], when no pixel is anomalous or none is normal.
pub fn pro<S: Score>(pixels: &Samples<S>, fpr_limit: f64, context: &Context) -> Result<f64, Error> {
    if !(fpr_limit > 0.0 && fpr_limit <= 1.0) {
        return Err(Error::invalid("fpr_limit", "a false positive rate above 0 and at most 1", fpr_limit));
    }
    pixels.require(true, "PRO")?;
    let regions = regions(pixels.labels, pixels.require_sizes("PRO")?, context)?;
    let limit = fpr_limit * pixels.normals as f64;

    let Classes { anomalous, normal } =
        gather(pixels.labels, pixels.scores, limit as usize + 1, |_, key| key, context)?;
    let normal = sort(normal, Into::into, context)?;
    let mut of_pixel = regions.of_pixel.into_iter();
    let anomalous = anomalous.into_iter().map(|keys| keys.into_iter().zip(&mut of_pixel).collect()).collect();
    let key_of = |(key, _): (S::Key, u32)| key.into();
    let anomalous = sort(anomalous, key_of, context)?;

    let mut shares = vec![0.0; regions.sizes.len()];
    for step in steps(&anomalous, &normal, key_of) {
        let share = share(step.normals.start as f64, step.normals.end as f64, limit);
        for &(_, region) in &anomalous[step.anomalies] {
            shares[region as usize] += share;
        }
    }
    let mut overlaps: Vec<f64> = shares.iter().zip(&regions.sizes).map(|(share, &size)| share / size as f64).collect();
    // Added in the order of their size, so that the order of images and pixels does not matter.
    overlaps.sort_unstable_by(f64::total_cmp);
    Ok(overlaps.iter().sum::<f64>() / overlaps.len() as f64)
}

/// The part of the false alarms up to `limit` during which a pixel counts as found, if it is found
/// gradually between `above` and `reached` false alarms.
fn share(above: f64, reached: f64, limit: f64) -> f64 {
    let left = limit - above;
    if reached <= limit {
        1.0 - (above + reached) / (2.0 * limit)
    } else if left > 0.0 {
        left / limit * (left / (reached - above)) / 2.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn of(masks: &[u8], maps: &[f32], sizes: &[[usize; 2]], limit: f64, threads: usize) -> Result<f64, Error> {
        let context = Context::new(Level::Scalar, threads);
        pro(&Samples::pixels(masks, maps, sizes, &context)?, limit, &context)
    }

    #[test]
    fn by_hand() {
        // Regions {0.9, 0.5} and {0.2}; normal 0.7, 0.3, 0.3, 0.1. FPR, PRO: (0, 1/4) (1/4, 1/4) (1/4, 1/2)
        // (3/4, 1/2) (3/4, 1) (1, 1).
        let (masks, maps) = ([1, 1, 0, 0, 0, 1, 0], [0.9, 0.5, 0.7, 0.3, 0.3, 0.2, 0.1]);
        let areas = [(0.25, 0.25 / 4.0), (0.5, 0.25 / 4.0 + 0.25 / 2.0), (1.0, 0.25 / 4.0 + 0.5 / 2.0 + 0.25)];
        for (limit, area) in areas {
            assert_eq!(of(&masks, &maps, &[[1, 7]], limit, 1), Ok(area / limit));
        }
        // All tie: the curve is the diagonal, and the area up to the limit is half of it squared.
        assert_eq!(of(&masks, &[0.0; 7], &[[1, 7]], 0.3, 1), Ok(0.15));
    }

    #[test]
    fn perfect_maps_give_exactly_one() {
        let masks: Vec<u8> = (0..3 * 11 * 13).map(|i| u8::from(i % 7 < 2)).collect();
        let maps: Vec<f32> = masks.iter().zip(0..).map(|(&m, i)| f32::from(m) * 9.0 + (i % 5) as f32).collect();
        for limit in [0.01, 0.3, 0.7, 1.0] {
            assert_eq!(of(&masks, &maps, &[[11, 13]; 3], limit, 2), Ok(1.0));
        }
    }

    #[test]
    fn refuses_what_has_no_pro() {
        let message = |masks: &[u8], limit| of(masks, &[0.5; 4], &[[2, 2]], limit, 1).unwrap_err().to_string();
        assert!(message(&[0; 4], 0.3).contains("got 0 anomalous of 4 pixels"));
        assert!(message(&[1; 4], 0.3).contains("got 4 anomalous of 4 pixels"));
        for limit in [0.0, -1.0, 1.5, f64::NAN] {
            assert!(message(&[0, 1, 0, 0], limit).starts_with("fpr_limit must be"), "{limit}");
        }
    }

    proptest! {
        #[test]
        fn equal_to_every_threshold(
            pixels in prop::collection::vec((prop_oneof![4 => Just(0), 4 => Just(1), 1 => Just(2_u8)], 0_u8..12), 2..99),
            sizes in prop::collection::vec([1_usize..8, 1_usize..8], 1..4),
            limit in prop_oneof![Just(0.3), Just(1.0), 1e-3..1.0],
        ) {
            let total = sizes.iter().map(|[height, width]| height * width).sum();
            let pixels: Vec<(u8, u8)> = pixels.iter().copied().cycle().take(total).collect();
            let masks: Vec<u8> = pixels.iter().map(|pixel| pixel.0).collect();
            let maps: Vec<f32> = pixels.iter().map(|pixel| f32::from(pixel.1) / 7.0).collect();
            prop_assume!(masks.contains(&0) && masks.contains(&1));
            let found = of(&masks, &maps, &sizes, limit, 1).unwrap();
            let expected = naive::pro(&masks, &maps, &sizes, limit);
            prop_assert!((found - expected).abs() < 1e-12, "{found} {expected}");
            prop_assert!((0.0..=1.0).contains(&found));
            prop_assert_eq!(of(&masks, &maps, &sizes, limit, 3), Ok(found));
            // float64 maps of the same values rank alike.
            let wide: Vec<f64> = maps.iter().map(|&score| score.into()).collect();
            let context = Context::new(Level::Scalar, 1);
            let samples = Samples::pixels(&masks, &wide, &sizes, &context).unwrap();
            prop_assert_eq!(pro(&samples, limit, &context), Ok(found));
        }
    }
}

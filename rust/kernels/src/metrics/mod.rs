//! Exact metrics of anomaly scores; a higher score is more anomalous.
//!
//! Every metric here needs, for each anomaly, only how many normal scores lie above it and how many tie
//! with it. So: map the scores to integer keys ([`Score`]), radix-sort each class, walk down both once
//! (`rank.rs`). What is counted stays an integer until one last division.
//!
//! ```text
//!   labels, scores -> Samples -> keys of each class -> sorted -> steps: (tied anomalies, normals above, normals tied)
//!                                                                  |
//!     AUROC, average precision, F1, full recall, PRO, AUPIMO  <----+
//! ```
//!
//! With P anomalies and N normal scores, and at each step p anomalies tied, t found, a normals above and
//! b at or above:
//!
//! | metric | value |
//! |---|---|
//! | [`roc_auc`] | 1 − Σ p (a + b) / 2PN: the chance that an anomaly outscores a normal one, ties half |
//! | [`average_precision`] | Σ p · t / (t + b) / P |
//! | [`f1_optimal`] | the largest 2t / (t + b + P) |
//! | [`full_recall`] | b of the last step |
//! | [`pro()`] | see `pro.rs` |
//! | [`aupimo()`] | see `aupimo.rs` |
//!
//! The same functions take images (a label and a score each) and pixels (masks and maps, of which some may be left
//! out).

mod aupimo;
mod pro;
mod radix;
mod rank;
mod regions;
mod samples;

use std::ops::Range;

pub use aupimo::aupimo;
pub use pro::pro;
pub use rank::Score;
pub use regions::count_regions;
pub use samples::Samples;

use crate::context::Context;
use crate::error::Error;
use rank::Step;

/// Area under the ROC curve, in 0 to 1; ties count half. Exact up to one division.
///
/// ```
/// use patchcore_kernels::{context::Context, metrics, simd::Level};
/// let context = Context::new(Level::Scalar, 1);
/// let samples = metrics::Samples::images(&[0, 0, 1, 1], &[0.1, 0.4, 0.35, 0.8], &context)?;
/// assert_eq!(metrics::roc_auc(&samples, &context)?, 0.75);
/// # Ok::<(), patchcore_kernels::error::Error>(())
/// ```
///
/// # Errors
/// [`Error::Invalid`] when there is only one class.
pub fn roc_auc<S: Score>(samples: &Samples<S>, context: &Context) -> Result<f64, Error> {
    samples.require(true, "AUROC")?;
    let count = |range: &Range<usize>| range.len() as u128;
    let misordered: u128 = samples
        .steps(context)?
        .map(|step| count(&step.anomalies) * (step.normals.start as u128 + step.normals.end as u128))
        .sum();
    let pairs = 2 * samples.anomalies as u128 * samples.normals as u128;
    Ok((pairs - misordered) as f64 / pairs as f64)
}

/// Average precision, in 0 to 1: the precision at each threshold weighted by the recall it adds.
///
/// # Errors
/// [`Error::Invalid`] when nothing is anomalous.
pub fn average_precision<S: Score>(samples: &Samples<S>, context: &Context) -> Result<f64, Error> {
    samples.require(false, "average precision")?;
    let weighted = |step: Step| {
        let found = step.anomalies.end as f64;
        step.anomalies.len() as f64 * (found / (found + step.normals.end as f64))
    };
    Ok(samples.steps(context)?.map(weighted).sum::<f64>() / samples.anomalies as f64)
}

/// A threshold, anomalous where score >= threshold, and what it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct F1Optimum {
    /// The threshold: one of the scores.
    pub threshold: f64,
    /// F1 there, above 0 and at most 1.
    pub f1: f64,
    /// Normal samples that it calls anomalous.
    pub false_alarms: usize,
    /// Anomalous samples that it calls normal.
    pub misses: usize,
}

/// The threshold of the largest F1; among equal ones the highest.
///
/// # Errors
/// [`Error::Invalid`] when nothing is anomalous.
pub fn f1_optimal<S: Score>(samples: &Samples<S>, context: &Context) -> Result<F1Optimum, Error> {
    samples.require(false, "F1")?;
    // F1 = 2 found / (found + alarms + all), compared as a fraction of integers.
    let fraction = |step: &Step| {
        let found = step.anomalies.end;
        (found as u128, (found + step.normals.end + samples.anomalies) as u128)
    };
    let better = |best: Step, step: Step| {
        let ((found, of), (best_found, best_of)) = (fraction(&step), fraction(&best));
        if found * best_of > best_found * of { step } else { best }
    };
    let start = Step { key: 0, anomalies: 0..0, normals: 0..0 };
    let best = samples.steps(context)?.fold(start, better);
    let (found, of) = fraction(&best);
    Ok(F1Optimum {
        threshold: S::from_key(best.key),
        f1: 2.0 * found as f64 / of as f64,
        false_alarms: best.normals.end,
        misses: samples.anomalies - best.anomalies.end,
    })
}

/// The highest threshold that finds every anomaly (score >= threshold), and its false alarms.
///
/// # Errors
/// [`Error::Invalid`] when nothing is anomalous.
pub fn full_recall<S: Score>(samples: &Samples<S>, context: &Context) -> Result<(f64, usize), Error> {
    samples.require(false, "full recall")?;
    let last = samples.steps(context)?.last();
    Ok(last.map_or((f64::NEG_INFINITY, 0), |step| (S::from_key(step.key), step.normals.end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn context() -> Context<'static> {
        Context::new(Level::Scalar, 2)
    }

    #[test]
    fn a_missing_class_is_refused() {
        let samples = |labels: &'static [u8]| Samples::images(labels, &[0.5_f32; 2], &context()).unwrap();
        let auroc = |labels| roc_auc(&samples(labels), &context()).unwrap_err().to_string();
        assert_eq!(
            auroc(&[0, 0]),
            "labels must be of both classes, for AUROC compares anomalous images with normal ones; \
             got 0 anomalous of 2 images"
        );
        assert!(auroc(&[1, 1]).ends_with("got 2 anomalous of 2 images"));

        let (none, all) = (samples(&[0, 0]), samples(&[1, 1]));
        let refusals = [
            average_precision(&none, &context()).unwrap_err(),
            f1_optimal(&none, &context()).unwrap_err(),
            full_recall(&none, &context()).unwrap_err(),
        ];
        for refusal in refusals {
            assert!(refusal.to_string().starts_with("labels must be 1 (anomalous) at least once"), "{refusal}");
        }
        assert_eq!(average_precision(&all, &context()), Ok(1.0));
        assert_eq!(f1_optimal(&all, &context()).unwrap().f1, 1.0);
        assert_eq!(full_recall(&all, &context()), Ok((0.5, 0)));
    }

    #[test]
    fn zeros_of_either_sign_tie() {
        let samples = Samples::images(&[0, 1], &[-0.0_f32, 0.0], &context()).unwrap();
        assert_eq!(roc_auc(&samples, &context()), Ok(0.5));
        let best = f1_optimal(&samples, &context()).unwrap();
        assert_eq!(best, F1Optimum { threshold: 0.0, f1: 2.0 / 3.0, false_alarms: 1, misses: 0 });
    }

    #[test]
    fn of_equal_f1_the_highest_threshold_wins() {
        // F1 is 2/3 at 0.9 and at 0.1.
        let samples = Samples::images(&[1, 0, 0, 1], &[0.9, 0.5, 0.4, 0.1], &context()).unwrap();
        let best = f1_optimal(&samples, &context()).unwrap();
        assert_eq!(best, F1Optimum { threshold: 0.9, f1: 2.0 / 3.0, false_alarms: 0, misses: 1 });
        assert_eq!(full_recall(&samples, &context()), Ok((0.1, 2)));
    }

    #[test]
    fn large_samples_do_not_depend_on_threads() {
        let hash = |i: u32| i.wrapping_mul(2_654_435_761) >> 8;
        let labels: Vec<u8> = (0..1_500_000).map(|i| u8::from(hash(i) % 40 == 0)).collect();
        let scores: Vec<f32> = (0..1_500_000).map(|i| (hash(i + 77) % 1000) as f32 - 500.0).collect();
        let auroc = |threads| {
            let context = Context::new(Level::Scalar, threads);
            roc_auc(&Samples::images(&labels, &scores, &context).unwrap(), &context).unwrap()
        };
        // Counting by value: the scores are 1000 integers.
        let mut counts = vec![[0_u64; 2]; 1000];
        labels.iter().zip(&scores).for_each(|(&l, &s)| counts[(s + 500.0) as usize][l as usize] += 1);
        let (mut below, mut won) = (0, 0);
        for [normal, anomalous] in &counts {
            won += anomalous * (2 * below + normal);
            below += normal;
        }
        let pairs = 2 * below * counts.iter().map(|count| count[1]).sum::<u64>();
        for threads in [1, 2, 5] {
            assert_eq!(auroc(threads), won as f64 / pairs as f64);
        }
    }

    proptest! {
        #[test]
        fn equal_to_the_definitions(
            samples in prop::collection::vec((0_u8..2, -9_i8..9, any::<f32>()), 1..80),
            ties in any::<bool>(),
        ) {
            let labels: Vec<u8> = samples.iter().map(|sample| sample.0).collect();
            let finite = |score: f32| if score.is_finite() { score } else { 0.0 };
            let score = |sample: &(u8, i8, f32)| if ties { f32::from(sample.1) / 4.0 } else { finite(sample.2) };
            let scores: Vec<f32> = samples.iter().map(score).collect();
            let wide: Vec<f64> = scores.iter().map(|&score| score.into()).collect();
            prop_assume!(labels.contains(&1));
            let narrow_samples = Samples::images(&labels, &scores, &context()).unwrap();
            let wide_samples = Samples::images(&labels, &wide, &context()).unwrap();
            let total = samples.iter().filter(|sample| sample.0 == 1).count();
            let thresholds = naive::thresholds(&labels, &wide);

            if labels.contains(&0) {
                let auroc = roc_auc(&narrow_samples, &context()).unwrap();
                prop_assert!((auroc - naive::roc_auc(&labels, &wide)).abs() < 1e-12);
                prop_assert_eq!(roc_auc(&wide_samples, &context()), Ok(auroc));
            }

            let mut expected = 0.0;
            let mut before = 0;
            for &(_, found, alarms) in &thresholds {
                expected += (found - before) as f64 / total as f64 * (found as f64 / (found + alarms) as f64);
                before = found;
            }
            let precision = average_precision(&narrow_samples, &context()).unwrap();
            prop_assert!((precision - expected).abs() < 1e-12);
            prop_assert_eq!(average_precision(&wide_samples, &context()), Ok(precision));

            let f1 = |found: usize, alarms: usize| 2.0 * found as f64 / (found + alarms + total) as f64;
            let best = f1_optimal(&narrow_samples, &context()).unwrap();
            let largest = thresholds.iter().map(|t| f1(t.1, t.2)).fold(0.0, f64::max);
            let highest = thresholds.iter().find(|t| f1(t.1, t.2) == largest).unwrap();
            prop_assert_eq!((best.threshold, best.f1), (highest.0, largest));
            prop_assert_eq!((best.misses, best.false_alarms), (total - highest.1, highest.2));
            prop_assert_eq!(f1_optimal(&wide_samples, &context()), Ok(best));

            let recall = thresholds.iter().find(|t| t.1 == total).unwrap();
            prop_assert_eq!(full_recall(&narrow_samples, &context()), Ok((recall.0, recall.2)));
            prop_assert_eq!(full_recall(&wide_samples, &context()), Ok((recall.0, recall.2)));
        }
    }
}

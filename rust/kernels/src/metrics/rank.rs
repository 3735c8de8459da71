//! Ranking: scores as integer keys, the two classes sorted, and the walk over their thresholds.

use std::ops::Range;

use super::radix::{per_block, sort};
use crate::context::Context;
use crate::error::Error;
use crate::matrix::reserved;

/// A float that can be ranked.
pub trait Score: Copy + Into<f64> + Sync {
    /// The unsigned integer of the same width.
    type Key: Copy + Default + Into<u64> + Send + Sync;

    /// An integer that falls as the score rises, so that rising keys run from the most anomalous score to
    /// the least. -0.0 and 0.0 share a key; the score must not be NaN.
    fn key(self) -> Self::Key;

    /// The score of a key.
    fn from_key(key: u64) -> f64;
}

macro_rules! score {
    ($float:ty, $key:ty) => {
        impl Score for $float {
            type Key = $key;

            #[inline(always)]
            fn key(self) -> $key {
                // Adding 0.0 turns -0.0 into 0.0.
                let bits = (self + 0.0).to_bits();
                if bits >> (<$key>::BITS - 1) == 1 { bits } else { !bits & (<$key>::MAX >> 1) }
            }

            fn from_key(key: u64) -> f64 {
                let key = key as $key;
                let bits = if key >> (<$key>::BITS - 1) == 1 { key } else { !key & (<$key>::MAX >> 1) };
                <$float>::from_bits(bits).into()
            }
        }
    };
}
score!(f32, u32);
score!(f64, u64);

/// Bits of [`coarse`]: sign, exponent and seven more bits of a float32 tell most scores apart, and a histogram of
/// 65 536 counts stays in the second-level cache.
const COARSE_BITS: u32 = 16;

/// The leading bits of a score's key.
fn coarse<S: Score>(score: S) -> usize {
    (score.key().into() >> (8 * size_of::<S::Key>() as u32 - COARSE_BITS)) as usize
}

/// The same of both classes: their keys, or lists of them.
pub(super) struct Classes<T> {
    pub anomalous: Vec<T>,
    pub normal: Vec<T>,
}

/// `item(index, key)` of the scores of each class, block by block in the order of the input; of the normal ones at least the
/// `wanted` most anomalous and all that tie with them; what is labelled otherwise is left out.
pub(super) fn gather<S: Score, T: Send>(
    labels: &[u8],
    scores: &[S],
    wanted: usize,
    item: impl Fn(usize, S::Key) -> T + Sync,
    context: &Context,
) -> Result<Classes<Vec<T>>, Error> {
    let bound = coarse_bound(labels, scores, wanted, context)?;
    let blocks = per_block(labels.len(), context, |range| {
        let (mut anomalous, mut normal) = (Vec::new(), reserved(&[range.len()])?);
        let mut first = range.start;
        let mut scores = &scores[range.clone()];
        for run in labels[range].chunk_by(PartialEq::eq) {
            let (head, tail) = scores.split_at(run.len());
            let indexed = (first..).zip(head);
            let of = |(index, &score): (usize, &S)| item(index, score.key());
            match run[0] {
                1 => anomalous.extend(indexed.map(of)),
                0 if bound == usize::MAX => normal.extend(indexed.map(of)),
                0 => normal.extend(indexed.filter(|&(_, &score)| coarse(score) <= bound).map(of)),
                _ => {} // left out
            }
            first += run.len();
            scores = tail;
        }
        Ok((anomalous, normal))
    })?;
    let (anomalous, normal) = blocks.into_iter().collect::<Result<_, Error>>()?;
    Ok(Classes { anomalous, normal })
}

/// The smallest coarse key at or below which `wanted` normal scores lie.
fn coarse_bound<S: Score>(labels: &[u8], scores: &[S], wanted: usize, context: &Context) -> Result<usize, Error> {
    if wanted >= labels.len() {
        return Ok(usize::MAX);
    }
    let histograms = per_block(labels.len(), context, |range| {
        let mut counts = vec![0_u32; 1 << COARSE_BITS];
        for (&label, &score) in labels[range.clone()].iter().zip(&scores[range]) {
            counts[coarse(score)] += u32::from(label == 0);
        }
        counts
    })?;
    let mut below = 0;
    let reaches = |&bound: &usize| {
        below += histograms.iter().map(|counts| counts[bound] as usize).sum::<usize>();
        below >= wanted
    };
    Ok((0..1 << COARSE_BITS).find(reaches).unwrap_or(usize::MAX))
}

/// The keys of each class in rising order.
pub(super) fn ranked<S: Score>(labels: &[u8], scores: &[S], context: &Context) -> Result<Classes<S::Key>, Error> {
    let Classes { anomalous, normal } = gather(labels, scores, usize::MAX, |_, key| key, context)?;
    Ok(Classes { anomalous: sort(anomalous, Into::into, context)?, normal: sort(normal, Into::into, context)? })
}

/// One threshold: the anomalies of one score, and where it stands among the normal scores.
#[derive(Debug, PartialEq)]
pub(super) struct Step {
    /// The key of the score.
    pub key: u64,
    /// The anomalies of this score. Its end counts those that the threshold finds.
    pub anomalies: Range<usize>,
    /// The normal scores that tie with it. Its end counts the false alarms of the threshold.
    pub normals: Range<usize>,
}

/// Every distinct anomalous score as a threshold, from the highest. Thresholds in between find nothing
/// new, so no metric needs them.
pub(super) fn steps<T: Copy, K: Copy + Into<u64>>(
    anomalous: impl AsRef<[T]>,
    normal: impl AsRef<[K]>,
    key_of: impl Fn(T) -> u64,
) -> impl Iterator<Item = Step> {
    let (mut found, mut alarms) = (0, 0);
    std::iter::from_fn(move || {
        let (anomalous, normal) = (anomalous.as_ref(), normal.as_ref());
        let key = key_of(*anomalous.get(found)?);
        let first = found;
        found += anomalous[first..].iter().take_while(|&&item| key_of(item) == key).count();
        alarms += normal[alarms..].iter().take_while(|&&normal| normal.into() < key).count();
        let above = alarms;
        alarms += normal[above..].iter().take_while(|&&normal| normal.into() == key).count();
        Some(Step { key, anomalies: first..found, normals: above..alarms })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;
    use proptest::prelude::*;

    #[test]
    fn keys_fall_as_scores_rise() {
        let scores = [f32::MIN, -1.0, -f32::MIN_POSITIVE, -1e-45, 0.0, 1e-45, 0.5, 1.0, f32::MAX];
        assert!(scores.windows(2).all(|pair| pair[0].key() > pair[1].key()));
        assert!(scores.windows(2).all(|pair| f64::from(pair[0]).key() > f64::from(pair[1]).key()));
        assert_eq!((-0.0_f32).key(), 0.0_f32.key());
        assert_eq!((-0.0_f64).key(), 0.0_f64.key());
        for score in scores {
            assert_eq!(f32::from_key(score.key().into()), f64::from(score));
            assert_eq!(f64::from_key(f64::from(score).key()), f64::from(score));
        }
    }

    #[test]
    fn a_step_counts_ties_on_both_sides() {
        let (anomalous, normal) = ([1_u32, 3, 3], [0_u32, 3, 3, 4]);
        let steps: Vec<Step> = steps(&anomalous, &normal, u64::from).collect();
        let expected =
            [Step { key: 1, anomalies: 0..1, normals: 1..1 }, Step { key: 3, anomalies: 1..3, normals: 1..3 }];
        assert_eq!(steps, expected);
    }

    proptest! {
        #[test]
        fn gather_keeps_what_is_wanted(
            samples in prop::collection::vec((0_u8..3, -4_i8..4), 1..60),
            wanted in 0_usize..60,
        ) {
            let labels: Vec<u8> = samples.iter().map(|sample| sample.0).collect();
            let scores: Vec<f32> = samples.iter().map(|sample| f32::from(sample.1)).collect();
            let of = |label| {
                let mut keys: Vec<u32> =
                    samples.iter().filter(|s| s.0 == label).map(|s| f32::from(s.1).key()).collect();
                keys.sort_unstable();
                keys
            };
            let key_of = |index: usize, key| {
                assert_eq!(scores[index].key(), key);
                key
            };
            let kept = gather(&labels, &scores, wanted, key_of, &Context::new(Level::Scalar, 2)).unwrap();
            let (mut anomalous, mut normal) = (kept.anomalous.concat(), kept.normal.concat());
            anomalous.sort_unstable();
            normal.sort_unstable();
            prop_assert_eq!(anomalous, of(1));
            let all = of(0);
            prop_assert!(normal.len() >= wanted.min(all.len()));
            // What was left out is strictly less anomalous than what was kept.
            prop_assert_eq!(&normal[..], &all[..normal.len()]);
            prop_assert!(normal.last() < all.get(normal.len()) || normal.len() == all.len());
        }
    }
}

//! Parallel radix sort of keys, in safe code.
//!
//! ```text
//!   low, high = the smallest and the largest key;  only the bits of high - low are sorted
//!   for each digit, from the least significant:
//!     every source counts its items per bucket                             in parallel
//!     carve the target into one slice per (bucket, source), bucket first
//!     every source moves its items to its own slices, in order             in parallel
//! ```
//!
//! Scores of one run lie within a few octaves, so subtracting the smallest key saves a pass or narrows the
//! digits. A digit has at most [`DIGIT_BITS`] bits: its slices' heads then stay in the second-level cache.
//! The order of equal keys is that of the input, so the result depends on neither threads nor sources.

use std::ops::Range;
use std::slice::IterMut;

use crate::context::Context;
use crate::error::Error;
use crate::matrix::zeroed;

/// Items of one unit of parallel work: some milliseconds, so that a call can be cancelled between two of them.
const BLOCK_ITEMS: usize = 1 << 19;

/// The most bits sorted in one pass: with 2048 buckets the place where each one is written next, a cache line, stays
/// in the second-level cache, and 32 bits take three passes.
const DIGIT_BITS: u32 = 11;

/// The results of `body` on the consecutive blocks of `0..len`, in order.
pub(super) fn per_block<R: Send>(
    len: usize,
    context: &Context,
    body: impl Fn(Range<usize>) -> R + Sync,
) -> Result<Vec<R>, Error> {
    let mut results: Vec<Option<R>> = (0..len.div_ceil(BLOCK_ITEMS)).map(|_| None).collect();
    let run = |(block, slot): (usize, &mut Option<R>)| {
        *slot = Some(body(block * BLOCK_ITEMS..len.min((block + 1) * BLOCK_ITEMS)));
    };
    context.for_each(results.iter_mut().enumerate(), || (), |(), item| run(item))?;
    Ok(results.into_iter().flatten().collect())
}

/// The items of all `lists` by rising key.
pub(super) fn sort<T: Copy + Default + Send + Sync>(
    lists: Vec<Vec<T>>,
    key: impl Fn(T) -> u64 + Sync,
    context: &Context,
) -> Result<Vec<T>, Error> {
    let mut extremes = vec![(u64::MAX, 0); lists.len()];
    let widen = |(low, high): (u64, u64), &item: &T| (low.min(key(item)), high.max(key(item)));
    context.for_each(
        lists.iter().zip(&mut extremes),
        || (),
        |(), (list, slot)| *slot = list.iter().fold(*slot, widen),
    )?;
    let low = extremes.iter().map(|&(low, _)| low).min().unwrap_or(0);
    let high = extremes.iter().map(|&(_, high)| high).max().unwrap_or(0);

    let bits = u64::BITS - high.saturating_sub(low).leading_zeros();
    let passes = bits.div_ceil(DIGIT_BITS).max(1);
    let width = bits.div_ceil(passes);
    let digit = |pass: u32| {
        let key = &key;
        move |item| ((key(item) - low) >> (pass * width)) as usize & ((1 << width) - 1)
    };

    let mut sorted = zeroed(&[lists.iter().map(Vec::len).sum()])?;
    let sources: Vec<&[T]> = lists.iter().map(Vec::as_slice).collect();
    scatter(&sources, &mut sorted, 1 << width, digit(0), context)?;
    drop(lists);
    let mut spare = if passes == 1 { Vec::new() } else { zeroed(&[sorted.len()])? };
    for pass in 1..passes {
        let sources: Vec<&[T]> = sorted.chunks(BLOCK_ITEMS).collect();
        scatter(&sources, &mut spare, 1 << width, digit(pass), context)?;
        std::mem::swap(&mut sorted, &mut spare);
    }
    Ok(sorted)
}

/// Moves the items of `sources` to `target`, ordered by digit, then source, then position.
fn scatter<T: Copy + Send + Sync>(
    sources: &[&[T]],
    target: &mut [T],
    buckets: usize,
    digit: impl Fn(T) -> usize + Sync,
    context: &Context,
) -> Result<(), Error> {
    let mut counts = vec![vec![0_usize; buckets]; sources.len()];
    let count = |source: &[T], counts: &mut [usize]| source.iter().for_each(|&item| counts[digit(item)] += 1);
    context.for_each(sources.iter().zip(&mut counts), || (), |(), (source, counts)| count(source, counts))?;

    let mut carved: Vec<Vec<IterMut<T>>> = sources.iter().map(|_| Vec::with_capacity(buckets)).collect();
    let mut rest = target;
    for bucket in 0..buckets {
        for (slices, counts) in carved.iter_mut().zip(&counts) {
            slices.push(rest.split_off_mut(..counts[bucket]).unwrap_or_default().iter_mut());
        }
    }

    context.for_each(
        sources.iter().zip(carved),
        || (),
        |(), (source, mut slices)| {
            for &item in *source {
                // Never exhausted: its length is the number of such items in this source.
                if let Some(slot) = slices[digit(item)].next() {
                    *slot = item;
                }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn sorted<T: Copy + Default + Send + Sync>(lists: Vec<Vec<T>>, key: fn(T) -> u64, threads: usize) -> Vec<T> {
        sort(lists, key, &Context::new(Level::Scalar, threads)).unwrap()
    }

    proptest! {
        #[test]
        fn sorts_keys_of_any_span(
            lists in prop::collection::vec(prop::collection::vec(any::<u64>(), 0..40), 0..5),
            shift in 0_u32..64,
            threads in 1_usize..4,
        ) {
            let lists: Vec<Vec<u64>> = lists.iter().map(|list| list.iter().map(|key| key >> shift).collect()).collect();
            let mut expected = lists.concat();
            expected.sort_unstable();
            prop_assert_eq!(sorted(lists, |key| key, threads), expected);
        }

        #[test]
        fn equal_keys_keep_their_order(keys in prop::collection::vec(0_u32..9, 0..200), threads in 1_usize..4) {
            let items: Vec<(u32, u32)> = keys.iter().zip(0..).map(|(&key, index)| (key, index)).collect();
            let mut expected = items.clone();
            expected.sort_by_key(|item| item.0);
            let lists = items.chunks(7).map(<[_]>::to_vec).collect();
            prop_assert_eq!(sorted(lists, |item| u64::from(item.0), threads), expected);
        }
    }

    #[test]
    fn many_blocks_give_one_order() {
        let keys: Vec<u32> = (0..2 * BLOCK_ITEMS as u32 + 5).map(|i| i.wrapping_mul(2_654_435_761)).collect();
        let mut expected = keys.clone();
        expected.sort_unstable();
        for threads in [1, 3] {
            assert_eq!(sorted(keys.chunks(BLOCK_ITEMS).map(<[_]>::to_vec).collect(), u64::from, threads), expected);
        }
    }

    #[test]
    fn blocks_cover_the_range_in_order() {
        let context = Context::new(Level::Scalar, 2);
        assert!(per_block(0, &context, |range| range).unwrap().is_empty());
        let ranges = per_block(BLOCK_ITEMS + 1, &context, |range| range).unwrap();
        assert_eq!(ranges, [0..BLOCK_ITEMS, BLOCK_ITEMS..BLOCK_ITEMS + 1]);
    }
}

//! The anomalous regions of masks: 8-connected components.
//!
//! Rows are cut into runs of anomalous pixels. A run joins every run of the row above that it overlaps or
//! touches at a corner, in a forest whose parents always come earlier. So one pass in order numbers the
//! regions: a root opens a new one, any other run takes its parent's.

use std::ops::Range;

use super::samples::{check_sizes, split};
use crate::context::Context;
use crate::error::Error;

/// The regions of a set of masks.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Regions {
    /// The region of every anomalous pixel, in the order of the pixels.
    pub of_pixel: Vec<u32>,
    /// Pixels in each region.
    pub sizes: Vec<usize>,
}

/// The number of regions in the masks of all images, which are laid out as for [`Samples::pixels`](super::Samples).
///
/// # Errors
/// [`Error::Invalid`] when an image has no pixels, or the masks are not as many values as the sizes say.
pub fn count_regions(masks: &[u8], sizes: &[[usize; 2]], context: &Context) -> Result<usize, Error> {
    check_sizes(masks, sizes)?;
    Ok(regions(masks, sizes, context)?.sizes.len())
}

/// The regions of ones in the masks, each `[height, width]` of `sizes`.
pub(super) fn regions(masks: &[u8], sizes: &[[usize; 2]], context: &Context) -> Result<Regions, Error> {
    let mut each: Vec<Vec<(usize, usize)>> = vec![Vec::new(); sizes.len()];
    let images = split(masks, sizes).zip(sizes).zip(&mut each);
    context.for_each(images, || (), |(), ((mask, &[_, width]), slot)| *slot = label_runs(mask, width))?;

    let mut all = Regions::default();
    for runs in each {
        let first = all.sizes.len();
        for (length, region) in runs {
            let region = first + region;
            all.sizes.resize(all.sizes.len().max(region + 1), 0);
            all.sizes[region] += length;
            let number = u32::try_from(region).map_err(|_| Error::TooLarge { sizes: vec![region] })?;
            all.of_pixel.extend(std::iter::repeat_n(number, length));
        }
    }
    Ok(all)
}

/// Length and region of every run of one mask; regions are numbered by their first pixel.
fn label_runs(mask: &[u8], width: usize) -> Vec<(usize, usize)> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut parents: Vec<usize> = Vec::new();
    let mut above = 0..0;
    for row in mask.chunks(width) {
        let first = runs.len();
        let mut column = 0;
        for run in row.chunk_by(PartialEq::eq) {
            let columns = column..column + run.len();
            column = columns.end;
            if run[0] != 1 {
                continue;
            }
            let own = runs.len();
            parents.push(own);
            // A run above that ends before this one starts touches no later run either.
            while above.start < above.end && runs[above.start].end < columns.start {
                above.start += 1;
            }
            for other in above.clone().take_while(|&other| runs[other].start <= columns.end) {
                join(&mut parents, own, other);
            }
            runs.push(columns);
        }
        above = first..runs.len();
    }
    number(&runs, &parents)
}

/// Makes the later of two roots a child of the earlier.
fn join(parents: &mut [usize], a: usize, b: usize) {
    let (a, b) = (root(parents, a), root(parents, b));
    parents[a.max(b)] = a.min(b);
}

/// The root of a run's tree; halves the path to it.
fn root(parents: &mut [usize], mut run: usize) -> usize {
    while parents[run] != run {
        parents[run] = parents[parents[run]];
        run = parents[run];
    }
    run
}

/// Length and region of every run.
fn number(runs: &[Range<usize>], parents: &[usize]) -> Vec<(usize, usize)> {
    let mut labelled: Vec<(usize, usize)> = Vec::with_capacity(runs.len());
    let mut count = 0;
    for (own, (run, &parent)) in runs.iter().zip(parents).enumerate() {
        let region = if parent == own { count } else { labelled[parent].1 };
        count = count.max(region + 1);
        labelled.push((run.len(), region));
    }
    labelled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn of(masks: &[u8], height: usize, width: usize) -> Regions {
        regions(masks, &vec![[height, width]; masks.len() / (height * width)], &Context::new(Level::Scalar, 2)).unwrap()
    }

    #[test]
    fn corners_touch_and_masks_do_not() {
        let mask = [
            1, 0, 0, 1, //
            0, 1, 0, 0, //
            1, 0, 0, 1,
        ];
        let two = [mask, mask].concat();
        let found = of(&two, 3, 4);
        assert_eq!(found.of_pixel, [0, 1, 0, 0, 2, 3, 4, 3, 3, 5]);
        assert_eq!(found.sizes, [3, 1, 1, 3, 1, 1]);
    }

    #[test]
    fn branches_that_meet_later_are_one_region() {
        let comb = [
            1, 0, 1, 0, 1, //
            1, 0, 1, 0, 1, //
            1, 1, 1, 1, 1,
        ];
        assert_eq!(of(&comb, 3, 5).sizes, [11]);
        assert_eq!(of(&[0; 6], 2, 3), Regions::default());
        assert_eq!(of(&[1; 6], 2, 3).sizes, [6]);
    }

    #[test]
    fn images_of_several_sizes_keep_their_rows() {
        // The same seven values: a column of three, two corners that touch, and a pixel beside one that is left out.
        let masks = [1, 1, 1, 0, 1, 1, 0, 1, 2, 1];
        let context = Context::new(Level::Scalar, 2);
        let found = regions(&masks, &[[3, 1], [2, 2], [1, 3]], &context).unwrap();
        assert_eq!(found.of_pixel, [0, 0, 0, 1, 1, 2, 3]);
        assert_eq!(found.sizes, [3, 2, 1, 1]);
        assert_eq!(count_regions(&masks, &[[3, 1], [2, 2], [1, 3]], &context), Ok(4));
        assert_eq!(count_regions(&masks, &[[10, 1]], &context), Ok(4));
        assert_eq!(count_regions(&[], &[], &context), Ok(0));
        assert!(count_regions(&masks, &[[3, 3]], &context).is_err());
    }

    proptest! {
        #[test]
        fn equal_to_the_flood_fill(width in 1_usize..9, pixels in prop::collection::vec(0_u8..2, 1..120)) {
            let height = pixels.len().div_ceil(width);
            let mut mask = pixels;
            mask.resize(height * width, 0);
            let found = of(&mask, height, width);
            let expected: Vec<u32> = naive::regions(&mask, width).into_iter().flatten().collect();
            prop_assert_eq!(&found.of_pixel, &expected);
            for (region, &size) in found.sizes.iter().enumerate() {
                prop_assert_eq!(size, expected.iter().filter(|&&r| r as usize == region).count());
            }
        }
    }
}

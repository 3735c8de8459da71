//! Maps in the pixels of their images: the resize and the crop before the backbone, undone.
//!
//! The image of h rows was resized to h' rows, of which the crop kept H from row `top` on: the map's. The centre of
//! row y of the image lies in the map at
//!
//! ```text
//! s = (y + ½)·h'/h − ½ − top
//! ```
//!
//! and at what columns is found alike. The value there is bilinear, as `align_corners=False` has it: within half a
//! pixel of the map's edge that of the edge, and farther outside the crop had cut the pixel off. Whether a pixel was
//! seen and between which two rows it lies is decided in integers; what follows is plain float32 arithmetic, which
//! memory keeps waiting, so there is nothing for a SIMD level to do.
//!
//! ```text
//! per call: each row of the map spread over the image's columns
//! for some rows of the image, dealt to the threads: each from the two spread rows that it lies between
//! ```

use crate::context::Context;
use crate::error::Error;
use crate::geometry::Geometry;
use crate::matrix::{check_len, zeroed};
use crate::resample::Between;

/// Pixels of an item: some tens of microseconds of work, so that dealing it to a thread pays.
const ITEM_PIXELS: usize = 1 << 16;

/// Writes the map's value at each pixel of its image, `unseen` where the crop had cut the pixel off. What `out` held
/// is not read.
///
/// # Errors
/// [`Error::Invalid`] when a size is 0, the crop does not lie within the resized image or a length does not fit;
/// [`Error::Cancelled`]. `out` then holds anything.
///
/// ```
/// use patchcore_kernels::undo_resize::undo_resize;
/// use patchcore_kernels::{context::Context, geometry::Geometry, simd::Level};
///
/// // One row of eight columns was halved, and its middle kept.
/// let geometry = Geometry { image: [1, 8], resized: [1, 4], offset: [0, 1], crop: [1, 2] };
/// let mut out = [0.0; 8];
/// undo_resize(&Context::new(Level::detect(), 1), &[4.0, 8.0], geometry, 0.0, &mut out)?;
/// assert_eq!(out, [0.0, 0.0, 4.0, 5.0, 7.0, 8.0, 0.0, 0.0]);
/// # Ok::<(), patchcore_kernels::error::Error>(())
/// ```
pub fn undo_resize(
    context: &Context<'_>,
    map: &[f32],
    geometry: Geometry,
    unseen: f32,
    out: &mut [f32],
) -> Result<(), Error> {
    geometry.check()?;
    check_len("map", map.len(), &geometry.crop)?;
    check_len("out", out.len(), &geometry.image)?;
    let Geometry { image: [_, width], crop: [rows, columns], .. } = geometry;
    let (down, across) = (positions(geometry, 0), positions(geometry, 1));

    let mut spread = zeroed(&[rows, width])?;
    let lines = map.chunks_exact(columns).zip(spread.chunks_exact_mut(width));
    context.for_each(
        lines,
        || (),
        |(), (line, pixels)| {
            for (pixel, at) in pixels.iter_mut().zip(&across) {
                *pixel = at.map_or(unseen, |at| mix(line[at.low], line[at.high], at.weight as f32));
            }
        },
    )?;

    let count = (ITEM_PIXELS / width).max(1);
    let items: Vec<_> = down.chunks(count).zip(out.chunks_mut(count * width)).collect();
    context.for_each(
        items.into_iter(),
        || (),
        |(), (down, out)| {
            for (at, out) in down.iter().zip(out.chunks_exact_mut(width)) {
                let Some(at) = at else {
                    out.fill(unseen);
                    continue;
                };
                let [low, high] = [at.low, at.high].map(|row| &spread[row * width..][..width]);
                let weight = at.weight as f32;
                for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
                    *out = mix(low, high, weight);
                }
            }
        },
    )
}

/// Where each row, or column, of the image lies in the map; None where that has nothing.
fn positions(geometry: Geometry, axis: usize) -> Vec<Option<Between>> {
    let [image, resized, offset, crop] =
        [geometry.image, geometry.resized, geometry.offset, geometry.crop].map(|size| size[axis] as i128);
    let period = 2 * image; // s is a number of such parts
    let position = |y: i128| {
        let parts = (2 * y + 1) * resized - (2 * offset + 1) * image;
        let seen = -image <= parts && parts < (2 * crop - 1) * image;
        seen.then(|| {
            let parts = parts.max(0);
            let (low, rest) = ((parts / period) as usize, parts % period);
            Between { low, high: (low + 1).min(crop as usize - 1), weight: rest as f64 / period as f64 }
        })
    };
    (0..image).map(position).collect()
}

/// Between two values: never outside them, whatever the rounding, so that no pixel falls below the smallest.
#[inline(always)]
fn mix(low: f32, high: f32, weight: f32) -> f32 {
    (low + (high - low) * weight).max(low.min(high)).min(low.max(high))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn undone(threads: usize, map: &[f32], geometry: Geometry) -> Result<Vec<f32>, Error> {
        let mut out = vec![f32::NAN; geometry.image.iter().product()];
        undo_resize(&Context::new(Level::Scalar, threads), map, geometry, -7.0, &mut out)?;
        Ok(out)
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(
            image in prop::array::uniform2(1_usize..70), resized in prop::array::uniform2(1_usize..50),
            cut in prop::array::uniform2(0.0..1.0_f64), values in prop::collection::vec(-3.0_f32..50.0, 2500),
        ) {
            let crop = [0, 1].map(|axis| 1 + ((resized[axis] - 1) as f64 * cut[axis]) as usize);
            let offset = [0, 1].map(|axis| (resized[axis] - crop[axis]) / 2);
            let geometry = Geometry { image, resized, offset, crop };
            let map = &values[..crop[0] * crop[1]];
            let found = undone(1, map, geometry).unwrap();
            let (low, high) = map.iter().fold((f32::MAX, f32::MIN), |(low, high), &v| (low.min(v), high.max(v)));
            for (at, (&found, expected)) in found.iter().zip(naive::undo_resize(map, geometry)).enumerate() {
                match expected {
                    None => prop_assert_eq!(found, -7.0, "{:?} [{}]", geometry, at),
                    Some(expected) => {
                        prop_assert!((f64::from(found) - expected).abs() < 2e-5, "{geometry:?} [{at}]");
                        prop_assert!((low..=high).contains(&found), "{found}");
                    }
                }
            }
            prop_assert_eq!(undone(3, map, geometry).unwrap(), found);
        }
    }

    #[test]
    fn what_was_neither_resized_nor_cropped_stays() {
        let map: Vec<f32> = (0..35).map(|i| (i * 17 % 23) as f32).collect();
        let geometry = Geometry { image: [5, 7], resized: [5, 7], offset: [0, 0], crop: [5, 7] };
        assert_eq!(undone(2, &map, geometry), Ok(map));
    }

    #[test]
    fn a_crop_alone_is_laid_where_it_was_cut_out() {
        let geometry = Geometry { image: [4, 3], resized: [4, 3], offset: [2, 1], crop: [2, 1] };
        let expected = [[-7.0; 3], [-7.0; 3], [-7.0, 1.0, -7.0], [-7.0, 2.0, -7.0]].concat();
        assert_eq!(undone(1, &[1.0, 2.0], geometry), Ok(expected));
    }

    #[test]
    fn large_images_are_the_same_for_any_number_of_threads() {
        let geometry = Geometry { image: [600, 700], resized: [256, 299], offset: [16, 37], crop: [224, 224] };
        let map: Vec<f32> = (0..224 * 224).map(|i| (i * 7919 % 1009) as f32).collect();
        let expected = undone(1, &map, geometry).unwrap();
        assert!(expected.contains(&-7.0) && expected.iter().any(|&value| value > 1000.0));
        for threads in [2, 5] {
            assert_eq!(undone(threads, &map, geometry).unwrap(), expected);
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let good = Geometry { image: [4, 4], resized: [2, 2], offset: [0, 0], crop: [2, 2] };
        let message = |map: &[f32], geometry| undone(1, map, geometry).unwrap_err().to_string();
        assert_eq!(message(&[0.0; 3], good), "map must be 4 values; got 3");
        assert!(message(&[0.0; 4], Geometry { image: [0, 4], ..good }).starts_with("image must be at least one row"));
        assert!(message(&[0.0; 4], Geometry { resized: [2, 0], ..good }).starts_with("resized must be"));
        assert!(message(&[], Geometry { crop: [0, 2], ..good }).starts_with("crop must be at least"));
        let outside = message(&[0.0; 4], Geometry { offset: [0, 1], ..good });
        assert_eq!(outside, "crop must be a part of the resized image, [2, 2]; got [2, 2] from [0, 1]");
        assert!(message(&[0.0; 4], Geometry { offset: [usize::MAX, 0], ..good }).starts_with("crop must be a part"));
        let context = Context::new(Level::Scalar, 1);
        let short = undo_resize(&context, &[0.0; 4], good, 0.0, &mut [0.0; 15]).unwrap_err();
        assert_eq!(short.to_string(), "out must be 16 values; got 15");
    }
}

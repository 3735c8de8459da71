//! The resize against its definition in plain loops, at every level.

use super::*;
use crate::random::splitmix64;
use crate::simd::Level;
use proptest::prelude::*;

/// The slow twin of one pass: every position of the result out of every position of the source.
fn pass(values: &[u8], size: [usize; 2], channels: usize, axis: usize, to: usize) -> Vec<u8> {
    let mut resized = size;
    resized[axis] = to;
    let mut out = Vec::new();
    let scale = size[axis] as f64 / to as f64;
    for row in 0..resized[0] {
        for column in 0..resized[1] {
            let center = ([row, column][axis] as f64 + 0.5) * scale;
            let height = |x: usize| (1.0 - ((x as f64 - center + 0.5) * (1.0 / scale.max(1.0))).abs()).max(0.0);
            let sum: f64 = (0..size[axis]).map(height).sum();
            for channel in 0..channels {
                let mut total = 1_i64 << 21;
                for x in 0..size[axis] {
                    let [y, x] = if axis == 0 { [x, column] } else { [row, x] };
                    let weight = (0.5 + height([y, x][axis]) / sum * 4_194_304.0).floor() as i64;
                    total += i64::from(values[(y * size[1] + x) * channels + channel]) * weight;
                }
                out.push((total >> 22).min(255) as u8);
            }
        }
    }
    out
}

/// The slow twin: both passes of the whole image, and then the crop.
fn twin(pixels: &[u8], channels: usize, Geometry { image, resized, offset, crop }: Geometry) -> Vec<u8> {
    let (less_high, less_wide) = (image[0] as i64 - resized[0] as i64, image[1] as i64 - resized[1] as i64);
    let whole = if less_high > 0 && 2 * less_wide < less_high {
        pass(&pass(pixels, image, channels, 0, resized[0]), [resized[0], image[1]], channels, 1, resized[1])
    } else {
        pass(&pass(pixels, image, channels, 1, resized[1]), [image[0], resized[1]], channels, 0, resized[0])
    };
    let rows = whole.chunks_exact(resized[1] * channels).skip(offset[0]).take(crop[0]);
    rows.flat_map(|row| &row[offset[1] * channels..][..crop[1] * channels]).copied().collect()
}

fn image(len: usize, seed: u64) -> Vec<u8> {
    (0..len as u64).map(|i| (splitmix64(seed ^ (i << 20)) >> 56) as u8).collect()
}

fn resized_at(level: Level, pixels: &[u8], channels: usize, geometry: Geometry) -> Result<Vec<u8>, Error> {
    let mut out = vec![77; geometry.crop[0] * geometry.crop[1] * channels];
    resize(&Context::new(level, 1), pixels, channels, geometry, &mut out)?;
    Ok(out)
}

fn whole(image: [usize; 2], resized: [usize; 2]) -> Geometry {
    Geometry { image, resized, offset: [0, 0], crop: resized }
}

fn agrees(pixels: &[u8], channels: usize, geometry: Geometry) {
    let expected = twin(pixels, channels, geometry);
    for level in Level::available() {
        assert_eq!(resized_at(level, pixels, channels, geometry).unwrap(), expected, "{geometry:?} {channels} {level}");
    }
}

proptest! {
    #[test]
    fn every_level_agrees_with_the_definition(
        sides in prop::array::uniform2(1_usize..60), resized in prop::array::uniform2(1_usize..60),
        cut in prop::array::uniform4(0.0..1.0_f64), channels in 1_usize..5, seed in any::<u64>(),
    ) {
        let crop = [0, 1].map(|axis| 1 + ((resized[axis] - 1) as f64 * cut[axis]) as usize);
        let offset = [0, 1].map(|axis| ((resized[axis] - crop[axis] + 1) as f64 * cut[axis + 2]) as usize);
        let pixels = image(sides[0] * sides[1] * channels, seed);
        agrees(&pixels, channels, Geometry { image: sides, resized, offset, crop });
        agrees(&pixels, channels, whole(sides, resized));
    }
}

#[test]
fn long_rows_and_sides_of_one_pixel_agree_with_the_definition() {
    for (sides, resized) in [
        ([3, 700], [2, 90]),
        ([700, 3], [90, 2]),
        ([1, 1], [33, 50]),
        ([1, 400], [1, 1]),
        ([400, 1], [1, 1]),
        ([35, 20], [17, 37]),
        ([17, 37], [17, 80]),
        ([17, 37], [80, 37]),
    ] {
        for channels in [1, 3, 4] {
            agrees(&image(sides[0] * sides[1] * channels, 5), channels, whole(sides, resized));
        }
    }
}

#[test]
fn an_image_of_the_same_size_stays_and_a_crop_of_it_is_cut_out() {
    let pixels = image(40 * 30 * 3, 9);
    for level in Level::available() {
        assert_eq!(resized_at(level, &pixels, 3, whole([40, 30], [40, 30])).unwrap(), pixels);
    }
    agrees(&pixels, 3, Geometry { offset: [7, 5], crop: [20, 21], ..whole([40, 30], [40, 30]) });
}

#[test]
fn one_colour_stays_whatever_the_size() {
    for level in Level::available() {
        for value in [0, 1, 127, 128, 254, 255] {
            let out = resized_at(level, &vec![value; 50 * 41 * 3], 3, whole([50, 41], [23, 64])).unwrap();
            assert!(out.iter().all(|&found| found == value), "{level} {value}");
        }
    }
}

#[test]
fn rows_come_first_where_many_are_left_out_and_few_columns() {
    assert!(rows_first(whole([373, 248], [224, 224])));
    assert!(rows_first(whole([100, 100], [99, 300])));
    for geometry in [
        whole([300, 300], [224, 224]),
        whole([300, 262], [224, 224]), // as many as twice the columns
        whole([224, 200], [224, 224]),
        whole([100, 500], [300, 100]),
    ] {
        assert!(!rows_first(geometry), "{geometry:?}");
    }
}

#[test]
fn the_order_of_the_passes_shows() {
    let (pixels, geometry) = (image(90 * 20, 3), whole([90, 20], [30, 19]));
    let rows_first = pass(&pass(&pixels, [90, 20], 1, 0, 30), [30, 20], 1, 1, 19);
    let columns_first = pass(&pass(&pixels, [90, 20], 1, 1, 19), [90, 19], 1, 0, 30);
    assert_ne!(rows_first, columns_first);
    assert_eq!(resized_at(Level::detect(), &pixels, 1, geometry).unwrap(), rows_first);
}

#[test]
fn a_watched_call_can_be_stopped() {
    let stop = |_: u64, _: u64| std::ops::ControlFlow::Break(());
    let context = Context::new(Level::Scalar, 1).observed(&stop);
    std::thread::sleep(crate::context::POLL);
    for geometry in [whole([90, 20], [30, 19]), whole([20, 90], [19, 30])] {
        let mut out = vec![0; geometry.crop[0] * geometry.crop[1]];
        assert_eq!(resize(&context, &[0; 1800], 1, geometry, &mut out), Err(Error::Cancelled));
        std::thread::sleep(crate::context::POLL);
    }
}

#[test]
fn wrong_arguments_are_named() {
    let good = whole([4, 4], [2, 2]);
    let message = |len: usize, channels: usize, geometry: Geometry, out: usize| {
        let context = Context::new(Level::Scalar, 1);
        resize(&context, &vec![0; len], channels, geometry, &mut vec![0; out]).unwrap_err().to_string()
    };
    assert_eq!(message(47, 3, good, 12), "pixels must be 48 values; got 47");
    assert_eq!(message(48, 3, good, 11), "out must be 12 values; got 11");
    assert_eq!(message(0, 0, good, 0), "channels must be at least 1; got 0");
    assert!(message(0, 3, whole([0, 4], [2, 2]), 12).starts_with("image must be at least one row and one column"));
    assert!(message(48, 3, whole([4, 4], [2, 0]), 0).starts_with("resized must be at least one row"));
    let outside = message(48, 3, Geometry { offset: [1, 0], ..good }, 12);
    assert_eq!(outside, "crop must be a part of the resized image, [2, 2]; got [2, 2] from [1, 0]");
}

use super::*;
use crate::context::Context;
use crate::naive;
use crate::simd::Level;
use proptest::prelude::*;
use std::ops::ControlFlow;

/// Sums and sums of products.
type Sums = (Vec<f64>, Vec<f64>);

fn zeros(positions: usize, d: usize) -> Sums {
    (vec![0.0; positions * d], vec![0.0; positions * d * (d + 1) / 2])
}

fn assert_same(found: &[f64], expected: &[f64], what: &str) {
    let bits = |values: &[f64]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(found), bits(expected), "{what}: {found:?} {expected:?}");
}

/// Asserts that all three kernels give the bits of their twins, at every level and number of threads, whatever the
/// batches. The first image is the shift.
fn agree(values: &[f32], images: usize, positions: usize, d: usize, batch: usize) {
    let features = Matrix::finite("features", values, images * positions, d).unwrap();
    let shift = features.slice(0, positions);
    let scale = if images > 1 { 1.0 / (images - 1) as f64 } else { 0.0 };
    let options = Options { images, scale, epsilon: 0.01 };
    let (mut sums, mut packed) = zeros(positions, d);
    naive::accumulate(features, shift, &mut sums, &mut packed);
    let triangle = d * (d + 1) / 2;
    let (mut mean, mut factor) = (Vec::new(), Vec::new());
    for position in 0..positions {
        let (sums, packed) = (&sums[position * d..][..d], &packed[position * triangle..][..triangle]);
        let (own_mean, own_factor) = naive::factorize(shift.row(position), sums, packed, options).unwrap();
        mean.extend(own_mean);
        factor.extend(own_factor);
    }
    let distance = |row: usize| {
        let position = row % positions;
        naive::mahalanobis(features.row(row), &mean[position * d..][..d], &factor[position * triangle..][..triangle])
    };
    let distances: Vec<f64> = (0..images * positions).map(distance).collect();
    for level in Level::available() {
        for threads in [1, 2, 5] {
            let context = Context::new(level, threads);
            let what = format!("{level}, {threads} threads, {images} images, {positions} positions, d = {d}");
            let (mut found_sums, mut found_packed) = zeros(positions, d);
            for first in (0..images).step_by(batch) {
                let rows = features.slice(first * positions, batch.min(images - first) * positions);
                accumulate(&context, rows, shift, &mut found_sums, &mut found_packed).unwrap();
            }
            assert_same(&found_sums, &sums, &what);
            assert_same(&found_packed, &packed, &what);
            factorize(&context, shift, &mut found_sums, &mut found_packed, options).unwrap();
            assert_same(&found_sums, &mean, &what);
            assert_same(&found_packed, &factor, &what);
            let all = mahalanobis(&context, features, &mean, &factor).unwrap();
            assert_same(&all, &distances, &what);
            let alone = mahalanobis(&context, features.slice(0, positions), &mean, &factor).unwrap();
            assert_same(&alone, &distances[..positions], &what);
        }
    }
}

proptest! {
    #[test]
    fn kernels_give_the_bits_of_their_definitions(
        images in 1_usize..20, positions in 1_usize..5, d in 1_usize..41, batch in 1_usize..5,
        values in prop::collection::vec(-3.0_f32..5.0, 19 * 4 * 40),
    ) {
        agree(&values[..images * positions * d], images, positions, d, batch);
    }
}

/// Values without a pattern that a matrix could notice.
fn scattered(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * i + 7 * i) % 1009) as f32 / 101.0 - 5.0).collect()
}

#[test]
fn many_channels_and_images_give_the_bits_of_the_definitions() {
    // More images, and more columns, than a sum takes at a time; more images than lanes; more positions than an item.
    agree(&scattered(70 * 2 * 50), 70, 2, 50, 70);
    agree(&scattered(3 * 2 * 150), 3, 2, 150, 2);
    agree(&scattered(35 * 3 * 17), 35, 3, 17, 33);
    agree(&scattered(2 * 9000 * 2), 2, 9000, 2, 1);
}

#[test]
fn factors_are_those_of_the_covariance() {
    let (images, d) = (30, 23);
    let values = scattered(images * d);
    let features = Matrix::finite("features", &values, images, d).unwrap();
    let (mut sums, mut packed) = zeros(1, d);
    let context = Context::new(Level::detect(), 2);
    accumulate(&context, features, features.slice(7, 1), &mut sums, &mut packed).unwrap();
    let options = Options { images, scale: 1.0 / 29.0, epsilon: 0.5 };
    factorize(&context, features.slice(7, 1), &mut sums, &mut packed, options).unwrap();
    let column = |j: usize| features.data()[j..].iter().step_by(d).map(|&x| f64::from(x));
    let means: Vec<f64> = (0..d).map(|j| column(j).sum::<f64>() / 30.0).collect();
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    (0..d).for_each(|j| near(sums[j], means[j]));
    let element = |i: usize, j: usize| packed[packed::origin(d, j) + i];
    for j in 0..d {
        for i in j..d {
            let product = (0..=j).map(|k| element(i, k) * element(j, k)).sum::<f64>();
            let centred = column(i).zip(column(j)).map(|(x, y)| (x - means[i]) * (y - means[j]));
            near(product, centred.sum::<f64>() / 29.0 + if i == j { 0.5 } else { 0.0 });
        }
    }
}

#[test]
fn one_image_leaves_only_epsilon() {
    let values = [3.0, -1.0];
    let features = Matrix::finite("features", &values, 1, 2).unwrap();
    let (mut sums, mut packed) = zeros(1, 2);
    let context = Context::new(Level::detect(), 1);
    accumulate(&context, features, features, &mut sums, &mut packed).unwrap();
    factorize(&context, features, &mut sums, &mut packed, Options { images: 1, scale: 0.0, epsilon: 0.25 }).unwrap();
    assert_eq!((sums.as_slice(), packed.as_slice()), ([3.0, -1.0].as_slice(), [0.5, 0.0, 0.5].as_slice()));
    let other = [3.0, 0.0];
    let other = Matrix::finite("features", &other, 1, 2).unwrap();
    assert_eq!(mahalanobis(&context, other, &sums, &packed).unwrap(), [2.0]);
}

#[test]
fn a_large_offset_does_not_cancel() {
    // The variance of these is 1; sums of their squares would have lost it.
    let values = [1e8_f32 - 8.0, 1e8, 1e8 + 8.0];
    let features = Matrix::finite("features", &values, 3, 1).unwrap();
    let (mut sums, mut packed) = zeros(1, 1);
    let context = Context::new(Level::detect(), 1);
    let shift = features.slice(0, 1);
    accumulate(&context, features, shift, &mut sums, &mut packed).unwrap();
    factorize(&context, shift, &mut sums, &mut packed, Options { images: 3, scale: 0.5, epsilon: 0.0 }).unwrap();
    assert_eq!((sums[0], packed[0]), (1e8, 8.0));
}

#[test]
fn the_first_position_that_is_not_positive_definite_is_named() {
    let (images, positions, d) = (3, 4000, 3);
    let mut values = scattered(images * positions * d);
    // From position 2500 on, channel 1 is a multiple of channel 0.
    for row in values.chunks_exact_mut(positions * d) {
        for row in row[2500 * d..].chunks_exact_mut(d) {
            row[1] = 2.0 * row[0];
        }
    }
    let features = Matrix::finite("features", &values, images * positions, d).unwrap();
    let shift = features.slice(0, positions);
    let options = Options { images, scale: 0.5, epsilon: 0.0 };
    for threads in [1, 3] {
        let context = Context::new(Level::detect(), threads);
        let (mut sums, mut packed) = zeros(positions, d);
        accumulate(&context, features, shift, &mut sums, &mut packed).unwrap();
        // Three images span two channels; the third of a position is not positive definite either, but later.
        for packed in packed.chunks_exact_mut(6) {
            packed[5] += 1e6;
        }
        let error = factorize(&context, shift, &mut sums, &mut packed, options).unwrap_err().to_string();
        let expected = "epsilon must be large enough to make every covariance positive definite, beside features of \
                        this size; got 0e0, with which that of position 2500 is not: the pivot of channel 1 is ";
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn a_call_can_be_stopped() {
    let stop = |_: u64, _: u64| ControlFlow::Break(());
    let context = Context::new(Level::Scalar, 2).observed(&stop);
    std::thread::sleep(crate::context::POLL);
    let values = scattered(2 * 300 * 60);
    let features = Matrix::finite("features", &values, 2 * 300, 60).unwrap();
    let shift = features.slice(0, 300);
    let (mut sums, mut packed) = zeros(300, 60);
    packed.fill(1.0);
    let options = Options { images: 2, scale: 1.0, epsilon: 100.0 };
    assert_eq!(factorize(&context, shift, &mut sums, &mut packed, options), Err(Error::Cancelled));
}

#[test]
fn sizes_that_do_not_fit_are_named() {
    let context = Context::new(Level::detect(), 1);
    let values = [1.0; 12];
    let matrix = |rows, cols| Matrix::new("features", &values[..rows * cols], rows, cols).unwrap();
    let add = |features, shift, sums: usize, packed: usize| {
        accumulate(&context, features, shift, &mut vec![0.0; sums], &mut vec![0.0; packed]).unwrap_err().to_string()
    };
    assert!(add(matrix(4, 2), matrix(0, 2), 0, 0).starts_with("sums is empty"));
    assert_eq!(add(matrix(4, 2), matrix(2, 2), 3, 6), "sums must be 2 x 2 values; got 3");
    assert_eq!(add(matrix(4, 2), matrix(2, 2), 4, 5), "packed must be 2 x 3 values; got 5");
    let rows = "features must be a multiple of 2 rows of 2 values; got ";
    assert_eq!(add(matrix(3, 2), matrix(2, 2), 4, 6), format!("{rows}3 rows of 2"));
    assert_eq!(add(matrix(2, 3), matrix(2, 2), 4, 6), format!("{rows}2 rows of 3"));
    let options = Options { images: 0, scale: 1.0, epsilon: 1.0 };
    let error = factorize(&context, matrix(1, 1), &mut [0.0], &mut [0.0], options).unwrap_err().to_string();
    assert!(error.starts_with("images is empty"), "{error}");
    let error = mahalanobis(&context, matrix(2, 2), &[0.0; 3], &[0.0; 3]).unwrap_err().to_string();
    assert_eq!(error, "mean must be 1 x 2 values; got 3");
    assert_eq!(mahalanobis(&context, matrix(0, 2), &[0.0; 4], &[1.0; 6]), Ok(Vec::new()));
}

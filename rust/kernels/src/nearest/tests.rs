//! Searches of a bank against the naive one, and what a bank refuses.

use super::*;
use crate::context::POLL;
use crate::filter::Encoder;
use crate::naive;
use crate::random::{features, splitmix64, uniform};
use proptest::prelude::*;
use std::ops::ControlFlow;

/// A bank for each way to search it, with the widths of its codes: none, all, or one.
pub(super) fn banks(
    level: Level,
    rows: Matrix<'_>,
    ends: &[usize],
    storage: Storage,
) -> impl Iterator<Item = (Vec<usize>, MemoryBank)> {
    let whole = Encoder::whole_width(rows.cols());
    [vec![], vec![16, 32, 64, whole], vec![32], vec![whole]].into_iter().map(move |mut widths| {
        let context = Context::new(level, 1);
        widths.dedup();
        let plan = |rows: Matrix<'_>, ends: &[usize]| {
            if widths.is_empty() { Ok(None) } else { Cascade::new(&context, rows, ends, &widths) }
        };
        let bank = MemoryBank::planned(&context, rows, ends.to_vec(), storage, plan).unwrap();
        (widths, bank)
    })
}

/// Every level, thread count and width of codes (none among them) gives the naive answer, for the k nearest rows and
/// for those within the radius of some of them.
fn check(queries: Matrix<'_>, rows: Matrix<'_>, k: usize) {
    check_stored(queries, rows, k, Storage::Float32);
}

/// The same; the rows are exact as they are stored.
fn check_stored(queries: Matrix<'_>, rows: Matrix<'_>, k: usize, storage: Storage) {
    let expected = naive::nearest(queries, rows, k, Distance::Euclidean);
    let squared = naive::nearest(queries, rows, k, Distance::Squared);
    // The distance of a row, in f64: such a row lies within.
    let radius =
        if queries.rows() == 0 { 1.0 } else { naive::squared_distance(queries.row(0), rows.row(k / 2)).sqrt() };
    let within = naive::within(queries, rows, radius, Distance::Euclidean);
    for level in Level::available() {
        for (widths, bank) in banks(level, rows, &[rows.rows()], storage) {
            for threads in [1, 2, 7] {
                let context = Context::new(level, threads);
                let found = bank.kneighbors(&context, queries, k, Distance::Euclidean).unwrap();
                assert_eq!(found, expected, "{level}, {threads} threads, {widths:?}");
                let found = bank.kneighbors(&context, queries, k, Distance::Squared).unwrap();
                assert_eq!(found, squared, "{level}, {threads} threads, {widths:?}");
                let found = bank.radius_neighbors(&context, queries, radius, Distance::Euclidean).unwrap();
                assert_eq!(found, within, "{level}, {threads} threads, {widths:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn equals_the_naive_search(
        n in 1_usize..150, m in 0_usize..20, cols in 1_usize..40, k in 1_usize..40,
        values in prop::collection::vec(-2.0_f32..2.0, 170 * 40),
    ) {
        let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
        let queries = Matrix::new("queries", &values[n * cols..][..m * cols], m, cols).unwrap();
        check(queries, rows, k.min(n));
    }

    /// Rows that lie in few directions, and queries that do not: some easy, some outside the rows' subspace, some
    /// far beyond the range of the codes, in one call.
    #[test]
    fn hard_queries_are_answered_like_easy_ones(
        n in 100_usize..200, cols in 70_usize..100, k in prop_oneof![Just(1_usize), 2_usize..40],
        far in prop_oneof![Just(1.0_f32), 1.0_f32..1e4], seed in any::<u64>(), half in any::<bool>(),
    ) {
        let uniform = |i: usize| uniform(seed ^ i as u64);
        let directions: Vec<f32> = (0..4 * cols).map(uniform).collect();
        let mut values: Vec<f32> = Vec::new();
        for row in 0..n + 24 {
            let shares: [f32; 4] = std::array::from_fn(|i| uniform(1_000_000 + 4 * row + i));
            let outside = match row.saturating_sub(n) % 3 { 1 if row > n => 1.0, 2 if row > n => far, _ => 0.01 };
            values.extend((0..cols).map(|column| {
                let inside: f32 = shares.iter().zip(0..).map(|(s, i)| s * directions[i * cols + column]).sum();
                inside + outside * uniform(2_000_000 + row * cols + column)
            }));
        }
        if half {
            values[..n * cols].iter_mut().for_each(|value| *value = Half::new(*value).to_f32());
        }
        let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
        let queries = Matrix::new("queries", &values[n * cols..], 24, cols).unwrap();
        check_stored(queries, rows, k, if half { Storage::Float16 } else { Storage::Float32 });
    }

    #[test]
    fn ties_go_to_the_lowest_index(
        n in 2_usize..60, cols in 1_usize..4, k in 1_usize..9,
        values in prop::collection::vec(0_i8..3, 70 * 4),
    ) {
        let values: Vec<f32> = values.into_iter().map(f32::from).collect();
        let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
        let queries = Matrix::new("queries", &values[n * cols..][..9 * cols], 9, cols).unwrap();
        check(queries, rows, k.min(n));
    }
}

#[test]
fn rows_stored_in_halves_are_searched_as_they_are_stored() {
    let values: Vec<f32> = (0..3000 * 20).map(|i: u32| (splitmix64(u64::from(i)) >> 44) as f32 * 0.001).collect();
    let rounded: Vec<f32> = values.iter().map(|&value| Half::new(value).to_f32()).collect();
    let queries = Matrix::new("queries", &values[..400 * 20], 400, 20).unwrap();
    let expected =
        naive::nearest(queries, Matrix::new("features", &rounded, 3000, 20).unwrap(), 3, Distance::Euclidean);
    let rows = Matrix::new("features", &values, 3000, 20).unwrap();
    for level in Level::available() {
        // So many threads that a block of queries is prepared in three pieces.
        let context = Context::new(level, 19);
        for full in [true, false] {
            let plan = |rows: Matrix<'_>, ends: &[usize]| {
                if full { Cascade::new(&context, rows, ends, &[16, 64]) } else { Ok(None) }
            };
            let bank = MemoryBank::planned(&context, rows, vec![3000], Storage::Float16, plan).unwrap();
            assert_eq!(bank.features(&context).unwrap(), rounded);
            let found = bank.kneighbors(&context, queries, 3, Distance::Euclidean).unwrap();
            assert_eq!(found, expected, "{level}, codes {full}");
        }
    }
    let large = Matrix::new("features", &[1.0, -7e4], 1, 2).unwrap();
    let error = MemoryBank::new(&Context::new(Level::Scalar, 1), large, Storage::Float16).unwrap_err();
    assert!(error.to_string().starts_with("features must be below 65520"), "{error}");
}

#[test]
fn a_row_of_the_bank_is_its_own_nearest() {
    let values: Vec<f32> = (0..300_u16).map(|i| (f32::from(i) * 0.37).sin() + 1e6).collect();
    let rows = Matrix::new("features", &values, 100, 3).unwrap();
    let found = MemoryBank::new(&Context::new(Level::detect(), 1), rows, Storage::Float32)
        .unwrap()
        .kneighbors(&Context::new(Level::detect(), 2), rows, 1, Distance::Euclidean)
        .unwrap();
    assert!(found.distances.iter().all(|&distance| distance == 0.0));
}

#[test]
fn a_radius_takes_in_what_lies_on_it_and_nothing_beyond() {
    let values: Vec<f32> = (0..1000_u16).map(f32::from).collect();
    let rows = Matrix::new("features", &values, 1000, 1).unwrap();
    let queries = Matrix::new("queries", &[500.0, 2000.0, 0.0], 3, 1).unwrap();
    for level in Level::available() {
        let context = Context::new(level, 2);
        let plan = |rows: Matrix<'_>, ends: &[usize]| Cascade::new(&context, rows, ends, &[16]);
        let bank = MemoryBank::planned(&context, rows, vec![1000], Storage::Float32, plan).unwrap();
        for (distance, radius) in [(Distance::Euclidean, 2.0), (Distance::Squared, 4.0)] {
            let found = bank.radius_neighbors(&context, queries, radius, distance).unwrap();
            assert_eq!(found.counts, [5, 0, 3]);
            assert_eq!(found.indices, [500, 499, 501, 498, 502, 0, 1, 2]);
            let [one, two] = [distance.of(1.0), distance.of(4.0)];
            assert_eq!(found.distances, [0.0, one, one, two, two, 0.0, one, two]);
            let found = bank.radius_neighbors(&context, queries, radius.next_down(), distance).unwrap();
            assert_eq!(found.counts, [3, 0, 2]);
        }
        // More pairs than are held at a time.
        let found = bank.radius_neighbors(&context, rows, f64::INFINITY, Distance::Squared).unwrap();
        assert_eq!(found.counts, [1000; 1000]);
    }
}

#[test]
fn building_copying_and_searching_can_be_cancelled() {
    let values = features(1000, 64);
    let rows = Matrix::new("features", &values, 1000, 64).unwrap();
    let stop = |_: u64, _: u64| ControlFlow::Break(());
    for threads in [1, 3] {
        let bank = MemoryBank::new(&Context::new(Level::Scalar, threads), rows, Storage::Float32).unwrap();
        assert!(bank.cascade.is_some());
        assert_eq!(bank.features(&Context::new(Level::Scalar, threads)).unwrap(), values);
        let watched = || {
            let context = Context::new(Level::Scalar, threads).observed(&stop);
            std::thread::sleep(POLL);
            context
        };
        assert!(matches!(MemoryBank::new(&watched(), rows, Storage::Float32), Err(Error::Cancelled)));
        assert_eq!(bank.features(&watched()), Err(Error::Cancelled));
        assert!(matches!(bank.kneighbors(&watched(), rows, 2, Distance::Euclidean), Err(Error::Cancelled)));
        assert!(matches!(bank.radius_neighbors(&watched(), rows, 1.0, Distance::Squared), Err(Error::Cancelled)));
    }
}

#[test]
fn codes_take_at_most_six_tenths_of_the_rows_and_three_beside_float16() {
    for cols in [16, 54, 64, 100, 344, 768] {
        let values = features(1200, cols);
        let rows = Matrix::new("features", &values, 1200, cols).unwrap();
        for level in Level::available() {
            let context = Context::new(level, 1);
            let bank = MemoryBank::new(&context, rows, Storage::Float32).unwrap();
            let codes = (bank.nbytes() - 4 * values.len()) as f64 / 1200.0;
            // Besides the codes: where the one group ends.
            let most = (0.6 * 4.0 * cols as f64).max(LEAST_BUDGET as f64) + 0.1;
            assert!(codes <= most, "{level}, {cols}: {codes} of {most} bytes a row");
            assert!(cols < 64 || codes > 16.0, "{level}, {cols}: no codes");
            let bank = MemoryBank::new(&context, rows, Storage::Float16).unwrap();
            assert!(bank.nbytes() <= values.len() * 32 / 10 + 100, "{level}, {cols}");
        }
    }
}

#[test]
fn bad_arguments_are_named() {
    let rows = Matrix::new("features", &[0.0; 6], 2, 3).unwrap();
    let context = Context::new(Level::Scalar, 1);
    let bank = MemoryBank::new(&context, rows, Storage::Float32).unwrap();
    let narrow = Matrix::new("queries", &[0.0; 4], 2, 2).unwrap();
    let error = bank.kneighbors(&context, narrow, 1, Distance::Euclidean).unwrap_err().to_string();
    assert_eq!(error, "queries must be 3 values wide, as the rows of the memory bank; got 2");
    for k in [0, 3] {
        let error = bank.kneighbors(&context, rows, k, Distance::Euclidean).unwrap_err().to_string();
        assert_eq!(error, format!("k must be between 1 and the 2 rows of the memory bank; got {k}"));
    }
    for radius in [-1.0, f64::NAN] {
        let error = bank.radius_neighbors(&context, rows, radius, Distance::Squared).unwrap_err().to_string();
        assert_eq!(error, format!("radius must be a number from 0 on; got {radius}"));
    }
    assert!(bank.radius_neighbors(&context, narrow, 1.0, Distance::Squared).is_err());
    assert!(MemoryBank::new(&context, Matrix::new("features", &[], 0, 3).unwrap(), Storage::Float32).is_err());
}

//! Selections against the textbook loop, by every plan, at every level of this CPU.

use super::*;
use crate::filter::Encoder;
use crate::naive;
use crate::random::splitmix64;
use crate::simd::{Level, Operation};
use proptest::prelude::*;
use std::ops::ControlFlow;

/// Codes of all rows of the given widths.
fn forced(context: &Context<'_>, rows: Matrix<'_>, widths: &[usize]) -> SelectionPlan {
    let encoder = Encoder::fit(context, rows, widths).unwrap();
    let encoded = encoder.encode(context, rows).unwrap();
    SelectionPlan { encoder, encoded }
}

/// Every level, thread count and plan (the chosen one and none among them) gives the textbook's picks.
fn check(rows: Matrix<'_>, count: usize, start: &Start) {
    let context = Context::new(Level::Scalar, 1);
    let (first, value) = start.resolve(&context, rows).unwrap();
    let (indices, radii) = naive::greedy_coreset(rows, count, first, value);
    let whole = Encoder::whole_width(rows.cols());
    let forced_widths = if whole == 64 { vec![vec![64]] } else { vec![vec![64, whole], vec![whole]] };
    for level in Level::available() {
        for threads in [1, 3] {
            let context = Context::new(level, threads);
            let mut ways = vec![greedy(&context, rows, count, 0.0, start)];
            ways.push(planned(&context, rows, count, 0.0, start, || Ok(None)));
            for widths in &forced_widths {
                ways.push(planned(&context, rows, count, 0.0, start, || Ok(Some(forced(&context, rows, widths)))));
            }
            for (way, found) in ways.into_iter().enumerate() {
                let found = found.unwrap();
                assert_eq!(found.indices, indices, "{level}, {threads} threads, way {way}");
                assert_eq!(found.radii, radii, "{level}, {threads} threads, way {way}");
                // The first pick is new to every other row.
                assert!(first.is_none() || found.distances >= rows.rows() as u64 - 1, "way {way}");
            }
        }
    }
}

fn starts() -> impl Strategy<Value = Start> {
    prop_oneof![
        (0_u64..99).prop_map(Start::Seed),
        Just(Start::Row(0)),
        Just(Start::Mean),
        Just(Start::MeanOf(vec![0])),
        (0_u64..99).prop_map(Start::MeanOfTen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn equals_the_textbook_loop(
        n in 1_usize..90, cols in 1_usize..20, share in 0.0_f64..1.0, start in starts(),
        values in prop::collection::vec(-2.0_f32..2.0, 90 * 20),
    ) {
        let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
        check(rows, 1 + (share * (n - 1) as f64) as usize, &start);
    }

    #[test]
    fn equals_it_on_grids_full_of_ties_and_duplicates(
        n in 1_usize..200, cols in 1_usize..4, start in starts(),
        values in prop::collection::vec(0_i8..4, 200 * 4),
    ) {
        let values: Vec<f32> = values.into_iter().map(f32::from).collect();
        check(Matrix::new("features", &values[..n * cols], n, cols).unwrap(), n, &start);
    }
}

#[test]
fn equals_it_on_correlated_rows_at_several_widths() {
    for cols in [3, 40, 100] {
        let values: Vec<f32> = (0..3000 * cols)
            .map(|i| {
                let (row, col) = ((i / cols) as f32, (i % cols) as f32);
                (row * 0.37).sin() * (col * 0.11).cos() + (row * 1.7 + col * 0.9).sin() * 0.05
            })
            .collect();
        check(Matrix::new("features", &values, 3000, cols).unwrap(), 500, &Start::Seed(5));
    }
}

#[test]
fn equals_it_over_many_rounds() {
    let mut state = 7_u64;
    let mut uniform = || {
        state = splitmix64(state);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    let smooth: Vec<f32> = (0..5000 * 5).map(|_| uniform()).collect();
    check(Matrix::new("features", &smooth, 5000, 5).unwrap(), 700, &Start::Seed(0));
    let grid: Vec<f32> = smooth.iter().map(|value| (value * 5.0).floor()).collect();
    check(Matrix::new("features", &grid, 5000, 5).unwrap(), 3000, &Start::Seed(1));
}

#[test]
fn equals_it_where_the_errors_of_all_codes_point_one_way() {
    // One column: every coordinate of a row is the same, and so is its error. No part of a bound is to spare.
    for scale in [1.0, 1e-3, 1e4] {
        let uniform = |i: u64| (splitmix64(i) >> 40) as f32 / (1 << 24) as f32;
        let values: Vec<f32> = (0..700).map(|i| scale * uniform(i)).collect();
        check(Matrix::new("features", &values, 700, 1).unwrap(), 300, &Start::Row(0));
    }
}

#[test]
fn equals_it_where_an_outlier_takes_the_codes_for_itself() {
    // The rows but the first share one code: all picks are listed, and measured without being looked up.
    let mut values: Vec<f32> = (0..900 * 3).map(|i| (splitmix64(i) >> 40) as f32).collect();
    values[0] = 1e15;
    check(Matrix::new("features", &values, 900, 3).unwrap(), 400, &Start::Seed(3));
}

#[test]
fn codes_rule_out_the_rows_beyond_a_distance_and_none_at_it() {
    struct RulesOut<'a>(&'a SelectionCodes, usize, usize, f64);
    impl Operation for RulesOut<'_> {
        type Output = bool;

        fn run<S: Simd>(self, simd: S) -> bool {
            self.0.rules_out(simd, self.1, self.2, self.3)
        }
    }
    for level in Level::available() {
        let context = Context::new(level, 1);
        // Whole numbers in one of 256 columns, all that codes can be: their distances are those of the rows.
        let limit = level.code_limit();
        let count = 2 * limit as usize + 1;
        let mut values = vec![0.0; count * 256];
        values.iter_mut().step_by(256).zip(-limit..).for_each(|(value, code)| *value = code as f32);
        let rows = Matrix::new("features", &values, count, 256).unwrap();
        let plan = forced(&context, rows, &[64, 256]);
        let codes = SelectionCodes { plan, picks: Codes::empty(64, level.code_offset()) };
        for (x, y) in (0..count).flat_map(|x| (0..count).map(move |y| (x, y))) {
            let apart = x.abs_diff(y) as f64;
            assert!(!level.run(RulesOut(&codes, x, y, apart)), "{level}: {apart} apart");
            assert!(x == y || level.run(RulesOut(&codes, x, y, apart - 0.5)), "{level}: {apart} apart");
        }
    }
}

#[test]
fn a_row_is_measured_against_the_picks_that_its_codes_leave() {
    for level in Level::available() {
        let context = Context::new(level, 1);
        // Whole numbers, all that codes can be, and every third of them a pick: the nearest is 1 away, the next 2.
        let limit = level.code_limit();
        let numbers: Vec<f32> = (-limit..=limit).map(|code| code as f32).collect();
        let picks: Vec<u32> = (0..numbers.len() as u32).step_by(3).collect();
        let others: Vec<usize> = (0..numbers.len()).filter(|row| row % 3 == 1).collect();
        let outlier: Vec<f32> = numbers.iter().copied().chain([1e9]).collect();
        // A row that falls below the boundary is measured once; one that goes on looks its nearest pick up again; one
        // whose codes are those of all picks is measured against all after the first; and one without codes, against all.
        let (all, on) = (picks.len(), f64::INFINITY);
        let cases = [
            (&numbers, true, 1.5, 1),
            (&numbers, true, on, 2),
            (&outlier, true, on, 1 + all),
            (&numbers, false, on, all),
        ];
        for (values, coded, boundary, each) in cases {
            let rows = Matrix::new("features", values, values.len(), 1).unwrap();
            let plan = coded.then(|| forced(&context, rows, &[64]));
            let mut selection = Selection::new(&context, rows, vec![f64::INFINITY; values.len()], plan).unwrap();
            selection.picks.extend_from_slice(&picks);
            selection.publish_picks(0);
            let mut stale: Vec<Ranked> = others.iter().map(|&index| Ranked { value: f64::INFINITY, index }).collect();
            selection.update(&context, &mut stale, Ranked { value: boundary, index: 0 }).unwrap();
            assert!(stale.iter().all(|row| row.value == 1.0), "{level}");
            assert!(stale.iter().all(|&row| selection.is_fresh(row) == (boundary == on)), "{level}");
            assert_eq!(selection.distances.into_inner(), (others.len() * each) as u64, "{level}, {each} each");
        }
    }
}

#[test]
fn equal_rows_give_one_pick_at_radius_zero() {
    let rows = Matrix::new("features", &[3.0; 30], 10, 3).unwrap();
    let found = greedy(&Context::new(Level::detect(), 1), rows, 5, 0.0, &Start::Row(4)).unwrap();
    assert_eq!(found, Coreset { indices: vec![4], radii: vec![0.0], distances: 9 });
}

#[test]
fn a_radius_ends_the_sequence_at_the_first_pick_that_reaches_it() {
    let values: Vec<f32> = (0..2000 * 6_u32).map(|i| (i as f32 * 0.37).sin()).collect();
    let rows = Matrix::new("features", &values, 2000, 6).unwrap();
    let context = Context::new(Level::detect(), 2);
    let whole = greedy(&context, rows, 300, 0.0, &Start::Seed(1)).unwrap();
    for last in [0, 1, 40, 298] {
        for radius in [whole.radii[last], whole.radii[last].next_up(), whole.radii[last].next_down()] {
            let found = greedy(&context, rows, 300, radius, &Start::Seed(1)).unwrap();
            let count = whole.radii.iter().take_while(|&&reached| reached > radius).count() + 1;
            assert_eq!(found.indices, whole.indices[..count]);
            assert_eq!(found.radii, whole.radii[..count]);
        }
    }
    assert_eq!(greedy(&context, rows, 300, f64::INFINITY, &Start::Row(7)).unwrap().indices, [7]);
}

#[test]
fn bad_counts_radii_and_starts_are_named() {
    let rows = Matrix::new("features", &[0.0; 6], 2, 3).unwrap();
    let context = Context::new(Level::Scalar, 1);
    for count in [0, 3] {
        let error = greedy(&context, rows, count, 0.0, &Start::Row(0)).unwrap_err().to_string();
        assert_eq!(error, format!("amount must be between 1 and the 2 rows of features; got {count}"));
    }
    for radius in [-1.0, f64::NAN] {
        let error = greedy(&context, rows, 1, radius, &Start::Row(0)).unwrap_err().to_string();
        assert_eq!(error, format!("radius must be a number from 0 on; got {radius}"));
    }
    let error = greedy(&context, rows, 1, 0.0, &Start::Row(2)).unwrap_err().to_string();
    assert_eq!(error, "start must be a row index below 2; got 2");
}

#[test]
fn a_selection_can_be_cancelled() {
    let values: Vec<f32> = (0..40_000_u32).map(|i| (i as f32 * 0.7).sin()).collect();
    let rows = Matrix::new("features", &values, 2500, 16).unwrap();
    let stop = |_: u64, _: u64| ControlFlow::Break(());
    let context = Context::new(Level::Scalar, 1).observed(&stop);
    assert_eq!(greedy(&context, rows, 2500, 0.0, &Start::Row(0)), Err(Error::Cancelled));
}

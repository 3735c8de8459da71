//! Greedy k-centre coreset: the exact sequence of the textbook loop, without its work.
//!
//! The loop keeps for every row its squared distance to the rows chosen so far, picks the row where
//! that is largest (ties to the lowest index), and lowers every row's value by the distance to the
//! pick: all rows are read once per pick. Here most of that reading never happens.
//!
//! A row's value only ever falls, so a value that has not seen the latest picks is an **upper
//! bound**, and a row whose bound lies below the largest value cannot be the next pick.
//!
//! ```text
//! state: value[i] (f64, squared; an upper bound), seen[i] (how many picks it has seen)
//! loop
//!   boundary = the POOL-th row in the order (value descending, index ascending)
//!   bring the rows at or above the boundary up to date, in parallel
//!   pool = those that are still at or above it                 all fresh
//!   while the best of the pool is at or above the boundary
//!     pick it; lower the values of the pool by the distance to it
//! ```
//!
//! *Why the picks are the textbook's.* A row outside the pool has a bound below the boundary in the
//! same total order that decides the picks; its true value is no larger, so it stays below. A pick
//! is at or above the boundary and the best of the pool, hence the best of all rows. Values come
//! from the canonical distance, whose bits depend on nothing but the two rows.
//!
//! *Bringing up to date* is a search for the nearest among the picks not seen yet, of interest only
//! below the value already known: the search of [`crate::filter`] with that value as its first τ.
//! The codes of a pick are the codes it had as a row. In the pool the same bound is asked row by row.
//! A pair that the codes rule out has a distance above the value, and would not have lowered it.
//! Without codes (few rows, few columns, or data that codes cannot tell apart) every distance is taken.
//!
//! *Radius.* The covering radius after a pick is the root of the value of the row that would be
//! picked next, so the loop runs one step beyond the last pick.

mod pool;
mod projection;
mod start;

pub use projection::{Projection, project};
pub use start::Start;

use crate::best::Best;
use crate::distance::{Wide, tile};
use crate::error::Error;
use crate::filter::{Codes, Encoded, Encoder, QUERIES, Scratch, Search, TILE};
use crate::matrix::{Matrix, reserved, zeroed};
use crate::nearest::probe;
use crate::simd::{Operation, Simd};
use crate::threads::Context;
use pool::Pool;

/// Rows held fresh at a time. More rows give more picks per refresh, and cost their mutual bounds.
const POOL: usize = 1024;

/// The chosen rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Coreset {
    /// Row indices in pick order.
    pub indices: Vec<i64>,
    /// Covering radius (Euclidean) after each pick.
    pub radii: Vec<f64>,
}

/// A picked row's value: below every distance, so that it is not picked again.
const PICKED: f64 = -1.0;

/// Chooses `count` rows of `features` by greedy k-centre selection, beginning at `start`.
///
/// Fewer rows are returned when the chosen ones already cover every row at `radius`, which is 0 where
/// only the count shall end the selection.
///
/// # Errors
/// [`Error::Invalid`] when `count` is not in `1..=rows`, `radius` is not a number from 0 on, or the
/// start is not a row, [`Error::Cancelled`].
pub fn greedy(
    context: &Context<'_>,
    features: Matrix<'_>,
    count: usize,
    radius: f64,
    start: Start,
) -> Result<Coreset, Error> {
    let rows = features.rows();
    if count == 0 || count > rows {
        return Err(Error::invalid("amount", format!("between 1 and the {rows} rows of features"), count));
    }
    if radius.is_nan() || radius < 0.0 {
        return Err(Error::invalid("radius", "a number from 0 on", radius));
    }
    context.set_progress(0, count);
    let (first, value) = start.resolve(context, features)?;
    let encoder = if rows > POOL { probe::encoder(context, features)? } else { None };
    let mut selection = Selection::new(context, features, value, encoder.as_ref())?;
    let mut coreset = Coreset { indices: reserved(&[count])?, radii: reserved(&[count])? };
    if let Some(first) = first {
        selection.pick(first);
        coreset.indices.push(first as i64);
    }
    loop {
        let boundary = selection.boundary();
        let mut pool = selection.refresh(context, boundary)?;
        while let Some(best) = pool.best().filter(|best| !boundary.beats(*best)) {
            if !coreset.indices.is_empty() {
                let reached = best.value.max(0.0).sqrt();
                coreset.radii.push(reached);
                if reached <= radius || coreset.indices.len() == count {
                    return Ok(coreset);
                }
            }
            coreset.indices.push(best.index as i64);
            context.set_progress(coreset.indices.len(), count);
            context.poll()?;
            selection.pick(best.index);
            context.level().run(pool::Update { pool: &mut pool, selection: &selection, pick: best.index });
        }
        selection.record(pool.rows());
    }
}

/// A row in the order that decides the picks.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    value: f64,
    index: usize,
}

impl Ranked {
    /// Whether `self` comes strictly before `other`: a larger value, or the same at a lower index.
    fn beats(self, other: Self) -> bool {
        self.value > other.value || (self.value == other.value && self.index < other.index)
    }
}

/// The state of all rows.
struct Selection<'a> {
    features: Matrix<'a>,
    value: Vec<f64>,
    seen: Vec<u32>,
    /// The picks so far, in order.
    picks: Vec<u32>,
    codes: Option<Coded<'a>>,
}

/// The codes of all rows, and those of the picks in their order.
struct Coded<'a> {
    encoder: &'a Encoder,
    rows: Encoded,
    picks: Codes,
}

impl<'a> Selection<'a> {
    fn new(
        context: &Context<'_>,
        features: Matrix<'a>,
        value: Vec<f64>,
        encoder: Option<&'a Encoder>,
    ) -> Result<Self, Error> {
        let codes = match encoder {
            Some(encoder) => {
                let all: Vec<u32> = (0..features.rows() as u32).collect();
                let rows = encoder.encode(context, features, &all)?;
                Some(Coded { encoder, rows, picks: Codes::empty(encoder.width()) })
            }
            None => None,
        };
        Ok(Self { features, seen: zeroed(&[value.len()])?, value, picks: Vec::new(), codes })
    }

    /// Notes a pick: other rows see it when they are next refreshed.
    fn pick(&mut self, index: usize) {
        self.picks.push(index as u32);
        if let Some(coded) = &mut self.codes {
            coded.picks.push(&coded.rows, index);
        }
        self.value[index] = PICKED;
    }

    /// The last of the first [`POOL`] rows in pick order, by bounds.
    fn boundary(&self) -> Ranked {
        let mut order: Vec<u32> = (0..self.value.len() as u32).collect();
        let last = POOL.min(order.len()) - 1;
        let (_, &mut index, _) = order.select_nth_unstable_by(last, |&a, &b| {
            self.value[b as usize].total_cmp(&self.value[a as usize]).then(a.cmp(&b))
        });
        let value = self.value[index as usize];
        // Rows that have seen no pick at all are brought up to date together.
        Ranked { value, index: if value == f64::INFINITY { usize::MAX } else { index as usize } }
    }

    /// Brings every row at or above `boundary` up to date and returns those that stay there.
    fn refresh(&mut self, context: &Context<'_>, boundary: Ranked) -> Result<Pool, Error> {
        let ranked = |index: usize| Ranked { value: self.value[index], index };
        let mut rows: Vec<Ranked> = (0..self.value.len()).map(ranked).filter(|row| !boundary.beats(*row)).collect();
        // Rows that have seen the same picks share a work item.
        rows.sort_unstable_by_key(|row| (self.seen[row.index], row.index));
        let same = |a: &Ranked, b: &Ranked| self.seen[a.index] == self.seen[b.index];
        let items: Vec<&mut [Ranked]> = rows.chunk_by_mut(same).flat_map(|same| same.chunks_mut(QUERIES)).collect();
        let (level, selection) = (context.level(), &*self);
        context.for_each(
            items.into_iter(),
            || selection.codes.as_ref().map(|coded| Scratch::new(coded.encoder.width())),
            |scratch, rows| level.run(Refresh { selection, rows, scratch: scratch.as_mut() }),
        )?;
        self.record(&rows);
        rows.retain(|row| !boundary.beats(*row));
        Ok(Pool::new(rows))
    }

    /// Takes the values of rows that have seen every pick.
    fn record(&mut self, rows: &[Ranked]) {
        for row in rows {
            self.value[row.index] = row.value;
            self.seen[row.index] = self.picks.len() as u32;
        }
    }
}

/// Lowers the values of some rows, which have seen the same picks, by the distances to the others.
struct Refresh<'a> {
    selection: &'a Selection<'a>,
    rows: &'a mut [Ranked],
    scratch: Option<&'a mut Scratch>,
}

impl Operation for Refresh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Refresh { selection, rows, scratch } = self;
        let seen = selection.seen[rows[0].index] as usize;
        if seen == selection.picks.len() {
            return;
        }
        match (&selection.codes, scratch) {
            (Some(coded), Some(scratch)) => {
                let queries: Vec<&[f32]> = rows.iter().map(|row| selection.features.row(row.index)).collect();
                let mut best: Vec<Best> = rows.iter().map(|row| Best::within(row.value, 1)).collect();
                scratch.block.gather(simd, &coded.rows, rows.iter().map(|row| row.index));
                // The first tile may hold picks seen before: they lower nothing again.
                let search = Search {
                    encoder: coded.encoder,
                    codes: &coded.picks,
                    order: &selection.picks,
                    features: selection.features,
                    tiles: seen / TILE..coded.picks.tiles(),
                    queries: &queries,
                    best: &mut best,
                };
                search.run(simd, scratch);
                for (row, best) in rows.iter_mut().zip(best) {
                    // A picked row stays picked.
                    if row.value > PICKED {
                        row.value = row.value.min(best.worst());
                    }
                }
            }
            _ if S::MANY_REGISTERS => measure_all::<S, 4, 2>(simd, selection, rows, seen),
            _ => measure_all::<S, 2, 1>(simd, selection, rows, seen),
        }
    }
}

/// As [`Refresh`], without codes.
#[inline(always)]
fn measure_all<S: Simd, const Q: usize, const R: usize>(
    simd: S,
    selection: &Selection<'_>,
    rows: &mut [Ranked],
    seen: usize,
) {
    let picks = &selection.picks[seen..];
    let mut wide = Wide::with_capacity(rows.len(), selection.features.cols());
    for row in &*rows {
        wide.push(selection.features.row(row.index));
    }
    for picks in picks.chunks(R) {
        // A short last group repeats its last row, which lowers nothing twice.
        let picks: [_; R] = std::array::from_fn(|r| selection.features.row(picks[r.min(picks.len() - 1)] as usize));
        for (group, rows) in rows.chunks_mut(Q).enumerate() {
            let queries: [_; Q] = std::array::from_fn(|q| wide.row(group * Q + q.min(rows.len() - 1)));
            for (row, squared) in rows.iter_mut().zip(tile(simd, queries, picks)) {
                if row.value > PICKED {
                    row.value = squared.into_iter().fold(row.value, f64::min);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::random::splitmix64;
    use crate::simd::Level;
    use proptest::prelude::*;
    use std::ops::ControlFlow;

    fn check(rows: Matrix<'_>, count: usize, start: Start) {
        let context = Context::new(Level::Scalar, 1);
        let (first, value) = start.resolve(&context, rows).unwrap();
        let (indices, radii) = naive::greedy_coreset(rows, count, first, value);
        for level in Level::available() {
            for threads in [1, 3] {
                let found = greedy(&Context::new(level, threads), rows, count, 0.0, start).unwrap();
                assert_eq!(found.indices, indices, "{level}, {threads} threads");
                assert_eq!(found.radii, radii, "{level}, {threads} threads");
            }
        }
    }

    fn starts() -> impl Strategy<Value = Start> {
        prop_oneof![
            (0_u64..99).prop_map(Start::Seed),
            Just(Start::Row(0)),
            Just(Start::Mean),
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
            check(rows, 1 + (share * (n - 1) as f64) as usize, start);
        }

        #[test]
        fn equals_it_on_grids_full_of_ties_and_duplicates(
            n in 1_usize..200, cols in 1_usize..4, start in starts(),
            values in prop::collection::vec(0_i8..4, 200 * 4),
        ) {
            let values: Vec<f32> = values.into_iter().map(f32::from).collect();
            check(Matrix::new("features", &values[..n * cols], n, cols).unwrap(), n, start);
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
            check(Matrix::new("features", &values, 3000, cols).unwrap(), 500, Start::Seed(5));
        }
    }

    #[test]
    fn equals_it_when_the_pool_is_smaller_than_the_set() {
        let mut state = 7_u64;
        let mut uniform = || {
            state = splitmix64(state);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        let smooth: Vec<f32> = (0..5000 * 5).map(|_| uniform()).collect();
        check(Matrix::new("features", &smooth, 5000, 5).unwrap(), 700, Start::Seed(0));
        let grid: Vec<f32> = smooth.iter().map(|value| (value * 5.0).floor()).collect();
        check(Matrix::new("features", &grid, 5000, 5).unwrap(), 3000, Start::Seed(1));
    }

    #[test]
    fn equal_rows_give_one_pick_at_radius_zero() {
        let rows = Matrix::new("features", &[3.0; 30], 10, 3).unwrap();
        let found = greedy(&Context::new(Level::detect(), 1), rows, 5, 0.0, Start::Row(4)).unwrap();
        assert_eq!(found, Coreset { indices: vec![4], radii: vec![0.0] });
    }

    #[test]
    fn a_radius_ends_the_sequence_at_the_first_pick_that_reaches_it() {
        let values: Vec<f32> = (0..2000 * 6_u32).map(|i| (i as f32 * 0.37).sin()).collect();
        let rows = Matrix::new("features", &values, 2000, 6).unwrap();
        let context = Context::new(Level::detect(), 2);
        let whole = greedy(&context, rows, 300, 0.0, Start::Seed(1)).unwrap();
        for last in [0, 1, 40, 298] {
            for radius in [whole.radii[last], whole.radii[last].next_up(), whole.radii[last].next_down()] {
                let found = greedy(&context, rows, 300, radius, Start::Seed(1)).unwrap();
                let count = whole.radii.iter().take_while(|&&reached| reached > radius).count() + 1;
                assert_eq!(found.indices, whole.indices[..count]);
                assert_eq!(found.radii, whole.radii[..count]);
            }
        }
        assert_eq!(greedy(&context, rows, 300, f64::INFINITY, Start::Row(7)).unwrap().indices, [7]);
    }

    #[test]
    fn bad_counts_radii_and_starts_are_named() {
        let rows = Matrix::new("features", &[0.0; 6], 2, 3).unwrap();
        let context = Context::new(Level::Scalar, 1);
        for count in [0, 3] {
            let error = greedy(&context, rows, count, 0.0, Start::Row(0)).unwrap_err().to_string();
            assert_eq!(error, format!("amount must be between 1 and the 2 rows of features; got {count}"));
        }
        for radius in [-1.0, f64::NAN] {
            let error = greedy(&context, rows, 1, radius, Start::Row(0)).unwrap_err().to_string();
            assert_eq!(error, format!("radius must be a number from 0 on; got {radius}"));
        }
        let error = greedy(&context, rows, 1, 0.0, Start::Row(2)).unwrap_err().to_string();
        assert_eq!(error, "start must be a row index below 2; got 2");
    }

    #[test]
    fn a_selection_can_be_cancelled() {
        let values: Vec<f32> = (0..40_000_u32).map(|i| (i as f32 * 0.7).sin()).collect();
        let rows = Matrix::new("features", &values, 2500, 16).unwrap();
        let stop = |_: u64, _: u64| ControlFlow::Break(());
        let context = Context::new(Level::Scalar, 1).observed(&stop);
        assert_eq!(greedy(&context, rows, 2500, 0.0, Start::Row(0)), Err(Error::Cancelled));
    }
}

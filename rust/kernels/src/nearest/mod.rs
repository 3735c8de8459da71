//! The memory bank and its exact search: for the k nearest rows, or for all within a radius.
//!
//! For every query the rows with the smallest (D2, index), D2 being the canonical distance of
//! `distance`. Most rows are ruled out by the codes of `filter`, whose header proves
//! the bound; what is left gets its distance. Small or shapeless banks are searched without codes
//! (`brute_force.rs`). Either way the answer is the same to the bit.
//!
//! The matrix of queries × rows is never written: beyond the answer a call needs the codes of some thousand queries
//! and, per thread, the rows of a window of the bank that may be near; on data that codes cannot tell apart that is
//! up to 2 MiB.
//!
//! Rows may come in groups, such as those of an image. A group's rows lie together among the codes, so a search held to
//! some groups visits their tiles, and of a tile that groups share, their rows.

mod brute_force;
mod subset;

use crate::context::Context;
use crate::distance::Pair;
use crate::error::Error;
use crate::filter::Cascade;
use crate::half::{self, Half};
use crate::matrix::{Matrix, reserved, zeroed};
use crate::runs::Runs;
use crate::simd::Level;

pub use crate::distance::Distance;
pub use subset::{Neighbors, RadiusNeighbors, Subset};

/// What the codes of a row may take, as a share of its float32 values: six tenths, and three tenths beside
/// float16, so that all of such a bank stays below eight.
const BUDGET: (usize, usize) = (3, 5);
const HALF_BUDGET: (usize, usize) = (3, 10);

/// What the codes of a row may take however few columns there are: the narrowest codes.
const LEAST_BUDGET: usize = 128;

/// An immutable set of feature rows that answers nearest-neighbour queries.
#[derive(Clone, Debug)]
pub struct MemoryBank {
    store: Store,
    rows: usize,
    cols: usize,
    /// One past the last row of each group: of one, where nothing is said of groups.
    ends: Vec<usize>,
    cascade: Option<Cascade>,
}

/// How a bank keeps its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Storage {
    /// As they came.
    Float32,
    /// Rounded, in half the memory. The search is exact for the rounded values.
    Float16,
}

/// The rows, one after another.
#[derive(Clone, Debug)]
enum Store {
    Float32(Vec<f32>),
    Float16(Vec<Half>),
}

impl MemoryBank {
    /// A bank of the rows of `features`, copied.
    ///
    /// # Errors
    /// [`Error::Empty`] when there are no rows, [`Error::Invalid`] when a value is too large for its storage,
    /// [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub fn new(context: &Context<'_>, features: Matrix<'_>, storage: Storage) -> Result<Self, Error> {
        Self::chosen(context, features, vec![features.rows()], storage)
    }

    /// As [`MemoryBank::new`], the rows being those of groups: so many of each, in turn. A search may be held to some of
    /// the groups ([`MemoryBank::of_groups`]).
    ///
    /// # Errors
    /// As [`MemoryBank::new`], and [`Error::Invalid`] when a group has no rows or they have more or fewer than there are.
    pub fn grouped(
        context: &Context<'_>,
        features: Matrix<'_>,
        groups: &[usize],
        storage: Storage,
    ) -> Result<Self, Error> {
        let rows = features.rows();
        if let Some(group) = groups.iter().position(|&count| count == 0) {
            return Err(Error::invalid("groups", "at least one row each", format!("none for group {group}")));
        }
        let mut ends = reserved(&[groups.len()])?;
        let total = groups.iter().try_fold(0_usize, |before, &count| {
            let end = before.checked_add(count)?;
            ends.push(end);
            Some(end)
        });
        if total != Some(rows) {
            let got = total.map_or("more than can be counted".to_owned(), |total| total.to_string());
            return Err(Error::invalid("groups", format!("{rows} rows in all, those of features"), got));
        }
        Self::chosen(context, features, ends, storage)
    }

    /// A bank whose codes the probe chooses.
    fn chosen(context: &Context<'_>, features: Matrix<'_>, ends: Vec<usize>, storage: Storage) -> Result<Self, Error> {
        let bytes = 4 * features.cols();
        let budget = match storage {
            Storage::Float32 => (bytes * BUDGET.0 / BUDGET.1).max(LEAST_BUDGET),
            Storage::Float16 => bytes * HALF_BUDGET.0 / HALF_BUDGET.1,
        };
        Self::planned(context, features, ends, storage, |rows, ends| Cascade::choose(context, rows, ends, budget))
    }

    /// The same bank searched without codes, as small ones are: what a search with codes is measured by.
    ///
    /// # Errors
    /// As [`MemoryBank::new`].
    pub fn without_codes(context: &Context<'_>, features: Matrix<'_>, storage: Storage) -> Result<Self, Error> {
        Self::planned(context, features, vec![features.rows()], storage, |_, _| Ok(None))
    }

    /// A bank searched as `plan` says; `None` for no codes.
    fn planned(
        context: &Context<'_>,
        features: Matrix<'_>,
        ends: Vec<usize>,
        storage: Storage,
        plan: impl FnOnce(Matrix<'_>, &[usize]) -> Result<Option<Cascade>, Error>,
    ) -> Result<Self, Error> {
        if features.rows() == 0 {
            return Err(Error::Empty { name: "features", expected: "a memory bank needs at least one row" });
        }
        features.check_row_numbers("features")?;
        let (rows, cols) = (features.rows(), features.cols());
        let (store, cascade) = match storage {
            Storage::Float32 => {
                (Store::Float32(copied(context, features.data(), |value| value)?), plan(features, &ends)?)
            }
            Storage::Float16 => {
                if let Some(&value) = features.data().iter().find(|value| value.abs() >= half::LIMIT) {
                    let expected = "below 65520 in magnitude to be stored as float16 (scale them, or use float32)";
                    return Err(Error::invalid("features", expected, value));
                }
                let stored = copied(context, features.data(), Half::new)?;
                let rounded = copied(context, &stored, Half::to_f32)?;
                (Store::Float16(stored), plan(Matrix::trusted(&rounded, rows, cols), &ends)?)
            }
        };
        Ok(Self { store, rows, cols, ends, cascade })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// D2 between a row of features and row `index`.
    pub(crate) fn squared_distance(&self, level: Level, x: &[f32], index: usize) -> f64 {
        let values = index * self.cols..(index + 1) * self.cols;
        match &self.store {
            Store::Float32(data) => level.run(Pair(x, &data[values])),
            Store::Float16(data) => level.run(Pair(x, &data[values])),
        }
    }

    /// Appends the values of row `index`.
    pub(crate) fn copy_row(&self, index: usize, out: &mut Vec<f32>) {
        let values = index * self.cols..(index + 1) * self.cols;
        match &self.store {
            Store::Float32(data) => out.extend_from_slice(&data[values]),
            Store::Float16(data) => out.extend(data[values].iter().map(|value| value.to_f32())),
        }
    }

    /// A copy of all rows, one after another.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub fn features(&self, context: &Context<'_>) -> Result<Vec<f32>, Error> {
        match &self.store {
            Store::Float32(data) => copied(context, data, |value| value),
            Store::Float16(data) => copied(context, data, Half::to_f32),
        }
    }

    /// Bytes held: the rows and their codes.
    pub fn nbytes(&self) -> usize {
        let rows = match &self.store {
            Store::Float32(data) => size_of_val(&**data),
            Store::Float16(data) => size_of_val(&**data),
        };
        rows + size_of_val(&*self.ends) + self.cascade.as_ref().map_or(0, Cascade::nbytes)
    }

    /// All rows, to be searched.
    pub fn all(&self) -> Subset<'_> {
        Subset::new(self, Runs::all(self.rows))
    }

    /// The rows of some groups, to be searched: exactly, as all rows are, in the time that a bank of those rows takes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a group is not there or comes twice, [`Error::Empty`] when there are none.
    pub fn of_groups(&self, groups: &[usize]) -> Result<Subset<'_>, Error> {
        if groups.is_empty() {
            return Err(Error::Empty { name: "groups", expected: "a search needs at least one group" });
        }
        let mut rising = groups.to_vec();
        rising.sort_unstable();
        if let Some(&group) = rising.iter().find(|&&group| group >= self.ends.len()) {
            let expected = format!("below {}, the number of groups of the memory bank", self.ends.len());
            return Err(Error::invalid("groups", expected, group));
        }
        if let Some([group, _]) = rising.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::invalid("groups", "distinct", format!("{group} twice")));
        }
        let rows = |group: usize| group.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[group];
        Ok(Subset::new(self, Runs::joined(rising.into_iter().map(rows))))
    }

    /// [`Subset::kneighbors`] of all rows.
    ///
    /// # Errors
    /// As there.
    pub fn kneighbors(
        &self,
        context: &Context<'_>,
        queries: Matrix<'_>,
        k: usize,
        distance: Distance,
    ) -> Result<Neighbors, Error> {
        self.all().kneighbors(context, queries, k, distance)
    }

    /// [`Subset::radius_neighbors`] of all rows.
    ///
    /// # Errors
    /// As there.
    pub fn radius_neighbors(
        &self,
        context: &Context<'_>,
        queries: Matrix<'_>,
        radius: f64,
        distance: Distance,
    ) -> Result<RadiusNeighbors, Error> {
        self.all().radius_neighbors(context, queries, radius, distance)
    }
}

/// Values that are copied at a time: four megabytes of float32.
const COPIED: usize = 1 << 20;

/// The values, each changed by `change`; asks meanwhile whether to go on.
fn copied<A: Copy + Sync, B: Clone + Default + Send>(
    context: &Context<'_>,
    values: &[A],
    change: impl Fn(A) -> B + Sync,
) -> Result<Vec<B>, Error> {
    let mut out = zeroed(&[values.len()])?;
    let parts = out.chunks_mut(COPIED).zip(values.chunks(COPIED));
    context.for_each(
        parts,
        || (),
        |(), (out, values)| {
            out.iter_mut().zip(values).for_each(|(out, &value)| *out = change(value));
        },
    )?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::POLL;
    use crate::filter::Encoder;
    use crate::naive;
    use crate::random::splitmix64;
    use proptest::prelude::*;
    use std::ops::ControlFlow;

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
            let whole = Encoder::whole_width(rows.cols());
            for widths in [&[][..], &[16, 32, 64, whole], &[32], &[whole]] {
                let context = Context::new(level, 1);
                let mut widths = widths.to_vec();
                widths.dedup();
                let plan = |rows: Matrix<'_>, ends: &[usize]| {
                    if widths.is_empty() { Ok(None) } else { Cascade::new(&context, rows, ends, &widths) }
                };
                let bank = MemoryBank::planned(&context, rows, vec![rows.rows()], storage, plan).unwrap();
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
            let uniform = |i: usize| (splitmix64(seed ^ i as u64) >> 40) as f32 / 8_388_608.0 - 1.0;
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
    fn copying_the_rows_can_be_cancelled() {
        let rows = Matrix::new("features", &[1.0; 6], 2, 3).unwrap();
        let context = Context::new(Level::Scalar, 1);
        let bank = MemoryBank::new(&context, rows, Storage::Float32).unwrap();
        assert_eq!(bank.features(&context).unwrap(), [1.0; 6]);
        let stop = |_: u64, _: u64| ControlFlow::Break(());
        let context = context.observed(&stop);
        std::thread::sleep(POLL);
        assert_eq!(bank.features(&context), Err(Error::Cancelled));
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
}

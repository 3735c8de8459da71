//! The memory bank and its exact search: for the k nearest rows, or for all within a radius.
//!
//! For every query the rows with the smallest (D2, index), D2 being the canonical distance of
//! `distance`. Most rows are ruled out by the codes of `filter`, whose header proves
//! the bound; what is left gets its distance. Small or shapeless banks are searched without codes
//! (`brute_force.rs`). Either way the answer is the same to the bit.
//!
//! The matrix of queries × rows is never written: beyond the answer a call needs the codes of some thousand queries
//! and, per thread, the rows of a window of the bank that may be near; on data that codes cannot tell apart that is
//! up to 6 MiB.
//!
//! Rows may come in groups, such as those of an image. A group's rows lie together among the codes, so a search held to
//! some groups visits their tiles, and of a tile that groups share, their rows.

mod brute_force;
mod subset;
#[cfg(test)]
mod tests;

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

/// What the codes of a row may take, in bytes, however few columns there are: below 54 columns the share would leave no
/// room for any that pay, and such rows are small.
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

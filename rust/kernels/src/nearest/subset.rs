//! The search of a memory bank, among all of its rows or those of some groups.

use super::{MemoryBank, Store, brute_force};
use crate::context::Context;
use crate::distance::{Distance, Element};
use crate::error::Error;
use crate::filter::WAVE_QUERIES;
use crate::matrix::Matrix;
use crate::runs::Runs;
use crate::top_k::Wanted;

/// Pairs of a query and a row that a search by radius may hold at a time beside its answer: all of them, where the
/// radius is large.
const RADIUS_PAIRS: usize = if cfg!(test) { 1 << 12 } else { 1 << 24 };

/// Rows of a memory bank that a search may answer with.
#[derive(Clone, Debug)]
pub struct Subset<'a> {
    bank: &'a MemoryBank,
    rows: Runs,
}

/// What [`Subset::kneighbors`] answers, row-major (queries × k).
#[derive(Clone, Debug, PartialEq)]
pub struct Neighbors {
    /// Distances, ascending.
    pub distances: Vec<f32>,
    /// Row indices in the bank; among equal D2 the lowest come first.
    pub indices: Vec<i64>,
}

/// What [`Subset::radius_neighbors`] answers, query after query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RadiusNeighbors {
    /// Rows of each query.
    pub counts: Vec<i64>,
    /// Distances, ascending for each query.
    pub distances: Vec<f32>,
    /// Row indices in the bank; among equal D2 the lowest come first.
    pub indices: Vec<i64>,
}

impl<'a> Subset<'a> {
    /// Of each group all rows or none.
    pub(super) fn new(bank: &'a MemoryBank, rows: Runs) -> Self {
        Self { bank, rows }
    }

    /// The `k` rows with the smallest (D2, index) for each query.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the widths differ or `k` is not in `1..=rows`, [`Error::OutOfMemory`],
    /// [`Error::Cancelled`].
    pub fn kneighbors(
        &self,
        context: &Context<'_>,
        queries: Matrix<'_>,
        k: usize,
        distance: Distance,
    ) -> Result<Neighbors, Error> {
        self.check_width(queries)?;
        let rows = self.rows.len();
        if k == 0 || k > rows {
            let of = if rows == self.bank.rows { "memory bank" } else { "groups" };
            return Err(Error::invalid("k", format!("between 1 and the {rows} rows of the {of}"), k));
        }
        let size = [queries.rows(), k];
        let mut found = Neighbors { distances: context.zeroed(&size)?, indices: context.zeroed(&size)? };
        let mut outputs = found.distances.chunks_mut(k).zip(found.indices.chunks_mut(k));
        self.search(context, queries, Wanted::Nearest(k), WAVE_QUERIES, |nearest| {
            let Some((distances, indices)) = outputs.next() else { return Ok(()) };
            for ((to_distance, to_index), &(squared, index)) in distances.iter_mut().zip(indices).zip(nearest) {
                (*to_distance, *to_index) = (distance.of(squared), index as i64);
            }
            Ok(())
        })?;
        drop(outputs);
        Ok(found)
    }

    /// All rows within `radius` of each query, by rising (D2, index). The radius is of the kind that `distance` names,
    /// and decided in f64: what is returned is rounded and may exceed it.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the widths differ or `radius` is not a number from 0 on, [`Error::OutOfMemory`],
    /// [`Error::Cancelled`].
    pub fn radius_neighbors(
        &self,
        context: &Context<'_>,
        queries: Matrix<'_>,
        radius: f64,
        distance: Distance,
    ) -> Result<RadiusNeighbors, Error> {
        self.check_width(queries)?;
        if radius.is_nan() || radius < 0.0 {
            return Err(Error::invalid("radius", "a number from 0 on", radius));
        }
        let mut found = RadiusNeighbors::default();
        let wave = (RADIUS_PAIRS / self.rows.len()).clamp(1, WAVE_QUERIES);
        self.search(context, queries, Wanted::Within(distance.largest_within(radius)), wave, |near| {
            make_room(&mut found.counts, 1)?;
            make_room(&mut found.distances, near.len())?;
            make_room(&mut found.indices, near.len())?;
            found.counts.push(near.len() as i64);
            found.distances.extend(near.iter().map(|&(squared, _)| distance.of(squared)));
            found.indices.extend(near.iter().map(|&(_, index)| index as i64));
            Ok(())
        })?;
        Ok(found)
    }

    fn check_width(&self, queries: Matrix<'_>) -> Result<(), Error> {
        if queries.cols() == self.bank.cols {
            return Ok(());
        }
        let expected = format!("{} values wide, as the rows of the memory bank", self.bank.cols);
        Err(Error::invalid("queries", expected, queries.cols()))
    }

    /// Hands what is found for each query to `take`, in order: (D2, index), ascending. So many queries are searched
    /// at a time as a `wave` holds.
    fn search(
        &self,
        context: &Context<'_>,
        queries: Matrix<'_>,
        wanted: Wanted,
        wave: usize,
        take: impl FnMut(&[(f64, usize)]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (rows, cols) = (self.bank.rows, self.bank.cols);
        match &self.bank.store {
            Store::Float32(data) => {
                self.search_stored(context, Matrix::trusted(data, rows, cols), queries, wanted, wave, take)
            }
            Store::Float16(data) => {
                self.search_stored(context, Matrix::trusted(data, rows, cols), queries, wanted, wave, take)
            }
        }
    }

    fn search_stored<E: Element>(
        &self,
        context: &Context<'_>,
        features: Matrix<'_, E>,
        queries: Matrix<'_>,
        wanted: Wanted,
        wave: usize,
        mut take: impl FnMut(&[(f64, usize)]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (cols, rows) = (self.bank.cols, &self.rows);
        let cascade = self.bank.cascade.as_ref().filter(|cascade| cascade.serves(context, wanted, rows.len()));
        for wave in queries.data().chunks(wave * cols) {
            let wave: Vec<&[f32]> = wave.chunks_exact(cols).collect();
            let found = match cascade {
                Some(cascade) => cascade.search(context, features, rows, &wave, wanted)?,
                None => brute_force::search(context, features, rows, &wave, wanted)?,
            };
            for mut found in found {
                take(found.sorted())?;
            }
            context.poll()?;
        }
        Ok(())
    }
}

/// Makes room for `more` values; to run out of memory is an error, not the end of the process.
fn make_room<T>(values: &mut Vec<T>, more: usize) -> Result<(), Error> {
    values.try_reserve(more).map_err(|_| Error::OutOfMemory { bytes: (values.len() + more) * size_of::<T>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::half::Half;
    use crate::naive;
    use crate::nearest::Storage;
    use crate::nearest::tests::banks;
    use crate::random::{splitmix64, uniform};
    use crate::simd::Level;
    use proptest::prelude::*;

    /// The group of each row.
    fn group_of_rows(groups: &[usize]) -> Vec<usize> {
        groups.iter().enumerate().flat_map(|(group, &count)| vec![group; count]).collect()
    }

    /// Every level, thread count and width of codes (none among them) gives the naive answer among the rows of some
    /// groups, and of all.
    fn check(queries: Matrix<'_>, rows: Matrix<'_>, groups: &[usize], (among, k): (&[usize], usize), storage: Storage) {
        let group_of = group_of_rows(groups);
        let belongs = |row: usize| among.contains(&group_of[row]);
        let count = (0..rows.rows()).filter(|&row| belongs(row)).count();
        let k = k.min(count);
        let expected = naive::nearest_among(queries, rows, &belongs, k, Distance::Euclidean);
        let of_all = naive::nearest(queries, rows, k, Distance::Euclidean);
        let radius =
            if queries.rows() == 0 { 1.0 } else { naive::squared_distance(queries.row(0), rows.row(k - 1)).sqrt() };
        let within = naive::within_among(queries, rows, &belongs, radius, Distance::Euclidean);
        let ends: Vec<usize> = (1..=groups.len()).map(|count| groups[..count].iter().sum()).collect();
        for level in Level::available() {
            for (widths, bank) in banks(level, rows, &ends, storage) {
                let subset = bank.of_groups(among).unwrap();
                for threads in [1, 2, 7] {
                    let context = Context::new(level, threads);
                    let found = subset.kneighbors(&context, queries, k, Distance::Euclidean).unwrap();
                    assert_eq!(found, expected, "{level}, {threads} threads, {widths:?}");
                    let found = subset.radius_neighbors(&context, queries, radius, Distance::Euclidean).unwrap();
                    assert_eq!(found, within, "{level}, {threads} threads, {widths:?}");
                    let found = bank.kneighbors(&context, queries, k, Distance::Euclidean).unwrap();
                    assert_eq!(found, of_all, "{level}, {threads} threads, {widths:?}, all groups");
                }
            }
        }
    }

    /// Groups of 1 to `most` rows whose sum is `rows`, and some of them in no order.
    fn split(rows: usize, most: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
        let mut groups = Vec::new();
        let mut left = rows;
        while left > 0 {
            let count = (1 + splitmix64(seed ^ left as u64) as usize % most).min(left);
            groups.push(count);
            left -= count;
        }
        let mut among: Vec<usize> =
            (0..groups.len()).filter(|&group| splitmix64(seed ^ (1 << 32) ^ group as u64).is_multiple_of(3)).collect();
        if among.is_empty() {
            among.push(groups.len() / 2);
        }
        among.reverse();
        (groups, among)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn groups_are_searched_as_the_naive_search_does(
            n in 1_usize..260, m in 0_usize..20, cols in 1_usize..80, k in 1_usize..40,
            most in prop_oneof![Just(1_usize), 2_usize..20, 20_usize..120], seed in any::<u64>(),
        ) {
            let value = |i: usize| 2.0 * uniform(seed ^ i as u64);
            let values: Vec<f32> = (0..(n + m) * cols).map(value).collect();
            let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
            let queries = Matrix::new("queries", &values[n * cols..], m, cols).unwrap();
            let (groups, among) = split(n, most, seed);
            check(queries, rows, &groups, (&among, k), Storage::Float32);
        }

        /// Duplicates and ties within groups and across them: integers, few of them.
        #[test]
        fn ties_across_groups_go_to_the_lowest_index(
            n in 2_usize..120, cols in 1_usize..20, k in 1_usize..12, most in 1_usize..40, seed in any::<u64>(),
        ) {
            let value = |i: usize| (splitmix64(seed ^ i as u64) % 3) as f32;
            let values: Vec<f32> = (0..(n + 9) * cols).map(value).collect();
            let rows = Matrix::new("features", &values[..n * cols], n, cols).unwrap();
            let queries = Matrix::new("queries", &values[n * cols..], 9, cols).unwrap();
            let (groups, among) = split(n, most, seed);
            check(queries, rows, &groups, (&among, k), Storage::Float32);
        }
    }

    #[test]
    fn groups_far_from_a_query_are_searched_although_nearer_ones_are_not() {
        // Each group is a cluster; queries lie in the middle of one that is not searched, or far from all.
        let cols = 70;
        let value = |row: usize, column: usize| {
            let noise = uniform((row * cols + column) as u64);
            ((row / 50) as f32 * 3.0) * ((column + row / 50) % 7) as f32 + noise
        };
        let values: Vec<f32> = (0..600).flat_map(|row| (0..cols).map(move |column| value(row, column))).collect();
        let halves: Vec<f32> = values.iter().map(|&value| Half::new(value).to_f32()).collect();
        let far: Vec<f32> = values[..30 * cols].iter().map(|value| value * 1e3).collect();
        for (storage, values) in [(Storage::Float32, &values), (Storage::Float16, &halves)] {
            let rows = Matrix::new("features", values, 600, cols).unwrap();
            for queries in [&values[270 * cols..][..30 * cols], &far] {
                let queries = Matrix::new("queries", queries, 30, cols).unwrap();
                for k in [1, 60] {
                    check(queries, rows, &[50; 12], (&[11, 3, 4], k), storage);
                }
            }
        }
    }

    #[test]
    fn bad_groups_are_named() {
        let rows = Matrix::new("features", &[0.0; 15], 5, 3).unwrap();
        let context = Context::new(Level::Scalar, 1);
        let grouped = |groups: &[usize]| MemoryBank::grouped(&context, rows, groups, Storage::Float32);
        for (groups, message) in [
            (&[2, 0, 3][..], "groups must be at least one row each; got none for group 1"),
            (&[2, 2], "groups must be 5 rows in all, those of features; got 4"),
            (&[], "groups must be 5 rows in all, those of features; got 0"),
            (&[usize::MAX, 6], "groups must be 5 rows in all, those of features; got more than can be counted"),
        ] {
            assert_eq!(grouped(groups).unwrap_err().to_string(), message);
        }
        let bank = grouped(&[2, 3]).unwrap();
        for (groups, message) in [
            (&[][..], "groups is empty: a search needs at least one group"),
            (&[2], "groups must be below 2, the number of groups of the memory bank; got 2"),
            (&[1, 0, 1], "groups must be distinct; got 1 twice"),
        ] {
            assert_eq!(bank.of_groups(groups).unwrap_err().to_string(), message);
        }
        let subset = bank.of_groups(&[1]).unwrap();
        for k in [0, 4] {
            let error = subset.kneighbors(&context, rows, k, Distance::Euclidean).unwrap_err().to_string();
            assert_eq!(error, format!("k must be between 1 and the 3 rows of the groups; got {k}"));
        }
    }
}

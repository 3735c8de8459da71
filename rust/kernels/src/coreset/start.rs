//! Where a greedy selection begins.

use crate::context::Context;
use crate::distance::Pair;
use crate::error::Error;
use crate::matrix::{Matrix, reserved, zeroed};
use crate::random::splitmix64;

/// What a selection begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Row `splitmix64(seed) mod rows` is the first pick.
    Seed(u64),
    /// This row is the first pick.
    Row(usize),
    /// No row is chosen beforehand: the first value of a row is its mean distance to all rows, squared.
    Mean,
    /// As [`Start::Mean`], with the mean distance to ten seeded rows: what patchcore-inspection's approximate
    /// sampler does.
    MeanOfTen(u64),
    /// As [`Start::Mean`], with the mean distance to these rows; one that is named twice counts twice.
    MeanOf(Vec<usize>),
}

impl Start {
    /// The first pick, if any, and the first values (squared distances) of all rows.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a row does not exist or none is named, [`Error::OutOfMemory`], [`Error::Cancelled`].
    pub fn resolve(&self, context: &Context<'_>, features: Matrix<'_>) -> Result<(Option<usize>, Vec<f64>), Error> {
        let rows = features.rows();
        let far = || {
            let mut values = zeroed(&[rows])?;
            values.fill(f64::INFINITY);
            Ok::<_, Error>(values)
        };
        match self {
            Self::Seed(seed) => Ok((Some((splitmix64(*seed) % rows as u64) as usize), far()?)),
            Self::Row(row) if *row < rows => Ok((Some(*row), far()?)),
            Self::Row(row) => Err(Error::invalid("start", format!("a row index below {rows}"), row)),
            Self::Mean => {
                let mut all = reserved(&[rows])?;
                all.extend(0..rows);
                Ok((None, mean_distances(context, features, &all)?))
            }
            Self::MeanOfTen(seed) => Ok((None, mean_distances(context, features, &seeded_rows(*seed, rows))?)),
            Self::MeanOf(anchors) if anchors.is_empty() => {
                Err(Error::Empty { name: "start", expected: "a mean distance needs at least one row" })
            }
            Self::MeanOf(anchors) => match anchors.iter().find(|&&row| row >= rows) {
                Some(row) => Err(Error::invalid("start", format!("row indices below {rows}"), row)),
                None => Ok((None, mean_distances(context, features, anchors)?)),
            },
        }
    }
}

/// Ten different rows (all of them where there are fewer), drawn with `seed`.
fn seeded_rows(seed: u64, rows: usize) -> Vec<usize> {
    let mut drawn = Vec::with_capacity(10);
    let mut state = seed;
    while drawn.len() < rows.min(10) {
        let row = (splitmix64(state) % rows as u64) as usize;
        state = state.wrapping_add(1);
        if !drawn.contains(&row) {
            drawn.push(row);
        }
    }
    drawn
}

/// The square of each row's mean Euclidean distance to the `anchors`.
fn mean_distances(context: &Context<'_>, features: Matrix<'_>, anchors: &[usize]) -> Result<Vec<f64>, Error> {
    let mut means: Vec<f64> = zeroed(&[features.rows()])?;
    let level = context.level();
    context.for_each(
        means.iter_mut().enumerate(),
        || (),
        |(), (row, mean)| {
            let x = features.row(row);
            let sum: f64 = anchors.iter().map(|&anchor| level.run(Pair(x, features.row(anchor))).sqrt()).sum();
            let distance = sum / anchors.len() as f64;
            *mean = distance * distance;
        },
    )?;
    Ok(means)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::simd::Level;

    #[test]
    fn means_are_over_the_anchors() {
        let values: Vec<f32> = (0..60_u16).map(|i| (f32::from(i) * 1.3).cos()).collect();
        let rows = Matrix::new("features", &values, 20, 3).unwrap();
        let context = Context::new(Level::detect(), 2);
        let twice = vec![7, 0, 7];
        let starts = [
            (Start::Mean, (0..20).collect()),
            (Start::MeanOfTen(3), seeded_rows(3, 20)),
            (Start::MeanOf(twice.clone()), twice),
        ];
        for (start, anchors) in starts {
            let (first, value) = start.resolve(&context, rows).unwrap();
            assert_eq!(first, None);
            for (row, value) in value.iter().enumerate() {
                let sum: f64 =
                    anchors.iter().map(|&a| naive::squared_distance(rows.row(row), rows.row(a)).sqrt()).sum();
                assert_eq!(*value, (sum / anchors.len() as f64).powi(2));
            }
        }
    }

    #[test]
    fn rows_that_do_not_exist_are_refused() {
        let rows = Matrix::new("features", &[1.0, 2.0], 2, 1).unwrap();
        let context = Context::new(Level::detect(), 1);
        let message = |start: Start| start.resolve(&context, rows).unwrap_err().to_string();
        assert_eq!(message(Start::Row(2)), "start must be a row index below 2; got 2");
        assert_eq!(message(Start::MeanOf(vec![1, 3])), "start must be row indices below 2; got 3");
        assert_eq!(message(Start::MeanOf(vec![])), "start is empty: a mean distance needs at least one row");
    }

    #[test]
    fn seeded_rows_differ_and_exist() {
        for rows in [1, 5, 10, 11, 1000] {
            let mut drawn = seeded_rows(9, rows);
            assert_eq!(drawn.len(), rows.min(10));
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), rows.min(10));
            assert!(drawn.iter().all(|&row| row < rows));
        }
    }
}

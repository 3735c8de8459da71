//! Image scores: Eq. 6 and Eq. 7 of the paper.
//!
//! ```text
//! m_test,*   the patch of the image with the largest distance to the bank, the lowest index among equals
//! m*         its nearest bank row;  s* = ‖m_test,* − m*‖                                          (6)
//! N_b(m*)    m* and its b − 1 nearest other bank rows by (D2, index)
//! s = (1 − exp‖m_test,* − m*‖ / Σ_{m ∈ N_b(m*)} exp‖m_test,* − m‖) · s*                            (7)
//! ```
//!
//! The largest distance is sought among the float32 distances that the search returned. All distances
//! of Eq. 7 are the f64 roots of the canonical D2, and the largest is subtracted before exp, so no
//! score overflows however far the patch lies. A neighbourhood of one row would make the factor 0; b = 1
//! therefore means Eq. 6.

use crate::context::Context;
use crate::error::Error;
use crate::math::exp;
use crate::matrix::{Matrix, checked_len};
use crate::nearest::{Distance, MemoryBank};

/// One score per image, from the patch features of the images and the distance and index of the bank
/// row nearest to each. `patches` features follow each other per image; `b` rows make a neighbourhood.
///
/// # Errors
/// [`Error::Invalid`] when lengths do not fit each other, an index is no row of the bank, a distance is
/// NaN, or `b` is not in `1..=rows`; [`Error::Cancelled`].
pub fn image_scores(
    context: &Context<'_>,
    bank: &MemoryBank,
    features: Matrix<'_>,
    (distances, indices): (&[f32], &[i64]),
    patches: usize,
    b: usize,
) -> Result<Vec<f64>, Error> {
    check(bank, features, (distances, indices), patches, b)?;
    let level = context.level();
    let distance = |patch: usize, row: usize| bank.squared_distance(level, features.row(patch), row).sqrt();
    let farthest = |(image, distances): (usize, &[f32])| {
        let farther = |best: usize, i: usize| if distances[i] > distances[best] { i } else { best };
        let patch = image * patches + (0..patches).fold(0, farther);
        (patch, indices[patch] as usize)
    };
    let farthest: Vec<_> = distances.chunks_exact(patches).enumerate().map(farthest).collect();
    if b == 1 {
        return Ok(farthest.iter().map(|&(patch, row)| distance(patch, row)).collect());
    }
    let neighborhoods = neighborhoods(context, bank, farthest.iter().map(|&(_, row)| row), b)?;
    let score = |(&(patch, row), others): (&(usize, usize), &[i64])| {
        let others = others.iter().filter(|&&other| other != row as i64).take(b - 1);
        let nearest = distance(patch, row);
        let mut all = vec![nearest];
        all.extend(others.map(|&other| distance(patch, other as usize)));
        reweighted(&all)
    };
    Ok(farthest.iter().zip(neighborhoods.chunks_exact(b)).map(score).collect())
}

/// Eq. 7 from the distances of the patch to m* and to the other rows of the neighbourhood.
fn reweighted(distances: &[f64]) -> f64 {
    let largest = distances.iter().copied().fold(0.0, f64::max);
    let sum: f64 = distances.iter().map(|distance| exp(distance - largest)).sum();
    (1.0 - exp(distances[0] - largest) / sum) * distances[0]
}

/// The `b` bank rows nearest to each of some bank rows, themselves included unless `b` duplicates with
/// lower indices come first.
fn neighborhoods(
    context: &Context<'_>,
    bank: &MemoryBank,
    rows: impl ExactSizeIterator<Item = usize>,
    b: usize,
) -> Result<Vec<i64>, Error> {
    let count = rows.len();
    let mut queries = Vec::with_capacity(checked_len(&[count, bank.cols()])?);
    rows.for_each(|row| bank.copy_row(row, &mut queries));
    let queries = Matrix::new("features", &queries, count, bank.cols())?;
    Ok(bank.kneighbors(context, queries, b, Distance::Euclidean)?.indices)
}

fn check(
    bank: &MemoryBank,
    features: Matrix<'_>,
    (distances, indices): (&[f32], &[i64]),
    patches: usize,
    b: usize,
) -> Result<(), Error> {
    let rows = features.rows();
    if features.cols() != bank.cols() {
        let expected = format!("{} values wide, as the rows of the memory bank", bank.cols());
        return Err(Error::invalid("features", expected, features.cols()));
    }
    if patches == 0 || !rows.is_multiple_of(patches) {
        return Err(Error::invalid("patches", format!("a divisor of the {rows} rows of features"), patches));
    }
    for (name, len) in [("distances", distances.len()), ("indices", indices.len())] {
        if len != rows {
            return Err(Error::invalid(name, format!("{rows} values, one per row of features"), len));
        }
    }
    if b == 0 || b > bank.rows() {
        return Err(Error::invalid("b", format!("between 1 and the {} rows of the memory bank", bank.rows()), b));
    }
    if let Some(at) = distances.iter().position(|distance| distance.is_nan()) {
        return Err(Error::invalid("distances", "numbers", format!("nan at {at}")));
    }
    let outside = |&index: &i64| usize::try_from(index).map_or(true, |index| index >= bank.rows());
    match indices.iter().find(|&index| outside(index)) {
        Some(index) => {
            Err(Error::invalid("indices", format!("below the {} rows of the memory bank", bank.rows()), index))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::naive;
    use crate::nearest::Storage;
    use crate::simd::Level;
    use proptest::prelude::*;

    fn scores(
        context: &Context<'_>,
        bank: &[f32],
        features: &[f32],
        cols: usize,
        patches: usize,
        b: usize,
    ) -> Vec<f64> {
        let bank = MemoryBank::new(
            &Context::new(Level::Scalar, 1),
            Matrix::new("bank", bank, bank.len() / cols, cols).unwrap(),
            Storage::Float32,
        )
        .unwrap();
        let features = Matrix::new("features", features, features.len() / cols, cols).unwrap();
        let found = bank.kneighbors(context, features, 1, Distance::Euclidean).unwrap();
        image_scores(context, &bank, features, (&found.distances, &found.indices), patches, b).unwrap()
    }

    #[test]
    fn the_literal_case() {
        let context = Context::new(Level::detect(), 1);
        let bank = [3.0, 3.5, 4.0, 9.0];
        let score = scores(&context, &bank, &[3.1, 0.0, 4.0], 1, 3, 3)[0];
        assert!((score - 2.4410).abs() < 5e-5, "{score}");
        assert_eq!(scores(&context, &bank, &[3.1, 0.0, 4.0], 1, 3, 1), [3.0]);
    }

    #[test]
    fn far_patches_do_not_overflow() {
        let context = Context::new(Level::detect(), 1);
        let score = scores(&context, &[0.0, 1.0, 2.0], &[1e6], 1, 1, 3)[0];
        assert!(score.is_finite() && score > 0.5e6, "{score}");
    }

    #[test]
    fn a_bank_of_one_point_halves_with_its_duplicate() {
        // Both rows are the same point: the factor is 1 − 1/2, whichever of them is m*.
        let context = Context::new(Level::detect(), 1);
        assert_eq!(scores(&context, &[1.0, 1.0], &[5.0], 1, 1, 2), [2.0]);
    }

    #[test]
    fn m_star_counts_once_behind_its_duplicates() {
        let context = Context::new(Level::detect(), 1);
        let bank = MemoryBank::new(
            &Context::new(Level::Scalar, 1),
            Matrix::new("bank", &[1.0, 1.0, 1.0, 7.0], 4, 1).unwrap(),
            Storage::Float32,
        )
        .unwrap();
        let features = Matrix::new("features", &[0.0], 1, 1).unwrap();
        // Row 2 given as m*, with two duplicates of lower index in a neighbourhood of two.
        let score = image_scores(&context, &bank, features, (&[1.0], &[2]), 1, 2).unwrap();
        assert_eq!(score, [0.5]);
    }

    proptest! {
        #[test]
        fn scores_are_those_of_the_definition_whatever_the_level_and_threads(
            cols in 1_usize..20, rows in 1_usize..12, images in 1_usize..4, patches in 1_usize..6, b in 1_usize..10,
            coarse in any::<bool>(), values in prop::collection::vec(-4.0_f32..4.0, 20 * 30),
        ) {
            let b = b.min(rows);
            // Small integers make ties and duplicates.
            let values: Vec<_> = values.iter().map(|v| if coarse { v.round() } else { *v }).collect();
            let (bank, rest) = values.split_at(rows * cols);
            let features = &rest[..images * patches * cols];
            let matrix = Matrix::new("bank", bank, rows, cols).unwrap();
            let expected: Vec<_> = features
                .chunks_exact(patches * cols)
                .map(|image| naive::image_score(Matrix::new("image", image, patches, cols).unwrap(), matrix, b))
                .collect();
            for level in Level::available() {
                for threads in [1, 2, 7] {
                    let found = scores(&Context::new(level, threads), bank, features, cols, patches, b);
                    prop_assert_eq!(&found, &expected, "{} {}", level, threads);
                }
            }
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let context = Context::new(Level::detect(), 1);
        let bank = MemoryBank::new(
            &Context::new(Level::Scalar, 1),
            Matrix::new("bank", &[1.0, 2.0, 3.0, 4.0], 2, 2).unwrap(),
            Storage::Float32,
        )
        .unwrap();
        let data = [0.0; 8];
        let message = |cols: usize, distances: &[f32], indices: &[i64], patches, b| {
            let features = Matrix::new("features", &data, 8 / cols, cols).unwrap();
            image_scores(&context, &bank, features, (distances, indices), patches, b).unwrap_err().to_string()
        };
        assert!(message(4, &[0.0; 2], &[0; 2], 1, 1).starts_with("features must be 2 values wide"));
        assert!(message(2, &[0.0; 4], &[0; 4], 3, 1).starts_with("patches must be a divisor of the 4 rows"));
        assert!(message(2, &[0.0; 4], &[0; 4], 0, 1).starts_with("patches"));
        assert!(message(2, &[0.0; 3], &[0; 4], 2, 1).starts_with("distances must be 4 values"));
        assert!(message(2, &[0.0; 4], &[0; 5], 2, 1).starts_with("indices must be 4 values"));
        assert!(message(2, &[0.0; 4], &[0; 4], 2, 3).starts_with("b must be between 1 and the 2 rows"));
        assert!(message(2, &[0.0; 4], &[0, 0, -1, 0], 2, 1).ends_with("got -1"));
        assert!(message(2, &[0.0; 4], &[0, 2, 0, 0], 2, 1).starts_with("indices must be below the 2 rows"));
        assert!(message(2, &[0.0, f32::NAN, 0.0, 0.0], &[0; 4], 2, 1).ends_with("nan at 1"));
    }
}

//! Slow twins: plain loops that are obviously right. Every test of a kernel compares with these by `==`.

use crate::matrix::Matrix;
use crate::nearest::Neighbors;

/// D2 of [`crate::distance`], lane by lane.
pub fn squared_distance(x: &[f32], y: &[f32]) -> f64 {
    let mut lanes = [0.0_f64; 16];
    for (i, (&a, &b)) in x.iter().zip(y).enumerate() {
        let difference = f64::from(a) - f64::from(b);
        lanes[i % 16] += difference * difference;
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// All (D2, index) sorted, the first `k` of each query.
pub fn nearest(queries: Matrix<'_>, rows: Matrix<'_>, k: usize) -> Neighbors {
    let mut found = Neighbors { distances: Vec::new(), indices: Vec::new() };
    for q in 0..queries.rows() {
        let mut all: Vec<(f64, usize)> =
            (0..rows.rows()).map(|r| (squared_distance(queries.row(q), rows.row(r)), r)).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        for &(squared, index) in &all[..k] {
            found.distances.push(squared.sqrt() as f32);
            found.indices.push(index as i64);
        }
    }
    found
}

/// The textbook greedy k-centre loop. `value` is each row's squared distance to the chosen rows so
/// far, or what a start without a row puts in its place.
pub fn greedy_coreset(
    rows: Matrix<'_>,
    count: usize,
    start: Option<usize>,
    mut value: Vec<f64>,
) -> (Vec<i64>, Vec<f64>) {
    let n = rows.rows();
    let (mut picks, mut radii) = (Vec::new(), Vec::new());
    let mut next = start;
    while picks.len() < count {
        let farthest = (0..n).fold(0, |best, i| if value[i] > value[best] { i } else { best });
        let pick = next.take().unwrap_or(farthest);
        if !picks.is_empty() && value[pick] <= 0.0 {
            break;
        }
        picks.push(pick as i64);
        for i in 0..n {
            value[i] = value[i].min(squared_distance(rows.row(i), rows.row(pick)));
        }
        // A chosen row is never chosen again.
        value[pick] = -1.0;
        radii.push(value.iter().fold(0.0_f64, |a, &b| a.max(b)).sqrt());
    }
    (picks, radii)
}

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
        for (i, value) in value.iter_mut().enumerate() {
            *value = value.min(squared_distance(rows.row(i), rows.row(pick)));
        }
        // A chosen row is never chosen again.
        value[pick] = -1.0;
        radii.push(value.iter().fold(0.0_f64, |a, &b| a.max(b)).sqrt());
    }
    (picks, radii)
}

/// AUROC: of all pairs, the share in which the anomaly outscores the normal one; ties half.
pub fn roc_auc(labels: &[u8], scores: &[f64]) -> f64 {
    let (mut won, mut pairs) = (0.0, 0.0);
    for (_, anomalous) in labels.iter().zip(scores).filter(|pair| *pair.0 == 1) {
        for (_, normal) in labels.iter().zip(scores).filter(|pair| *pair.0 == 0) {
            pairs += 1.0;
            won += if anomalous > normal { 1.0 } else { 0.5 * f64::from(u8::from(anomalous == normal)) };
        }
    }
    won / pairs
}

/// (threshold, found, false alarms) of every distinct score, from the highest.
pub fn thresholds(labels: &[u8], scores: &[f64]) -> Vec<(f64, usize, usize)> {
    let mut distinct = scores.to_vec();
    distinct.sort_by(|a, b| b.total_cmp(a));
    distinct.dedup();
    let reach = |label, threshold| labels.iter().zip(scores).filter(|&(&l, &s)| l == label && s >= threshold).count();
    distinct.into_iter().map(|threshold| (threshold, reach(1, threshold), reach(0, threshold))).collect()
}

/// The 8-connected regions of a mask of rows of `width`, numbered by their first pixel; None where normal.
pub fn regions(mask: &[u8], width: usize) -> Vec<Option<u32>> {
    let mut region = vec![None; mask.len()];
    let mut count = 0;
    for seed in 0..mask.len() {
        if mask[seed] == 0 || region[seed].is_some() {
            continue;
        }
        let mut stack = vec![seed];
        while let Some(at) = stack.pop() {
            if mask[at] == 0 || region[at].is_some() {
                continue;
            }
            region[at] = Some(count);
            let near = |a: usize, b: usize| a.abs_diff(b) <= 1;
            stack.extend((0..mask.len()).filter(|&o| near(o / width, at / width) && near(o % width, at % width)));
        }
        count += 1;
    }
    region
}

/// PRO: the curve over every distinct threshold, by trapezoids up to `limit`, divided by it.
pub fn pro(masks: &[u8], maps: &[f32], height: usize, width: usize, limit: f64) -> f64 {
    let mut overlaps: Vec<Vec<f32>> = Vec::new();
    for (mask, map) in masks.chunks(height * width).zip(maps.chunks(height * width)) {
        let first = overlaps.len();
        for (region, &score) in regions(mask, width).into_iter().zip(map) {
            let Some(region) = region else { continue };
            overlaps.resize(overlaps.len().max(first + region as usize + 1), Vec::new());
            overlaps[first + region as usize].push(score);
        }
    }
    let normal: Vec<f32> = masks.iter().zip(maps).filter(|pair| *pair.0 == 0).map(|pair| *pair.1).collect();
    let mut distinct = maps.to_vec();
    distinct.sort_by(|a, b| b.total_cmp(a));
    let reached = |scores: &[f32], threshold| {
        scores.iter().filter(|&&score| score >= threshold).count() as f64 / scores.len() as f64
    };
    let mut area = 0.0;
    let mut last = (0.0, 0.0);
    for threshold in distinct {
        let overlap = overlaps.iter().map(|region| reached(region, threshold)).sum::<f64>() / overlaps.len() as f64;
        let mut point = (reached(&normal, threshold), overlap);
        if point.0 > limit {
            let part = (limit - last.0) / (point.0 - last.0);
            point = (limit, last.1 + part * (point.1 - last.1));
        }
        area += (point.0 - last.0) * (point.1 + last.1) / 2.0;
        if point.0 >= limit {
            break;
        }
        last = point;
    }
    area / limit
}

//! Slow twins: plain loops that are obviously right. Every test of a kernel compares with these by `==`.

use crate::anomaly_map::{Border, Options, Upsampling};
use crate::gaussian;
use crate::geometry::Geometry;
use crate::math::{exp, ln};
use crate::matrix::Matrix;
use crate::nearest::{Distance, Neighbors, RadiusNeighbors};
use crate::resample;

/// D2 of the canonical distance, lane by lane.
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

/// All (D2, index) of a query, sorted.
fn sorted(query: &[f32], rows: Matrix<'_>) -> Vec<(f64, usize)> {
    let mut all: Vec<(f64, usize)> = (0..rows.rows()).map(|r| (squared_distance(query, rows.row(r)), r)).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    all
}

/// A D2 as users see it.
fn seen(squared: f64, distance: Distance) -> f64 {
    if distance == Distance::Squared { squared } else { squared.sqrt() }
}

/// The first `k` of each query.
pub fn nearest(queries: Matrix<'_>, rows: Matrix<'_>, k: usize, distance: Distance) -> Neighbors {
    nearest_among(queries, rows, &|_| true, k, distance)
}

/// The first `k` of each query among the rows that `belongs` names.
pub fn nearest_among(
    queries: Matrix<'_>,
    rows: Matrix<'_>,
    belongs: &dyn Fn(usize) -> bool,
    k: usize,
    distance: Distance,
) -> Neighbors {
    let mut found = Neighbors { distances: Vec::new(), indices: Vec::new() };
    for q in 0..queries.rows() {
        for (squared, index) in sorted(queries.row(q), rows).into_iter().filter(|&(_, row)| belongs(row)).take(k) {
            found.distances.push(seen(squared, distance) as f32);
            found.indices.push(index as i64);
        }
    }
    found
}

/// Those of each query that are at most `radius` away.
pub fn within(queries: Matrix<'_>, rows: Matrix<'_>, radius: f64, distance: Distance) -> RadiusNeighbors {
    within_among(queries, rows, &|_| true, radius, distance)
}

/// Those of each query that are at most `radius` away, among the rows that `belongs` names.
pub fn within_among(
    queries: Matrix<'_>,
    rows: Matrix<'_>,
    belongs: &dyn Fn(usize) -> bool,
    radius: f64,
    distance: Distance,
) -> RadiusNeighbors {
    let mut found = RadiusNeighbors::default();
    for q in 0..queries.rows() {
        let mut near = sorted(queries.row(q), rows);
        near.retain(|&(squared, row)| belongs(row) && seen(squared, distance) <= radius);
        found.counts.push(near.len() as i64);
        for (squared, index) in near {
            found.distances.push(seen(squared, distance) as f32);
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

/// The area under the true positive rate of each image over the logarithm of the mean false positive rate of normal
/// images, threshold by threshold, over that of the limits; NaN for images without an anomalous pixel.
pub fn aupimo(masks: &[u8], maps: &[f32], sizes: &[[usize; 2]], [lower, upper]: [f64; 2]) -> Vec<f64> {
    let mut start = 0;
    let mut images = Vec::new();
    for [height, width] in sizes {
        let pixels = start..start + height * width;
        start = pixels.end;
        let of = |label| {
            let pixels = masks[pixels.clone()].iter().zip(&maps[pixels.clone()]);
            pixels.filter(|pixel| *pixel.0 == label).map(|pixel| *pixel.1).collect::<Vec<f32>>()
        };
        images.push((of(0), of(1)));
    }
    let mut distinct = maps.to_vec();
    distinct.sort_by(|a, b| b.total_cmp(a));
    let reached = |scores: &[f32], threshold| {
        scores.iter().filter(|&&score| score >= threshold).count() as f64 / scores.len() as f64
    };
    let normal: Vec<&Vec<f32>> =
        images.iter().filter(|image| image.1.is_empty() && !image.0.is_empty()).map(|image| &image.0).collect();
    let value = |anomalous: &Vec<f32>| {
        let mut area = 0.0;
        let mut last = (0.0, 0.0);
        for &threshold in &distinct {
            let rate = normal.iter().map(|image| reached(image, threshold)).sum::<f64>() / normal.len() as f64;
            let point = (rate, reached(anomalous, threshold));
            let (from, to) = (f64::clamp(last.0, lower, upper), f64::clamp(point.0, lower, upper));
            if to > from {
                let slope = (point.1 - last.1) / (point.0 - last.0);
                area += (last.1 - slope * last.0) * ln(to / from) + slope * (to - from);
            }
            last = point;
        }
        area / ln(upper / lower)
    };
    images.iter().map(|image| if image.1.is_empty() { f64::NAN } else { value(&image.1) }).collect()
}

/// The 8-connected regions of a mask of rows of `width`, numbered by their first pixel; None where it is not 1.
pub fn regions(mask: &[u8], width: usize) -> Vec<Option<u32>> {
    let mut region = vec![None; mask.len()];
    let mut count = 0;
    for seed in 0..mask.len() {
        if mask[seed] != 1 || region[seed].is_some() {
            continue;
        }
        let mut stack = vec![seed];
        while let Some(at) = stack.pop() {
            if mask[at] != 1 || region[at].is_some() {
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
pub fn pro(masks: &[u8], maps: &[f32], sizes: &[[usize; 2]], limit: f64) -> f64 {
    let mut overlaps: Vec<Vec<f32>> = Vec::new();
    let mut start = 0;
    for &[height, width] in sizes {
        let pixels = start..start + height * width;
        start = pixels.end;
        let (mask, map) = (&masks[pixels.clone()], &maps[pixels]);
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

// Aggregation: backbone maps → patch features.

/// The features of [`crate::aggregate`] in f64, position by position, without any rearrangement: every
/// (images, height, width, channels) map is unfolded, interpolated and pooled.
pub fn aggregate(
    maps: &[(&[f32], [usize; 4])],
    patch_size: usize,
    stride: usize,
    width: Option<usize>,
) -> (Vec<f64>, (usize, usize)) {
    let mut grid = (0, 0);
    let mut layers = Vec::new();
    for (layer, &(map, shape)) in maps.iter().enumerate() {
        let (unfolded, own) = unfold(map, shape, patch_size, stride);
        if layer == 0 {
            grid = own;
        }
        layers.push((interpolate(&unfolded, shape[0], own, grid), shape[3] * patch_size * patch_size));
    }
    let mut features = Vec::new();
    for patch in 0..maps[0].1[0] * grid.0 * grid.1 {
        let vectors = layers.iter().map(|(values, len)| &values[patch * len..][..*len]);
        match width {
            None => features.extend(vectors.flat_map(|v| adaptive(v, v.len() / (patch_size * patch_size)))),
            Some(width) => {
                let pooled: Vec<f64> = vectors.flat_map(|v| adaptive(v, width)).collect();
                features.extend(adaptive(&pooled, width));
            }
        }
    }
    (features, grid)
}

/// The p × p neighbourhoods of a map, index channel·p² + tap, zeros outside, and their grid.
fn unfold(map: &[f32], [n, h, w, c]: [usize; 4], p: usize, stride: usize) -> (Vec<f64>, (usize, usize)) {
    let padding = (p - 1) / 2;
    let grid = ((h + 2 * padding - p) / stride + 1, (w + 2 * padding - p) / stride + 1);
    let mut out = Vec::new();
    for (image, gy, gx) in positions(n, grid) {
        for channel in 0..c {
            for tap in 0..p * p {
                let (y, x) = (gy * stride + tap / p, gx * stride + tap % p);
                let inside = (padding..h + padding).contains(&y) && (padding..w + padding).contains(&x);
                let at = |y: usize, x: usize| ((image * h + y - padding) * w + x - padding) * c + channel;
                out.push(if inside { f64::from(map[at(y, x)]) } else { 0.0 });
            }
        }
    }
    (out, grid)
}

/// Vectors on one grid interpolated bilinearly to another (`align_corners=False`).
pub fn interpolate(values: &[f64], n: usize, from: (usize, usize), to: (usize, usize)) -> Vec<f64> {
    let len = values.len() / (n * from.0 * from.1);
    let source = |i: usize, from: usize, to: usize| {
        let at = ((i as f64 + 0.5) * from as f64 / to as f64 - 0.5).max(0.0);
        let low = (at.floor() as usize).min(from - 1);
        (low, (low + 1).min(from - 1), at - low as f64)
    };
    let mut out = Vec::new();
    for (image, y, x) in positions(n, to) {
        let (top, bottom, v) = source(y, from.0, to.0);
        let (left, right, u) = source(x, from.1, to.1);
        for i in 0..len {
            let at = |y: usize, x: usize| values[((image * from.0 + y) * from.1 + x) * len + i];
            let upper = (1.0 - u) * at(top, left) + u * at(top, right);
            let lower = (1.0 - u) * at(bottom, left) + u * at(bottom, right);
            out.push((1.0 - v) * upper + v * lower);
        }
    }
    out
}

/// Adaptive average pooling of a vector to `width` values.
fn adaptive(values: &[f64], width: usize) -> Vec<f64> {
    let pool = |k: usize| {
        let range = k * values.len() / width..((k + 1) * values.len()).div_ceil(width);
        values[range.clone()].iter().sum::<f64>() / range.len() as f64
    };
    (0..width).map(pool).collect()
}

/// (image, row, column) of every position, in order.
fn positions(n: usize, (rows, columns): (usize, usize)) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..n * rows * columns).map(move |i| (i / columns / rows, i / columns % rows, i % columns))
}

// Scores and maps.

/// Eq. 7 for the patches of one image, or Eq. 6 where `b` is 1.
pub fn image_score(patches: Matrix<'_>, bank: Matrix<'_>, b: usize) -> f64 {
    let found = nearest(patches, bank, 1, Distance::Euclidean);
    let mut test = 0;
    for patch in 1..patches.rows() {
        if found.distances[patch] > found.distances[test] {
            test = patch;
        }
    }
    let star = found.indices[test] as usize;
    let mut others: Vec<usize> = (0..bank.rows()).filter(|&row| row != star).collect();
    others.sort_by(|&i, &j| {
        let squared = |row| squared_distance(bank.row(star), bank.row(row));
        squared(i).total_cmp(&squared(j)).then(i.cmp(&j))
    });
    let distance = |row: usize| squared_distance(patches.row(test), bank.row(row)).sqrt();
    let distances: Vec<f64> = std::iter::once(star).chain(others).take(b).map(distance).collect();
    if b == 1 {
        return distances[0];
    }
    let largest = distances.iter().copied().fold(0.0, f64::max);
    let sum: f64 = distances.iter().map(|d| exp(d - largest)).sum();
    (1.0 - exp(distances[0] - largest) / sum) * distances[0]
}

/// Maps of [`crate::anomaly_map`] in f64: upsampled to full size, then blurred down and across.
pub fn anomaly_maps(scores: &[f32], [n, rows, columns]: [usize; 3], options: Options) -> Vec<f64> {
    let (height, width) = (options.height, options.width);
    let scores: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
    let map = match options.upsampling {
        Upsampling::Bilinear => interpolate(&scores, n, (rows, columns), (height, width)),
        Upsampling::Nearest => {
            let (ys, xs) = (resample::nearest(rows, height), resample::nearest(columns, width));
            let at = |(image, y, x)| scores[(image * rows + ys[y]) * columns + xs[x]];
            positions(n, (height, width)).map(at).collect()
        }
    };
    let down =
        |(image, y, x): (usize, usize, usize)| blur(y, height, options, |y| map[(image * height + y) * width + x]);
    let blurred: Vec<f64> = positions(n, (height, width)).map(down).collect();
    let across =
        |(image, y, x): (usize, usize, usize)| blur(x, width, options, |x| blurred[(image * height + y) * width + x]);
    positions(n, (height, width)).map(across).collect()
}

/// Maps of [`crate::undo_resize`] in f64: each pixel from the four around where it lies; None where the crop cut it off.
pub fn undo_resize(map: &[f32], geometry: Geometry) -> Vec<Option<f64>> {
    let Geometry { image, resized, offset, crop } = geometry;
    let source = |at: usize, axis: usize| {
        let scale = resized[axis] as f64 / image[axis] as f64;
        let source = (at as f64 + 0.5) * scale - 0.5 - offset[axis] as f64;
        let last = crop[axis] as f64 - 1.0;
        // Rounding must not decide whether a pixel on the very edge was seen: it is, at the low end alone.
        let seen = -0.5 - 1e-9 <= source && source < last + 0.5 - 1e-9;
        seen.then(|| source.clamp(0.0, last))
    };
    let value = |y: f64, x: f64| {
        let (top, left) = (y.floor(), x.floor());
        let at = |row: f64, column: f64| {
            let (row, column) = ((row as usize).min(crop[0] - 1), (column as usize).min(crop[1] - 1));
            f64::from(map[row * crop[1] + column])
        };
        let across = |row: f64| at(row, left) * (1.0 - (x - left)) + at(row, left + 1.0) * (x - left);
        across(top) * (1.0 - (y - top)) + across(top + 1.0) * (y - top)
    };
    let pixels = (0..image[0]).flat_map(|y| (0..image[1]).map(move |x| (y, x)));
    pixels.map(|(y, x)| Some(value(source(y, 0)?, source(x, 1)?))).collect()
}

/// The Gaussian mean of the values around `center` on an axis of `len`.
fn blur(center: usize, len: usize, options: Options, value: impl Fn(usize) -> f64) -> f64 {
    let radius = (4.0 * options.sigma + 0.5).floor() as isize;
    let (mut sum, mut total) = (0.0, 0.0);
    for offset in -radius..=radius {
        let deviations = if radius == 0 { 0.0 } else { offset as f64 / options.sigma };
        let weight = exp(-0.5 * deviations * deviations);
        // Bounce off the ends until inside.
        let (mut at, last) = (center as isize + offset, len as isize - 1);
        while len > 1 && !(0..=last).contains(&at) {
            at = match options.border {
                Border::Symmetric if at < 0 => -at - 1,
                Border::Reflect if at < 0 => -at,
                Border::Symmetric => 2 * last + 1 - at,
                Border::Reflect => 2 * last - at,
            };
        }
        sum += weight * value(if len == 1 { 0 } else { at as usize });
        total += weight;
    }
    sum / total
}

// Gaussians.

/// Adds images, a row for each position, to sums of differences from `shift` and of products of these.
pub fn accumulate(features: Matrix<'_>, shift: Matrix<'_>, sums: &mut [f64], packed: &mut [f64]) {
    let (positions, d) = (shift.rows(), shift.cols());
    for row in 0..features.rows() {
        let position = row % positions;
        let t: Vec<f64> =
            features.row(row).iter().zip(shift.row(position)).map(|(&x, &s)| f64::from(x) - f64::from(s)).collect();
        let mut at = position * d * (d + 1) / 2;
        for j in 0..d {
            sums[position * d + j] += t[j];
            for i in j..d {
                packed[at] += t[i] * t[j];
                at += 1;
            }
        }
    }
}

/// Mean and packed Cholesky factor of one position; None where the covariance is not positive definite.
pub fn factorize(
    shift: &[f32],
    sums: &[f64],
    packed: &[f64],
    options: gaussian::Options,
) -> Option<(Vec<f64>, Vec<f64>)> {
    let d = sums.len();
    let means: Vec<f64> = sums.iter().map(|sum| sum / options.images as f64).collect();
    let mut a = vec![vec![0.0; d]; d];
    let mut values = packed.iter();
    for j in 0..d {
        for i in j..d {
            a[i][j] = options.scale * (values.next()? - sums[i] * means[j]);
        }
        a[j][j] += options.epsilon;
    }
    let mut factor = Vec::new();
    for j in 0..d {
        // What is left of a variance must be more than rounding.
        let least = d as f64 * f64::EPSILON * a[j][j];
        for i in j..d {
            for k in 0..j {
                a[i][j] -= a[i][k] * a[j][k];
            }
        }
        if !(a[j][j] > least && a[j][j] < f64::INFINITY) {
            return None;
        }
        a[j][j] = a[j][j].sqrt();
        let inverse = 1.0 / a[j][j];
        for row in &mut a[j + 1..] {
            row[j] *= inverse;
        }
        factor.extend((j..d).map(|i| a[i][j]));
    }
    Some((means.iter().zip(shift).map(|(mean, &shift)| f64::from(shift) + mean).collect(), factor))
}

/// The Mahalanobis distance of a row, by a packed Cholesky factor.
pub fn mahalanobis(row: &[f32], mean: &[f64], packed: &[f64]) -> f64 {
    let mut z: Vec<f64> = row.iter().zip(mean).map(|(&x, mean)| f64::from(x) - mean).collect();
    let (mut sum, mut column) = (0.0, packed);
    for j in 0..z.len() {
        let y = z[j] * (1.0 / column[0]);
        sum += y * y;
        for i in j + 1..z.len() {
            z[i] -= column[i - j] * y;
        }
        column = &column[z.len() - j..];
    }
    sum.sqrt()
}

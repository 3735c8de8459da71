//! An order of rows in which neighbours are alike: recursive bisection.
//!
//! A tile of alike rows is near a query, or far from it, as a whole: in the order in which rows come, twice as many
//! tiles hold a row that may be near. Any order is right.

use crate::context::Context;
use crate::error::Error;
use crate::simd::LANES;

/// The direction of a cut is fitted to so many rows.
const SAMPLE: usize = 192;

/// Cuts of all parts at a time, until there are so many parts that the threads share them evenly.
const PARTS: usize = 64;

/// Some slots of the order: the first, and the rows that stand there.
struct Part<'a> {
    start: usize,
    rows: &'a mut [u32],
}

impl Part<'_> {
    /// Where a leaf ends near the middle; behind the last row where there is one leaf.
    fn half(&self, leaf: usize) -> usize {
        let end = self.start + self.rows.len();
        if self.rows.is_empty() || self.start / leaf == (end - 1) / leaf {
            return self.rows.len();
        }
        let middle = (self.start + self.rows.len() / 2).next_multiple_of(leaf);
        middle.min((end - 1) / leaf * leaf) - self.start
    }

    fn split(self, half: usize) -> [Self; 2] {
        let (low, high) = self.rows.split_at_mut(half);
        [Self { start: self.start, rows: low }, Self { start: self.start + half, rows: high }]
    }
}

/// The rows of `values`, `dims` wide (a multiple of 16), in an order whose leaves, `leaf` rows from each multiple of that
/// on, are alike. Each group, of which `ends` are the ends, keeps its place.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn order(
    context: &Context<'_>,
    values: &[f32],
    dims: usize,
    leaf: usize,
    ends: &[usize],
) -> Result<Vec<u32>, Error> {
    let mut order: Vec<u32> = (0..(values.len() / dims) as u32).collect();
    let mut parts = Vec::with_capacity(ends.len());
    let mut rest = Part { start: 0, rows: &mut order };
    for &end in ends {
        let half = end - rest.start;
        let [group, others] = rest.split(half);
        parts.push(group);
        rest = others;
    }
    while parts.len() < PARTS && parts.iter().any(|part| part.half(leaf) < part.rows.len()) {
        let mut halves: Vec<(Part<'_>, usize)> = parts.into_iter().map(|part| (part, 0)).collect();
        context.for_each(halves.iter_mut(), || (), |(), (part, half)| *half = cut(values, dims, part, leaf))?;
        parts = halves.into_iter().flat_map(|(part, half)| part.split(half)).collect();
    }
    context.for_each(parts.into_iter(), || (), |(), part| bisect(values, dims, part, leaf))?;
    Ok(order)
}

fn bisect(values: &[f32], dims: usize, mut part: Part<'_>, leaf: usize) {
    let half = cut(values, dims, &mut part, leaf);
    if half < part.rows.len() {
        for part in part.split(half) {
            bisect(values, dims, part, leaf);
        }
    }
}

/// Puts the rows on one side of a plane first; returns how many. Whole leaves go there, all where there is one.
fn cut(values: &[f32], dims: usize, part: &mut Part<'_>, leaf: usize) -> usize {
    let half = part.half(leaf);
    let part = &mut *part.rows;
    if half == part.len() {
        return half;
    }
    let row = |row: u32| &values[row as usize * dims..][..dims];
    let sample: Vec<u32> = part.iter().copied().step_by(part.len().div_ceil(SAMPLE)).collect();
    let mut centre = vec![0.0_f32; dims];
    for &picked in &sample {
        centre.iter_mut().zip(row(picked)).for_each(|(centre, &value)| *centre += value / sample.len() as f32);
    }
    // From the row farthest from the centre, two steps of power iteration towards the widest direction.
    let from_centre = |picked: u32| -> f32 { row(picked).iter().zip(&centre).map(|(x, c)| (x - c) * (x - c)).sum() };
    let farthest = sample.iter().copied().max_by(|&a, &b| from_centre(a).total_cmp(&from_centre(b))).unwrap_or(part[0]);
    let mut direction: Vec<f32> = row(farthest).iter().zip(&centre).map(|(x, c)| x - c).collect();
    for _ in 0..2 {
        let middle = inner(&centre, &direction);
        let mut next = vec![0.0_f32; dims];
        for &picked in &sample {
            let share = inner(row(picked), &direction) - middle;
            next.iter_mut().zip(row(picked)).zip(&centre).for_each(|((next, x), c)| *next += share * (x - c));
        }
        let length = inner(&next, &next).sqrt().max(f32::MIN_POSITIVE);
        for value in &mut next {
            *value /= length;
        }
        direction = next;
    }
    let mut placed: Vec<(f32, u32)> = part.iter().map(|&each| (inner(row(each), &direction), each)).collect();
    placed.select_nth_unstable_by(half, |a, b| a.0.total_cmp(&b.0));
    part.iter_mut().zip(placed).for_each(|(each, placed)| *each = placed.1);
    half
}

/// The sum of products, in lanes for the compiler to vectorize.
fn inner(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (x, y) in x.as_chunks::<LANES>().0.iter().zip(y.as_chunks::<LANES>().0) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    let mut count = LANES;
    while count > 1 {
        count /= 2;
        let (low, high) = lanes.split_at_mut(count);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::splitmix64;
    use crate::simd::Level;

    #[test]
    fn groups_keep_their_place_and_leaves_are_those_of_tiles() {
        // Rows on a line, in no order.
        let place = |row: usize| (splitmix64(row as u64) >> 40) as f32 / 16_777_216.0;
        for ends in [&[500][..], &[1, 2, 30, 30 + 16, 180, 500], &[100, 500]] {
            let mut values = vec![0.0; 500 * LANES];
            values.iter_mut().step_by(LANES).zip(0..).for_each(|(value, row)| *value = place(row));
            for threads in [1, 3] {
                let order = order(&Context::new(Level::Scalar, threads), &values, LANES, 16, ends).unwrap();
                let mut start = 0;
                for &end in ends {
                    let mut rows = order[start..end].to_vec();
                    rows.sort_unstable();
                    assert!(rows.iter().copied().eq(start as u32..end as u32), "{ends:?}");
                    // The leaves of the group follow each other on the line, up or down.
                    let leaves: Vec<(f32, f32)> = (start / 16..end.div_ceil(16))
                        .map(|leaf| {
                            let rows = &order[start.max(16 * leaf)..end.min(16 * leaf + 16)];
                            let places = rows.iter().map(|&row| place(row as usize));
                            (places.clone().fold(f32::INFINITY, f32::min), places.fold(0.0, f32::max))
                        })
                        .collect();
                    for (i, one) in leaves.iter().enumerate() {
                        assert!(leaves[..i].iter().all(|other| other.1 < one.0 || one.1 < other.0), "{ends:?}");
                    }
                    start = end;
                }
            }
        }
    }
}

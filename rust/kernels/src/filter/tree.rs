//! An order of rows in which neighbours are alike: recursive bisection.
//!
//! A tile of alike rows is near a query, or far from it, as a whole: in the order in which rows come, twice as many
//! tiles hold a row that may be near. Any order is right.

use crate::context::Context;
use crate::error::Error;

/// The direction of a cut is fitted to so many rows.
const SAMPLE: usize = 192;

/// Cuts of all parts at a time, until there are so many parts that the threads share them evenly.
const PARTS: usize = 64;

/// Sixteen lanes of a sum.
const LANES: usize = 16;

/// The rows of `values`, `dims` wide (a multiple of 16), in an order whose runs of `leaf` rows are alike.
///
/// # Errors
/// [`Error::Cancelled`].
pub(super) fn order(context: &Context<'_>, values: &[f32], dims: usize, leaf: usize) -> Result<Vec<u32>, Error> {
    let mut order: Vec<u32> = (0..(values.len() / dims) as u32).collect();
    let mut parts = vec![&mut order[..]];
    while parts.len() < PARTS && parts[0].len() > leaf {
        let mut halves: Vec<(&mut [u32], usize)> = parts.into_iter().map(|part| (part, 0)).collect();
        context.for_each(halves.iter_mut(), || (), |(), (part, half)| *half = cut(values, dims, part, leaf))?;
        parts = halves.into_iter().flat_map(|(part, half)| <[_; 2]>::from(part.split_at_mut(half))).collect();
    }
    context.for_each(parts.into_iter(), || (), |(), part| bisect(values, dims, part, leaf))?;
    Ok(order)
}

fn bisect(values: &[f32], dims: usize, part: &mut [u32], leaf: usize) {
    if part.len() > leaf {
        let half = cut(values, dims, part, leaf);
        let (low, high) = part.split_at_mut(half);
        bisect(values, dims, low, leaf);
        bisect(values, dims, high, leaf);
    }
}

/// Puts the rows on one side of a plane first; returns how many. Whole leaves go there.
fn cut(values: &[f32], dims: usize, part: &mut [u32], leaf: usize) -> usize {
    if part.len() <= leaf {
        return part.len();
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
    let half = (part.len() / 2).next_multiple_of(leaf).min((part.len() - 1) / leaf * leaf);
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
    lanes.iter().sum()
}

//! The weights of a resize along one axis, as Pillow has them.
//!
//! Position i of the result lies at c = (i + ½)·from/to of the source. A triangle stands there, one source position
//! wide to either side, or from/to of them where the axis shrinks, so that every source position counts. The weight of
//! position x is the triangle's height at x + ½, divided by the sum of all, and rounded to [`BITS`] bits behind the
//! point. What is in float64 here takes part in no sum of pixels: those are exact.

use std::ops::Range;

use crate::error::Error;
use crate::matrix::reserved;

/// Bits of a weight behind the point: a sum of bytes by weights, which add up to 1 but for rounding, fits in 32 bits.
///
/// Rounding at most doubles a weight, as one below half of a unit becomes 0: sums stay below 255·2²³ + 2²¹ < 2³¹.
pub(super) const BITS: u32 = 22;

/// The source positions of some positions of an axis, and what each of them counts.
pub(super) struct Weights {
    /// Of each position, the first source position, and where its weights end.
    ends: Vec<(usize, usize)>,
    values: Vec<i32>,
}

impl Weights {
    /// Those of the `wanted` ones of `to` positions, out of `from`.
    ///
    /// # Errors
    /// [`Error::TooLarge`] and [`Error::OutOfMemory`].
    pub(super) fn new(from: usize, to: usize, wanted: Range<usize>) -> Result<Self, Error> {
        let scale = from as f64 / to as f64;
        let support = scale.max(1.0);
        let inverse = 1.0 / support;
        let most = (2.0 * support) as usize + 2;
        let mut ends = reserved(&[wanted.len()])?;
        let mut values = reserved(&[wanted.len(), most.min(from)])?;
        let mut heights = reserved::<f64>(&[most.min(from)])?;
        for i in wanted {
            let center = (i as f64 + 0.5) * scale;
            // A conversion cuts off what is behind the point, and below 0 everything.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(from);
            heights.clear();
            heights.extend((first..end).map(|x| (1.0 - ((x as f64 - center + 0.5) * inverse).abs()).max(0.0)));
            let sum: f64 = heights.iter().sum();
            values.extend(heights.iter().map(|height| (0.5 + height / sum * f64::from(1 << BITS)) as i32));
            ends.push((first, values.len()));
        }
        Ok(Self { ends, values })
    }

    /// The first source position and the weights from there on, position by position.
    pub(super) fn iter(&self) -> impl ExactSizeIterator<Item = (usize, &[i32])> {
        let mut begin = 0;
        self.ends.iter().map(move |&(first, end)| (first, &self.values[std::mem::replace(&mut begin, end)..end]))
    }

    /// The source positions that count.
    pub(super) fn sources(&self) -> Range<usize> {
        let begin = self.iter().map(|(first, _)| first).min();
        let end = self.iter().map(|(first, weights)| first + weights.len()).max();
        begin.unwrap_or(0)..end.unwrap_or(0)
    }

    /// The same where the first `count` source positions, which do not count, are left out.
    pub(super) fn without(mut self, count: usize) -> Self {
        self.ends.iter_mut().for_each(|(first, _)| *first -= count);
        self
    }
}

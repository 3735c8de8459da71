//! Some rows of a bank: all, or those of some groups.

use std::ops::Range;

/// Row numbers: ranges that rise, and neither overlap nor touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Runs(Vec<Range<usize>>);

impl Runs {
    /// All of so many rows.
    pub(crate) fn all(rows: usize) -> Self {
        Self::joined(std::iter::once(0..rows))
    }

    /// The rows of ranges that rise and do not overlap.
    pub(crate) fn joined(ranges: impl Iterator<Item = Range<usize>>) -> Self {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for range in ranges {
            match runs.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => runs.push(range),
            }
        }
        Self(runs)
    }

    /// How many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(ExactSizeIterator::len).sum()
    }

    /// Row after row.
    #[inline(always)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + Clone + '_ {
        self.0.iter().cloned().flatten()
    }

    /// The rows in parts of `size`, the last of which may have fewer.
    pub(crate) fn parts(&self, size: usize) -> Vec<Self> {
        let mut parts = Vec::with_capacity(self.len().div_ceil(size));
        let mut part: Vec<Range<usize>> = Vec::new();
        let mut room = size;
        for run in &self.0 {
            let mut first = run.start;
            while first < run.end {
                let taken = first..run.end.min(first + room);
                room -= taken.len();
                first = taken.end;
                part.push(taken);
                if room == 0 {
                    parts.push(Self(std::mem::take(&mut part)));
                    room = size;
                }
            }
        }
        if !part.is_empty() {
            parts.push(Self(part));
        }
        parts
    }

    /// The runs in pieces that lie in at most `count` tiles of `tile` rows, tiles being counted from the first row of
    /// the bank.
    pub(crate) fn pieces(&self, tile: usize, count: usize) -> Vec<Range<usize>> {
        let mut pieces = Vec::with_capacity(self.len() / (tile * count) + 2 * self.0.len());
        for run in &self.0 {
            let mut first = run.start;
            while first < run.end {
                let last = run.end.min((first / tile + count) * tile);
                pieces.push(first..last);
                first = last;
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one_run() {
        let runs = Runs::joined([0..3, 3..4, 7..9, 9..20].into_iter());
        assert_eq!(runs, Runs(vec![0..4, 7..20]));
        assert_eq!(runs.len(), 17);
        assert_eq!(runs.iter().collect::<Vec<_>>(), (0..4).chain(7..20).collect::<Vec<_>>());
        assert!(Runs::all(5).iter().eq(0..5));
    }

    #[test]
    fn parts_hold_all_rows_in_order() {
        let runs = Runs::joined([2..5, 6..7, 10..21].into_iter());
        let parts: Vec<Vec<usize>> = runs.parts(4).iter().map(|part| part.iter().collect()).collect();
        assert_eq!(parts, [&[2, 3, 4, 6][..], &[10, 11, 12, 13], &[14, 15, 16, 17], &[18, 19, 20]]);
        assert_eq!(runs.parts(15), std::slice::from_ref(&runs));
        assert_eq!(runs.parts(100), [runs]);
    }

    #[test]
    fn pieces_end_where_tiles_do() {
        let runs = Runs::joined([3..21, 30..31, 32..60].into_iter());
        assert_eq!(runs.pieces(4, 2), [3..8, 8..16, 16..21, 30..31, 32..40, 40..48, 48..56, 56..60]);
        assert_eq!(Runs::all(20).pieces(16, 1), [0..16, 16..20]);
    }
}

//! Where an upsampled axis reads its source: torch's formulas for `align_corners=False`.

/// A position between two source positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Between {
    /// The source position at or before.
    pub low: usize,
    /// The next one, or the last.
    pub high: usize,
    /// Weight of `high`; `low` has the rest of 1.
    pub weight: f64,
}

/// The source of each of `to` positions, interpolated linearly from `from` positions:
/// `(i + ½)·from/to − ½`, not below 0.
pub(crate) fn linear(from: usize, to: usize) -> Vec<Between> {
    let scale = from as f64 / to as f64;
    let between = |i: usize| {
        let source = ((i as f64 + 0.5) * scale - 0.5).max(0.0);
        let low = (source as usize).min(from - 1);
        let high = (low + 1).min(from - 1);
        Between { low, high, weight: source - low as f64 }
    };
    (0..to).map(between).collect()
}

/// The source of each of `to` positions, the nearest of `from` positions in torch's sense:
/// `⌊i·from/to⌋`. Torch computes it in float32, and which side of an integer a product falls on is
/// part of the formula, so this does too.
pub(crate) fn nearest(from: usize, to: usize) -> Vec<usize> {
    let scale = from as f32 / to as f32;
    (0..to).map(|i| ((i as f32 * scale) as usize).min(from - 1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubling_reads_quarters() {
        let found: Vec<_> = linear(2, 4).iter().map(|b| (b.low, b.high, b.weight)).collect();
        assert_eq!(found, [(0, 1, 0.0), (0, 1, 0.25), (0, 1, 0.75), (1, 1, 0.25)]);
        assert_eq!(nearest(2, 4), [0, 0, 1, 1]);
    }

    #[test]
    fn sources_stay_inside() {
        for (from, to) in [(1, 1), (1, 9), (7, 28), (5, 3), (9, 1), (13, 27), (100, 7)] {
            assert!(linear(from, to).iter().all(|b| b.low <= b.high && b.high < from && b.weight < 1.5));
            assert!(nearest(from, to).iter().all(|&i| i < from));
        }
    }

    #[test]
    fn the_same_size_reads_itself() {
        assert!(linear(9, 9).iter().enumerate().all(|(i, b)| b.low == i && b.weight == 0.0));
        assert!(nearest(9, 9).into_iter().eq(0..9));
    }
}

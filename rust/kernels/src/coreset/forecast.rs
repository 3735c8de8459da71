//! The progress of a selection: what share of its time has passed, expressed in picks.
//!
//! ```text
//! time per row  =  PREPARE_NS  +  BEGIN_NS  +  PICK_NS·picks^GROWTH
//! ```
//!
//! The codes are made and every row is looked at once before the second pick, and later picks concern ever fewer
//! rows: counted in picks alone, a selection stood still for two thirds of its time and then ran
//! (`benches/NOTES.md`).

use crate::math::pow;

/// A selection of `count` from `rows` rows.
pub(super) struct Forecast {
    pub rows: usize,
    pub count: usize,
}

/// Nanoseconds per value of a row, fitted to selections from features of networks: of its codes, of its first
/// search among the picks, and of the first of all picks. Only their ratios matter.
const PREPARE_NS: f64 = 3.8;
const BEGIN_NS: f64 = 2.0;
const PICK_NS: f64 = 0.024;

/// How the time grows with the number of picks: later ones are cheaper.
const GROWTH: f64 = 0.65;

impl Forecast {
    /// The progress, out of `count`, once the codes are made, `begun` rows have had their first search and `picks`
    /// picks are made. It is `count` only when all are.
    pub(super) fn done(&self, begun: usize, picks: usize) -> usize {
        let time = |begun: usize, picks: usize| {
            PREPARE_NS + BEGIN_NS * begun as f64 / self.rows as f64 + PICK_NS * pow(picks as f64, GROWTH)
        };
        let share = time(begun, picks) / time(self.rows, self.count);
        if picks == self.count { picks } else { ((share * self.count as f64) as usize).min(self.count - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_to_the_count_and_reaches_it_last() {
        for count in [1, 2, 30, 5000] {
            let forecast = Forecast { rows: 5000, count };
            let mut before = 0;
            let begun = (0..=5000).map(|begun| forecast.done(begun, 0));
            for done in begun.chain((0..=count).map(|picks| forecast.done(5000, picks))) {
                assert!(before <= done && done <= count);
                before = done;
            }
            assert_eq!(before, count);
            assert!(forecast.done(5000, count - 1) < count);
        }
    }
}

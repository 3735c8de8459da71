//! How far a selection is, in picks: what part of its time has passed, measured on features of networks.
//!
//! ```text
//! time per row  =  PREPARE  +  BEGIN  +  PICK·picks^GROWTH
//! ```
//!
//! The codes are made and every row is looked at once before the second pick, later picks concern ever fewer
//! rows: counted in picks alone, a selection would seem to stand still and then to hurry.

use crate::math::pow;

/// A selection of `count` from `rows` rows.
pub struct Forecast {
    pub rows: usize,
    pub count: usize,
}

/// Nanoseconds of a value of a row: of its codes, of its first look, of a pick.
const PREPARE: f64 = 3.8;
const BEGIN: f64 = 2.0;
const PICK: f64 = 0.024;
const GROWTH: f64 = 0.65;

impl Forecast {
    /// What stands for the picks done once the codes are made, `begun` rows have been looked at and `picks`
    /// were made: all of them only when they are.
    pub fn done(&self, begun: usize, picks: usize) -> usize {
        let time = |begun: usize, picks: usize| {
            PREPARE + BEGIN * begun as f64 / self.rows as f64 + PICK * pow(picks as f64, GROWTH)
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

//! The k nearest rows of a query, while they are being found.

/// Up to this many rows are kept sorted; more are collected and sorted now and then.
const SORTED: usize = 64;

/// The k smallest (D2, index) seen so far.
#[derive(Clone, Debug)]
pub(crate) struct TopK {
    kept: Vec<(f64, usize)>,
    worst: f64,
    k: usize,
}

impl TopK {
    /// None seen yet.
    pub(crate) fn new(k: usize) -> Self {
        Self::within(f64::INFINITY, k)
    }

    /// None seen yet, and of interest only up to a D2 of `worst`.
    pub(crate) fn within(worst: f64, k: usize) -> Self {
        Self { kept: Vec::with_capacity(k), worst, k }
    }

    /// The D2 that a row must not exceed to be taken in.
    #[inline(always)]
    pub(crate) fn worst(&self) -> f64 {
        self.worst
    }

    /// Takes a row in if it belongs; a row that is already kept changes nothing.
    #[inline(always)]
    pub(crate) fn offer(&mut self, squared: f64, index: usize) {
        if squared <= self.worst {
            self.insert(squared, index);
        }
    }

    #[inline(never)]
    fn insert(&mut self, squared: f64, index: usize) {
        if self.k > SORTED {
            self.kept.push((squared, index));
            // The first k rows bound the others at once; later ones are sorted in by the k.
            if self.kept.len() >= if self.worst == f64::INFINITY { self.k } else { 2 * self.k } {
                self.sort();
            }
            return;
        }
        let at = self.kept.partition_point(|kept| (kept.0, kept.1) < (squared, index));
        if self.kept.get(at) == Some(&(squared, index)) {
            return;
        }
        self.kept.insert(at, (squared, index));
        self.kept.truncate(self.k);
        self.bound();
    }

    fn sort(&mut self) {
        self.kept.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.kept.dedup();
        self.kept.truncate(self.k);
        self.bound();
    }

    fn bound(&mut self) {
        if self.kept.len() == self.k {
            self.worst = self.kept[self.k - 1].0;
        }
    }

    /// Takes in what another has kept.
    pub(crate) fn absorb(&mut self, other: &Self) {
        for &(squared, index) in &other.kept {
            self.offer(squared, index);
        }
    }

    /// The rows, as (D2, index), ascending.
    pub(crate) fn sorted(&mut self) -> &[(f64, usize)] {
        self.sort();
        &self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_rows_are_kept_alike() {
        for k in [1, 3, SORTED, SORTED + 1, 200] {
            let rows: Vec<(f64, usize)> = (0..1000).map(|i| (f64::from(i * 7919 % 97), i as usize)).collect();
            let mut best = TopK::new(k);
            // Some rows are offered twice.
            for &(squared, index) in rows.iter().chain(&rows[300..400]) {
                best.offer(squared, index);
            }
            let mut expected = rows;
            expected.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            assert_eq!(best.sorted(), &expected[..k]);
        }
    }

    #[test]
    fn rows_beyond_the_first_bound_are_not_taken() {
        let mut best = TopK::within(2.0, 1);
        best.offer(3.0, 0);
        assert_eq!(best.worst(), 2.0);
        best.offer(1.0, 5);
        assert_eq!(best.sorted(), &[(1.0, 5)]);
    }
}

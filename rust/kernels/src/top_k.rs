//! The rows that a query asks for, while they are being found: the k nearest, or all within a distance.

/// Up to this many rows are kept sorted; more are collected and sorted now and then.
const SORTED: usize = 64;

/// Which rows a search is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted {
    /// The k nearest.
    Nearest(usize),
    /// All whose D2 is not above this.
    Within(f64),
}

/// The k smallest (D2, index) seen so far; without a k, all up to a D2.
#[derive(Debug)]
pub(crate) struct TopK {
    /// For a k of 1, which needs no memory of its own; its index is none where nothing was seen.
    nearest: [(f64, usize); 1],
    /// For any other.
    kept: Vec<(f64, usize)>,
    worst: f64,
    k: usize,
}

impl Clone for TopK {
    fn clone(&self) -> Self {
        Self { kept: self.kept.clone(), ..*self }
    }

    /// Into the same memory: a search copies those of all queries for every part of the bank.
    fn clone_from(&mut self, other: &Self) {
        self.kept.clone_from(&other.kept);
        (self.nearest, self.worst, self.k) = (other.nearest, other.worst, other.k);
    }
}

impl TopK {
    /// None seen yet.
    pub(crate) fn new(wanted: Wanted) -> Self {
        let (k, worst) = match wanted {
            Wanted::Nearest(k) => (k, f64::INFINITY),
            Wanted::Within(worst) => (usize::MAX, worst),
        };
        Self { nearest: [(worst, usize::MAX)], kept: Vec::new(), worst, k }
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
            if self.k == 1 {
                self.replace(squared, index);
            } else {
                self.insert(squared, index);
            }
        }
    }

    #[inline(always)]
    fn replace(&mut self, squared: f64, index: usize) {
        if (squared, index) < self.nearest[0] {
            self.nearest[0] = (squared, index);
            self.worst = squared;
        }
    }

    #[inline(never)]
    fn insert(&mut self, squared: f64, index: usize) {
        if self.kept.is_empty() {
            self.kept.reserve_exact(self.k.min(SORTED));
        }
        if self.k > SORTED {
            self.kept.push((squared, index));
            // The first k rows bound the others at once; later ones are sorted in by the k.
            if self.kept.len() >= if self.worst == f64::INFINITY { self.k } else { self.k.saturating_mul(2) } {
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
        for &(squared, index) in other.nearest() {
            self.offer(squared, index);
        }
        for &(squared, index) in &other.kept {
            self.offer(squared, index);
        }
    }

    /// The rows, as (D2, index), ascending.
    pub(crate) fn sorted(&mut self) -> &[(f64, usize)] {
        if self.k == 1 {
            return self.nearest();
        }
        self.sort();
        &self.kept
    }

    /// The row that is kept for a k of 1.
    fn nearest(&self) -> &[(f64, usize)] {
        &self.nearest[..usize::from(self.nearest[0].1 != usize::MAX)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_and_many_rows_are_kept_alike() {
        for k in [1, 3, SORTED, SORTED + 1, 200] {
            let rows: Vec<(f64, usize)> = (0..1000).map(|i| (f64::from(i * 7919 % 97), i as usize)).collect();
            let mut best = TopK::new(Wanted::Nearest(k));
            // Some rows are offered twice.
            for &(squared, index) in rows.iter().chain(&rows[300..400]) {
                best.offer(squared, index);
            }
            let mut expected = rows;
            expected.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            assert_eq!(best.sorted(), &expected[..k]);
            assert_eq!(best.worst(), expected[k - 1].0);
        }
    }

    #[test]
    fn all_rows_up_to_a_distance_are_kept() {
        for worst in [0.0, 2.0, f64::INFINITY] {
            let mut best = TopK::new(Wanted::Within(worst));
            (0..200).for_each(|index| best.offer(f64::from(index % 5), index as usize));
            assert_eq!(best.worst(), worst);
            let mut expected: Vec<(f64, usize)> = (0..200).map(|i| (f64::from(i % 5), i as usize)).collect();
            expected.retain(|&(squared, _)| squared <= worst);
            expected.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            assert_eq!(best.sorted(), expected);
        }
    }
}

//! The k nearest rows of a query, while they are being found.

/// The k smallest (D2, index) seen so far, ascending.
#[derive(Clone, Debug)]
pub struct Best {
    kept: Vec<(f64, usize)>,
    worst: f64,
    k: usize,
}

impl Best {
    /// None seen yet.
    pub fn new(k: usize) -> Self {
        Self::within(f64::INFINITY, k)
    }

    /// None seen yet, and of interest only up to a D2 of `worst`.
    pub fn within(worst: f64, k: usize) -> Self {
        Self { kept: Vec::with_capacity(k), worst, k }
    }

    /// The D2 that a row must not exceed to be taken in.
    #[inline(always)]
    pub fn worst(&self) -> f64 {
        self.worst
    }

    /// How many rows are needed for a finite [`Best::worst`], at least 1.
    pub fn wanted(&self) -> usize {
        if self.worst == f64::INFINITY { self.k } else { 1 }
    }

    /// The rows, as (D2, index), ascending.
    pub fn kept(&self) -> &[(f64, usize)] {
        &self.kept
    }

    /// Takes a row in if it belongs; a row that is already kept changes nothing.
    #[inline(always)]
    pub fn offer(&mut self, squared: f64, index: usize) {
        if squared <= self.worst {
            self.insert(squared, index);
        }
    }

    #[inline(never)]
    fn insert(&mut self, squared: f64, index: usize) {
        let at = self.kept.partition_point(|kept| (kept.0, kept.1) < (squared, index));
        if self.kept.get(at) == Some(&(squared, index)) {
            return;
        }
        self.kept.insert(at, (squared, index));
        self.kept.truncate(self.k);
        if self.kept.len() == self.k {
            self.worst = self.kept[self.k - 1].0;
        }
    }
}

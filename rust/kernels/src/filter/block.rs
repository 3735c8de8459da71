//! A block of queries: what they share while the bank is searched.

use super::codes::CodedQueries;
use super::thresholds::Thresholds;
use crate::top_k::TopK;

/// Queries with their codes and what is known of their nearest rows.
#[derive(Debug)]
pub(super) struct Block<'a> {
    pub(super) queries: Vec<&'a [f32]>,
    /// One for each stage.
    pub(super) coded: Vec<CodedQueries>,
    pub(super) best: Vec<TopK>,
    pub(super) thresholds: Thresholds,
}

/// One of the wanted rows of a query in a part of the bank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) query: u32,
    pub(super) row: u32,
    pub(super) squared: f64,
}

/// Lists all of so many queries.
pub(super) fn number(all: &mut Vec<u16>, queries: usize) {
    all.clear();
    all.extend(0..queries as u16);
}

impl Block<'_> {
    /// Some blocks as one.
    pub(super) fn joined(mut blocks: Vec<Self>) -> Option<Self> {
        if blocks.len() < 2 {
            return blocks.pop();
        }
        let stages = 0..blocks[0].coded.len();
        let coded = stages.map(|stage| CodedQueries::joined(blocks.iter().map(|block| &block.coded[stage]))).collect();
        let thresholds: Vec<_> = blocks.iter().map(|block| (&block.thresholds, block.queries.len())).collect();
        let thresholds = Thresholds::joined(&thresholds);
        let (mut queries, mut best) = (Vec::new(), Vec::new());
        for block in blocks {
            queries.extend(block.queries);
            best.extend(block.best);
        }
        Some(Self { queries, coded, best, thresholds })
    }

    /// Takes in the rows of a part of the bank.
    pub(super) fn take(&mut self, found: Vec<Found>) {
        for Found { query, row, squared } in found {
            self.best[query as usize].offer(squared, row as usize);
        }
    }
}

//! What the products of a search must reach: the bound of `encode`, for the nearest rows of each query known so far.

use super::cascade::{Cascade, StageCodes};
use super::codes::{CodedQueries, UNIT_QUERIES};
use super::search::Block;
use crate::top_k::TopK;

/// By stage, class of tile and query: what products must reach. Past the last query, what none reaches.
#[derive(Debug, Default)]
pub(super) struct Thresholds(pub(super) Vec<Vec<Vec<i32>>>);

impl Thresholds {
    /// Those of queries whose near rows are the best ones known.
    #[inline(always)]
    pub(super) fn new(cascade: &Cascade, coded: &[CodedQueries], best: &[TopK]) -> Self {
        let padded = best.len().next_multiple_of(UNIT_QUERIES);
        let of = |stage: &StageCodes| vec![vec![i32::MAX; padded]; stage.epsilons.len()];
        let mut thresholds = Self(cascade.stages.iter().map(of).collect());
        for (query, best) in best.iter().enumerate() {
            thresholds.set(cascade, coded, query, best.worst());
        }
        thresholds
    }

    /// Sets those of a query whose near rows are the ones within a D2.
    #[inline(always)]
    pub(super) fn set(&mut self, cascade: &Cascade, coded: &[CodedQueries], query: usize, squared: f64) {
        let tau = squared.sqrt();
        for (i, stage) in cascade.stages.iter().enumerate() {
            let bound = cascade.encoder.stages()[i].bound(&coded[i].measures()[query], tau);
            let offset = coded[i].offset_part(query, stage.codes.offset());
            for (thresholds, &epsilon) in self.0[i].iter_mut().zip(&stage.epsilons) {
                thresholds[query] = bound.threshold(epsilon).saturating_add(offset);
            }
        }
    }

    /// Those of the queries of some blocks.
    pub(super) fn joined(blocks: &[Block<'_>]) -> Self {
        let mut joined = Self(blocks[0].thresholds.0.iter().map(|stage| vec![Vec::new(); stage.len()]).collect());
        let count: usize = blocks.iter().map(|block| block.queries.len()).sum();
        for (i, stage) in joined.0.iter_mut().enumerate() {
            for (j, thresholds) in stage.iter_mut().enumerate() {
                for block in blocks {
                    thresholds.extend_from_slice(&block.thresholds.0[i][j][..block.queries.len()]);
                }
                thresholds.resize(count.next_multiple_of(UNIT_QUERIES), i32::MAX);
            }
        }
        joined
    }
}

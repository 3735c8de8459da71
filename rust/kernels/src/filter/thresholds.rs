//! What the products of a search must reach: the right side of (3) in the header of this folder, for the nearest rows of
//! each query known so far.

use super::cascade::{Cascade, StageCodes};
use super::codes::{CodedQueries, UNIT_QUERIES};
use crate::top_k::TopK;

/// By stage, class of tile and query: what products must reach. Past the last query, what none reaches.
#[derive(Debug, Default)]
pub(super) struct Thresholds(pub(super) Vec<Vec<Vec<i32>>>);

impl Thresholds {
    /// Those of queries, for their best rows known so far.
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

    /// Sets those of a query, for rows within a D2.
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

    /// Those of some blocks of so many queries each, as those of one.
    pub(super) fn joined(blocks: &[(&Self, usize)]) -> Self {
        let mut joined = Self(blocks[0].0.0.iter().map(|stage| vec![Vec::new(); stage.len()]).collect());
        let queries: usize = blocks.iter().map(|&(_, queries)| queries).sum();
        for (i, stage) in joined.0.iter_mut().enumerate() {
            for (j, thresholds) in stage.iter_mut().enumerate() {
                for &(block, queries) in blocks {
                    thresholds.extend_from_slice(&block.0[i][j][..queries]);
                }
                thresholds.resize(queries.next_multiple_of(UNIT_QUERIES), i32::MAX);
            }
        }
        joined
    }
}

//! The candidates: the rows from which the picks of a round are taken, all of them fresh.
//!
//! A pick lowers the values of the rows near it. The candidates' codes lie together in tiles, so the products
//! of a pick with all of them take microseconds. What the product of each must reach for its distance to be
//! worth taking is kept until its value changes.

use super::{PICKED, Ranked, Selection, SelectionCodes};
use crate::distance::pair;
use crate::error::Error;
use crate::filter::{CodedQueries, Codes, TILE, one_product};
use crate::simd::{Operation, Simd};

/// Rows that have seen every pick.
pub(super) struct Candidates {
    rows: Vec<Ranked>,
    codes: Option<CandidateCodes>,
}

/// The codes of the candidates.
struct CandidateCodes {
    codes: Codes,
    /// The pick, as a query.
    pick: CodedQueries,
    /// One for each row: a pick can be nearer than the row's value only if its product with the row, less half
    /// the pick's own squared norm, is at least this.
    reach: Vec<[i32; TILE]>,
    /// The largest ε of the candidates, hence of the picks.
    epsilon: f64,
}

/// The reach of a row that no pick can lower: above every product, and far enough from the end of i32 for a
/// norm to be added.
const OUT_OF_REACH: i32 = i32::MAX / 2;

impl Candidates {
    /// Candidates of fresh rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(super) fn new(selection: &Selection<'_>, rows: Vec<Ranked>) -> Result<Self, Error> {
        let Some(SelectionCodes { plan, picks }) = &selection.codes else { return Ok(Self { rows, codes: None }) };
        let order: Vec<u32> = rows.iter().map(|row| row.index as u32).collect();
        let codes = Codes::new(&plan.encoded[0], &order, picks.offset(), None)?;
        let epsilon = (0..codes.tiles()).fold(0.0_f64, |epsilon, tile| epsilon.max(codes.epsilon(tile)));
        let reach = vec![[OUT_OF_REACH; TILE]; codes.tiles()];
        let mut codes = CandidateCodes { codes, pick: CodedQueries::default(), reach, epsilon };
        for (slot, row) in rows.iter().enumerate() {
            codes.set_reach(selection, slot, *row);
        }
        Ok(Self { rows, codes: Some(codes) })
    }

    /// The rows with their values.
    pub(super) fn rows(&self) -> &[Ranked] {
        &self.rows
    }

    /// The candidate of the largest value.
    pub(super) fn best(&self) -> Option<Ranked> {
        self.rows.iter().copied().max()
    }
}

impl CandidateCodes {
    /// Sets the reach of the row in `slot` by its value.
    fn set_reach(&mut self, selection: &Selection<'_>, slot: usize, row: Ranked) {
        let Some(SelectionCodes { plan, .. }) = &selection.codes else { return };
        let measures = &plan.encoded[0].measures[row.index];
        self.reach[slot / TILE][slot % TILE] = if row.value == PICKED {
            OUT_OF_REACH
        } else {
            // The bound is asked with the row as the query, so its threshold has half the pick's norm taken off.
            // The products of a tile have half the norms of the tile's rows taken off, which here are the
            // candidates'.
            let threshold = plan.encoder.stages()[0].bound(measures, row.value.sqrt()).threshold(self.epsilon);
            threshold.saturating_sub(measures.norm >> 1).clamp(-OUT_OF_REACH, OUT_OF_REACH)
        };
    }
}

/// Lowers the values of the candidates by their distances to a pick.
pub(super) struct LowerCandidates<'a, 'b> {
    pub candidates: &'a mut Candidates,
    pub selection: &'a Selection<'b>,
    pub pick: usize,
}

impl Operation for LowerCandidates<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { candidates: Candidates { rows, codes }, selection, pick } = self;
        let (Some(selection_codes), Some(codes)) = (&selection.codes, codes) else {
            selection.add_distances(rows.len());
            for row in rows {
                lower(simd, selection, row, pick);
            }
            return;
        };
        codes.pick.gather(&selection_codes.plan.encoded[0], std::iter::once(pick));
        let mut measured = 0;
        let half = codes.pick.measures()[0].norm >> 1;
        let half = simd.splat_i32(half + codes.pick.offset_part(0, codes.codes.offset()));
        for tile in 0..codes.codes.tiles() {
            let reach = simd.add_i32(simd.load_i32(&codes.reach[tile]), half);
            let mut reached = simd.at_least(one_product(simd, &codes.codes, tile, &codes.pick, 0), reach);
            while reached != 0 {
                let slot = tile * TILE + reached.trailing_zeros() as usize;
                reached &= reached - 1;
                let row = &mut rows[slot];
                let may_lower = !selection_codes.rules_out(simd, row.index, pick, row.value.max(0.0).sqrt());
                measured += usize::from(may_lower);
                if may_lower && lower(simd, selection, row, pick) {
                    codes.set_reach(selection, slot, *row);
                }
            }
        }
        selection.add_distances(measured);
    }
}

/// Lowers the value of a row by its distance to a pick; says whether that changed it.
#[inline(always)]
fn lower<S: Simd>(simd: S, selection: &Selection<'_>, row: &mut Ranked, pick: usize) -> bool {
    let value = if row.index == pick {
        PICKED
    } else {
        row.value.min(pair(simd, selection.features.row(row.index), selection.features.row(pick)))
    };
    let changed = value < row.value;
    row.value = value;
    changed
}

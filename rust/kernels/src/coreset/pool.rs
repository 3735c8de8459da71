//! The fresh rows from which the next picks come.
//!
//! A pick lowers the values of the rows near it. Their codes lie together, so one product of a pick with
//! all of them takes microseconds; what each row's product must reach is kept until its value changes.

use super::{Filter, PICKED, Ranked, Selection};
use crate::distance::pair;
use crate::error::Error;
use crate::filter::{Block, Codes, TILE, products};
use crate::simd::{Operation, Simd};

/// Rows that have seen every pick.
pub struct Pool {
    rows: Vec<Ranked>,
    codes: Option<PoolCodes>,
}

/// The codes of the pool's rows.
struct PoolCodes {
    codes: Codes,
    /// The pick, as a query.
    block: Block,
    /// Per row: a pick may be near only if its product with the row, less half its own squared norm, is at
    /// least this.
    reach: Vec<[i32; TILE]>,
    /// The largest ε of the rows, hence of the picks.
    error: f64,
}

/// Above every product, and far enough from the end of i32 for a norm to be added.
const NEVER: i32 = i32::MAX / 2;

impl Pool {
    /// A pool of fresh rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(selection: &Selection<'_>, rows: Vec<Ranked>) -> Result<Self, Error> {
        let Some(Filter { first, .. }) = &selection.codes else { return Ok(Self { rows, codes: None }) };
        let order: Vec<u32> = rows.iter().map(|row| row.index as u32).collect();
        let codes = Codes::new(&first.rows, &order)?;
        let error = (0..codes.tiles()).fold(0.0_f64, |error, tile| error.max(codes.error(tile)));
        let reach = vec![[NEVER; TILE]; codes.tiles()];
        let mut codes = PoolCodes { codes, block: Block::new(first.encoder.width()), reach, error };
        for (place, row) in rows.iter().enumerate() {
            codes.set_reach(selection, place, *row);
        }
        Ok(Self { rows, codes: Some(codes) })
    }

    /// The rows with their values.
    pub fn rows(&self) -> &[Ranked] {
        &self.rows
    }

    /// The next pick, if it is in the pool.
    pub fn best(&self) -> Option<Ranked> {
        self.rows.iter().copied().max()
    }
}

impl PoolCodes {
    /// Takes the row's value into account.
    fn set_reach(&mut self, selection: &Selection<'_>, place: usize, row: Ranked) {
        let Some(Filter { first, .. }) = &selection.codes else { return };
        let measures = &first.rows.measures[row.index];
        self.reach[place / TILE][place % TILE] = if row.value == PICKED {
            NEVER
        } else {
            // Products with a tile have half the norms of its rows taken off: here those of the pool.
            let threshold = first.encoder.near(measures, row.value.sqrt()).threshold(self.error);
            threshold.saturating_sub(measures.norm >> 1).clamp(-NEVER, NEVER)
        };
    }
}

/// Lowers the values of the pool by the distances to a pick.
pub struct Update<'a, 'b> {
    pub pool: &'a mut Pool,
    pub selection: &'a Selection<'b>,
    pub pick: usize,
}

impl Operation for Update<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Update { pool: Pool { rows, codes }, selection, pick } = self;
        let (Some(Filter { first, second, .. }), Some(codes)) = (&selection.codes, codes) else {
            selection.count(rows.len());
            for row in rows {
                lower(simd, selection, row, pick);
            }
            return;
        };
        codes.block.gather(simd, &first.rows, std::iter::once(pick));
        let mut measured = 0;
        let half = simd.splat_i32(first.rows.measures[pick].norm >> 1);
        for tile in 0..codes.codes.tiles() {
            let reach = simd.add_i32(simd.load_i32(&codes.reach[tile]), half);
            let mut reached = simd.at_least(products(simd, &codes.codes, &codes.block, tile, 0), reach);
            while reached != 0 {
                let place = tile * TILE + reached.trailing_zeros() as usize;
                reached &= reached - 1;
                let row = &mut rows[place];
                let near = match second {
                    Some(second) => !second.rules_out(simd, row.index, pick, row.value.max(0.0).sqrt()),
                    None => true,
                };
                measured += usize::from(near);
                if near && lower(simd, selection, row, pick) {
                    codes.set_reach(selection, place, *row);
                }
            }
        }
        selection.count(measured);
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

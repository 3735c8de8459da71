//! Brings rows up to date: a search for the nearest among the picks that they have not seen.

use super::{Ranked, Selection};
use crate::best::Best;
use crate::context::Pulse;
use crate::distance::every_distance;
use crate::filter::{Coded, Scratch, Search, Second, TILE};
use crate::simd::{Operation, Simd};

/// Without codes, picks between two looks at which rows have fallen below the boundary: few, since most rows
/// fall early, but enough that a row is read for many distances.
const CHUNK_PICKS: usize = 128;

/// Lowers the values of some rows, of which the first has seen the fewest picks, by the distances to the
/// picks that it has not seen. In the answer, bit i is set where row i stopped early, because its value fell below
/// `stop_below`: it has not seen all picks.
pub(super) struct Refresh<'a> {
    pub selection: &'a Selection<'a>,
    pub rows: &'a mut [Ranked],
    pub stop_below: f64,
    pub scratch: Option<&'a mut Scratch>,
    pub pulse: &'a Pulse<'a>,
}

impl Operation for Refresh<'_> {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        let Self { selection, rows, stop_below, scratch, pulse } = self;
        let seen = selection.seen[rows[0].index] as usize;
        if let (Some(codes), Some(scratch)) = (&selection.codes, scratch) {
            let queries: Vec<&[f32]> = rows.iter().map(|row| selection.features.row(row.index)).collect();
            let mut best: Vec<Best> = rows.iter().map(|row| Best::within(row.value, 1)).collect();
            scratch.block.gather(simd, &codes.first.rows, rows.iter().map(|row| row.index));
            let indices: Vec<u32> = rows.iter().map(|row| row.index as u32).collect();
            let second = codes.second.as_ref().map(|Coded { encoder, rows }| Second {
                encoder,
                rows,
                queries: rows,
                names: &indices,
            });
            // The first tile may hold picks seen before: they lower nothing again.
            let search = Search {
                encoder: &codes.first.encoder,
                second,
                codes: &codes.picks,
                order: &selection.picks,
                features: selection.features,
                tiles: seen / TILE..codes.picks.tiles(),
                queries: &queries,
                best: &mut best,
                enough: stop_below,
                pulse: Some(pulse),
            };
            scratch.measured = 0;
            search.run(simd, scratch);
            selection.add_distances(scratch.measured);
            for (row, best) in rows.iter_mut().zip(best) {
                row.value = row.value.min(best.worst());
            }
            scratch.settled
        } else {
            let mut stopped = 0;
            // The latest picks first: none of these rows has seen them.
            for picks in selection.picks[seen..].rchunks(CHUNK_PICKS) {
                for (i, row) in rows.iter().enumerate() {
                    stopped |= u64::from(row.value < stop_below) << i;
                }
                let open: Vec<usize> = (0..rows.len()).filter(|row| stopped >> row & 1 == 0).collect();
                if open.is_empty() || pulse.stopped() {
                    break;
                }
                let queries: Vec<&[f32]> = open.iter().map(|&row| selection.features.row(rows[row].index)).collect();
                selection.add_distances(queries.len() * picks.len());
                let picks = picks.iter().map(|&pick| pick as usize);
                let mut lowest: Vec<f64> = open.iter().map(|&row| rows[row].value).collect();
                every_distance(simd, &queries, selection.features, &picks, |row, squared, _| {
                    lowest[row] = if squared < lowest[row] { squared } else { lowest[row] };
                });
                for (&row, lowest) in open.iter().zip(lowest) {
                    rows[row].value = lowest;
                }
            }
            stopped
        }
    }
}

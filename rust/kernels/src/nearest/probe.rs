//! Chooses how a bank is searched: without codes, or with codes of which width.
//!
//! Narrow codes are multiplied faster, wide ones leave fewer rows to measure, and which of the two wins
//! depends on the data: features of a network live in few dimensions, noise in all. So the probe tries.
//! For some rows of the bank it finds the distance to the nearest other row; for each width it encodes a
//! sample and counts the share of rows that the codes would leave at a fraction [`NEARNESS`] of that
//! distance. The cheapest width by this count is taken:
//!
//! ```text
//! cost per row  =  width  +  columns·width·ROTATE / rows  +  share·(columns·MEASURE + FETCH)
//! without codes =  columns·MEASURE
//! ```
//!
//! The choice decides speed, never answers.

use crate::distance::{Wide, tile};
use crate::error::Error;
use crate::filter::{Basis, Block, Codes, Encoder, QUERIES, STEP, WIDEST, mean, products, sample};
use crate::matrix::{Matrix, checked_len};
use crate::simd::{Operation, Simd};
use crate::threads::Context;

/// Banks below this many rows are searched without codes.
const SMALLEST: usize = 256;

/// Rows that serve as queries.
const PROBES: usize = 32;

/// Rows among which their nearest is sought.
const NEIGHBOURS: usize = 32_768;

/// Rows on which shares are counted.
const SAMPLE: usize = 2048;

/// How near a query is taken to be, in distances between a row and its nearest other: rather too far,
/// since codes that are too narrow cost more than codes that are too wide.
const NEARNESS: f64 = 1.1;

/// Costs in units of one product of 8-bit codes: a product of float32 when a query is rotated, a squared
/// difference in f64, a row that must be fetched from memory and its tile multiplied again. Measured on
/// AVX-512 VNNI; the other levels keep about the same proportions.
const ROTATE: f64 = 4.0;
const MEASURE: f64 = 24.0;
const FETCH: f64 = 30_000.0;

/// The encoder that a bank of these rows should have; `None` for none.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::OutOfMemory`].
pub fn encoder(context: &Context<'_>, rows: Matrix<'_>) -> Result<Option<Encoder>, Error> {
    if rows.rows() < SMALLEST {
        return Ok(None);
    }
    let cols = rows.cols();
    let probes: Vec<usize> = sample(rows.rows(), PROBES).collect();
    let near: Vec<f64> =
        nearest_others(context, rows, &probes)?.into_iter().map(|squared| NEARNESS * squared.sqrt()).collect();
    let chosen: Vec<u32> = sample(rows.rows(), SAMPLE).map(|row| row as u32).collect();
    let all: Vec<u32> = (0..chosen.len() as u32).collect();
    let full = Encoder::full_width(cols);
    let widths = widths(cols);
    let mean = mean(rows);
    let basis = match widths.iter().rfind(|&&width| width < full) {
        Some(&widest) => Some(Basis::fit(context, rows, &mean, widest)?),
        None => None,
    };
    let mut cheapest = (cols as f64 * MEASURE, None);
    for width in widths {
        let own = if width < full { basis.as_ref().map(|basis| basis.narrowed(width)) } else { None };
        let encoder = Encoder::new(context, rows, mean.clone(), own, width);
        let fixed = width as f64 * (1.0 + cols as f64 * ROTATE / rows.rows() as f64);
        if fixed >= cheapest.0 {
            continue;
        }
        let codes = Codes::new(&encoder.encode(context, rows, &chosen)?, &all)?;
        let left = context.level().run(Count { encoder: &encoder, codes: &codes, rows, probes: &probes, near: &near });
        let share = left as f64 / checked_len(&[probes.len(), chosen.len()])? as f64;
        let cost = fixed + share * (cols as f64 * MEASURE + FETCH);
        if cost < cheapest.0 {
            cheapest = (cost, Some(encoder));
        }
    }
    Ok(cheapest.1)
}

/// D2 of each probe to the nearest other row, among at most [`NEIGHBOURS`].
fn nearest_others(context: &Context<'_>, rows: Matrix<'_>, probes: &[usize]) -> Result<Vec<f64>, Error> {
    struct Nearest<'a> {
        rows: Matrix<'a>,
        among: &'a [usize],
        probe: usize,
    }
    impl Operation for Nearest<'_> {
        type Output = f64;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> f64 {
            let mut wide = Wide::with_capacity(1, self.rows.cols());
            wide.push(self.rows.row(self.probe));
            let mut nearest = f64::INFINITY;
            for two in self.among.chunks(2) {
                let pair = [two[0], two[two.len() - 1]];
                let [squared] = tile(simd, [wide.row(0)], pair.map(|row| self.rows.row(row)));
                for (row, squared) in pair.into_iter().zip(squared) {
                    if row != self.probe {
                        nearest = nearest.min(squared);
                    }
                }
            }
            nearest
        }
    }
    let among: Vec<usize> = sample(rows.rows(), NEIGHBOURS).collect();
    let mut nearest = vec![0.0; probes.len()];
    let level = context.level();
    context.for_each(
        probes.iter().zip(&mut nearest),
        || (),
        |(), (&probe, nearest)| {
            *nearest = level.run(Nearest { rows, among: &among, probe });
        },
    )?;
    Ok(nearest)
}

/// How many pairs of a probe and a sampled row the codes leave.
struct Count<'a> {
    encoder: &'a Encoder,
    codes: &'a Codes,
    rows: Matrix<'a>,
    probes: &'a [usize],
    near: &'a [f64],
}

impl Operation for Count<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> usize {
        let mut block = Block::new(self.encoder.width());
        let mut left = 0;
        for (probes, near) in self.probes.chunks(QUERIES).zip(self.near.chunks(QUERIES)) {
            let queries: Vec<&[f32]> = probes.iter().map(|&probe| self.rows.row(probe)).collect();
            block.encode(simd, self.encoder, &queries);
            for (query, &near) in near.iter().enumerate() {
                for tile in 0..self.codes.tiles() {
                    let threshold = self.encoder.threshold(&block.measures[query], near, self.codes.typical_error());
                    let products = products(simd, self.codes, &block, tile, query);
                    left += products.iter().filter(|&&product| product >= threshold).count();
                }
            }
        }
        left
    }
}

/// The widths tried for rows of `cols` columns: prefixes, and all columns where codes may be that wide.
fn widths(cols: usize) -> Vec<usize> {
    let full = Encoder::full_width(cols);
    let prefixes = [STEP, 2 * STEP, 4 * STEP].into_iter().filter(|&width| width < full);
    prefixes.chain((full <= WIDEST).then_some(full)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_codes_are_wider_than_products_allow() {
        assert_eq!(widths(10), [64]);
        assert_eq!(widths(300), [64, 128, 256, 320]);
        assert_eq!(widths(WIDEST), [64, 128, 256, WIDEST]);
        assert_eq!(widths(WIDEST + 1), [64, 128, 256]);
    }
}

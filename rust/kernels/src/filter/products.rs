//! Products of encoded queries with tiles of encoded rows.
//!
//! A query's codes are broadcast four at a time and multiplied by those of sixteen rows, so a product costs the same for
//! one query as for many, and a query that has nothing left to find in a tile costs nothing there. What becomes of the
//! products is a [`Sink`]'s business.
//!
//! Loops over what lies in registers go by number: a closure over an array is not always inlined, and then not compiled
//! for the level, and an array that is moved into an iterator is stored first.

use super::codes::{CodedQueries, Codes, TILE, UNIT_QUERIES};
use crate::simd::{Aligned, LANES, Simd, TileSums};
use std::ops::Range;

/// Takes the products of a query with the sixteen rows of a tile.
pub(crate) trait Sink {
    /// `tile` counts from the first that is asked for.
    fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32);

    /// Takes the products of sixteen queries, from `first` on, with the rows of a tile, from the matrix unit.
    #[inline(always)]
    fn take_sixteen<S: Simd, const COARSER: bool>(
        &mut self,
        simd: S,
        tile: usize,
        first: usize,
        products: &UnitProducts<'_, S, COARSER>,
    ) {
        for i in 0..products.there {
            self.take(simd, tile, first + i, products.of(simd, i));
        }
    }
}

/// The products of sixteen queries with the rows of a tile, as the matrix unit leaves them.
pub(crate) struct UnitProducts<'a, S: Simd, const COARSER: bool> {
    sums: &'a TileSums,
    halves: S::I32,
    /// How much coarser the codes of each query are, where `COARSER`.
    steps: &'a [u32; LANES],
    /// The queries there are; the rest are padding.
    there: usize,
}

impl<S: Simd, const COARSER: bool> UnitProducts<'_, S, COARSER> {
    /// The products of the `i`-th query.
    #[inline(always)]
    pub(crate) fn of(&self, simd: S, i: usize) -> S::I32 {
        let sum = simd.load_i32(&self.sums.0[i]);
        let sum = if COARSER { simd.shift_left(sum, self.steps[i]) } else { sum };
        simd.add_i32(sum, self.halves)
    }
}

/// Hands the lanes whose bits are set in `reached` to `take`, with their products.
#[inline(always)]
pub(crate) fn for_each_reached<S: Simd>(simd: S, products: S::I32, mut reached: u16, mut take: impl FnMut(usize, i32)) {
    if reached == 0 {
        return;
    }
    let mut each = [0; LANES];
    simd.store_i32(products, &mut each);
    while reached != 0 {
        let lane = reached.trailing_zeros() as usize;
        reached &= reached - 1;
        take(lane, each[lane]);
    }
}

/// Hands the products of the listed queries with a tile to a sink.
#[inline(always)]
pub(crate) fn tile_products<S: Simd>(
    simd: S,
    codes: &Codes,
    tile: usize,
    queries: &CodedQueries,
    listed: &[u16],
    sink: &mut impl Sink,
) {
    products_by_many(simd, codes, (tile, 0), queries, listed, sink);
}

/// Hands the products of the listed queries with some tiles to a sink, or those of all queries: a matrix unit multiplies
/// by all of them, or by none.
#[inline(always)]
pub(crate) fn all_products<S: Simd>(
    simd: S,
    unit: &S::MatrixUnit,
    codes: &Codes,
    tiles: Range<usize>,
    queries: &CodedQueries,
    listed: &[u16],
    sink: &mut impl Sink,
) {
    if S::HAS_MATRIX_UNIT && codes.width().is_multiple_of(64) && listed.len() > FEW.max(queries.len() / UNIT_GAIN) {
        if queries.are_coarser() {
            products_by_unit::<S, true>(simd, unit, codes, tiles, queries, sink);
        } else {
            products_by_unit::<S, false>(simd, unit, codes, tiles, queries, sink);
        }
        return;
    }
    for tile in tiles.clone() {
        products_by_many(simd, codes, (tile, tile - tiles.start), queries, listed, sink);
    }
}

/// Codes narrower than this are multiplied by a query after another in the first stage, and codes of this width where
/// there are registers for them.
pub(super) const NARROW: usize = 64;

/// Writes the queries that have a row in the tile whose product reaches their threshold to `left`, which has room for
/// all; returns how many. For codes of `V` vectors a tile: few, so that it stays in registers.
#[inline(always)]
pub(crate) fn narrow_survivors<S: Simd, const V: usize>(
    simd: S,
    codes: &Codes,
    tile: usize,
    queries: &CodedQueries,
    thresholds: &[i32],
    left: &mut [u16],
) -> usize {
    if queries.are_coarser() {
        narrow_survivors_by::<S, V, true>(simd, codes, tile, queries, thresholds, left)
    } else {
        narrow_survivors_by::<S, V, false>(simd, codes, tile, queries, thresholds, left)
    }
}

/// One query after another, many of which the CPU has at work. Several at once need more registers than there are.
#[inline(always)]
fn narrow_survivors_by<S: Simd, const V: usize, const COARSER: bool>(
    simd: S,
    codes: &Codes,
    tile: usize,
    queries: &CodedQueries,
    thresholds: &[i32],
    left: &mut [u16],
) -> usize {
    let stored = &codes.tile(tile)[..V];
    let mut vectors = [simd.load_codes(&stored[0].0); V];
    for (vector, stored) in vectors.iter_mut().zip(stored) {
        *vector = simd.load_codes(&stored.0);
    }
    let halves = simd.load_i32(codes.halves(tile));
    let rows: &[[[i8; 4]; V]] = queries.codes().as_chunks().0.as_chunks().0;
    let rows = rows[..queries.len()].iter().zip(queries.steps()).zip(thresholds);
    let (mut count, mut query) = (0, 0);
    for ((row, &coarser), &threshold) in rows {
        let mut sum = if COARSER { simd.splat_i32(0) } else { halves };
        for k in (0..V).step_by(2) {
            let four = [simd.splat_codes(row[k]), simd.splat_codes(row[k + 1])];
            sum = simd.dot_two(sum, [vectors[k], vectors[k + 1]], four);
        }
        let products = if COARSER { simd.add_i32(simd.shift_left(sum, coarser), halves) } else { sum };
        // Written always, counted where it belongs: a branch would often be guessed wrong.
        left[count] = query;
        count += usize::from(simd.at_least(products, simd.splat_i32(threshold)) != 0);
        query += 1;
    }
    count
}

/// Up to this many queries leave most of the matrix unit empty.
const FEW: usize = 8;

/// How many queries it multiplies by in the time that one takes without it.
const UNIT_GAIN: usize = 6;

/// As many queries at a time as have room for their sums in registers, then the others one by one.
#[inline(always)]
fn products_by_many<S: Simd>(
    simd: S,
    codes: &Codes,
    at: (usize, usize),
    queries: &CodedQueries,
    listed: &[u16],
    sink: &mut impl Sink,
) {
    match (S::MANY_REGISTERS, queries.are_coarser()) {
        (true, true) => products_by::<S, 8, true>(simd, codes, at, queries, listed, sink),
        (true, false) => products_by::<S, 8, false>(simd, codes, at, queries, listed, sink),
        (false, true) => products_by::<S, 3, true>(simd, codes, at, queries, listed, sink),
        (false, false) => products_by::<S, 3, false>(simd, codes, at, queries, listed, sink),
    }
}

#[inline(always)]
fn products_by<S: Simd, const Q: usize, const COARSER: bool>(
    simd: S,
    codes: &Codes,
    (tile, at): (usize, usize),
    queries: &CodedQueries,
    listed: &[u16],
    sink: &mut impl Sink,
) {
    let vectors: &[[Aligned<[i8; 64]>; 2]] = codes.tile(tile).as_chunks().0;
    let halves = simd.load_i32(codes.halves(tile));
    let (groups, rest) = listed.as_chunks::<Q>();
    for group in groups {
        let mut rows: [&[[[i8; 4]; 2]]; Q] = [&[]; Q];
        for (row, &query) in rows.iter_mut().zip(group) {
            *row = &queries.row(query as usize).as_chunks().0[..vectors.len()];
        }
        let mut sums = [simd.splat_i32(0); Q];
        for (k, [first, second]) in vectors.iter().enumerate() {
            let tile = [simd.load_codes(&first.0), simd.load_codes(&second.0)];
            for q in 0..Q {
                let four = [simd.splat_codes(rows[q][k][0]), simd.splat_codes(rows[q][k][1])];
                sums[q] = simd.dot_two(sums[q], tile, four);
            }
        }
        for q in 0..Q {
            let query = usize::from(group[q]);
            let sum = if COARSER { simd.shift_left(sums[q], queries.steps()[query]) } else { sums[q] };
            sink.take(simd, at, query, simd.add_i32(sum, halves));
        }
    }
    for &query in rest {
        let products = one_product(simd, codes, tile, queries, query as usize);
        sink.take(simd, at, query as usize, products);
    }
}

/// The products of a query with a tile.
#[inline(always)]
pub(crate) fn one_product<S: Simd>(
    simd: S,
    codes: &Codes,
    tile: usize,
    queries: &CodedQueries,
    query: usize,
) -> S::I32 {
    // Four sums, so that an addition need not wait for the last.
    let (eights, rest) = codes.tile(tile).as_chunks::<8>();
    let (row_eights, row_rest) = queries.row(query).as_chunks::<8>();
    let mut sums = [simd.splat_i32(0); 4];
    for (vectors, row) in eights.iter().zip(row_eights) {
        for (i, sum) in sums.iter_mut().enumerate() {
            let tile = [simd.load_codes(&vectors[2 * i].0), simd.load_codes(&vectors[2 * i + 1].0)];
            *sum = simd.dot_two(*sum, tile, [simd.splat_codes(row[2 * i]), simd.splat_codes(row[2 * i + 1])]);
        }
    }
    for (i, (vector, &four)) in rest.iter().zip(row_rest).enumerate() {
        sums[i % 4] = simd.dot(sums[i % 4], simd.load_codes(&vector.0), simd.splat_codes(four));
    }
    let sum = simd.add_i32(simd.add_i32(sums[0], sums[1]), simd.add_i32(sums[2], sums[3]));
    simd.add_i32(simd.shift_left(sum, queries.steps()[query]), simd.load_i32(codes.halves(tile)))
}

/// Two tiles and 32 queries at a time; codes of the tiles wait in the first-level cache for the next queries.
#[inline(always)]
fn products_by_unit<S: Simd, const COARSER: bool>(
    simd: S,
    unit: &S::MatrixUnit,
    codes: &Codes,
    tiles: Range<usize>,
    queries: &CodedQueries,
    sink: &mut impl Sink,
) {
    let mut sums: [[TileSums; 2]; 2] = [[Aligned([[0; LANES]; TILE]); 2]; 2];
    for (i, group) in queries.codes().chunks_exact(UNIT_QUERIES * codes.width()).enumerate() {
        for first in tiles.clone().step_by(2) {
            let count = (tiles.end - first).min(2);
            // A last tile without a second is multiplied twice.
            let pair = [codes.tile(first), codes.tile(first + count - 1)];
            simd.dot_tiles(unit, group.as_chunks().0, pair, &mut sums);
            for (g, sums) in sums.iter().enumerate() {
                let start = i * UNIT_QUERIES + g * LANES;
                let steps = &queries.steps().as_chunks().0[start / LANES];
                let there = queries.len().saturating_sub(start).min(LANES);
                for (t, sums) in sums.iter().enumerate().take(count) {
                    let halves = simd.load_i32(codes.halves(first + t));
                    let products = UnitProducts::<S, COARSER> { sums, halves, steps, there };
                    sink.take_sixteen(simd, first + t - tiles.start, start, &products);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;
    use crate::distance::Pair;
    use crate::filter::codes::NEVER;
    use crate::filter::encode::{Encode, EncodeScratch};
    use crate::filter::encoder::{Encoder, Stage};
    use crate::matrix::Matrix;
    use crate::simd::{Level, Operation};
    use proptest::prelude::*;

    /// The products of all queries with all rows, offsets taken off, by each way to compute them.
    struct Products<'a> {
        codes: &'a Codes,
        queries: &'a CodedQueries,
    }

    /// Collects products.
    struct Collect<'a> {
        tile: usize,
        products: &'a mut [Vec<i32>],
    }

    impl Sink for Collect<'_> {
        #[inline(always)]
        fn take<S: Simd>(&mut self, simd: S, tile: usize, query: usize, products: S::I32) {
            let first = (self.tile + tile) * TILE;
            let lanes = &mut self.products[query][first..][..TILE];
            simd.store_i32(products, lanes.first_chunk_mut().unwrap());
        }
    }

    impl Operation for Products<'_> {
        type Output = Vec<Vec<Vec<i32>>>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let Self { codes, queries } = self;
            let empty = vec![vec![i32::MIN; codes.tiles() * TILE]; queries.len()];
            let mut ways = vec![empty; 3];
            let all: Vec<u16> = (0..queries.len() as u16).collect();
            let unit = simd.matrix_unit();
            let mut sink = Collect { tile: 0, products: &mut ways[0] };
            all_products(simd, &unit, codes, 0..codes.tiles(), queries, &all, &mut sink);
            drop(unit);
            for tile in 0..codes.tiles() {
                let mut sink = Collect { tile, products: &mut ways[1] };
                tile_products(simd, codes, tile, queries, &all, &mut sink);
                for (query, products) in ways[2].iter_mut().enumerate() {
                    let lanes = products[tile * TILE..].first_chunk_mut().unwrap();
                    simd.store_i32(one_product(simd, codes, tile, queries, query), lanes);
                }
            }
            for products in &mut ways {
                for (query, products) in products.iter_mut().enumerate() {
                    let offset = queries.offset_part(query, codes.offset());
                    for product in products {
                        *product -= offset;
                    }
                }
            }
            ways
        }
    }

    /// Encodes rows as queries: where they would be clipped, their codes are coarser.
    pub(super) struct EncodeQueries<'a> {
        encoder: &'a Encoder,
        rows: &'a [&'a [f32]],
    }

    impl Operation for EncodeQueries<'_> {
        type Output = Vec<CodedQueries>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let Self { encoder, rows } = self;
            let count = rows.len();
            let widths = encoder.stages().iter().map(Stage::width);
            let mut coded: Vec<CodedQueries> = widths.map(|width| CodedQueries::with_room(width, count)).collect();
            let mut outputs: Vec<_> = coded.iter_mut().map(|coded| coded.part(0, count)).collect();
            let scratch = &mut EncodeScratch::default();
            Encode { encoder, rows, outputs: &mut outputs, leading: &mut [], coarser: true, scratch }.run(simd);
            coded.into_iter().map(CodedQueries::encoded).collect()
        }
    }

    /// No pair within `tau` may fall below the threshold, for any level, width and data.
    fn check(rows: Matrix<'_>, queries: Matrix<'_>, widths: &[usize]) {
        let order: Vec<u32> = (0..rows.rows() as u32).collect();
        let queries: Vec<&[f32]> = (0..queries.rows()).map(|i| queries.row(i)).collect();
        for level in Level::available() {
            let context = Context::new(level, 1);
            let encoder = Encoder::fit(&context, rows, widths).unwrap();
            let encoded = encoder.encode(&context, rows).unwrap();
            let coded = level.run(EncodeQueries { encoder: &encoder, rows: &queries });
            for ((stage, encoded), coded) in encoder.stages().iter().zip(&encoded).zip(&coded) {
                let codes = Codes::new(encoded, &order, level.code_offset(), None).unwrap();
                let ways = level.run(Products { codes: &codes, queries: coded });
                let product = |query: usize, row: usize| {
                    let (x, y) = (&coded.codes()[query * stage.width()..][..stage.width()], encoded.row(row));
                    let dot: i32 = x.iter().zip(y).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum();
                    (dot << coded.measures()[query].coarser) - (encoded.measures[row].norm >> 1)
                };
                for (q, query) in queries.iter().enumerate() {
                    for row in 0..rows.rows() {
                        let product = product(q, row);
                        for ways in &ways {
                            assert_eq!(ways[q][row], product, "{level}: query {q}, row {row}");
                        }
                        let tau = level.run(Pair(query, rows.row(row))).sqrt();
                        let epsilon = codes.epsilon(row / TILE);
                        let threshold = stage.bound(&coded.measures()[q], tau).threshold(epsilon);
                        assert!(product >= threshold, "{level}: query {q}, row {row}, tau {tau}");
                    }
                    assert!(ways[0][q][rows.rows()..].iter().all(|&padding| padding < NEVER / 2));
                }
            }
        }
    }

    /// Data that bounds are attacked with: shapes of value, scales and offsets per column.
    fn data() -> impl Strategy<Value = (usize, Vec<f32>)> {
        let value = prop_oneof![
            4 => -1.0_f32..1.0,
            1 => Just(0.0_f32),
            1 => (-3_i8..4).prop_map(f32::from),
            1 => (0.0_f32..9.0).prop_map(f32::exp),
        ];
        let scale = prop_oneof![3 => Just(1.0_f32), 1 => Just(0.0_f32), 1 => 1e-6_f32..1e-3, 1 => 1e2_f32..1e3];
        let offset = prop_oneof![3 => Just(0.0_f32), 1 => Just(1e6_f32), 1 => -5.0_f32..5.0];
        (1_usize..150).prop_flat_map(move |cols| {
            let values = prop::collection::vec(value.clone(), 60 * cols);
            let columns = prop::collection::vec((scale.clone(), offset.clone()), cols);
            (values, columns).prop_map(move |(mut values, columns)| {
                for row in values.chunks_exact_mut(cols) {
                    for (value, (scale, offset)) in row.iter_mut().zip(&columns) {
                        *value = *value * scale + offset;
                    }
                }
                (cols, values)
            })
        })
    }

    /// Every width below that of all columns, and that.
    fn all_widths(cols: usize) -> Vec<usize> {
        let whole = Encoder::whole_width(cols);
        [16, 32, 64, 128].into_iter().filter(|&width| width < whole).chain([whole]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_bound_never_loses_a_pair(
            (cols, mut values) in data(), rows in 1_usize..40, far in prop_oneof![Just(1.0_f32), 2.0_f32..1e5],
        ) {
            // Half of the queries are easy, and half as far from all rows as is asked for.
            values[50 * cols..].iter_mut().for_each(|value| *value = *value * far + (far - 1.0));
            let bank = Matrix::new("features", &values[..rows * cols], rows, cols).unwrap();
            let queries = Matrix::new("queries", &values[40 * cols..], 20, cols).unwrap();
            check(bank, queries, &all_widths(cols));
            check(bank, bank, &all_widths(cols));
        }
    }

    #[test]
    fn queries_far_outside_the_codes_range_are_not_lost() {
        let values: Vec<f32> = (0..200 * 90).map(|i| ((i * 37 % 101) as f32).sin()).collect();
        let bank = Matrix::new("features", &values, 200, 90).unwrap();
        for far in [3.0, 1e2, 1e4] {
            let far: Vec<f32> = values[..10 * 90].iter().map(|value| value * far + 30.0).collect();
            check(bank, Matrix::new("queries", &far, 10, 90).unwrap(), &all_widths(90));
        }
    }

    /// Rows and queries of one value in one column, others zero: where the value is a multiple of the largest code, all
    /// their coordinates are equal, and multiples of the step. Nothing is rounded but what a test means to be.
    fn single(cols: usize, values: &[f32]) -> Vec<f32> {
        let mut rows = vec![0.0; values.len() * cols];
        rows.iter_mut().step_by(cols).zip(values).for_each(|(first, &value)| *first = value);
        rows
    }

    /// The largest codes of all levels.
    const LIMITS: [f32; 2] = [63.0, 127.0];

    #[test]
    fn a_threshold_for_exactly_the_distance_is_reached_exactly() {
        for limit in LIMITS {
            let values = single(64, &[limit, -limit]);
            let rows = Matrix::new("features", &values, 2, 64).unwrap();
            // Both rows are as far from each other as codes can be: a factor below 1 on lengths loses the pair.
            check(rows, rows, &[64]);
            for level in Level::available().into_iter().filter(|level| level.code_limit() as f32 == limit) {
                let encoder = Encoder::fit(&Context::new(level, 1), rows, &[64]).unwrap();
                let coded = level.run(EncodeQueries { encoder: &encoder, rows: &[rows.row(0)] });
                let bound = encoder.stages()[0].bound(&coded[0].measures()[0], 0.0);
                // Equal rows: the product is half the norm, and no other integer is within reach.
                assert_eq!(bound.threshold(0.0), coded[0].measures()[0].norm >> 1, "{level}");
            }
        }
    }

    #[test]
    fn the_error_of_the_computed_image_belongs_to_a_row() {
        // The mean is half of the last bit of the rows' values, so that centring rounds them away from it; a query at
        // the mean errs by nothing. The code of a row is then longer than the row is far from the query, and the error
        // of its computed image is the only one there is.
        let cols = 16_384;
        for limit in LIMITS {
            let ulp = limit.next_up() - limit;
            let values = single(cols, &[limit, ulp - limit]);
            let rows = Matrix::new("features", &values, 2, cols).unwrap();
            let query = single(cols, &[0.5 * ulp]);
            check(rows, Matrix::new("queries", &query, 1, cols).unwrap(), &[cols]);
        }
    }
}

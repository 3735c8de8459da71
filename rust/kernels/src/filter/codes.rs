//! Encoded rows in tiles of sixteen, encoded queries in blocks of forty-eight, and their products.
//!
//! A tile is stored row after row. A block is stored twice: interleaved in lanes, four codes of sixteen
//! queries to a vector, for [`maxima`], which multiplies a whole block by a tile and keeps the largest
//! product per query; and row after row for [`products`], which recomputes one query's sixteen.
//!
//! A product here is X·Y − ⌊|Y|²/2⌋, the left side of (3) in the header of this folder.

use super::{Encode, Encoded, Encoder, Measures, Workspace};
use crate::error::Error;
use crate::matrix::reserved;
use crate::simd::{LANES, Operation, Simd};

/// Rows of a tile.
pub(crate) const TILE: usize = 16;

/// Queries of a block.
pub(crate) const QUERIES: usize = 48;

/// Up to this many queries are multiplied one by one: most lanes of a vector would be empty.
const FEW: usize = 4;

/// Sixteen queries share a vector.
pub(crate) const GROUPS: usize = QUERIES / LANES;

/// A product no query reaches: padding rows have it, less the little that their zero codes add.
const NEVER: i32 = i32::MIN / 2;

/// Encoded rows in tiles.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    bytes: Vec<i8>,
    width: usize,
    rows: usize,
    /// −⌊|Y|²/2⌋ and ΣY of each row, padding included.
    halves: Vec<i32>,
    sums: Vec<i32>,
    /// ε of each row, and the largest of each tile.
    row_errors: Vec<f32>,
    errors: Vec<f32>,
}

impl Codes {
    /// No rows yet.
    pub(crate) fn empty(width: usize) -> Self {
        Self {
            bytes: Vec::new(),
            width,
            rows: 0,
            halves: Vec::new(),
            sums: Vec::new(),
            row_errors: Vec::new(),
            errors: Vec::new(),
        }
    }

    /// The rows of `encoded` in the given order.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn new(encoded: &Encoded, order: &[u32]) -> Result<Self, Error> {
        let tiles = order.len().div_ceil(TILE);
        let mut codes = Self {
            bytes: reserved(&[tiles, TILE, encoded.width])?,
            halves: reserved(&[tiles, TILE])?,
            sums: reserved(&[tiles, TILE])?,
            row_errors: reserved(&[order.len()])?,
            errors: reserved(&[tiles])?,
            ..Self::empty(encoded.width)
        };
        for &row in order {
            codes.push(encoded, row as usize);
        }
        Ok(codes)
    }

    /// Appends a row of `encoded`.
    pub(crate) fn push(&mut self, encoded: &Encoded, row: usize) {
        if self.rows == self.halves.len() {
            let padded = self.rows + TILE;
            self.bytes.resize(padded * self.width, 0);
            self.halves.resize(padded, NEVER);
            self.sums.resize(padded, 0);
            self.errors.push(0.0);
        }
        let measures = &encoded.measures[row];
        self.bytes[self.rows * self.width..][..self.width].copy_from_slice(encoded.row(row));
        self.halves[self.rows] = -(measures.norm >> 1);
        self.sums[self.rows] = measures.sum;
        let error = &mut self.errors[self.rows / TILE];
        *error = error.max(measures.total);
        self.row_errors.push(measures.total);
        self.rows += 1;
    }

    /// Number of rows, padding not counted.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of tiles.
    pub(crate) fn tiles(&self) -> usize {
        self.errors.len()
    }

    /// Largest ε of a tile.
    #[inline(always)]
    pub(crate) fn error(&self, tile: usize) -> f64 {
        f64::from(self.errors[tile])
    }

    /// ε of the row at a place.
    #[inline(always)]
    pub(crate) fn row_error(&self, place: usize) -> f64 {
        f64::from(self.row_errors[place])
    }

    /// Bytes held.
    pub(crate) fn nbytes(&self) -> usize {
        self.bytes.len() + 4 * (self.halves.len() + self.sums.len() + self.row_errors.len() + self.errors.len())
    }

    /// The rows of a tile, one after another.
    #[inline(always)]
    fn tile(&self, tile: usize) -> &[[i8; 64]] {
        self.bytes[tile * TILE * self.width..][..TILE * self.width].as_chunks().0
    }

    /// A row of a tile, four codes at a time.
    #[inline(always)]
    fn row(&self, tile: usize, row: usize) -> &[[i8; 4]] {
        self.bytes[(tile * TILE + row) * self.width..][..self.width].as_chunks().0
    }

    /// What the products of a tile start from: −⌊|Y|²/2⌋, less what the queries' offset adds.
    #[inline(always)]
    fn start<S: Simd>(&self, tile: usize) -> [i32; TILE] {
        let (halves, sums) = (&self.halves[tile * TILE..][..TILE], &self.sums[tile * TILE..][..TILE]);
        let mut start = [0; TILE];
        for (row, start) in start.iter_mut().enumerate() {
            *start = halves[row] - S::CODE_OFFSET * sums[row];
        }
        start
    }
}

/// Encoded queries, [`QUERIES`] at most.
pub(crate) struct Block {
    /// [`GROUPS`] × width/4 vectors of 16 queries × 4 codes, offset.
    lanes: Vec<[i8; 64]>,
    /// `QUERIES × width` codes, offset.
    rows: Vec<i8>,
    /// One for each query.
    pub measures: Vec<Measures>,
    width: usize,
}

impl Block {
    /// An empty block for codes of `width`.
    pub(crate) fn new(width: usize) -> Self {
        Self {
            lanes: vec![[0; 64]; GROUPS * width / 4],
            rows: vec![0; QUERIES * width],
            measures: Vec::with_capacity(QUERIES),
            width,
        }
    }

    /// Encodes queries into the block.
    #[inline(always)]
    pub(crate) fn encode<S: Simd>(
        &mut self,
        simd: S,
        encoder: &Encoder,
        queries: &[&[f32]],
        workspace: &mut Workspace,
    ) {
        self.measures.clear();
        self.measures.resize(queries.len(), Measures::default());
        let codes = &mut self.rows[..queries.len() * self.width];
        Encode { encoder, rows: queries, codes, measures: &mut self.measures, workspace }.run(simd);
        self.interleave(simd);
    }

    /// Takes queries that are encoded already.
    #[inline(always)]
    pub(crate) fn gather<S: Simd>(&mut self, simd: S, encoded: &Encoded, queries: impl Iterator<Item = usize>) {
        self.measures.clear();
        for (query, codes) in queries.zip(self.rows.chunks_exact_mut(self.width)) {
            codes.copy_from_slice(encoded.row(query));
            self.measures.push(encoded.measures[query]);
        }
        self.interleave(simd);
    }

    /// Offsets the codes of the rows and writes them to the lanes.
    #[inline(always)]
    fn interleave<S: Simd>(&mut self, _: S) {
        let queries = self.measures.len();
        for code in &mut self.rows[..queries * self.width] {
            *code = (i32::from(*code) + S::CODE_OFFSET) as i8;
        }
        let per_group = self.width / 4;
        for (query, codes) in self.rows.chunks_exact(self.width).take(queries).enumerate() {
            let (group, lane) = (query / LANES, query % LANES);
            for (vector, four) in self.lanes[group * per_group..].iter_mut().zip(codes.as_chunks::<4>().0) {
                vector[4 * lane..4 * lane + 4].copy_from_slice(four);
            }
        }
    }

    #[inline(always)]
    fn group(&self, group: usize) -> &[[i8; 64]] {
        &self.lanes[group * self.width / 4..][..self.width / 4]
    }
}

/// The largest product of each query of a block with the rows of each tile `first..first + out.len()`.
/// Lanes past the last query hold anything.
#[inline(always)]
pub(crate) fn maxima<S: Simd>(simd: S, codes: &Codes, block: &Block, first: usize, out: &mut [[[i32; LANES]; GROUPS]]) {
    if block.measures.len() <= FEW {
        for (i, out) in out.iter_mut().enumerate() {
            for (query, out) in out[0].iter_mut().enumerate().take(block.measures.len()) {
                let mut each = [0; TILE];
                simd.store_i32(products(simd, codes, block, first + i, query), &mut each);
                *out = each.into_iter().fold(i32::MIN, i32::max);
            }
        }
        return;
    }
    let groups = block.measures.len().div_ceil(LANES);
    if S::HAS_MATRIX_UNIT {
        let unit = simd.matrix_unit();
        for (i, out) in out.iter_mut().enumerate() {
            if groups == GROUPS {
                unit_maxima::<S, GROUPS>(simd, &unit, codes, &block.lanes, first + i, out);
            } else {
                for (group, out) in out[..groups].iter_mut().enumerate() {
                    let queries = block.group(group);
                    unit_maxima::<S, 1>(simd, &unit, codes, queries, first + i, std::array::from_mut(out));
                }
            }
        }
        return;
    }
    for (i, out) in out.iter_mut().enumerate() {
        let tile = first + i;
        let start = codes.start::<S>(tile);
        if !S::MANY_REGISTERS {
            for (group, out) in out[..groups].iter_mut().enumerate() {
                tile_maxima::<S, 4, 1>(simd, codes, block, tile, &start, group, std::array::from_mut(out));
            }
        } else if groups == GROUPS {
            tile_maxima::<S, 8, GROUPS>(simd, codes, block, tile, &start, 0, out);
        } else {
            for (group, out) in out[..groups].iter_mut().enumerate() {
                tile_maxima::<S, TILE, 1>(simd, codes, block, tile, &start, group, std::array::from_mut(out));
            }
        }
    }
}

/// The largest products of a tile with `G` groups of queries, by a matrix unit.
#[inline(always)]
fn unit_maxima<S: Simd, const G: usize>(
    simd: S,
    unit: &S::MatrixUnit,
    codes: &Codes,
    queries: &[[i8; 64]],
    tile: usize,
    out: &mut [[i32; LANES]; G],
) {
    let start = codes.start::<S>(tile);
    let mut sums = [[[0; LANES]; TILE]; G];
    simd.dot_tile(unit, codes.tile(tile), queries, &mut sums);
    for (sums, out) in sums.iter().zip(out) {
        let mut largest = simd.splat_i32(i32::MIN);
        for (sums, &start) in sums.iter().zip(&start) {
            largest = simd.max_i32(largest, simd.add_i32(simd.load_i32(sums), simd.splat_i32(start)));
        }
        simd.store_i32(largest, out);
    }
}

/// `R` rows times `G` groups of queries keep their sums in registers.
#[inline(always)]
fn tile_maxima<S: Simd, const R: usize, const G: usize>(
    simd: S,
    codes: &Codes,
    block: &Block,
    tile: usize,
    start: &[i32; TILE],
    group: usize,
    out: &mut [[i32; LANES]; G],
) {
    // Loops instead of closures over arrays: those are not always inlined, and then not compiled for
    // the level.
    let quads = codes.width / 4;
    let mut queries: [&[[i8; 64]]; G] = [&[]; G];
    for (g, query) in queries.iter_mut().enumerate() {
        *query = &block.group(group + g)[..quads];
    }
    let mut largest = [simd.splat_i32(i32::MIN); G];
    for first in (0..TILE).step_by(R) {
        let mut rows: [&[[i8; 4]]; R] = [&[]; R];
        let mut sums = [[simd.splat_i32(0); G]; R];
        for r in 0..R {
            rows[r] = &codes.row(tile, first + r)[..quads];
            sums[r] = [simd.splat_i32(start[first + r]); G];
        }
        for k in 0..quads {
            let mut four = [simd.splat_codes([0; 4]); G];
            for (four, query) in four.iter_mut().zip(&queries) {
                *four = simd.load_codes(&query[k]);
            }
            for (sums, row) in sums.iter_mut().zip(&rows) {
                let row = simd.splat_codes(row[k]);
                for (sum, &query) in sums.iter_mut().zip(&four) {
                    *sum = simd.dot(*sum, query, row);
                }
            }
        }
        for sums in sums {
            for (largest, sum) in largest.iter_mut().zip(sums) {
                *largest = simd.max_i32(*largest, sum);
            }
        }
    }
    for (largest, out) in largest.into_iter().zip(out) {
        simd.store_i32(largest, out);
    }
}

/// The products of one query of a block with the sixteen rows of a tile.
#[inline(always)]
pub(crate) fn products<S: Simd>(simd: S, codes: &Codes, block: &Block, tile: usize, query: usize) -> S::I32 {
    let query: &[[i8; 64]] = block.rows[query * block.width..][..block.width].as_chunks().0;
    let mut sums = [simd.splat_i32(0); TILE];
    for (row, sum) in codes.tile(tile).chunks_exact(query.len()).zip(&mut sums) {
        for (query, row) in query.iter().zip(row) {
            *sum = simd.dot(*sum, simd.load_codes(query), simd.load_codes(row));
        }
    }
    simd.add_i32(simd.load_i32(&codes.start::<S>(tile)), simd.sums(sums))
}

/// The product of two encoded rows: X·Y − ⌊|Y|²/2⌋.
#[inline(always)]
pub(super) fn product<S: Simd>(simd: S, x: &[i8], (y, measures): (&[i8], &Measures)) -> i32 {
    let (x, y): (&[[i8; 64]], &[[i8; 64]]) = (x.as_chunks().0, y.as_chunks().0);
    let mut lanes = simd.splat_i32(0);
    for (x, y) in x.iter().zip(y) {
        let mut offset = *x;
        for code in &mut offset {
            *code = code.wrapping_add(S::CODE_OFFSET as u8 as i8);
        }
        lanes = simd.dot(lanes, simd.load_codes(&offset), simd.load_codes(y));
    }
    simd.sum_i32(lanes) - (measures.norm >> 1) - S::CODE_OFFSET * measures.sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;
    use crate::distance::Pair;
    use crate::filter::STEP;
    use crate::matrix::Matrix;
    use crate::simd::Level;
    use proptest::prelude::*;

    struct Check<'a> {
        codes: &'a Codes,
        encoder: &'a Encoder,
        queries: &'a [&'a [f32]],
    }

    impl Operation for Check<'_> {
        type Output = (Vec<Vec<i32>>, Block);

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut block = Block::new(self.encoder.width());
            block.encode(simd, self.encoder, self.queries, &mut Workspace::default());
            let mut largest = vec![[[0; LANES]; GROUPS]; self.codes.tiles()];
            maxima(simd, self.codes, &block, 0, &mut largest);
            let mut by_unit = vec![[[[0; LANES]; TILE]; GROUPS]; self.codes.tiles()];
            let unit = simd.matrix_unit();
            for (tile, sums) in by_unit.iter_mut().enumerate() {
                simd.dot_tile(&unit, self.codes.tile(tile), &block.lanes, sums);
            }
            drop(unit);
            let all = (0..self.queries.len())
                .map(|query| {
                    let products = (0..self.codes.tiles()).flat_map(|tile| {
                        let mut all = [0; TILE];
                        simd.store_i32(products(simd, self.codes, &block, tile, query), &mut all);
                        let products = all;
                        for (row, start) in self.codes.start::<S>(tile).into_iter().enumerate() {
                            assert_eq!(by_unit[tile][query / LANES][row][query % LANES] + start, products[row]);
                        }
                        let found = largest[tile][query / LANES][query % LANES];
                        assert_eq!(found, products.into_iter().max().unwrap(), "tile {tile}, query {query}");
                        products
                    });
                    products.collect()
                })
                .collect();
            (all, block)
        }
    }

    /// No pair within `tau` may fall below the threshold, for any level, width and data.
    fn check(rows: Matrix<'_>, queries: Matrix<'_>, width: usize) {
        let order: Vec<u32> = (0..rows.rows() as u32).collect();
        let queries: Vec<&[f32]> = (0..queries.rows()).map(|i| queries.row(i)).collect();
        for level in Level::available() {
            let context = Context::new(level, 1);
            let encoder = Encoder::fit(&context, rows, width);
            let encoded = encoder.encode(&context, rows, &order).unwrap();
            let codes = Codes::new(&encoded, &order).unwrap();
            let (products, block) = level.run(Check { codes: &codes, encoder: &encoder, queries: &queries });
            for (q, query) in queries.iter().enumerate() {
                for (r, &product) in products[q][..rows.rows()].iter().enumerate() {
                    let tau = level.run(Pair(query, rows.row(r))).sqrt();
                    let threshold = encoder.near(&block.measures[q], tau).threshold(codes.error(r / TILE));
                    assert!(product >= threshold, "{level}: query {q}, row {r}, tau {tau}");
                }
                assert!(products[q][rows.rows()..].iter().all(|&padding| padding < NEVER / 2));
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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_bound_never_loses_a_pair((cols, values) in data(), rows in 1_usize..40, wide in any::<bool>()) {
            let bank = Matrix::new("features", &values[..rows * cols], rows, cols).unwrap();
            let queries = Matrix::new("queries", &values[40 * cols..], 20, cols).unwrap();
            check(bank, queries, if wide { Encoder::full_width(cols) } else { STEP });
            check(bank, bank.slice(0, rows.min(QUERIES)), STEP);
        }
    }

    #[test]
    fn queries_far_outside_the_codes_range_are_not_lost() {
        let values: Vec<f32> = (0..200 * 90).map(|i| ((i * 37 % 101) as f32).sin()).collect();
        let bank = Matrix::new("features", &values, 200, 90).unwrap();
        let far: Vec<f32> = values[..10 * 90].iter().map(|value| value * 1e4 + 30.0).collect();
        check(bank, Matrix::new("queries", &far, 10, 90).unwrap(), 64);
        check(bank, Matrix::new("queries", &far, 10, 90).unwrap(), 128);
    }
}

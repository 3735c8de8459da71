//! Search and selection equal their slow twins, bit for bit, on data of every shape that could betray a
//! bound: at every SIMD level of this CPU, and with whatever codes the probe chooses.

#![expect(clippy::disallowed_methods, reason = "the data of a test may differ in its last bits")]

use patchcore_kernels::context::Context;
use patchcore_kernels::coreset::{Start, greedy};
use patchcore_kernels::half::Half;
use patchcore_kernels::matrix::Matrix;
use patchcore_kernels::naive;
use patchcore_kernels::nearest::{Distance, MemoryBank, Storage};
use patchcore_kernels::random::splitmix64;
use patchcore_kernels::simd::Level;
use proptest::prelude::*;

/// Shapes of data.
#[derive(Clone, Copy, Debug)]
enum Shape {
    Uniform,
    Gaussian,
    LogNormal,
    /// Rectified, most values 0, few directions: like features of a network.
    Sparse,
    Clustered,
    Duplicated,
    /// A few integers: ties everywhere.
    Grid,
    /// Far from the origin.
    Offset,
    Denormal,
    /// Columns of scales from 10⁻⁶ to 10³.
    Scaled,
    /// Columns without variance.
    Constant,
    /// Two clusters far apart.
    Apart,
    /// One row at 10⁶.
    Outlier,
    /// Rows by rising norm.
    Sorted,
}

const SHAPES: [Shape; 14] = [
    Shape::Uniform,
    Shape::Gaussian,
    Shape::LogNormal,
    Shape::Sparse,
    Shape::Clustered,
    Shape::Duplicated,
    Shape::Grid,
    Shape::Offset,
    Shape::Denormal,
    Shape::Scaled,
    Shape::Constant,
    Shape::Apart,
    Shape::Outlier,
    Shape::Sorted,
];

/// Seeded numbers.
struct Random(u64);

impl Random {
    /// Below 2²⁴.
    fn integer(&mut self) -> u64 {
        self.0 = splitmix64(self.0);
        self.0 >> 40
    }

    /// In [−1, 1).
    fn uniform(&mut self) -> f32 {
        self.integer() as f32 / 8_388_608.0 - 1.0
    }

    fn gaussian(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() * 0.5
    }
}

/// `rows × cols` values of a shape.
fn data(shape: Shape, rows: usize, cols: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let centres: Vec<f32> = (0..8 * cols).map(|_| random.gaussian() * 4.0).collect();
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let cluster = (random.integer() % 8) as usize;
        let latent: [f32; 3] = std::array::from_fn(|_| random.gaussian());
        for col in 0..cols {
            let centre = centres[cluster * cols + col];
            values.push(match shape {
                Shape::Outlier if row == rows / 2 => 1e6,
                Shape::Uniform | Shape::Outlier => random.uniform(),
                Shape::Gaussian | Shape::Sorted => random.gaussian(),
                Shape::LogNormal => (2.0 * random.gaussian()).exp(),
                Shape::Sparse => {
                    let along = latent.iter().enumerate().map(|(i, x)| x * centres[i * cols + col]).sum::<f32>();
                    (0.5 * along + 0.2 * random.gaussian() - 1.0).max(0.0)
                }
                Shape::Clustered => centre + 0.05 * random.gaussian(),
                Shape::Duplicated => centre,
                Shape::Grid => (random.integer() % 4) as f32,
                Shape::Offset => 1e6 + random.uniform(),
                Shape::Denormal => f32::from_bits((random.integer() % 1000) as u32),
                Shape::Scaled => random.gaussian() * 10_f32.powi((col % 10) as i32 - 6),
                Shape::Constant if col % 3 > 0 => 7.5,
                Shape::Constant => 2.0 * random.uniform(),
                Shape::Apart => random.uniform() + if row % 2 == 0 { 0.0 } else { 1000.0 },
            });
        }
    }
    if let Shape::Sorted = shape {
        let norm = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
        let mut sorted: Vec<&[f32]> = values.chunks_exact(cols).collect();
        sorted.sort_by(|a, b| norm(a).total_cmp(&norm(b)));
        values = sorted.concat();
    }
    values
}

fn shapes() -> impl Strategy<Value = Shape> {
    prop::sample::select(SHAPES.to_vec())
}

/// The bank's answers, at every level, are those of the oracle. A third of the queries are rows.
fn check_search(shape: Shape, rows: usize, cols: usize, k: usize, seed: u64, storage: Storage) {
    const QUERIES: usize = 51;
    let mut values = data(shape, rows + QUERIES, cols, seed);
    for query in 0..QUERIES / 3 {
        let row = (query * 7 % rows) * cols;
        values.copy_within(row..row + cols, (rows + query) * cols);
    }
    let (bank, queries) = values.split_at(rows * cols);
    let queries = Matrix::new("queries", queries, QUERIES, cols).unwrap();
    let stored: Vec<f32> = match storage {
        Storage::Float32 => bank.to_vec(),
        Storage::Float16 => bank.iter().map(|&value| Half::new(value).to_f32()).collect(),
    };
    let stored = Matrix::new("features", &stored, rows, cols).unwrap();
    let expected = naive::nearest(queries, stored, k, Distance::Euclidean);
    // As far as the last neighbour of a query that is no row.
    let last = expected.indices[(QUERIES - 1) * k..][k - 1] as usize;
    let radius = naive::squared_distance(queries.row(QUERIES - 1), stored.row(last));
    let within = naive::within(queries, stored, radius, Distance::Squared);
    let bank = Matrix::new("features", bank, rows, cols).unwrap();
    for level in Level::available() {
        let built = MemoryBank::new(&Context::new(level, 1), bank, storage).unwrap();
        for threads in [1, 3] {
            let found = built.kneighbors(&Context::new(level, threads), queries, k, Distance::Euclidean).unwrap();
            assert_eq!(found, expected, "{shape:?}, {rows} x {cols}, k {k}, {level}, {threads} threads");
            let context = Context::new(level, threads);
            let found = built.radius_neighbors(&context, queries, radius, Distance::Squared).unwrap();
            assert_eq!(found, within, "{shape:?}, {rows} x {cols}, within {radius}, {level}, {threads} threads");
        }
        let few = queries.slice(0, 2);
        let found = built.kneighbors(&Context::new(level, 4), few, k, Distance::Euclidean).unwrap();
        assert_eq!(found.indices, expected.indices[..2 * k], "{shape:?}, two queries, {level}");
    }
}

/// The same among some of three groups of rows.
fn check_groups(shape: Shape, rows: usize, cols: usize, k: usize, seed: u64) {
    let values = data(shape, rows + 20, cols, seed);
    let features = Matrix::new("features", &values[..rows * cols], rows, cols).unwrap();
    let queries = Matrix::new("queries", &values[rows * cols..], 20, cols).unwrap();
    let groups = [rows / 3 + 5, 1, rows - rows / 3 - 6];
    for among in [&[0][..], &[2], &[1, 0]] {
        let belongs = |row: usize| among.contains(&(usize::from(row >= groups[0]) + usize::from(row > groups[0])));
        let expected = naive::nearest_among(queries, features, &belongs, k, Distance::Euclidean);
        for level in Level::available() {
            let bank = MemoryBank::grouped(&Context::new(level, 1), features, &groups, Storage::Float32).unwrap();
            let subset = bank.of_groups(among).unwrap();
            let found = subset.kneighbors(&Context::new(level, 2), queries, k, Distance::Euclidean).unwrap();
            assert_eq!(found, expected, "{shape:?}, {rows} x {cols}, k {k}, {level}, groups {among:?}");
        }
    }
}

fn check_coreset(shape: Shape, rows: usize, cols: usize, count: usize, seed: u64, start: &Start) {
    let values = data(shape, rows, cols, seed);
    let features = Matrix::new("features", &values, rows, cols).unwrap();
    let context = Context::new(Level::Scalar, 1);
    let (first, value) = start.resolve(&context, features).unwrap();
    let (indices, radii) = naive::greedy_coreset(features, count, first, value);
    for level in Level::available() {
        let found = greedy(&Context::new(level, 2), features, count, 0.0, start).unwrap();
        assert_eq!(found.indices, indices, "{shape:?}, {rows} x {cols}, {count} picks, {level}");
        assert_eq!(found.radii, radii, "{shape:?}, {rows} x {cols}, {count} picks, {level}");
    }
}

/// As many cases as `PROPTEST_CASES` says, else `count`.
fn cases(count: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig::with_cases(asked.unwrap_or(count))
}

proptest! {
    #![proptest_config(cases(300))]
    #[test]
    fn search_equals_the_oracle(
        shape in shapes(), rows in 256_usize..900, cols in 1_usize..140, k in 1_usize..6, seed in any::<u64>(),
    ) {
        check_search(shape, rows, cols, k, seed, Storage::Float32);
    }

    #[test]
    fn selection_equals_the_textbook_loop(
        shape in shapes(), rows in 2100_usize..2800, cols in 1_usize..70, count in 2_usize..120, seed in any::<u64>(),
    ) {
        check_coreset(shape, rows, cols, count, seed, &Start::Seed(seed));
    }
}

proptest! {
    #![proptest_config(cases(2000))]
    #[test]
    fn selection_of_few_rows_equals_the_textbook_loop(
        shape in shapes(), rows in 1_usize..80, cols in 1_usize..20, share in 0.0_f64..1.0, seed in any::<u64>(),
    ) {
        check_coreset(shape, rows, cols, 1 + (share * (rows - 1) as f64) as usize, seed, &Start::MeanOfTen(seed));
    }
}

#[test]
fn every_shape_is_searched_exactly_at_every_width() {
    for shape in SHAPES {
        for cols in [1, 63, 64, 65, 200, 520, 2000] {
            check_search(shape, 300, cols, 2, 11, Storage::Float32);
        }
        if !matches!(shape, Shape::Offset | Shape::Outlier | Shape::LogNormal) {
            check_search(shape, 300, 200, 3, 12, Storage::Float16);
        }
    }
}

#[test]
fn queries_far_outside_the_rows_subspace_are_searched_exactly_among_easy_ones() {
    // More rows than a window of the search, and more queries than a block.
    const ROWS: usize = 3000;
    const QUERIES: usize = 1100;
    let cols = 90;
    let mut random = Random(17);
    let axes: Vec<f32> = (0..5 * cols).map(|_| random.gaussian()).collect();
    let mut row = |noise: f32| -> Vec<f32> {
        let along: [f32; 5] = std::array::from_fn(|_| random.gaussian());
        let value = |col: usize| (0..5).map(|i| along[i] * axes[i * cols + col]).sum::<f32>();
        (0..cols).map(|col| value(col) + noise * random.gaussian()).collect()
    };
    let rows: Vec<f32> = (0..ROWS).flat_map(|_| row(0.05)).collect();
    // Of nine in turn: rows of the kind, one of the bank, pushed out a little or a lot, and so far that codes clip.
    let query = |i: usize| match i % 9 {
        4 => rows[i % ROWS * cols..][..cols].to_vec(),
        5 => row(0.5),
        6 => row(3.0),
        7 => row(0.05).into_iter().map(|value| 40.0 * value + 7.0).collect(),
        8 => row(1e3),
        _ => row(0.05),
    };
    let queries: Vec<f32> = (0..QUERIES).flat_map(query).collect();
    let (rows, queries) =
        (Matrix::new("features", &rows, ROWS, cols).unwrap(), Matrix::new("queries", &queries, QUERIES, cols).unwrap());
    for k in [1, 9] {
        let expected = naive::nearest(queries, rows, k, Distance::Euclidean);
        for level in Level::available() {
            let bank = MemoryBank::new(&Context::new(level, 2), rows, Storage::Float32).unwrap();
            for threads in [1, 2, 5] {
                let found = bank.kneighbors(&Context::new(level, threads), queries, k, Distance::Euclidean).unwrap();
                assert_eq!(found, expected, "{level}, {threads} threads, k {k}");
            }
        }
    }
}

#[test]
fn groups_of_every_shape_are_searched_exactly() {
    for shape in SHAPES {
        for cols in [3, 64, 200] {
            check_groups(shape, 900, cols, 2, 13);
        }
    }
}

#[test]
fn every_shape_is_selected_exactly_over_many_rounds() {
    for shape in SHAPES {
        check_coreset(shape, 2200, 70, 150, 5, &Start::Row(3));
        check_coreset(shape, 2300, 700, 20, 6, &Start::Mean);
        check_coreset(shape, 2100, 20, 20, 7, &Start::MeanOf(vec![5, 2099, 5]));
    }
}

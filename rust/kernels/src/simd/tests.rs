//! Every operation of [`Simd`], at every level of this CPU, against plain arithmetic on random and extreme values.

use super::*;
use crate::half::Half;
use std::array::from_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Inputs of each test: an extreme meets most others.
const ROUNDS: usize = 300;

/// Seeded numbers: Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, count: usize) -> usize {
        (self.bits() >> 33) as usize % count
    }

    /// Any finite f32, half of the time an extreme one.
    fn single(&mut self) -> f32 {
        const EXTREMES: [f32; 12] =
            [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-39, f32::MIN_POSITIVE, f32::MAX, f32::MIN, 1e16, 16_777_215.0];
        let random = f32::from_bits(self.bits() as u32);
        if self.below(2) == 0 || !random.is_finite() { EXTREMES[self.below(12)] } else { random }
    }

    /// Any finite f64: extreme, of any magnitude, or such that sums are rounded.
    fn double(&mut self) -> f64 {
        const EXTREMES: [f64; 9] = [0.0, -0.0, 1.0, -1.0, 5e-324, -1e-310, f64::MIN_POSITIVE, f64::MAX, f64::MIN];
        let random = f64::from_bits(self.bits());
        match self.below(4) {
            0 => EXTREMES[self.below(9)],
            1 if random.is_finite() => random,
            _ => (self.bits() >> 11) as f64 / 1e10 - 4e5,
        }
    }

    /// Any i32, half of the time an extreme one.
    fn integer(&mut self) -> i32 {
        const EXTREMES: [i32; 7] = [0, 1, -1, i32::MAX, i32::MIN, i32::MAX - 1, i32::MIN + 1];
        if self.below(2) == 0 { EXTREMES[self.below(7)] } else { self.bits() as i32 }
    }

    /// A code within `limit`, often at it.
    fn code(&mut self, limit: i32) -> i32 {
        match self.below(4) {
            0 => limit,
            1 => -limit,
            _ => self.below(2 * limit as usize + 1) as i32 - limit,
        }
    }

    /// A finite float16.
    fn half(&mut self) -> Half {
        Half(self.bits() as u16 & if self.below(2) == 0 { 0x83ff } else { 0xfbff })
    }
}

/// What operations are tried on.
struct Input {
    doubles: [[f64; LANES]; 3],
    singles: [[f32; LANES]; 3],
    halves: [Half; LANES],
    integers: [[i32; LANES]; LANES],
    bytes: [[u8; LANES]; 2],
    /// By how much integers are shifted.
    bits: u32,
    /// Codes of rows, offset as the level wants them, and of queries.
    rows: [[i8; 64]; 2],
    query: [[i8; 64]; 2],
    /// Two tiles and two groups of queries.
    tiles: [Vec<Aligned<[i8; 64]>>; 2],
    queries: Vec<[i8; 64]>,
    /// The level's [`Simd::CODE_OFFSET`].
    offset: i32,
}

impl Input {
    fn new(random: &mut Random, limit: i32, offset: i32) -> Self {
        let query = |random: &mut Random| from_fn(|_| random.code(limit) as i8);
        let rows = |random: &mut Random| from_fn(|_| (random.code(limit) + offset) as i8);
        let chunks = 1 + random.below(2);
        Self {
            doubles: from_fn(|_| from_fn(|_| random.double())),
            singles: from_fn(|_| from_fn(|_| random.single())),
            halves: from_fn(|_| random.half()),
            integers: from_fn(|_| from_fn(|_| random.integer())),
            bytes: from_fn(|_| from_fn(|_| random.bits() as u8)),
            bits: random.below(32) as u32,
            rows: from_fn(|_| rows(random)),
            query: from_fn(|_| query(random)),
            tiles: from_fn(|_| (0..LANES * chunks).map(|_| Aligned(rows(random))).collect()),
            queries: (0..2 * LANES * chunks).map(|_| query(random)).collect(),
            offset,
        }
    }

    /// A code of a row as the level reads it: unsigned where there is an offset.
    fn read(&self, code: i8) -> i32 {
        if self.offset == 0 { i32::from(code) } else { i32::from(code as u8) }
    }

    /// The sum of products of codes of a row and of a query.
    fn dot(&self, row: &[i8], query: &[i8]) -> i32 {
        row.iter().zip(query).map(|(&x, &y)| self.read(x) * i32::from(y)).sum()
    }
}

fn f64s<S: Simd>(simd: S, lanes: S::F64) -> [f64; LANES] {
    let mut values = [f64::NAN; LANES];
    simd.store(lanes, &mut values);
    values
}

fn f32s<S: Simd>(simd: S, lanes: S::F32) -> [f32; LANES] {
    let mut values = [f32::NAN; LANES];
    simd.store_f32(lanes, &mut values);
    values
}

fn i32s<S: Simd>(simd: S, lanes: S::I32) -> [i32; LANES] {
    let mut values = [-7; LANES];
    simd.store_i32(lanes, &mut values);
    values
}

/// Asserts that the bits are equal, which tells zeros apart; those of a NaN are left open by IEEE 754.
fn same(found: [f64; LANES], expected: [f64; LANES]) {
    let bits = |values: [f64; LANES]| values.map(|value| if value.is_nan() { 1 } else { value.to_bits() });
    assert_eq!(bits(found), bits(expected), "{found:?} {expected:?}");
}

/// As [`same`]; every f32 is an f64.
fn same_f32(found: [f32; LANES], expected: [f32; LANES]) {
    same(found.map(f64::from), expected.map(f64::from));
}

/// [`Simd::CODE_LIMIT`] and [`Simd::CODE_OFFSET`].
struct Codes;

impl Operation for Codes {
    type Output = (i32, i32);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> (i32, i32) {
        (S::CODE_LIMIT, S::CODE_OFFSET)
    }
}

/// One test for each operation, named like it. What is compiled for every level is short: the operation on an
/// input. What was found is then checked by code that knows no levels.
macro_rules! tests {
    ($($operation:ident($simd:ident, $input:ident) -> $found:ty $body:block $check:expr;)+) => {
        $(#[test]
        fn $operation() {
            struct Found<'a>(&'a Input);

            impl Operation for Found<'_> {
                type Output = $found;

                #[inline(always)]
                fn run<S: Simd>(self, $simd: S) -> $found {
                    let $input = self.0;
                    $body
                }
            }

            let check: fn(&Input, $found) = $check;
            for level in Level::available() {
                let (limit, offset) = level.run(Codes);
                let mut random = Random(0x9e37_79b9_7f4a_7c15);
                for _ in 0..ROUNDS {
                    let input = Input::new(&mut random, limit, offset);
                    let checked = catch_unwind(AssertUnwindSafe(|| check(&input, level.run(Found(&input)))));
                    assert!(checked.is_ok(), "{} at {level}", stringify!($operation));
                }
            }
        })+

        const TESTED: &[&str] = &[$(stringify!($operation)),+];
    };
}

#[test]
fn no_operation_is_without_a_test() {
    let (_, source) = include_str!("mod.rs").split_once("pub trait Simd").unwrap();
    let (body, _) = source.split_once("\n}\n").unwrap();
    let names = body.lines().filter_map(|line| line.strip_prefix("    fn "));
    let names: Vec<_> = names.map(|line| line.split(['(', '<']).next().unwrap()).collect();
    assert_eq!(names, TESTED);
}

#[test]
fn every_level_that_the_features_of_the_cpu_allow_is_tested() {
    #[cfg(target_arch = "x86_64")]
    let possible = [
        (Level::Avx2, is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")),
        (Level::AvxVnni, is_x86_feature_detected!("avxvnni")),
        (Level::Avx512, is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")),
        (Level::Avx512Vnni, is_x86_feature_detected!("avx512vnni")),
    ];
    #[cfg(target_arch = "aarch64")]
    let possible = [(Level::Neon, true), (Level::NeonDot, std::arch::is_aarch64_feature_detected!("dotprod"))];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let possible: [(Level, bool); 0] = [];
    let tested = Level::available();
    assert!(tested.contains(&Level::Scalar));
    for (level, expected) in possible {
        assert_eq!(tested.contains(&level), expected, "{level}");
    }
}

tests! {
    zero(simd, _input) -> [f64; LANES] { f64s(simd, simd.zero()) }
    |_, found| same(found, [0.0; LANES]);

    widen(simd, input) -> [f64; LANES] { f64s(simd, simd.widen(&input.singles[0])) }
    |input, found| same(found, input.singles[0].map(f64::from));

    widen_half(simd, input) -> [f64; LANES] { f64s(simd, simd.widen_half(&input.halves)) }
    |input, found| same(found, input.halves.map(|half| half.to_f32().into()));

    load(simd, input) -> [f64; LANES] { f64s(simd, simd.load(&input.doubles[0])) }
    |input, found| same(found, input.doubles[0]);

    store(simd, input) -> [[f64; LANES]; 3] {
        let mut values = [[0.5; LANES]; 3];
        simd.store(simd.load(&input.doubles[0]), &mut values[1]);
        values
    }
    |input, [before, found, after]| {
        same(found, input.doubles[0]);
        assert_eq!((before, after), ([0.5; LANES], [0.5; LANES]));
    };

    splat(simd, input) -> [f64; LANES] { f64s(simd, simd.splat(input.doubles[0][0])) }
    |input, found| same(found, [input.doubles[0][0]; LANES]);

    add_product(simd, input) -> [f64; LANES] {
        let [sum, x, y] = &input.doubles;
        f64s(simd, simd.add_product(simd.load(sum), simd.load(x), simd.load(y)))
    }
    |Input { doubles: [sum, x, y], .. }, found| same(found, from_fn(|i| sum[i] + x[i] * y[i]));

    add_squared_difference(simd, input) -> [f64; LANES] {
        let [sum, x, y] = &input.doubles;
        f64s(simd, simd.add_squared_difference(simd.load(sum), simd.load(x), simd.load(y)))
    }
    |Input { doubles: [sum, x, y], .. }, found| same(found, from_fn(|i| sum[i] + (x[i] - y[i]) * (x[i] - y[i])));

    fold(simd, input) -> f64 { simd.fold(simd.load(&input.doubles[0])) }
    |input, found| {
        let mut lanes = input.doubles[0];
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        same([found; LANES], [lanes[0]; LANES]);
    };

    splat_f32(simd, input) -> [f32; LANES] { f32s(simd, simd.splat_f32(input.singles[0][0])) }
    |input, found| same_f32(found, [input.singles[0][0]; LANES]);

    load_f32(simd, input) -> [f32; LANES] { f32s(simd, simd.load_f32(&input.singles[0])) }
    |input, found| same_f32(found, input.singles[0]);

    store_f32(simd, input) -> [[f32; LANES]; 3] {
        let mut values = [[0.5; LANES]; 3];
        simd.store_f32(simd.load_f32(&input.singles[0]), &mut values[1]);
        values
    }
    |input, [before, found, after]| {
        same_f32(found, input.singles[0]);
        assert_eq!((before, after), ([0.5; LANES], [0.5; LANES]));
    };

    multiply_add(simd, input) -> [f32; LANES] {
        let [sum, x, y] = &input.singles;
        f32s(simd, simd.multiply_add(simd.load_f32(sum), simd.load_f32(x), simd.load_f32(y)))
    }
    |Input { singles: [sum, x, y], .. }, found| {
        let fused: [f32; LANES] = from_fn(|i| x[i].mul_add(y[i], sum[i]));
        let is_fused = |i: usize| found[i].to_bits() == fused[i].to_bits();
        same_f32(found, from_fn(|i| if is_fused(i) { fused[i] } else { sum[i] + x[i] * y[i] }));
    };

    clamp(simd, input) -> [f32; LANES] {
        let [values, limits, _] = &input.singles;
        f32s(simd, simd.clamp(simd.load_f32(values), limits[0].abs()))
    }
    |Input { singles: [values, limits, _], .. }, found| {
        let limit = limits[0].abs();
        // Not by bits: at a limit of 0 either zero is right.
        assert_eq!(found, values.map(|value| value.clamp(-limit, limit)));
    };

    swap(simd, input) -> [[f32; LANES]; 4] {
        let lanes = simd.load_f32(&input.singles[0]);
        let (by_one, by_two) = (simd.swap::<1>(lanes), simd.swap::<2>(lanes));
        [f32s(simd, by_one), f32s(simd, by_two), f32s(simd, simd.swap::<4>(lanes)), f32s(simd, simd.swap::<8>(lanes))]
    }
    |input, found| {
        for (half, found) in [1, 2, 4, 8].into_iter().zip(found) {
            same_f32(found, from_fn(|i| input.singles[0][i ^ half]));
        }
    };

    splat_i32(simd, input) -> [i32; LANES] { i32s(simd, simd.splat_i32(input.integers[0][0])) }
    |input, found| assert_eq!(found, [input.integers[0][0]; LANES]);

    load_i32(simd, input) -> [i32; LANES] { i32s(simd, simd.load_i32(&input.integers[0])) }
    |input, found| assert_eq!(found, input.integers[0]);

    store_i32(simd, input) -> [[i32; LANES]; 3] {
        let mut values = [[5; LANES]; 3];
        simd.store_i32(simd.load_i32(&input.integers[0]), &mut values[1]);
        values
    }
    |input, found| assert_eq!(found, [[5; LANES], input.integers[0], [5; LANES]]);

    add_i32(simd, input) -> [i32; LANES] {
        i32s(simd, simd.add_i32(simd.load_i32(&input.integers[0]), simd.load_i32(&input.integers[1])))
    }
    |Input { integers: [x, y, ..], .. }, found| assert_eq!(found, from_fn(|i| x[i].wrapping_add(y[i])));

    shift_left(simd, input) -> [i32; LANES] {
        i32s(simd, simd.shift_left(simd.load_i32(&input.integers[0]), input.bits))
    }
    |input, found| assert_eq!(found, input.integers[0].map(|value| value << input.bits));

    shift_right(simd, input) -> [i32; LANES] {
        i32s(simd, simd.shift_right(simd.load_i32(&input.integers[0]), input.bits))
    }
    |input, found| assert_eq!(found, input.integers[0].map(|value| value >> input.bits));

    add_product_i32(simd, input) -> [i32; LANES] {
        let [sum, x, y, ..] = &input.integers;
        i32s(simd, simd.add_product_i32(simd.load_i32(sum), simd.load_i32(x), simd.load_i32(y)))
    }
    |Input { integers: [sum, x, y, ..], .. }, found| {
        assert_eq!(found, from_fn(|i| sum[i].wrapping_add(x[i].wrapping_mul(y[i]))));
    };

    load_u8(simd, input) -> [i32; LANES] { i32s(simd, simd.load_u8(&input.bytes[0])) }
    |input, found| assert_eq!(found, input.bytes[0].map(i32::from));

    store_u8(simd, input) -> [[u8; LANES]; 3] {
        let mut values = [[5; LANES]; 3];
        simd.store_u8(simd.shift_right(simd.load_i32(&input.integers[0]), input.bits), &mut values[1]);
        values
    }
    |input, found| {
        let bytes = input.integers[0].map(|value| (value >> input.bits).clamp(0, 255) as u8);
        assert_eq!(found, [[5; LANES], bytes, [5; LANES]]);
    };

    interleave(simd, input) -> [[u8; LANES]; 2] { simd.interleave(input.bytes[0], input.bytes[1]) }
    |Input { bytes: [x, y], .. }, found| {
        assert_eq!(found.as_flattened(), (0..LANES).flat_map(|i| [x[i], y[i]]).collect::<Vec<_>>());
    };

    at_least(simd, input) -> u16 {
        simd.at_least(simd.load_i32(&input.integers[0]), simd.load_i32(&input.integers[1]))
    }
    |Input { integers: [x, y, ..], .. }, found| {
        assert_eq!(from_fn(|i| found >> i & 1 == 1), from_fn::<_, LANES, _>(|i| x[i] >= y[i]));
    };

    sum_i32(simd, input) -> i32 { simd.sum_i32(simd.load_i32(&input.integers[0])) }
    |input, found| assert_eq!(found, input.integers[0].into_iter().fold(0, i32::wrapping_add));

    prefetch(simd, input) -> () {
        // It changes nothing that a program can see; but it may not fail, even on no memory.
        simd.prefetch(&input.queries);
        simd.prefetch(&input.queries[..0]);
    }
    |_, ()| ();

    load_codes(simd, input) -> [[i32; LANES]; 4] {
        // Codes have no store: products with one and zeros show each of a lane's four.
        let rows = simd.load_codes(&input.rows[0]);
        let mut shown = [[0; LANES]; 4];
        for (at, shown) in shown.iter_mut().enumerate() {
            let mut one = [0; 64];
            one[at..].iter_mut().step_by(4).for_each(|code| *code = 1);
            simd.store_i32(simd.dot(simd.splat_i32(0), rows, simd.load_codes(&one)), shown);
        }
        shown
    }
    |input, found| {
        assert_eq!(found, from_fn(|at| from_fn(|lane| input.read(input.rows[0][4 * lane + at]))));
    };

    splat_codes(simd, input) -> [i32; LANES] {
        let query = simd.splat_codes(*input.query[0].first_chunk().unwrap());
        i32s(simd, simd.dot(simd.splat_i32(0), simd.load_codes(&input.rows[0]), query))
    }
    |input, found| {
        assert_eq!(found, from_fn(|lane| input.dot(&input.rows[0][4 * lane..][..4], &input.query[0][..4])));
    };

    dot(simd, input) -> [i32; LANES] {
        let sum = simd.load_i32(&input.integers[0].map(|value| value / 2));
        i32s(simd, simd.dot(sum, simd.load_codes(&input.rows[0]), simd.load_codes(&input.query[0])))
    }
    |input, found| {
        let dot = |lane: usize| input.dot(&input.rows[0][4 * lane..][..4], &input.query[0][4 * lane..][..4]);
        assert_eq!(found, from_fn(|lane| input.integers[0][lane] / 2 + dot(lane)));
    };

    dot_two(simd, input) -> [i32; LANES] {
        let sum = simd.load_i32(&input.integers[0].map(|value| value / 2));
        let [a, b] = &input.rows;
        let [x, y] = &input.query;
        let (rows, query) = ([simd.load_codes(a), simd.load_codes(b)], [simd.load_codes(x), simd.load_codes(y)]);
        i32s(simd, simd.dot_two(sum, rows, query))
    }
    |input, found| {
        let four = |codes: &[i8; 64], lane: usize| *codes[4 * lane..].first_chunk::<4>().unwrap();
        let dot = |i: usize, lane| input.dot(&four(&input.rows[i], lane), &four(&input.query[i], lane));
        assert_eq!(found, from_fn(|lane| input.integers[0][lane] / 2 + dot(0, lane) + dot(1, lane)));
    };

    matrix_unit(simd, input) -> [[TileSums; 2]; 2] {
        let unit = simd.matrix_unit();
        // A failed attempt is slow, as it panics.
        if input.integers[0][0] == 0 {
            let second = catch_unwind(AssertUnwindSafe(|| drop(simd.matrix_unit())));
            assert_eq!(second.is_err(), S::HAS_MATRIX_UNIT, "a thread has one at most");
        }
        // The first is as good as before.
        let mut sums = [[Aligned([[-1; LANES]; LANES]); 2]; 2];
        simd.dot_tiles(&unit, &input.queries, [&input.tiles[0], &input.tiles[1]], &mut sums);
        drop(unit);
        drop(simd.matrix_unit());
        sums
    }
    check_tiles;

    dot_tiles(simd, input) -> [[TileSums; 2]; 2] {
        let mut sums = [[Aligned([[-1; LANES]; LANES]); 2]; 2];
        let unit = simd.matrix_unit();
        simd.dot_tiles(&unit, &input.queries, [&input.tiles[0], &input.tiles[1]], &mut sums);
        drop(unit);
        sums
    }
    check_tiles;
}

/// The sums of two groups of queries with two tiles.
#[expect(clippy::large_types_passed_by_value, reason = "as the other checks")]
fn check_tiles(input: &Input, found: [[TileSums; 2]; 2]) {
    let len = input.tiles[0].len();
    for (found, queries) in found.iter().zip(input.queries.chunks_exact(len)) {
        for (found, tile) in found.iter().zip(&input.tiles) {
            for (found, query) in found.0.iter().zip(queries.chunks_exact(len / LANES)) {
                let of = |lane: usize| {
                    let fours = tile.iter().zip(query.as_flattened().chunks_exact(4));
                    fours.map(|(rows, four)| input.dot(&rows.0[4 * lane..][..4], four)).sum()
                };
                assert_eq!(*found, from_fn(of));
            }
        }
    }
}

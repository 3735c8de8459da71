//! The level without SIMD: plain Rust. It is also the definition that the others must reproduce.

use super::{LANES, Operation, Simd};

/// Needs nothing.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

impl Scalar {
    /// Runs `operation` as it is.
    #[inline]
    pub(super) fn enter<O: Operation>(self, operation: O) -> O::Output {
        operation.run(self)
    }
}

impl Simd for Scalar {
    type F64 = [f64; LANES];

    type F32 = [f32; LANES];
    type I32 = [i32; LANES];
    type Codes = [[i8; 4]; LANES];
    type MatrixUnit = ();

    const MANY_REGISTERS: bool = false;
    const CODE_LIMIT: i32 = 127;
    const CODE_OFFSET: i32 = 0;
    // Where it is the only level, for `make mutants`, a product may cost little, or no selection would use codes.
    const DOT_COST: f64 = if cfg!(scalar_only) { 3.0 } else { 60.0 };

    #[inline(always)]
    fn zero(self) -> Self::F64 {
        [0.0; LANES]
    }

    #[inline(always)]
    fn widen(self, values: &[f32; LANES]) -> Self::F64 {
        values.map(f64::from)
    }

    #[inline(always)]
    fn load(self, values: &[f64; LANES]) -> Self::F64 {
        *values
    }

    #[inline(always)]
    fn store(self, lanes: Self::F64, values: &mut [f64; LANES]) {
        *values = lanes;
    }

    #[inline(always)]
    fn splat(self, value: f64) -> Self::F64 {
        [value; LANES]
    }

    #[inline(always)]
    fn add_product(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| sum[i] + x[i] * y[i])
    }

    #[inline(always)]
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| {
            let difference = x[i] - y[i];
            sum[i] + difference * difference
        })
    }

    #[inline(always)]
    fn fold(self, mut lanes: Self::F64) -> f64 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::F32 {
        [value; LANES]
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Self::F32 {
        *values
    }

    #[inline(always)]
    fn store_f32(self, lanes: Self::F32, values: &mut [f32; LANES]) {
        *values = lanes;
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| sum[i] + x[i] * y[i])
    }

    #[inline(always)]
    fn clamp(self, lanes: Self::F32, limit: f32) -> Self::F32 {
        lanes.map(|lane| lane.clamp(-limit, limit))
    }

    #[inline(always)]
    fn swap<const HALF: usize>(self, lanes: Self::F32) -> Self::F32 {
        std::array::from_fn(|i| lanes[i ^ HALF])
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        [value; LANES]
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32 {
        *values
    }

    #[inline(always)]
    fn store_i32(self, lanes: Self::I32, values: &mut [i32; LANES]) {
        *values = lanes;
    }

    #[inline(always)]
    fn add_i32(self, x: Self::I32, y: Self::I32) -> Self::I32 {
        std::array::from_fn(|i| x[i].wrapping_add(y[i]))
    }

    #[inline(always)]
    fn shift_left(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        lanes.map(|lane| lane << bits)
    }

    #[inline(always)]
    fn shift_right(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        lanes.map(|lane| lane >> bits)
    }

    #[inline(always)]
    fn add_product_i32(self, sum: Self::I32, x: Self::I32, y: Self::I32) -> Self::I32 {
        std::array::from_fn(|i| sum[i].wrapping_add(x[i].wrapping_mul(y[i])))
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::I32 {
        values.map(i32::from)
    }

    #[inline(always)]
    fn store_u8(self, lanes: Self::I32, values: &mut [u8; LANES]) {
        *values = lanes.map(|lane| lane.clamp(0, 255) as u8);
    }

    #[inline(always)]
    fn interleave(self, x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2] {
        [0, LANES / 2].map(|begin| std::array::from_fn(|i| [x, y][i % 2][begin + i / 2]))
    }

    #[inline(always)]
    fn at_least(self, x: Self::I32, y: Self::I32) -> u16 {
        (0..LANES).fold(0, |mask, i| mask | (u16::from(x[i] >= y[i]) << i))
    }

    #[inline(always)]
    fn sum_i32(self, lanes: Self::I32) -> i32 {
        lanes.into_iter().fold(0, i32::wrapping_add)
    }

    #[inline(always)]
    fn load_codes(self, codes: &[i8; 64]) -> Self::Codes {
        std::array::from_fn(|i| [codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3]])
    }

    #[inline(always)]
    fn splat_codes(self, codes: [i8; 4]) -> Self::Codes {
        [codes; LANES]
    }

    #[inline(always)]
    fn dot(self, sum: Self::I32, rows: Self::Codes, query: Self::Codes) -> Self::I32 {
        std::array::from_fn(|i| (0..4).fold(sum[i], |sum, j| sum + i32::from(rows[i][j]) * i32::from(query[i][j])))
    }

    #[inline(always)]
    fn matrix_unit(self) {}
}

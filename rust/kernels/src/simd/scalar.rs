//! The level without SIMD: plain Rust. It is also the definition that the others must reproduce.

use super::{LANES, Simd};

/// Needs nothing.
#[derive(Clone, Copy)]
pub struct Scalar;

impl Simd for Scalar {
    type F64 = [f64; LANES];

    const MANY_REGISTERS: bool = false;

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
}

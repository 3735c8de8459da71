//! NEON: sixteen f64 lanes are eight registers.

use std::arch::aarch64::{
    float64x2_t, vaddq_f64, vcvt_f64_f32, vdupq_n_f64, vgetq_lane_f64, vld1_f32, vld1q_f64, vmulq_f64, vsubq_f64,
};
use std::arch::is_aarch64_feature_detected;

use super::{LANES, Operation, Simd};

/// Proof that the CPU has Advanced SIMD.
#[derive(Clone, Copy)]
pub struct Neon(());

impl Neon {
    /// The token, where the CPU has the feature.
    #[inline]
    pub fn new() -> Option<Self> {
        is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    /// Runs `operation` compiled for this level.
    #[inline]
    pub fn enter<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "neon")]
        fn entry<O: Operation>(token: Neon, operation: O) -> O::Output {
            operation.run(token)
        }
        // SAFETY: a token exists only where `new` detected the feature, and it does not go away.
        unsafe { entry(self, operation) }
    }
}

impl Simd for Neon {
    type F64 = [float64x2_t; 8];

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::F64 {
        // SAFETY: the token proves NEON.
        unsafe { [vdupq_n_f64(0.0); 8] }
    }

    #[inline(always)]
    fn widen(self, values: &[f32; LANES]) -> Self::F64 {
        // SAFETY: the token proves NEON; the eight loads of 2 lie inside the array of 16.
        std::array::from_fn(|i| unsafe { vcvt_f64_f32(vld1_f32(values.as_ptr().add(2 * i))) })
    }

    #[inline(always)]
    fn load(self, values: &[f64; LANES]) -> Self::F64 {
        // SAFETY: the token proves NEON; the eight loads of 2 lie inside the array of 16.
        std::array::from_fn(|i| unsafe { vld1q_f64(values.as_ptr().add(2 * i)) })
    }

    #[inline(always)]
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| {
            // SAFETY: the token proves NEON. The multiplication and the addition stay apart.
            unsafe {
                let difference = vsubq_f64(x[i], y[i]);
                vaddq_f64(sum[i], vmulq_f64(difference, difference))
            }
        })
    }

    #[inline(always)]
    fn fold(self, lanes: Self::F64) -> f64 {
        // SAFETY: the token proves NEON.
        unsafe {
            let eight: [float64x2_t; 4] = std::array::from_fn(|i| vaddq_f64(lanes[i], lanes[i + 4]));
            let two = vaddq_f64(vaddq_f64(eight[0], eight[2]), vaddq_f64(eight[1], eight[3]));
            vgetq_lane_f64::<0>(two) + vgetq_lane_f64::<1>(two)
        }
    }
}

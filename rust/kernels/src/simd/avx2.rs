//! AVX2: sixteen f64 lanes are four registers.

use std::arch::x86_64::{
    __m256d, _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64, _mm_loadu_ps, _mm_unpackhi_pd, _mm256_add_pd,
    _mm256_castpd256_pd128, _mm256_cvtps_pd, _mm256_extractf128_pd, _mm256_loadu_pd, _mm256_mul_pd, _mm256_setzero_pd,
    _mm256_sub_pd,
};

use super::{LANES, Operation, Simd};

/// Proof that the CPU has AVX2 and FMA.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The token, where the CPU has the features.
    #[inline]
    pub fn new() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
    }

    /// Runs `operation` compiled for this level.
    #[inline]
    pub fn enter<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx2,fma")]
        fn entry<O: Operation>(token: Avx2, operation: O) -> O::Output {
            operation.run(token)
        }
        // SAFETY: a token exists only where `new` detected these features, and they do not go away.
        unsafe { entry(self, operation) }
    }
}

impl Simd for Avx2 {
    type F64 = [__m256d; 4];

    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    fn zero(self) -> Self::F64 {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_setzero_pd(); 4] }
    }

    #[inline(always)]
    fn widen(self, values: &[f32; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX; the four loads of 4 lie inside the array of 16.
        unsafe {
            [
                _mm256_cvtps_pd(_mm_loadu_ps(at)),
                _mm256_cvtps_pd(_mm_loadu_ps(at.add(4))),
                _mm256_cvtps_pd(_mm_loadu_ps(at.add(8))),
                _mm256_cvtps_pd(_mm_loadu_ps(at.add(12))),
            ]
        }
    }

    #[inline(always)]
    fn load(self, values: &[f64; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX; the four loads of 4 lie inside the array of 16.
        unsafe {
            [_mm256_loadu_pd(at), _mm256_loadu_pd(at.add(4)), _mm256_loadu_pd(at.add(8)), _mm256_loadu_pd(at.add(12))]
        }
    }

    #[inline(always)]
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        std::array::from_fn(|i| {
            // SAFETY: the token proves AVX.
            unsafe {
                let difference = _mm256_sub_pd(x[i], y[i]);
                _mm256_add_pd(sum[i], _mm256_mul_pd(difference, difference))
            }
        })
    }

    #[inline(always)]
    fn fold(self, lanes: Self::F64) -> f64 {
        // SAFETY: the token proves AVX.
        unsafe {
            let low = _mm256_add_pd(lanes[0], lanes[2]);
            let high = _mm256_add_pd(lanes[1], lanes[3]);
            let four = _mm256_add_pd(low, high);
            let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
}

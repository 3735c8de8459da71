//! AVX-512: sixteen f64 lanes are two registers.

use std::arch::x86_64::{
    __m512d, _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64, _mm_unpackhi_pd, _mm256_add_pd, _mm256_castpd256_pd128,
    _mm256_extractf128_pd, _mm256_loadu_ps, _mm512_add_pd, _mm512_castpd512_pd256, _mm512_cvtps_pd,
    _mm512_extractf64x4_pd, _mm512_loadu_pd, _mm512_mul_pd, _mm512_setzero_pd, _mm512_sub_pd,
};

use super::{LANES, Operation, Simd};

/// Proof that the CPU has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// The token, where the CPU has the features.
    #[inline]
    pub fn new() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma");
        found.then_some(Self(()))
    }

    /// Runs `operation` compiled for this level.
    #[inline]
    pub fn enter<O: Operation>(self, operation: O) -> O::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
        fn entry<O: Operation>(token: Avx512, operation: O) -> O::Output {
            operation.run(token)
        }
        // SAFETY: a token exists only where `new` detected these features, and they do not go away.
        unsafe { entry(self, operation) }
    }
}

impl Simd for Avx512 {
    type F64 = [__m512d; 2];

    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn zero(self) -> Self::F64 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { [_mm512_setzero_pd(); 2] }
    }

    #[inline(always)]
    fn widen(self, values: &[f32; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX-512 F; both loads of 8 lie inside the array of 16.
        unsafe { [_mm512_cvtps_pd(_mm256_loadu_ps(at)), _mm512_cvtps_pd(_mm256_loadu_ps(at.add(8)))] }
    }

    #[inline(always)]
    fn load(self, values: &[f64; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX-512 F; both loads of 8 lie inside the array of 16.
        unsafe { [_mm512_loadu_pd(at), _mm512_loadu_pd(at.add(8))] }
    }

    #[inline(always)]
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            let low = _mm512_sub_pd(x[0], y[0]);
            let high = _mm512_sub_pd(x[1], y[1]);
            [_mm512_add_pd(sum[0], _mm512_mul_pd(low, low)), _mm512_add_pd(sum[1], _mm512_mul_pd(high, high))]
        }
    }

    #[inline(always)]
    fn fold(self, lanes: Self::F64) -> f64 {
        // SAFETY: the token proves AVX-512 F, which implies AVX.
        unsafe {
            let eight = _mm512_add_pd(lanes[0], lanes[1]);
            let four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd::<1>(eight));
            let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
            _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
        }
    }
}

//! AVX-512: sixteen f64 lanes are two registers, sixteen f32 or i32 lanes are one. With VNNI four
//! products of codes are one instruction; without, three, and codes keep to 7 bits. With AMX besides,
//! sixteen rows times sixteen queries are one (see [`super::amx`]).

use std::arch::x86_64::{
    __m512, __m512d, __m512i, _MM_HINT_T0, _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64, _mm_cvtsi32_si128, _mm_loadu_si128,
    _mm_prefetch, _mm_storeu_si128, _mm_unpackhi_pd, _mm256_add_pd, _mm256_castpd256_pd128, _mm256_extractf128_pd,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm512_add_epi16, _mm512_add_epi32, _mm512_add_pd, _mm512_castpd512_pd256,
    _mm512_castps512_ps256, _mm512_cmpge_epi32_mask, _mm512_cvtepu8_epi32, _mm512_cvtph_ps, _mm512_cvtps_pd,
    _mm512_cvtusepi32_epi8, _mm512_dpbusd_epi32, _mm512_extractf32x8_ps, _mm512_extractf64x4_pd, _mm512_fmadd_ps,
    _mm512_loadu_pd, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_madd_epi16, _mm512_maddubs_epi16, _mm512_max_epi32,
    _mm512_max_ps, _mm512_min_ps, _mm512_mul_pd, _mm512_mullo_epi32, _mm512_permute_ps, _mm512_reduce_add_epi32,
    _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_pd, _mm512_set1_ps, _mm512_setzero_pd, _mm512_setzero_si512,
    _mm512_shuffle_f32x4, _mm512_sll_epi32, _mm512_sra_epi32, _mm512_storeu_pd, _mm512_storeu_ps, _mm512_storeu_si512,
    _mm512_sub_pd,
};

use super::avx2::interleave_sse2;
use super::{Aligned, LANES, Operation, Simd, TileSums, amx, dot_by_dot};
use crate::half::Half;

/// Proof that the CPU has AVX-512 F, BW, DQ and VL, VNNI where `VNNI` is true, and AMX where `AMX` is.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool, const AMX: bool>(());

impl<const VNNI: bool, const AMX: bool> Avx512<VNNI, AMX> {
    new_and_enter!(
        is_x86_feature_detected: "avx512f", "avx512bw", "avx512dq", "avx512vl", "fma";
        "avx512vnni" if VNNI;
        and !AMX || amx::is_available()
    );
}

impl<const VNNI: bool, const AMX: bool> Simd for Avx512<VNNI, AMX> {
    type F64 = [__m512d; 2];
    type F32 = __m512;
    type I32 = __m512i;
    type Codes = __m512i;
    type MatrixUnit = Option<amx::AmxTiles>;

    const MANY_REGISTERS: bool = true;
    const CODE_LIMIT: i32 = if VNNI { 127 } else { 63 };
    const CODE_OFFSET: i32 = if VNNI { 128 } else { 64 };
    const DOT_COST: f64 = if VNNI { 1.0 } else { 2.5 };
    const HAS_MATRIX_UNIT: bool = AMX;

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
    fn widen_half(self, values: &[Half; LANES]) -> Self::F64 {
        // SAFETY: the token proves AVX-512 F and DQ; the load is the array, whose elements are 16 bits.
        unsafe {
            let single = _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast()));
            [_mm512_cvtps_pd(_mm512_castps512_ps256(single)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(single))]
        }
    }

    #[inline(always)]
    fn load(self, values: &[f64; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX-512 F; both loads of 8 lie inside the array of 16.
        unsafe { [_mm512_loadu_pd(at), _mm512_loadu_pd(at.add(8))] }
    }

    #[inline(always)]
    fn store(self, lanes: Self::F64, values: &mut [f64; LANES]) {
        let at = values.as_mut_ptr();
        // SAFETY: the token proves AVX-512 F; both stores of 8 lie inside the array of 16.
        unsafe {
            _mm512_storeu_pd(at, lanes[0]);
            _mm512_storeu_pd(at.add(8), lanes[1]);
        }
    }

    #[inline(always)]
    fn splat(self, value: f64) -> Self::F64 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { [_mm512_set1_pd(value); 2] }
    }

    #[inline(always)]
    fn add_product(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { [_mm512_add_pd(sum[0], _mm512_mul_pd(x[0], y[0])), _mm512_add_pd(sum[1], _mm512_mul_pd(x[1], y[1]))] }
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

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::F32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Self::F32 {
        // SAFETY: the token proves AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store_f32(self, lanes: Self::F32, values: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX-512 F; the store is the array.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), lanes) }
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_fmadd_ps(x, y, sum) }
    }

    #[inline(always)]
    fn clamp(self, lanes: Self::F32, limit: f32) -> Self::F32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_min_ps(_mm512_max_ps(lanes, _mm512_set1_ps(-limit)), _mm512_set1_ps(limit)) }
    }

    #[inline(always)]
    fn swap<const HALF: usize>(self, lanes: Self::F32) -> Self::F32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            match HALF {
                1 => _mm512_permute_ps::<0b10_11_00_01>(lanes),
                2 => _mm512_permute_ps::<0b01_00_11_10>(lanes),
                4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(lanes, lanes),
                _ => _mm512_shuffle_f32x4::<0b01_00_11_10>(lanes, lanes),
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_si512(values.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_i32(self, lanes: Self::I32, values: &mut [i32; LANES]) {
        // SAFETY: the token proves AVX-512 F; the store is the array.
        unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), lanes) }
    }

    #[inline(always)]
    fn add_i32(self, x: Self::I32, y: Self::I32) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_add_epi32(x, y) }
    }

    #[inline(always)]
    fn shift_left(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_sll_epi32(lanes, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn shift_right(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_sra_epi32(lanes, _mm_cvtsi32_si128(bits as i32)) }
    }

    #[inline(always)]
    fn add_product_i32(self, sum: Self::I32, x: Self::I32, y: Self::I32) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_add_epi32(sum, _mm512_mullo_epi32(x, y)) }
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::I32 {
        // SAFETY: the token proves AVX-512 F; the load is the array.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(values.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_u8(self, lanes: Self::I32, values: &mut [u8; LANES]) {
        // SAFETY: the token proves AVX-512 F; the store is the array.
        unsafe {
            let bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(lanes, _mm512_setzero_si512()));
            _mm_storeu_si128(values.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn interleave(self, x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2] {
        interleave_sse2(x, y)
    }

    #[inline(always)]
    fn at_least(self, x: Self::I32, y: Self::I32) -> u16 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_cmpge_epi32_mask(x, y) }
    }

    #[inline(always)]
    fn sum_i32(self, lanes: Self::I32) -> i32 {
        // SAFETY: the token proves AVX-512 F.
        unsafe { _mm512_reduce_add_epi32(lanes) }
    }

    #[inline(always)]
    fn prefetch<T>(self, memory: &[T]) {
        for at in (0..size_of_val(memory)).step_by(64) {
            // SAFETY: the baseline of x86-64 has SSE, and a prefetch reads nothing that a program can see.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(memory.as_ptr().cast::<i8>().wrapping_add(at)) };
        }
    }

    #[inline(always)]
    fn load_codes(self, codes: &[i8; 64]) -> Self::Codes {
        // SAFETY: the token proves AVX-512 F; the load is the array.
        unsafe { _mm512_loadu_si512(codes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn splat_codes(self, codes: [i8; 4]) -> Self::Codes {
        // SAFETY: the token proves AVX-512 F.
        unsafe {
            _mm512_set1_epi32(i32::from_ne_bytes([codes[0] as u8, codes[1] as u8, codes[2] as u8, codes[3] as u8]))
        }
    }

    #[inline(always)]
    fn dot(self, sum: Self::I32, rows: Self::Codes, query: Self::Codes) -> Self::I32 {
        if VNNI {
            // SAFETY: a token with `VNNI` proves AVX-512 VNNI.
            unsafe { _mm512_dpbusd_epi32(sum, rows, query) }
        } else {
            // SAFETY: the token proves AVX-512 BW. Two products of codes up to 127 and 63 in magnitude
            // stay within 16 bits.
            unsafe {
                let pairs = _mm512_maddubs_epi16(rows, query);
                _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
            }
        }
    }

    #[inline(always)]
    fn matrix_unit(self) -> Self::MatrixUnit {
        // SAFETY: a token with `AMX` exists only where `new` found it available.
        AMX.then(|| unsafe { amx::AmxTiles::configure() })
    }

    #[inline(always)]
    fn dot_two(self, sum: Self::I32, rows: [Self::Codes; 2], query: [Self::Codes; 2]) -> Self::I32 {
        if VNNI {
            return self.dot(self.dot(sum, rows[0], query[0]), rows[1], query[1]);
        }
        // SAFETY: the token proves AVX-512 BW. Four products of codes up to 127 and 63 in magnitude stay within 16 bits.
        unsafe {
            let first = _mm512_maddubs_epi16(rows[0], query[0]);
            let pairs = _mm512_add_epi16(first, _mm512_maddubs_epi16(rows[1], query[1]));
            _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn dot_tiles(
        self,
        unit: &Self::MatrixUnit,
        queries: &[[i8; 64]],
        tiles: [&[Aligned<[i8; 64]>]; 2],
        sums: &mut [[TileSums; 2]; 2],
    ) {
        match unit {
            Some(registers) => amx::dot_tiles(registers, queries, tiles, sums),
            None => dot_by_dot(self, queries, tiles, sums),
        }
    }
}

//! AVX2: sixteen f64 lanes are four registers, sixteen f32 or i32 lanes are two. With AVX-VNNI four
//! products of codes are one instruction; without, three, and codes keep to 7 bits.

use std::arch::x86_64::{
    __m256, __m256d, __m256i, _MM_HINT_T0, _mm_add_epi32, _mm_add_pd, _mm_add_sd, _mm_cvtsd_f64, _mm_cvtsi32_si128,
    _mm_cvtsi128_si32, _mm_loadl_epi64, _mm_loadu_ps, _mm_loadu_si128, _mm_packus_epi16, _mm_prefetch,
    _mm_shuffle_epi32, _mm_storeu_si128, _mm_unpackhi_epi8, _mm_unpackhi_pd, _mm_unpacklo_epi8, _mm256_add_epi16,
    _mm256_add_epi32, _mm256_add_pd, _mm256_castpd256_pd128, _mm256_castps256_ps128, _mm256_castsi256_ps,
    _mm256_castsi256_si128, _mm256_cmpgt_epi32, _mm256_cvtepu8_epi32, _mm256_cvtph_ps, _mm256_cvtps_pd,
    _mm256_dpbusd_avx_epi32, _mm256_extractf128_pd, _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_ps,
    _mm256_loadu_pd, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_max_ps,
    _mm256_min_ps, _mm256_movemask_ps, _mm256_mul_pd, _mm256_mullo_epi32, _mm256_packs_epi32, _mm256_permute_ps,
    _mm256_permute2f128_ps, _mm256_permute4x64_epi64, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_pd,
    _mm256_set1_ps, _mm256_setzero_pd, _mm256_sll_epi32, _mm256_sra_epi32, _mm256_storeu_pd, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm256_sub_pd,
};

use super::{LANES, Operation, Simd};
use crate::half::Half;

/// Proof that the CPU has AVX2 and FMA, and AVX-VNNI where `VNNI` is true.
#[derive(Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>(());

impl<const VNNI: bool> Avx2<VNNI> {
    new_and_enter!(is_x86_feature_detected: "avx2", "fma", "f16c"; "avxvnni" if VNNI; and true);
}

/// [`Simd::interleave`] of every x86-64.
#[inline(always)]
pub(super) fn interleave_sse2(x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2] {
    let mut pairs = [[0; LANES]; 2];
    // SAFETY: the baseline of x86-64 has SSE2; loads and stores are arrays of 16.
    unsafe {
        let (x, y) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(y.as_ptr().cast()));
        _mm_storeu_si128(pairs[0].as_mut_ptr().cast(), _mm_unpacklo_epi8(x, y));
        _mm_storeu_si128(pairs[1].as_mut_ptr().cast(), _mm_unpackhi_epi8(x, y));
    }
    pairs
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F64 = [__m256d; 4];
    type F32 = [__m256; 2];
    type I32 = [__m256i; 2];
    type Codes = [__m256i; 2];
    type MatrixUnit = ();

    const MANY_REGISTERS: bool = false;
    const CODE_LIMIT: i32 = if VNNI { 127 } else { 63 };
    const CODE_OFFSET: i32 = if VNNI { 128 } else { 64 };
    const DOT_COST: f64 = if VNNI { 2.3 } else { 3.5 };

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
    fn widen_half(self, values: &[Half; LANES]) -> Self::F64 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX and F16C; both loads of 8 lie inside the array of 16, whose elements
        // are 16 bits.
        unsafe {
            let low = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
            let high = _mm256_cvtph_ps(_mm_loadu_si128(at.add(8).cast()));
            [
                _mm256_cvtps_pd(_mm256_castps256_ps128(low)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(low)),
                _mm256_cvtps_pd(_mm256_castps256_ps128(high)),
                _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(high)),
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
    fn store(self, lanes: Self::F64, values: &mut [f64; LANES]) {
        for (lanes, values) in lanes.into_iter().zip(values.as_chunks_mut::<4>().0) {
            // SAFETY: the token proves AVX; the store is the array.
            unsafe { _mm256_storeu_pd(values.as_mut_ptr(), lanes) };
        }
    }

    #[inline(always)]
    fn splat(self, value: f64) -> Self::F64 {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_set1_pd(value); 4] }
    }

    #[inline(always)]
    fn add_product(self, mut sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        for i in 0..4 {
            // SAFETY: the token proves AVX.
            sum[i] = unsafe { _mm256_add_pd(sum[i], _mm256_mul_pd(x[i], y[i])) };
        }
        sum
    }

    #[inline(always)]
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        // A loop instead of a closure, which is not always inlined.
        let mut sums = sum;
        for i in 0..4 {
            // SAFETY: the token proves AVX.
            unsafe {
                let difference = _mm256_sub_pd(x[i], y[i]);
                sums[i] = _mm256_add_pd(sum[i], _mm256_mul_pd(difference, difference));
            }
        }
        sums
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

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::F32 {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Self::F32 {
        // SAFETY: the token proves AVX; both loads of 8 lie inside the array of 16.
        unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn store_f32(self, lanes: Self::F32, values: &mut [f32; LANES]) {
        // SAFETY: the token proves AVX; both stores of 8 lie inside the array of 16.
        unsafe {
            _mm256_storeu_ps(values.as_mut_ptr(), lanes[0]);
            _mm256_storeu_ps(values.as_mut_ptr().add(8), lanes[1]);
        }
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token proves FMA.
        unsafe { [_mm256_fmadd_ps(x[0], y[0], sum[0]), _mm256_fmadd_ps(x[1], y[1], sum[1])] }
    }

    #[inline(always)]
    fn clamp(self, [low, high]: Self::F32, limit: f32) -> Self::F32 {
        // SAFETY: the token proves AVX.
        unsafe {
            let (least, most) = (_mm256_set1_ps(-limit), _mm256_set1_ps(limit));
            [_mm256_min_ps(_mm256_max_ps(low, least), most), _mm256_min_ps(_mm256_max_ps(high, least), most)]
        }
    }

    #[inline(always)]
    fn swap<const HALF: usize>(self, [low, high]: Self::F32) -> Self::F32 {
        // SAFETY: the token proves AVX.
        unsafe {
            match HALF {
                1 => [_mm256_permute_ps::<0b10_11_00_01>(low), _mm256_permute_ps::<0b10_11_00_01>(high)],
                2 => [_mm256_permute_ps::<0b01_00_11_10>(low), _mm256_permute_ps::<0b01_00_11_10>(high)],
                4 => [_mm256_permute2f128_ps::<1>(low, low), _mm256_permute2f128_ps::<1>(high, high)],
                _ => [high, low],
            }
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        // SAFETY: the token proves AVX.
        unsafe { [_mm256_set1_epi32(value); 2] }
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX; both loads of 8 lie inside the array of 16.
        unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(8).cast())] }
    }

    #[inline(always)]
    fn store_i32(self, lanes: Self::I32, values: &mut [i32; LANES]) {
        let at = values.as_mut_ptr();
        // SAFETY: the token proves AVX; both stores of 8 lie inside the array of 16.
        unsafe {
            _mm256_storeu_si256(at.cast(), lanes[0]);
            _mm256_storeu_si256(at.add(8).cast(), lanes[1]);
        }
    }

    #[inline(always)]
    fn add_i32(self, x: Self::I32, y: Self::I32) -> Self::I32 {
        // SAFETY: the token proves AVX2.
        unsafe { [_mm256_add_epi32(x[0], y[0]), _mm256_add_epi32(x[1], y[1])] }
    }

    #[inline(always)]
    fn shift_left(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            [_mm256_sll_epi32(lanes[0], bits), _mm256_sll_epi32(lanes[1], bits)]
        }
    }

    #[inline(always)]
    fn shift_right(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            [_mm256_sra_epi32(lanes[0], bits), _mm256_sra_epi32(lanes[1], bits)]
        }
    }

    #[inline(always)]
    fn add_product_i32(self, mut sum: Self::I32, x: Self::I32, y: Self::I32) -> Self::I32 {
        for i in 0..2 {
            // SAFETY: the token proves AVX2.
            sum[i] = unsafe { _mm256_add_epi32(sum[i], _mm256_mullo_epi32(x[i], y[i])) };
        }
        sum
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::I32 {
        let at = values.as_ptr();
        // SAFETY: the token proves AVX2; both loads of 8 lie inside the array of 16.
        unsafe {
            [_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.add(8).cast()))]
        }
    }

    #[inline(always)]
    fn store_u8(self, lanes: Self::I32, values: &mut [u8; LANES]) {
        // SAFETY: the token proves AVX2; the store is the array.
        unsafe {
            // Halves of registers are packed apart, which the permutation puts right.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(lanes[0], lanes[1]));
            let bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(values.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn interleave(self, x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2] {
        interleave_sse2(x, y)
    }

    #[inline(always)]
    fn at_least(self, x: Self::I32, y: Self::I32) -> u16 {
        // SAFETY: the token proves AVX2.
        let less = |i: usize| unsafe { _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(y[i], x[i]))) };
        !((less(0) | (less(1) << 8)) as u16)
    }

    #[inline(always)]
    fn sum_i32(self, lanes: Self::I32) -> i32 {
        // SAFETY: the token proves AVX2.
        unsafe {
            let eight = _mm256_add_epi32(lanes[0], lanes[1]);
            let four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_add_epi32(four, _mm_shuffle_epi32::<0b01_00_11_10>(four));
            _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<0b10_11_00_01>(two)))
        }
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
        let at = codes.as_ptr();
        // SAFETY: the token proves AVX; both loads of 32 lie inside the array of 64.
        unsafe { [_mm256_loadu_si256(at.cast()), _mm256_loadu_si256(at.add(32).cast())] }
    }

    #[inline(always)]
    fn splat_codes(self, codes: [i8; 4]) -> Self::Codes {
        // SAFETY: the token proves AVX.
        unsafe {
            [_mm256_set1_epi32(i32::from_ne_bytes([codes[0] as u8, codes[1] as u8, codes[2] as u8, codes[3] as u8])); 2]
        }
    }

    #[inline(always)]
    fn dot(self, sum: Self::I32, rows: Self::Codes, query: Self::Codes) -> Self::I32 {
        let mut sums = sum;
        for i in 0..2 {
            sums[i] = if VNNI {
                // SAFETY: a token with `VNNI` proves AVX-VNNI.
                unsafe { _mm256_dpbusd_avx_epi32(sum[i], rows[i], query[i]) }
            } else {
                // SAFETY: the token proves AVX2. Two products of codes up to 127 and 63 in magnitude
                // stay within 16 bits.
                unsafe {
                    let pairs = _mm256_maddubs_epi16(rows[i], query[i]);
                    _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
                }
            };
        }
        sums
    }

    #[inline(always)]
    fn dot_two(self, sum: Self::I32, rows: [Self::Codes; 2], query: [Self::Codes; 2]) -> Self::I32 {
        if VNNI {
            return self.dot(self.dot(sum, rows[0], query[0]), rows[1], query[1]);
        }
        let mut sums = sum;
        for i in 0..2 {
            // SAFETY: the token proves AVX2. Four products of codes up to 127 and 63 in magnitude stay within 16 bits.
            sums[i] = unsafe {
                let first = _mm256_maddubs_epi16(rows[0][i], query[0][i]);
                let second = _mm256_maddubs_epi16(rows[1][i], query[1][i]);
                let pairs = _mm256_add_epi16(first, second);
                _mm256_add_epi32(sum[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            };
        }
        sums
    }

    #[inline(always)]
    fn matrix_unit(self) {}
}

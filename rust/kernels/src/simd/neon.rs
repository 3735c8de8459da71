//! NEON: sixteen f64 lanes are eight registers, sixteen f32 or i32 lanes are four. With the dot-product
//! instructions four products of codes are one instruction, else five.

use std::arch::aarch64::{
    float32x4_t, float64x2_t, int8x16_t, int32x4_t, vaddq_f64, vaddq_s32, vaddvq_s32, vcgeq_s32, vcombine_u8,
    vcombine_u16, vcvt_f64_f32, vdupq_n_f32, vdupq_n_f64, vdupq_n_s32, vextq_f32, vfmaq_f32, vget_low_s8, vget_low_u8,
    vget_low_u16, vgetq_lane_f64, vgetq_lane_u32, vld1_f32, vld1q_f32, vld1q_f64, vld1q_s8, vld1q_s32, vld1q_u8,
    vmaxq_f32, vminq_f32, vmlaq_s32, vmovl_high_u8, vmovl_high_u16, vmovl_u8, vmovl_u16, vmull_high_s8, vmull_s8,
    vmulq_f64, vpadalq_s16, vpaddq_s32, vqmovn_u16, vqmovun_s32, vreinterpretq_s8_s32, vreinterpretq_s32_u32,
    vrev64q_f32, vshlq_s32, vst1q_f32, vst1q_f64, vst1q_s32, vst1q_u8, vsubq_f64, vzip1q_u8, vzip2q_u8,
};
use std::arch::is_aarch64_feature_detected;

use super::{LANES, Operation, Simd};

/// Proof that the CPU has Advanced SIMD, and its dot-product instructions where `DOT` is true.
#[derive(Clone, Copy)]
pub(super) struct Neon<const DOT: bool>(());

impl<const DOT: bool> Neon<DOT> {
    new_and_enter!(is_aarch64_feature_detected: "neon"; "dotprod" if DOT; and true);
}

/// `sdot`, whose intrinsic is not stable at the supported Rust version.
///
/// # Safety
/// The CPU has the dot-product instructions.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, x: int8x16_t, y: int8x16_t) -> int32x4_t {
    // SAFETY: the caller vouches for the instruction, which touches registers only.
    unsafe {
        std::arch::asm!(
            // The assembler goes by the features of the function this ends up in, which may be none of ours.
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {x:v}.16b, {y:v}.16b",
            sum = inout(vreg) sum, x = in(vreg) x, y = in(vreg) y,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

impl<const DOT: bool> Simd for Neon<DOT> {
    type F64 = [float64x2_t; 8];
    type F32 = [float32x4_t; 4];
    type I32 = [int32x4_t; 4];
    type Codes = [int8x16_t; 4];
    type MatrixUnit = ();

    const MANY_REGISTERS: bool = false;
    const CODE_LIMIT: i32 = 127;
    const CODE_OFFSET: i32 = 0;
    // Counted, in instructions, not measured.
    const DOT_COST: f64 = if DOT { 4.0 } else { 28.0 };

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
    fn store(self, lanes: Self::F64, values: &mut [f64; LANES]) {
        for (lanes, values) in lanes.into_iter().zip(values.as_chunks_mut::<2>().0) {
            // SAFETY: the token proves NEON; the store is the array.
            unsafe { vst1q_f64(values.as_mut_ptr(), lanes) };
        }
    }

    #[inline(always)]
    fn splat(self, value: f64) -> Self::F64 {
        // SAFETY: the token proves NEON.
        unsafe { [vdupq_n_f64(value); 8] }
    }

    #[inline(always)]
    fn add_product(self, mut sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64 {
        for i in 0..8 {
            // SAFETY: the token proves NEON.
            sum[i] = unsafe { vaddq_f64(sum[i], vmulq_f64(x[i], y[i])) };
        }
        sum
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

    #[inline(always)]
    fn splat_f32(self, value: f32) -> Self::F32 {
        // SAFETY: the token proves NEON.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load_f32(self, values: &[f32; LANES]) -> Self::F32 {
        // SAFETY: the token proves NEON; the four loads of 4 lie inside the array of 16.
        std::array::from_fn(|i| unsafe { vld1q_f32(values.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    fn store_f32(self, lanes: Self::F32, values: &mut [f32; LANES]) {
        for (i, lanes) in lanes.into_iter().enumerate() {
            // SAFETY: the token proves NEON; the four stores of 4 lie inside the array of 16.
            unsafe { vst1q_f32(values.as_mut_ptr().add(4 * i), lanes) };
        }
    }

    #[inline(always)]
    fn multiply_add(self, sum: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32 {
        // SAFETY: the token proves NEON.
        std::array::from_fn(|i| unsafe { vfmaq_f32(sum[i], x[i], y[i]) })
    }

    #[inline(always)]
    fn clamp(self, lanes: Self::F32, limit: f32) -> Self::F32 {
        // SAFETY: the token proves NEON.
        lanes.map(|lanes| unsafe { vminq_f32(vmaxq_f32(lanes, vdupq_n_f32(-limit)), vdupq_n_f32(limit)) })
    }

    #[inline(always)]
    fn swap<const HALF: usize>(self, lanes: Self::F32) -> Self::F32 {
        let [a, b, c, d] = lanes;
        match HALF {
            // SAFETY: the token proves NEON.
            1 => lanes.map(|lanes| unsafe { vrev64q_f32(lanes) }),
            // SAFETY: the token proves NEON.
            2 => lanes.map(|lanes| unsafe { vextq_f32::<2>(lanes, lanes) }),
            4 => [b, a, d, c],
            _ => [c, d, a, b],
        }
    }

    #[inline(always)]
    fn splat_i32(self, value: i32) -> Self::I32 {
        // SAFETY: the token proves NEON.
        unsafe { [vdupq_n_s32(value); 4] }
    }

    #[inline(always)]
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32 {
        // SAFETY: the token proves NEON; the four loads of 4 lie inside the array of 16.
        std::array::from_fn(|i| unsafe { vld1q_s32(values.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    fn store_i32(self, lanes: Self::I32, values: &mut [i32; LANES]) {
        for (i, lanes) in lanes.into_iter().enumerate() {
            // SAFETY: the token proves NEON; the four stores of 4 lie inside the array of 16.
            unsafe { vst1q_s32(values.as_mut_ptr().add(4 * i), lanes) };
        }
    }

    #[inline(always)]
    fn add_i32(self, x: Self::I32, y: Self::I32) -> Self::I32 {
        // SAFETY: the token proves NEON.
        std::array::from_fn(|i| unsafe { vaddq_s32(x[i], y[i]) })
    }

    #[inline(always)]
    fn shift_left(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves NEON.
        lanes.map(|lanes| unsafe { vshlq_s32(lanes, vdupq_n_s32(bits as i32)) })
    }

    #[inline(always)]
    fn shift_right(self, lanes: Self::I32, bits: u32) -> Self::I32 {
        // SAFETY: the token proves NEON.
        lanes.map(|lanes| unsafe { vshlq_s32(lanes, vdupq_n_s32(-(bits as i32))) })
    }

    #[inline(always)]
    fn add_product_i32(self, sum: Self::I32, x: Self::I32, y: Self::I32) -> Self::I32 {
        // SAFETY: the token proves NEON.
        std::array::from_fn(|i| unsafe { vmlaq_s32(sum[i], x[i], y[i]) })
    }

    #[inline(always)]
    fn load_u8(self, values: &[u8; LANES]) -> Self::I32 {
        // SAFETY: the token proves NEON; the load is the array.
        unsafe {
            let bytes = vld1q_u8(values.as_ptr());
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            let four = [
                vmovl_u16(vget_low_u16(low)),
                vmovl_high_u16(low),
                vmovl_u16(vget_low_u16(high)),
                vmovl_high_u16(high),
            ];
            four.map(|lanes| vreinterpretq_s32_u32(lanes))
        }
    }

    #[inline(always)]
    fn store_u8(self, lanes: Self::I32, values: &mut [u8; LANES]) {
        // SAFETY: the token proves NEON; the store is the array.
        unsafe {
            let low = vcombine_u16(vqmovun_s32(lanes[0]), vqmovun_s32(lanes[1]));
            let high = vcombine_u16(vqmovun_s32(lanes[2]), vqmovun_s32(lanes[3]));
            vst1q_u8(values.as_mut_ptr(), vcombine_u8(vqmovn_u16(low), vqmovn_u16(high)));
        }
    }

    #[inline(always)]
    fn interleave(self, x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2] {
        let mut pairs = [[0; LANES]; 2];
        // SAFETY: the token proves NEON; loads and stores are arrays of 16.
        unsafe {
            let (x, y) = (vld1q_u8(x.as_ptr()), vld1q_u8(y.as_ptr()));
            vst1q_u8(pairs[0].as_mut_ptr(), vzip1q_u8(x, y));
            vst1q_u8(pairs[1].as_mut_ptr(), vzip2q_u8(x, y));
        }
        pairs
    }

    #[inline(always)]
    fn at_least(self, x: Self::I32, y: Self::I32) -> u16 {
        let mut mask = 0;
        for i in 0..4 {
            // SAFETY: the token proves NEON.
            unsafe {
                let lanes = vcgeq_s32(x[i], y[i]);
                let bits = (vgetq_lane_u32::<0>(lanes) & 1)
                    | (vgetq_lane_u32::<1>(lanes) & 2)
                    | (vgetq_lane_u32::<2>(lanes) & 4)
                    | (vgetq_lane_u32::<3>(lanes) & 8);
                mask |= (bits as u16) << (4 * i);
            }
        }
        mask
    }

    #[inline(always)]
    fn sum_i32(self, lanes: Self::I32) -> i32 {
        // SAFETY: the token proves NEON.
        unsafe { vaddvq_s32(vaddq_s32(vaddq_s32(lanes[0], lanes[1]), vaddq_s32(lanes[2], lanes[3]))) }
    }

    #[inline(always)]
    fn load_codes(self, codes: &[i8; 64]) -> Self::Codes {
        // SAFETY: the token proves NEON; the four loads of 16 lie inside the array of 64.
        std::array::from_fn(|i| unsafe { vld1q_s8(codes.as_ptr().add(16 * i)) })
    }

    #[inline(always)]
    fn splat_codes(self, codes: [i8; 4]) -> Self::Codes {
        let four = i32::from_ne_bytes(codes.map(|code| code as u8));
        // SAFETY: the token proves NEON.
        unsafe { [vreinterpretq_s8_s32(vdupq_n_s32(four)); 4] }
    }

    #[inline(always)]
    fn dot(self, sum: Self::I32, rows: Self::Codes, query: Self::Codes) -> Self::I32 {
        std::array::from_fn(|i| {
            if DOT {
                // SAFETY: a token with `DOT` proves the dot-product instructions.
                unsafe { sdot(sum[i], rows[i], query[i]) }
            } else {
                // SAFETY: the token proves NEON. A product of two codes within ±127 fits 16 bits.
                unsafe {
                    let low = vmull_s8(vget_low_s8(rows[i]), vget_low_s8(query[i]));
                    let high = vmull_high_s8(rows[i], query[i]);
                    let pairs = vpaddq_s32(vpadalq_s16(vdupq_n_s32(0), low), vpadalq_s16(vdupq_n_s32(0), high));
                    vaddq_s32(sum[i], pairs)
                }
            }
        })
    }

    #[inline(always)]
    fn matrix_unit(self) {}
}

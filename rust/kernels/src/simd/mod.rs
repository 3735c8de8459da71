//! SIMD levels: one trait, one token per level, one dispatch per block of work.
//!
//! A kernel is written once, generic over [`Simd`], as an [`Operation`]. [`Level::run`] picks the
//! implementation that the level names and enters the operation through a function compiled with
//! that level's features, so that everything inlined into it is compiled with them too.
//!
//! The implementations are zero-sized tokens. A token can only be made where its features were
//! detected, hence its methods are safe to call: holding one is the proof. This folder is the only
//! place where CPU features are looked at and, with few exceptions, where `unsafe` is written; the
//! files beside this one hold loads, arithmetic and shuffles, and no algorithm.
//!
//! A tile is sixteen rows of codes, as in `filter`. The matrix unit is what AMX adds to a CPU; its
//! registers, which Intel calls tiles, are named `AmxTiles` here.

use crate::half::Half;
use std::fmt;

/// `new` and `enter` of a token with one flag: the features that `new` looks for are those that `enter`
/// compiles for, with one more where the flag is set.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! new_and_enter {
    ($detected:ident: $($always:tt),+; $more:tt if $flag:ident; and $condition:expr) => {
        /// The token, where the CPU has the features.
        #[inline]
        pub(super) fn new() -> Option<Self> {
            let found = $($detected!($always) &&)+ (!$flag || $detected!($more)) && $condition;
            found.then_some(Self(()))
        }

        /// Runs `operation` compiled for this level.
        #[inline]
        pub(super) fn enter<O: Operation>(self, operation: O) -> O::Output {
            #[target_feature($(enable = $always),+)]
            fn without<S: Simd, O: Operation>(token: S, operation: O) -> O::Output {
                operation.run(token)
            }
            #[target_feature($(enable = $always),+, enable = $more)]
            fn with<S: Simd, O: Operation>(token: S, operation: O) -> O::Output {
                operation.run(token)
            }
            if $flag {
                // SAFETY: a token exists only where `new` detected these features, that of the flag too.
                unsafe { with(self, operation) }
            } else {
                // SAFETY: a token exists only where `new` detected these features.
                unsafe { without(self, operation) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod float_mode;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;

pub use float_mode::FloatMode;

/// Lanes of the canonical distance: the same at every level (see `distance`).
pub const LANES: usize = 16;

/// What a level offers: sixteen lanes of f64, f32 and i32, each on as many registers as that takes.
///
/// The f64 operations decide answers: none fuses a multiplication with an addition or reorders
/// additions, so that every level returns the same bits. The f32 and code operations serve the
/// filters (see `filter`), whose bounds hold for any rounding; the code products are exact.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f64 lanes.
    type F64: Copy;

    /// Sixteen f32 lanes.
    type F32: Copy;

    /// Sixteen i32 lanes.
    type I32: Copy;

    /// Sixteen lanes of four 8-bit codes.
    type Codes: Copy;

    /// What [`Simd::dot_tiles`] computes on: the configured registers of AMX, `()` where there are none.
    type MatrixUnit;

    /// Whether sums may fill 32 registers of 512 bits; else 16 of 256 bits, or as much, must do.
    const MANY_REGISTERS: bool;

    /// Largest magnitude of a code that [`Simd::dot`] multiplies without overflow.
    const CODE_LIMIT: i32;

    /// What is added to the codes of a tile's rows to make them unsigned: see [`Simd::dot`].
    const CODE_OFFSET: i32;

    /// Relative cost of [`Simd::dot`], 1.0 with AVX-512 VNNI; the cost model of the filter scales with it.
    const DOT_COST: f64;

    /// Whether [`Simd::dot_tiles`] is faster than [`Simd::dot`], as it is done by a matrix unit.
    const HAS_MATRIX_UNIT: bool = false;

    /// All lanes 0.
    fn zero(self) -> Self::F64;

    /// Sixteen f32, each exactly as f64.
    fn widen(self, values: &[f32; LANES]) -> Self::F64;

    /// Sixteen float16, each exactly as f64.
    #[inline(always)]
    fn widen_half(self, values: &[Half; LANES]) -> Self::F64 {
        let mut wide = [0.0; LANES];
        for (wide, value) in wide.iter_mut().zip(values) {
            *wide = value.to_f32();
        }
        self.widen(&wide)
    }

    /// Sixteen f64 as they are.
    fn load(self, values: &[f64; LANES]) -> Self::F64;

    /// Writes the lanes.
    fn store(self, lanes: Self::F64, values: &mut [f64; LANES]);

    /// All lanes `value`.
    fn splat(self, value: f64) -> Self::F64;

    /// `sum + x·y` per lane: a multiplication and an addition, each rounded.
    fn add_product(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64;

    /// `sum + (x − y)²` per lane: a subtraction, a multiplication, an addition, each rounded.
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64;

    /// The lanes added up in halves: lane i takes lane i + 8, then i + 4, i + 2, i + 1.
    fn fold(self, lanes: Self::F64) -> f64;

    /// All lanes `value`.
    fn splat_f32(self, value: f32) -> Self::F32;

    /// Sixteen f32 as they are.
    fn load_f32(self, values: &[f32; LANES]) -> Self::F32;

    /// Writes the lanes.
    fn store_f32(self, lanes: Self::F32, values: &mut [f32; LANES]);

    /// `sum + x·y` per lane, fused or not.
    fn multiply_add(self, sum: Self::F32, x: Self::F32, y: Self::F32) -> Self::F32;

    /// Each lane, but no farther from 0 than `limit`.
    fn clamp(self, lanes: Self::F32, limit: f32) -> Self::F32;

    /// Lane i takes lane i ^ `HALF`; `HALF` is 1, 2, 4 or 8.
    fn swap<const HALF: usize>(self, lanes: Self::F32) -> Self::F32;

    /// All lanes `value`.
    fn splat_i32(self, value: i32) -> Self::I32;

    /// Sixteen i32 as they are.
    fn load_i32(self, values: &[i32; LANES]) -> Self::I32;

    /// Writes the lanes.
    fn store_i32(self, lanes: Self::I32, values: &mut [i32; LANES]);

    /// The sum of two lanes; wraps.
    fn add_i32(self, x: Self::I32, y: Self::I32) -> Self::I32;

    /// Each lane times 2 to the `bits`, which are below 32; wraps.
    fn shift_left(self, lanes: Self::I32, bits: u32) -> Self::I32;

    /// Each lane divided by 2 to the `bits`, which are below 32, and rounded down.
    fn shift_right(self, lanes: Self::I32, bits: u32) -> Self::I32;

    /// `sum + x·y` per lane; wraps.
    fn add_product_i32(self, sum: Self::I32, x: Self::I32, y: Self::I32) -> Self::I32;

    /// Sixteen bytes, each as an i32.
    fn load_u8(self, values: &[u8; LANES]) -> Self::I32;

    /// Writes the lanes: 0 for those below, 255 for those above.
    fn store_u8(self, lanes: Self::I32, values: &mut [u8; LANES]);

    /// The bytes of `x` and `y` by turns, from `x` on.
    fn interleave(self, x: [u8; LANES], y: [u8; LANES]) -> [[u8; LANES]; 2];

    /// Bit i is set where lane i of `x` is at least that of `y`.
    fn at_least(self, x: Self::I32, y: Self::I32) -> u16;

    /// The lanes added up; wraps.
    fn sum_i32(self, lanes: Self::I32) -> i32;

    /// Asks for memory that will be read soon, where the level can.
    #[inline(always)]
    fn prefetch<T>(self, _memory: &[T]) {}

    /// Sixty-four codes as they are.
    fn load_codes(self, codes: &[i8; 64]) -> Self::Codes;

    /// Four codes in every lane.
    fn splat_codes(self, codes: [i8; 4]) -> Self::Codes;

    /// `sum + Σ (offset codes of the rows)·(codes of the query)` per lane, in i32, exact.
    ///
    /// `rows` holds `code + CODE_OFFSET` as bits, codes within ±[`Simd::CODE_LIMIT`]; `query` holds
    /// plain codes within the same limit. The caller subtracts `CODE_OFFSET · Σ query`.
    fn dot(self, sum: Self::I32, rows: Self::Codes, query: Self::Codes) -> Self::I32;

    /// [`Simd::dot`] twice: faster than one after the other where products are added up in 16 bits first.
    #[inline(always)]
    fn dot_two(self, sum: Self::I32, rows: [Self::Codes; 2], query: [Self::Codes; 2]) -> Self::I32 {
        self.dot(self.dot(sum, rows[0], query[0]), rows[1], query[1])
    }

    /// Readies the matrix unit of this thread until the value is dropped.
    ///
    /// # Panics
    /// With AMX, where the thread holds such a value already.
    fn matrix_unit(self) -> Self::MatrixUnit;

    /// `sums[g][t][q][i]` = what [`Simd::dot`] gives for query q of group g and row i of tile t, from 0.
    ///
    /// `queries` holds two groups of sixteen queries one after another, each of a multiple of 64 plain codes; each of
    /// `tiles` is as long as a group, each vector four offset codes of sixteen rows.
    ///
    /// # Panics
    /// With AMX, when lengths do not fit together.
    #[inline(always)]
    fn dot_tiles(
        self,
        _unit: &Self::MatrixUnit,
        queries: &[[i8; 64]],
        tiles: [&[Aligned<[i8; 64]>]; 2],
        sums: &mut [[TileSums; 2]; 2],
    ) {
        dot_by_dot(self, queries, tiles, sums);
    }
}

/// Begins at a line of the cache: a load or a store that crosses two takes twice as long.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
pub struct Aligned<T>(pub T);

/// The products of sixteen queries with the sixteen rows of a tile, by query.
pub type TileSums = Aligned<[[i32; LANES]; LANES]>;

/// [`Simd::dot_tiles`] without a matrix unit.
#[inline(always)]
fn dot_by_dot<S: Simd>(simd: S, queries: &[[i8; 64]], tiles: [&[Aligned<[i8; 64]>]; 2], sums: &mut [[TileSums; 2]; 2]) {
    for (queries, sums) in queries.chunks_exact(tiles[0].len()).zip(sums) {
        for (tile, sums) in tiles.into_iter().zip(sums) {
            for (query, sums) in queries.chunks_exact(tile.len() / LANES).zip(&mut sums.0) {
                let mut sum = simd.splat_i32(0);
                for (rows, four) in tile.iter().zip(query.as_flattened().as_chunks().0) {
                    sum = simd.dot(sum, simd.load_codes(&rows.0), simd.splat_codes(*four));
                }
                simd.store_i32(sum, sums);
            }
        }
    }
}

/// A kernel body, generic over the level. Implementations mark `run` `#[inline(always)]`, since only
/// what is inlined is compiled for the level.
pub trait Operation {
    /// What the body returns.
    type Output;

    /// The body.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// A SIMD level. Levels of the running architecture are ordered from slow to fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust, compiled for the architecture's baseline.
    Scalar,
    /// Advanced SIMD of `ARMv8`.
    Neon,
    /// Advanced SIMD with the dot-product instructions.
    NeonDot,
    /// AVX2 and FMA.
    Avx2,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI.
    Avx512Vnni,
    /// AVX-512 with VNNI, and AMX for 8-bit integers.
    Amx,
}

/// `Some` of the body with `$token` bound to the level's token, where the CPU has the level. Built with
/// `--cfg scalar_only`, as `make mutants` does, there are no others: every level more is compiled anew for a mutant.
macro_rules! with_token {
    ($level:expr, $token:ident => $body:expr) => {
        match $level {
            Level::Scalar => Some(scalar::Scalar).map(|$token| $body),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::Neon::<false>::new().map(|$token| $body),
            #[cfg(target_arch = "aarch64")]
            Level::NeonDot => neon::Neon::<true>::new().map(|$token| $body),
            #[cfg(all(target_arch = "x86_64", not(scalar_only)))]
            Level::Avx2 => avx2::Avx2::<false>::new().map(|$token| $body),
            #[cfg(all(target_arch = "x86_64", not(scalar_only)))]
            Level::AvxVnni => avx2::Avx2::<true>::new().map(|$token| $body),
            #[cfg(all(target_arch = "x86_64", not(scalar_only)))]
            Level::Avx512 => avx512::Avx512::<false, false>::new().map(|$token| $body),
            #[cfg(all(target_arch = "x86_64", not(scalar_only)))]
            Level::Avx512Vnni => avx512::Avx512::<true, false>::new().map(|$token| $body),
            #[cfg(all(target_arch = "x86_64", not(scalar_only)))]
            Level::Amx => avx512::Avx512::<true, true>::new().map(|$token| $body),
            // Reached by the levels of other architectures.
            _ => None,
        }
    };
}

impl Level {
    /// Every level, of any architecture.
    pub const ALL: [Self; 8] =
        [Self::Scalar, Self::Neon, Self::NeonDot, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni, Self::Amx];

    /// The name that `PATCHCORE_RS_SIMD` and `build_info` use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
            Self::Amx => "amx",
        }
    }

    /// Whether this CPU has the level.
    pub fn is_available(self) -> bool {
        with_token!(self, _token => ()).is_some()
    }

    /// The levels of this CPU, slow to fast.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|level| level.is_available()).collect()
    }

    /// The fastest level of this CPU.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }

    /// [`Simd::CODE_LIMIT`] of this level.
    ///
    /// # Panics
    /// As [`Level::run`].
    pub fn code_limit(self) -> i32 {
        self.run(Constants).0
    }

    /// [`Simd::CODE_OFFSET`] of this level.
    ///
    /// # Panics
    /// As [`Level::run`].
    pub fn code_offset(self) -> i32 {
        self.run(Constants).1
    }

    /// [`Simd::DOT_COST`] of this level.
    ///
    /// # Panics
    /// As [`Level::run`].
    pub fn dot_cost(self) -> f64 {
        self.run(Constants).2
    }

    /// [`Simd::HAS_MATRIX_UNIT`] of this level.
    ///
    /// # Panics
    /// As [`Level::run`].
    pub fn has_matrix_unit(self) -> bool {
        self.run(Constants).3
    }

    /// Runs `operation` at this level.
    ///
    /// # Panics
    /// When the CPU lacks the level: callers take levels from [`Level::available`] or ask
    /// [`Level::is_available`] first.
    #[inline]
    pub fn run<O: Operation>(self, operation: O) -> O::Output {
        with_token!(self, token => token.enter(operation)).expect("a level of this CPU")
    }
}

/// [`Simd::CODE_LIMIT`], [`Simd::CODE_OFFSET`], [`Simd::DOT_COST`] and [`Simd::HAS_MATRIX_UNIT`].
struct Constants;

impl Operation for Constants {
    type Output = (i32, i32, f64, bool);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        (S::CODE_LIMIT, S::CODE_OFFSET, S::DOT_COST, S::HAS_MATRIX_UNIT)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Level {
    type Err = crate::error::Error;

    /// The level of that name, whether or not this CPU has it.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|level| level.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            crate::error::Error::invalid("SIMD level", format!("one of {names}"), format!("{name:?}"))
        })
    }
}

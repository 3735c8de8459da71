//! SIMD levels: one trait, one token per level, one dispatch per call.
//!
//! A kernel is written once, generic over [`Simd`], as an [`Operation`]. [`Level::run`] picks the
//! implementation that the level names and enters the operation through a function compiled with
//! that level's features, so that everything inlined into it is compiled with them too.
//!
//! The implementations are zero-sized tokens. A token can only be made where its features were
//! detected, hence its methods are safe to call: holding one is the proof. This folder is the only
//! place where CPU features are looked at and, with few exceptions, where `unsafe` is written; the
//! files beside this one hold loads, arithmetic and shuffles, and no algorithm.

use std::fmt;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

/// Lanes of the canonical distance: the same at every level (see [`crate::distance`]).
pub const LANES: usize = 16;

/// What a level offers: sixteen lanes of f64, on as many registers as that takes.
///
/// No operation fuses a multiplication with an addition or reorders additions, so that every level
/// returns the same bits.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f64 lanes.
    type F64: Copy;

    /// Whether there are registers for eight sums of sixteen lanes; else there are for two.
    const MANY_REGISTERS: bool;

    /// All lanes 0.
    fn zero(self) -> Self::F64;

    /// Sixteen f32, each exactly as f64.
    fn widen(self, values: &[f32; LANES]) -> Self::F64;

    /// Sixteen f64 as they are.
    fn load(self, values: &[f64; LANES]) -> Self::F64;

    /// `sum + (x − y)²` per lane: a subtraction, a multiplication, an addition, each rounded.
    fn add_squared_difference(self, sum: Self::F64, x: Self::F64, y: Self::F64) -> Self::F64;

    /// The lanes added up in halves: lane i takes lane i + 8, then i + 4, i + 2, i + 1.
    fn fold(self, lanes: Self::F64) -> f64;
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
    /// AVX2 and FMA (the latter unused by the canonical distance).
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Level {
    /// Every level, of any architecture.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];

    /// The name that `PATCHCORE_RS_SIMD` and `build_info` use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// Whether this CPU has the level.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::Neon::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::new().is_some(),
            #[allow(unreachable_patterns, reason = "reached by the levels of other architectures")]
            _ => false,
        }
    }

    /// The levels of this CPU, slow to fast.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|level| level.is_available()).collect()
    }

    /// The fastest level of this CPU.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Scalar)
    }

    /// Runs `operation` at this level, or at [`Level::Scalar`] where the CPU lacks it.
    #[inline]
    pub fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Neon => {
                if let Some(token) = neon::Neon::new() {
                    return token.enter(operation);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                if let Some(token) = avx2::Avx2::new() {
                    return token.enter(operation);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                if let Some(token) = avx512::Avx512::new() {
                    return token.enter(operation);
                }
            }
            _ => {}
        }
        operation.run(scalar::Scalar)
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

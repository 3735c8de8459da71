//! The mode of a thread's floating-point unit: how it rounds, what it does with denormals, what traps.
//!
//! The compiler and the kernels' bounds take the default mode for granted. A host may have set another, as
//! `torch.set_flush_denormal(True)` does, and the threads that it starts inherit that.

/// A mode in which a thread was found, or the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FloatMode(u32);

impl FloatMode {
    /// Rounds to nearest, keeps denormals, never traps.
    pub const DEFAULT: Self = Self(register::DEFAULT);

    /// The mode of this thread.
    pub fn current() -> Self {
        Self(register::read() & register::MODE)
    }

    /// Runs `body` in this mode, and puts the thread's own mode back, also when `body` panics.
    pub fn run<R>(self, body: impl FnOnce() -> R) -> R {
        /// Not inlined, so that no arithmetic of the body moves out of the mode.
        #[inline(never)]
        fn apart<R>(body: impl FnOnce() -> R) -> R {
            body()
        }
        let _own = Restore(Self::current());
        self.set();
        apart(body)
    }

    fn set(self) {
        let before = register::read();
        // Writing the register stalls the CPU a little, and mostly it holds the default already.
        if before & register::MODE != self.0 {
            register::write(before & !register::MODE | self.0);
        }
    }
}

/// Sets the mode when dropped.
struct Restore(FloatMode);

impl Drop for Restore {
    fn drop(&mut self) {
        self.0.set();
    }
}

/// MXCSR.
#[cfg(target_arch = "x86_64")]
mod register {
    use std::arch::asm;

    /// All masks of exceptions.
    pub(super) const DEFAULT: u32 = 0x1f80;

    /// Every bit that is defined but the six that note exceptions.
    pub(super) const MODE: u32 = 0xffc0;

    /// Flush to zero, and denormals are zeros.
    #[cfg(test)]
    pub(super) const FLUSHES: u32 = 0x9fc0;

    pub(super) fn read() -> u32 {
        let mut value = 0;
        // SAFETY: the baseline of x86-64 has SSE; the instruction writes the four bytes of `value`.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
        value
    }

    /// `value` differs from what was read in bits of [`MODE`] only.
    pub(super) fn write(value: u32) {
        // SAFETY: the baseline of x86-64 has SSE; the instruction reads the four bytes of `value`, which sets
        // no reserved bit. The mode is the one that Rust assumes, or one that the thread was called in.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
    }
}

/// FPCR.
#[cfg(target_arch = "aarch64")]
mod register {
    use std::arch::asm;

    /// Every feature is off.
    pub(super) const DEFAULT: u32 = 0;

    /// Exceptions are noted elsewhere.
    pub(super) const MODE: u32 = u32::MAX;

    /// Flush to zero.
    #[cfg(test)]
    pub(super) const FLUSHES: u32 = 1 << 24;

    pub(super) fn read() -> u32 {
        let value: u64;
        // SAFETY: every program may read the register.
        unsafe { asm!("mrs {}, fpcr", out(reg) value, options(nostack, preserves_flags)) };
        value as u32
    }

    /// `value` is 0 or was read.
    pub(super) fn write(value: u32) {
        // SAFETY: every program may write the register. The mode is the one that Rust assumes, or one that the
        // thread was called in.
        unsafe { asm!("msr fpcr, {}", in(reg) u64::from(value), options(nostack)) };
    }
}

/// Nothing is known of other architectures: the mode stays as it is.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod register {
    pub(super) const DEFAULT: u32 = 0;
    pub(super) const MODE: u32 = 0;

    pub(super) fn read() -> u32 {
        0
    }

    pub(super) fn write(_value: u32) {}
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;
    use crate::coreset::{Start, greedy};
    use crate::matrix::Matrix;
    use crate::nearest::{Distance, MemoryBank, Storage};
    use crate::score::image_scores;
    use crate::simd::Level;
    use std::hint::black_box;
    use std::panic::catch_unwind;

    const FLUSHING: FloatMode = FloatMode(register::FLUSHES);

    fn flushes() -> bool {
        black_box(f32::MIN_POSITIVE) * black_box(0.5) == 0.0
    }

    #[test]
    fn a_mode_holds_while_the_body_runs() {
        assert_eq!(FloatMode::current(), FloatMode::DEFAULT);
        assert!(!flushes());
        let inner = FLUSHING.run(|| (flushes(), FloatMode::DEFAULT.run(flushes), FloatMode::current(), flushes()));
        assert_eq!(inner, (true, false, FLUSHING, true));
        assert_eq!(FloatMode::current(), FloatMode::DEFAULT);
        assert!(!flushes());
    }

    #[test]
    fn a_panic_leaves_the_callers_mode() {
        FLUSHING.run(|| {
            assert!(catch_unwind(|| FloatMode::DEFAULT.run(|| panic!("body"))).is_err());
            assert_eq!(FloatMode::current(), FLUSHING);
        });
        assert!(catch_unwind(|| FLUSHING.run(|| panic!("body"))).is_err());
        assert_eq!(FloatMode::current(), FloatMode::DEFAULT);
    }

    #[test]
    fn threads_work_in_the_default_mode_whoever_calls() {
        FLUSHING.run(|| {
            let caller = std::thread::current().id();
            let body = |(): &mut (), _| {
                std::thread::sleep(std::time::Duration::from_millis(1));
                assert!(std::thread::current().id() == caller || FloatMode::current() == FloatMode::DEFAULT);
            };
            Context::new(Level::Scalar, 4).for_each(0..100, || (), body).unwrap();
        });
    }

    #[test]
    fn answers_on_denormals_are_the_same_where_the_caller_flushes_them() {
        let values: Vec<f32> = (0..400 * 20_u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9) >> 9)).collect();
        let answers = |level| {
            let features = Matrix::new("features", &values, 400, 20).unwrap();
            let context = Context::new(level, 2);
            let bank = MemoryBank::new(&context, features.slice(0, 300), Storage::Float32).unwrap();
            let found = bank.kneighbors(&context, features, 1, Distance::Euclidean).unwrap();
            let nearest = (&*found.distances, &*found.indices);
            let scores = image_scores(&context, &bank, features, nearest, 10, 3).unwrap();
            let coreset = greedy(&context, features, 50, 0.0, &Start::Row(0)).unwrap();
            (found, scores, coreset.indices, coreset.radii)
        };
        for level in Level::available() {
            let expected = answers(level);
            assert!(expected.1.iter().any(|&score| score > 0.0));
            let found = FLUSHING.run(|| FloatMode::DEFAULT.run(|| answers(level)));
            assert!(found == expected, "{level}");
            // Without the default mode they are others: the test would notice.
            assert!(FLUSHING.run(|| answers(level)) != expected, "{level}");
        }
    }
}

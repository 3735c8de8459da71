//! AMX, the matrix unit: products of codes, sixteen rows by sixteen queries at a time. All else is AVX-512's.
//!
//! Its registers, which Intel calls tiles, are unknown to the compiler, so their instructions are assembled here.
//! What a register holds never outlives one block of assembly; between blocks only the configuration stands, which
//! no compiled code touches. An instruction on registers that are not configured would end the process, so
//! [`AmxTiles`] stands for the configuration, and a thread has one at a time.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::{Aligned, LANES, TileSums};

/// Bits of CPUID leaf 7, EDX: the registers, and products of 8-bit integers on them.
const TILE: u32 = 1 << 24;
const INT8: u32 = 1 << 25;

/// Linux's `arch_prctl`, its request for a feature, and the feature: what the registers hold.
const ARCH_PRCTL: usize = 158;
const REQUEST: usize = 0x1023;
const TILE_DATA: usize = 18;

/// Whether the CPU has the unit, the system lets this process use it, and its products are right: checked at
/// start, because CI has no machine with AMX.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| cfg!(target_os = "linux") && has_unit() && is_permitted() && is_right())
}

fn has_unit() -> bool {
    #[expect(unused_unsafe, reason = "safe in newer versions of Rust")]
    // SAFETY: every CPU with AVX-512, which is asked for before, has the leaf.
    let found = unsafe { __cpuid_count(7, 0) };
    found.edx & TILE != 0 && found.edx & INT8 != 0
}

/// Asks Linux, which saves the eight kilobytes of the registers only for processes that say they want them;
/// threads and children inherit the answer.
fn is_permitted() -> bool {
    let answer: isize;
    // SAFETY: a system call that takes two numbers and writes no memory; it changes rcx and r11 besides its answer.
    unsafe {
        asm!(
            "syscall",
            inout("rax") ARCH_PRCTL => answer, in("rdi") REQUEST, in("rsi") TILE_DATA,
            out("rcx") _, out("r11") _,
            options(nostack)
        );
    }
    answer == 0
}

/// What `ldtilecfg` reads: all eight registers have sixteen rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static SIXTEEN_ROWS: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes_per_row: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Whether products of codes of all values are those of plain arithmetic. Called where there is a unit.
fn is_right() -> bool {
    let (mut queries, mut tiles) = ([[0; 64]; 2 * LANES], [[Aligned([0; 64]); LANES]; 2]);
    for (i, code) in queries.as_flattened_mut().iter_mut().enumerate() {
        *code = (i * 37 % 255) as u8 as i8;
    }
    for (i, code) in tiles.as_flattened_mut().iter_mut().flat_map(|vector| &mut vector.0).enumerate() {
        *code = (i * 101 % 256) as u8 as i8;
    }
    let mut sums = [[Aligned([[0; LANES]; LANES]); 2]; 2];
    // SAFETY: the caller has seen to it that there is a unit, and that this process may use it.
    let registers = unsafe { AmxTiles::configure() };
    dot_tiles(&registers, &queries, [&tiles[0], &tiles[1]], &mut sums);
    drop(registers);
    let expected = |query: usize, tile: usize, row: usize| -> i32 {
        let of = |code: usize| {
            i32::from(queries[query][code]) * i32::from(tiles[tile][code / 4].0[4 * row + code % 4] as u8)
        };
        (0..64).map(of).sum()
    };
    let each = (0..2 * LANES).flat_map(|query| (0..2 * LANES).map(move |row| (query, row / LANES, row % LANES)));
    each.into_iter()
        .all(|(query, tile, row)| sums[query / LANES][tile].0[query % LANES][row] == expected(query, tile, row))
}

thread_local! {
    /// Whether this thread has an [`AmxTiles`].
    static CONFIGURED: Cell<bool> = const { Cell::new(false) };
}

/// Proof that the registers of this thread are configured. It cannot leave the thread, and a thread has one at
/// most: a second would lose its configuration to the first that is dropped. Dropped, it frees the registers, so
/// that switches between threads need not save them any more.
pub(super) struct AmxTiles(PhantomData<*const ()>);

impl AmxTiles {
    /// Configures the registers of this thread.
    ///
    /// # Safety
    /// The CPU has the unit, and the system lets this process use it, as [`is_available`] finds out.
    ///
    /// # Panics
    /// Where this thread has a value of this type.
    #[inline(always)]
    pub(super) unsafe fn configure() -> Self {
        assert!(!CONFIGURED.replace(true), "the matrix unit is in use on this thread");
        // SAFETY: the caller vouches for the instruction; it reads the 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SIXTEEN_ROWS, options(nostack, preserves_flags, readonly)) };
        Self(PhantomData)
    }
}

impl Drop for AmxTiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: `configure` made this value, so there is a unit, and no other value of this thread relies on
        // the configuration; the instruction touches no memory.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
        CONFIGURED.set(false);
    }
}

/// What [`super::Simd::dot_tiles`] says.
///
/// # Panics
/// When lengths do not fit together.
#[inline(always)]
pub(super) fn dot_tiles(
    _registers: &AmxTiles,
    queries: &[[i8; 64]],
    tiles: [&[Aligned<[i8; 64]>]; 2],
    sums: &mut [[TileSums; 2]; 2],
) {
    let len = tiles[0].len();
    assert!(tiles[1].len() == len && queries.len() == 2 * len && len >= LANES && len.is_multiple_of(LANES));
    let steps = len / LANES; // 64 codes of a query each
    let stride = 64 * steps;
    // Queries are signed, rows offset and unsigned: `tdpbsud`.
    // SAFETY: `_registers` proves that this thread's registers are configured. A load takes sixteen rows of 64 bytes:
    // of a group of queries, `stride` apart, 64 bytes farther with each step; of a tile, 64 apart, 1024 bytes farther
    // with each step. `steps` steps, at least one, read exactly the lengths that were asserted. The four stores fill
    // the four arrays of `sums`, which lie one after another.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{first} + {stride}]",
            "tileloadd tmm6, [{left} + {line}]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{right} + {line}]",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{second} + {stride}]",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "add {first}, 64",
            "add {second}, 64",
            "add {left}, 1024",
            "add {right}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3",
            first = inout(reg) queries.as_ptr() => _,
            second = inout(reg) queries.as_ptr().add(len) => _,
            left = inout(reg) tiles[0].as_ptr() => _,
            right = inout(reg) tiles[1].as_ptr() => _,
            steps = inout(reg) steps => _,
            stride = in(reg) stride,
            line = in(reg) 64_usize,
            sums = in(reg) sums.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

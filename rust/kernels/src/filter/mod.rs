//! A provable filter: most pairs of rows are told apart by 8-bit codes, without their distance.
//!
//! # The map
//!
//! ```text
//! w = x − mean
//! z = Qᵀw                 leading coordinates in an orthonormal basis fitted on the bank (PCA)
//! for each stage, of width K, from the narrowest to the widest
//!   r = √(‖w‖² − ‖z‖²)    z now the first K − 1 coordinates: the length of what they leave out
//!   t = H [z, r − shift]  K coordinates, mixed by signs and Walsh–Hadamard butterflies
//!   X = round(t / step)   K codes within ±limit; one step for all rows
//! ```
//!
//! For exact arithmetic, by orthogonality and Cauchy–Schwarz,
//!
//! ```text
//! ‖x − y‖² = ‖z_x − z_y‖² + ‖rest_x − rest_y‖² ≥ ‖z_x − z_y‖² + (r_x − r_y)² = ‖t_x − t_y‖²       (1)
//! ```
//!
//! for any orthonormal columns z is taken with, so for every first part of one basis: each stage has its own z and r.
//! H is orthogonal, so it changes no distance; it gives all coordinates a like variance, which one
//! step for all needs. A stage as wide as the columns takes Q to be the identity; r is then 0, and (1) is an equality.
//!
//! # The bound
//!
//! Let t* be the exact image, t the computed one, and |t − t*| ≤ a (below). A bank row y keeps one
//! ε ≥ ‖t* − step·Y‖, all its errors in one number: rounding to codes, clipping, a. The codes of a query are multiples
//! of 2ˢ·step, s being 0 unless it lies far outside the range of the rows' codes. It keeps its errors in parts:
//! c = t clipped to ±limit·2ˢ·step, e = ‖c − 2ˢ·step·X‖, out = ‖t − c‖, and a. The decoded
//! row step·Y lies in the box to which c is the nearest point from t, so a query outside the box is
//! farther from it than c is, by Pythagoras' inequality for convex sets:
//!
//! ```text
//! ‖x − y‖ ≥ ‖t*_x − t*_y‖ ≥ ‖t_x − step·Y‖ − a − ε_y
//!         ≥ √(‖c − step·Y‖² + out²) − a − ε_y
//!         ≥ √(max(0, step·‖2ˢX − Y‖ − e)² + out²) − a − ε_y                                        (2)
//! ```
//!
//! So a pair with ‖x − y‖ ≤ τ has step·‖2ˢX − Y‖ ≤ T := e + √(max(0, (τ + a + E)² − out²)), E the
//! largest ε of the rows considered. With ‖2ˢX − Y‖² = 4ˢ|X|² + |Y|² − 2·2ˢ X·Y, all integers,
//!
//! ```text
//! the pair may be near only if  2ˢ X·Y − |Y|²/2 ≥ (4ˢ|X|² − (T / step)²) / 2                       (3)
//! ```
//!
//! The left side is computed exactly in i32, |Y|²/2 rounded down, which keeps more pairs; the right side in f64, and
//! rounded up, since an integer that reaches it reaches the integer above it. Where a level can only multiply signed by
//! unsigned bytes, rows are stored as Y + offset, which adds 2ˢ·offset·ΣX to both sides. s is kept so small that the left
//! side stays within i32 all the same. `τ` carries [`SLACK`], which covers the f64 rounding of the canonical distance and
//! of (3). Pairs at exactly τ are kept: ties are decided by distances, not here.
//!
//! # Why a search may skip what it skips
//!
//! The right side of (3) falls as E or τ grows. So a threshold for the largest ε of a tile, of a class of tiles or of
//! some tiles in turn keeps whatever the row's own would, and so does one that was set before τ fell: τ is a distance
//! within which k rows are known, hence never below that of the k-th nearest. A tile is left at a stage when no row of it
//! reaches the threshold, and (3) holds at each stage by itself, whichever came before. Where the first thresholds come
//! from, and in which order rows lie, decides speed only: every distance that is compared is canonical, and ties go by
//! the row's number in the bank.
//!
//! # Rounding errors: what `a` covers
//!
//! u = 2⁻²⁴. All in units of length, of one row:
//! - w is a rounded difference: ‖δw‖ ≤ u‖w‖.
//! - z: columns of Q as stored in f32 obey `‖QᵀQ − I‖ ≤ η`, measured in f64; the polar factor of Q is an
//!   exactly orthonormal basis within η of it, so this costs η‖w‖. Products are added up in f32, `CHAIN` at a time, and
//!   those sums one after another, so one of the P coordinates of z errs by at most (CHAIN + number of sums + 2)·u·‖q‖‖w‖,
//!   the first products and sums being added to zero, and z by √P times it.
//! - r: with e the error of z, |r² − r*²| ≤ g := 2‖z‖e + e² + the errors of two sums of squares, hence
//!   |r − r*| ≤ min(√g, g/r). Taking the shift off rounds once more: u(r + |shift|).
//! - H: each butterfly rounds once; log₂ of the block of them and the signs, which carry the scale, cost
//!   (log₂ block + 2)·u·‖t‖.
//!
//! - Sums of n squares in f32, for ‖w‖, ‖z‖, e, out and ε, err by (n/16 + 24)·u of themselves; half of that
//!   is the share of a length. Underflow may take 10⁻¹⁶ from one.
//!
//! The f64 sums of the canonical distance are covered by [`SLACK`].

mod basis;
mod block;
mod cascade;
mod codes;
mod encode;
mod encoder;
mod gemm;
mod plan;
mod products;
mod scan;
mod search;
mod seeds;
mod thresholds;
mod tree;

pub(crate) use cascade::Cascade;
pub(crate) use codes::{CodedQueries, Codes, TILE};
#[cfg(test)]
pub(crate) use encoder::Encoder;
pub(crate) use encoder::{Bound, shifted_dot};
pub(crate) use plan::SelectionPlan;
pub(crate) use products::{Sink, all_products, for_each_reached, one_product, tile_products};
pub(crate) use search::WAVE_QUERIES;

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Factor on lengths that covers f64 rounding anywhere in the bound: rows have fewer than 10⁶ columns,
/// so sums of squares are right to 10⁻¹⁰.
const SLACK: f64 = 1.0 + 1e-9;

/// Fewer rows are searched without codes.
const SMALLEST: usize = 256;

/// The width of a basis, and of codes of all columns, is a multiple of this.
const STEP: usize = 64;

/// Codes wider than this could overflow the i32 of a product, or reach the products of padding rows.
const WIDEST: usize = 16_384;

/// How many deviations of the coordinates the codes span. What lies beyond is clipped, and counted in ε of a row and in
/// `clipped` of a query.
const SPAN: f64 = 4.5;

//! The arithmetic of `PatchCore`. No Python, no I/O, no environment variables.
//!
//! ```text
//!   images -> resize -> the backbone's maps              masks, labels
//!        |                                                     |
//!   aggregate  -> patch features -> coreset -> bank            |
//!                      |                        |              |
//!                      +------> nearest <-------+              |
//!                                  |                           |
//!           patch distances -> score, anomaly_map -> undo_resize -> metrics
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`aggregate`] | backbone maps → patch features: local neighbourhood aggregation |
//! | `distance` | the canonical distance, which defines what "exact" means |
//! | `filter` | 8-bit codes with a proved bound: which rows need no distance |
//! | [`half`] | float16 as a way to store rows |
//! | `runs` | some rows of a bank: all, or those of some groups |
//! | `top_k` | the k nearest rows of a query while they are being found |
//! | [`nearest`] | the memory bank and exact k-nearest search |
//! | [`coreset`] | greedy k-centre selection and random projections |
//! | [`score`] | patch distances → image scores (Eq. 6 and Eq. 7) |
//! | [`anomaly_map`] | patch scores → upsampled, smoothed maps |
//! | [`resize`] | 8-bit images as the backbone sees them |
//! | [`undo_resize`] | maps in the pixels of their images |
//! | [`geometry`] | the sizes of an image on its way through resize and crop |
//! | [`gaussian`] | mean and covariance of each position, and Mahalanobis distances: what `PaDiM` scores by |
//! | [`metrics`] | exact rank metrics, PRO and AUPIMO |
//! | [`random`] | a seeded hash: the only randomness |
//! | `math` | exp, ln, cos and their like, the same bits everywhere |
//! | `resample` | source positions of torch's upsampling |
//! | [`simd`] | levels, the trait over them, dispatch |
//! | [`context`] | what every call is given: SIMD level, threads, and who watches |
//! | `workers` | threads kept from call to call |
//! | [`matrix`], [`error`] | checked views, the one error type |
//! | [`naive`] | slow f64 twins of the kernels: what the tests believe |
//!
//! The public modules are what a caller needs; `half`, `naive` and `random` are public for the tests only.
//! `cargo doc --document-private-items` shows all of them.
//!
//! # Glossary
//!
//! | word | meaning |
//! |---|---|
//! | patch | a position of the grid, and its feature: a row made of a neighbourhood in the backbone's maps |
//! | grid | the rows and columns of patches of an image |
//! | level | a set of SIMD instructions that a kernel is compiled for, such as AVX2 |
//! | D2 | the canonical squared distance of two rows, in f64: the same bits at every level |
//! | image | of a row: its coordinates after the filter's map, before they are rounded |
//! | code | an 8-bit integer: one rounded coordinate of a row's image |
//! | epsilon, ε | of an encoded row: a bound of the distance between its codes, decoded, and its exact image |
//! | tau, τ | the distance within which a row is still of interest to a query: that of the k-th best so far |
//! | group | rows of a bank that belong together, as those of an image do; a search may be held to some groups |
//! | slot | the position of an encoded row among the codes, which are in an order of their own |
//! | stage | codes of one width of all rows; a search goes from the narrowest to the widest |
//! | cascade | the stages of a bank |
//! | tile | sixteen slots, whose codes are multiplied together |
//! | centroid | the mean codes of a tile: they say where to look first |
//! | chunk | tiles that share a threshold |
//! | window, stretch | the tiles or rows that a search, or a refresh, goes through before it looks at what it found |
//! | plan | how rows are searched: without codes, or through stages of which widths |
//! | pick | a row chosen for the coreset |
//! | value | of a row during a selection: its squared distance to the picks that it has seen, an upper bound |
//! | fresh | said of a row whose value has seen every pick |
//! | boundary | a value such that every row at or above it is fresh, and so may be picked |
//! | candidates | the fresh rows at or above the boundary, of which a round of picks is chosen |
//! | reach | of a candidate: what its product with a pick must be for the pick to lower its value |
//! | cover | a coreset covers a row at a radius when a pick lies within it; the covering radius covers all rows |

#![cfg_attr(test, expect(clippy::disallowed_methods, reason = "the data of a test may differ in its last bits"))]

pub mod aggregate;
pub mod anomaly_map;
pub mod context;
pub mod coreset;
mod distance;
pub mod error;
mod filter;
pub mod gaussian;
pub mod geometry;
#[doc(hidden)]
pub mod half;
mod math;
pub mod matrix;
pub mod metrics;
#[doc(hidden)]
pub mod naive;
pub mod nearest;
#[doc(hidden)]
pub mod random;
mod resample;
pub mod resize;
mod runs;
pub mod score;
pub mod simd;
mod top_k;
pub mod undo_resize;
mod workers;

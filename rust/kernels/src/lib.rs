//! The arithmetic of `PatchCore`. No Python, no I/O, no environment variables.
//!
//! ```text
//!   maps of the backbone                                 masks, labels
//!        |                                                     |
//!   aggregate  -> patch features -> coreset -> bank            |
//!                      |                        |              |
//!                      +------> nearest <-------+              |
//!                                  |                           |
//!                    patch distances -> score, anomaly_map -> metrics
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`aggregate`] | backbone maps → patch features: local neighbourhood aggregation |
//! | [`distance`] | the canonical distance, which defines what "exact" means |
//! | [`filter`] | 8-bit codes with a proved bound: which rows need no distance |
//! | [`half`] | float16 as a way to store rows |
//! | [`best`] | the k nearest rows of a query while they are being found |
//! | [`nearest`] | the memory bank and exact k-nearest search |
//! | [`coreset`] | greedy k-centre selection and random projections |
//! | [`score`] | patch distances → image scores (Eq. 6 and Eq. 7) |
//! | [`anomaly_map`] | patch scores → upsampled, smoothed maps |
//! | [`metrics`] | exact rank metrics and PRO |
//! | [`random`] | a seeded hash: the only randomness |
//! | `math` | exp, ln, cos and their like, the same bits everywhere |
//! | [`resample`] | source positions of torch's upsampling |
//! | [`simd`] | levels, the trait over them, dispatch |
//! | [`threads`] | threads, cancellation and progress of a call |
//! | `helpers` | threads kept from call to call |
//! | [`matrix`], [`error`] | checked views, the one error type |
//! | [`naive`] | slow f64 twins of the kernels: what the tests believe |

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "the data of a test may differ in its last bits"))]

pub mod aggregate;
pub mod anomaly_map;
pub mod best;
pub mod coreset;
pub mod distance;
pub mod error;
pub mod filter;
pub mod half;
mod helpers;
mod math;
pub mod matrix;
pub mod metrics;
pub mod naive;
pub mod nearest;
pub mod random;
pub mod resample;
pub mod score;
pub mod simd;
pub mod threads;

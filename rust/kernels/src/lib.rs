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
//! | `distance` | the canonical distance, which defines what "exact" means |
//! | `filter` | 8-bit codes with a proved bound: which rows need no distance |
//! | [`half`] | float16 as a way to store rows |
//! | `best` | the k nearest rows of a query while they are being found |
//! | [`nearest`] | the memory bank and exact k-nearest search |
//! | [`coreset`] | greedy k-centre selection and random projections |
//! | [`score`] | patch distances → image scores (Eq. 6 and Eq. 7) |
//! | [`anomaly_map`] | patch scores → upsampled, smoothed maps |
//! | [`metrics`] | exact rank metrics and PRO |
//! | [`random`] | a seeded hash: the only randomness |
//! | `resample` | source positions of torch's upsampling |
//! | [`simd`] | levels, the trait over them, dispatch |
//! | [`context`] | what every call is given: SIMD level, threads, and who watches |
//! | `workers` | threads kept from call to call |
//! | [`matrix`], [`error`] | checked views, the one error type |
//! | [`naive`] | slow f64 twins of the kernels: what the tests believe |

pub mod aggregate;
pub mod anomaly_map;
mod best;
pub mod context;
pub mod coreset;
mod distance;
pub mod error;
mod filter;
#[doc(hidden)]
pub mod half;
pub mod matrix;
pub mod metrics;
#[doc(hidden)]
pub mod naive;
pub mod nearest;
#[doc(hidden)]
pub mod random;
mod resample;
pub mod score;
pub mod simd;
mod workers;

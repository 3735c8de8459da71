//! The one error type. Every variant carries the argument's name, what was expected and what came.

use std::fmt;

/// Why a kernel refused its input or stopped.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// An argument that must hold something holds nothing.
    Empty {
        /// The argument's name.
        name: &'static str,
        /// What it must hold, and what usually leaves it empty.
        expected: &'static str,
    },
    /// An argument has another shape, or lies outside its range.
    Invalid {
        /// The argument's name.
        name: &'static str,
        /// What was expected.
        expected: String,
        /// What came.
        got: String,
    },
    /// A value is NaN or infinite, or too large for float32 arithmetic.
    BadValue {
        /// The argument's name.
        name: &'static str,
        /// Row of the first bad value.
        row: usize,
        /// Column of the first bad value.
        column: usize,
        /// The value.
        value: f32,
        /// The largest magnitude that is accepted.
        limit: f32,
    },
    /// A size does not fit the address space.
    TooLarge {
        /// The sizes whose product overflows.
        sizes: Vec<usize>,
    },
    /// Memory could not be had.
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// The observer of the call asked to stop.
    Cancelled,
}

impl Error {
    /// Shorthand for [`Error::Invalid`].
    pub fn invalid(name: &'static str, expected: impl Into<String>, got: impl fmt::Display) -> Self {
        Self::Invalid { name, expected: expected.into(), got: got.to_string() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty { name, expected } => write!(f, "{name} is empty: {expected}"),
            Self::Invalid { name, expected, got } => write!(f, "{name} must be {expected}; got {got}"),
            Self::BadValue { name, row, column, value, limit } if value.is_finite() => write!(
                f,
                "{name}[{row}, {column}] is {value:e}: magnitudes above {limit:e} overflow float32 distances; scale the features"
            ),
            Self::BadValue { name, row, column, value, .. } => write!(
                f,
                "{name}[{row}, {column}] is {}: every value must be finite; look at what produced that row",
                value.to_string().to_lowercase()
            ),
            Self::TooLarge { sizes } => write!(f, "the product of the sizes {sizes:?} does not fit the address space"),
            Self::OutOfMemory { bytes } => {
                write!(f, "cannot allocate {:.2} GiB of memory", *bytes as f64 / (1_u64 << 30) as f64)
            }
            Self::Cancelled => write!(f, "cancelled"),
        }
    }
}

impl std::error::Error for Error {}

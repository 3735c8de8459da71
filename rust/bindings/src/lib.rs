//! Conversion only.

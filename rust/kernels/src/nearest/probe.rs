//! Chooses how a bank is searched.

use crate::error::Error;
use crate::filter::{Encoder, STEP};
use crate::matrix::Matrix;
use crate::threads::Context;

/// The width of the codes that a bank of these rows should have; `None` for none.
pub fn width(_: &Context<'_>, rows: Matrix<'_>) -> Result<Option<usize>, Error> {
    if rows.rows() < 256 {
        return Ok(None);
    }
    Ok(Some(Encoder::full_width(rows.cols()).min(2 * STEP)))
}

//! Checked row-major views over slices. All size arithmetic is checked here and only here.

use crate::error::Error;

/// Largest magnitude a feature may have. The filters compute squared norms in float32, which ends at 3·10³⁸: a
/// row may then have a million columns of this magnitude.
pub const LIMIT: f32 = 1e16;

/// Values checked at a time: 16 KiB are still in the first-level cache when the first bad one is looked for.
const CHUNK_VALUES: usize = 4096;

/// Whether a value may be a feature: one comparison refuses NaN, infinities and huge values alike.
#[inline(always)]
pub(crate) fn is_good(value: f32) -> bool {
    value.abs() <= LIMIT
}

/// Product of sizes, or [`Error::TooLarge`].
///
/// # Errors
/// When the product, taken in bytes of 8, does not fit `isize`.
pub(crate) fn checked_len(sizes: &[usize]) -> Result<usize, Error> {
    let too_large = || Error::TooLarge { sizes: sizes.to_vec() };
    let len = sizes.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    let len = len.ok_or_else(too_large)?;
    if len > isize::MAX as usize / 8 { Err(too_large()) } else { Ok(len) }
}

/// Refuses a slice that is not as long as the product of `sizes`.
///
/// # Errors
/// [`Error::Invalid`] and [`Error::TooLarge`].
pub(crate) fn check_len(name: &'static str, len: usize, sizes: &[usize]) -> Result<(), Error> {
    let expected = checked_len(sizes)?;
    if len == expected { Ok(()) } else { Err(Error::invalid(name, format!("{expected} values"), len)) }
}

/// A vector with room for the product of `sizes`. Large results and copies are kept in these: running out of
/// memory is then an error, not the end of the process.
///
/// # Errors
/// [`Error::TooLarge`] and [`Error::OutOfMemory`].
pub(crate) fn reserved<T>(sizes: &[usize]) -> Result<Vec<T>, Error> {
    let len = checked_len(sizes)?;
    let mut vec = Vec::new();
    vec.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { bytes: len.saturating_mul(size_of::<T>()) })?;
    Ok(vec)
}

/// As [`reserved`], filled with zeros.
///
/// # Errors
/// As [`reserved`].
pub(crate) fn zeroed<T: Clone + Default>(sizes: &[usize]) -> Result<Vec<T>, Error> {
    // `vec!` alone leaves the zeros to the system, which clears a page when it is first written to, by the thread that
    // does. Without memory it would end the process, so that is asked for before.
    drop(reserved::<T>(sizes)?);
    Ok(vec![T::default(); checked_len(sizes)?])
}

/// A read-only matrix, of float32 unless another type is named: `rows` rows of `cols` values, row after row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, E = f32> {
    data: &'a [E],
    rows: usize,
    cols: usize,
}

impl<'a> Matrix<'a> {
    /// A view of `data` as `rows × cols`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the length is another, [`Error::Empty`] when `cols` is 0.
    pub fn new(name: &'static str, data: &'a [f32], rows: usize, cols: usize) -> Result<Self, Error> {
        if cols == 0 {
            return Err(Error::Empty {
                name,
                expected: "rows of at least one value; a backbone that returned empty features is the usual cause",
            });
        }
        if data.len() != checked_len(&[rows, cols])? {
            return Err(Error::invalid(name, format!("{rows} x {cols} values"), data.len()));
        }
        Ok(Self { data, rows, cols })
    }

    /// As [`Matrix::new`], with the check that every value is finite and at most [`LIMIT`] in magnitude.
    ///
    /// # Errors
    /// As [`Matrix::new`], and [`Error::BadValue`] naming the first offender.
    pub fn finite(name: &'static str, data: &'a [f32], rows: usize, cols: usize) -> Result<Self, Error> {
        let matrix = Self::new(name, data, rows, cols)?;
        // Chunks without a branch inside are checked at the speed of memory.
        for (index, chunk) in data.chunks(CHUNK_VALUES).enumerate() {
            if !chunk.iter().fold(true, |all, &value| all & is_good(value)) {
                let at = index * CHUNK_VALUES + chunk.iter().take_while(|&&value| is_good(value)).count();
                return Err(Error::BadValue { name, row: at / cols, column: at % cols, value: data[at], limit: LIMIT });
            }
        }
        Ok(matrix)
    }
}

impl<'a, E> Matrix<'a, E> {
    /// A view whose shape the caller vouches for.
    pub(crate) fn trusted(data: &'a [E], rows: usize, cols: usize) -> Self {
        debug_assert_eq!(data.len(), rows * cols, "a matrix is as long as its shape says");
        Self { data, rows, cols }
    }

    /// Refuses more rows than 32-bit row numbers reach.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub(crate) fn check_row_numbers(&self, name: &'static str) -> Result<(), Error> {
        if u32::try_from(self.rows).is_ok() {
            return Ok(());
        }
        Err(Error::invalid(name, format!("at most {} rows", u32::MAX), format!("{} rows", self.rows)))
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row after row.
    pub fn data(&self) -> &'a [E] {
        self.data
    }

    /// Row `index`.
    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [E] {
        &self.data[index * self.cols..][..self.cols]
    }

    /// Rows `start .. start + count`.
    #[must_use]
    pub fn slice(&self, start: usize, count: usize) -> Self {
        let data = &self.data[start * self.cols..][..count * self.cols];
        Self { data, rows: count, cols: self.cols }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bad_value_is_named() {
        let mut data = vec![0.0; 5000 * 3];
        data[4100 * 3 + 2] = f32::NAN;
        let error = Matrix::finite("features", &data, 5000, 3).unwrap_err();
        assert!(error.to_string().starts_with("features[4100, 2] is nan"), "{error}");
        data[7] = f32::NEG_INFINITY;
        let error = Matrix::finite("features", &data, 5000, 3).unwrap_err();
        assert!(error.to_string().starts_with("features[2, 1] is -inf"), "{error}");
        data[7] = 2e16;
        let error = Matrix::finite("features", &data, 5000, 3).unwrap_err();
        assert!(error.to_string().contains("overflow"), "{error}");
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        assert_eq!(checked_len(&[3, 4]), Ok(12));
        assert!(matches!(checked_len(&[usize::MAX, 2]), Err(Error::TooLarge { .. })));
        assert!(matches!(checked_len(&[isize::MAX as usize]), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn shapes_are_checked() {
        assert!(matches!(Matrix::new("x", &[], 3, 0), Err(Error::Empty { .. })));
        assert!(matches!(Matrix::new("x", &[1.0; 5], 2, 3), Err(Error::Invalid { .. })));
        let matrix = Matrix::new("x", &[1.0, 2.0, 3.0, 4.0], 2, 2).unwrap();
        assert_eq!(matrix.row(1), &[3.0, 4.0]);
        assert_eq!(matrix.slice(1, 1).data(), &[3.0, 4.0]);
        assert!(matrix.check_row_numbers("x").is_ok());
        let huge = Matrix { data: &[0.0], rows: 1 << 33, cols: 1 };
        let error = huge.check_row_numbers("x").unwrap_err().to_string();
        assert_eq!(error, "x must be at most 4294967295 rows; got 8589934592 rows");
    }
}

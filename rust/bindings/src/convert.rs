//! numpy arrays to slices and matrices, and back. The Python side has already made the arrays
//! C-contiguous, aligned and of the right dtype; what still can be wrong is checked here.
//!
//! The slices are the arrays' own memory, read while the GIL is released: another Python thread may write it
//! meanwhile. By the letter of Rust's rules that is undefined behaviour, but numpy cannot forbid it, and a copy of
//! every argument would double the memory of the largest calls. It is accepted because of how the kernels use
//! what they read. Lengths come from the arrays' shapes, never from values. Values are compared and computed with;
//! where one serves as an index, it is compared with the length of what it indexes (no kernel indexes unchecked).
//! So a call that races with a writer returns an unspecified answer or panics, which Python sees as an exception;
//! it does not read or write out of bounds.

use numpy::{
    Element, PyArray, PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray, PyReadonlyArray2, PyUntypedArrayMethods,
};
use patchcore_kernels::matrix::Matrix;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::call::to_python;

/// The values of a C-contiguous array.
pub(crate) fn slice<'a, T: Element, D: numpy::ndarray::Dimension>(
    name: &str,
    array: &'a PyReadonlyArray<'_, T, D>,
) -> PyResult<&'a [T]> {
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{name} must be C-contiguous")));
    }
    array.as_slice().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}

/// A (rows, columns) array whose values are all finite.
pub(crate) fn matrix<'a>(name: &'static str, array: &'a PyReadonlyArray2<'_, f32>) -> PyResult<Matrix<'a>> {
    let [rows, cols] = [array.shape()[0], array.shape()[1]];
    let values = slice(name, array)?;
    let check = || Matrix::finite(name, values, rows, cols);
    // Other Python threads run while a large array is read; for a small one they would only delay it.
    let matrix = if values.len() > 1 << 22 { array.py().detach(check) } else { check() };
    matrix.map_err(|error| to_python(&error))
}

/// A new one-dimensional array that takes over `values`.
pub(crate) fn vector<T: Element>(py: Python<'_>, values: Vec<T>) -> Bound<'_, PyArray1<T>> {
    PyArray::from_vec(py, values)
}

/// A new (rows, columns) array that takes over `values`.
pub(crate) fn rows<T: Element>(
    py: Python<'_>,
    values: Vec<T>,
    rows: usize,
    cols: usize,
) -> PyResult<Bound<'_, PyArray2<T>>> {
    PyArray::from_vec(py, values).reshape([rows, cols])
}

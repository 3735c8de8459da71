//! Gaussians of positions, as Python sees them: they stand in arrays of Python's, which are written in place.

use numpy::{PyArray2, PyArrayMethods, PyReadonlyArray2, PyReadwriteArray2, PyUntypedArrayMethods};
use patchcore_kernels::gaussian::{self, Options};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{call, convert};

/// Adds images to the sums of differences from `shift` and to those of their products.
#[pyfunction]
#[pyo3(signature = (features, shift, sums, packed, threads))]
pub(crate) fn accumulate_gaussians(
    py: Python<'_>,
    features: PyReadonlyArray2<'_, f32>,
    shift: PyReadonlyArray2<'_, f32>,
    sums: &Bound<'_, PyArray2<f64>>,
    packed: &Bound<'_, PyArray2<f64>>,
    threads: Option<usize>,
) -> PyResult<()> {
    let (features, shift) = (convert::matrix("features", &features)?, convert::matrix("shift", &shift)?);
    let (mut sums, mut packed) = (writable("sums", sums)?, writable("packed", packed)?);
    let (sums, packed) = (sums.as_slice_mut()?, packed.as_slice_mut()?);
    call::run(py, threads, None, |context| gaussian::accumulate(context, features, shift, sums, packed))
}

/// Turns sums into means, and sums of products into Cholesky factors.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the signature is Python's")]
#[pyo3(signature = (shift, sums, packed, images, scale, epsilon, threads, progress))]
pub(crate) fn factorize_gaussians(
    py: Python<'_>,
    shift: PyReadonlyArray2<'_, f32>,
    sums: &Bound<'_, PyArray2<f64>>,
    packed: &Bound<'_, PyArray2<f64>>,
    images: usize,
    scale: f64,
    epsilon: f64,
    threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let shift = convert::matrix("shift", &shift)?;
    let (mut sums, mut packed) = (writable("sums", sums)?, writable("packed", packed)?);
    let (sums, packed) = (sums.as_slice_mut()?, packed.as_slice_mut()?);
    let options = Options { images, scale, epsilon };
    call::run(py, threads, progress, |context| gaussian::factorize(context, shift, sums, packed, options))
}

/// Mahalanobis distances (images, positions) of (images * positions, d) features.
#[pyfunction]
#[pyo3(signature = (features, mean, packed, threads))]
pub(crate) fn mahalanobis<'py>(
    py: Python<'py>,
    features: PyReadonlyArray2<'py, f32>,
    mean: PyReadonlyArray2<'py, f64>,
    packed: PyReadonlyArray2<'py, f64>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray2<f64>>> {
    let positions = mean.shape()[0];
    let features = convert::matrix("features", &features)?;
    let (mean, packed) = (convert::slice("mean", &mean)?, convert::slice("packed", &packed)?);
    let distances = call::run(py, threads, None, |context| gaussian::mahalanobis(context, features, mean, packed))?;
    convert::rows(py, distances, features.rows() / positions, positions)
}

/// A C-contiguous array to write to, which nobody else reads or writes meanwhile.
fn writable<'py>(name: &str, array: &Bound<'py, PyArray2<f64>>) -> PyResult<PyReadwriteArray2<'py, f64>> {
    if !array.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{name} must be C-contiguous")));
    }
    array.try_readwrite().map_err(|error| PyValueError::new_err(format!("{name} must be writeable: {error}")))
}

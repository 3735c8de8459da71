//! The memory bank and the coreset, as Python sees them.

use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use patchcore_kernels::coreset::{Projection, Start, greedy, project as project_rows};
use patchcore_kernels::nearest;
use patchcore_kernels::score::image_scores;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{call, convert};

/// Indices, radii, and the number of distances taken.
type Selected<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>, u64);

/// Distances and indices.
type Found<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<i64>>);

/// An immutable memory bank.
#[pyclass(frozen, module = "patchcore_rs._native")]
#[derive(Debug)]
pub struct MemoryBank(pub nearest::MemoryBank);

#[pymethods]
impl MemoryBank {
    #[new]
    #[pyo3(signature = (features, threads, *, half=false, codes=true))]
    fn new(
        py: Python<'_>,
        features: PyReadonlyArray2<'_, f32>,
        threads: Option<usize>,
        half: bool,
        codes: bool,
    ) -> PyResult<Self> {
        let features = convert::matrix("features", &features)?;
        let storage = if half { nearest::Storage::Float16 } else { nearest::Storage::Float32 };
        let make = if codes { nearest::MemoryBank::new } else { nearest::MemoryBank::without_codes };
        call::run(py, threads, None, |context| make(context, features, storage)).map(Self)
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    #[getter]
    fn dim(&self) -> usize {
        self.0.cols()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.nbytes()
    }

    fn features<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let copy = call::run(py, Some(1), None, |context| self.0.features(context))?;
        convert::rows(py, copy, self.0.rows(), self.0.cols())
    }

    #[pyo3(signature = (queries, k, threads))]
    fn kneighbors<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        k: usize,
        threads: Option<usize>,
    ) -> PyResult<Found<'py>> {
        let queries = convert::matrix("queries", &queries)?;
        let found = call::run(py, threads, None, |context| self.0.kneighbors(context, queries, k))?;
        let rows = queries.rows();
        Ok((convert::rows(py, found.distances, rows, k)?, convert::rows(py, found.indices, rows, k)?))
    }

    #[expect(clippy::too_many_arguments, reason = "the signature is Python's")]
    #[pyo3(signature = (features, distances, indices, patches, b, threads=None))]
    fn image_scores<'py>(
        &self,
        py: Python<'py>,
        features: PyReadonlyArray2<'py, f32>,
        distances: PyReadonlyArray1<'py, f32>,
        indices: PyReadonlyArray1<'py, i64>,
        patches: usize,
        b: usize,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let features = convert::matrix("features", &features)?;
        let found = (convert::slice("distances", &distances)?, convert::slice("indices", &indices)?);
        let scores =
            call::run(py, threads, None, |context| image_scores(context, &self.0, features, found, patches, b))?;
        Ok(convert::vector(py, scores))
    }
}

/// Greedy k-centre selection: indices in pick order, the radius after each pick, the distances taken. It ends at `count`
/// picks, or once the radius is at most `radius`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the signature is Python's")]
#[pyo3(signature = (features, count, start, seed, threads, progress, *, radius=0.0))]
pub(crate) fn greedy_coreset<'py>(
    py: Python<'py>,
    features: PyReadonlyArray2<'py, f32>,
    count: usize,
    start: &Bound<'py, PyAny>,
    seed: u64,
    threads: Option<usize>,
    progress: Option<&Bound<'py, PyAny>>,
    radius: f64,
) -> PyResult<Selected<'py>> {
    let features = convert::matrix("features", &features)?;
    let start = match start.extract::<Option<usize>>() {
        Ok(None) => Start::Seed(seed),
        Ok(Some(row)) => Start::Row(row),
        Err(_) => match start.extract::<&str>() {
            Ok("mean") => Start::Mean,
            Ok("mean10") => Start::MeanOfTen(seed),
            _ => {
                return Err(PyValueError::new_err(format!(
                    "start must be None, a row index, \"mean\" or \"mean10\"; got {}",
                    start.repr()?
                )));
            }
        },
    };
    let coreset = call::run(py, threads, progress, |context| greedy(context, features, count, radius, start))?;
    Ok((convert::vector(py, coreset.indices), convert::vector(py, coreset.radii), coreset.distances))
}

/// Random projection of rows to `width` columns.
#[pyfunction]
#[pyo3(signature = (features, width, kind, seed, threads))]
pub(crate) fn project<'py>(
    py: Python<'py>,
    features: PyReadonlyArray2<'py, f32>,
    width: usize,
    kind: &str,
    seed: u64,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray2<f32>>> {
    let features = convert::matrix("features", &features)?;
    let kind = match kind {
        "sparse" => Projection::Sparse,
        "gaussian" => Projection::Gaussian,
        _ => {
            return Err(PyValueError::new_err(format!(
                "projection_kind must be \"sparse\" or \"gaussian\"; got {kind:?}"
            )));
        }
    };
    let projected = call::run(py, threads, None, |context| project_rows(context, features, width, kind, seed))?;
    convert::rows(py, projected, features.rows(), width)
}

//! The memory bank and the coreset, as Python sees them.

use numpy::{PyArray1, PyArray2, PyReadonlyArray1, PyReadonlyArray2};
use patchcore_kernels::coreset::{Projection, Start, greedy, project as project_rows};
use patchcore_kernels::nearest::{self, Distance};
use patchcore_kernels::score::image_scores;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{call, convert};

/// Indices, radii, and the number of distances taken.
type Selected<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>, u64);

/// Distances and indices.
type Found<'py> = (Bound<'py, PyArray2<f32>>, Bound<'py, PyArray2<i64>>);

/// Rows of each query, and their distances and indices, query after query.
type Within<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<i64>>);

/// An immutable memory bank.
#[pyclass(frozen, module = "patchcore_rs._native")]
#[derive(Debug)]
pub struct MemoryBank(pub nearest::MemoryBank);

#[pymethods]
impl MemoryBank {
    #[new]
    #[pyo3(signature = (features, threads, *, half=false, codes=true, groups=None))]
    fn new(
        py: Python<'_>,
        features: PyReadonlyArray2<'_, f32>,
        threads: Option<usize>,
        half: bool,
        codes: bool,
        groups: Option<PyReadonlyArray1<'_, usize>>,
    ) -> PyResult<Self> {
        let features = convert::matrix("features", &features)?;
        let storage = if half { nearest::Storage::Float16 } else { nearest::Storage::Float32 };
        let groups = groups.as_ref().map(|groups| convert::slice("groups", groups)).transpose()?;
        let bank = call::run(py, threads, None, |context| match groups {
            Some(groups) => nearest::MemoryBank::grouped(context, features, groups, storage),
            None if codes => nearest::MemoryBank::new(context, features, storage),
            None => nearest::MemoryBank::without_codes(context, features, storage),
        })?;
        Ok(Self(bank))
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

    /// Of `groups`, or of all rows.
    #[pyo3(signature = (queries, k, threads, *, squared=false, groups=None))]
    fn kneighbors<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        k: usize,
        threads: Option<usize>,
        squared: bool,
        groups: Option<PyReadonlyArray1<'py, usize>>,
    ) -> PyResult<Found<'py>> {
        let queries = convert::matrix("queries", &queries)?;
        let rows = self.among(groups.as_ref())?;
        let found = call::run(py, threads, None, |context| rows.kneighbors(context, queries, k, distance(squared)))?;
        let rows = queries.rows();
        Ok((convert::rows(py, found.distances, rows, k)?, convert::rows(py, found.indices, rows, k)?))
    }

    /// All rows of `groups`, or of the bank, within `radius` of each query, which is a squared one where `squared`.
    #[pyo3(signature = (queries, radius, threads, *, squared=false, groups=None))]
    fn radius_neighbors<'py>(
        &self,
        py: Python<'py>,
        queries: PyReadonlyArray2<'py, f32>,
        radius: f64,
        threads: Option<usize>,
        squared: bool,
        groups: Option<PyReadonlyArray1<'py, usize>>,
    ) -> PyResult<Within<'py>> {
        let queries = convert::matrix("queries", &queries)?;
        let rows = self.among(groups.as_ref())?;
        let found =
            call::run(py, threads, None, |context| rows.radius_neighbors(context, queries, radius, distance(squared)))?;
        let counts = convert::vector(py, found.counts);
        Ok((counts, convert::vector(py, found.distances), convert::vector(py, found.indices)))
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

impl MemoryBank {
    /// The rows of some groups, or all.
    fn among(&self, groups: Option<&PyReadonlyArray1<'_, usize>>) -> PyResult<nearest::Subset<'_>> {
        match groups {
            Some(groups) => {
                self.0.of_groups(convert::slice("groups", groups)?).map_err(|error| call::to_python(&error))
            }
            None => Ok(self.0.all()),
        }
    }
}

fn distance(squared: bool) -> Distance {
    if squared { Distance::Squared } else { Distance::Euclidean }
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
    let start = resolve_start(start, seed)?;
    let coreset = call::run(py, threads, progress, |context| greedy(context, features, count, radius, &start))?;
    Ok((convert::vector(py, coreset.indices), convert::vector(py, coreset.radii), coreset.distances))
}

/// What a selection begins with: None, a row, a word, or an array of rows.
fn resolve_start(start: &Bound<'_, PyAny>, seed: u64) -> PyResult<Start> {
    if let Ok(row) = start.extract::<Option<usize>>() {
        return Ok(row.map_or(Start::Seed(seed), Start::Row));
    }
    if let Ok(rows) = start.extract::<PyReadonlyArray1<'_, usize>>() {
        return Ok(Start::MeanOf(convert::slice("start", &rows)?.to_vec()));
    }
    match start.extract::<&str>() {
        Ok("mean") => Ok(Start::Mean),
        Ok("mean10") => Ok(Start::MeanOfTen(seed)),
        _ => Err(PyValueError::new_err(format!(
            "start must be None, a row index, row indices, \"mean\" or \"mean10\"; got {}",
            start.repr()?
        ))),
    }
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

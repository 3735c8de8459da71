//! The metrics, as Python sees them. Labels and scores have one dimension and are read where they lie; where they are
//! pixels, of all images one after the other, (height, width) of each image comes with them.

use numpy::{Element, PyArray1, PyReadonlyArray1};
use patchcore_kernels::context::Context;
use patchcore_kernels::error::Error;
use patchcore_kernels::metrics::{self, Samples, Score};
use pyo3::prelude::*;

use crate::{call, convert};

/// Scores or maps of either precision.
#[derive(FromPyObject)]
pub(crate) enum Scores<'py> {
    #[pyo3(transparent, annotation = "ndarray[float32]")]
    Single(PyReadonlyArray1<'py, f32>),
    #[pyo3(transparent, annotation = "ndarray[float64]")]
    Double(PyReadonlyArray1<'py, f64>),
}

type Labels<'py> = PyReadonlyArray1<'py, u8>;
type Sizes = Option<Vec<[usize; 2]>>;

/// `metric(samples, context)` of labels and scores of either precision.
macro_rules! measure {
    ($py:expr, $labels:expr, $scores:expr, $sizes:expr, $threads:expr, $metric:expr) => {
        match &$scores {
            Scores::Single(scores) => measure($py, &$labels, scores, $sizes.as_deref(), $threads, $metric),
            Scores::Double(scores) => measure($py, &$labels, scores, $sizes.as_deref(), $threads, $metric),
        }
    };
}

fn measure<S: Score + Element, T: Send>(
    py: Python<'_>,
    labels: &Labels<'_>,
    scores: &PyReadonlyArray1<'_, S>,
    sizes: Option<&[[usize; 2]]>,
    threads: Option<usize>,
    metric: impl FnOnce(&Samples<S>, &Context) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let (labels, scores) = (convert::slice("labels", labels)?, convert::slice("scores", scores)?);
    call::run(py, threads, None, |context| {
        let samples = match sizes {
            Some(sizes) => Samples::pixels(labels, scores, sizes, context),
            None => Samples::images(labels, scores, context),
        };
        metric(&samples?, context)
    })
}

/// Area under the ROC curve.
#[pyfunction]
#[pyo3(signature = (labels, scores, sizes, threads))]
pub(crate) fn roc_auc(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    sizes: Sizes,
    threads: Option<usize>,
) -> PyResult<f64> {
    measure!(py, labels, scores, sizes, threads, metrics::roc_auc)
}

/// Average precision.
#[pyfunction]
#[pyo3(signature = (labels, scores, sizes, threads))]
pub(crate) fn average_precision(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    sizes: Sizes,
    threads: Option<usize>,
) -> PyResult<f64> {
    measure!(py, labels, scores, sizes, threads, metrics::average_precision)
}

/// The F1-optimal threshold, its F1, false alarms and misses.
#[pyfunction]
#[pyo3(signature = (labels, scores, sizes, threads))]
pub(crate) fn f1_optimal(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    sizes: Sizes,
    threads: Option<usize>,
) -> PyResult<(f64, f64, usize, usize)> {
    let best = measure!(py, labels, scores, sizes, threads, metrics::f1_optimal)?;
    Ok((best.threshold, best.f1, best.false_alarms, best.misses))
}

/// The highest threshold that finds every anomaly, and its false alarms.
#[pyfunction]
#[pyo3(signature = (labels, scores, sizes, threads))]
pub(crate) fn full_recall(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    sizes: Sizes,
    threads: Option<usize>,
) -> PyResult<(f64, usize)> {
    measure!(py, labels, scores, sizes, threads, metrics::full_recall)
}

/// PRO up to a false positive rate.
#[pyfunction]
#[pyo3(signature = (masks, maps, sizes, fpr_limit, threads))]
pub(crate) fn pro(
    py: Python<'_>,
    masks: Labels<'_>,
    maps: Scores<'_>,
    sizes: Sizes,
    fpr_limit: f64,
    threads: Option<usize>,
) -> PyResult<f64> {
    measure!(py, masks, maps, sizes, threads, |samples, context| metrics::pro(samples, fpr_limit, context))
}

/// AUPIMO of every image between two false positive rates; NaN where no pixel is anomalous.
#[pyfunction]
#[pyo3(signature = (masks, maps, sizes, fpr_limits, threads))]
pub(crate) fn aupimo<'py>(
    py: Python<'py>,
    masks: Labels<'py>,
    maps: Scores<'py>,
    sizes: Sizes,
    fpr_limits: [f64; 2],
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let metric =
        measure!(py, masks, maps, sizes, threads, |samples, context| metrics::aupimo(samples, fpr_limits, context))?;
    Ok(convert::vector(py, metric))
}

/// The number of regions that PRO averages over.
#[pyfunction]
#[pyo3(signature = (masks, sizes, threads))]
pub(crate) fn count_regions(
    py: Python<'_>,
    masks: Labels<'_>,
    sizes: Vec<[usize; 2]>,
    threads: Option<usize>,
) -> PyResult<usize> {
    let masks = convert::slice("masks", &masks)?;
    call::run(py, threads, None, |context| metrics::count_regions(masks, &sizes, context))
}

//! The metrics, as Python sees them. Labels and scores have one dimension (images) or three (pixels), and
//! are read where they lie.

use numpy::{Element, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use patchcore_kernels::context::Context;
use patchcore_kernels::error::Error;
use patchcore_kernels::metrics::{self, Samples, Score};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{call, convert};

/// Scores or maps of either precision.
#[derive(FromPyObject)]
pub(crate) enum Scores<'py> {
    #[pyo3(transparent, annotation = "ndarray[float32]")]
    Single(PyReadonlyArrayDyn<'py, f32>),
    #[pyo3(transparent, annotation = "ndarray[float64]")]
    Double(PyReadonlyArrayDyn<'py, f64>),
}

type Labels<'py> = PyReadonlyArrayDyn<'py, u8>;

/// `metric(samples, context)` of labels and scores of either precision.
macro_rules! measure {
    ($py:expr, $labels:expr, $scores:expr, $threads:expr, $metric:expr) => {
        match &$scores {
            Scores::Single(scores) => measure($py, &$labels, scores, $threads, $metric),
            Scores::Double(scores) => measure($py, &$labels, scores, $threads, $metric),
        }
    };
}

fn measure<S: Score + Element, T: Send>(
    py: Python<'_>,
    labels: &Labels<'_>,
    scores: &PyReadonlyArrayDyn<'_, S>,
    threads: Option<usize>,
    metric: impl FnOnce(&Samples<S>, &Context) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let (of_labels, of_scores) = (labels.shape(), scores.shape());
    let pixels: Option<[usize; 3]> = match (of_labels.len(), of_scores.len()) {
        (1, 1) => None,
        (3, 3) if of_labels == of_scores => of_scores.try_into().ok(),
        _ => {
            return Err(PyValueError::new_err(format!(
                "masks must have the shape of maps, (n, height, width): one mask for each map; got masks {} and maps {}",
                tuple(of_labels),
                tuple(of_scores)
            )));
        }
    };
    let (labels, scores) = (convert::slice("labels", labels)?, convert::slice("scores", scores)?);
    call::run(py, threads, None, |context| {
        let samples = match pixels {
            Some(shape) => Samples::pixels(labels, scores, shape, context),
            None => Samples::images(labels, scores, context),
        };
        metric(&samples?, context)
    })
}

/// A shape as Python prints it.
fn tuple(shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("({}{})", sizes.join(", "), if shape.len() == 1 { "," } else { "" })
}

/// Area under the ROC curve.
#[pyfunction]
#[pyo3(signature = (labels, scores, threads))]
pub(crate) fn roc_auc(py: Python<'_>, labels: Labels<'_>, scores: Scores<'_>, threads: Option<usize>) -> PyResult<f64> {
    measure!(py, labels, scores, threads, metrics::roc_auc)
}

/// Average precision.
#[pyfunction]
#[pyo3(signature = (labels, scores, threads))]
pub(crate) fn average_precision(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    threads: Option<usize>,
) -> PyResult<f64> {
    measure!(py, labels, scores, threads, metrics::average_precision)
}

/// The F1-optimal threshold, its F1, false alarms and misses.
#[pyfunction]
#[pyo3(signature = (labels, scores, threads))]
pub(crate) fn f1_optimal(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    threads: Option<usize>,
) -> PyResult<(f64, f64, usize, usize)> {
    let best = measure!(py, labels, scores, threads, metrics::f1_optimal)?;
    Ok((best.threshold, best.f1, best.false_alarms, best.misses))
}

/// The highest threshold that finds every anomaly, and its false alarms.
#[pyfunction]
#[pyo3(signature = (labels, scores, threads))]
pub(crate) fn full_recall(
    py: Python<'_>,
    labels: Labels<'_>,
    scores: Scores<'_>,
    threads: Option<usize>,
) -> PyResult<(f64, usize)> {
    measure!(py, labels, scores, threads, metrics::full_recall)
}

/// PRO up to a false positive rate.
#[pyfunction]
#[pyo3(signature = (masks, maps, fpr_limit, threads))]
pub(crate) fn pro(
    py: Python<'_>,
    masks: Labels<'_>,
    maps: Scores<'_>,
    fpr_limit: f64,
    threads: Option<usize>,
) -> PyResult<f64> {
    measure!(py, masks, maps, threads, |samples, context| metrics::pro(samples, fpr_limit, context))
}

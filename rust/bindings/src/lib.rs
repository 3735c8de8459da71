//! Python bindings of `patchcore_kernels`: conversion only, no arithmetic. The stub beside the Python
//! sources, `_native.pyi`, is what type checkers see.

#![expect(clippy::needless_pass_by_value, reason = "pyo3 passes arguments by value")]

mod bank;
mod call;
mod convert;
mod gaussian;
mod maps;
mod metrics;

use pyo3::prelude::*;

/// What Python sees.
#[pymodule]
mod _native {
    use super::call;
    use patchcore_kernels::matrix::LIMIT;
    use patchcore_kernels::simd::Level;
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use super::bank::{MemoryBank, greedy_coreset, project};
    #[pymodule_export]
    use super::gaussian::{accumulate_gaussians, factorize_gaussians, mahalanobis};
    #[pymodule_export]
    use super::maps::{aggregate, anomaly_maps, resize, undo_resize};
    #[pymodule_export]
    use super::metrics::{aupimo, average_precision, count_regions, f1_optimal, full_recall, pro, roc_auc};

    /// Known without asking for the SIMD level, which may be a wrong one.
    #[pymodule_export]
    const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// The largest magnitude that features may have.
    #[pymodule_export]
    const MAX_MAGNITUDE: f64 = LIMIT as f64;

    /// The number of threads that `None` means: processors that this process may use, by its affinity and by the
    /// quota of its control group.
    #[pyfunction]
    fn available_threads() -> usize {
        call::available_threads()
    }

    /// Version, SIMD level in force, levels of this CPU, default number of threads.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let info = PyDict::new(py);
        info.set_item("version", VERSION)?;
        info.set_item("simd", call::level()?.name())?;
        info.set_item("simd_available", Level::available().into_iter().map(Level::name).collect::<Vec<_>>())?;
        info.set_item("threads", call::available_threads())?;
        Ok(info)
    }
}

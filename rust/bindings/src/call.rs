//! The one door for long calls: release the GIL, run, answer Ctrl-C, report progress, map errors, and
//! let no panic out.

use std::cell::RefCell;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use patchcore_kernels::context::Context;
use patchcore_kernels::error::Error;
use patchcore_kernels::simd::{FloatMode, Level};
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// Runs `body` without the GIL on `threads` threads (None: as many as this process may use), at the
/// SIMD level in force. `progress(done, total)` is called with the GIL; what it raises ends the call.
pub(crate) fn run<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    progress: Option<&Bound<'_, PyAny>>,
    body: impl FnOnce(&Context<'_>) -> Result<T, Error> + Send,
) -> PyResult<T> {
    let level = level()?;
    let threads = match threads {
        Some(0) => return Err(PyValueError::new_err("threads must be at least 1, or None for all; got 0")),
        Some(threads) => threads,
        None => available_threads(),
    };
    let progress = progress.map(|progress| progress.clone().unbind());
    py.detach(move || {
        // The mode for what Python runs meanwhile.
        let mode = FloatMode::current();
        let raised = RefCell::new(None);
        let observer = |done: u64, total: u64| {
            let ask = |py: Python<'_>| {
                py.check_signals()?;
                if let Some(progress) = &progress {
                    progress.call1(py, (done, total))?;
                }
                Ok(())
            };
            match mode.run(|| Python::attach(ask)) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    *raised.borrow_mut() = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let context = Context::new(level, threads).observed(&observer);
        match catch_unwind(AssertUnwindSafe(|| FloatMode::DEFAULT.run(|| body(&context)))) {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(error)) => Err(raised.take().unwrap_or_else(|| to_python(&error))),
            Err(_) => Err(PyRuntimeError::new_err(
                "patchcore-rs failed inside a kernel: this is a bug, please report it with the message printed above",
            )),
        }
    })
}

/// The Python exception for a kernel's error.
pub(crate) fn to_python(error: &Error) -> PyErr {
    match error {
        Error::OutOfMemory { .. } => PyMemoryError::new_err(error.to_string()),
        Error::Cancelled => PyKeyboardInterrupt::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// The level that `PATCHCORE_RS_SIMD` names in any case, or the fastest of this CPU where it is unset or
/// empty. Called with the GIL held, so that no other Python thread changes the environment meanwhile.
pub(crate) fn level() -> PyResult<Level> {
    let name = std::env::var("PATCHCORE_RS_SIMD").unwrap_or_default();
    if name.is_empty() {
        return Ok(Level::detect());
    }
    let usable = || {
        let names: Vec<_> = Level::available().into_iter().map(Level::name).collect();
        format!("this CPU has {}; unset PATCHCORE_RS_SIMD to use the fastest", names.join(", "))
    };
    let level: Level = name
        .to_ascii_lowercase()
        .parse()
        .map_err(|error| PyValueError::new_err(format!("PATCHCORE_RS_SIMD: {error} ({})", usable())))?;
    if level.is_available() {
        Ok(level)
    } else {
        Err(PyValueError::new_err(format!("PATCHCORE_RS_SIMD={name}: not available, {}", usable())))
    }
}

/// Processors that this process may use: its affinity and its control group's quota, of version 1 or 2, counted in.
pub(crate) fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

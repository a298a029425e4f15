//! Memory that torch keeps for later tensors, asked for where weights do not fit beside it.

use std::sync::OnceLock;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::errors::OutOfMemoryError;

static RECLAIM: OnceLock<Py<PyAny>> = OnceLock::new();

/// Sets the callable that gives a device's unused memory back (its name to bytes), once.
#[pyfunction]
pub(crate) fn set_reclaim(reclaim: Py<PyAny>) -> PyResult<()> {
    RECLAIM.set(reclaim).map_err(|_| PyRuntimeError::new_err("it is set already"))
}

/// Does something that needs memory for weights: once more if there was not enough and torch gave some back. Not called
/// with a lock of torch's or of the engine's held.
pub(crate) fn with_reclaim<T>(
    py: Python<'_>,
    engine: &forebay::Engine,
    mut attempt: impl FnMut() -> PyResult<T>,
) -> PyResult<T> {
    let error = match attempt() {
        Err(error) if error.is_instance_of::<OutOfMemoryError>(py) => error,
        done => return done,
    };
    let Some(reclaim) = RECLAIM.get() else { return Err(error) };
    let given_back: u64 = reclaim.bind(py).call1((engine.device().to_string(),))?.extract()?;
    if given_back > 0 { attempt() } else { Err(error) }
}

//! Memory that is taken from an engine, or kept from weights, for as long as a Python object is open.

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyAny;

/// Device memory that is no weight's: as if another program had it.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Ballast {
    inner: Mutex<Option<forebay::Ballast>>,
}

/// Weights take as little memory as can be.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Squeeze {
    inner: Mutex<Option<forebay::Squeeze>>,
}

impl Ballast {
    pub(crate) fn new(ballast: forebay::Ballast) -> Self {
        Ballast { inner: Mutex::new(Some(ballast)) }
    }
}

impl Squeeze {
    pub(crate) fn new(squeeze: forebay::Squeeze) -> Self {
        Squeeze { inner: Mutex::new(Some(squeeze)) }
    }
}

#[pymethods]
impl Ballast {
    /// How much it is; 0 after :meth:`close`.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.lock().as_ref().map_or(0, |ballast| ballast.size().get())
    }

    /// Gives it back. Idempotent.
    fn close(&self, py: Python<'_>) {
        let ballast = self.inner.lock().take();
        py.detach(|| drop(ballast));
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }
}

#[pymethods]
impl Squeeze {
    /// Ends it. Idempotent.
    fn close(&self, py: Python<'_>) {
        let squeeze = self.inner.lock().take();
        py.detach(|| drop(squeeze));
    }

    fn __enter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) {
        self.close(py);
    }
}

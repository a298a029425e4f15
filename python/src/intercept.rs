//! The door of every torch function that is called with a stand-in. The common call, an operation of inference whose
//! results share no memory with a weight, goes straight on; every other is for the package to look at.

use std::sync::OnceLock;

use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyAny, PyDict, PyFrozenSet, PyTuple};

use crate::run::{Mode, run_as};

struct Interception {
    /// Functions that go straight on, unless somebody may keep their arguments.
    common: Py<PyFrozenSet>,
    /// Takes every other call.
    otherwise: Py<PyAny>,
    grad_enabled: Py<PyAny>,
    dispatch_modes: Py<PyAny>,
    tracing_state: Py<PyAny>,
}

static INTERCEPTION: OnceLock<Interception> = OnceLock::new();

/// Sets the functions that go straight on and what takes the others, once.
#[pyfunction]
pub(crate) fn set_interception(
    py: Python<'_>,
    common: Py<PyFrozenSet>,
    otherwise: Py<PyAny>,
) -> PyResult<()> {
    let torch = py.import("torch._C")?;
    let named = |name: &str| torch.getattr(name).map(Bound::unbind);
    let interception = Interception {
        common,
        otherwise,
        grad_enabled: named("is_grad_enabled")?,
        dispatch_modes: named("_len_torch_dispatch_stack")?,
        tracing_state: named("_get_tracing_state")?,
    };
    INTERCEPTION.set(interception).map_err(|_| PyRuntimeError::new_err("the interception is set already"))
}

/// A class method ``__torch_function__``.
#[pyfunction]
#[pyo3(signature = (cls, func, types, args=None, kwargs=None))]
pub(crate) fn intercept<'py>(
    cls: &Bound<'py, PyAny>,
    func: &Bound<'py, PyAny>,
    types: &Bound<'py, PyAny>,
    args: Option<&Bound<'py, PyTuple>>,
    kwargs: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = cls.py();
    let interception =
        INTERCEPTION.get().ok_or_else(|| PyRuntimeError::new_err("the interception is not set yet"))?;
    let kwargs = kwargs.filter(|kwargs| !kwargs.is_empty());
    if let Some(args) = args
        && interception.is_common(func, kwargs)?
    {
        return run_as(func, args, kwargs, Mode::Pure);
    }
    let args = args.cloned().unwrap_or_else(|| PyTuple::empty(py));
    interception.otherwise.bind(py).call1((func, types, args, kwargs))
}

impl Interception {
    fn is_common(&self, func: &Bound<'_, PyAny>, kwargs: Option<&Bound<'_, PyDict>>) -> PyResult<bool> {
        let py = func.py();
        if !self.common.bind(py).contains(func)? {
            return Ok(false);
        }
        if let Some(kwargs) = kwargs
            && kwargs.contains(intern!(py, "out"))?
        {
            return Ok(false);
        }
        // Autograd, modes that record, and traces may keep what they see.
        Ok(!self.grad_enabled.bind(py).call0()?.is_truthy()?
            && !self.dispatch_modes.bind(py).call0()?.is_truthy()?
            && self.tracing_state.bind(py).call0()?.is_none())
    }
}

//! Engine errors as Python exceptions.

use forebay::EngineError;
use forebay::store::StoreError;
use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(forebay, ForebayError, PyRuntimeError, "Base of Forebay's errors.");
create_exception!(forebay, OutOfMemoryError, ForebayError, "Weights do not fit, whatever else leaves.");
create_exception!(forebay, SourceError, ForebayError, "A weight's bytes cannot be read; names the file.");
create_exception!(forebay, DeviceError, ForebayError, "A device is missing or refused a call.");
create_exception!(forebay, DetachedError, ForebayError, "The model was detached.");

pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("ForebayError", py.get_type::<ForebayError>())?;
    module.add("OutOfMemoryError", py.get_type::<OutOfMemoryError>())?;
    module.add("SourceError", py.get_type::<SourceError>())?;
    module.add("DeviceError", py.get_type::<DeviceError>())?;
    module.add("DetachedError", py.get_type::<DetachedError>())
}

/// The exception for an engine error.
pub(crate) fn raised(error: EngineError) -> PyErr {
    let text = error.to_string();
    match error {
        EngineError::TooLarge { .. } | EngineError::AllPinned { .. } => OutOfMemoryError::new_err(text),
        EngineError::Device(error) if error.is_out_of_memory() => OutOfMemoryError::new_err(text),
        EngineError::Device(_) => DeviceError::new_err(text),
        EngineError::Source { .. } | EngineError::Transfer(_) => SourceError::new_err(text),
        EngineError::Detached { .. } => DetachedError::new_err(text),
        EngineError::Invalid(_) => PyValueError::new_err(text),
        _ => ForebayError::new_err(text),
    }
}

pub(crate) fn device(error: forebay::device::DeviceError) -> PyErr {
    raised(error.into())
}

pub(crate) fn source(error: StoreError) -> PyErr {
    SourceError::new_err(error.to_string())
}

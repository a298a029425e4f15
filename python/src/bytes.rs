//! Sizes as Python gives them.

use forebay::Bytes;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A number of bytes from an int or a float, checked: `name` is the argument's.
pub(crate) fn size(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    if let Ok(bytes) = value.extract::<u64>() {
        return Ok(Bytes::new(bytes));
    }
    match value.extract::<f64>() {
        Ok(bytes) if bytes.is_finite() && bytes >= 0.0 && bytes < u64::MAX as f64 => {
            Ok(Bytes::new(bytes as u64))
        }
        _ => Err(PyValueError::new_err(format!(
            "{name} is a number of bytes between 0 and 2**64: {}",
            value.repr().map_or_else(|_| "?".to_owned(), |text| text.to_string())
        ))),
    }
}

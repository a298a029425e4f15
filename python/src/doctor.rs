//! What works on this machine.

use pyo3::prelude::*;

/// The checks of this machine: (name, status, detail, remedy) each.
#[pyfunction]
pub(crate) fn examine(py: Python<'_>) -> Vec<(String, String, String, Option<String>)> {
    let checks = py.detach(forebay::doctor::examine);
    checks
        .into_iter()
        .map(|check| (check.name, check.status.to_string(), check.detail, check.remedy))
        .collect()
}

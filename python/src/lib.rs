//! The extension module `forebay._forebay`: the engine as Python sees it.
//!
//! Python is never called while a lock of the engine is held, and the interpreter lock is never held while the engine
//! waits.

mod allocations;
mod ballast;
mod bytes;
mod checkpoint;
mod dlpack;
mod doctor;
mod engine;
mod errors;
mod host_buffer;
mod intercept;
mod logs;
mod model;
mod patches;
mod recalls;
mod reclaim;
mod run;
mod running;
mod shadows;
mod transfer;
mod vbar;

use pyo3::prelude::*;

/// The extension module of the package `forebay`.
#[pymodule(gil_used = false)]
fn _forebay(module: &Bound<'_, PyModule>) -> PyResult<()> {
    logs::install();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<engine::Engine>()?;
    module.add_class::<ballast::Ballast>()?;
    module.add_class::<ballast::Squeeze>()?;
    module.add_class::<model::Model>()?;
    module.add_class::<model::Weight>()?;
    module.add_class::<patches::PyEightBitSum>()?;
    module.add_class::<shadows::Shadows>()?;
    module.add_class::<shadows::Scope>()?;
    module.add_class::<vbar::ExplicitVbar>()?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<host_buffer::HostBuffer>()?;
    module.add_class::<transfer::FileMapping>()?;
    module.add_function(wrap_pyfunction!(transfer::read_to_device, module)?)?;
    module.add_function(wrap_pyfunction!(transfer::write_from_device, module)?)?;
    module.add_function(wrap_pyfunction!(transfer::write_from_host, module)?)?;
    module.add_function(wrap_pyfunction!(transfer::foreign_capsule, module)?)?;
    module.add_function(wrap_pyfunction!(allocations::redirect_allocations, module)?)?;
    module.add_function(wrap_pyfunction!(allocations::import_of, module)?)?;
    module.add_function(wrap_pyfunction!(allocations::restore_allocations, module)?)?;
    module.add_function(wrap_pyfunction!(allocations::redirected_allocations, module)?)?;
    module.add_function(wrap_pyfunction!(doctor::examine, module)?)?;
    module.add_function(wrap_pyfunction!(intercept::intercept, module)?)?;
    module.add_function(wrap_pyfunction!(intercept::set_interception, module)?)?;
    module.add_function(wrap_pyfunction!(run::run, module)?)?;
    module.add_class::<run::Holding>()?;
    module.add_function(wrap_pyfunction!(run::hold, module)?)?;
    module.add_function(wrap_pyfunction!(run::lend_all, module)?)?;
    module.add_function(wrap_pyfunction!(reclaim::set_reclaim, module)?)?;
    module.add_function(wrap_pyfunction!(run::set_managed_types, module)?)?;
    module.add_function(wrap_pyfunction!(running::begin_forward, module)?)?;
    module.add_function(wrap_pyfunction!(running::end_forward, module)?)?;
    module.add_function(wrap_pyfunction!(running::is_ending, module)?)?;
    module.add_function(wrap_pyfunction!(engine::shut_down_engines, module)?)?;
    module.add_function(wrap_pyfunction!(recalls::open_recalls, module)?)?;
    module.add_function(wrap_pyfunction!(recalls::serve_recalls, module)?)?;
    module.add_function(wrap_pyfunction!(recalls::close_recalls, module)?)?;
    errors::add(module)
}

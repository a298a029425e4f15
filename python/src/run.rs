//! Running an operation with its managed weights acquired.
//!
//! The pins are owned by this call's frame, so an exception or an interrupt inside the operation leaves none behind.

use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

use forebay::device::StreamHandle;
use forebay::{Attachment, Begun, Bytes, Engine, Held, Pinned, Use, View};
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};
use smallvec::{SmallVec, smallvec};

use crate::errors::{ForebayError, raised};
use crate::model::Weight;
use crate::reclaim::with_reclaim;
use crate::running::Running;

/// The weights of one call: a weight and its bias take no allocation.
type Weights<'py> = SmallVec<[Bound<'py, Weight>; 2]>;

/// The tensor types that stand for managed weights, each with its `Weight` in `_weight`.
static MANAGED: OnceLock<Vec<Py<PyType>>> = OnceLock::new();

/// Sets the tensor types that stand for managed weights, once.
#[pyfunction]
pub(crate) fn set_managed_types(types: Vec<Py<PyType>>) -> PyResult<()> {
    MANAGED.set(types).map_err(|_| PyRuntimeError::new_err("the managed types are set already"))
}

/// What is known of a function's results.
#[derive(Clone, Copy)]
pub(crate) enum Mode {
    /// They never share memory with the arguments.
    Pure,
    /// They may; then the call is made again on tensors that keep their weight pinned.
    Checked,
    /// They usually do: such tensors are used at once.
    Views,
}

/// Calls ``func`` with every managed weight among its arguments replaced by a plain tensor.
///
/// ``mode`` is ``"pure"`` for functions whose results never share memory with their arguments, ``"checked"`` where they
/// may (then the call is made again on tensors that keep their weight pinned), ``"views"`` to use such tensors at once.
#[pyfunction]
pub(crate) fn run<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    mode: &str,
) -> PyResult<Bound<'py, PyAny>> {
    let mode = match mode {
        "pure" => Mode::Pure,
        "views" => Mode::Views,
        _ => Mode::Checked,
    };
    run_as(func, args, kwargs, mode)
}

/// [`run`] from here.
pub(crate) fn run_as<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    mode: Mode,
) -> PyResult<Bound<'py, PyAny>> {
    let mut weights = Weights::new();
    collect(args.as_any(), &mut weights)?;
    if let Some(kwargs) = kwargs {
        collect(kwargs.as_any(), &mut weights)?;
    }
    if weights.is_empty() {
        return without_interception(func, args, kwargs);
    }
    let _running = Running::new(func.py());
    let result = match mode {
        Mode::Pure => on_plain(func, args, kwargs, &weights),
        Mode::Checked => checked(func, args, kwargs, &weights),
        Mode::Views => on_views(func, args, kwargs, &weights),
    }?;
    let is_squeezed = |weight: &Weight| weight.shared.attachment.engine().is_squeezed();
    if weights.iter().any(|weight| is_squeezed(weight.get())) {
        // What runs did not fit before: nothing of the weights is left beside what comes next.
        for group in by_engine(&weights).iter().filter(|group| is_squeezed(group[0])) {
            let engine = group[0].shared.attachment.engine();
            func.py().detach(|| engine.make_room(Bytes::MAX)).map_err(raised)?;
        }
    }
    Ok(result)
}

/// Calls with the plain tensors, pinned meanwhile.
fn on_plain<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    weights: &[Bound<'py, Weight>],
) -> PyResult<Bound<'py, PyAny>> {
    let plain = plain(func.py(), weights)?;
    let _pinned = acquire(func.py(), weights)?;
    call(func, args, kwargs, &plain)
}

/// Calls with the plain tensors, and once more on views where a result shares their memory.
fn checked<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    weights: &[Bound<'py, Weight>],
) -> PyResult<Bound<'py, PyAny>> {
    let plain = plain(func.py(), weights)?;
    let pinned = acquire(func.py(), weights)?;
    let before = versions(&plain)?;
    let result = call(func, args, kwargs, &plain)?;
    if versions(&plain)? != before {
        drop(pinned);
        return Err(written(weights));
    }
    if aliases(&result, args, weights)? {
        drop(pinned);
        drop(result);
        return on_views(func, args, kwargs, weights);
    }
    Ok(result)
}

/// The plain tensors of weights.
fn plain<'py>(py: Python<'py>, weights: &[Bound<'py, Weight>]) -> PyResult<SmallVec<[Bound<'py, PyAny>; 2]>> {
    weights.iter().map(|weight| weight.get().plain(py)).collect()
}

/// Plain tensors over weights for the length of an operation: all pinned together, each for as long as its storage
/// lives.
#[pyfunction]
pub(crate) fn lend_all<'py>(
    py: Python<'py>,
    weights: Vec<Bound<'py, Weight>>,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let _running = Running::new(py);
    pinning(py, &weights, |engine, pairs, how| engine.loans(pairs, how))
}

/// Weights that are pinned together for as long as this lives, in order with the stream that was current.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Holding {
    _held: SmallVec<[Held; 1]>,
}

/// Pins weights for as long as what this gives lives: their plain tensors can be computed with meanwhile.
#[pyfunction]
pub(crate) fn hold(py: Python<'_>, weights: Vec<Bound<'_, Weight>>) -> PyResult<Holding> {
    let _running = Running::new(py);
    Ok(Holding { _held: acquire(py, &weights)?.into_iter().map(Pinned::held).collect() })
}

/// Runs an engine call that may wait, without the interpreter lock, ended by a signal (Ctrl-C) if one comes.
pub(crate) fn with_interrupts<T: Send>(
    py: Python<'_>,
    stream: StreamHandle,
    wait: impl FnOnce(Use<'_>) -> forebay::Result<T> + Send,
) -> PyResult<T> {
    let (result, signal) = py.detach(move || {
        let signal = RefCell::new(None);
        let interrupted =
            || Python::attach(|py| py.check_signals().map_err(|error| signal.replace(Some(error))).is_err());
        let result = wait(Use { stream, interrupted: &interrupted });
        (result, signal.into_inner())
    });
    result.map_err(|error| signal.unwrap_or_else(|| raised(error)))
}

/// For weights in places where `collect` does not look: the call reaches `__torch_dispatch__`, which finds them.
fn without_interception<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let torch = func.py().import("torch._C")?;
    if !torch.call_method0("_is_torch_function_enabled")?.extract::<bool>()? {
        return Err(ForebayError::new_err(format!("no managed weight is found among the arguments: {func}")));
    }
    let guard = torch.call_method0("DisableTorchFunctionSubclass")?;
    guard.call_method0("__enter__")?;
    let result = func.call(args, kwargs);
    guard.call_method1("__exit__", (func.py().None(), func.py().None(), func.py().None()))?;
    result
}

/// Pins all weights, those of one engine together.
fn acquire<'a>(py: Python<'_>, weights: &'a [Bound<'_, Weight>]) -> PyResult<SmallVec<[Pinned<'a>; 1]>> {
    by_engine(weights)
        .into_iter()
        .map(|group| {
            let stream = group[0].shared.current_stream(py)?;
            let engine = group[0].shared.attachment.engine();
            with_reclaim(py, engine, || match engine.begin(&pairs(&group), stream).map_err(raised)? {
                Begun::Ready(pinned) => Ok(pinned),
                Begun::Waiting(waiting) => with_interrupts(py, stream, |how| waiting.wait(how.interrupted)),
            })
        })
        .collect()
}

/// Calls with tensors that keep their weights pinned for as long as their storages live.
fn on_views<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    weights: &[Bound<'py, Weight>],
) -> PyResult<Bound<'py, PyAny>> {
    let views = views(func.py(), weights)?;
    let before = versions(&views)?;
    let result = call(func, args, kwargs, &views)?;
    if versions(&views)? != before {
        drop((views, result));
        return Err(written(weights));
    }
    Ok(result)
}

/// A pinning tensor for each weight, all acquired together.
fn views<'py>(py: Python<'py>, weights: &[Bound<'py, Weight>]) -> PyResult<Vec<Bound<'py, PyAny>>> {
    pinning(py, weights, |engine, pairs, how| engine.views(pairs, how))
}

fn pinning<'py>(
    py: Python<'py>,
    weights: &[Bound<'py, Weight>],
    pin: impl Fn(&Arc<Engine>, &[(&Attachment, usize)], Use<'_>) -> forebay::Result<Vec<View>> + Sync,
) -> PyResult<Vec<Bound<'py, PyAny>>> {
    let mut tensors: Vec<Option<Bound<'py, PyAny>>> = weights.iter().map(|_| None).collect();
    for group in by_engine(weights) {
        let stream = group[0].shared.current_stream(py)?;
        let engine = Arc::clone(group[0].shared.attachment.engine());
        let pairs = pairs(&group);
        let pinned: Vec<View> =
            with_reclaim(py, &engine, || with_interrupts(py, stream, |how| pin(&engine, &pairs, how)))?;
        for (weight, view) in group.iter().zip(pinned) {
            let tensor = weight.viewed(weight.capsule_kept_by(py, view)?)?;
            let place =
                (0..weights.len()).find(|&i| std::ptr::eq(weights[i].get(), *weight) && tensors[i].is_none());
            if let Some(place) = place {
                tensors[place] = Some(tensor);
            }
        }
    }
    Ok(tensors.into_iter().flatten().collect())
}

/// Weights as the engine takes them.
fn pairs<'a>(group: &[&'a Weight]) -> SmallVec<[(&'a Attachment, usize); 2]> {
    group.iter().map(|weight| (&weight.shared.attachment, weight.index)).collect()
}

/// The weights grouped by their engine.
fn by_engine<'a>(weights: &'a [Bound<'_, Weight>]) -> SmallVec<[SmallVec<[&'a Weight; 2]>; 1]> {
    let mut groups: SmallVec<[SmallVec<[&Weight; 2]>; 1]> = SmallVec::new();
    for weight in weights.iter().map(Bound::get) {
        let engine = weight.shared.attachment.engine();
        match groups.iter_mut().find(|group| Arc::ptr_eq(group[0].shared.attachment.engine(), engine)) {
            Some(group) => group.push(weight),
            None => groups.push(smallvec![weight]),
        }
    }
    groups
}

/// Calls with the managed weights, in the order `collect` finds them, replaced by `tensors`.
fn call<'py>(
    func: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    kwargs: Option<&Bound<'py, PyDict>>,
    tensors: &[Bound<'py, PyAny>],
) -> PyResult<Bound<'py, PyAny>> {
    let mut next = tensors.iter();
    let args = substitute(args.as_any(), &mut next)?;
    let kwargs = kwargs.map(|kwargs| substitute(kwargs.as_any(), &mut next)).transpose()?;
    let kwargs = kwargs.as_ref().map(|kwargs| kwargs.cast::<PyDict>()).transpose()?;
    func.call(args.cast::<PyTuple>()?, kwargs)
}

fn is_managed(object: &Bound<'_, PyAny>) -> bool {
    let kind = object.get_type_ptr().cast();
    MANAGED.get().is_some_and(|types| types.iter().any(|managed| managed.as_ptr() == kind))
}

/// Finds managed weights, also inside lists, tuples and dicts.
fn collect<'py>(object: &Bound<'py, PyAny>, found: &mut Weights<'py>) -> PyResult<()> {
    if is_managed(object) {
        let weight = object.getattr(intern!(object.py(), "_weight"))?;
        found.push(weight.cast_into::<Weight>()?);
    } else if let Ok(tuple) = object.cast::<PyTuple>() {
        for item in tuple {
            collect(&item, found)?;
        }
    } else if let Ok(list) = object.cast::<PyList>() {
        for item in list {
            collect(&item, found)?;
        }
    } else if let Ok(dict) = object.cast::<PyDict>() {
        for (_, item) in dict {
            collect(&item, found)?;
        }
    }
    Ok(())
}

/// A copy of the object with its managed weights replaced in the order in which `collect` finds them. Containers keep
/// their type where it is plain, or a named tuple; torch functions take the others as what they derive from.
fn substitute<'a, 'py: 'a>(
    object: &Bound<'py, PyAny>,
    tensors: &mut impl Iterator<Item = &'a Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = object.py();
    if is_managed(object) {
        return tensors
            .next()
            .cloned()
            .ok_or_else(|| PyRuntimeError::new_err("an argument changed during the call"));
    }
    if let Ok(tuple) = object.cast::<PyTuple>() {
        let items: Vec<_> = tuple.iter().map(|item| substitute(&item, tensors)).collect::<PyResult<_>>()?;
        if object.is_exact_instance_of::<PyTuple>() {
            return Ok(PyTuple::new(py, items)?.into_any());
        }
        if items.iter().zip(tuple).all(|(item, was)| item.is(&was)) {
            return Ok(object.clone()); // a shape, for example
        }
        return match object.get_type().getattr(intern!(py, "_make")) {
            Ok(make) => make.call1((PyList::new(py, items)?,)),
            Err(_) => Ok(PyTuple::new(py, items)?.into_any()),
        };
    }
    if let Ok(list) = object.cast::<PyList>() {
        let items: Vec<_> = list.iter().map(|item| substitute(&item, tensors)).collect::<PyResult<_>>()?;
        return Ok(PyList::new(py, items)?.into_any());
    }
    if let Ok(dict) = object.cast::<PyDict>() {
        let copy = PyDict::new(py);
        for (key, item) in dict {
            copy.set_item(key, substitute(&item, tensors)?)?;
        }
        return Ok(copy.into_any());
    }
    Ok(object.clone())
}

/// torch counts writes to a tensor.
fn versions(tensors: &[Bound<'_, PyAny>]) -> PyResult<Vec<u64>> {
    tensors.iter().map(|tensor| tensor.getattr(intern!(tensor.py(), "_version"))?.extract()).collect()
}

/// Whether a result, or a tensor inside it, lies in the memory of one of the weights, or may.
fn aliases(
    result: &Bound<'_, PyAny>,
    args: &Bound<'_, PyTuple>,
    weights: &[Bound<'_, Weight>],
) -> PyResult<bool> {
    let or_one_of = |found: bool, item: Bound<'_, PyAny>| Ok(found || aliases(&item, args, weights)?);
    if let Ok(items) = result.cast::<PyTuple>() {
        return items.iter().try_fold(false, or_one_of);
    }
    if let Ok(items) = result.cast::<PyList>() {
        return items.iter().try_fold(false, or_one_of);
    }
    if let Ok(items) = result.cast::<PyDict>() {
        return items.values().iter().try_fold(false, or_one_of);
    }
    let py = result.py();
    if !result.hasattr(intern!(py, "untyped_storage"))? {
        return Ok(false);
    }
    match result.call_method0(intern!(py, "data_ptr")).and_then(|address| address.extract::<u64>()) {
        Ok(address) => Ok(weights.iter().any(|weight| weight.get().owns(address))),
        // Tensors without memory of their own (functorch's, nested and sparse ones) refuse to give an address. One that
        // was an argument was written to, and a second call would write again.
        Err(_) => Ok(!args.iter().any(|arg| arg.is(result))),
    }
}

/// The error of an operation that wrote to a weight. What it wrote is given up.
fn written(weights: &[Bound<'_, Weight>]) -> PyErr {
    let names: Vec<&str> = weights.iter().map(|weight| weight.get().discarded()).collect();
    written_error(&names)
}

pub(crate) fn written_error<S: std::borrow::Borrow<str>>(names: &[S]) -> PyErr {
    ForebayError::new_err(format!(
        "an operation wrote to managed weights, which are read-only; what it wrote is discarded. \
         detach() the model to change its weights: {}",
        names.join(", ")
    ))
}

//! Plain tensors in place of stand-ins, while a model that fits runs.
//!
//! Where everything a model uses is resident, its weights are lent as a whole ([`forebay::Lease`]). While one of its
//! modules runs its forward, plain tensors stand in the `__dict__`s of the modules, where an attribute is looked up
//! before `_parameters`: the forward finds them without any interception, and everybody who looks into `_parameters`
//! finds the stand-ins. When the engine recalls the lease, they go at once and the forward goes on with stand-ins; so
//! a result never depends on them.
//!
//! All of this happens under the interpreter lock. The lock in here is a leaf: no Python runs under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay::device::StreamHandle;
use forebay::{Lease, Lending, Operation};
use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use crate::errors::raised;
use crate::model::{Model, Shared, Weight};
use crate::recalls::{self, Token};
use crate::run::written_error;
use crate::running::Running;

/// A loan that was recalled after fewer forwards than this did not pay for its tensors.
const PAYS_AFTER: u32 = 16;
/// How many forwards run on stand-ins, at most, after loans that did not pay.
const LONGEST_PAUSE: u32 = 64;

/// The shadows of one model.
#[pyclass(frozen, weakref, module = "forebay._forebay")]
pub(crate) struct Shadows {
    shared: Arc<Shared>,
    token: Token,
    weights: Vec<(Py<Weight>, Py<PyAny>)>,
    places: Vec<Place>,
    /// Makes a parameter of a plain tensor and the stand-in it is for.
    make: Py<PyAny>,
    /// Gives the streams that work may be enqueued on without our being told.
    streams: Option<Py<PyAny>>,
    /// What must not be at work while tensors are made or used: traces, modes that record, transforms.
    watchers: Watchers,
    state: Mutex<State>,
}

/// A parameter of a module.
struct Place {
    /// The module's `__dict__`.
    dict: Py<PyDict>,
    /// The module's `_parameters`.
    parameters: Py<PyDict>,
    name: Py<PyString>,
    /// Index into the weights.
    weight: usize,
}

struct Watchers {
    tracing_state: Py<PyAny>,
    dispatch_modes: Py<PyAny>,
    transforms: Py<PyAny>,
}

#[derive(Default)]
struct State {
    loan: Option<Loan>,
    /// One thread makes tensors, and has the loan meanwhile.
    making: bool,
    closed: bool,
    /// What scopes put into modules, by the scope's number.
    installed: Vec<(usize, Tensors)>,
    /// Forwards that run on stand-ins before the next loan.
    pause: u32,
    next_pause: u32,
    /// Pages filled when it was last looked for resident weights, unless there were some on their way.
    looked_at: Option<u64>,
    /// Streams were told to the engine.
    streams_known: bool,
    /// Weights that were written to, for the next forward that ends.
    written: Vec<String>,
}

/// A plain tensor for each weight that is lent.
type Tensors = Arc<Vec<Option<Shadow>>>;

struct Shadow {
    tensor: Py<PyAny>,
    /// torch's count of writes when it was made. A small weight's are not looked at: it is a parameter of its own, and
    /// its own shadow.
    version: Option<u64>,
}

/// The tensors go before the lease.
struct Loan {
    tensors: Tensors,
    lease: Lease,
    /// Forwards that had it.
    served: u32,
}

/// What is known of a place: name, module's `__dict__`, module's `_parameters`, number of the weight.
type PyPlace = (Py<PyDict>, Py<PyDict>, Py<PyString>, usize);

#[pymethods]
impl Shadows {
    /// Shadows of ``weights`` (each with its stand-in) at ``places`` (``__dict__``, ``_parameters``, name, number of the
    /// weight).
    #[new]
    fn new(
        py: Python<'_>,
        model: &Bound<'_, Model>,
        weights: Vec<(Py<Weight>, Py<PyAny>)>,
        places: Vec<PyPlace>,
        make: Py<PyAny>,
        streams: Option<Py<PyAny>>,
    ) -> PyResult<Py<Self>> {
        let torch = py.import("torch._C")?;
        let watchers = Watchers {
            tracing_state: torch.getattr("_get_tracing_state")?.unbind(),
            dispatch_modes: torch.getattr("_len_torch_dispatch_stack")?.unbind(),
            transforms: torch.getattr("_functorch")?.getattr("peek_interpreter_stack")?.unbind(),
        };
        let places = places
            .into_iter()
            .map(|(dict, parameters, name, weight)| Place { dict, parameters, name, weight })
            .collect();
        let shadows = Shadows {
            shared: Arc::clone(&model.get().shared),
            token: recalls::new_token(),
            weights,
            places,
            make,
            streams,
            watchers,
            state: Mutex::default(),
        };
        let shadows = Bound::new(py, shadows)?;
        recalls::register(shadows.get().token, &shadows)?;
        Ok(shadows.unbind())
    }

    /// What one module's forward sees: these places. Nothing is done for it inside of a forward of ``parent``.
    fn scope(
        slf: Bound<'_, Self>,
        number: usize,
        places: Vec<usize>,
        parent: Option<Py<Scope>>,
    ) -> PyResult<Scope> {
        let shadows = slf.get();
        if places.iter().any(|&place| place >= shadows.places.len()) {
            return Err(pyo3::exceptions::PyIndexError::new_err("there is no such place"));
        }
        Ok(Scope { shadows: slf.unbind(), number, places, parent, users: AtomicUsize::new(0) })
    }

    /// Gives everything back, for good.
    fn close(&self, py: Python<'_>) {
        self.state.lock().closed = true;
        self.give_back(py);
    }

    /// Whether the model's weights are lent at this moment.
    #[getter]
    fn lent(&self) -> bool {
        self.state.lock().loan.is_some()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        for (weight, stand_in) in &self.weights {
            visit.call(weight)?;
            visit.call(stand_in)?;
        }
        for place in &self.places {
            visit.call(&place.dict)?;
            visit.call(&place.parameters)?;
        }
        visit.call(&self.make)?;
        if let Some(streams) = &self.streams {
            visit.call(streams)?;
        }
        if let Some(state) = self.state.try_lock()
            && let Some(loan) = &state.loan
        {
            loan.tensors.iter().flatten().try_for_each(|shadow| visit.call(&shadow.tensor))?;
        }
        Ok(())
    }
}

impl Drop for Shadows {
    fn drop(&mut self) {
        recalls::forget(self.token);
    }
}

impl Shadows {
    /// Gives everything back because the engine asked for it.
    pub(crate) fn recall(&self, py: Python<'_>) {
        {
            let mut state = self.state.lock();
            // A recall may come after its loan was given back, and be of no meaning to the next.
            let Some(loan) = state.loan.as_ref().filter(|loan| loan.lease.is_recalled()) else { return };
            let paid = loan.served >= PAYS_AFTER;
            let pause = if paid { 1 } else { (2 * state.next_pause).clamp(1, LONGEST_PAUSE) };
            (state.pause, state.next_pause) = (pause, pause);
        }
        self.give_back(py);
    }

    /// Removes all shadows and lets go of their tensors. What somebody else holds stays pinned until it goes.
    pub(crate) fn give_back(&self, py: Python<'_>) {
        let loan = self.state.lock().loan.take();
        if let Some(loan) = loan {
            self.end(py, loan);
        }
    }

    /// Ends a loan that was taken out of the state.
    fn end(&self, py: Python<'_>, loan: Loan) {
        let installed = {
            let mut state = self.state.lock();
            state.looked_at = None;
            std::mem::take(&mut state.installed)
        };
        self.remove(py, 0..self.places.len(), &loan.tensors);
        let written = self.written(py, &loan.tensors);
        drop(installed);
        drop(loan);
        if !written.is_empty() {
            let names: Vec<String> = written
                .into_iter()
                .map(|weight| self.weights[weight].0.get().discarded().to_owned())
                .collect();
            self.state.lock().written.extend(names);
        }
    }

    /// Lends what is resident now, or more of it than before. Whether anything is lent.
    fn lend(&self, py: Python<'_>, stream: StreamHandle) -> PyResult<bool> {
        let attachment = &self.shared.attachment;
        let filled = attachment.pages_filled();
        let before = {
            let mut state = self.state.lock();
            if state.making || state.closed || !recalls::are_open() {
                return Ok(false);
            }
            if state.loan.as_ref().is_some_and(|loan| loan.lease.is_recalled()) {
                return Ok(false); // about to go
            }
            if state.looked_at == Some(filled) {
                return Ok(state.loan.is_some());
            }
            if state.loan.is_none() && state.pause > 0 {
                state.pause -= 1;
                return Ok(false);
            }
            state.making = true;
            state.loan.take()
        };
        let made = self.made(py, stream, before);
        let mut state = self.state.lock();
        state.making = false;
        // After an error the loan is gone; forwards that run remove what they see of it.
        let (loan, pending) = made?;
        state.looked_at = (!pending).then_some(filled);
        let Some(loan) = loan else { return Ok(false) };
        if loan.lease.is_recalled() || state.closed {
            drop(state);
            self.end(py, loan);
            return Ok(false);
        }
        state.loan = Some(loan);
        Ok(true)
    }

    /// A loan of all that is resident, and whether more is on its way.
    fn made(
        &self,
        py: Python<'_>,
        stream: StreamHandle,
        before: Option<Loan>,
    ) -> PyResult<(Option<Loan>, bool)> {
        let attachment = &self.shared.attachment;
        let (tensors, lease, served) = match before {
            Some(loan) => (Some(loan.tensors), loan.lease, loan.served),
            None => {
                let token = self.token;
                let Some(lease) = attachment.lend(Box::new(move || recalls::post(token))) else {
                    return Ok((None, true));
                };
                (None, lease, 0)
            }
        };
        // Streams stay known as long as the model does.
        let streams_known = self.state.lock().streams_known;
        if let Some(streams) = self.streams.as_ref().filter(|_| !streams_known) {
            for handle in streams.bind(py).call0()?.extract::<Vec<u64>>()? {
                // SAFETY: a stream of torch's on the model's device; torch destroys none of its streams.
                lease.know_stream(unsafe { StreamHandle::from_raw(handle) });
            }
            self.state.lock().streams_known = true;
        }
        let (mut pending, mut any, mut whole) = (false, false, false);
        let mut all = Vec::with_capacity(self.weights.len());
        for (index, (weight, stand_in)) in self.weights.iter().enumerate() {
            if let Some(shadow) = tensors.as_ref().and_then(|tensors| tensors[index].as_ref()) {
                any |= shadow.version.is_some();
                all.push(Some(Shadow { tensor: shadow.tensor.clone_ref(py), version: shadow.version }));
                continue;
            }
            let weight = weight.get();
            if attachment.is_small(weight.index).map_err(raised)? {
                all.push(Some(Shadow { tensor: stand_in.clone_ref(py), version: None }));
                continue;
            }
            whole = true;
            let view = match lease.view(attachment, weight.index, stream).map_err(raised)? {
                Lending::Lent(view) => view,
                Lending::Pending => {
                    pending = true;
                    all.push(None);
                    continue;
                }
                Lending::Absent => {
                    all.push(None);
                    continue;
                }
            };
            let plain = weight.viewed(weight.capsule_kept_by(py, view)?)?;
            let tensor = self.make.bind(py).call1((plain, stand_in))?;
            any = true;
            all.push(Some(Shadow { version: Some(version(&tensor)?), tensor: tensor.unbind() }));
        }
        // Small weights are always there; they alone are worth it where there are no others.
        Ok(((any || !whole).then(|| Loan { tensors: Arc::new(all), lease, served }), pending))
    }

    /// Whether something watches that must see stand-ins.
    fn is_watched(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.watchers.dispatch_modes.bind(py).call0()?.is_truthy()?
            || !self.watchers.tracing_state.bind(py).call0()?.is_none())
    }

    /// Puts plain tensors where stand-ins are looked for. Whatever else stands there stays.
    fn install(&self, py: Python<'_>, places: &[usize], tensors: &Tensors) -> PyResult<()> {
        for place in places.iter().map(|&place| &self.places[place]) {
            let Some(shadow) = &tensors[place.weight] else { continue };
            let (dict, name) = (place.dict.bind(py), place.name.bind(py));
            let stands = place.parameters.bind(py).get_item(name)?;
            if stands.is_some_and(|stands| stands.is(&self.weights[place.weight].1))
                && !dict.contains(name)?
            {
                dict.set_item(name, &shadow.tensor)?;
            }
        }
        Ok(())
    }

    /// Removes what [`install`](Shadows::install) put there, as far as it still stands there.
    fn remove(&self, py: Python<'_>, places: impl Iterator<Item = usize>, tensors: &Tensors) {
        for place in places.map(|place| &self.places[place]) {
            let Some(shadow) = &tensors[place.weight] else { continue };
            let (dict, name) = (place.dict.bind(py), place.name.bind(py));
            if let Ok(Some(stands)) = dict.get_item(name)
                && stands.is(&shadow.tensor)
            {
                // It is there, under a plain string.
                dict.del_item(name).ok();
            }
        }
    }

    /// Which weights were written to, by torch's count.
    fn written(&self, py: Python<'_>, tensors: &Tensors) -> Vec<usize> {
        (0..self.weights.len()).filter(|&weight| is_written(py, tensors[weight].as_ref())).collect()
    }
}

/// The part of a model's shadows that one module's forward sees.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Scope {
    shadows: Py<Shadows>,
    number: usize,
    places: Vec<usize>,
    parent: Option<Py<Scope>>,
    /// Forwards that run now.
    users: AtomicUsize,
}

#[pymethods]
impl Scope {
    /// Calls a forward with plain tensors in place of stand-ins, where everything is resident.
    #[pyo3(signature = (original, /, *args, **kwargs))]
    fn run<'py>(
        &self,
        original: &Bound<'py, PyAny>,
        args: &Bound<'py, PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = original.py();
        let _running = Running::new(py);
        if self.parent.as_ref().is_some_and(|parent| parent.get().users.load(Ordering::Acquire) > 0) {
            return original.call(args, kwargs);
        }
        let operation = self.enter(py);
        let result = match &operation {
            Ok(_) => original.call(args, kwargs),
            Err(error) => Err(error.clone_ref(py)),
        };
        let exit = self.exit(py);
        let result = result?;
        exit?;
        Ok(result)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.shadows)?;
        if let Some(parent) = &self.parent {
            visit.call(parent)?;
        }
        Ok(())
    }
}

impl Scope {
    /// Begins a forward; [`exit`](Scope::exit) must follow, also after an error.
    fn enter(&self, py: Python<'_>) -> PyResult<Option<Operation>> {
        let is_first = self.users.fetch_add(1, Ordering::AcqRel) == 0;
        let shadows = self.shadows.get();
        if shadows.is_watched(py)? {
            return Ok(None);
        }
        let stream = shadows.shared.current_stream(py)?;
        let in_transform = !shadows.watchers.transforms.bind(py).call0()?.is_none();
        if !in_transform && !shadows.lend(py, stream)? {
            return Ok(None);
        }
        let tensors = {
            let mut state = shadows.state.lock();
            let Some(loan) = state.loan.as_mut() else { return Ok(None) };
            loan.served = loan.served.saturating_add(1);
            loan.lease.know_stream(stream);
            loan.lease.note_use();
            let tensors = Arc::clone(&loan.tensors);
            if is_first {
                state.installed.push((self.number, Arc::clone(&tensors)));
            }
            tensors
        };
        // From here on other threads that need its pages wait for this forward, which may hold some.
        let operation = shadows.shared.attachment.engine().operation();
        if is_first {
            shadows.install(py, &self.places, &tensors)?;
        }
        Ok(Some(operation))
    }

    /// Ends a forward.
    fn exit(&self, py: Python<'_>) -> PyResult<()> {
        let is_last = self.users.fetch_sub(1, Ordering::AcqRel) == 1;
        let shadows = self.shadows.get();
        let (installed, mut names) = {
            let mut state = shadows.state.lock();
            let own = state.installed.iter().position(|(number, _)| is_last && *number == self.number);
            (own.map(|own| state.installed.swap_remove(own).1), std::mem::take(&mut state.written))
        };
        if let Some(tensors) = installed {
            shadows.remove(py, self.places.iter().copied(), &tensors);
            let mut weights = self.places.iter().map(|&place| shadows.places[place].weight);
            let written = weights.any(|weight| is_written(py, tensors[weight].as_ref()));
            drop(tensors);
            if written {
                shadows.give_back(py);
                names.append(&mut shadows.state.lock().written);
            }
        }
        if names.is_empty() { Ok(()) } else { Err(written_error(&names)) }
    }
}

/// Whether torch counted a write to a lent tensor. Without a count there is none.
fn is_written(py: Python<'_>, shadow: Option<&Shadow>) -> bool {
    let Some(Shadow { tensor, version: Some(before) }) = shadow else { return false };
    version(tensor.bind(py)).is_ok_and(|now| now != *before)
}

fn version(tensor: &Bound<'_, PyAny>) -> PyResult<u64> {
    tensor.getattr(intern!(tensor.py(), "_version"))?.extract()
}

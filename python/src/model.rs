//! `Model` and `Weight`: an attached model and one of its weights.

use std::sync::{Arc, OnceLock};

use forebay::device::StreamHandle;
use forebay::{Attachment, Bytes, PageState};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::dlpack::capsule;
use crate::engine::vbar_stats;
use crate::errors::raised;
use crate::patches::{self, PyPatch};
use crate::run::with_interrupts;
use crate::transfer::on_device;

/// What all weights of a model share.
pub(crate) struct Shared {
    pub(crate) attachment: Attachment,
    /// Gives the current stream's handle; unset where work runs on the calling thread.
    stream: OnceLock<Py<PyAny>>,
}

impl Shared {
    /// The stream that the calling thread enqueues its work on.
    pub(crate) fn current_stream(&self, py: Python<'_>) -> PyResult<StreamHandle> {
        match self.stream.get() {
            None => Ok(StreamHandle::DEFAULT),
            // SAFETY: torch's current stream on the model's device; torch destroys none of its streams.
            Some(source) => Ok(unsafe { StreamHandle::from_raw(source.bind(py).call0()?.extract()?) }),
        }
    }
}

/// The weights of one model on one device.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Model {
    pub(crate) shared: Arc<Shared>,
}

impl Model {
    pub(crate) fn new(attachment: Attachment) -> Self {
        Model { shared: Arc::new(Shared { attachment, stream: OnceLock::new() }) }
    }
}

#[pymethods]
impl Model {
    /// Sets the callable that gives the current stream's handle, once.
    fn set_stream_source(&self, source: Py<PyAny>) -> PyResult<()> {
        self.shared
            .stream
            .set(source)
            .map_err(|_| PyRuntimeError::new_err("the stream source is set already"))
    }

    /// The weight with this number, in the order attached.
    fn weight(&self, index: usize) -> PyResult<Weight> {
        self.shared.attachment.address(index).map_err(raised)?;
        Ok(Weight {
            shared: Arc::clone(&self.shared),
            index,
            plain: OnceLock::new(),
            viewer: OnceLock::new(),
        })
    }

    /// The model's name.
    #[getter]
    fn name(&self) -> &str {
        self.shared.attachment.name()
    }

    /// Detaches the model: its memory leaves as soon as nothing uses it.
    fn detach(&self, py: Python<'_>) {
        py.detach(|| self.shared.attachment.detach());
    }

    /// Detaches the model and keeps its memory until others need it.
    fn park(&self, py: Python<'_>) {
        py.detach(|| self.shared.attachment.park());
    }

    /// To the top of the priorities.
    fn prioritize(&self, py: Python<'_>) {
        py.detach(|| self.shared.attachment.prioritize());
    }

    /// Reads weights ahead of a pass that is to begin.
    fn prefetch(&self, py: Python<'_>) {
        py.detach(|| self.shared.attachment.prefetch());
    }

    /// To the bottom of the priorities.
    fn deprioritize(&self, py: Python<'_>) {
        py.detach(|| self.shared.attachment.deprioritize());
    }

    /// Whether it has less memory than it would use.
    fn lacks_memory(&self, py: Python<'_>) -> bool {
        py.detach(|| self.shared.attachment.lacks_memory())
    }

    /// One character a page: ``R`` resident, ``S`` streamed and backed now, ``.`` absent.
    fn page_map(&self, py: Python<'_>) -> String {
        letters(&py.detach(|| self.shared.attachment.page_states()))
    }

    /// Gives weights, by number, new patches or none, of factors that are written by what is in the stream by now.
    fn change_patches(
        &self,
        py: Python<'_>,
        changes: Vec<(usize, Option<PyPatch>)>,
        stream: u64,
    ) -> PyResult<()> {
        // SAFETY: the package passes a stream of torch's on the model's device; torch destroys none of its streams.
        let stream = unsafe { StreamHandle::from_raw(stream) };
        patches::change(py, &self.shared, changes, stream)
    }

    /// What was moved and who waited.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.shared.attachment.stats());
        vbar_stats(py, &stats)
    }
}

/// One character a page: `R` resident, `S` streamed and backed now, `.` absent.
pub(crate) fn letters(states: &[PageState]) -> String {
    let letter = |state: &PageState| match state {
        PageState::Resident => 'R',
        PageState::Streamed => 'S',
        PageState::Absent => '.',
    };
    states.iter().map(letter).collect()
}

/// One weight, at one address until its model is detached.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Weight {
    pub(crate) shared: Arc<Shared>,
    pub(crate) index: usize,
    /// The plain tensor at the weight's address, to be read only while the weight is pinned.
    plain: OnceLock<Py<PyAny>>,
    /// Makes a tensor of the weight's dtype, shape and strides from a capsule of its bytes.
    viewer: OnceLock<Py<PyAny>>,
}

impl Weight {
    /// The plain tensor, made at the first call.
    pub(crate) fn plain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        if let Some(plain) = self.plain.get() {
            return Ok(plain.bind(py).clone());
        }
        let made = self.viewed(self.capsule_kept_by(py, Arc::clone(&self.shared))?)?;
        Ok(self.plain.get_or_init(|| made.unbind()).bind(py).clone())
    }

    /// A tensor over a capsule of this weight's bytes.
    pub(crate) fn viewed<'py>(&self, capsule: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let viewer =
            self.viewer.get().ok_or_else(|| PyRuntimeError::new_err("the weight has no viewer yet"))?;
        viewer.bind(capsule.py()).call1((capsule,))
    }

    /// A capsule of the weight's bytes that keeps `keep` alive.
    pub(crate) fn capsule_kept_by<'py, K: Send + 'static>(
        &self,
        py: Python<'py>,
        keep: K,
    ) -> PyResult<Bound<'py, PyAny>> {
        let attachment = &self.shared.attachment;
        let address = attachment.address(self.index).map_err(raised)?;
        let bytes = attachment.bytes(self.index).map_err(raised)?;
        capsule(py, attachment.engine().device(), address, bytes, Box::new(keep))
    }

    /// Gives the weight's pages up, with what was written to them. A page that somebody pins keeps it until it leaves.
    /// The weight's name, for the error.
    pub(crate) fn discarded(&self) -> &str {
        // The weight was found in a model, so it exists.
        self.shared.attachment.discard(self.index).ok();
        self.shared.attachment.weight_names()[self.index].as_str()
    }

    /// Whether `address` lies in the address range of this weight's model.
    pub(crate) fn owns(&self, address: u64) -> bool {
        let (base, size) = self.shared.attachment.range();
        (base.get()..base.get() + size.get()).contains(&address)
    }
}

#[pymethods]
impl Weight {
    /// Sets the callable that makes this weight's tensor from a capsule, once. The plain tensor is made now: a first use
    /// may come inside a transform or trace, which would make its own kind of tensor. A small weight has one of its own.
    fn set_viewer(&self, py: Python<'_>, viewer: Py<PyAny>) -> PyResult<()> {
        self.viewer.set(viewer).map_err(|_| PyRuntimeError::new_err("the weight has a viewer already"))?;
        if self.is_small()? {
            return Ok(());
        }
        self.plain(py).map(drop)
    }

    /// A plain tensor over the weight that keeps it pinned for as long as its storage lives.
    fn view<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let stream = self.shared.current_stream(py)?;
        let view = with_interrupts(py, stream, |how| self.shared.attachment.view(self.index, how))?;
        self.viewed(self.capsule_kept_by(py, view)?)
    }

    /// The one plain tensor at the weight's address. There is memory behind it only while the weight is held: see ``hold``.
    #[getter]
    fn unpinned<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.plain(py)
    }

    /// Whether the weight is used as a whole now; if not, it is a table whose rows are to be looked up.
    fn is_kept(&self) -> PyResult<bool> {
        self.shared.attachment.is_kept(self.index).map_err(raised)
    }

    /// Whether the weight belongs to the always-resident region.
    #[getter]
    fn is_small(&self) -> PyResult<bool> {
        self.shared.attachment.is_small(self.index).map_err(raised)
    }

    /// Reads rows of ``row_bytes`` bytes from the weight's source to the memory at ``address``, in the order given.
    fn read_rows(&self, py: Python<'_>, row_bytes: u64, rows: Vec<u64>, address: u64) -> PyResult<()> {
        let len = row_bytes as usize * rows.len();
        // SAFETY: the package passes the address of a contiguous tensor of exactly these rows, which it holds.
        let out = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) };
        let attachment = &self.shared.attachment;
        py.detach(|| attachment.read_rows(self.index, Bytes::new(row_bytes), &rows, out)).map_err(raised)
    }

    /// Reads the weight's bytes, as they are stored, to memory of ``nbytes`` bytes on the model's device. Work that is enqueued
    /// in the stream afterwards finds them.
    fn read_to_device(&self, py: Python<'_>, address: u64, nbytes: u64, stream: u64) -> PyResult<()> {
        let attachment = &self.shared.attachment;
        let stored = attachment.source(self.index).map_err(raised)?.len().get();
        if stored != nbytes {
            return Err(PyValueError::new_err(format!("{nbytes} bytes take no weight of {stored}")));
        }
        // SAFETY: the package passes memory and streams of torch's on this device.
        let read = || unsafe { attachment.read_to_device(self.index, on_device(address, stream)) };
        py.detach(read).map_err(raised)
    }

    /// A number for each of the weight's pages, which changes whenever the page is filled: to be compared while it is held.
    #[getter]
    fn serials(&self) -> PyResult<Vec<u64>> {
        let serials = self.shared.attachment.serials(self.index).map_err(raised)?;
        Ok(serials.iter().map(|serial| serial.0).collect())
    }

    /// Whether all of the weight is there and stays between uses.
    #[getter]
    fn is_resident(&self) -> PyResult<bool> {
        self.shared.attachment.is_resident(self.index).map_err(raised)
    }

    /// Has the weight filled anew from its source, whatever was written to its memory. Waits for those who use it as it is.
    fn refill(&self, py: Python<'_>) -> PyResult<()> {
        let stream = self.shared.current_stream(py)?;
        with_interrupts(py, stream, |how| self.shared.attachment.refill(&[self.index], how))
    }

    /// Gives the weight's pages up, so that its bytes are read again at the next use.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.shared.attachment.discard(self.index)).map_err(raised)
    }

    /// The weight's name in its model.
    #[getter]
    fn name(&self) -> &str {
        &self.shared.attachment.weight_names()[self.index]
    }

    /// The weight's device address, the same until its model is detached.
    #[getter]
    fn address(&self) -> PyResult<u64> {
        self.shared.attachment.address(self.index).map(|address| address.get()).map_err(raised)
    }

    /// Where the weight's bytes come from, for people.
    #[getter]
    fn source(&self) -> PyResult<String> {
        self.shared.attachment.source(self.index).map(|source| source.describe()).map_err(raised)
    }
}

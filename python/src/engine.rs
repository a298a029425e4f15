//! `Engine`: the engine of one device.

use std::sync::{Arc, Weak};

use forebay::device::host::{HostConfig, HostDevice};
use forebay::device::{Device, DeviceAddr, DeviceId, Requantize, StreamHandle};
use forebay::store::{MemoryRange, ProcessMaps, Source};
use forebay::{
    Budget, Bytes, EngineConfig, LayoutOptions, PageState, RingConfig, Scaling, VbarStats, WeightKind,
    WeightSpec,
};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::ballast::{Ballast, Squeeze};
use crate::bytes::size;
use crate::errors::{raised, source};
use crate::model::{Model, letters};
use crate::patches::{PyConversion, PyEightBitSum, PyProduct, conversion};
use crate::reclaim::with_reclaim;
use crate::running::{begin_ending, wait_for_calls};
use crate::vbar::ExplicitVbar;

/// Host memory that a `host` engine may use unless told otherwise: this share of what is available at its start.
const HOST_SHARE: u64 = 4;

/// Keeps the weights of any number of models on one device, within a budget.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Engine {
    inner: Arc<forebay::Engine>,
}

impl Engine {
    pub(crate) fn inner(&self) -> &Arc<forebay::Engine> {
        &self.inner
    }
}

/// The engines of this process, to be shut down at its end.
static ENGINES: Mutex<Vec<Weak<forebay::Engine>>> = Mutex::new(Vec::new());

/// Ends the threads of all engines: at the end of a process, while interpreter and driver are still there. Later uses of
/// weights are errors. Calls that have begun and weights that are held are waited for, shortly.
#[pyfunction]
pub(crate) fn shut_down_engines(py: Python<'_>) {
    py.detach(|| {
        begin_ending();
        let engines = std::mem::take(&mut *ENGINES.lock());
        let engines: Vec<_> = engines.iter().filter_map(Weak::upgrade).collect();
        engines.iter().for_each(|engine| engine.shut_down());
        wait_for_calls(|| engines.iter().any(|engine| engine.operations() > 0));
    });
}

/// The engines of a device that live.
pub(crate) fn of_device(id: DeviceId) -> Vec<Arc<forebay::Engine>> {
    let engines = ENGINES.lock();
    engines.iter().filter_map(Weak::upgrade).filter(|engine| engine.device() == id).collect()
}

/// A weight to attach: name, address, bytes, what keeps the address alive, and whether it is a table.
type PyWeight = (String, u64, u64, Py<PyAny>, bool);

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (device, *, budget=None, headroom=None, readers=None, slots=None, chunk=None, registered=None, page_cache=None, poison=false, capacity=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python class")]
    fn new(
        py: Python<'_>,
        device: &str,
        budget: Option<&Bound<'_, PyAny>>,
        headroom: Option<&Bound<'_, PyAny>>,
        readers: Option<usize>,
        slots: Option<u32>,
        chunk: Option<&Bound<'_, PyAny>>,
        registered: Option<&Bound<'_, PyAny>>,
        page_cache: Option<&Bound<'_, PyAny>>,
        poison: bool,
        capacity: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let id: DeviceId = device
            .parse()
            .map_err(|error: forebay::device::ParseDeviceError| PyValueError::new_err(error.to_string()))?;
        let budget = chosen_budget(budget, headroom)?.unwrap_or_else(|| default_budget(id));
        let registered = registered.map(|value| size("registered", value)).transpose()?;
        let default = RingConfig::default();
        let chunk = chunk.map(|value| size("chunk", value)).transpose()?.unwrap_or(default.chunk);
        let ring = RingConfig { readers, slots: slots.unwrap_or(default.slots), chunk };
        let page_cache = page_cache.map(|value| size("page_cache", value)).transpose()?;
        let capacity = capacity.map(|value| size("capacity", value)).transpose()?;
        if capacity.is_some() && id != DeviceId::Host {
            return Err(PyValueError::new_err(format!("only the host device can be made smaller: {id}")));
        }
        let config = EngineConfig { budget, ring, registered, page_cache };
        py.detach(|| {
            let device: Arc<dyn Device> = match id {
                DeviceId::Host => {
                    // What is free must mean something to those who ask for room.
                    let capacity = capacity.unwrap_or_else(|| available_memory().max(Bytes::gib(1)));
                    let config = HostConfig { capacity, poison, ..HostConfig::default() };
                    Arc::new(HostDevice::new(config).map_err(crate::errors::device)?)
                }
                DeviceId::Cuda(_) => forebay::device::open(id).map_err(crate::errors::device)?,
            };
            let inner = forebay::Engine::new(device, config).map_err(raised)?;
            let mut engines = ENGINES.lock();
            engines.retain(|engine| engine.strong_count() > 0);
            engines.push(Arc::downgrade(&inner));
            drop(engines);
            Ok(Engine { inner })
        })
    }

    /// The device's name: ``host`` or ``cuda:N``.
    #[getter]
    fn device(&self) -> String {
        self.inner.device().to_string()
    }

    /// Bytes that weights may take at this moment.
    #[getter]
    fn budget(&self) -> u64 {
        self.inner.budget().1.get()
    }

    /// Bytes that are kept free for everyone else; None where the budget is fixed.
    #[getter]
    fn headroom(&self) -> Option<u64> {
        match self.inner.budget().0 {
            Budget::Fixed(_) => None,
            Budget::Headroom(bytes) => Some(bytes.get()),
        }
    }

    /// Sets the budget: ``budget`` bytes, or everything free but for ``headroom`` bytes.
    #[pyo3(signature = (*, budget=None, headroom=None))]
    fn set_budget(
        &self,
        py: Python<'_>,
        budget: Option<&Bound<'_, PyAny>>,
        headroom: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let budget = chosen_budget(budget, headroom)?.unwrap_or_else(|| default_budget(self.inner.device()));
        py.detach(|| self.inner.set_budget(budget)).map_err(raised)
    }

    /// Adds a product to rows of elements at an address, in a stream: what it is added to begins with its first row.
    fn add_product(
        &self,
        py: Python<'_>,
        address: u64,
        element: &str,
        columns: u32,
        product: PyProduct,
        stream: u64,
    ) -> PyResult<()> {
        let (element, product) =
            (crate::patches::element(element)?, crate::patches::product(product, columns)?);
        let at = DeviceAddr::new(address);
        // SAFETY: the package passes a stream of torch's on this device.
        let stream = unsafe { StreamHandle::from_raw(stream) };
        // SAFETY: likewise memory.
        py.detach(|| unsafe { self.inner.add_product(at, element, &product, stream) }).map_err(raised)
    }

    /// Computes a weight of eight-bit elements anew at an address, behind what is in a stream: the sum, rounded up or down by
    /// random bytes as torch draws them with ``threads`` threads. With ``scaling`` it first raises the float32 at the first address to
    /// the largest magnitude of the sum before that is multiplied with its last number, looks up the nearest half's row in the
    /// table of 32768 x 2 float32 at the second, and puts the two at the third.
    #[expect(clippy::too_many_arguments)]
    #[pyo3(signature = (address, sum, seed, threads, stream, scaling=None))]
    fn requantize(
        &self,
        py: Python<'_>,
        address: u64,
        sum: &PyEightBitSum,
        seed: u64,
        threads: u64,
        stream: u64,
        scaling: Option<(u64, u64, u64)>,
    ) -> PyResult<()> {
        let scaling = scaling.map(|(largest, table, to)| {
            let [largest, table, to] = [largest, table, to].map(DeviceAddr::new);
            Scaling { largest, table, to }
        });
        let to = DeviceAddr::new(address);
        let work = Requantize { sum: sum.0, to, random: to, seed, threads };
        // SAFETY: the package passes a stream of torch's on this device.
        let stream = unsafe { StreamHandle::from_raw(stream) };
        // SAFETY: likewise memory.
        py.detach(|| unsafe { self.inner.requantize(&work, scaling.as_ref(), stream) }).map_err(raised)
    }

    /// Sets how many bytes of the page cache may be registered with the device; ``None``: what is free.
    #[pyo3(signature = (nbytes=None))]
    fn set_registered(&self, py: Python<'_>, nbytes: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let limit = nbytes.map(|value| size("nbytes", value)).transpose()?;
        py.detach(|| self.inner.set_registered(limit));
        Ok(())
    }

    /// Lets go of all parked models; returns how many there were.
    fn clear_parked(&self, py: Python<'_>) -> usize {
        py.detach(|| self.inner.clear_parked())
    }

    /// Gives device memory back, lowest priority first; returns how many bytes.
    fn make_room(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<u64> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.make_room(bytes)).map(Bytes::get).map_err(raised)
    }

    /// Free and total memory of the device.
    fn memory(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        let memory = py.detach(|| self.inner.memory()).map_err(raised)?;
        Ok((memory.free.get(), memory.total.get()))
    }

    /// Takes device memory as another program would.
    fn ballast(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<Ballast> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.ballast(bytes)).map(Ballast::new).map_err(raised)
    }

    /// Lets weights take as little memory as can be, until the result is closed.
    fn squeeze(&self, py: Python<'_>) -> PyResult<Squeeze> {
        py.detach(|| self.inner.squeeze()).map(Squeeze::new).map_err(raised)
    }

    /// Forgets what was read ahead of `read_to_device`.
    fn end_read_ahead(&self, py: Python<'_>) {
        py.detach(|| self.inner.end_read_ahead());
    }

    /// Gives back what is registered of a file for `read_to_device`, told by its device and inode; without them of any file.
    #[pyo3(signature = (file=None))]
    fn forget_file(&self, py: Python<'_>, file: Option<(u64, u64)>) {
        py.detach(|| self.inner.forget_file(file));
    }

    /// Whether page cache is registered with the device, as far as memory is free.
    #[getter]
    fn registers(&self) -> bool {
        self.inner.registers()
    }

    /// Waits until everything decided so far is done.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.inner.settle()).map_err(raised)
    }

    /// Attaches weights. Where a weight's bytes are an unmodified part of a mapped file they are read from the file.
    #[pyo3(signature = (name, weights, *, page_size=None, small=None, conversions=Vec::new(), whole=false))]
    #[allow(clippy::too_many_arguments, reason = "by name in Python")]
    fn attach(
        &self,
        py: Python<'_>,
        name: &str,
        weights: Vec<PyWeight>,
        page_size: Option<&Bound<'_, PyAny>>,
        small: Option<&Bound<'_, PyAny>>,
        conversions: Vec<Option<PyConversion>>,
        whole: bool,
    ) -> PyResult<Model> {
        let default = LayoutOptions::default();
        let page_size = page_size.map(|value| size("page_size", value)).transpose()?;
        let small = small.map(|value| size("small", value)).transpose()?.unwrap_or(default.small);
        let conversions = conversions.into_iter().map(|given| given.map(conversion).transpose());
        let conversions = conversions.collect::<PyResult<Vec<_>>>()?;
        let specs: Vec<WeightSpec> = py.detach(|| {
            let maps = ProcessMaps::snapshot().map_err(source)?;
            Ok::<_, PyErr>(weights.into_iter().map(|weight| spec(&maps, weight)).collect())
        })?;
        let options = LayoutOptions { page_size, small, whole };
        let attachment = with_reclaim(py, &self.inner, || {
            py.detach(|| self.inner.attach_converting(name, specs.clone(), conversions.clone(), options))
                .map_err(raised)
        })?;
        Ok(Model::new(attachment))
    }

    /// Reserves an address range whose pages the caller faults in and fills.
    fn vbar(&self, py: Python<'_>, name: &str, nbytes: &Bound<'_, PyAny>) -> PyResult<ExplicitVbar> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.vbar(name, bytes)).map(ExplicitVbar::new).map_err(raised)
    }

    /// What is where and what was moved, as plain data.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        let dict = PyDict::new(py);
        dict.set_item("device", stats.device.to_string())?;
        dict.set_item("device_name", stats.device_name)?;
        dict.set_item("budget", stats.budget.get())?;
        dict.set_item("held", stats.held.get())?;
        dict.set_item("free_frames", stats.free_frames.get())?;
        dict.set_item("operations", stats.operations)?;
        dict.set_item("views", stats.views)?;
        dict.set_item("reserved", stats.reserved.get())?;
        dict.set_item("pinned_host", stats.ring.get())?;
        dict.set_item("registered", stats.registered.get())?;
        let models: Vec<_> = stats.vbars.iter().map(|vbar| vbar_stats(py, vbar)).collect::<PyResult<_>>()?;
        dict.set_item("models", PyList::new(py, models)?)?;
        Ok(dict)
    }

    /// (name, page map) of each model and range, most recently used first; the maps are as ``Model.page_map``'s.
    fn page_maps(&self, py: Python<'_>) -> Vec<(String, String)> {
        let stats = py.detach(|| self.inner.stats());
        stats.vbars.into_iter().map(|vbar| (vbar.name, letters(&vbar.pages))).collect()
    }

    /// Begins to record what the engine does when.
    fn start_recording(&self) {
        self.inner.start_recording();
    }

    /// Ends the recording: a list of (activity, page, start in seconds, length in seconds).
    fn stop_recording(&self, py: Python<'_>) -> Vec<(String, u32, f64, f64)> {
        let moments = py.detach(|| self.inner.stop_recording());
        let seconds = |time: std::time::Duration| time.as_secs_f64();
        let plain = moments.iter().map(|moment| {
            (
                format!("{:?}", moment.activity).to_lowercase(),
                moment.page,
                seconds(moment.start),
                seconds(moment.length),
            )
        });
        plain.collect()
    }

    /// The same as a table.
    fn summary(&self, py: Python<'_>) -> String {
        py.detach(|| self.inner.stats()).to_string()
    }

    fn __repr__(&self) -> String {
        let (budget, bytes) = self.inner.budget();
        let budget = match budget {
            Budget::Fixed(_) => format!("budget={bytes}"),
            Budget::Headroom(headroom) => format!("headroom={headroom}"),
        };
        format!("<forebay.Engine {} {budget}>", self.inner.device())
    }
}

/// One model's numbers as a dict.
pub(crate) fn vbar_stats<'py>(py: Python<'py>, stats: &VbarStats) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &stats.name)?;
    dict.set_item("bytes", stats.bytes.get())?;
    dict.set_item("page_size", stats.page_size.get())?;
    dict.set_item("pages", stats.pages.len())?;
    dict.set_item("watermark", stats.watermark)?;
    dict.set_item("resident", stats.in_state(PageState::Resident).get())?;
    dict.set_item("streamed", stats.in_state(PageState::Streamed).get())?;
    dict.set_item("absent", stats.in_state(PageState::Absent).get())?;
    dict.set_item("pinned", stats.pinned.get())?;
    dict.set_item("lent", stats.lent)?;
    dict.set_item("filled", stats.filled.get())?;
    dict.set_item("direct", stats.direct.get())?;
    dict.set_item("past_cache", stats.past_cache.get())?;
    dict.set_item("cached", stats.cached.as_ref().map(|ranks| (ranks.start, ranks.end)))?;
    dict.set_item("parked", stats.parked)?;
    dict.set_item("filled_pages", stats.filled_pages)?;
    dict.set_item("looked_up", stats.looked_up.get())?;
    dict.set_item("waits", stats.waits)?;
    dict.set_item("wait_s", stats.wait_time.as_secs_f64())?;
    dict.set_item("longest_wait_s", stats.longest_wait.as_secs_f64())?;
    dict.set_item("mispredicted", stats.mispredicted)?;
    Ok(dict)
}

fn spec(maps: &ProcessMaps, (name, address, nbytes, owner, table): PyWeight) -> WeightSpec {
    let (address, len) = (address as usize, nbytes as usize);
    let source = match maps.source_of(address, len) {
        Some((file, offset)) => {
            // SAFETY: just found. The tensor is kept for a detach, and nobody writes to weights that are attached.
            unsafe { maps.drop_pages(address, len) };
            Source::file(&file, offset, Bytes::new(nbytes))
        }
        // SAFETY: `owner` is the tensor whose storage this is; it keeps the memory for as long as the source lives.
        None => Source::memory(Arc::new(unsafe { MemoryRange::new(address as *const u8, len, owner) })),
    };
    WeightSpec { name, source, kind: if table { WeightKind::Table } else { WeightKind::Whole } }
}

fn chosen_budget(
    budget: Option<&Bound<'_, PyAny>>,
    headroom: Option<&Bound<'_, PyAny>>,
) -> PyResult<Option<Budget>> {
    match (budget, headroom) {
        (Some(_), Some(_)) => {
            Err(PyValueError::new_err("budget and headroom exclude each other; give one of them, or neither"))
        }
        (Some(budget), None) => Ok(Some(Budget::Fixed(size("budget", budget)?))),
        (None, Some(headroom)) => Ok(Some(Budget::Headroom(size("headroom", headroom)?))),
        (None, None) => Ok(None),
    }
}

/// On the host the weights are in the page cache anyway, so a second copy of them takes a share of what is available.
fn default_budget(id: DeviceId) -> Budget {
    match id {
        DeviceId::Cuda(_) => EngineConfig::default().budget,
        DeviceId::Host => {
            Budget::Fixed(Bytes::new(available_memory().get() / HOST_SHARE).max(Bytes::mib(256)))
        }
    }
}

fn available_memory() -> Bytes {
    forebay::measure::available_memory().unwrap_or(Bytes::gib(1))
}

//! `HostBuffer`: host memory that grows at one address.

use std::sync::Arc;

use forebay::device::{DeviceAddr, DeviceId};
use forebay::{Growth, HostBufferOptions};
use pyo3::prelude::*;

use crate::bytes::size;
use crate::dlpack::capsule;
use crate::engine::Engine;
use crate::errors::raised;
use crate::transfer::{file_part, on_device};

/// Host memory that grows at one address, and that copy engines read where it is.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct HostBuffer {
    inner: Arc<forebay::HostBuffer>,
}

#[pymethods]
impl HostBuffer {
    /// Reserves address space; ``limit`` 0: as much as the machine has memory. Without an engine nothing is registered.
    #[new]
    #[pyo3(signature = (engine, *, limit=None, ahead=None))]
    fn new(
        engine: Option<&Bound<'_, Engine>>,
        limit: Option<&Bound<'_, PyAny>>,
        ahead: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let options = HostBufferOptions {
            limit: limit.map(|value| size("limit", value)).transpose()?.unwrap_or_default(),
            ahead: ahead.map(|value| size("ahead", value)).transpose()?.unwrap_or_default(),
        };
        let engine = engine.map(|engine| Arc::clone(engine.get().inner()));
        let inner = Arc::new(forebay::HostBuffer::new(engine.as_ref(), options).map_err(raised)?);
        Ok(HostBuffer { inner })
    }

    /// Grows; returns the buffer's address.
    #[pyo3(signature = (nbytes, *, register, may_move=false))]
    fn extend(
        &self,
        py: Python<'_>,
        nbytes: &Bound<'_, PyAny>,
        register: bool,
        may_move: bool,
    ) -> PyResult<u64> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.extend(bytes, Growth { register, may_move })).map_err(raised)?;
        Ok(self.address())
    }

    /// Registers a part with the engine's device.
    fn register(&self, py: Python<'_>, offset: &Bound<'_, PyAny>, nbytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let (offset, bytes) = (size("offset", offset)?, size("nbytes", nbytes)?);
        py.detach(|| self.inner.register(offset, bytes)).map_err(raised)
    }

    /// Undoes it, once no copy needs it any more.
    fn unregister(&self, py: Python<'_>, offset: &Bound<'_, PyAny>) -> PyResult<()> {
        let offset = size("offset", offset)?;
        py.detach(|| self.inner.unregister(offset)).map_err(raised)
    }

    /// Shrinks; what was registered there is given up unless ``unregister`` is false.
    fn truncate(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>, unregister: bool) -> PyResult<()> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.truncate(bytes, unregister)).map_err(raised)
    }

    /// Reads a part of an open file into the buffer, and with an engine also to an address on its device, in a stream.
    #[pyo3(signature = (descriptor, file_offset, nbytes, at, engine=None, address=0, stream=0))]
    #[expect(clippy::too_many_arguments, reason = "a part of a file, a place in memory and one on a device")]
    fn read(
        &self,
        py: Python<'_>,
        descriptor: i32,
        file_offset: u64,
        nbytes: u64,
        at: u64,
        engine: Option<&Bound<'_, Engine>>,
        address: u64,
        stream: u64,
    ) -> PyResult<()> {
        let part = file_part(descriptor, file_offset, nbytes)?;
        let at = forebay::Bytes::new(at);
        let engine = engine.map(|engine| Arc::clone(engine.get().inner()));
        let to = engine.as_ref().map(|engine| (&**engine, on_device(address, stream)));
        py.detach(|| {
            // SAFETY: the caller asks for these bytes there; the package passes memory and streams of torch's.
            unsafe { self.inner.read(&part, at, to) }
        })
        .map_err(raised)
    }

    /// A DLPack capsule of the whole buffer as uint8, in host memory.
    fn capsule<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let range = self.inner.range();
        let (address, bytes) = (DeviceAddr::new(range.base().expose_provenance() as u64), range.len());
        capsule(py, DeviceId::Host, address, bytes, Box::new(range))
    }

    /// The first address.
    #[getter]
    fn address(&self) -> u64 {
        self.inner.range().base().expose_provenance() as u64
    }

    /// How many bytes there are.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.len().get()
    }

    /// Bytes that the buffer itself has registered.
    #[getter]
    fn registered(&self) -> u64 {
        self.inner.registered().get()
    }
}

//! `ExplicitVbar`: an address range that the caller fills.

use std::sync::Arc;

use forebay::device::{DeviceAddr, StreamHandle};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::bytes::size;
use crate::dlpack::capsule;
use crate::engine::vbar_stats;
use crate::errors::raised;
use crate::run::with_interrupts;

/// A reserved address range; pages are faulted in, filled by the caller, and lost under pressure.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct ExplicitVbar {
    inner: Arc<forebay::ExplicitVbar>,
}

impl ExplicitVbar {
    pub(crate) fn new(vbar: forebay::ExplicitVbar) -> Self {
        ExplicitVbar { inner: Arc::new(vbar) }
    }
}

fn torch_stream(handle: u64) -> StreamHandle {
    // SAFETY: the package passes torch's current stream on the VBAR's device; torch destroys none of its streams.
    unsafe { StreamHandle::from_raw(handle) }
}

#[pymethods]
impl ExplicitVbar {
    /// The next ``nbytes`` of the range, aligned to 512; returns the address.
    fn alloc(&self, nbytes: &Bound<'_, PyAny>) -> PyResult<u64> {
        let bytes = size("nbytes", nbytes)?;
        self.inner.alloc(bytes).map(DeviceAddr::get).map_err(raised)
    }

    /// Backs and pins a range; its signature, or None above the watermark.
    fn fault(&self, py: Python<'_>, address: u64, nbytes: u64, stream: u64) -> PyResult<Option<Vec<u64>>> {
        let (address, bytes) = (DeviceAddr::new(address), forebay::Bytes::new(nbytes));
        let signature =
            with_interrupts(py, torch_stream(stream), |how| self.inner.fault(address, bytes, how))?;
        Ok(signature.map(|signature| signature.serials().iter().map(|serial| serial.0).collect()))
    }

    /// Takes the pins of one fault back, behind what is in the stream.
    fn unpin(&self, py: Python<'_>, address: u64, nbytes: u64, stream: u64) -> PyResult<()> {
        let (address, bytes) = (DeviceAddr::new(address), forebay::Bytes::new(nbytes));
        py.detach(|| self.inner.unpin(address, bytes, torch_stream(stream))).map_err(raised)
    }

    /// Takes the pins of one fault back, behind what is in every stream that the range was told of.
    fn unpin_everywhere(&self, py: Python<'_>, address: u64, nbytes: u64) -> PyResult<()> {
        let (address, bytes) = (DeviceAddr::new(address), forebay::Bytes::new(nbytes));
        py.detach(|| self.inner.unpin_everywhere(address, bytes)).map_err(raised)
    }

    /// Tells of streams that may use the pages.
    fn know(&self, streams: Vec<u64>) {
        self.inner.know(streams.into_iter().map(torch_stream));
    }

    /// Bytes of the pages that have memory.
    #[getter]
    fn held(&self, py: Python<'_>) -> u64 {
        py.detach(|| self.inner.held()).get()
    }

    /// A DLPack capsule of the range as uint8. There is memory behind it only while it is faulted in.
    fn capsule<'py>(&self, py: Python<'py>, address: u64, nbytes: u64) -> PyResult<Bound<'py, PyAny>> {
        self.inner.check(DeviceAddr::new(address), forebay::Bytes::new(nbytes)).map_err(raised)?;
        let device = self.inner.engine().device();
        let keep = Box::new(Arc::clone(&self.inner));
        capsule(py, device, DeviceAddr::new(address), forebay::Bytes::new(nbytes), keep)
    }

    /// To the top of the priorities, with the watermark fully open.
    fn prioritize(&self, py: Python<'_>) {
        py.detach(|| self.inner.prioritize());
    }

    /// As ``prioritize``, where the model whose weights these are is about to run: what is asked of files is asked anew.
    fn begin_run(&self, py: Python<'_>) {
        py.detach(|| self.inner.begin_run());
    }

    /// To the bottom of the priorities.
    fn deprioritize(&self, py: Python<'_>) {
        py.detach(|| self.inner.deprioritize());
    }

    /// Pages above ``nbytes`` leave, and faults there are refused until the next ``prioritize``.
    fn set_watermark(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.set_watermark(bytes));
        Ok(())
    }

    /// Pages below ``nbytes`` are not taken by pressure until this is 0 again.
    fn set_watermark_limit(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = size("nbytes", nbytes)?;
        py.detach(|| self.inner.set_watermark_limit(bytes));
        Ok(())
    }

    /// Gives up memory of this range, highest address first; returns how many bytes.
    fn free(&self, py: Python<'_>, nbytes: &Bound<'_, PyAny>) -> PyResult<u64> {
        let bytes = size("nbytes", nbytes)?;
        Ok(py.detach(|| self.inner.free(bytes)).get())
    }

    /// For each page (backed, pinned).
    fn residency(&self, py: Python<'_>) -> Vec<(bool, bool)> {
        py.detach(|| self.inner.residency())
    }

    /// How many pages are below the watermark.
    #[getter]
    fn watermark(&self, py: Python<'_>) -> u32 {
        py.detach(|| self.inner.watermark())
    }

    /// The first address.
    #[getter]
    fn base(&self) -> u64 {
        self.inner.base().get()
    }

    /// Bytes of the range.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.size().get()
    }

    /// Bytes handed out.
    #[getter]
    fn allocated(&self) -> u64 {
        self.inner.allocated().get()
    }

    /// What is resident.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = py.detach(|| self.inner.stats());
        vbar_stats(py, &stats)
    }
}

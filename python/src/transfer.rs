//! Bytes between open files and memory, as the application asks for them.

use std::os::fd::BorrowedFd;

use forebay::device::{DeviceAddr, DeviceId, StreamHandle};
use forebay::store::{MappedFile, SourceFile};
use forebay::{Bytes, FilePart, OnDevice, ReadBy};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::dlpack::capsule;
use crate::engine::Engine;
use crate::errors::{raised, source};

/// Reads a part of an open file to an address on the engine's device, in a stream. Whether the copy engine reads it by itself, from
/// the page cache.
#[pyfunction]
pub(crate) fn read_to_device(
    py: Python<'_>,
    engine: &Bound<'_, Engine>,
    descriptor: i32,
    file_offset: u64,
    nbytes: u64,
    address: u64,
    stream: u64,
) -> PyResult<bool> {
    let part = file_part(descriptor, file_offset, nbytes)?;
    let engine = engine.get().inner();
    // SAFETY: the package passes memory and streams of torch's on this device.
    let read = py.detach(|| unsafe { engine.read_to_device(&part, on_device(address, stream)) });
    read.map(|by| by == ReadBy::CopyEngine).map_err(raised)
}

/// Writes memory on the engine's device to a part of an open file, behind what is in the stream.
#[pyfunction]
pub(crate) fn write_from_device(
    py: Python<'_>,
    engine: &Bound<'_, Engine>,
    descriptor: i32,
    file_offset: u64,
    nbytes: u64,
    address: u64,
    stream: u64,
) -> PyResult<()> {
    let part = file_part(descriptor, file_offset, nbytes)?;
    let engine = engine.get().inner();
    // SAFETY: as in `read_to_device`.
    py.detach(|| unsafe { engine.write_from_device(&part, on_device(address, stream)) }).map_err(raised)
}

/// Writes host memory to a part of an open file.
#[pyfunction]
pub(crate) fn write_from_host(
    py: Python<'_>,
    descriptor: i32,
    file_offset: u64,
    nbytes: u64,
    address: u64,
) -> PyResult<()> {
    let part = file_part(descriptor, file_offset, nbytes)?;
    if address == 0 {
        return Err(PyValueError::new_err("an address of host memory is not 0"));
    }
    // SAFETY: the caller says that the memory is there, and writes nothing to it meanwhile.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, part.bytes.as_usize()) };
    py.detach(|| part.file.write_all_at(part.offset, bytes)).map_err(source)
}

/// A DLPack capsule of memory that somebody else keeps, as uint8.
#[pyfunction]
pub(crate) fn foreign_capsule<'py>(
    py: Python<'py>,
    device: &str,
    address: u64,
    nbytes: u64,
) -> PyResult<Bound<'py, PyAny>> {
    let device: DeviceId = device
        .parse()
        .map_err(|error: forebay::device::ParseDeviceError| PyValueError::new_err(error.to_string()))?;
    capsule(py, device, DeviceAddr::new(address), Bytes::new(nbytes), Box::new(()))
}

/// A file mapped read-only: its pages are the page cache's own.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct FileMapping {
    map: MappedFile,
}

#[pymethods]
impl FileMapping {
    #[new]
    fn new(py: Python<'_>, path: std::path::PathBuf) -> PyResult<Self> {
        py.detach(|| {
            let file = SourceFile::open(path).map_err(source)?;
            Ok(FileMapping { map: MappedFile::map(&file).map_err(source)? })
        })
    }

    /// Where the file's first byte is.
    #[getter]
    fn address(&self) -> u64 {
        self.map.as_ptr().expose_provenance() as u64
    }

    /// How many bytes are mapped.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.map.len().get()
    }

    /// The descriptor of the open file, valid as long as this object.
    fn fileno(&self) -> i32 {
        use std::os::fd::{AsFd, AsRawFd};
        self.map.file().as_fd().as_raw_fd()
    }

    /// Takes the mapping's pages out of this process's memory; they stay in the page cache.
    fn drop_pages(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.map.drop_pages()).map_err(source)
    }
}

pub(crate) fn file_part(descriptor: i32, offset: u64, bytes: u64) -> PyResult<FilePart> {
    if descriptor < 0 {
        return Err(PyValueError::new_err(format!(
            "a descriptor of an open file is not negative: {descriptor}"
        )));
    }
    // SAFETY: the caller passes a descriptor that stays open during the call; one that is not open is refused by the system.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    let own = borrowed.try_clone_to_owned().map_err(PyOSError::new_err)?;
    let file = SourceFile::from_open(own.into(), format!("descriptor {descriptor}")).map_err(source)?;
    Ok(FilePart { file, offset, bytes: Bytes::new(bytes) })
}

pub(crate) fn on_device(address: u64, stream: u64) -> OnDevice {
    // SAFETY: the package passes streams of torch's, which it destroys none of.
    let stream = unsafe { StreamHandle::from_raw(stream) };
    OnDevice { addr: DeviceAddr::new(address), stream }
}

//! `Checkpoint`: safetensors files as memory that nobody copied.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use forebay::device::{DeviceAddr, DeviceId};
use forebay::store::{MappedFile, SourceFile};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

use crate::dlpack::capsule;
use crate::errors::source;

/// A checkpoint: one safetensors file, or several with an index. Its files are mapped, read-only.
#[pyclass(frozen, module = "forebay._forebay")]
pub(crate) struct Checkpoint {
    inner: forebay::store::Checkpoint,
    maps: HashMap<(u64, u64), Arc<MappedFile>>,
}

#[pymethods]
impl Checkpoint {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| {
            let inner = forebay::store::Checkpoint::open(path).map_err(source)?;
            let maps = inner.files().iter().map(|file| Ok((key(file), Arc::new(MappedFile::map(file)?))));
            let maps = maps.collect::<forebay::store::Result<_>>().map_err(source)?;
            Ok(Checkpoint { inner, maps })
        })
    }

    /// (name, dtype, shape, bytes) of each tensor, in file order.
    fn entries(&self) -> Vec<(String, String, Vec<u64>, u64)> {
        let entry = |entry: &forebay::store::TensorEntry| {
            (entry.name.clone(), entry.dtype.name().to_owned(), entry.shape.clone(), entry.bytes.get())
        };
        self.inner.tensors().iter().map(entry).collect()
    }

    /// A DLPack capsule of a tensor's bytes as uint8, in host memory.
    fn capsule<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let entry = self.inner.get(name).ok_or_else(|| PyKeyError::new_err(name.to_owned()))?;
        let map = self.maps.get(&key(&entry.file)).ok_or_else(|| PyKeyError::new_err(name.to_owned()))?;
        let address = map.ptr_at(entry.offset, entry.bytes).map_err(source)?;
        capsule(py, DeviceId::Host, DeviceAddr::new(address as u64), entry.bytes, Box::new(Arc::clone(map)))
    }

    /// Bytes of all tensors.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.inner.total_bytes().get()
    }
}

fn key(file: &SourceFile) -> (u64, u64) {
    file.stamp().file()
}

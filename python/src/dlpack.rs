//! Device memory as DLPack capsules, the exchange format torch imports without asking the driver.
//!
//! Layouts are those of `dlpack.h`, version 0.8 (the unversioned `DLManagedTensor`, which every torch takes).

use std::any::Any;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use forebay::Bytes;
use forebay::device::{DeviceAddr, DeviceId};
use pyo3::ffi;
use pyo3::prelude::*;

const UNUSED: &CStr = c"dltensor";

#[repr(C)]
struct DlDevice {
    kind: c_int,
    ordinal: c_int,
}

#[repr(C)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    dimensions: c_int,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlManagedTensor {
    tensor: DlTensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut DlManagedTensor)>,
}

const _: () = assert!(size_of::<DlManagedTensor>() == 64);

/// What lives as long as the tensor. The managed tensor comes first: its address is the owner's.
#[repr(C)]
struct Owner {
    managed: DlManagedTensor,
    shape: i64,
    _keep: Box<dyn Any + Send>,
}

/// A capsule of `bytes` bytes at `addr` as a one-dimensional uint8 tensor. `keep` is dropped, on any thread, with the
/// last tensor that shares the storage.
pub(crate) fn capsule(
    py: Python<'_>,
    device: DeviceId,
    addr: DeviceAddr,
    bytes: Bytes,
    keep: Box<dyn Any + Send>,
) -> PyResult<Bound<'_, PyAny>> {
    let (kind, ordinal) = match device {
        DeviceId::Host => (1, 0),
        DeviceId::Cuda(ordinal) => (2, ordinal as c_int),
    };
    let tensor = DlTensor {
        data: addr.get() as *mut c_void,
        device: DlDevice { kind, ordinal },
        dimensions: 1,
        dtype: DlDataType { code: 1, bits: 8, lanes: 1 },
        shape: ptr::null_mut(),
        strides: ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = DlManagedTensor { tensor, context: ptr::null_mut(), deleter: Some(delete) };
    let mut owner = Box::new(Owner { managed, shape: bytes.get() as i64, _keep: keep });
    owner.managed.tensor.shape = &raw mut owner.shape;
    let owner = Box::into_raw(owner);
    // SAFETY: the interpreter lock is held; the name lives for ever.
    let capsule = unsafe { ffi::PyCapsule_New(owner.cast(), UNUSED.as_ptr(), Some(drop_unused)) };
    if capsule.is_null() {
        // SAFETY: nobody else knows the owner.
        drop(unsafe { Box::from_raw(owner) });
        return Err(PyErr::fetch(py));
    }
    // SAFETY: `PyCapsule_New` gave a new reference.
    Ok(unsafe { Bound::from_owned_ptr(py, capsule) })
}

/// Called by the importer when its last tensor is gone.
///
/// torch gives the interpreter lock away while it frees a tensor, also on a thread that PyO3 counts as attached. What is
/// dropped here may own Python objects, so the lock is taken again first.
unsafe extern "C" fn delete(managed: *mut DlManagedTensor) {
    // SAFETY: may be asked at any time.
    if unsafe { ffi::Py_IsInitialized() } == 0 {
        return; // the process ends, the lock cannot be had any more, and the system takes everything back
    }
    // SAFETY: the interpreter is alive; a thread that has the lock already may ask for it.
    let lock = unsafe { ffi::PyGILState_Ensure() };
    // SAFETY: the managed tensor is the first field of an `Owner` from `capsule`, and the importer deletes once.
    drop(unsafe { Box::from_raw(managed.cast::<Owner>()) });
    // SAFETY: `PyGILState_Ensure` gave it, on this thread.
    unsafe { ffi::PyGILState_Release(lock) };
}

/// Called when a capsule goes; one that was imported carries another name.
unsafe extern "C" fn drop_unused(capsule: *mut ffi::PyObject) {
    let name: *const c_char = UNUSED.as_ptr();
    // SAFETY: a capsule's destructor gets its capsule.
    let unused = unsafe { ffi::PyCapsule_IsValid(capsule, name) };
    if unused == 0 {
        return;
    }
    // SAFETY: the capsule is valid under this name.
    let owner = unsafe { ffi::PyCapsule_GetPointer(capsule, name) };
    // SAFETY: it was never imported, so the owner is still ours.
    unsafe { delete(owner.cast()) };
}

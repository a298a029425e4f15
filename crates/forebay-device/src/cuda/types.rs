//! The driver's own types and constants, as its header for CUDA 12 and 13 lays them out.

use std::ffi::{c_char, c_int, c_uint, c_void};

/// What every driver call returns (`CUresult`).
pub(super) type Code = c_int;
/// `CUdevice`.
pub(super) type Ordinal = c_int;
/// `CUdeviceptr`.
pub(super) type Pointer = u64;
/// `CUcontext`, `CUstream`, `CUevent` and `CUmemGenericAllocationHandle`: opaque, never followed here, and 64 bits wide
/// like a pointer (asserted below).
pub(super) type Handle = u64;

pub(super) const SUCCESS: Code = 0;
pub(super) const OUT_OF_MEMORY: Code = 2;
pub(super) const DEVICE_UNAVAILABLE: Code = 46;
pub(super) const NO_DEVICE: Code = 100;
pub(super) const NOT_READY: Code = 600;
pub(super) const ALREADY_REGISTERED: Code = 712;

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`.
pub(super) const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR`.
pub(super) const COMPUTE_CAPABILITY_MINOR: c_int = 76;
/// `CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED`.
pub(super) const VIRTUAL_MEMORY_SUPPORTED: c_int = 102;

/// `CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED`.
pub(super) const READ_ONLY_HOST_REGISTER_SUPPORTED: c_int = 113;

/// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
pub(super) const GRANULARITY_MINIMUM: c_uint = 0;
/// `CU_STREAM_NON_BLOCKING`: does not synchronise with the legacy default stream.
pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
/// A number below every priority that there is: the driver takes the highest priority for it. What little Forebay has the
/// processors do comes between the blocks of others' kernels instead of behind them.
pub(super) const HIGHEST_PRIORITY: c_int = c_int::MIN;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`.
pub(super) const EVENT_BLOCKING_UNTIMED: c_uint = 1 | 2;
/// `CU_MEMHOSTREGISTER_PORTABLE`: pinned for every context.
pub(super) const HOST_PORTABLE: c_uint = 1;

/// `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_READ_ONLY`: memory that is mapped read-only is refused without.
pub(super) const HOST_REGISTER_READ_ONLY: c_uint = 1 | 8;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Location {
    kind: c_uint,
    id: c_int,
}

impl Location {
    fn device(ordinal: Ordinal) -> Self {
        const DEVICE: c_uint = 1;
        Location { kind: DEVICE, id: ordinal }
    }
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct AllocationProp {
    kind: c_uint,
    requested_handle_types: c_uint,
    location: Location,
    win32_handle_metadata: *mut c_void,
    compression: u8,
    gpu_direct_rdma: u8,
    usage: u16,
    reserved: [u8; 4],
}

impl AllocationProp {
    /// Plain memory of a device, shared with no other process.
    pub(super) fn on_device(ordinal: Ordinal) -> Self {
        const PINNED: c_uint = 1;
        AllocationProp {
            kind: PINNED,
            requested_handle_types: 0,
            location: Location::device(ordinal),
            win32_handle_metadata: std::ptr::null_mut(),
            compression: 0,
            gpu_direct_rdma: 0,
            usage: 0,
            reserved: [0; 4],
        }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct AccessDesc {
    location: Location,
    flags: c_uint,
}

impl AccessDesc {
    /// Reading and writing by a device.
    pub(super) fn read_write(ordinal: Ordinal) -> Self {
        const READ_WRITE: c_uint = 3;
        AccessDesc { location: Location::device(ordinal), flags: READ_WRITE }
    }
}

/// `CUmemcpyAttributes`: of copies between memory that is pinned or registered and the device's, in order with what is in the
/// stream. Where the memory is, the driver sees by its address.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct CopyAttributes {
    source_access_order: c_uint,
    source: Location,
    target: Location,
    flags: c_uint,
}

impl CopyAttributes {
    pub(super) const IN_STREAM_ORDER: CopyAttributes = {
        const STREAM: c_uint = 1;
        let nowhere = Location { kind: 0, id: 0 };
        CopyAttributes { source_access_order: STREAM, source: nowhere, target: nowhere, flags: 0 }
    };
}

/// `cuMemcpyBatchAsync_v2`: targets, sources, sizes, how many, attributes, the first copy that each is of, how many, stream.
pub(super) type CopyBatch = unsafe extern "C" fn(
    *const Pointer,
    *const Pointer,
    *const usize,
    usize,
    *const CopyAttributes,
    *const usize,
    usize,
    Handle,
) -> Code;

/// `cuGetProcAddress_v2`: name, where to put the address, CUDA version, flags, where to put the status.
pub(super) type GetProcAddress =
    unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_int) -> Code;

const _: () = {
    assert!(size_of::<*mut c_void>() == size_of::<Handle>());
    assert!(size_of::<Location>() == 8);
    assert!(size_of::<CopyAttributes>() == 24);
    assert!(size_of::<AccessDesc>() == 12);
    assert!(size_of::<AllocationProp>() == 32);
    assert!(std::mem::offset_of!(AllocationProp, location) == 8);
    assert!(std::mem::offset_of!(AllocationProp, win32_handle_metadata) == 16);
    assert!(std::mem::offset_of!(AllocationProp, usage) == 26);
};

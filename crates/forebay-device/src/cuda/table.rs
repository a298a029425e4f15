//! The driver's functions that Forebay calls: nothing else is resolved, above all no device-wide synchronisation.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::{self, NonNull};

use libloading::Library;

use super::types::{
    AccessDesc, AllocationProp, Code, CopyBatch, GetProcAddress, Handle, Ordinal, Pointer, SUCCESS,
};

/// The CUDA version whose function signatures the table declares.
pub(super) const CUDA_VERSION: c_int = 12_000;
/// The CUDA version of what can be done without.
const CUDA_VERSION_OF_BATCHES: c_int = 13_000;

const BATCH: &str = "cuMemcpyBatchAsync_v2";

macro_rules! driver_table {
    ($($field:ident = $symbol:literal ($($arg:ident: $kind:ty),*);)*) => {
        /// The functions, by their names without `cu`.
        #[derive(Debug)]
        pub(super) struct Table {
            $(pub(super) $field: unsafe extern "C" fn($($arg: $kind),*) -> Code,)*
            /// `cuMemcpyBatchAsync`, of drivers from CUDA 13 on.
            pub(super) memcpy_batch: Option<CopyBatch>,
        }

        #[cfg(test)]
        const SYMBOLS: &[&str] = &[$($symbol,)* BATCH];

        impl Table {
            /// Resolves every function, or names the first one that is missing.
            pub(super) fn resolve(library: &Library) -> Result<Table, &'static str> {
                let resolver = Resolver::new(library);
                Ok(Table {
                    $($field: {
                        let address = resolver.find($symbol, CUDA_VERSION).ok_or($symbol)?;
                        // SAFETY: the driver's function of this name has this signature, in its header for
                        // `CUDA_VERSION`; the library stays loaded for the life of the process.
                        unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg: $kind),*) -> Code>(
                                address.as_ptr(),
                            )
                        }
                    },)*
                    memcpy_batch: resolver.find(BATCH, CUDA_VERSION_OF_BATCHES).map(|address| {
                        // SAFETY: as above, of the header for the version asked for.
                        unsafe { std::mem::transmute::<*mut c_void, CopyBatch>(address.as_ptr()) }
                    }),
                })
            }
        }
    };
}

driver_table! {
    init = "cuInit" (flags: c_uint);
    get_error_name = "cuGetErrorName" (code: Code, name: *mut *const c_char);
    get_error_string = "cuGetErrorString" (code: Code, text: *mut *const c_char);

    device_get_count = "cuDeviceGetCount" (count: *mut c_int);
    device_get = "cuDeviceGet" (device: *mut Ordinal, ordinal: c_int);
    device_get_name = "cuDeviceGetName" (name: *mut c_char, len: c_int, device: Ordinal);
    device_total_mem = "cuDeviceTotalMem_v2" (size: *mut usize, device: Ordinal);
    device_get_attribute = "cuDeviceGetAttribute" (value: *mut c_int, attribute: c_int, device: Ordinal);

    primary_ctx_retain = "cuDevicePrimaryCtxRetain" (context: *mut Handle, device: Ordinal);
    primary_ctx_release = "cuDevicePrimaryCtxRelease_v2" (device: Ordinal);
    ctx_get_current = "cuCtxGetCurrent" (context: *mut Handle);
    ctx_push_current = "cuCtxPushCurrent_v2" (context: Handle);
    ctx_pop_current = "cuCtxPopCurrent_v2" (context: *mut Handle);

    mem_get_info = "cuMemGetInfo_v2" (free: *mut usize, total: *mut usize);
    mem_get_granularity = "cuMemGetAllocationGranularity"
        (granularity: *mut usize, prop: *const AllocationProp, option: c_uint);
    mem_address_reserve = "cuMemAddressReserve"
        (addr: *mut Pointer, size: usize, align: usize, hint: Pointer, flags: u64);
    mem_address_free = "cuMemAddressFree" (addr: Pointer, size: usize);
    mem_create = "cuMemCreate" (frame: *mut Handle, size: usize, prop: *const AllocationProp, flags: u64);
    mem_release = "cuMemRelease" (frame: Handle);
    mem_map = "cuMemMap" (addr: Pointer, size: usize, offset: usize, frame: Handle, flags: u64);
    mem_set_access = "cuMemSetAccess" (addr: Pointer, size: usize, access: *const AccessDesc, count: usize);
    mem_unmap = "cuMemUnmap" (addr: Pointer, size: usize);

    stream_create_with_priority = "cuStreamCreateWithPriority" (stream: *mut Handle, flags: c_uint, priority: c_int);
    stream_destroy = "cuStreamDestroy_v2" (stream: Handle);
    stream_wait_event = "cuStreamWaitEvent" (stream: Handle, event: Handle, flags: c_uint);
    event_create = "cuEventCreate" (event: *mut Handle, flags: c_uint);
    event_destroy = "cuEventDestroy_v2" (event: Handle);
    event_record = "cuEventRecord" (event: Handle, stream: Handle);
    event_query = "cuEventQuery" (event: Handle);
    event_synchronize = "cuEventSynchronize" (event: Handle);

    mem_host_register = "cuMemHostRegister_v2" (ptr: *mut c_void, size: usize, flags: c_uint);
    mem_host_unregister = "cuMemHostUnregister" (ptr: *mut c_void);
    memcpy_to_device = "cuMemcpyHtoDAsync_v2" (dst: Pointer, src: *const c_void, size: usize, stream: Handle);
    memcpy_to_host = "cuMemcpyDtoHAsync_v2" (dst: *mut c_void, src: Pointer, size: usize, stream: Handle);
    memcpy_on_device = "cuMemcpyDtoDAsync_v2" (dst: Pointer, src: Pointer, size: usize, stream: Handle);

    module_load_data = "cuModuleLoadData" (module: *mut Handle, image: *const c_void);
    module_get_function = "cuModuleGetFunction" (function: *mut Handle, module: Handle, name: *const c_char);
    launch_kernel = "cuLaunchKernel"
        (function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
         block_z: c_uint, shared: c_uint, stream: Handle, parameters: *mut *mut c_void, extra: *mut *mut c_void);
}

/// Finds functions by the name they are exported under.
struct Resolver<'a> {
    library: &'a Library,
    /// The driver's own resolver, which picks the version of a function that fits a CUDA version.
    by_version: Option<GetProcAddress>,
}

impl<'a> Resolver<'a> {
    fn new(library: &'a Library) -> Self {
        // SAFETY: the driver's function of this name has this signature.
        let by_version = unsafe { library.get::<GetProcAddress>("cuGetProcAddress_v2") };
        Resolver { library, by_version: by_version.ok().map(|function| *function) }
    }

    fn find(&self, symbol: &'static str, version: c_int) -> Option<NonNull<c_void>> {
        self.find_by_version(symbol, version).or_else(|| self.find_exported(symbol))
    }

    fn find_by_version(&self, symbol: &str, version: c_int) -> Option<NonNull<c_void>> {
        let get_proc_address = self.by_version?;
        // It knows functions by the name they have in source code, without the version.
        let name = std::ffi::CString::new(symbol.trim_end_matches("_v2")).ok()?;
        let (mut address, mut status) = (ptr::null_mut(), 0);
        // SAFETY: the name ends in a zero byte and both results have a place to go.
        let code = unsafe { get_proc_address(name.as_ptr(), &mut address, version, 0, &mut status) };
        if code == SUCCESS { NonNull::new(address) } else { None }
    }

    fn find_exported(&self, symbol: &str) -> Option<NonNull<c_void>> {
        // SAFETY: an address is taken, not yet called.
        let address = unsafe { self.library.get::<*mut c_void>(symbol) };
        NonNull::new(*address.ok()?)
    }
}

/// What a driver's string function says of a code, where it knows the code.
pub(super) fn text(
    function: unsafe extern "C" fn(Code, *mut *const c_char) -> Code,
    code: Code,
) -> Option<&'static str> {
    let mut text = ptr::null();
    // SAFETY: the result has a place to go; every code is allowed.
    let known = unsafe { function(code, &mut text) } == SUCCESS && !text.is_null();
    if !known {
        return None;
    }
    // SAFETY: the driver answers with a string constant of its own, which lives as long as the library.
    unsafe { CStr::from_ptr(text) }.to_str().ok()
}

#[cfg(test)]
mod tests {
    use super::SYMBOLS;

    #[test]
    fn nothing_in_the_table_waits_for_more_than_an_event() {
        let waits: Vec<_> = SYMBOLS.iter().filter(|symbol| symbol.contains("Synchronize")).collect();
        assert_eq!(waits, [&"cuEventSynchronize"]);
        // Copies that are not asynchronous wait, and freeing memory of the old kind waits for the whole device.
        let copies = SYMBOLS.iter().filter(|symbol| symbol.contains("Memcpy") || symbol.contains("Memset"));
        assert!(copies.clone().all(|symbol| symbol.contains("Async")), "{:?}", copies.collect::<Vec<_>>());
        assert!(!SYMBOLS.iter().any(|symbol| symbol.starts_with("cuMemFree") && *symbol != "cuMemFreeHost"));
    }
}

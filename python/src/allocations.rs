//! torch's own allocations, seen just before the driver is asked: weights make room for them.
//!
//! torch's allocators call `cudaMalloc` and `cudaMallocAsync` through slots of `libc10_cuda.so`. These are redirected to
//! the functions in here, which ask the engines of the current device for room, then call the original. Our own calls of
//! the driver do not come this way.
//!
//! What may deadlock here, and why it does not. The caller holds the lock of torch's allocator, and perhaps the
//! interpreter:
//! * *The engine* needs neither: its threads call neither torch nor Python, and nobody calls torch with a lock of the
//!   engine held. Waits for it are bounded ([`forebay::Engine::room_for`]).
//! * *Leases* are returned by a thread that needs the interpreter. Where the caller does not have it (torch's operators
//!   give it up), they are waited for, shortly: the thread that has it may be freeing a tensor, and wait for torch's lock.
//! * *With the interpreter held* nothing of Python's is waited for, and the interpreter is not given up: to take it again
//!   under torch's lock would wait for a thread that has it and waits for torch's lock, for ever. Leases are asked back,
//!   and return when the interpreter is free. What fails meanwhile is run again at a module's boundary.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::transmute;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use forebay::device::DeviceId;
use forebay::{Bytes, Leases};
use forebay_imports::{Import, Redirection};
use parking_lot::Mutex;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::engine::{self, Engine};

type Malloc = unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int;
type MallocAsync = unsafe extern "C" fn(*mut *mut c_void, usize, *mut c_void) -> c_int;
type GetDevice = unsafe extern "C" fn(*mut c_int) -> c_int;
type LastError = unsafe extern "C" fn() -> c_int;
type DefaultPool = unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int;
type PoolAttribute = unsafe extern "C" fn(*mut c_void, c_int, *mut c_void) -> c_int;
type HoldsInterpreter = unsafe extern "C" fn() -> c_int;

const SUCCESS: c_int = 0;
/// `cudaErrorMemoryAllocation`.
const NO_MEMORY: c_int = 2;
/// `cudaMemPoolAttrReservedMemCurrent` and `cudaMemPoolAttrUsedMemCurrent`.
const POOL_RESERVED: c_int = 5;
const POOL_USED: c_int = 7;

/// A function of another library, once it is known.
struct Function(AtomicPtr<c_void>);

impl Function {
    const fn unknown() -> Self {
        Function(AtomicPtr::new(std::ptr::null_mut()))
    }

    fn set(&self, address: Option<*mut c_void>) {
        self.0.store(address.unwrap_or(std::ptr::null_mut()), Ordering::Release);
    }

    fn get(&self) -> Option<*mut c_void> {
        let address = self.0.load(Ordering::Acquire);
        (!address.is_null()).then_some(address)
    }
}

static MALLOC: Function = Function::unknown();
static MALLOC_ASYNC: Function = Function::unknown();
static GET_DEVICE: Function = Function::unknown();
static LAST_ERROR: Function = Function::unknown();
static DEFAULT_POOL: Function = Function::unknown();
static POOL_ATTRIBUTE: Function = Function::unknown();
static HOLDS_INTERPRETER: Function = Function::unknown();

static ON: AtomicBool = AtomicBool::new(false);
static SEEN: AtomicU64 = AtomicU64::new(0);
static PRESSED: AtomicU64 = AtomicU64::new(0);
static REPEATED: AtomicU64 = AtomicU64::new(0);

/// Lock order: never taken by the redirected functions.
static INSTALLED: Mutex<Option<Installed>> = Mutex::new(None);
/// The engine that is asked whatever the current device is. Lock order: a leaf.
static ASKED: Mutex<Option<std::sync::Weak<forebay::Engine>>> = Mutex::new(None);

struct Installed {
    object: String,
    functions: Vec<&'static str>,
    redirections: Vec<Redirection>,
}

/// Lets allocations that a loaded object makes press weights out. Names of the functions that are redirected. ``engine`` is
/// asked whatever the device, in place of the engines of the current one. Nothing changes where it is on already.
#[pyfunction]
#[pyo3(signature = (library, holds_interpreter, engine=None))]
pub(crate) fn redirect_allocations(
    library: &str,
    holds_interpreter: u64,
    engine: Option<&Bound<'_, Engine>>,
) -> PyResult<Vec<&'static str>> {
    let mut installed = INSTALLED.lock();
    if let Some(installed) = &*installed {
        return Ok(installed.functions.clone());
    }
    let failed = |error: forebay_imports::ImportError| PyRuntimeError::new_err(error.to_string());
    let malloc = Import::find(library, "cudaMalloc").map_err(failed)?;
    // One of several ways to allocate: a build without it is none the worse.
    let malloc_async = Import::find(library, "cudaMallocAsync").ok();
    for (function, name) in [
        (&GET_DEVICE, "cudaGetDevice"),
        (&LAST_ERROR, "cudaGetLastError"),
        (&DEFAULT_POOL, "cudaDeviceGetDefaultMemPool"),
        (&POOL_ATTRIBUTE, "cudaMemPoolGetAttribute"),
    ] {
        function.set(malloc.symbol(name));
    }
    HOLDS_INTERPRETER.set(Some(holds_interpreter as *mut c_void));
    *ASKED.lock() = engine.map(|engine| Arc::downgrade(engine.get().inner()));
    // Known before the first call can come.
    MALLOC.set(Some(malloc.original()));
    MALLOC_ASYNC.set(malloc_async.as_ref().map(Import::original));
    let mut functions = vec!["cudaMalloc"];
    let (ours, ours_async): (Malloc, MallocAsync) = (cuda_malloc, cuda_malloc_async);
    // SAFETY: the same signature, and this library is never unloaded.
    let mut redirections = vec![unsafe { malloc.redirect(ours as *mut c_void) }.map_err(failed)?];
    if let Some(import) = malloc_async {
        // SAFETY: the same signature, and this library is never unloaded.
        redirections.push(unsafe { import.redirect(ours_async as *mut c_void) }.map_err(failed)?);
        functions.push("cudaMallocAsync");
    }
    ON.store(true, Ordering::Release);
    *installed = Some(Installed { object: library.to_owned(), functions: functions.clone(), redirections });
    Ok(functions)
}

/// Undoes :func:`redirect_allocations`. Whether it was on.
#[pyfunction]
pub(crate) fn restore_allocations() -> PyResult<bool> {
    ON.store(false, Ordering::Release);
    let Some(installed) = INSTALLED.lock().take() else { return Ok(false) };
    for redirection in installed.redirections {
        // Where somebody else redirected it as well our functions stay in the chain, and do nothing.
        redirection.undo().map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
    }
    *ASKED.lock() = None;
    Ok(true)
}

/// The address of a function that a loaded object imports, as its calls find it.
#[pyfunction]
pub(crate) fn import_of(library: &str, function: &str) -> PyResult<usize> {
    let import = Import::find(library, function);
    import
        .map(|import| import.original() as usize)
        .map_err(|error| PyRuntimeError::new_err(error.to_string()))
}

/// What is redirected, and what came of it.
#[pyfunction]
pub(crate) fn redirected_allocations(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    let installed = INSTALLED.lock();
    let functions = installed.as_ref().map(|installed| installed.functions.clone()).unwrap_or_default();
    dict.set_item("object", installed.as_ref().map(|installed| installed.object.clone()))?;
    dict.set_item("functions", functions)?;
    dict.set_item("seen", SEEN.load(Ordering::Relaxed))?;
    dict.set_item("pressed", PRESSED.load(Ordering::Relaxed))?;
    dict.set_item("repeated", REPEATED.load(Ordering::Relaxed))?;
    Ok(dict)
}

unsafe extern "C" fn cuda_malloc(at: *mut *mut c_void, size: usize) -> c_int {
    let Some(address) = MALLOC.get() else { return NO_MEMORY };
    // SAFETY: the address of the function that was redirected.
    let original: Malloc = unsafe { transmute(address) };
    // SAFETY: passed on as it came.
    allocate(size, Bytes::ZERO, || unsafe { original(at, size) })
}

unsafe extern "C" fn cuda_malloc_async(at: *mut *mut c_void, size: usize, stream: *mut c_void) -> c_int {
    let Some(address) = MALLOC_ASYNC.get() else { return NO_MEMORY };
    // SAFETY: the address of the function that was redirected.
    let original: MallocAsync = unsafe { transmute(address) };
    let unused = if ON.load(Ordering::Acquire) { unused_in_pool(size) } else { Bytes::ZERO };
    // SAFETY: passed on as it came.
    allocate(size, unused, || unsafe { original(at, size, stream) })
}

/// Makes room, as far as the allocator has not got `unused` bytes itself, and calls the original: once more if it finds no
/// memory all the same and there was some to be had.
fn allocate(size: usize, unused: Bytes, original: impl Fn() -> c_int) -> c_int {
    if !ON.load(Ordering::Acquire) {
        return original();
    }
    SEEN.fetch_add(1, Ordering::Relaxed);
    let size = Bytes::new(size as u64);
    if size > unused {
        make_room(size);
    }
    let code = original();
    // What it had was in pieces, or somebody else was faster.
    if code == NO_MEMORY && make_room(size) {
        REPEATED.fetch_add(1, Ordering::Relaxed);
        forget_error();
        return original();
    }
    code
}

/// Whether the engines of the current device gave anything back.
fn make_room(size: Bytes) -> bool {
    let leases = if holds_interpreter() { Leases::Ask } else { Leases::Await };
    // A panic must not go through the caller's frames, which are not Rust's.
    let made = std::panic::catch_unwind(|| {
        let mut made = false;
        for engine in engines() {
            match engine.room_for(size, leases) {
                Ok(room) => {
                    made |= room.given_back;
                    if room.missing == Bytes::ZERO {
                        break;
                    }
                }
                Err(error) => tracing::debug!(%error, "no room was made for an allocation of {size}"),
            }
        }
        made
    });
    let made = made.unwrap_or(false);
    if made {
        PRESSED.fetch_add(1, Ordering::Relaxed);
    }
    made
}

fn engines() -> Vec<Arc<forebay::Engine>> {
    if let Some(engine) = ASKED.lock().as_ref().and_then(std::sync::Weak::upgrade) {
        return vec![engine];
    }
    match current_device() {
        Some(ordinal) => engine::of_device(DeviceId::Cuda(ordinal)),
        None => Vec::new(),
    }
}

fn current_device() -> Option<u32> {
    // SAFETY: the runtime's function of this name.
    let get: GetDevice = unsafe { transmute(GET_DEVICE.get()?) };
    let mut ordinal = -1;
    // SAFETY: the result has a place to go.
    let code = unsafe { get(&mut ordinal) };
    (code == SUCCESS).then_some(ordinal)?.try_into().ok()
}

thread_local! {
    /// A device, what its pool had unused when this thread looked at it, less what the thread asked for since.
    static LOOKED_AT: Cell<(u32, u64)> = const { Cell::new((0, 0)) };
}

/// What the current device's pool has from the driver and nobody uses, at least, before it gives `size`. To look takes three
/// calls that wait for whoever else is in the driver, and torch allocates some thousand times a step: it is not looked at again
/// before what was there is used up. Where it has less by then, because others took it, the allocation fails and is repeated.
fn unused_in_pool(size: usize) -> Bytes {
    let size = size as u64;
    let look = |looked: &Cell<(u32, u64)>| -> Option<u64> {
        let ordinal = current_device()?;
        let (of, left) = looked.get();
        let unused = if of == ordinal && left >= size { left } else { unused_now(ordinal)? };
        looked.set((ordinal, unused.saturating_sub(size)));
        Some(unused)
    };
    Bytes::new(LOOKED_AT.try_with(look).ok().flatten().unwrap_or(0))
}

/// What a device's pool has unused at this moment.
fn unused_now(ordinal: u32) -> Option<u64> {
    // SAFETY: the runtime's function of this name.
    let default_pool: DefaultPool = unsafe { transmute(DEFAULT_POOL.get()?) };
    // SAFETY: the runtime's function of this name.
    let attribute: PoolAttribute = unsafe { transmute(POOL_ATTRIBUTE.get()?) };
    let mut pool = std::ptr::null_mut();
    // SAFETY: the result has a place to go.
    if unsafe { default_pool(&mut pool, ordinal.try_into().ok()?) } != SUCCESS {
        return None;
    }
    let value = |which| {
        let mut value = 0_u64;
        // SAFETY: these attributes are of 64 bits.
        let code = unsafe { attribute(pool, which, (&raw mut value).cast()) };
        (code == SUCCESS).then_some(value)
    };
    Some(value(POOL_RESERVED)?.saturating_sub(value(POOL_USED)?))
}

/// The runtime keeps the error of a call for whoever asks next; this one is dealt with.
fn forget_error() {
    if let Some(address) = LAST_ERROR.get() {
        // SAFETY: the runtime's function of this name.
        let last_error: LastError = unsafe { transmute(address) };
        // SAFETY: it takes nothing.
        unsafe { last_error() };
    }
}

/// Whether this thread has the interpreter. Not known counts as so.
fn holds_interpreter() -> bool {
    let Some(address) = HOLDS_INTERPRETER.get() else { return true };
    // SAFETY: Python's `PyGILState_Check`, which any thread may call.
    let holds: HoldsInterpreter = unsafe { transmute(address) };
    // SAFETY: it takes nothing.
    unsafe { holds() != 0 }
}

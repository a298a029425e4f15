//! The embedded device: memory of this process behaving like a GPU's.
//!
//! Address ranges are reserved, frames are parts of one memory file, and an address without a frame is a segmentation
//! fault. Streams are threads, so work is asynchronous and ordering bugs show. What the GPU driver refuses is refused
//! here with the same code, and so is every broken contract that the bookkeeping can see: a frame mapped at two
//! addresses, a mapped frame released, a range unmapped that was not mapped. A GPU lets these pass.
//!
//! A frame counts against the capacity when it is made, though its pages take memory only once they are touched.
//!
//! Locks: `memory`, `pinned` and `registered` are leaves. An event's lock may be held while a stream's queue is taken, never the other
//! way round. Nothing is waited for and no work runs under any of them.
//!
//! ```
//! use forebay_core::Bytes;
//! use forebay_device::host::{HostConfig, HostDevice};
//! use forebay_device::{Device, DeviceError};
//!
//! let device = HostDevice::new(HostConfig { capacity: Bytes::mib(4), ..HostConfig::default() })?;
//! device.create_frame(Bytes::mib(2))?;
//! let full = device.create_frame(Bytes::mib(4));
//! assert!(matches!(full, Err(DeviceError::OutOfMemory { free: Some(free), .. }) if free == Bytes::mib(2)));
//! # Ok::<(), DeviceError>(())
//! ```

mod event;
mod frames;
mod memory;
mod space;
mod stream;
mod transform;
mod vm;

use std::collections::{BTreeMap, HashMap};
use std::ptr;
use std::thread;
use std::time::Duration;

use forebay_core::Bytes;
use parking_lot::Mutex;

use self::event::Events;
use self::memory::Memory;
use self::stream::Streams;
use crate::{
    Device, DeviceAddr, DeviceError, DeviceId, EventHandle, FrameHandle, MemoryInfo, Result, StreamHandle,
    Transform,
};

/// The smallest frame, as on GPUs.
const GRANULARITY: Bytes = Bytes::mib(2);

/// What a host device pretends to be.
#[derive(Clone, Copy, Debug)]
pub struct HostConfig {
    /// How much frames may take together. [`Bytes::MAX`], the default, sets no limit.
    pub capacity: Bytes,
    /// Fills every frame with `0xA5` when it is made and whenever it moves to another address, so that a page nobody
    /// filled shows. (A GPU keeps a frame's contents when it moves.)
    pub poison: bool,
    /// How much longer each copy takes, so that what does not wait for it shows.
    pub copy_delay: Duration,
    /// Lets memory be registered, which gains nothing here: for testing what a GPU does.
    pub registers: bool,
}

impl Default for HostConfig {
    fn default() -> Self {
        HostConfig { capacity: Bytes::MAX, poison: false, copy_delay: Duration::ZERO, registers: false }
    }
}

/// The embedded device.
#[derive(Debug)]
pub struct HostDevice {
    config: HostConfig,
    // Before `memory`: dropping the streams ends their work, which may touch mapped frames.
    streams: Streams,
    events: Events,
    memory: Mutex<Memory>,
    pinned: Mutex<HashMap<usize, Bytes>>,
    registered: Mutex<BTreeMap<usize, Bytes>>,
}

impl HostDevice {
    /// Makes a device of its own; two devices share nothing.
    ///
    /// # Errors
    /// [`DeviceError::System`] where the system gives no memory file.
    pub fn new(config: HostConfig) -> Result<Self> {
        Ok(HostDevice {
            config,
            streams: Streams::default(),
            events: Events::default(),
            memory: Mutex::new(Memory::new(config.capacity, config.poison)?),
            pinned: Mutex::default(),
            registered: Mutex::default(),
        })
    }

    /// Runs `kernel` in the stream's order: a kernel for tests and examples. On [`StreamHandle::DEFAULT`] it has run
    /// when the call returns.
    ///
    /// A kernel that panics on a stream loses the device, as a failed kernel does on a GPU.
    ///
    /// # Errors
    /// [`DeviceError::Driver`] where there is no such stream, [`DeviceError::Lost`] after a panic.
    pub fn launch(&self, stream: StreamHandle, kernel: Box<dyn FnOnce() + Send>) -> Result<()> {
        self.streams.submit("launch", stream, kernel)
    }

    fn register(&self, call: &'static str, first: usize, size: Bytes) -> Result<()> {
        if !self.config.registers {
            let why = "copies read any memory of the host as it is".to_owned();
            return Err(DeviceError::unsupported(call, why));
        }
        if size == Bytes::ZERO {
            return Err(DeviceError::invalid(call, format!("at least a byte: {size} at {first:#x}")));
        }
        let mut registered = self.registered.lock();
        let before = registered.range(..first + size.as_usize()).next_back();
        if before.is_some_and(|(start, len)| start + len.as_usize() > first) {
            let why = format!("registered already, in part: {size} at {first:#x}");
            return Err(DeviceError::invalid(call, why));
        }
        registered.insert(first, size);
        Ok(())
    }

    fn copy(&self, call: &'static str, copy: HostCopy, stream: StreamHandle) -> Result<()> {
        let delay = self.config.copy_delay;
        let work = move || {
            if !delay.is_zero() {
                thread::sleep(delay);
            }
            copy.run();
        };
        self.streams.submit(call, stream, Box::new(work))
    }
}

/// The bytes of one copy, on their way to a stream's thread.
struct HostCopy {
    to: *mut u8,
    from: *const u8,
    len: Bytes,
}

// SAFETY: whoever enqueues a copy keeps both sides alive and untouched until it has completed, on whichever thread it
// runs (`Device::copy_to_device`, `Device::copy_to_host`).
unsafe impl Send for HostCopy {}

impl HostCopy {
    fn run(self) {
        // SAFETY: both sides are valid for `len` bytes by the contract of the copy calls, and lie apart: one is device
        // memory, the other is not.
        unsafe { ptr::copy_nonoverlapping(self.from, self.to, self.len.as_usize()) }
    }
}

impl Device for HostDevice {
    fn id(&self) -> DeviceId {
        DeviceId::Host
    }

    fn name(&self) -> String {
        "host memory".to_owned()
    }

    fn granularity(&self) -> Bytes {
        GRANULARITY
    }

    fn memory(&self) -> Result<MemoryInfo> {
        Ok(self.memory.lock().info())
    }

    fn reserve(&self, size: Bytes, align: Bytes) -> Result<DeviceAddr> {
        self.memory.lock().reserve(size, align)
    }

    unsafe fn free_reservation(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.memory.lock().free_reservation(addr, size)
    }

    fn create_frame(&self, size: Bytes) -> Result<FrameHandle> {
        self.memory.lock().create_frame(size)
    }

    unsafe fn release_frame(&self, frame: FrameHandle, size: Bytes) -> Result<()> {
        self.memory.lock().release_frame(frame, size)
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, frame: FrameHandle) -> Result<()> {
        self.memory.lock().map(addr, size, frame)
    }

    unsafe fn allow_access(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.memory.lock().allow_access(addr, size)
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.memory.lock().unmap(addr, size)
    }

    fn take_stream(&self) -> Result<StreamHandle> {
        self.streams.take()
    }

    fn give_back_stream(&self, stream: StreamHandle) -> Result<()> {
        self.streams.give_back(stream)
    }

    fn create_event(&self) -> Result<EventHandle> {
        Ok(self.events.create())
    }

    unsafe fn destroy_event(&self, event: EventHandle) -> Result<()> {
        self.events.destroy(event)
    }

    unsafe fn record(&self, event: EventHandle, stream: StreamHandle) -> Result<()> {
        self.events.find("record", event)?.record(&self.streams, stream)
    }

    unsafe fn wait(&self, stream: StreamHandle, event: EventHandle) -> Result<()> {
        match self.events.find("wait", event)?.latest() {
            Some(mark) => self.streams.submit("wait", stream, Box::new(move || mark.wait())),
            None => self.streams.check("wait", stream),
        }
    }

    unsafe fn is_complete(&self, event: EventHandle) -> Result<bool> {
        let complete = self.events.find("is_complete", event)?.latest().is_none_or(|mark| mark.is_reached());
        self.streams.check_alive("is_complete")?;
        Ok(complete)
    }

    unsafe fn synchronize(&self, event: EventHandle) -> Result<()> {
        if let Some(mark) = self.events.find("synchronize", event)?.latest() {
            mark.wait();
        }
        self.streams.check_alive("synchronize")
    }

    fn alloc_pinned(&self, size: Bytes) -> Result<*mut u8> {
        let first = vm::allocate(size)?;
        self.pinned.lock().insert(first.addr(), size);
        Ok(first)
    }

    unsafe fn free_pinned(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        let mut pinned = self.pinned.lock();
        if pinned.get(&ptr.addr()) != Some(&size) {
            return Err(DeviceError::invalid(
                "free_pinned",
                format!("no buffer of {size} at {:#x}", ptr.addr()),
            ));
        }
        pinned.remove(&ptr.addr());
        // SAFETY: the range is one of `allocate`, known until just now, so this is its only release; by the contract of
        // this call nothing uses it any more.
        unsafe { vm::release("free_pinned", ptr.expose_provenance() as u64, size) }
    }

    unsafe fn register_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        let page = rustix::param::page_size();
        if !ptr.addr().is_multiple_of(page) || !size.as_usize().is_multiple_of(page) {
            let pages = format!("whole pages of {page} bytes: {size} at {ptr:p}");
            return Err(DeviceError::invalid("register_host", pages));
        }
        self.register("register_host", ptr.addr(), size)
    }

    unsafe fn register_memory(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        self.register("register_memory", ptr.addr(), size)
    }

    unsafe fn unregister_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        let mut registered = self.registered.lock();
        if registered.get(&ptr.addr()) != Some(&size) {
            return Err(DeviceError::invalid(
                "unregister_host",
                format!("no registration of {size} at {ptr:p}"),
            ));
        }
        registered.remove(&ptr.addr());
        Ok(())
    }

    unsafe fn copy_to_device(
        &self,
        dst: DeviceAddr,
        src: *const u8,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        let copy = HostCopy { to: vm::pointer(dst), from: src, len };
        self.copy("copy_to_device", copy, stream)
    }

    unsafe fn copy_to_host(
        &self,
        dst: *mut u8,
        src: DeviceAddr,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        let copy = HostCopy { to: dst, from: vm::pointer(src), len };
        self.copy("copy_to_host", copy, stream)
    }

    unsafe fn transform(&self, transform: &Transform, stream: StreamHandle) -> Result<()> {
        if !transform.check()? {
            return self.streams.check("transform", stream);
        }
        let transform = *transform;
        // SAFETY: the memory stays valid until the work has completed, by the contract of this call.
        let work = move || unsafe { transform::run(transform) };
        self.streams.submit("transform", stream, Box::new(work))
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        // Field order ends the streams' work before the memory goes.
        for (first, size) in self.pinned.get_mut().drain() {
            tracing::warn!(%size, addr = format_args!("{first:#x}"), "a pinned buffer outlived its device");
        }
        for (first, size) in std::mem::take(self.registered.get_mut()) {
            tracing::warn!(%size, addr = format_args!("{first:#x}"), "a registration outlived its device");
        }
    }
}

//! Device resources that give themselves back when dropped.
//!
//! A drop that the device refuses is logged: there is nobody to hand the error to.

use std::fmt;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use forebay_core::Bytes;

use crate::{Device, DeviceAddr, DeviceError, EventHandle, FrameHandle, Result, StreamHandle};

/// A reserved address range with no memory of its own.
///
/// Whoever maps frames into it has unmapped them before it is dropped; that is part of the contract of
/// [`Device::map`].
#[derive(Debug)]
pub struct Reservation {
    device: Arc<dyn Device>,
    addr: DeviceAddr,
    size: Bytes,
}

impl Reservation {
    /// Reserves `size` bytes, a multiple of the device's granularity, aligned to `align`.
    ///
    /// # Errors
    /// What [`Device::reserve`] reports.
    pub fn new(device: Arc<dyn Device>, size: Bytes, align: Bytes) -> Result<Self> {
        let addr = device.reserve(size, align)?;
        Ok(Reservation { device, addr, size })
    }

    /// The first address.
    pub fn addr(&self) -> DeviceAddr {
        self.addr
    }

    /// The length of the range.
    pub fn size(&self) -> Bytes {
        self.size
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: addr and size come from one `reserve` and are given back once; nothing is mapped by now, which
        // the contract of `Device::map` left to the mapper.
        let freed = unsafe { self.device.free_reservation(self.addr, self.size) };
        report(&*self.device, "reservation", freed);
    }
}

/// A physical allocation of one page.
///
/// Whoever maps it has unmapped it before it is dropped; that is part of the contract of [`Device::map`].
#[derive(Debug)]
pub struct Frame {
    device: Arc<dyn Device>,
    handle: FrameHandle,
    size: Bytes,
}

impl Frame {
    /// Makes a frame of `size` bytes, a multiple of the device's granularity.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] where the device has no room.
    pub fn new(device: Arc<dyn Device>, size: Bytes) -> Result<Self> {
        let handle = device.create_frame(size)?;
        Ok(Frame { device, handle, size })
    }

    /// The backend's handle, valid as long as this value lives.
    pub fn handle(&self) -> FrameHandle {
        self.handle
    }

    /// How much memory it is.
    pub fn size(&self) -> Bytes {
        self.size
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        // SAFETY: the handle is given back once, here; the frame is mapped nowhere by now, which the contract of
        // `Device::map` left to the mapper.
        let released = unsafe { self.device.release_frame(self.handle, self.size) };
        report(&*self.device, "frame", released);
    }
}

/// A stream of its own, which does not synchronise with the default stream.
#[derive(Debug)]
pub struct Stream {
    device: Arc<dyn Device>,
    handle: StreamHandle,
}

impl Stream {
    /// Makes a stream.
    ///
    /// # Errors
    /// What [`Device::take_stream`] reports.
    pub fn new(device: Arc<dyn Device>) -> Result<Self> {
        let handle = device.take_stream()?;
        Ok(Stream { device, handle })
    }

    /// The driver's handle. After this value it may be somebody else's.
    pub fn handle(&self) -> StreamHandle {
        self.handle
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        report(&*self.device, "stream", self.device.give_back_stream(self.handle));
    }
}

/// A point in a stream's work that others can wait for. Complete until it is first recorded.
#[derive(Debug)]
pub struct Event {
    device: Arc<dyn Device>,
    handle: EventHandle,
}

impl Event {
    /// Makes an event.
    ///
    /// # Errors
    /// What [`Device::create_event`] reports.
    pub fn new(device: Arc<dyn Device>) -> Result<Self> {
        let handle = device.create_event()?;
        Ok(Event { device, handle })
    }

    /// The backend's handle, alive as long as this value lives.
    pub fn handle(&self) -> EventHandle {
        self.handle
    }

    /// Marks the end of all work now in `stream`, in place of an earlier mark.
    ///
    /// # Errors
    /// What [`Device::record`] reports.
    ///
    /// # Safety
    /// The stream is alive, and of this event's device.
    pub unsafe fn record(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: the event lives as long as `self`; the caller keeps the stream alive.
        unsafe { self.device.record(self.handle, stream) }
    }

    /// Makes later work in `stream` wait for the latest mark.
    ///
    /// # Errors
    /// What [`Device::wait`] reports.
    ///
    /// # Safety
    /// The stream is alive, and of this event's device.
    pub unsafe fn wait_on(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: the event lives as long as `self`; the caller keeps the stream alive.
        unsafe { self.device.wait(stream, self.handle) }
    }

    /// Whether the work before the latest mark is done.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] where that work failed.
    pub fn is_complete(&self) -> Result<bool> {
        // SAFETY: the event lives as long as `self`.
        unsafe { self.device.is_complete(self.handle) }
    }

    /// Blocks this thread until the work before the latest mark is done.
    ///
    /// # Errors
    /// [`DeviceError::Lost`] where that work failed.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        unsafe { self.device.synchronize(self.handle) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle came from `create_event` of this device and is given back once, here.
        let destroyed = unsafe { self.device.destroy_event(self.handle) };
        report(&*self.device, "event", destroyed);
    }
}

/// Host memory that the copy engine reads and writes directly.
///
/// The copy engine and the processor take turns by events, which the compiler cannot see: access is by raw pointer, or
/// by the unsafe slices. Whoever enqueues a copy keeps the buffer until it has completed.
#[derive(Debug)]
pub struct PinnedBuffer {
    device: Arc<dyn Device>,
    ptr: NonNull<u8>,
    size: Bytes,
}

// SAFETY: the memory belongs to the process, not to a thread; it is given back through a `Device`, which any thread
// may call.
unsafe impl Send for PinnedBuffer {}
// SAFETY: shared access gives out addresses only; whoever reads or writes through them orders that himself.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    /// Allocates `size` bytes, page-aligned.
    ///
    /// # Errors
    /// What [`Device::alloc_pinned`] reports.
    pub fn new(device: Arc<dyn Device>, size: Bytes) -> Result<Self> {
        let ptr = NonNull::new(device.alloc_pinned(size)?).ok_or(DeviceError::OutOfMemory {
            call: "alloc_pinned",
            wanted: size,
            free: None,
        })?;
        Ok(PinnedBuffer { device, ptr, size })
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The length of the buffer.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// `len` bytes from `offset` on.
    ///
    /// # Panics
    /// Where the range leaves the buffer.
    ///
    /// # Safety
    /// Nobody writes to the range while the slice lives: no copy to it is pending, no other slice is mutable.
    pub unsafe fn slice(&self, offset: Bytes, len: Bytes) -> &[u8] {
        let first = self.at(offset, len);
        // SAFETY: `at` checked the range; the memory came from the system filled and lives as
        // long as `self`; the caller excludes writers.
        unsafe { slice::from_raw_parts(first, len.as_usize()) }
    }

    /// `len` writable bytes from `offset` on.
    ///
    /// # Panics
    /// Where the range leaves the buffer.
    ///
    /// # Safety
    /// Nobody else reads or writes the range while the slice lives: no copy of it is pending, no other slice overlaps.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one ring are filled by many threads")]
    pub unsafe fn slice_mut(&self, offset: Bytes, len: Bytes) -> &mut [u8] {
        let first = self.at(offset, len);
        // SAFETY: `at` checked the range; the memory is initialised and lives as long as `self`; the caller excludes
        // every other access.
        unsafe { slice::from_raw_parts_mut(first, len.as_usize()) }
    }

    fn at(&self, offset: Bytes, len: Bytes) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.size),
            "{len} from {offset} on leaves a buffer of {}",
            self.size
        );
        self.ptr.as_ptr().wrapping_add(offset.as_usize())
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        // SAFETY: ptr and size come from one `alloc_pinned`; no copy is pending, which the contracts of the copy calls
        // left to the one who enqueued it.
        let freed = unsafe { self.device.free_pinned(self.ptr.as_ptr(), self.size) };
        report(&*self.device, "pinned buffer", freed);
    }
}

/// Host memory that the copy engine reads where it is, such as a mapped file, with what keeps it mapped.
#[derive(Debug)]
pub struct Registration<M: fmt::Debug> {
    device: Arc<dyn Device>,
    ptr: *const u8,
    size: Bytes,
    memory: ManuallyDrop<M>,
}

// SAFETY: the memory belongs to the process, not to a thread, and is only named here, never read or written.
unsafe impl<M: fmt::Debug + Send> Send for Registration<M> {}
// SAFETY: as for `Send`.
unsafe impl<M: fmt::Debug + Sync> Sync for Registration<M> {}

impl<M: fmt::Debug> Registration<M> {
    /// Registers `size` bytes at `ptr`, page-aligned, which `memory` keeps mapped.
    ///
    /// # Errors
    /// What [`Device::register_host`] reports.
    ///
    /// # Safety
    /// The range is mapped readable and in no other registration, and stays mapped as long as `memory` lives. This value is
    /// dropped only when no copy that reads the range is pending.
    pub unsafe fn new(device: Arc<dyn Device>, memory: M, ptr: *const u8, size: Bytes) -> Result<Self> {
        // SAFETY: as the caller promises.
        unsafe { device.register_host(ptr, size)? };
        Ok(Registration { device, ptr, size, memory: ManuallyDrop::new(memory) })
    }

    /// How much memory it is.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// What keeps it mapped.
    pub fn memory(&self) -> &M {
        &self.memory
    }
}

impl<M: fmt::Debug> Drop for Registration<M> {
    /// May block until the device is idle. Memory that cannot be given back stays mapped: the driver would refuse whatever is
    /// mapped and registered at its address later.
    fn drop(&mut self) {
        // SAFETY: registered by `new` and given back once, here; no copy is pending, which `new` left to the caller.
        let given_back = unsafe { self.device.unregister_host(self.ptr, self.size) };
        if given_back.is_ok() {
            // SAFETY: dropped once, here, and not used any more.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
        report(&*self.device, "registration", given_back);
    }
}

fn report(device: &dyn Device, what: &str, result: Result<()>) {
    match result {
        Ok(()) => {}
        // The loss itself was reported to the caller who met it; everything the device held is gone with it.
        Err(error) if error.is_lost() => {
            tracing::debug!(device = %device.id(), %error, "a {what} went with its device")
        }
        Err(error) => tracing::warn!(device = %device.id(), %error, "a {what} could not be given back"),
    }
}

//! Devices: reserved address ranges, the physical frames that back them, streams and events.
//!
//! The engine above validates every request; a backend is thin and reports only what nobody could foresee.
//! Three invariants hold for every backend:
//!
//! * **Unmapped stays unmapped.** An address of a reservation without a frame faults when touched, on the host
//!   (segmentation fault) as on the GPU (sticky error). Nothing maps a page behind the engine's back.
//! * **Nothing waits for the whole device.** The only blocking call is [`Device::synchronize`], on one event; but a
//!   driver may let [`Device::unregister_host`] wait for an idle device, so it has a thread of its own above.
//! * **Calls bind themselves.** Any thread may call; a backend that needs a current context sets it and restores
//!   the caller's.

mod error;
mod id;
mod owned;
mod transform;

pub mod cuda;
pub mod host;

pub use error::{DeviceError, Result};
pub use id::{DeviceId, ParseDeviceError};
pub use owned::{Event, Frame, PinnedBuffer, Registration, Reservation, Stream};
pub use transform::{
    AddLowRank, Convert, EightBitSum, Element, Factors, Requantize, Rounding, Scale, Transform,
};

use std::fmt;
use std::sync::Arc;

use forebay_core::Bytes;

/// Opens a device: `host` with its default configuration (no capacity limit), or a GPU.
///
/// ```
/// let device = forebay_device::open("host".parse()?)?;
/// let frame = forebay_device::Frame::new(device.clone(), device.granularity())?;
/// assert_eq!(frame.size(), device.granularity());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`DeviceError::Unavailable`] with what was found and what would make it work.
pub fn open(id: DeviceId) -> Result<Arc<dyn Device>> {
    Ok(match id {
        DeviceId::Host => Arc::new(host::HostDevice::new(host::HostConfig::default())?),
        DeviceId::Cuda(ordinal) => cuda::CudaDevice::open(ordinal)?,
    })
}

/// An address on a device. Meaningful only together with the device it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceAddr(u64);

impl DeviceAddr {
    /// The address with this number.
    pub const fn new(raw: u64) -> Self {
        DeviceAddr(raw)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address `offset` bytes further on. Panics past the end of the address space.
    pub fn offset(self, offset: Bytes) -> DeviceAddr {
        DeviceAddr(self.0.checked_add(offset.get()).expect("device address overflow"))
    }
}

/// A physical allocation, by the backend's own handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FrameHandle(pub u64);

/// A stream, by the driver's own handle (`CUstream`; on the host backend a number of its own).
///
/// Streams of a [`Device`] exist as long as it does, so a handle that somebody kept does no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamHandle(u64);

impl StreamHandle {
    /// CUDA: the legacy default stream. Host: the calling thread itself, where work is done before the call returns.
    pub const DEFAULT: StreamHandle = StreamHandle(0);

    /// A stream that was made elsewhere, by PyTorch say.
    ///
    /// # Safety
    /// It is a stream of the device it is used with, and exists as long as anything remembers the handle: a model whose
    /// weights were used on it remembers it until the model is detached and its last view is gone. (PyTorch's own streams
    /// exist for ever.)
    pub const unsafe fn from_raw(raw: u64) -> Self {
        StreamHandle(raw)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// An event, by the backend's own handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EventHandle(pub u64);

/// A copy from host memory to a device's.
#[derive(Clone, Copy, Debug)]
pub struct HostCopy {
    /// Where to.
    pub dst: DeviceAddr,
    /// The first byte to be read.
    pub src: *const u8,
    /// How many.
    pub len: Bytes,
}

/// What a device has, in bytes, as seen by this process at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free for anybody to allocate.
    pub free: Bytes,
    /// All of it.
    pub total: Bytes,
}

/// A device, as its consumers (the engine, the owned handles) need it.
///
/// Raw handles come from this trait's `create_*` calls and are used with the device that made them; the owned
/// types ([`Frame`], [`Reservation`], [`Stream`], [`Event`], [`PinnedBuffer`], [`Registration`]) keep that promise.
pub trait Device: Send + Sync + fmt::Debug {
    /// Which device this is.
    fn id(&self) -> DeviceId;

    /// The hardware's name, for people.
    fn name(&self) -> String;

    /// The smallest frame; every frame and every mapped range is a multiple of it.
    fn granularity(&self) -> Bytes;

    /// Free and total memory.
    fn memory(&self) -> Result<MemoryInfo>;

    /// Reserves `size` bytes of address space with no memory behind it, aligned to `align` (a power of two).
    fn reserve(&self, size: Bytes, align: Bytes) -> Result<DeviceAddr>;

    /// Gives a reservation back.
    ///
    /// # Safety
    /// `addr` and `size` are those of one [`reserve`](Device::reserve), and nothing is mapped in it.
    unsafe fn free_reservation(&self, addr: DeviceAddr, size: Bytes) -> Result<()>;

    /// Makes a physical frame of `size` bytes, a multiple of the granularity.
    fn create_frame(&self, size: Bytes) -> Result<FrameHandle>;

    /// Gives a frame's memory back.
    ///
    /// # Safety
    /// The frame is mapped nowhere and is not used again.
    unsafe fn release_frame(&self, frame: FrameHandle, size: Bytes) -> Result<()>;

    /// Maps the whole frame at `addr`. Not accessible before [`allow_access`](Device::allow_access).
    ///
    /// # Safety
    /// The range lies in a reservation of this device and is unmapped; the frame is mapped nowhere else.
    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, frame: FrameHandle) -> Result<()>;

    /// Makes a mapped range readable and writable by this device.
    ///
    /// # Safety
    /// Every page of the range is mapped.
    unsafe fn allow_access(&self, addr: DeviceAddr, size: Bytes) -> Result<()>;

    /// Unmaps whole frames. The frames keep their contents.
    ///
    /// # Safety
    /// The range consists of whole mapped frames, and no work that touches it is pending or running.
    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()>;

    /// A stream that does not synchronise with the default stream and is nobody else's until it is given back.
    fn take_stream(&self) -> Result<StreamHandle>;

    /// Gives a stream from [`take_stream`](Device::take_stream) back, to be taken again. Work on it still completes.
    fn give_back_stream(&self, stream: StreamHandle) -> Result<()>;

    /// Makes an event (no timing, blocking host waits). One that was never recorded counts as complete.
    fn create_event(&self) -> Result<EventHandle>;

    /// Destroys an event; a recorded one may still be pending.
    ///
    /// # Safety
    /// The event came from [`create_event`](Device::create_event) and is not used again.
    unsafe fn destroy_event(&self, event: EventHandle) -> Result<()>;

    /// Records the event after all work now in the stream; replaces an earlier record.
    ///
    /// # Safety
    /// Both handles are alive.
    unsafe fn record(&self, event: EventHandle, stream: StreamHandle) -> Result<()>;

    /// Makes later work in `stream` wait for the event's latest record. The caller does not wait, except on the
    /// host backend's [`StreamHandle::DEFAULT`], which *is* the caller.
    ///
    /// # Safety
    /// Both handles are alive.
    unsafe fn wait(&self, stream: StreamHandle, event: EventHandle) -> Result<()>;

    /// Whether the event's latest record has completed.
    ///
    /// # Safety
    /// The event is alive.
    unsafe fn is_complete(&self, event: EventHandle) -> Result<bool>;

    /// Blocks the calling thread until the event's latest record has completed.
    ///
    /// # Safety
    /// The event is alive.
    unsafe fn synchronize(&self, event: EventHandle) -> Result<()>;

    /// Allocates host memory that the copy engine reads directly. Page-aligned, valid for every device.
    fn alloc_pinned(&self, size: Bytes) -> Result<*mut u8>;

    /// Frees host memory from [`alloc_pinned`](Device::alloc_pinned).
    ///
    /// # Safety
    /// `ptr` and `size` are those of one `alloc_pinned`, and no copy that touches it is pending.
    unsafe fn free_pinned(&self, ptr: *mut u8, size: Bytes) -> Result<()>;

    /// Lets the copy engine read host memory where it is, for instance a file mapped read-only. Until it is
    /// unregistered its pages cannot be reclaimed. Refused as not supported where copies gain nothing by it.
    ///
    /// # Safety
    /// The range is page-aligned, mapped readable and in no other registration, and stays mapped until unregistered.
    unsafe fn register_host(&self, ptr: *const u8, size: Bytes) -> Result<()>;

    /// As [`register_host`](Device::register_host), for memory that may be written as well, and for every device. The range
    /// need not be aligned.
    ///
    /// # Safety
    /// The range is mapped readable and writable and in no other registration, and stays mapped until unregistered.
    unsafe fn register_memory(&self, ptr: *mut u8, size: Bytes) -> Result<()>;

    /// Undoes [`register_host`](Device::register_host) and [`register_memory`](Device::register_memory). May block the
    /// caller until the device is idle.
    ///
    /// # Safety
    /// `ptr` and `size` are those of one registration, and no copy that uses the range is pending.
    unsafe fn unregister_host(&self, ptr: *const u8, size: Bytes) -> Result<()>;

    /// Enqueues a copy from host memory (asynchronous where `src` is pinned or registered).
    ///
    /// # Safety
    /// `src` is readable and unchanged, and `dst` mapped and accessible, until the copy has completed.
    unsafe fn copy_to_device(
        &self,
        dst: DeviceAddr,
        src: *const u8,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()>;

    /// Enqueues copies from host memory, in no order among themselves. Some of them may be enqueued where this fails.
    ///
    /// # Safety
    /// As for [`copy_to_device`](Device::copy_to_device), for each of them. They have no target in common.
    unsafe fn copy_all_to_device(&self, copies: &[HostCopy], stream: StreamHandle) -> Result<()> {
        copies.iter().try_for_each(|copy| {
            // SAFETY: the caller's promise is this call's as well.
            unsafe { self.copy_to_device(copy.dst, copy.src, copy.len, stream) }
        })
    }

    /// Enqueues a copy to host memory.
    ///
    /// # Safety
    /// `src` is mapped and accessible, and `dst` writable and otherwise unused, until the copy has completed.
    unsafe fn copy_to_host(
        &self,
        dst: *mut u8,
        src: DeviceAddr,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()>;

    /// Enqueues work on bytes that are on the device. The first that is no copy may take a while, until the work's code is
    /// loaded; one without elements does nothing else.
    ///
    /// # Safety
    /// Every address is valid for the sizes given, and what is read unchanged and what is written otherwise unused,
    /// until the work has completed.
    unsafe fn transform(&self, transform: &Transform, stream: StreamHandle) -> Result<()>;
}

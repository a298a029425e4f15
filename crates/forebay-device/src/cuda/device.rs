//! A GPU as a [`Device`].

use std::collections::HashMap;
use std::ffi::c_uint;
use std::sync::{Arc, OnceLock};

use forebay_core::Bytes;
use parking_lot::Mutex;

use super::context::PrimaryContext;
use super::driver::{Driver, retried};
use super::info::{self, CudaInfo};
use super::kernels::Kernels;
use super::pinned::HostMapping;
use super::table::Table;
use super::types::{
    ALREADY_REGISTERED, AccessDesc, AllocationProp, Code, CopyAttributes, DEVICE_UNAVAILABLE,
    EVENT_BLOCKING_UNTIMED, GRANULARITY_MINIMUM, HIGHEST_PRIORITY, HOST_PORTABLE, HOST_REGISTER_READ_ONLY,
    NOT_READY, OUT_OF_MEMORY, Ordinal, Pointer, STREAM_NON_BLOCKING,
};
use crate::{
    Device, DeviceAddr, DeviceError, DeviceId, EventHandle, FrameHandle, HostCopy, MemoryInfo, Result,
    StreamHandle, Transform,
};

/// How many places in memory are tried for a pinned buffer.
const MOST_PLACES: usize = 8;

/// A GPU. Works in its primary context, so pointers, streams and events are shared with PyTorch.
#[derive(Debug)]
pub struct CudaDevice {
    driver: &'static Driver,
    context: PrimaryContext,
    device: Ordinal,
    info: CudaInfo,
    granularity: Bytes,
    /// The mappings behind pinned buffers, by their first byte. A leaf: no driver call is made under it.
    pinned: Mutex<HashMap<usize, HostMapping>>,
    /// Streams given back. A leaf like `pinned`.
    idle_streams: Mutex<Vec<StreamHandle>>,
    /// Loaded when first needed.
    kernels: OnceLock<Kernels>,
}

impl CudaDevice {
    /// Opens the GPU `cuda:N` and holds its primary context until dropped.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`], with what is missing and what would help: no driver library, a driver older than
    /// CUDA 12.0, no GPU, no such ordinal, no virtual memory management, a GPU that another process holds.
    pub fn open(ordinal: u32) -> Result<Arc<CudaDevice>> {
        let name = format!("cuda:{ordinal}");
        let driver = Driver::get(&name)?;
        let device = info::find(driver, ordinal)?;
        let info = CudaInfo::read(driver, device)?;
        if !info.virtual_memory {
            return Err(DeviceError::Unavailable {
                device: name,
                reason: format!("{} has no virtual memory management with this driver", info.name),
                remedy: "use a GPU or a vGPU profile that has it, or the device \"host\"".to_owned(),
            });
        }
        let context =
            PrimaryContext::retain(driver, device).map_err(|code| no_context(driver, &name, code))?;
        let granularity = granularity_of(driver, &context, device)?;
        tracing::debug!(%info, %granularity, "opened");
        Ok(Arc::new(CudaDevice {
            driver,
            context,
            device,
            info,
            granularity,
            pinned: Mutex::default(),
            idle_streams: Mutex::default(),
            kernels: OnceLock::new(),
        }))
    }

    /// What the driver says of the GPU.
    pub fn info(&self) -> &CudaInfo {
        &self.info
    }

    fn table(&self) -> &'static Table {
        &self.driver.table
    }

    /// # Safety
    /// The memory is mapped, and writable unless the flags say that it is only read; it stays mapped until unregistered.
    unsafe fn register(&self, first: *mut u8, size: Bytes, flags: c_uint) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: mapped memory, by the contract of this call.
        let code = unsafe { (self.table().mem_host_register)(first.cast(), size.as_usize(), flags) };
        if code == OUT_OF_MEMORY {
            // Memory of the host, of which the device does not know how much is free.
            return Err(DeviceError::OutOfMemory { call: "cuMemHostRegister", wanted: size, free: None });
        }
        self.driver.check("cuMemHostRegister", code, || format!("{size} at {first:p}"))
    }

    /// `Ok` where a call that takes `size` bytes of something succeeded. Out of memory carries what is free now.
    fn check_room(&self, call: &'static str, code: Code, size: Bytes) -> Result<()> {
        if code == OUT_OF_MEMORY {
            let free = self.memory().ok().map(|memory| memory.free);
            return Err(DeviceError::OutOfMemory { call, wanted: size, free });
        }
        self.driver.check(call, code, || size.to_string())
    }

    fn check_range(&self, call: &'static str, code: Code, addr: DeviceAddr, size: Bytes) -> Result<()> {
        if code == OUT_OF_MEMORY {
            return self.check_room(call, code, size);
        }
        self.driver.check(call, code, || format!("{size} at {:#x}", addr.get()))
    }

    fn check_event(&self, call: &'static str, code: Code, event: EventHandle) -> Result<()> {
        self.driver.check(call, code, || format!("event {:#x}", event.0))
    }

    fn check_stream(&self, call: &'static str, code: Code, stream: StreamHandle) -> Result<()> {
        self.driver.check(call, code, || format!("stream {:#x}", stream.get()))
    }
}

impl Device for CudaDevice {
    fn id(&self) -> DeviceId {
        DeviceId::Cuda(self.info.ordinal)
    }

    fn name(&self) -> String {
        self.info.name.clone()
    }

    fn granularity(&self) -> Bytes {
        self.granularity
    }

    fn memory(&self) -> Result<MemoryInfo> {
        let _current = self.context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both results have a place to go.
        let code = unsafe { (self.table().mem_get_info)(&mut free, &mut total) };
        self.driver.check("cuMemGetInfo", code, || format!("cuda:{}", self.device))?;
        Ok(MemoryInfo { free: Bytes::new(free as u64), total: Bytes::new(total as u64) })
    }

    fn reserve(&self, size: Bytes, align: Bytes) -> Result<DeviceAddr> {
        let _current = self.context.enter()?;
        let mut addr = 0;
        let code = retried("cuMemAddressReserve", || {
            // SAFETY: the result has a place to go; the driver checks size and alignment.
            unsafe { (self.table().mem_address_reserve)(&mut addr, size.as_usize(), align.as_usize(), 0, 0) }
        });
        self.check_room("cuMemAddressReserve", code, size)?;
        Ok(DeviceAddr::new(addr))
    }

    unsafe fn free_reservation(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let _current = self.context.enter()?;
        let code = retried("cuMemAddressFree", || {
            // SAFETY: a reservation with nothing mapped in it, by the contract of this call.
            unsafe { (self.table().mem_address_free)(addr.get(), size.as_usize()) }
        });
        self.check_range("cuMemAddressFree", code, addr, size)
    }

    fn create_frame(&self, size: Bytes) -> Result<FrameHandle> {
        let _current = self.context.enter()?;
        let prop = AllocationProp::on_device(self.device);
        let mut frame = 0;
        let code = retried("cuMemCreate", || {
            // SAFETY: the result has a place to go and `prop` is laid out as the driver's header says.
            unsafe { (self.table().mem_create)(&mut frame, size.as_usize(), &prop, 0) }
        });
        self.check_room("cuMemCreate", code, size)?;
        Ok(FrameHandle(frame))
    }

    unsafe fn release_frame(&self, frame: FrameHandle, size: Bytes) -> Result<()> {
        let _current = self.context.enter()?;
        let code = retried("cuMemRelease", || {
            // SAFETY: a frame of this device that is not used again, by the contract of this call.
            unsafe { (self.table().mem_release)(frame.0) }
        });
        self.driver.check("cuMemRelease", code, || format!("frame {:#x} of {size}", frame.0))
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, frame: FrameHandle) -> Result<()> {
        let _current = self.context.enter()?;
        let code = retried("cuMemMap", || {
            // SAFETY: a free range of a reservation and a live frame, by the contract of this call.
            unsafe { (self.table().mem_map)(addr.get(), size.as_usize(), 0, frame.0, 0) }
        });
        self.check_range("cuMemMap", code, addr, size)
    }

    unsafe fn allow_access(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let _current = self.context.enter()?;
        let access = AccessDesc::read_write(self.device);
        let code = retried("cuMemSetAccess", || {
            // SAFETY: a mapped range, by the contract of this call; one description is given.
            unsafe { (self.table().mem_set_access)(addr.get(), size.as_usize(), &access, 1) }
        });
        self.check_range("cuMemSetAccess", code, addr, size)
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let _current = self.context.enter()?;
        let code = retried("cuMemUnmap", || {
            // SAFETY: whole frames that no work touches, by the contract of this call.
            unsafe { (self.table().mem_unmap)(addr.get(), size.as_usize()) }
        });
        self.check_range("cuMemUnmap", code, addr, size)
    }

    fn take_stream(&self) -> Result<StreamHandle> {
        if let Some(stream) = self.idle_streams.lock().pop() {
            return Ok(stream);
        }
        let _current = self.context.enter()?;
        let mut stream = 0;
        // SAFETY: the result has a place to go.
        let code = unsafe {
            (self.table().stream_create_with_priority)(&mut stream, STREAM_NON_BLOCKING, HIGHEST_PRIORITY)
        };
        self.driver.check("cuStreamCreateWithPriority", code, || "a stream of its own".to_owned())?;
        // SAFETY: a stream of this device, which destroys it only with itself.
        Ok(unsafe { StreamHandle::from_raw(stream) })
    }

    fn give_back_stream(&self, stream: StreamHandle) -> Result<()> {
        self.idle_streams.lock().push(stream);
        Ok(())
    }

    fn create_event(&self) -> Result<EventHandle> {
        let _current = self.context.enter()?;
        let mut event = 0;
        // SAFETY: the result has a place to go.
        let code = unsafe { (self.table().event_create)(&mut event, EVENT_BLOCKING_UNTIMED) };
        self.driver.check("cuEventCreate", code, || "an event without timing".to_owned())?;
        Ok(EventHandle(event))
    }

    unsafe fn destroy_event(&self, event: EventHandle) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: an event of this device that is not used again, by the contract of this call.
        let code = unsafe { (self.table().event_destroy)(event.0) };
        self.check_event("cuEventDestroy", code, event)
    }

    unsafe fn record(&self, event: EventHandle, stream: StreamHandle) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both are alive, by the contract of this call.
        let code = unsafe { (self.table().event_record)(event.0, stream.get()) };
        self.check_stream("cuEventRecord", code, stream)
    }

    unsafe fn wait(&self, stream: StreamHandle, event: EventHandle) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both are alive, by the contract of this call.
        let code = unsafe { (self.table().stream_wait_event)(stream.get(), event.0, 0) };
        self.check_stream("cuStreamWaitEvent", code, stream)
    }

    unsafe fn is_complete(&self, event: EventHandle) -> Result<bool> {
        let _current = self.context.enter()?;
        // SAFETY: the event is alive, by the contract of this call.
        match unsafe { (self.table().event_query)(event.0) } {
            NOT_READY => Ok(false),
            code => self.check_event("cuEventQuery", code, event).map(|()| true),
        }
    }

    unsafe fn synchronize(&self, event: EventHandle) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: the event is alive, by the contract of this call.
        let code = unsafe { (self.table().event_synchronize)(event.0) };
        self.check_event("cuEventSynchronize", code, event)
    }

    fn alloc_pinned(&self, size: Bytes) -> Result<*mut u8> {
        let mut elsewhere = Vec::new();
        loop {
            let mapping = HostMapping::new(size)?;
            let first = mapping.first();
            // SAFETY: memory of our own that stays mapped until it is unregistered.
            match unsafe { self.register(first, size, HOST_PORTABLE) } {
                Ok(()) => {
                    self.pinned.lock().insert(first.addr(), mapping);
                    return Ok(first);
                }
                // Somebody unmapped memory that the driver still knows, and the kernel gave its address again. Held until
                // another is found.
                Err(DeviceError::Driver { code: ALREADY_REGISTERED, .. })
                    if elsewhere.len() < MOST_PLACES =>
                {
                    elsewhere.push(mapping);
                }
                Err(error) => return Err(error),
            }
        }
    }

    unsafe fn free_pinned(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        let mapping = self.pinned.lock().remove(&ptr.addr());
        // SAFETY: registered by `alloc_pinned`, and no copy touches it, by the contract of this call.
        let unregistered = unsafe { self.unregister_host(ptr, size) };
        if unregistered.is_err() {
            // The driver may still know its pages.
            std::mem::forget(mapping);
        }
        unregistered
    }

    unsafe fn register_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        if !self.info.registers_files {
            let why = format!("{} does not read memory that is mapped read-only", self.info.name);
            return Err(DeviceError::unsupported("cuMemHostRegister", why));
        }
        // SAFETY: mapped memory that stays mapped, by the contract of this call; the driver does not write to it.
        unsafe { self.register(ptr.cast_mut(), size, HOST_REGISTER_READ_ONLY) }
    }

    unsafe fn register_memory(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        // SAFETY: mapped memory that stays mapped, by the contract of this call.
        unsafe { self.register(ptr, size, HOST_PORTABLE) }
    }

    unsafe fn unregister_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: registered memory that no copy reads, by the contract of this call.
        let code = unsafe { (self.table().mem_host_unregister)(ptr.cast_mut().cast()) };
        self.driver.check("cuMemHostUnregister", code, || format!("{size} at {ptr:p}"))
    }

    unsafe fn copy_to_device(
        &self,
        dst: DeviceAddr,
        src: *const u8,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both sides stay valid until the copy has completed, by the contract of this call.
        let code =
            unsafe { (self.table().memcpy_to_device)(dst.get(), src.cast(), len.as_usize(), stream.get()) };
        self.check_range("cuMemcpyHtoDAsync", code, dst, len)
    }

    unsafe fn copy_all_to_device(&self, copies: &[HostCopy], stream: StreamHandle) -> Result<()> {
        let one_by_one = || {
            copies.iter().try_for_each(|&HostCopy { dst, src, len }| {
                // SAFETY: the contract of this call.
                unsafe { self.copy_to_device(dst, src, len, stream) }
            })
        };
        let (Some(memcpy_batch), true) = (self.table().memcpy_batch, copies.len() > 1) else {
            return one_by_one();
        };
        let targets: Vec<Pointer> = copies.iter().map(|copy| copy.dst.get()).collect();
        let sources: Vec<Pointer> = copies.iter().map(|copy| copy.src.addr() as Pointer).collect();
        let sizes: Vec<usize> = copies.iter().map(|copy| copy.len.as_usize()).collect();
        let _current = self.context.enter()?;
        // SAFETY: both sides of all copies stay valid until they have completed, by the contract of this call; the lists are
        // equally long, and the driver reads them before it returns.
        let code = unsafe {
            memcpy_batch(
                targets.as_ptr(),
                sources.as_ptr(),
                sizes.as_ptr(),
                copies.len(),
                &CopyAttributes::IN_STREAM_ORDER,
                &0,
                1,
                stream.get(),
            )
        };
        let size = copies.iter().map(|copy| copy.len).sum();
        match self.check_range("cuMemcpyBatchAsync", code, copies[0].dst, size) {
            Err(error) if error.is_unsupported() => one_by_one(),
            result => result,
        }
    }

    unsafe fn copy_to_host(
        &self,
        dst: *mut u8,
        src: DeviceAddr,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        let _current = self.context.enter()?;
        // SAFETY: both sides stay valid until the copy has completed, by the contract of this call.
        let code =
            unsafe { (self.table().memcpy_to_host)(dst.cast(), src.get(), len.as_usize(), stream.get()) };
        self.check_range("cuMemcpyDtoHAsync", code, src, len)
    }

    unsafe fn transform(&self, transform: &Transform, stream: StreamHandle) -> Result<()> {
        let _current = self.context.enter()?;
        if let Transform::Copy { to, from, len } = *transform {
            if len == Bytes::ZERO {
                return Ok(());
            }
            // SAFETY: both sides are valid until the copy has completed, by the contract of this call.
            let code = unsafe {
                (self.table().memcpy_on_device)(to.get(), from.get(), len.as_usize(), stream.get())
            };
            return self.check_range("cuMemcpyDtoDAsync", code, to, len);
        }
        let kernels = match self.kernels.get() {
            Some(kernels) => kernels,
            // Two threads may load them at once; one of the two is kept, and the other goes with the context.
            None => {
                let loaded = Kernels::load(self.driver)?;
                self.kernels.get_or_init(|| loaded)
            }
        };
        if !transform.check()? {
            return Ok(());
        }
        // SAFETY: the memory stays valid until the work has completed, by the contract of this call.
        unsafe { kernels.enqueue(self.driver, transform, stream) }
    }
}

fn granularity_of(driver: &Driver, context: &PrimaryContext, device: Ordinal) -> Result<Bytes> {
    let _current = context.enter()?;
    let prop = AllocationProp::on_device(device);
    let mut granularity = 0;
    // SAFETY: the result has a place to go and `prop` is laid out as the driver's header says.
    let code = unsafe { (driver.table.mem_get_granularity)(&mut granularity, &prop, GRANULARITY_MINIMUM) };
    driver.check("cuMemGetAllocationGranularity", code, || format!("cuda:{device}"))?;
    Ok(Bytes::new(granularity as u64))
}

fn no_context(driver: &Driver, device: &str, code: Code) -> DeviceError {
    let (reason, remedy) = match code {
        OUT_OF_MEMORY => (
            "the GPU has no room left for this process to start".to_owned(),
            "end other programs on the GPU, which nvidia-smi lists",
        ),
        DEVICE_UNAVAILABLE => (
            "the GPU is held by another process alone".to_owned(),
            "end that process, or set the compute mode to default with nvidia-smi -c 0",
        ),
        code => (
            format!("the GPU gave no context with {} (code {code})", driver.describe(code)),
            "look at what nvidia-smi says of the GPU",
        ),
    };
    DeviceError::Unavailable { device: device.to_owned(), reason, remedy: remedy.to_owned() }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Buffers whose end failed are registered still: the driver must not meet other memory at their addresses.
        self.pinned.get_mut().drain().for_each(|(_, mapping)| std::mem::forget(mapping));
        let Ok(_current) = self.context.enter() else { return };
        for stream in std::mem::take(self.idle_streams.get_mut()) {
            // SAFETY: made by this device, of which nothing is left that could use it.
            let code = unsafe { (self.table().stream_destroy)(stream.get()) };
            if let Err(error) = self.check_stream("cuStreamDestroy", code, stream) {
                tracing::debug!(%error, "a stream went with its device");
            }
        }
    }
}

//! A device that fails the calls it is told to fail, and remembers which streams it was asked to record.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use forebay::Bytes;
use forebay::device::{
    Device, DeviceAddr, DeviceError, DeviceId, EventHandle, FrameHandle, HostCopy, MemoryInfo, Result,
    StreamHandle, Transform,
};

/// The kinds of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Memory,
    Reserve,
    FreeReservation,
    CreateFrame,
    ReleaseFrame,
    Map,
    AllowAccess,
    Unmap,
    TakeStream,
    GiveBackStream,
    CreateEvent,
    DestroyEvent,
    Record,
    Wait,
    IsComplete,
    Synchronize,
    AllocPinned,
    FreePinned,
    RegisterHost,
    UnregisterHost,
    CopyToDevice,
    CopyToHost,
    Transform,
}

impl Call {
    pub const ALL: [Call; 23] = [
        Call::Memory,
        Call::Reserve,
        Call::FreeReservation,
        Call::CreateFrame,
        Call::ReleaseFrame,
        Call::Map,
        Call::AllowAccess,
        Call::Unmap,
        Call::TakeStream,
        Call::GiveBackStream,
        Call::CreateEvent,
        Call::DestroyEvent,
        Call::Record,
        Call::Wait,
        Call::IsComplete,
        Call::Synchronize,
        Call::AllocPinned,
        Call::FreePinned,
        Call::RegisterHost,
        Call::UnregisterHost,
        Call::CopyToDevice,
        Call::CopyToHost,
        Call::Transform,
    ];
}

/// How a call fails. A lost device fails every later call as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    OutOfMemory,
    /// As a driver answers now and then under pressure.
    NotReady,
    Refused,
    Lost,
}

/// What was made on the device and not given back. What a failure kept from being given back does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    pub frames: i64,
    pub reservations: i64,
    pub events: i64,
    pub pinned: i64,
    pub registered: i64,
}

/// Passes everything on to another device, but for the calls that are to fail.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Device>,
    plan: Mutex<Plan>,
    /// What the next failing call waits for before it fails.
    held: Mutex<Option<mpsc::Receiver<()>>>,
    recorded: Mutex<HashSet<StreamHandle>>,
    live: Mutex<Live>,
}

#[derive(Debug, Default)]
struct Plan {
    call: Option<Call>,
    failure: Option<Failure>,
    /// Calls of this kind to let pass first.
    pass: u32,
    /// Calls of this kind to fail then.
    fail: u32,
    lost: bool,
    hits: u32,
}

impl Faulty {
    pub fn new(inner: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Faulty {
            inner,
            plan: Mutex::default(),
            held: Mutex::default(),
            recorded: Mutex::default(),
            live: Mutex::default(),
        })
    }

    /// Lets `pass` calls of this kind through, then fails the next `fail`.
    pub fn fail(&self, call: Call, failure: Failure, pass: u32, fail: u32) {
        *self.plan() = Plan { call: Some(call), failure: Some(failure), pass, fail, ..Plan::default() };
    }

    /// Fails the next call of this kind once that is let go: when what this returns is dropped.
    pub fn fail_later(&self, call: Call, failure: Failure) -> mpsc::Sender<()> {
        let (let_go, held) = mpsc::channel();
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        self.fail(call, failure, 0, 1);
        let_go
    }

    /// How many calls were failed.
    pub fn hits(&self) -> u32 {
        self.plan().hits
    }

    /// The streams recorded since the last time this was asked.
    pub fn take_recorded(&self) -> HashSet<StreamHandle> {
        std::mem::take(&mut self.recorded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What there is now.
    pub fn live(&self) -> Live {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what was made, where it was.
    fn made<T>(&self, result: Result<T>, count: impl FnOnce(&mut Live)) -> Result<T> {
        if result.is_ok() {
            count(&mut self.live.lock().unwrap_or_else(PoisonError::into_inner));
        }
        result
    }

    fn gone(&self, count: impl FnOnce(&mut Live)) {
        count(&mut self.live.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, call: Call) -> Result<()> {
        let mut plan = self.plan();
        if plan.call == Some(call) && !plan.lost {
            match (plan.pass, plan.fail) {
                (0, 0) => {}
                (0, _) => {
                    (plan.fail, plan.hits) = (plan.fail - 1, plan.hits + 1);
                    let failure = plan.failure.unwrap();
                    plan.lost = failure == Failure::Lost;
                    drop(plan);
                    let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
                    assert!(held.is_none_or(|held| held.recv().is_err()), "nothing is ever sent");
                    return Err(failure.error());
                }
                _ => plan.pass -= 1,
            }
        }
        if plan.lost { Err(Failure::Lost.error()) } else { Ok(()) }
    }
}

impl Failure {
    fn error(self) -> DeviceError {
        let (name, context) = ("injected".to_owned(), "by a test".to_owned());
        match self {
            Failure::OutOfMemory => {
                DeviceError::OutOfMemory { call: "injected", wanted: Bytes::new(1), free: None }
            }
            Failure::NotReady => DeviceError::Driver { call: "injected", code: 600, name, context },
            Failure::Refused => DeviceError::Driver { call: "injected", code: 999, name, context },
            Failure::Lost => DeviceError::Lost { call: "injected", code: 719, name, context },
        }
    }
}

impl Device for Faulty {
    fn id(&self) -> DeviceId {
        self.inner.id()
    }

    fn name(&self) -> String {
        self.inner.name()
    }

    fn granularity(&self) -> Bytes {
        self.inner.granularity()
    }

    fn memory(&self) -> Result<MemoryInfo> {
        self.check(Call::Memory)?;
        self.inner.memory()
    }

    fn reserve(&self, size: Bytes, align: Bytes) -> Result<DeviceAddr> {
        self.check(Call::Reserve)?;
        self.made(self.inner.reserve(size, align), |live| live.reservations += 1)
    }

    unsafe fn free_reservation(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.gone(|live| live.reservations -= 1);
        self.check(Call::FreeReservation)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.free_reservation(addr, size) }
    }

    fn create_frame(&self, size: Bytes) -> Result<FrameHandle> {
        self.check(Call::CreateFrame)?;
        self.made(self.inner.create_frame(size), |live| live.frames += 1)
    }

    unsafe fn release_frame(&self, frame: FrameHandle, size: Bytes) -> Result<()> {
        self.gone(|live| live.frames -= 1);
        self.check(Call::ReleaseFrame)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.release_frame(frame, size) }
    }

    unsafe fn map(&self, addr: DeviceAddr, size: Bytes, frame: FrameHandle) -> Result<()> {
        self.check(Call::Map)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.map(addr, size, frame) }
    }

    unsafe fn allow_access(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.check(Call::AllowAccess)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.allow_access(addr, size) }
    }

    unsafe fn unmap(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.check(Call::Unmap)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.unmap(addr, size) }
    }

    fn take_stream(&self) -> Result<StreamHandle> {
        self.check(Call::TakeStream)?;
        self.inner.take_stream()
    }

    fn give_back_stream(&self, stream: StreamHandle) -> Result<()> {
        self.check(Call::GiveBackStream)?;
        self.inner.give_back_stream(stream)
    }

    fn create_event(&self) -> Result<EventHandle> {
        self.check(Call::CreateEvent)?;
        self.made(self.inner.create_event(), |live| live.events += 1)
    }

    unsafe fn destroy_event(&self, event: EventHandle) -> Result<()> {
        self.gone(|live| live.events -= 1);
        self.check(Call::DestroyEvent)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.destroy_event(event) }
    }

    unsafe fn record(&self, event: EventHandle, stream: StreamHandle) -> Result<()> {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).insert(stream);
        self.check(Call::Record)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.record(event, stream) }
    }

    unsafe fn wait(&self, stream: StreamHandle, event: EventHandle) -> Result<()> {
        self.check(Call::Wait)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.wait(stream, event) }
    }

    unsafe fn is_complete(&self, event: EventHandle) -> Result<bool> {
        self.check(Call::IsComplete)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.is_complete(event) }
    }

    unsafe fn synchronize(&self, event: EventHandle) -> Result<()> {
        self.check(Call::Synchronize)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.synchronize(event) }
    }

    fn alloc_pinned(&self, size: Bytes) -> Result<*mut u8> {
        self.check(Call::AllocPinned)?;
        self.made(self.inner.alloc_pinned(size), |live| live.pinned += 1)
    }

    unsafe fn free_pinned(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        self.gone(|live| live.pinned -= 1);
        self.check(Call::FreePinned)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.free_pinned(ptr, size) }
    }

    unsafe fn register_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        self.check(Call::RegisterHost)?;
        // SAFETY: passed on as it came.
        let registered = unsafe { self.inner.register_host(ptr, size) };
        self.made(registered, |live| live.registered += 1)
    }

    unsafe fn register_memory(&self, ptr: *mut u8, size: Bytes) -> Result<()> {
        self.check(Call::RegisterHost)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.register_memory(ptr, size) }
    }

    unsafe fn unregister_host(&self, ptr: *const u8, size: Bytes) -> Result<()> {
        self.gone(|live| live.registered -= 1);
        self.check(Call::UnregisterHost)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.unregister_host(ptr, size) }
    }

    unsafe fn copy_to_device(
        &self,
        dst: DeviceAddr,
        src: *const u8,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        self.check(Call::CopyToDevice)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.copy_to_device(dst, src, len, stream) }
    }

    unsafe fn copy_all_to_device(&self, copies: &[HostCopy], stream: StreamHandle) -> Result<()> {
        self.check(Call::CopyToDevice)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.copy_all_to_device(copies, stream) }
    }

    unsafe fn copy_to_host(
        &self,
        dst: *mut u8,
        src: DeviceAddr,
        len: Bytes,
        stream: StreamHandle,
    ) -> Result<()> {
        self.check(Call::CopyToHost)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.copy_to_host(dst, src, len, stream) }
    }

    unsafe fn transform(&self, transform: &Transform, stream: StreamHandle) -> Result<()> {
        self.check(Call::Transform)?;
        // SAFETY: passed on as it came.
        unsafe { self.inner.transform(transform, stream) }
    }
}

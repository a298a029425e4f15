//! The thread that gives memory of buffers back: a driver may let it wait for an idle device.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use forebay_core::Bytes;
use forebay_device::{Device, DeviceError, Event};
use parking_lot::Mutex;

use super::memory::HostMemory;
use super::{HostRange, Part, have_ended};

/// How long a buffer may keep memory that it took ahead of need.
const IDLE: Duration = Duration::from_secs(1);

/// The thread's other end. Without a thread, and once the engine is shut down, nothing is given back: the memory goes with
/// the process, for a device may still use it.
#[derive(Debug, Default)]
pub(crate) struct Helper(Mutex<Option<Sender<Job>>>);

/// What a part gives up.
#[derive(Debug)]
pub(crate) struct GiveBack {
    /// To be unregistered, where it is registered.
    pub(super) registered: Vec<Part>,
    /// Memory to be given back afterwards: from, to.
    pub(super) discard: Option<(Bytes, Bytes)>,
}

#[derive(Debug)]
pub(crate) enum Job {
    GiveBack { range: Arc<HostRange>, what: GiveBack, part: (Bytes, Bytes), copies: Vec<Arc<Event>> },
    End { memory: Arc<HostMemory>, registered: Vec<Part>, copies: Vec<Arc<Event>> },
    Watch(Weak<HostRange>),
}

impl GiveBack {
    pub(super) fn start(&self) -> Option<Bytes> {
        let registered = self.registered.iter().map(|(start, _)| *start);
        registered.chain(self.discard.map(|(start, _)| start)).min()
    }
}

impl Helper {
    /// Where the thread listens.
    pub(crate) fn open(&self) -> Receiver<Job> {
        let (sender, jobs) = channel();
        *self.0.lock() = Some(sender);
        jobs
    }

    /// Ends the thread once it has done what it was told.
    pub(crate) fn close(&self) {
        self.0.lock().take();
    }

    pub(super) fn give_back(
        &self,
        range: &Arc<HostRange>,
        what: GiveBack,
        part: (Bytes, Bytes),
        copies: Vec<Arc<Event>>,
    ) {
        let job = Job::GiveBack { range: Arc::clone(range), what, part, copies };
        if let Err(Job::GiveBack { range, .. }) = self.send(job) {
            range.left(part);
        }
    }

    /// Unregisters what is left of a buffer and drops its memory.
    pub(super) fn end(&self, memory: Arc<HostMemory>, registered: Vec<Part>, copies: Vec<Arc<Event>>) {
        if let Err(job) = self.send(Job::End { memory, registered, copies }) {
            std::mem::forget(job);
        }
    }

    /// Looks at a buffer that grew, until it has not grown for a while.
    pub(super) fn watch(&self, range: &Arc<HostRange>) {
        // Nothing to tell where nobody listens: the memory goes with the buffer.
        self.send(Job::Watch(Arc::downgrade(range))).ok();
    }

    fn send(&self, job: Job) -> Result<(), Job> {
        match &*self.0.lock() {
            Some(jobs) => jobs.send(job).map_err(|error| error.0),
            None => Err(job),
        }
    }
}

/// The thread.
pub(crate) fn run(device: &dyn Device, jobs: &Receiver<Job>) {
    let mut watched: Vec<Weak<HostRange>> = Vec::new();
    loop {
        let job = match watched.is_empty() {
            true => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            false => jobs.recv_timeout(IDLE),
        };
        match job {
            Ok(job) => job.run(device, &mut watched),
            Err(RecvTimeoutError::Timeout) => trim(&mut watched),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

impl Job {
    fn run(self, device: &dyn Device, watched: &mut Vec<Weak<HostRange>>) {
        match self {
            Job::Watch(range) => {
                if !watched.iter().any(|other| Weak::ptr_eq(other, &range)) {
                    watched.push(range);
                }
            }
            Job::GiveBack { range, what, part, copies } => {
                let free = give_up(device, &range.memory, &what.registered, &copies);
                if let (true, Some((start, end))) = (free, what.discard) {
                    // SAFETY: the part is past the end of the buffer, which waits for this before it grows again; its
                    // copies have ended, and nothing of it is registered any more.
                    unsafe { range.memory.discard(start, end) };
                }
                range.left(part);
            }
            Job::End { memory, registered, copies } => {
                if !give_up(device, &memory, &registered, &copies) {
                    std::mem::forget(memory);
                }
            }
        }
    }
}

/// Waits for the copies and unregisters. `false` where a device may still use the memory.
fn give_up(device: &dyn Device, memory: &HostMemory, registered: &[Part], copies: &[Arc<Event>]) -> bool {
    if !have_ended(copies) {
        return false;
    }
    registered.iter().fold(true, |free, (start, bytes)| {
        let first = memory.base().wrapping_add(start.as_usize());
        // SAFETY: no copy that this engine knows of is pending; a copy of the user's own the driver waits for.
        let result = unsafe { device.unregister_host(first, *bytes) };
        match result {
            Ok(()) => free,
            // A part that its user did not register, or gave back already.
            Err(error) if is_not_registered(&error) => free,
            Err(error) => {
                tracing::warn!(device = %device.id(), %error, "memory of a buffer stays registered");
                false
            }
        }
    })
}

/// By CUDA's codes for memory that is not registered, and for an invalid value.
fn is_not_registered(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Driver { code: 713 | 1, .. }) || error.is_unsupported()
}

fn trim(watched: &mut Vec<Weak<HostRange>>) {
    let idle_since = Instant::now().checked_sub(IDLE);
    watched.retain(|range| {
        let (Some(range), Some(idle_since)) = (range.upgrade(), idle_since) else { return false };
        !range.trim(idle_since)
    });
}

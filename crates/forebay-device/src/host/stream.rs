//! Streams: one thread each, which does its queue's work in order.

use std::collections::HashMap;
use std::fmt;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use crate::{DeviceError, Result, StreamHandle};

/// One piece of a stream's work.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// The streams of a device.
#[derive(Debug, Default)]
pub(super) struct Streams {
    table: Mutex<Table>,
    /// What the first panic said. Set once: the device does not come back.
    lost: Arc<OnceLock<String>>,
}

#[derive(Debug, Default)]
struct Table {
    /// Every stream there is.
    running: HashMap<StreamHandle, Worker>,
    /// Those that were given back.
    idle: Vec<StreamHandle>,
}

struct Worker {
    /// Dropping it ends the thread after the work that is queued.
    queue: Sender<Work>,
    thread: JoinHandle<()>,
}

impl Streams {
    /// A stream that was given back, or a new one.
    pub(super) fn take(&self) -> Result<StreamHandle> {
        let mut table = self.table.lock();
        if let Some(stream) = table.idle.pop() {
            return Ok(stream);
        }
        let (queue, work) = mpsc::channel();
        let lost = Arc::clone(&self.lost);
        // SAFETY: a number that only this table gives a meaning to; the stream runs until the device goes.
        let handle = unsafe { StreamHandle::from_raw(table.running.len() as u64 + 1) };
        let thread = thread::Builder::new()
            .name(format!("forebay-host-{}", handle.get()))
            .spawn(move || run(&work, &lost))
            .map_err(|error| DeviceError::System {
                call: "take_stream",
                errno: error.raw_os_error().unwrap_or_default(),
                error: error.to_string(),
                context: format!("a thread beside those of {} other streams", table.running.len()),
            })?;
        table.running.insert(handle, Worker { queue, thread });
        Ok(handle)
    }

    pub(super) fn give_back(&self, stream: StreamHandle) -> Result<()> {
        let mut table = self.table.lock();
        if !table.running.contains_key(&stream) || table.idle.contains(&stream) {
            return Err(unknown("give_back_stream", stream));
        }
        table.idle.push(stream);
        Ok(())
    }

    /// Does `work` after everything now in the stream; on the default stream before it returns.
    pub(super) fn submit(&self, call: &'static str, stream: StreamHandle, work: Work) -> Result<()> {
        self.check_alive(call)?;
        if stream == StreamHandle::DEFAULT {
            work();
            return Ok(());
        }
        let table = self.table.lock();
        let worker = table.running.get(&stream).ok_or_else(|| unknown(call, stream))?;
        // The thread outlives its queue: it ends only when the sender is gone.
        worker.queue.send(work).map_err(|_| unknown(call, stream))
    }

    /// Whether there is such a stream on a living device.
    pub(super) fn check(&self, call: &'static str, stream: StreamHandle) -> Result<()> {
        self.check_alive(call)?;
        if stream == StreamHandle::DEFAULT || self.table.lock().running.contains_key(&stream) {
            return Ok(());
        }
        Err(unknown(call, stream))
    }

    /// Whether no kernel has panicked so far.
    pub(super) fn check_alive(&self, call: &'static str) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(panic) => Err(DeviceError::Lost {
                call,
                code: 719,
                name: "launch failed".to_owned(),
                context: format!("a kernel panicked with {panic:?}"),
            }),
        }
    }
}

impl Drop for Streams {
    /// Ends all work: the memory it touches goes next.
    fn drop(&mut self) {
        let Table { running, .. } = std::mem::take(self.table.get_mut());
        // All queues close before the first wait: one stream may be waiting for another.
        let threads: Vec<_> = running.into_values().map(|worker| worker.thread).collect();
        threads.into_iter().for_each(join);
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.thread.fmt(f)
    }
}

fn run(queue: &Receiver<Work>, lost: &OnceLock<String>) {
    for work in queue {
        // The queue goes on after a panic, so that nobody waits for ever; every later call reports the loss.
        if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(work)) {
            let said = panic.downcast_ref::<&str>().map(ToString::to_string);
            let said = said.or_else(|| panic.downcast_ref::<String>().cloned());
            let _ = lost.set(said.unwrap_or_else(|| "no message".to_owned()));
        }
    }
}

/// Waits for a stream's thread, unless this is it: the last work may hold the last reference to the device.
fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != thread::current().id() {
        // Panics were caught in `run`.
        let _ = thread.join();
    }
}

fn unknown(call: &'static str, stream: StreamHandle) -> DeviceError {
    DeviceError::invalid(call, format!("no stream {}", stream.get()))
}

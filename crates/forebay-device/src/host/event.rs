//! Events: marks in a stream's work.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex, RwLock};

use super::stream::Streams;
use crate::{DeviceError, EventHandle, Result, StreamHandle};

/// The events of a device.
#[derive(Debug, Default)]
pub(super) struct Events {
    made: AtomicU64,
    live: RwLock<HashMap<EventHandle, Arc<HostEvent>>>,
}

impl Events {
    pub(super) fn create(&self) -> EventHandle {
        let handle = EventHandle(self.made.fetch_add(1, Ordering::Relaxed) + 1);
        self.live.write().insert(handle, Arc::default());
        handle
    }

    pub(super) fn destroy(&self, event: EventHandle) -> Result<()> {
        let removed = self.live.write().remove(&event);
        removed.map(drop).ok_or_else(|| unknown("destroy_event", event))
    }

    pub(super) fn find(&self, call: &'static str, event: EventHandle) -> Result<Arc<HostEvent>> {
        self.live.read().get(&event).cloned().ok_or_else(|| unknown(call, event))
    }
}

/// An event: its latest record, or none, which counts as complete.
#[derive(Debug, Default)]
pub(super) struct HostEvent {
    latest: Mutex<Option<Arc<Mark>>>,
}

impl HostEvent {
    pub(super) fn record(&self, streams: &Streams, stream: StreamHandle) -> Result<()> {
        let mark = Arc::new(Mark::default());
        let reached = Arc::clone(&mark);
        // Held while the mark is queued: a stream that sees the mark can then only be behind it, never wait for a mark
        // that is queued behind its own wait.
        let mut latest = self.latest.lock();
        streams.submit("record", stream, Box::new(move || reached.reach()))?;
        *latest = Some(mark);
        Ok(())
    }

    pub(super) fn latest(&self) -> Option<Arc<Mark>> {
        self.latest.lock().clone()
    }
}

/// One place in a stream's work. Reached once, for ever.
#[derive(Debug, Default)]
pub(super) struct Mark {
    reached: Mutex<bool>,
    changed: Condvar,
}

impl Mark {
    pub(super) fn is_reached(&self) -> bool {
        *self.reached.lock()
    }

    pub(super) fn wait(&self) {
        let mut reached = self.reached.lock();
        while !*reached {
            self.changed.wait(&mut reached);
        }
    }

    fn reach(&self) {
        *self.reached.lock() = true;
        self.changed.notify_all();
    }
}

fn unknown(call: &'static str, event: EventHandle) -> DeviceError {
    DeviceError::invalid(call, format!("no event {}", event.0))
}

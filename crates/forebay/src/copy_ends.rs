//! When copies out of host memory have ended, in whatever streams they are.

use std::collections::HashMap;
use std::sync::Arc;

use forebay_device::{self as device, Device, DeviceId, Event, StreamHandle};
use parking_lot::Mutex;

use crate::Result;

/// An event for each stream, behind the last copy on it.
#[derive(Debug, Default)]
pub(crate) struct CopyEnds(Mutex<HashMap<(DeviceId, StreamHandle), Arc<Event>>>);

impl CopyEnds {
    /// What is in the stream by now is waited for from now on.
    ///
    /// # Errors
    /// What the device reports.
    pub(crate) fn note(&self, device: &Arc<dyn Device>, stream: StreamHandle) -> Result<()> {
        let mut events = self.0.lock();
        let event = match events.get(&(device.id(), stream)) {
            Some(event) => Arc::clone(event),
            None => Arc::new(Event::new(Arc::clone(device))?),
        };
        // SAFETY: the stream exists as long as anything remembers its handle (see `StreamHandle`).
        unsafe { event.record(stream)? };
        events.insert((device.id(), stream), event);
        Ok(())
    }

    /// Those that are not complete, as far as they can be asked.
    pub(crate) fn pending(&self) -> Vec<Arc<Event>> {
        let mut events = self.0.lock();
        events.retain(|_, event| !event.is_complete().unwrap_or(false));
        events.values().map(Arc::clone).collect()
    }

    /// Waits for all that was noted by now.
    ///
    /// # Errors
    /// What the device reports.
    pub(crate) fn wait(&self) -> device::Result<()> {
        self.pending().iter().try_for_each(|event| event.synchronize())
    }
}

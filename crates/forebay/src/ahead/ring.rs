//! Pinned memory that is handed out as a queue: what was taken first comes free first.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{Device, DeviceAddr, Event, PinnedBuffer, StreamHandle};
use parking_lot::{Condvar, Mutex};

use crate::{EngineError, Result};

/// The queue.
#[derive(Debug)]
pub(super) struct Ring {
    device: Arc<dyn Device>,
    buffer: Arc<PinnedBuffer>,
    /// What is taken, oldest first.
    slots: VecDeque<Arc<Slot>>,
    /// Bytes that were ever taken, with what was left over at the end of the buffer.
    taken: u64,
    /// Events to be used again.
    spare: Vec<Event>,
}

/// A run of bytes of a ring, filled by a reader and then copied to the device.
#[derive(Debug)]
pub(super) struct Slot {
    buffer: Arc<PinnedBuffer>,
    /// Where it begins among all bytes that were ever taken.
    begins: u64,
    at: Bytes,
    len: Bytes,
    state: Mutex<Stage>,
    read: Condvar,
}

#[derive(Debug)]
enum Stage {
    /// A reader has it. Whether anybody will ask for it.
    Reading {
        is_wanted: bool,
    },
    Read(Result<()>),
    /// Its copy is enqueued; complete behind the event.
    Copying(Event),
    Free,
}

/// Fills a slot, on any thread. Dropped before, nothing will.
pub(super) struct Filling(Option<Arc<Slot>>);

impl Ring {
    pub(super) fn new(device: &Arc<dyn Device>, size: Bytes) -> Result<Self> {
        let buffer = Arc::new(PinnedBuffer::new(Arc::clone(device), size)?);
        let device = Arc::clone(device);
        Ok(Ring { device, buffer, slots: VecDeque::new(), taken: 0, spare: Vec::new() })
    }

    pub(super) fn size(&self) -> Bytes {
        self.buffer.size()
    }

    /// The next `len` bytes, at least one and at most the ring, if they are free.
    pub(super) fn take(&mut self, len: Bytes) -> Result<Option<(Arc<Slot>, Filling)>> {
        self.reclaim()?;
        let (size, len) = (self.size().get(), len.get());
        let at = self.taken % size;
        let skipped = if at + len > size { size - at } else { 0 };
        let oldest = self.slots.front().map_or(self.taken, |slot| slot.begins);
        if self.taken + skipped + len - oldest > size {
            return Ok(None);
        }
        let slot = Arc::new(Slot {
            buffer: Arc::clone(&self.buffer),
            begins: self.taken,
            at: Bytes::new((self.taken + skipped) % size),
            len: Bytes::new(len),
            state: Mutex::new(Stage::Reading { is_wanted: true }),
            read: Condvar::new(),
        });
        self.taken += skipped + len;
        self.slots.push_back(Arc::clone(&slot));
        Ok(Some((Arc::clone(&slot), Filling(Some(slot)))))
    }

    /// Waits until the oldest slot may come free, unless somebody is still to ask for it. Whether there is hope.
    pub(super) fn wait_for_oldest(&mut self) -> Result<bool> {
        let Some(slot) = self.slots.front() else { return Ok(true) };
        let mut state = slot.state.lock();
        loop {
            match &*state {
                Stage::Copying(event) => return Ok(event.synchronize().map(|()| true)?),
                Stage::Free => return Ok(true),
                Stage::Reading { is_wanted: false } => slot.read.wait(&mut state),
                Stage::Reading { is_wanted: true } | Stage::Read(_) => return Ok(false),
            }
        }
    }

    /// Copies a slot that was read to the device, in a stream.
    ///
    /// # Safety
    /// The place is memory of the device until the copy has completed, and the stream lives as long.
    pub(super) unsafe fn copy(&mut self, slot: &Slot, to: DeviceAddr, stream: StreamHandle) -> Result<()> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => Event::new(Arc::clone(&self.device))?,
        };
        let from = self.buffer.as_ptr().wrapping_add(slot.at.as_usize());
        // SAFETY: a slot that was read is written to by nobody before its event has completed; the rest is the caller's.
        unsafe { self.device.copy_to_device(to, from, slot.len, stream) }?;
        // SAFETY: the stream lives, as the caller promises.
        let recorded = unsafe { event.record(stream) };
        *slot.state.lock() = Stage::Copying(event);
        if let Err(error) = recorded {
            // Nobody can know any more when the copy ends.
            std::mem::forget(Arc::clone(&self.buffer));
            return Err(error.into());
        }
        Ok(())
    }

    fn reclaim(&mut self) -> Result<()> {
        while let Some(slot) = self.slots.front() {
            let mut state = slot.state.lock();
            match &*state {
                Stage::Free => {}
                Stage::Copying(event) if event.is_complete()? => {
                    if let Stage::Copying(event) = std::mem::replace(&mut *state, Stage::Free) {
                        self.spare.push(event);
                    }
                }
                _ => break,
            }
            drop(state);
            self.slots.pop_front();
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for slot in &self.slots {
            let state = slot.state.lock();
            if let Stage::Copying(event) = &*state
                && let Err(error) = event.synchronize()
            {
                tracing::debug!(%error, "pinned memory is kept: its copies may not have ended");
                std::mem::forget(Arc::clone(&self.buffer));
            }
        }
    }
}

impl Slot {
    pub(super) fn len(&self) -> Bytes {
        self.len
    }

    /// Waits until it is filled.
    pub(super) fn wait(&self) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            match &*state {
                Stage::Reading { .. } => self.read.wait(&mut state),
                Stage::Read(result) => return result.clone(),
                Stage::Copying(_) | Stage::Free => return Ok(()),
            }
        }
    }

    /// Nobody will ask for it.
    pub(super) fn give_up(&self) {
        let mut state = self.state.lock();
        match &mut *state {
            Stage::Reading { is_wanted } => *is_wanted = false,
            Stage::Read(_) => *state = Stage::Free,
            Stage::Copying(_) | Stage::Free => {}
        }
    }

    fn finish(&self, result: Result<()>) {
        let mut state = self.state.lock();
        *state = match *state {
            Stage::Reading { is_wanted: false } => Stage::Free,
            _ => Stage::Read(result),
        };
        drop(state);
        self.read.notify_all();
    }
}

impl Filling {
    /// Has the bytes read, if anybody still asks for them.
    pub(super) fn fill(mut self, read: impl FnOnce(&mut [u8]) -> Result<()>) {
        let Some(slot) = &self.0 else { return };
        let is_wanted = !matches!(*slot.state.lock(), Stage::Reading { is_wanted: false });
        let result = match is_wanted {
            // SAFETY: the slot's bytes are this value's until it says that they are read.
            true => read(unsafe { slot.buffer.slice_mut(slot.at, slot.len) }),
            false => Ok(()),
        };
        slot.finish(result);
        self.0 = None;
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        if let Some(slot) = &self.0 {
            slot.finish(Err(EngineError::Invalid("a reader ended before it had read".to_owned())));
        }
    }
}

//! Device memory that is handed out as a queue: what was taken first comes free first.
//!
//! Readers fill it through their own pinned slots, which are small and stay in the processor's cache, in a stream of its
//! own; a copy on the device brings its bytes to where they are asked for.

use std::collections::VecDeque;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{Device, DeviceAddr, Event, Stream, StreamHandle, Transform};
use parking_lot::{Condvar, Mutex};

use crate::reader::Reader;
use crate::scratch::{Scratch, wait};
use crate::state::{OfHeadroom, Shared};
use crate::{EngineError, Result};

/// The queue.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<Memory>,
    /// What is taken, oldest first.
    slots: VecDeque<Arc<Slot>>,
    /// Bytes that were ever taken, with what was left over at the end of the memory.
    taken: u64,
    /// Behind what fills what is copied next.
    filled: Event,
    /// Events to be used again.
    spare: Vec<Event>,
    /// Its memory is not taken from weights, which get none back before they are prioritized.
    _of_headroom: OfHeadroom,
}

/// The memory, and the stream in which it is filled. Whoever fills a part holds it.
#[derive(Debug)]
struct Memory {
    device: Arc<dyn Device>,
    stream: Stream,
    base: DeviceAddr,
    size: Bytes,
    /// Taken when it goes.
    backing: Option<Scratch>,
}

/// A run of bytes of a ring, filled by a reader and then copied.
#[derive(Debug)]
pub(super) struct Slot {
    memory: Arc<Memory>,
    /// Where it begins among all bytes that were ever taken.
    begins: u64,
    at: Bytes,
    len: Bytes,
    stage: Mutex<Stage>,
    read: Condvar,
}

#[derive(Debug)]
enum Stage {
    /// A reader has it. Whether anybody will ask for it.
    Reading { is_wanted: bool },
    /// The copy that fills it is enqueued.
    Read(Result<()>),
    /// The copy that reads it is enqueued; complete behind the event, which those have in common that are copied together.
    Copying(Arc<Event>),
    /// What fills it is enqueued at most, in the order in which it is filled again.
    Free,
}

/// Fills a slot, on a reader's thread. Dropped before, nothing will.
pub(super) struct Filling(Option<Arc<Slot>>);

impl Ring {
    /// # Errors
    /// What the device reports; that it has no room.
    pub(super) fn new(shared: &Arc<Shared>, size: Bytes) -> Result<Self> {
        let (device, of_headroom) = (&shared.device, shared.take_of_headroom(size));
        let (stream, filled) = (Stream::new(Arc::clone(device))?, Event::new(Arc::clone(device))?);
        let backing = Scratch::new(device, size)?;
        let (device, base) = (Arc::clone(device), backing.addr());
        let memory = Arc::new(Memory { device, stream, base, size, backing: Some(backing) });
        let slots = VecDeque::new();
        Ok(Ring { memory, slots, taken: 0, filled, spare: Vec::new(), _of_headroom: of_headroom })
    }

    /// The most that can be taken at once.
    pub(super) fn half(&self) -> Bytes {
        Bytes::new(self.memory.size.get() / 2)
    }

    /// The next `len` bytes, at least one and at most half of the ring, if they are free.
    pub(super) fn take(&mut self, len: Bytes) -> Result<Option<(Arc<Slot>, Filling)>> {
        self.reclaim()?;
        let (size, len) = (self.memory.size.get(), len.get());
        let at = self.taken % size;
        let skipped = if at + len > size { size - at } else { 0 };
        let oldest = self.slots.front().map_or(self.taken, |slot| slot.begins);
        if self.taken + skipped + len - oldest > size {
            return Ok(None);
        }
        let slot = Arc::new(Slot {
            memory: Arc::clone(&self.memory),
            begins: self.taken,
            at: Bytes::new((self.taken + skipped) % size),
            len: Bytes::new(len),
            stage: Mutex::new(Stage::Reading { is_wanted: true }),
            read: Condvar::new(),
        });
        self.taken += skipped + len;
        self.slots.push_back(Arc::clone(&slot));
        Ok(Some((Arc::clone(&slot), Filling(Some(slot)))))
    }

    /// Waits until the oldest slot may come free, unless somebody is still to ask for it. Whether there is hope.
    pub(super) fn wait_for_oldest(&mut self) -> Result<bool> {
        let Some(slot) = self.slots.front() else { return Ok(true) };
        let mut stage = slot.stage.lock();
        loop {
            match &*stage {
                Stage::Copying(copied) => return Ok(copied.synchronize().map(|()| true)?),
                Stage::Free => return Ok(true),
                Stage::Reading { is_wanted: false } => slot.read.wait(&mut stage),
                Stage::Reading { is_wanted: true } | Stage::Read(_) => return Ok(false),
            }
        }
    }

    /// Copies slots that were [waited for](Slot::wait), and belong side by side, to a place on the device, in a stream. After an
    /// error the ring is not to be used.
    ///
    /// # Safety
    /// The place is memory of the device until the copies have completed, and the stream lives as long.
    pub(super) unsafe fn copy(
        &mut self,
        slots: &[Arc<Slot>],
        to: DeviceAddr,
        stream: StreamHandle,
    ) -> Result<()> {
        let copied = Arc::new(self.event()?);
        // SAFETY: both streams live, this one as long as its memory.
        let enqueued = unsafe { self.filled.record(self.memory.stream.handle()) }
            // SAFETY: as before.
            .and_then(|()| unsafe { self.filled.wait_on(stream) })
            // SAFETY: the slots are filled by then, and by nobody again before the event; the rest is the caller's.
            .and_then(|()| unsafe { self.copy_runs(slots, to, stream) })
            // SAFETY: as before.
            .and_then(|()| unsafe { copied.record(stream) });
        for slot in slots {
            *slot.stage.lock() = Stage::Copying(Arc::clone(&copied));
        }
        if let Err(error) = enqueued {
            // Nobody can know any more when the copies end.
            std::mem::forget(Arc::clone(&self.memory));
            return Err(error.into());
        }
        Ok(())
    }

    /// One copy for slots that lie side by side here too.
    ///
    /// # Safety
    /// As for [`copy`](Ring::copy), and in the stream the slots are filled.
    unsafe fn copy_runs(
        &self,
        slots: &[Arc<Slot>],
        mut to: DeviceAddr,
        stream: StreamHandle,
    ) -> forebay_device::Result<()> {
        for run in slots.chunk_by(|one, next| one.at + one.len == next.at) {
            let (from, len) = (self.memory.base.offset(run[0].at), run.iter().map(|slot| slot.len).sum());
            // SAFETY: the caller's promise.
            unsafe { self.memory.device.transform(&Transform::Copy { to, from, len }, stream) }?;
            to = to.offset(len);
        }
        Ok(())
    }

    fn event(&mut self) -> Result<Event> {
        match self.spare.pop() {
            Some(event) => Ok(event),
            None => Ok(Event::new(Arc::clone(&self.memory.device))?),
        }
    }

    fn reclaim(&mut self) -> Result<()> {
        while let Some(slot) = self.slots.front() {
            let mut stage = slot.stage.lock();
            match &*stage {
                Stage::Free => {}
                Stage::Copying(copied) if copied.is_complete()? => {
                    if let Stage::Copying(copied) = std::mem::replace(&mut *stage, Stage::Free) {
                        self.spare.extend(Arc::into_inner(copied));
                    }
                }
                Stage::Copying(_) | Stage::Reading { .. } | Stage::Read(_) => break,
            }
            drop(stage);
            self.slots.pop_front();
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Stage::Copying(copied) = &*slot.stage.lock()
                && let Err(error) = copied.synchronize()
            {
                tracing::debug!(%error, "memory is kept: its copies may not have ended");
                std::mem::forget(Arc::clone(&self.memory));
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let done = Event::new(Arc::clone(&self.device)).and_then(|done| wait(&done, &self.stream));
        let given_back = done.and_then(|()| self.backing.take().map_or(Ok(()), Scratch::unmap));
        if let Err(error) = given_back {
            tracing::warn!(device = %self.device.id(), %error, "memory for reading ahead is kept");
        }
    }
}

impl Slot {
    /// Its place among all bytes that were ever taken.
    pub(super) fn begins(&self) -> u64 {
        self.begins
    }

    pub(super) fn len(&self) -> Bytes {
        self.len
    }

    /// Waits until what fills it is enqueued.
    pub(super) fn wait(&self) -> Result<()> {
        let mut stage = self.stage.lock();
        loop {
            match &*stage {
                Stage::Reading { .. } => self.read.wait(&mut stage),
                Stage::Read(result) => return result.clone(),
                Stage::Copying(_) | Stage::Free => return Ok(()),
            }
        }
    }

    /// Nobody will ask for it.
    pub(super) fn give_up(&self) {
        let mut stage = self.stage.lock();
        *stage = match *stage {
            Stage::Reading { .. } => Stage::Reading { is_wanted: false },
            Stage::Read(_) => Stage::Free,
            Stage::Copying(_) | Stage::Free => return,
        };
    }

    fn finish(&self, result: Result<()>) {
        let mut stage = self.stage.lock();
        *stage = match *stage {
            Stage::Reading { is_wanted: false } => Stage::Free,
            _ => Stage::Read(result),
        };
        drop(stage);
        self.read.notify_all();
    }
}

impl Filling {
    /// Has the bytes read and copied to the ring, if anybody still asks for them.
    pub(super) fn fill(
        mut self,
        shared: &Shared,
        reader: &mut Reader,
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) {
        let Some(slot) = &self.0 else { return };
        let is_wanted = !matches!(*slot.stage.lock(), Stage::Reading { is_wanted: false });
        let stream = slot.memory.stream.handle();
        let fill = || {
            let addr = slot.memory.base.offset(slot.at);
            // SAFETY: the slot is memory of the device as long as anybody holds it, and so is the stream; the memory waits for
            // what is in the stream before it goes. Nobody else writes to the slot: what filled it before is in the same stream.
            unsafe { reader.copy_in(shared, slot.len, (addr, stream), read) }
        };
        slot.finish(if is_wanted { fill() } else { Ok(()) });
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

//! A reader and the pinned slots that it brings bytes into.
//!
//! A reader owns a few slots, reads into one while the others are copied, and waits only for its own. Small slots stay in
//! the processor's cache.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use forebay_core::Bytes;
use forebay_device::{DeviceAddr, Event, PinnedBuffer, StreamHandle};
use forebay_store::DirectBuffer;

use crate::state::Shared;
use crate::{EngineError, Result};

/// A reader and its own slots. Pinning them takes long while a kernel runs, so they are made before there is work; what
/// fails then is tried again, and reported, at the first job.
pub(crate) struct Reader {
    slots: Option<Slots>,
    /// For reads past the page cache.
    through: DirectBuffer,
}

/// Pinned memory in equal parts, used in turn.
pub(crate) struct Slots {
    // Before `buffer`: nothing is dropped before the copies that read it are done.
    /// Behind what read each slot last.
    pub(crate) copied: Vec<Event>,
    pub(crate) buffer: PinnedBuffer,
    chunk: Bytes,
    next: usize,
}

impl Reader {
    pub(crate) fn new() -> Self {
        Reader { slots: None, through: DirectBuffer::default() }
    }

    /// Makes the slots if they are not there yet.
    pub(crate) fn prepare(&mut self, shared: &Shared) {
        if let Err(error) = self.parts(shared) {
            tracing::debug!(device = %shared.id, %error, "a reader has no slots yet");
        }
    }

    /// Copies what `read` puts into a slot to a place on the device, in a stream.
    ///
    /// # Safety
    /// The place is memory of this device until the copy has completed, and the stream lives as long.
    pub(crate) unsafe fn copy_in(
        &mut self,
        shared: &Shared,
        len: Bytes,
        (addr, stream): (DeviceAddr, StreamHandle),
        read: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let (slots, _) = self.parts(shared)?;
        let (slot, copied) = slots.next()?;
        // SAFETY: the slot is this reader's own, and `next` waited for the copy that used it last.
        let bytes = unsafe { slots.buffer.slice_mut(slot, len) };
        read(bytes)?;
        // SAFETY: the slot is not touched before its event has completed; the place is the caller's affair.
        unsafe { copy_in_turn(shared, bytes, addr, stream) }?;
        self.copied(copied, stream).map(drop)
    }

    /// Copies a place on the device to a slot, behind what is in the stream, and gives the bytes to `write`.
    ///
    /// # Safety
    /// As for [`copy_in`](Reader::copy_in).
    pub(crate) unsafe fn copy_out(
        &mut self,
        shared: &Shared,
        len: Bytes,
        (addr, stream): (DeviceAddr, StreamHandle),
        write: impl FnOnce(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (slots, _) = self.parts(shared)?;
        let (slot, copied) = slots.next()?;
        // SAFETY: the slot is this reader's own, and `next` waited for the copy that used it last.
        let bytes = unsafe { slots.buffer.slice_mut(slot, len) };
        // SAFETY: the slot is not touched before its event has completed; the place is the caller's affair.
        unsafe { shared.device.copy_to_host(bytes.as_mut_ptr(), addr, len, stream) }?;
        self.copied(copied, stream)?.copied[copied].synchronize()?;
        let (slots, _) = self.parts(shared)?;
        // SAFETY: the copy has completed, and the next one has not begun.
        write(unsafe { slots.buffer.slice(slot, len) })
    }

    /// Marks the end of a slot's copy.
    fn copied(&mut self, copied: usize, stream: StreamHandle) -> Result<&Slots> {
        let recorded = match &self.slots {
            // SAFETY: the stream lives, as the caller of the copy promises.
            Some(slots) => unsafe { slots.copied[copied].record(stream) },
            None => Ok(()),
        };
        self.slot_marked(recorded)?;
        self.slots.as_ref().ok_or_else(|| EngineError::Invalid("a reader without slots".into()))
    }

    /// The end of a slot's use was marked, or could not be: nobody can know any more when the slot is free then, so it stays
    /// for ever.
    pub(crate) fn slot_marked(&mut self, recorded: forebay_device::Result<()>) -> Result<()> {
        if recorded.is_err() {
            std::mem::forget(self.slots.take());
        }
        recorded.map_err(Into::into)
    }

    /// The slots, made now if they are not there yet, and the buffer.
    pub(crate) fn parts(&mut self, shared: &Shared) -> Result<(&mut Slots, &mut DirectBuffer)> {
        let slots = match &mut self.slots {
            Some(slots) => slots,
            empty => {
                let (device, ring) = (|| Arc::clone(&shared.device), shared.ring_config);
                let copied =
                    (0..ring.slots).map(|_| Event::new(device())).collect::<std::result::Result<_, _>>()?;
                let buffer = PinnedBuffer::new(device(), ring.chunk * u64::from(ring.slots))?;
                shared.ring.fetch_add(buffer.size().get(), Ordering::Relaxed);
                empty.insert(Slots { copied, buffer, chunk: ring.chunk, next: 0 })
            }
        };
        Ok((slots, &mut self.through))
    }
}

/// Enqueues the copy of a slot's bytes, and behind it lets others in, if it is time.
///
/// # Safety
/// Nobody touches the slot until what is in the stream has completed; the place and the stream are as for
/// [`Device::copy_to_device`](forebay_device::Device::copy_to_device).
pub(crate) unsafe fn copy_in_turn(
    shared: &Shared,
    slot: &mut [u8],
    to: DeviceAddr,
    stream: StreamHandle,
) -> Result<()> {
    let len = Bytes::new(slot.len() as u64);
    // SAFETY: the caller's promise.
    unsafe { shared.device.copy_to_device(to, slot.as_ptr(), len, stream) }?;
    // SAFETY: as before; the slot gets back what it holds.
    unsafe { shared.gives_way.behind(len, to, slot.as_mut_ptr(), stream) };
    Ok(())
}

impl Slots {
    /// The next slot's place in the buffer and its event, once the copy that read it last has completed.
    pub(crate) fn next(&mut self) -> Result<(Bytes, usize)> {
        let slot = self.next;
        self.next = (slot + 1) % self.copied.len();
        self.copied[slot].synchronize()?;
        Ok((self.chunk * slot as u64, slot))
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        for event in &self.copied {
            if let Err(error) = event.synchronize() {
                tracing::debug!(%error, "a copy's end could not be waited for");
            }
        }
    }
}

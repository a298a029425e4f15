//! The books of one device's frames.

use std::collections::BTreeMap;

use crate::{Bytes, FrameId};

/// Which frames exist and which of them back nothing. A frame is used again by the next page of its size; it is
/// destroyed only to make room for another size or for somebody else.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    size_of: Vec<Option<Bytes>>,
    unused_ids: Vec<FrameId>,
    free: BTreeMap<Bytes, Vec<FrameId>>,
    held: Bytes,
    free_bytes: Bytes,
}

impl Frames {
    /// Bytes of all frames that exist.
    pub(crate) fn held(&self) -> Bytes {
        self.held
    }

    /// Bytes of the frames that back nothing.
    pub(crate) fn free_bytes(&self) -> Bytes {
        self.free_bytes
    }

    pub(crate) fn create(&mut self, size: Bytes) -> FrameId {
        self.held += size;
        match self.unused_ids.pop() {
            Some(id) => {
                self.size_of[id.0 as usize] = Some(size);
                id
            }
            None => {
                self.size_of.push(Some(size));
                FrameId(self.size_of.len() as u32 - 1)
            }
        }
    }

    /// A free frame of exactly this size.
    pub(crate) fn take(&mut self, size: Bytes) -> Option<FrameId> {
        let frame = self.free.get_mut(&size)?.pop()?;
        self.free_bytes -= size;
        Some(frame)
    }

    pub(crate) fn put_back(&mut self, frame: FrameId) {
        let size = self.size(frame);
        self.free_bytes += size;
        self.free.entry(size).or_default().push(frame);
    }

    /// Takes some free frame out of the books; its number may be used again.
    pub(crate) fn destroy_one(&mut self) -> Option<(FrameId, Bytes)> {
        let (&size, frames) = self.free.iter_mut().find(|(_, frames)| !frames.is_empty())?;
        let frame = frames.pop()?;
        self.free_bytes -= size;
        self.forget(frame);
        Some((frame, size))
    }

    /// Takes a frame that backs nothing and is not free (it could not be created) out of the books.
    pub(crate) fn forget(&mut self, frame: FrameId) {
        self.held -= self.size(frame);
        self.size_of[frame.0 as usize] = None;
        self.unused_ids.push(frame);
    }

    pub(crate) fn size(&self, frame: FrameId) -> Bytes {
        self.size_of[frame.0 as usize].expect("a frame of the books")
    }
}

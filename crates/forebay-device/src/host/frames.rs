//! Physical frames: parts of one memory file, so that any number of them takes one file descriptor.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use forebay_core::Bytes;
use rustix::fs::{self, FallocateFlags, MemfdFlags};

use crate::{DeviceError, FrameHandle, Result};

/// What an unfilled frame holds where poisoning is on.
static POISON: [u8; 64 << 10] = [0xA5; 64 << 10];

/// A live frame.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    /// Where its bytes are in the file.
    pub(super) offset: u64,
    pub(super) size: Bytes,
    /// Where it is mapped now.
    pub(super) mapped_at: Option<u64>,
    /// Where it was mapped last.
    pub(super) last_at: Option<u64>,
}

/// All frames of a device.
#[derive(Debug)]
pub(super) struct Frames {
    file: OwnedFd,
    /// The file's length.
    end: u64,
    /// Holes of the file, by offset; no two touch.
    holes: BTreeMap<u64, u64>,
    live: HashMap<u64, Frame>,
    used: Bytes,
    next_handle: u64,
}

impl Frames {
    pub(super) fn new() -> Result<Self> {
        let file = fs::memfd_create("forebay-frames", MemfdFlags::CLOEXEC).map_err(|errno| {
            DeviceError::system("memfd_create", errno, "the file behind all frames".to_owned())
        })?;
        Ok(Frames {
            file,
            end: 0,
            holes: BTreeMap::new(),
            live: HashMap::new(),
            used: Bytes::ZERO,
            next_handle: 1,
        })
    }

    /// What all live frames take together.
    pub(super) fn used(&self) -> Bytes {
        self.used
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn create(&mut self, size: Bytes) -> Result<FrameHandle> {
        let offset = self.take(size)?;
        let handle = self.next_handle;
        self.next_handle += 1;
        self.live.insert(handle, Frame { offset, size, mapped_at: None, last_at: None });
        self.used += size;
        Ok(FrameHandle(handle))
    }

    /// Forgets the frame and gives its memory back to the system.
    pub(super) fn release(&mut self, handle: FrameHandle) -> Result<()> {
        let Frame { offset, size, .. } = *self.find("release_frame", handle)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fs::fallocate(&self.file, flags, offset, size.get())
            .map_err(|errno| DeviceError::system("release_frame", errno, format!("a frame of {size}")))?;
        self.live.remove(&handle.0);
        self.used -= size;
        self.put_back(offset, size.get());
        Ok(())
    }

    pub(super) fn find(&self, call: &'static str, handle: FrameHandle) -> Result<&Frame> {
        self.live.get(&handle.0).ok_or_else(|| DeviceError::invalid(call, format!("no frame {}", handle.0)))
    }

    pub(super) fn set_mapped(&mut self, handle: FrameHandle, addr: Option<u64>) {
        if let Some(frame) = self.live.get_mut(&handle.0) {
            frame.mapped_at = addr;
            frame.last_at = addr.or(frame.last_at);
        }
    }

    /// Overwrites the frame through the file, so that it need not be mapped.
    pub(super) fn poison(&self, call: &'static str, handle: FrameHandle) -> Result<()> {
        let Frame { offset, size, .. } = *self.find(call, handle)?;
        let end = offset + size.get();
        let mut at = offset;
        while at < end {
            let len = POISON.len().min((end - at) as usize);
            let written = rustix::io::pwrite(&self.file, &POISON[..len], at)
                .map_err(|errno| DeviceError::system(call, errno, format!("poisoning a frame of {size}")))?;
            at += written as u64;
        }
        Ok(())
    }

    /// The first hole that is large enough, or the end of the file.
    fn take(&mut self, size: Bytes) -> Result<u64> {
        let size = size.get();
        if let Some((offset, len)) = self.holes.iter().map(|(o, l)| (*o, *l)).find(|(_, len)| *len >= size) {
            self.holes.remove(&offset);
            if len > size {
                self.holes.insert(offset + size, len - size);
            }
            return Ok(offset);
        }
        let offset = self.end;
        let end = offset.checked_add(size).ok_or_else(|| too_large(rustix::io::Errno::FBIG, size))?;
        fs::ftruncate(&self.file, end).map_err(|errno| too_large(errno, size))?;
        self.end = end;
        Ok(offset)
    }

    fn put_back(&mut self, mut offset: u64, mut len: u64) {
        if let Some((&before, &before_len)) = self.holes.range(..offset).next_back()
            && before + before_len == offset
        {
            self.holes.remove(&before);
            (offset, len) = (before, before_len + len);
        }
        if let Some(after_len) = self.holes.remove(&(offset + len)) {
            len += after_len;
        }
        self.holes.insert(offset, len);
    }
}

fn too_large(errno: rustix::io::Errno, size: u64) -> DeviceError {
    DeviceError::system("create_frame", errno, format!("a frame of {}", Bytes::new(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_frames_leave_one_hole_that_is_taken_again() {
        let mut frames = Frames::new().unwrap();
        let handles: Vec<_> = (0..6).map(|_| frames.create(Bytes::mib(2)).unwrap()).collect();
        let end = frames.end;
        for i in [1, 4, 3, 0, 2, 5] {
            frames.release(handles[i]).unwrap();
        }
        assert_eq!(frames.holes, BTreeMap::from([(0, end)]));
        assert_eq!(frames.used(), Bytes::ZERO);
        frames.create(Bytes::mib(12)).unwrap();
        assert_eq!((frames.end, frames.holes.len()), (end, 0));
    }

    #[test]
    fn a_released_frame_gives_its_memory_back() {
        let mut frames = Frames::new().unwrap();
        let handle = frames.create(Bytes::mib(2)).unwrap();
        frames.poison("test", handle).unwrap();
        let blocks = |frames: &Frames| fs::fstat(&frames.file).unwrap().st_blocks;
        assert_eq!(blocks(&frames) * 512, 2 << 20);
        frames.release(handle).unwrap();
        assert_eq!(blocks(&frames), 0);
    }
}

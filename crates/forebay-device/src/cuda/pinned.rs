//! Memory of the host to be pinned: mapped and populated by us, so that the driver's lock is held for its registration
//! alone. `cuMemHostAlloc` takes five times as long and does all of it under that lock (bench/results, 2026-11-24-h100).

use std::ffi::c_void;
use std::ptr::{self, NonNull};

use forebay_core::Bytes;
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use crate::{DeviceError, Result};

/// What the kernel may back by one entry of a page table.
const HUGE: usize = 2 << 20;

/// Anonymous memory with every page there, aligned to [`HUGE`].
#[derive(Debug)]
pub(super) struct HostMapping {
    base: NonNull<c_void>,
    /// Of the whole mapping, what aligns it included.
    len: usize,
    first: NonNull<u8>,
}

// SAFETY: mapped memory belongs to the process; any thread may use and unmap it.
unsafe impl Send for HostMapping {}

impl HostMapping {
    /// Maps `size` bytes.
    pub(super) fn new(size: Bytes) -> Result<Self> {
        let no_room = || DeviceError::OutOfMemory { call: "mmap", wanted: size, free: None };
        let wanted = size.as_usize();
        let len = wanted.checked_add(HUGE).ok_or_else(no_room)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let base = unsafe { mm::mmap_anonymous(ptr::null_mut(), len, protection, MapFlags::PRIVATE) };
        let base = base.ok().and_then(NonNull::new).ok_or_else(no_room)?;
        let padding = base.as_ptr().cast::<u8>().align_offset(HUGE);
        // SAFETY: the padding is less than what was mapped beyond `wanted`.
        let mapping = HostMapping { base, len, first: unsafe { base.cast::<u8>().add(padding) } };
        let advise = |len: usize, advice: Advice| {
            // SAFETY: a part of the new mapping; neither advice changes what it holds.
            unsafe { mm::madvise(mapping.first.as_ptr().cast(), len, advice) }
        };
        // Whole huge pages only: the rest of one more would be memory that nobody uses. Where there are none, pages are
        // small; where populating is unknown (before Linux 5.14), the driver faults them in.
        if wanted >= HUGE {
            advise(wanted - wanted % HUGE, Advice::LinuxHugepage).ok();
        }
        advise(wanted, Advice::LinuxPopulateWrite).ok();
        Ok(mapping)
    }

    pub(super) fn first(&self) -> *mut u8 {
        self.first.as_ptr()
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and whoever has the address gave it up with this.
        if let Err(error) = unsafe { mm::munmap(self.base.as_ptr(), self.len) } {
            tracing::debug!(%error, "host memory could not be unmapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_aligned_and_can_be_written_to_its_end() {
        for size in [Bytes::kib(4), Bytes::mib(2), Bytes::mib(5)] {
            let mapping = HostMapping::new(size).expect("memory");
            assert_eq!(mapping.first().addr() % HUGE, 0);
            // SAFETY: `size` bytes are mapped, and nobody else has them.
            let bytes = unsafe { std::slice::from_raw_parts_mut(mapping.first(), size.as_usize()) };
            bytes.fill(0xa5);
            assert!(bytes.iter().all(|&byte| byte == 0xa5));
        }
    }

    #[test]
    fn what_no_address_space_holds_is_refused_by_its_size() {
        let error = HostMapping::new(Bytes::new(u64::MAX)).expect_err("too much");
        assert!(matches!(error, DeviceError::OutOfMemory { wanted, .. } if wanted == Bytes::new(u64::MAX)));
    }
}

//! A range of host addresses that gets memory as it grows.

use std::ptr;

use forebay_core::Bytes;
use rustix::io::Errno;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, ProtFlags};

use crate::{EngineError, Result};

/// What huge pages are aligned to: memory in them is taken, and registered, several times faster.
const HUGE: Bytes = Bytes::mib(2);

/// A reserved range of addresses. Its first `ready` bytes may be touched; the system gives them memory, zeroed, as they are.
#[derive(Debug)]
pub(crate) struct HostMemory {
    /// What the system gave, and how much of it: the range is the aligned part.
    mapping: *mut u8,
    mapped: Bytes,
    base: *mut u8,
    limit: Bytes,
}

// SAFETY: the memory belongs to the process, not to a thread.
unsafe impl Send for HostMemory {}
// SAFETY: shared access gives out addresses only; whoever reads or writes through them orders that himself.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// Reserves `limit` bytes of address space.
    pub(super) fn reserve(limit: Bytes) -> Result<Self> {
        let refused = |errno| failed("reserve address space", limit, errno);
        let limit = limit.max(Bytes::new(1)).checked_align_up(HUGE).ok_or_else(|| refused(Errno::NOMEM))?;
        let mapped = limit.checked_add(HUGE).ok_or_else(|| refused(Errno::NOMEM))?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapping =
            unsafe { mm::mmap_anonymous(ptr::null_mut(), mapped.as_usize(), ProtFlags::empty(), flags) };
        let mapping = mapping.map_err(refused)?.cast::<u8>();
        let base = mapping.wrapping_add(mapping.align_offset(HUGE.as_usize()));
        // SAFETY: the range lies in the mapping just made. A kernel without huge pages refuses, and is as right without.
        let huge = unsafe { mm::madvise(base.cast(), limit.as_usize(), Advice::LinuxHugepage) };
        if let Err(error) = huge {
            tracing::debug!(%error, "a buffer has no huge pages");
        }
        Ok(HostMemory { mapping, mapped, base, limit })
    }

    /// The first address.
    pub(super) fn base(&self) -> *mut u8 {
        self.base
    }

    /// How far it can grow.
    pub(super) fn limit(&self) -> Bytes {
        self.limit
    }

    /// Lets a part be touched.
    pub(super) fn allow(&self, from: Bytes, to: Bytes) -> Result<()> {
        let (first, len) = self.part(from, to);
        // SAFETY: the part lies in the mapping, and more access breaks no assumption of safe code.
        unsafe { mm::mprotect(first.cast(), len, MprotectFlags::READ | MprotectFlags::WRITE) }
            .map_err(|errno| failed("take memory", to - from, errno))
    }

    /// Takes memory for a part now instead of at the first touch. Advice only: a kernel before 5.14 refuses, and memory
    /// that there is not shows at the touch.
    pub(super) fn populate(&self, from: Bytes, to: Bytes) {
        let (first, len) = self.part(from, to);
        // SAFETY: the part lies in the mapping and may be touched; what it holds stays as it is.
        let populated = unsafe { mm::madvise(first.cast(), len, Advice::LinuxPopulateWrite) };
        if let Err(error) = populated {
            tracing::debug!(%error, "memory is not taken ahead of its use");
        }
    }

    /// Gives the memory of a part back to the system; whole pages of it. It reads as zeros afterwards.
    ///
    /// # Safety
    /// Nobody uses what the part holds, no copy of it is pending, and nothing of it is registered with a device.
    pub(super) unsafe fn discard(&self, from: Bytes, to: Bytes) {
        let page = Bytes::new(rustix::param::page_size() as u64);
        let Some(from) = from.checked_align_up(page).filter(|from| *from < to) else { return };
        let (first, len) = self.part(from, to);
        // SAFETY: the part lies in the mapping, and by the contract of this call nobody uses what it holds.
        let discarded = unsafe { mm::madvise(first.cast(), len, Advice::LinuxDontNeed) };
        if let Err(error) = discarded {
            tracing::warn!(%error, "the memory of a buffer could not be given back");
        }
    }

    fn part(&self, from: Bytes, to: Bytes) -> (*mut u8, usize) {
        debug_assert!(from <= to && to <= self.limit);
        (self.base.wrapping_add(from.as_usize()), (to - from).as_usize())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own and goes with it; whoever registered a part or copies it holds it.
        let unmapped = unsafe { mm::munmap(self.mapping.cast(), self.mapped.as_usize()) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "a buffer could not be given back");
        }
    }
}

fn failed(what: &str, bytes: Bytes, errno: Errno) -> EngineError {
    let (call, context) = ("host buffer", format!("{bytes} to {what}"));
    let error = errno.to_string();
    forebay_device::DeviceError::System { call, errno: errno.raw_os_error(), error, context }.into()
}

//! The system calls behind the host device's address space.

use std::os::fd::BorrowedFd;
use std::ptr;

use forebay_core::Bytes;
use rustix::io::Errno;
use rustix::mm::{self, MapFlags, MprotectFlags, ProtFlags};

use crate::{DeviceAddr, DeviceError, Result};

/// Reserves `size` bytes that nothing may touch, aligned to `align`, a power of two of at least a page.
pub(super) fn reserve(size: Bytes, align: Bytes) -> Result<u64> {
    let failed =
        |errno| DeviceError::system("reserve", errno, format!("{size} of address space aligned to {align}"));
    // The system aligns to its own page only: reserve more, and trim both ends.
    let padded = size.checked_add(align).ok_or_else(|| failed(Errno::NOMEM))?;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    let start =
        unsafe { mm::mmap_anonymous(ptr::null_mut(), padded.as_usize(), ProtFlags::empty(), UNBACKED) }
            .map_err(failed)?
            .expose_provenance() as u64;
    let first = start.next_multiple_of(align.get());
    let lead = Bytes::new(first - start);
    for (addr, len) in [(start, lead), (first + size.get(), align - lead)] {
        if len != Bytes::ZERO {
            // SAFETY: the piece belongs to the mapping just made, outside the part that is handed out.
            unsafe { release("reserve", addr, len)? };
        }
    }
    Ok(first)
}

/// Gives a range back to the system.
///
/// # Safety
/// The range belongs to the caller, who uses it no more.
pub(super) unsafe fn release(call: &'static str, addr: u64, size: Bytes) -> Result<()> {
    // SAFETY: the caller owns the range.
    unsafe { mm::munmap(at(addr), size.as_usize()) }.map_err(|errno| failed(call, errno, addr, size))
}

/// Puts a part of a file at `addr`, still untouchable.
///
/// # Safety
/// The range belongs to a reservation of the caller and nothing uses what was there.
pub(super) unsafe fn map_file(addr: u64, size: Bytes, file: BorrowedFd<'_>, offset: u64) -> Result<()> {
    let flags = MapFlags::FIXED | MapFlags::SHARED;
    // SAFETY: the caller owns the range that is replaced.
    unsafe { mm::mmap(at(addr), size.as_usize(), ProtFlags::empty(), flags, file, offset) }
        .map_err(|errno| failed("map", errno, addr, size))?;
    Ok(())
}

/// Makes a mapped range readable and writable.
///
/// # Safety
/// The range belongs to the caller.
pub(super) unsafe fn allow_access(addr: u64, size: Bytes) -> Result<()> {
    // SAFETY: the caller owns the range, and more access breaks no assumption of safe code.
    unsafe { mm::mprotect(at(addr), size.as_usize(), MprotectFlags::READ | MprotectFlags::WRITE) }
        .map_err(|errno| failed("allow_access", errno, addr, size))
}

/// Takes whatever is in the range away and keeps the range reserved. Never a plain unmap: between that and reserving
/// again another thread's mapping could move in.
///
/// # Safety
/// The range belongs to a reservation of the caller and nothing uses what was there.
pub(super) unsafe fn unmap(addr: u64, size: Bytes) -> Result<()> {
    let flags = UNBACKED | MapFlags::FIXED;
    // SAFETY: the caller owns the range that is replaced.
    unsafe { mm::mmap_anonymous(at(addr), size.as_usize(), ProtFlags::empty(), flags) }
        .map_err(|errno| failed("unmap", errno, addr, size))?;
    Ok(())
}

/// Ordinary memory, page-aligned and zeroed.
pub(super) fn allocate(size: Bytes) -> Result<*mut u8> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
    unsafe { mm::mmap_anonymous(ptr::null_mut(), size.as_usize(), access, MapFlags::PRIVATE) }
        .map(|first| first.cast())
        .map_err(|errno| DeviceError::system("alloc_pinned", errno, format!("{size} of host memory")))
}

/// A device address as a pointer. The provenance is that of the reservation, exposed when it was made.
pub(super) fn pointer(addr: DeviceAddr) -> *mut u8 {
    ptr::with_exposed_provenance_mut(addr.get() as usize)
}

/// Address space without memory, and without a claim on any.
const UNBACKED: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

fn at(addr: u64) -> *mut std::ffi::c_void {
    ptr::with_exposed_provenance_mut(addr as usize)
}

fn failed(call: &'static str, errno: Errno, addr: u64, size: Bytes) -> DeviceError {
    let hint = if errno == Errno::NOMEM { "; the limit on mappings is vm.max_map_count" } else { "" };
    DeviceError::system(call, errno, format!("{size} at {addr:#x}{hint}"))
}

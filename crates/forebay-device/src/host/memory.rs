//! Address space and frames together: checks what a GPU driver would check, then asks the system.

use forebay_core::Bytes;

use super::GRANULARITY;
use super::frames::Frames;
use super::space::Space;
use super::vm;
use crate::{DeviceAddr, DeviceError, FrameHandle, MemoryInfo, Result};

/// Invariant: the bookkeeping in `space` and `frames` says what the process's address space is; it changes only after
/// the system call it stands for has succeeded.
#[derive(Debug)]
pub(super) struct Memory {
    capacity: Bytes,
    poison: bool,
    frames: Frames,
    space: Space,
}

impl Memory {
    pub(super) fn new(capacity: Bytes, poison: bool) -> Result<Self> {
        Ok(Memory { capacity, poison, frames: Frames::new()?, space: Space::default() })
    }

    pub(super) fn info(&self) -> MemoryInfo {
        MemoryInfo { free: self.capacity.saturating_sub(self.frames.used()), total: self.capacity }
    }

    pub(super) fn reserve(&mut self, size: Bytes, align: Bytes) -> Result<DeviceAddr> {
        check_size("reserve", size)?;
        if !align.get().is_power_of_two() {
            return Err(DeviceError::invalid(
                "reserve",
                format!("an alignment is a power of two: {}", align.get()),
            ));
        }
        let addr = vm::reserve(size, align.max(GRANULARITY))?;
        self.space.add(addr, size);
        Ok(DeviceAddr::new(addr))
    }

    pub(super) fn free_reservation(&mut self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.space.check_removable(addr, size)?;
        // SAFETY: the range is one that `reserve` made and nobody gave back, and nothing is mapped in it.
        unsafe { vm::release("free_reservation", addr.get(), size)? };
        self.space.remove(addr.get());
        Ok(())
    }

    pub(super) fn create_frame(&mut self, size: Bytes) -> Result<FrameHandle> {
        check_size("create_frame", size)?;
        let free = self.info().free;
        if size > free {
            return Err(DeviceError::OutOfMemory { call: "create_frame", wanted: size, free: Some(free) });
        }
        let frame = self.frames.create(size)?;
        if self.poison
            && let Err(error) = self.frames.poison("create_frame", frame)
        {
            self.frames.release(frame)?;
            return Err(error);
        }
        Ok(frame)
    }

    pub(super) fn release_frame(&mut self, handle: FrameHandle, size: Bytes) -> Result<()> {
        let frame = self.frames.find("release_frame", handle)?;
        let wrong = |why: String| Err(DeviceError::invalid("release_frame", why));
        if let Some(addr) = frame.mapped_at {
            return wrong(format!("frame {} is mapped at {addr:#x}", handle.0));
        }
        if frame.size != size {
            return wrong(format!("frame {} has {}: {size}", handle.0, frame.size));
        }
        self.frames.release(handle)
    }

    pub(super) fn map(&mut self, addr: DeviceAddr, size: Bytes, handle: FrameHandle) -> Result<()> {
        check_size("map", size)?;
        check_addr("map", addr)?;
        let frame = *self.frames.find("map", handle)?;
        if frame.size != size {
            return Err(DeviceError::unsupported(
                "map",
                format!("frame {} is mapped whole, with {}: {size}", handle.0, frame.size),
            ));
        }
        if let Some(at) = frame.mapped_at {
            return Err(DeviceError::invalid(
                "map",
                format!("frame {} is already mapped at {at:#x}", handle.0),
            ));
        }
        self.space.check_unmapped("map", addr, size)?;
        if self.poison && frame.last_at.is_some_and(|last| last != addr.get()) {
            self.frames.poison("map", handle)?;
        }
        // SAFETY: the range lies in a reservation and nothing is mapped there, both checked just now.
        unsafe { vm::map_file(addr.get(), size, self.frames.file(), frame.offset)? };
        self.space.insert(addr, size, handle);
        self.frames.set_mapped(handle, Some(addr.get()));
        Ok(())
    }

    pub(super) fn allow_access(&mut self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        self.space.whole_frames("allow_access", addr, size)?;
        // SAFETY: the range consists of mapped frames of this device, checked just now.
        unsafe { vm::allow_access(addr.get(), size) }
    }

    pub(super) fn unmap(&mut self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let frames = self.space.whole_frames("unmap", addr, size)?;
        // SAFETY: the range consists of mapped frames of this device, checked just now; that no work touches them is
        // the contract of `Device::unmap`.
        unsafe { vm::unmap(addr.get(), size)? };
        self.space.erase(addr, size);
        for frame in frames {
            self.frames.set_mapped(frame, None);
        }
        Ok(())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (addr, size) in self.space.drain() {
            tracing::warn!(%size, addr = format_args!("{addr:#x}"), "a reservation outlived its device");
            // SAFETY: the range is one that `reserve` made and nobody gave back; with the device gone nobody may use it.
            if let Err(error) = unsafe { vm::release("free_reservation", addr, size) } {
                tracing::warn!(%error, "a reservation could not be given back");
            }
        }
    }
}

fn check_size(call: &'static str, size: Bytes) -> Result<()> {
    if size == Bytes::ZERO || !size.get().is_multiple_of(GRANULARITY.get()) {
        return Err(DeviceError::invalid(
            call,
            format!("a size is a multiple of {GRANULARITY}: {}", size.get()),
        ));
    }
    Ok(())
}

fn check_addr(call: &'static str, addr: DeviceAddr) -> Result<()> {
    if !addr.get().is_multiple_of(GRANULARITY.get()) {
        return Err(DeviceError::invalid(
            call,
            format!("an address is aligned to {GRANULARITY}: {:#x}", addr.get()),
        ));
    }
    Ok(())
}

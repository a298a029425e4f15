//! Which addresses are reserved and what is mapped where. Bookkeeping only: no system calls.

use std::collections::BTreeMap;

use forebay_core::Bytes;

use crate::{DeviceAddr, DeviceError, FrameHandle, Result};

/// The reserved ranges of a device, by their first address.
#[derive(Debug, Default)]
pub(super) struct Space {
    reservations: BTreeMap<u64, Reserved>,
}

#[derive(Debug)]
struct Reserved {
    size: Bytes,
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    size: Bytes,
    frame: FrameHandle,
}

impl Space {
    pub(super) fn add(&mut self, addr: u64, size: Bytes) {
        self.reservations.insert(addr, Reserved { size, mappings: BTreeMap::new() });
    }

    pub(super) fn remove(&mut self, addr: u64) {
        self.reservations.remove(&addr);
    }

    /// Whether `addr` and `size` are a reservation with nothing mapped in it.
    pub(super) fn check_removable(&self, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let wrong = |why: String| Err(DeviceError::invalid("free_reservation", why));
        match self.reservations.get(&addr.get()) {
            Some(reserved) if reserved.size != size => {
                wrong(format!("the reservation at {:#x} has {}: {size}", addr.get(), reserved.size))
            }
            Some(reserved) if !reserved.mappings.is_empty() => {
                wrong(format!("{} frames are mapped in {}", reserved.mappings.len(), shown(addr, size)))
            }
            Some(_) => Ok(()),
            None => wrong(format!("no reservation starts at {:#x}", addr.get())),
        }
    }

    /// Whether the range lies in a reservation and nothing is mapped in it.
    pub(super) fn check_unmapped(&self, call: &'static str, addr: DeviceAddr, size: Bytes) -> Result<()> {
        let reserved = self.containing(call, addr, size)?;
        let end = addr.get() + size.get();
        let before = reserved.mappings.range(..end).next_back();
        match before.filter(|(start, mapping)| *start + mapping.size.get() > addr.get()) {
            Some((start, _)) => Err(DeviceError::invalid(
                call,
                format!("a frame is already mapped at {start:#x}: {}", shown(addr, size)),
            )),
            None => Ok(()),
        }
    }

    /// The frames mapped in the range, which must consist of whole ones.
    pub(super) fn whole_frames(
        &self,
        call: &'static str,
        addr: DeviceAddr,
        size: Bytes,
    ) -> Result<Vec<FrameHandle>> {
        let reserved = self.containing(call, addr, size)?;
        let end = addr.get() + size.get();
        let mut frames = Vec::new();
        let mut at = addr.get();
        while at < end {
            let mapping = reserved.mappings.get(&at).ok_or_else(|| {
                DeviceError::invalid(call, format!("no frame begins at {at:#x}: {}", shown(addr, size)))
            })?;
            frames.push(mapping.frame);
            at += mapping.size.get();
        }
        if at > end {
            return Err(DeviceError::invalid(
                call,
                format!("a frame reaches on to {at:#x}: {}", shown(addr, size)),
            ));
        }
        Ok(frames)
    }

    pub(super) fn insert(&mut self, addr: DeviceAddr, size: Bytes, frame: FrameHandle) {
        if let Some(reserved) = self.reserved_mut(addr) {
            reserved.mappings.insert(addr.get(), Mapping { size, frame });
        }
    }

    pub(super) fn erase(&mut self, addr: DeviceAddr, size: Bytes) {
        let end = addr.get() + size.get();
        if let Some(reserved) = self.reserved_mut(addr) {
            let inside: Vec<u64> =
                reserved.mappings.range(addr.get()..end).map(|(start, _)| *start).collect();
            for start in inside {
                reserved.mappings.remove(&start);
            }
        }
    }

    /// Every reservation, for the device's end.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (u64, Bytes)> + use<> {
        std::mem::take(&mut self.reservations).into_iter().map(|(addr, reserved)| (addr, reserved.size))
    }

    fn containing(&self, call: &'static str, addr: DeviceAddr, size: Bytes) -> Result<&Reserved> {
        let outside = || DeviceError::invalid(call, format!("no reservation holds {}", shown(addr, size)));
        let end = addr.get().checked_add(size.get()).ok_or_else(outside)?;
        let (start, reserved) = self.reservations.range(..=addr.get()).next_back().ok_or_else(outside)?;
        if size == Bytes::ZERO || end > start + reserved.size.get() { Err(outside()) } else { Ok(reserved) }
    }

    fn reserved_mut(&mut self, addr: DeviceAddr) -> Option<&mut Reserved> {
        self.reservations.range_mut(..=addr.get()).next_back().map(|(_, reserved)| reserved)
    }
}

fn shown(addr: DeviceAddr, size: Bytes) -> String {
    format!("{size} at {:#x}", addr.get())
}

//! A naive executor of commands: which frames exist, what backs what, and what the pages contain.

use std::collections::{BTreeMap, BTreeSet};

use forebay_core::{Bytes, Command, FrameId, PageRef, Serial};

use super::{Checked, ensure};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Backing {
    pub(crate) frame: FrameId,
    /// Differs for any two mappings, as the bytes in a fresh frame do.
    pub(crate) contents: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Machine {
    frames: BTreeMap<FrameId, Bytes>,
    in_use: BTreeSet<FrameId>,
    backing: BTreeMap<PageRef, Backing>,
    /// What a page contained, or contains, under a serial.
    contents: BTreeMap<(PageRef, Serial), u64>,
    last_serial: Serial,
    /// Every page ever mapped, in order.
    history: Vec<PageRef>,
}

impl Machine {
    /// Executes one command, or says what is wrong with it.
    pub(crate) fn apply(&mut self, command: Command, size_of: impl Fn(PageRef) -> Bytes) -> Checked {
        match command {
            Command::Create { frame, size } => {
                ensure!(self.frames.insert(frame, size).is_none(), "{frame:?} was created twice");
            }
            Command::Destroy { frame, size } => {
                ensure!(!self.in_use.contains(&frame), "{frame:?} was destroyed under a page");
                let real = self.frames.remove(&frame);
                ensure!(real == Some(size), "{frame:?} of {real:?} was destroyed as one of {size}");
            }
            Command::Retire { page, frame } => {
                let real = self.backing.remove(&page).map(|backing| backing.frame);
                ensure!(real == Some(frame), "{page} is backed by {real:?}, but {frame:?} was retired");
                self.in_use.remove(&frame);
            }
            Command::Map { page, frame, serial, .. } => {
                let size = self.frames.get(&frame).copied();
                ensure!(size == Some(size_of(page)), "{frame:?} of {size:?} does not fit {page}");
                ensure!(self.in_use.insert(frame), "{frame:?} was mapped to {page} while it backs another");
                ensure!(serial > self.last_serial, "{serial:?} after {:?}", self.last_serial);
                self.last_serial = serial;
                self.history.push(page);
                let contents = self.history.len() as u64;
                self.contents.insert((page, serial), contents);
                let backing = Backing { frame, contents };
                ensure!(self.backing.insert(page, backing).is_none(), "{page} was mapped twice");
            }
        }
        Ok(())
    }

    /// A frame was refused, so it and what it was mapped to never came to be.
    pub(crate) fn undo_create(&mut self, page: PageRef, frame: FrameId) {
        self.frames.remove(&frame);
        self.in_use.remove(&frame);
        self.backing.remove(&page);
    }

    pub(crate) fn backing(&self, page: PageRef) -> Option<Backing> {
        self.backing.get(&page).copied()
    }

    pub(crate) fn contents(&self, page: PageRef, serial: Serial) -> Option<u64> {
        self.contents.get(&(page, serial)).copied()
    }

    pub(crate) fn backed_pages(&self) -> usize {
        self.backing.len()
    }

    /// Bytes of all frames.
    pub(crate) fn held(&self) -> Bytes {
        self.frames.values().copied().sum()
    }

    /// Bytes of the frames that back nothing.
    pub(crate) fn free(&self) -> Bytes {
        self.frames.iter().filter(|(frame, _)| !self.in_use.contains(frame)).map(|(_, &size)| size).sum()
    }

    /// Every page ever mapped, in order.
    pub(crate) fn history(&self) -> &[PageRef] {
        &self.history
    }
}

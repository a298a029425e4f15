//! Names for the things the policy speaks of.

use std::fmt;

/// One VBAR of a [`Policy`](crate::Policy). Never reused, so a stale id is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VbarId(pub(crate) u32);

impl VbarId {
    /// The plain number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A page's place in its VBAR, counted from its base address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageIndex(pub u32);

impl PageIndex {
    /// The plain number as an index.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

/// A page's importance inside its VBAR: 0 is kept longest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rank(pub u32);

/// One page of one VBAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRef {
    /// The VBAR.
    pub vbar: VbarId,
    /// The page in it.
    pub page: PageIndex,
}

impl fmt::Display for PageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {} of VBAR {}", self.page.0, self.vbar.0)
    }
}

/// A physical allocation, numbered by the policy. Numbers of destroyed frames are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameId(pub u32);

/// Counts mappings. A page gets a new serial each time it is backed, so an unchanged serial means unchanged
/// contents. 0 means never backed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Serial(pub u64);

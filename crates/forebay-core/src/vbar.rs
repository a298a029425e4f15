//! One VBAR as the policy sees it.

use std::collections::VecDeque;

use crate::rank_set::RankSet;
use crate::{Bytes, FrameId, PageIndex, Rank, RankOrder, Ranks, Serial};

/// What happens to a fault above the watermark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Pages above the watermark are lent for one use.
    Streamed,
    /// Pages above the watermark are refused; whoever asked fills the pages.
    Explicit,
}

/// A VBAR to be added to a policy.
#[derive(Clone, Copy, Debug)]
pub struct VbarSpec {
    /// How many pages.
    pub pages: u32,
    /// Bytes a page.
    pub page_size: Bytes,
    /// Which pages are kept longest.
    pub order: RankOrder,
    /// What happens above the watermark.
    pub mode: Mode,
    /// How many streamed frames to aim at: enough to read ahead while the pages in use are still held.
    pub window: u32,
}

/// Where a page stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// No frame.
    Absent,
    /// Has a frame, its contents are on the way.
    Filling,
    /// Below the watermark: kept between uses.
    Resident,
    /// Streamed, filled, not used yet.
    Ahead,
    /// Streamed and pinned, or not yet released since it was.
    InUse,
    /// Streamed, used and released: its frame is the next to go.
    Spent,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) place: Place,
    pub(crate) frame: FrameId,
    pub(crate) serial: Serial,
    /// Planned uses that have not come yet.
    pub(crate) upcoming: u16,
    /// Stands in the queue of spent pages, still spent or not.
    pub(crate) queued: bool,
    /// The fill was asked for by a caller, not by read-ahead.
    pub(crate) demanded: bool,
}

#[derive(Debug)]
pub(crate) struct Vbar {
    pub(crate) spec: VbarSpec,
    pub(crate) ranks: Ranks,
    pub(crate) pages: Vec<Page>,
    /// Ranks below this are resident, or will be once they come by.
    pub(crate) watermark: u32,
    /// Ranks below this are not taken by pressure.
    pub(crate) floor: u32,
    /// The filled pages below the watermark.
    pub(crate) resident: RankSet,
    /// Pages filled ahead of their use, nearest first; entries whose page moved on are skipped.
    pub(crate) ahead: VecDeque<PageIndex>,
    /// Pages with a frame.
    pub(crate) held: u32,
    /// Uses since pressure last lowered the watermark.
    pub(crate) calm: u32,
    /// Being removed: every page leaves as soon as it can.
    pub(crate) closing: bool,
}

impl Vbar {
    pub(crate) fn new(spec: VbarSpec) -> Self {
        let absent = Page {
            place: Place::Absent,
            frame: FrameId(0),
            serial: Serial(0),
            upcoming: 0,
            queued: false,
            demanded: false,
        };
        Vbar {
            spec,
            ranks: Ranks::new(spec.pages, spec.order),
            pages: vec![absent; spec.pages as usize],
            watermark: spec.pages,
            floor: 0,
            resident: RankSet::new(spec.pages),
            ahead: VecDeque::new(),
            held: 0,
            calm: 0,
            closing: false,
        }
    }

    pub(crate) fn page(&mut self, page: PageIndex) -> &mut Page {
        &mut self.pages[page.as_usize()]
    }

    pub(crate) fn place(&self, page: PageIndex) -> Place {
        self.pages[page.as_usize()].place
    }

    pub(crate) fn is_kept(&self, page: PageIndex) -> bool {
        self.ranks.rank(page).0 < self.watermark
    }

    /// Whether pages above the watermark are lent for a use.
    pub(crate) fn lends(&self) -> bool {
        self.spec.mode == Mode::Streamed && !self.closing
    }

    /// Whether a page without a frame may get one.
    pub(crate) fn admits(&self, page: PageIndex) -> bool {
        self.lends() || self.is_kept(page)
    }

    /// Frames held by pages above the watermark, or still being filled.
    pub(crate) fn streamed(&self) -> u32 {
        self.held - self.resident.len()
    }

    /// The watermark falls to `rank` if it is above.
    pub(crate) fn lower_to(&mut self, rank: Rank) {
        if rank.0 < self.watermark {
            self.watermark = rank.0;
            self.calm = 0;
        }
    }

    /// Drops entries at the front of the read-ahead queue whose page was used or given up meanwhile.
    pub(crate) fn trim_ahead(&mut self) {
        while self.ahead.front().is_some_and(|&page| self.place(page) != Place::Ahead) {
            self.ahead.pop_front();
        }
    }
}

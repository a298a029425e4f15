//! One VBAR as the policy sees it.

use std::collections::VecDeque;

use crate::rank_set::RankSet;
use crate::turns::Turns;
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
#[derive(Clone, Debug)]
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
    /// How many uses one pass has: the weights that are read in order. 0: passes are not told apart.
    pub uses_a_pass: u32,
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
    /// What it holds is out of date: it leaves with its last pin.
    pub(crate) stale: bool,
    /// Stands in the queue of spent pages, still spent or not.
    pub(crate) queued: bool,
    /// The number of its latest entry among the pages read ahead.
    entry: u32,
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
    /// Pages filled ahead of their use, nearest first, and the number of the entry; entries whose page moved on are
    /// skipped.
    ahead: VecDeque<(PageIndex, u32)>,
    entries: u32,
    /// Pages with a frame.
    pub(crate) held: u32,
    /// Releases since the watermark last fell, or a frame had to be taken for a window that was not overfull.
    pub(crate) calm: u32,
    /// A page was given up before a use that was planned for it.
    pub(crate) lost_plan: bool,
    /// Being removed: every page leaves as soon as it can.
    pub(crate) closing: bool,
    pub(crate) lent: Lent,
    pub(crate) turns: Turns,
}

/// Whether somebody holds a VBAR's pages until asked to give them back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lent {
    No,
    Yes,
    AskedBack,
}

impl Vbar {
    pub(crate) fn new(spec: VbarSpec) -> Self {
        let absent = Page {
            place: Place::Absent,
            frame: FrameId(0),
            serial: Serial(0),
            upcoming: 0,
            stale: false,
            queued: false,
            entry: 0,
        };
        Vbar {
            ranks: Ranks::new(spec.pages, &spec.order),
            pages: vec![absent; spec.pages as usize],
            watermark: spec.pages,
            floor: 0,
            resident: RankSet::new(spec.pages),
            spec,
            ahead: VecDeque::new(),
            entries: 0,
            held: 0,
            calm: 0,
            lost_plan: false,
            closing: false,
            lent: Lent::No,
            turns: Turns::default(),
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

    /// A filled page waits for its use, after those that wait already.
    pub(crate) fn push_ahead(&mut self, page: PageIndex) {
        while self.ahead.front().is_some_and(|&entry| !self.is_current(entry)) {
            self.ahead.pop_front();
        }
        self.entries = self.entries.wrapping_add(1);
        let number = self.entries;
        let entry = self.page(page);
        (entry.place, entry.entry) = (Place::Ahead, number);
        self.ahead.push_back((page, number));
    }

    /// Takes the page that waits for the farthest use out of the queue.
    pub(crate) fn pop_ahead(&mut self) -> Option<PageIndex> {
        while let Some(entry) = self.ahead.pop_back() {
            if self.is_current(entry) {
                return Some(entry.0);
            }
        }
        None
    }

    fn is_current(&self, (page, number): (PageIndex, u32)) -> bool {
        let page = &self.pages[page.as_usize()];
        page.place == Place::Ahead && page.entry == number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_wait_again_and_again_leave_no_trail() {
        let order = RankOrder::Address;
        let (page_size, mode) = (Bytes::mib(2), Mode::Streamed);
        let spec = VbarSpec { pages: 2, page_size, order, mode, window: 2, uses_a_pass: 2 };
        let mut vbar = Vbar::new(spec);
        for n in 0..1000 {
            let page = PageIndex(n % 2);
            vbar.push_ahead(page);
            vbar.page(page).place = Place::InUse;
            vbar.push_ahead(page);
        }
        assert!(vbar.ahead.len() <= 4, "{} entries for two pages", vbar.ahead.len());
        assert_eq!(
            [vbar.pop_ahead(), vbar.pop_ahead(), vbar.pop_ahead()],
            [Some(PageIndex(1)), Some(PageIndex(0)), None]
        );
    }
}

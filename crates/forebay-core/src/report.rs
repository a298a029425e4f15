//! What a policy tells of itself.

use crate::vbar::Place;
use crate::{Bytes, PageRef, Policy, Rank, Serial, VbarId};

/// Where a page stands, for reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageState {
    /// No memory behind it.
    Absent,
    /// Kept between uses.
    Resident,
    /// Backed for the time of a use.
    Streamed,
}

impl Policy {
    /// Bytes that frames may take.
    pub fn budget(&self) -> Bytes {
        self.budget
    }

    /// Bytes of all frames, those that back nothing included.
    pub fn held(&self) -> Bytes {
        self.frames.held()
    }

    /// Bytes of the frames that back nothing.
    pub fn free_frames(&self) -> Bytes {
        self.frames.free_bytes()
    }

    /// Pages of a VBAR that have a frame.
    pub fn held_pages(&self, id: VbarId) -> u32 {
        self.vbars[id.0 as usize].as_ref().map_or(0, |vbar| vbar.held)
    }

    /// How many ranks of a VBAR are resident.
    pub fn watermark(&self, id: VbarId) -> Rank {
        Rank(self.vbars[id.0 as usize].as_ref().map_or(0, |vbar| vbar.watermark))
    }

    /// How many ranks of a VBAR stay resident once its passes have settled: what the watermark and the budget allow beside
    /// a window.
    pub fn settled_watermark(&self, id: VbarId) -> Rank {
        let Some(vbar) = &self.vbars[id.0 as usize] else { return Rank(0) };
        let frames = u32::try_from(self.budget.get() / vbar.spec.page_size.get()).unwrap_or(u32::MAX);
        let fits = if frames < vbar.spec.pages { frames.saturating_sub(vbar.spec.window) } else { frames };
        Rank(vbar.watermark.min(fits))
    }

    /// A page's rank in its VBAR.
    pub fn rank(&self, page: PageRef) -> Rank {
        self.vbars[page.vbar.0 as usize].as_ref().map_or(Rank(0), |vbar| vbar.ranks.rank(page.page))
    }

    /// Whether a page has its place below the watermark.
    pub fn is_kept(&self, page: PageRef) -> bool {
        self.vbars[page.vbar.0 as usize].as_ref().is_some_and(|vbar| vbar.is_kept(page.page))
    }

    /// Where a page stands.
    pub fn state(&self, page: PageRef) -> PageState {
        match self.vbars[page.vbar.0 as usize]
            .as_ref()
            .map(|vbar| (vbar.place(page.page), vbar.is_kept(page.page)))
        {
            None | Some((Place::Absent, _)) => PageState::Absent,
            Some((Place::Resident, _) | (Place::Filling, true)) => PageState::Resident,
            Some(_) => PageState::Streamed,
        }
    }

    /// The page's serial: a new one each time it is backed.
    pub fn serial(&self, page: PageRef) -> Serial {
        self.vbars[page.vbar.0 as usize]
            .as_ref()
            .map_or(Serial(0), |vbar| vbar.pages[page.page.as_usize()].serial)
    }

    /// The VBARs, highest priority first.
    pub fn priorities(&self) -> impl Iterator<Item = VbarId> {
        self.priority.iter().rev().copied()
    }

    /// The VBARs, highest priority first; those at the top that are used in turn in an order that their turns do not change.
    pub fn lasting_priorities(&self) -> Vec<VbarId> {
        let mut ids: Vec<VbarId> = self.priorities().collect();
        ids[..self.top_in_turn().count()].sort_unstable();
        ids
    }

    /// The first of the [lasting priorities](Self::lasting_priorities).
    pub fn lasting_first(&self) -> Option<VbarId> {
        self.top_in_turn().map(|(id, _)| id).min().or_else(|| self.priorities().next())
    }

    /// The VBAR used last, or else the one of the highest priority.
    pub fn in_use(&self) -> Option<VbarId> {
        self.in_use.or_else(|| self.priorities().next())
    }

    /// Units of work done so far, a measure of cost that does not depend on the machine.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

//! Whose frame goes next.
//!
//! Spent pages first; then VBARs of lower priority, lowest first, and in each the highest rank; then the asking VBAR's
//! own, which lowers its watermark. VBARs that are used in [turn](crate::turns) lose theirs together, the largest share
//! first; what a member of the group read ahead within its window is left to it. A demand may take anything that is not
//! pinned, read-ahead only as much as its window. What is lent as a whole is not taken but asked back, and waited for.

use std::ops::Range;

use crate::vbar::{Lent, Place};
use crate::{Bytes, Command, FrameId, Mode, PageRef, Pins, Policy, Rank, VbarId};

/// Why a frame is wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A caller waits.
    Demand,
    /// A use is expected.
    ReadAhead,
}

/// Whose frame was freed.
enum Whose {
    Spent,
    Lower,
    Shared,
}

impl Policy {
    pub(crate) fn take_frame(
        &mut self,
        page: PageRef,
        purpose: Purpose,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> Option<FrameId> {
        let size = self.page_size(page.vbar);
        let (mut takes_lower, mut takes_shared) = (false, false);
        let frame = loop {
            self.steps += 1;
            let over = self.frames.held() > self.budget;
            if !over && let Some(frame) = self.frames.take(size) {
                break frame;
            }
            if self.frames.held().checked_add(size).is_some_and(|held| held <= self.budget) {
                let frame = self.frames.create(size);
                out.push(Command::Create { frame, size });
                break frame;
            }
            if let Some((frame, size)) = self.frames.destroy_one() {
                out.push(Command::Destroy { frame, size });
                continue;
            }
            if self.is_short(page.vbar) {
                self.vbar(page.vbar).calm = 0;
            }
            match self.evict_for(page, purpose, pins, out)? {
                Whose::Spent => {}
                Whose::Lower => takes_lower = true,
                Whose::Shared => takes_shared = true,
            }
        };
        if takes_lower && !takes_shared {
            self.keep_what_was_taken(page.vbar);
        }
        Some(frame)
    }

    /// Frees one frame for `page`, if the rules let it take one.
    fn evict_for(
        &mut self,
        page: PageRef,
        purpose: Purpose,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> Option<Whose> {
        if self.evict_spent(pins, out) {
            return Some(Whose::Spent);
        }
        let sharing = self.sharing(page.vbar);
        for i in 0..sharing.start {
            let lower = self.priority[i];
            if self.asks_back(lower) {
                return None;
            }
            let floor = self.vbar(lower).floor;
            if self.evict_ahead(lower, pins, out) || self.evict_resident(lower, floor, pins, out) {
                return Some(Whose::Lower);
            }
        }
        self.evict_shared(page, purpose, &sharing, pins, out).then_some(Whose::Shared)
    }

    /// Frees one frame of the VBAR itself and those that share memory with it; for a demand, in the end, anybody's.
    fn evict_shared(
        &mut self,
        page: PageRef,
        purpose: Purpose,
        sharing: &Range<usize>,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> bool {
        let own = self.vbar(page.vbar);
        let below_window = own.streamed() < own.spec.window;
        if self.asks_back(page.vbar) || (below_window && self.asks_largest_back(sharing, true)) {
            return false;
        }
        if below_window && self.evict_beyond_windows(sharing, pins, out) {
            return true;
        }
        let own = self.vbar(page.vbar);
        match (own.spec.mode, purpose) {
            (Mode::Explicit, _) => {
                let above = own.ranks.rank(page.page).0 + 1;
                self.evict_resident(page.vbar, above, pins, out)
            }
            (Mode::Streamed, Purpose::ReadAhead) => self.evict_for_read_ahead(page.vbar, sharing, pins, out),
            (Mode::Streamed, Purpose::Demand) => {
                (below_window && self.evict_largest(sharing, true, pins, out))
                    || self.evict_ahead(page.vbar, pins, out)
                    || self.evict_any(pins, out)
            }
        }
    }

    /// Read-ahead may turn kept pages of those that share memory into streamed ones until the own window is full. An own
    /// page that is in use, or about to be, joins the window as it is, instead of being read twice.
    fn evict_for_read_ahead(
        &mut self,
        id: VbarId,
        sharing: &Range<usize>,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> bool {
        loop {
            self.steps += 1;
            let vbar = self.vbar(id);
            if vbar.streamed() >= vbar.spec.window {
                return false;
            }
            let Some((from, rank)) = self.largest_share(sharing, true) else { return false };
            if self.asks_back(from) {
                return false;
            }
            self.vbar(from).lower_to(rank);
            let page = self.at(from, rank);
            let joins = from == id && self.vbar(id).page(page.page).upcoming > 0;
            if !joins && self.try_evict(page, pins, out) {
                return true;
            }
            self.stream(page, pins, out);
        }
    }

    /// Any unpinned page at all: spent ones, then from the lowest priority up. Floors hold as long as there is
    /// another way.
    pub(crate) fn evict_any(&mut self, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        if self.evict_spent(pins, out) {
            return true;
        }
        let group = self.group();
        for respect_floor in [true, false] {
            for i in 0..group.start {
                let id = self.priority[i];
                self.steps += 1;
                if self.asks_back(id) {
                    return false;
                }
                let floor = if respect_floor { self.vbar(id).floor } else { 0 };
                if self.evict_ahead(id, pins, out) || self.evict_resident(id, floor, pins, out) {
                    return true;
                }
            }
            if self.asks_largest_back(&group, respect_floor) {
                return false;
            }
            if self.evict_beyond_windows(&group, pins, out)
                || self.evict_largest(&group, respect_floor, pins, out)
                || group.clone().any(|i| self.evict_ahead(self.priority[i], pins, out))
            {
                return true;
            }
        }
        false
    }

    fn evict_spent(&mut self, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        while let Some(page) = self.spent.pop_front() {
            self.steps += 1;
            let entry = self.vbar(page.vbar).page(page.page);
            entry.queued = false;
            if entry.place != Place::Spent {
                continue;
            }
            if self.try_evict(page, pins, out) {
                return true;
            }
            self.vbar(page.vbar).page(page.page).place = Place::InUse;
        }
        false
    }

    /// The page of `id` read ahead for the farthest use.
    fn evict_ahead(&mut self, id: VbarId, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        while let Some(page) = self.vbar(id).pop_ahead() {
            self.steps += 1;
            let at = PageRef { vbar: id, page };
            if self.try_evict(at, pins, out) {
                return true;
            }
            self.vbar(id).page(page).place = Place::InUse;
        }
        false
    }

    /// The resident page of the highest rank, unless that is below `floor`; the watermark falls to it. Pinned ones on
    /// the way turn streamed.
    pub(crate) fn evict_resident(
        &mut self,
        id: VbarId,
        floor: u32,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> bool {
        loop {
            self.steps += 1;
            let Some(rank) = self.vbar(id).resident.max().filter(|rank| rank.0 >= floor) else {
                return false;
            };
            if self.evict_kept(id, rank, pins, out) {
                return true;
            }
        }
    }

    /// The kept page of the highest rank of the largest share. Pinned ones on the way turn streamed.
    fn evict_largest(
        &mut self,
        sharing: &Range<usize>,
        respect_floor: bool,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> bool {
        while let Some((id, rank)) = self.largest_share(sharing, respect_floor)
            && !self.asks_back(id)
        {
            if self.evict_kept(id, rank, pins, out) {
                return true;
            }
        }
        false
    }

    /// Whether the kept page of a rank left; a pinned one turns streamed. The watermark falls to it.
    fn evict_kept(&mut self, id: VbarId, rank: Rank, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        self.vbar(id).lower_to(rank);
        let page = self.at(id, rank);
        let left = self.try_evict(page, pins, out);
        if !left {
            self.stream(page, pins, out);
        }
        left
    }

    fn asks_largest_back(&mut self, sharing: &Range<usize>, respect_floor: bool) -> bool {
        self.largest_share(sharing, respect_floor).is_some_and(|(id, _)| self.asks_back(id))
    }

    /// A page that was read ahead beyond a window, which its VBAR does not need before its turn.
    fn evict_beyond_windows(
        &mut self,
        sharing: &Range<usize>,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> bool {
        sharing.clone().any(|i| {
            self.steps += 1;
            let id = self.priority[i];
            let vbar = self.vbar(id);
            vbar.streamed() > vbar.spec.window && vbar.lent == Lent::No && self.evict_ahead(id, pins, out)
        })
    }

    /// Gives up unpinned pages and free frames until the budget holds again.
    pub(crate) fn shrink(&mut self, pins: &mut impl Pins, out: &mut Vec<Command>) {
        while self.frames.held() > self.budget {
            self.steps += 1;
            if self.destroy_free(Bytes::new(1), out) == Bytes::ZERO && !self.evict_any(pins, out) {
                return;
            }
        }
    }

    /// Destroys free frames until `want` bytes are given back or none is left.
    pub(crate) fn destroy_free(&mut self, want: Bytes, out: &mut Vec<Command>) -> Bytes {
        let mut freed = Bytes::ZERO;
        while freed < want
            && let Some((frame, size)) = self.frames.destroy_one()
        {
            self.steps += 1;
            freed += size;
            out.push(Command::Destroy { frame, size });
        }
        freed
    }

    pub(crate) fn try_evict(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        let claimed = pins.claim(page);
        if claimed {
            let vbar = self.vbar(page.vbar);
            vbar.lost_plan |= vbar.page(page.page).upcoming > 0;
            self.vacate(page, out);
        }
        claimed
    }
}

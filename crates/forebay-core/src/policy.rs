//! The residency policy: events in, commands out.
//!
//! Invariants:
//! * The bytes of all frames never grow past the budget. After the budget fell, what is over leaves as soon as its
//!   pins do.
//! * A pinned page is never taken.
//! * Memory is taken from spent pages first, then from the lowest priority, highest rank first; among VBARs that are used in
//!   [turn](crate::turns) from the one with the largest share of its pages.
//! * Equal serials mean equal contents.
//! * No decision's cost depends on the number of pages; it is proportional to the pages it moves and the pins in
//!   its way. [`Policy::steps`] counts.

use std::collections::VecDeque;

use crate::eviction::Purpose;
use crate::frames::Frames;
use crate::vbar::{Lent, Place, Vbar};
use crate::{Bytes, FrameId, PageIndex, PageRef, Pins, Rank, Serial, VbarId, VbarSpec};

/// Releases without shortage before a watermark rises again: no frame was taken but those beyond the window.
const CALM_RELEASES: u32 = 64;

/// What the policy asks its executor to do, strictly in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make a frame.
    Create {
        /// Its number.
        frame: FrameId,
        /// Its size.
        size: Bytes,
    },
    /// Give a frame's memory back.
    Destroy {
        /// Its number, which may be used again from now on.
        frame: FrameId,
        /// Its size.
        size: Bytes,
    },
    /// Unmap a page once the work that read it has finished. Its frame is free afterwards.
    Retire {
        /// The page, claimed.
        page: PageRef,
        /// The frame that backs it.
        frame: FrameId,
    },
    /// Back a page with a frame, then fill it and tell [`Policy::filled`].
    Map {
        /// The page.
        page: PageRef,
        /// A frame that backs nothing.
        frame: FrameId,
        /// The page's new serial.
        serial: Serial,
        /// A caller waits for it.
        demanded: bool,
    },
}

/// The answer to a demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every page is pinned, and is filled or on its way.
    Granted,
    /// A page lies above an explicit watermark, or its VBAR closes. Nothing was pinned.
    Refused,
    /// Pins of others, or fills on their way, hold what is needed. Nothing was pinned; ask again when something was
    /// released, filled or given back.
    Blocked,
    /// Even with every other page gone the pages do not fit. Nothing was pinned.
    TooLarge {
        /// Bytes of the demanded pages.
        needed: Bytes,
    },
}

/// The residency policy of one device. See the module's invariants.
#[derive(Debug)]
pub struct Policy {
    pub(crate) budget: Bytes,
    pub(crate) frames: Frames,
    pub(crate) vbars: Vec<Option<Box<Vbar>>>,
    /// Highest priority last.
    pub(crate) priority: Vec<VbarId>,
    /// The VBAR used last.
    pub(crate) in_use: Option<VbarId>,
    /// Streamed pages whose frames are the next to go, oldest first; entries whose page moved on are skipped.
    pub(crate) spent: VecDeque<PageRef>,
    pub(crate) serial: u64,
    pub(crate) steps: u64,
    /// Lent VBARs that are asked back, and those among them whose holder was not told yet.
    pub(crate) asked_back: usize,
    pub(crate) recalls: Vec<VbarId>,
}

impl Policy {
    /// A policy that may use `budget` bytes of frames.
    pub fn new(budget: Bytes) -> Self {
        Policy {
            budget,
            frames: Frames::default(),
            vbars: Vec::new(),
            priority: Vec::new(),
            in_use: None,
            spent: VecDeque::new(),
            serial: 0,
            steps: 0,
            asked_back: 0,
            recalls: Vec::new(),
        }
    }

    /// Adds a VBAR at the top of the priorities, its watermark fully open.
    pub fn add_vbar(&mut self, spec: VbarSpec) -> VbarId {
        let id = VbarId(self.vbars.len() as u32);
        self.vbars.push(Some(Box::new(Vbar::new(spec))));
        self.end_stay();
        self.in_use = Some(id);
        self.priority.push(id);
        id
    }

    /// Begins to remove a VBAR: what is not pinned leaves now, the rest with its last pin or once filled. Call
    /// [`forget_vbar`](Policy::forget_vbar) when [`held_pages`](Policy::held_pages) has reached zero.
    pub fn close_vbar(&mut self, id: VbarId, pins: &mut impl Pins, out: &mut Vec<Command>) {
        let vbar = self.vbar(id);
        vbar.closing = true;
        vbar.watermark = 0;
        for page in (0..vbar.spec.pages).map(PageIndex) {
            let entry = self.vbar(id).page(page);
            entry.upcoming = 0;
            match entry.place {
                Place::Absent | Place::Filling => {}
                Place::Resident | Place::Ahead | Place::InUse | Place::Spent => {
                    self.stream(PageRef { vbar: id, page }, pins, out);
                }
            }
        }
    }

    /// Removes a closed VBAR that holds no page any more.
    pub fn forget_vbar(&mut self, id: VbarId) {
        debug_assert_eq!(self.held_pages(id), 0);
        debug_assert_eq!(self.vbar(id).lent, Lent::No);
        self.vbars[id.0 as usize] = None;
        self.priority.retain(|&other| other != id);
        self.in_use = self.in_use.filter(|&used| used != id);
        self.spent.retain(|page| page.vbar != id);
    }

    /// Pins pages for an operation and sees to it that they are filled. All or nothing.
    ///
    /// `reserved` are bytes that cannot be made free, whatever leaves (pages pinned for good).
    pub fn demand(
        &mut self,
        pages: &[PageRef],
        reserved: Bytes,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> Outcome {
        let needed: Bytes = pages.iter().map(|page| self.page_size(page.vbar)).sum();
        if needed.checked_add(reserved).is_none_or(|bytes| bytes > self.budget) {
            return Outcome::TooLarge { needed };
        }
        for (done, &page) in pages.iter().enumerate() {
            self.steps += 1;
            if let Err(outcome) = self.demand_one(page, pins, out) {
                for &earlier in &pages[..done] {
                    pins.unpin(earlier);
                    if self.vbar(earlier.vbar).place(earlier.page) == Place::InUse {
                        self.settle(earlier, pins, out);
                    }
                }
                self.shrink(pins, out);
                return outcome;
            }
        }
        Outcome::Granted
    }

    /// Expects a use of a page and reads it ahead. `false` when no frame may be taken for it now, or a demand would
    /// be refused.
    pub fn plan(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        self.steps += 1;
        let vbar = self.vbar(page.vbar);
        match vbar.place(page.page) {
            Place::Absent if !vbar.admits(page.page) => return false,
            Place::Absent => {
                let Some(frame) = self.take_frame(page, Purpose::ReadAhead, pins, out) else { return false };
                self.map(page, frame, Purpose::ReadAhead, pins, out);
            }
            Place::Spent => vbar.push_ahead(page.page),
            Place::Filling | Place::Resident | Place::Ahead | Place::InUse => {}
        }
        let page = self.vbar(page.vbar).page(page.page);
        page.upcoming = page.upcoming.saturating_add(1);
        true
    }

    /// Whether pages were given up since the last call before uses that were planned for them. Then every plan is to be
    /// taken back and made again from the nearest use: what waits for far uses is in the way of near ones.
    pub fn lost_plans(&mut self, id: VbarId) -> bool {
        std::mem::take(&mut self.vbar(id).lost_plan)
    }

    /// A planned use came, or will not come after all.
    pub fn unplan(&mut self, page: PageRef) {
        let entry = self.vbar(page.vbar).page(page.page);
        entry.upcoming = entry.upcoming.saturating_sub(1);
        if entry.upcoming == 0 && entry.place == Place::Ahead {
            self.set_spent(page);
        }
    }

    /// A page's bytes are all there, or its copy is enqueued.
    pub fn filled(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) {
        debug_assert_eq!(self.vbar(page.vbar).place(page.page), Place::Filling);
        self.settle(page, pins, out);
        self.shrink(pins, out);
    }

    /// A page could not be mapped or filled: it is absent again. Callers that wait for it take their pins back.
    pub fn failed(&mut self, page: PageRef, out: &mut Vec<Command>) {
        debug_assert_eq!(self.vbar(page.vbar).place(page.page), Place::Filling);
        self.vacate(page, out);
        let over = self.frames.held().saturating_sub(self.budget);
        self.destroy_free(over, out);
    }

    /// A frame could not be made: the page it was for is absent again, and the budget falls to what there is.
    pub fn create_failed(&mut self, page: PageRef) {
        let vbar = self.vbar(page.vbar);
        vbar.held -= 1;
        let entry = vbar.page(page.page);
        (entry.place, entry.stale) = (Place::Absent, false);
        let frame = entry.frame;
        self.frames.forget(frame);
        self.budget = self.budget.min(self.frames.held());
    }

    /// The last pin of a streamed page went.
    pub fn released(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) {
        self.steps += 1;
        let vbar = self.vbar(page.vbar);
        vbar.calm = vbar.calm.saturating_add(1);
        let rises = vbar.lends() && vbar.calm > CALM_RELEASES && vbar.watermark < vbar.spec.pages;
        if rises && self.could_keep_one_more(page.vbar) {
            self.vbar(page.vbar).watermark += 1;
        }
        match self.vbar(page.vbar).place(page.page) {
            Place::Absent | Place::Filling | Place::Resident => {}
            Place::Ahead | Place::InUse | Place::Spent => self.settle(page, pins, out),
        }
        self.shrink(pins, out);
    }

    /// Gives a page up if it is filled and has no pins, so that it is filled again at its next use.
    pub fn discard(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) {
        if !matches!(self.vbar(page.vbar).place(page.page), Place::Absent | Place::Filling) {
            self.try_evict(page, pins, out);
        }
    }

    /// What a page holds, or is being filled with, is out of date: it leaves now, or with its last pin, and is filled again
    /// at its next use. Nobody pins it meanwhile. Whether it is gone already; [`is_stale`](Policy::is_stale) tells later.
    pub fn outdate(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) -> bool {
        self.steps += 1;
        let place = self.vbar(page.vbar).place(page.page);
        if place == Place::Absent || (place != Place::Filling && self.try_evict(page, pins, out)) {
            return true;
        }
        self.vbar(page.vbar).page(page.page).stale = true;
        pins.set_stale(page);
        if place != Place::Filling {
            self.stream(page, pins, out);
        }
        !self.is_stale(page)
    }

    /// What a page holds is to be changed where it is: it counts as on its way until it is [`filled`](Policy::filled), or
    /// [`failed`](Policy::failed). `false`, and nothing has changed, where it is not filled, pinned or out of date.
    pub fn amend(&mut self, page: PageRef, pins: &mut impl Pins) -> bool {
        self.steps += 1;
        let entry = *self.vbar(page.vbar).page(page.page);
        if matches!(entry.place, Place::Absent | Place::Filling) || entry.stale || !pins.claim(page) {
            return false;
        }
        let vbar = self.vbar(page.vbar);
        let rank = vbar.ranks.rank(page.page);
        vbar.resident.remove(rank);
        vbar.page(page.page).place = Place::Filling;
        self.begin_life(page, pins);
        true
    }

    /// Whether a page still holds what was [outdated](Policy::outdate).
    pub fn is_stale(&mut self, page: PageRef) -> bool {
        self.vbar(page.vbar).page(page.page).stale
    }

    /// Pages whose rank is below `rank` are not taken by pressure until this is set to 0 again.
    pub fn set_floor(&mut self, id: VbarId, rank: Rank) {
        let vbar = self.vbar(id);
        vbar.floor = rank.0.min(vbar.spec.pages);
    }

    /// Lowers the watermark: pages above it leave, pinned ones with their last pin. It opens again with
    /// [`prioritize`](Policy::prioritize).
    pub fn lower_watermark(&mut self, id: VbarId, rank: Rank, pins: &mut impl Pins, out: &mut Vec<Command>) {
        self.vbar(id).lower_to(rank);
        while let Some(top) = self.vbar(id).resident.max().filter(|top| *top >= rank) {
            self.steps += 1;
            let at = self.at(id, top);
            if !self.try_evict(at, pins, out) {
                self.stream(at, pins, out);
            }
        }
    }

    /// Takes memory from one VBAR, highest rank first, down to its floor. Returns the bytes freed.
    pub fn free_from(
        &mut self,
        id: VbarId,
        want: Bytes,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> Bytes {
        let size = self.page_size(id);
        let floor = self.vbar(id).floor;
        let mut freed = Bytes::ZERO;
        while freed < want && self.evict_resident(id, floor, pins, out) {
            freed += size;
        }
        self.destroy_free(freed, out);
        freed
    }

    /// Sets the budget. What is over it leaves now, or with its last pin.
    pub fn set_budget(&mut self, budget: Bytes, pins: &mut impl Pins, out: &mut Vec<Command>) {
        self.budget = budget;
        self.shrink(pins, out);
    }

    /// Frees and destroys frames of at least `want` bytes, from the lowest priority up, as far as there are unpinned
    /// ones. Returns the bytes freed.
    pub fn make_room(&mut self, want: Bytes, pins: &mut impl Pins, out: &mut Vec<Command>) -> Bytes {
        let mut freed = self.destroy_free(want, out);
        while freed < want && self.evict_any(pins, out) {
            freed += self.destroy_free(Bytes::new(1), out);
        }
        freed
    }

    fn demand_one(
        &mut self,
        page: PageRef,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) -> Result<(), Outcome> {
        let vbar = self.vbar(page.vbar);
        if vbar.page(page.page).stale {
            return Err(Outcome::Blocked);
        }
        match vbar.place(page.page) {
            Place::Absent => {
                if !vbar.admits(page.page) {
                    return Err(Outcome::Refused);
                }
                let Some(frame) = self.take_frame(page, Purpose::Demand, pins, out) else {
                    return Err(self.no_frame_for(page));
                };
                self.map(page, frame, Purpose::Demand, pins, out);
            }
            Place::Ahead | Place::Spent => vbar.page(page.page).place = Place::InUse,
            Place::Filling | Place::Resident | Place::InUse => {}
        }
        pins.pin(page);
        Ok(())
    }

    /// Explicit mode closes the watermark down to what could not be had, and the next fault is refused at once.
    fn no_frame_for(&mut self, page: PageRef) -> Outcome {
        let awaited = self.asked_back > 0;
        let vbar = self.vbar(page.vbar);
        if vbar.lends() || awaited {
            return Outcome::Blocked;
        }
        let rank = vbar.ranks.rank(page.page);
        vbar.lower_to(rank);
        Outcome::Refused
    }

    fn map(
        &mut self,
        page: PageRef,
        frame: FrameId,
        purpose: Purpose,
        pins: &mut impl Pins,
        out: &mut Vec<Command>,
    ) {
        self.serial += 1;
        let serial = Serial(self.serial);
        let demanded = purpose == Purpose::Demand;
        let vbar = self.vbar(page.vbar);
        vbar.held += 1;
        let entry = vbar.page(page.page);
        (entry.place, entry.frame, entry.serial) = (Place::Filling, frame, serial);
        self.begin_life(page, pins);
        out.push(Command::Map { page, frame, serial, demanded });
    }

    /// A page without contents will be kept or streamed, as the watermark says.
    fn begin_life(&mut self, page: PageRef, pins: &mut impl Pins) {
        if self.vbar(page.vbar).is_kept(page.page) {
            pins.set_resident(page);
        } else {
            pins.set_streamed(page);
        }
    }

    /// Takes a page's frame away.
    pub(crate) fn vacate(&mut self, page: PageRef, out: &mut Vec<Command>) {
        let vbar = self.vbar(page.vbar);
        let rank = vbar.ranks.rank(page.page);
        vbar.resident.remove(rank);
        vbar.held -= 1;
        let entry = vbar.page(page.page);
        (entry.place, entry.stale) = (Place::Absent, false);
        let frame = entry.frame;
        self.frames.put_back(frame);
        out.push(Command::Retire { page, frame });
    }

    /// A filled page is kept or streamed, as the watermark says.
    fn settle(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) {
        let vbar = self.vbar(page.vbar);
        if vbar.page(page.page).stale || !vbar.is_kept(page.page) {
            return self.stream(page, pins, out);
        }
        pins.set_resident(page);
        let vbar = self.vbar(page.vbar);
        vbar.page(page.page).place = Place::Resident;
        let rank = vbar.ranks.rank(page.page);
        vbar.resident.insert(rank);
    }

    /// A filled page turns streamed: it is in use, waits for its use, or is spent. Where nothing is lent it leaves as
    /// soon as it has no pins.
    pub(crate) fn stream(&mut self, page: PageRef, pins: &mut impl Pins, out: &mut Vec<Command>) {
        let pinned = pins.set_streamed(page);
        let vbar = self.vbar(page.vbar);
        let rank = vbar.ranks.rank(page.page);
        vbar.resident.remove(rank);
        let lends = vbar.lends();
        let entry = vbar.page(page.page);
        if pinned {
            entry.place = Place::InUse;
            return;
        }
        let (expected, stale) = (entry.upcoming > 0, entry.stale);
        if (stale || !lends) && self.try_evict(page, pins, out) {
            return;
        }
        if expected { self.vbar(page.vbar).push_ahead(page.page) } else { self.set_spent(page) }
    }

    fn set_spent(&mut self, page: PageRef) {
        let entry = self.vbar(page.vbar).page(page.page);
        entry.place = Place::Spent;
        if !std::mem::replace(&mut entry.queued, true) {
            self.spent.push_back(page);
        }
    }

    /// The page of a rank.
    pub fn at(&mut self, id: VbarId, rank: Rank) -> PageRef {
        PageRef { vbar: id, page: self.vbar(id).ranks.page(rank) }
    }

    pub(crate) fn page_size(&mut self, id: VbarId) -> Bytes {
        self.vbar(id).spec.page_size
    }

    pub(crate) fn vbar(&mut self, id: VbarId) -> &mut Vbar {
        self.vbars[id.0 as usize].as_mut().expect("a VBAR of this policy")
    }
}

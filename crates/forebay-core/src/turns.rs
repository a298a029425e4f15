//! VBARs that are used in turn within one step do not take memory from each other at each turn.
//!
//! A *stay* is the time in which one VBAR is used and no other. A VBAR whose last two stays were short is used *in turn*: of
//! two such models that lack `missing` pages together, each would take `missing` from the other at each turn. So:
//! * Those at the top of the priorities are the *group*. A member whose turn comes does not open its watermark. It may keep
//!   as large a share of its pages as all together do, and memory is taken from the member with the largest share. They
//!   stream `missing` pages and their windows in a round.
//! * One that comes after a VBAR of longer stays, as a large model after the small one that drafts for it, takes nothing of
//!   it: that one uses its memory more often.
//!
//! What is shared is streamed in every pass, what is taken once in a stay. So a short stay is one pass.

use std::ops::Range;

use crate::vbar::Vbar;
use crate::{Bytes, Policy, Rank, VbarId};

/// The most of a short stay, in halves of a pass: some weights are used twice in a pass.
const SHORT_HALVES: u64 = 3;

/// The most of a stay that is not long, as well.
const LONG_HALVES: u64 = 16;

/// Stays in a row that make a habit.
const HABIT: u8 = 2;

/// How often others of the group may have their turns before a member that had none leaves it.
const MOST_MISSED: u8 = 4;

/// What is known of a VBAR's stays.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turns {
    /// Uses in this stay.
    uses: u64,
    /// Stays in a row that were short, and that were not long.
    short: u8,
    not_long: u8,
    /// Turns that others of the group had since the last one.
    missed: u8,
    /// This stay began without opening the watermark.
    holds_back: bool,
}

impl Vbar {
    /// Whether the VBAR is used in turn with others.
    pub(crate) fn is_in_turn(&self) -> bool {
        self.lends() && self.turns.short >= HABIT
    }

    fn comes_back_soon(&self) -> bool {
        self.lends() && self.turns.not_long >= HABIT
    }

    fn has_stayed_beyond(&self, halves: u64) -> bool {
        2 * self.turns.uses > halves * u64::from(self.spec.uses_a_pass)
    }

    fn bytes_of(&self, pages: u32) -> Bytes {
        self.spec.page_size * u64::from(pages)
    }
}

impl Policy {
    /// The VBAR was used that many times since the last call; 0 announces a use. It goes to the top of the priorities, its
    /// watermark fully open, unless it is there or was used last. One that is used in turn holds back.
    pub fn touch(&mut self, id: VbarId, uses: u32) {
        if self.in_use != Some(id) {
            self.change_turns(id);
        }
        let vbar = self.vbar(id);
        vbar.turns.uses += u64::from(uses);
        if vbar.has_stayed_beyond(LONG_HALVES) {
            vbar.turns.not_long = 0;
        }
        if vbar.has_stayed_beyond(SHORT_HALVES) {
            vbar.turns.short = 0;
            if vbar.turns.holds_back {
                self.raise(id);
                self.open(id);
            }
        }
    }

    fn change_turns(&mut self, id: VbarId) {
        let last = self.in_use;
        self.end_stay();
        self.in_use = Some(id);
        if self.priority.last() == Some(&id) {
            return;
        }
        let follows = last.filter(|last| self.vbar(id).is_in_turn() && self.priority.last() == Some(last));
        match follows {
            Some(last) if self.vbar(last).is_in_turn() => self.take_turn(id),
            Some(last) if self.vbar(last).comes_back_soon() => self.go_below(id),
            _ => {
                self.raise(id);
                self.open(id);
            }
        }
    }

    /// To the top of the priorities with the watermark fully open.
    pub fn prioritize(&mut self, id: VbarId) {
        if self.in_use != Some(id) {
            self.end_stay();
            self.in_use = Some(id);
        }
        self.vbar(id).turns = Turns::default();
        self.raise(id);
        self.open(id);
    }

    /// To the bottom of the priorities.
    pub fn deprioritize(&mut self, id: VbarId) {
        self.vbar(id).turns = Turns::default();
        self.in_use = self.in_use.filter(|&used| used != id);
        self.priority.retain(|&other| other != id);
        self.priority.insert(0, id);
    }

    /// Another VBAR is used.
    pub(crate) fn end_stay(&mut self) {
        let Some(last) = self.in_use.take() else { return };
        let vbar = self.vbar(last);
        let was_short = !vbar.has_stayed_beyond(SHORT_HALVES);
        let was_not_long = !vbar.has_stayed_beyond(LONG_HALVES);
        let turns = &mut vbar.turns;
        if std::mem::take(&mut turns.uses) > 0 {
            turns.short = if was_short { turns.short.saturating_add(1) } else { 0 };
            turns.not_long = if was_not_long { turns.not_long.saturating_add(1) } else { 0 };
        }
    }

    fn raise(&mut self, id: VbarId) {
        self.priority.retain(|&other| other != id);
        self.priority.push(id);
        self.vbar(id).turns.missed = 0;
    }

    fn open(&mut self, id: VbarId) {
        let vbar = self.vbar(id);
        vbar.turns.holds_back = false;
        if !vbar.closing {
            vbar.watermark = vbar.spec.pages;
            vbar.calm = 0;
        }
    }

    /// Right below the top of the priorities, with the watermark where it is.
    fn go_below(&mut self, id: VbarId) {
        self.raise(id);
        self.vbar(id).turns.holds_back = true;
        let top = self.priority.len() - 1;
        self.priority.swap(top - 1, top);
    }

    /// To the top of the group, with the watermark at least where the members together have theirs.
    fn take_turn(&mut self, id: VbarId) {
        self.pass_over_those_below(id);
        self.raise(id);
        let group = self.group();
        if group.is_empty() {
            return self.open(id);
        }
        let (mut kept, mut all) = (Bytes::ZERO, Bytes::ZERO);
        for i in group {
            self.steps += 1;
            let member = self.vbar(self.priority[i]);
            kept += member.bytes_of(member.watermark);
            all += member.bytes_of(member.spec.pages);
        }
        let vbar = self.vbar(id);
        let level = u128::from(vbar.spec.pages) * u128::from(kept.get()) / u128::from(all.get());
        vbar.watermark = vbar.watermark.max(level as u32);
        vbar.turns.holds_back = true;
    }

    fn pass_over_those_below(&mut self, id: VbarId) {
        for i in self.group().start..self.place(id) {
            self.steps += 1;
            let passed_over = self.priority[i];
            let turns = &mut self.vbar(passed_over).turns;
            turns.missed += 1;
            if turns.missed > MOST_MISSED {
                *turns = Turns::default();
            }
        }
    }

    /// A VBAR that holds back and has a full window keeps as much more as it takes of lower priorities.
    pub(crate) fn keep_what_was_taken(&mut self, id: VbarId) {
        let vbar = self.vbar(id);
        let is_beyond_window = vbar.streamed() >= vbar.spec.window;
        if vbar.turns.holds_back && vbar.lends() && is_beyond_window && vbar.watermark < vbar.spec.pages {
            vbar.watermark += 1;
        }
    }

    pub(crate) fn place(&self, id: VbarId) -> usize {
        self.priority.iter().position(|&other| other == id).unwrap_or(0)
    }

    /// The VBARs at the top of the priorities that are used in turn, highest priority first.
    pub(crate) fn top_in_turn(&self) -> impl Iterator<Item = (VbarId, &Vbar)> {
        self.priorities().map_while(|id| {
            let vbar = self.vbars[id.0 as usize].as_deref().filter(|vbar| vbar.is_in_turn())?;
            Some((id, vbar))
        })
    }

    /// The group, as places in the order of priorities. There is none where it costs less to take what is missing from each
    /// other than to have a window each.
    pub(crate) fn group(&self) -> Range<usize> {
        let (mut all, mut windows, mut members) = (Bytes::ZERO, Bytes::ZERO, 0);
        for (_, member) in self.top_in_turn() {
            all += member.bytes_of(member.spec.pages);
            windows += member.bytes_of(member.spec.window.min(member.spec.pages));
            members += 1;
        }
        let end = self.priority.len();
        let missing = all.saturating_sub(self.budget);
        let pays = members > 1 && missing > Bytes::ZERO && missing * (members as u64 - 1) >= windows;
        if pays { end - members..end } else { end..end }
    }

    /// Those that share memory with a VBAR, itself included, as places in the order of priorities.
    pub(crate) fn sharing(&self, id: VbarId) -> Range<usize> {
        let (place, group) = (self.place(id), self.group());
        if place < group.start { place..place + 1 } else { group }
    }

    /// The VBAR that keeps the largest share of its pages and its highest rank, if that is not below its floor.
    pub(crate) fn largest_share(
        &mut self,
        sharing: &Range<usize>,
        respect_floor: bool,
    ) -> Option<(VbarId, Rank)> {
        let mut largest: Option<(VbarId, Rank, u32)> = None;
        for i in sharing.clone() {
            self.steps += 1;
            let id = self.priority[i];
            let vbar = self.vbar(id);
            let floor = if respect_floor { vbar.floor } else { 0 };
            let Some(rank) = vbar.resident.max().filter(|rank| rank.0 >= floor) else { continue };
            let pages = vbar.spec.pages;
            let share = |rank: Rank, of: u32| u64::from(rank.0 + 1) * u64::from(of);
            if largest.is_none_or(|(_, least, of)| share(rank, of) > share(least, pages)) {
                largest = Some((id, rank, pages));
            }
        }
        largest.map(|(id, rank, _)| (id, rank))
    }

    /// Whether those that share memory with a VBAR stream through no more frames than their windows.
    pub(crate) fn is_short(&mut self, id: VbarId) -> bool {
        let (mut streamed, mut windows) = (Bytes::ZERO, Bytes::ZERO);
        for i in self.sharing(id) {
            self.steps += 1;
            let vbar = self.vbar(self.priority[i]);
            streamed += vbar.bytes_of(vbar.streamed());
            windows += vbar.bytes_of(vbar.spec.window);
        }
        streamed <= windows
    }

    /// Whether the pages below the watermarks and one more of this VBAR leave room for full windows, in the frames of those
    /// that share memory with it and those that nobody has.
    pub(crate) fn could_keep_one_more(&mut self, id: VbarId) -> bool {
        let unused = self.budget.saturating_sub(self.frames.held() - self.frames.free_bytes());
        let size = self.page_size(id);
        let (mut held, mut wanted) = (size * (unused.get() / size.get()), Bytes::ZERO);
        for i in self.sharing(id) {
            self.steps += 1;
            let one = self.priority[i];
            let vbar = self.vbar(one);
            held += vbar.bytes_of(vbar.held);
            let kept = u64::from(vbar.watermark) + u64::from(one == id);
            let pages = (kept + u64::from(vbar.spec.window)).min(vbar.spec.pages.into());
            wanted += vbar.spec.page_size * pages;
        }
        held >= wanted
    }
}

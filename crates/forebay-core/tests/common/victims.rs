//! Whose frame may go next, written down the slow way.

use forebay_core::{Mode, PageRef, VbarId};

use super::books::{Asked, Books, Standing};

impl Books {
    /// [`victims`](Books::victims) in the middle of a decision: pinned pages that were tried in vain have joined their
    /// windows, and what is beyond those may go as well.
    pub(crate) fn victims_by_now(&self) -> Vec<PageRef> {
        let mut pages = self.victims();
        if !pages.is_empty() && self.tried.iter().any(|&page| self.page(page).pins > 0) {
            pages.extend(self.beyond(&self.group(), |id| self.vbar(id).streamed_frames()));
        }
        pages
    }

    /// The pages of which one has to be the next to lose its frame. Empty: no frame may be taken.
    pub(crate) fn victims(&self) -> Vec<PageRef> {
        match &self.asked {
            Asked::Nothing | Asked::Amend(_) => vec![],
            Asked::Demand(pages) if self.undoing => {
                pages.iter().copied().filter(|&page| self.must_leave(page)).collect()
            }
            Asked::Demand(pages) => pages.get(self.given).map_or(vec![], |&page| self.victims_for(page)),
            Asked::Plan(page) => self.for_plan(*page),
            Asked::Pressure => self.any(),
            Asked::Leave(page) if self.must_leave(*page) => vec![*page],
            Asked::Leave(_) => self.any(),
            Asked::Discard(page) if self.evictable(*page) => vec![*page],
            Asked::Discard(_) => vec![],
            Asked::FreeFrom(id) => self.highest(*id, self.vbar(*id).floor),
            Asked::LowerTo(id, rank) => self.highest(*id, *rank),
            Asked::Close(id) => self.pages_of(*id).filter(|&page| self.evictable(page)).collect(),
        }
    }

    /// Filled and without pins.
    pub(crate) fn evictable(&self, page: PageRef) -> bool {
        matches!(self.standing(page), Standing::Resident | Standing::Ahead | Standing::Spent)
    }

    /// A page that nobody keeps: streamed, in a VBAR that lends nothing.
    pub(crate) fn must_leave(&self, page: PageRef) -> bool {
        let vbar = self.vbar(page.vbar);
        matches!(self.standing(page), Standing::Ahead | Standing::Spent)
            && (vbar.closing || vbar.spec.mode == Mode::Explicit)
    }

    /// Spent pages; then what lower priorities may lose; then the VBAR's own, or those of all that share memory with it.
    pub(crate) fn victims_for(&self, page: PageRef) -> Vec<PageRef> {
        let own = self.vbar(page.vbar);
        let sharing = self.sharing(page.vbar);
        let below_window = own.streamed_before < own.spec.window;
        let kept = || if below_window { self.beyond_or_largest(&sharing, true) } else { vec![] };
        first([&|| self.spent(), &|| self.lower(page.vbar), &|| match own.spec.mode {
            Mode::Explicit => self.highest(page.vbar, self.rank(page) + 1),
            Mode::Streamed => first([&kept, &|| self.ahead(page.vbar), &|| self.any()]),
        }])
    }

    /// As for a demand, but of its own only kept pages that nobody expects, and no more than fill the window.
    fn for_plan(&self, page: PageRef) -> Vec<PageRef> {
        let own = self.vbar(page.vbar);
        first([&|| self.spent(), &|| self.lower(page.vbar), &|| match own.spec.mode {
            Mode::Explicit => self.highest(page.vbar, self.rank(page) + 1),
            Mode::Streamed if own.streamed_frames() < own.spec.window => {
                let mut top = self.beyond_or_largest(&self.sharing(page.vbar), true);
                top.retain(|&top| top.vbar != page.vbar || self.page(top).upcoming == 0);
                top
            }
            Mode::Streamed => vec![],
        }])
    }

    /// What was read ahead beyond a window, or the highest rank of the largest share.
    fn beyond_or_largest(&self, sharing: &[VbarId], floors: bool) -> Vec<PageRef> {
        let highest = |id| self.highest(id, if floors { self.vbar(id).floor } else { 0 });
        first([&|| self.beyond(sharing, |id| self.vbar(id).streamed_before), &|| {
            self.largest(sharing, floors).map_or(vec![], highest)
        }])
    }

    /// The page read ahead last of the first VBAR that streams through more frames than its window.
    fn beyond(&self, sharing: &[VbarId], streamed: impl Fn(VbarId) -> u32) -> Vec<PageRef> {
        let beyond = sharing.iter().filter(|&&id| streamed(id) > self.vbar(id).spec.window);
        beyond.map(|&id| self.ahead(id)).find(|pages| !pages.is_empty()).unwrap_or_default()
    }

    /// Any page: floors hold while there is another way.
    fn any(&self) -> Vec<PageRef> {
        let group = self.group();
        let in_order = |floors: bool| {
            self.ids()
                .filter(|id| !group.contains(id))
                .map(|id| self.ahead_then_kept(id, if floors { self.vbar(id).floor } else { 0 }))
                .find(|pages| !pages.is_empty())
                .unwrap_or_default()
        };
        let of_group = |floors: bool| {
            let ahead = || group.iter().map(|&id| self.ahead(id)).find(|pages| !pages.is_empty());
            first([&|| self.beyond_or_largest(&group, floors), &|| ahead().unwrap_or_default()])
        };
        let ways = |floors: bool| first([&|| in_order(floors), &|| of_group(floors)]);
        first([&|| self.spent(), &|| ways(true), &|| ways(false)])
    }

    fn lower(&self, than: VbarId) -> Vec<PageRef> {
        let sharing = self.sharing(than);
        self.ids()
            .take_while(|id| !sharing.contains(id))
            .map(|id| self.ahead_then_kept(id, self.vbar(id).floor))
            .find(|pages| !pages.is_empty())
            .unwrap_or_default()
    }

    fn ahead_then_kept(&self, id: VbarId, floor: u32) -> Vec<PageRef> {
        first([&|| self.ahead(id), &|| self.highest(id, floor)])
    }

    fn spent(&self) -> Vec<PageRef> {
        self.pages().filter(|&page| self.standing(page) == Standing::Spent).collect()
    }

    /// The page read ahead last, whose use is the farthest.
    fn ahead(&self, id: VbarId) -> Vec<PageRef> {
        self.pages_of(id)
            .filter(|&page| self.standing(page) == Standing::Ahead)
            .max_by_key(|&page| self.page(page).waiting_since)
            .into_iter()
            .collect()
    }

    /// The unpinned kept page of the highest rank, if that is not below `floor`.
    fn highest(&self, id: VbarId, floor: u32) -> Vec<PageRef> {
        self.pages_of(id)
            .filter(|&page| self.standing(page) == Standing::Resident && self.rank(page) >= floor)
            .max_by_key(|&page| self.rank(page))
            .into_iter()
            .collect()
    }
}

fn first<const N: usize>(ways: [&dyn Fn() -> Vec<PageRef>; N]) -> Vec<PageRef> {
    ways.iter().map(|way| way()).find(|pages| !pages.is_empty()).unwrap_or_default()
}

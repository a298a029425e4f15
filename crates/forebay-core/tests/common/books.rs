//! The naive picture of pages and pins, kept with plain counters. It sees every decision at the moment it is made,
//! as the policy's [`Pins`].

use forebay_core::{Bytes, PageRef, Pins, Ranks, VbarId, VbarSpec};

use super::page_at;

/// Where a page stands, told from what the policy said about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Absent,
    Filling,
    /// Filled and pinned.
    Pinned,
    /// Filled, no pins, kept.
    Resident,
    /// Filled, no pins, streamed, a use is planned.
    Ahead,
    /// Filled, no pins, streamed, nobody expects it.
    Spent,
}

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Page {
    pub(crate) backed: bool,
    pub(crate) filled: bool,
    pub(crate) streamed: bool,
    pub(crate) pins: u32,
    pub(crate) upcoming: u32,
    /// When it last was lent without a user; orders the pages read ahead.
    pub(crate) waiting_since: u64,
}

#[derive(Debug)]
pub(crate) struct NaiveVbar {
    pub(crate) spec: VbarSpec,
    pub(crate) ranks: Ranks,
    pub(crate) pages: Vec<Page>,
    pub(crate) floor: u32,
    pub(crate) closing: bool,
    /// Releases told since its watermark last fell or memory was short.
    pub(crate) calm: u32,
    /// Uses of each of its stays, and of the one under way.
    pub(crate) stays: Vec<u64>,
    pub(crate) uses: u64,
    /// Turns that others had since its last one.
    pub(crate) missed: u32,
    /// Its watermark was not opened when it was used again.
    pub(crate) holds_back: bool,
    /// Streamed frames when the decision that is under way began.
    pub(crate) streamed_before: u32,
}

impl NaiveVbar {
    pub(crate) fn kept(&self, page: &Page) -> bool {
        page.backed && page.filled && !page.streamed
    }

    /// Frames that are not kept ones.
    pub(crate) fn streamed_frames(&self) -> u32 {
        self.pages.iter().filter(|page| page.backed && !self.kept(page)).count() as u32
    }
}

/// What the policy was asked, which decides whose frame may go.
#[derive(Clone, Debug)]
pub(crate) enum Asked {
    /// Nothing that moves memory.
    Nothing,
    Demand(Vec<PageRef>),
    Plan(PageRef),
    /// Memory for others: a smaller budget, room.
    Pressure,
    /// The page may leave for good, then what is over the budget.
    Leave(PageRef),
    FreeFrom(VbarId),
    Discard(PageRef),
    /// The page is changed where it is.
    Amend(PageRef),
    LowerTo(VbarId, u32),
    Close(VbarId),
}

#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) budget: Bytes,
    pub(crate) vbars: Vec<Option<NaiveVbar>>,
    /// Highest last.
    pub(crate) priority: Vec<VbarId>,
    /// The one used last.
    pub(crate) in_use: Option<VbarId>,
    pub(crate) asked: Asked,
    /// Pins given by the call under way.
    pub(crate) given: usize,
    /// The call under way takes its pins back.
    pub(crate) undoing: bool,
    /// Pages of which the call under way took, or tried to take, the frame.
    pub(crate) tried: Vec<PageRef>,
    /// Those of them that were kept ones.
    pub(crate) unkept: Vec<PageRef>,
    pub(crate) wrong: Vec<String>,
    clock: u64,
}

impl Books {
    pub(crate) fn new(budget: Bytes) -> Self {
        Books {
            budget,
            vbars: Vec::new(),
            priority: Vec::new(),
            in_use: None,
            asked: Asked::Nothing,
            given: 0,
            undoing: false,
            tried: Vec::new(),
            unkept: Vec::new(),
            wrong: Vec::new(),
            clock: 0,
        }
    }

    pub(crate) fn add(&mut self, id: VbarId, spec: VbarSpec) {
        assert_eq!(id.get() as usize, self.vbars.len());
        self.end_stay();
        self.in_use = Some(id);
        self.vbars.push(Some(NaiveVbar {
            ranks: Ranks::new(spec.pages, &spec.order),
            pages: vec![Page::default(); spec.pages as usize],
            spec,
            floor: 0,
            closing: false,
            calm: 0,
            stays: Vec::new(),
            uses: 0,
            missed: 0,
            holds_back: false,
            streamed_before: 0,
        }));
        self.priority.push(id);
    }

    pub(crate) fn begin(&mut self, asked: Asked) {
        self.asked = asked;
        self.given = 0;
        self.undoing = false;
        self.tried.clear();
        self.unkept.clear();
        self.note_streamed();
    }

    pub(crate) fn vbar(&self, id: VbarId) -> &NaiveVbar {
        self.vbars[id.get() as usize].as_ref().expect("a VBAR that was not forgotten")
    }

    pub(crate) fn vbar_mut(&mut self, id: VbarId) -> &mut NaiveVbar {
        self.vbars[id.get() as usize].as_mut().expect("a VBAR that was not forgotten")
    }

    pub(crate) fn page(&self, page: PageRef) -> &Page {
        &self.vbar(page.vbar).pages[page.page.as_usize()]
    }

    pub(crate) fn page_mut(&mut self, page: PageRef) -> &mut Page {
        &mut self.vbar_mut(page.vbar).pages[page.page.as_usize()]
    }

    pub(crate) fn size(&self, page: PageRef) -> Bytes {
        self.vbar(page.vbar).spec.page_size
    }

    pub(crate) fn rank(&self, page: PageRef) -> u32 {
        self.vbar(page.vbar).ranks.rank(page.page).0
    }

    pub(crate) fn standing(&self, page: PageRef) -> Standing {
        match self.page(page) {
            Page { backed: false, .. } => Standing::Absent,
            Page { filled: false, .. } => Standing::Filling,
            Page { pins: 1.., .. } => Standing::Pinned,
            Page { streamed: false, .. } => Standing::Resident,
            Page { upcoming: 1.., .. } => Standing::Ahead,
            _ => Standing::Spent,
        }
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = VbarId> {
        self.priority.iter().copied()
    }

    pub(crate) fn pages_of(&self, id: VbarId) -> impl Iterator<Item = PageRef> {
        (0..self.vbar(id).spec.pages).map(move |page| page_at(id, page))
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = PageRef> {
        self.ids().flat_map(|id| self.pages_of(id))
    }

    pub(crate) fn pins(&self) -> Vec<u32> {
        self.vbars.iter().flatten().flat_map(|vbar| vbar.pages.iter().map(|page| page.pins)).collect()
    }

    /// The page begins to wait for a use.
    pub(crate) fn waits(&mut self, page: PageRef) {
        self.clock += 1;
        self.page_mut(page).waiting_since = self.clock;
    }

    fn note_streamed(&mut self) {
        for vbar in self.vbars.iter_mut().flatten() {
            vbar.streamed_before = vbar.streamed_frames();
        }
    }

    /// A frame is taken where those that share memory stream through no more than their windows: that is no calm.
    fn note_pressure(&mut self) {
        let id = match &self.asked {
            Asked::Demand(pages) if !self.undoing => pages[0].vbar,
            Asked::Plan(page) => page.vbar,
            _ => return,
        };
        let bytes = |pages: u32, id| self.vbar(id).spec.page_size * u64::from(pages);
        let sharing = self.sharing(id);
        let streamed: Bytes = sharing.iter().map(|&id| bytes(self.vbar(id).streamed_before, id)).sum();
        let windows: Bytes = sharing.iter().map(|&id| bytes(self.vbar(id).spec.window, id)).sum();
        if streamed <= windows {
            self.vbar_mut(id).calm = 0;
        }
    }

    /// A page that has no frame is mapped; any other changes its flag.
    fn flag(&mut self, page: PageRef, streamed: bool) -> bool {
        let entry = self.page_mut(page);
        entry.streamed = streamed;
        if !entry.backed {
            (entry.backed, entry.filled) = (true, false);
            self.note_streamed();
        }
        self.waits(page);
        self.page(page).pins > 0
    }
}

impl Pins for Books {
    fn pin(&mut self, page: PageRef) {
        if !self.page(page).backed {
            self.wrong.push(format!("{page} was pinned without a frame"));
        }
        self.page_mut(page).pins += 1;
        self.given += 1;
        self.note_streamed();
    }

    fn unpin(&mut self, page: PageRef) {
        match self.page(page).pins {
            0 => self.wrong.push(format!("{page} was unpinned without a pin")),
            _ => self.page_mut(page).pins -= 1,
        }
        self.undoing = true;
    }

    fn claim(&mut self, page: PageRef) -> bool {
        if matches!(self.asked, Asked::Amend(asked) if asked == page) {
            let entry = self.page_mut(page);
            entry.filled &= entry.pins > 0;
            return entry.pins == 0;
        }
        self.tried.push(page);
        let vbar = self.vbar(page.vbar);
        if vbar.kept(self.page(page)) {
            self.unkept.push(page);
        }
        if self.page(page).pins > 0 {
            return false;
        }
        let allowed = self.victims_by_now();
        if !allowed.contains(&page) {
            let standing = self.standing(page);
            let asked = &self.asked;
            self.wrong.push(format!("{asked:?} took {page} ({standing:?}), which is none of {allowed:?}"));
        }
        self.note_pressure();
        self.page_mut(page).backed = false;
        self.note_streamed();
        true
    }

    fn set_streamed(&mut self, page: PageRef) -> bool {
        self.flag(page, true)
    }

    fn set_stale(&mut self, _: PageRef) {
        unreachable!("the world outdates nothing");
    }

    fn set_resident(&mut self, page: PageRef) {
        self.flag(page, false);
    }
}

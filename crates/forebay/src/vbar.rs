//! A VBAR as all threads share it.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use forebay_core::{Bytes, PageIndex, PageRef, Serial, VbarId};
use forebay_device::{DeviceAddr, Reservation};
use smallvec::SmallVec;

use crate::cell::PageCell;
use crate::layout::Layout;
use crate::patches::Patches;
use crate::stats::Counters;
use crate::streams::KnownStreams;
use crate::trace::Trace;

/// The address range of one model and the state of its pages. Dropped, and with it the reservation, when nothing is
/// mapped any more and nobody holds one of its tensors.
#[derive(Debug)]
pub(crate) struct Vbar {
    pub(crate) id: VbarId,
    pub(crate) name: String,
    pub(crate) page_size: Bytes,
    pub(crate) cells: Box<[PageCell]>,
    /// Written under the state lock when a page is mapped; stable while the page is pinned.
    pub(crate) serials: Box<[AtomicU64]>,
    /// The serials of the contents to which everything was added, with the patches in force at that time; or [`SPOILED`].
    /// Written under the copy lock.
    completed: Box<[AtomicU64]>,
    /// What the pages are filled from; `None` where the user fills them.
    pub(crate) layout: Option<Layout>,
    pub(crate) trace: Trace,
    pub(crate) counters: Counters,
    pub(crate) streams: KnownStreams,
    /// When each page was used last, as [`Marking`](crate::cell::Marking) tells the time.
    used_at: Box<[AtomicU64]>,
    pub(crate) patches: Patches,
    /// Leading pages that are pinned as long as the model is attached, once they are.
    pub(crate) reserved: AtomicU32,
    /// Passes without a lock since uses were last taken in.
    pub(crate) passes_as_lent: AtomicU32,
    has_runs: AtomicBool,
    /// Set when the VBAR is closed, so that nobody pins what others still hold.
    pub(crate) closed: AtomicBool,
    reservation: Reservation,
}

impl Vbar {
    pub(crate) fn new(
        id: VbarId,
        name: String,
        reservation: Reservation,
        page_size: Bytes,
        layout: Option<Layout>,
    ) -> Self {
        let pages = reservation.size().pages_of(page_size);
        Vbar {
            id,
            name,
            page_size,
            cells: (0..pages).map(|_| PageCell::default()).collect(),
            serials: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            completed: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            trace: Trace::new(layout.as_ref().map_or(0, |layout| layout.scheduled.len())),
            layout,
            counters: Counters::default(),
            streams: KnownStreams::default(),
            used_at: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            patches: Patches::default(),
            reserved: AtomicU32::new(0),
            passes_as_lent: AtomicU32::new(0),
            has_runs: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            reservation,
        }
    }

    pub(crate) fn base(&self) -> DeviceAddr {
        self.reservation.addr()
    }

    pub(crate) fn size(&self) -> Bytes {
        self.reservation.size()
    }

    pub(crate) fn page_addr(&self, page: u32) -> DeviceAddr {
        self.base().offset(self.page_size * u64::from(page))
    }

    pub(crate) fn page_ref(&self, page: u32) -> PageRef {
        PageRef { vbar: self.id, page: PageIndex(page) }
    }

    pub(crate) fn cell(&self, page: u32) -> &PageCell {
        &self.cells[page as usize]
    }

    /// Work on pinned pages was enqueued. To be noted before they are unpinned.
    pub(crate) fn note_use(&self, pages: RangeInclusive<u32>) {
        let now = self.streams.marking.now();
        pages.for_each(|page| {
            self.used_at[page as usize].fetch_max(now, Ordering::AcqRel);
        });
    }

    /// When a claimed page was used last.
    pub(crate) fn used_at(&self, page: u32) -> u64 {
        self.used_at[page as usize].load(Ordering::Acquire)
    }

    /// See [`ExplicitVbar::begin_run`](crate::ExplicitVbar::begin_run).
    pub(crate) fn begin_run(&self) {
        self.has_runs.store(true, Ordering::Release);
    }

    /// Whether the application ever ran the model whose weights these are: what it reads to the pages stays there for that run.
    pub(crate) fn has_runs(&self) -> bool {
        self.has_runs.load(Ordering::Acquire)
    }

    /// The pages that have some bytes, at least one, if they are in it.
    pub(crate) fn pages_at(&self, addr: DeviceAddr, bytes: Bytes) -> Option<RangeInclusive<u32>> {
        let first = addr.get().checked_sub(self.base().get())?;
        let last = first.checked_add(bytes.get().saturating_sub(1))?;
        let page = |at: u64| (at / self.page_size.get()) as u32;
        (last < self.size().get()).then(|| page(first)..=page(last))
    }

    /// Whether any page is pinned. Reads every page; for closing only.
    pub(crate) fn has_pins(&self) -> bool {
        self.cells.iter().any(|cell| cell.load().pins() > 0)
    }

    /// What is still to be done to a filled page.
    pub(crate) fn completion(&self, page: u32) -> Completion {
        match self.completed[page as usize].load(Ordering::Acquire) {
            _ if self.layout.is_none() => Completion::Complete,
            serial if serial == self.serial(page).0 => Completion::Complete,
            SPOILED => Completion::Spoiled,
            _ => Completion::Incomplete,
        }
    }

    /// Under the copy lock, once the page's mark covers what was done.
    pub(crate) fn set_completion(&self, page: u32, completion: Completion) {
        let now = match completion {
            Completion::Complete => self.serial(page).0,
            Completion::Incomplete => Serial::default().0,
            Completion::Spoiled => SPOILED,
        };
        self.completed[page as usize].store(now, Ordering::Release);
    }

    pub(crate) fn serial(&self, page: u32) -> Serial {
        Serial(self.serials[page as usize].load(Ordering::Acquire))
    }
}

/// What is still to be done to a filled page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// Nothing.
    Complete,
    /// What patches add to it.
    Incomplete,
    /// To be filled anew: the device refused a part of what was to be added.
    Spoiled,
}

/// In place of a serial: no page gets as far.
const SPOILED: u64 = u64::MAX;

/// A run of pages of one VBAR, inclusive at both ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span<V> {
    pub(crate) vbar: V,
    pub(crate) first: u32,
    pub(crate) last: u32,
}

impl<V: AsRef<Vbar>> Span<V> {
    pub(crate) fn pages(&self) -> impl Iterator<Item = (&Vbar, u32)> {
        (self.first..=self.last).map(|page| (self.vbar.as_ref(), page))
    }
}

/// The pages of an operation's weights: a weight and its bias take no allocation.
pub(crate) type Spans<'a> = SmallVec<[Span<&'a Arc<Vbar>>; 2]>;

impl AsRef<Vbar> for Vbar {
    fn as_ref(&self) -> &Vbar {
        self
    }
}

//! VBARs whose pages the application fills itself: fault, fill, use, unpin.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_core::{Bytes, PageState, Rank, Serial};
use forebay_device::{DeviceAddr, StreamHandle};

use crate::acquire::{Above, Use, Used};
use crate::engine::Engine;
use crate::layout::ALIGNMENT;
use crate::stats::VbarStats;
use crate::vbar::{Span, Vbar};
use crate::{EngineError, Result};

/// An address range with memory behind what was faulted in. Pages at lower addresses are kept longer; a fault above
/// the watermark is refused, and the application uses something else.
#[derive(Debug)]
pub struct ExplicitVbar {
    engine: Arc<Engine>,
    vbar: Arc<Vbar>,
    size: Bytes,
    allocated: AtomicU64,
}

/// The pages' serials at fault time. A different signature means that the contents were lost and must be filled again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Signature(Vec<Serial>);

impl Signature {
    /// The serials, one a page, lowest address first.
    pub fn serials(&self) -> &[Serial] {
        &self.0
    }
}

impl ExplicitVbar {
    pub(crate) fn new(engine: &Arc<Engine>, vbar: Arc<Vbar>, size: Bytes) -> Self {
        ExplicitVbar { engine: Arc::clone(engine), vbar, size, allocated: AtomicU64::new(0) }
    }

    /// The next `bytes` bytes of the range, aligned to 512. There is no free; the range is.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] past the end of the range.
    pub fn alloc(&self, bytes: Bytes) -> Result<DeviceAddr> {
        let mut start = Bytes::ZERO;
        let taken = self.allocated.fetch_update(Ordering::AcqRel, Ordering::Acquire, |allocated| {
            start = Bytes::new(allocated).checked_align_up(ALIGNMENT)?;
            let end = start.checked_add(bytes)?;
            (end <= self.size).then_some(end.get())
        });
        match taken {
            Ok(_) => Ok(self.vbar.base().offset(start)),
            Err(allocated) => Err(EngineError::Invalid(format!(
                "VBAR {:?} of {} has {} left, not {bytes}",
                self.vbar.name,
                self.size,
                self.size.saturating_sub(Bytes::new(allocated)),
            ))),
        }
    }

    /// Backs and pins the range. `None` above the watermark: nothing was pinned. New memory holds arbitrary bytes; its
    /// signature tells. Pins that were not taken back go when the VBAR is dropped.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a range outside the VBAR, and what the device reports.
    pub fn fault(&self, addr: DeviceAddr, bytes: Bytes, how: Use<'_>) -> Result<Option<Signature>> {
        let span = self.span(addr, bytes)?;
        if !self.engine.shared().acquire(std::slice::from_ref(&span), how, Above::Refuse, || {})? {
            return Ok(None);
        }
        self.engine.shared().operations.fetch_sub(1, Ordering::Relaxed);
        Ok(Some(Signature((span.first..=span.last).map(|page| self.vbar.serial(page)).collect())))
    }

    /// Takes the pins of one fault back. What is in `stream` by now still finds the memory; pages without pins are left
    /// alone.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a range outside the VBAR.
    pub fn unpin(&self, addr: DeviceAddr, bytes: Bytes, stream: StreamHandle) -> Result<()> {
        let span = self.span(addr, bytes)?;
        self.vbar.streams.know(stream);
        self.engine.shared().unpin(std::slice::from_ref(&span), Used::On(stream));
        Ok(())
    }

    /// As [`unpin`](ExplicitVbar::unpin), for pages that work in any of the streams that the VBAR was told of may use.
    ///
    /// # Errors
    /// As [`unpin`](ExplicitVbar::unpin).
    pub fn unpin_everywhere(&self, addr: DeviceAddr, bytes: Bytes) -> Result<()> {
        let span = self.span(addr, bytes)?;
        self.engine.shared().unpin(std::slice::from_ref(&span), Used::Anywhere);
        Ok(())
    }

    /// Tells of streams that may use the pages without a call that says so: they are waited for before a page leaves.
    pub fn know(&self, streams: impl IntoIterator<Item = StreamHandle>) {
        streams.into_iter().for_each(|stream| self.vbar.streams.know(stream));
    }

    /// Whether a range lies in the VBAR.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] where it does not.
    pub fn check(&self, addr: DeviceAddr, bytes: Bytes) -> Result<()> {
        self.span(addr, bytes).map(drop)
    }

    /// Bytes of the pages that have memory, or are about to.
    pub fn held(&self) -> Bytes {
        let held = self.engine.shared().state.lock().policy.held_pages(self.vbar.id);
        self.vbar.page_size * u64::from(held)
    }

    /// To the top of the priorities, with the watermark fully open.
    pub fn prioritize(&self) {
        self.engine.prioritize(&self.vbar);
    }

    /// As [`prioritize`](ExplicitVbar::prioritize), where the application is about to run the model whose weights these are. What
    /// it reads from files to the range stays there for that run, as far as its pages do, and what it asks of files from now on is
    /// asked anew: see [`Engine::read_to_device`].
    pub fn begin_run(&self) {
        self.prioritize();
        self.vbar.begin_run();
        self.engine.shared().state.lock().registering.begin_run();
    }

    /// To the bottom of the priorities.
    pub fn deprioritize(&self) {
        self.engine.deprioritize(&self.vbar);
    }

    /// Lowers the watermark: pages above it leave, pinned ones when unpinned; faults there are refused until the next
    /// [`prioritize`](ExplicitVbar::prioritize).
    pub fn set_watermark(&self, bytes: Bytes) {
        let rank = self.rank_at(bytes);
        let mut state = self.engine.shared().state.lock();
        state.decide(|policy, books, out| policy.lower_watermark(self.vbar.id, rank, books, out));
        drop(state);
        self.engine.shared().work.notify_one();
    }

    /// Pages below this offset are not taken by pressure until the limit is 0 again.
    pub fn set_watermark_limit(&self, bytes: Bytes) {
        let rank = self.rank_at(bytes);
        self.engine.shared().state.lock().policy.set_floor(self.vbar.id, rank);
    }

    /// Gives up memory of this VBAR, highest address first. Returns how much.
    pub fn free(&self, bytes: Bytes) -> Bytes {
        let mut state = self.engine.shared().state.lock();
        let freed = state.decide(|policy, books, out| policy.free_from(self.vbar.id, bytes, books, out));
        drop(state);
        self.engine.shared().work.notify_one();
        freed
    }

    /// The first address of the range.
    pub fn base(&self) -> DeviceAddr {
        self.vbar.base()
    }

    /// The length asked for.
    pub fn size(&self) -> Bytes {
        self.size
    }

    /// Bytes handed out by [`alloc`](ExplicitVbar::alloc), alignment included.
    pub fn allocated(&self) -> Bytes {
        Bytes::new(self.allocated.load(Ordering::Acquire))
    }

    /// How many pages are below the watermark.
    pub fn watermark(&self) -> u32 {
        self.engine.shared().state.lock().policy.watermark(self.vbar.id).0
    }

    /// For each page whether it has memory and whether it is pinned.
    pub fn residency(&self) -> Vec<(bool, bool)> {
        let state = self.engine.shared().state.lock();
        (0..self.vbar.cells.len() as u32)
            .map(|page| {
                let backed = state.policy.state(self.vbar.page_ref(page)) != PageState::Absent;
                (backed, self.vbar.cell(page).load().pins() > 0)
            })
            .collect()
    }

    /// What is resident.
    pub fn stats(&self) -> VbarStats {
        self.engine.vbar_stats(&self.engine.shared().state.lock(), &self.vbar)
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    fn rank_at(&self, bytes: Bytes) -> Rank {
        Rank(bytes.pages_of(self.vbar.page_size).min(self.vbar.cells.len() as u64) as u32)
    }

    fn span(&self, addr: DeviceAddr, bytes: Bytes) -> Result<Span<Arc<Vbar>>> {
        let Some(pages) = self.vbar.pages_at(addr, bytes).filter(|_| bytes > Bytes::ZERO) else {
            return Err(EngineError::Invalid(format!(
                "{bytes} at {:#x} are no range of VBAR {:?} with {} at {:#x}",
                addr.get(),
                self.vbar.name,
                self.vbar.size(),
                self.vbar.base().get()
            )));
        };
        Ok(Span { vbar: Arc::clone(&self.vbar), first: *pages.start(), last: *pages.end() })
    }
}

impl Drop for ExplicitVbar {
    /// Pins go with the range: nobody could take them back any more.
    fn drop(&mut self) {
        for (page, cell) in (0..).zip(&*self.vbar.cells) {
            for _ in 0..cell.load().pins() {
                let span = Span { vbar: &*self.vbar, first: page, last: page };
                self.engine.shared().unpin(&[span], Used::Anywhere);
            }
        }
        self.engine.close(&self.vbar);
    }
}

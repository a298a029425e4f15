//! An attached model: its weights, each at one address for life.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use forebay_core::{Bytes, PageState, Serial};
use forebay_device::{DeviceAddr, StreamHandle};
use forebay_store::{Source, read_rows};
use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::acquire::{Above, Found, Use, Used};
use crate::engine::{Engine, note_uses};
use crate::filler::source_error;
use crate::layout::{Class, Layout, Placed};
use crate::operation::OwnOperation;
use crate::stats::VbarStats;
use crate::vbar::{Span, Spans, Vbar};
use crate::{EngineError, Result};

/// The weights of one model on one device. Dropping it detaches them: what is not in use leaves at once, what is with
/// its last use.
#[derive(Debug)]
pub struct Attachment {
    engine: Arc<Engine>,
    vbar: Arc<Vbar>,
    /// The always-resident region stays pinned as long as the model is attached.
    small: Mutex<Option<SmallPins>>,
    /// Detached or parked: the model may be somebody else's by now.
    has_left: AtomicBool,
}

/// The weights of an operation, pinned and in order with its stream. Dropping it releases them behind the work that
/// is in the stream by then.
#[derive(Debug)]
#[must_use = "weights are pinned only as long as this lives"]
pub struct Pinned<'a> {
    engine: &'a Arc<Engine>,
    spans: Spans<'a>,
    stream: StreamHandle,
}

/// As [`Pinned`], for callers that cannot borrow the weights so long. Demands of the thread that made it do not wait for it.
#[derive(Debug)]
#[must_use = "weights are pinned only as long as this lives"]
pub struct Held {
    engine: Arc<Engine>,
    spans: SmallVec<[Span<Arc<Vbar>>; 2]>,
    stream: StreamHandle,
    _own: OwnOperation,
}

/// What [`Engine::begin`] came to.
#[derive(Debug)]
pub enum Begun<'a> {
    /// Every page is there.
    Ready(Pinned<'a>),
    /// To be waited for.
    Waiting(Waiting<'a>),
}

/// An acquisition that has to wait. Dropping it gives it up.
#[derive(Debug)]
#[must_use = "an acquisition is given up when this is dropped"]
pub struct Waiting<'a> {
    engine: &'a Arc<Engine>,
    spans: Spans<'a>,
    weights: SmallVec<[(&'a Attachment, usize); 2]>,
    stream: StreamHandle,
    /// Pending: the pages are pinned. Missing: nothing is.
    found: Found,
}

/// A weight pinned for as long as this lives, for tensors whose use has no end that the engine could see. It keeps the
/// address range alive, also when the model was detached.
#[derive(Debug)]
#[must_use = "the weight is pinned only as long as this lives"]
pub struct View {
    engine: Arc<Engine>,
    span: Span<Arc<Vbar>>,
    addr: DeviceAddr,
    bytes: Bytes,
    counted: Counted,
    /// Of a loan: demands of its thread do not wait for it.
    _own: Option<OwnOperation>,
}

/// What a view is to those who wait for its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// It may stay.
    View,
    /// It ends with an operation.
    Operation,
    /// Of a small weight, whose page is pinned anyway.
    Nothing,
}

#[derive(Debug)]
struct SmallPins {
    span: Span<Arc<Vbar>>,
    bytes: Bytes,
}

impl Attachment {
    pub(crate) fn new(engine: &Arc<Engine>, vbar: Arc<Vbar>) -> Result<Self> {
        let attachment = Attachment {
            engine: Arc::clone(engine),
            vbar,
            small: Mutex::new(None),
            has_left: AtomicBool::new(false),
        };
        let small_pages = attachment.layout().small_pages;
        if small_pages > 0 {
            let span = Span { vbar: Arc::clone(&attachment.vbar), first: 0, last: small_pages - 1 };
            // Nobody uses them now. The copy stream is the one that need not wait for its copies.
            let nobody = Use::on(engine.shared().copy.lock().handle());
            engine.shared().acquire(std::slice::from_ref(&span), nobody, Above::Fail, || {})?;
            // Not an operation: nobody is to wait for it to end.
            engine.shared().operations.fetch_sub(1, Ordering::Relaxed);
            let bytes = attachment.vbar.page_size * u64::from(small_pages);
            engine.shared().reserved.fetch_add(bytes.get(), Ordering::AcqRel);
            attachment.vbar.reserved.store(small_pages, Ordering::Release);
            *attachment.small.lock() = Some(SmallPins { span, bytes });
        }
        Ok(attachment)
    }

    /// Pins a weight for work on `how.stream`, which will see the weight's bytes at [`address`](Attachment::address).
    /// Waits where they are not on their way yet.
    ///
    /// The engine remembers the stream until the model is detached and its views are dropped: pages are unmapped behind
    /// what it has been given.
    ///
    /// # Errors
    /// [`EngineError::TooLarge`], [`EngineError::AllPinned`], [`EngineError::Source`], [`EngineError::Interrupted`], or
    /// what the device reports. Nothing stays pinned then.
    pub fn acquire(&self, weight: usize, how: Use<'_>) -> Result<Pinned<'_>> {
        self.engine.acquire(&[(self, weight)], how)
    }

    /// Like [`acquire`](Attachment::acquire), for tensors that outlive the operation.
    ///
    /// # Errors
    /// As for `acquire`.
    pub fn view(&self, weight: usize, how: Use<'_>) -> Result<View> {
        let mut views = self.engine.views(&[(self, weight)], how)?;
        views.pop().ok_or_else(|| EngineError::Invalid(format!("no view of weight {weight}")))
    }

    /// Whether a table is to be acquired as a whole: it is resident, or everything before it fits as well. If not, its
    /// rows are to be looked up with [`read_rows`](Attachment::read_rows). Weights that are no tables always are, and so
    /// are those with a patch.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn is_kept(&self, weight: usize) -> Result<bool> {
        let placed = self.placed(weight)?;
        // What is read at the source has no patch.
        if placed.class != Class::Table || self.is_patched(weight) {
            return Ok(true);
        }
        let pages = placed.first_page..=placed.last_page;
        if pages.clone().all(|page| self.vbar.cell(page).load().is_filled()) {
            return Ok(true);
        }
        let state = self.engine.shared().state.lock();
        let up_to_here = self.vbar.page_size * (u64::from(placed.last_page) + 1);
        let room = state.policy.budget().saturating_sub(self.reserved_by_others());
        Ok(up_to_here <= room && pages.into_iter().all(|page| state.policy.is_kept(self.vbar.page_ref(page))))
    }

    /// Reads rows of `row_bytes` bytes of a table at its source into `out`, in the order given.
    ///
    /// # Errors
    /// [`EngineError::Source`] where a row does not exist or cannot be read.
    pub fn read_rows(&self, weight: usize, row_bytes: Bytes, rows: &[u64], out: &mut [u8]) -> Result<()> {
        let source = self.source(weight)?;
        let read = source.verify().and_then(|()| read_rows(source, row_bytes.get(), rows, out));
        read.map_err(|error| source_error(&self.vbar, weight as u32, error))?;
        self.vbar.counters.looked_up_bytes.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Where a weight's bytes come from.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn source(&self, weight: usize) -> Result<&Source> {
        self.placed(weight)?;
        Ok(&self.layout().sources[weight])
    }

    /// The weight's length on the device.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn bytes(&self, weight: usize) -> Result<Bytes> {
        Ok(self.placed(weight)?.bytes)
    }

    /// The weight's address, the same until the model goes. There is memory behind it while the weight is pinned.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn address(&self, weight: usize) -> Result<DeviceAddr> {
        Ok(self.vbar.base().offset(self.placed(weight)?.offset))
    }

    /// The address range of the whole model: its first address and its length.
    pub fn range(&self) -> (DeviceAddr, Bytes) {
        (self.vbar.base(), self.vbar.size())
    }

    /// Whether a weight belongs to the always-resident region.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn is_small(&self, weight: usize) -> Result<bool> {
        Ok(self.placed(weight)?.class == Class::Small)
    }

    /// To the top of the priorities, with the watermark fully open.
    pub fn prioritize(&self) {
        self.engine.prioritize(&self.vbar);
    }

    /// Reads weights ahead of a pass that is to begin, in the order in which they will be used as far as that is known, into
    /// the memory that they would get by being used. Returns at once.
    pub fn prefetch(&self) {
        self.engine.prefetch(&self.vbar);
    }

    /// To the bottom of the priorities: its memory is taken first.
    pub fn deprioritize(&self) {
        self.engine.deprioritize(&self.vbar);
    }

    /// Detaches the model, as dropping does: what is not in use leaves at once, what is with its last use. Later calls
    /// find [`EngineError::Detached`].
    pub fn detach(&self) {
        if self.leave() {
            self.engine.close(&self.vbar);
        }
    }

    /// Gives the small weights up, the first time. Whether it was.
    pub(crate) fn leave(&self) -> bool {
        if self.has_left.swap(true, Ordering::AcqRel) {
            return false;
        }
        let shared = self.engine.shared();
        let small = self.small.lock().take();
        if let Some(small) = small {
            self.vbar.reserved.store(0, Ordering::Release);
            shared.reserved.fetch_sub(small.bytes.get(), Ordering::AcqRel);
            shared.unpin(&[small.span], Used::Anywhere);
        }
        true
    }

    /// Gives the pages of a weight up if nobody pins them, so that its bytes are read again at the next use.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn discard(&self, weight: usize) -> Result<()> {
        let placed = self.placed(weight)?;
        let shared = self.engine.shared();
        let mut state = shared.state.lock();
        if !state.is_open(self.vbar.id) {
            return Ok(()); // a detached model's pages leave anyway
        }
        for page in placed.first_page..=placed.last_page {
            let at = self.vbar.page_ref(page);
            state.decide(|policy, books, out| policy.discard(at, books, out));
        }
        drop(state);
        shared.work.notify_one();
        Ok(())
    }

    /// The serials of a weight's pages, lowest address first. While the weight is pinned an unchanged serial means that the
    /// page holds what it held, and what was written to it.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn serials(&self, weight: usize) -> Result<Vec<Serial>> {
        let placed = self.placed(weight)?;
        Ok((placed.first_page..=placed.last_page).map(|page| self.vbar.serial(page)).collect())
    }

    /// Whether all pages of a weight are there and stay between uses.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist.
    pub fn is_resident(&self, weight: usize) -> Result<bool> {
        let placed = self.placed(weight)?;
        let is_resident = |page| {
            let seen = self.vbar.cell(page).load();
            seen.is_filled() && !seen.is_streamed()
        };
        Ok((placed.first_page..=placed.last_page).all(is_resident))
    }

    /// Where each page stands.
    pub fn page_states(&self) -> Vec<PageState> {
        self.stats().pages
    }

    /// How many pages were filled so far.
    pub fn pages_filled(&self) -> u64 {
        self.vbar.counters.filled_pages.load(Ordering::Relaxed)
    }

    /// What was moved and who waited.
    pub fn stats(&self) -> VbarStats {
        self.engine.vbar_stats(&self.engine.shared().state.lock(), &self.vbar)
    }

    /// The name given at [`Engine::attach`].
    pub fn name(&self) -> &str {
        &self.vbar.name
    }

    /// The names of the weights, in the order given.
    pub fn weight_names(&self) -> &[String] {
        &self.layout().names
    }

    /// The engine.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(crate) fn vbar(&self) -> &Arc<Vbar> {
        &self.vbar
    }

    pub(crate) fn span(&self, weight: usize) -> Result<Span<&Arc<Vbar>>> {
        let placed = self.placed(weight)?;
        Ok(Span { vbar: &self.vbar, first: placed.first_page, last: placed.last_page })
    }

    /// Lets the schedule know.
    pub(crate) fn note_use(&self, weight: usize) {
        if let Class::Whole(number) = self.layout().weights[weight].class {
            self.vbar.trace.push(number);
        }
    }

    pub(crate) fn placed(&self, weight: usize) -> Result<Placed> {
        self.layout().weights.get(weight).copied().ok_or_else(|| {
            let (name, count) = (&self.vbar.name, self.layout().weights.len());
            EngineError::Invalid(format!("{name:?} has {count} weights, there is no number {weight}"))
        })
    }

    pub(crate) fn layout(&self) -> &Layout {
        self.vbar.layout.as_ref().expect("an attachment is made with a layout")
    }

    pub(crate) fn reserved_by_others(&self) -> Bytes {
        let own = self.small.lock().as_ref().map_or(Bytes::ZERO, |small| small.bytes);
        self.engine.shared().reserved().saturating_sub(own)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.detach();
    }
}

impl<'a> Pinned<'a> {
    /// The caller has pinned the pages.
    pub(crate) fn new(engine: &'a Arc<Engine>, spans: Spans<'a>, stream: StreamHandle) -> Self {
        Pinned { engine, spans, stream }
    }

    /// The same pins, kept alive by themselves.
    pub fn held(mut self) -> Held {
        let spans = std::mem::take(&mut self.spans).into_iter();
        let owned =
            |span: Span<&Arc<Vbar>>| Span { vbar: Arc::clone(span.vbar), first: span.first, last: span.last };
        let held = Held {
            engine: Arc::clone(self.engine),
            spans: spans.map(owned).collect(),
            stream: self.stream,
            _own: OwnOperation::begin(),
        };
        // Its operation goes on.
        std::mem::forget(self);
        held
    }
}

impl<'a> Begun<'a> {
    /// The weights, if they are there. What would have to wait is given up.
    pub fn ready(self) -> Option<Pinned<'a>> {
        match self {
            Begun::Ready(pinned) => Some(pinned),
            Begun::Waiting(_) => None,
        }
    }
}

impl<'a> Waiting<'a> {
    /// The caller has begun it, and its pins are this one's from now on.
    pub(crate) fn new(
        engine: &'a Arc<Engine>,
        spans: Spans<'a>,
        weights: &[(&'a Attachment, usize)],
        stream: StreamHandle,
        found: Found,
    ) -> Self {
        Waiting { engine, spans, weights: weights.into(), stream, found }
    }

    /// Waits until the weights are pinned and their fills enqueued; `interrupted` is asked as in [`Use`].
    ///
    /// # Errors
    /// As [`Attachment::acquire`].
    pub fn wait(mut self, interrupted: &dyn Fn() -> bool) -> Result<Pinned<'a>> {
        let how = Use { stream: self.stream, interrupted };
        let found = std::mem::replace(&mut self.found, Found::Missing);
        let note = || note_uses(&self.weights);
        self.engine.shared().finish(&self.spans, found, how, Above::Fail, note)?;
        Ok(Pinned::new(self.engine, std::mem::take(&mut self.spans), self.stream))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if self.found != Found::Missing {
            self.engine.shared().release(&self.spans, Used::Nowhere);
        }
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.engine.shared().release(&self.spans, Used::On(self.stream));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.engine.shared().release(&self.spans, Used::On(self.stream));
    }
}

impl View {
    /// A view of a weight whose pages the caller has pinned; from now on they are the view's.
    pub(crate) fn new(
        engine: &Arc<Engine>,
        attachment: &Attachment,
        weight: usize,
        counted: Counted,
    ) -> Result<Self> {
        let placed = attachment.placed(weight)?;
        let vbar = Arc::clone(&attachment.vbar);
        let span = Span { vbar, first: placed.first_page, last: placed.last_page };
        let addr = attachment.address(weight)?;
        let counted = if placed.class == Class::Small { Counted::Nothing } else { counted };
        let own = (counted == Counted::Operation).then(OwnOperation::begin);
        let view = View { engine: Arc::clone(engine), span, addr, bytes: placed.bytes, counted, _own: own };
        if let Some(count) = view.count() {
            count.fetch_add(1, Ordering::AcqRel);
        }
        Ok(view)
    }

    /// Where the weight is.
    pub fn address(&self) -> DeviceAddr {
        self.addr
    }

    /// The weight's length.
    pub fn len(&self) -> Bytes {
        self.bytes
    }

    /// Whether the weight has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == Bytes::ZERO
    }
}

impl View {
    fn count(&self) -> Option<&AtomicUsize> {
        let shared = self.engine.shared();
        match self.counted {
            Counted::View => Some(&shared.views),
            Counted::Operation => Some(&shared.operations),
            Counted::Nothing => None,
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.engine.shared().unpin(std::slice::from_ref(&self.span), Used::Anywhere);
        if let Some(count) = self.count() {
            count.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

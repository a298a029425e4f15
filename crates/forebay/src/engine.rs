//! The engine of one device.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use forebay_core::{Bytes, Mode, PageIndex, PageRef, RankOrder, Schedule, VbarId, VbarSpec};
use forebay_device::{Device, DeviceId, Reservation, StreamHandle};
use forebay_store::{ReaderPool, Urgency};
use parking_lot::Mutex;

use crate::acquire::{Above, Found, Use};
use crate::ahead::Ahead;
use crate::attachment::{Attachment, Begun, Counted, Pinned, View, Waiting};
use crate::books::{PageBook, VbarBook};
use crate::cache::keeper::Keeper;
use crate::config::EngineConfig;
use crate::converting::Conversion;
use crate::copier::Copier;
use crate::explicit::ExplicitVbar;
use crate::host_buffer::{self, Helper};
use crate::layout::{Layout, LayoutOptions, WeightSpec};
use crate::mover::Mover;
use crate::reader::Reader;
use crate::state::{Budget, Shared, State};
use crate::stats::{EngineStats, VbarStats};
use crate::timeline::Moment;
use crate::vbar::{Spans, Vbar};
use crate::{EngineError, Result};

/// The pages of an explicit VBAR (ComfyUI's contract).
const EXPLICIT_PAGE: Bytes = Bytes::mib(32);

/// Keeps the weights of any number of models on one device, within a budget. See the crate's documentation.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    /// The mover, the cache's keeper and the buffers' helper.
    threads: Mutex<Vec<JoinHandle<()>>>,
    readers: Mutex<Option<Arc<ReaderPool<Reader>>>>,
    copier: Mutex<Option<Arc<Copier>>>,
    helper: Helper,
    helper_starts: Once,
    pub(crate) ahead: Arc<Ahead>,
    /// Lock order: never together with the state lock.
    pub(crate) parked: Mutex<Vec<Arc<Vbar>>>,
}

impl Engine {
    /// Starts an engine. Nothing of the device's memory is taken before it is needed.
    ///
    /// # Errors
    /// What the device reports, [`EngineError::Readers`] where threads cannot be started, [`EngineError::Invalid`] for
    /// a fixed budget below one page, or a ring that cannot be.
    pub fn new(device: Arc<dyn Device>, config: EngineConfig) -> Result<Arc<Self>> {
        check_budget(config.budget, &*device)?;
        config.ring.check()?;
        let shared = Arc::new(Shared::new(device, config)?);
        let threads = config.ring.reader_threads();
        let readers = ReaderPool::new("forebay-read", threads, |_| Reader::new());
        let readers = readers.map_err(EngineError::Readers)?;
        // Beside what the caller does next. A reader that finds its slots made goes on at once.
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            readers.submit(Urgency::Ahead, move |reader: &mut Reader| reader.prepare(&shared));
        }
        let readers = Arc::new(readers);
        let copier = Arc::new(Copier::new(Arc::clone(&shared))?);
        let mover = Mover::new(Arc::clone(&shared), Arc::clone(&readers), Arc::clone(&copier));
        let keeper = Keeper::new(Arc::clone(&shared))?;
        // Made first: where a thread cannot be started, the other ends with it.
        let engine = Engine {
            shared,
            threads: Mutex::default(),
            readers: Mutex::new(Some(readers)),
            copier: Mutex::new(Some(copier)),
            helper: Helper::default(),
            helper_starts: Once::new(),
            ahead: Arc::default(),
            parked: Mutex::default(),
        };
        engine.start("forebay-mover", move || mover.run())?;
        engine.start("forebay-cache", move || keeper.run())?;
        Ok(Arc::new(engine))
    }

    /// Attaches weights: each gets its address. The always-resident region is filled now, the rest when used. A model that
    /// was [parked](Attachment::park) finds what is left of it on the device.
    ///
    /// # Errors
    /// [`EngineError::TooLarge`] where not even the small weights fit, [`EngineError::Invalid`] for a layout that
    /// cannot be, and what the device and the sources report.
    pub fn attach(
        self: &Arc<Self>,
        name: &str,
        weights: Vec<WeightSpec>,
        options: LayoutOptions,
    ) -> Result<Attachment> {
        self.attach_converting(name, weights, Vec::new(), options)
    }

    /// [`attach`](Engine::attach) with conversions of some of the weights, one entry for each weight: their elements are
    /// converted while their pages are filled, and the weight is as long as its converted elements.
    ///
    /// # Errors
    /// As `attach`; [`EngineError::Invalid`] for conversions that do not fit their weights.
    pub fn attach_converting(
        self: &Arc<Self>,
        name: &str,
        weights: Vec<WeightSpec>,
        conversions: Vec<Option<Conversion>>,
        options: LayoutOptions,
    ) -> Result<Attachment> {
        if !conversions.is_empty() {
            self.shared.load_kernels()?;
        }
        let layout = Layout::converting(weights, conversions, options)?;
        if let Some(vbar) = self.unpark(name, &layout)? {
            return Attachment::new(self, vbar);
        }
        let window = layout.window(self.shared.state.lock().policy.budget());
        let spec = VbarSpec {
            // A model without weights has an address as well.
            pages: layout.pages.max(1),
            page_size: layout.page_size,
            order: layout.order(),
            mode: Mode::Streamed,
            window,
            uses_a_pass: layout.scheduled.len() as u32,
        };
        let vbar = self.open(name, spec, Some(layout))?;
        Attachment::new(self, vbar)
    }

    /// Reserves an explicit VBAR of `size` bytes, in pages of 32 MiB. The size may be many times the device's memory.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a size of zero or beyond the address space, and what the device reports.
    pub fn vbar(self: &Arc<Self>, name: &str, size: Bytes) -> Result<ExplicitVbar> {
        let pages = size.pages_of(EXPLICIT_PAGE);
        let pages = u32::try_from(pages).ok().filter(|pages| *pages > 0).ok_or_else(|| {
            EngineError::Invalid(format!(
                "a VBAR has between 1 B and {} bytes: {size}",
                EXPLICIT_PAGE * u64::from(u32::MAX)
            ))
        })?;
        let spec = VbarSpec {
            pages,
            page_size: EXPLICIT_PAGE,
            order: RankOrder::Address,
            mode: Mode::Explicit,
            window: 0,
            uses_a_pass: 0,
        };
        Ok(ExplicitVbar::new(self, self.open(name, spec, None)?, size))
    }

    /// Pins the weights of one operation together: all or none, so that operations of several threads never block each
    /// other half-way. See [`Attachment::acquire`].
    ///
    /// # Errors
    /// As [`Attachment::acquire`]; [`EngineError::Invalid`] for an attachment of another engine.
    pub fn acquire<'a>(
        self: &'a Arc<Self>,
        weights: &[(&'a Attachment, usize)],
        how: Use<'_>,
    ) -> Result<Pinned<'a>> {
        match self.begin(weights, how.stream)? {
            Begun::Ready(pinned) => Ok(pinned),
            Begun::Waiting(waiting) => waiting.wait(how.interrupted),
        }
    }

    /// [`acquire`](Engine::acquire) in two steps, for callers that must give something up before they wait. This one
    /// never waits.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for an attachment of another engine or a weight that does not exist.
    pub fn begin<'a>(
        self: &'a Arc<Self>,
        weights: &[(&'a Attachment, usize)],
        stream: StreamHandle,
    ) -> Result<Begun<'a>> {
        let spans = self.spans(weights)?;
        let found = self.shared.begin(&spans, stream);
        if found != Found::Missing {
            note_uses(weights);
        }
        if found == Found::Ready {
            return Ok(Begun::Ready(Pinned::new(self, spans, stream)));
        }
        Ok(Begun::Waiting(Waiting::new(self, spans, weights, stream, found)))
    }

    /// Pins weights together like [`acquire`](Engine::acquire), each for as long as its view lives.
    ///
    /// # Errors
    /// As [`acquire`](Engine::acquire).
    pub fn views(self: &Arc<Self>, weights: &[(&Attachment, usize)], how: Use<'_>) -> Result<Vec<View>> {
        self.views_counted(weights, how, Counted::View)
    }

    /// [`views`](Engine::views) that end with an operation, so that other threads wait for them as for an operation.
    ///
    /// # Errors
    /// As [`acquire`](Engine::acquire).
    pub fn loans(self: &Arc<Self>, weights: &[(&Attachment, usize)], how: Use<'_>) -> Result<Vec<View>> {
        self.views_counted(weights, how, Counted::Operation)
    }

    fn views_counted(
        self: &Arc<Self>,
        weights: &[(&Attachment, usize)],
        how: Use<'_>,
        counted: Counted,
    ) -> Result<Vec<View>> {
        let spans = self.spans(weights)?;
        self.shared.acquire(&spans, how, Above::Fail, || note_uses(weights))?;
        let views = weights.iter().map(|(attachment, weight)| View::new(self, attachment, *weight, counted));
        let views = views.collect();
        // From here on the views are counted, each as what it is.
        self.shared.operations.fetch_sub(1, Ordering::AcqRel);
        views
    }

    /// Sets how much of the device may be used. What is over leaves at once, or with its last pin.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a fixed budget below one page, and what the device reports.
    pub fn set_budget(&self, budget: Budget) -> Result<()> {
        check_budget(budget, &*self.shared.device)?;
        let mut state = self.shared.state.lock();
        let allowed = state.allowed(budget, &*self.shared.device)?;
        state.budget = budget;
        state.decide(|policy, books, out| policy.set_budget(allowed, books, out));
        drop(state);
        self.shared.changed.notify_all();
        self.shared.work.notify_one();
        Ok(())
    }

    /// Waits until everything decided so far is done: pages mapped, filled, unmapped, memory given back. Waits for work
    /// of the device only where a page that leaves is still read by it.
    ///
    /// # Errors
    /// What stopped the engine.
    pub fn settle(&self) -> Result<()> {
        let mut state = self.shared.state.lock();
        self.shared.work.notify_one();
        // Twice: a page that was filled may have to leave at once. Never until there is nothing to do at all, which may
        // not come while others use weights.
        for _ in 0..2 {
            let so_far = state.so_far();
            while !state.is_done(so_far) {
                state.check()?;
                self.shared.changed.wait_for(&mut state, Duration::from_millis(10));
            }
        }
        state.check()
    }

    /// Sets how much of the page cache may be registered with the device; see [`EngineConfig::registered`]. What is over is
    /// handed back in the background.
    pub fn set_registered(&self, limit: Option<Bytes>) {
        self.shared.state.lock().registering.set_limit(limit);
        self.shared.register.notify_one();
    }

    /// How much page cache is registered with the device.
    pub(crate) fn registered(&self) -> Bytes {
        self.shared.state.lock().registering.held()
    }

    /// Whether page cache is registered with the device, as far as memory is free: the device does not refuse, and the application
    /// allows it.
    pub fn registers(&self) -> bool {
        !self.shared.state.lock().registering.is_off()
    }

    /// Ends the engine before its last owner goes, as a process should before it exits: what is not pinned is given back,
    /// its threads end, and no later call reaches the device. Such calls fail with [`EngineError::Stopped`]. Idempotent.
    pub fn shut_down(&self) {
        self.end_threads();
        self.shared.state.lock().books.lost(self.shared.shut_down());
        self.shared.changed.notify_all();
    }

    /// The device's name.
    pub fn device(&self) -> DeviceId {
        self.shared.id
    }

    /// The budget, and how many bytes of frames it allows at this moment.
    pub fn budget(&self) -> (Budget, Bytes) {
        let state = self.shared.state.lock();
        (state.budget, state.policy.budget())
    }

    /// How many operations hold weights at this moment.
    pub fn operations(&self) -> usize {
        self.shared.operations.load(Ordering::Acquire)
    }

    /// What is where and what was moved. Prints as a table.
    pub fn stats(&self) -> EngineStats {
        let state = self.shared.state.lock();
        EngineStats {
            device: self.shared.id,
            device_name: self.shared.device.name(),
            budget: state.policy.budget(),
            held: state.policy.held(),
            free_frames: state.policy.free_frames(),
            operations: self.shared.operations.load(Ordering::Relaxed),
            views: self.shared.views.load(Ordering::Relaxed),
            reserved: self.shared.reserved(),
            ring: Bytes::new(self.shared.ring.load(Ordering::Relaxed)),
            registered: state.registering.held(),
            vbars: state
                .policy
                .priorities()
                .filter_map(|id| state.books.vbars.get(&id))
                .map(|book| self.vbar_stats(&state, &book.vbar))
                .collect(),
        }
    }

    /// Begins to record what the engine does when.
    pub fn start_recording(&self) {
        self.shared.timeline.start();
    }

    /// Ends the recording. What was recorded, in the order in which it ended.
    pub fn stop_recording(&self) -> Vec<Moment> {
        self.shared.timeline.stop()
    }

    /// The pages of an operation's weights.
    fn spans<'a>(&self, weights: &[(&'a Attachment, usize)]) -> Result<Spans<'a>> {
        let of = |&(attachment, weight): &(&'a Attachment, usize)| {
            if !std::ptr::eq(&**attachment.engine(), self) {
                let name = attachment.name();
                return Err(EngineError::Invalid(format!("{name:?} is attached to another engine")));
            }
            attachment.span(weight)
        };
        weights.iter().map(of).collect()
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The threads that read; none once the engine was shut down.
    pub(crate) fn readers(&self) -> Option<Arc<ReaderPool<Reader>>> {
        self.readers.lock().clone()
    }

    /// Who gives memory of host buffers back. Its thread is started with the first.
    pub(crate) fn helper(&self) -> &Helper {
        self.helper_starts.call_once(|| {
            if self.shared.state.lock().stop {
                return;
            }
            let (jobs, device) = (self.helper.open(), Arc::clone(&self.shared.device));
            if let Err(error) = self.start("forebay-host", move || host_buffer::run(&*device, &jobs)) {
                tracing::warn!(%error, "memory of buffers is not given back");
            }
        });
        &self.helper
    }

    pub(crate) fn vbar_stats(&self, state: &State, vbar: &Vbar) -> VbarStats {
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &vbar.counters;
        let weights =
            vbar.layout.as_ref().map(|layout| layout.weights.iter().map(|weight| weight.bytes).sum());
        let page = |page| PageRef { vbar: vbar.id, page: PageIndex(page) };
        VbarStats {
            name: vbar.name.clone(),
            bytes: weights.unwrap_or(vbar.size()),
            page_size: vbar.page_size,
            pages: (0..vbar.cells.len() as u32).map(|p| state.policy.state(page(p))).collect(),
            pinned: vbar.page_size * vbar.cells.iter().filter(|cell| cell.load().pins() > 0).count() as u64,
            lent: state.books.vbars.get(&vbar.id).is_some_and(|book| book.lent.is_some()),
            parked: state.books.vbars.get(&vbar.id).is_some_and(|book| book.parked),
            watermark: state.policy.watermark(vbar.id).0,
            filled: Bytes::new(load(&counters.filled_bytes)),
            direct: Bytes::new(load(&counters.direct_bytes)),
            past_cache: Bytes::new(load(&counters.past_cache_bytes)),
            cached: state.books.vbars.get(&vbar.id).and_then(|book| book.cached.clone()),
            filled_pages: load(&counters.filled_pages),
            looked_up: Bytes::new(load(&counters.looked_up_bytes)),
            waits: load(&counters.waits),
            wait_time: Duration::from_nanos(load(&counters.wait_ns)),
            longest_wait: Duration::from_nanos(load(&counters.longest_wait_ns)),
            mispredicted: state.books.vbars.get(&vbar.id).map_or(0, |book| book.schedule.mispredicted()),
        }
    }

    pub(crate) fn prioritize(&self, vbar: &Vbar) {
        let mut state = self.shared.state.lock();
        // A use from before must not change the order afterwards.
        state.take_in_uses();
        if state.is_open(vbar.id) {
            state.policy.prioritize(vbar.id);
        }
    }

    pub(crate) fn deprioritize(&self, vbar: &Vbar) {
        let mut state = self.shared.state.lock();
        state.take_in_uses();
        if state.is_open(vbar.id) {
            state.policy.deprioritize(vbar.id);
        }
    }

    /// A pass over a model is expected: its weights are read ahead from now on.
    pub(crate) fn prefetch(&self, vbar: &Vbar) {
        let mut state = self.shared.state.lock();
        state.take_in_uses();
        if state.is_open(vbar.id) {
            state.books.vbar(vbar.id).started = true;
            state.policy.touch(vbar.id, 0);
        }
        drop(state);
        self.shared.work.notify_one();
    }

    /// Begins to remove a VBAR: what is not pinned leaves at once, the rest with its last pin.
    pub(crate) fn close(&self, vbar: &Vbar) {
        let mut state = self.shared.state.lock();
        vbar.closed.store(true, Ordering::Release);
        if let Some(book) = state.books.vbars.get_mut(&vbar.id) {
            book.closing = true;
            if let Some(lent) = book.lent.clone() {
                state.recall(&lent);
            }
            state.registering.forget_pages(vbar.id);
            state.decide(|policy, books, out| policy.close_vbar(vbar.id, books, out));
            state.keep_registered(vbar.id);
        }
        let gone = state.forget_if_gone(vbar.id);
        drop(state);
        drop(gone);
        self.shared.abandon_computing(Some(vbar.id));
        self.shared.work.notify_one();
        self.shared.register.notify_one();
        self.shared.changed.notify_all();
    }

    fn end_threads(&self) {
        self.shared.state.lock().stop = true;
        self.shared.abandon_computing(None);
        self.shared.work.notify_one();
        self.shared.register.notify_one();
        self.helper.close();
        // Kept until the others have ended: a pool can be dropped on a thread of its own, which could not wait for them.
        let pools = (self.readers.lock().take(), self.copier.lock().take());
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            // A drop on one of them (the last owner went with a VBAR) cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!(device = %self.shared.id, "the thread {name} had panicked");
            }
        }
        drop(pools);
    }

    fn start(&self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let thread =
            Builder::new().name(name.to_owned()).spawn(body).map_err(|error| EngineError::Stopped {
                device: self.shared.id,
                reason: format!("its thread {name} cannot be started: {error}"),
            })?;
        self.threads.lock().push(thread);
        Ok(())
    }

    fn open(&self, name: &str, spec: VbarSpec, layout: Option<Layout>) -> Result<Arc<Vbar>> {
        let size = spec.page_size * u64::from(spec.pages.max(1));
        let reservation = Reservation::new(Arc::clone(&self.shared.device), size, spec.page_size)?;
        let scheduled = layout.as_ref().map_or(0, |layout| layout.scheduled.len());
        let mut state = self.shared.state.lock();
        state.check()?;
        let (pages, page_size) = (spec.pages, spec.page_size);
        let id: VbarId = state.policy.add_vbar(spec);
        let vbar = Arc::new(Vbar::new(id, name.to_owned(), reservation, page_size, layout));
        let book = VbarBook {
            vbar: Arc::clone(&vbar),
            pages: (0..pages).map(|_| PageBook::default()).collect(),
            mapped: 0,
            closing: false,
            parked: false,
            cached: None,
            schedule: Schedule::new(scheduled as u32),
            trace_tail: 0,
            uses: 0,
            started: false,
            lent: None,
            marks: VecDeque::new(),
        };
        state.books.vbars.insert(id, book);
        state.adopt_kept(id);
        drop(state);
        self.shared.register.notify_one();
        Ok(vbar)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end_threads();
    }
}

pub(crate) fn note_uses(weights: &[(&Attachment, usize)]) {
    weights.iter().for_each(|(attachment, weight)| attachment.note_use(*weight));
}

fn check_budget(budget: Budget, device: &dyn Device) -> Result<()> {
    match budget {
        Budget::Fixed(bytes) if bytes < device.granularity() => Err(EngineError::Invalid(format!(
            "a budget holds at least one page of {}: {bytes}",
            device.granularity()
        ))),
        _ => Ok(()),
    }
}

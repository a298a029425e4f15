//! The engine's one lock and what is under it.
//!
//! Lock order: the state lock, then nothing. The copy lock ([`Shared::copy`]) is never taken together with it. Under
//! the state lock nobody waits for the device, calls Python, reads a source, maps or unmaps; recording and querying
//! events is allowed, as neither waits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use forebay_core::{Bytes, Command, PageRef, Policy, VbarId};
use forebay_device::{Device, DeviceId, Stream, StreamHandle};
use parking_lot::{Condvar, Mutex};

use crate::books::{Books, VbarBook};
use crate::layout::Class;
use crate::{EngineError, Result};

/// How much of the device the engine may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// This many bytes of frames.
    Fixed(Bytes),
    /// Everything that is free, but for this many bytes, which are kept free for everyone else.
    Headroom(Bytes),
}

/// What all threads of an engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) id: DeviceId,
    pub(crate) state: Mutex<State>,
    /// Something was filled, failed, released or unmapped.
    pub(crate) changed: Condvar,
    /// The mover has something to do.
    pub(crate) work: Condvar,
    /// The copy stream. Copies and the events behind them are enqueued under this lock, so that an event covers its
    /// copies.
    pub(crate) copy: Mutex<Stream>,
    /// Bytes of pages that are pinned as long as their model is attached.
    pub(crate) reserved: AtomicU64,
    /// Operations that hold weights.
    pub(crate) operations: AtomicUsize,
    /// Exported tensors that hold weights.
    pub(crate) views: AtomicUsize,
    pub(crate) ring: AtomicU64,
    last_stream: AtomicU64,
}

/// What is under the lock.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) policy: Policy,
    pub(crate) books: Books,
    pub(crate) queue: VecDeque<Command>,
    pub(crate) budget: Budget,
    /// Fills on their way.
    pub(crate) filling: usize,
    /// Commands taken from the queue and not finished.
    pub(crate) executing: usize,
    pub(crate) stop: bool,
    scratch: Vec<Command>,
}

/// No stream: every real handle, 0 included, differs from it.
const NO_STREAM: u64 = u64::MAX;

impl Shared {
    pub(crate) fn new(device: Arc<dyn Device>, budget: Budget, effective: Bytes) -> Result<Self> {
        let copy = Stream::new(Arc::clone(&device))?;
        Ok(Shared {
            id: device.id(),
            state: Mutex::new(State {
                policy: Policy::new(effective),
                books: Books::new(Arc::clone(&device)),
                queue: VecDeque::new(),
                budget,
                filling: 0,
                executing: 0,
                stop: false,
                scratch: Vec::new(),
            }),
            device,
            changed: Condvar::new(),
            work: Condvar::new(),
            copy: Mutex::new(copy),
            reserved: AtomicU64::new(0),
            operations: AtomicUsize::new(0),
            views: AtomicUsize::new(0),
            ring: AtomicU64::new(0),
            last_stream: AtomicU64::new(NO_STREAM),
        })
    }

    /// Sees to it that a stream is waited for before pages are unmapped that it may have used.
    pub(crate) fn know_stream(&self, stream: StreamHandle) {
        if self.last_stream.load(Ordering::Acquire) != stream.0 {
            self.state.lock().books.know_stream(stream);
            self.last_stream.store(stream.0, Ordering::Release);
        }
    }

    pub(crate) fn reserved(&self) -> Bytes {
        Bytes::new(self.reserved.load(Ordering::Acquire))
    }
}

impl State {
    /// Runs a policy event and queues the commands it gives.
    pub(crate) fn decide<T>(
        &mut self,
        event: impl FnOnce(&mut Policy, &mut Books, &mut Vec<Command>) -> T,
    ) -> T {
        let answer = event(&mut self.policy, &mut self.books, &mut self.scratch);
        self.queue.extend(self.scratch.drain(..));
        answer
    }

    /// Fails if the device or a thread of the engine is lost.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.books.fatal {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Takes in what was used since the last call: the schedules learn, planned uses are ticked off, and the model used
    /// goes to the top of the priorities.
    pub(crate) fn take_in_uses(&mut self) {
        let policy = &mut self.policy;
        for (id, book) in &mut self.books.vbars {
            let Some(layout) = &book.vbar.layout else { continue };
            let unplan = |policy: &mut Policy, number: u32| {
                let weight = layout.weights[layout.scheduled[number as usize] as usize];
                (weight.first_page..=weight.last_page)
                    .for_each(|page| policy.unplan(book.vbar.page_ref(page)));
            };
            let (schedule, tail) = (&mut book.schedule, &mut book.trace_tail);
            let mut used = false;
            book.vbar.trace.drain(tail, |number| {
                used = true;
                if schedule.used(number, |dropped| unplan(policy, dropped)) {
                    unplan(policy, number);
                }
            });
            if used && !book.closing {
                book.started = true;
                policy.touch(*id);
            }
        }
    }

    /// Reads ahead for the model in use, as far as frames may be taken for it.
    pub(crate) fn read_ahead(&mut self) {
        let Some(id) = self.policy.priorities().next() else { return };
        let Some(book) = self.books.vbars.get(&id) else { return };
        let vbar = Arc::clone(&book.vbar);
        let Some(layout) = vbar.layout.as_ref().filter(|_| book.started && !book.closing) else { return };
        while let Some(number) = self.books.vbar(id).schedule.plan_next() {
            let weight = layout.weights[layout.scheduled[number as usize] as usize];
            debug_assert!(matches!(weight.class, Class::Whole(_)));
            let pages = weight.first_page..=weight.last_page;
            let planned = pages.clone().take_while(|&page| {
                self.decide(|policy, books, out| policy.plan(vbar.page_ref(page), books, out))
            });
            let planned = planned.count() as u32;
            if planned <= weight.last_page - weight.first_page {
                pages.take(planned as usize).for_each(|page| self.policy.unplan(vbar.page_ref(page)));
                self.books.vbar(id).schedule.unplan_last();
                return;
            }
        }
    }

    /// Whether everything that was decided is done.
    pub(crate) fn is_settled(&self) -> bool {
        self.queue.is_empty() && self.executing == 0 && self.filling == 0
    }

    /// Reports the last release of streamed pages.
    pub(crate) fn released(&mut self, page: PageRef) {
        self.decide(|policy, books, out| policy.released(page, books, out));
    }

    /// Takes a closed VBAR of which nothing is mapped any more out of the books. The caller drops it without the lock:
    /// its sources may belong to another language's objects.
    #[must_use]
    pub(crate) fn forget_if_gone(&mut self, id: VbarId) -> Option<VbarBook> {
        let book = self.books.vbars.get(&id)?;
        let gone =
            book.closing && book.mapped == 0 && self.policy.held_pages(id) == 0 && !book.vbar.has_pins();
        if !gone {
            return None;
        }
        self.policy.forget_vbar(id);
        self.books.vbars.remove(&id)
    }

    /// The error of a model that is gone.
    pub(crate) fn detached(name: &str, device: DeviceId) -> EngineError {
        EngineError::Detached { name: name.to_owned(), device }
    }
}

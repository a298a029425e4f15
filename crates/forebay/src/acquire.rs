//! Pinning pages for a use, and letting them go.
//!
//! Present and filled is the fast path: one atomic step a page, no lock, no allocation. Everything else goes through
//! the state lock once, and waits there only until the copies are enqueued; for their end the consumer's stream waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, Outcome, PageRef, PageState};
use forebay_device::{Event, StreamHandle};
use parking_lot::MutexGuard;

use crate::state::{Shared, State};
use crate::vbar::{Span, Vbar};
use crate::{EngineError, Result};

/// How long a call waits while running operations of other threads hold what it needs.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a call waits when only live views hold what it needs.
const VIEW_PATIENCE: Duration = Duration::from_secs(1);
/// How often a waiting call looks for an interrupt.
const INTERRUPT_POLL: Duration = Duration::from_millis(50);

/// How a use is to be made.
#[derive(Clone, Copy)]
pub struct Use<'a> {
    /// The stream whose work reads the weight.
    pub stream: StreamHandle,
    /// Asked now and then while waiting, without any lock: `true` ends the wait with [`EngineError::Interrupted`].
    pub interrupted: &'a dyn Fn() -> bool,
}

impl Use<'_> {
    /// A use on this stream that is not interrupted.
    pub fn on(stream: StreamHandle) -> Self {
        Use { stream, interrupted: &|| false }
    }
}

/// What to do about a page above an explicit watermark.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Above {
    Fail,
    Refuse,
}

impl Shared {
    /// Pins every page of the spans, once for each time it occurs, and orders `how.stream` behind their fills.
    /// `false` when refused.
    pub(crate) fn acquire<V: AsRef<Vbar>>(
        &self,
        spans: &[Span<V>],
        how: Use<'_>,
        above: Above,
    ) -> Result<bool> {
        self.know_stream(how.stream);
        if self.try_fast(spans) {
            self.operations.fetch_add(1, Ordering::Relaxed);
            return Ok(true);
        }
        let start = Instant::now();
        let granted = self.acquire_slow(spans, how, above)?;
        if let (true, Some(span)) = (granted, spans.first()) {
            span.vbar.as_ref().counters.waited(start.elapsed());
            self.operations.fetch_add(1, Ordering::Relaxed);
        }
        Ok(granted)
    }

    /// Takes the pins of [`acquire`](Shared::acquire) back. `stream` is where the pages were used; without one they may
    /// have been used on any stream the engine knows.
    pub(crate) fn release<V: AsRef<Vbar>>(&self, spans: &[Span<V>], stream: Option<StreamHandle>) {
        self.operations.fetch_sub(1, Ordering::Relaxed);
        self.unpin(spans, stream);
    }

    pub(crate) fn unpin<V: AsRef<Vbar>>(&self, spans: &[Span<V>], stream: Option<StreamHandle>) {
        let mut streamed: Vec<(&Vbar, u32)> = Vec::new();
        let mut last_of_streamed: Vec<PageRef> = Vec::new();
        for (vbar, page) in spans.iter().flat_map(Span::pages) {
            if vbar.cell(page).load().is_streamed() {
                streamed.push((vbar, page));
            } else if let Some(now) = vbar.cell(page).unpin()
                && now.is_streamed()
                && now.pins() == 0
            {
                last_of_streamed.push(vbar.page_ref(page));
            }
        }
        if streamed.is_empty() && last_of_streamed.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        let pages: Vec<PageRef> = streamed.iter().map(|(vbar, page)| vbar.page_ref(*page)).collect();
        let mut gone = Vec::new();
        // A closed and emptied VBAR has no book any more, but then it had no pins either: these pages have books.
        match stream {
            Some(stream) => state.books.used_until_now(&pages, stream),
            None => pages.iter().for_each(|&page| state.books.used_somewhere(page)),
        }
        for (vbar, page) in streamed {
            if vbar.cell(page).unpin().is_some_and(|now| now.pins() == 0) {
                last_of_streamed.push(vbar.page_ref(page));
            }
        }
        for page in last_of_streamed {
            state.released(page);
            gone.extend(state.forget_if_gone(page.vbar));
        }
        drop(state);
        drop(gone);
        self.work.notify_one();
        self.changed.notify_all();
    }

    /// Pins filled pages whose bytes are there; all or none.
    fn try_fast<V: AsRef<Vbar>>(&self, spans: &[Span<V>]) -> bool {
        let mut pinned = 0;
        for (vbar, page) in spans.iter().flat_map(Span::pages) {
            let seen = vbar.cell(page).try_pin();
            pinned += u32::from(seen.is_some());
            if !seen.is_some_and(|seen| seen.is_ready()) {
                self.unpin_first(spans, pinned);
                return false;
            }
        }
        true
    }

    /// Takes the first `count` pins of a try back. Nothing was enqueued meanwhile that reads the pages.
    fn unpin_first<V: AsRef<Vbar>>(&self, spans: &[Span<V>], count: u32) {
        let mut left = count;
        for span in spans {
            let len = (span.last - span.first + 1).min(left);
            if len > 0 {
                let part = Span { vbar: span.vbar.as_ref(), first: span.first, last: span.first + len - 1 };
                self.unpin(&[part], None);
            }
            left -= len;
        }
    }

    fn acquire_slow<V: AsRef<Vbar>>(&self, spans: &[Span<V>], how: Use<'_>, above: Above) -> Result<bool> {
        let pages: Vec<(&Vbar, u32)> = spans.iter().flat_map(Span::pages).collect();
        let mut distinct: Vec<PageRef> = pages.iter().map(|(vbar, page)| vbar.page_ref(*page)).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let mut wait = Wait::new(how);
        let mut state = self.state.lock();
        let pending = loop {
            if !self.demand(&mut state, spans, &distinct, above, &mut wait)? {
                return Ok(false);
            }
            // Pages that occur twice are pinned twice, as they will be released.
            let mut seen: Vec<PageRef> = Vec::with_capacity(distinct.len());
            for (vbar, page) in &pages {
                let at = vbar.page_ref(*page);
                if seen.contains(&at) {
                    vbar.cell(*page).pin();
                } else {
                    seen.push(at);
                }
            }
            match self.wait_for_fills(&mut state, &pages, &mut wait) {
                Ok(Some(pending)) => break pending,
                Ok(None) => self.give_up(&mut state, spans),
                Err(error) => {
                    self.give_up(&mut state, spans);
                    return Err(error);
                }
            }
        };
        drop(state);
        for event in pending {
            // SAFETY: the caller keeps the stream alive for the time of the use.
            if let Err(error) = unsafe { event.wait_on(how.stream) } {
                self.unpin(spans, None);
                return Err(error.into());
            }
        }
        Ok(true)
    }

    /// Asks the policy until it grants the pages. `false` when refused.
    fn demand<V: AsRef<Vbar>>(
        &self,
        state: &mut MutexGuard<'_, State>,
        spans: &[Span<V>],
        distinct: &[PageRef],
        above: Above,
        wait: &mut Wait<'_>,
    ) -> Result<bool> {
        loop {
            state.check()?;
            state.take_in_uses();
            for span in spans {
                let vbar = span.vbar.as_ref();
                match state.books.vbars.get(&vbar.id) {
                    Some(book) if !book.closing => {}
                    _ => return Err(State::detached(&vbar.name, self.id)),
                }
                if vbar.layout.is_some() {
                    state.policy.touch(vbar.id);
                }
            }
            let reserved = self.reserved_beside(spans);
            let outcome = state.decide(|policy, books, out| policy.demand(distinct, reserved, books, out));
            self.work.notify_one();
            match outcome {
                Outcome::Granted => return Ok(true),
                Outcome::Refused if above == Above::Refuse => return Ok(false),
                Outcome::TooLarge { .. } if above == Above::Refuse => return Ok(false),
                Outcome::TooLarge { needed } => {
                    let budget = state.policy.budget();
                    return Err(EngineError::TooLarge { device: self.id, needed, budget, reserved });
                }
                Outcome::Refused | Outcome::Blocked => self.wait_for_room(state, distinct, wait)?,
            }
        }
    }

    /// Pages pinned for good are counted once, also where the operation itself asks for them.
    fn reserved_beside<V: AsRef<Vbar>>(&self, spans: &[Span<V>]) -> Bytes {
        let own = spans
            .iter()
            .flat_map(Span::pages)
            .filter(|(vbar, page)| vbar.layout.as_ref().is_some_and(|layout| *page < layout.small_pages));
        let own: Bytes = own.map(|(vbar, _)| vbar.page_size).sum();
        self.reserved().saturating_sub(own)
    }

    fn wait_for_room(
        &self,
        state: &mut MutexGuard<'_, State>,
        distinct: &[PageRef],
        wait: &mut Wait<'_>,
    ) -> Result<()> {
        let operations = self.operations.load(Ordering::Relaxed);
        let busy = operations > 0 || !state.is_settled();
        let patience = if busy { PATIENCE } else { VIEW_PATIENCE };
        if wait.elapsed() > patience {
            return Err(self.all_pinned(state, distinct, wait));
        }
        wait.for_change(self, state)
    }

    fn all_pinned(&self, state: &State, distinct: &[PageRef], wait: &Wait<'_>) -> EngineError {
        let size = |id| state.books.vbars.get(&id).map_or(Bytes::ZERO, |book| book.vbar.page_size);
        let pinned = state.books.vbars.values().map(|book| {
            let pages = book.vbar.cells.iter().filter(|cell| cell.load().pins() > 0).count();
            book.vbar.page_size * pages as u64
        });
        EngineError::AllPinned {
            device: self.id,
            needed: distinct.iter().map(|page| size(page.vbar)).sum(),
            budget: state.policy.budget(),
            pinned: pinned.sum(),
            operations: self.operations.load(Ordering::Relaxed),
            views: self.views.load(Ordering::Relaxed),
            waited_s: wait.elapsed().as_secs_f64(),
        }
    }

    /// Waits until every page's copies are enqueued and returns the events that are still pending; `None` when a page
    /// was lost on the way without an error (no frame could be made for it), and the demand is to be made again.
    fn wait_for_fills(
        &self,
        state: &mut MutexGuard<'_, State>,
        pages: &[(&Vbar, u32)],
        wait: &mut Wait<'_>,
    ) -> Result<Option<Vec<Arc<Event>>>> {
        loop {
            state.check()?;
            let mut waiting = false;
            for (vbar, page) in pages {
                if vbar.cell(*page).load().is_filled() {
                    continue;
                }
                waiting = true;
                let at = vbar.page_ref(*page);
                if state.policy.state(at) == PageState::Absent {
                    let error = state.books.page(at).error.clone();
                    return error.map_or(Ok(None), Err);
                }
            }
            if !waiting {
                break;
            }
            wait.for_change(self, state)?;
        }
        let mut pending = Vec::new();
        for (vbar, page) in pages {
            let cell = vbar.cell(*page);
            if cell.load().is_ready() {
                continue;
            }
            let frame = state.books.page(vbar.page_ref(*page)).frame;
            let Some(filled) =
                frame.and_then(|frame| state.books.frames.get(&frame)).map(|book| &book.filled)
            else {
                continue;
            };
            if filled.is_complete()? {
                cell.set_ready();
            } else {
                pending.push(Arc::clone(filled));
            }
        }
        Ok(Some(pending))
    }

    /// Takes all pins of a demand back that came to nothing.
    fn give_up<V: AsRef<Vbar>>(&self, state: &mut MutexGuard<'_, State>, spans: &[Span<V>]) {
        MutexGuard::unlocked(state, || self.unpin(spans, None));
    }
}

/// One call's waiting.
struct Wait<'a> {
    how: Use<'a>,
    since: Option<Instant>,
}

impl<'a> Wait<'a> {
    fn new(how: Use<'a>) -> Self {
        Wait { how, since: None }
    }

    fn elapsed(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits until something changed, was interrupted, or a while has passed.
    fn for_change(&mut self, shared: &Shared, state: &mut MutexGuard<'_, State>) -> Result<()> {
        self.since.get_or_insert_with(Instant::now);
        let timed_out = shared.changed.wait_for(state, INTERRUPT_POLL).timed_out();
        if timed_out && MutexGuard::unlocked(state, || (self.how.interrupted)()) {
            return Err(EngineError::Interrupted { device: shared.id });
        }
        Ok(())
    }
}

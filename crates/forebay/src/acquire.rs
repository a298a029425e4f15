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

use crate::operation::own_operations;
use crate::patches::Ordered;
use crate::state::{Shared, State};
use crate::timeline::Activity;
use crate::vbar::{Completion, Span, Vbar};
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

/// What a look without the lock found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Every page is pinned and its bytes are there.
    Ready,
    /// Every page is pinned, its bytes there or on their way in the copy stream.
    Pending,
    /// Nothing is pinned.
    Missing,
}

/// A page of which not everything is there yet, and its mark.
type Pending<'a> = (&'a Vbar, u32, Arc<Event>);

/// Where pages were used between their pin and its end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Used {
    /// On this stream.
    On(StreamHandle),
    /// On any stream that the VBAR knows.
    Anywhere,
    /// Not at all.
    Nowhere,
}

impl Shared {
    /// Pins every page of the spans, once for each time it occurs, and orders `how.stream` behind their fills.
    /// `false` when refused. `note` is called once, as soon as the pages are pinned: a use that was noted earlier would
    /// count as past while its pages can still be taken.
    pub(crate) fn acquire<V: AsRef<Vbar>>(
        &self,
        spans: &[Span<V>],
        how: Use<'_>,
        above: Above,
        note: impl FnOnce(),
    ) -> Result<bool> {
        match self.begin(spans, how.stream) {
            Found::Missing => self.finish(spans, Found::Missing, how, above, note),
            found => {
                note();
                self.finish(spans, found, how, above, || {})
            }
        }
    }

    /// The rest of an [`acquire`](Shared::acquire) after [`begin`](Shared::begin), whose pins it takes over: they are
    /// the caller's when this is `true`, and gone otherwise. `note` is called for pages that were missing.
    pub(crate) fn finish<V: AsRef<Vbar>>(
        &self,
        spans: &[Span<V>],
        found: Found,
        how: Use<'_>,
        above: Above,
        note: impl FnOnce(),
    ) -> Result<bool> {
        if found == Found::Ready {
            return Ok(true);
        }
        let start = Instant::now();
        let mut pending = if found == Found::Pending {
            let pages: Vec<(&Vbar, u32)> = spans.iter().flat_map(Span::pages).collect();
            let pending = self.pending(&mut self.state.lock(), &pages);
            Some(pending.inspect_err(|_| self.release(spans, Used::Nowhere))?)
        } else {
            self.acquire_slow(spans, how, above, note)?
        };
        loop {
            let Some(pages) = &pending else { return Ok(false) };
            if found == Found::Pending && pages.is_empty() {
                return Ok(true);
            }
            match self.order_behind_all(pages, how.stream) {
                Ok(Ordered::Behind) => break,
                ordered => {
                    self.release(spans, Used::Nowhere);
                    ordered?;
                }
            }
            pending = self.acquire_slow(spans, how, above, || {})?;
        }
        if let Some(span) = spans.first() {
            span.vbar.as_ref().counters.waited(start.elapsed());
            self.timeline.note(Activity::Wait, span.first, self.timeline.begin().map(|_| start));
        }
        Ok(true)
    }

    /// Begins an operation if its pages are filled: they are pinned then. Never waits.
    pub(crate) fn begin<V: AsRef<Vbar>>(&self, spans: &[Span<V>], stream: StreamHandle) -> Found {
        spans.iter().for_each(|span| span.vbar.as_ref().streams.know(stream));
        // Counted before the first pin and until after the last: who waits for pins sees whose they are.
        self.operations.fetch_add(1, Ordering::AcqRel);
        let found = self.try_fast(spans);
        if found == Found::Missing {
            self.operations.fetch_sub(1, Ordering::AcqRel);
        }
        found
    }

    /// Ends an operation: takes the pins of [`acquire`](Shared::acquire) back.
    pub(crate) fn release<V: AsRef<Vbar>>(&self, spans: &[Span<V>], used: Used) {
        self.unpin(spans, used);
        self.operations.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn unpin<V: AsRef<Vbar>>(&self, spans: &[Span<V>], used: Used) {
        if used != Used::Nowhere {
            spans.iter().for_each(|span| span.vbar.as_ref().note_use(span.first..=span.last));
        }
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
        // These pages are still pinned, so their VBARs have books.
        match used {
            Used::On(stream) => state.books.used_until_now(&pages, stream),
            Used::Anywhere => pages.iter().for_each(|&page| state.books.used_somewhere(page)),
            Used::Nowhere => {}
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
        self.nudge_mover();
        self.changed.notify_all();
    }

    /// Wakes the mover for what nobody waits for. To wake a thread takes whoever launches work as long as a use.
    pub(crate) fn nudge_mover(&self) {
        if !self.mover_looks.load(Ordering::Acquire) {
            self.work.notify_one();
        }
    }

    /// Pins filled pages; all or none.
    fn try_fast<V: AsRef<Vbar>>(&self, spans: &[Span<V>]) -> Found {
        if spans.iter().any(|span| span.vbar.as_ref().closed.load(Ordering::Acquire)) {
            return Found::Missing;
        }
        let mut found = Found::Ready;
        for (pinned, (vbar, page)) in (0..).zip(spans.iter().flat_map(Span::pages)) {
            match vbar.cell(page).try_pin() {
                Some(seen) if seen.is_ready() => {}
                Some(_) => found = Found::Pending,
                None => {
                    self.unpin_first(spans, pinned);
                    return Found::Missing;
                }
            }
        }
        found
    }

    /// Takes the first `count` pins of a try back.
    fn unpin_first<V: AsRef<Vbar>>(&self, spans: &[Span<V>], count: u32) {
        let mut left = count;
        for span in spans {
            let len = (span.last - span.first + 1).min(left);
            if len > 0 {
                let part = Span { vbar: span.vbar.as_ref(), first: span.first, last: span.first + len - 1 };
                self.unpin(&[part], Used::Nowhere);
            }
            left -= len;
        }
    }

    /// Returns the pages whose fills are still pending, or `None` when refused.
    fn acquire_slow<'a, V: AsRef<Vbar>>(
        &self,
        spans: &'a [Span<V>],
        how: Use<'_>,
        above: Above,
        note: impl FnOnce(),
    ) -> Result<Option<Vec<Pending<'a>>>> {
        let mut note = Some(note);
        let pages: Vec<(&Vbar, u32)> = spans.iter().flat_map(Span::pages).collect();
        let mut distinct: Vec<PageRef> = pages.iter().map(|(vbar, page)| vbar.page_ref(*page)).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let mut wait = Wait::new(how);
        let mut state = self.state.lock();
        loop {
            if !self.demand(&mut state, spans, &distinct, above, &mut wait)? {
                return Ok(None);
            }
            self.operations.fetch_add(1, Ordering::AcqRel);
            if let Some(note) = note.take() {
                note();
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
                Ok(true) => {
                    let pending = self.pending(&mut state, &pages);
                    drop(state);
                    return pending.map(Some).inspect_err(|_| self.release(spans, Used::Nowhere));
                }
                Ok(false) => self.give_up(&mut state, spans),
                Err(error) => {
                    self.give_up(&mut state, spans);
                    return Err(error);
                }
            }
        }
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
                if !state.is_open(vbar.id) {
                    return Err(State::detached(&vbar.name, self.id));
                }
                if vbar.layout.is_some() {
                    state.policy.touch(vbar.id, 0);
                }
            }
            let reserved = self.reserved_beside(state, distinct);
            let outcome = state.decide(|policy, books, out| policy.demand(distinct, reserved, books, out));
            self.work.notify_one();
            let needed = match outcome {
                Outcome::TooLarge { needed } => needed + reserved,
                Outcome::Blocked if state.squeezed.is_some() => state.size_of(distinct) + state.pinned(),
                Outcome::Blocked | Outcome::Granted | Outcome::Refused => Bytes::ZERO,
            };
            if state.rises_if_squeezed(&*self.device, needed)? {
                continue;
            }
            match outcome {
                Outcome::Granted => return Ok(true),
                Outcome::TooLarge { .. } if wait.looks_again(self, state) => {}
                Outcome::Refused if above == Above::Refuse => return Ok(false),
                Outcome::TooLarge { .. } if above == Above::Refuse => return Ok(false),
                Outcome::TooLarge { needed } => {
                    let budget = state.policy.budget();
                    return Err(EngineError::TooLarge { device: self.id, needed, budget, reserved });
                }
                Outcome::Refused | Outcome::Blocked => {
                    // Nothing is lent as a whole meanwhile.
                    state.waiting += 1;
                    let waited = self.wait_for_room(state, distinct, wait);
                    state.waiting -= 1;
                    waited?;
                }
            }
        }
    }

    /// Pages pinned for good are counted once, also where the operation itself asks for them.
    fn reserved_beside(&self, state: &State, distinct: &[PageRef]) -> Bytes {
        let own = distinct.iter().map(|page| match state.books.vbars.get(&page.vbar) {
            Some(book) if page.page.0 < book.vbar.reserved.load(Ordering::Acquire) => book.vbar.page_size,
            _ => Bytes::ZERO,
        });
        self.reserved().saturating_sub(own.sum())
    }

    fn wait_for_room(
        &self,
        state: &mut MutexGuard<'_, State>,
        distinct: &[PageRef],
        wait: &mut Wait<'_>,
    ) -> Result<()> {
        if wait.elapsed() > self.patience(state) {
            return Err(self.all_pinned(state, distinct, wait));
        }
        wait.for_change(self, state)
    }

    /// How long to wait for what others hold.
    fn patience(&self, state: &State) -> Duration {
        // The operations around this demand do not end before it does.
        let others = self.operations.load(Ordering::Acquire).saturating_sub(own_operations());
        let busy = others > 0 || !state.is_settled() || state.recalled > 0;
        if busy { PATIENCE } else { VIEW_PATIENCE }
    }

    /// Waits until others let go of what they hold, as long as for memory. Where they did not, the seconds waited.
    pub(crate) fn wait_until_let_go(
        &self,
        state: &mut MutexGuard<'_, State>,
        how: Use<'_>,
        mut is_done: impl FnMut(&mut State) -> bool,
    ) -> Result<Option<f64>> {
        let mut wait = Wait::new(how);
        while !is_done(state) {
            state.check()?;
            if wait.elapsed() > self.patience(state) {
                return Ok(Some(wait.elapsed().as_secs_f64()));
            }
            wait.for_change(self, state)?;
        }
        Ok(None)
    }

    fn all_pinned(&self, state: &State, distinct: &[PageRef], wait: &Wait<'_>) -> EngineError {
        EngineError::AllPinned {
            device: self.id,
            needed: state.size_of(distinct),
            budget: state.policy.budget(),
            pinned: state.pinned(),
            operations: self.operations.load(Ordering::Relaxed),
            views: self.views.load(Ordering::Relaxed),
            waited_s: wait.elapsed().as_secs_f64(),
        }
    }

    /// Waits until every page's copies are enqueued. `false` when a page was lost on the way without an error (no frame
    /// could be made for it), and the demand is to be made again.
    fn wait_for_fills(
        &self,
        state: &mut MutexGuard<'_, State>,
        pages: &[(&Vbar, u32)],
        wait: &mut Wait<'_>,
    ) -> Result<bool> {
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
                    return error.map_or(Ok(false), Err);
                }
                self.copies.hurry(at);
            }
            if !waiting {
                return Ok(true);
            }
            wait.for_change(self, state)?;
        }
    }

    fn order_behind_all(&self, pages: &[Pending<'_>], stream: StreamHandle) -> Result<Ordered> {
        for (vbar, page, filled) in pages {
            if self.order_behind(vbar, *page, filled, stream)? == Ordered::NotAnyMore {
                return Ok(Ordered::NotAnyMore);
            }
        }
        Ok(Ordered::Behind)
    }

    /// Those of pages that are pinned and filled of which not everything is there yet.
    fn pending<'a>(&self, state: &mut State, pages: &[(&'a Vbar, u32)]) -> Result<Vec<Pending<'a>>> {
        let mut pending = Vec::new();
        for &(vbar, page) in pages {
            let cell = vbar.cell(page);
            if cell.load().is_ready() {
                continue;
            }
            let Some(filled) = state.books.filled(vbar.page_ref(page)) else { continue };
            if vbar.completion(page) == Completion::Complete && filled.is_complete()? {
                cell.set_ready();
            } else {
                pending.push((vbar, page, filled));
            }
        }
        Ok(pending)
    }

    /// Takes all pins of a demand back that came to nothing.
    fn give_up<V: AsRef<Vbar>>(&self, state: &mut MutexGuard<'_, State>, spans: &[Span<V>]) {
        MutexGuard::unlocked(state, || self.release(spans, Used::Nowhere));
        // The model may have been detached meanwhile, and these pins may have been what kept it.
        let gone: Vec<_> =
            spans.iter().filter_map(|span| state.forget_if_gone(span.vbar.as_ref().id)).collect();
        MutexGuard::unlocked(state, || drop(gone));
    }
}

/// One call's waiting.
struct Wait<'a> {
    how: Use<'a>,
    since: Option<Instant>,
    asked: Instant,
    has_looked: bool,
}

impl<'a> Wait<'a> {
    fn new(how: Use<'a>) -> Self {
        Wait { how, since: None, asked: Instant::now(), has_looked: false }
    }

    fn elapsed(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits until something changed, was interrupted, or a while has passed.
    fn for_change(&mut self, shared: &Shared, state: &mut MutexGuard<'_, State>) -> Result<()> {
        self.since.get_or_insert_with(Instant::now);
        shared.changed.wait_for(state, INTERRUPT_POLL);
        // Other threads may change things all the time, so a wait that did not time out asks as well.
        if self.asked.elapsed() >= INTERRUPT_POLL {
            self.asked = Instant::now();
            if MutexGuard::unlocked(state, || (self.how.interrupted)()) {
                return Err(EngineError::Interrupted { device: shared.id });
            }
        }
        Ok(())
    }

    /// Before a demand is refused, once: whether others have given memory back since it was looked at.
    fn looks_again(&mut self, shared: &Shared, state: &mut State) -> bool {
        !std::mem::replace(&mut self.has_looked, true)
            && state.follow_memory(&*shared.device, Bytes::new(1)).unwrap_or(false)
    }
}

//! The one thread that maps, retires and has pages filled; callers never map.
//!
//! It executes the policy's commands strictly in their order. A page is unmapped once the events of its last uses have
//! completed; nothing else is waited for. While an event is pending the mover looks again every 500 us, or every 50 us where
//! somebody waits for a page behind it, or for memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_core::{Bytes, Command, FrameId, PageRef, Serial};
use forebay_device::{Event, Frame, FrameHandle};
use forebay_store::{ReaderPool, Urgency};
use parking_lot::MutexGuard;

use crate::Result;
use crate::books::{FrameBook, VbarBook};
use crate::cache::registered::RegisteredPage;
use crate::computed::is_computed_whole;
use crate::copier::{Copier, PageCopy};
use crate::filler::{self, Fill};
use crate::reader::Reader;
use crate::state::{Shared, State};
use crate::timeline::Activity;
use crate::vbar::Vbar;

/// How often a pending event is looked at while somebody waits for what is behind it, and while nobody does: a look takes the
/// locks of whoever launches work.
const URGENT_POLL: Duration = Duration::from_micros(50);
const EVENT_POLL: Duration = Duration::from_micros(500);
/// How often free memory is looked at, while memory moves and while it does not.
const BUSY_POLL: Duration = Duration::from_millis(10);
const IDLE_POLL: Duration = Duration::from_millis(200);
/// Pages mapped in one go.
const MOST_MAPPED: usize = 16;
/// Frames made in one go, so that their pages are mapped in one go.
const MOST_CREATED: usize = 8;
/// By how much more a budget must be able to rise before it does, at most; on a small device a sixteenth of its memory.
const MOST_RISE: Bytes = Bytes::mib(64);

pub(crate) struct Mover {
    shared: Arc<Shared>,
    readers: Arc<ReaderPool<Reader>>,
    copier: Arc<Copier>,
    /// A budget rises only by at least this, so that it does not follow every small allocation of others.
    rise: Bytes,
    /// What stopped the engine was logged.
    told: bool,
}

/// What the mover took from the queue to do without the lock.
enum Task {
    /// Unmap these pages of one VBAR; the events are given back afterwards.
    Unmap {
        vbar: Arc<Vbar>,
        pages: Range<u32>,
        events: Vec<Arc<Event>>,
    },
    Create {
        frames: Vec<(FrameId, Bytes)>,
    },
    Destroy {
        book: Option<FrameBook>,
    },
    /// Map and fill these pages of one VBAR.
    Map {
        vbar: Arc<Vbar>,
        first: u32,
        backing: Vec<Backing>,
    },
}

/// One page to be mapped.
struct Backing {
    frame: FrameHandle,
    filled: Arc<Event>,
    way: Way,
}

/// How a page's bytes come to it.
enum Way {
    /// The copy engine reads them by itself.
    Registered { from: Arc<RegisteredPage>, urgency: Urgency },
    /// Readers bring them, if anything is read at all.
    Ring { urgency: Urgency, past_cache: bool },
}

impl Mover {
    pub(crate) fn new(shared: Arc<Shared>, readers: Arc<ReaderPool<Reader>>, copier: Arc<Copier>) -> Self {
        let total = shared.device.memory().map_or(Bytes::MAX, |memory| memory.total);
        let rise = MOST_RISE.min(Bytes::new(total.get() / 16));
        Mover { shared, readers, copier, rise, told: false }
    }

    /// Runs until the engine stops and everything is unmapped.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            self.poll_budget(&mut state);
            self.log(&mut state);
            state.land();
            state.take_in_uses();
            if state.is_cache_shared_anew() {
                shared.register.notify_one();
            }
            if !state.stop {
                state.read_ahead();
            }
            match self.take_task(&mut state) {
                Next::Task(task) => {
                    let gone = State::unlocked(&mut state, || self.execute(task));
                    MutexGuard::unlocked(&mut state, || drop(gone));
                }
                Next::EventPending => {
                    let is_demanded =
                        |command: &Command| matches!(command, Command::Map { demanded: true, .. });
                    let is_urgent = state.waiting > 0 || state.queue.iter().any(is_demanded);
                    shared.mover_looks.store(true, Ordering::Release);
                    shared.work.wait_for(&mut state, if is_urgent { URGENT_POLL } else { EVENT_POLL });
                    shared.mover_looks.store(false, Ordering::Release);
                }
                Next::Nothing if state.stop && self.empty_pool(&mut state) => {}
                Next::Nothing if state.stop && self.is_over(&state) => return,
                Next::Nothing => {
                    if state.is_quiet(&shared) && state.registering.has_wanted() {
                        shared.register.notify_one();
                    }
                    shared.changed.notify_all();
                    shared.work.wait_for(&mut state, IDLE_POLL);
                }
            }
        }
    }

    /// Takes what is next in the queue, with what can be done in one go with it.
    fn take_task(&mut self, state: &mut State) -> Next {
        if state.books.fatal.is_some() {
            state.queue.clear();
            self.shared.changed.notify_all();
            return Next::Nothing;
        }
        match state.queue.front().copied() {
            None => Next::Nothing,
            Some(Command::Create { .. }) => Next::Task(Task::Create { frames: Self::take_creates(state) }),
            Some(Command::Destroy { frame, .. }) => {
                state.queue.pop_front();
                Next::Task(Task::Destroy { book: state.books.frames.remove(&frame) })
            }
            Some(Command::Retire { page, .. }) => self.take_retires(state, page),
            Some(Command::Map { page, .. }) => Self::take_maps(state, page),
        }
    }

    /// The first frame, and those behind it that only pages to be mapped stand before: they need no memory that is given
    /// back first.
    fn take_creates(state: &mut State) -> Vec<(FrameId, Bytes)> {
        let mut frames = Vec::new();
        let mut at = 0;
        while let Some(&command) = state.queue.get(at)
            && frames.len() < MOST_CREATED
        {
            match command {
                Command::Create { frame, size } => {
                    state.queue.remove(at);
                    frames.push((frame, size));
                }
                Command::Map { .. } => at += 1,
                Command::Retire { .. } | Command::Destroy { .. } => break,
            }
        }
        frames
    }

    /// The first page, and those behind it in the queue and in address, if their last uses have completed.
    fn take_retires(&mut self, state: &mut State, first: PageRef) -> Next {
        let vbar = Arc::clone(&state.books.vbar(first.vbar).vbar);
        // A page whose mapping failed is retired all the same; there is nothing to unmap then.
        let mapped = state.books.page(first).mapped;
        let (mut events, mut end) = (Vec::new(), first.page.0);
        while let Some(&Command::Retire { page, .. }) = state.queue.front() {
            if page.vbar != first.vbar || page.page.0 != end || state.books.page(page).mapped != mapped {
                break;
            }
            let entry = state.books.page(page);
            match completed(&entry.leaving) {
                Ok(true) => events.append(&mut entry.leaving),
                Ok(false) if end > first.page.0 => break,
                Ok(false) => return Next::EventPending,
                Err(error) => {
                    state.books.lost(error);
                    return Next::EventPending;
                }
            }
            state.queue.pop_front();
            end += 1;
        }
        let start = if mapped { first.page.0 } else { end };
        Next::Task(Task::Unmap { vbar, pages: start..end, events })
    }

    /// The first page, and those behind it in the queue and in address.
    fn take_maps(state: &mut State, first: PageRef) -> Next {
        let vbar = Arc::clone(&state.books.vbar(first.vbar).vbar);
        let mut backing: Vec<Backing> = Vec::new();
        while let Some(&Command::Map { page, frame, serial, demanded }) = state.queue.front() {
            let goes_on = page.vbar == first.vbar && page.page.0 == first.page.0 + backing.len() as u32;
            if !goes_on || backing.len() >= MOST_MAPPED {
                break;
            }
            state.queue.pop_front();
            let Some(book) = state.books.frames.get(&frame) else { continue };
            let (frame_handle, filled) = (book.frame.handle(), Arc::clone(&book.filled));
            let registered = state.books.page(page).registered.clone();
            let urgency = if demanded { Urgency::Urgent } else { Urgency::Ahead };
            let way = match registered {
                _ if is_computed_whole(&vbar, page.page.0) => Way::Ring { urgency, past_cache: false },
                Some(from) => Way::Registered { from, urgency },
                None => Way::Ring { urgency, past_cache: state.is_past_cache(page) },
            };
            backing.push(Backing { frame: frame_handle, filled, way });
            Self::begin_page(state, &vbar, page, frame, serial);
        }
        Next::Task(Task::Map { vbar, first: first.page.0, backing })
    }

    fn begin_page(state: &mut State, vbar: &Vbar, page: PageRef, frame: FrameId, serial: Serial) {
        vbar.serials[page.page.as_usize()].store(serial.0, Ordering::Release);
        state.filling.insert(serial);
        let entry = state.books.page(page);
        (entry.frame, entry.error) = (Some(frame), None);
    }

    /// Does a task without the lock, then books it. Returns what is to be dropped without the lock.
    fn execute(&mut self, task: Task) -> Vec<VbarBook> {
        match task {
            Task::Create { frames } => {
                let began = self.shared.timeline.begin();
                let gone = frames.iter().filter_map(|&(frame, size)| self.create(frame, size)).collect();
                self.shared.timeline.note(Activity::Create, frames.len() as u32, began);
                gone
            }
            Task::Destroy { book } => {
                drop(book);
                self.shared.changed.notify_all();
                Vec::new()
            }
            Task::Unmap { vbar, pages, events } => {
                let (began, first) = (self.shared.timeline.begin(), pages.start);
                let gone = self.unmap(&vbar, pages, events);
                self.shared.timeline.note(Activity::Unmap, first, began);
                gone.into_iter().collect()
            }
            Task::Map { vbar, first, backing } => {
                let began = self.shared.timeline.begin();
                self.map(&vbar, first, &backing);
                self.shared.timeline.note(Activity::Map, first, began);
                Vec::new()
            }
        }
    }

    fn create(&self, id: FrameId, size: Bytes) -> Option<VbarBook> {
        let device = &self.shared.device;
        let made = Frame::new(Arc::clone(device), size)
            .and_then(|frame| Ok(FrameBook { frame, filled: Arc::new(Event::new(Arc::clone(device))?) }));
        let error = match made {
            Ok(book) => {
                self.shared.state.lock().books.frames.insert(id, book);
                return None;
            }
            Err(error) => error,
        };
        tracing::info!(device = %self.shared.id, %error, "a frame could not be made; the budget falls");
        let mut state = self.shared.state.lock();
        if error.is_lost() {
            state.books.lost(error.clone().into());
        }
        // The frame's page comes behind it in the queue.
        let place = state.queue.iter().position(|c| matches!(c, Command::Map { frame, .. } if *frame == id));
        let mut gone = None;
        if let Some(Command::Map { page, .. }) = place.and_then(|place| state.queue.remove(place)) {
            // Without room whoever waits asks again, and finds the new budget.
            state.books.page(page).error = (!error.is_out_of_memory()).then(|| error.into());
            state.policy.create_failed(page);
            gone = state.forget_if_gone(page.vbar);
        }
        drop(state);
        self.shared.changed.notify_all();
        gone
    }

    fn map(&self, vbar: &Arc<Vbar>, first: u32, backing: &[Backing]) {
        let pages = || (first..).zip(backing);
        let mut mapped = 0;
        let mut result: Result<()> = Ok(());
        for (page, backing) in pages() {
            let at = vbar.page_addr(page);
            // SAFETY: the page lies in the VBAR's reservation and is unmapped: the policy had it absent, and its
            // `Retire` was executed before this command. The frame was free likewise.
            let done = unsafe { self.shared.device.map(at, vbar.page_size, backing.frame) };
            if let Err(error) = done {
                result = Err(error.into());
                break;
            }
            mapped += 1;
        }
        if mapped > 0 && result.is_ok() {
            let len = vbar.page_size * u64::from(mapped);
            // SAFETY: these pages were just mapped.
            result =
                unsafe { self.shared.device.allow_access(vbar.page_addr(first), len) }.map_err(Into::into);
        }
        {
            let mut state = self.shared.state.lock();
            let book = state.books.vbar(vbar.id);
            book.mapped += mapped;
            (first..first + mapped).for_each(|page| book.pages[page as usize].mapped = true);
        }
        if let Err(error) = &result
            && error.is_out_of_memory()
        {
            tracing::info!(device = %self.shared.id, %error, "a page could not be mapped; the budget falls");
            let mut state = self.shared.state.lock();
            let less = state.policy.held().saturating_sub(vbar.page_size);
            state.decide(|policy, books, out| policy.set_budget(policy.budget().min(less), books, out));
        }
        for (page, backing) in pages() {
            match &result {
                Err(error) => {
                    // Without room whoever waits asks again, and finds the new budget.
                    let reason = (!error.is_out_of_memory()).then(|| error.clone());
                    filler::finished(&self.shared, vbar, page, Err(reason));
                }
                Ok(()) if vbar.layout.is_none() => filler::finished(&self.shared, vbar, page, Ok(())),
                Ok(()) => {
                    let filled = Arc::clone(&backing.filled);
                    match &backing.way {
                        Way::Registered { from, urgency } => {
                            let (vbar, registered) = (Arc::clone(vbar), Arc::clone(from));
                            self.copier.submit(*urgency, PageCopy { vbar, page, registered, filled });
                        }
                        Way::Ring { urgency, past_cache } => {
                            let (urgency, past_cache) = (*urgency, *past_cache);
                            Fill::start(&self.shared, vbar, page, filled, &self.readers, urgency, past_cache);
                        }
                    }
                }
            }
        }
        // Who waits for a page that was read ahead has it hurried, once it is there to be.
        self.shared.changed.notify_all();
    }

    fn unmap(&self, vbar: &Vbar, pages: Range<u32>, events: Vec<Arc<Event>>) -> Option<VbarBook> {
        let count = pages.end - pages.start;
        let result = match count {
            0 => Ok(()),
            // SAFETY: the pages are mapped and claimed, so nobody pins them any more, and the events after their last
            // uses and fills have completed.
            _ => unsafe {
                self.shared.device.unmap(vbar.page_addr(pages.start), vbar.page_size * u64::from(count))
            },
        };
        let mut state = self.shared.state.lock();
        if let Err(error) = result {
            state.books.lost(error.into());
        }
        // Where nothing was mapped the VBAR may be gone by now.
        if let Some(book) = state.books.vbars.get_mut(&vbar.id) {
            book.mapped -= count;
            pages.for_each(|page| book.pages[page as usize].mapped = false);
        }
        state.books.recycle(events);
        let gone = state.forget_if_gone(vbar.id);
        drop(state);
        self.shared.changed.notify_all();
        gone
    }

    /// Follows what others take and give back.
    fn poll_budget(&mut self, state: &mut MutexGuard<'_, State>) {
        let period = if state.is_settled() { IDLE_POLL } else { BUSY_POLL };
        if !state.is_time_to_look(period) {
            return;
        }
        if let Err(error) = state.follow_memory(&*self.shared.device, self.rise) {
            state.books.warnings.push(format!("free memory is unknown: {error}"));
        }
    }

    /// Logs what happened under the lock.
    fn log(&mut self, state: &mut MutexGuard<'_, State>) {
        let warnings = std::mem::take(&mut state.books.warnings);
        let fatal = state.books.fatal.clone().filter(|_| !std::mem::replace(&mut self.told, true));
        if warnings.is_empty() && fatal.is_none() {
            return;
        }
        MutexGuard::unlocked(state, || {
            let device = self.shared.id;
            warnings.iter().for_each(|warning| tracing::warn!(%device, "{warning}"));
            fatal.iter().for_each(|error| tracing::error!(%device, %error, "the engine stops"));
        });
    }

    /// Before the engine ends: takes all frames that can be had. Whether there were any.
    fn empty_pool(&self, state: &mut State) -> bool {
        state.books.fatal.is_none()
            && state.decide(|policy, books, out| policy.make_room(Bytes::MAX, books, out)) > Bytes::ZERO
    }

    /// Whether nothing is left that could be done before the engine ends.
    fn is_over(&self, state: &State) -> bool {
        state.books.fatal.is_some() || state.is_settled()
    }
}

enum Next {
    Task(Task),
    /// The head of the queue waits for the device.
    EventPending,
    Nothing,
}

fn completed(events: &[Arc<Event>]) -> Result<bool> {
    for event in events {
        if !event.is_complete()? {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.shared.ends_with_panic("its mover thread");
    }
}

//! The thread that registers page cache with the device, so that the copy engine reads it by itself, and gives it back.
//!
//! It works beside everything else: a page that is not registered goes through the ring. It begins when the first pass
//! is over, takes pages in the order of their ranks, so that any share of them is spread evenly, and stops where memory
//! that is really free ends. What the host's memory is wanted for is given back page by page, highest rank first.
//! A driver may let that wait for an idle device: nobody but this thread waits for it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, PageRef, PageState, Rank, VbarId};
use forebay_device::Event;
use parking_lot::MutexGuard;

use crate::ram::Ram;
use crate::registered::{NotRegistered, PagePlan, RegisteredPage};
use crate::state::{Shared, State};
use crate::timeline::Activity;
use crate::vbar::Vbar;

/// How often the host's memory is looked at, while pages are registered and while nothing changes.
const BUSY_POLL: Duration = Duration::from_millis(100);
const IDLE_POLL: Duration = Duration::from_secs(1);
/// Registered memory cannot be reclaimed, so this share of the host's memory, and this much, is left to everyone else.
const LEFT_SHARE: u64 = 10;
const LEFT: Bytes = Bytes::gib(2);
/// Above this percentage of the last ten seconds in which something waited for memory, nothing more is registered.
const PRESSURE: f64 = 10.0;
/// How long memory that is to be given back may wait for a moment in which nothing is in use.
const PATIENCE: Duration = Duration::from_secs(2);
/// Refusals by the device after which it is not asked any more.
const MOST_REFUSALS: u32 = 3;

/// What the state knows of registered page cache.
#[derive(Debug, Default)]
pub(crate) struct Registering {
    /// Pages that were streamed through the ring, by rank.
    wanted: BTreeSet<(Rank, PageRef)>,
    /// Registered pages that nobody copies from any more, to be given back.
    leaving: Vec<Arc<RegisteredPage>>,
    /// The most that may be registered, as set by the application.
    limit: Option<Bytes>,
    /// Bytes registered.
    held: Bytes,
    /// The device does not register, or refused too often.
    off: bool,
}

impl Registering {
    pub(crate) fn new(limit: Option<Bytes>) -> Self {
        Registering { limit, off: limit == Some(Bytes::ZERO), ..Registering::default() }
    }

    /// A streamed page went through the ring.
    pub(crate) fn want(&mut self, rank: Rank, page: PageRef) {
        if !self.off {
            self.wanted.insert((rank, page));
        }
    }

    /// A VBAR closes: none of its pages is wanted, these are given back.
    pub(crate) fn close(&mut self, id: VbarId, pages: impl Iterator<Item = Arc<RegisteredPage>>) {
        self.wanted.retain(|(_, page)| page.vbar != id);
        self.leaving.extend(pages);
    }

    /// Bytes registered.
    pub(crate) fn held(&self) -> Bytes {
        self.held
    }

    /// Sets the most that may be registered; what is over is given back.
    pub(crate) fn set_limit(&mut self, limit: Option<Bytes>) {
        (self.limit, self.off) = (limit, limit == Some(Bytes::ZERO));
        if self.off {
            self.wanted.clear();
        }
    }
}

pub(crate) struct Registrar {
    shared: Arc<Shared>,
    /// Behind the copies that may read what is given back.
    copied: Event,
    /// What may be registered by what is free, and when that was looked at.
    room: Bytes,
    pressed: bool,
    looked: Option<Instant>,
    /// Since when there is more than that.
    over_since: Option<Instant>,
    refusals: u32,
}

impl Registrar {
    pub(crate) fn new(shared: Arc<Shared>) -> crate::Result<Self> {
        let copied = Event::new(Arc::clone(&shared.device))?;
        Ok(Registrar {
            shared,
            copied,
            room: Bytes::ZERO,
            pressed: false,
            looked: None,
            over_since: None,
            refusals: 0,
        })
    }

    /// Runs until the engine stops and nothing is registered.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            if state.stop {
                let pages = state.books.take_registered(|_| true);
                state.registering.leaving.extend(pages);
            }
            if !state.registering.leaving.is_empty() {
                self.give_back(&mut state);
            } else if state.stop {
                return;
            } else if !self.follow_memory(&mut state)
                && !self.register_next(&mut state)
                // Looking at the memory let go of the lock.
                && !state.stop
                && state.registering.leaving.is_empty()
            {
                let is_idle = state.registering.wanted.is_empty() && state.registering.held == Bytes::ZERO;
                match is_idle {
                    true => shared.register.wait(&mut state),
                    false => drop(shared.register.wait_for(&mut state, IDLE_POLL)),
                }
            }
        }
    }

    /// Unregisters what leaves, once the copies that may read it have completed.
    fn give_back(&mut self, state: &mut MutexGuard<'_, State>) {
        let leaving = std::mem::take(&mut state.registering.leaving);
        let bytes: Bytes = leaving.iter().map(|page| page.size()).sum();
        MutexGuard::unlocked(state, || {
            let stream = self.shared.copy.lock();
            // SAFETY: the copy stream lives as long as `shared`.
            let recorded = unsafe { self.copied.record(stream.handle()) };
            drop(stream);
            match recorded.and_then(|()| self.copied.synchronize()) {
                Ok(()) => {
                    let began = self.shared.timeline.begin();
                    drop(leaving);
                    self.shared.timeline.note(Activity::Unregister, 0, began);
                }
                Err(error) => {
                    // Nobody can know whether they are still read.
                    tracing::warn!(device = %self.shared.id, %error, "registered memory could not be given back");
                    std::mem::forget(leaving);
                }
            }
        });
        state.registering.held = state.registering.held.saturating_sub(bytes);
        self.shared.changed.notify_all();
    }

    /// Looks at the host's memory now and then, and gives up what it is wanted for. Whether something leaves.
    fn follow_memory(&mut self, state: &mut MutexGuard<'_, State>) -> bool {
        let period = if state.registering.wanted.is_empty() { IDLE_POLL } else { BUSY_POLL };
        if self.looked.is_none_or(|looked| looked.elapsed() >= period) {
            let ram = MutexGuard::unlocked(state, Ram::read);
            self.looked = Some(Instant::now());
            // A system that does not tell is not pressed for memory by us.
            self.room = ram.map_or(Bytes::ZERO, |ram| {
                let left = LEFT.max(Bytes::new(ram.limit().get() / LEFT_SHARE));
                ram.cache_room().saturating_sub(left)
            });
            self.pressed = ram.is_some_and(|ram| ram.pressure > PRESSURE);
        }
        let limit = state.registering.limit.unwrap_or(Bytes::MAX);
        let over = state.registering.held.saturating_sub(self.room.min(limit));
        if over == Bytes::ZERO {
            self.over_since = None;
            return false;
        }
        let since = *self.over_since.get_or_insert_with(Instant::now);
        if !state.is_quiet(&self.shared) && since.elapsed() < PATIENCE && state.registering.held <= limit {
            return false;
        }
        state.take_registered_beyond(over)
    }

    /// Registers the page that is wanted most. Whether there was one, and room for it.
    fn register_next(&mut self, state: &mut MutexGuard<'_, State>) -> bool {
        if self.pressed {
            return false;
        }
        let room = self.room.min(state.registering.limit.unwrap_or(Bytes::MAX));
        let Some((rank, page)) = state.registering.wanted.pop_first() else { return false };
        let Some((vbar, plan)) = state.registrable(page) else { return true };
        if state.registering.held + plan.size() > room {
            state.registering.wanted.insert((rank, page));
            return false;
        }
        let made = MutexGuard::unlocked(state, || {
            let began = self.shared.timeline.begin();
            let made = RegisteredPage::new(&self.shared.device, &plan).map(Arc::new);
            self.shared.timeline.note(Activity::Register, page.page.0, began);
            made
        });
        match made {
            Ok(made) => {
                state.registering.held += made.size();
                // The model may have been detached meanwhile.
                match state.is_open(vbar.id) {
                    true => state.books.page(page).registered = Some(made),
                    false => state.registering.leaving.push(made),
                }
            }
            Err(error) => {
                let refused = matches!(&error, NotRegistered::Device(_));
                self.refusals += u32::from(refused);
                let gives_up = match &error {
                    NotRegistered::Device(error) => error.is_unsupported() || self.refusals >= MOST_REFUSALS,
                    NotRegistered::File(_) => false,
                };
                if gives_up {
                    state.registering.set_limit(Some(Bytes::ZERO));
                } else if state.is_open(vbar.id) {
                    state.books.page(page).stays_in_ring = true;
                }
                MutexGuard::unlocked(state, || {
                    tracing::debug!(device = %self.shared.id, model = %vbar.name, %error, gives_up, "page cache was not registered");
                });
            }
        }
        true
    }
}

impl State {
    /// A page was filled, from the ring unless it is registered. Whether the registrar has something to do: it leaves a
    /// model alone until its first pass is over, which shows when a page is filled once more.
    pub(crate) fn went_through_ring(&mut self, page: PageRef) -> bool {
        if self.books.page(page).registered.is_some() || self.books.page(page).stays_in_ring {
            return false;
        }
        let again = std::mem::replace(&mut self.books.page(page).was_filled, true);
        if !self.policy.is_kept(page) {
            let number = page.page.0;
            self.books.vbar(page.vbar).through_ring.push(number);
        }
        again && self.first_pass_is_over(page.vbar)
    }

    /// Hands the pages that went through the ring to the registrar. Whether there are any.
    pub(crate) fn first_pass_is_over(&mut self, id: VbarId) -> bool {
        let book = self.books.vbar(id);
        let vbar = Arc::clone(&book.vbar);
        for page in std::mem::take(&mut book.through_ring) {
            let page = vbar.page_ref(page);
            self.registering.want(self.policy.rank(page), page);
        }
        !self.registering.wanted.is_empty()
    }

    /// Nothing is going on, so every pass is over. Whether the registrar has something to do.
    pub(crate) fn has_unregistered(&mut self) -> bool {
        let open = self.books.vbars.iter().filter(|(_, book)| !book.closing && !book.through_ring.is_empty());
        let open: Vec<VbarId> = open.map(|(id, _)| *id).collect();
        open.into_iter().fold(false, |any, id| self.first_pass_is_over(id) || any)
    }

    /// What registering a page takes, if it is still streamed and its bytes lie in files, not too scattered.
    fn registrable(&mut self, page: PageRef) -> Option<(Arc<Vbar>, PagePlan)> {
        if !self.is_open(page.vbar) || self.policy.is_kept(page) {
            return None;
        }
        let vbar = Arc::clone(&self.books.vbar(page.vbar).vbar);
        if self.books.page(page).registered.is_some() {
            return None;
        }
        let plan = PagePlan::of(&vbar.layout.as_ref()?.segments[page.page.as_usize()]);
        self.books.page(page).stays_in_ring = plan.is_none();
        plan.map(|plan| (vbar, plan))
    }

    /// Takes `bytes` of registered pages out of the books: those that are resident, then those of the highest ranks.
    fn take_registered_beyond(&mut self, bytes: Bytes) -> bool {
        let policy = &self.policy;
        let mut held: Vec<(bool, Rank, PageRef, Bytes)> = Vec::new();
        for (id, book) in &self.books.vbars {
            for (number, entry) in (0..).zip(&book.pages) {
                let Some(registered) = &entry.registered else { continue };
                let page = PageRef { vbar: *id, ..book.vbar.page_ref(number) };
                let is_resident = policy.state(page) == PageState::Resident;
                held.push((is_resident, policy.rank(page), page, registered.size()));
            }
        }
        held.sort_unstable_by(|a, b| b.cmp(a));
        let mut taken = Bytes::ZERO;
        for (_, _, page, size) in held {
            if taken >= bytes {
                break;
            }
            taken += size;
            let registered = self.books.page(page).registered.take();
            self.registering.leaving.extend(registered);
        }
        taken > Bytes::ZERO
    }
}

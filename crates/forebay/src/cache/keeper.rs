//! The thread that registers page cache with the device, so that the copy engine reads it by itself, gives it back, and
//! divides the page cache where it is too small for all weights.
//!
//! Registering lets nobody else call the driver. So it is done when nothing goes on, as far as the engine knows, with a rest
//! after each page, for whoever calls the driver all the same; where nothing is ever quiet, for pages that are
//! read so often that it pays. It stops where memory that is really free ends. What the host's memory is wanted for is given
//! back page by page: a driver may let that wait for an idle device, and nobody but this thread waits for it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, PageRef};
use forebay_device::Event;
use parking_lot::MutexGuard;

use super::ram::Ram;
use super::registered::{NotRegistered, PagePlan, RegisteredPage};
use super::registering::MOST_REFUSALS;
use crate::state::{Shared, State};
use crate::timeline::Activity;
use crate::vbar::Vbar;

/// How often the host's memory is looked at, while something is in use.
const PERIOD: Duration = Duration::from_millis(500);
/// How often pages that are still copied from are looked at.
const BUSY_POLL: Duration = Duration::from_millis(1);
/// Registered memory cannot be reclaimed, so this share of the host's memory, and this much, is left to everyone else.
const LEFT_SHARE: u64 = 10;
const LEFT: Bytes = Bytes::gib(2);
/// Above this percentage of the last ten seconds in which something waited for memory, nothing more is registered.
const PRESSURE: f64 = 10.0;
/// How long memory that is to be given back may wait for a moment in which nothing is in use.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long nothing has gone on when it is quiet: longer than between two steps of a sampler (10 ms), and in a first pass longer
/// than the driver's loading of kernels, which waits for each page.
const QUIET: Duration = Duration::from_millis(50);
const QUIET_IN_FIRST_PASS: Duration = Duration::from_secs(1);
/// How many times as long as registering a page took nothing is registered. Without a rest a pass took 1.65 times as long while
/// its pages were registered (16 GiB of 25 GB; 2026-11-28-h100-third), and between two steps of ComfyUI's, where nothing is used
/// and the driver is called some seventy times, 45 ms went by instead of 7. Of Flux in 12 GiB all was registered after four, seven and
/// eight steps with one rest, two and three, and twenty steps took 6.2, 5.9 and 6.1 s together; in pieces of 4 MiB with one rest 7.1
/// (2026-11-29-h200-registering).
const REST: u32 = 2;
/// How often the end of copies is asked for.
const MOST_TRIES: u32 = 10;
/// Pages given back, or given up in the page cache, in one go.
const AT_ONCE: usize = 8;

pub(crate) struct Keeper {
    shared: Arc<Shared>,
    /// Behind the copies that may read what is given back.
    copied: Event,
    looked: Option<Instant>,
    /// Since when more is registered than is free.
    over_since: Option<Instant>,
    /// Since when it is quiet, and what had been decided by then.
    quiet: Option<(Instant, u64)>,
    /// Nothing is registered before.
    rests_until: Instant,
    refusals: u32,
}

impl Keeper {
    pub(crate) fn new(shared: Arc<Shared>) -> crate::Result<Self> {
        let copied = Event::new(Arc::clone(&shared.device))?;
        let rests_until = Instant::now();
        Ok(Keeper { shared, copied, looked: None, over_since: None, quiet: None, rests_until, refusals: 0 })
    }

    /// Runs until the engine stops and nothing is registered.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            if state.stop {
                let pages = state.books.take_registered();
                state.registering.let_go(pages);
                state.registering.end();
            }
            if state.registering.has_leaving() {
                self.give_back(&mut state);
            } else if state.stop {
                if !state.registering.is_ending() {
                    return;
                }
                shared.register.wait_for(&mut state, BUSY_POLL);
            } else if !self.look_at_memory(&mut state)
                && !Self::leave_cache(&mut state)
                && !self.let_expire(&mut state)
                && !self.register_part(&mut state)
                && !self.register_next(&mut state)
            {
                // Nothing let go of the lock since the state was looked at.
                match state.books.vbars.is_empty() && !state.registering.has_rest() {
                    true => shared.register.wait(&mut state),
                    false => {
                        let awaits_quiet = self.quiet.is_some() && state.registering.has_wanted();
                        let pause = if awaits_quiet { QUIET } else { PERIOD };
                        shared.register.wait_for(&mut state, pause);
                    }
                }
            }
        }
    }

    /// Tells the kernel of some pages that have no place in its cache any more. Whether there were any.
    fn leave_cache(state: &mut MutexGuard<'_, State>) -> bool {
        let Some(given_up) = state.take_leaving_cache(AT_ONCE) else { return false };
        MutexGuard::unlocked(state, || given_up.leave_cache());
        true
    }

    /// Lets go of what nobody came back for, when nothing goes on. Whether there was anything.
    fn let_expire(&self, state: &mut MutexGuard<'_, State>) -> bool {
        if state.is_quiet(&self.shared) {
            state.registering.expire(AT_ONCE);
        }
        state.registering.has_leaving()
    }

    /// Registers a part of a file that the application asks for again soon. Whether there was one.
    fn register_part(&self, state: &mut MutexGuard<'_, State>) -> bool {
        let Some(part) = state.registering.take_wanted_part() else { return false };
        self.shared.register_part(state, &part);
        true
    }

    /// Registers a page that goes through the ring again and again, if it is time. Whether there was one.
    fn register_next(&mut self, state: &mut MutexGuard<'_, State>) -> bool {
        let is_quiet = self.is_quiet_for_long(state);
        if !is_quiet && state.is_first_pass() {
            return false;
        }
        let Some((rank, page)) = state.registering.take_wanted(is_quiet) else { return false };
        if !state.is_still_wanted(page) {
            return true;
        }
        let Some(plan) = state.plan_of(page) else { return true };
        if !state.registering.has_room_for(plan.size()) {
            state.registering.put_back((rank, page));
            self.quiet = None;
            return false;
        }
        let vbar = Arc::clone(&state.books.vbar(page.vbar).vbar);
        self.register(state, &vbar, page, &plan);
        true
    }

    /// Whether nothing has gone on for long enough, as far as this thread looked.
    fn is_quiet_for_long(&mut self, state: &State) -> bool {
        if !state.is_quiet(&self.shared) {
            self.quiet = None;
            return false;
        }
        match self.quiet {
            Some((since, decided)) if decided == state.decided() => {
                let long = if state.is_first_pass() { QUIET_IN_FIRST_PASS } else { QUIET };
                since.elapsed() >= long
            }
            _ => {
                self.quiet = Some((Instant::now(), state.decided()));
                false
            }
        }
    }

    fn register(&mut self, state: &mut MutexGuard<'_, State>, vbar: &Vbar, page: PageRef, plan: &PagePlan) {
        match MutexGuard::unlocked(state, || self.registered_page(page, plan)) {
            Ok(made) => {
                let made = Arc::new(made);
                state.registering.registered(made.size());
                // The model may have been detached meanwhile.
                match state.is_open(page.vbar) {
                    true => {
                        let earlier = state.books.page(page).registered.replace(made);
                        state.registering.let_go(earlier);
                    }
                    false => state.registering.let_go([made]),
                }
            }
            Err(error) => {
                self.refusals += u32::from(error.is_the_devices());
                let gives_up = error.is_for_good() || self.refusals >= MOST_REFUSALS;
                if gives_up {
                    state.registering.set_limit(Some(Bytes::ZERO));
                } else if state.is_open(page.vbar) {
                    state.books.page(page).stays_in_ring = true;
                }
                MutexGuard::unlocked(state, || {
                    let device = self.shared.id;
                    tracing::debug!(%device, model = %vbar.name, %error, gives_up, "page cache was not registered");
                });
            }
        }
    }

    /// Rests while the page is mapped and populated, which keeps nobody from calling the driver, then registers it.
    fn registered_page(&mut self, page: PageRef, plan: &PagePlan) -> Result<RegisteredPage, NotRegistered> {
        let mapped = plan.map()?;
        thread::sleep(self.rests_until.saturating_duration_since(Instant::now()));
        let began = Instant::now();
        let made = mapped.register(&self.shared.device)?;
        self.shared.timeline.note(Activity::Register, page.page.0, Some(began));
        self.rests_until = Instant::now() + began.elapsed() * REST;
        Ok(made)
    }

    /// Unregisters some of what leaves, once the copies that may read it have completed.
    fn give_back(&mut self, state: &mut MutexGuard<'_, State>) {
        let leaving = state.registering.take_leaving(AT_ONCE);
        if leaving.is_empty() {
            self.shared.register.wait_for(state, BUSY_POLL);
            return;
        }
        let bytes: Bytes = leaving.iter().map(RegisteredPage::size).sum();
        MutexGuard::unlocked(state, || {
            match self.wait_for_copies() {
                Ok(()) => {
                    let began = self.shared.timeline.begin();
                    leaving.into_iter().for_each(RegisteredPage::give_back);
                    self.shared.timeline.note(Activity::Unregister, 0, began);
                }
                Err(error) => {
                    // Nobody can know whether they are still read.
                    tracing::warn!(device = %self.shared.id, %error, "registered memory could not be given back");
                    std::mem::forget(leaving);
                }
            }
        });
        state.registering.given_back(bytes);
        self.shared.changed.notify_all();
    }

    /// Waits until all copies that are enqueued by now have completed, those of parts in whatever streams they are. What the device
    /// refuses is tried again: what may still be read can never be given back.
    fn wait_for_copies(&self) -> forebay_device::Result<()> {
        let wait = || {
            let stream = self.shared.copy.lock();
            // SAFETY: the copy stream lives as long as `shared`.
            let recorded = unsafe { self.copied.record(stream.handle()) };
            drop(stream);
            recorded.and_then(|()| self.copied.synchronize())?;
            self.shared.part_copies.wait()
        };
        for _ in 1..MOST_TRIES {
            match wait() {
                Err(error) if !error.is_lost() => thread::sleep(BUSY_POLL),
                ended => return ended,
            }
        }
        wait()
    }

    /// Looks at the host's memory when it is time, shares the page cache, and lets go of what the memory is wanted for.
    /// Whether anything was done.
    fn look_at_memory(&mut self, state: &mut MutexGuard<'_, State>) -> bool {
        let is_time =
            self.looked.is_none_or(|looked| looked.elapsed() >= PERIOD) || state.is_cache_shared_anew();
        if is_time {
            let ram = MutexGuard::unlocked(state, Ram::read);
            self.looked = Some(Instant::now());
            // Where the system does not tell, nothing is registered, and everything read through the page cache.
            let room = ram.map_or(Bytes::ZERO, registrable);
            let is_pressed = ram.is_some_and(|ram| ram.pressure > PRESSURE);
            let most = if is_pressed { state.registering.held() } else { Bytes::MAX };
            state.registering.set_room(room.min(most));
            let most = self.shared.page_cache.unwrap_or(Bytes::MAX);
            let held = state.registering.held();
            state.share_cache(ram.map_or(most, |ram| ram.unmapped_room(held).min(most)));
        }
        let (over_limit, over_room) = state.registering.over();
        if over_room == Bytes::ZERO {
            self.over_since = None;
        }
        let waits = over_room > Bytes::ZERO
            && !state.is_quiet(&self.shared)
            && self.over_since.get_or_insert_with(Instant::now).elapsed() < PATIENCE;
        let over = if waits { over_limit } else { over_limit.max(over_room) };
        if over > Bytes::ZERO {
            state.let_go_of(over);
        }
        is_time || state.registering.has_leaving()
    }
}

/// What may be registered by what is free.
fn registrable(ram: Ram) -> Bytes {
    ram.cache_room().saturating_sub(LEFT.max(Bytes::new(ram.limit().get() / LEFT_SHARE)))
}

impl Drop for Keeper {
    /// A keeper that panicked takes the engine with it, instead of leaving callers waiting.
    fn drop(&mut self) {
        self.shared.ends_with_panic("its page cache thread");
    }
}

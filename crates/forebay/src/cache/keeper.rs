//! The thread that registers page cache with the device, so that the copy engine reads it by itself, gives it back, and
//! divides the page cache where it is too small for all weights.
//!
//! Registering takes longer than copying and holds the driver up meanwhile, so it is done when nothing else goes on, as far
//! as the engine knows: the application may still call the driver all the time. A page that went through the ring so often that
//! it pays is registered in place of that; after a model's first pass any page is where readers do not keep up with the link.
//! Pages are registered one at a time, each with a rest after it. It stops where memory that is really free ends. What the
//! host's memory is wanted for is given back page by page: a driver may let that wait for an idle device, and nobody but this
//! thread waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, PageRef};
use forebay_device::Event;
use forebay_store::{ReaderPool, Urgency};
use parking_lot::MutexGuard;

use super::ram::Ram;
use super::registered::{NotRegistered, PagePlan, RegisteredPage};
use super::registering::Job;
use crate::filler::{self, Fill};
use crate::reader::Reader;
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
/// Refusals by the device after which it is not asked any more.
const MOST_REFUSALS: u32 = 3;
/// Pages given back, or given up in the page cache, in one go.
const AT_ONCE: usize = 8;

pub(crate) struct Keeper {
    shared: Arc<Shared>,
    readers: Arc<ReaderPool<Reader>>,
    /// Behind the copies that may read what is given back.
    copied: Event,
    looked: Option<Instant>,
    /// Since when more is registered than is free.
    over_since: Option<Instant>,
    refusals: u32,
}

impl Keeper {
    pub(crate) fn new(shared: Arc<Shared>, readers: Arc<ReaderPool<Reader>>) -> crate::Result<Self> {
        let copied = Event::new(Arc::clone(&shared.device))?;
        Ok(Keeper { shared, readers, copied, looked: None, over_since: None, refusals: 0 })
    }

    /// Runs until the engine stops and nothing is registered.
    pub(crate) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state.lock();
        loop {
            if state.stop {
                let pages = state.books.take_registered();
                state.registering.let_go(pages);
                state.registering.drop_kept();
            }
            if let Some(job) = state.registering.take_job() {
                self.run_job(&mut state, job);
            } else if state.registering.has_leaving() {
                self.give_back(&mut state);
            } else if state.stop && !state.registering.expects_job() {
                return;
            } else if !self.look_at_memory(&mut state)
                && !Self::leave_cache(&mut state)
                && !self.use_quiet(&mut state)
            {
                // Nothing let go of the lock since the state was looked at.
                match state.books.vbars.is_empty() && !state.registering.has_rest() {
                    true => shared.register.wait(&mut state),
                    false => {
                        let pause = Self::pause(&state, &shared);
                        shared.register.wait_for(&mut state, pause);
                    }
                }
            }
        }
    }

    /// Registers and fills a page, or has it filled through the ring after all.
    fn run_job(&mut self, state: &mut MutexGuard<'_, State>, Job { vbar, page, filled }: Job) {
        let plan = state.plan_of(vbar.page_ref(page));
        let plan = plan.filter(|plan| state.registering.has_room_for(plan.size()));
        let registered = plan.and_then(|plan| self.register(state, &vbar, vbar.page_ref(page), &plan));
        MutexGuard::unlocked(state, || match registered {
            Some(registered) => {
                filler::fill_directly(&self.shared, &vbar, page, &registered, &filled, None);
            }
            None => {
                Fill::start(&self.shared, &vbar, page, filled, &self.readers, Urgency::Urgent, false);
            }
        });
        state.registering.job_done();
    }

    /// Tells the kernel of some pages that have no place in its cache any more. Whether there were any.
    fn leave_cache(state: &mut MutexGuard<'_, State>) -> bool {
        let Some(given_up) = state.take_leaving_cache(AT_ONCE) else { return false };
        MutexGuard::unlocked(state, || given_up.leave_cache());
        true
    }

    /// Does what is better done when nothing goes on. Whether there was anything.
    fn use_quiet(&mut self, state: &mut MutexGuard<'_, State>) -> bool {
        if !state.is_quiet(&self.shared) {
            return false;
        }
        state.registering.expire(AT_ONCE);
        if state.registering.has_leaving() {
            return true;
        }
        if state.registering.rest().is_some() {
            return false;
        }
        let Some((rank, page)) = state.registering.take_wanted() else { return false };
        if !state.is_still_wanted(page) {
            return true;
        }
        let Some(plan) = state.plan_of(page) else { return true };
        if !state.registering.has_room_for(plan.size()) {
            state.registering.put_back((rank, page));
            return false;
        }
        let vbar = Arc::clone(&state.books.vbar(page.vbar).vbar);
        self.register(state, &vbar, page, &plan);
        true
    }

    /// How long there is nothing to do unless somebody calls.
    fn pause(state: &State, shared: &Shared) -> Duration {
        let rest = state.registering.rest().filter(|_| state.is_quiet(shared));
        rest.map_or(PERIOD, |rest| rest.min(PERIOD))
    }

    fn register(
        &mut self,
        state: &mut MutexGuard<'_, State>,
        vbar: &Vbar,
        page: PageRef,
        plan: &PagePlan,
    ) -> Option<Arc<RegisteredPage>> {
        let began = Instant::now();
        let made = MutexGuard::unlocked(state, || {
            let began = self.shared.timeline.begin();
            let made = RegisteredPage::new(&self.shared.device, plan).map(Arc::new);
            self.shared.timeline.note(Activity::Register, page.page.0, began);
            made
        });
        state.registering.rest_after(began.elapsed());
        match made {
            Ok(made) => {
                state.registering.registered(made.size());
                // The model may have been detached meanwhile.
                match state.is_open(page.vbar) {
                    true => {
                        let earlier = state.books.page(page).registered.replace(Arc::clone(&made));
                        state.registering.let_go(earlier);
                    }
                    false => state.registering.let_go([Arc::clone(&made)]),
                }
                Some(made)
            }
            Err(error) => {
                self.refusals += u32::from(matches!(&error, NotRegistered::Device(_)));
                let gives_up = match &error {
                    NotRegistered::Device(error) => error.is_unsupported() || self.refusals >= MOST_REFUSALS,
                    NotRegistered::File(_) => false,
                };
                if gives_up {
                    state.registering.set_limit(Some(Bytes::ZERO));
                } else if state.is_open(page.vbar) {
                    state.books.page(page).stays_in_ring = true;
                }
                MutexGuard::unlocked(state, || {
                    let device = self.shared.id;
                    tracing::debug!(%device, model = %vbar.name, %error, gives_up, "page cache was not registered");
                });
                None
            }
        }
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
        state.registering.given_back(bytes);
        self.shared.changed.notify_all();
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

//! The engine's one lock and what is under it.
//!
//! Lock order: the state lock, then a VBAR's [`KnownStreams`](crate::streams::KnownStreams) or the queue of
//! [`Copies`](crate::copier::Copies), then nothing. The copy lock ([`Shared::copy`]) is never taken together with it; a VBAR's
//! [patches](crate::patches) are a leaf under that. Under the state lock nobody waits for the device, calls Python, logs, reads
//! a source, maps or unmaps; recording and querying events is allowed, as neither waits.

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use forebay_core::{Bytes, Command, PageRef, Policy, Serial, VbarId};
use forebay_device::{Device, DeviceId, Stream};
use parking_lot::{Condvar, Mutex, MutexGuard};
use smallvec::SmallVec;

use crate::books::{Books, VbarBook};
use crate::cache::registering::Registering;
use crate::computed::Computing;
use crate::config::{EngineConfig, RingConfig};
use crate::copier::Copies;
use crate::copy_ends::CopyEnds;
use crate::giving_way::GivesWay;
use crate::room::Squeezed;
use crate::timeline::Timeline;
use crate::vbar::{Completion, Vbar};
use crate::{EngineError, Result};

/// How much of the device the engine may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// This many bytes of frames.
    Fixed(Bytes),
    /// Everything that is free, but for this many bytes, which are kept free for everyone else.
    Headroom(Bytes),
}

/// How long the budget must be able to rise by a little before it does: others take and give small amounts all the time.
const CALM: Duration = Duration::from_secs(1);

/// Bytes read ahead that are not filled yet: 10 ms of the link.
const MOST_UNDER_WAY: Bytes = Bytes::mib(512);

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
    /// The mover looks again soon by itself, and can do nothing before. Set under the state lock.
    pub(crate) mover_looks: AtomicBool,
    /// The cache's keeper has something to do.
    pub(crate) register: Condvar,
    /// The copy stream. Copies and the events behind them are enqueued under this lock, so that an event covers its
    /// copies.
    pub(crate) copy: Mutex<Stream>,
    /// What is done to pages behind their copies, and not by their users. Enqueued under the copy lock, too.
    pub(crate) patching: Stream,
    pub(crate) computing: Computing,
    pub(crate) copies: Copies,
    /// Of registered parts of files that the application asks for by itself.
    pub(crate) part_copies: CopyEnds,
    /// Bytes of pages that are pinned as long as their model is attached.
    pub(crate) reserved: AtomicU64,
    /// Operations that hold weights.
    pub(crate) operations: AtomicUsize,
    /// Exported tensors that hold weights.
    pub(crate) views: AtomicUsize,
    /// A [`Squeeze`](crate::Squeeze) lives. Changes under the state lock.
    pub(crate) is_squeezed: AtomicBool,
    pub(crate) ring: AtomicU64,
    pub(crate) ring_config: RingConfig,
    pub(crate) gives_way: GivesWay,
    /// The most that the page cache may hold of the weights, as set by the application.
    pub(crate) page_cache: Option<Bytes>,
    pub(crate) timeline: Timeline,
}

/// What is under the lock.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) policy: Policy,
    pub(crate) books: Books,
    pub(crate) queue: VecDeque<Command>,
    /// Filled pages whose copies were not complete when last looked at, oldest first.
    pub(crate) landing: VecDeque<PageRef>,
    pub(crate) budget: Budget,
    /// Of the headroom, what the engine uses itself for a while.
    of_headroom: Bytes,
    pub(crate) registering: Registering,
    /// Commands that were ever queued, and the serial of the latest page among them.
    decided: u64,
    newest: Serial,
    /// Commands that were ever finished, in their order.
    done: u64,
    /// Fills on their way.
    pub(crate) filling: BTreeSet<Serial>,
    /// Commands taken from the queue and not finished.
    executing: usize,
    pub(crate) stop: bool,
    /// When the device's memory is to be looked at the next time.
    pub(crate) look_after: Instant,
    /// Calls that wait for memory to be free.
    pub(crate) making_room: usize,
    /// Those among them that need all that can leave.
    pub(crate) emptying: usize,
    /// Since when the budget could be higher by a little, and what it could have been all that time.
    offer: Option<(Instant, Bytes)>,
    /// What the budget may not rise beyond, while somebody runs with as little memory for weights as can be.
    pub(crate) squeezed: Option<Squeezed>,
    /// Demands that wait for memory.
    pub(crate) waiting: usize,
    /// Leases that are recalled and not returned yet.
    pub(crate) recalled: usize,
    /// The VBAR that came first when the page cache was shared.
    pub(crate) cache_shared_for: Option<VbarId>,
    /// Pages that lost their place in the page cache, and may be in it still.
    pub(crate) leaving_cache: VecDeque<PageRef>,
    scratch: Vec<Command>,
}

impl Shared {
    pub(crate) fn new(device: Arc<dyn Device>, config: EngineConfig) -> Result<Self> {
        let copy = Stream::new(Arc::clone(&device))?;
        let patching = Stream::new(Arc::clone(&device))?;
        let gives_way = GivesWay::new(Arc::clone(&device));
        let mut state = State {
            policy: Policy::new(Bytes::ZERO),
            books: Books::new(Arc::clone(&device)),
            queue: VecDeque::new(),
            landing: VecDeque::new(),
            budget: config.budget,
            of_headroom: Bytes::ZERO,
            registering: Registering::new(config.registered),
            decided: 0,
            newest: Serial(0),
            done: 0,
            filling: BTreeSet::new(),
            executing: 0,
            stop: false,
            look_after: Instant::now(),
            making_room: 0,
            offer: None,
            emptying: 0,
            squeezed: None,
            waiting: 0,
            recalled: 0,
            cache_shared_for: None,
            leaving_cache: VecDeque::new(),
            scratch: Vec::new(),
        };
        state.policy = Policy::new(state.allowed(config.budget, &*device)?);
        Ok(Shared {
            id: device.id(),
            state: Mutex::new(state),
            device,
            changed: Condvar::new(),
            work: Condvar::new(),
            mover_looks: AtomicBool::new(false),
            register: Condvar::new(),
            copy: Mutex::new(copy),
            patching,
            computing: Computing::default(),
            copies: Copies::default(),
            part_copies: CopyEnds::default(),
            reserved: AtomicU64::new(0),
            operations: AtomicUsize::new(0),
            views: AtomicUsize::new(0),
            is_squeezed: AtomicBool::new(false),
            ring: AtomicU64::new(0),
            ring_config: config.ring,
            gives_way,
            page_cache: config.page_cache,
            timeline: Timeline::new(),
        })
    }

    pub(crate) fn reserved(&self) -> Bytes {
        Bytes::new(self.reserved.load(Ordering::Acquire))
    }

    /// Takes bytes of the device's memory from the headroom, half of it at most, and not from the weights.
    pub(crate) fn take_of_headroom(self: &Arc<Self>, bytes: Bytes) -> OfHeadroom {
        self.state.lock().of_headroom += bytes;
        OfHeadroom { shared: Arc::clone(self), bytes }
    }
}

/// See [`Shared::take_of_headroom`].
#[derive(Debug)]
pub(crate) struct OfHeadroom {
    shared: Arc<Shared>,
    bytes: Bytes,
}

impl Drop for OfHeadroom {
    fn drop(&mut self) {
        self.shared.state.lock().of_headroom -= self.bytes;
    }
}

/// A point in the order of decisions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SoFar {
    commands: u64,
    fills: Serial,
}

impl Shared {
    /// The error of an engine that ended.
    pub(crate) fn shut_down(&self) -> EngineError {
        let reason = "it was shut down, as at the end of a process".to_owned();
        EngineError::Stopped { device: self.id, reason }
    }

    /// To be called as a thread of the engine ends: one that panicked takes the engine with it, instead of leaving callers
    /// waiting.
    pub(crate) fn ends_with_panic(&self, thread: &str) {
        if std::thread::panicking() {
            let reason = format!("{thread} panicked; see the log");
            let error = EngineError::Stopped { device: self.id, reason };
            tracing::error!(%error, "the engine stops");
            // The panic may have happened under the lock, which parking_lot releases without poisoning.
            self.state.lock().books.lost(error);
            self.changed.notify_all();
        }
    }
}

impl State {
    /// Runs a policy event and queues the commands it gives.
    pub(crate) fn decide<T>(
        &mut self,
        event: impl FnOnce(&mut Policy, &mut Books, &mut Vec<Command>) -> T,
    ) -> T {
        let answer = event(&mut self.policy, &mut self.books, &mut self.scratch);
        self.books.claimed().for_each(|page| self.registering.left(page));
        self.books.leave();
        while let Some(id) = self.policy.take_recall() {
            if let Some(lent) = self.books.vbar(id).lent.clone() {
                self.recall(&lent);
            }
        }
        for command in self.scratch.drain(..) {
            if let Command::Map { serial, .. } = command {
                self.newest = serial;
            }
            self.decided += 1;
            self.queue.push_back(command);
        }
        answer
    }

    /// Runs a part of the mover's work without the lock.
    pub(crate) fn unlocked<T>(state: &mut MutexGuard<'_, State>, work: impl FnOnce() -> T) -> T {
        state.executing += 1;
        let result = MutexGuard::unlocked(state, work);
        state.executing -= 1;
        state.done = state.decided - state.queue.len() as u64;
        result
    }

    /// How many commands were decided.
    pub(crate) fn decided(&self) -> u64 {
        self.decided
    }

    /// All that is decided by now.
    pub(crate) fn so_far(&self) -> SoFar {
        SoFar { commands: self.decided, fills: self.newest }
    }

    /// Whether all that was decided by then is done, whatever was decided since.
    pub(crate) fn is_done(&self, then: SoFar) -> bool {
        self.done >= then.commands && self.filling.first().is_none_or(|oldest| *oldest > then.fills)
    }

    /// Fails if the device or a thread of the engine is lost.
    pub(crate) fn check(&self) -> Result<()> {
        match &self.books.fatal {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Takes in what was used since the last call: the schedules learn, planned uses are ticked off, and the policy is told.
    pub(crate) fn take_in_uses(&mut self) {
        let policy = &mut self.policy;
        let mut used: SmallVec<[(VbarId, u32); 4]> = SmallVec::new();
        for (id, book) in &mut self.books.vbars {
            let Some(layout) = &book.vbar.layout else { continue };
            let unplan = |policy: &mut Policy, number: u32| {
                layout.scheduled_pages(number).for_each(|page| policy.unplan(book.vbar.page_ref(page)));
            };
            let (schedule, tail) = (&mut book.schedule, &mut book.trace_tail);
            let before = *tail;
            book.vbar.trace.drain(tail, |number| {
                if schedule.used(number, |dropped| unplan(policy, dropped)) {
                    unplan(policy, number);
                }
            });
            let passes_as_lent = book.vbar.passes_as_lent.swap(0, Ordering::AcqRel);
            let uses = *tail - before + u64::from(passes_as_lent) * layout.scheduled.len() as u64;
            book.uses += uses;
            if (uses > 0 || passes_as_lent > 0) && book.is_open() {
                book.started = true;
                used.push((*id, u32::try_from(uses).unwrap_or(u32::MAX)));
            }
        }
        // In which order is not known, but what was in use is used up first, and the others have their turns as before.
        let in_use = policy.in_use();
        used.sort_by_key(|(id, _)| {
            let place = policy.priorities().position(|other| other == *id);
            (in_use != Some(*id), Reverse(place))
        });
        used.into_iter().for_each(|(id, uses)| policy.touch(id, uses));
    }

    /// Reads ahead for the model in use, as far as frames may be taken for it.
    pub(crate) fn read_ahead(&mut self) {
        // What a demand gave back would be taken before it asks again, and what is being filled cannot leave.
        if self.waiting > 0 || self.emptying > 0 || self.squeezed.is_some() {
            return;
        }
        let Some(id) = self.policy.in_use() else { return };
        let Some(book) = self.books.vbars.get(&id) else { return };
        let vbar = Arc::clone(&book.vbar);
        let Some(layout) = vbar.layout.as_ref().filter(|_| book.started && book.is_open()) else { return };
        if self.policy.lost_plans(id) {
            self.take_plans_back(&vbar);
        }
        while self.under_way() < most_under_way(vbar.page_size)
            && let Some(number) = self.books.vbar(id).schedule.plan_next()
        {
            let pages = layout.scheduled_pages(number);
            let planned = pages.clone().take_while(|&page| {
                self.decide(|policy, books, out| policy.plan(vbar.page_ref(page), books, out))
            });
            let planned = planned.count();
            if planned < pages.clone().count() {
                pages.take(planned).for_each(|page| self.policy.unplan(vbar.page_ref(page)));
                self.books.vbar(id).schedule.unplan_last();
                return;
            }
        }
    }

    /// Pages that were decided on and are not filled.
    fn under_way(&self) -> usize {
        let is_map = |command: &&Command| matches!(command, Command::Map { .. });
        self.queue.iter().filter(is_map).count() + self.filling.len()
    }

    /// No use of the model is expected any more.
    pub(crate) fn take_plans_back(&mut self, vbar: &Vbar) {
        let Some(layout) = &vbar.layout else { return };
        while let Some(number) = self.books.vbar(vbar.id).schedule.unplan_last() {
            layout.scheduled_pages(number).for_each(|page| self.policy.unplan(vbar.page_ref(page)));
        }
    }

    /// Everything that fills a page is enqueued.
    pub(crate) fn arrived(&mut self, vbar: &Vbar, page: u32) {
        vbar.cell(page).set_filled();
        let at = vbar.page_ref(page);
        if vbar.layout.is_some() {
            self.landing.push_back(at);
        }
        self.decide(|policy, books, out| policy.filled(at, books, out));
    }

    /// Marks pages whose copies have completed, so that their uses need no look at an event.
    pub(crate) fn land(&mut self) {
        while let Some(&page) = self.landing.front() {
            if let Some(book) = self.books.vbars.get(&page.vbar)
                && let cell = book.vbar.cell(page.page.0)
                && cell.load().is_filled()
            {
                let frame = book.pages[page.page.as_usize()].frame;
                let filled = frame.and_then(|frame| self.books.frames.get(&frame)).map(|frame| &frame.filled);
                // What somebody is still to add to comes again once he has.
                let filled = filled.filter(|_| book.vbar.completion(page.page.0) == Completion::Complete);
                match filled.map(|filled| filled.is_complete()) {
                    Some(Ok(true)) => cell.set_ready(),
                    Some(Ok(false)) => return,
                    // The next wait for the device meets the error.
                    Some(Err(_)) | None => {}
                }
            }
            self.landing.pop_front();
        }
    }

    /// Whether everything that was decided is done.
    pub(crate) fn is_settled(&self) -> bool {
        self.queue.is_empty() && self.executing == 0 && self.filling.is_empty()
    }

    /// Whether everything that was decided is done, and no operation runs.
    pub(crate) fn is_quiet(&self, shared: &Shared) -> bool {
        self.is_settled() && shared.operations.load(Ordering::Acquire) == 0
    }

    /// Whether the model in use has been used less than one pass takes.
    pub(crate) fn is_first_pass(&self) -> bool {
        let book = self.policy.in_use().and_then(|id| self.books.vbars.get(&id));
        book.is_some_and(|book| {
            let scheduled = book.vbar.layout.as_ref().map_or(0, |layout| layout.scheduled.len());
            book.uses < scheduled as u64
        })
    }

    /// Whether a VBAR is neither closed, nor parked, nor gone.
    pub(crate) fn is_open(&self, id: VbarId) -> bool {
        self.books.vbars.get(&id).is_some_and(VbarBook::is_open)
    }

    /// Reports the last release of a streamed page. Another thread may have used, released and evicted the page since
    /// its pin went, and the VBAR may be gone.
    pub(crate) fn released(&mut self, page: PageRef) {
        if self.books.vbars.contains_key(&page.vbar) {
            self.decide(|policy, books, out| policy.released(page, books, out));
        }
    }

    /// Whether somebody waits for memory, or runs with as little for weights as can be.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting > 0 || self.making_room > 0 || self.recalled > 0 || self.squeezed.is_some()
    }

    /// Whether it is time to look at the device's memory; the next time is after `period`.
    pub(crate) fn is_time_to_look(&mut self, period: Duration) -> bool {
        let now = Instant::now();
        let is_time = now >= self.look_after && self.making_room == 0 && !self.stop;
        if is_time {
            self.look_after = now + period;
        }
        is_time
    }

    /// Sets the budget to what others leave, where that is less, or more by at least `least`. Whether it rose.
    pub(crate) fn follow_memory(&mut self, device: &dyn Device, least: Bytes) -> Result<bool> {
        let now = self.policy.budget();
        let target = match self.budget {
            Budget::Fixed(bytes) if bytes == now => return Ok(false),
            // A device without room made it fall: it rises as there is room again.
            Budget::Fixed(bytes) => self.usable(device)?.min(bytes).max(now),
            Budget::Headroom(_) => self.allowed(self.budget, device)?,
        };
        let target = self.squeezed.map_or(target, |squeezed| target.min(squeezed.most));
        let is_whole = self.budget == Budget::Fixed(target);
        let at_once = target < now || is_whole || target - now >= least;
        let target = if at_once { target } else { self.offered_for_long(now, target, device.granularity()) };
        if target != now {
            self.offer = None;
            self.decide(|policy, books, out| policy.set_budget(target, books, out));
        }
        Ok(target > now)
    }

    /// What the budget could have been for a while, where that is more than `now` by `least`; else `now`.
    fn offered_for_long(&mut self, now: Bytes, target: Bytes, least: Bytes) -> Bytes {
        if target - now < least {
            self.offer = None;
            return now;
        }
        // An offer from before the application raised the budget is none.
        let known = self.offer.filter(|(_, offered)| *offered > now);
        let (since, offered) = known.map_or((Instant::now(), target), |(since, o)| (since, o.min(target)));
        self.offer = Some((since, offered));
        if since.elapsed() >= CALM { offered } else { now }
    }

    /// How many bytes of frames a budget allows at this moment.
    pub(crate) fn allowed(&self, budget: Budget, device: &dyn Device) -> Result<Bytes> {
        Ok(match budget {
            Budget::Fixed(bytes) => bytes,
            Budget::Headroom(headroom) => {
                let own = self.of_headroom.min(Bytes::new(headroom.get() / 2));
                self.usable(device)?.saturating_sub(headroom - own)
            }
        })
    }

    /// What the engine has and what nobody has.
    pub(crate) fn usable(&self, device: &dyn Device) -> Result<Bytes> {
        Ok(self.books.frame_bytes().checked_add(device.memory()?.free).unwrap_or(Bytes::MAX))
    }

    /// Takes a closed VBAR of which nothing is mapped any more out of the books. The caller drops it without the lock:
    /// its sources may belong to another language's objects.
    #[must_use]
    pub(crate) fn forget_if_gone(&mut self, id: VbarId) -> Option<VbarBook> {
        let book = self.books.vbars.get(&id)?;
        let gone = book.closing
            && book.mapped == 0
            && self.policy.held_pages(id) == 0
            && !book.vbar.has_pins()
            && book.lent.is_none()
            && !self.queue.iter().any(|command| is_of(command, id));
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

/// Pages under way beyond which nothing more is read ahead. One that turns out to be needed sooner waits behind all of
/// them: 0.4 s where a first pass queued all that the budget allowed.
fn most_under_way(page_size: Bytes) -> usize {
    (MOST_UNDER_WAY.get() / page_size.get()).max(4) as usize
}

/// Whether a command works on a page of the VBAR.
fn is_of(command: &Command, id: VbarId) -> bool {
    match command {
        Command::Retire { page, .. } | Command::Map { page, .. } => page.vbar == id,
        Command::Create { .. } | Command::Destroy { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use forebay_device::StreamHandle;
    use forebay_device::host::{HostConfig, HostDevice};

    use super::*;
    use crate::testing::attach_pages;
    use crate::{Engine, Use};

    #[test]
    fn an_offer_counts_once_it_lasted_and_only_above_the_budget()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let device = HostDevice::new(HostConfig::default())?;
        let engine = Engine::new(Arc::new(device), EngineConfig::default())?;
        let mut state = engine.shared().state.lock();
        let mut offered = |lasting: Bytes, target: Bytes| {
            state.offer = Instant::now().checked_sub(CALM * 2).map(|since| (since, lasting));
            state.offered_for_long(Bytes::mib(20), target, Bytes::mib(2))
        };
        assert_eq!(offered(Bytes::mib(22), Bytes::mib(24)), Bytes::mib(22));
        assert_eq!(offered(Bytes::mib(26), Bytes::mib(24)), Bytes::mib(24));
        assert_eq!(offered(Bytes::mib(22), Bytes::mib(21)), Bytes::mib(20), "less than a frame");
        assert_eq!(offered(Bytes::mib(10), Bytes::mib(24)), Bytes::mib(20), "from before the budget rose");
        Ok(())
    }

    #[test]
    fn a_first_pass_is_over_with_as_many_uses_also_while_lent()
    -> std::result::Result<(), Box<dyn std::error::Error>> {
        let page = Bytes::mib(2);
        let device = HostDevice::new(HostConfig::default())?;
        let config = EngineConfig { budget: Budget::Fixed(page * 8), ..EngineConfig::default() };
        let engine = Engine::new(Arc::new(device), config)?;
        let [one, other] = [attach_pages(&engine, page, 3)?, attach_pages(&engine, page, 3)?];
        let is_first_pass = || {
            let mut state = engine.shared().state.lock();
            state.take_in_uses();
            state.is_first_pass()
        };
        for weight in 0..3 {
            one.acquire(weight, Use::on(StreamHandle::DEFAULT)).map(drop)?;
            assert_eq!(is_first_pass(), weight < 2, "{weight}");
        }
        one.acquire(0, Use::on(StreamHandle::DEFAULT)).map(drop)?;
        assert!(!is_first_pass());
        other.acquire(0, Use::on(StreamHandle::DEFAULT)).map(drop)?;
        assert!(is_first_pass(), "the other's");
        other.vbar().passes_as_lent.store(1, Ordering::Release);
        assert!(!is_first_pass());
        Ok(())
    }

    #[test]
    fn little_is_under_way_however_much_fits() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let page = Bytes::mib(32);
        let device = HostDevice::new(HostConfig { capacity: Bytes::gib(2), ..HostConfig::default() })?;
        let config = EngineConfig { budget: Budget::Fixed(page * 24), ..EngineConfig::default() };
        let engine = Engine::new(Arc::new(device), config)?;
        let model = attach_pages(&engine, page, 40)?;
        // Readers get no further than their slots.
        let copies = engine.shared().copy.lock();
        std::thread::scope(|scope| {
            let caller = scope.spawn(|| model.acquire(0, Use::on(StreamHandle::DEFAULT)).map(drop));
            let most = most_under_way(page);
            loop {
                let mut state = engine.shared().state.lock();
                state.take_in_uses();
                state.read_ahead();
                assert!(state.under_way() <= most, "{} pages are under way", state.under_way());
                if state.under_way() == most {
                    break;
                }
            }
            drop(copies);
            caller.join().expect("the caller")
        })?;
        assert!(model.vbar().cell(0).load().is_filled());
        Ok(())
    }
}

//! Room for others: memory that leaves because somebody else needs it.
//!
//! A call in here may come from inside of somebody else's allocator, which holds a lock of its own meanwhile. So every wait
//! is bounded, and none is for more than the threads of the engine, the device, and, where the caller allows it, the
//! holders of leases.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, PageRef};
use forebay_device::{Device, Frame};

use crate::attachment::Attachment;
use crate::engine::Engine;
use crate::state::State;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// How long memory that was made free is left to others.
const GRACE: Duration = Duration::from_millis(200);
/// How long a call that makes room waits for models that were lent as a whole.
const RECALL_PATIENCE: Duration = Duration::from_secs(1);
/// The same from inside of an allocator: whoever should return a lease may be waiting for that very allocator.
const ALLOCATOR_RECALL_PATIENCE: Duration = Duration::from_millis(300);
/// How long [`Engine::room_for`] waits for the device. Pages that leave wait for work that reads them.
const PATIENCE: Duration = Duration::from_secs(10);
/// What is kept free beside an allocation: what a driver rounds up, and takes for itself.
const MARGIN: Bytes = Bytes::mib(32);

/// Whether a call waits for models that were lent as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leases {
    /// For a moment: their holders can run meanwhile.
    Await,
    /// No: the caller has something that their holders need. They are asked all the same.
    Ask,
}

impl Engine {
    /// Gives at least `bytes` of device memory back, as far as there are unpinned pages, lowest priority first. Pages that
    /// are being filled are waited for. The memory is free when this returns, and for a moment the engine leaves `bytes` to
    /// others, unless an operation could not be done without. Returns how much was given back.
    ///
    /// # Errors
    /// What the device reports.
    pub fn make_room(&self, bytes: Bytes) -> Result<Bytes> {
        self.shared().state.lock().begin_room();
        let freed = self.give_up_and_settle(bytes);
        self.shared().state.lock().room_was_made();
        freed
    }

    fn give_up_and_settle(&self, bytes: Bytes) -> Result<Bytes> {
        let freed = self.take_what_can_leave(bytes);
        if freed >= bytes {
            self.settle()?;
            return Ok(freed);
        }
        // What is being filled can leave once it is, if nothing else is read ahead in its place.
        self.shared().state.lock().emptying += 1;
        let rest = self.settle().and_then(|()| {
            let mut state = self.shared().state.lock();
            let rest = state.make_room(&*self.shared().device, bytes, bytes.saturating_sub(freed));
            drop(state);
            self.settle().map(|()| rest)
        });
        self.shared().state.lock().emptying -= 1;
        Ok(freed + rest?)
    }

    /// What can leave now, and what was lent once that is returned.
    fn take_what_can_leave(&self, bytes: Bytes) -> Bytes {
        let shared = self.shared();
        let mut state = shared.state.lock();
        let mut freed = state.make_room(&*shared.device, bytes, bytes);
        let start = Instant::now();
        while freed < bytes && state.recalled > 0 && start.elapsed() < RECALL_PATIENCE {
            shared.changed.wait_for(&mut state, Duration::from_millis(10));
            freed += state.make_room(&*shared.device, bytes, bytes.saturating_sub(freed));
        }
        freed
    }

    /// Sees to it that `bytes` and a margin are free on the device: gives back what is missing, if anything, and leaves it
    /// to the caller for a moment.
    ///
    /// For allocators that are about to ask the driver. Where enough is free this takes no lock. It waits as described in
    /// the module, at most some seconds.
    ///
    /// # Errors
    /// What the device reports, and what stopped the engine.
    pub fn room_for(&self, bytes: Bytes, leases: Leases) -> Result<Room> {
        let wanted = bytes.checked_add(MARGIN).unwrap_or(Bytes::MAX);
        if self.shared().device.memory()?.free >= wanted {
            return Ok(Room { missing: Bytes::ZERO, given_back: false });
        }
        self.shared().state.lock().begin_room();
        let room = self.wait_until_free(wanted, leases);
        self.shared().state.lock().room_was_made();
        room
    }

    fn wait_until_free(&self, wanted: Bytes, leases: Leases) -> Result<Room> {
        let (shared, start) = (self.shared(), Instant::now());
        let mut given_back = false;
        let mut state = shared.state.lock();
        loop {
            state.check()?;
            let missing = wanted.saturating_sub(shared.device.memory()?.free);
            if missing == Bytes::ZERO {
                return Ok(Room { missing, given_back });
            }
            let leaving = state.leaving();
            let freed = state.leave(&*shared.device, wanted, missing.saturating_sub(leaving))?;
            given_back |= freed + leaving > Bytes::ZERO;
            shared.work.notify_one();
            let awaits = leases == Leases::Await && start.elapsed() < ALLOCATOR_RECALL_PATIENCE;
            let hopeful =
                freed + leaving > Bytes::ZERO || !state.is_settled() || (awaits && state.recalled > 0);
            if !hopeful || start.elapsed() > PATIENCE {
                return Ok(Room { missing, given_back });
            }
            shared.changed.wait_for(&mut state, Duration::from_millis(10));
        }
    }

    /// From now on weights take as little memory as can be: what one operation needs, and nothing is read ahead. Everything
    /// else leaves. For running what did not fit, with [`make_room`](Self::make_room) after each operation.
    /// Ends with the result.
    ///
    /// # Errors
    /// What the device reports.
    pub fn squeeze(self: &Arc<Self>) -> Result<Squeeze> {
        {
            let mut state = self.shared().state.lock();
            let open = state.books.vbars.values().filter(|book| book.is_open());
            let least = open.map(|book| largest(&book.vbar)).max().unwrap_or(Bytes::ZERO);
            let most = self.shared().reserved() + least;
            let number = state.squeezed.map_or(0, |squeezed| squeezed.number);
            let most = state.squeezed.map_or(most, |squeezed| squeezed.most.max(most));
            state.squeezed = Some(Squeezed { most, number: number + 1 });
            self.shared().is_squeezed.store(true, Ordering::Release);
            state.decide(|policy, books, out| policy.set_budget(policy.budget().min(most), books, out));
        }
        let squeeze = Squeeze(Arc::clone(self));
        self.make_room(Bytes::MAX)?;
        Ok(squeeze)
    }

    /// Whether a [`Squeeze`] lives. Takes no lock.
    pub fn is_squeezed(&self) -> bool {
        self.shared().is_squeezed.load(Ordering::Acquire)
    }

    /// Takes device memory as any other program would: to leave less of a device to everybody, in tests and benchmarks.
    /// Given back when dropped.
    ///
    /// # Errors
    /// Where it is not free.
    pub fn ballast(&self, bytes: Bytes) -> Result<Ballast> {
        let granularity = self.shared().device.granularity();
        let size = granularity * bytes.pages_of(granularity);
        if size == Bytes::ZERO {
            return Err(EngineError::Invalid(format!("a ballast has at least one byte: {bytes}")));
        }
        Ok(Ballast(Frame::new(Arc::clone(&self.shared().device), size)?))
    }

    /// Free and total memory of the device.
    ///
    /// # Errors
    /// What the device reports.
    pub fn memory(&self) -> Result<forebay_device::MemoryInfo> {
        Ok(self.shared().device.memory()?)
    }
}

/// What [`Engine::room_for`] found or made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// What is still missing.
    pub missing: Bytes,
    /// Whether anything was given back for it.
    pub given_back: bool,
}

impl Attachment {
    /// Whether it has less memory than it would use: a part of its pages is streamed.
    pub fn lacks_memory(&self) -> bool {
        let state = self.engine().shared().state.lock();
        let id = self.vbar().id;
        state.is_open(id) && (state.policy.watermark(id).0 as usize) < self.vbar().cells.len()
    }
}

/// Device memory that is no weight's.
#[derive(Debug)]
#[must_use = "a ballast that is dropped is given back"]
pub struct Ballast(Frame);

impl Ballast {
    /// How much it is.
    pub fn size(&self) -> Bytes {
        self.0.size()
    }
}

/// Weights take as little memory as can be while this lives.
#[derive(Debug)]
#[must_use = "what is dropped has ended"]
pub struct Squeeze(Arc<Engine>);

impl Drop for Squeeze {
    fn drop(&mut self) {
        let mut state = self.0.shared().state.lock();
        state.squeezed = state
            .squeezed
            .filter(|squeezed| squeezed.number > 1)
            .map(|squeezed| Squeezed { number: squeezed.number - 1, ..squeezed });
        self.0.shared().is_squeezed.store(state.squeezed.is_some(), Ordering::Release);
        state.look_after = Instant::now();
        drop(state);
        self.0.shared().work.notify_one();
    }
}

/// What a [`Squeeze`] allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Squeezed {
    pub(crate) most: Bytes,
    /// How many there are.
    number: usize,
}

impl State {
    /// Somebody waits for memory to be free, until [`room_was_made`](State::room_was_made).
    fn begin_room(&mut self) {
        self.making_room += 1;
    }

    /// The memory that a call gave up is free.
    fn room_was_made(&mut self) {
        self.making_room -= 1;
        self.look_after = Instant::now() + GRACE;
    }

    /// As [`leave`](State::leave), also where the device does not tell its memory: then all that is given up is left.
    fn make_room(&mut self, device: &dyn Device, wanted: Bytes, more: Bytes) -> Bytes {
        self.leave(device, wanted, more).unwrap_or_else(|_| self.give_up(more, Bytes::ZERO))
    }

    /// Gives `more` back, and leaves `wanted` to others until the device's memory is looked at the next time. What was
    /// given up.
    fn leave(&mut self, device: &dyn Device, wanted: Bytes, more: Bytes) -> Result<Bytes> {
        let left = self.usable(device)?.saturating_sub(wanted);
        Ok(self.give_up(more, left))
    }

    /// Gives `bytes` back as far as they can leave; from now on the budget is at most `left`, or what is held beyond that.
    fn give_up(&mut self, bytes: Bytes, left: Bytes) -> Bytes {
        self.decide(|policy, books, out| {
            let freed = policy.make_room(bytes, books, out);
            policy.set_budget(policy.budget().min(left.max(policy.held())), books, out);
            freed
        })
    }

    /// Bytes of frames that were given up and are not given back yet.
    fn leaving(&self) -> Bytes {
        self.books.frame_bytes().saturating_sub(self.policy.held())
    }

    /// Bytes of pages.
    pub(crate) fn size_of(&self, pages: &[PageRef]) -> Bytes {
        let size = |id| self.books.vbars.get(&id).map_or(Bytes::ZERO, |book| book.vbar.page_size);
        pages.iter().map(|page| size(page.vbar)).sum()
    }

    /// Bytes of the pages that have pins. Reads every page.
    pub(crate) fn pinned(&self) -> Bytes {
        let pinned = self.books.vbars.values().map(|book| {
            let pages = book.vbar.cells.iter().filter(|cell| cell.load().pins() > 0).count();
            book.vbar.page_size * pages as u64
        });
        pinned.sum()
    }

    /// Lets a squeezed budget rise to what an operation cannot be done without. Whether it did.
    pub(crate) fn rises_if_squeezed(&mut self, device: &dyn Device, needed: Bytes) -> Result<bool> {
        let Some(squeezed) = self.squeezed.as_mut() else { return Ok(false) };
        squeezed.most = squeezed.most.max(needed);
        Ok(self.policy.budget() < needed && self.follow_memory(device, Bytes::new(1))?)
    }
}

/// Bytes of the pages of the weight that has most of them.
fn largest(vbar: &Vbar) -> Bytes {
    let weights = vbar.layout.iter().flat_map(|layout| &layout.weights);
    let pages = weights.map(|weight| weight.last_page - weight.first_page + 1).max().unwrap_or(0);
    vbar.page_size * u64::from(pages)
}

//! Host memory that grows at one address, and that copy engines read where it is.
//!
//! Taking memory and registering it costs more than filling it, so both are done ahead of need and in large pieces: growing
//! is a step of a counter, most of the time. What shrinks is given back by a thread of its own, as a driver may let it wait
//! for an idle device.
//!
//! A part that grew without being registered may be registered by its user, who then says so when it shrinks.
//!
//! Lock order: a buffer's books are taken without the engine's state lock, and `copied` is a leaf. Under the books memory
//! may be taken and registered; nothing is waited for but what the books tell of.

mod helper;
mod memory;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use forebay_core::Bytes;
use forebay_device::{Device, DeviceError, Event, StreamHandle};
use forebay_store::Urgency;
use parking_lot::{Condvar, Mutex, MutexGuard};

use self::helper::GiveBack;
pub(crate) use self::helper::{Helper, run};
use self::memory::HostMemory;
use crate::cache::ram::Ram;
use crate::copy_ends::CopyEnds;
use crate::engine::Engine;
use crate::reader::Reader;
use crate::{EngineError, Result};

/// Memory that is taken ahead of need, at most and at least.
const MOST_AHEAD: Bytes = Bytes::mib(256);
const LEAST_AHEAD: Bytes = Bytes::mib(8);
/// Memory of a cgroup that is left to others, at most; a sixteenth of a small one's.
const LEAST_LEFT: Bytes = Bytes::gib(2);
/// What a range without a limit has reserved before it grows, at most.
const NOTHING: Bytes = Bytes::mib(2);
/// Memory that one reader takes at once.
const PIECE: u64 = 4 << 20;

/// How a buffer is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostBufferOptions {
    /// How far it may grow. [`Bytes::ZERO`]: as far as the machine has memory; its address is then known once it has bytes.
    pub limit: Bytes,
    /// How much memory is taken ahead of need, at least. It is given back where nobody needs it for a second.
    pub ahead: Bytes,
}

/// How a buffer grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// Registers the new part with the engine's device, so that copies do not go through memory of the driver's.
    pub register: bool,
    /// Past its limit the buffer moves to a larger range, and its contents with it. What was lent of the old one stays as
    /// it is.
    pub may_move: bool,
}

/// Host memory that grows at one address. Bytes past its length may be touched by nobody.
#[derive(Debug)]
pub struct HostBuffer {
    options: HostBufferOptions,
    range: Mutex<Arc<HostRange>>,
}

/// The memory of a buffer, which lives as long as anybody holds it.
#[derive(Debug)]
pub struct HostRange {
    engine: Option<Arc<Engine>>,
    memory: Arc<HostMemory>,
    books: Mutex<Books>,
    /// Something was given back.
    changed: Condvar,
    copied: CopyEnds,
}

#[derive(Debug, Default)]
struct Books {
    size: Bytes,
    /// What may be touched, and up to where memory was taken or is about to be.
    ready: Bytes,
    populated: Bytes,
    /// By where they begin.
    registered: BTreeMap<Bytes, Bytes>,
    /// Parts that their user may have registered, in their order.
    parts: Vec<Part>,
    leaving: Vec<(Bytes, Bytes)>,
    grown: Option<Instant>,
}

/// A run of bytes: where it begins, and how many.
type Part = (Bytes, Bytes);

impl HostBuffer {
    /// Reserves address space for a buffer. With an engine its readers take memory, and its device is what parts are
    /// registered with; without one nothing is registered.
    ///
    /// # Errors
    /// [`EngineError::Device`] where the system has no such address range.
    pub fn new(engine: Option<&Arc<Engine>>, options: HostBufferOptions) -> Result<Self> {
        // One that is never used takes nothing: without a limit addresses are reserved once it grows.
        let range = HostRange::new(engine.cloned(), options.limit)?;
        Ok(HostBuffer { options, range: Mutex::new(range) })
    }

    /// Grows by `bytes`. The new part holds arbitrary bytes.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] past the limit, and what the system and the device report; the buffer is as it was then.
    pub fn extend(&self, bytes: Bytes, growth: Growth) -> Result<()> {
        let mut range = self.range.lock();
        let size = range.len();
        let reserved = range.memory.limit();
        let begins = self.options.limit == Bytes::ZERO && reserved <= NOTHING;
        let limit = if begins { reserved.max(machine_memory()) } else { reserved };
        let Some(to) = size.checked_add(bytes).filter(|to| growth.may_move || *to <= limit) else {
            return Err(EngineError::Invalid(format!(
                "a buffer of {size} grows up to {limit}, not by {bytes}"
            )));
        };
        if to > limit {
            *range = range.moved(to.checked_add(to).unwrap_or(to))?;
        } else if limit > reserved {
            *range = HostRange::new(range.engine.clone(), limit)?;
        }
        range.grow(to, growth.register, self.ahead(to))
    }

    /// Registers a part.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a part that the buffer does not have, or that is registered in part, and what the device
    /// reports.
    pub fn register(&self, offset: Bytes, bytes: Bytes) -> Result<()> {
        self.range().register(offset, bytes)
    }

    /// Undoes [`register`](HostBuffer::register), at a moment when no copy needs it any more.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] where nothing is registered at this offset.
    pub fn unregister(&self, offset: Bytes) -> Result<()> {
        self.range().unregister(offset)
    }

    /// Shrinks to `size`, and gives the rest back to the system once no copy needs it any more. `unregister` says that parts
    /// of it may be registered, by the buffer or by its user; without, its user has seen to it, and what the buffer has
    /// registered by itself stays so.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a size that is larger than the buffer.
    pub fn truncate(&self, size: Bytes, unregister: bool) -> Result<()> {
        self.range().truncate(size, unregister)
    }

    /// Its length.
    pub fn len(&self) -> Bytes {
        self.range().len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == Bytes::ZERO
    }

    /// Bytes that the buffer itself has registered with the device.
    pub fn registered(&self) -> Bytes {
        self.range().books.lock().registered.values().copied().sum()
    }

    /// Its memory as it is now. It stays mapped as long as anybody holds it.
    pub fn range(&self) -> Arc<HostRange> {
        Arc::clone(&self.range.lock())
    }

    fn ahead(&self, size: Bytes) -> Bytes {
        let eighth = Bytes::new(size.get() / 8);
        eighth.max(self.options.ahead).clamp(LEAST_AHEAD, MOST_AHEAD)
    }
}

impl HostRange {
    fn new(engine: Option<Arc<Engine>>, limit: Bytes) -> Result<Arc<Self>> {
        Ok(Arc::new(HostRange {
            engine,
            memory: Arc::new(HostMemory::reserve(limit)?),
            books: Mutex::default(),
            changed: Condvar::new(),
            copied: CopyEnds::default(),
        }))
    }

    /// The first address.
    pub fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    /// How many bytes may be touched.
    pub fn len(&self) -> Bytes {
        self.books.lock().size
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == Bytes::ZERO
    }

    /// Where `bytes` bytes at `offset` are.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a part that the buffer does not have.
    pub fn at(&self, offset: Bytes, bytes: Bytes) -> Result<*mut u8> {
        let size = self.len();
        if offset.checked_add(bytes).is_none_or(|end| end > size) {
            let what = format!("a buffer of {size} has no {bytes} at {}", offset.get());
            return Err(EngineError::Invalid(what));
        }
        Ok(self.base().wrapping_add(offset.as_usize()))
    }

    pub(crate) fn engine(&self) -> Option<&Arc<Engine>> {
        self.engine.as_ref()
    }

    /// Copies of this memory that are now in the stream have ended before it is given back.
    pub(crate) fn note_copies(&self, device: &Arc<dyn Device>, stream: StreamHandle) -> Result<()> {
        self.copied.note(device, stream)
    }

    /// A copy in a range of its own.
    fn moved(&self, limit: Bytes) -> Result<Arc<Self>> {
        let new = HostRange::new(self.engine.clone(), limit)?;
        let books = self.books.lock();
        new.grow(books.size, !books.registered.is_empty(), LEAST_AHEAD)?;
        // SAFETY: both ranges may be touched as far as `size`; the new one is nobody else's yet.
        unsafe { std::ptr::copy_nonoverlapping(self.base(), new.base(), books.size.as_usize()) };
        drop(books);
        Ok(new)
    }

    fn grow(self: &Arc<Self>, to: Bytes, register: bool, ahead: Bytes) -> Result<()> {
        let mut books = self.books.lock();
        let from = books.size;
        // What leaves there may still be registered.
        while books.leaving.iter().any(|(_, end)| *end > from) {
            self.changed.wait(&mut books);
        }
        let limit = self.memory.limit();
        let wanted = Bytes::new(to.get() + ahead.get() / 2);
        if books.populated < wanted && to > from {
            let registered = self.engine.as_ref().map_or(Bytes::ZERO, |engine| engine.registered());
            check_room(Ram::read(), registered, to.saturating_sub(books.populated.max(from)).max(ahead))?;
        }
        if to > books.ready {
            let ready = to.checked_add(ahead).map_or(limit, |ready| ready.min(limit));
            let ready = ready.checked_align_up(Bytes::mib(2)).map_or(limit, |ready| ready.min(limit));
            self.memory.allow(books.ready, ready)?;
            books.ready = ready;
        }
        if register {
            self.register_up_to(&mut books, to, ahead)?;
        } else {
            self.unregister_beyond(&mut books)?;
            if to > from {
                books.parts.push((from, to - from));
            }
        }
        books.size = to;
        books.grown = Some(Instant::now());
        if let Some(engine) = &self.engine
            && books.populated < wanted
        {
            let end = books.ready.min(to.checked_add(ahead).unwrap_or(limit));
            self.populate_in_background(engine, books.populated, end);
            books.populated = books.populated.max(end);
            engine.helper().watch(self);
        }
        Ok(())
    }

    /// Registers what is not yet, and more ahead of need.
    fn register_up_to(&self, books: &mut Books, to: Bytes, ahead: Bytes) -> Result<()> {
        let Some(engine) = &self.engine else { return Ok(()) };
        let mut from = books.size;
        while from < to {
            let before = books.registered.range(..=from).next_back().map(|(start, len)| *start + *len);
            if let Some(end) = before.filter(|end| *end > from) {
                from = end;
                continue;
            }
            let next = books.registered.range(from..).next().map_or(books.ready, |(start, _)| *start);
            let end = next.min(from.checked_add(ahead).map_or(to, |end| end.max(to)));
            self.memory.populate(from.max(books.populated.min(end)), end);
            books.populated = books.populated.max(end);
            if register(&*engine.shared().device, self.base(), from, end - from)? {
                books.registered.insert(from, end - from);
            }
            from = end;
        }
        Ok(())
    }

    /// Undoes what was registered ahead of need: the next part is its user's to register.
    fn unregister_beyond(&self, books: &mut Books) -> Result<()> {
        let Some(engine) = &self.engine else { return Ok(()) };
        let (device, size) = (&*engine.shared().device, books.size);
        while let Some((start, len)) = books.registered.last_key_value().map(|(start, len)| (*start, *len))
            && start + len > size
        {
            self.copied.wait()?;
            books.registered.remove(&start);
            let first = self.base().wrapping_add(start.as_usize());
            // SAFETY: registered by this buffer, and the copies that used it have ended.
            unsafe { device.unregister_host(first, len)? };
            let used = size.saturating_sub(start);
            if used > Bytes::ZERO && register(device, self.base(), start, used)? {
                books.registered.insert(start, used);
            }
        }
        Ok(())
    }

    fn register(&self, offset: Bytes, bytes: Bytes) -> Result<()> {
        self.at(offset, bytes)?;
        let mut books = self.books.lock();
        while books.leaving.iter().any(|(start, end)| *start < offset + bytes && *end > offset) {
            self.changed.wait(&mut books);
        }
        let before = books.registered.range(..offset + bytes).next_back().map(|(start, len)| *start + *len);
        if bytes == Bytes::ZERO || before.is_some_and(|end| end > offset) {
            let what = format!("{bytes} at {} are nothing, or registered in part", offset.get());
            return Err(EngineError::Invalid(what));
        }
        let Some(engine) = &self.engine else { return Ok(()) };
        if register(&*engine.shared().device, self.base(), offset, bytes)? {
            books.registered.insert(offset, bytes);
        }
        Ok(())
    }

    fn unregister(self: &Arc<Self>, offset: Bytes) -> Result<()> {
        let mut books = self.books.lock();
        let own = books.registered.remove(&offset).map(|bytes| (offset, bytes));
        let part = books.parts.iter().find(|(start, _)| *start == offset).copied();
        let nothing = || EngineError::Invalid(format!("nothing is registered at {}", offset.get()));
        let (start, bytes) = own.or(part).ok_or_else(nothing)?;
        self.leave(books, GiveBack { registered: vec![(start, bytes)], discard: None }, start + bytes);
        Ok(())
    }

    fn truncate(self: &Arc<Self>, size: Bytes, unregister: bool) -> Result<()> {
        let mut books = self.books.lock();
        let before = books.size;
        if size > before {
            return Err(EngineError::Invalid(format!("a buffer of {before} shrinks, not to {size}")));
        }
        books.size = size;
        let mut registered = Vec::new();
        while let Some(part) = books.parts.pop_if(|(start, _)| *start >= size) {
            if unregister {
                registered.push(part);
            }
        }
        if unregister {
            registered.extend(books.registered.split_off(&size));
        }
        // What may still be registered keeps its memory: a device would go on reading what is not there any more.
        let kept = books.registered.last_key_value().map(|(start, len)| *start + *len);
        let kept = kept.max(books.parts.last().map(|(start, len)| *start + *len)).unwrap_or(Bytes::ZERO);
        let end = before.max(books.populated);
        books.populated = books.populated.min(size.max(kept));
        let discard = Some((size.max(kept), end)).filter(|(start, end)| start < end);
        self.leave(books, GiveBack { registered, discard }, end);
        Ok(())
    }

    /// Gives something back, at once where no device has to do with it.
    fn leave(self: &Arc<Self>, mut books: MutexGuard<'_, Books>, what: GiveBack, end: Bytes) {
        let start = what.start().unwrap_or(end);
        let copies = self.copied.pending();
        match &self.engine {
            Some(engine) if !what.registered.is_empty() || !copies.is_empty() => {
                books.leaving.push((start, end));
                drop(books);
                engine.helper().give_back(self, what, (start, end), copies);
            }
            _ => {
                let ended = have_ended(&copies);
                if let (true, Some((start, end))) = (ended, what.discard) {
                    // SAFETY: the part is past the end of the buffer, no copy uses it, and nothing of it is registered.
                    unsafe { self.memory.discard(start, end) };
                }
            }
        }
    }

    fn left(&self, part: (Bytes, Bytes)) {
        let mut books = self.books.lock();
        if let Some(place) = books.leaving.iter().position(|other| *other == part) {
            books.leaving.swap_remove(place);
        }
        drop(books);
        self.changed.notify_all();
    }

    /// Gives memory back that was taken ahead of need and is not needed. `false` while it may be.
    fn trim(&self, idle_since: Instant) -> bool {
        let mut books = self.books.lock();
        if books.grown.is_some_and(|grown| grown > idle_since) {
            return false;
        }
        let registered = books.registered.last_key_value().map(|(start, len)| *start + *len);
        let from = registered.unwrap_or(Bytes::ZERO).max(books.size);
        if from < books.populated && books.leaving.is_empty() {
            // SAFETY: the part is past the end of the buffer and of all that is registered.
            unsafe { self.memory.discard(from, books.populated) };
            books.populated = from;
        }
        true
    }

    fn populate_in_background(&self, engine: &Engine, from: Bytes, end: Bytes) {
        let Some(readers) = engine.readers() else { return };
        for start in (from.get()..end.get()).step_by(PIECE as usize) {
            let memory = Arc::clone(&self.memory);
            let (start, end) = (Bytes::new(start), Bytes::new((start + PIECE).min(end.get())));
            readers.submit(Urgency::Ahead, move |_: &mut Reader| memory.populate(start, end));
        }
    }
}

impl Drop for HostRange {
    fn drop(&mut self) {
        let copies = self.copied.pending();
        let Some(engine) = &self.engine else {
            if !have_ended(&copies) {
                std::mem::forget(Arc::clone(&self.memory));
            }
            return;
        };
        let books = self.books.get_mut();
        let parts = std::mem::take(&mut books.parts);
        let registered: Vec<Part> = std::mem::take(&mut books.registered).into_iter().chain(parts).collect();
        if !registered.is_empty() || !copies.is_empty() {
            engine.helper().end(Arc::clone(&self.memory), registered, copies);
        }
    }
}

/// Whether a part is registered now: a device that reads any memory needs nothing.
fn register(device: &dyn Device, base: *mut u8, offset: Bytes, bytes: Bytes) -> Result<bool> {
    // SAFETY: the part may be touched and is in no other registration of this buffer's; it stays mapped until it is
    // unregistered.
    let result = unsafe { device.register_memory(base.wrapping_add(offset.as_usize()), bytes) };
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.is_unsupported() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Waits for copies. `false` where they may go on for ever, for all that the device tells.
fn have_ended(copies: &[Arc<Event>]) -> bool {
    let ended = copies.iter().try_for_each(|event| event.synchronize());
    let log = |error: &DeviceError| tracing::warn!(%error, "memory of a buffer is kept: its copies may not have ended");
    ended.inspect_err(log).is_ok()
}

/// Refuses what would have a memory cgroup end the process: there the bytes are better read again from the page cache. What
/// the machine has is its user's to look at, but that the kernel calls registered page cache available, which it is not.
fn check_room(ram: Option<Ram>, registered: Bytes, wanted: Bytes) -> Result<()> {
    let Some(ram) = ram else { return Ok(()) };
    let room = match registered {
        Bytes::ZERO => ram.cgroup.map(|cgroup| cgroup.room()),
        _ => Some(ram.cache_room()),
    };
    let Some(room) = room else { return Ok(()) };
    let reserve = LEAST_LEFT.min(Bytes::new(ram.limit().get() / 16));
    let free = room.saturating_sub(registered).saturating_sub(reserve);
    if wanted <= free {
        return Ok(());
    }
    Err(DeviceError::OutOfMemory { call: "host buffer", wanted, free: Some(free) }.into())
}

fn machine_memory() -> Bytes {
    let pages = rustix::system::sysinfo();
    Bytes::new(u64::from(pages.mem_unit).saturating_mul(pages.totalram as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::ram::Cgroup;

    #[test]
    fn a_buffer_grows_as_far_as_its_cgroup_has_room_beside_what_is_left_to_others() {
        let with_room = |room: Bytes| Some(ram(Some(Cgroup::new(Bytes::gib(64), Bytes::gib(64), room))));
        let check = |ram, wanted| check_room(ram, Bytes::ZERO, wanted);
        assert!(check(None, Bytes::gib(1)).is_ok());
        assert!(check(Some(ram(None)), Bytes::gib(100)).is_ok(), "the user's to look at");
        assert!(check(with_room(Bytes::gib(3)), Bytes::gib(1)).is_ok());
        let refused = check(with_room(Bytes::gib(3)), Bytes::mib(1025)).unwrap_err();
        assert!(refused.is_out_of_memory());
        assert!(check(with_room(Bytes::gib(1)), Bytes::mib(1)).is_err());
    }

    #[test]
    fn registered_page_cache_is_not_there_to_be_had_again() {
        let (cgroup, registered) =
            (Cgroup::new(Bytes::gib(64), Bytes::gib(64), Bytes::gib(9)), Bytes::gib(6));
        assert!(check_room(Some(ram(Some(cgroup))), registered, Bytes::gib(1)).is_ok());
        assert!(check_room(Some(ram(Some(cgroup))), registered, Bytes::mib(1025)).is_err());
        assert!(check_room(Some(ram(None)), registered, Bytes::gib(2)).is_ok());
        assert!(
            check_room(Some(ram(None)), registered, Bytes::mib(2049)).is_err(),
            "of 10 GiB that are available"
        );
    }

    /// A machine with 10 of 128 GiB available.
    fn ram(cgroup: Option<Cgroup>) -> Ram {
        let (total, available) = (Bytes::gib(128), Bytes::gib(10));
        Ram { total, available, mapped: Bytes::ZERO, cgroup, pressure: 0.0 }
    }
}

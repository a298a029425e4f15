//! Files read ahead of those who ask for their parts one by one, as ComfyUI does.
//!
//! A safetensors file says where its tensors are, and a [`Schedule`] which is asked for next. The readers bring them into a
//! ring of device memory while the caller does something else, so that a call has nothing to do but to enqueue a copy on the
//! device. What is asked for early, and has no room beside what was read ahead, is read directly to its place; what is asked for
//! far from where it was expected has everything read ahead dropped.

mod ring;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use forebay_core::{Bytes, Schedule};
use forebay_device::Device;
use forebay_store::{FileStamp, ReaderPool, SourceFile, Urgency, ranges_as_used};
use parking_lot::Mutex;

use self::ring::{Ring, Slot};
use crate::reader::Reader;
use crate::state::Shared;
use crate::transfer::{FilePart, OnDevice};
use crate::{EngineError, Result};

/// The ring at most: two of a large model's largest weights, of which one is copied and one is read. A small device gives one
/// part in so many.
const RING: Bytes = Bytes::mib(256);
const PART_OF_DEVICE: u64 = 32;
/// How long it is not asked for again where there was no memory for it.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// What is read at once, at most.
const MOST_AT_ONCE: Bytes = Bytes::mib(16);
/// Smaller tensors are not read ahead: scales and formats of quantized weights, which ComfyUI does not ask for in this way. What
/// nobody asks for stays in the ring for a while, and what is behind it was read twice: of a Flux in scaled float8 2.5 times
/// what was asked for (`bench/reading.py`).
const LEAST: Bytes = Bytes::new(128);
/// How many tensors may be asked for after one that lies behind them: those of a block of a large model, sorted by name.
const SKIP: usize = 64;
/// What is smaller may turn out not to be asked for, as the norms' weights are by ComfyUI: once so many tensors behind it were, it is
/// given up, for the ring has no room behind what stays in it.
const TINY: Bytes = Bytes::kib(64);
const MOST_PASSED: u8 = 8;
/// Parts of another file that are asked for one after the other before it is the one at hand. Until then they are read directly: a
/// LoRA's factors are asked for between the weights, and what is read ahead of these stays.
const ASIDE: u32 = 8;
/// Files whose order of use is remembered.
const MOST_FILES: usize = 16;

/// Parts in a row that the copy engine reads by itself before the ring is given back: not everything is registered at once.
const UNUSED: u32 = 64;

/// All of it, for one engine. Callers take turns; between their calls readers that have nothing else to do go on.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    inner: Mutex<Inner>,
    /// Parts in a row for which it was not needed.
    unused: AtomicU32,
}

#[derive(Debug, Default)]
struct Inner {
    ring: Option<Ring>,
    refused: Option<Instant>,
    /// The one at hand comes last.
    files: Vec<Known>,
    /// Another one, and how many of its parts were asked for since the one at hand was.
    aside: Option<(FileStamp, u32)>,
}

/// A file that parts were asked of.
#[derive(Debug)]
struct Known {
    file: Arc<SourceFile>,
    /// Its tensors in the order in which they are probably used; none where it is no safetensors file.
    parts: Vec<(u64, Bytes)>,
    numbers: HashMap<(u64, Bytes), u32>,
    schedule: Schedule,
    staged: HashMap<u32, Staged>,
    /// The tensor that is being staged, for the rest of which there was no room.
    growing: Option<u32>,
}

/// A part that is read ahead, its beginning at least.
#[derive(Debug, Default)]
struct Staged {
    slots: Vec<Arc<Slot>>,
    read: Bytes,
    /// Tensors that were asked for before it, though they are staged behind it or not at all.
    passed: u8,
}

/// Who reads, and for whom.
#[derive(Clone, Copy)]
struct Readers<'a> {
    shared: &'a Arc<Shared>,
    pool: &'a Arc<ReaderPool<Reader>>,
    ahead: &'a Arc<Ahead>,
}

impl Ahead {
    /// Reads a part of a file to the device, if it is a tensor of a safetensors file. How much of it, from its beginning: the rest
    /// has no room beside what is asked for later. Nothing where it is no such tensor, and where there is no memory for a
    /// ring, also after `make_room`.
    ///
    /// # Safety
    /// As for [`Engine::read_to_device`](crate::Engine::read_to_device).
    pub(crate) unsafe fn read(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        pool: &Arc<ReaderPool<Reader>>,
        part: &FilePart,
        to: OnDevice,
        make_room: impl FnOnce(Bytes) -> Result<()>,
    ) -> Result<Bytes> {
        let mut inner = self.inner.lock();
        if inner.is_aside(&part.file) {
            return Ok(Bytes::ZERO);
        }
        let Some(number) = inner.find(part) else { return Ok(Bytes::ZERO) };
        self.unused.store(0, Ordering::Relaxed);
        if inner.ring.is_none() {
            if inner.refused.is_some_and(|refused| refused.elapsed() < REFUSED_FOR) {
                return Ok(Bytes::ZERO);
            }
            let made = ring_size(&*shared.device).and_then(|size| match Ring::new(shared, size) {
                Err(error) if error.is_out_of_memory() => {
                    make_room(size)?;
                    Ring::new(shared, size)
                }
                made => made,
            });
            match made {
                Ok(ring) => inner.ring = Some(ring),
                Err(error) => {
                    tracing::debug!(device = %shared.id, %error, "nothing is read ahead of its use");
                    inner.refused = Some(Instant::now());
                    return Ok(Bytes::ZERO);
                }
            }
        }
        // SAFETY: the caller's promise.
        unsafe { inner.read(Readers { shared, pool, ahead: self }, part, number, to) }
    }

    /// Reads ahead unless somebody who calls does it himself.
    fn go_on(self: &Arc<Self>, shared: &Arc<Shared>, pool: &Arc<ReaderPool<Reader>>) {
        if let Some(mut inner) = self.inner.try_lock()
            && let Err(error) = inner.plan(Readers { shared, pool, ahead: self })
        {
            tracing::debug!(device = %shared.id, %error, "nothing more is read ahead");
        }
    }

    /// The copy engine reads a part by itself. The ring's memory is the application's again after a while.
    pub(crate) fn note_unused(&self) {
        if self.unused.fetch_add(1, Ordering::Relaxed) + 1 == UNUSED {
            self.end();
        }
    }

    /// Forgets what was read, and gives the ring back.
    pub(crate) fn end(&self) {
        let mut inner = self.inner.lock();
        inner.files.iter_mut().for_each(Known::take_back);
        inner.ring = None;
    }
}

impl Inner {
    /// Whether a file is another than the one at hand, and not to take its place yet.
    fn is_aside(&mut self, file: &SourceFile) -> bool {
        let stamp = file.stamp();
        self.aside = match (self.files.last(), self.aside) {
            (None, _) => None,
            (Some(last), _) if last.file.stamp().file() == stamp.file() => None,
            (_, Some((other, count))) if other == stamp => Some((other, count + 1)),
            _ => Some((stamp, 1)),
        };
        self.aside.is_some_and(|(_, count)| count <= ASIDE)
    }

    /// The number of a tensor of the file that was used last by then.
    fn find(&mut self, part: &FilePart) -> Option<u32> {
        let same = |known: &Known| known.is(&part.file);
        let place = match self.files.iter().position(same) {
            Some(place) => place,
            None => {
                // The same file as it was before it was written to.
                self.files.retain_mut(|known| {
                    let stays = known.file.stamp().file() != part.file.stamp().file();
                    if !stays {
                        known.take_back();
                    }
                    stays
                });
                if self.files.len() == MOST_FILES {
                    self.files.remove(0).take_back();
                }
                self.files.push(Known::new(&part.file));
                self.files.len() - 1
            }
        };
        let known = self.files.remove(place);
        let number = known.numbers.get(&(part.offset, part.bytes)).copied();
        self.files.push(known);
        number
    }

    /// Reads what is missing, as far as there is room, and reads ahead meanwhile. How much of the part is enqueued.
    unsafe fn read(
        &mut self,
        readers: Readers<'_>,
        part: &FilePart,
        number: u32,
        mut to: OnDevice,
    ) -> Result<Bytes> {
        let Some(known) = self.files.last_mut() else { return Ok(Bytes::ZERO) };
        let Staged { mut slots, mut read, .. } = known.used(number);
        loop {
            // SAFETY: the caller's promise.
            match unsafe { self.go_on(readers, part, to, &mut slots, &mut read) } {
                Ok(Some(copied)) => to.addr = to.addr.offset(copied),
                Ok(None) => return self.plan(readers).map(|()| read),
                Err(error) => {
                    slots.iter().for_each(|slot| slot.give_up());
                    return Err(error);
                }
            }
        }
    }

    /// Copies as much of a part as there is room for; how much it was. `None` where nothing is left to be copied, or where there
    /// is no room before something else is asked for.
    unsafe fn go_on(
        &mut self,
        readers: Readers<'_>,
        part: &FilePart,
        to: OnDevice,
        slots: &mut Vec<Arc<Slot>>,
        read: &mut Bytes,
    ) -> Result<Option<Bytes>> {
        while *read < part.bytes {
            let chunk = (part.offset + read.get(), self.chunk(readers, part.bytes - *read));
            let Some(slot) = self.take(readers, &part.file, chunk, Urgency::Urgent, slots.is_empty())? else {
                break;
            };
            *read += slot.len();
            slots.push(slot);
        }
        if slots.is_empty() {
            return Ok(None);
        }
        self.plan(readers)?;
        slots.iter().try_for_each(|slot| slot.wait())?;
        let gone = || EngineError::Invalid("what is read ahead has no memory".to_owned());
        let ring = self.ring.as_mut().ok_or_else(gone)?;
        // SAFETY: the place is the caller's promise.
        if let Err(error) = unsafe { ring.copy(slots, to.addr, to.stream) } {
            self.ring = None;
            self.files.iter_mut().for_each(Known::take_back);
            return Err(error);
        }
        Ok(Some(slots.drain(..).map(|slot| slot.len()).sum()))
    }

    /// How much of the rest is read at once.
    fn chunk(&self, readers: Readers<'_>, rest: Bytes) -> Bytes {
        let half = self.ring.as_ref().map_or(MOST_AT_ONCE, Ring::half);
        rest.min(readers.shared.ring_config.chunk).min(MOST_AT_ONCE).min(half)
    }

    /// A slot that is being filled. With `must` room is made for it, unless what was read ahead in the file at hand has it all.
    fn take(
        &mut self,
        readers: Readers<'_>,
        file: &Arc<SourceFile>,
        (offset, len): (u64, Bytes),
        urgency: Urgency,
        must: bool,
    ) -> Result<Option<Arc<Slot>>> {
        let (slot, filling) = loop {
            let Some(ring) = &mut self.ring else { return Ok(None) };
            if let Some(taken) = ring.take(len)? {
                break taken;
            }
            if !must {
                return Ok(None);
            }
            if !ring.wait_for_oldest()? && !self.take_others_back() {
                return Ok(None);
            }
        };
        let (file, shared) = (Arc::clone(file), Arc::clone(readers.shared));
        let (ahead, pool) = (Arc::downgrade(readers.ahead), Arc::downgrade(readers.pool));
        readers.pool.submit(urgency, move |reader: &mut Reader| {
            let read = |bytes: &mut [u8]| file.read_exact_at(offset, bytes).map_err(EngineError::Transfer);
            filling.fill(&shared, reader, read);
            if let (Some(ahead), Some(pool)) = (ahead.upgrade(), pool.upgrade()) {
                ahead.go_on(&shared, &pool);
            }
        });
        Ok(Some(slot))
    }

    /// Gives up what was read ahead in other files than the one that was used last. Whether there was anything.
    fn take_others_back(&mut self) -> bool {
        let others = self.files.len().saturating_sub(1);
        let staged = self.files[..others].iter().any(|known| !known.staged.is_empty());
        self.files[..others].iter_mut().for_each(Known::take_back);
        staged
    }

    /// Reads ahead in the file that was used last, as far as there is room.
    fn plan(&mut self, readers: Readers<'_>) -> Result<()> {
        loop {
            let Some(known) = self.files.last_mut() else { return Ok(()) };
            let Some(number) = known.growing.take().or_else(|| known.schedule.plan_next()) else {
                return Ok(());
            };
            let (offset, bytes) = known.parts[number as usize];
            let (read, file) = (known.staged.entry(number).or_default().read, Arc::clone(&known.file));
            if read == bytes {
                continue;
            }
            let chunk = (offset + read.get(), self.chunk(readers, bytes - read));
            let slot = self.take(readers, &file, chunk, Urgency::Ahead, false)?;
            let Some(known) = self.files.last_mut() else { return Ok(()) };
            known.growing = Some(number);
            let Some(slot) = slot else { return Ok(()) };
            let staged = known.staged.entry(number).or_default();
            staged.read += slot.len();
            staged.slots.push(slot);
        }
    }
}

impl Known {
    fn new(file: &Arc<SourceFile>) -> Self {
        let mut parts = ranges_as_used(file).unwrap_or_default();
        parts.retain(|(_, bytes)| *bytes >= LEAST);
        let numbers = parts.iter().enumerate().map(|(number, part)| (*part, number as u32)).collect();
        Known {
            file: Arc::clone(file),
            numbers,
            schedule: Schedule::skipping(parts.len() as u32, SKIP),
            parts,
            staged: HashMap::new(),
            growing: None,
        }
    }

    /// Whether it is this file, as it is now.
    fn is(&self, file: &SourceFile) -> bool {
        self.file.stamp() == file.stamp()
    }

    /// A tensor is asked for. What of it was read ahead.
    fn used(&mut self, number: u32) -> Staged {
        let mut dropped = Vec::new();
        self.schedule.used(number, |other| dropped.push(other));
        dropped.into_iter().for_each(|other| self.unstage(other).give_up());
        let found = self.unstage(number);
        self.pass_by(&found);
        found
    }

    /// Another tensor is asked for before those that are staged in front of it.
    fn pass_by(&mut self, asked_for: &Staged) {
        let mut given_up = Vec::new();
        for (&number, staged) in &mut self.staged {
            let is_tiny = self.parts[number as usize].1 < TINY;
            if is_tiny && staged.begins() < asked_for.begins() {
                staged.passed += 1;
                if staged.passed > MOST_PASSED {
                    given_up.push(number);
                }
            }
        }
        given_up.into_iter().for_each(|number| self.unstage(number).give_up());
    }

    /// What of a tensor was read ahead, which is no longer kept here.
    fn unstage(&mut self, number: u32) -> Staged {
        self.growing.take_if(|growing| *growing == number);
        self.staged.remove(&number).unwrap_or_default()
    }

    /// No use is expected any more.
    fn take_back(&mut self) {
        while self.schedule.unplan_last().is_some() {}
        self.growing = None;
        self.staged.drain().for_each(|(_, staged)| staged.give_up());
    }
}

impl Staged {
    /// Where it begins in the ring; behind everything if it does not.
    fn begins(&self) -> u64 {
        self.slots.first().map_or(u64::MAX, |slot| slot.begins())
    }

    /// Nobody will ask for it.
    fn give_up(self) {
        self.slots.iter().for_each(|slot| slot.give_up());
    }
}

fn ring_size(device: &dyn Device) -> Result<Bytes> {
    let (granularity, total) = (device.granularity().get(), device.memory()?.total.get());
    let size = RING.get().min(total / PART_OF_DEVICE) / granularity * granularity;
    Ok(Bytes::new(size.max(granularity)))
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use forebay_device::host::{HostConfig, HostDevice};
    use forebay_device::{DeviceAddr, Event, StreamHandle};

    use super::*;
    use crate::testing::tensor_file;
    use crate::{Budget, Engine, EngineConfig, ExplicitVbar, Use};

    type Tried = std::result::Result<(), Box<dyn Error>>;

    /// An engine, a file of tensors, and room on the device to read one of them to.
    struct Files {
        engine: Arc<Engine>,
        contents: Vec<Vec<u8>>,
        file: tempfile::NamedTempFile,
        target: ExplicitVbar,
        addr: DeviceAddr,
    }

    impl Files {
        const ROOM: Bytes = Bytes::mib(32);

        fn new(capacity: Bytes, contents: Vec<Vec<u8>>) -> std::result::Result<Files, Box<dyn Error>> {
            let device = Arc::new(HostDevice::new(HostConfig { capacity, ..HostConfig::default() })?);
            let config = EngineConfig { budget: Budget::Fixed(Self::ROOM * 2), ..EngineConfig::default() };
            let engine = Engine::new(device, config)?;
            let file = tensor_file(&contents)?;
            let target = engine.vbar("target", Self::ROOM)?;
            let addr = target.alloc(Self::ROOM)?;
            let _signature = target.fault(addr, Self::ROOM, Use::on(StreamHandle::DEFAULT))?;
            Ok(Files { engine, contents, file, target, addr })
        }

        fn read(&self, number: usize) -> Tried {
            let file = SourceFile::open(self.file.path())?;
            let (offset, bytes) = ranges_as_used(&file)?[number];
            let to = OnDevice { addr: self.addr, stream: StreamHandle::DEFAULT };
            // SAFETY: the place is faulted in, and nobody else's.
            unsafe { self.engine.read_to_device(&FilePart { file, offset, bytes }, to) }?;
            let done = Event::new(Arc::clone(&self.engine.shared().device))?;
            // SAFETY: the default stream lives.
            unsafe { done.record(StreamHandle::DEFAULT) }?;
            done.synchronize()?;
            // SAFETY: on this device memory is the process's own, and nothing is under way to it any more.
            let read = unsafe { std::slice::from_raw_parts(self.addr.get() as *const u8, bytes.as_usize()) };
            assert!(read == self.contents[number], "tensor {number}");
            Ok(())
        }

        /// The first slot of a tensor that is read ahead.
        fn slot_of(&self, number: u32) -> Option<Arc<Slot>> {
            let inner = self.engine.ahead.inner.lock();
            inner.files.last()?.staged.get(&number)?.slots.first().map(Arc::clone)
        }

        /// What is read ahead, and how much of each.
        fn staged(&self) -> Vec<(u32, Bytes)> {
            let inner = self.engine.ahead.inner.lock();
            let known = inner.files.last().map(|known| &known.staged);
            let mut found: Vec<_> =
                known.into_iter().flatten().map(|(n, staged)| (*n, staged.read)).collect();
            found.sort_unstable();
            found
        }
    }

    #[test]
    fn what_is_asked_for_early_is_read_beside_what_is_read_ahead() -> Tried {
        let contents: Vec<Vec<u8>> = (0..12).map(|n| vec![n + 1; 1 << 20]).collect();
        // Of which the ring is 4 MiB.
        let files = Files::new(Bytes::mib(128), contents)?;
        files.read(0)?;
        let ahead = || [1, 2, 3].map(|number| files.slot_of(number));
        let before = ahead();
        assert!(before.iter().all(Option::is_some), "{:?}", files.staged());
        for number in [9, 10, 8] {
            files.read(number)?;
            let is_same = before.iter().zip(ahead()).all(|(before, after)| match (before, after) {
                (Some(before), Some(after)) => Arc::ptr_eq(before, &after),
                _ => false,
            });
            assert!(is_same, "what was read ahead of tensor {number} was read again");
        }
        (1..8).try_for_each(|number| files.read(number))?;
        files.target.unpin_everywhere(files.addr, Files::ROOM)?;
        Ok(())
    }

    #[test]
    fn tiny_tensors_are_read_when_asked_for() -> Tried {
        let contents = (0..6).map(|n| vec![n + 1; if n % 2 == 0 { 1 << 20 } else { 27 }]).collect();
        let files = Files::new(Bytes::mib(128), contents)?;
        files.read(2)?;
        let ahead = files.staged();
        assert!(ahead.len() > 1 && ahead.iter().all(|(_, read)| *read == Bytes::mib(1)), "{ahead:?}");
        (0..6).try_for_each(|number| files.read(number))?;
        files.target.unpin_everywhere(files.addr, Files::ROOM)?;
        Ok(())
    }

    #[test]
    fn what_is_small_and_passed_by_again_and_again_is_given_up_and_read_when_asked_for() -> Tried {
        let contents: Vec<Vec<u8>> =
            (0..40).map(|n| vec![n + 1; if n == 1 { 256 } else { 1 << 18 }]).collect();
        let files = Files::new(Bytes::mib(128), contents)?;
        let is_staged = |number: u32| files.staged().iter().any(|(n, _)| *n == number);
        files.read(0)?;
        for number in 2..=1 + usize::from(MOST_PASSED) {
            files.read(number)?;
            assert!(is_staged(1), "{number}: {:?}", files.staged());
        }
        for number in 2 + usize::from(MOST_PASSED)..34 {
            files.read(number)?;
            assert!(!is_staged(1) && is_staged(number as u32 + 1), "{number}: {:?}", files.staged());
        }
        files.read(1)?;
        files.target.unpin_everywhere(files.addr, Files::ROOM)?;
        Ok(())
    }

    #[test]
    fn what_is_read_next_is_ready_before_it_is_asked_for() -> Tried {
        let contents = vec![vec![1; 5 << 20], vec![2; 200], vec![5; 150], vec![3; 3 << 20], vec![4; 7 << 20]];
        let files = Files::new(Bytes::MAX, contents)?;
        let (staged, read) = (|| files.staged(), |number: usize| files.read(number));
        let (engine, file, addr) = (&files.engine, &files.file, files.addr);
        let contents = &files.contents;
        let sizes = contents.iter().map(|bytes| Bytes::new(bytes.len() as u64)).collect::<Vec<_>>();
        let of = |numbers: &[u32]| numbers.iter().map(|n| (*n, sizes[*n as usize])).collect::<Vec<_>>();
        for number in [3, 0, 1, 4] {
            read(number)?;
        }
        // Tensor 2 was never used: it is still expected.
        assert_eq!(staged().first(), Some(&(0, sizes[0])), "the next pass has begun");
        read(3)?;
        let ahead = staged();
        for expected in of(&[0, 1, 4]) {
            assert!(ahead.contains(&expected), "{ahead:?}");
        }
        std::fs::write(file.path(), b"another one")?;
        let part = FilePart { file: SourceFile::open(file.path())?, offset: 0, bytes: Bytes::new(11) };
        // SAFETY: as above.
        unsafe { engine.read_to_device(&part, OnDevice { addr, stream: StreamHandle::DEFAULT }) }?;
        assert_eq!(staged(), [], "what was read of the file as it was is dropped");
        files.target.unpin_everywhere(addr, Files::ROOM)?;
        Ok(())
    }

    #[test]
    fn what_is_read_ahead_stays_while_another_file_is_asked_for_in_between() -> Tried {
        let of = |value: u8| vec![vec![value; 1 << 20]; 12];
        // Of which the ring is 4 MiB.
        let files = Files::new(Bytes::mib(128), of(1))?;
        let other = tensor_file(&of(2))?;
        let part = |number: usize| -> std::result::Result<FilePart, Box<dyn Error>> {
            let file = SourceFile::open(other.path())?;
            let (offset, bytes) = ranges_as_used(&file)?[number];
            Ok(FilePart { file, offset, bytes })
        };
        let to = OnDevice { addr: files.addr, stream: StreamHandle::DEFAULT };
        for number in 0..4 {
            files.read(number)?;
            let ahead = files.slot_of(number as u32 + 1).ok_or("nothing is read ahead")?;
            for of_other in 0..3 {
                // SAFETY: as above.
                unsafe { files.engine.read_to_device(&part(3 * number + of_other)?, to) }?;
            }
            let after = files.slot_of(number as u32 + 1).ok_or("it was dropped")?;
            assert!(Arc::ptr_eq(&ahead, &after), "it was read again");
        }
        let last = || files.engine.ahead.inner.lock().files.last().map(|known| known.file.stamp());
        let at_hand = last();
        files.read(4)?;
        for number in 0..=ASIDE as usize {
            assert_eq!(last(), at_hand, "{number}");
            // SAFETY: as above.
            unsafe { files.engine.read_to_device(&part(number)?, to) }?;
        }
        assert_eq!(last(), Some(part(0)?.file.stamp()));
        files.target.unpin_everywhere(files.addr, Files::ROOM)?;
        Ok(())
    }
}

//! Files read ahead of those who ask for their parts one by one, as ComfyUI does.
//!
//! A safetensors file says where its tensors are, and a [`Schedule`] which is asked for next. The readers bring them into a
//! ring of device memory while the caller does something else, so that a call has nothing to do but to enqueue a copy on the
//! device. What is asked for in another order is dropped and read when it is asked for.

mod ring;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_core::{Bytes, Schedule};
use forebay_device::Device;
use forebay_store::{ReaderPool, SourceFile, Urgency, tensor_ranges};
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
/// Files whose order of use is remembered.
const MOST_FILES: usize = 16;

/// All of it, for one engine. Callers take turns; between their calls readers that have nothing else to do go on.
#[derive(Debug, Default)]
pub(crate) struct Ahead(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    ring: Option<Ring>,
    refused: Option<Instant>,
    /// The one that was used last comes last.
    files: Vec<Known>,
}

/// A file that parts were asked of.
#[derive(Debug)]
struct Known {
    file: Arc<SourceFile>,
    /// Its tensors in the order of their bytes; none where it is no safetensors file.
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
}

/// Who reads, and for whom.
#[derive(Clone, Copy)]
struct Readers<'a> {
    shared: &'a Arc<Shared>,
    pool: &'a Arc<ReaderPool<Reader>>,
    ahead: &'a Arc<Ahead>,
}

impl Ahead {
    /// Reads a part of a file to the device, if it is a tensor of a safetensors file; `None` where it is not, and where there
    /// is no memory for a ring, also after `make_room`.
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
    ) -> Option<Result<()>> {
        let mut inner = self.0.lock();
        let number = inner.find(part)?;
        if inner.ring.is_none() {
            if inner.refused.is_some_and(|refused| refused.elapsed() < REFUSED_FOR) {
                return None;
            }
            let made = ring_size(&*shared.device).and_then(|size| match Ring::new(&shared.device, size) {
                Err(error) if error.is_out_of_memory() => {
                    make_room(size)?;
                    Ring::new(&shared.device, size)
                }
                made => made,
            });
            if let Err(error) = &made {
                tracing::debug!(device = %shared.id, %error, "nothing is read ahead of its use");
                inner.refused = Some(Instant::now());
            }
            inner.ring = Some(made.ok()?);
        }
        // SAFETY: the caller's promise.
        Some(unsafe { inner.read(Readers { shared, pool, ahead: self }, part, number, to) })
    }

    /// Reads ahead unless somebody who calls does it himself.
    fn go_on(self: &Arc<Self>, shared: &Arc<Shared>, pool: &Arc<ReaderPool<Reader>>) {
        if let Some(mut inner) = self.0.try_lock()
            && let Err(error) = inner.plan(Readers { shared, pool, ahead: self })
        {
            tracing::debug!(device = %shared.id, %error, "nothing more is read ahead");
        }
    }

    /// Forgets what was read, and gives the ring back.
    pub(crate) fn end(&self) {
        let mut inner = self.0.lock();
        inner.files.iter_mut().for_each(Known::take_back);
        inner.ring = None;
    }
}

impl Inner {
    /// The number of a tensor of the file that was used last by then.
    fn find(&mut self, part: &FilePart) -> Option<u32> {
        let same = |known: &Known| known.is(&part.file);
        let place = match self.files.iter().position(same) {
            Some(place) => place,
            None => {
                // The same file as it was before it was written to.
                self.files.retain_mut(|known| {
                    let stays =
                        (known.file.dev(), known.file.inode()) != (part.file.dev(), part.file.inode());
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

    /// Reads what is missing, and reads ahead meanwhile.
    unsafe fn read(
        &mut self,
        readers: Readers<'_>,
        part: &FilePart,
        number: u32,
        mut to: OnDevice,
    ) -> Result<()> {
        let Some(known) = self.files.last_mut() else { return Ok(()) };
        let Staged { mut slots, mut read } = known.used(number);
        loop {
            // SAFETY: the caller's promise.
            match unsafe { self.go_on(readers, part, to, &mut slots, &mut read) } {
                Ok(Some(copied)) => to.addr = to.addr.offset(copied),
                Ok(None) => return self.plan(readers),
                Err(error) => {
                    slots.iter().for_each(|slot| slot.give_up());
                    return Err(error);
                }
            }
        }
    }

    /// Copies as much of a part as there is room for; how much it was. `None` where nothing is left to be copied.
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
        let gone = || EngineError::Invalid("what is read ahead has no memory".to_owned());
        if slots.is_empty() {
            return if *read == part.bytes { Ok(None) } else { Err(gone()) };
        }
        self.plan(readers)?;
        slots.iter().try_for_each(|slot| slot.wait())?;
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

    /// A slot that is being filled. With `must` room is made for it.
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
            if !ring.wait_for_oldest()? {
                // Somebody else's plan is in the way.
                self.files.iter_mut().for_each(Known::take_back);
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
        let parts = tensor_ranges(file).unwrap_or_default();
        let numbers = parts.iter().enumerate().map(|(number, part)| (*part, number as u32)).collect();
        Known {
            file: Arc::clone(file),
            numbers,
            schedule: Schedule::new(parts.len() as u32),
            parts,
            staged: HashMap::new(),
            growing: None,
        }
    }

    /// Whether it is this file, as it is now.
    fn is(&self, file: &SourceFile) -> bool {
        let identity = |file: &SourceFile| (file.dev(), file.inode(), file.mtime_ns(), file.len());
        identity(&self.file) == identity(file)
    }

    /// A tensor is asked for. What of it was read ahead.
    fn used(&mut self, number: u32) -> Staged {
        let mut dropped = Vec::new();
        self.schedule.used(number, |other| dropped.push(other));
        dropped.into_iter().for_each(|other| self.unstage(other).give_up());
        self.unstage(number)
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

    use forebay_device::StreamHandle;
    use forebay_device::host::{HostConfig, HostDevice};

    use super::*;
    use crate::testing::tensor_file;
    use crate::{Budget, Engine, EngineConfig, Use};

    #[test]
    fn what_is_read_next_is_ready_before_it_is_asked_for() -> std::result::Result<(), Box<dyn Error>> {
        let device = Arc::new(HostDevice::new(HostConfig::default())?);
        let config = EngineConfig { budget: Budget::Fixed(Bytes::mib(64)), ..EngineConfig::default() };
        let engine = Engine::new(device, config)?;
        let contents = vec![vec![1; 5 << 20], vec![2; 100], Vec::new(), vec![3; 3 << 20], vec![4; 7 << 20]];
        let file = tensor_file(&contents)?;
        let vbar = engine.vbar("target", Bytes::mib(32))?;
        let addr = vbar.alloc(Bytes::mib(32))?;
        let _signature = vbar.fault(addr, Bytes::mib(32), Use::on(StreamHandle::DEFAULT))?;
        let staged = || -> Vec<(u32, Bytes)> {
            let inner = engine.ahead.0.lock();
            let known = inner.files.last().map(|known| &known.staged);
            let mut found: Vec<_> =
                known.into_iter().flatten().map(|(n, staged)| (*n, staged.read)).collect();
            found.sort_unstable();
            found
        };
        let read = |number: usize| -> std::result::Result<(), Box<dyn Error>> {
            let file = SourceFile::open(file.path())?;
            let (offset, bytes) = tensor_ranges(&file)?[number];
            let to = OnDevice { addr, stream: StreamHandle::DEFAULT };
            // SAFETY: the place is faulted in, and nobody else's.
            Ok(unsafe { engine.read_to_device(&FilePart { file, offset, bytes }, to) }?)
        };
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
        vbar.unpin_everywhere(addr, Bytes::mib(32))?;
        Ok(())
    }
}

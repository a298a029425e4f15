//! Bytes of files on their way to memory that the application asks for by itself, and back.
//!
//! The engine's readers share the work. What goes to the device is in the caller's stream when a call returns, in front of
//! all that is enqueued afterwards.

use std::panic;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use forebay_core::Bytes;
use forebay_device::{DeviceAddr, StreamHandle};
use forebay_store::{SourceFile, Urgency};
use parking_lot::{Condvar, Mutex};

use crate::attachment::Attachment;
use crate::engine::Engine;
use crate::filler::source_error;
use crate::host_buffer::{HostBuffer, HostRange};
use crate::reader::Reader;
use crate::state::Shared;
use crate::{EngineError, Result};

/// What is read without the readers: handing it on takes as long.
const LEAST_SHARED: Bytes = Bytes::kib(128);

/// A part of an open file.
#[derive(Clone, Debug)]
pub struct FilePart {
    /// The file.
    pub file: Arc<SourceFile>,
    /// Where in it.
    pub offset: u64,
    /// How much of it.
    pub bytes: Bytes,
}

/// How bytes of a file get to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadBy {
    /// Through pinned memory, and maybe read ahead.
    Readers,
    /// From the page cache, which is registered.
    CopyEngine,
}

/// A place on the device, and the stream whose order copies to it or from it follow.
#[derive(Clone, Copy, Debug)]
pub struct OnDevice {
    /// The first address.
    pub addr: DeviceAddr,
    /// The stream.
    pub stream: StreamHandle,
}

impl Engine {
    /// Reads a part of a file to the device. Work that is enqueued in the stream after this returns finds the bytes.
    ///
    /// At first they go through pinned memory; tensors of a safetensors file are read ahead of the calls that ask for them, in
    /// the order in which they were asked for before. Then a part is registered in the background where it is in the page cache, as
    /// far as memory is free ([`EngineConfig::registered`](crate::EngineConfig::registered)), and the copy engine reads it by itself,
    /// until the file is written to or [forgotten](Engine::forget_file). What goes to pages of a model that
    /// [runs](crate::ExplicitVbar::begin_run) is registered once they leave during that run, or when it is asked for again in the same
    /// run or in a third one.
    ///
    /// # Errors
    /// [`EngineError::Transfer`] where the file cannot be read, and what the device reports. The place then holds arbitrary
    /// bytes.
    ///
    /// # Safety
    /// The place is memory of this device and nobody else's until the copies have ended; the stream is one of the device and
    /// lives as long.
    pub unsafe fn read_to_device(&self, part: &FilePart, to: OnDevice) -> Result<ReadBy> {
        part.check()?;
        let shared = self.shared();
        // SAFETY: as the caller promises.
        if unsafe { shared.copy_from_cache(part, to) }? {
            self.ahead.note_unused();
            return Ok(ReadBy::CopyEngine);
        }
        let mut begun = Bytes::ZERO;
        if let Some(readers) = self.readers() {
            let make_room = |bytes| self.make_room(bytes).map(drop);
            // SAFETY: as the caller promises.
            begun = unsafe { self.ahead.read(shared, &readers, part, to, make_room) }?;
        }
        let (from, rest) = (part.clone(), part.bytes - begun);
        if rest == Bytes::ZERO {
            return Ok(ReadBy::Readers);
        }
        self.for_each_chunk(rest, move |shared, reader, at, len| {
            let at = begun + at;
            let addr = to.addr.offset(at);
            let read = |bytes: &mut [u8]| from.read(at, bytes);
            // SAFETY: as the caller promises.
            unsafe { reader.copy_in(shared, len, (addr, to.stream), read) }
        })
        .map(|()| ReadBy::Readers)
    }

    /// Nobody asks for parts of a file any more, told by its device and inode: what is registered of it is given back in the
    /// background. Without one, of any file.
    pub fn forget_file(&self, file: Option<(u64, u64)>) {
        self.shared().state.lock().registering.forget_file(file);
        self.shared().register.notify_one();
    }

    /// Forgets what was read ahead of [`read_to_device`](Engine::read_to_device), and gives the memory for it back. May wait
    /// for the device.
    pub fn end_read_ahead(&self) {
        self.ahead.end();
    }

    /// Writes what work now in the stream leaves at a place on the device to a part of a file, and returns when the bytes
    /// are written.
    ///
    /// # Errors
    /// As [`read_to_device`](Engine::read_to_device).
    ///
    /// # Safety
    /// The place is memory of this device, which nobody writes to until this returns; the stream is one of the device.
    pub unsafe fn write_from_device(&self, part: &FilePart, from: OnDevice) -> Result<()> {
        let to = part.clone();
        self.for_each_chunk(part.bytes, move |shared, reader, at, len| {
            let addr = from.addr.offset(at);
            let write = |bytes: &[u8]| to.write(at, bytes);
            // SAFETY: as the caller promises.
            unsafe { reader.copy_out(shared, len, (addr, from.stream), write) }
        })
    }

    /// See [`HostBuffer::read`].
    unsafe fn read_to_host(
        &self,
        part: &FilePart,
        buffer: &Arc<HostRange>,
        at: Bytes,
        to: Option<OnDevice>,
    ) -> Result<()> {
        let dst = Address(buffer.at(at, part.bytes)?);
        let (from, whole) = (part.clone(), dst);
        let copied = self.for_each_chunk(part.bytes, move |shared, _, at, len| {
            let dst = whole.after(at);
            // SAFETY: the chunk lies in the part, which is the caller's alone, and no other chunk overlaps it.
            let bytes = unsafe { std::slice::from_raw_parts_mut(dst, len.as_usize()) };
            from.read(at, bytes)?;
            if let Some(to) = to {
                // SAFETY: the buffer keeps its memory until copies have ended that are noted below, and so does the caller
                // the place.
                unsafe { shared.device.copy_to_device(to.addr.offset(at), dst, len, to.stream) }?;
            }
            Ok(())
        });
        // Also where a chunk failed: others are under way.
        let noted = to.map_or(Ok(()), |to| buffer.note_copies(&self.shared().device, to.stream));
        copied.and(noted)
    }

    /// Has the readers work on `bytes` in chunks, and waits for the last.
    fn for_each_chunk(
        &self,
        bytes: Bytes,
        work: impl Fn(&Shared, &mut Reader, Bytes, Bytes) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        let shared = self.shared();
        let stopped = |reason: &str| EngineError::Stopped { device: shared.id, reason: reason.to_owned() };
        shared.state.lock().check()?;
        let readers = self.readers().ok_or_else(|| stopped("it was shut down"))?;
        let chunk = shared.ring_config.chunk.get();
        let chunks = bytes.get().div_ceil(chunk);
        let (work, left) = (Arc::new(work), Arc::new(Left::new(chunks)));
        for start in (0..bytes.get()).step_by(chunk as usize) {
            let (shared, work, left) = (Arc::clone(shared), Arc::clone(&work), Arc::clone(&left));
            let (at, len) = (Bytes::new(start), Bytes::new(chunk.min(bytes.get() - start)));
            readers.submit(Urgency::Urgent, move |reader: &mut Reader| {
                if left.has_failed() {
                    return left.done(Ok(()));
                }
                let done = panic::catch_unwind(panic::AssertUnwindSafe(|| work(&shared, reader, at, len)));
                let panicked = "a reader thread panicked; see the log".to_owned();
                let device = shared.id;
                left.done(done.unwrap_or(Err(EngineError::Stopped { device, reason: panicked })));
            });
        }
        left.wait()
    }
}

impl Attachment {
    /// Reads a weight's bytes, as they are stored, to memory of the application's on the device, through the readers'
    /// pinned slots. Work that is enqueued in the stream after this returns finds them.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist, [`EngineError::Source`] where it cannot be read, and what the
    /// device reports. The place then holds arbitrary bytes.
    ///
    /// # Safety
    /// As for [`Engine::read_to_device`].
    pub unsafe fn read_to_device(&self, weight: usize, to: OnDevice) -> Result<()> {
        let source = self.source(weight)?.clone();
        let vbar = Arc::clone(self.vbar());
        vbar.counters.filled_bytes.fetch_add(source.len().get(), Ordering::Relaxed);
        self.engine().for_each_chunk(source.len(), move |shared, reader, at, len| {
            let read = |bytes: &mut [u8]| {
                let read = source.verify().and_then(|()| source.read_at(at.get(), bytes));
                read.map_err(|error| source_error(&vbar, weight as u32, error))
            };
            // SAFETY: as the caller promises.
            unsafe { reader.copy_in(shared, len, (to.addr.offset(at), to.stream), read) }
        })
    }
}

impl HostBuffer {
    /// Reads a part of a file into the buffer, and returns when the bytes are there. With a place on an engine's device they
    /// also go there, as by [`Engine::read_to_device`]. What is registered of the part for that is given back a while later: the
    /// buffer has it.
    ///
    /// # Errors
    /// As [`Engine::read_to_device`]; [`EngineError::Invalid`] for a part that the buffer does not have.
    ///
    /// # Safety
    /// Nobody else uses that part of the buffer until this returns, nor writes to it until the copies have ended. The place
    /// is as for [`Engine::read_to_device`].
    pub unsafe fn read(&self, part: &FilePart, at: Bytes, to: Option<(&Engine, OnDevice)>) -> Result<()> {
        part.check()?;
        let range = self.range();
        let engine = to.map(|(engine, _)| engine).or(range.engine().map(|engine| &**engine));
        if let Some(engine) = engine {
            engine.shared().state.lock().registering.part_copied(part);
        }
        match engine {
            Some(engine) if to.is_some() || part.bytes > LEAST_SHARED => {
                // SAFETY: as the caller promises.
                unsafe { engine.read_to_host(part, &range, at, to.map(|(_, place)| place)) }
            }
            _ => {
                let dst = range.at(at, part.bytes)?;
                // SAFETY: `at` checked that the part lies in the buffer, and it is the caller's alone.
                part.read(Bytes::ZERO, unsafe { std::slice::from_raw_parts_mut(dst, part.bytes.as_usize()) })
            }
        }
    }
}

impl FilePart {
    /// Whether the file has it.
    fn check(&self) -> Result<()> {
        self.file.check_range(self.offset, self.bytes).map_err(EngineError::Transfer)
    }

    fn read(&self, at: Bytes, bytes: &mut [u8]) -> Result<()> {
        let offset = self.offset.saturating_add(at.get());
        self.file.read_exact_at(offset, bytes).map_err(EngineError::Transfer)
    }

    fn write(&self, at: Bytes, bytes: &[u8]) -> Result<()> {
        let offset = self.offset.saturating_add(at.get());
        self.file.write_all_at(offset, bytes).map_err(EngineError::Transfer)
    }
}

/// A place in host memory, on its way to readers.
#[derive(Clone, Copy)]
struct Address(*mut u8);

impl Address {
    fn after(self, bytes: Bytes) -> *mut u8 {
        self.0.wrapping_add(bytes.as_usize())
    }
}

// SAFETY: who gives the address away sees to it that nobody else uses the memory meanwhile.
unsafe impl Send for Address {}
// SAFETY: as for `Send`; the chunks that are worked on lie apart.
unsafe impl Sync for Address {}

/// How many chunks are left, and what went wrong first.
struct Left {
    state: Mutex<(u64, Option<EngineError>)>,
    changed: Condvar,
}

impl Left {
    fn new(chunks: u64) -> Self {
        Left { state: Mutex::new((chunks, None)), changed: Condvar::new() }
    }

    fn has_failed(&self) -> bool {
        self.state.lock().1.is_some()
    }

    fn done(&self, result: Result<()>) {
        let mut state = self.state.lock();
        state.0 -= 1;
        if let Err(error) = result {
            state.1.get_or_insert(error);
        }
        if state.0 == 0 {
            drop(state);
            self.changed.notify_all();
        }
    }

    fn wait(&self) -> Result<()> {
        let mut state = self.state.lock();
        while state.0 > 0 {
            self.changed.wait(&mut state);
        }
        state.1.take().map_or(Ok(()), Err)
    }
}

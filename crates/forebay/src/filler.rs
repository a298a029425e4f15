//! Filling a page: readers bring its bytes into pinned slots, the copy engine moves them to the page.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use forebay_core::{Bytes, PageRef};
use forebay_device::{Event, StreamHandle};
use forebay_store::{
    DirectBuffer, ReaderPool, Segment, Source, StoreError, Urgency, read_segments, read_segments_past_cache,
};
use parking_lot::Mutex;

use crate::converting::ConvertedPart;
use crate::copier::{Brought, PageCopy};
use crate::patches::{Completed, Incomplete, PatchSet, computes, mark_filled};
use crate::reader::{Reader, copy_in_turn};
use crate::state::Shared;
use crate::timeline::Activity;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// One page's fill, shared by the readers of its chunks.
pub(crate) struct Fill {
    shared: Arc<Shared>,
    vbar: Arc<Vbar>,
    page: u32,
    filled: Arc<Event>,
    /// In force when it began: what these compute is not read.
    patches: Arc<PatchSet>,
    chunks_left: AtomicUsize,
    past_cache: bool,
    has_failed: AtomicBool,
    error: Mutex<Option<EngineError>>,
    began: Option<Instant>,
    _brought: Option<Brought>,
}

/// What a reader does at once.
enum Job {
    /// A run of the page, copied as it is.
    Copied(Range<u64>),
    /// A part of a weight that is converted.
    Converted(ConvertedPart),
}

impl Fill {
    /// Hands the page's chunks to the readers. The state learns of the end.
    pub(crate) fn start(
        shared: &Arc<Shared>,
        vbar: &Arc<Vbar>,
        page: u32,
        filled: Arc<Event>,
        readers: &ReaderPool<Reader>,
        urgency: Urgency,
        past_cache: bool,
    ) {
        let patches = vbar.patches.current();
        let jobs = jobs_of(vbar, page, &patches, shared.ring_config.chunk);
        let fill = Arc::new(Fill {
            shared: Arc::clone(shared),
            vbar: Arc::clone(vbar),
            page,
            filled,
            patches,
            chunks_left: AtomicUsize::new(jobs.len().max(1)),
            past_cache,
            has_failed: AtomicBool::new(false),
            error: Mutex::new(None),
            began: shared.timeline.begin(),
            _brought: (urgency == Urgency::Urgent).then(|| Brought::new(shared)),
        });
        if jobs.is_empty() {
            fill.chunk_done();
        }
        for job in jobs {
            let fill = Arc::clone(&fill);
            readers.submit(urgency, move |reader| {
                // A reader that panics must not leave the page waiting for ever.
                let done = ChunkDone(&fill);
                let ran = match job {
                    Job::Copied(run) => fill.run(run, reader),
                    Job::Converted(part) => fill.convert(part, reader),
                };
                if let Err(error) = ran {
                    fill.fail(error);
                }
                drop(done);
            });
        }
    }

    fn run(&self, Range { start, end }: Range<u64>, reader: &mut Reader) -> Result<()> {
        if self.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(layout) = &self.vbar.layout else { return Ok(()) };
        let segments = layout.segments[self.page as usize].iter().zip(&layout.weight_of[self.page as usize]);
        let in_run: Vec<_> = segments
            .filter(|(_, weight)| !computes(&self.patches, **weight))
            .filter(|(s, _)| s.dst_offset < end && s.dst_offset + s.len > start)
            .collect();
        // Without the padding at its ends.
        let first = in_run.iter().map(|(s, _)| s.dst_offset.max(start)).min().unwrap_or(start);
        let last = in_run.iter().map(|(s, _)| (s.dst_offset + s.len).min(end)).max().unwrap_or(start);
        let len = Bytes::new(last - first);
        let (slots, through) = reader.parts(&self.shared)?;
        let timeline = &self.shared.timeline;
        let began = timeline.begin();
        let (slot, copied) = slots.next()?;
        timeline.note(Activity::Slot, self.page, began);
        let began = timeline.begin();
        // SAFETY: the slot is this reader's own, and `next` waited for the copy that read it last.
        let bytes = unsafe { slots.buffer.slice_mut(slot, len) };
        for (segment, weight) in in_run {
            self.read(segment, first, bytes, through)
                .map_err(|error| source_error(&self.vbar, *weight, error))?;
        }
        timeline.note(Activity::Read, self.page, began);
        let to = self.vbar.page_addr(self.page).offset(Bytes::new(first));
        let stream = self.shared.copy.lock();
        // SAFETY: the slot is not touched before its event has completed; the page is mapped and stays so until its
        // fill event, recorded after this copy, has completed.
        unsafe { copy_in_turn(&self.shared, bytes, to, stream.handle()) }?;
        // SAFETY: the copy stream lives as long as `shared`.
        let recorded = unsafe { slots.copied[copied].record(stream.handle()) };
        drop(stream);
        self.slot_used(recorded, reader, len)
    }

    /// Reads a piece of a weight as it is stored, and has it converted.
    fn convert(&self, part: ConvertedPart, reader: &mut Reader) -> Result<()> {
        if self.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(layout) = &self.vbar.layout else { return Ok(()) };
        let Some(conversion) = layout.conversion(part.weight) else { return Ok(()) };
        let segment = part.stored(conversion, &layout.sources[part.weight as usize]);
        let len = Bytes::new(segment.len);
        let (slots, through) = reader.parts(&self.shared)?;
        let began = self.shared.timeline.begin();
        let (slot, copied) = slots.next()?;
        self.shared.timeline.note(Activity::Slot, self.page, began);
        let began = self.shared.timeline.begin();
        // SAFETY: the slot is this reader's own, and `next` waited for the work that read it last.
        let bytes = unsafe { slots.buffer.slice_mut(slot, len) };
        self.read(&segment, 0, bytes, through)
            .map_err(|error| source_error(&self.vbar, part.weight, error))?;
        self.shared.timeline.note(Activity::Read, self.page, began);
        let transform = part.transform(conversion, self.vbar.page_addr(self.page), bytes.as_ptr());
        let copies = self.shared.copy.lock();
        let patching = self.shared.patching.handle();
        // SAFETY: the slot is not touched before its event has completed, and the scale kept as long as the VBAR; the page
        // is mapped and stays so until its fill event, recorded after this work, has completed.
        unsafe { self.shared.device.transform(&transform, patching) }?;
        // SAFETY: the stream lives as long as `shared`.
        let recorded = unsafe { slots.copied[copied].record(patching) };
        drop(copies);
        self.slot_used(recorded, reader, len)
    }

    fn read(
        &self,
        segment: &Segment,
        first: u64,
        bytes: &mut [u8],
        through: &mut DirectBuffer,
    ) -> std::result::Result<(), StoreError> {
        segment.source.verify()?;
        let segment = std::slice::from_ref(segment);
        match self.past_cache {
            true => read_segments_past_cache(segment, first, bytes, through),
            false => read_segments(segment, first, bytes),
        }
    }

    /// What a reader read is on its way, marked by its slot's event.
    fn slot_used(&self, recorded: forebay_device::Result<()>, reader: &mut Reader, len: Bytes) -> Result<()> {
        reader.slot_marked(recorded)?;
        self.vbar.counters.filled_bytes.fetch_add(len.get(), Ordering::Relaxed);
        if self.past_cache {
            self.vbar.counters.past_cache_bytes.fetch_add(len.get(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn fail(&self, error: EngineError) {
        self.error.lock().get_or_insert(error);
        self.has_failed.store(true, Ordering::Release);
    }

    fn chunk_done(&self) {
        if self.chunks_left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let stream = self.shared.copy.lock();
        let completed = match self.has_failed.load(Ordering::Acquire) {
            true => self
                .shared
                .mark_enqueued(&self.vbar, self.page, &self.filled, &stream)
                .map(|()| Completed::Now),
            false => self.shared.complete(&self.vbar, &self.patches, self.page, &self.filled, &stream),
        };
        drop(stream);
        let completed = completed.unwrap_or_else(|error| {
            self.fail(incomplete(&self.shared, error));
            Completed::Now
        });
        self.shared.timeline.note(Activity::Fill, self.page, self.began);
        let error = self.error.lock().take();
        if error.is_none() {
            self.vbar.counters.filled_pages.fetch_add(1, Ordering::Relaxed);
        }
        hand_on(&self.shared, &self.vbar, self.page, &self.filled, error.map_or(Ok(completed), Err));
    }
}

/// The reads that a page takes.
fn jobs_of(vbar: &Vbar, page: u32, patches: &PatchSet, chunk: Bytes) -> Vec<Job> {
    let Some(layout) = &vbar.layout else { return Vec::new() };
    let (segments, converted) = (&layout.segments[page as usize], &layout.converted[page as usize]);
    // Neighbouring segments are one run, padding included. Nothing is copied over what is converted, or computed.
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut begins_anew = true;
    for (segment, weight) in segments.iter().zip(&layout.weight_of[page as usize]) {
        if computes(patches, *weight) {
            begins_anew = true;
            continue;
        }
        let (start, end) = (segment.dst_offset, segment.dst_offset + segment.len);
        let begins = std::mem::take(&mut begins_anew);
        match runs.last_mut().filter(|_| !begins) {
            Some(run) if !converted.iter().any(|part| (run.end..start).contains(&part.to.get())) => {
                run.end = end
            }
            _ => runs.push(start..end),
        }
    }
    let converted = converted.iter().filter(|part| !computes(patches, part.weight));
    let chunk = chunk.get();
    let chunks = runs.iter().flat_map(|run| {
        (run.start / chunk..run.end.div_ceil(chunk))
            .map(|n| Job::Copied(run.start.max(n * chunk)..run.end.min((n + 1) * chunk)))
    });
    let pieces = converted.flat_map(|part| {
        let conversion = layout.conversion(part.weight).into_iter();
        conversion.flat_map(move |conversion| part.pieces(conversion, Bytes::new(chunk)))
    });
    chunks.chain(pieces.map(Job::Converted)).collect()
}

/// Has the copy engine read a page's bytes from the registered page cache, and records `copied` behind the copies. `behind` is
/// called between the two, with the copy stream.
pub(crate) fn fill_directly(
    shared: &Arc<Shared>,
    copy: &PageCopy,
    copied: &Event,
    behind: impl FnOnce(StreamHandle),
) {
    let PageCopy { vbar, page, registered, filled } = copy;
    let page = *page;
    let began = shared.timeline.begin();
    let result = verify_sources(vbar, page).and_then(|()| {
        let stream = shared.copy.lock();
        // SAFETY: the page is mapped and stays so until its fill event, recorded after these copies, has completed. The
        // registered page is dropped by the keeper alone, once nobody else has it, behind all copies.
        let enqueued = unsafe { registered.copy_to(&*shared.device, vbar.page_addr(page), stream.handle()) };
        let enqueued = enqueued.and_then(|()| {
            behind(stream.handle());
            // SAFETY: the copy stream lives as long as `shared`.
            unsafe { copied.record(stream.handle()) }.map_err(Into::into)
        });
        let completed = match &enqueued {
            Ok(()) => shared.complete(vbar, &vbar.patches.current(), page, filled, &stream),
            Err(_) => mark_filled(filled, stream.handle()).map(|()| Completed::Now),
        };
        drop(stream);
        let completed = completed.map_err(|error| incomplete(shared, error))?;
        enqueued?;
        Ok(completed)
    });
    if result.is_ok() {
        vbar.counters.filled_bytes.fetch_add(registered.bytes().get(), Ordering::Relaxed);
        vbar.counters.direct_bytes.fetch_add(registered.bytes().get(), Ordering::Relaxed);
        vbar.counters.filled_pages.fetch_add(1, Ordering::Relaxed);
    }
    shared.timeline.note(Activity::Fill, page, began);
    hand_on(shared, vbar, page, filled, result);
}

/// What comes after a page's copies.
fn hand_on(
    shared: &Arc<Shared>,
    vbar: &Arc<Vbar>,
    page: u32,
    filled: &Arc<Event>,
    result: Result<Completed>,
) {
    match result {
        Ok(Completed::Now) => finished(shared, vbar, page, Ok(())),
        Ok(Completed::Outdated) => finished(shared, vbar, page, Err(None)),
        Ok(Completed::Later(patches)) => shared.complete_later(vbar, &patches, page, filled),
        Err(error) => finished(shared, vbar, page, Err(Some(error))),
    }
}

/// Asks every file of a page once whether it is still what it was.
fn verify_sources(vbar: &Vbar, page: u32) -> Result<()> {
    let Some(layout) = &vbar.layout else { return Ok(()) };
    let mut last: Option<&Source> = None;
    for (segment, weight) in layout.segments[page as usize].iter().zip(&layout.weight_of[page as usize]) {
        if !last.is_some_and(|last| last.shares_file_with(&segment.source)) {
            segment.source.verify().map_err(|error| source_error(vbar, *weight, error))?;
        }
        last = Some(&segment.source);
    }
    Ok(())
}

/// The error of a page that was not completed. Without the mark behind its copies the engine is lost.
pub(crate) fn incomplete(shared: &Shared, error: Incomplete) -> EngineError {
    match error {
        Incomplete::Unpatched(error) => error,
        Incomplete::Unmarked(error) => {
            shared.state.lock().books.lost(error.clone());
            error
        }
    }
}

pub(crate) fn source_error(vbar: &Vbar, weight: u32, error: StoreError) -> EngineError {
    let name = vbar.layout.as_ref().and_then(|layout| layout.names.get(weight as usize));
    EngineError::Source {
        model: vbar.name.clone(),
        weight: name.cloned().unwrap_or_default(),
        error: Box::new(error),
    }
}

/// Tells the state that a page is filled, or why not; without a reason, whoever waits for it asks for it again.
pub(crate) fn finished(
    shared: &Shared,
    vbar: &Vbar,
    page: u32,
    result: std::result::Result<(), Option<EngineError>>,
) {
    match &result {
        Err(Some(error)) if vbar.closed.load(Ordering::Acquire) => {
            tracing::debug!(model = %vbar.name, page, %error, "a page of a model that goes could not be filled");
        }
        Err(Some(error)) => {
            tracing::warn!(model = %vbar.name, page, %error, "a page could not be filled");
        }
        _ => {}
    }
    let at: PageRef = vbar.page_ref(page);
    let mut state = shared.state.lock();
    state.filling.remove(&vbar.serial(page));
    match result {
        Ok(()) => {
            if vbar.layout.is_none() {
                vbar.cell(page).set_ready();
            } else if state.went_through_ring(at) {
                shared.register.notify_one();
            }
            state.arrived(vbar, page);
        }
        Err(error) => {
            if let Some(EngineError::Device(device)) = &error
                && device.is_lost()
            {
                state.books.lost(device.clone().into());
            }
            let filled = state.books.filled(at);
            let entry = state.books.page(at);
            entry.leaving.extend(filled);
            entry.error = error;
            state.decide(|policy, _, out| policy.failed(at, out));
        }
    }
    drop(state);
    shared.changed.notify_all();
    shared.nudge_mover();
}

/// Counts a chunk as done, however its job ends.
struct ChunkDone<'a>(&'a Fill);

impl Drop for ChunkDone<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = "a reader thread panicked; see the log".to_owned();
            self.0.fail(EngineError::Stopped { device: self.0.shared.id, reason });
        }
        self.0.chunk_done();
    }
}

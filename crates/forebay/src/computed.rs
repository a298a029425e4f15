//! Weights that the application computes: patches that are no products of low rank.
//!
//! A page that holds a part of such a weight is handed to one thread when its copies are enqueued. The thread has the
//! application compute the weight, copies its part to the page, and completes the page. The results of two weights are kept
//! for as long as pages of them follow: a page may hold parts of both, and pages come in no strict order. Lock order: the queue, then the copy lock; nothing is computed under either, and the state
//! lock is not taken with it.
//!
//! The application may need locks that whoever detaches the model holds (Python's). So nobody waits for it then: what is
//! computed for a model that goes is abandoned.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::Builder;
use std::time::Duration;

use forebay_core::VbarId;
use forebay_device::{DeviceAddr, Event, StreamHandle, Transform};
use parking_lot::{Condvar, Mutex};

use crate::filler::{self, incomplete};
use crate::layout::Layout;
use crate::patches::{Incomplete, PatchSet, computes, parts_of};
use crate::state::Shared;
use crate::vbar::Vbar;
use crate::{EngineError, Result};

/// How many results are kept, and how long without a further page.
const MOST_KEPT: usize = 2;
const KEPT_FOR: Duration = Duration::from_millis(200);

/// Computes a weight as a whole.
pub trait Compute: Send + Sync {
    /// The weight as it is to be, without its products of low rank. Called without locks, by one thread of the engine; what
    /// it does must not wait for uses of the same model.
    ///
    /// # Errors
    /// Why not, for people. Uses of the weight fail with it.
    fn compute(&self) -> std::result::Result<Computed, String>;
}

/// A computed weight on the device.
pub struct Computed {
    /// Where it is; as long as the weight.
    pub at: DeviceAddr,
    /// The stream of the work that writes it.
    pub written_on: StreamHandle,
    /// Keeps its memory.
    pub keep: Box<dyn Any + Send>,
}

/// What the computing thread has to do.
#[derive(Default)]
pub(crate) struct Computing {
    queue: Mutex<Queue>,
    /// Something was handed in, or the thread is to end.
    handed_in: Condvar,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Job>,
    /// What the thread works on; taken away where it is abandoned.
    running: Option<Job>,
    is_started: bool,
    stop: bool,
}

/// A page whose copies are enqueued and marked.
#[derive(Clone)]
struct Job {
    vbar: Arc<Vbar>,
    patches: Arc<PatchSet>,
    page: u32,
    filled: Arc<Event>,
}

/// A result that is kept, by what computed it.
struct Kept {
    by: Arc<dyn Compute>,
    computed: Computed,
}

impl Shared {
    /// Has a page completed once its computed weights are there.
    pub(crate) fn complete_later(
        self: &Arc<Self>,
        vbar: &Arc<Vbar>,
        patches: &Arc<PatchSet>,
        page: u32,
        filled: &Arc<Event>,
    ) {
        let (patches, filled) = (Arc::clone(patches), Arc::clone(filled));
        let job = Job { vbar: Arc::clone(vbar), patches, page, filled };
        let mut queue = self.computing.queue.lock();
        // Before a model's jobs are abandoned it is marked as closed.
        let refused = match queue.stop {
            true => Some(Some(self.shut_down())),
            false if vbar.closed.load(Ordering::Acquire) => Some(None),
            false => self.start_computing(&mut queue).err().map(Some),
        };
        if let Some(reason) = refused {
            drop(queue);
            return filler::finished(self, vbar, page, Err(reason));
        }
        queue.waiting.push_back(job);
        drop(queue);
        self.computing.handed_in.notify_one();
    }

    fn start_computing(self: &Arc<Self>, queue: &mut Queue) -> Result<()> {
        if queue.is_started {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let name = "forebay-patch";
        let body = move || shared.compute_until_stopped();
        // Nobody waits for its end: it may be in code of the application.
        Builder::new().name(name.to_owned()).spawn(body).map_err(|error| EngineError::Stopped {
            device: self.id,
            reason: format!("its thread {name} cannot be started: {error}"),
        })?;
        queue.is_started = true;
        Ok(())
    }

    /// Nobody needs the pages of a model any more (of any, without one): they count as not filled.
    pub(crate) fn abandon_computing(&self, of: Option<VbarId>) {
        let mut queue = self.computing.queue.lock();
        queue.stop |= of.is_none();
        let is_of = |job: &Job| of.is_none_or(|id| job.vbar.id == id);
        let (gone, waiting) = queue.waiting.drain(..).partition::<VecDeque<_>, _>(is_of);
        queue.waiting = waiting;
        let running = queue.running.take_if(|job| is_of(job));
        drop(queue);
        self.computing.handed_in.notify_one();
        // Whoever waits for a model that goes asks again, and is told so. For an engine that ends that would never end.
        let reason = of.is_none().then(|| self.shut_down());
        for job in gone.into_iter().chain(running) {
            filler::finished(self, &job.vbar, job.page, Err(reason.clone()));
        }
    }

    fn compute_until_stopped(&self) {
        let _guard = EndsWithPanic(self);
        let mut kept: VecDeque<Kept> = VecDeque::new();
        let done = Event::new(Arc::clone(&self.device));
        loop {
            let mut queue = self.computing.queue.lock();
            let job = loop {
                match queue.waiting.pop_front() {
                    Some(job) => break Some(job),
                    None if queue.stop => break None,
                    None if kept.is_empty() => self.computing.handed_in.wait(&mut queue),
                    None if self.computing.handed_in.wait_for(&mut queue, KEPT_FOR).timed_out() => {
                        break None;
                    }
                    None => {}
                }
            };
            queue.running.clone_from(&job);
            let stop = queue.stop;
            drop(queue);
            match job {
                Some(job) => self.compute_page(&job, &mut kept, done.as_ref().ok()),
                None => self.keep_at_most(0, &mut kept, done.as_ref().ok()),
            }
            if stop {
                return self.keep_at_most(0, &mut kept, done.as_ref().ok());
            }
        }
    }

    fn compute_page(&self, job: &Job, kept: &mut VecDeque<Kept>, done: Option<&Event>) {
        let Some(layout) = &job.vbar.layout else { return };
        let result = self.computed_page(job, layout, kept, done);
        // Where it was abandoned, somebody else has told.
        if self.computing.queue.lock().running.take().is_some() {
            filler::finished(self, &job.vbar, job.page, result);
        }
    }

    /// Without a reason it is to be filled again.
    fn computed_page(
        &self,
        job: &Job,
        layout: &Layout,
        kept: &mut VecDeque<Kept>,
        done: Option<&Event>,
    ) -> std::result::Result<(), Option<EngineError>> {
        let set = &job.patches;
        for part in parts_of(layout, &job.vbar, job.page) {
            let Some(by) = set.get(&part.weight).and_then(|patch| patch.computed.clone()) else { continue };
            let place = kept.iter().position(|kept| Arc::ptr_eq(&kept.by, &by));
            let latest = match place.and_then(|place| kept.remove(place)) {
                Some(found) => found,
                None => {
                    self.keep_at_most(MOST_KEPT - 1, kept, done);
                    let computed = by.compute().map_err(|reason| EngineError::Computed {
                        model: job.vbar.name.clone(),
                        weight: layout.names[part.weight as usize].clone(),
                        reason,
                    })?;
                    Kept { by, computed }
                }
            };
            let Computed { at, written_on, .. } = latest.computed;
            kept.push_back(latest);
            let copy = Transform::Copy {
                to: job.vbar.base().offset(part.start),
                from: at.offset(part.start - layout.weights[part.weight as usize].offset),
                len: part.end - part.start,
            };
            self.enqueue(|| {
                self.patch_behind(&job.filled, |patching| self.copy_computed(&copy, written_on, patching))
            })?;
        }
        let is_current = self.enqueue(|| match job.vbar.patches.is(set) {
            true => self.add_products(&job.vbar, set, job.page, &job.filled).map(|()| true),
            false => Ok(false),
        })?;
        // Otherwise what is on the page is neither the one nor the other.
        is_current.then_some(()).ok_or(None)
    }

    /// Enqueues work on the page that is worked on, under the copy lock, unless it was abandoned.
    fn enqueue<T>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, Incomplete>,
    ) -> std::result::Result<T, Option<EngineError>> {
        let queue = self.computing.queue.lock();
        if queue.running.is_none() {
            return Err(None);
        }
        let copies = self.copy.lock();
        let worked = work();
        drop(copies);
        drop(queue);
        worked.map_err(|error| Some(incomplete(self, error)))
    }

    /// Copies a part of a result to its page, in the patching stream.
    fn copy_computed(
        &self,
        copy: &Transform,
        written_on: StreamHandle,
        patching: StreamHandle,
    ) -> Result<()> {
        let written = Event::new(Arc::clone(&self.device))?;
        // SAFETY: a stream exists as long as anything remembers its handle.
        unsafe { written.record(written_on) }?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { written.wait_on(patching) }?;
        // SAFETY: the page is mapped until its fill event, recorded next, has completed; the result is kept until what is in
        // this stream by then is done.
        unsafe { self.device.transform(copy, patching) }.map_err(Into::into)
    }

    /// Drops the results that were used least recently once nothing on the device reads them any more.
    fn keep_at_most(&self, most: usize, kept: &mut VecDeque<Kept>, done: Option<&Event>) {
        let gone: Vec<Kept> = kept.drain(..kept.len().saturating_sub(most)).collect();
        if gone.is_empty() {
            return;
        }
        let copies = self.copy.lock();
        // SAFETY: the stream lives as long as `self`.
        let marked = done.map(|done| unsafe { done.record(self.patching.handle()) }.map(|()| done));
        drop(copies);
        match marked {
            Some(Ok(done)) if done.synchronize().is_ok() => drop(gone),
            // Nobody can know whether they are still read.
            _ => std::mem::forget(gone),
        }
    }
}

/// A thread that panicked takes the engine with it, instead of leaving callers waiting.
struct EndsWithPanic<'a>(&'a Shared);

impl Drop for EndsWithPanic<'_> {
    fn drop(&mut self) {
        self.0.ends_with_panic("its thread for computed weights");
    }
}

/// Whether a page of this VBAR waits for a computed weight.
pub(crate) fn is_computed(set: &PatchSet, layout: &Layout, vbar: &Vbar, page: u32) -> bool {
    set.values().any(|patch| patch.computed.is_some())
        && parts_of(layout, vbar, page).any(|part| computes(set, part.weight))
}

/// Whether nothing of a page is read: all of it is computed.
pub(crate) fn is_computed_whole(vbar: &Vbar, page: u32) -> bool {
    let set = vbar.patches.current();
    vbar.layout.as_ref().is_some_and(|layout| {
        is_computed(&set, layout, vbar, page)
            && parts_of(layout, vbar, page).all(|part| computes(&set, part.weight))
    })
}

impl fmt::Debug for Computing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Computing").field("waiting", &self.queue.lock().waiting.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Computed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Computed").field("at", &self.at).finish_non_exhaustive()
    }
}

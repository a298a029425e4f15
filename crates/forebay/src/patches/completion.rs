//! What comes behind the copies of a page: its mark, and what is added to it.

use std::sync::Arc;

use forebay_device::{Convert, DeviceAddr, Element, Event, Scale, Stream, StreamHandle, Transform};

use super::{PatchSet, computes, has_products, transforms};
use crate::computed::is_computed;
use crate::filler::incomplete;
use crate::state::Shared;
use crate::vbar::{Completion, Vbar};
use crate::{EngineError, Result};

/// What is left to be done to a page.
pub(crate) enum Completed {
    /// Nothing.
    Now,
    /// What these compute.
    Later(Arc<PatchSet>),
    /// Everything: it was read for patches that are no longer in force.
    Outdated,
}

/// Whether a stream was ordered behind a page's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ordered {
    Behind,
    /// They are spoiled: the page is filled anew once nobody has it pinned.
    NotAnyMore,
}

/// Why a page was not completed.
pub(crate) enum Incomplete {
    /// Nobody can know any more when its copies end.
    Unmarked(EngineError),
    /// What was to be done to it was refused.
    Unpatched(EngineError),
}

impl Shared {
    /// A driver may take a while at the first transform that is no copy: not under a lock.
    pub(crate) fn load_kernels(&self) -> Result<()> {
        let (to, from) = (DeviceAddr::new(0), DeviceAddr::new(0));
        let (to_element, from_element) = (Element::F32, Element::F32);
        let nothing =
            Transform::Convert(Convert { to, to_element, from, from_element, count: 0, scale: Scale::None });
        // SAFETY: nothing is read or written.
        unsafe { self.device.transform(&nothing, self.patching.handle()) }.map_err(Into::into)
    }

    /// What comes behind the last copy of a page: its mark, and what is to be done to its bytes but for products, which who
    /// uses it adds. Under the copy lock. What `patches` compute may not have been read.
    pub(crate) fn complete(
        &self,
        vbar: &Vbar,
        patches: &Arc<PatchSet>,
        page: u32,
        filled: &Event,
        copies: &Stream,
    ) -> std::result::Result<Completed, Incomplete> {
        self.mark_enqueued(vbar, page, filled, copies)?;
        let current = vbar.patches.current();
        let is_computed =
            |set: &PatchSet| vbar.layout.as_ref().is_some_and(|layout| is_computed(set, layout, vbar, page));
        if !Arc::ptr_eq(patches, &current) && is_computed(patches) {
            return Ok(Completed::Outdated);
        }
        if is_computed(&current) {
            return Ok(Completed::Later(current));
        }
        let adds = has_products(&current, vbar, page);
        vbar.set_completion(page, if adds { Completion::Incomplete } else { Completion::Complete });
        Ok(Completed::Now)
    }

    /// Orders a stream behind everything that a page is filled with. The first to use it has what is to be added to it added in
    /// that stream. The page is pinned, and filled.
    ///
    /// # Errors
    /// What the device reports: of what was to be added also that it cannot do it. The page is filled anew then.
    pub(crate) fn order_behind(
        &self,
        vbar: &Vbar,
        page: u32,
        filled: &Arc<Event>,
        stream: StreamHandle,
    ) -> Result<Ordered> {
        // SAFETY: a stream exists as long as anything remembers its handle.
        let wait = || unsafe { filled.wait_on(stream) }.map_err(EngineError::from);
        if vbar.completion(page) == Completion::Complete {
            return wait().map(|()| Ordered::Behind);
        }
        let copies = self.copy.lock();
        // Others may have come first.
        let added = match vbar.completion(page) {
            Completion::Complete => return wait().map(|()| Ordered::Behind),
            Completion::Spoiled => return Ok(Ordered::NotAnyMore),
            Completion::Incomplete => {
                wait()?;
                self.add_as_user(vbar, page, filled, stream)
            }
        };
        drop(copies);
        let added = added.map_err(|error| incomplete(self, error));
        let mut state = self.state.lock();
        let at = vbar.page_ref(page);
        match added {
            Ok(()) => state.landing.push_back(at),
            Err(_) => drop(state.decide(|policy, books, out| policy.outdate(at, books, out))),
        }
        drop(state);
        self.nudge_mover();
        added.map(|()| Ordered::Behind)
    }

    /// Adds what is to be added to a page in a user's stream, which is behind all else, and marks it anew. Under the copy lock.
    fn add_as_user(
        &self,
        vbar: &Vbar,
        page: u32,
        filled: &Arc<Event>,
        stream: StreamHandle,
    ) -> std::result::Result<(), Incomplete> {
        let set = vbar.patches.current();
        let written = vbar.patches.factors.lock().written.clone();
        // SAFETY: a stream exists as long as anything remembers its handle.
        let is_behind = written.iter().try_for_each(|written| unsafe { written.wait_on(stream) });
        // What is computed since the page was filled has it filled anew: until then it is as it was.
        let of = |weight: u32| !computes(&set, weight);
        let added = is_behind
            .map_err(EngineError::from)
            .and_then(|()| self.transform_page(vbar, &set, (page, filled), of, stream));
        let marked = mark_filled(filled, stream);
        vbar.patches.note_read(filled);
        let is_done = added.is_ok() && marked.is_ok();
        vbar.set_completion(page, if is_done { Completion::Complete } else { Completion::Spoiled });
        marked.and(added.map_err(Incomplete::Unpatched))
    }

    /// Adds what is to be added to a page that is there otherwise and marked, in the patching stream. Under the copy lock.
    pub(crate) fn add_products(
        &self,
        vbar: &Vbar,
        set: &PatchSet,
        page: u32,
        filled: &Arc<Event>,
    ) -> std::result::Result<(), Incomplete> {
        if has_products(set, vbar, page) {
            self.patch_behind(filled, |patching| {
                self.transform_page(vbar, set, (page, filled), |_| true, patching)
            })?;
        }
        vbar.set_completion(page, Completion::Complete);
        Ok(())
    }

    /// Adds what is to be added to some weights' parts of a page, in a stream that is behind everything else in the page and
    /// behind what writes the factors. The page is marked behind it, whatever is refused. Under the copy lock.
    pub(super) fn transform_page(
        &self,
        vbar: &Vbar,
        set: &PatchSet,
        (page, filled): (u32, &Arc<Event>),
        of: impl Fn(u32) -> bool,
        stream: StreamHandle,
    ) -> Result<()> {
        let Some(layout) = &vbar.layout else { return Ok(()) };
        let transforms = transforms(set, layout, vbar, page, of);
        if transforms.iter().any(|transform| matches!(transform, Transform::Requantize(_))) {
            self.draw(vbar, filled, stream)?;
        }
        transforms.iter().try_for_each(|transform| {
            // SAFETY: the page is mapped, and everything in it written by now in the stream's order; the factors are
            // kept as long as the set is in force, and until what reads them by then is done.
            unsafe { self.device.transform(transform, stream) }.map_err(Into::into)
        })
    }

    /// Orders a stream behind what reads the random bytes that were drawn before those that are drawn in it now, for a page that
    /// is marked behind what reads these. Under the copy lock.
    fn draw(&self, vbar: &Vbar, filled: &Arc<Event>, stream: StreamHandle) -> Result<()> {
        let mut factors = vbar.patches.factors.lock();
        if let Some((_, before)) = factors.drawn.as_ref().filter(|(other, _)| *other != stream) {
            // SAFETY: a stream exists as long as anything remembers its handle.
            unsafe { before.wait_on(stream) }?;
        }
        factors.drawn = Some((stream, Arc::clone(filled)));
        Ok(())
    }

    /// Has work done in the patching stream behind everything that a page is marked by, and marks it anew behind that.
    /// Whatever is refused, the mark covers all that was enqueued for the page. Under the copy lock.
    pub(crate) fn patch_behind(
        &self,
        filled: &Event,
        work: impl FnOnce(StreamHandle) -> Result<()>,
    ) -> std::result::Result<(), Incomplete> {
        let patching = self.patching.handle();
        // SAFETY: the stream lives as long as `self`.
        unsafe { filled.wait_on(patching) }.map_err(|error| Incomplete::Unpatched(error.into()))?;
        let worked = work(patching);
        mark_filled(filled, self.patching.handle())?;
        worked.map_err(Incomplete::Unpatched)
    }

    /// Marks a page behind everything that is enqueued for it by now: its copies, and what writes converted parts to it in
    /// the other stream. Under the copy lock. Also for a page that failed: it stays mapped until then.
    pub(crate) fn mark_enqueued(
        &self,
        vbar: &Vbar,
        page: u32,
        filled: &Event,
        copies: &Stream,
    ) -> std::result::Result<(), Incomplete> {
        mark_filled(filled, copies.handle())?;
        let is_converted =
            vbar.layout.as_ref().is_some_and(|layout| !layout.converted[page as usize].is_empty());
        if !is_converted {
            return Ok(());
        }
        // SAFETY: the stream lives as long as `self`.
        let waited = unsafe { filled.wait_on(self.patching.handle()) };
        // SAFETY: as before. A driver that refused once is asked once more.
        let waited = waited.or_else(|_| unsafe { filled.wait_on(self.patching.handle()) });
        waited.map_err(|error| Incomplete::Unmarked(error.into()))?;
        mark_filled(filled, self.patching.handle())
    }
}

/// Records a page's fill event behind its copies. Without the mark nobody could know any more when they end, and the page
/// would have to stay mapped for ever: the engine is lost then.
pub(crate) fn mark_filled(filled: &Event, stream: StreamHandle) -> std::result::Result<(), Incomplete> {
    // SAFETY: a stream exists as long as anything remembers its handle.
    let recorded = unsafe { filled.record(stream) };
    // SAFETY: as before. A driver that refused once is asked once more.
    let recorded = recorded.or_else(|_| unsafe { filled.record(stream) });
    recorded.map_err(|error| Incomplete::Unmarked(error.into()))
}

//! A change of patches while pages are on the device.
//!
//! Where the set changes, the pages of the weights that it touches are out of date. What has products now and had nothing gets them
//! where it is, behind its last uses; all else is filled again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use forebay_core::{PageRef, Serial};
use forebay_device::{Event, StreamHandle};
use parking_lot::MutexGuard;

use super::{Patch, PatchSet, Product, parts_of};
use crate::acquire::Use;
use crate::attachment::Attachment;
use crate::filler::{self, incomplete};
use crate::layout::Class;
use crate::state::{Shared, State};
use crate::vbar::{Completion, Vbar};
use crate::{EngineError, Result};

/// A change of patches that is in force.
struct Changed {
    /// The weights whose patches changed, or that are to be filled anew without.
    touched: HashSet<u32>,
    /// The set that is in force.
    now: Arc<PatchSet>,
    /// See [`added_to`].
    added_to: HashMap<u32, Option<Serial>>,
}

/// A page that is changed where it is: claimed, and counted as being filled.
struct Amended {
    page: PageRef,
    filled: Arc<Event>,
    /// What must be complete before it is written to.
    before: Vec<Arc<Event>>,
}

impl Amended {
    /// Behind the decision that claimed it.
    fn new(state: &mut State, page: PageRef) -> Self {
        let before = std::mem::take(&mut state.books.page(page).leaving);
        let filled = state.books.filled(page).expect("it is filled");
        let serial = state.books.vbar(page.vbar).vbar.serial(page.page.0);
        state.filling.insert(serial);
        Amended { page, filled, before }
    }
}

impl Attachment {
    /// Patches weights anew: each of these with what is given, or with nothing. Their pages that are on the device leave and
    /// are filled again when used, those excepted whose weights only get products and had no patch before: they stay, and get
    /// them behind their last uses. What uses a page keeps it as it was, and is waited for. Uses that begin after this returned
    /// find the weights as they are to be. Other weights are not touched.
    ///
    /// The factors are written by work that is in `how.stream` by now.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist or is always resident (it is patched where it is), and
    /// for a patch that does not fit its weight; what the device reports. Nothing has changed then.
    /// [`EngineError::StillInUse`] where views hold a weight as it was, and [`EngineError::Interrupted`]: the patches are
    /// in force then, and the weights that are named change when they are let go.
    pub fn change_patches(&self, changes: Vec<(usize, Option<Patch>)>, how: Use<'_>) -> Result<()> {
        changes.iter().try_for_each(|(weight, patch)| self.check_patch(*weight, patch.as_ref()))?;
        let touched: HashSet<u32> = changes.iter().map(|(weight, _)| *weight as u32).collect();
        let shared = self.engine().shared();
        if changes.iter().any(|(_, patch)| patch.as_ref().is_some_and(|patch| !patch.products.is_empty())) {
            shared.load_kernels()?;
        }
        let changed = shared.swap_patches(self.vbar(), changes, touched, how.stream)?;
        self.renew(&changed, how)
    }

    fn check_patch(&self, weight: usize, patch: Option<&Patch>) -> Result<()> {
        let placed = self.placed(weight)?;
        let name = &self.layout().names[weight];
        if placed.class == Class::Small {
            return Err(EngineError::Invalid(format!(
                "is always resident, and patched where it is: weight {name:?} of {:?}",
                self.name()
            )));
        }
        let Some(patch) = patch else { return Ok(()) };
        let size = patch.element.size();
        let mut last = 0;
        let mut products: Vec<&Product> = patch.products.iter().collect();
        products.sort_by_key(|product| product.rows.start);
        for Product { rows, factors } in products {
            let columns = u64::from(factors.columns);
            let elements = u64::from(rows.start) * columns..u64::from(rows.end) * columns;
            let end = elements.end * size.get();
            let fits = rows.start >= last && rows.start < rows.end && end <= placed.bytes.get();
            // What is rounded at random is one product for all of the weight.
            let is_rounded = patch.rounding.is_none_or(|rounding| {
                let is_whole = patch.products.len() == 1 && rows.start == 0 && end == placed.bytes.get();
                is_whole && rounding.random_bytes >= placed.bytes.min(self.vbar().page_size)
            });
            let can = || {
                let at = self.vbar().base().offset(placed.offset + size * elements.start);
                patch.addition(*factors, at, elements).is_possible()
            };
            if !fits || !is_rounded || factors.row_base != rows.start || !can() {
                return Err(EngineError::Invalid(format!(
                    "{:?} elements of {} bytes take no product of rank {} for rows {rows:?} of {} columns: weight {name:?} of \
                     {:?}",
                    patch.element,
                    placed.bytes.get(),
                    factors.rank,
                    factors.columns,
                    self.name()
                )));
            }
            last = rows.end;
        }
        Ok(())
    }

    /// Has weights filled anew from their sources: what somebody wrote to their pages is gone. As
    /// [`change_patches`](Attachment::change_patches) without a change.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] for a weight that does not exist, [`EngineError::StillInUse`] and
    /// [`EngineError::Interrupted`] as there.
    pub fn refill(&self, weights: &[usize], how: Use<'_>) -> Result<()> {
        weights.iter().try_for_each(|&weight| self.placed(weight).map(drop))?;
        let touched = weights.iter().map(|&weight| weight as u32).collect();
        self.renew(&Changed { touched, now: self.vbar().patches.current(), added_to: HashMap::new() }, how)
    }

    /// Has the pages of weights changed, or filled again, and waits for those who use them as they are.
    fn renew(&self, changed: &Changed, how: Use<'_>) -> Result<()> {
        let shared = self.engine().shared();
        let vbar = self.vbar();
        let pages = |weight: u32| {
            let placed = self.layout().weights[weight as usize];
            (placed.first_page..=placed.last_page).map(|page| vbar.page_ref(page))
        };
        let mut state = shared.state.lock();
        let id = vbar.id;
        if !state.is_open(id) {
            return Ok(()); // a detached model's pages leave anyway
        }
        let mut waited = Ok(None);
        if let Some(lent) = state.books.vbar(id).lent.clone() {
            state.recall(&lent);
            // What is lent is pinned until it is given back, and cannot be changed where it is.
            if !changed.added_to.is_empty() {
                waited = shared.wait_while_used(&mut state, how, |state| {
                    !state.is_open(id) || state.books.vbar(id).lent.is_none()
                });
                if !state.is_open(id) {
                    return Ok(());
                }
            }
        }
        let mut seen = HashSet::new();
        let of = changed.touched.iter().flat_map(|&weight| pages(weight).map(move |page| (weight, page)));
        let mut held: Vec<(u32, PageRef)> = of.filter(|(_, page)| seen.insert(*page)).collect();
        // As they are used, and neighbours are unmapped together.
        held.sort_unstable_by_key(|(_, page)| page.page);
        let mut amended = Vec::new();
        // In one decision: pages that leave together share the events that are waited for.
        state.decide(|policy, books, out| {
            held.retain(|&(_, page)| {
                let serial = vbar.serial(page.page.0);
                match changed.added_to.get(&page.page.0) {
                    Some(complete) if *complete != Some(serial) => return false,
                    Some(_) if policy.amend(page, books) => {
                        amended.push(page);
                        return false;
                    }
                    _ => {}
                }
                !policy.outdate(page, books, out)
            });
        });
        let amended: Vec<Amended> = amended.into_iter().map(|page| Amended::new(&mut state, page)).collect();
        shared.work.notify_one();
        MutexGuard::unlocked(&mut state, || {
            amended.into_iter().for_each(|page| shared.amend(vbar, page, changed));
        });
        let mut are_gone = |state: &mut State| {
            held.retain(|(_, page)| state.is_open(id) && state.policy.is_stale(*page));
            held.is_empty()
        };
        let left = match waited {
            Ok(Some(waited_s)) if !are_gone(&mut state) => Ok(Some(waited_s)),
            Ok(_) => shared.wait_while_used(&mut state, how, are_gone),
            Err(error) => Err(error),
        };
        drop(state);
        shared.changed.notify_all();
        let Some(waited_s) = left? else { return Ok(()) };
        let mut names: Vec<_> =
            held.iter().map(|(weight, _)| self.layout().names[*weight as usize].as_str()).collect();
        names.dedup();
        let (model, weights) = (self.name().to_owned(), names.join(", "));
        Err(EngineError::StillInUse { model, weights, device: shared.id, waited_s })
    }
}

impl Shared {
    /// Waits until pages are let go. Nothing is lent as a whole meanwhile. Where they were not, the seconds waited.
    fn wait_while_used(
        &self,
        state: &mut MutexGuard<'_, State>,
        how: Use<'_>,
        is_done: impl FnMut(&mut State) -> bool,
    ) -> Result<Option<f64>> {
        state.waiting += 1;
        let waited = self.wait_until_let_go(state, how, is_done);
        state.waiting -= 1;
        waited
    }

    /// Puts patches in force for every page that is completed from now on. Drops what was in force once nothing on the device
    /// reads it any more.
    fn swap_patches(
        &self,
        vbar: &Vbar,
        changes: Vec<(usize, Option<Patch>)>,
        touched: HashSet<u32>,
        written_on: StreamHandle,
    ) -> Result<Changed> {
        let (written, done) = (Event::new(Arc::clone(&self.device))?, Event::new(Arc::clone(&self.device))?);
        // SAFETY: a stream exists as long as anything remembers its handle.
        unsafe { written.record(written_on) }?;
        let copies = self.copy.lock();
        // SAFETY: the stream lives as long as `self`.
        unsafe { written.wait_on(self.patching.handle()) }?;
        let mut factors = vbar.patches.factors.lock();
        // SAFETY: as before.
        factors.read.iter().try_for_each(|filled| unsafe { filled.wait_on(self.patching.handle()) })?;
        // SAFETY: as before. What reads the former factors comes before this: it was enqueued under the copy lock, in this stream
        // or behind those marks.
        unsafe { done.record(self.patching.handle()) }?;
        factors.read.clear();
        let written = Arc::new(written);
        factors.written.push(Arc::clone(&written));
        drop(factors);
        let mut set = vbar.patches.set.lock();
        let mut new = PatchSet::clone(&set);
        for (weight, patch) in changes {
            match patch {
                Some(patch) => drop(new.insert(weight as u32, patch)),
                None => drop(new.remove(&(weight as u32))),
            }
        }
        let now = Arc::new(new);
        let former = std::mem::replace(&mut *set, Arc::clone(&now));
        drop(set);
        let added_to = added_to(vbar, &touched, &former, &now);
        drop(copies);
        if let Err(error) = done.synchronize() {
            // Nobody can know whether the factors are still read.
            std::mem::forget(former);
            return Err(error.into());
        }
        vbar.patches.factors.lock().written.retain(|other| !Arc::ptr_eq(other, &written));
        // Without any lock: its memory may belong to another language's objects.
        drop(former);
        Ok(Changed { touched, now, added_to })
    }

    /// Adds to a page what changed, and has it count as filled again.
    fn amend(&self, vbar: &Vbar, Amended { page, filled, before }: Amended, changed: &Changed) {
        let number = page.page.0;
        let copies = self.copy.lock();
        // What has other patches by now is filled anew with those.
        let added = vbar.patches.is(&changed.now).then(|| {
            self.patch_behind(&filled, |patching| {
                // SAFETY: the stream lives as long as `self`.
                before.iter().try_for_each(|event| unsafe { event.wait_on(patching) })?;
                let is_touched = |weight: u32| changed.touched.contains(&weight);
                self.transform_page(vbar, &changed.now, (number, &filled), is_touched, patching)
            })
        });
        drop(copies);
        let result = match added {
            Some(result) => result.map_err(|error| Some(incomplete(self, error))),
            None => Err(None),
        };
        let mut state = self.state.lock();
        match result {
            Ok(()) => {
                state.books.recycle(before);
                state.filling.remove(&vbar.serial(number));
                state.arrived(vbar, number);
                drop(state);
                self.changed.notify_all();
                self.nudge_mover();
            }
            Err(error) => {
                // Not all of this was waited for.
                state.books.page(page).leaving = before;
                drop(state);
                filler::finished(self, vbar, number, Err(error));
            }
        }
    }
}

/// The pages that need nothing but products of the set that is in force now: none of their weights that changed had anything
/// before, and none is computed. With the serial of what was complete; what was not will have the products by itself. Under the
/// copy lock.
fn added_to(
    vbar: &Vbar,
    touched: &HashSet<u32>,
    former: &PatchSet,
    now: &PatchSet,
) -> HashMap<u32, Option<Serial>> {
    let Some(layout) = &vbar.layout else { return HashMap::new() };
    let adds = |weight: u32| {
        !former.contains_key(&weight) && now.get(&weight).is_some_and(|patch| patch.computed.is_none())
    };
    let touched_pages = touched.iter().flat_map(|&weight| {
        let placed = layout.weights[weight as usize];
        placed.first_page..=placed.last_page
    });
    let pages: HashSet<u32> = touched_pages.collect();
    let adds_to = |page: &u32| {
        parts_of(layout, vbar, *page).all(|part| !touched.contains(&part.weight) || adds(part.weight))
    };
    let complete = |page: u32| (vbar.completion(page) == Completion::Complete).then(|| vbar.serial(page));
    pages.into_iter().filter(adds_to).map(|page| (page, complete(page))).collect()
}

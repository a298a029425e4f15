//! Patches: what is added to weights on the device.
//!
//! Products are added to a page by whoever is the first to use it, in his own stream: work in another one, between the copies and
//! him, had the copies slow down (`bench/results/2026-11-30-h200-rules`). What is computed is copied to the page in a stream of its
//! own, and products behind it.
//!
//! The set of patches is read under the copy lock, in which everything of a page is enqueued: a page has one set's patches, all
//! of them, once. Where the set changes, the pages of the weights that it touches are out of date. What has products now and
//! had nothing gets them where it is, behind its last uses; all else is filled again.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use forebay_core::{Bytes, PageRef, Serial};
use forebay_device::{
    AddLowRank, Convert, DeviceAddr, EightBitSum, Element, Event, Factors, Requantize, Scale, Stream,
    StreamHandle, Transform,
};
use parking_lot::{Mutex, MutexGuard};

use crate::acquire::Use;
use crate::attachment::Attachment;
use crate::computed::{Compute, is_computed};
use crate::filler::{self, incomplete};
use crate::layout::{Class, Layout};
use crate::state::{Shared, State};
use crate::vbar::{Completion, Vbar};
use crate::{Engine, EngineError, Result};

/// What is added to a weight: products of low rank, as adapters (LoRA) are. The weight is row-major.
#[derive(Clone)]
pub struct Patch {
    /// The weight's elements.
    pub element: Element,
    /// What computes the weight, before anything is added, in place of its source.
    pub computed: Option<Arc<dyn Compute>>,
    /// What is added to which rows. No two share a row: each element is rounded as one of them says.
    pub products: Vec<Product>,
    /// How elements of eight bits are rounded behind the product, of which there is one for all rows then.
    pub rounding: Option<EightBits>,
    /// Keeps the factors' memory. Dropped when nothing reads them any more.
    pub keep: Arc<dyn Any + Send + Sync>,
}

impl Patch {
    /// What adds a product to a run of the weight's elements, which begins at an address.
    fn addition(&self, factors: Factors, at: DeviceAddr, run: Range<u64>) -> Transform {
        let (first, count, element) = (run.start, run.end.saturating_sub(run.start), self.element);
        match self.rounding {
            None => Transform::AddLowRank(AddLowRank { at, first, count, element, factors }),
            Some(EightBits { scale, seed, threads, random, .. }) => {
                let sum = EightBitSum { from: at, element, first, count, scale, factors };
                Transform::Requantize(Requantize { sum, to: at, random, seed, threads })
            }
        }
    }
}

/// How elements of eight bits are rounded: see [`Requantize`].
#[derive(Clone, Copy, Debug)]
pub struct EightBits {
    /// See [`EightBitSum::scale`].
    pub scale: Option<DeviceAddr>,
    /// See [`Requantize::seed`].
    pub seed: u64,
    /// See [`Requantize::threads`].
    pub threads: u64,
    /// Memory for the random bytes of what a page has of the weight. All patches of one attachment may have the same.
    pub random: DeviceAddr,
    /// How much.
    pub random_bytes: Bytes,
}

/// A product of low rank and the rows of a weight that it is added to.
#[derive(Clone, Debug)]
pub struct Product {
    /// The rows.
    pub rows: Range<u32>,
    /// The factors; their first row is the first of `rows`.
    pub factors: Factors,
}

impl Engine {
    /// Has a product added to memory of the application's, which begins with the product's first row, behind what is in the
    /// stream: for who wants to know what it gives.
    ///
    /// # Errors
    /// What the device reports; also that it cannot do it.
    ///
    /// # Safety
    /// The rows are memory of this device and nobody else's until the work has ended, and the factors unchanged; the stream is
    /// one of the device and lives as long.
    pub unsafe fn add_product(
        &self,
        at: DeviceAddr,
        element: Element,
        product: &Product,
        stream: StreamHandle,
    ) -> Result<()> {
        let Product { rows, factors } = product;
        let (columns, rows) = (u64::from(factors.columns), rows.start.into()..u64::from(rows.end));
        let (first, count) = (rows.start * columns, rows.end.saturating_sub(rows.start) * columns);
        let add = AddLowRank { at, first, count, element, factors: *factors };
        self.shared().state.lock().check()?;
        // SAFETY: the caller's promise.
        unsafe { self.shared().device.transform(&Transform::AddLowRank(add), stream) }.map_err(Into::into)
    }

    /// Has a weight of eight-bit elements computed anew in memory of the application's, behind what is in the stream; with
    /// `scaling` once the numbers are found that it is scaled by.
    ///
    /// # Errors
    /// What the device reports; also that it cannot do it.
    ///
    /// # Safety
    /// As of [`add_product`](Engine::add_product): what is read, and what is written.
    pub unsafe fn requantize(
        &self,
        work: &Requantize,
        scaling: Option<&Scaling>,
        stream: StreamHandle,
    ) -> Result<()> {
        self.shared().state.lock().check()?;
        let finding = scaling.map(|Scaling { largest, table, to }| {
            let (sum, at) = (work.sum, *largest);
            [Transform::Largest { sum, at }, Transform::LookUp { number: at, table: *table, to: *to }]
        });
        let all = finding.into_iter().flatten().chain([Transform::Requantize(*work)]);
        for transform in all {
            // SAFETY: the caller's promise.
            unsafe { self.shared().device.transform(&transform, stream) }?;
        }
        Ok(())
    }
}

/// How the numbers are found that a weight is scaled by: those that belong to its largest magnitude.
#[derive(Clone, Copy, Debug)]
pub struct Scaling {
    /// A float32 of at least 0, which becomes the largest magnitude where that is larger: see [`Transform::Largest`].
    pub largest: DeviceAddr,
    /// Two float32 for each such number: see [`Transform::LookUp`].
    pub table: DeviceAddr,
    /// Where the two go.
    pub to: DeviceAddr,
}

/// The patches of one VBAR.
#[derive(Debug, Default)]
pub(crate) struct Patches {
    /// Lock order: a leaf, taken under the copy lock and without it.
    set: Mutex<Arc<PatchSet>>,
    /// Under the copy lock.
    factors: Mutex<InUse>,
}

/// What is under way with factors of products that users add, and with memory for random bytes.
#[derive(Debug, Default)]
struct InUse {
    /// Marks of pages to which they are added: until then they are read.
    read: Vec<Arc<Event>>,
    /// Behind what writes them.
    written: Vec<Arc<Event>>,
    /// The stream in which random bytes were drawn last, and the mark of the page that they are for.
    drawn: Option<(StreamHandle, Arc<Event>)>,
}

/// Marks that are kept before those are looked for that have completed.
const MOST_READ: usize = 16;

/// By the weight's number.
pub(crate) type PatchSet = HashMap<u32, Patch>;

impl Patches {
    /// What is in force.
    pub(crate) fn current(&self) -> Arc<PatchSet> {
        Arc::clone(&self.set.lock())
    }

    /// What is in force is read by work that a page's mark covers.
    fn note_read(&self, filled: &Arc<Event>) {
        let read = &mut self.factors.lock().read;
        if read.len() >= MOST_READ {
            // Whether one has completed that cannot be asked is not known.
            read.retain(|filled| !filled.is_complete().unwrap_or(false));
        }
        if !read.iter().any(|other| Arc::ptr_eq(other, filled)) {
            read.push(Arc::clone(filled));
        }
    }

    /// Whether this is what is in force.
    pub(crate) fn is(&self, set: &Arc<PatchSet>) -> bool {
        Arc::ptr_eq(&self.set.lock(), set)
    }
}

/// A part of a weight on a page, by its place in the VBAR.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) weight: u32,
    pub(crate) start: Bytes,
    pub(crate) end: Bytes,
}

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

    /// Whether a weight has a patch.
    pub(crate) fn is_patched(&self, weight: usize) -> bool {
        self.vbar().patches.set.lock().contains_key(&(weight as u32))
    }

    /// Whether any weight has a patch.
    pub(crate) fn has_patches(&self) -> bool {
        !self.vbar().patches.set.lock().is_empty()
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
    fn transform_page(
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

/// The parts of weights on a page.
pub(crate) fn parts_of(layout: &Layout, vbar: &Vbar, page: u32) -> impl Iterator<Item = Part> {
    let start = vbar.page_size * u64::from(page);
    let end = start + vbar.page_size;
    let as_stored = layout.weight_of[page as usize].iter().copied();
    let converted = layout.converted[page as usize].iter().map(|part| part.weight);
    as_stored.chain(converted).map(move |weight| {
        let placed = layout.weights[weight as usize];
        Part { weight, start: start.max(placed.offset), end: end.min(placed.offset + placed.bytes) }
    })
}

/// Whether a weight is computed, and its source not read.
pub(crate) fn computes(set: &PatchSet, weight: u32) -> bool {
    set.get(&weight).is_some_and(|patch| patch.computed.is_some())
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

/// Whether anything is to be added to a page.
fn has_products(set: &PatchSet, vbar: &Vbar, page: u32) -> bool {
    let adds = |weight: u32| set.get(&weight).is_some_and(|patch| !patch.products.is_empty());
    !set.is_empty()
        && vbar
            .layout
            .as_ref()
            .is_some_and(|layout| parts_of(layout, vbar, page).any(|part| adds(part.weight)))
}

/// What is to be added to some weights' parts of a page.
fn transforms(
    set: &PatchSet,
    layout: &Layout,
    vbar: &Vbar,
    page: u32,
    of: impl Fn(u32) -> bool,
) -> Vec<Transform> {
    let mut transforms = Vec::new();
    for part in parts_of(layout, vbar, page).filter(|part| of(part.weight)) {
        let Some(patch) = set.get(&part.weight) else { continue };
        let (size, offset) = (patch.element.size().get(), layout.weights[part.weight as usize].offset);
        let (first, end) = ((part.start - offset).get() / size, (part.end - offset).get() / size);
        for Product { rows, factors } in &patch.products {
            let columns = u64::from(factors.columns);
            let from = first.max(u64::from(rows.start) * columns);
            let to = end.min(u64::from(rows.end) * columns);
            if from < to {
                let at = vbar.base().offset(part.start + Bytes::new((from - first) * size));
                transforms.push(patch.addition(*factors, at, from..to));
            }
        }
    }
    transforms
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

impl fmt::Debug for Patch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Patch { element, products, rounding, computed, .. } = self;
        f.debug_struct("Patch")
            .field("computed", &computed.is_some())
            .field("element", element)
            .field("products", products)
            .field("rounding", rounding)
            .finish_non_exhaustive()
    }
}

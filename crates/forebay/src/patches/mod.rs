//! Patches: what is added to weights on the device.
//!
//! Products are added to a page by whoever is the first to use it, in his own stream: work in another one, between the copies and
//! him, had the copies slow down (`bench/results/2026-11-30-h200-rules`). What is computed is copied to the page in a stream of its
//! own, and products behind it.
//!
//! The set of patches is read under the copy lock, in which everything of a page is enqueued: a page has one set's patches, all
//! of them, once.

mod change;
mod completion;
mod of_application;

use std::any::Any;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{
    AddLowRank, DeviceAddr, EightBitSum, Element, Event, Factors, Requantize, StreamHandle, Transform,
};
use parking_lot::Mutex;

pub(crate) use self::completion::{Completed, Incomplete, Ordered, mark_filled};
pub use self::of_application::Scaling;
use crate::attachment::Attachment;
use crate::computed::Compute;
use crate::layout::Layout;
use crate::vbar::Vbar;

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

impl Attachment {
    /// Whether a weight has a patch.
    pub(crate) fn is_patched(&self, weight: usize) -> bool {
        self.vbar().patches.set.lock().contains_key(&(weight as u32))
    }

    /// Whether any weight has a patch.
    pub(crate) fn has_patches(&self) -> bool {
        !self.vbar().patches.set.lock().is_empty()
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

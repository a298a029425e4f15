//! What a model's layout comes to in a budget, told without a device.
//!
//! ```
//! use std::sync::Arc;
//! use forebay::plan::Plan;
//! use forebay::store::Source;
//! use forebay::{Bytes, LayoutOptions, WeightKind, WeightSpec};
//!
//! // 16 weights that take a page of 2 MiB each.
//! let weights = (0..16).map(|i| WeightSpec {
//!     name: format!("layer{i}.weight"),
//!     source: Source::memory(Arc::new(vec![0; 2 << 20])),
//!     kind: WeightKind::Whole,
//! });
//! let plan = Plan::new(weights.collect(), LayoutOptions::default())?;
//! let half = plan.within(Bytes::mib(16));
//! assert_eq!(half.resident + half.streamed, plan.weights());
//! assert!(plan.within(Bytes::gib(1)).is_all_resident());
//! # Ok::<(), forebay::EngineError>(())
//! ```

use forebay_core::{Bytes, PageIndex, PageState, Ranks};

use crate::Result;
use crate::layout::{Layout, LayoutOptions, WeightSpec};

/// The layout of a model, as [`Engine::attach`](crate::Engine::attach) would make it.
#[derive(Debug)]
pub struct Plan {
    layout: Layout,
    ranks: Ranks,
    /// Bytes of weights on each page.
    filled: Vec<Bytes>,
}

/// Where the pages stand once passes have settled in a budget, when no other model wants memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Each page, in address order. Absent are pages of tables that are looked up at their source.
    pub pages: Vec<PageState>,
    /// Bytes of weights that stay on the device.
    pub resident: Bytes,
    /// Bytes of weights that are copied in each pass.
    pub streamed: Bytes,
}

impl Plan {
    /// Lays weights out.
    ///
    /// # Errors
    /// As for [`Engine::attach`](crate::Engine::attach), of the layout.
    pub fn new(weights: Vec<WeightSpec>, options: LayoutOptions) -> Result<Self> {
        let layout = Layout::new(weights, options)?;
        let filled =
            layout.segments.iter().map(|page| page.iter().map(|segment| Bytes::new(segment.len)).sum());
        Ok(Plan { filled: filled.collect(), ranks: Ranks::new(layout.pages, &layout.order()), layout })
    }

    /// Bytes of all weights.
    pub fn weights(&self) -> Bytes {
        self.layout.weights.iter().map(|weight| weight.bytes).sum()
    }

    /// Bytes a page.
    pub fn page_size(&self) -> Bytes {
        self.layout.page_size
    }

    /// How many pages there are.
    pub fn pages(&self) -> u32 {
        self.layout.pages
    }

    /// How many leading pages hold small weights and are always resident.
    pub fn small_pages(&self) -> u32 {
        self.layout.small_pages
    }

    /// The least budget that works when one weight is used at a time.
    pub fn least_budget(&self) -> Bytes {
        let widest = if self.layout.scheduled.is_empty() { 0 } else { self.layout.widest() };
        self.layout.page_size * u64::from(self.layout.small_pages + widest)
    }

    /// Where the pages stand in this budget. Below the [least one](Plan::least_budget) the answer is how far it reaches.
    pub fn within(&self, budget: Bytes) -> Residency {
        let layout = &self.layout;
        let frames = u32::try_from(budget.get() / layout.page_size.get()).unwrap_or(u32::MAX);
        let watermark = if frames >= layout.pages {
            layout.pages
        } else {
            frames.saturating_sub(layout.window(budget)).max(layout.small_pages).min(frames)
        };
        let streamed_pages = layout.pages - layout.table_pages;
        let state = |page: u32| match self.ranks.rank(PageIndex(page)).0 {
            rank if rank < watermark => PageState::Resident,
            _ if page < streamed_pages => PageState::Streamed,
            _ => PageState::Absent,
        };
        let pages: Vec<_> = (0..layout.pages).map(state).collect();
        let bytes = |wanted| {
            let with_bytes = pages.iter().zip(&self.filled);
            with_bytes.filter(|(state, _)| **state == wanted).map(|(_, bytes)| *bytes).sum()
        };
        Residency { resident: bytes(PageState::Resident), streamed: bytes(PageState::Streamed), pages }
    }
}

impl Residency {
    /// Whether nothing is copied after the first pass.
    pub fn is_all_resident(&self) -> bool {
        self.pages.iter().all(|page| *page == PageState::Resident)
    }
}

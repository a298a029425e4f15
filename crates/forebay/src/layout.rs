//! Where a model's weights lie in their VBAR.

use std::ops::RangeInclusive;

use forebay_core::{Bytes, RankOrder};
use forebay_store::{Segment, Source};

use crate::cache::registered::PagePlan;
use crate::converting::{Conversion, ConvertedPart};
use crate::{EngineError, Result};

/// Weights start at multiples of this.
pub const ALIGNMENT: Bytes = Bytes::new(512);

/// Streamed frames to aim at where the budget allows, so that read-ahead runs well before its use, and what they take at most.
const WINDOW: u32 = 16;
const WINDOW_BYTES: Bytes = Bytes::mib(512);
/// Pages that are chosen for a model. Mapping and unmapping one holds the driver's lock as long whatever its size.
const LEAST_PAGE: Bytes = Bytes::mib(2);
const MOST_PAGE: Bytes = Bytes::mib(64);

/// A weight to be attached.
#[derive(Clone, Debug)]
pub struct WeightSpec {
    /// Its name, for messages and reports.
    pub name: String,
    /// Where its bytes come from; its length is the weight's.
    pub source: Source,
    /// How it is used.
    pub kind: WeightKind,
}

/// How a weight is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightKind {
    /// Read as a whole.
    #[default]
    Whole,
    /// A table of which single rows can be looked up at the source, so it is the first to go.
    Table,
}

/// How a model's weights are laid out.
#[derive(Clone, Copy, Debug)]
pub struct LayoutOptions {
    /// Bytes a page: a power of two from 2 MiB up. `None` chooses 1/64 of the weights, between 2 and 64 MiB.
    pub page_size: Option<Bytes>,
    /// Weights below this size share a region that is always resident.
    pub small: Bytes,
    /// Whether a weight is to be resident with all of its pages or with none, where that can be. Otherwise single pages are
    /// spread, which evens out better.
    pub whole: bool,
}

impl Default for LayoutOptions {
    fn default() -> Self {
        LayoutOptions { page_size: None, small: Bytes::kib(64), whole: false }
    }
}

/// A weight's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) offset: Bytes,
    pub(crate) bytes: Bytes,
    pub(crate) first_page: u32,
    /// Inclusive.
    pub(crate) last_page: u32,
    pub(crate) class: Class,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// In the always-resident region.
    Small,
    /// Number in the schedule, which counts whole weights in layout order.
    Whole(u32),
    Table,
}

/// The layout of one VBAR: small weights, whole weights in the order given, tables by size.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) page_size: Bytes,
    pub(crate) pages: u32,
    /// In the order given.
    pub(crate) weights: Vec<Placed>,
    pub(crate) names: Vec<String>,
    pub(crate) sources: Vec<Source>,
    /// The schedule's numbers to weights.
    pub(crate) scheduled: Vec<u32>,
    /// Whether weights are resident as a whole, where that can be.
    whole: bool,
    /// Leading pages of small weights.
    pub(crate) small_pages: u32,
    /// Trailing pages of tables.
    pub(crate) table_pages: u32,
    /// What each page is filled from.
    pub(crate) segments: Vec<Vec<Segment>>,
    /// The weight of each segment.
    pub(crate) weight_of: Vec<Vec<u32>>,
    /// What of each page is converted on its way; not among the segments.
    pub(crate) converted: Vec<Vec<ConvertedPart>>,
    /// Of each weight; empty where none is converted.
    pub(crate) conversions: Vec<Option<Conversion>>,
}

impl Placed {
    /// Before it has a place.
    fn somewhere(bytes: Bytes) -> Self {
        Placed { offset: Bytes::ZERO, bytes, first_page: 0, last_page: 0, class: Class::Small }
    }
}

impl Layout {
    pub(crate) fn new(specs: Vec<WeightSpec>, options: LayoutOptions) -> Result<Self> {
        Layout::converting(specs, Vec::new(), options)
    }

    /// A layout of weights that are converted while they are filled. Without conversions none is.
    pub(crate) fn converting(
        specs: Vec<WeightSpec>,
        conversions: Vec<Option<Conversion>>,
        options: LayoutOptions,
    ) -> Result<Self> {
        let len = |(i, spec): (usize, &WeightSpec)| match conversions.get(i) {
            Some(Some(conversion)) => conversion.used_len(spec),
            _ => Ok(spec.source.len()),
        };
        let bytes = specs.iter().enumerate().map(len).collect::<Result<Vec<_>>>()?;
        let total = bytes.iter().try_fold(Bytes::ZERO, |sum, bytes| sum.checked_add(*bytes));
        let total =
            total.ok_or_else(|| EngineError::Invalid("the weights' sizes overflow 64 bits".into()))?;
        let page_size = match options.page_size {
            None => default_page_size(total),
            Some(size) if size >= LEAST_PAGE && size.get().is_power_of_two() => size,
            Some(size) => {
                return Err(EngineError::Invalid(format!(
                    "a page is a power of two of at least 2 MiB: {size}"
                )));
            }
        };
        if total.pages_of(page_size) > u64::from(u32::MAX / 4) {
            return Err(EngineError::Invalid(format!(
                "weights of {total} in pages of {page_size} are too many pages"
            )));
        }
        let mut layout = Layout {
            page_size,
            pages: 0,
            weights: bytes.iter().map(|&bytes| Placed::somewhere(bytes)).collect(),
            names: Vec::new(),
            sources: Vec::new(),
            scheduled: Vec::new(),
            whole: options.whole,
            small_pages: 0,
            table_pages: 0,
            segments: Vec::new(),
            weight_of: Vec::new(),
            converted: Vec::new(),
            conversions,
        };
        let class = |i: usize| match specs[i].kind {
            _ if bytes[i] < options.small => Class::Small,
            WeightKind::Whole => Class::Whole(0),
            WeightKind::Table => Class::Table,
        };
        let of =
            |wanted: fn(Class) -> bool| (0..specs.len()).filter(|&i| wanted(class(i))).collect::<Vec<_>>();
        layout.place(&of(|class| class == Class::Small), |_| Class::Small);
        layout.small_pages = layout.pages;
        let whole = of(|class| matches!(class, Class::Whole(_)));
        layout.place(&whole, Class::Whole);
        layout.scheduled = whole.iter().map(|&i| i as u32).collect();
        let before_tables = layout.pages;
        let mut tables = of(|class| class == Class::Table);
        tables.sort_by_key(|&i| bytes[i]);
        layout.place(&tables, |_| Class::Table);
        layout.table_pages = layout.pages - before_tables;
        layout.fill_segments(&specs)?;
        for spec in specs {
            layout.names.push(spec.name);
            layout.sources.push(spec.source);
        }
        Ok(layout)
    }

    /// Whether both lay the same bytes of the same files out in the same way.
    pub(crate) fn has_bytes_of(&self, other: &Layout) -> bool {
        let is_same = |(a, b): (&Source, &Source)| a.has_bytes_of(b);
        self.conversions.is_empty()
            && other.conversions.is_empty()
            && (self.page_size, self.whole) == (other.page_size, other.whole)
            && self.weights == other.weights
            && self.names == other.names
            && self.sources.iter().zip(&other.sources).all(is_same)
    }

    /// What registering a page takes, if its bytes lie in files, as they are used, and not too scattered.
    pub(crate) fn registration(&self, page: u32) -> Option<PagePlan> {
        let is_stored_as_used = self.converted[page as usize].is_empty();
        is_stored_as_used.then(|| PagePlan::of(&self.segments[page as usize])).flatten()
    }

    /// How a weight is converted.
    pub(crate) fn conversion(&self, weight: u32) -> Option<&Conversion> {
        self.conversions.get(weight as usize)?.as_ref()
    }

    /// The stored bytes that a page is filled from.
    pub(crate) fn stored_of(&self, page: u32) -> impl Iterator<Item = Segment> {
        let converted = self.converted[page as usize].iter().filter_map(|part| {
            Some(part.stored(self.conversion(part.weight)?, &self.sources[part.weight as usize]))
        });
        self.segments[page as usize].iter().cloned().chain(converted)
    }

    /// The page order of this layout. Where weights are to be whole, those behind one another stay or leave together that have half
    /// as many pages as are read ahead. A part of a weight is left at either end: of Flux in float8, 56% of its pages resident, 51%
    /// of the weights are whole, 34% where each is a run of its own, 53% with runs as long as all that is read ahead.
    pub(crate) fn order(&self) -> RankOrder {
        let (first, last) = (self.small_pages, self.table_pages);
        if !self.whole {
            return RankOrder::Spread { first, last };
        }
        let least = self.frames() / 2;
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for number in 0..self.scheduled.len() as u32 {
            let (begin, end) = self.scheduled_pages(number).into_inner();
            match runs.last_mut().filter(|run| run.1 - run.0 + 1 < least) {
                Some(run) => run.1 = end,
                None => runs.push((begin, end)),
            }
        }
        RankOrder::SpreadRuns { first, last, runs: runs.into() }
    }

    /// The pages of the weight with this number in the schedule.
    pub(crate) fn scheduled_pages(&self, number: u32) -> RangeInclusive<u32> {
        let weight = self.weights[self.scheduled[number as usize] as usize];
        debug_assert!(matches!(weight.class, Class::Whole(_)));
        weight.first_page..=weight.last_page
    }

    /// The most pages one weight lies on.
    pub(crate) fn widest(&self) -> u32 {
        let whole = self.weights.iter().filter(|weight| matches!(weight.class, Class::Whole(_)));
        whole.map(|weight| weight.last_page - weight.first_page + 1).max().unwrap_or(1)
    }

    /// How many streamed frames to aim at in this budget: room for the operation at hand and the next one, and more
    /// where it costs little.
    pub(crate) fn window(&self, budget: Bytes) -> u32 {
        let affordable = budget.get() / self.page_size.get() / 4;
        (2 * self.widest()).max(self.frames().min(u32::try_from(affordable).unwrap_or(WINDOW)))
    }

    /// Streamed frames to aim at in a large budget.
    fn frames(&self) -> u32 {
        WINDOW.min(WINDOW_BYTES.get().div_ceil(self.page_size.get()) as u32)
    }

    /// Lays weights out from the next page on.
    fn place(&mut self, which: &[usize], class: impl Fn(u32) -> Class) {
        let mut offset = self.page_size * u64::from(self.pages);
        for (number, &i) in which.iter().enumerate() {
            let bytes = self.weights[i].bytes;
            let page = |at: Bytes| (at.get() / self.page_size.get()) as u32;
            let last = if bytes == Bytes::ZERO { offset } else { offset + bytes - Bytes::new(1) };
            self.weights[i] = Placed {
                offset,
                bytes,
                first_page: page(offset),
                last_page: page(last),
                class: class(number as u32),
            };
            self.pages = page(last) + 1;
            offset = (offset + bytes.max(Bytes::new(1))).checked_align_up(ALIGNMENT).unwrap_or(Bytes::MAX);
        }
    }

    fn fill_segments(&mut self, specs: &[WeightSpec]) -> Result<()> {
        self.segments = vec![Vec::new(); self.pages as usize];
        self.weight_of = vec![Vec::new(); self.pages as usize];
        self.converted = vec![Vec::new(); self.pages as usize];
        let mut by_offset: Vec<_> = (0..specs.len()).collect();
        by_offset.sort_by_key(|&i| self.weights[i].offset);
        for i in by_offset {
            let weight = self.weights[i];
            for page in weight.first_page..=weight.last_page {
                let base = self.page_size * u64::from(page);
                let start = weight.offset.max(base);
                let end = (weight.offset + weight.bytes).min(base + self.page_size);
                if start >= end {
                    continue;
                }
                if let Some(conversion) = self.conversion(i as u32) {
                    let size = conversion.to.size().get();
                    let part = ConvertedPart {
                        weight: i as u32,
                        first: (start - weight.offset).get() / size,
                        count: (end - start).get() / size,
                        to: start - base,
                    };
                    self.converted[page as usize].push(part);
                    continue;
                }
                self.weight_of[page as usize].push(i as u32);
                self.segments[page as usize].push(Segment {
                    source: specs[i].source.clone(),
                    source_offset: (start - weight.offset).get(),
                    dst_offset: (start - base).get(),
                    len: (end - start).get(),
                });
            }
        }
        Ok(())
    }
}

fn default_page_size(total: Bytes) -> Bytes {
    let wanted = (total.get() / 64).clamp(LEAST_PAGE.get(), MOST_PAGE.get());
    Bytes::new(1 << wanted.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    fn spec(name: &str, bytes: usize, kind: WeightKind) -> WeightSpec {
        WeightSpec { name: name.into(), source: Source::memory(Arc::new(vec![7; bytes])), kind }
    }

    #[test]
    fn pages_grow_with_the_model_and_what_is_read_ahead_does_not_grow_with_them() {
        let chosen =
            [100 << 20, 1 << 30, 3 << 30, 12 << 30, 100 << 30].map(Bytes::new).map(default_page_size);
        assert_eq!(chosen, [2, 16, 32, 64, 64].map(Bytes::mib));
        for (page_size, window, budget) in
            [(2, 16, 12 << 30), (32, 16, 12 << 30), (64, 8, 12 << 30), (64, 4, 1 << 30)]
        {
            let options =
                LayoutOptions { page_size: Some(Bytes::mib(page_size)), ..LayoutOptions::default() };
            let layout = Layout::new(vec![spec("w", 3 << 20, WeightKind::Whole)], options).unwrap();
            assert_eq!(layout.window(Bytes::new(budget)), window, "pages of {page_size} MiB");
        }
    }

    #[test]
    fn small_weights_come_first_and_tables_last_smallest_first() {
        let specs = vec![
            spec("big table", 5 << 20, WeightKind::Table),
            spec("w", 3 << 20, WeightKind::Whole),
            spec("norm", 100, WeightKind::Whole),
            spec("table", 1 << 20, WeightKind::Table),
        ];
        let layout = Layout::new(specs, LayoutOptions::default()).unwrap();
        assert_eq!(layout.page_size, Bytes::mib(2));
        let pages = layout.weights.iter().map(|w| (w.first_page, w.last_page)).collect::<Vec<_>>();
        assert_eq!(pages, [(3, 5), (1, 2), (0, 0), (3, 3)]);
        assert_eq!((layout.small_pages, layout.table_pages, layout.pages), (1, 3, 6));
        assert_eq!(layout.scheduled, [1]);
    }

    #[test]
    fn a_page_that_is_no_power_of_two_is_refused_by_value() {
        let options = LayoutOptions { page_size: Some(Bytes::mib(3)), ..LayoutOptions::default() };
        let error = Layout::new(vec![spec("w", 1, WeightKind::Whole)], options).unwrap_err();
        assert_eq!(error.to_string(), "a page is a power of two of at least 2 MiB: 3 MiB");
    }

    proptest! {
        #[test]
        fn weights_never_overlap_and_segments_cover_them(sizes in prop::collection::vec((0usize..6 << 20, any::<bool>()), 1..12)) {
            let specs: Vec<_> = sizes
                .iter()
                .map(|&(bytes, table)| spec("w", bytes, if table { WeightKind::Table } else { WeightKind::Whole }))
                .collect();
            let layout = Layout::new(specs, LayoutOptions::default()).unwrap();
            let mut places: Vec<_> = layout.weights.iter().filter(|w| w.bytes > Bytes::ZERO).collect();
            places.sort_by_key(|weight| weight.offset);
            for pair in places.windows(2) {
                prop_assert!(pair[0].offset + pair[0].bytes <= pair[1].offset);
            }
            prop_assert!(layout.weights.iter().all(|w| w.offset.get() % ALIGNMENT.get() == 0 && w.last_page < layout.pages));
            let covered: u64 = layout.segments.iter().flatten().map(|segment| segment.len).sum();
            prop_assert_eq!(covered, sizes.iter().map(|&(bytes, _)| bytes as u64).sum::<u64>());
        }
    }
}

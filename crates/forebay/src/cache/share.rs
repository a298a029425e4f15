//! The second watermark: where the weights exceed the page cache, which streamed pages are read through it.
//!
//! A scan in a circle that is larger than the page cache never finds anything there. So a run of ranks that are streamed,
//! evenly spread as ranks are, is read through the cache and stays in it; all others are read past it. The model in use
//! comes first. What others lose to it leaves the cache at once: the kernel would rather keep what was read several times
//! than what was read once, and the new model's own pages would push each other out, pass after pass.

use std::num::NonZeroU64;
use std::ops::Range;
use std::sync::Arc;

use forebay_core::{Bytes, PageIndex, PageRef, Rank, VbarId};
use forebay_store::{Advice, Segment, Source, SourceKind};

use crate::state::State;
use crate::vbar::Vbar;

/// Of the room that there seems to be this share is used. Others' needs come and go, and a little too much costs far more than
/// a little too little: what is read in a circle is then lost page by page before it is used again.
const USED: (u64, u64) = (7, 8);
/// A run moves only by more than this share of the pages: what it moves over is read from disk once more.
const STEADY: u32 = 64;

/// Of one VBAR, what bears on its share of the cache.
#[derive(Clone, Copy, Debug)]
struct Demand {
    page_size: Bytes,
    pages: u32,
    /// Of them, how many are resident once passes have settled.
    resident: u32,
}

impl Demand {
    fn streamed(&self) -> u32 {
        self.pages - self.resident
    }

    /// The run of so many streamed ranks. It moves as little as it can: what was resident is not in the cache.
    fn run_of(&self, share: u32, was: Option<&Range<u32>>) -> Range<u32> {
        let latest = self.pages - share;
        let start = was.map_or(self.resident, |was| was.start.clamp(self.resident, latest));
        start..start + share
    }

    /// Whether a run is so close to another that it stays.
    fn is_steady(&self, was: &Range<u32>, now: &Range<u32>) -> bool {
        let most = self.pages / STEADY;
        was.start.abs_diff(now.start) <= most && was.end.abs_diff(now.end) <= most
    }
}

/// How many streamed pages of each VBAR, highest priority first, are read through a page cache of `room`. `None`: all
/// pages of all VBARs are.
fn shares(room: Bytes, demands: &[Demand]) -> Option<Vec<u32>> {
    let all: Bytes = demands.iter().map(|demand| demand.page_size * u64::from(demand.pages)).sum();
    if all <= room {
        return None;
    }
    let mut left = Bytes::new(room.get() / USED.1 * USED.0);
    let share = |demand: &Demand| {
        let pages = (left.get() / demand.page_size.get()).min(demand.streamed().into());
        left -= demand.page_size * pages;
        pages as u32
    };
    Some(demands.iter().map(share).collect())
}

/// Pages that have no place in the page cache any more.
pub(crate) struct GivenUp(Vec<(Arc<Vbar>, PageIndex)>);

impl GivenUp {
    /// Tells the kernel, which takes its time.
    pub(crate) fn leave_cache(&self) {
        for (vbar, page) in &self.0 {
            let layout = vbar.layout.iter();
            layout.flat_map(|layout| layout.stored_of(page.0)).for_each(|segment| leave_cache(&segment));
        }
    }
}

impl State {
    /// Whether another VBAR comes first than when the page cache was shared.
    pub(crate) fn is_cache_shared_anew(&self) -> bool {
        self.policy.lasting_first() != self.cache_shared_for
    }

    /// Divides a page cache of `room` among the VBARs. What loses its place is given up.
    pub(crate) fn share_cache(&mut self, room: Bytes) {
        self.cache_shared_for = self.policy.lasting_first();
        let mut open: Vec<(VbarId, Demand)> = Vec::new();
        for id in self.policy.lasting_priorities() {
            let Some(book) = self.books.vbars.get(&id).filter(|book| book.is_open()) else { continue };
            let Some(layout) = &book.vbar.layout else { continue };
            let pages = layout.pages - layout.table_pages;
            let resident = self.policy.settled_watermark(id).0.min(pages);
            open.push((id, Demand { page_size: layout.page_size, pages, resident }));
        }
        let demands: Vec<Demand> = open.iter().map(|(_, demand)| *demand).collect();
        let shares = shares(room, &demands);
        for (i, (id, demand)) in open.iter().enumerate() {
            let book = self.books.vbar(*id);
            let run = shares.as_ref().map(|shares| demand.run_of(shares[i], book.cached.as_ref()));
            if matches!((&book.cached, &run), (Some(was), Some(now)) if demand.is_steady(was, now)) {
                continue;
            }
            if book.cached.is_some() != run.is_some() {
                let sources = book.vbar.layout.as_ref().map_or(&[][..], |layout| &layout.sources);
                read_ahead_of_files(sources, run.is_none());
            }
            let was = std::mem::replace(&mut book.cached, run.clone());
            // Other pages of the first one leave as they are read, and may be found in the cache until then.
            let was = if i > 0 { Some(0..demand.pages) } else { was };
            let (Some(was), Some(now)) = (was, run) else { continue };
            let left = was.filter(|rank| !now.contains(rank));
            self.leaving_cache.extend(left.map(|rank| self.policy.at(*id, Rank(rank))));
        }
    }

    /// Takes some of what was given up, but for what has a place again: what is done about it takes its time, and shares may
    /// change meanwhile.
    pub(crate) fn take_leaving_cache(&mut self, most: usize) -> Option<GivenUp> {
        let pages: Vec<PageRef> = self.leaving_cache.drain(..most.min(self.leaving_cache.len())).collect();
        let past = pages.iter().filter(|&&page| self.is_past_cache(page));
        let past = past.map(|page| (Arc::clone(&self.books.vbars[&page.vbar].vbar), page.page));
        (!pages.is_empty()).then(|| GivenUp(past.collect()))
    }

    /// Whether the page cache is too small for a VBAR. Then the disk is what takes time, and to register what is cached
    /// gains nothing.
    pub(crate) fn exceeds_cache(&self, id: VbarId) -> bool {
        self.books.vbars.get(&id).is_some_and(|book| book.cached.is_some())
    }

    /// Whether a page is to be read past the page cache: it stays resident, and need not be read again soon, or has no share
    /// in the cache.
    pub(crate) fn is_past_cache(&self, page: PageRef) -> bool {
        let run = self.books.vbars.get(&page.vbar).and_then(|book| book.cached.as_ref());
        run.is_some_and(|run| !run.contains(&self.policy.rank(page).0))
    }
}

/// Tells the kernel that a piece of a file is not needed in its cache.
fn leave_cache(segment: &Segment) {
    if let SourceKind::File { file, offset } = segment.source.kind()
        && let Some(len) = NonZeroU64::new(segment.len)
    {
        file.advise(offset + segment.source_offset, Some(len), Advice::DontNeed);
    }
}

/// Tells the kernel whether to read ahead in the files of these sources: what it brings beyond a page that has its place
/// in the cache belongs to pages that have none.
fn read_ahead_of_files(sources: &[Source], ahead: bool) {
    let advice = if ahead { Advice::Normal } else { Advice::Random };
    let mut last: Option<&Source> = None;
    for source in sources {
        if let SourceKind::File { file, .. } = source.kind()
            && !last.is_some_and(|last| last.shares_file_with(source))
        {
            file.advise(0, None, advice);
        }
        last = Some(source);
    }
}

#[cfg(test)]
mod tests {
    use forebay_device::host::{HostConfig, HostDevice};

    use super::*;
    use crate::testing::attach_pages;
    use crate::{Budget, Engine, EngineConfig};

    fn demand(resident: u32, streamed: u32) -> Demand {
        Demand { page_size: Bytes::mib(32), pages: resident + streamed, resident }
    }

    #[test]
    fn what_fits_is_read_through_the_cache() {
        assert_eq!(shares(Bytes::mib(32) * 10, &[demand(4, 6)]), None);
    }

    #[test]
    fn of_what_does_not_fit_streamed_pages_get_the_room() {
        assert_eq!(shares(Bytes::mib(32) * 32, &[demand(8, 92)]), Some(vec![28]));
    }

    #[test]
    fn the_model_in_use_comes_first() {
        let two = [demand(10, 20), demand(0, 30)];
        assert_eq!(shares(Bytes::mib(32) * 32, &two), Some(vec![20, 8]));
        assert_eq!(shares(Bytes::ZERO, &two), Some(vec![0, 0]));
    }

    #[test]
    fn a_run_begins_above_what_is_resident_and_moves_no_more_than_it_must() {
        let ranks = |start: u32, end: u32| start..end;
        assert_eq!(demand(10, 90).run_of(40, None), ranks(10, 50));
        // Less is resident, for another model or a spike: what was, is not in the cache.
        assert_eq!(demand(0, 100).run_of(20, Some(&(10..50))), ranks(10, 30));
        assert_eq!(demand(0, 100).run_of(95, Some(&(10..50))), ranks(5, 100));
        // More is resident.
        assert_eq!(demand(30, 70).run_of(40, Some(&(10..50))), ranks(30, 70));
    }

    #[test]
    fn what_has_a_place_again_does_not_leave_the_cache() -> Result<(), Box<dyn std::error::Error>> {
        let page = Bytes::mib(2);
        let config = EngineConfig {
            budget: Budget::Fixed(page * 8),
            page_cache: Some(page * 16),
            ..EngineConfig::default()
        };
        let engine = Engine::new(Arc::new(HostDevice::new(HostConfig::default())?), config)?;
        let model = attach_pages(&engine, page, 40)?;
        let mut state = engine.shared().state.lock();
        state.share_cache(page * 16);
        let run = state.books.vbar(model.vbar().id).cached.clone().ok_or("all fits")?;
        assert_eq!(run.len(), 14);
        state.leaving_cache = (0..40).map(|number| model.vbar().page_ref(number)).collect();
        let mut left = 0;
        while let Some(GivenUp(pages)) = state.take_leaving_cache(3) {
            assert!(pages.len() <= 3);
            let rank = |page: &PageIndex| state.policy.rank(model.vbar().page_ref(page.0)).0;
            assert!(pages.iter().all(|(_, page)| !run.contains(&rank(page))));
            left += pages.len();
        }
        assert_eq!(left, 40 - 14);
        Ok(())
    }

    #[test]
    fn a_run_stays_where_little_changed() {
        let of_128 = demand(28, 100);
        assert!(of_128.is_steady(&(28..60), &(30..58)));
        assert!(!of_128.is_steady(&(28..60), &(28..57)));
        assert!(!of_128.is_steady(&(28..60), &(31..60)));
    }
}

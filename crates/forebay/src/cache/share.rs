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
pub(crate) struct GivenUp {
    vbar: Arc<Vbar>,
    pages: Vec<PageIndex>,
}

impl GivenUp {
    /// Tells the kernel. Takes time: about 50 ms a GB.
    pub(crate) fn leave_cache(&self) {
        let Some(layout) = &self.vbar.layout else { return };
        for segment in self.pages.iter().flat_map(|page| layout.stored_of(page.0)) {
            leave_cache(&segment);
        }
    }
}

impl State {
    /// Whether another VBAR comes first than when the page cache was shared.
    pub(crate) fn is_cache_shared_anew(&self) -> bool {
        self.policy.lasting_priorities().first().copied() != self.cache_shared_for
    }

    /// Divides a page cache of `room` among the VBARs. What loses its place is to be told to the kernel, without the lock.
    #[must_use]
    pub(crate) fn share_cache(&mut self, room: Bytes) -> Vec<GivenUp> {
        let priorities = self.policy.lasting_priorities();
        self.cache_shared_for = priorities.first().copied();
        let mut open: Vec<(VbarId, Demand)> = Vec::new();
        for id in priorities {
            let Some(book) = self.books.vbars.get(&id).filter(|book| book.is_open()) else { continue };
            let Some(layout) = &book.vbar.layout else { continue };
            let pages = layout.pages - layout.table_pages;
            let resident = self.policy.settled_watermark(id).0.min(pages);
            open.push((id, Demand { page_size: layout.page_size, pages, resident }));
        }
        let demands: Vec<Demand> = open.iter().map(|(_, demand)| *demand).collect();
        let shares = shares(room, &demands);
        let mut given_up = Vec::new();
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
            let vbar = Arc::clone(&book.vbar);
            let left = was.filter(|rank| !now.contains(rank));
            let pages = left.filter_map(|rank| self.policy.page_of(*id, Rank(rank))).map(|page| page.page);
            given_up.push(GivenUp { vbar, pages: pages.collect() });
        }
        given_up
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
    use super::*;

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
    fn a_run_stays_where_little_changed() {
        let of_128 = demand(28, 100);
        assert!(of_128.is_steady(&(28..60), &(30..58)));
        assert!(!of_128.is_steady(&(28..60), &(28..57)));
        assert!(!of_128.is_steady(&(28..60), &(31..60)));
    }
}

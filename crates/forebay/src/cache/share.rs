//! The second watermark: where the weights exceed the page cache, which streamed pages are read through it.
//!
//! A scan in a circle that is larger than the page cache never finds anything there. So the streamed pages of the lowest
//! ranks, evenly spread as ranks are, are read through the cache and stay in it; all others are read past it.

use forebay_core::{Bytes, PageRef, VbarId};

use forebay_store::{Advice, Source, SourceKind};

use crate::state::State;

/// Of the room that there seems to be this share is used: others' needs come and go.
const USED: (u64, u64) = (15, 16);
/// A bound moves only by more than this share of the pages: what it moves over is read from disk once more.
const STEADY: u32 = 64;

/// Of one VBAR, what bears on its share of the cache.
#[derive(Clone, Copy, Debug)]
struct Demand {
    page_size: Bytes,
    /// Pages that are resident once passes have settled.
    resident: u32,
    /// Pages that are not.
    streamed: u32,
}

/// How many streamed pages of each VBAR, highest priority first, are read through a page cache of `room`. `None`: all
/// pages of all VBARs are.
fn shares(room: Bytes, demands: &[Demand]) -> Option<Vec<u32>> {
    let all: Bytes = demands.iter().map(|d| d.page_size * u64::from(d.resident + d.streamed)).sum();
    if all <= room {
        return None;
    }
    let mut left = Bytes::new(room.get() / USED.1 * USED.0);
    let share = |demand: &Demand| {
        let pages = (left.get() / demand.page_size.get()).min(demand.streamed.into());
        left -= demand.page_size * pages;
        pages as u32
    };
    Some(demands.iter().map(share).collect())
}

impl State {
    /// Divides a page cache of `room` among the VBARs.
    pub(crate) fn share_cache(&mut self, room: Bytes) {
        let mut open: Vec<(VbarId, Demand)> = Vec::new();
        for id in self.policy.priorities() {
            let Some(book) = self.books.vbars.get(&id).filter(|book| book.is_open()) else { continue };
            let Some(layout) = &book.vbar.layout else { continue };
            let whole = layout.pages - layout.table_pages;
            let resident = self.policy.watermark(id).0.min(whole);
            let demand = Demand { page_size: layout.page_size, resident, streamed: whole - resident };
            open.push((id, demand));
        }
        let demands: Vec<Demand> = open.iter().map(|(_, demand)| *demand).collect();
        let shares = shares(room, &demands);
        for (i, (id, demand)) in open.iter().enumerate() {
            let book = self.books.vbar(*id);
            let bound = shares.as_ref().map(|shares| demand.resident + shares[i]);
            let steady = (demand.resident + demand.streamed) / STEADY;
            let stays =
                matches!((book.cached_below, bound), (Some(was), Some(now)) if was.abs_diff(now) <= steady);
            if stays {
                continue;
            }
            if book.cached_below.is_some() != bound.is_some() {
                let layout = book.vbar.layout.as_ref().map_or(&[][..], |layout| &layout.sources);
                read_ahead_of_files(layout, bound.is_none());
            }
            book.cached_below = bound;
        }
    }

    /// Whether the page cache is too small for a VBAR. Then the disk is what takes time, and to register what is cached
    /// gains nothing.
    pub(crate) fn exceeds_cache(&self, id: VbarId) -> bool {
        self.books.vbars.get(&id).is_some_and(|book| book.cached_below.is_some())
    }

    /// Whether a page is to be read past the page cache: it is resident, and need not be read again soon, or has no share
    /// in the cache.
    pub(crate) fn is_past_cache(&self, page: PageRef) -> bool {
        let Some(book) = self.books.vbars.get(&page.vbar) else { return false };
        book.cached_below.is_some_and(|bound| self.policy.is_kept(page) || self.policy.rank(page).0 >= bound)
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
        Demand { page_size: Bytes::mib(32), resident, streamed }
    }

    #[test]
    fn what_fits_is_read_through_the_cache() {
        assert_eq!(shares(Bytes::mib(32) * 10, &[demand(4, 6)]), None);
    }

    #[test]
    fn of_what_does_not_fit_streamed_pages_get_the_room() {
        assert_eq!(shares(Bytes::mib(32) * 32, &[demand(8, 92)]), Some(vec![30]));
    }

    #[test]
    fn the_model_in_use_comes_first() {
        let two = [demand(10, 20), demand(0, 30)];
        assert_eq!(shares(Bytes::mib(32) * 32, &two), Some(vec![20, 10]));
        assert_eq!(shares(Bytes::ZERO, &two), Some(vec![0, 0]));
    }
}

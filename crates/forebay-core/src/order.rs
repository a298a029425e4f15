//! Which page matters more: the permutation between pages and ranks.

use std::sync::Arc;

use crate::{PageIndex, Rank};

/// How ranks are laid over a VBAR's pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RankOrder {
    /// Rank = place: the first pages are kept longest (ComfyUI's contract).
    Address,
    /// Low-discrepancy: the pages below *any* watermark are spread evenly over the VBAR, so that streaming overlaps
    /// compute everywhere. The order is the bit-reversal permutation (the base-2 van der Corput sequence; J. G. van
    /// der Corput, "Verteilungsfunktionen", 1935).
    ///
    /// The `first` leading pages take the lowest ranks and the `last` trailing ones the highest.
    Spread {
        /// Leading pages that are kept before all others (the always-resident region).
        first: u32,
        /// Trailing pages that are given up before all others (tables that can be looked up at their source).
        last: u32,
    },
    /// As `Spread`, run by run: whatever the watermark, it parts one run at most. For weights that are worth more where they
    /// are resident as a whole. Runs that are longer than others take more of the streamed frames at once.
    SpreadRuns {
        /// As of `Spread`.
        first: u32,
        /// As of `Spread`.
        last: u32,
        /// The first and the last page of each run, both in ascending order. Runs may share pages, which have the lower of
        /// the ranks they would have. A page of no run is one by itself.
        runs: Arc<[(u32, u32)]>,
    },
}

/// The permutation of one VBAR.
///
/// ```
/// use forebay_core::{PageIndex, Rank, RankOrder, Ranks};
/// let ranks = Ranks::new(8, &RankOrder::Spread { first: 0, last: 0 });
/// let kept: Vec<_> = (0..4).map(|r| ranks.page(Rank(r)).0).collect();
/// assert_eq!(kept, [0, 4, 2, 6]); // half of the pages: every second one
/// ```
#[derive(Debug)]
pub struct Ranks {
    rank_of: Vec<u32>,
    page_of: Vec<u32>,
}

impl Ranks {
    /// The ranks of `pages` pages. Leading and trailing pages, and those of runs, beyond `pages` are ignored.
    pub fn new(pages: u32, order: &RankOrder) -> Self {
        let page_of: Vec<u32> = match order {
            RankOrder::Address => (0..pages).collect(),
            RankOrder::Spread { first, last } => spread(pages, *first, *last, &[]),
            RankOrder::SpreadRuns { first, last, runs } => spread(pages, *first, *last, runs),
        };
        let mut rank_of = vec![0; page_of.len()];
        for (rank, &page) in page_of.iter().enumerate() {
            rank_of[page as usize] = rank as u32;
        }
        Ranks { rank_of, page_of }
    }

    /// How many pages there are.
    pub fn len(&self) -> u32 {
        self.page_of.len() as u32
    }

    /// Whether there are no pages.
    pub fn is_empty(&self) -> bool {
        self.page_of.is_empty()
    }

    /// The rank of a page.
    pub fn rank(&self, page: PageIndex) -> Rank {
        Rank(self.rank_of[page.as_usize()])
    }

    /// The page of a rank.
    pub fn page(&self, rank: Rank) -> PageIndex {
        PageIndex(self.page_of[rank.0 as usize])
    }
}

/// The pages in the order of their ranks: of `Spread` without runs.
fn spread(pages: u32, first: u32, last: u32, runs: &[(u32, u32)]) -> Vec<u32> {
    let first = first.min(pages);
    let last = last.min(pages - first);
    let middle = first..pages - last;
    let mut is_placed = vec![false; pages as usize];
    let mut page_of: Vec<u32> = (0..first).collect();
    for page in van_der_corput(middle.end - middle.start).map(|page| first + page) {
        // Of several runs the one that began before this page.
        let run = runs.get(runs.partition_point(|&(_, end)| end < page));
        let (begin, end) = run.filter(|run| run.0 <= page).map_or((page, page), |&run| run);
        for page in begin.max(middle.start)..=end.min(middle.end - 1) {
            if !std::mem::replace(&mut is_placed[page as usize], true) {
                page_of.push(page);
            }
        }
    }
    page_of.extend(middle.end..pages);
    page_of
}

/// `0..n` in bit-reversed order of the next power of two, numbers past the end skipped.
fn van_der_corput(n: u32) -> impl Iterator<Item = u32> {
    let bits = n.max(1).next_power_of_two().trailing_zeros();
    (0..1u64 << bits)
        .map(move |i| if bits == 0 { 0 } else { (i as u32).reverse_bits() >> (32 - bits) })
        .filter(move |&i| i < n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_a_permutation_at_every_size() {
        for pages in [0, 1, 2, 3, 7, 8, 9, 100, 1000, 1025] {
            let runs = [(0, 2), (2, 4), (4, 4), (8, 90), (1020, 1100)].into();
            let in_runs = RankOrder::SpreadRuns { first: 2, last: 3, runs };
            for order in [RankOrder::Address, RankOrder::Spread { first: 2, last: 3 }, in_runs] {
                let ranks = Ranks::new(pages, &order);
                let mut seen: Vec<_> = (0..pages).map(|r| ranks.page(Rank(r)).0).collect();
                assert!((0..pages).all(|p| ranks.page(ranks.rank(PageIndex(p))).0 == p));
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..pages), "{pages} pages, {order:?}");
            }
        }
    }

    #[test]
    fn any_watermark_keeps_evenly_spread_pages() {
        let pages = 1000;
        let ranks = Ranks::new(pages, &RankOrder::Spread { first: 0, last: 0 });
        for watermark in [10, 100, 250, 500, 750] {
            let mut kept: Vec<_> = (0..watermark).map(|r| ranks.page(Rank(r)).0).collect();
            kept.sort_unstable();
            kept.push(pages + kept[0]);
            let even = pages / watermark;
            let widest = kept.windows(2).map(|w| w[1] - w[0]).max().unwrap();
            assert!(
                widest <= 4 * even.max(1),
                "watermark {watermark}: a gap of {widest} pages, even is {even}"
            );
        }
    }

    #[test]
    fn the_first_pages_are_kept_longest_and_the_last_leave_first() {
        let ranks = Ranks::new(10, &RankOrder::Spread { first: 2, last: 3 });
        assert_eq!((ranks.rank(PageIndex(0)), ranks.rank(PageIndex(1))), (Rank(0), Rank(1)));
        assert_eq!(ranks.rank(PageIndex(9)), Rank(9));
        assert!((2..7).all(|p| (2..7).contains(&ranks.rank(PageIndex(p)).0)));
    }

    #[test]
    fn any_watermark_parts_one_run_at_most_and_keeps_evenly_spread_ones() {
        // Weights of three and a bit pages, one behind the other: neighbours share a page.
        let runs: Vec<(u32, u32)> = (0..100).map(|n| (n * 33 / 10, (n + 1) * 33 / 10)).collect();
        let pages = runs.last().unwrap().1 + 1;
        let whole = |watermark: u32| {
            let order = RankOrder::SpreadRuns { first: 0, last: 0, runs: runs.clone().into() };
            let ranks = Ranks::new(pages, &order);
            let is_kept = |page| ranks.rank(PageIndex(page)).0 < watermark;
            let kept = |&(begin, end): &(u32, u32)| (begin..=end).filter(|&page| is_kept(page)).count();
            let whole: Vec<u32> = (0..)
                .zip(&runs)
                .filter(|(_, run)| kept(run) as u32 == run.1 - run.0 + 1)
                .map(|(n, _)| n)
                .collect();
            // What is kept beside them is pages that they share with others, and a part of one run.
            let theirs: std::collections::HashSet<u32> =
                whole.iter().flat_map(|&n| runs[n as usize].0..=runs[n as usize].1).collect();
            assert!(watermark as usize - theirs.len() < 5, "{watermark}: {} of whole runs", theirs.len());
            whole
        };
        for watermark in [20, 100, 165, 250] {
            let mut kept = whole(watermark);
            assert!(kept.len() as u32 >= watermark / 5, "{watermark}: {} runs", kept.len());
            kept.push(100 + kept[0]);
            let widest = kept.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
            assert!(widest <= 4 * pages.div_ceil(watermark), "watermark {watermark}: a gap of {widest} runs");
        }
    }
}

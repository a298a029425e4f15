//! Which page matters more: the permutation between pages and ranks.

use crate::{PageIndex, Rank};

/// How ranks are laid over a VBAR's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
}

/// The permutation of one VBAR.
///
/// ```
/// use forebay_core::{PageIndex, Rank, RankOrder, Ranks};
/// let ranks = Ranks::new(8, RankOrder::Spread { first: 0, last: 0 });
/// let kept: Vec<_> = (0..4).map(|r| ranks.page(Rank(r)).0).collect();
/// assert_eq!(kept, [0, 4, 2, 6]); // half of the pages: every second one
/// ```
#[derive(Debug)]
pub struct Ranks {
    rank_of: Vec<u32>,
    page_of: Vec<u32>,
}

impl Ranks {
    /// The ranks of `pages` pages. Leading and trailing pages of [`RankOrder::Spread`] beyond `pages` are ignored.
    pub fn new(pages: u32, order: RankOrder) -> Self {
        let page_of: Vec<u32> = match order {
            RankOrder::Address => (0..pages).collect(),
            RankOrder::Spread { first, last } => {
                let first = first.min(pages);
                let last = last.min(pages - first);
                let middle = pages - first - last;
                (0..first)
                    .chain(van_der_corput(middle).map(|page| first + page))
                    .chain(pages - last..pages)
                    .collect()
            }
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
            for order in [RankOrder::Address, RankOrder::Spread { first: 2, last: 3 }] {
                let ranks = Ranks::new(pages, order);
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
        let ranks = Ranks::new(pages, RankOrder::Spread { first: 0, last: 0 });
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
        let ranks = Ranks::new(10, RankOrder::Spread { first: 2, last: 3 });
        assert_eq!((ranks.rank(PageIndex(0)), ranks.rank(PageIndex(1))), (Rank(0), Rank(1)));
        assert_eq!(ranks.rank(PageIndex(9)), Rank(9));
        assert!((2..7).all(|p| (2..7).contains(&ranks.rank(PageIndex(p)).0)));
    }
}

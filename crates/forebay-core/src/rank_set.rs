//! A set of ranks with its largest member at hand.

use crate::Rank;

const FANOUT: usize = 64;

/// A set over `0..n` as a tree of 64-bit words: each operation touches one word a level, four levels for a set over
/// sixteen million.
#[derive(Debug)]
pub(crate) struct RankSet {
    /// Level 0 holds a bit per member; a bit of level k+1 says that a word of level k is not zero.
    levels: Vec<Vec<u64>>,
    len: u32,
}

impl RankSet {
    pub(crate) fn new(n: u32) -> Self {
        let mut levels = Vec::new();
        let mut bits = n as usize;
        loop {
            let words = bits.div_ceil(FANOUT).max(1);
            levels.push(vec![0; words]);
            if words == 1 {
                return RankSet { levels, len: 0 };
            }
            bits = words;
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, rank: Rank) -> bool {
        let i = rank.0 as usize;
        self.levels[0][i / FANOUT] >> (i % FANOUT) & 1 == 1
    }

    /// Adds a rank; whether it was absent.
    pub(crate) fn insert(&mut self, rank: Rank) -> bool {
        let mut i = rank.0 as usize;
        for (level, words) in self.levels.iter_mut().enumerate() {
            let (word, bit) = (&mut words[i / FANOUT], 1u64 << (i % FANOUT));
            if *word & bit != 0 {
                debug_assert!(level == 0 || self.len > 0);
                if level == 0 {
                    return false;
                }
                break;
            }
            *word |= bit;
            i /= FANOUT;
        }
        self.len += 1;
        true
    }

    /// Takes a rank out; whether it was present.
    pub(crate) fn remove(&mut self, rank: Rank) -> bool {
        let mut i = rank.0 as usize;
        if self.levels[0][i / FANOUT] >> (i % FANOUT) & 1 == 0 {
            return false;
        }
        for words in &mut self.levels {
            let word = &mut words[i / FANOUT];
            *word &= !(1u64 << (i % FANOUT));
            if *word != 0 {
                break;
            }
            i /= FANOUT;
        }
        self.len -= 1;
        true
    }

    /// The largest member.
    pub(crate) fn max(&self) -> Option<Rank> {
        let mut i = 0;
        for words in self.levels.iter().rev() {
            let word = words[i];
            if word == 0 {
                return None;
            }
            i = i * FANOUT + (63 - word.leading_zeros() as usize);
        }
        Some(Rank(i as u32))
    }

    /// How many words the deepest operation touches.
    #[cfg(test)]
    pub(crate) fn depth(&self) -> usize {
        self.levels.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_sorted_set(n in 1u32..10_000, ops in prop::collection::vec((any::<bool>(), any::<u32>()), 0..200)) {
            let (mut set, mut naive) = (RankSet::new(n), BTreeSet::new());
            for (insert, rank) in ops {
                let rank = Rank(rank % n);
                if insert {
                    prop_assert_eq!(set.insert(rank), naive.insert(rank));
                } else {
                    prop_assert_eq!(set.remove(rank), naive.remove(&rank));
                }
                prop_assert_eq!(set.max(), naive.last().copied());
                prop_assert_eq!(set.len() as usize, naive.len());
                prop_assert_eq!(set.contains(rank), naive.contains(&rank));
            }
        }
    }

    #[test]
    fn a_million_ranks_are_four_levels_at_most() {
        assert!(RankSet::new(1_000_000).depth() <= 4);
    }
}

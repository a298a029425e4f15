//! The learned order in which a VBAR's weights are used.
//!
//! A model reads its weights in the same order pass after pass. The schedule remembers, for every pair of consecutive
//! uses, which use came next (a second-order Markov predictor in the sense of D. Joseph and D. Grunwald, "Prefetching
//! using Markov predictors", ISCA 1997); two uses of context tell apart the places of a tied weight. A pair that was
//! never seen is followed by what last followed its second use, and at the end of a first pass that begins again.
//!
//! Before all were used once, those that were not are expected in layout order. Modules seldom run in the very order in
//! which they were made, so one that was skipped stays expected for some while. A wrong guess costs a wait, never a wrong
//! result.

use std::collections::{HashMap, VecDeque};

/// How far ahead the schedule looks, in uses.
const HORIZON: usize = 512;

/// How many predicted uses may be skipped before the prediction is thrown away, unless said otherwise.
const SKIP: usize = 16;

/// How often a weight that was never used may be skipped before it is expected no longer.
const PATIENCE: u8 = 16;

/// How many uses in a row may come again, or from far away, before the weights that were never used are not waited for.
const STRAY: u32 = 3;

/// A use that is expected.
#[derive(Clone, Copy, Debug)]
struct Expected {
    weight: u32,
    /// It is the first of this weight.
    is_first: bool,
}

/// The schedule of one VBAR. Weights are numbered in layout order.
///
/// ```
/// use forebay_core::Schedule;
/// let mut schedule = Schedule::new(3);
/// for weight in [0, 2, 1, 0, 2, 1, 0] {
///     schedule.used(weight, |_| {});
/// }
/// let ahead: Vec<_> = std::iter::from_fn(|| schedule.plan_next()).take(3).collect();
/// assert_eq!(ahead, [2, 1, 0]); // learned, not the layout order
/// ```
#[derive(Debug)]
pub struct Schedule {
    weights: u32,
    next: HashMap<(u32, u32), u32>,
    /// What came last after each weight; `weights` stands for "nothing yet".
    after: Vec<u32>,
    /// The last two uses, and the very first; `weights` stands for "none yet".
    last: (u32, u32),
    first: u32,
    /// Predicted uses, nearest first. The first `planned` of them have been handed out.
    queue: VecDeque<Expected>,
    planned: usize,
    /// For each weight how often it may still be skipped: as long as it was never used.
    patience: Vec<u8>,
    /// The first weight in layout order that was never expected; from there on a first pass goes.
    unseen: u32,
    /// Uses in a row that nobody expected.
    stray: u32,
    mispredicted: u64,
    /// How many predicted uses may be skipped before the prediction is thrown away.
    skip: usize,
}

impl Schedule {
    /// A schedule that has seen nothing: layout order.
    pub fn new(weights: u32) -> Self {
        Self::skipping(weights, SKIP)
    }

    /// As [`new`](Schedule::new), for weights whose first uses may be farther out of their order: up to `skip` others that are
    /// expected before one stay expected.
    pub fn skipping(weights: u32, skip: usize) -> Self {
        let mut schedule = Schedule {
            weights,
            skip,
            next: HashMap::new(),
            after: vec![weights; weights as usize],
            last: (weights, weights),
            first: weights,
            queue: VecDeque::new(),
            planned: 0,
            patience: vec![PATIENCE; weights as usize],
            unseen: 0,
            stray: 0,
            mispredicted: 0,
        };
        schedule.extend();
        schedule
    }

    /// Notes a use; whether it was a planned one. `dropped` is called for every other planned use that is no longer
    /// expected.
    pub fn used(&mut self, weight: u32, mut dropped: impl FnMut(u32)) -> bool {
        debug_assert!(weight < self.weights);
        let mut place = self.place_of(weight);
        if place.is_none() {
            self.extend_to(self.skip + 1);
            place = self.place_of(weight);
        }
        self.learn(weight);
        let is_new = std::mem::take(&mut self.patience[weight as usize]) > 0;
        let mut was_planned = false;
        match place {
            Some(skipped) => {
                let kept = self.skip(skipped, &mut dropped);
                self.queue.remove(kept);
                was_planned = self.planned > kept;
                self.planned -= usize::from(was_planned);
                self.mispredicted += u64::from(skipped > 0);
                self.stray = 0;
            }
            None => {
                self.mispredicted += 1;
                self.stray += 1;
                // A weight that is used twice in a first pass changes nothing about the rest of it.
                let goes_on = !is_new && self.is_first_pass() && self.stray < STRAY;
                if !goes_on {
                    while !self.queue.is_empty() {
                        self.drop_at(0, &mut dropped);
                    }
                    self.unseen = if is_new { weight + 1 } else { self.weights };
                }
            }
        }
        // What was learned now bears on all that nobody relies on yet.
        self.take_back();
        self.extend();
        was_planned
    }

    /// The next predicted use that was not handed out yet, if it lies within the horizon.
    pub fn plan_next(&mut self) -> Option<u32> {
        let weight = self.queue.get(self.planned)?.weight;
        self.planned += 1;
        self.extend();
        Some(weight)
    }

    /// Takes the latest [`plan_next`](Schedule::plan_next) back, to be handed out again. Which use it was.
    ///
    /// When a planned page was lost to pressure, take everything back and plan again from the nearest use: what is
    /// read ahead for far uses would only be in the way of near ones.
    pub fn unplan_last(&mut self) -> Option<u32> {
        self.planned = self.planned.checked_sub(1)?;
        self.queue.get(self.planned).map(|expected| expected.weight)
    }

    /// How often a use was not the one expected.
    pub fn mispredicted(&self) -> u64 {
        self.mispredicted
    }

    /// A model without any order must not make the memory of it grow for ever.
    fn memory_limit(&self) -> usize {
        1024 + 8 * self.weights as usize
    }

    /// How many nearer uses are expected before this one, if it is.
    fn place_of(&self, weight: u32) -> Option<usize> {
        self.queue.iter().take(self.skip + 1).position(|expected| expected.weight == weight)
    }

    fn learn(&mut self, weight: u32) {
        let (_, before) = self.last;
        if before == self.weights {
            self.first = weight;
        } else {
            if self.next.len() >= self.memory_limit() {
                self.next.clear();
            }
            self.next.insert(self.last, weight);
            self.after[before as usize] = weight;
        }
        self.last = (before, weight);
    }

    /// Whether weights are expected that were never used.
    fn is_first_pass(&self) -> bool {
        self.queue.front().is_some_and(|expected| expected.is_first)
    }

    /// Another use came before the nearest `count`. How many of these are still expected: they stay the nearest.
    fn skip(&mut self, count: usize, dropped: &mut impl FnMut(u32)) -> usize {
        let mut kept = 0;
        for _ in 0..count {
            let Expected { weight, is_first } = self.queue[kept];
            match &mut self.patience[weight as usize] {
                left if is_first && *left > 0 => {
                    *left -= 1;
                    kept += 1;
                }
                _ => self.drop_at(kept, dropped),
            }
        }
        kept
    }

    fn drop_at(&mut self, place: usize, dropped: &mut impl FnMut(u32)) {
        let expected = self.queue.remove(place);
        if self.planned > place {
            self.planned -= 1;
            expected.into_iter().for_each(|expected| dropped(expected.weight));
        }
    }

    /// Keeps a prediction beyond the planned ones, up to the horizon.
    fn extend(&mut self) {
        self.extend_to(HORIZON.min(self.planned + 1));
    }

    fn extend_to(&mut self, len: usize) {
        while self.weights > 0 && self.queue.len() < len {
            let first = self.take_unseen();
            let weight = first.unwrap_or_else(|| self.predict(self.context()));
            self.queue.push_back(Expected { weight, is_first: first.is_some() });
        }
    }

    /// Forgets predictions that were not handed out.
    fn take_back(&mut self) {
        for Expected { weight, is_first } in self.queue.drain(self.planned..) {
            if is_first {
                self.unseen = self.unseen.min(weight);
            }
        }
    }

    /// The next weight in layout order that was never used or expected.
    fn take_unseen(&mut self) -> Option<u32> {
        let found = (self.unseen..self.weights).find(|&weight| self.patience[weight as usize] > 0);
        self.unseen = found.map_or(self.weights, |weight| weight + 1);
        found
    }

    /// The last two predicted uses, or uses where there are no two.
    fn context(&self) -> (u32, u32) {
        match self.queue.len() {
            0 => self.last,
            1 => (self.last.1, self.queue[0].weight),
            n => (self.queue[n - 2].weight, self.queue[n - 1].weight),
        }
    }

    fn predict(&self, context: (u32, u32)) -> u32 {
        let known = self.next.get(&context).or_else(|| self.after.get(context.1 as usize));
        if let Some(&next) = known.filter(|next| **next < self.weights) {
            return next;
        }
        let beside = if context.1 < self.weights { context.1 + 1 } else { 0 };
        let is_new = self.patience.get(beside as usize).is_some_and(|left| *left > 0);
        match is_new || self.first == self.weights {
            true => beside % self.weights,
            false => self.first,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The next `n` predictions, handed back afterwards.
    fn ahead(schedule: &mut Schedule, n: usize) -> Vec<u32> {
        let planned: Vec<_> = std::iter::from_fn(|| schedule.plan_next()).take(n).collect();
        for _ in &planned {
            schedule.unplan_last();
        }
        planned
    }

    #[test]
    fn before_anything_was_seen_the_layout_is_the_order() {
        assert_eq!(ahead(&mut Schedule::new(4), 6), [0, 1, 2, 3, 0, 1]);
    }

    #[test]
    fn a_tied_weight_used_twice_a_pass_is_told_apart_by_what_came_before() {
        let mut schedule = Schedule::new(4);
        for _ in 0..2 {
            for weight in [0, 1, 2, 3, 0, 2] {
                schedule.used(weight, |_| {});
            }
        }
        assert_eq!(ahead(&mut schedule, 8), [0, 1, 2, 3, 0, 2, 0, 1]);
    }

    #[test]
    fn a_skipped_layer_drops_only_itself() {
        let mut schedule = Schedule::new(10);
        for weight in 0..10 {
            schedule.used(weight, |_| {});
        }
        for _ in 0..6 {
            schedule.plan_next();
        }
        let mut dropped = vec![];
        schedule.used(0, |w| dropped.push(w));
        schedule.used(3, |w| dropped.push(w));
        assert_eq!(dropped, [1, 2]);
        assert_eq!(schedule.plan_next(), Some(6), "4 and 5 stay planned");
    }

    #[test]
    fn weights_that_are_used_before_others_of_their_block_leave_these_expected() {
        // As made: a, b, modulation; as used: modulation, a, b.
        let mut schedule = Schedule::new(12);
        let mut planned = vec![];
        for block in 0..4 {
            for weight in [2, 0, 1].map(|weight| 3 * block + weight) {
                planned.extend(std::iter::from_fn(|| schedule.plan_next()).take(4));
                schedule.used(weight, |dropped| panic!("{dropped} is still expected"));
            }
        }
        planned.truncate(12);
        assert_eq!(planned, (0..12).collect::<Vec<_>>(), "each is planned once");
    }

    #[test]
    fn a_weight_that_is_never_used_is_not_expected_for_ever() {
        let mut schedule = Schedule::new(40);
        for _ in 0..3 {
            schedule.plan_next();
        }
        let mut dropped = vec![];
        for weight in 2..30 {
            schedule.used(weight, |w| dropped.push(w));
        }
        assert_eq!(dropped, [0, 1]);
        assert_eq!(ahead(&mut schedule, 2), [30, 31]);
    }

    #[test]
    fn as_many_as_may_be_skipped_stay_expected() {
        for (skip, kept) in [(49, false), (50, true)] {
            let mut schedule = Schedule::skipping(100, skip);
            let mut dropped = vec![];
            schedule.plan_next();
            schedule.used(50, |w| dropped.push(w));
            assert_eq!(dropped.is_empty(), kept, "{skip}");
            assert_eq!(ahead(&mut schedule, 1), [if kept { 1 } else { 51 }], "{skip}");
        }
    }

    #[test]
    fn a_wild_jump_drops_every_plan_and_goes_on_from_there() {
        let mut schedule = Schedule::new(100);
        for _ in 0..3 {
            schedule.plan_next();
        }
        let mut dropped = vec![];
        schedule.used(50, |w| dropped.push(w));
        assert_eq!(dropped, [0, 1, 2]);
        assert_eq!(ahead(&mut schedule, 2), [51, 52]);
        assert_eq!(schedule.mispredicted(), 1);
    }

    #[test]
    fn plans_are_taken_back_farthest_first() {
        let mut schedule = Schedule::new(4);
        let planned: Vec<_> = std::iter::from_fn(|| schedule.plan_next()).take(3).collect();
        let back: Vec<_> = std::iter::from_fn(|| schedule.unplan_last()).collect();
        assert_eq!((planned, back), (vec![0, 1, 2], vec![2, 1, 0]));
    }

    #[test]
    fn the_horizon_is_finite_and_an_empty_model_predicts_nothing() {
        let mut schedule = Schedule::new(3);
        assert_eq!(std::iter::from_fn(|| schedule.plan_next()).count(), HORIZON);
        assert_eq!(Schedule::new(0).plan_next(), None);
    }
}

//! The learned order in which a VBAR's weights are used.
//!
//! A model reads its weights in the same order pass after pass. The schedule remembers, for every pair of consecutive
//! uses, which use came next (a second-order Markov predictor in the sense of D. Joseph and D. Grunwald, "Prefetching
//! using Markov predictors", ISCA 1997); two uses of context tell apart the places of a tied weight. What was never
//! seen is guessed from the layout: the next weight by place, after the last the first. A wrong guess costs a wait,
//! never a wrong result.

use std::collections::{HashMap, VecDeque};

/// How far ahead the schedule looks, in uses.
const HORIZON: usize = 512;

/// How many predicted uses may be skipped before the prediction is thrown away.
const SKIP: usize = 16;

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
    /// The last two uses; `weights` stands for "none yet".
    last: (u32, u32),
    /// Predicted uses, nearest first. The first `planned` of them have been handed out.
    queue: VecDeque<u32>,
    planned: usize,
    mispredicted: u64,
}

impl Schedule {
    /// A schedule that has seen nothing: layout order.
    pub fn new(weights: u32) -> Self {
        let mut schedule = Schedule {
            weights,
            next: HashMap::new(),
            last: (weights, weights),
            queue: VecDeque::new(),
            planned: 0,
            mispredicted: 0,
        };
        schedule.extend();
        schedule
    }

    /// Notes a use; whether it was a planned one. `dropped` is called for every other planned use that is no longer
    /// expected.
    pub fn used(&mut self, weight: u32, mut dropped: impl FnMut(u32)) -> bool {
        debug_assert!(weight < self.weights);
        if self.last.1 != self.weights {
            if self.next.len() >= self.memory_limit() {
                self.next.clear();
            }
            self.next.insert(self.last, weight);
        }
        self.last = (self.last.1, weight);
        let mut was_planned = false;
        match self.queue.iter().take(SKIP).position(|&expected| expected == weight) {
            Some(skipped) => {
                for _ in 0..skipped {
                    self.drop_front(&mut dropped);
                }
                self.queue.pop_front();
                was_planned = self.planned > 0;
                self.planned = self.planned.saturating_sub(1);
                self.mispredicted += u64::from(skipped > 0);
            }
            None => {
                self.mispredicted += 1;
                while !self.queue.is_empty() {
                    self.drop_front(&mut dropped);
                }
            }
        }
        self.extend();
        was_planned
    }

    /// The next predicted use that was not handed out yet, if it lies within the horizon.
    pub fn plan_next(&mut self) -> Option<u32> {
        let weight = *self.queue.get(self.planned)?;
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
        self.queue.get(self.planned).copied()
    }

    /// How often a use was not the one expected.
    pub fn mispredicted(&self) -> u64 {
        self.mispredicted
    }

    /// A model without any order must not make the memory of it grow for ever.
    fn memory_limit(&self) -> usize {
        1024 + 8 * self.weights as usize
    }

    fn drop_front(&mut self, dropped: &mut impl FnMut(u32)) {
        let weight = self.queue.pop_front();
        if self.planned > 0 {
            self.planned -= 1;
            weight.into_iter().for_each(dropped);
        }
    }

    /// Keeps at least one prediction beyond the planned ones, up to the horizon.
    fn extend(&mut self) {
        while self.weights > 0 && self.queue.len() <= self.planned && self.queue.len() < HORIZON {
            let context = match self.queue.len() {
                0 => self.last,
                1 => (self.last.1, self.queue[0]),
                n => (self.queue[n - 2], self.queue[n - 1]),
            };
            self.queue.push_back(self.predict(context));
        }
    }

    fn predict(&self, context: (u32, u32)) -> u32 {
        match self.next.get(&context) {
            Some(&next) => next,
            None if context.1 + 1 < self.weights => context.1 + 1,
            None => 0,
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

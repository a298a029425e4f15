//! Which weights were used, in order, written without a lock and read by the mover.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// A ring of the latest uses. A reader that falls behind by more than its length loses the oldest; the schedule then
/// guesses.
#[derive(Debug)]
pub(crate) struct Trace {
    /// Lap number plus one in the upper half, the weight in the lower.
    slots: Box<[AtomicU64]>,
    head: AtomicU64,
}

impl Trace {
    /// A ring for `weights` weights.
    pub(crate) fn new(weights: usize) -> Self {
        Trace::of_length((2 * weights).next_power_of_two().clamp(256, 1 << 15))
    }

    fn of_length(len: usize) -> Self {
        Trace { slots: (0..len).map(|_| AtomicU64::new(0)).collect(), head: AtomicU64::new(0) }
    }

    pub(crate) fn push(&self, weight: u32) {
        let at = self.head.fetch_add(1, Ordering::Relaxed);
        let (slot, lap) = self.slot(at);
        slot.store(u64::from(lap) << 32 | u64::from(weight), Ordering::Release);
    }

    /// Hands out what was pushed since `tail`, up to the first use whose writer is not done yet.
    pub(crate) fn drain(&self, tail: &mut u64, mut each: impl FnMut(u32)) {
        let head = self.head.load(Ordering::Acquire);
        *tail = (*tail).max(head.saturating_sub(self.slots.len() as u64));
        while *tail < head {
            let (slot, lap) = self.slot(*tail);
            let word = slot.load(Ordering::Acquire);
            let written = (word >> 32) as u32;
            if written == lap {
                each(word as u32);
            } else if written.wrapping_sub(lap) > u32::MAX / 2 {
                return; // still the lap before
            }
            *tail += 1;
        }
    }

    fn slot(&self, at: u64) -> (&AtomicU64, u32) {
        let len = self.slots.len() as u64;
        (&self.slots[(at % len) as usize], (at / len) as u32 + 1)
    }
}

/// Every order in which threads may run: `make loom`.
#[cfg(all(test, loom))]
mod interleavings {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    #[test]
    fn every_use_comes_out_once_or_was_overwritten() {
        loom::model(|| {
            let trace = Arc::new(Trace::of_length(2));
            let writers: Vec<_> = [1, 3]
                .map(|first| {
                    let trace = Arc::clone(&trace);
                    thread::spawn(move || {
                        trace.push(first);
                        trace.push(first + 1);
                    })
                })
                .into();
            let (mut tail, mut seen) = (0, vec![]);
            trace.drain(&mut tail, |weight| seen.push(weight));
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            trace.drain(&mut tail, |weight| seen.push(weight));
            assert!(seen.iter().all(|weight| (1..=4).contains(weight)));
            let mut once = seen.clone();
            once.sort_unstable();
            once.dedup();
            assert_eq!(once.len(), seen.len(), "a use came out twice: {seen:?}");
            for first in [1, 3] {
                let place = |weight| seen.iter().position(|&other| other == weight);
                assert!(
                    place(first).is_none()
                        || place(first + 1).is_none_or(|second| place(first) < Some(second)),
                    "in the order of their thread: {seen:?}"
                );
            }
        });
    }

    #[test]
    fn a_reader_that_keeps_up_misses_nothing() {
        loom::model(|| {
            let trace = Arc::new(Trace::of_length(4));
            let writer = {
                let trace = Arc::clone(&trace);
                thread::spawn(move || [1, 2].into_iter().for_each(|weight| trace.push(weight)))
            };
            let (mut tail, mut seen) = (0, vec![]);
            trace.push(3);
            trace.drain(&mut tail, |weight| seen.push(weight));
            writer.join().unwrap();
            trace.drain(&mut tail, |weight| seen.push(weight));
            seen.sort_unstable();
            assert_eq!(seen, [1, 2, 3]);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn drained(trace: &Trace, tail: &mut u64) -> Vec<u32> {
        let mut all = vec![];
        trace.drain(tail, |weight| all.push(weight));
        all
    }

    #[test]
    fn uses_come_out_once_and_in_order() {
        let (trace, mut tail) = (Trace::new(4), 0);
        [3, 1, 2].into_iter().for_each(|weight| trace.push(weight));
        assert_eq!(drained(&trace, &mut tail), [3, 1, 2]);
        assert!(drained(&trace, &mut tail).is_empty());
    }

    #[test]
    fn a_reader_that_falls_behind_sees_the_latest() {
        let (trace, mut tail) = (Trace::new(4), 0);
        (0..1000).for_each(|weight| trace.push(weight));
        assert_eq!(drained(&trace, &mut tail), (1000 - 256..1000).collect::<Vec<_>>());
    }

    #[test]
    fn writers_of_many_threads_lose_nothing_while_the_reader_keeps_up() {
        const EACH: u32 = if cfg!(miri) { 50 } else { 5000 };
        let (trace, mut tail) = (Trace::new(1 << 14), 0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let trace = &trace;
                scope.spawn(move || (0..EACH).for_each(|i| trace.push(thread * EACH + i)));
            }
        });
        let mut all = drained(&trace, &mut tail);
        all.sort_unstable();
        assert_eq!(all, (0..4 * EACH).collect::<Vec<_>>());
    }
}

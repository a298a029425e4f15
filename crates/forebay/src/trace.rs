//! Which weights were used, in order, written without a lock and read by the mover.

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
        let len = (2 * weights).next_power_of_two().clamp(256, 1 << 15);
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

#[cfg(test)]
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
        let (trace, mut tail) = (Trace::new(1 << 14), 0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let trace = &trace;
                scope.spawn(move || (0..5000).for_each(|i| trace.push(thread * 5000 + i)));
            }
        });
        let mut all = drained(&trace, &mut tail);
        all.sort_unstable();
        assert_eq!(all, (0..20_000).collect::<Vec<_>>());
    }
}

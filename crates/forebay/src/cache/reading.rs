//! Whether the readers keep up with the link: when they do not, the processor is what streaming waits for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long readers are watched before it is said whether they keep up.
const WINDOW: Duration = Duration::from_millis(100);
/// Of their time, what readers read at most that keep up. The rest they wait for their slots to be copied, or for work.
const MOST: f64 = 0.9;

/// How long readers have read so far.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    ns: AtomicU64,
}

impl Reading {
    /// Runs what reads.
    pub(crate) fn during<T>(&self, read: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = read();
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.ns.fetch_add(took, Ordering::Relaxed);
        result
    }

    fn so_far(&self) -> Duration {
        Duration::from_nanos(self.ns.load(Ordering::Relaxed))
    }
}

/// Watches them.
#[derive(Debug)]
pub(crate) struct Watched {
    readers: usize,
    began: Instant,
    read: Duration,
    are_behind: bool,
}

impl Watched {
    pub(crate) fn new(readers: usize) -> Self {
        Watched { readers, began: Instant::now(), read: Duration::ZERO, are_behind: false }
    }

    /// Whether readers did nothing but read when they were watched last.
    pub(crate) fn are_behind(&mut self, reading: &Reading, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.began);
        if passed >= WINDOW {
            let read = reading.so_far();
            let all = passed.as_secs_f64() * self.readers as f64;
            self.are_behind = (read.saturating_sub(self.read)).as_secs_f64() > MOST * all;
            (self.began, self.read) = (now, read);
        }
        self.are_behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_that_do_nothing_else_are_behind() {
        let (reading, start) = (Reading::default(), Instant::now());
        let mut watched = Watched { began: start, ..Watched::new(4) };
        let mut at = start;
        for (of_ten_ms, are_behind) in [(40, true), (37, true), (35, false), (0, false), (39, true)] {
            for _ in 0..10 {
                reading.ns.fetch_add(of_ten_ms * 1_000_000, Ordering::Relaxed);
                at += Duration::from_millis(10);
            }
            assert_eq!(watched.are_behind(&reading, at), are_behind, "{of_ten_ms} of 40 ms");
            assert_eq!(
                watched.are_behind(&reading, at + WINDOW / 2),
                are_behind,
                "until the next window is over"
            );
        }
    }

    #[test]
    fn what_reads_is_counted() {
        let reading = Reading::default();
        assert_eq!(reading.during(|| std::thread::sleep(Duration::from_millis(3))), ());
        assert!(reading.so_far() >= Duration::from_millis(3));
    }
}

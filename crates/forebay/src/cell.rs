//! One page's state as every thread may read it without a lock.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

/// Pins and flags of a page in one word.
///
/// Anybody may pin a filled page. Only the holder of the state lock pins an unfilled one, claims, or changes flags.
/// So a page that is claimed while it has no pins cannot be pinned any more until it is filled again.
#[derive(Debug, Default)]
pub(crate) struct PageCell(AtomicU64);

const PINS: u64 = u32::MAX as u64;
/// The bytes are on their way in the copy stream, or there.
const FILLED: u64 = 1 << 32;
/// The bytes are there.
const READY: u64 = 1 << 33;
/// Releases are to be reported.
const STREAMED: u64 = 1 << 34;
/// Was pinned since it was mapped.
const USED: u64 = 1 << 35;

/// The bytes are out of date: nobody pins the page without the lock.
const STALE: u64 = 1 << 36;

/// What a page was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen(u64);

impl Seen {
    pub(crate) fn is_filled(self) -> bool {
        self.0 & FILLED != 0
    }

    pub(crate) fn is_ready(self) -> bool {
        self.0 & READY != 0
    }

    pub(crate) fn is_streamed(self) -> bool {
        self.0 & STREAMED != 0
    }

    pub(crate) fn was_used(self) -> bool {
        self.0 & USED != 0
    }

    pub(crate) fn pins(self) -> u32 {
        (self.0 & PINS) as u32
    }
}

impl PageCell {
    pub(crate) fn load(&self) -> Seen {
        Seen(self.0.load(Ordering::Acquire))
    }

    /// Adds a pin if the page is filled, and with what it is to be filled with.
    pub(crate) fn try_pin(&self) -> Option<Seen> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (word & (FILLED | STALE) == FILLED).then_some((word + 1) | USED)
            })
            .ok()
            .map(Seen)
    }

    /// Adds a pin, filled or not. Under the state lock.
    pub(crate) fn pin(&self) {
        self.0.fetch_or(USED, Ordering::AcqRel);
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes a pin back; what the page is from then on. `None` if there was no pin to take.
    pub(crate) fn unpin(&self) -> Option<Seen> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| (word & PINS != 0).then(|| word - 1))
            .ok()
            .map(|before| Seen(before - 1))
    }

    /// Takes a filled page without pins away from everybody; what it was. Under the state lock.
    pub(crate) fn try_claim(&self) -> Option<Seen> {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
                (word & PINS == 0 && word & FILLED != 0).then_some(0)
            })
            .ok()
            .map(Seen)
    }

    pub(crate) fn set_filled(&self) {
        self.0.fetch_or(FILLED, Ordering::AcqRel);
    }

    pub(crate) fn set_ready(&self) {
        self.0.fetch_or(READY, Ordering::AcqRel);
    }

    /// Under the state lock.
    pub(crate) fn set_stale(&self, stale: bool) {
        match stale {
            true => self.0.fetch_or(STALE, Ordering::AcqRel),
            false => self.0.fetch_and(!STALE, Ordering::AcqRel),
        };
    }

    /// What the page was before.
    pub(crate) fn set_streamed(&self, streamed: bool) -> Seen {
        Seen(match streamed {
            true => self.0.fetch_or(STREAMED, Ordering::AcqRel),
            false => self.0.fetch_and(!STREAMED, Ordering::AcqRel),
        })
    }
}

/// Tells work on some pages that was enqueued before the ends of streams were marked from work that was not.
#[derive(Debug, Default)]
pub(crate) struct Marking(AtomicU64);

impl Marking {
    /// When work was enqueued, to be noted of its page before that is unpinned.
    pub(crate) fn now(&self) -> u64 {
        // No load: whoever marks next sees what everybody did who was told the time before.
        self.0.fetch_add(0, Ordering::AcqRel)
    }

    /// Streams are about to be marked: behind all work on claimed pages of which this time is noted, or one before.
    pub(crate) fn begin(&self) -> u64 {
        self.0.fetch_add(1, Ordering::AcqRel)
    }
}

/// Every order in which threads may run: `make loom`.
#[cfg(all(test, loom))]
mod interleavings {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    /// A page and its contents. A reader beside a writer is an error that loom finds.
    struct Page {
        cell: PageCell,
        contents: UnsafeCell<u32>,
        state: Mutex<()>,
    }

    impl Page {
        fn filled() -> Arc<Page> {
            let page =
                Page { cell: PageCell::default(), contents: UnsafeCell::new(1), state: Mutex::new(()) };
            page.cell.set_filled();
            Arc::new(page)
        }

        fn read(&self) -> u32 {
            // SAFETY: only the holder of a claimed page writes, and loom checks that.
            self.contents.with(|contents| unsafe { *contents })
        }

        fn write(&self, contents: u32) {
            // SAFETY: as for `read`.
            self.contents.with_mut(|place| unsafe { *place = contents });
        }

        /// What an operation does that finds the page filled, or does not.
        fn use_it(&self) {
            if self.cell.try_pin().is_some() {
                assert_ne!(self.read(), 0, "a page is read that nobody filled");
                assert!(self.cell.unpin().is_some());
            }
        }

        /// Takes it, and fills it anew.
        fn take_and_fill(&self, contents: u32) -> bool {
            let _locked = self.state.lock().unwrap();
            let claimed = self.cell.try_claim().is_some();
            if claimed {
                self.write(0);
                self.write(contents);
                self.cell.set_filled();
            }
            claimed
        }
    }

    #[test]
    fn nobody_reads_a_page_that_is_taken_and_filled_again() {
        loom::model(|| {
            let page = Page::filled();
            let users: Vec<_> = (0..2)
                .map(|_| {
                    let page = Arc::clone(&page);
                    thread::spawn(move || page.use_it())
                })
                .collect();
            page.take_and_fill(2);
            users.into_iter().for_each(|user| user.join().unwrap());
            assert_eq!(page.cell.load().pins(), 0);
        });
    }

    #[test]
    fn work_on_a_claimed_page_was_marked_or_is_noted_as_later() {
        // All orders of three threads take too long.
        let mut some = loom::model::Builder::new();
        some.preemption_bound = Some(2);
        some.check(|| {
            let cell = Arc::new(PageCell::default());
            cell.set_filled();
            let (marking, used_at) = (Arc::new(Marking::default()), Arc::new(AtomicU64::new(0)));
            let enqueued = Arc::new(AtomicU64::new(0));
            let users: Vec<_> = (0..2)
                .map(|_| {
                    let (cell, marking) = (Arc::clone(&cell), Arc::clone(&marking));
                    let (used_at, enqueued) = (Arc::clone(&used_at), Arc::clone(&enqueued));
                    thread::spawn(move || {
                        if cell.try_pin().is_some() {
                            enqueued.fetch_add(1, Ordering::Relaxed);
                            used_at.fetch_max(marking.now(), Ordering::AcqRel);
                            assert!(cell.unpin().is_some());
                        }
                    })
                })
                .collect();
            let covered = marking.begin();
            let marked = enqueued.load(Ordering::Relaxed);
            if cell.try_claim().is_some() && used_at.load(Ordering::Acquire) <= covered {
                assert_eq!(
                    enqueued.load(Ordering::Relaxed),
                    marked,
                    "nobody waits for work on a claimed page"
                );
            }
            users.into_iter().for_each(|user| user.join().unwrap());
        });
    }

    #[test]
    fn a_page_pinned_under_the_lock_before_it_is_filled_is_not_taken() {
        loom::model(|| {
            let page = Page::filled();
            assert!(page.cell.try_claim().is_some());
            page.write(0);
            let demand = {
                let page = Arc::clone(&page);
                thread::spawn(move || {
                    let locked = page.state.lock().unwrap();
                    page.cell.pin();
                    drop(locked);
                    if page.cell.load().is_filled() {
                        assert_ne!(page.read(), 0);
                    }
                    assert!(page.cell.unpin().is_some());
                })
            };
            page.write(1);
            page.cell.set_filled();
            page.take_and_fill(2);
            demand.join().unwrap();
        });
    }

    #[test]
    fn who_pins_a_page_beside_its_becoming_stale_is_seen_or_refused() {
        loom::model(|| {
            let page = Page::filled();
            let user = {
                let page = Arc::clone(&page);
                thread::spawn(move || page.use_it())
            };
            let locked = page.state.lock().unwrap();
            page.cell.set_stale(true);
            drop(locked);
            // Gone at once, or with its last pin.
            let gone = page.take_and_fill(2);
            user.join().unwrap();
            assert!(gone || page.take_and_fill(2), "nobody could pin it any more");
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_page_cannot_be_claimed_and_a_claimed_page_cannot_be_pinned() {
        let cell = PageCell::default();
        assert!(cell.try_pin().is_none(), "not filled yet");
        cell.set_filled();
        assert!(cell.try_pin().is_some());
        assert_eq!(cell.try_claim(), None);
        assert_eq!(cell.unpin().map(Seen::pins), Some(0));
        assert!(cell.try_claim().is_some_and(Seen::was_used));
        assert!(cell.try_pin().is_none());
        assert!(cell.unpin().is_none(), "there is no pin to take back");
    }

    #[test]
    fn a_stale_page_is_not_pinned_but_claimed() {
        let cell = PageCell::default();
        cell.set_filled();
        assert!(cell.try_pin().is_some());
        cell.set_stale(true);
        assert!(cell.try_pin().is_none());
        assert!(cell.unpin().is_some() && cell.try_claim().is_some());
        cell.set_filled();
        assert!(cell.try_pin().is_some(), "what it holds now is not stale");
    }

    #[test]
    fn a_page_that_nobody_pinned_since_it_was_mapped_is_known_as_unused() {
        let cell = PageCell::default();
        cell.set_filled();
        assert!(cell.try_pin().is_some() && cell.unpin().is_some());
        assert!(cell.try_claim().is_some_and(Seen::was_used));
        cell.set_filled();
        assert!(cell.try_claim().is_some_and(|seen| !seen.was_used()));
    }

    #[test]
    fn claims_and_pins_of_many_threads_never_overlap() {
        use std::sync::atomic::AtomicBool;
        const TIMES: usize = if cfg!(miri) { 200 } else { 20_000 };
        let (cell, owned) = (PageCell::default(), AtomicBool::new(false));
        cell.set_filled();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..TIMES {
                        if cell.try_pin().is_some() {
                            assert!(!owned.load(Ordering::SeqCst), "pinned while claimed");
                            cell.unpin();
                        }
                    }
                });
            }
            scope.spawn(|| {
                for _ in 0..TIMES {
                    if cell.try_claim().is_some() {
                        owned.store(true, Ordering::SeqCst);
                        std::hint::spin_loop();
                        owned.store(false, Ordering::SeqCst);
                        cell.set_filled();
                    }
                }
            });
        });
        assert_eq!(cell.load().pins(), 0);
    }
}

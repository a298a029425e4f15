//! What the engine did when, recorded on demand: for finding out where time goes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Moments kept at most; later ones are dropped.
const MOST: usize = 1 << 20;

/// What took time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// A caller waited until its pages' copies were enqueued.
    Wait,
    /// The mover made frames; as many as the moment's page says.
    Create,
    /// The mover mapped pages, or unmapped them.
    Map,
    /// See [`Map`](Activity::Map).
    Unmap,
    /// A reader read a chunk into its slot.
    Read,
    /// A reader waited for the copy of the chunk that was in its slot before.
    Slot,
    /// A page's copies were enqueued; from the page's mapping until all of them were.
    Fill,
    /// A piece of a page was registered, or several pages were given back.
    Register,
    /// See [`Register`](Activity::Register).
    Unregister,
}

/// Something that took time.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// What.
    pub activity: Activity,
    /// The first page it was about, by its number in its model; for [`Create`](Activity::Create) how many frames.
    pub page: u32,
    /// When it began, since the recording did.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

/// A recording that may be on or off. Lock order: `moments` is a leaf.
#[derive(Debug)]
pub(crate) struct Timeline {
    on: AtomicBool,
    moments: Mutex<(Option<Instant>, Vec<Moment>)>,
}

impl Timeline {
    pub(crate) fn new() -> Self {
        Timeline { on: AtomicBool::new(false), moments: Mutex::default() }
    }

    /// Begins a new recording.
    pub(crate) fn start(&self) {
        *self.moments.lock() = (Some(Instant::now()), Vec::new());
        self.on.store(true, Ordering::Release);
    }

    /// Ends the recording and gives it.
    pub(crate) fn stop(&self) -> Vec<Moment> {
        self.on.store(false, Ordering::Release);
        std::mem::take(&mut self.moments.lock().1)
    }

    /// When something begins; `None` while nothing is recorded.
    pub(crate) fn begin(&self) -> Option<Instant> {
        self.on.load(Ordering::Relaxed).then(Instant::now)
    }

    /// Notes what began then, if it was recorded.
    pub(crate) fn note(&self, activity: Activity, page: u32, began: Option<Instant>) {
        let Some(began) = began else { return };
        let length = began.elapsed();
        let mut recording = self.moments.lock();
        if let (Some(zero), moments) = &mut *recording
            && moments.len() < MOST
        {
            moments.push(Moment { activity, page, start: began.saturating_duration_since(*zero), length });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happens_during_a_recording_is_in_it() {
        let timeline = Timeline::new();
        timeline.note(Activity::Map, 1, timeline.begin());
        timeline.start();
        timeline.note(Activity::Unmap, 2, timeline.begin());
        let moments = timeline.stop();
        timeline.note(Activity::Map, 3, timeline.begin());
        assert_eq!(
            moments.iter().map(|moment| (moment.activity, moment.page)).collect::<Vec<_>>(),
            [(Activity::Unmap, 2)]
        );
        assert!(timeline.stop().is_empty());
    }
}

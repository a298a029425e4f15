//! The streams whose work may read the pages of one VBAR.

use std::array;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_device::StreamHandle;
use parking_lot::Mutex;

use crate::cell::Marking;

/// Streams that are found without a lock.
const RECENT: usize = 8;

/// No stream: every real handle, 0 included, differs from it.
const NO_STREAM: u64 = u64::MAX;

/// Every stream that used a VBAR since it was made. A stream that is known costs no lock.
///
/// Lock order: `all` is a leaf; it is taken under the state lock and without it.
#[derive(Debug)]
pub(crate) struct KnownStreams {
    recent: [AtomicU64; RECENT],
    all: Mutex<Vec<StreamHandle>>,
    /// When they are marked.
    pub(crate) marking: Marking,
}

impl Default for KnownStreams {
    fn default() -> Self {
        KnownStreams {
            recent: array::from_fn(|_| AtomicU64::new(NO_STREAM)),
            all: Mutex::default(),
            marking: Marking::default(),
        }
    }
}

impl KnownStreams {
    /// From now on the stream is waited for before a page is unmapped whose last uses are not recorded. To be called
    /// before the use.
    pub(crate) fn know(&self, stream: StreamHandle) {
        if self.recent.iter().any(|slot| slot.load(Ordering::Acquire) == stream.get()) {
            return;
        }
        let mut all = self.all.lock();
        if !all.contains(&stream) {
            all.push(stream);
        }
        let free = self.recent.iter().position(|slot| slot.load(Ordering::Relaxed) == NO_STREAM);
        self.recent[free.unwrap_or(all.len() % RECENT)].store(stream.get(), Ordering::Release);
    }

    /// A stream that is gone is not waited for any more.
    pub(crate) fn forget(&self, stream: StreamHandle) {
        let mut all = self.all.lock();
        all.retain(|other| *other != stream);
        for slot in self.recent.iter().filter(|slot| slot.load(Ordering::Relaxed) == stream.get()) {
            slot.store(NO_STREAM, Ordering::Release);
        }
    }

    pub(crate) fn all(&self) -> Vec<StreamHandle> {
        self.all.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: StreamHandle = handle(7);

    const fn handle(raw: u64) -> StreamHandle {
        // SAFETY: no device ever sees it.
        unsafe { StreamHandle::from_raw(raw) }
    }

    #[test]
    fn every_stream_is_known_once_however_many_there_are() {
        let streams = KnownStreams::default();
        let handles: Vec<_> = (0..3 * RECENT as u64).map(handle).collect();
        for _ in 0..3 {
            handles.iter().for_each(|&stream| streams.know(stream));
        }
        assert_eq!(streams.all(), handles);
    }

    #[test]
    fn a_handle_that_was_forgotten_is_known_again_when_a_new_stream_has_it() {
        let streams = KnownStreams::default();
        streams.know(StreamHandle::DEFAULT);
        streams.know(SEVEN);
        streams.forget(SEVEN);
        assert_eq!(streams.all(), [StreamHandle::DEFAULT]);
        streams.know(SEVEN);
        assert_eq!(streams.all(), [StreamHandle::DEFAULT, SEVEN]);
    }
}

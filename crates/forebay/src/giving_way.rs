//! Letting others copy to the device while weights stream.
//!
//! A copy engine works on one stream for as long as there is something in it. Beside a stream that is never empty a copy of 1 MiB in
//! another one waited until streaming ended: 405 ms of 405 (2026-11-29-h200-first-steps, `starve.txt`). A few bytes in the other
//! direction are another engine's work, for which the stream changes engines and back: others waited 0.4 ms then, at the same rate.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forebay_core::Bytes;
use forebay_device::{Device, DeviceAddr, StreamHandle};

/// Bytes of copies in a row: 0.6 ms of the link.
const IN_A_ROW: Bytes = Bytes::mib(32);
/// What is copied back.
pub(crate) const BACK: Bytes = Bytes::new(4);

/// Counts what all threads of an engine copy to the device: a count for each would let nobody in for as long as it takes all of
/// them to fill theirs.
#[derive(Debug)]
pub(crate) struct GivesWay {
    device: Arc<dyn Device>,
    copied: AtomicU64,
}

impl GivesWay {
    pub(crate) fn new(device: Arc<dyn Device>) -> Self {
        GivesWay { device, copied: AtomicU64::new(0) }
    }

    /// Behind a copy of `len` bytes to `copied` that was enqueued: lets others in, if it is time, by copying [`BACK`] bytes to
    /// `back`. Whatever the device says to that, the copy was enqueued.
    ///
    /// # Safety
    /// As of [`Device::copy_to_host`].
    pub(crate) unsafe fn behind(&self, len: Bytes, copied: DeviceAddr, back: *mut u8, stream: StreamHandle) {
        let before = self.copied.fetch_add(len.get(), Ordering::Relaxed);
        let turn = |copied: u64| copied / IN_A_ROW.get();
        if turn(before) < turn(before + len.get()) && len >= BACK {
            // SAFETY: the caller's promise.
            unsafe { self.device.copy_to_host(back, copied, BACK, stream) }.ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use forebay_device::host::{HostConfig, HostDevice};
    use forebay_device::{Event, PinnedBuffer, Stream};

    use super::*;

    #[test]
    fn once_in_a_while_a_few_bytes_come_back() -> Result<(), Box<dyn std::error::Error>> {
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(HostConfig::default())?);
        let (stream, done) = (Stream::new(Arc::clone(&device))?, Event::new(Arc::clone(&device))?);
        let (from, back) =
            (PinnedBuffer::new(Arc::clone(&device), BACK)?, PinnedBuffer::new(Arc::clone(&device), BACK)?);
        // On this device memory is the process's own.
        let copied = DeviceAddr::new(from.as_ptr() as u64);
        let gives_way = GivesWay::new(Arc::clone(&device));
        let mut times = 0;
        for number in 1..=64_u8 {
            // SAFETY: nothing is under way in the stream.
            unsafe { from.slice_mut(Bytes::ZERO, BACK) }.fill(number);
            // SAFETY: both are valid until the stream is waited for.
            unsafe { gives_way.behind(Bytes::mib(3), copied, back.as_ptr(), stream.handle()) };
            // SAFETY: the stream lives.
            unsafe { done.record(stream.handle()) }?;
            done.synchronize()?;
            // SAFETY: as before.
            times += u32::from(unsafe { back.slice(Bytes::ZERO, BACK) } == [number; 4]);
        }
        assert_eq!(times, 64 * 3 / 32, "of 64 copies of 3 MiB those that end a turn of 32");
        Ok(())
    }
}

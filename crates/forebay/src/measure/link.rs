//! Host to device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_core::Bytes;
use forebay_device::{Device, Event, PinnedBuffer, Result, Stream};

use super::Rate;
use crate::scratch::{Scratch, wait};

/// What is copied at once: links reach their rate from here on.
const SIZE: Bytes = Bytes::mib(256);

/// The first copy warms up; the best of the others counts.
const COPIES: u32 = 6;

/// No copy starts later than this.
const LIMIT: Duration = Duration::from_secs(1);

/// The rate of copies from pinned memory to the device: 256 MiB at a time, or what there is room for.
///
/// # Errors
/// What the device reports; out of memory where there is no room for its smallest frame.
pub fn link(device: &Arc<dyn Device>) -> Result<Rate> {
    let (scratch, buffer) = room(device)?;
    let stream = Stream::new(Arc::clone(device))?;
    let done = Event::new(Arc::clone(device))?;
    // Memory that nobody wrote to is one page of zeros in the processor's cache.
    // SAFETY: no copy of the buffer is enqueued yet.
    unsafe { buffer.slice_mut(Bytes::ZERO, buffer.size()) }.fill(1);
    match best_copy(&scratch, &buffer, &stream, &done) {
        Ok(time) => {
            scratch.unmap()?;
            Ok(Rate { bytes: buffer.size(), time })
        }
        Err(error) => {
            // A copy may still run: what it uses stays.
            std::mem::forget((buffer, scratch));
            Err(error)
        }
    }
}

fn best_copy(scratch: &Scratch, buffer: &PinnedBuffer, stream: &Stream, done: &Event) -> Result<Duration> {
    let copy = || {
        let start = Instant::now();
        scratch.copy_from(buffer, stream)?;
        wait(done, stream)?;
        Ok(start.elapsed())
    };
    let first = copy()?;
    let end = Instant::now() + LIMIT;
    let mut best: Option<Duration> = None;
    for _ in 1..COPIES {
        if Instant::now() >= end {
            break;
        }
        let time = copy()?;
        best = Some(best.map_or(time, |best| best.min(time)));
    }
    Ok(best.unwrap_or(first))
}

/// Memory on both sides, as much as wanted or as there is.
fn room(device: &Arc<dyn Device>) -> Result<(Scratch, PinnedBuffer)> {
    let mut size = SIZE.max(device.granularity());
    loop {
        let scratch = Scratch::new(device, size);
        match scratch.and_then(|scratch| with_buffer(device, scratch, size)) {
            Err(error) if error.is_out_of_memory() && size > device.granularity() => {
                size = Bytes::new(size.get() / 2);
            }
            result => return result,
        }
    }
}

fn with_buffer(device: &Arc<dyn Device>, scratch: Scratch, size: Bytes) -> Result<(Scratch, PinnedBuffer)> {
    match PinnedBuffer::new(Arc::clone(device), size) {
        Ok(buffer) => Ok((scratch, buffer)),
        Err(error) => {
            scratch.unmap()?;
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_device::host::{HostConfig, HostDevice};

    #[test]
    fn a_small_device_is_measured_with_what_it_has_and_gets_it_back() {
        let config = HostConfig { capacity: Bytes::mib(20), ..HostConfig::default() };
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(config).unwrap());
        let rate = link(&device).unwrap();
        assert_eq!(rate.bytes, Bytes::mib(16));
        assert!(rate.bytes_per_s() > 0.0);
        assert_eq!(device.memory().unwrap().free, Bytes::mib(20));
    }

    #[test]
    fn a_copy_that_takes_long_is_a_slow_link() {
        let delay = Duration::from_millis(50);
        let config = HostConfig { capacity: Bytes::mib(2), copy_delay: delay, ..HostConfig::default() };
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(config).unwrap());
        let rate = link(&device).unwrap();
        assert!(rate.time >= delay, "{rate:?}");
    }
}

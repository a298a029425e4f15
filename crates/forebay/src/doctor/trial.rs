//! One page's life on a device: reserved, backed, filled, read back, unmapped.

use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{Device, Event, PinnedBuffer, Result, Stream};

use crate::scratch::{Scratch, wait};

/// What a trial that reached its end found.
pub(super) enum Trial {
    /// Every byte came back.
    Passed,
    /// The byte at this offset of the page did not.
    WrongByte(Bytes),
}

/// Takes one page of the device's smallest size through its life, on a stream of its own.
pub(super) fn one_page(device: &Arc<dyn Device>) -> Result<Trial> {
    let size = device.granularity();
    let buffer = PinnedBuffer::new(Arc::clone(device), size)?;
    let stream = Stream::new(Arc::clone(device))?;
    let done = Event::new(Arc::clone(device))?;
    let page = Scratch::new(device, size)?;
    // SAFETY: no copy of the buffer is enqueued yet.
    write_pattern(unsafe { buffer.slice_mut(Bytes::ZERO, size) });
    let round_trip = page
        .copy_from(&buffer, &stream)
        .and_then(|()| wait(&done, &stream))
        .map(|()| {
            // SAFETY: the only copy of the buffer has completed.
            unsafe { buffer.slice_mut(Bytes::ZERO, size) }.fill(0);
        })
        .and_then(|()| page.copy_to(&buffer, &stream))
        .and_then(|()| wait(&done, &stream));
    if let Err(error) = round_trip {
        // A copy may still run: what it uses stays.
        std::mem::forget((buffer, page));
        return Err(error);
    }
    page.unmap()?;
    // SAFETY: both copies have completed.
    let got = unsafe { buffer.slice(Bytes::ZERO, size) };
    let wrong = got.iter().enumerate().position(|(i, byte)| *byte != pattern(i));
    Ok(wrong.map_or(Trial::Passed, |i| Trial::WrongByte(Bytes::new(i as u64))))
}

fn write_pattern(bytes: &mut [u8]) {
    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = pattern(i));
}

/// Differs between neighbours, and between multiples of every power of two.
fn pattern(i: usize) -> u8 {
    (i ^ i >> 8 ^ i >> 16) as u8
}

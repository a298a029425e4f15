//! One page's life on a device: reserved, backed, filled, read back, unmapped.

use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{
    Device, DeviceAddr, DeviceError, Event, Frame, PinnedBuffer, Reservation, Result, Stream,
};

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
    let page = Page::new(device, size)?;
    // SAFETY: no copy of the buffer is enqueued yet.
    write_pattern(unsafe { buffer.slice_mut(Bytes::ZERO, size) });
    let round_trip = there(&page, &buffer, &stream)
        .and_then(|()| wait(&done, &stream))
        .map(|()| {
            // SAFETY: the only copy of the buffer has completed.
            unsafe { buffer.slice_mut(Bytes::ZERO, size) }.fill(0);
        })
        .and_then(|()| back(&page, &buffer, &stream))
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

/// A mapped page. What is not unmapped is left to the end of the process: it may be in use.
struct Page {
    device: Arc<dyn Device>,
    backing: Option<(Reservation, Frame)>,
    addr: DeviceAddr,
    size: Bytes,
}

impl Page {
    fn new(device: &Arc<dyn Device>, size: Bytes) -> Result<Self> {
        let reservation = Reservation::new(Arc::clone(device), size, size)?;
        let frame = Frame::new(Arc::clone(device), size)?;
        let addr = reservation.addr();
        // SAFETY: the range was just reserved and the frame just made.
        unsafe { device.map(addr, size, frame.handle()) }?;
        let page = Page { device: Arc::clone(device), backing: Some((reservation, frame)), addr, size };
        // SAFETY: the range was just mapped.
        match unsafe { device.allow_access(addr, size) } {
            Ok(()) => Ok(page),
            Err(error) => {
                page.unmap()?;
                Err(error)
            }
        }
    }

    fn unmap(mut self) -> Result<()> {
        // SAFETY: the page is mapped, and every copy that touches it has completed.
        unsafe { self.device.unmap(self.addr, self.size) }?;
        drop(self.backing.take());
        Ok(())
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        std::mem::forget(self.backing.take());
    }
}

fn there(page: &Page, buffer: &PinnedBuffer, stream: &Stream) -> Result<()> {
    // SAFETY: page and buffer are kept until the copy has completed.
    unsafe { page.device.copy_to_device(page.addr, buffer.as_ptr(), page.size, stream.handle()) }
}

fn back(page: &Page, buffer: &PinnedBuffer, stream: &Stream) -> Result<()> {
    // SAFETY: page and buffer are kept, and the buffer left alone, until the copy has completed.
    unsafe { page.device.copy_to_host(buffer.as_ptr(), page.addr, page.size, stream.handle()) }
}

fn wait(done: &Event, stream: &Stream) -> std::result::Result<(), DeviceError> {
    // SAFETY: the stream is alive and of this event's device.
    unsafe { done.record(stream.handle()) }?;
    done.synchronize()
}

fn write_pattern(bytes: &mut [u8]) {
    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = pattern(i));
}

/// Differs between neighbours, and between multiples of every power of two.
fn pattern(i: usize) -> u8 {
    (i ^ i >> 8 ^ i >> 16) as u8
}

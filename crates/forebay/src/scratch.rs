//! Device memory for a moment: reserved, backed, copied to and from, given back.

use std::sync::Arc;

use forebay_core::Bytes;
use forebay_device::{Device, DeviceAddr, Event, Frame, PinnedBuffer, Reservation, Result, Stream};

/// A mapped range of one frame. What is not unmapped is left to the end of the process: it may be in use.
#[derive(Debug)]
pub(crate) struct Scratch {
    device: Arc<dyn Device>,
    backing: Option<(Reservation, Frame)>,
    addr: DeviceAddr,
    size: Bytes,
}

impl Scratch {
    /// `size` is a multiple of the device's granularity.
    pub(crate) fn new(device: &Arc<dyn Device>, size: Bytes) -> Result<Self> {
        let reservation = Reservation::new(Arc::clone(device), size, device.granularity())?;
        let frame = Frame::new(Arc::clone(device), size)?;
        let addr = reservation.addr();
        // SAFETY: the range was just reserved and the frame just made.
        unsafe { device.map(addr, size, frame.handle()) }?;
        let scratch = Scratch { device: Arc::clone(device), backing: Some((reservation, frame)), addr, size };
        // SAFETY: the range was just mapped.
        match unsafe { device.allow_access(addr, size) } {
            Ok(()) => Ok(scratch),
            Err(error) => {
                scratch.unmap()?;
                Err(error)
            }
        }
    }

    /// The first address.
    pub(crate) fn addr(&self) -> DeviceAddr {
        self.addr
    }

    /// Enqueues a copy of a buffer of the same size. Both are kept, and the buffer left alone, until it has completed.
    pub(crate) fn copy_from(&self, buffer: &PinnedBuffer, stream: &Stream) -> Result<()> {
        assert_eq!(buffer.size(), self.size, "a scratch is copied as a whole");
        // SAFETY: both sides are of this size, and kept until the copy has completed.
        unsafe { self.device.copy_to_device(self.addr, buffer.as_ptr(), self.size, stream.handle()) }
    }

    /// Enqueues a copy to a buffer of the same size. Both are kept, and the buffer left alone, until it has completed.
    pub(crate) fn copy_to(&self, buffer: &PinnedBuffer, stream: &Stream) -> Result<()> {
        assert_eq!(buffer.size(), self.size, "a scratch is copied as a whole");
        // SAFETY: both sides are of this size, kept, and the buffer left alone, until the copy has completed.
        unsafe { self.device.copy_to_host(buffer.as_ptr(), self.addr, self.size, stream.handle()) }
    }

    /// Gives everything back. Every copy has completed.
    pub(crate) fn unmap(mut self) -> Result<()> {
        // SAFETY: the range is mapped, and every copy that touches it has completed.
        unsafe { self.device.unmap(self.addr, self.size) }?;
        drop(self.backing.take());
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::mem::forget(self.backing.take());
    }
}

/// Waits for all work now in the stream.
pub(crate) fn wait(done: &Event, stream: &Stream) -> Result<()> {
    // SAFETY: the stream is alive and of this event's device.
    unsafe { done.record(stream.handle()) }?;
    done.synchronize()
}

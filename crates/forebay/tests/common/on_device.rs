//! Memory of the device beside what the engine manages.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::sync::Arc;

use forebay::device::{Device, DeviceAddr, Event, Frame, PinnedBuffer, Reservation, Stream, StreamHandle};
use forebay::{Bytes, Compute, Computed};

/// Bytes on the device, until dropped.
#[derive(Debug)]
pub struct OnDevice {
    device: Arc<dyn Device>,
    range: Option<(Reservation, Frame)>,
    pub addr: DeviceAddr,
    size: Bytes,
}

impl OnDevice {
    pub fn new(device: &Arc<dyn Device>, bytes: &[u8]) -> Self {
        let len = Bytes::new(bytes.len() as u64);
        let size = len.checked_align_up(device.granularity()).unwrap();
        let reservation = Reservation::new(Arc::clone(device), size, device.granularity()).unwrap();
        let frame = Frame::new(Arc::clone(device), size).unwrap();
        let addr = reservation.addr();
        // SAFETY: both are new.
        unsafe { device.map(addr, size, frame.handle()) }.unwrap();
        // SAFETY: mapped just now.
        unsafe { device.allow_access(addr, size) }.unwrap();
        let buffer = PinnedBuffer::new(Arc::clone(device), len).unwrap();
        // SAFETY: the buffer is new.
        unsafe { buffer.slice_mut(Bytes::ZERO, len) }.copy_from_slice(bytes);
        let (stream, done) =
            (Stream::new(Arc::clone(device)).unwrap(), Event::new(Arc::clone(device)).unwrap());
        // SAFETY: both sides live until the copy has completed, below.
        unsafe { device.copy_to_device(addr, buffer.as_ptr(), len, stream.handle()) }.unwrap();
        // SAFETY: the stream lives.
        unsafe { done.record(stream.handle()) }.unwrap();
        done.synchronize().unwrap();
        OnDevice { device: Arc::clone(device), range: Some((reservation, frame)), addr, size }
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the engine drops factors when nothing reads them any more, which is what a fault here
        // would tell.
        unsafe { self.device.unmap(self.addr, self.size) }.unwrap();
        drop(self.range.take());
    }
}

/// Computes a weight: gives what is there already, at once.
pub struct Given(pub Arc<OnDevice>);

impl Compute for Given {
    fn compute(&self) -> Result<Computed, String> {
        let keep = Arc::clone(&self.0);
        Ok(Computed { at: keep.addr, written_on: StreamHandle::DEFAULT, keep: Box::new(keep) })
    }
}

//! Streams that are busy for as long as a test wants.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::sync::{Arc, mpsc};

use forebay::Bytes;
use forebay::device::{Device, Event, Frame, PinnedBuffer, Reservation, StreamHandle};

use super::Rig;

/// Work in a stream that does not end before the gate is opened (on the host) or not soon (on a GPU).
pub enum Gate {
    Host(mpsc::Sender<()>),
    Gpu(Box<BigCopies>),
}

impl Gate {
    pub fn close(rig: &Rig, stream: StreamHandle) -> Self {
        let Some(host) = &rig.host else {
            return Gate::Gpu(Box::new(BigCopies::start(&rig.device, stream)));
        };
        let (open, opened) = mpsc::channel();
        // Nothing is ever sent: the gate opens when its other end is dropped.
        host.launch(stream, Box::new(move || assert!(opened.recv().is_err()))).unwrap();
        Gate::Host(open)
    }

    /// Lets the stream's work go on.
    pub fn open(self) {}
}

/// Some 200 ms of copies.
pub struct BigCopies {
    device: Arc<dyn Device>,
    done: Event,
    _to: PinnedBuffer,
    from: Reservation,
    _frame: Frame,
}

const COPY: Bytes = Bytes::mib(64);

impl BigCopies {
    fn start(device: &Arc<dyn Device>, stream: StreamHandle) -> Self {
        let to = PinnedBuffer::new(Arc::clone(device), COPY).unwrap();
        let from = Reservation::new(Arc::clone(device), COPY, device.granularity()).unwrap();
        let frame = Frame::new(Arc::clone(device), COPY).unwrap();
        // SAFETY: a free reservation and a free frame.
        unsafe { device.map(from.addr(), COPY, frame.handle()) }.unwrap();
        // SAFETY: mapped just now.
        unsafe { device.allow_access(from.addr(), COPY) }.unwrap();
        for _ in 0..160 {
            // SAFETY: both sides live until `done` has completed.
            unsafe { device.copy_to_host(to.as_ptr(), from.addr(), COPY, stream) }.unwrap();
        }
        let done = Event::new(Arc::clone(device)).unwrap();
        // SAFETY: the test keeps the stream alive.
        unsafe { done.record(stream) }.unwrap();
        BigCopies { device: Arc::clone(device), done, _to: to, from, _frame: frame }
    }
}

impl Drop for BigCopies {
    fn drop(&mut self) {
        self.done.synchronize().ok();
        // SAFETY: mapped in `start`; the copies are done.
        unsafe { self.device.unmap(self.from.addr(), COPY) }.ok();
    }
}

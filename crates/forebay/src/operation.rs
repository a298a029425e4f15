//! Operations that hold pages while others wait for them, and whose they are.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::engine::Engine;

thread_local! {
    static OWN_OPERATIONS: Arc<AtomicUsize> = Arc::default();
}

/// Operations of the calling thread that other demands of it run inside of.
pub(crate) fn own_operations() -> usize {
    OWN_OPERATIONS.with(|count| count.load(Ordering::Relaxed))
}

/// One of the operations that began on a thread, for as long as this lives. It may end on another thread, as loans do.
#[derive(Debug)]
pub(crate) struct OwnOperation(Arc<AtomicUsize>);

impl OwnOperation {
    pub(crate) fn begin() -> Self {
        let count = OWN_OPERATIONS.with(Arc::clone);
        count.fetch_add(1, Ordering::Relaxed);
        OwnOperation(count)
    }
}

impl Drop for OwnOperation {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An operation of many uses, like a model's forward: while it lives, other threads that wait for pages wait for it.
/// It ends on the thread that began it.
#[derive(Debug)]
#[must_use = "the operation ends when this is dropped"]
pub struct Operation {
    engine: Arc<Engine>,
    _own: OwnOperation,
    /// Demands inside of it are the thread's.
    _here: PhantomData<*const ()>,
}

impl Engine {
    /// Begins an operation of many uses.
    pub fn operation(self: &Arc<Self>) -> Operation {
        self.shared().operations.fetch_add(1, Ordering::AcqRel);
        Operation { engine: Arc::clone(self), _own: OwnOperation::begin(), _here: PhantomData }
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.engine.shared().operations.fetch_sub(1, Ordering::AcqRel);
        // Who waits for pages looks again whose they are.
        self.engine.shared().changed.notify_all();
    }
}

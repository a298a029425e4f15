//! Threads that read, each with state of its own.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use crate::error::{Result, StoreError};

/// A number of threads that run jobs, those someone waits for first.
///
/// Each thread owns a `W` (a slot of pinned memory, say) that it makes itself and lends to its jobs, so a `W` need
/// not be [`Send`]. A job that panics is logged and its thread goes on, with its `W` as the panic left it.
///
/// Dropping the pool drops the jobs that have not started, waits for those that have, and ends the threads.
///
/// ```
/// use forebay_store::{ReaderPool, Urgency};
/// let pool = ReaderPool::new("reader", 2, |_thread| vec![0_u8; 4096])?;
/// let (done, results) = std::sync::mpsc::channel();
/// pool.submit(Urgency::Urgent, move |buffer| {
///     done.send(buffer.len()).ok();
/// });
/// assert_eq!(results.recv(), Ok(4096));
/// # Ok::<(), forebay_store::StoreError>(())
/// ```
pub struct ReaderPool<W: 'static> {
    shared: Arc<Shared<W>>,
    threads: Vec<JoinHandle<()>>,
}

/// Whether someone waits for a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Someone waits: before all that is [`Ahead`](Self::Ahead).
    Urgent,
    /// Read ahead of need.
    Ahead,
}

impl<W: 'static> ReaderPool<W> {
    /// Starts `threads` threads (at least one) named `name-0`, `name-1` and so on; the kernel keeps 15 bytes of a
    /// name. Each calls `make_worker` with its number, and all have when this returns.
    ///
    /// # Errors
    /// [`StoreError::ReaderThread`] where a thread cannot be started or its `make_worker` panics.
    pub fn new<F>(name: &str, threads: usize, make_worker: F) -> Result<ReaderPool<W>>
    where
        F: Fn(usize) -> W + Send + Sync + 'static,
    {
        let shared = Arc::new(Shared { queue: Mutex::new(Queue::new()), ready: Condvar::new() });
        let mut pool = ReaderPool { shared, threads: Vec::new() };
        let make_worker = Arc::new(make_worker);
        let (started, starts) = mpsc::channel();
        for number in 0..threads.max(1) {
            let (shared, make_worker, started) =
                (Arc::clone(&pool.shared), Arc::clone(&make_worker), started.clone());
            let thread = format!("{name}-{number}");
            let body = move || {
                let worker = catch_unwind(AssertUnwindSafe(|| make_worker(number)));
                // Nobody listens once another thread has failed, and then the pool is about to end.
                match worker {
                    Ok(worker) => {
                        started.send(Ok(())).ok();
                        shared.run(worker);
                    }
                    Err(panic) => {
                        started.send(Err((number, panic_text(&*panic)))).ok();
                    }
                }
            };
            match thread::Builder::new().name(thread.clone()).spawn(body) {
                Ok(handle) => pool.threads.push(handle),
                Err(error) => return Err(StoreError::ReaderThread { thread, reason: error.to_string() }),
            }
        }
        drop(started);
        for start in starts.iter().take(pool.threads.len()) {
            start.map_err(|(number, reason)| StoreError::ReaderThread {
                thread: format!("{name}-{number}"),
                reason,
            })?;
        }
        Ok(pool)
    }

    /// Queues a job. Jobs of one urgency start in the order in which they were queued.
    pub fn submit(&self, urgency: Urgency, job: impl FnOnce(&mut W) + Send + 'static) {
        let job: Job<W> = Box::new(job);
        let mut queue = self.shared.queue.lock();
        match urgency {
            Urgency::Urgent => queue.urgent.push_back(job),
            Urgency::Ahead => queue.ahead.push_back(job),
        }
        drop(queue);
        self.shared.ready.notify_one();
    }

    /// How many jobs are queued and have not started.
    pub fn pending(&self) -> usize {
        let queue = self.shared.queue.lock();
        queue.urgent.len() + queue.ahead.len()
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }
}

impl<W: 'static> Drop for ReaderPool<W> {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.stopping = true;
        let dropped = (std::mem::take(&mut queue.urgent), std::mem::take(&mut queue.ahead));
        drop(queue);
        self.shared.ready.notify_all();
        // What a job holds may do anything as it goes, so not under the lock; and before joining, as a running
        // job may wait for it.
        drop(dropped);
        for handle in self.threads.drain(..) {
            // A job may have held the pool's last owner; a thread cannot wait for itself.
            if handle.thread().id() != thread::current().id() {
                // Jobs' panics are caught; what is left is one in a worker's drop, reported by its own thread.
                handle.join().ok();
            }
        }
    }
}

impl<W: 'static> std::fmt::Debug for ReaderPool<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReaderPool")
            .field("threads", &self.threads())
            .field("pending", &self.pending())
            .finish()
    }
}

type Job<W> = Box<dyn FnOnce(&mut W) + Send>;

/// Lock order: `queue` is the only lock, and a leaf. Under it no job runs or is dropped, and nothing is logged.
struct Shared<W> {
    queue: Mutex<Queue<W>>,
    ready: Condvar,
}

struct Queue<W> {
    urgent: VecDeque<Job<W>>,
    ahead: VecDeque<Job<W>>,
    stopping: bool,
}

impl<W> Queue<W> {
    fn new() -> Queue<W> {
        Queue { urgent: VecDeque::new(), ahead: VecDeque::new(), stopping: false }
    }
}

impl<W> Shared<W> {
    fn run(&self, mut worker: W) {
        while let Some(job) = self.next() {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(&mut worker))) {
                let text = panic_text(&*panic);
                tracing::error!(thread = thread::current().name(), "a reader's job panicked: {text}");
            }
        }
    }

    /// The next job, once there is one; `None` when the pool ends.
    fn next(&self) -> Option<Job<W>> {
        let mut queue = self.queue.lock();
        loop {
            if queue.stopping {
                return None;
            }
            let job = queue.urgent.pop_front();
            if let Some(job) = job.or_else(|| queue.ahead.pop_front()) {
                return Some(job);
            }
            self.ready.wait(&mut queue);
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

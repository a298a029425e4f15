//! The pool of reader threads.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::thread;

use forebay_store::{ReaderPool, StoreError, Urgency};

#[test]
fn all_jobs_run_each_with_its_threads_own_worker() {
    // An `Rc` shows that a worker need not be `Send`.
    let pool = ReaderPool::new("reader", 4, |number| (number, Rc::new(Cell::new(0_usize)))).unwrap();
    let (done, results) = mpsc::channel();
    for job in 0..1000 {
        let done = done.clone();
        let urgency = if job % 3 == 0 { Urgency::Urgent } else { Urgency::Ahead };
        pool.submit(urgency, move |(number, count)| {
            count.set(count.get() + 1);
            let name = thread::current().name().map(str::to_owned);
            done.send((job, *number, count.get(), name)).unwrap();
        });
    }
    drop(done);
    let results: Vec<_> = results.iter().collect();
    let jobs: HashSet<_> = results.iter().map(|(job, ..)| *job).collect();
    assert_eq!((results.len(), jobs.len()), (1000, 1000));
    let mut last = [0; 4];
    for (_, number, count, name) in results {
        last[number] = last[number].max(count);
        assert_eq!(name, Some(format!("reader-{number}")));
    }
    assert_eq!(last.iter().sum::<usize>(), 1000, "each worker counted its own jobs");
    assert_eq!((pool.pending(), pool.threads()), (0, 4));
}

#[test]
fn threads_work_at_the_same_time() {
    let pool = ReaderPool::new("reader", 3, |_| ()).unwrap();
    let together = Arc::new(Barrier::new(4));
    for _ in 0..3 {
        let together = Arc::clone(&together);
        pool.submit(Urgency::Ahead, move |()| {
            together.wait();
        });
    }
    together.wait();
}

/// A pool of one thread, held up until the sender is used or dropped.
fn held_up() -> (ReaderPool<()>, mpsc::Sender<()>) {
    let pool = ReaderPool::new("reader", 1, |_| ()).expect("a thread");
    let (open, gate) = mpsc::channel();
    let (started, starts) = mpsc::channel();
    pool.submit(Urgency::Urgent, move |()| {
        started.send(()).expect("the test waits");
        gate.recv().ok();
    });
    starts.recv().expect("the job starts");
    (pool, open)
}

#[test]
fn urgent_jobs_go_first_and_each_kind_in_its_order() {
    let (pool, gate) = held_up();
    let (done, order) = mpsc::channel();
    for (urgency, name) in [
        (Urgency::Ahead, "ahead 1"),
        (Urgency::Urgent, "urgent 1"),
        (Urgency::Ahead, "ahead 2"),
        (Urgency::Urgent, "urgent 2"),
    ] {
        let done = done.clone();
        pool.submit(urgency, move |()| done.send(name).unwrap());
    }
    drop(done);
    assert_eq!(pool.pending(), 4);
    drop(gate);
    assert_eq!(order.iter().collect::<Vec<_>>(), ["urgent 1", "urgent 2", "ahead 1", "ahead 2"]);
}

#[test]
fn a_panic_ends_its_job_and_not_the_thread() {
    let pool = ReaderPool::new("reader", 1, |_| 0_u32).unwrap();
    let (done, results) = mpsc::channel();
    for job in 0..6 {
        let done = done.clone();
        pool.submit(Urgency::Ahead, move |count| {
            *count += 1;
            assert!(job % 2 == 0, "job {job} panics, as the test wants");
            done.send(*count).unwrap();
        });
    }
    drop(done);
    assert_eq!(results.iter().collect::<Vec<_>>(), [1, 3, 5]);
}

#[test]
fn dropping_the_pool_drops_waiting_jobs_and_waits_for_running_ones() {
    let (pool, gate) = held_up();
    let finished = Arc::new(AtomicBool::new(false));
    let (only_in_queue, queue_dropped) = mpsc::channel::<()>();
    let (started, starts) = mpsc::channel();
    let seen = Arc::clone(&finished);
    pool.submit(Urgency::Urgent, move |()| {
        started.send(()).unwrap();
        // Ends only once the drop below has begun and thrown the queued job away.
        assert!(queue_dropped.recv().is_err());
        seen.store(true, Ordering::SeqCst);
    });
    drop(gate);
    starts.recv().unwrap();
    pool.submit(Urgency::Urgent, move |()| only_in_queue.send(()).unwrap());

    drop(pool);
    assert!(finished.load(Ordering::SeqCst));
}

#[test]
fn dropping_an_idle_pool_drops_the_workers() {
    struct Worker(Arc<AtomicUsize>);
    impl Drop for Worker {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&dropped);
    drop(ReaderPool::new("reader", 3, move |_| Worker(Arc::clone(&count))).unwrap());
    assert_eq!(dropped.load(Ordering::SeqCst), 3);
}

#[test]
fn a_job_may_hold_the_last_owner_of_its_pool() {
    let (pool, gate) = held_up();
    let pool = Arc::new(pool);
    let (done, results) = mpsc::channel();
    let last = Arc::clone(&pool);
    let (handed_over, owned) = mpsc::channel::<()>();
    pool.submit(Urgency::Urgent, move |()| {
        owned.recv().ok();
        drop(last);
        done.send(()).unwrap();
    });
    drop(pool);
    drop((handed_over, gate));
    assert_eq!(results.recv(), Ok(()));
}

#[test]
fn a_worker_that_cannot_be_made_is_an_error() {
    let error = ReaderPool::new("reader", 3, |number| assert!(number != 1, "no memory to pin")).unwrap_err();
    assert_eq!(
        error,
        StoreError::ReaderThread { thread: "reader-1".into(), reason: "no memory to pin".into() }
    );
}

#[test]
fn a_pool_has_at_least_one_thread() {
    let pool = ReaderPool::new("reader", 0, |_| ()).unwrap();
    let (done, results) = mpsc::channel();
    pool.submit(Urgency::Ahead, move |()| done.send(()).unwrap());
    assert_eq!(results.recv(), Ok(()));
}

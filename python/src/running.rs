//! Calls with weights that have begun, which the end of a process waits for.
//!
//! A thread that comes back to an interpreter that is gone ends there, in the middle of whatever code called it: torch's aborts
//! the process. So calls are counted from before they give the interpreter up until after they have it again; the engine's own
//! count of operations ends before that. Behind a forward its thread still frees what came of it, for which torch gives the
//! interpreter up as well: a while has to pass since the last one.

use std::marker::PhantomData;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

/// How long ago the last forward of another thread has to have ended: some turns of the interpreter's.
const QUIET: Duration = Duration::from_millis(50);
/// How long is waited at most.
const PATIENCE: Duration = Duration::from_millis(500);

static CALLS: AtomicUsize = AtomicUsize::new(0);
static IS_ENDING: AtomicBool = AtomicBool::new(false);
/// In which thread the last forward ended, if any did, and when, in milliseconds since the first one.
static LAST_IN: AtomicUsize = AtomicUsize::new(0);
static LAST_AT: AtomicU64 = AtomicU64::new(0);
static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A call that has begun, for as long as this lives: its thread has the interpreter at both ends.
pub(crate) struct Running<'py>(PhantomData<Python<'py>>);

impl<'py> Running<'py> {
    pub(crate) fn new(_py: Python<'py>) -> Self {
        CALLS.fetch_add(1, Ordering::AcqRel);
        Running(PhantomData)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A forward begins: a call that uses torch before and after it uses weights. [`end_forward`] must follow.
#[pyfunction]
pub(crate) fn begin_forward() {
    CALLS.fetch_add(1, Ordering::AcqRel);
}

/// A forward has ended, and its thread has the interpreter.
#[pyfunction]
pub(crate) fn end_forward() {
    LAST_AT.store(FIRST.elapsed().as_millis() as u64, Ordering::Relaxed);
    LAST_IN.store(this_thread(), Ordering::Relaxed);
    CALLS.fetch_sub(1, Ordering::AcqRel);
}

/// Whether the process ends, and uses of weights are errors.
#[pyfunction]
pub(crate) fn is_ending() -> bool {
    IS_ENDING.load(Ordering::Acquire)
}

/// From now on the process ends.
pub(crate) fn begin_ending() {
    IS_ENDING.store(true, Ordering::Release);
}

/// Waits until no other thread is in a call or has just ended one, nor holds weights. Without the interpreter, shortly.
pub(crate) fn wait_for_calls(is_any_held: impl Fn() -> bool) {
    let began = Instant::now();
    let is_quiet = || {
        let (last_in, last_at) = (LAST_IN.load(Ordering::Relaxed), LAST_AT.load(Ordering::Relaxed));
        let is_anothers = last_in != 0 && last_in != this_thread();
        !is_anothers || FIRST.elapsed().saturating_sub(Duration::from_millis(last_at)) >= QUIET
    };
    let is_over = || CALLS.load(Ordering::Acquire) == 0 && is_quiet() && !is_any_held();
    while began.elapsed() < PATIENCE && !is_over() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// A number that no other living thread has, and not 0.
fn this_thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here).addr())
}

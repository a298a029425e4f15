//! Recalls of models that are lent as a whole, on their way from the engine to Python.
//!
//! The engine recalls under its lock, where Python may not be called. So recalls go through a queue to one thread of
//! Python's. Nothing is lent before the queue is open or after it is closed.

use std::collections::{HashMap, VecDeque};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use pyo3::prelude::*;
use pyo3::types::{PyWeakrefMethods, PyWeakrefReference};

use crate::shadows::Shadows;

/// Names a model's shadows without touching a Python object.
pub(crate) type Token = u64;

/// Lock order: a leaf, taken under the engine's lock.
static QUEUE: Mutex<VecDeque<Token>> = Mutex::new(VecDeque::new());
static QUEUED: Condvar = Condvar::new();
static OPEN: AtomicBool = AtomicBool::new(false);

/// Lock order: a leaf, taken with the interpreter lock, and no Python runs under it.
static SHADOWS: LazyLock<Mutex<HashMap<Token, Py<PyWeakrefReference>>>> = LazyLock::new(Mutex::default);
static NEXT: AtomicU64 = AtomicU64::new(0);

pub(crate) fn new_token() -> Token {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// From now on recalls with this token reach these shadows, as long as they live.
pub(crate) fn register(token: Token, shadows: &Bound<'_, Shadows>) -> PyResult<()> {
    let weak = PyWeakrefReference::new(shadows.as_any())?.unbind();
    SHADOWS.lock().insert(token, weak);
    Ok(())
}

pub(crate) fn forget(token: Token) {
    let weak = SHADOWS.lock().remove(&token);
    drop(weak);
}

/// Asks for a model's weights back.
pub(crate) fn post(token: Token) {
    QUEUE.lock().push_back(token);
    QUEUED.notify_one();
}

/// Whether recalls are served.
pub(crate) fn are_open() -> bool {
    OPEN.load(Ordering::Acquire)
}

/// From now on models may be lent: :func:`serve_recalls` is about to run.
#[pyfunction]
pub(crate) fn open_recalls() {
    OPEN.store(true, Ordering::Release);
}

/// Serves recalls until :func:`close_recalls` is called.
#[pyfunction]
pub(crate) fn serve_recalls(py: Python<'_>) {
    while let Some(token) = py.detach(next) {
        let weak = SHADOWS.lock().get(&token).map(|weak| weak.clone_ref(py));
        let shadows = weak.and_then(|weak| weak.bind(py).upgrade());
        if let Some(Ok(shadows)) = shadows.map(|shadows| shadows.cast_into::<Shadows>()) {
            shadows.get().recall(py);
        }
    }
}

/// Ends :func:`serve_recalls`. What is lent is given back now.
#[pyfunction]
pub(crate) fn close_recalls(py: Python<'_>) {
    py.detach(|| {
        let _queue = QUEUE.lock();
        OPEN.store(false, Ordering::Release);
        QUEUED.notify_all();
    });
    let all: Vec<_> = SHADOWS.lock().values().map(|weak| weak.clone_ref(py)).collect();
    for shadows in all.iter().filter_map(|weak| weak.bind(py).upgrade()) {
        if let Ok(shadows) = shadows.cast::<Shadows>() {
            shadows.get().give_back(py);
        }
    }
}

fn next() -> Option<Token> {
    let mut queue = QUEUE.lock();
    loop {
        if let Some(next) = queue.pop_front() {
            return Some(next);
        }
        if !are_open() {
            return None;
        }
        QUEUED.wait(&mut queue);
    }
}

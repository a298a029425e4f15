//! Ends the process when a test hangs, and says what its engines were doing.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::thread;
use std::time::Duration;

use forebay::Engine;

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(60);

static ENGINES: Mutex<Vec<Weak<Engine>>> = Mutex::new(Vec::new());

/// Aborts the process unless it is dropped in time.
#[derive(Debug)]
pub struct Watchdog {
    _ended: mpsc::Sender<()>,
}

impl Watchdog {
    /// Watches the calling test. `FOREBAY_TEST_WATCHDOG` sets another limit, in seconds.
    pub fn start(seed: u64) -> Self {
        Self::with_limit(seed, LIMIT)
    }

    pub fn with_limit(seed: u64, limit: Duration) -> Self {
        let set = std::env::var("FOREBAY_TEST_WATCHDOG").ok();
        let limit = set.map_or(limit, |seconds| Duration::from_secs(seconds.parse().unwrap()));
        let test = thread::current().name().unwrap_or("a test").to_owned();
        let (ended, end) = mpsc::channel::<()>();
        thread::spawn(move || {
            if end.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                // Straight to the stream: what `eprintln` writes is captured, and lost with the process.
                let text = format!("\n{test} hangs after {limit:?}; FOREBAY_TEST_SEED={seed}\n{}", report());
                std::io::stderr().write_all(text.as_bytes()).ok();
                std::process::abort();
            }
        });
        Watchdog { _ended: ended }
    }
}

/// Has an engine's state reported when a test hangs.
pub fn report_on(engine: &Arc<Engine>) {
    let mut engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner);
    engines.retain(|engine| engine.strong_count() > 0);
    engines.push(Arc::downgrade(engine));
}

fn report() -> String {
    let engines = ENGINES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let of = |engine: Arc<Engine>| {
        let (told, answer) = mpsc::channel();
        // In a thread of its own, as the lock may be what hangs. The engine must not be dropped here.
        thread::spawn(move || {
            told.send(engine.stats().to_string()).ok();
            std::mem::forget(engine);
        });
        answer.recv_timeout(Duration::from_secs(2)).unwrap_or_else(|_| "an engine's lock is held\n".into())
    };
    engines.iter().filter_map(Weak::upgrade).map(of).collect()
}

//! The engine's log in Python's `logging`, under the logger `forebay`.
//!
//! Records are written by any thread, also under the engine's lock, where taking the interpreter lock could wait for a
//! thread that waits for the engine. So they go through a queue to a thread of their own; nothing waits for it.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;

struct Forwarder(Sender<(Level, String)>);

static FORWARDER: OnceLock<Forwarder> = OnceLock::new();

impl Log for Forwarder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("forebay")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // The receiver is gone only when its thread could not be started; there is no other place to tell.
            self.0.send((record.level(), record.args().to_string())).ok();
        }
    }

    fn flush(&self) {}
}

/// Starts forwarding. Debug records and below are dropped at the source.
pub(crate) fn install() {
    let (sender, records) = channel::<(Level, String)>();
    let thread = std::thread::Builder::new().name("forebay-log".into()).spawn(move || {
        for (level, text) in records {
            let number = match level {
                Level::Error => 40,
                Level::Warn => 30,
                Level::Info => 20,
                Level::Debug | Level::Trace => 10,
            };
            let told = Python::try_attach(|py| -> PyResult<()> {
                let logger = py.import("logging")?.call_method1("getLogger", ("forebay",))?;
                logger.call_method1("log", (number, "%s", text.as_str())).map(drop)
            });
            if told.is_none() {
                return; // the interpreter is ending
            }
        }
    });
    if thread.is_ok() && log::set_logger(FORWARDER.get_or_init(|| Forwarder(sender))).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

//! Passes over a model's weights, timed.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use forebay::device::{Device, Event, Stream};
use forebay::measure::Rate;
use forebay::{Attachment, Bytes, Engine, PageState, Use};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::seconds;
use crate::checkpoint::Model;

/// What a pass shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The model is attached, and every byte of it brought.
    First,
    /// Passes settle on what stays.
    Step(u32),
    /// Other models were used since the last one.
    Return,
}

/// What one pass came to.
#[derive(Clone, Debug)]
pub(super) struct Pass {
    pub(super) kind: Kind,
    pub(super) time: Duration,
    pub(super) copied: Bytes,
    /// How long the link alone would take.
    pub(super) limit: Duration,
    resident: Bytes,
    waits: u64,
    waited: Duration,
}

/// Uses models' weights in order on one stream.
pub(super) struct Runner<'a> {
    engine: &'a Arc<Engine>,
    stream: &'a Stream,
    done: Event,
    link: Rate,
    bar: &'a ProgressBar,
}

impl<'a> Runner<'a> {
    pub(super) fn new(
        engine: &'a Arc<Engine>,
        device: &Arc<dyn Device>,
        stream: &'a Stream,
        link: Rate,
        bar: &'a ProgressBar,
    ) -> anyhow::Result<Self> {
        Ok(Runner { engine, stream, done: Event::new(Arc::clone(device))?, link, bar })
    }

    /// Attaches a model and brings all of it to the device once.
    pub(super) fn first(&self, model: &Model) -> anyhow::Result<(Attachment, Pass)> {
        let start = Instant::now();
        let path = model.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let attached = self
            .engine
            .attach(&name, model.weights.clone(), model.options)
            .with_context(|| format!("cannot attach {}", path.display()))?;
        let pass = self.timed(Kind::First, &attached, start, Bytes::ZERO)?;
        // What was read ahead for the next pass already is not this one's.
        let limit = self.link.time_for(model.plan.weights());
        Ok((attached, Pass { limit, ..pass }))
    }

    /// One more pass over a model.
    pub(super) fn pass(&self, kind: Kind, model: &Attachment) -> anyhow::Result<Pass> {
        self.timed(kind, model, Instant::now(), model.stats().filled)
    }

    fn timed(&self, kind: Kind, model: &Attachment, start: Instant, before: Bytes) -> anyhow::Result<Pass> {
        self.bar.set_message(format!("{}, pass {kind}", model.name()));
        let waited = model.stats();
        self.use_all(model).with_context(|| format!("pass {kind} over {:?} failed", model.name()))?;
        let (time, after) = (start.elapsed(), model.stats());
        let copied = after.filled - before;
        Ok(Pass {
            kind,
            time,
            copied,
            limit: self.link.time_for(copied),
            resident: after.in_state(PageState::Resident),
            waits: after.waits - waited.waits,
            waited: after.wait_time - waited.wait_time,
        })
    }

    /// Ends when every weight was on the device, and not before the last copy is done. Tables that are not kept are
    /// left out: their rows would be looked up at the source.
    fn use_all(&self, model: &Attachment) -> anyhow::Result<()> {
        for weight in 0..model.weight_names().len() {
            if model.is_kept(weight)? {
                drop(model.acquire(weight, Use::on(self.stream.handle()))?);
            }
            self.bar.inc(1);
        }
        // SAFETY: the stream outlives `self`, and is of the event's device.
        unsafe { self.done.record(self.stream.handle()) }?;
        Ok(self.done.synchronize()?)
    }
}

impl Pass {
    pub(super) fn rate(&self) -> Rate {
        Rate { bytes: self.copied, time: self.time }
    }

    /// `None` where nothing was copied.
    fn times_limit(&self) -> Option<f64> {
        (self.copied > Bytes::ZERO).then(|| self.time.as_secs_f64() / self.limit.as_secs_f64().max(1e-9))
    }

    pub(super) fn print_head(out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>6}  {:>9}  {:>10}  {:>6}  {:>9}  {:>7}  {:>10}  {:>6}",
            "pass", "time", "copied", "GB/s", "limit", "x limit", "resident", "waits"
        )
    }

    pub(super) fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let Pass { kind, time, copied, limit, resident, waits, .. } = self;
        writeln!(
            out,
            "{:>6}  {:>9}  {:>10}  {:>6.1}  {:>9}  {:>7}  {:>10}  {waits:>6}",
            kind.to_string(),
            seconds(*time),
            copied.to_string(),
            self.rate().bytes_per_s() / 1e9,
            seconds(*limit),
            self.times_limit().map_or("-".to_owned(), |times| format!("{times:.2}")),
            resident.to_string(),
        )?;
        out.flush()
    }

    pub(super) fn to_json(&self) -> Value {
        json!({
            "pass": self.kind.to_string(),
            "seconds": self.time.as_secs_f64(),
            "copied_bytes": self.copied.get(),
            "copied_bytes_per_s": self.rate().bytes_per_s(),
            "limit_seconds": self.limit.as_secs_f64(),
            "times_limit": self.times_limit(),
            "resident_bytes": self.resident.get(),
            "waits": self.waits,
            "waited_seconds": self.waited.as_secs_f64(),
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::First => f.write_str("first"),
            Kind::Step(number) => write!(f, "{number}"),
            Kind::Return => f.write_str("return"),
        }
    }
}

//! `forebay run`

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use forebay::device::{self, Device, Event, Stream};
use forebay::plan::Plan;
use forebay::store::Checkpoint;
use forebay::{Attachment, Budget, Bytes, Engine, EngineConfig, PageState, Use};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::args::RunArgs;
use crate::checkpoint::{budget, layout, weights};

/// What one pass came to.
struct Pass {
    number: u32,
    time: Duration,
    copied: Bytes,
    resident: Bytes,
    streamed: Bytes,
    waits: u64,
}

pub(crate) fn run(args: &RunArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.model.path)?;
    let weights = weights(&checkpoint, &args.model)?;
    let plan = Plan::new(weights.clone(), layout(&args.model))?;
    let budget = budget(&args.model, &plan);
    let device = device::open(args.device)?;
    let config = EngineConfig { budget: Budget::Fixed(budget), ..EngineConfig::default() };
    let engine = Engine::new(Arc::clone(&device), config)?;
    // Before the model, so that it is there until the model is detached.
    let stream = Stream::new(Arc::clone(&device))?;
    let name = checkpoint.path().file_name().unwrap_or_default().to_string_lossy();
    let model = engine
        .attach(&name, weights, layout(&args.model))
        .with_context(|| format!("cannot attach {}", checkpoint.path().display()))?;

    if !args.json {
        let (count, bytes) = (checkpoint.tensors().len(), plan.weights());
        let (pages, size) = (plan.pages(), plan.page_size());
        writeln!(out, "{}: {count} tensors, {bytes}, {pages} pages of {size}", checkpoint.path().display())?;
        writeln!(out, "{} ({}), budget {budget}\n", args.device, device.name())?;
        Pass::print_head(out)?;
    }
    let mut runner = Runner::new(&device, &stream, &model, args.passes)?;
    let mut passes = Vec::new();
    for number in 1..=args.passes {
        let pass = runner.pass(number).with_context(|| format!("pass {number} failed"))?;
        if args.json { passes.push(pass.to_json()) } else { runner.bar.suspend(|| pass.print(out))? }
    }
    if args.json {
        let report = json!({
            "path": checkpoint.path().to_string_lossy(),
            "device": args.device.to_string(),
            "device_name": device.name(),
            "budget": budget.get(),
            "tensors": checkpoint.tensors().len(),
            "bytes": plan.weights().get(),
            "page_size": plan.page_size().get(),
            "pages": plan.pages(),
            "passes": passes,
        });
        writeln!(out, "{report:#}")?;
    }
    Ok(())
}

/// Uses a model's weights in order.
struct Runner<'a> {
    model: &'a Attachment,
    stream: &'a Stream,
    done: Event,
    bar: ProgressBar,
}

impl<'a> Runner<'a> {
    fn new(
        device: &Arc<dyn Device>,
        stream: &'a Stream,
        model: &'a Attachment,
        passes: u32,
    ) -> anyhow::Result<Self> {
        let uses = u64::from(passes) * model.weight_names().len() as u64;
        // Hidden where standard error is no terminal.
        let bar = ProgressBar::new(uses);
        bar.set_style(ProgressStyle::with_template("{wide_bar} pass {msg}, {eta} left")?);
        Ok(Runner { model, stream, done: Event::new(Arc::clone(device))?, bar })
    }

    /// Ends when every weight was on the device, and not before the last copy is done. Tables that are not kept are
    /// left out: their rows would be looked up at the source.
    fn pass(&mut self, number: u32) -> anyhow::Result<Pass> {
        self.bar.set_message(number.to_string());
        let before = self.model.stats();
        let start = Instant::now();
        for weight in 0..self.model.weight_names().len() {
            if self.model.is_kept(weight)? {
                drop(self.model.acquire(weight, Use::on(self.stream.handle()))?);
            }
            self.bar.inc(1);
        }
        // SAFETY: the stream outlives `self`, and is of the event's device.
        unsafe { self.done.record(self.stream.handle()) }?;
        self.done.synchronize()?;
        let (time, after) = (start.elapsed(), self.model.stats());
        Ok(Pass {
            number,
            time,
            copied: after.filled - before.filled,
            resident: after.in_state(PageState::Resident),
            streamed: after.in_state(PageState::Streamed),
            waits: after.waits - before.waits,
        })
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

impl Pass {
    /// 10^9 bytes a second.
    fn gb_per_s(&self) -> f64 {
        self.copied.get() as f64 / 1e9 / self.time.as_secs_f64().max(1e-9)
    }

    fn print_head(out: &mut impl Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>4}  {:>10}  {:>10}  {:>6}  {:>10}  {:>10}  {:>6}",
            "pass", "time", "copied", "GB/s", "resident", "streamed", "waits"
        )
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let Pass { number, time, copied, resident, streamed, waits } = self;
        writeln!(
            out,
            "{number:>4}  {:>8.3} s  {:>10}  {:>6.2}  {:>10}  {:>10}  {waits:>6}",
            time.as_secs_f64(),
            copied.to_string(),
            self.gb_per_s(),
            resident.to_string(),
            streamed.to_string(),
        )?;
        out.flush()
    }

    fn to_json(&self) -> Value {
        json!({
            "pass": self.number,
            "seconds": self.time.as_secs_f64(),
            "copied_bytes": self.copied.get(),
            "gb_per_s": self.gb_per_s(),
            "resident_bytes": self.resident.get(),
            "streamed_bytes": self.streamed.get(),
            "waits": self.waits,
        })
    }
}

//! `forebay bench`

mod free;
mod passes;
mod prediction;
mod storage;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use forebay::device::{self, Device, Stream};
use forebay::measure::{self, Rate};
use forebay::{Budget, Engine, EngineConfig};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use self::free::{Free, default_device};
use self::passes::{Kind, Pass, Runner};
use self::prediction::Prediction;
use self::storage::{Storage, rate_to_json};
use crate::args::BenchArgs;
use crate::checkpoint::{Model, check_tables};

pub(crate) fn bench(args: &BenchArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let models = args.models.iter().map(|path| Model::open(path, &args.layout));
    let models: Vec<_> = models.collect::<Result<_, _>>()?;
    check_tables(&models, &args.layout)?;
    let device = device::open(args.device.unwrap_or_else(default_device))?;
    let free = Free::choose(args.free, &models, &*device)?;
    let config = EngineConfig { budget: Budget::Fixed(free.budget), ..EngineConfig::default() };
    let bench = Bench { args, models, device, free, config };
    if args.json {
        let report = bench.run(&mut io::sink())?;
        writeln!(out, "{report:#}")?;
    } else {
        bench.run(out)?;
    }
    Ok(())
}

/// What is to be tried, and where.
struct Bench<'a> {
    args: &'a BenchArgs,
    models: Vec<Model>,
    device: Arc<dyn Device>,
    free: Free,
    config: EngineConfig,
}

impl Bench<'_> {
    /// Tells what it finds as it finds it, and returns all of it.
    fn run(&self, out: &mut dyn Write) -> anyhow::Result<Value> {
        let bar = Bar::new(self.uses())?;
        bar.0.set_message("measuring the disk");
        let threads = self.config.ring.reader_threads();
        let storages = self.models.iter().map(|model| Storage::look_at(&model.checkpoint, threads));
        let storages: Vec<_> = storages.collect::<Result<_, _>>()?;
        bar.0.set_message("measuring the link");
        let link = measure::link(&self.device)
            .with_context(|| format!("cannot measure the link to {}", self.device.id()))?;
        bar.0.suspend(|| self.print_head(&storages, link, out))?;

        let passes = self.passes(link, &bar, out)?;
        bar.0.set_message("measuring the page cache");
        let caches: Vec<_> = storages.iter().map(Storage::page_cache).collect::<Result<_, _>>()?;
        drop(bar);
        writeln!(out)?;
        for (storage, cache) in storages.iter().zip(&caches) {
            writeln!(out, "page cache  {}", storage.describe_page_cache(cache))?;
        }

        let mut reports = Vec::new();
        for (((model, storage), cache), passes) in self.models.iter().zip(&storages).zip(&caches).zip(&passes)
        {
            let prediction = Prediction::new(&model.plan, self.free.budget, passes, link, self.args.compute);
            self.print_name(model, out)?;
            prediction.print(out)?;
            reports.push(json!({
                "path": model.path().to_string_lossy(),
                "tensors": model.checkpoint.tensors().len(),
                "bytes": model.plan.weights().get(),
                "page_size_bytes": model.plan.page_size().get(),
                "pages": model.plan.pages(),
                "least_memory_bytes": model.plan.least_budget().get(),
                "files": storage.to_json(),
                "page_cache": rate_to_json(cache),
                "passes": passes.iter().map(Pass::to_json).collect::<Vec<_>>(),
                "prediction": prediction.to_json(),
            }));
        }
        Ok(json!({
            "device": { "id": self.device.id().to_string(), "name": self.device.name() },
            "memory": self.free.to_json(),
            "reader_threads": threads,
            "compute_seconds_a_step": self.args.compute.as_secs_f64(),
            "link": rate_to_json(&link),
            "models": reports,
        }))
    }

    /// Each model in turn: its first pass, then its steps. Then, where there are several, each once more.
    fn passes(&self, link: Rate, bar: &Bar, out: &mut dyn Write) -> anyhow::Result<Vec<Vec<Pass>>> {
        let engine = Engine::new(Arc::clone(&self.device), self.config)?;
        // Before the models, so that it is there until they are detached.
        let stream = Stream::new(Arc::clone(&self.device))?;
        let runner = Runner::new(&engine, &self.device, &stream, link, &bar.0)?;
        let mut attached = Vec::new();
        let mut passes = Vec::new();
        for model in &self.models {
            bar.0.suspend(|| {
                self.print_name(model, out)?;
                Pass::print_head(out)
            })?;
            let (attachment, first) = runner.first(model)?;
            bar.0.suspend(|| first.print(out))?;
            let mut of_model = vec![first];
            for step in 1..=self.args.steps {
                let pass = runner.pass(Kind::Step(step), &attachment)?;
                bar.0.suspend(|| pass.print(out))?;
                of_model.push(pass);
            }
            attached.push(attachment);
            passes.push(of_model);
        }
        if self.models.len() > 1 {
            for ((model, attachment), of_model) in self.models.iter().zip(&attached).zip(&mut passes) {
                let pass = runner.pass(Kind::Return, attachment)?;
                bar.0.suspend(|| {
                    self.print_name(model, out)?;
                    Pass::print_head(out)?;
                    pass.print(out)
                })?;
                of_model.push(pass);
            }
        }
        Ok(passes)
    }

    fn print_head(&self, storages: &[Storage], link: Rate, out: &mut dyn Write) -> io::Result<()> {
        for (model, storage) in self.models.iter().zip(storages) {
            let (count, plan) = (model.checkpoint.tensors().len(), &model.plan);
            let (bytes, pages, size) = (plan.weights(), plan.pages(), plan.page_size());
            let (path, cached) = (model.path().display(), storage.describe_cached());
            writeln!(out, "{path}: {count} tensors, {bytes}, {pages} pages of {size}, {cached}")?;
        }
        let (id, name) = (self.device.id(), self.device.name());
        writeln!(out, "{id} ({name}): {}\n", self.free.describe())?;
        writeln!(out, "link        {link:>10}  {} at a time from pinned memory to {id}", link.bytes)?;
        for storage in storages {
            writeln!(out, "disk        {}", storage.describe_disk())?;
        }
        out.flush()
    }

    /// Above a table of a model, which needs no name where there is one.
    fn print_name(&self, model: &Model, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out)?;
        if self.models.len() > 1 {
            writeln!(out, "{}", model.path().display())?;
        }
        Ok(())
    }

    /// How often a weight is used.
    fn uses(&self) -> u64 {
        let again = u64::from(self.models.len() > 1);
        let weights: usize = self.models.iter().map(|model| model.weights.len()).sum();
        weights as u64 * (1 + u64::from(self.args.steps) + again)
    }
}

/// On standard error where that is a terminal, and gone with this value.
struct Bar(ProgressBar);

impl Bar {
    fn new(uses: u64) -> anyhow::Result<Self> {
        let bar = ProgressBar::new(uses);
        bar.set_style(ProgressStyle::with_template("{wide_bar} {msg}, {elapsed}, {eta} left")?);
        bar.enable_steady_tick(Duration::from_millis(200));
        Ok(Bar(bar))
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.3} s", time.as_secs_f64())
}

//! What acquiring and releasing a resident weight costs, on the host device: `cargo bench -p forebay --bench acquire`.
//!
//! Prints nanoseconds an operation, the best of many batches: other work on the machine only ever adds.
#![allow(clippy::print_stdout, reason = "a benchmark prints its result")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use forebay::device::StreamHandle;
use forebay::device::host::{HostConfig, HostDevice};
use forebay::store::Source;
use forebay::{Attachment, Budget, Bytes, Engine, EngineConfig, LayoutOptions, Use, WeightKind, WeightSpec};

const WEIGHTS: usize = 8;
const BATCHES: usize = 300;
const BATCH: u32 = 2_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Arc::new(HostDevice::new(HostConfig::default())?);
    let config = EngineConfig { budget: Budget::Fixed(Bytes::mib(64)), ..EngineConfig::default() };
    let engine = Engine::new(device, config)?;
    let specs = (0..WEIGHTS).map(|i| WeightSpec {
        name: format!("layer{i}"),
        source: Source::memory(Arc::new(vec![i as u8; 2 << 20])),
        kind: WeightKind::Whole,
    });
    let model = engine.attach("model", specs.collect(), LayoutOptions::default())?;
    let how = Use::on(StreamHandle::DEFAULT);
    // Filled, and seen to be.
    for weight in 0..WEIGHTS {
        while engine.begin(&[(&model, weight)], how.stream)?.ready().is_none() {
            drop(model.acquire(weight, how)?);
        }
    }
    for (name, count) in [("one weight", 1), ("a weight and its bias", 2), ("eight weights", 8)] {
        let group: Vec<(&Attachment, usize)> = (0..count).map(|weight| (&model, weight)).collect();
        let best = best_of(|| drop(black_box(engine.acquire(black_box(&group), how))));
        println!("{name:<24} {best:7.1} ns");
    }
    Ok(())
}

/// Nanoseconds a call in the best batch.
fn best_of(mut call: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..BATCHES {
        let start = Instant::now();
        (0..BATCH).for_each(|_| call());
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(BATCH));
    }
    best
}

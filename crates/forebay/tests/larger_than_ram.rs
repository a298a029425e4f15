//! Weights that exceed the page cache: a part of what is streamed is read through it, the rest past it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Consumer, Random, Rig, Weights};
use forebay::device::Device;
use forebay::{Budget, Bytes, Engine, EngineConfig};

fn weights() -> Weights {
    Weights::new(&mut Random::seeded(), &[(2 << 20) + 4096; 24])
}

/// Memory for a third of them, and page cache for less than half.
fn engine(device: &Arc<dyn Device>) -> Arc<Engine> {
    let config = EngineConfig {
        budget: Budget::Fixed(Bytes::mib(16)),
        ring: common::readers(3),
        registered: None,
        page_cache: Some(Bytes::mib(20)),
    };
    Engine::new(Arc::clone(device), config).unwrap()
}

#[test]
fn what_has_no_room_in_the_page_cache_is_read_past_it_and_bytes_are_right() {
    let weights = weights();
    let device = Rig::new().device;
    let engine = engine(&device);
    let model = weights.attach(&engine, "model");
    let mut consumer = Consumer::new(&device);
    let start = Instant::now();
    let mut last = (Bytes::ZERO, Bytes::ZERO);
    loop {
        for weight in 0..weights.contents.len() {
            consumer.use_weight(&model, &weights, weight).unwrap();
        }
        let stats = model.stats();
        let (past, filled) = (stats.past_cache - last.0, stats.filled - last.1);
        last = (stats.past_cache, stats.filled);
        // The keeper's first look at the memory comes at some time during the first passes.
        if past > Bytes::ZERO && past < filled {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{past} of {filled}");
    }
    consumer.check();
}

#[test]
fn a_model_whose_turn_comes_has_its_share_of_the_cache_from_its_first_pass() {
    let (one, other) = (weights(), weights());
    let device = Rig::new().device;
    let engine = engine(&device);
    let models = [one.attach(&engine, "one"), other.attach(&engine, "other")];
    let mut consumer = Consumer::new(&device);
    for (model, weights) in models.iter().zip([&one, &other]) {
        for weight in 0..weights.contents.len() {
            consumer.use_weight(model, weights, weight).unwrap();
            // The keeper takes note of whose turn it is; no more than fits is read ahead of that.
            if weight == 0 {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        let stats = model.stats();
        let through = stats.filled - stats.past_cache;
        assert!(through > Bytes::mib(8) && through < Bytes::mib(28), "{through} of {}", stats.filled);
    }
    consumer.check();
}

//! Weights that exceed the page cache: a part of what is streamed is read through it, the rest past it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::time::{Duration, Instant};

use common::{Consumer, Random, Rig, Weights};
use forebay::{Budget, Bytes, Engine, EngineConfig};

#[test]
fn what_has_no_room_in_the_page_cache_is_read_past_it_and_bytes_are_right() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &[(2 << 20) + 4096; 24]);
    let device = Rig::new().device;
    let config = EngineConfig {
        budget: Budget::Fixed(Bytes::mib(16)),
        ring: common::readers(3),
        registered: None,
        page_cache: Some(Bytes::mib(20)),
    };
    let engine = Engine::new(std::sync::Arc::clone(&device), config).unwrap();
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

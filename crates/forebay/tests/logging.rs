//! A log may call back: nothing is logged under the engine's lock. Alone in its file: it sets the process's subscriber.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use common::faulty::{Call, Failure, Faulty};
use common::{Random, Rig, Weights};
use forebay::store::{Source, SourceFile};
use forebay::{Budget, Bytes, Engine, LayoutOptions, WeightKind, WeightSpec};
use tracing::span;

/// Looks at the engine whenever something is logged, as a Python handler may that waits for a thread which does.
struct Curious;

static ENGINE: Mutex<Weak<Engine>> = Mutex::new(Weak::new());
static EVENTS: AtomicU64 = AtomicU64::new(0);

impl tracing::Subscriber for Curious {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        let engine = ENGINE.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(engine) = engine.upgrade() {
            EVENTS.fetch_add(1, Ordering::Relaxed);
            engine.stats();
        }
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn whatever_goes_wrong_is_logged_without_the_lock() {
    let mut random = Random::seeded();
    tracing::subscriber::set_global_default(Curious).unwrap();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 << 20; 4]);
    let file = SourceFile::open(weights.file.path()).unwrap();
    let past_the_end = WeightSpec {
        name: "past the end".into(),
        source: Source::file(&file, 20 << 20, Bytes::mib(4)),
        kind: WeightKind::Whole,
    };
    for (call, failure) in [
        (Call::Memory, Failure::Refused),
        (Call::CreateFrame, Failure::OutOfMemory),
        (Call::CreateFrame, Failure::Refused),
        (Call::Map, Failure::OutOfMemory),
        (Call::Map, Failure::Refused),
        (Call::Record, Failure::Refused),
        (Call::DestroyEvent, Failure::Refused),
        (Call::Unmap, Failure::Refused),
        (Call::IsComplete, Failure::Lost),
    ] {
        let device = Faulty::new(Arc::clone(&rig.device));
        let engine = common::engine_on(Arc::clone(&device) as _, Bytes::mib(6));
        *ENGINE.lock().unwrap() = Arc::downgrade(&engine);
        let logged = EVENTS.load(Ordering::Relaxed);
        let model = weights.attach(&engine, "model");
        let bad = engine.attach("bad", vec![past_the_end.clone()], LayoutOptions::default()).unwrap();
        let mut consumer = rig.consumer();
        consumer.use_weight(&bad, &weights, 0).unwrap_err();
        assert!(EVENTS.load(Ordering::Relaxed) > logged, "an unreadable weight is logged");
        engine.set_budget(Budget::Headroom(Bytes::mib(1))).unwrap();
        engine.set_budget(Budget::Fixed(Bytes::mib(6))).unwrap();
        device.fail(call, failure, 3, 4);
        for weight in [0, 1, 2, 3, 0, 1] {
            consumer.use_weight(&model, &weights, weight).ok();
        }
        engine.make_room(Bytes::MAX).ok();
        drop((model, bad));
        drop(engine);
    }
}

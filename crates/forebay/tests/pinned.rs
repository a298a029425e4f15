//! Pins: taken all or none, held as long as their guard or view lives, and gone with it, whatever happens.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Random, Rig, Weights, assert_no_pins};
use forebay::device::StreamHandle;
use forebay::device::host::HostConfig;
use forebay::store::{Source, SourceFile};
use forebay::{Bytes, EngineError, LayoutOptions, Use, WeightKind, WeightSpec};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

#[test]
fn a_group_of_two_models_with_shared_pages_and_duplicates_is_right() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    // w0 and w1 share a page, w2 and w3 another.
    let a = Weights::new(&mut random, &[3 * MIB, MIB, MIB, 3 * MIB, 100]);
    let b = Weights::new(&mut random, &[5 * MIB, MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 9);
    let (model_a, model_b) = (a.attach(&engine, "a"), b.attach(&engine, "b"));
    let mut consumer = rig.consumer();
    for round in 0..12 {
        let group =
            [(&model_a, 0), (&model_a, 1), (&model_b, 0), (&model_a, 0), (&model_a, 4), (&model_a, 1)];
        let pinned = engine.acquire(&group[..3 + round % 4], Use::on(consumer.stream())).unwrap();
        consumer.read(&model_a, &a, 0);
        consumer.read(&model_a, &a, 1);
        consumer.read(&model_b, &b, 0);
        drop(pinned);
        for weight in [2, 3] {
            consumer.use_weight(&model_a, &a, weight).unwrap();
        }
        consumer.use_weight(&model_b, &b, 2).unwrap();
    }
    consumer.check();
    assert_no_pins(&engine, 1);
}

#[test]
fn nothing_of_a_group_stays_pinned_when_one_weight_fails() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 8);
    let model = weights.attach(&engine, "good");
    let file = SourceFile::open(weights.file.path()).unwrap();
    let past_the_end = WeightSpec {
        name: "past the end".into(),
        source: Source::file(&file, 7 << 20, Bytes::mib(4)),
        kind: WeightKind::Whole,
    };
    let bad = engine.attach("bad", vec![past_the_end], LayoutOptions::default()).unwrap();
    let mut consumer = rig.consumer();
    for _ in 0..3 {
        let group = [(&model, 0), (&bad, 0), (&model, 1)];
        let error = engine.acquire(&group, Use::on(consumer.stream())).unwrap_err();
        assert!(matches!(&error, EngineError::Source { weight, .. } if weight == "past the end"), "{error}");
        consumer.use_weight(&model, &weights, 0).unwrap();
    }
    assert_no_pins(&engine, 0);
    consumer.use_weight(&model, &weights, 1).unwrap();
}

#[test]
fn weights_that_are_there_are_acquired_without_waiting_and_others_not_at_all() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 4);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let stream = consumer.stream();
    assert!(engine.begin(&[(&model, 0)], stream).unwrap().ready().is_none());
    // Their bytes are there once a use has seen it.
    while engine.begin(&[(&model, 0), (&model, 1)], stream).unwrap().ready().is_none() {
        consumer.use_weight(&model, &weights, 0).unwrap();
        consumer.use_weight(&model, &weights, 1).unwrap();
    }
    let pinned = engine.begin(&[(&model, 1)], stream).unwrap().ready().unwrap();
    consumer.read(&model, &weights, 1);
    drop(pinned);
    assert!(matches!(engine.begin(&[(&model, 2)], stream), Err(EngineError::Invalid(_))));
    assert_no_pins(&engine, 0);
    assert!(engine.begin(&[(&model, 0)], stream).unwrap().ready().is_none());
}

#[test]
fn a_guard_that_a_panic_drops_leaves_no_pin() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 4]);
    let engine = rig.engine(PAGE * 4);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for weight in 0..4 {
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _pinned = model.acquire(weight, Use::on(consumer.stream())).unwrap();
            panic!("as a kernel's caller does");
        }));
        assert!(panicked.is_err());
    }
    engine.set_budget(forebay::Budget::Fixed(PAGE)).unwrap();
    engine.settle().unwrap();
    assert_eq!(engine.stats().held, PAGE);
    (0..4).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    assert_no_pins(&engine, 0);
}

#[test]
fn a_view_keeps_its_bytes_while_everything_else_streams_by() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB, 2 * MIB, 2 * MIB, 4 * MIB, MIB, 3 * MIB]);
    let engine = rig.engine(PAGE * 5);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let view = model.view(0, Use::on(consumer.stream())).unwrap();
    assert_eq!((view.address(), view.len()), (model.address(0).unwrap(), Bytes::mib(3)));
    for _pass in 0..10 {
        for weight in 1..6 {
            consumer.use_weight(&model, &weights, weight).unwrap();
        }
        consumer.read_at(view.address(), &weights.contents[0], "the view");
    }
    consumer.check();
    drop(view);
    assert_no_pins(&engine, 0);
}

#[test]
fn a_view_outlives_its_model_and_the_engine_and_may_be_dropped_anywhere() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB, 2 * MIB, 100]);
    let free = rig.device.memory().unwrap().free;
    let mut consumer = rig.consumer();
    let (view, small) = {
        let engine = rig.engine(PAGE * 4);
        let model = weights.attach(&engine, "model");
        consumer.use_weight(&model, &weights, 1).unwrap();
        let views =
            (model.view(0, Use::on(consumer.stream())).unwrap(), model.view(2, Use::on(consumer.stream())));
        consumer.check();
        drop(model);
        engine.settle().unwrap();
        assert_eq!(engine.stats().held - engine.stats().free_frames, PAGE * 3, "only the views' pages stay");
        views
    };
    consumer.read_at(view.address(), &weights.contents[0], "a view without a model");
    consumer.read_at(small.as_ref().unwrap().address(), &weights.contents[2], "a small view");
    drop(small);
    consumer.read_at(view.address(), &weights.contents[0], "a view without a model");
    std::thread::spawn(move || drop(view)).join().unwrap();
    if rig.host.is_some() {
        assert_eq!(rig.device.memory().unwrap().free, free, "the engine went with the last view");
    }
}

#[test]
fn views_that_hold_everything_are_an_error_with_its_numbers_soon() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB, 2 * MIB, 2 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 4);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let how = || Use::on(StreamHandle::DEFAULT);
    let mut views: Vec<_> = (0..3).map(|weight| model.view(weight, how()).unwrap()).collect();
    let start = Instant::now();
    let error = model.acquire(3, how()).unwrap_err();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let EngineError::AllPinned { needed, budget, pinned, operations, views: live, waited_s, .. } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((*needed, *budget, *pinned), (PAGE * 2, PAGE * 4, PAGE * 3));
    assert_eq!((*operations, *live), (0, 3));
    assert!((0.5..5.0).contains(waited_s), "{waited_s}");
    assert!(error.is_out_of_memory());
    // What fits beside them goes on, and with one view less everything does.
    consumer.use_weight(&model, &weights, 0).unwrap();
    views.pop();
    consumer.use_weight(&model, &weights, 3).unwrap();
    drop(views);
    (0..4).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    assert_no_pins(&engine, 0);
}

#[test]
fn a_long_operation_is_waited_for_and_not_taken_for_a_view() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let (mut first, mut second) = (rig.consumer(), rig.consumer());
    std::thread::scope(|scope| {
        let (held, holds) = mpsc::channel::<()>();
        let (model, weights) = (&model, &weights);
        scope.spawn(move || {
            let pinned = model.acquire(0, Use::on(first.stream())).unwrap();
            held.send(()).unwrap();
            // Longer than a call waits for views. The operation, not the test, takes this time.
            let (_never, nothing) = mpsc::channel::<()>();
            nothing.recv_timeout(Duration::from_millis(1500)).unwrap_err();
            first.read(model, weights, 0);
            drop(pinned);
        });
        holds.recv().unwrap();
        second.use_weight(model, weights, 1).unwrap();
    });
}

#[test]
fn an_interrupt_ends_the_wait_for_views_and_leaves_no_pin() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let view = model.view(0, Use::on(consumer.stream())).unwrap();
    let asked = AtomicU32::new(0);
    let how = Use { stream: consumer.stream(), interrupted: &|| asked.fetch_add(1, Ordering::Relaxed) == 2 };
    assert!(matches!(model.acquire(1, how), Err(EngineError::Interrupted { .. })));
    assert_eq!(asked.load(Ordering::Relaxed), 3);
    drop(view);
    assert_no_pins(&engine, 0);
    consumer.use_weight(&model, &weights, 1).unwrap();
}

#[test]
fn a_loan_is_waited_for_longer_than_a_view() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    // Of another thread: a demand inside of its own thread's loans would wait for itself.
    let lend = || engine.loans(&[(&model, 0)], Use::on(StreamHandle::DEFAULT)).unwrap();
    let loan = Mutex::new(Some(std::thread::scope(|scope| scope.spawn(lend).join().unwrap())));
    let start = Instant::now();
    let give_back_late = || {
        // A view would have been an error by now.
        if start.elapsed() > Duration::from_millis(1500) {
            drop(loan.lock().unwrap().take());
        }
        false
    };
    let how = Use { stream: consumer.stream(), interrupted: &give_back_late };
    drop(model.acquire(1, how).unwrap());
    consumer.use_weight(&model, &weights, 0).unwrap();
    assert_no_pins(&engine, 0);
}

#[test]
fn a_demand_inside_of_its_threads_own_loan_waits_as_for_a_view() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let loan = engine.loans(&[(&model, 0)], Use::on(StreamHandle::DEFAULT)).unwrap();
    let error = model.acquire(1, Use::on(StreamHandle::DEFAULT)).map(drop).unwrap_err();
    assert!(matches!(error, EngineError::AllPinned { waited_s, .. } if waited_s < 10.0), "{error}");
    drop(loan);
    drop(model.acquire(1, Use::on(StreamHandle::DEFAULT)).unwrap());
}

#[test]
fn an_interrupt_is_heard_while_other_threads_keep_everything_moving() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[4 * MIB, 4 * MIB, 2 * MIB, 2 * MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let view = model.view(0, Use::on(StreamHandle::DEFAULT)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut consumer = rig.consumer();
                for weight in (2..5).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                    consumer.use_weight(&model, &weights, weight).unwrap();
                }
            });
        }
        let start = Instant::now();
        let how = Use { stream: StreamHandle::DEFAULT, interrupted: &|| start.elapsed().as_millis() > 300 };
        let result = model.acquire(1, how);
        stop.store(true, Ordering::Relaxed);
        assert!(matches!(result, Err(EngineError::Interrupted { .. })), "{result:?}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    });
    drop(view);
    assert_no_pins(&engine, 0);
}

#[test]
fn an_interrupt_ends_the_wait_for_a_slow_fill_and_leaves_no_pin() {
    let mut random = Random::seeded();
    let slow = HostConfig { poison: true, copy_delay: Duration::from_millis(60), ..HostConfig::default() };
    let Some(rig) = Rig::host(slow) else { return };
    let weights = Weights::new(&mut random, &[32 * MIB]);
    let engine = rig.engine(PAGE * 16);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let how = Use { stream: consumer.stream(), interrupted: &|| true };
    assert!(matches!(model.acquire(0, how), Err(EngineError::Interrupted { .. })));
    assert_no_pins(&engine, 0);
    consumer.use_weight(&model, &weights, 0).unwrap();
}

#[test]
fn an_operation_that_needs_everything_gets_its_turn_among_small_ones() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[6 * MIB, 2 * MIB, 2 * MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut consumer = rig.consumer();
                for weight in (1..4).cycle().take_while(|_| !stop.load(Ordering::Relaxed)) {
                    consumer.use_weight(&model, &weights, weight).unwrap();
                }
            });
        }
        let mut consumer = rig.consumer();
        let all = (0..5).try_for_each(|_| consumer.use_weight(&model, &weights, 0));
        stop.store(true, Ordering::Relaxed);
        all.unwrap();
    });
}

#[test]
fn small_weights_that_do_not_fit_beside_others_are_refused_with_their_numbers() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[100, 200]);
    let engine = rig.engine(PAGE);
    let first = weights.attach(&engine, "first");
    let start = Instant::now();
    let error = weights.try_attach(&engine, "second").unwrap_err();
    assert!(
        matches!(error, EngineError::TooLarge { needed, budget, reserved, .. } if [needed, budget, reserved] == [PAGE; 3]),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_millis(900), "refused at once: {:?}", start.elapsed());
    let mut consumer = rig.consumer();
    consumer.use_weight(&first, &weights, 1).unwrap();
    // Asked for twice in one operation they count once.
    let twice = engine.acquire(&[(&first, 0), (&first, 1), (&first, 0)], Use::on(consumer.stream())).unwrap();
    drop(twice);
    drop(first);
    let second = weights.attach(&engine, "second");
    consumer.use_weight(&second, &weights, 0).unwrap();
    consumer.check();
}

#[test]
fn a_model_without_weights_is_a_model() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE);
    let model = engine.attach("empty", Vec::new(), LayoutOptions::default()).unwrap();
    assert_eq!(model.stats().bytes, Bytes::ZERO);
    assert_eq!(engine.stats().vbars.len(), 1);
    assert!(matches!(model.acquire(0, Use::on(StreamHandle::DEFAULT)), Err(EngineError::Invalid(_))));
    drop(engine.acquire(&[], Use::on(StreamHandle::DEFAULT)).unwrap());
    let nothing = WeightSpec {
        name: "no bytes".into(),
        source: Source::memory(Arc::new(Vec::new())),
        kind: WeightKind::Whole,
    };
    let model = engine.attach("empty weight", vec![nothing], LayoutOptions::default()).unwrap();
    assert!(model.view(0, Use::on(StreamHandle::DEFAULT)).unwrap().is_empty());
}

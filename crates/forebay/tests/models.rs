//! Several models on one device: who gives memory up, and what detaching does.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use common::faulty::Faulty;
use common::{Consumer, Random, Rig, Weights, assert_no_pins, device, engine_on};
use forebay::device::StreamHandle;
use forebay::policy::{PageIndex, RankOrder, Ranks};
use forebay::{Attachment, Bytes, EngineError, PageState, Use};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

fn pass(consumer: &mut Consumer, model: &Attachment, weights: &Weights) {
    for weight in 0..weights.contents.len() {
        consumer.use_weight(model, weights, weight).unwrap();
    }
}

fn resident(model: &Attachment) -> HashSet<usize> {
    let states = model.page_states();
    states
        .iter()
        .enumerate()
        .filter(|(_, state)| **state == PageState::Resident)
        .map(|(page, _)| page)
        .collect()
}

#[test]
fn a_second_model_takes_memory_from_the_first_and_both_stay_right() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let (a, b) = (Weights::new(&mut random, &[2 * MIB; 10]), Weights::new(&mut random, &[3 * MIB; 6]));
    let engine = rig.engine(PAGE * 12);
    let mut consumer = rig.consumer();
    let first = a.attach(&engine, "first");
    (0..3).for_each(|_| pass(&mut consumer, &first, &a));
    engine.settle().unwrap();
    assert_eq!(resident(&first).len(), 10, "everything fits");
    let second = b.attach(&engine, "second");
    (0..3).for_each(|_| pass(&mut consumer, &second, &b));
    engine.settle().unwrap();
    assert_eq!(resident(&second).len(), 9, "the model in use has its pages");
    assert!(resident(&first).len() <= 3, "the other one gave them up");
    for _turn in 0..4 {
        pass(&mut consumer, &first, &a);
        pass(&mut consumer, &second, &b);
    }
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn two_models_used_from_two_threads_at_once_stay_right() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let sizes = [3 * MIB, 100, 5 * MIB, MIB, 2 * MIB, 4 * MIB];
    let (a, b) = (Weights::new(&mut random, &sizes), Weights::new(&mut random, &sizes));
    let engine = rig.engine(PAGE * 10);
    let (first, second) = (a.attach(&engine, "first"), b.attach(&engine, "second"));
    std::thread::scope(|scope| {
        for (model, weights) in [(&first, &a), (&second, &b)] {
            let rig = &rig;
            scope.spawn(move || {
                let mut consumer = rig.consumer();
                (0..15).for_each(|_| pass(&mut consumer, model, weights));
            });
        }
    });
    assert_no_pins(&engine, 2);
}

#[test]
fn pressure_takes_the_highest_ranks_of_the_lowest_priority() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 8]);
    let engine = rig.engine(PAGE * 16);
    let (a, b) = (weights.attach(&engine, "a"), weights.attach(&engine, "b"));
    let mut consumer = rig.consumer();
    for _ in 0..2 {
        pass(&mut consumer, &a, &weights);
        pass(&mut consumer, &b, &weights);
    }
    engine.settle().unwrap();
    let all: HashSet<usize> = (0..8).collect();
    assert_eq!((resident(&a), resident(&b)), (all.clone(), all.clone()));
    let ranks = Ranks::new(8, &RankOrder::Spread { first: 0, last: 0 });
    let kept = |watermark: u32| -> HashSet<usize> {
        (0..8).filter(|page| ranks.rank(PageIndex(*page)).0 < watermark).map(|page| page as usize).collect()
    };

    b.deprioritize();
    assert_eq!(engine.make_room(PAGE * 3).unwrap(), PAGE * 3);
    assert_eq!((resident(&a), resident(&b)), (all.clone(), kept(5)));
    // What is still there when a model wakes is not read again.
    let before = b.stats().filled_pages;
    pass(&mut consumer, &b, &weights);
    engine.settle().unwrap();
    assert_eq!(b.stats().filled_pages - before, 3);
    // The other one is the lowest now.
    assert_eq!(engine.make_room(PAGE * 8).unwrap(), PAGE * 8);
    let backed = |model: &Attachment| model.page_states().iter().filter(|p| **p != PageState::Absent).count();
    assert_eq!((backed(&a), backed(&b)), (0, 8));
    pass(&mut consumer, &a, &weights);
    consumer.check();
}

#[test]
fn a_model_is_detached_while_another_thread_runs_another() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB, 100, 2 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 8);
    let model = weights.attach(&engine, "stays");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut consumer = rig.consumer();
            while !stop.load(Ordering::Relaxed) {
                pass(&mut consumer, &model, &weights);
            }
        });
        let mut consumer = rig.consumer();
        for _ in 0..40 {
            let other = weights.attach(&engine, "comes and goes");
            consumer.use_weight(&other, &weights, 0).unwrap();
            let pinned = engine.acquire(&[(&other, 3)], Use::on(consumer.stream())).unwrap();
            consumer.read(&other, &weights, 3);
            other.detach();
            drop(pinned);
        }
        consumer.check();
        stop.store(true, Ordering::Relaxed);
    });
    engine.settle().unwrap();
    assert_eq!(engine.stats().vbars.len(), 1, "{}", engine.stats());
    assert_no_pins(&engine, 1);
}

#[test]
fn a_model_detached_under_its_users_is_an_error_for_them_and_nothing_for_others() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB, 100, 2 * MIB, 4 * MIB]);
    let engine = rig.engine(PAGE * 6);
    let other = weights.attach(&engine, "other");
    let mut own = rig.consumer();
    // Kept until the models are gone, as streams have to be.
    let streams: Vec<_> = (0..3).map(|_| rig.stream()).collect();
    for round in 0..12 {
        let model = weights.attach(&engine, "model");
        let used = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for stream in &streams {
                let (model, weights, used, rig) = (&model, &weights, &used, &rig);
                scope.spawn(move || {
                    let mut consumer = Consumer::borrowing(&rig.device, stream.handle());
                    for weight in (0..4).cycle() {
                        match consumer.use_weight(model, weights, weight) {
                            Ok(()) => used.fetch_add(1, Ordering::Relaxed),
                            Err(EngineError::Detached { .. }) => break,
                            Err(error) => panic!("{error}"),
                        };
                    }
                });
            }
            while used.load(Ordering::Relaxed) < round {
                own.use_weight(&other, &weights, 2).unwrap();
            }
            model.detach();
        });
        // What is left to call on it does nothing.
        model.prioritize();
        model.deprioritize();
        model.discard(0).unwrap();
        model.detach();
        assert!(matches!(model.view(0, Use::on(StreamHandle::DEFAULT)), Err(EngineError::Detached { .. })));
        assert!(engine.begin(&[(&model, 1)], StreamHandle::DEFAULT).unwrap().ready().is_none());
        assert!(model.page_states().iter().all(|page| *page == PageState::Absent) || engine.settle().is_ok());
        drop(model);
        pass(&mut own, &other, &weights);
    }
    own.check();
    engine.settle().unwrap();
    assert_eq!(engine.stats().vbars.len(), 1, "{}", engine.stats());
    assert_no_pins(&engine, 1);
}

#[test]
fn a_detached_model_is_not_found_even_while_a_view_keeps_its_page() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB]);
    let engine = rig.engine(PAGE * 2);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    consumer.use_weight(&model, &weights, 0).unwrap();
    consumer.check();
    let view = model.view(0, Use::on(consumer.stream())).unwrap();
    consumer.use_weight(&model, &weights, 0).unwrap();
    model.detach();
    assert!(matches!(consumer.use_weight(&model, &weights, 0), Err(EngineError::Detached { .. })));
    consumer.read_at(view.address(), &weights.contents[0], "the view");
    drop(view);
    engine.settle().unwrap();
    assert!(engine.stats().vbars.is_empty());
}

#[test]
fn a_stream_may_go_when_the_models_that_used_it_are_gone() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 3]);
    let device = Faulty::new(Arc::clone(&rig.device));
    let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 8);
    let gone = {
        let model = weights.attach(&engine, "first");
        let mut consumer = rig.consumer();
        pass(&mut consumer, &model, &weights);
        consumer.check();
        drop(model);
        engine.settle().unwrap();
        consumer.stream()
    };
    device.take_recorded();
    let model = weights.attach(&engine, "second");
    let mut consumer = rig.consumer();
    (0..2).for_each(|_| pass(&mut consumer, &model, &weights));
    consumer.check();
    engine.make_room(Bytes::MAX).unwrap();
    drop(model);
    engine.settle().unwrap();
    let recorded = device.take_recorded();
    assert!(recorded.contains(&consumer.stream()));
    assert!(gone == consumer.stream() || !recorded.contains(&gone), "a destroyed stream was used");
}

#[test]
fn an_engine_that_is_shut_down_gives_back_what_it_can_and_refuses_every_use() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &[2 << 20, 3 << 20, 100]);
    let device = device();
    let engine = engine_on(Arc::clone(&device), Bytes::mib(16));
    let model = weights.attach(&engine, "model");
    let mut consumer = Consumer::new(&device);
    consumer.use_weight(&model, &weights, 0).unwrap();
    let view = model.view(1, Use::on(consumer.stream())).unwrap();
    consumer.check();
    engine.shut_down();
    engine.shut_down();
    let refused = [
        model.acquire(0, Use::on(consumer.stream())).err(),
        weights.try_attach(&engine, "another").err(),
        engine.settle().err(),
    ];
    for error in refused {
        assert!(matches!(error, Some(EngineError::Stopped { .. })), "{error:?}");
    }
    consumer.read_at(view.address(), &weights.contents[1], "a view that outlives its engine's threads");
    consumer.check();
    drop(view);
    drop(model);
}

#[test]
fn a_parked_model_that_comes_again_finds_what_nobody_else_needed() {
    let mut random = Random::seeded();
    let (weights, others) =
        (Weights::in_a_file(&mut random, &[2 * MIB; 8]), Weights::new(&mut random, &[2 * MIB; 4]));
    let device = device();
    let engine = engine_on(Arc::clone(&device), PAGE * 10);
    let mut consumer = Consumer::new(&device);
    let model = weights.attach(&engine, "model");
    pass(&mut consumer, &model, &weights);
    model.park();
    assert!(matches!(model.acquire(0, Use::on(consumer.stream())), Err(EngineError::Detached { .. })));
    let (stats, parked) = (engine.stats(), &engine.stats().vbars[0]);
    assert!(parked.parked && parked.in_state(PageState::Resident) == PAGE * 8, "{stats}");

    // Others take its memory first, and only what they need.
    let other = others.attach(&engine, "other");
    pass(&mut consumer, &other, &others);
    assert_eq!(other.stats().in_state(PageState::Resident), PAGE * 4);
    drop(other);

    let again = weights.attach(&engine, "model");
    assert_eq!(again.stats().filled, Bytes::ZERO);
    pass(&mut consumer, &again, &weights);
    consumer.check();
    assert_eq!(again.stats().filled, PAGE * 2, "two pages were taken meanwhile: {}", engine.stats());
    // The attachment it was before has nothing to do with it any more.
    drop(model);
    pass(&mut consumer, &again, &weights);
    consumer.check();
    again.park();
    drop(again);
    assert_eq!(engine.clear_parked(), 1);
    engine.settle().unwrap();
    assert!(engine.stats().vbars.is_empty(), "{}", engine.stats());
}

#[test]
fn other_bytes_under_the_same_name_are_attached_anew() {
    let mut random = Random::seeded();
    let (first, second) =
        (Weights::in_a_file(&mut random, &[2 * MIB; 3]), Weights::in_a_file(&mut random, &[2 * MIB; 3]));
    let device = device();
    let engine = engine_on(Arc::clone(&device), PAGE * 10);
    let mut consumer = Consumer::new(&device);
    let model = first.attach(&engine, "model");
    pass(&mut consumer, &model, &first);
    model.park();
    let other = second.attach(&engine, "model");
    pass(&mut consumer, &other, &second);
    let again = first.attach(&engine, "model");
    pass(&mut consumer, &again, &first);
    consumer.check();
    assert_eq!((other.stats().filled, again.stats().filled), (PAGE * 3, Bytes::ZERO));
    other.park();
    // What was parked first goes where there are too many.
    for number in 0..9 {
        let name = format!("model {number}");
        let model = first.attach(&engine, &name);
        pass(&mut consumer, &model, &first);
        model.park();
    }
    consumer.check();
    engine.settle().unwrap();
    assert_eq!(engine.stats().vbars.iter().filter(|vbar| vbar.parked).count(), 8);
}

//! Budgets: what they allow is used, what they take leaves, and what others need is theirs.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use common::{Consumer, Random, Rig, Weights, assert_no_pins, try_engine_on};
use forebay::device::host::HostConfig;
use forebay::device::{Frame, StreamHandle};
use forebay::{Attachment, Budget, Bytes, Engine, EngineError, PageState, Use};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

fn pass(consumer: &mut Consumer, model: &Attachment, weights: &Weights) {
    (0..weights.contents.len()).for_each(|weight| consumer.use_weight(model, weights, weight).unwrap());
}

/// Uses a model until something is so.
fn pass_until(
    consumer: &mut Consumer,
    model: &Attachment,
    weights: &Weights,
    mut is_so: impl FnMut() -> bool,
) {
    while !is_so() {
        pass(consumer, model, weights);
    }
    consumer.check();
}

fn is_all_resident(model: &Attachment) -> bool {
    model.page_states().iter().all(|page| *page == PageState::Resident)
}

fn small_host(capacity: Bytes) -> Option<Rig> {
    Rig::host(HostConfig { capacity, poison: true, ..HostConfig::default() })
}

#[test]
fn a_budget_below_a_page_is_refused_by_value() {
    let rig = Rig::new();
    for bytes in [Bytes::ZERO, Bytes::new(1), PAGE - Bytes::new(1)] {
        let error = try_engine_on(rig.device.clone(), Budget::Fixed(bytes)).unwrap_err();
        assert_eq!(error.to_string(), format!("a budget holds at least one page of 2 MiB: {bytes}"));
        let engine = rig.engine(PAGE);
        assert!(matches!(engine.set_budget(Budget::Fixed(bytes)), Err(EngineError::Invalid(_))));
        assert_eq!(engine.budget(), (Budget::Fixed(PAGE), PAGE));
    }
}

#[test]
fn a_budget_grows_and_shrinks_while_weights_are_in_use() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB, 2 * MIB, 5 * MIB, MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 12);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for pages in [12, 4, 9, 3, 5, 12, 3, 20] {
        let pinned = model.acquire(2, Use::on(consumer.stream())).unwrap();
        engine.set_budget(Budget::Fixed(PAGE * pages)).unwrap();
        assert_eq!(engine.budget(), (Budget::Fixed(PAGE * pages), PAGE * pages));
        consumer.read(&model, &weights, 2);
        drop(pinned);
        engine.settle().unwrap();
        assert!(engine.stats().held <= PAGE * pages, "{pages} pages: {}", engine.stats());
        (0..2).for_each(|_| pass(&mut consumer, &model, &weights));
        assert!(engine.stats().held <= PAGE * pages, "{pages} pages: {}", engine.stats());
    }
    consumer.check();
    // Below what is pinned the rest leaves with its pins.
    let view = model.view(2, Use::on(consumer.stream())).unwrap();
    engine.set_budget(Budget::Fixed(PAGE)).unwrap();
    engine.settle().unwrap();
    assert_eq!(engine.stats().held, view.len().max(PAGE * 3));
    assert!(matches!(model.acquire(0, Use::on(StreamHandle::DEFAULT)), Err(EngineError::TooLarge { .. })));
    consumer.read_at(view.address(), &weights.contents[2], "the view");
    drop(view);
    consumer.check();
    engine.settle().unwrap();
    assert!(engine.stats().held <= PAGE);
    engine.set_budget(Budget::Fixed(PAGE * 12)).unwrap();
    pass_until(&mut consumer, &model, &weights, || is_all_resident(&model));
    assert_no_pins(&engine, 0);
}

#[test]
fn room_that_is_made_is_free_on_the_device_and_the_engine_recovers() {
    let mut random = Random::seeded();
    let rig = small_host(PAGE * 14).unwrap_or_else(Rig::new);
    let weights = Weights::new(&mut random, &[2 * MIB; 12]);
    let engine = rig.engine(PAGE * 12);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for _ in 0..2 {
        pass_until(&mut consumer, &model, &weights, || is_all_resident(&model));
        engine.settle().unwrap();
        let before = rig.device.memory().unwrap().free;
        assert_eq!(engine.make_room(PAGE * 5).unwrap(), PAGE * 5);
        if rig.host.is_some() {
            // Long enough for read-ahead to have taken it again.
            let start = std::time::Instant::now();
            while start.elapsed() < std::time::Duration::from_millis(50) {
                assert!(rig.device.memory().unwrap().free >= before.max(PAGE * 5));
            }
        }
        engine.make_room(Bytes::MAX).unwrap();
        assert_eq!(engine.stats().held, Bytes::ZERO);
        // What an operation cannot do without is had at once.
        consumer.use_weight(&model, &weights, 3).unwrap();
    }
}

#[test]
fn room_that_is_made_is_not_taken_again_by_reading_ahead() {
    let mut random = Random::seeded();
    let Some(rig) = small_host(PAGE * 14) else { return };
    let weights = Weights::new(&mut random, &[2 * MIB; 24]);
    let engine = rig.engine(PAGE * 12);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for _ in 0..3 {
        (0..2).for_each(|_| pass(&mut consumer, &model, &weights));
        engine.make_room(PAGE * 8).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_millis(50) {
            assert!(rig.device.memory().unwrap().free >= PAGE * 8);
        }
    }
    pass(&mut consumer, &model, &weights);
}

#[test]
fn a_device_smaller_than_the_budget_is_used_as_far_as_it_goes() {
    let mut random = Random::seeded();
    let Some(rig) = small_host(PAGE * 7) else { return };
    let weights = Weights::new(&mut random, &[3 * MIB, 2 * MIB, 5 * MIB, MIB, 100, 2 * MIB, 4 * MIB]);
    let engine = rig.engine(Bytes::gib(1));
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    (0..6).for_each(|_| pass(&mut consumer, &model, &weights));
    consumer.check();
    assert!(engine.stats().held <= PAGE * 7);
    assert!(engine.stats().held >= PAGE * 6, "{}", engine.stats());
    assert_eq!(engine.budget().0, Budget::Fixed(Bytes::gib(1)));
}

#[test]
fn a_fixed_budget_that_others_made_fall_rises_when_they_go() {
    let mut random = Random::seeded();
    let Some(rig) = small_host(PAGE * 16) else { return };
    let weights = Weights::new(&mut random, &[2 * MIB; 12]);
    let take = |pages: usize| -> Vec<Frame> {
        (0..pages).map(|_| Frame::new(rig.device.clone(), PAGE).unwrap()).collect()
    };
    let engine = rig.engine(PAGE * 12);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for others in [10, 14] {
        let taken = take(others);
        (0..4).for_each(|_| pass(&mut consumer, &model, &weights));
        assert!(engine.stats().held <= PAGE * (16 - others as u64));
        drop(taken);
        pass_until(&mut consumer, &model, &weights, || is_all_resident(&model));
        assert_eq!(engine.budget(), (Budget::Fixed(PAGE * 12), PAGE * 12));
        engine.make_room(Bytes::MAX).unwrap();
    }
    // With nothing left at all an operation is told so, and goes on as soon as there is something.
    let taken = take(16);
    let error = model.acquire(0, Use::on(StreamHandle::DEFAULT)).unwrap_err();
    assert!(matches!(&error, EngineError::TooLarge { budget, .. } if *budget == Bytes::ZERO), "{error}");
    drop(taken);
    pass(&mut consumer, &model, &weights);
}

#[test]
fn headroom_is_kept_free_while_another_application_takes_and_returns_memory() {
    let mut random = Random::seeded();
    let (capacity, headroom) = (Bytes::mib(64), Bytes::mib(8));
    let Some(rig) = small_host(capacity) else { return };
    let weights = Weights::new(&mut random, &[3 * MIB; 14]);
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(headroom)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let free = || rig.device.memory().unwrap().free;
    for _ in 0..2 {
        pass_until(&mut consumer, &model, &weights, || is_all_resident(&model));
        // The application takes what it sees free, and the engine makes way.
        let mut taken: Vec<Frame> = Vec::new();
        pass_until(&mut consumer, &model, &weights, || {
            while free() > Bytes::ZERO && taken.len() < 20 {
                taken.extend(Frame::new(rig.device.clone(), PAGE));
            }
            taken.len() == 20
        });
        pass_until(&mut consumer, &model, &weights, || free() >= headroom);
        assert!(engine.stats().held <= capacity - headroom - PAGE * 20);
        assert!(engine.budget().1 <= capacity - headroom - PAGE * 20);
        drop(taken);
    }
    // More headroom than there is leaves nothing.
    engine.set_budget(Budget::Headroom(Bytes::gib(1))).unwrap();
    engine.settle().unwrap();
    assert_eq!(held(&engine), Bytes::ZERO);
    assert!(matches!(model.acquire(0, Use::on(StreamHandle::DEFAULT)), Err(EngineError::TooLarge { .. })));
    engine.set_budget(Budget::Headroom(headroom)).unwrap();
    pass(&mut consumer, &model, &weights);
}

fn held(engine: &Engine) -> Bytes {
    engine.stats().held
}

//! Room for others: only what is missing leaves, others' memory counts, and what left comes back.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::{Consumer, Random, Rig, Weights, assert_no_pins, try_engine_on};
use forebay::device::Frame;
use forebay::device::host::HostConfig;
use forebay::{Attachment, Budget, Bytes, Engine, EngineError, Leases, PageState, Use};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

/// What one test takes or leaves free of a GPU is not another's.
fn turn() -> MutexGuard<'static, ()> {
    static WHOLE_DEVICE: Mutex<()> = Mutex::new(());
    WHOLE_DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device of 128 MiB; elsewhere the whole GPU, but for what a ballast takes.
fn small_device() -> (Rig, Option<(Frame, MutexGuard<'static, ()>)>) {
    let config = HostConfig { capacity: Bytes::mib(128), poison: true, ..HostConfig::default() };
    match Rig::host(config) {
        Some(rig) => (rig, None),
        None => {
            let turn = turn();
            let rig = Rig::new();
            let free = rig.device.memory().unwrap().free;
            let ballast = free.saturating_sub(Bytes::mib(512));
            let ballast = PAGE * (ballast.get() / PAGE.get());
            let frame = Frame::new(rig.device.clone(), ballast).unwrap();
            (rig, Some((frame, turn)))
        }
    }
}

fn pass(consumer: &mut Consumer, model: &Attachment, weights: &Weights) {
    (0..weights.contents.len()).for_each(|weight| consumer.use_weight(model, weights, weight).unwrap());
}

fn free(rig: &Rig) -> Bytes {
    rig.device.memory().unwrap().free
}

fn resident(model: &Attachment) -> usize {
    model.page_states().iter().filter(|page| **page == PageState::Resident).count()
}

/// Runs until as many pages are resident.
fn pass_until_resident(consumer: &mut Consumer, model: &Attachment, weights: &Weights, pages: usize) {
    let start = Instant::now();
    while resident(model) < pages {
        pass(consumer, model, weights);
        let so_far = || {
            format!(
                "{} of {pages} pages\n{}{:?}",
                resident(model),
                model.engine().stats(),
                model.page_states()
            )
        };
        assert!(start.elapsed() < Duration::from_secs(15), "{}", so_far());
    }
    consumer.check();
}

#[test]
fn only_what_is_missing_leaves_and_comes_back() {
    let mut random = Random::seeded();
    let (rig, _ballast) = small_device();
    let weights = Weights::in_a_file(&mut random, &[2 * MIB; 40]);
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(PAGE)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    pass_until_resident(&mut consumer, &model, &weights, 40);
    let enough = free(&rig).saturating_sub(Bytes::mib(33));
    assert!(!engine.room_for(enough.min(Bytes::mib(4)), Leases::Await).unwrap().given_back);
    assert_eq!(resident(&model), 40);
    for _spike in 0..3 {
        let want = PAGE * (free(&rig).get() / PAGE.get() + 10);
        let room = engine.room_for(want, Leases::Await).unwrap();
        assert_eq!(room.missing, Bytes::ZERO);
        assert!(room.given_back && free(&rig) >= want);
        // Ten pages, and a margin of 16.
        let left = engine.stats().held;
        assert!((PAGE * 13..=PAGE * 30).contains(&left), "{left}");
        // The engine takes none of it before the caller can, though it is used.
        let taken = Frame::new(rig.device.clone(), want).unwrap();
        pass(&mut consumer, &model, &weights);
        assert!(engine.stats().held <= PAGE * 30);
        drop(taken);
        pass_until_resident(&mut consumer, &model, &weights, 40);
    }
    assert_no_pins(&engine, 0);
}

#[test]
fn what_cannot_be_had_is_told_soon() {
    let mut random = Random::seeded();
    let (rig, _ballast) = small_device();
    let weights = Weights::new(&mut random, &[2 * MIB; 4]);
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(PAGE)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let view = model.view(0, Use::on(consumer.stream())).unwrap();
    pass(&mut consumer, &model, &weights);
    let total = rig.device.memory().unwrap().total;
    let start = Instant::now();
    let room = engine.room_for(total, Leases::Await).unwrap();
    assert!(room.missing >= PAGE && room.given_back, "{room:?}");
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(engine.stats().held, PAGE, "only the view's page is left: {}", engine.stats());
    consumer.read_at(view.address(), &weights.contents[0], "the view");
    pass(&mut consumer, &model, &weights);
}

#[test]
fn what_is_being_filled_makes_room_too() {
    let slow = HostConfig { poison: true, copy_delay: Duration::from_millis(5), ..HostConfig::default() };
    let Some(rig) = Rig::host(slow) else { return };
    let weights = Weights::new(&mut Random::seeded(), &[2 * MIB; 24]);
    let engine = try_engine_on(rig.device.clone(), Budget::Fixed(PAGE * 12)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for _ in 0..5 {
        pass(&mut consumer, &model, &weights);
        let freed = engine.make_room(Bytes::MAX).unwrap();
        assert_eq!((engine.stats().held, freed), (Bytes::ZERO, PAGE * 12), "{}", engine.stats());
    }
}

#[test]
fn while_squeezed_an_operation_has_what_it_needs_and_no_more() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let _turn = rig.host.is_none().then(turn);
    let weights = Weights::new(&mut random, &[2 * MIB, 6 * MIB, 4 * MIB, 2 * MIB, 100, 5 * MIB]);
    let engine = rig.engine(PAGE * 30);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    pass(&mut consumer, &model, &weights);
    let outer = engine.squeeze().unwrap();
    let inner = engine.squeeze().unwrap();
    for weight in 0..6 {
        consumer.use_weight(&model, &weights, weight).unwrap();
        assert!(engine.stats().held <= PAGE * 4, "the small weights and the largest: {}", engine.stats());
    }
    // Together they need more than the largest alone, and views stay.
    let view = model.view(2, Use::on(consumer.stream())).unwrap();
    let both = engine.acquire(&[(&model, 1), (&model, 5)], Use::on(consumer.stream())).unwrap();
    consumer.read(&model, &weights, 1);
    consumer.read(&model, &weights, 5);
    drop(both);
    drop(view);
    drop(inner);
    pass(&mut consumer, &model, &weights);
    assert!(engine.stats().held <= PAGE * 10, "{}", engine.stats());
    drop(outer);
    // The small weights' page stays with its pins, counted as streamed.
    pass_until_resident(&mut consumer, &model, &weights, model.page_states().len() - 1);
}

#[test]
fn headroom_is_kept_for_other_processes_which_get_it_while_weights_stream() {
    let mut random = Random::seeded();
    let (rig, _ballast) = small_device();
    let weights = Weights::in_a_file(&mut random, &[2 * MIB; 80]);
    let headroom = PAGE * 8;
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(headroom)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let mut others: Vec<Frame> = Vec::new();
    (0..3).for_each(|_| pass(&mut consumer, &model, &weights));
    for round in 0..12 {
        // At any moment a process that takes no more than the headroom finds it, as by polling it is restored.
        others.push(Frame::new(rig.device.clone(), headroom - PAGE).unwrap());
        let start = Instant::now();
        while free(&rig) < headroom && start.elapsed() < Duration::from_secs(10) {
            pass(&mut consumer, &model, &weights);
        }
        assert!(free(&rig) >= headroom, "round {round}: {} free of {headroom}", free(&rig));
        if others.len() > 3 {
            others.clear();
        }
    }
    // Set at run time: more is free at once, less is used again.
    others.clear();
    engine.set_budget(Budget::Headroom(PAGE * 32)).unwrap();
    engine.settle().unwrap();
    assert!(free(&rig) >= PAGE * 32);
    pass(&mut consumer, &model, &weights);
    assert!(free(&rig) >= PAGE * 32);
    consumer.check();
}

/// Weights of a page each, 24 more than the device has room for.
fn more_than_fits(random: &mut Random, rig: &Rig) -> Weights {
    let count = (free(rig).get() / PAGE.get() + 24) as usize;
    Weights::in_a_file(random, &vec![2 * MIB; count])
}

/// Pages filled in some passes.
fn moved(
    consumer: &mut Consumer,
    engine: &Engine,
    model: &Attachment,
    weights: &Weights,
    passes: u64,
) -> u64 {
    let before = model.stats().filled_pages;
    (0..passes).for_each(|_| pass(consumer, model, weights));
    consumer.check();
    engine.settle().unwrap();
    (model.stats().filled_pages - before).div_ceil(passes)
}

#[test]
fn two_hundred_spikes_leave_residency_and_steps_as_they_were() {
    let mut random = Random::seeded_for(Duration::from_secs(240));
    let (rig, _ballast) = small_device();
    let weights = more_than_fits(&mut random, &rig);
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(PAGE * 2)).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    (0..12).for_each(|_| pass(&mut consumer, &model, &weights));
    let steady = moved(&mut consumer, &engine, &model, &weights, 6);
    let before = resident(&model);
    let mut most = 0;
    for spike in 0..200_u64 {
        let filled = model.stats().filled_pages;
        let size = PAGE * (4 + random.below(30));
        let room = engine.room_for(size, Leases::Await).unwrap();
        assert_eq!(room.missing, Bytes::ZERO, "spike {spike}");
        let taken = Frame::new(rig.device.clone(), size).unwrap();
        if spike % 10 == 0 {
            pass(&mut consumer, &model, &weights);
        }
        drop(taken);
        if spike % 10 == 0 {
            pass(&mut consumer, &model, &weights);
            most = most.max(model.stats().filled_pages - filled);
        }
    }
    // What a spike pushed out is filled again once: two passes stream twice, and refill what left. What was read ahead as
    // memory was taken, a window of 16 pages, may be read again, and so may what was as it came back. On a busy machine what
    // the spike before pushed out, after which there was no pass, comes back only now.
    let bound = 2 * (steady + 34 + 16) + 34 + 2 * 16 + 34 + 16;
    assert!(most <= bound, "{most} pages were filled around a spike, not {bound}");
    pass_until_resident(&mut consumer, &model, &weights, before - 1);
    (0..12).for_each(|_| pass(&mut consumer, &model, &weights));
    let after = moved(&mut consumer, &engine, &model, &weights, 6);
    assert!(resident(&model) + 1 >= before, "{} pages of {before} came back", resident(&model));
    assert!(after <= steady + 1, "a step fills {after} pages, {steady} before the spikes");
}

#[test]
fn a_little_that_stays_free_is_used_after_a_while() {
    let mut random = Random::seeded_for(Duration::from_secs(60));
    let (rig, _ballast) = small_device();
    let weights = more_than_fits(&mut random, &rig);
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(PAGE * 2)).unwrap();
    // Less than a budget follows at once.
    let taken = Frame::new(rig.device.clone(), PAGE).unwrap();
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    (0..12).for_each(|_| pass(&mut consumer, &model, &weights));
    let before = resident(&model);
    drop(taken);
    pass_until_resident(&mut consumer, &model, &weights, before + 1);
}

#[test]
fn a_ballast_is_others_memory() {
    let (rig, _ballast) = small_device();
    let engine = try_engine_on(rig.device.clone(), Budget::Headroom(PAGE)).unwrap();
    let before = free(&rig);
    let ballast = engine.ballast(PAGE + Bytes::new(1)).unwrap();
    assert_eq!(ballast.size(), PAGE * 2);
    assert!(free(&rig) <= before - PAGE * 2);
    assert!(engine.ballast(before).is_err_and(|error| error.is_out_of_memory()));
    assert!(matches!(engine.ballast(Bytes::ZERO), Err(EngineError::Invalid(_))));
}

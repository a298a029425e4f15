//! A device that fails at any call, once or for good: an error or a right result, never a hang or a wrong byte.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use common::faulty::{Call, Failure, Faulty, Live};
use common::gate::Gate;
use common::on_device::{Given, OnDevice};
use common::{Consumer, Random, Rig, Weights, try_engine_on};
use forebay::device::host::HostConfig;
use forebay::device::{Device, Element, Factors, Rounding, StreamHandle};
use forebay::{Budget, Bytes, Compute, Engine, EngineError, Patch, Product, Result, Use};

const PAGE: Bytes = Bytes::mib(2);

/// Weights of one and two pages, and a small one. Few bytes, so that many runs take little time.
const SIZES: [usize; 5] = [100_000, 3 << 20, 100, 70_000, 2 << 20];

/// The weight that is patched, of float32 in 250 rows.
const PATCHED: usize = 0;
const COLUMNS: u32 = 100;

/// A patch that makes a weight of other numbers and adds 1.5 to them, and what that gives.
fn patch(device: &Arc<dyn Device>) -> (Patch, Arc<Vec<u8>>) {
    let mut random = Random::from_seed(5);
    let numbers: Vec<f32> =
        (0..SIZES[PATCHED] / 4).map(|_| random.below(1 << 20) as f32 / 4096.0 - 100.0).collect();
    let of = |numbers: &[f32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
    let ones = OnDevice::new(device, &of(&[1.0; SIZES[PATCHED] / 4]));
    let scale = OnDevice::new(device, &of(&[1.5]));
    let factors = Factors {
        up: ones.addr,
        down: ones.addr,
        scale: scale.addr,
        element: Element::F32,
        rank: 1,
        columns: COLUMNS,
        row_base: 0,
        rounding: Rounding::Once,
    };
    let product = Product { rows: 0..(SIZES[PATCHED] / 4) as u32 / COLUMNS, factors };
    let computed: Arc<dyn Compute> = Arc::new(Given(Arc::new(OnDevice::new(device, &of(&numbers)))));
    let keep = Arc::new((ones, scale));
    let patch = Patch {
        element: Element::F32,
        computed: Some(computed),
        products: vec![product],
        rounding: None,
        keep,
    };
    (patch, Arc::new(of(&numbers.iter().map(|number| number + 1.5).collect::<Vec<_>>())))
}

/// Uses an engine in every way there is. Goes on after an error, and returns them all.
fn use_everything(
    engine: &Arc<Engine>,
    device: &Arc<dyn Device>,
    weights: &Weights,
    consumer: &mut Consumer,
) -> Vec<EngineError> {
    let mut errors = Vec::new();
    let mut note = |result: Result<()>| errors.extend(result.err());
    match weights.try_attach(engine, "model") {
        Err(error) => note(Err(error)),
        Ok(model) => {
            for _pass in 0..2 {
                (0..SIZES.len()).for_each(|weight| note(consumer.use_weight(&model, weights, weight)));
            }
            let view = model.view(1, Use::on(consumer.stream()));
            note(consumer.use_weight(&model, weights, 0));
            match &view {
                Ok(view) => consumer.read_at(view.address(), &weights.contents[1], "a view"),
                Err(error) => note(Err(error.clone())),
            }
            drop(view);
            note(engine.make_room(PAGE).map(drop));
            note(engine.set_budget(Budget::Fixed(PAGE * 7)));
            let other = weights.try_attach(engine, "other");
            note(other.and_then(|other| consumer.use_weight(&other, weights, 4)));
            note(consumer.use_weight(&model, weights, 4));
            let (patch, patched) = patch(device);
            let change = model.change_patches(vec![(PATCHED, Some(patch))], Use::on(consumer.stream()));
            match change.and_then(|()| model.acquire(PATCHED, Use::on(consumer.stream()))) {
                Ok(pinned) => {
                    consumer.read_at(model.address(PATCHED).unwrap(), &patched, "a patched weight");
                    drop(pinned);
                }
                Err(error) => note(Err(error)),
            }
        }
    }
    note(engine.settle());
    consumer.check();
    errors
}

fn is_clear(error: &EngineError) -> bool {
    match error {
        EngineError::Device(error) => error.to_string().contains("injected"),
        EngineError::TooLarge { .. } | EngineError::AllPinned { .. } => true,
        EngineError::Stopped { .. } => panic!("a thread of the engine ended: {error}"),
        _ => false,
    }
}

/// One run with one failure. Returns how many calls were failed.
fn run(rig: &Rig, weights: &Weights, call: Call, failure: Failure, pass: u32, fail: u32) -> u32 {
    let what = format!("{failure:?} at {call:?} {pass}, {fail} times");
    let device = Faulty::new(Arc::clone(&rig.device));
    let mut consumer = rig.consumer();
    device.fail(call, failure, pass, fail);
    let engine = match try_engine_on(Arc::clone(&device) as _, Budget::Fixed(PAGE * 5)) {
        Ok(engine) => engine,
        Err(error) => {
            assert!(is_clear(&error), "{what}: {error}");
            return device.hits();
        }
    };
    let errors = use_everything(&engine, &rig.device, weights, &mut consumer);
    if let Some(error) = errors.iter().find(|error| !is_clear(error)) {
        panic!("{what}: {error}");
    }
    let hits = device.hits();
    if failure == Failure::Lost {
        return hits;
    }
    // The failure is over: everything works again, or the engine says that it has stopped.
    device.fail(call, failure, 0, 0);
    let stopped = engine.settle();
    let errors = use_everything(&engine, &rig.device, weights, &mut consumer);
    match (stopped, errors.first()) {
        (Ok(()), Some(error)) => panic!("{what}: still {error}\n{}", engine.stats()),
        (Err(_), None) => panic!("{what}: stopped, and goes on"),
        (Err(why), _) => {
            assert!(is_clear(&why), "{what}: {why}");
            // Not for what can be done without, or again.
            let must = fail > 1 || matches!(call, Call::Unmap | Call::IsComplete);
            assert!(must, "{what} stopped the engine: {why}");
            return hits;
        }
        (Ok(()), None) => {}
    }
    drop(engine);
    // What a copy may still read is never given back where nobody can know when the copy ends.
    let kept = |left: Live| match call {
        Call::Record => Live { frames: 0, reservations: 0, ..left },
        _ => Live::default(),
    };
    // The thread that has applications compute weights is not waited for, and ends a little later.
    let end = Instant::now() + Duration::from_secs(10);
    while device.live() != kept(device.live()) && Instant::now() < end {
        std::thread::yield_now();
    }
    let left = device.live();
    assert_eq!(left, kept(left), "{what}: it left something behind");
    hits
}

fn fails_everywhere(failure: Failure, times: u32) {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let all = std::env::var_os("FOREBAY_FAULTS_ALL").is_some();
    for call in Call::ALL {
        // The first two, and of the others every ninth, at random.
        for pass in (0..20).filter(|pass| all || *pass < 2 || random.below(9) == 0).collect::<Vec<_>>() {
            let config = HostConfig { capacity: Bytes::mib(64), ..HostConfig::default() };
            let rig = Rig::host(config).unwrap_or_else(Rig::new);
            if run(&rig, &weights, call, failure, pass, times) == 0 {
                break;
            }
        }
    }
}

#[test]
fn any_call_may_find_no_memory() {
    fails_everywhere(Failure::OutOfMemory, 1);
}

#[test]
fn any_call_may_find_the_driver_not_ready() {
    fails_everywhere(Failure::NotReady, 1);
}

#[test]
fn any_call_may_be_refused() {
    fails_everywhere(Failure::Refused, 1);
}

#[test]
fn any_call_may_find_the_device_lost() {
    fails_everywhere(Failure::Lost, 1);
}

#[test]
fn every_piece_of_work_on_a_page_may_be_refused() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    // Getting ready, the copy of what was computed, the product.
    for pass in 0..3 {
        let config = HostConfig { capacity: Bytes::mib(64), ..HostConfig::default() };
        let rig = Rig::host(config).unwrap_or_else(Rig::new);
        assert_eq!(run(&rig, &weights, Call::Transform, Failure::Refused, pass, 1), 1, "{pass}");
    }
}

#[test]
fn a_page_that_cannot_be_completed_stays_mapped_under_its_copies() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES[..=PATCHED]);
    let copy_delay = Duration::from_millis(10);
    for call in [Call::CreateEvent, Call::Record, Call::Wait] {
        for pass in 0.. {
            let rig = Rig::host(HostConfig { copy_delay, ..HostConfig::default() }).unwrap_or_else(Rig::new);
            let mut consumer = rig.consumer();
            let device = Faulty::new(Arc::clone(&rig.device));
            let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 5);
            let model = weights.attach(&engine, "model");
            let how = Use::on(consumer.stream());
            let (patch, patched) = patch(&rig.device);
            model.change_patches(vec![(PATCHED, Some(patch))], how).unwrap();
            device.fail(call, Failure::Refused, pass, 1);
            match model.acquire(PATCHED, how) {
                Ok(pinned) => {
                    consumer.read_at(model.address(PATCHED).unwrap(), &patched, "a patched weight");
                    drop(pinned);
                }
                Err(error) => assert!(is_clear(&error), "{call:?} {pass}: {error}"),
            }
            engine.settle().unwrap();
            consumer.check();
            if device.hits() == 0 {
                break;
            }
        }
    }
}

#[test]
fn any_call_may_be_refused_several_times() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    for (call, failure) in Call::ALL
        .iter()
        .flat_map(|&call| [Failure::Refused, Failure::NotReady].map(|failure| (call, failure)))
    {
        for _ in 0..2 {
            let config = HostConfig { capacity: Bytes::mib(64), ..HostConfig::default() };
            let rig = Rig::host(config).unwrap_or_else(Rig::new);
            run(&rig, &weights, call, failure, random.below(20) as u32, 4);
        }
    }
}

#[test]
fn a_driver_that_cannot_mark_a_stream_does_not_take_its_pages() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 << 20; 3]);
    for times in [1, 2, 3] {
        let device = Faulty::new(Arc::clone(&rig.device));
        let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 3);
        let model = weights.attach(&engine, "model");
        let mut slow = rig.consumer();
        for _ in 0..2 {
            (0..3).for_each(|weight| slow.use_weight(&model, &weights, weight).unwrap());
            slow.check();
        }
        let gate = Gate::close(&rig, slow.stream());
        (0..3).for_each(|weight| slow.use_weight(&model, &weights, weight).unwrap());
        device.fail(Call::Record, Failure::Refused, 0, times);
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let engine = &engine;
            scope.spawn(move || done.send(engine.make_room(Bytes::MAX)).unwrap());
            let early = is_done.recv_timeout(Duration::from_millis(100));
            if rig.host.is_some() {
                // It waits for the stream, or says that it cannot go on.
                assert!(matches!(early, Err(RecvTimeoutError::Timeout) | Ok(Err(_))), "{times}: {early:?}");
            }
            gate.open();
        });
        slow.check();
        assert!(device.hits() > 0);
    }
}

#[test]
fn a_model_detached_after_a_failed_map_goes_though_its_page_still_waits_in_the_queue() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 << 20; 2]);
    // Of one page, so that nothing is read ahead for it.
    let one = Weights::new(&mut random, &[2 << 20]);
    let device = Faulty::new(Arc::clone(&rig.device));
    let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 4);
    let stays = weights.attach(&engine, "stays");
    let mut slow = rig.consumer();
    for _ in 0..2 {
        (0..2).for_each(|weight| slow.use_weight(&stays, &weights, weight).unwrap());
    }
    slow.check();
    let gate = Gate::close(&rig, slow.stream());
    slow.use_weight(&stays, &weights, 0).unwrap();
    let let_go = device.fail_later(Call::Map, Failure::Refused);
    std::thread::scope(|scope| {
        let goes = scope.spawn(|| {
            let goes = one.attach(&engine, "goes");
            goes.acquire(0, Use::on(StreamHandle::DEFAULT)).map(drop)
        });
        wait_for(|| device.hits() == 1);
        // Its page leaves behind the stream, and what the failed map leaves comes behind that.
        stays.discard(0).unwrap();
        drop(let_go);
        assert!(matches!(goes.join().unwrap(), Err(EngineError::Device(_))));
    });
    gate.open();
    slow.check();
    engine.settle().unwrap();
    assert_eq!(engine.stats().vbars.len(), 1, "{}", engine.stats());
    (0..2).for_each(|weight| slow.use_weight(&stays, &weights, weight).unwrap());
}

#[test]
fn a_model_detached_while_a_frame_for_it_cannot_be_made_goes() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 << 20; 2]);
    for failure in [Failure::OutOfMemory, Failure::Refused] {
        let device = Faulty::new(Arc::clone(&rig.device));
        let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 4);
        let model = weights.attach(&engine, "model");
        let let_go = device.fail_later(Call::CreateFrame, failure);
        std::thread::scope(|scope| {
            let user = scope.spawn(|| model.acquire(0, Use::on(StreamHandle::DEFAULT)).map(drop));
            wait_for(|| device.hits() == 1);
            model.detach();
            drop(let_go);
            let error = user.join().unwrap().unwrap_err();
            assert!(matches!(error, EngineError::Detached { .. } | EngineError::Device(_)), "{error}");
        });
        engine.settle().unwrap();
        assert!(engine.stats().vbars.is_empty(), "{}", engine.stats());
    }
}

#[test]
fn maps_that_fail_while_models_come_and_go_leave_nothing() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 << 20; 3]);
    let other = Weights::new(&mut random, &[2 << 20; 2]);
    let device = Faulty::new(Arc::clone(&rig.device));
    let engine = common::engine_on(Arc::clone(&device) as _, PAGE * 4);
    let stays = other.attach(&engine, "stays");
    let mut consumer = rig.consumer();
    for round in 0..60 {
        let failure = [Failure::Refused, Failure::OutOfMemory][round % 2];
        let call = [Call::Map, Call::CreateFrame, Call::AllowAccess][round % 3];
        device.fail(call, failure, (round % 4) as u32, 1 + (round % 2) as u32);
        let model = weights.attach(&engine, "goes");
        (0..3).for_each(|weight| drop(consumer.use_weight(&model, &weights, weight)));
        drop(model);
        device.fail(call, failure, 0, 0);
        (0..2).for_each(|weight| consumer.use_weight(&stays, &other, weight).unwrap());
    }
    consumer.check();
    engine.settle().unwrap();
    assert_eq!(engine.stats().vbars.len(), 1, "{}", engine.stats());
}

/// Waits for something that another thread does at once.
fn wait_for(is_so: impl Fn() -> bool) {
    while !is_so() {
        std::thread::yield_now();
    }
}

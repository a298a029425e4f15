//! Streamed pages whose bytes lie in files are read by the copy engine itself, from the registered page cache.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::io::{Seek, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::faulty::{Call, Failure, Faulty};
use common::{Consumer, Random, Rig, Weights};
use forebay::device::Device;
use forebay::{Activity, Attachment, Budget, Bytes, Engine, EngineConfig, EngineError, Moment, Use};

/// Two thirds of these lie in a file.
const SIZES: [usize; 12] = [2 << 20; 12];

fn pass(model: &Attachment, weights: &Weights, device: &Arc<dyn Device>) {
    let mut consumer = Consumer::new(device);
    for weight in 0..weights.contents.len() {
        consumer.use_weight(model, weights, weight).unwrap();
    }
    consumer.check();
}

/// Passes until `enough` of what the engine tells.
fn passes_until(
    engine: &Engine,
    model: &Attachment,
    weights: &Weights,
    device: &Arc<dyn Device>,
    enough: impl Fn(Bytes) -> bool,
) {
    let start = Instant::now();
    loop {
        pass(model, weights, device);
        if enough(engine.stats().registered) {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "{}", engine.stats());
        std::thread::yield_now();
    }
}

fn engine(device: &Arc<dyn Device>, registered: Option<Bytes>) -> Arc<Engine> {
    let config = EngineConfig {
        budget: Budget::Fixed(Bytes::mib(10)),
        ring: common::readers(2),
        registered,
        page_cache: None,
    };
    Engine::new(Arc::clone(device), config).unwrap()
}

/// A model of which more than half is streamed.
struct Setting {
    weights: Weights,
    device: Arc<dyn Device>,
    engine: Arc<Engine>,
    model: Attachment,
}

impl Setting {
    fn new(registered: Option<Bytes>) -> Self {
        let weights = Weights::new(&mut Random::seeded(), &SIZES);
        let device = Rig::new().device;
        let engine = engine(&device, registered);
        let model = weights.attach(&engine, "model");
        Setting { weights, device, engine, model }
    }
}

#[test]
fn after_the_first_pass_the_copy_engine_reads_files_by_itself_also_when_the_model_comes_again() {
    let Setting { weights, device, engine, model } = Setting::new(None);
    pass(&model, &weights, &device);
    assert_eq!(model.stats().direct, Bytes::ZERO, "the first pass waits for nothing");
    passes_until(&engine, &model, &weights, &device, |registered| registered >= Bytes::mib(8));
    let before = model.stats();
    pass(&model, &weights, &device);
    let after = model.stats();
    let (direct, filled) = (after.direct - before.direct, after.filled - before.filled);
    assert!(direct > Bytes::ZERO && direct < filled, "{direct} of {filled}: some weights lie in memory");
    drop(model);
    let again = weights.attach(&engine, "again");
    pass(&again, &weights, &device);
    assert!(again.stats().direct > Bytes::ZERO, "what is registered was kept");
    drop(again);
    engine.set_registered(Some(Bytes::ZERO));
    let start = Instant::now();
    while engine.stats().registered > Bytes::ZERO {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", engine.stats());
        std::thread::yield_now();
    }
}

#[test]
fn what_cannot_be_waited_for_at_once_is_given_back_later() {
    for call in [Call::Record, Call::Synchronize] {
        let weights = Weights::new(&mut Random::seeded(), &SIZES);
        let inner = Rig::new().device;
        let faulty = Faulty::new(Arc::clone(&inner));
        let device: Arc<dyn Device> = Arc::<Faulty>::clone(&faulty);
        let engine = engine(&device, None);
        let model = weights.attach(&engine, "model");
        passes_until(&engine, &model, &weights, &inner, |registered| registered >= Bytes::mib(8));
        engine.settle().unwrap();
        faulty.fail(call, Failure::NotReady, 0, 4);
        engine.set_registered(Some(Bytes::ZERO));
        let start = Instant::now();
        while faulty.live().registered > 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "{call:?}: {:?}", faulty.live());
            std::thread::yield_now();
        }
        assert_eq!(faulty.hits(), 4, "{call:?}");
    }
}

#[test]
fn whoever_calls_the_driver_meanwhile_gets_two_thirds_of_the_time() {
    let Setting { weights, device, engine, model } = Setting::new(None);
    pass(&model, &weights, &device);
    for _ in 0..5 {
        engine.set_registered(Some(Bytes::ZERO));
        passes_until(&engine, &model, &weights, &device, |registered| registered == Bytes::ZERO);
        engine.start_recording();
        engine.set_registered(None);
        passes_until(&engine, &model, &weights, &device, |registered| registered >= Bytes::mib(8));
        let moments = engine.stop_recording();
        let made: Vec<_> = moments.iter().filter(|moment| moment.activity == Activity::Register).collect();
        assert!(made.len() > 1, "{made:?}");
        for (one, next) in made.iter().zip(&made[1..]) {
            let rest = next.start.saturating_sub(one.start + one.length);
            assert!(rest >= one.length * 2, "{one:?}, {next:?}");
        }
    }
}

#[test]
fn a_moment_in_which_nothing_is_used_is_not_taken_for_quiet() {
    let quiet = Duration::from_millis(50);
    let (mut made, mut hasty) = (0, 0);
    for _ in 0..4 {
        let Setting { weights, device, engine, model } = Setting::new(None);
        engine.start_recording();
        // Once each, which is not so often that it would pay without any quiet.
        let mut consumer = Consumer::new(&device);
        for (half, pause_ms) in [(0..SIZES.len() / 2, 5), (SIZES.len() / 2..SIZES.len(), 150)] {
            half.for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
        consumer.check();
        let moments = engine.stop_recording();
        let of = |activity| moments.iter().filter(move |moment| moment.activity == activity);
        made += of(Activity::Register).count();
        // A use may begin between the look at what goes on and the registering.
        let before =
            |moment: &Moment| moment.start.saturating_sub(quiet)..moment.start.saturating_sub(quiet / 2);
        hasty += of(Activity::Register)
            .filter(|made| of(Activity::Map).any(|map| before(made).contains(&map.start)))
            .count();
    }
    assert!(made > 4 && hasty * 4 <= made, "{hasty} of {made}");
}

#[test]
fn nothing_is_registered_before_a_first_pass_is_over() {
    let Setting { weights, device, engine, model } = Setting::new(None);
    let mut consumer = Consumer::new(&device);
    (0..SIZES.len() - 1).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(engine.stats().registered, Bytes::ZERO, "loading of kernels takes longer than a quiet moment");
    consumer.use_weight(&model, &weights, SIZES.len() - 1).unwrap();
    consumer.check();
    passes_until(&engine, &model, &weights, &device, |registered| registered >= Bytes::mib(6));
}

#[test]
fn where_nothing_is_ever_quiet_pages_are_registered_all_the_same() {
    let Setting { weights, device, engine, model } = Setting::new(None);
    let running = engine.operation();
    passes_until(&engine, &model, &weights, &device, |registered| registered >= Bytes::mib(6));
    pass(&model, &weights, &device);
    assert!(model.stats().direct > Bytes::ZERO, "{}", engine.stats());
    drop(running);
}

#[test]
fn a_model_that_ran_twice_does_not_keep_the_next_one_from_being_registered() {
    let mut random = Random::seeded();
    let [few, many] = [(); 2].map(|()| Weights::new(&mut random, &SIZES));
    let device = Rig::new().device;
    let engine = engine(&device, None);
    let running = engine.operation();
    let first = few.attach(&engine, "runs twice");
    pass(&first, &few, &device);
    pass(&first, &few, &device);
    let second = many.attach(&engine, "runs on");
    passes_until(&engine, &second, &many, &device, |registered| registered >= Bytes::mib(6));
    pass(&second, &many, &device);
    assert!(second.stats().direct > Bytes::ZERO, "{}", engine.stats());
    drop(running);
}

#[test]
fn a_limit_is_kept_and_what_is_over_it_is_handed_back() {
    let limit = Bytes::mib(4) + Bytes::kib(64);
    let Setting { weights, device, engine, model } = Setting::new(Some(limit));
    passes_until(&engine, &model, &weights, &device, |registered| registered > Bytes::ZERO);
    for _ in 0..10 {
        pass(&model, &weights, &device);
        assert!(engine.stats().registered <= limit, "{}", engine.stats());
    }
    engine.set_registered(Some(Bytes::ZERO));
    passes_until(&engine, &model, &weights, &device, |registered| registered == Bytes::ZERO);
    let direct = model.stats().direct;
    pass(&model, &weights, &device);
    assert_eq!(model.stats().direct, direct);
    engine.set_registered(None);
    passes_until(&engine, &model, &weights, &device, |registered| registered > Bytes::ZERO);
}

#[test]
fn a_file_changed_in_place_is_an_error_by_name_also_where_it_is_registered() {
    let Setting { mut weights, device, engine, model } = Setting::new(None);
    passes_until(&engine, &model, &weights, &device, |registered| registered >= Bytes::mib(8));
    weights.file.rewind().unwrap();
    weights.file.write_all(b"other bytes").unwrap();
    let stream = forebay::device::Stream::new(Arc::clone(&device)).unwrap();
    let errors: Vec<_> =
        (0..SIZES.len()).filter_map(|weight| model.acquire(weight, Use::on(stream.handle())).err()).collect();
    assert!(!errors.is_empty());
    for error in &errors {
        assert!(matches!(error, EngineError::Source { .. }), "{error}");
        assert!(error.to_string().contains(&weights.file.path().display().to_string()), "{error}");
    }
}

#[test]
fn a_device_that_refuses_to_register_gets_its_pages_through_the_ring() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let faulty = Faulty::new(Rig::new().device);
    faulty.fail(Call::RegisterHost, Failure::Refused, 0, u32::MAX);
    let device: Arc<dyn Device> = faulty.clone();
    let engine = engine(&device, None);
    let model = weights.attach(&engine, "model");
    for _ in 0..5 {
        pass(&model, &weights, &device);
    }
    let start = Instant::now();
    while faulty.hits() < 3 {
        assert!(start.elapsed() < Duration::from_secs(20), "asked {} times", faulty.hits());
        pass(&model, &weights, &device);
    }
    for _ in 0..5 {
        pass(&model, &weights, &device);
    }
    assert_eq!((faulty.hits(), model.stats().direct), (3, Bytes::ZERO));
}

#[test]
fn what_stays_is_registered_too_when_another_model_takes_its_place_again_and_again() {
    let mut random = Random::seeded();
    let device = Rig::new().device;
    // Room for either, with some of the other.
    let config = EngineConfig {
        budget: Budget::Fixed(Bytes::mib(32)),
        ring: common::readers(2),
        registered: None,
        page_cache: None,
    };
    let engine = Engine::new(Arc::clone(&device), config).unwrap();
    let weights = [Weights::new(&mut random, &SIZES), Weights::new(&mut random, &SIZES)];
    let models = ["first", "second"].map(|name| weights[usize::from(name == "second")].attach(&engine, name));
    let round = || {
        for (model, weights) in models.iter().zip(&weights) {
            (0..3).for_each(|_| pass(model, weights, &device));
            engine.settle().unwrap();
        }
    };
    round();
    // What the keeper has to do it does when nothing goes on.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(engine.stats().registered, Bytes::ZERO, "{}", engine.stats());
    let start = Instant::now();
    while engine.stats().registered == Bytes::ZERO {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", engine.stats());
        round();
    }
    round();
    assert!(models.iter().any(|model| model.stats().direct > Bytes::ZERO), "{}", engine.stats());
}

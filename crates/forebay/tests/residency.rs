//! Weights are right at every budget, in any order, from several streams and threads.

mod common;

use std::sync::Arc;

use common::{Consumer, Random, Weights, device, engine_on};
use forebay::device::PinnedBuffer;
use forebay::{Bytes, EngineError, LayoutOptions, PageState, Use};

const SIZES: [usize; 9] =
    [3 << 20, 100, 2 << 20, (5 << 20) + 777, 1 << 20, 70_000, 4096, (2 << 20) - 512, 6 << 20];

#[test]
fn passes_are_right_from_everything_fits_down_to_one_operation() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let device = device();
    for pages in (5..=14).rev() {
        let engine = engine_on(Arc::clone(&device), Bytes::mib(2) * pages);
        let model = weights.attach(&engine, "model");
        let mut consumer = Consumer::new(&device);
        for _pass in 0..4 {
            for weight in 0..SIZES.len() {
                consumer.use_weight(&model, &weights, weight).unwrap();
                assert!(engine.stats().held <= Bytes::mib(2) * pages);
            }
        }
        consumer.check();
    }
}

#[test]
fn one_frame_less_than_an_operation_needs_is_an_error_with_its_numbers() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &[2 << 20, 6 << 20, 100]);
    let engine = common::engine(Bytes::mib(6));
    let model = weights.attach(&engine, "model");
    let error = model.acquire(1, Use::on(forebay::device::StreamHandle::DEFAULT)).unwrap_err();
    assert!(matches!(
        error,
        EngineError::TooLarge { needed, budget, reserved, .. }
            if (needed, budget, reserved) == (Bytes::mib(6), Bytes::mib(6), Bytes::mib(2))
    ));
    assert!(error.to_string().contains("needs 6 MiB of weights at once, the budget is 6 MiB"), "{error}");
    assert!(error.to_string().ends_with("by 2 MiB"), "{error}");
    drop(model.acquire(0, Use::on(forebay::device::StreamHandle::DEFAULT)).unwrap());
}

#[test]
fn any_order_from_several_threads_and_streams_is_right() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let device = device();
    let engine = engine_on(Arc::clone(&device), Bytes::mib(16));
    let model = weights.attach(&engine, "model");
    let seeds: Vec<u64> = (0..4).map(|_| random.next()).collect();
    std::thread::scope(|scope| {
        for seed in seeds {
            let (model, weights, device, engine) = (&model, &weights, &device, &engine);
            scope.spawn(move || {
                let mut random = common::Random::from_seed(seed);
                let mut consumer = Consumer::new(device);
                for _ in 0..150 {
                    let weight = random.below(SIZES.len() as u64) as usize;
                    consumer.use_weight(model, weights, weight).unwrap();
                    match random.below(20) {
                        0 => drop(engine.make_room(Bytes::mib(random.below(16))).unwrap()),
                        1 => engine
                            .set_budget(forebay::Budget::Fixed(Bytes::mib(14 + random.below(20))))
                            .unwrap(),
                        _ => {}
                    }
                }
            });
        }
    });
}

#[test]
fn weights_that_are_to_be_whole_are_resident_with_all_of_their_pages() {
    const COUNT: usize = 24;
    let mut random = Random::seeded();
    // Three pages and a bit, so that neighbours share pages.
    let weights = Weights::new(&mut random, &[(6 << 20) + 4096; COUNT]);
    let device = device();
    let resident = |whole: bool| {
        let engine = engine_on(Arc::clone(&device), Bytes::mib(100));
        let options = LayoutOptions { page_size: Some(Bytes::mib(2)), whole, ..LayoutOptions::default() };
        let model = engine.attach("model", weights.specs.clone(), options).unwrap();
        let mut consumer = Consumer::new(&device);
        for _pass in 0..4 {
            for weight in 0..COUNT {
                consumer.use_weight(&model, &weights, weight).unwrap();
            }
        }
        consumer.check();
        let kept = model.page_states().iter().filter(|&&page| page == PageState::Resident).count();
        ((0..COUNT).filter(|&weight| model.is_resident(weight).unwrap()).count(), kept)
    };
    let ((whole, kept), (spread, _)) = (resident(true), resident(false));
    assert!(whole * 4 >= kept - 8, "{whole} weights in {kept} resident pages");
    assert!(whole > spread, "{whole}, and {spread} where single pages are spread");
}

#[test]
fn serials_tell_what_holds_what_was_written_and_refilling_gives_back_what_is_stored() {
    let mut random = Random::seeded();
    let weights = Weights::in_a_file(&mut random, &[(3 << 20) + 512, 5 << 20, 2 << 20]);
    let device = device();
    let engine = engine_on(Arc::clone(&device), Bytes::mib(64));
    let model = weights.attach(&engine, "model");
    let mut consumer = Consumer::new(&device);
    let how = Use::on(consumer.stream());
    let written = Arc::new(random.bytes(5 << 20));
    let source = PinnedBuffer::new(Arc::clone(&device), Bytes::mib(5)).unwrap();
    // SAFETY: the buffer is new.
    unsafe { source.slice_mut(Bytes::ZERO, Bytes::mib(5)) }.copy_from_slice(&written);
    let pinned = model.acquire(1, how).unwrap();
    let (before, at) = (model.serials(1).unwrap(), model.address(1).unwrap());
    assert_eq!(before.len(), 4);
    // SAFETY: the weight is pinned, the buffer lives until the reads were checked, and nobody else uses either.
    unsafe { device.copy_to_device(at, source.as_ptr(), Bytes::mib(5), how.stream) }.unwrap();
    drop(pinned);
    for _ in 0..3 {
        let pinned = model.acquire(1, how).unwrap();
        consumer.read_at(at, &written, "what was written");
        drop(pinned);
        consumer.use_weight(&model, &weights, 0).unwrap();
        consumer.check();
        assert!(model.is_resident(1).unwrap());
        assert_eq!(model.serials(1).unwrap(), before);
    }
    model.refill(&[1], how).unwrap();
    for weight in [1, 0, 2] {
        consumer.use_weight(&model, &weights, weight).unwrap();
    }
    consumer.check();
    assert!(model.serials(1).unwrap().iter().all(|serial| !before.contains(serial)));
    let error = model.refill(&[3], how).unwrap_err();
    assert!(matches!(error, EngineError::Invalid(_)), "{error}");
}

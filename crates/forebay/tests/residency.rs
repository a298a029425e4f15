//! Weights are right at every budget, in any order, from several streams and threads.

mod common;

use std::sync::Arc;

use common::{Consumer, Random, Weights, device, engine_on};
use forebay::{Bytes, EngineError, Use};

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

//! Work in streams sees the right bytes: pages are unmapped behind it, filled before it, and neither waits for more.

mod common;

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use common::gate::Gate;
use common::{Consumer, Random, Rig, Weights, assert_no_pins};
use forebay::device::host::HostConfig;
use forebay::{Bytes, Use};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

/// Long enough for what is not held back to happen.
const A_WHILE: Duration = Duration::from_millis(150);

#[test]
fn a_streamed_page_stays_until_the_work_that_reads_it_has_finished() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 4]);
    for pages in [1, 2] {
        let engine = rig.engine(PAGE * pages);
        let model = weights.attach(&engine, "model");
        for round in 0..3 {
            let mut slow = rig.consumer();
            let gate = Gate::close(&rig, slow.stream());
            // Everything there is, released while the stream has not even begun.
            (0..pages as usize).for_each(|weight| slow.use_weight(&model, &weights, weight).unwrap());
            let (done, is_done) = mpsc::channel();
            std::thread::scope(|scope| {
                let (rig, model, weights) = (&rig, &model, &weights);
                scope.spawn(move || {
                    let mut consumer = rig.consumer();
                    for weight in [2, 3, 0] {
                        consumer.use_weight(model, weights, weight).unwrap();
                    }
                    consumer.check();
                    done.send(()).unwrap();
                });
                if rig.host.is_some() {
                    let early = is_done.recv_timeout(A_WHILE);
                    assert_eq!(
                        early,
                        Err(RecvTimeoutError::Timeout),
                        "round {round}: pages were taken under a stream"
                    );
                }
                gate.open();
                is_done.recv().unwrap();
            });
            slow.check();
        }
        assert_no_pins(&engine, 0);
    }
}

#[test]
fn a_page_that_several_streams_use_stays_for_the_last_of_them_whoever_releases_first() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 3]);
    let engine = rig.engine(PAGE);
    let model = weights.attach(&engine, "model");
    for order in [[0, 1], [1, 0], [0, 1], [1, 0]] {
        let mut consumers = [rig.consumer(), rig.consumer()];
        let mut gates: Vec<_> = consumers.iter().map(|c| Some(Gate::close(&rig, c.stream()))).collect();
        let mut pins: Vec<_> = consumers
            .iter()
            .map(|consumer| Some(model.acquire(0, Use::on(consumer.stream())).unwrap()))
            .collect();
        consumers.iter_mut().for_each(|consumer| consumer.read(&model, &weights, 0));
        pins[order[0]].take();
        pins[order[1]].take();
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let (rig, model, weights) = (&rig, &model, &weights);
            scope.spawn(move || {
                let mut consumer = rig.consumer();
                consumer.use_weight(model, weights, 1).unwrap();
                consumer.check();
                done.send(()).unwrap();
            });
            gates[order[1]].take();
            consumers[order[1]].check();
            if rig.host.is_some() {
                assert_eq!(is_done.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
            }
            gates[order[0]].take();
            is_done.recv().unwrap();
        });
        consumers.iter_mut().for_each(Consumer::check);
    }
}

#[test]
fn a_resident_page_stays_until_the_work_of_every_stream_has_finished() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 3]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    // More streams than any list of recent ones is long.
    let mut others: Vec<_> = (0..12).map(|_| rig.consumer()).collect();
    for _ in 0..2 {
        (0..3).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
        others.iter_mut().for_each(|other| other.use_weight(&model, &weights, 0).unwrap());
        others.iter_mut().for_each(Consumer::check);
        consumer.check();
    }
    for slow in [0, 5, 11] {
        let gate = Gate::close(&rig, others[slow].stream());
        (0..3).for_each(|weight| others[slow].use_weight(&model, &weights, weight).unwrap());
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let engine = &engine;
            scope.spawn(move || {
                engine.make_room(Bytes::MAX).unwrap();
                done.send(()).unwrap();
            });
            if rig.host.is_some() {
                assert_eq!(is_done.recv_timeout(A_WHILE), Err(RecvTimeoutError::Timeout));
            }
            gate.open();
            is_done.recv().unwrap();
        });
        others[slow].check();
        (0..3).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    }
}

#[test]
fn a_stuck_stream_holds_up_nobody_who_streams_other_pages() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[3 * MIB; 12]);
    let engine = rig.engine(PAGE * 8);
    let model = weights.attach(&engine, "model");
    let (mut stuck, mut consumer) = (rig.consumer(), rig.consumer());
    stuck.use_weight(&model, &weights, 0).unwrap();
    // Until the resident pages are the ones that stay.
    for _ in 0..6 {
        (1..12).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    }
    consumer.check();
    stuck.check();
    let pinned = model.acquire(0, Use::on(stuck.stream())).unwrap();
    engine.settle().unwrap();
    let gate = Gate::close(&rig, stuck.stream());
    stuck.read(&model, &weights, 0);
    // Each page of the window is streamed several times; none was used by the stream that is stuck.
    for _ in 0..4 {
        (1..12).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
        consumer.check();
    }
    gate.open();
    drop(pinned);
    stuck.check();
}

#[test]
fn slow_copies_are_waited_for_on_streams_and_on_the_default_stream() {
    let mut random = Random::seeded();
    let slow = HostConfig { poison: true, copy_delay: Duration::from_millis(5), ..HostConfig::default() };
    let rig = Rig::host(slow).unwrap_or_else(Rig::new);
    let weights = Weights::new(&mut random, &[3 * MIB, 100, 5 * MIB, 2 * MIB, MIB]);
    for pages in [5, 12] {
        let engine = rig.engine(PAGE * pages);
        let model = weights.attach(&engine, "model");
        let mut consumers = [rig.consumer(), Consumer::on_default(&rig.device), rig.consumer()];
        for use_number in 0..40 {
            let consumer = &mut consumers[use_number % 3];
            consumer.use_weight(&model, &weights, (use_number * 7) % 5).unwrap();
        }
    }
}

#[test]
fn making_room_ends_while_another_thread_streams_without_pause() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 24]);
    let engine = rig.engine(PAGE * 12);
    let model = weights.attach(&engine, "model");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut consumer = rig.consumer();
            for weight in (0..24).cycle() {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                consumer.use_weight(&model, &weights, weight).unwrap();
            }
        });
        let start = std::time::Instant::now();
        let made: forebay::Result<Vec<Bytes>> = (0..30).map(|_| engine.make_room(PAGE)).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        made.unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    });
}

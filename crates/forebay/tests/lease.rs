//! A model that fits, lent as a whole: recalled at once by whoever needs its memory, and by nobody else.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::gate::Gate;
use common::{Consumer, Random, Rig, Weights, assert_no_pins};
use forebay::{Attachment, Budget, Bytes, Engine, Lease, Lending, Use, View};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

/// A lease of everything, which waits for its recall.
struct Holder {
    views: Vec<View>,
    lease: Lease,
    recalled: Receiver<()>,
}

impl Holder {
    fn new(model: &Attachment, weights: &Weights, consumer: &mut Consumer) -> Self {
        let (told, recalled) = channel();
        let lease = model.lend(Box::new(move || told.send(()).unwrap())).expect("it fits");
        let mut views = Vec::new();
        for weight in 0..weights.specs.len() {
            loop {
                consumer.use_weight(model, weights, weight).unwrap();
                match lease.view(model, weight, consumer.stream()).unwrap() {
                    Lending::Lent(view) => break views.push(view),
                    Lending::Pending | Lending::Absent => {}
                }
            }
        }
        Holder { views, lease, recalled }
    }

    fn is_recalled(&self) -> bool {
        self.recalled.try_recv().is_ok()
    }

    /// Gives everything back once asked to.
    fn serve(self) {
        self.recalled.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(self.lease.is_recalled());
        drop(self.views);
        drop(self.lease);
    }
}

fn whole(engine: &Engine, name: &str) -> Bytes {
    let stats = engine.stats();
    let vbar = stats.vbars.iter().find(|vbar| vbar.name == name).unwrap();
    vbar.in_state(forebay::PageState::Resident)
}

#[test]
fn what_is_lent_is_not_taken_before_it_is_returned_and_then_only_as_much_as_needed() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 6]);
    let engine = rig.engine(PAGE * 6);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let holder = Holder::new(&model, &weights, &mut consumer);
    assert!(!holder.is_recalled() && engine.stats().vbars[0].lent);
    assert!(model.lend(Box::new(|| ())).is_none(), "it is lent");
    engine.set_budget(Budget::Fixed(PAGE * 4)).unwrap();
    engine.settle().unwrap();
    assert_eq!(engine.stats().held, PAGE * 6);
    for (view, bytes) in holder.views.iter().zip(&weights.contents) {
        consumer.read_at(view.address(), bytes, "lent");
    }
    consumer.check();
    holder.serve();
    engine.settle().unwrap();
    assert_eq!(engine.stats().held, PAGE * 4);
    assert!(whole(&engine, "model") > Bytes::ZERO, "{}", engine.stats());
    (0..6).for_each(|weight| consumer.use_weight(&model, &weights, weight).unwrap());
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn a_demand_of_another_model_recalls_at_once() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 4]);
    let engine = rig.engine(PAGE * 4);
    let (model, other) = (weights.attach(&engine, "model"), weights.attach(&engine, "other"));
    let mut consumer = rig.consumer();
    let holder = Holder::new(&model, &weights, &mut consumer);
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| holder.serve());
        for weight in 0..4 {
            consumer.use_weight(&other, &weights, weight).unwrap();
        }
    });
    assert!(
        start.elapsed() < Duration::from_millis(900),
        "{:?}: nobody's patience was needed",
        start.elapsed()
    );
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn making_room_waits_for_what_is_lent() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 4]);
    let engine = rig.engine(PAGE * 8);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let holder = Holder::new(&model, &weights, &mut consumer);
    std::thread::scope(|scope| {
        scope.spawn(|| holder.serve());
        assert_eq!(engine.make_room(PAGE * 3).unwrap(), PAGE * 3);
    });
    assert_no_pins(&engine, 0);
}

#[test]
fn an_explicit_fault_waits_for_what_is_lent_instead_of_being_refused() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 16]);
    let engine = rig.engine(PAGE * 17);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let holder = Holder::new(&model, &weights, &mut consumer);
    let vbar = engine.vbar("explicit", Bytes::mib(32)).unwrap();
    vbar.prioritize();
    let addr = vbar.alloc(Bytes::mib(32)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| holder.serve());
        let fault = vbar.fault(addr, Bytes::mib(32), Use::on(consumer.stream())).unwrap();
        assert!(fault.is_some());
    });
    vbar.unpin(addr, Bytes::mib(32), consumer.stream()).unwrap();
    drop(vbar);
    assert_no_pins(&engine, 0);
}

#[test]
fn a_closed_model_goes_when_what_was_lent_of_it_does() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 3]);
    let engine = rig.engine(PAGE * 4);
    let mut consumer = rig.consumer();
    let model = weights.attach(&engine, "model");
    let holder = Holder::new(&model, &weights, &mut consumer);
    drop(model);
    engine.settle().unwrap();
    consumer.read_at(holder.views[1].address(), &weights.contents[1], "lent");
    consumer.check();
    holder.serve();
    engine.settle().unwrap();
    assert!(engine.stats().vbars.is_empty(), "{}", engine.stats());
}

#[test]
fn a_model_that_does_not_fit_is_not_lent() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 5]);
    let engine = rig.engine(PAGE * 4);
    let model = weights.attach(&engine, "model");
    assert!(model.lend(Box::new(|| ())).is_none());
    engine.set_budget(Budget::Fixed(PAGE * 5)).unwrap();
    assert!(model.lend(Box::new(|| ())).is_some());
}

#[test]
fn leases_recalls_and_uses_of_many_threads_never_read_a_wrong_byte() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[MIB, 3 * MIB, 2 * MIB, MIB / 2]);
    let engine = rig.engine(PAGE * 6);
    let models = [weights.attach(&engine, "a"), weights.attach(&engine, "b")];
    let lent = Arc::new(AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| (0..40).for_each(|_| _ = engine.make_room(PAGE).unwrap()));
        for model in &models {
            let (weights, rig, lent) = (&weights, &rig, &lent);
            scope.spawn(move || {
                let mut consumer = rig.consumer();
                for _ in 0..60 {
                    for weight in 0..4 {
                        consumer.use_weight(model, weights, weight).unwrap();
                    }
                    let recalled = Arc::new(AtomicUsize::new(0));
                    let told = Arc::clone(&recalled);
                    let Some(lease) = model.lend(Box::new(move || _ = told.fetch_add(1, Ordering::SeqCst)))
                    else {
                        continue;
                    };
                    lent.fetch_add(1, Ordering::Relaxed);
                    let mut views = Vec::new();
                    for weight in 0..4 {
                        if let Lending::Lent(view) = lease.view(model, weight, consumer.stream()).unwrap() {
                            consumer.read_at(view.address(), &weights.contents[weight], "lent");
                            views.push(view);
                        }
                    }
                    drop(views);
                    assert!(recalled.load(Ordering::SeqCst) <= 1);
                    drop(lease);
                }
                consumer.check();
            });
        }
    });
    assert!(lent.load(Ordering::Relaxed) > 0);
    assert_no_pins(&engine, 0);
}

#[test]
fn a_page_that_was_lent_leaves_behind_the_work_of_every_stream_that_was_told_of() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB; 3]);
    let engine = rig.engine(PAGE * 3);
    let model = weights.attach(&engine, "model");
    for _ in 0..3 {
        let (mut consumer, mut side) = (rig.consumer(), rig.consumer());
        model.prioritize();
        let holder = Holder::new(&model, &weights, &mut consumer);
        holder.lease.know_stream(side.stream());
        // Reads that have not even begun when everything is given back, on a stream that no acquire names.
        let gate = Gate::close(&rig, side.stream());
        for (view, bytes) in holder.views.iter().zip(&weights.contents) {
            side.read_at(view.address(), bytes, "lent, on the side");
        }
        drop(holder);
        let (done, is_done) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                engine.make_room(PAGE * 3).unwrap();
                done.send(()).unwrap();
            });
            if rig.host.is_some() {
                let early = is_done.recv_timeout(Duration::from_millis(150));
                assert!(early.is_err(), "unmapped under a stream");
            }
            gate.open();
            is_done.recv().unwrap();
        });
        side.check();
        consumer.check();
    }
    assert_no_pins(&engine, 0);
}

//! Weights that the application computes.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use common::on_device::OnDevice;
use common::{Consumer, Random, Rig, Weights, copy_of, pass};
use forebay::device::{Element, StreamHandle};
use forebay::store::{Memory, Source};
use forebay::{Attachment, Bytes, Compute, Computed, EngineError, Patch, Use, WeightKind};

const SIZES: [usize; 5] = [3 << 20, 2048, (5 << 20) + 1024, 2 << 20, (6 << 20) - 1024];

/// Gives bytes that it has.
struct Fixed {
    rig: Rig,
    bytes: Arc<Vec<u8>>,
    calls: AtomicUsize,
    fails: AtomicBool,
}

impl Compute for Fixed {
    fn compute(&self) -> Result<Computed, String> {
        self.calls.fetch_add(1, Ordering::AcqRel);
        if self.fails.load(Ordering::Acquire) {
            return Err("it was told so".to_owned());
        }
        let keep = OnDevice::new(&self.rig.device, &self.bytes);
        Ok(Computed { at: keep.addr, written_on: StreamHandle::DEFAULT, keep: Box::new(keep) })
    }
}

impl Fixed {
    fn of(rig: &Rig, bytes: Arc<Vec<u8>>) -> Arc<Fixed> {
        let rig = Rig { device: Arc::clone(&rig.device), host: None };
        Arc::new(Fixed { rig, bytes, calls: AtomicUsize::new(0), fails: AtomicBool::new(false) })
    }
}

fn fixed(random: &mut Random, rig: &Rig, weight: usize, now: &mut Weights) -> Arc<Fixed> {
    let bytes = Arc::new(random.bytes(SIZES[weight]));
    now.contents[weight] = Arc::clone(&bytes);
    Fixed::of(rig, bytes)
}

fn patch(by: Arc<dyn Compute>) -> Option<Patch> {
    Some(Patch {
        element: Element::Bf16,
        computed: Some(by),
        products: Vec::new(),
        rounding: None,
        keep: Arc::new(()),
    })
}

/// Has two weights computed, and notes what they are now.
fn compute_two(
    random: &mut Random,
    rig: &Rig,
    model: &Attachment,
    consumer: &Consumer,
    which: [usize; 2],
    now: &mut Weights,
) -> [Arc<Fixed>; 2] {
    let by = which.map(|weight| fixed(random, rig, weight, now));
    let changes = which.into_iter().zip(&by).map(|(weight, by)| (weight, patch(by.clone()))).collect();
    model.change_patches(changes, Use::on(consumer.stream())).unwrap();
    by
}

#[test]
fn computed_weights_are_used_at_every_budget_until_they_are_taken_back() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    for pages in [16, 9, 6] {
        let engine = rig.engine(Bytes::mib(2) * pages);
        let model = weights.attach(&engine, "model");
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        pass(&model, &now, &mut consumer);
        let by = compute_two(&mut random, &rig, &model, &consumer, [2, 4], &mut now);
        for _ in 0..3 {
            pass(&model, &now, &mut consumer);
        }
        // Four pages hold the weight, and each pass fills each of them once at most.
        let calls = by[0].calls.load(Ordering::Acquire);
        assert!((1..12).contains(&calls), "{calls} computations in three passes");
        engine.make_room(Bytes::MAX).unwrap();
        pass(&model, &now, &mut consumer);
        model.change_patches(vec![(2, None), (4, None)], Use::on(consumer.stream())).unwrap();
        pass(&model, &weights, &mut consumer);
    }
}

#[test]
fn a_computation_that_fails_is_the_error_of_its_weight() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(64));
    let model = weights.attach(&engine, "model");
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    let by = fixed(&mut random, &rig, 4, &mut now);
    by.fails.store(true, Ordering::Release);
    model.change_patches(vec![(4, patch(by.clone()))], Use::on(consumer.stream())).unwrap();
    let error = consumer.use_weight(&model, &now, 4).unwrap_err();
    assert!(matches!(&error, EngineError::Computed { weight, .. } if weight == "w4"), "{error}");
    assert!(error.to_string().ends_with("it was told so"), "{error}");
    for other in 0..3 {
        consumer.use_weight(&model, &now, other).unwrap();
    }
    by.fails.store(false, Ordering::Release);
    pass(&model, &now, &mut consumer);
}

#[test]
fn what_is_computed_is_not_read() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(64));
    let model = weights.attach(&engine, "model");
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    // One within pages that it fills, and one that shares a page with others.
    compute_two(&mut random, &rig, &model, &consumer, [0, 4], &mut now);
    pass(&model, &now, &mut consumer);
    engine.settle().unwrap();
    let others = Bytes::new([1, 2, 3].map(|weight| SIZES[weight] as u64).iter().sum());
    let read = model.stats().filled;
    // Padding between weights goes along.
    assert!((others..others + Bytes::kib(4)).contains(&read), "{read}, not {others}");
}

/// Memory that nobody reads before it is let go.
struct Held {
    bytes: Vec<u8>,
    begun: Mutex<Option<mpsc::Sender<()>>>,
    let_go: Mutex<mpsc::Receiver<()>>,
}

// SAFETY: nobody changes the bytes.
unsafe impl Memory for Held {
    fn as_ptr(&self) -> *const u8 {
        if let Some(begun) = self.begun.lock().unwrap().take() {
            begun.send(()).unwrap();
            assert!(self.let_go.lock().unwrap().recv().is_err(), "nothing is ever sent");
        }
        self.bytes.as_ptr()
    }

    fn len(&self) -> usize {
        self.bytes.len()
    }
}

#[test]
fn what_was_not_read_for_patches_that_are_gone_is_read_after_all() {
    let mut random = Random::seeded();
    let mut weights = Weights::new(&mut random, &[1 << 20, 1 << 19, 1 << 20]);
    let rig = Rig::new();
    // Without room for the table, which tells by that when the patches are gone.
    let engine = rig.engine(Bytes::mib(2));
    let (begun, has_begun) = mpsc::channel();
    let (hold, let_go) = mpsc::channel::<()>();
    let bytes = weights.contents[1].to_vec();
    let held = Held { bytes, begun: Mutex::new(None), let_go: Mutex::new(let_go) };
    let held = Arc::new(held);
    weights.specs[1].source = Source::memory(held.clone());
    weights.specs[2].kind = WeightKind::Table;
    let model = weights.attach(&engine, "model");
    let consumer = rig.consumer();
    let by = Fixed::of(&rig, Arc::new(random.bytes(1 << 20)));
    let changes = vec![(0, patch(by.clone())), (2, patch(by.clone()))];
    model.change_patches(changes, Use::on(consumer.stream())).unwrap();
    *held.begun.lock().unwrap() = Some(begun);
    std::thread::scope(|scope| {
        // On one page with what is held.
        let user = scope.spawn(|| rig.consumer().use_weight(&model, &weights, 0));
        has_begun.recv().unwrap();
        let none = vec![(0, None), (2, None)];
        let changed = scope.spawn(|| model.change_patches(none, Use::on(StreamHandle::DEFAULT)));
        while model.is_kept(2).unwrap() {
            std::thread::yield_now();
        }
        drop(hold);
        user.join().unwrap().unwrap();
        changed.join().unwrap().unwrap();
    });
    assert_eq!(by.calls.load(Ordering::Acquire), 0, "what is gone was computed");
}

#[test]
fn a_weight_is_read_as_it_is_stored_to_memory_of_the_application() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(16));
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    for (weight, &size) in SIZES.iter().enumerate() {
        let place = OnDevice::new(&rig.device, &vec![0xa5; size]);
        let to = forebay::OnDevice { addr: place.addr, stream: consumer.stream() };
        // SAFETY: the place is as long as the weight, and outlives the check.
        unsafe { model.read_to_device(weight, to) }.unwrap();
        consumer.read_at(place.addr, &weights.contents[weight], "a copy");
        consumer.check();
    }
    let place = OnDevice::new(&rig.device, &vec![0xa5; SIZES[0]]);
    let to = forebay::OnDevice { addr: place.addr, stream: consumer.stream() };
    // SAFETY: nothing is read.
    let none = unsafe { model.read_to_device(SIZES.len(), to) };
    assert!(matches!(none, Err(EngineError::Invalid(_))), "{none:?}");
    weights.file.as_file().set_len(100).unwrap();
    // SAFETY: as before.
    let short = unsafe { model.read_to_device(0, to) };
    assert!(matches!(&short, Err(EngineError::Source { weight, .. }) if weight == "w0"), "{short:?}");
    engine.settle().unwrap();
}

/// Waits until it is let go.
struct Waits {
    began: Mutex<mpsc::Sender<()>>,
    let_go: Mutex<mpsc::Receiver<()>>,
}

impl Compute for Waits {
    fn compute(&self) -> Result<Computed, String> {
        self.began.lock().unwrap().send(()).unwrap();
        assert!(self.let_go.lock().unwrap().recv().is_err(), "nothing is ever sent");
        Err("the model is gone by now".to_owned())
    }
}

#[test]
fn nobody_waits_for_a_computation_of_a_model_that_goes() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    for ends_engine in [false, true] {
        let engine = rig.engine(Bytes::mib(64));
        let model = weights.attach(&engine, "model");
        let (began, has_begun) = mpsc::channel();
        let (hold, let_go) = mpsc::channel::<()>();
        let by = Waits { began: Mutex::new(began), let_go: Mutex::new(let_go) };
        let mut consumer = rig.consumer();
        model.change_patches(vec![(2, patch(Arc::new(by)))], Use::on(consumer.stream())).unwrap();
        std::thread::scope(|scope| {
            let user = scope.spawn(|| consumer.use_weight(&model, &weights, 2));
            has_begun.recv().unwrap();
            match ends_engine {
                true => engine.shut_down(),
                false => model.detach(),
            }
            let error = user.join().unwrap().unwrap_err();
            let expected = if ends_engine { "shut down" } else { "was detached" };
            assert!(error.to_string().contains(expected), "{error}");
        });
        drop((model, engine));
        drop(hold);
    }
}

#[test]
fn a_change_while_a_weight_is_computed_is_what_is_used() {
    let mut random = Random::seeded();
    let weights = Weights::new(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(64));
    let model = weights.attach(&engine, "model");
    let (began, has_begun) = mpsc::channel();
    let (hold, let_go) = mpsc::channel::<()>();
    let by = Waits { began: Mutex::new(began), let_go: Mutex::new(let_go) };
    let mut consumer = rig.consumer();
    model.change_patches(vec![(2, patch(Arc::new(by)))], Use::on(consumer.stream())).unwrap();
    std::thread::scope(|scope| {
        let user = scope.spawn(|| rig.consumer().use_weight(&model, &weights, 2));
        has_begun.recv().unwrap();
        let changed = scope.spawn(|| model.change_patches(vec![(2, None)], Use::on(StreamHandle::DEFAULT)));
        drop(hold);
        // It began before the change, so it may meet the failure.
        if let Err(error) = user.join().unwrap() {
            assert!(matches!(error, EngineError::Computed { .. }), "{error}");
        }
        changed.join().unwrap().unwrap();
    });
    pass(&model, &weights, &mut consumer);
}

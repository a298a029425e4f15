//! Patches of weights of eight-bit elements: a page at a time, where it is, as the device does it to a whole weight elsewhere.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::gate::Gate;
use common::on_device::OnDevice;
use common::refusing::Refusing;
use common::{Consumer, Random, Rig, Weights, copy_of, pass, read};
use forebay::device::{EightBitSum, Element, Event, Factors, Requantize, Rounding, Transform};
use forebay::{Bytes, EightBits, EngineError, Patch, Product, Use};

/// Bytes of the weights: 512 columns, so that pages end within rows, and one that is always resident.
const SIZES: [usize; 5] = [(1 << 20) + 1536, 2048, (2 << 20) + 1024, 1 << 19, (5 << 20) - 1024];
const COLUMNS: u32 = 512;
const PAGE: Bytes = Bytes::mib(2);
const THREADS: u64 = 4096;

/// Memory of one model's pages for random bytes, filled with some.
fn random_memory(rig: &Rig) -> Arc<OnDevice> {
    Arc::new(OnDevice::new(&rig.device, &vec![0x5a; PAGE.as_usize()]))
}

/// A patch of a weight, and the weight with it: computed from all of it at once, in other memory.
fn patched(random: &mut Random, rig: &Rig, weight: &[u8], memory: &Arc<OnDevice>) -> (Patch, Arc<Vec<u8>>) {
    let element = if random.below(2) == 0 { Element::F8E4m3 } else { Element::F8E5m2 };
    let (rank, rows) = (1 + random.below(20) as u32, weight.len() as u32 / COLUMNS);
    // Halves between -2 and 2.
    let mut halves = |count: u32| -> Vec<u8> {
        (0..count)
            .flat_map(|_| (random.below(0x4000) as u16 | (random.below(2) as u16) << 15).to_le_bytes())
            .collect()
    };
    let numbers = [0.25_f32.to_le_bytes(), rank.to_le_bytes(), 0.5_f32.to_le_bytes(), 3_f32.to_le_bytes()];
    let parts = [halves(rows * rank), halves(rank * COLUMNS), numbers.concat()];
    let [up, down, numbers] = parts.map(|bytes| OnDevice::new(&rig.device, &bytes));
    let number = |n: u64| numbers.addr.offset(Bytes::new(4 * n));
    let rounding = Rounding::Each { through: Element::F16, terms: 1, ends: number(1), by: Some(number(3)) };
    let factors = Factors {
        up: up.addr,
        down: down.addr,
        scale: numbers.addr,
        element: Element::F16,
        rank,
        columns: COLUMNS,
        row_base: 0,
        rounding,
    };
    let (scale, seed) = ((random.below(2) == 0).then(|| number(2)), random.next());
    let [from, to] = [weight, &vec![0x5a; weight.len()]].map(|bytes| OnDevice::new(&rig.device, bytes));
    let sum = EightBitSum { from: from.addr, element, first: 0, count: weight.len() as u64, scale, factors };
    let work = Requantize { sum, to: to.addr, random: to.addr, seed, threads: THREADS };
    let stream = rig.stream();
    // SAFETY: all of it lives until it was read, below.
    unsafe { rig.device.transform(&Transform::Requantize(work), stream.handle()) }.unwrap();
    let expected = read(rig, &to, to.addr, weight.len(), stream.handle());
    let rounding = Some(EightBits { scale, seed, threads: THREADS, random: memory.addr, random_bytes: PAGE });
    let keep = Arc::new((up, down, numbers, Arc::clone(memory)));
    let products = vec![Product { rows: 0..rows, factors }];
    (Patch { element, computed: None, products, rounding, keep }, Arc::new(expected))
}

/// Changes for some weights; what they are from then on.
fn change(
    random: &mut Random,
    rig: &Rig,
    weights: &Weights,
    which: &[usize],
    memory: &Arc<OnDevice>,
    now: &mut Weights,
) -> Vec<(usize, Option<Patch>)> {
    let mut one = |&weight: &usize| {
        let (patch, contents) = patched(random, rig, &weights.contents[weight], memory);
        now.contents[weight] = contents;
        (weight, Some(patch))
    };
    which.iter().map(&mut one).collect()
}

#[test]
fn pages_are_patched_as_a_whole_weight_is_at_every_budget() {
    let mut random = Random::seeded();
    let weights = Weights::in_a_file(&mut random, &SIZES);
    let rig = Rig::new();
    for pages in [32, 5] {
        let engine = rig.engine(PAGE * pages);
        let memory = random_memory(&rig);
        let model = weights.attach(&engine, "model");
        let (mut first, mut second, mut now) = (rig.consumer(), rig.consumer(), copy_of(&weights));
        let written = rig.stream();
        for which in [&[0, 4][..], &[2, 3]] {
            // What is there gets them where it is, or is filled again where it had others.
            let changes = change(&mut random, &rig, &weights, which, &memory, &mut now);
            model.change_patches(changes, Use::on(written.handle())).unwrap();
            for _ in 0..2 {
                // In two streams, which draw random bytes in the same memory.
                for weight in 0..SIZES.len() {
                    let consumer = if weight % 2 == 0 { &mut first } else { &mut second };
                    consumer.use_weight(&model, &now, weight).unwrap();
                }
                pass(&model, &now, &mut second);
            }
            engine.settle().unwrap();
        }
        let nothing = [0, 2, 3, 4].map(|weight| (weight, None));
        model.change_patches(nothing.into(), Use::on(written.handle())).unwrap();
        pass(&model, &weights, &mut first);
        second.check();
    }
}

#[test]
fn whoever_draws_in_another_stream_waits_for_who_drew_before() {
    let mut random = Random::seeded();
    let weights = Weights::in_a_file(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 32);
    let memory = random_memory(&rig);
    let model = weights.attach(&engine, "model");
    let (mut first, mut second, mut now) = (rig.consumer(), rig.consumer(), copy_of(&weights));
    // What has other patches is filled anew, and patched by whoever uses it.
    for _ in 0..2 {
        let changes = change(&mut random, &rig, &weights, &[0, 4], &memory, &mut now);
        model.change_patches(changes, Use::on(first.stream())).unwrap();
    }
    let gate = Gate::close(&rig, first.stream());
    first.use_weight(&model, &now, 0).unwrap();
    second.use_weight(&model, &now, 4).unwrap();
    let done = Event::new(Arc::clone(&rig.device)).unwrap();
    // SAFETY: the stream lives.
    unsafe { done.record(second.stream()) }.unwrap();
    std::thread::sleep(Duration::from_millis(50));
    // On a GPU taking memory to read into may have waited for the gate.
    let is_known = rig.host.is_some();
    assert!(
        !(is_known && done.is_complete().unwrap()),
        "it drew where another one's random bytes are to be read"
    );
    gate.open();
    second.check();
    first.check();
}

#[test]
fn what_could_not_be_patched_is_filled_anew() {
    let mut random = Random::seeded();
    let weights = Weights::in_a_file(&mut random, &SIZES);
    Refusing::one_after_another(|refusing| {
        let rig = &refusing.rig;
        let memory = random_memory(rig);
        let model = weights.attach(&refusing.engine, "model");
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        consumer.use_weight(&model, &now, 0).unwrap();
        consumer.check();
        let mut then = copy_of(&now);
        let changes = change(&mut random, rig, &weights, &[0, 3], &memory, &mut then);
        // Weight 0 is patched where it is, 3 by its user.
        let mut user: Consumer = rig.consumer();
        refusing.does(|| {
            model.change_patches(changes, Use::on(rig.stream().handle()))?;
            now = then;
            user.use_weight(&model, &now, 3)
        });
        refusing.check(&model, &now);
        user.check();
    });
}

#[test]
fn what_is_not_rounded_so_is_refused() {
    let mut random = Random::seeded();
    let weights = Weights::in_a_file(&mut random, &SIZES);
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 32);
    let model = weights.attach(&engine, "model");
    let (good, contents) = patched(&mut random, &rig, &weights.contents[0], &random_memory(&rig));
    let [product] = &good.products[..] else { panic!("one product") };
    let rounding = good.rounding.unwrap();
    let with_rounding = |rounding| Patch { rounding, ..good.clone() };
    let with_product = |product| Patch { products: vec![product], ..good.clone() };
    let with_factors = |factors| with_product(Product { factors, ..product.clone() });
    let half = Product { rows: 0..product.rows.end / 2, ..product.clone() };
    let rest = Factors { row_base: half.rows.end, ..product.factors };
    let rest = Product { rows: half.rows.end..product.rows.end, factors: rest };
    let refused = [
        with_rounding(None),
        with_rounding(Some(EightBits { threads: 0, ..rounding })),
        with_rounding(Some(EightBits { threads: 100, ..rounding })),
        with_rounding(Some(EightBits { random: rounding.random.offset(Bytes::new(1)), ..rounding })),
        with_rounding(Some(EightBits { random_bytes: Bytes::kib(1024), ..rounding })),
        with_product(half.clone()),
        Patch { products: vec![half, rest], ..good.clone() },
        with_factors(Factors { rounding: Rounding::Once, ..product.factors }),
        Patch { element: Element::Bf16, ..good.clone() },
    ];
    for patch in refused {
        let what = format!("{patch:?}");
        let error = model.change_patches(vec![(0, Some(patch))], Use::on(rig.stream().handle())).unwrap_err();
        assert!(
            matches!(error, EngineError::Invalid(_)) && error.to_string().contains("\"w0\""),
            "{what}: {error}"
        );
    }
    let mut now = copy_of(&weights);
    pass(&model, &now, &mut rig.consumer());
    // A page is as large as a weight that is no larger.
    let small = Patch { rounding: Some(EightBits { random_bytes: PAGE, ..rounding }), ..good };
    model.change_patches(vec![(0, Some(small))], Use::on(rig.stream().handle())).unwrap();
    now.contents[0] = contents;
    pass(&model, &now, &mut rig.consumer());
}

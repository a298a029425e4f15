//! Patches of weights: what is read is the weight with its products of low rank added, whatever was resident, and a change
//! refills the weights that it touches and no others.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    reason = "tests end where their setting fails; some lists are of one range"
)]

mod common;

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::gate::Gate;
use common::on_device::{Given, OnDevice};
use common::refusing::Refusing;
use common::{Consumer, Random, Rig, Weights, copy_of, eventually, pass, read};
use forebay::device::{Device, DeviceAddr, Element, Factors, Rounding};
use forebay::{Attachment, Begun, Bytes, Engine, EngineError, Lending, Patch, Product, Use};

/// Bytes of the weights: of bf16, 512 columns, so that pages end within rows, and one that is always resident.
const SIZES: [usize; 6] = [3 << 20, 2048, (5 << 20) + 1024, 2 << 20, (6 << 20) - 1024, 1 << 20];
const COLUMNS: u32 = 512;
const SMALL: usize = 1;

fn bf16(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()
}

fn float(raw: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([raw[0], raw[1]])) << 16)
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(float).collect()
}

/// A row of a product, summed in ascending order of rank.
fn multiply(factors: &[f32], down: &[f32], sums: &mut [f32]) {
    sums.fill(0.0);
    for (factor, row) in factors.iter().zip(down.chunks_exact(COLUMNS as usize)) {
        sums.iter_mut().zip(row).for_each(|(sum, down)| *sum = factor.mul_add(*down, *sum));
    }
}

/// The nearest half, for numbers of its range: the sum's last bit is that of a half.
fn through_half(value: f32) -> f32 {
    let exponent = (value.to_bits() >> 23 & 0xff).max(127 - 14) + 13;
    let large = f32::from_bits(exponent << 23 | 1 << 22);
    (value + large) - large
}

fn random_bf16(random: &mut Random, bytes: usize, size: f32) -> Vec<u8> {
    (0..bytes / 2).flat_map(|_| bf16((random.below(2001) as f32 - 1000.0) / 1000.0 * size)).collect()
}

/// Weights of bf16, none of them in memory, so that they are filled in every way there is.
fn weights(random: &mut Random) -> Weights {
    let mut weights = Weights::in_a_file(random, &SIZES);
    let contents: Vec<_> = SIZES.iter().map(|&size| Arc::new(random_bf16(random, size, 1.0))).collect();
    std::fs::write(
        weights.file.path(),
        contents.iter().flat_map(|bytes| bytes.iter().copied()).collect::<Vec<u8>>(),
    )
    .unwrap();
    weights.contents = contents;
    let file = forebay::store::SourceFile::open(weights.file.path()).unwrap();
    let mut offset = 0;
    for (spec, &size) in weights.specs.iter_mut().zip(&SIZES) {
        spec.source = forebay::store::Source::file(&file, offset, Bytes::new(size as u64));
        offset += size as u64;
    }
    weights
}

/// A model on a device that holds all of it.
struct Attached {
    random: Random,
    weights: Weights,
    rig: Rig,
    engine: Arc<Engine>,
    model: Attachment,
}

fn attached() -> Attached {
    attached_in(32)
}

/// A model on a device of so many pages.
fn attached_in(pages: u64) -> Attached {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(2) * pages);
    let model = weights.attach(&engine, "model");
    Attached { random, weights, rig, engine, model }
}

/// A patch of some rows of a weight, and the weight with it.
fn patched(
    random: &mut Random,
    device: &Arc<dyn Device>,
    weight: &[u8],
    rows: &[Range<u32>],
) -> (Patch, Arc<Vec<u8>>) {
    let mut result = weight.to_vec();
    let (mut products, mut keep) = (Vec::new(), Vec::new());
    for rows in rows {
        let rank = 1 + random.below(20) as u32;
        let up = random_bf16(random, (rows.end - rows.start) as usize * rank as usize * 2, 0.3);
        let down = random_bf16(random, (rank * COLUMNS) as usize * 2, 0.3);
        let scale: Vec<f32> = (0..rank).map(|_| random.below(100) as f32 / 100.0).collect();
        // Half of them with terms, which are rounded one after another.
        let ends = (random.below(2) == 0).then(|| {
            let inner = (1..rank).filter(|_| random.below(4) == 0).collect::<Vec<_>>();
            inner.into_iter().chain([rank]).collect::<Vec<_>>()
        });
        let (ups, downs) = (floats(&up), floats(&down));
        let mut sums = vec![0.0; COLUMNS as usize];
        for row in rows.clone() {
            let of_row = &ups[((row - rows.start) * rank) as usize..][..rank as usize];
            let elements = &mut result[(row * COLUMNS) as usize * 2..][..COLUMNS as usize * 2];
            let mut values = floats(elements);
            match &ends {
                None => {
                    let factors: Vec<f32> = of_row.iter().zip(&scale).map(|(up, scale)| scale * up).collect();
                    multiply(&factors, &downs, &mut sums);
                    values.iter_mut().zip(&sums).for_each(|(value, sum)| *value += sum);
                }
                Some(ends) => {
                    values.iter_mut().for_each(|value| *value = through_half(*value));
                    let mut begin = 0;
                    for (&end, scale) in ends.iter().zip(&scale) {
                        let end = end as usize;
                        multiply(&of_row[begin..end], &downs[begin * COLUMNS as usize..], &mut sums);
                        for (value, sum) in values.iter_mut().zip(&sums) {
                            *value = through_half(*value + through_half(scale * sum));
                        }
                        begin = end;
                    }
                }
            }
            for (element, value) in elements.chunks_exact_mut(2).zip(values) {
                element.copy_from_slice(&bf16(value));
            }
        }
        let parts = [up, down, scale.iter().flat_map(|value| value.to_le_bytes()).collect()];
        let [up, down, scale] = parts.map(|bytes| OnDevice::new(device, &bytes));
        let raw_ends: Vec<u8> = ends.iter().flatten().flat_map(|end| end.to_le_bytes()).collect();
        let ends_at = ends.as_ref().map(|_| OnDevice::new(device, &raw_ends));
        let rounding = ends_at.as_ref().map_or(Rounding::Once, |at| Rounding::Each {
            through: Element::F16,
            terms: raw_ends.len() as u32 / 4,
            ends: at.addr,
            by: None,
        });
        let factors = Factors {
            up: up.addr,
            down: down.addr,
            scale: scale.addr,
            element: Element::Bf16,
            rank,
            columns: COLUMNS,
            row_base: rows.start,
            rounding,
        };
        products.push(Product { rows: rows.clone(), factors });
        keep.push((up, down, scale, ends_at));
    }
    (
        Patch { element: Element::Bf16, computed: None, products, rounding: None, keep: Arc::new(keep) },
        Arc::new(result),
    )
}

/// Some rows of a weight, as one range or two.
fn some_rows(random: &mut Random, weight: usize) -> Vec<Range<u32>> {
    let rows = (SIZES[weight] / 2) as u32 / COLUMNS;
    let middle = 1 + random.below(u64::from(rows) - 1) as u32;
    match random.below(3) {
        0 => vec![0..rows],
        1 => vec![middle..rows, 0..middle],
        _ => vec![middle / 2..middle],
    }
}

/// Gives weights a patch or none; what they are from then on.
fn change(
    random: &mut Random,
    rig: &Rig,
    weights: &Weights,
    which: &[usize],
    now: &mut Weights,
) -> Vec<(usize, Option<Patch>)> {
    let mut changes = Vec::new();
    for &weight in which {
        let patch = (random.below(4) > 0).then(|| {
            let rows = some_rows(random, weight);
            patched(random, &rig.device, &weights.contents[weight], &rows)
        });
        let contents = patch.as_ref().map_or(&weights.contents[weight], |(_, contents)| contents);
        now.contents[weight] = Arc::clone(contents);
        changes.push((weight, patch.map(|(patch, _)| patch)));
    }
    changes
}

fn large(random: &mut Random) -> Vec<usize> {
    (0..SIZES.len()).filter(|&weight| weight != SMALL && random.below(2) == 0).collect()
}

#[test]
fn weights_are_as_the_set_in_force_says_at_every_budget() {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    let rig = Rig::new();
    for pages in [12, 9, 6, 5] {
        let engine = rig.engine(Bytes::mib(2) * pages);
        let model = weights.attach(&engine, "model");
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        let written = rig.stream();
        for round in 0..5 {
            for _ in 0..=round % 3 {
                pass(&model, &now, &mut consumer);
            }
            let which = large(&mut random);
            let changes = change(&mut random, &rig, &weights, &which, &mut now);
            model.change_patches(changes, Use::on(written.handle())).unwrap();
            pass(&model, &now, &mut consumer);
            engine.settle().unwrap();
        }
        let nothing = (0..SIZES.len()).filter(|&weight| weight != SMALL).map(|weight| (weight, None));
        model.change_patches(nothing.collect(), Use::on(written.handle())).unwrap();
        pass(&model, &weights, &mut consumer);
    }
}

#[test]
fn what_is_only_added_to_is_changed_where_it_is_and_all_else_that_a_change_touches_is_refilled() {
    let Attached { mut random, weights, rig, model, .. } = attached();
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    pass(&model, &now, &mut consumer);
    let mut refilled = |model: &Attachment, patch: Option<Patch>, contents: &Arc<Vec<u8>>, weight: usize| {
        let before = model.stats().filled;
        now.contents[weight] = Arc::clone(contents);
        model.change_patches(vec![(weight, patch)], Use::on(consumer.stream())).unwrap();
        for _ in 0..2 {
            pass(model, &now, &mut consumer);
        }
        model.stats().filled.get() - before.get()
    };
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &[0..9]);
    assert_eq!(refilled(&model, Some(patch), &contents, 4), 0, "the first patch");
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[5], &[3..70, 90..200]);
    assert_eq!(refilled(&model, Some(patch), &contents, 5), 0, "beside a weight that has one");
    // The weight, and what else is on its first and last page.
    let touched = SIZES[4] as u64..=SIZES[4] as u64 + 2 * Bytes::mib(2).get();
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &[2..11]);
    let bytes = refilled(&model, Some(patch), &contents, 4);
    assert!(touched.contains(&bytes), "{bytes} of {} bytes for another one in its place", SIZES[4]);
    let bytes = refilled(&model, None, &weights.contents[4], 4);
    assert!(touched.contains(&bytes), "{bytes} of {} bytes without", SIZES[4]);
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &[0..9]);
    assert_eq!(refilled(&model, Some(patch), &contents, 4), 0, "one again");
    drop(model);
}

#[test]
fn each_page_has_its_patches_once_however_much_of_the_model_was_read_by_then() {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    let rig = Rig::new();
    let all = [0, 3, 5];
    let patches = all.map(|weight| {
        let rows = (SIZES[weight] / 2) as u32 / COLUMNS;
        (weight, patched(&mut random, &rig.device, &weights.contents[weight], &[0..rows]))
    });
    let engine = rig.engine(Bytes::mib(64));
    for round in 0..60 {
        let model = weights.attach(&engine, "model");
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        model.prefetch();
        std::thread::sleep(Duration::from_micros(random.below(1 + 40 * round)));
        let mut changes = Vec::new();
        for (weight, (patch, contents)) in &patches {
            now.contents[*weight] = Arc::clone(contents);
            changes.push((*weight, Some(patch.clone())));
        }
        model.change_patches(changes, Use::on(consumer.stream())).unwrap();
        pass(&model, &now, &mut consumer);
    }
}

#[test]
fn what_could_not_be_added_to_a_page_is_there_when_that_was_filled_anew() {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    Refusing::one_after_another(|refusing| {
        let rig = &refusing.rig;
        let model = weights.attach(&refusing.engine, "model");
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        pass(&model, &now, &mut consumer);
        let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &[0..6000]);
        // Work from before, that the pages are read by.
        let gate = Gate::close(rig, consumer.stream());
        consumer.use_weight(&model, &now, 4).unwrap();
        let written = rig.stream();
        if refusing.does(|| model.change_patches(vec![(4, Some(patch))], Use::on(written.handle()))) {
            now.contents[4] = contents;
        }
        gate.open();
        refusing.check(&model, &now);
        consumer.check();
    });
}

#[test]
fn what_could_not_be_added_at_its_first_use_is_there_at_the_next_whoever_used_it_beside() {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    Refusing::one_after_another(|refusing| {
        let rig = &refusing.rig;
        let model = weights.attach(&refusing.engine, "model");
        let rows = [0..900, 900..6000];
        let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &rows);
        let mut now = copy_of(&weights);
        now.contents[4] = contents;
        model.change_patches(vec![(4, Some(patch))], Use::on(rig.stream().handle())).unwrap();
        let use_it = || -> forebay::Result<()> {
            let mut consumer = consumer_of(rig);
            consumer.use_weight(&model, &now, 4)?;
            consumer.check();
            Ok(())
        };
        refusing.does(|| {
            std::thread::scope(|scope| {
                let beside = scope.spawn(use_it);
                let here = use_it();
                beside.join().unwrap().and(here)
            })
        });
        refusing.check(&model, &now);
    });
}

#[test]
fn whoever_comes_second_waits_for_what_the_first_adds() {
    for pages in [32, 6] {
        let Attached { mut random, weights, rig, model, .. } = attached_in(pages);
        let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5000]);
        let (mut first, mut second, mut now) = (rig.consumer(), rig.consumer(), copy_of(&weights));
        now.contents[2] = contents;
        model.change_patches(vec![(2, Some(patch))], Use::on(first.stream())).unwrap();
        let gate = Gate::close(&rig, first.stream());
        first.use_weight(&model, &now, 2).unwrap();
        second.use_weight(&model, &now, 2).unwrap();
        gate.open();
        second.check();
        first.check();
        pass(&model, &now, &mut second);
    }
}

#[test]
fn factors_stay_until_nobody_adds_them_any_more() {
    let Attached { mut random, weights, rig, engine, model } = attached();
    let (mut patch, contents) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5000]);
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    now.contents[2] = contents;
    let written = rig.stream();
    // A driver takes a while for a kernel that is used for the first time.
    let other = weights.attach(&engine, "other");
    other.change_patches(vec![(2, Some(patch.clone()))], Use::on(written.handle())).unwrap();
    pass(&other, &now, &mut consumer);
    // What had another patch is filled anew, and added to by whoever uses it.
    let (before, _) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5000]);
    model.change_patches(vec![(2, Some(before))], Use::on(written.handle())).unwrap();
    let [still_read, gone_early] = [true, false].map(|is_so| Arc::new(AtomicBool::new(is_so)));
    let flags = [&still_read, &gone_early].map(Arc::clone);
    patch.keep = Arc::new(Kept { _of: patch.keep, flags });
    model.change_patches(vec![(2, Some(patch))], Use::on(written.handle())).unwrap();
    let gate = Gate::close(&rig, consumer.stream());
    consumer.use_weight(&model, &now, 2).unwrap();
    std::thread::scope(|scope| {
        let change = scope.spawn(|| model.change_patches(vec![(2, None)], Use::on(written.handle())));
        std::thread::sleep(Duration::from_millis(30));
        still_read.store(false, Ordering::Release);
        gate.open();
        change.join().unwrap().unwrap();
    });
    consumer.check();
    pass(&model, &weights, &mut consumer);
    engine.settle().unwrap();
    // On a GPU taking memory to read into may have waited for the gate; there what reads them once they are gone faults.
    let is_known = rig.host.is_some();
    assert!(!(is_known && gone_early.load(Ordering::Acquire)), "they went while they were read");
}

#[test]
fn factors_that_are_being_written_are_waited_for() {
    let Attached { mut random, weights, rig, model, .. } = attached();
    let Some(host) = &rig.host else { return };
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5000]);
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    now.contents[2] = contents;
    let (written, factors) = (rig.stream(), patch.products[0].factors);
    let (at, len) = (factors.up.get(), 5000 * factors.rank as usize * 2);
    // SAFETY: on this device memory is the process's own; nothing else uses it before the stream's work.
    let up = unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) };
    let right = up.to_vec();
    up.fill(0x3f);
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let write = move || {
        assert!(opened.recv().is_err());
        // SAFETY: what adds them waits for this stream.
        unsafe { std::slice::from_raw_parts_mut(at as *mut u8, len) }.copy_from_slice(&right);
    };
    host.launch(written.handle(), Box::new(write)).unwrap();
    std::thread::scope(|scope| {
        let change = scope.spawn(|| model.change_patches(vec![(2, Some(patch))], Use::on(written.handle())));
        // By then it is in force.
        std::thread::sleep(Duration::from_millis(30));
        consumer.use_weight(&model, &now, 2).unwrap();
        std::thread::sleep(Duration::from_millis(30));
        drop(open);
        change.join().unwrap().unwrap();
    });
    consumer.check();
}

/// Tells whether it goes while it is still read.
struct Kept {
    _of: Arc<dyn Any + Send + Sync>,
    flags: [Arc<AtomicBool>; 2],
}

impl Drop for Kept {
    /// By whoever is the last to have it.
    fn drop(&mut self) {
        let [still_read, gone_early] = &self.flags;
        gone_early.store(still_read.load(Ordering::Acquire), Ordering::Release);
    }
}

#[test]
fn work_in_a_stream_keeps_what_it_began_with() {
    for pages in [32, 6] {
        let Attached { mut random, weights, rig, model, .. } = attached_in(pages);
        let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
        pass(&model, &now, &mut consumer);
        let gate = Gate::close(&rig, consumer.stream());
        consumer.use_weight(&model, &now, 2).unwrap();
        let changes = change(&mut random, &rig, &weights, &[2], &mut now);
        model.change_patches(changes, Use::on(rig.stream().handle())).unwrap();
        gate.open();
        // The read from before is checked against what was in force then.
        consumer.use_weight(&model, &now, 2).unwrap();
        consumer.check();
    }
}

#[test]
fn whoever_holds_a_weight_is_waited_for() {
    let Attached { mut random, weights, rig, model, .. } = attached();
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    pass(&model, &now, &mut consumer);
    let view = model.view(2, Use::on(consumer.stream())).unwrap();
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5]);
    now.contents[2] = contents;
    let error = model.change_patches(vec![(2, Some(patch))], Use::on(consumer.stream())).unwrap_err();
    assert!(matches!(&error, EngineError::StillInUse { weights, .. } if weights == "w2"), "{error}");
    assert!(error.to_string().ends_with(" s: w2"), "{error}");
    // As it was.
    consumer.read_at(view.address(), &weights.contents[2], "the view");
    consumer.check();
    std::thread::scope(|scope| {
        let user = scope.spawn(|| consumer_of(&rig).use_weight(&model, &now, 2));
        // Whether it waits already or comes later: it gets the new one.
        std::thread::sleep(Duration::from_millis(20));
        drop(view);
        user.join().unwrap().unwrap();
    });
    pass(&model, &now, &mut consumer);
}

fn consumer_of(rig: &Rig) -> Consumer {
    rig.consumer()
}

#[test]
fn a_lent_model_is_recalled() {
    let Attached { mut random, weights, rig, engine, model } = attached();
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    pass(&model, &now, &mut consumer);
    engine.settle().unwrap();
    let (told, recalled) = std::sync::mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let lease = model.lend(Box::new(move || told.lock().unwrap().send(()).unwrap())).expect("it fits");
    let view = lease.view(&model, 3, consumer.stream()).unwrap();
    let changes = change(&mut random, &rig, &weights, &[3], &mut now);
    std::thread::scope(|scope| {
        let holder = scope.spawn(move || {
            recalled.recv().unwrap();
            drop(view);
            drop(lease);
        });
        model.change_patches(changes, Use::on(consumer.stream())).unwrap();
        holder.join().unwrap();
    });
    pass(&model, &now, &mut consumer);
}

/// The parts of a weight on each of its pages.
fn pages_of(at: DeviceAddr, len: usize) -> impl Iterator<Item = Range<usize>> {
    let page = Bytes::mib(2).get() as usize;
    let before = at.get() as usize % page;
    (0..(before + len).div_ceil(page))
        .map(move |number| (number * page).saturating_sub(before)..((number + 1) * page - before).min(len))
}

/// Has a model's pages filled, and all be done by itself that is done to them.
fn fill_unused(engine: &Engine, model: &Attachment) {
    model.prefetch();
    let all = SIZES.iter().sum::<usize>() as u64;
    eventually("everything is filled", || model.stats().filled.get() >= all);
    engine.settle().unwrap();
    std::thread::sleep(Duration::from_millis(30));
}

#[test]
fn what_was_begun_before_a_weight_is_computed_finds_it_as_it_was() {
    let Attached { mut random, weights, rig, engine, model } = attached();
    let rows = [0..2000];
    let (patch, as_it_was) = patched(&mut random, &rig.device, &weights.contents[2], &rows);
    let other = random_bf16(&mut random, SIZES[2], 1.0);
    let (added, contents) = patched(&mut random, &rig.device, &other, &rows);
    let given = Given(Arc::new(OnDevice::new(&rig.device, &other)));
    let computed = Patch { computed: Some(Arc::new(given)), ..added };
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    let written = rig.stream();
    model.change_patches(vec![(2, Some(patch))], Use::on(written.handle())).unwrap();
    fill_unused(&engine, &model);
    let begun = engine.begin(&[(&model, 2)], consumer.stream()).unwrap();
    let Begun::Waiting(waiting) = begun else { panic!("nothing is to be added to it") };
    std::thread::scope(|scope| {
        let change =
            scope.spawn(|| model.change_patches(vec![(2, Some(computed))], Use::on(written.handle())));
        std::thread::sleep(Duration::from_millis(30));
        let pinned = waiting.wait(Use::on(consumer.stream()).interrupted).unwrap();
        let at = model.address(2).unwrap();
        let got = read(&rig, pinned, at, SIZES[2], consumer.stream());
        change.join().unwrap().unwrap();
        for part in pages_of(at, got.len()) {
            let is = |contents: &[u8]| got[part.clone()] == contents[part.clone()];
            // The latter where the change came late.
            assert!(is(&weights.contents[2]) || is(&as_it_was), "something else at {part:?}");
        }
    });
    now.contents[2] = contents;
    pass(&model, &now, &mut consumer);
}

#[test]
fn a_patched_model_is_there_as_a_whole_after_one_pass() {
    let Attached { mut random, weights, rig, engine, model } = attached();
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[2], &[0..5000]);
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    now.contents[2] = contents;
    model.change_patches(vec![(2, Some(patch))], Use::on(consumer.stream())).unwrap();
    fill_unused(&engine, &model);
    pass(&model, &now, &mut consumer);
    let lease = model.lend(Box::new(|| {})).expect("it fits");
    let mut view = None;
    eventually("its marks have completed", || {
        match lease.view(&model, 2, consumer.stream()).unwrap() {
            Lending::Lent(lent) => view = Some(lent),
            Lending::Pending => {}
            Lending::Absent => panic!("it is resident"),
        }
        view.is_some()
    });
    let view = view.unwrap();
    consumer.read_at(view.address(), &now.contents[2], "the view");
    consumer.check();
}

#[test]
fn threads_that_use_weights_meanwhile_get_what_was_in_force_on_each_page() {
    let mut random = Random::seeded();
    let weights = weights(&mut random);
    let rig = Rig::new();
    for pages in [32, 9] {
        let engine = rig.engine(Bytes::mib(2) * pages);
        let model = weights.attach(&engine, "model");
        let (patch, other) = {
            let rows = SIZES[3] as u32 / 2 / COLUMNS;
            patched(&mut random, &rig.device, &weights.contents[3], &[0..rows])
        };
        let third = random_bf16(&mut random, SIZES[3], 1.0);
        let given = || Given(Arc::new(OnDevice::new(&rig.device, &third)));
        let computed = Patch {
            element: Element::Bf16,
            computed: Some(Arc::new(given())),
            products: Vec::new(),
            rounding: None,
            keep: Arc::new(()),
        };
        let (both, fourth) = {
            let (added, contents) = patched(&mut random, &rig.device, &third, &[5..300]);
            (Patch { computed: Some(Arc::new(given())), ..added }, contents)
        };
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let stream = rig.stream();
                    while !stop.load(Ordering::Acquire) {
                        let pinned = model.acquire(3, Use::on(stream.handle())).unwrap();
                        let at = model.address(3).unwrap();
                        let got = read(&rig, pinned, at, SIZES[3], stream.handle());
                        for part in pages_of(at, got.len()) {
                            let is = |contents: &[u8]| got[part.clone()] == contents[part.clone()];
                            let is_old = is(&weights.contents[3]) || is(&other);
                            assert!(is_old || is(&third) || is(&fourth), "none of them");
                        }
                    }
                });
            }
            let written = rig.stream();
            for round in 0..60 {
                let all = [
                    Some(patch.clone()),
                    Some(computed.clone()),
                    Some(patch.clone()),
                    Some(both.clone()),
                    None,
                ];
                let now = all[round % all.len()].clone();
                model.change_patches(vec![(3, now)], Use::on(written.handle())).unwrap();
            }
            stop.store(true, Ordering::Release);
        });
    }
}

#[test]
fn patches_that_do_not_fit_change_nothing() {
    let Attached { mut random, weights, rig, model, .. } = attached();
    let mut consumer = rig.consumer();
    let (patch, _) = patched(&mut random, &rig.device, &weights.contents[4], &[0..4]);
    let with = |rows: Range<u32>, element| {
        let mut patch = patch.clone();
        patch.element = element;
        patch.products[0].rows = rows;
        Some(patch)
    };
    let how = || Use::on(consumer.stream());
    let too_long = model.change_patches(vec![(3, with(0..5000, Element::Bf16))], how()).unwrap_err();
    assert!(too_long.to_string().ends_with("weight \"w3\" of \"model\""), "{too_long}");
    let elsewhere = model.change_patches(vec![(4, with(2..6, Element::Bf16))], how()).unwrap_err();
    let eight_bits = model.change_patches(vec![(4, with(0..4, Element::F8E4m3))], how()).unwrap_err();
    let mut through = with(0..4, Element::Bf16);
    if let Some(patch) = &mut through {
        let ends = patch.products[0].factors.scale;
        patch.products[0].factors.rounding =
            Rounding::Each { through: Element::Bf16, terms: 1, ends, by: None };
    }
    let through = model.change_patches(vec![(4, through)], how()).unwrap_err();
    let small = model.change_patches(vec![(0, None), (SMALL, with(0..2, Element::Bf16))], how()).unwrap_err();
    assert!(small.to_string().starts_with("is always resident"), "{small}");
    for error in [too_long, elsewhere, eight_bits, through, small] {
        assert!(matches!(error, EngineError::Invalid(_)), "{error}");
    }
    pass(&model, &weights, &mut consumer);
}

#[test]
fn a_patched_table_is_used_as_a_whole_and_a_patched_model_is_not_parked() {
    let mut random = Random::seeded();
    let mut weights = weights(&mut random);
    weights.specs[4].kind = forebay::WeightKind::Table;
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(12));
    let model = weights.attach(&engine, "model");
    let (mut consumer, mut now) = (rig.consumer(), copy_of(&weights));
    assert!(!model.is_kept(4).unwrap());
    let (patch, contents) = patched(&mut random, &rig.device, &weights.contents[4], &[0..4]);
    now.contents[4] = contents;
    model.change_patches(vec![(4, Some(patch))], Use::on(consumer.stream())).unwrap();
    assert!(model.is_kept(4).unwrap());
    pass(&model, &now, &mut consumer);
    model.park();
    let again = weights.attach(&engine, "model");
    pass(&again, &weights, &mut consumer);
    assert!(!again.is_kept(4).unwrap());
}

//! Weights that are stored in another type than they are used in: what is read is converted, whatever was resident, and
//! what lies beside them on a page is as it is stored.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::gate::Gate;
use common::on_device::OnDevice;
use common::{Random, Rig, Weights, pass};
use forebay::device::{Element, Factors, Rounding};
use forebay::store::{Source, SourceFile};
use forebay::{
    Attachment, Budget, Bytes, Conversion, Engine, EngineConfig, EngineError, LayoutOptions, Patch, Product,
    StoredScale, Use, WeightKind, WeightSpec,
};

const COLUMNS: u64 = 384;

/// How many elements a weight has, how they are stored, and in what they are used.
struct Kind {
    elements: u64,
    from: Element,
    to: Element,
    /// 0 without scale, 1 one for all, 2 one for each row.
    scale: u32,
}

/// Pages of 2 MiB end within weights and rows; some weights are always resident; some are used as they are stored.
fn kinds() -> Vec<Kind> {
    let kind = |elements, from, to, scale| Kind { elements, from, to, scale };
    let (f32, f16, bf16) = (Element::F32, Element::F16, Element::Bf16);
    vec![
        kind(COLUMNS * 3000, Element::F8E4m3, bf16, 1),
        kind(100, f32, bf16, 0),
        kind(COLUMNS * 500, bf16, bf16, 0),
        kind(COLUMNS * 4001, Element::F8E5m2, f16, 2),
        kind(COLUMNS * 777, f32, bf16, 0),
        kind(COLUMNS, f16, f32, 1),
        kind(COLUMNS * 901, f16, f32, 2),
        kind(COLUMNS * 2222, f32, f32, 0),
        kind(COLUMNS * 1500, bf16, f16, 0),
    ]
}

/// Random elements that are numbers, small enough to be scaled in every type.
fn stored(random: &mut Random, kind: &Kind) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..kind.elements {
        let value = (random.below(4001) as f32 - 2000.0) / 512.0;
        match kind.from {
            Element::F32 => bytes.extend(value.to_le_bytes()),
            Element::Bf16 => bytes.extend(((value.to_bits() >> 16) as u16).to_le_bytes()),
            Element::F16 => {
                bytes.extend((random.below(0x7800) as u16 | (random.below(2) as u16) << 15).to_le_bytes())
            }
            Element::F8E4m3 => bytes.push(random.below(0x7f) as u8 | (random.below(2) as u8) << 7),
            Element::F8E5m2 => bytes.push(random.below(0x7c) as u8 | (random.below(2) as u8) << 7),
        }
    }
    bytes
}

/// A conversion by the device itself, in one piece, which the device's own tests hold against exact arithmetic.
fn converted(rig: &Rig, kind: &Kind, bytes: &[u8], scales: &[f32]) -> Vec<u8> {
    use forebay::device::{Convert, Event, PinnedBuffer, Scale, Stream, Transform};
    let scales: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let len = kind.elements * kind.to.size().get();
    let [from, scales, to] =
        [bytes, &scales, &vec![0; len as usize]].map(|bytes| OnDevice::new(&rig.device, bytes));
    let scale = match kind.scale {
        0 => Scale::None,
        1 => Scale::One(scales.addr),
        _ => Scale::Rows { at: scales.addr, first: 0, columns: COLUMNS },
    };
    let convert = Convert {
        to: to.addr,
        to_element: kind.to,
        from: from.addr,
        from_element: kind.from,
        count: kind.elements,
        scale,
    };
    let stream = Stream::new(Arc::clone(&rig.device)).unwrap();
    let done = Event::new(Arc::clone(&rig.device)).unwrap();
    let result = PinnedBuffer::new(Arc::clone(&rig.device), Bytes::new(len)).unwrap();
    // SAFETY: everything is on the device, and waited for below.
    unsafe { rig.device.transform(&Transform::Convert(convert), stream.handle()) }.unwrap();
    // SAFETY: as before.
    unsafe { rig.device.copy_to_host(result.as_ptr(), to.addr, Bytes::new(len), stream.handle()) }.unwrap();
    // SAFETY: the stream lives.
    unsafe { done.record(stream.handle()) }.unwrap();
    done.synchronize().unwrap();
    // SAFETY: the copy has completed.
    unsafe { result.slice(Bytes::ZERO, Bytes::new(len)) }.to_vec()
}

/// The weights, what is read of them, and how they are converted.
fn weights(random: &mut Random, rig: &Rig, kinds: &[Kind]) -> (Weights, Vec<Option<Conversion>>) {
    let all: Vec<Vec<u8>> = kinds.iter().map(|kind| stored(random, kind)).collect();
    let sizes: Vec<usize> = all.iter().map(Vec::len).collect();
    let mut weights = Weights::in_a_file(random, &sizes);
    std::fs::write(weights.file.path(), all.concat()).unwrap();
    let file = SourceFile::open(weights.file.path()).unwrap();
    let (mut offset, mut conversions) = (0, Vec::new());
    for (i, (kind, bytes)) in kinds.iter().zip(&all).enumerate() {
        let len = Bytes::new(bytes.len() as u64);
        weights.specs[i].source = match i % 4 {
            3 => Source::memory(Arc::new(bytes.clone())),
            _ => Source::file(&file, offset, len),
        };
        offset += len.get();
        if kind.from == kind.to && kind.scale == 0 {
            weights.contents[i] = Arc::new(bytes.clone());
            conversions.push(None);
            continue;
        }
        let count = [1, 1, (kind.elements / COLUMNS) as usize][kind.scale as usize];
        let scales: Vec<f32> = (0..count).map(|_| (1 + random.below(300)) as f32 / 177.0).collect();
        weights.contents[i] = Arc::new(converted(rig, kind, bytes, &scales));
        let keep = OnDevice::new(
            &rig.device,
            &scales.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<_>>(),
        );
        let scale = match kind.scale {
            0 => StoredScale::None,
            1 => StoredScale::One(keep.addr),
            _ => StoredScale::Rows { at: keep.addr, columns: COLUMNS },
        };
        conversions.push(Some(Conversion { from: kind.from, to: kind.to, scale, keep: Arc::new(keep) }));
    }
    (weights, conversions)
}

fn attach(
    engine: &Arc<Engine>,
    weights: &Weights,
    conversions: &[Option<Conversion>],
) -> forebay::Result<Attachment> {
    let options = LayoutOptions { page_size: Some(Bytes::mib(2)), ..LayoutOptions::default() };
    engine.attach_converting("model", weights.specs.clone(), conversions.to_vec(), options)
}

#[test]
fn weights_are_read_converted_at_every_budget() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let kinds = kinds();
    let (weights, conversions) = weights(&mut random, &rig, &kinds);
    for pages in [20, 9, 5, 4] {
        let engine = rig.engine(Bytes::mib(2) * pages);
        let model = attach(&engine, &weights, &conversions).unwrap();
        let mut consumer = rig.consumer();
        for (i, kind) in kinds.iter().enumerate() {
            assert_eq!(model.bytes(i).unwrap().get(), kind.elements * kind.to.size().get());
        }
        for _ in 0..3 {
            pass(&model, &weights, &mut consumer);
            engine.settle().unwrap();
        }
        engine.make_room(Bytes::MAX).unwrap();
        pass(&model, &weights, &mut consumer);
        model.park();
        let again = attach(&engine, &weights, &conversions).unwrap();
        pass(&again, &weights, &mut consumer);
    }
}

#[test]
fn what_is_moved_is_what_is_stored() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let (weights, conversions) = weights(&mut random, &rig, &kinds());
    let engine = rig.engine(Bytes::mib(64));
    let model = attach(&engine, &weights, &conversions).unwrap();
    pass(&model, &weights, &mut rig.consumer());
    let stored: u64 = weights.specs.iter().map(|spec| spec.source.len().get()).sum();
    let filled = model.stats().filled.get();
    assert!((stored..stored + 16 * 512).contains(&filled), "{filled} of {stored} bytes");
}

#[test]
fn patches_come_after_the_conversion() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let kinds = kinds();
    let (mut weights, conversions) = weights(&mut random, &rig, &kinds);
    let engine = rig.engine(Bytes::mib(14));
    let model = attach(&engine, &weights, &conversions).unwrap();
    let mut consumer = rig.consumer();
    pass(&model, &weights, &mut consumer);
    // 1.0 for every element of some rows: a product of ones.
    let one = OnDevice::new(&rig.device, &1.0_f32.to_le_bytes().repeat(COLUMNS.max(4000) as usize));
    let factors = Factors {
        up: one.addr,
        down: one.addr,
        scale: one.addr,
        element: Element::F32,
        rank: 1,
        columns: COLUMNS as u32,
        row_base: 7,
        rounding: Rounding::Once,
    };
    let product = Product { rows: 7..2500, factors };
    let patch = Patch {
        element: Element::Bf16,
        computed: None,
        products: vec![product],
        rounding: None,
        keep: Arc::new(one),
    };
    model.change_patches(vec![(0, Some(patch))], Use::on(consumer.stream())).unwrap();
    let mut patched = weights.contents[0].to_vec();
    for raw in patched.chunks_exact_mut(2).skip(7 * COLUMNS as usize).take(2493 * COLUMNS as usize) {
        let bits = (f32::from_bits(u32::from(u16::from_le_bytes([raw[0], raw[1]])) << 16) + 1.0).to_bits();
        raw.copy_from_slice(&(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes());
    }
    weights.contents[0] = Arc::new(patched);
    for _ in 0..3 {
        pass(&model, &weights, &mut consumer);
    }
}

#[test]
fn a_page_that_failed_stays_until_what_is_converted_for_it_has_been_written() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    // Two that are converted to half of this make a page.
    let bytes = random.bytes(2 << 20);
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), &bytes).unwrap();
    let bad = Source::file(&SourceFile::open(path.path()).unwrap(), 0, Bytes::new(bytes.len() as u64));
    let memory = |bytes: Vec<u8>| Source::memory(Arc::new(bytes));
    let spec = |name: &str, source, kind| WeightSpec { name: name.into(), source, kind };
    let specs = vec![
        spec("good", memory(bytes), WeightKind::Whole),
        spec("bad", bad, WeightKind::Whole),
        spec("other", memory(random.bytes(2 << 20)), WeightKind::Whole),
        spec("table", memory(random.bytes(8 << 20)), WeightKind::Table),
    ];
    let half =
        Conversion { from: Element::F32, to: Element::Bf16, scale: StoredScale::None, keep: Arc::new(()) };
    // One reader takes one weight after the other; there is memory for one page.
    let config = EngineConfig {
        budget: Budget::Fixed(Bytes::mib(2)),
        ring: common::readers(1),
        ..EngineConfig::default()
    };
    let engine = Engine::new(Arc::clone(&rig.device), config).unwrap();
    let options = LayoutOptions { page_size: Some(Bytes::mib(2)), ..LayoutOptions::default() };
    let conversions = vec![Some(half.clone()), Some(half), None, None];
    let model = engine.attach_converting("model", specs, conversions, options).unwrap();
    std::fs::write(path.path(), b"short").unwrap();
    // What is patched waits for the factors, and these for the gate; and so does what is converted.
    let (uploads, consumer) = (rig.stream(), rig.consumer());
    let gate = Gate::close(&rig, uploads.handle());
    let one = OnDevice::new(&rig.device, &[0x3f; 1 << 14]);
    let (at, columns) = (one.addr, 1024);
    let factors = Factors {
        up: at,
        down: at,
        scale: at,
        element: Element::F32,
        rank: 1,
        columns,
        row_base: 0,
        rounding: Rounding::Once,
    };
    let products = vec![Product { rows: 0..9, factors }];
    let patch =
        Patch { element: Element::F32, computed: None, products, rounding: None, keep: Arc::new(one) };
    std::thread::scope(|threads| {
        threads.spawn(|| model.change_patches(vec![(3, Some(patch))], Use::on(uploads.handle())).unwrap());
        while !model.is_kept(3).unwrap() {
            std::thread::yield_now();
        }
        let error = model.acquire(0, Use::on(consumer.stream())).unwrap_err();
        assert!(matches!(&error, EngineError::Source { weight, .. } if weight == "bad"), "{error}");
        let asked = AtomicU32::new(0);
        let interrupted = || asked.fetch_add(1, Ordering::Relaxed) > 3;
        let how = Use { stream: consumer.stream(), interrupted: &interrupted };
        let result = model.acquire(2, how);
        // Elsewhere the gate opens by itself after a while.
        let waited = matches!(result, Err(EngineError::Interrupted { .. }));
        assert!(waited || (rig.host.is_none() && result.is_ok()), "{result:?}");
        drop(result);
        gate.open();
    });
    drop(model.acquire(2, Use::on(consumer.stream())).unwrap());
    engine.settle().unwrap();
}

#[test]
fn a_conversion_that_does_not_fit_is_refused_by_name() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let (weights, conversions) = weights(&mut random, &rig, &kinds());
    let engine = rig.engine(Bytes::mib(64));
    let mut wrong = conversions.clone();
    wrong[0].as_mut().unwrap().to = Element::F8E4m3;
    let error = attach(&engine, &weights, &wrong).unwrap_err();
    assert!(
        matches!(error, EngineError::Invalid(_)) && error.to_string().ends_with("weight \"w0\""),
        "{error}"
    );
    let mut wrong = conversions;
    let scale = &mut wrong[3].as_mut().unwrap().scale;
    *scale = match *scale {
        StoredScale::Rows { at, .. } => StoredScale::Rows { at, columns: 1000 },
        other => other,
    };
    let error = attach(&engine, &weights, &wrong).unwrap_err();
    assert!(error.to_string().ends_with("weight \"w3\""), "{error}");
}

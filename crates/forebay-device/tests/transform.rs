//! What a device does to bytes that are there: results are the same bit for bit on every device, and those of exact
//! arithmetic but for their rounding.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;

use common::{Page, Rng, fill, frame_of, on_every_device, read};
use forebay_core::Bytes;
use forebay_device::{
    AddLowRank, Convert, Device, DeviceAddr, DeviceError, EightBitSum, Element, Event, Factors, Requantize,
    Reservation, Rounding, Scale, Stream, Transform,
};

const TARGETS: [Element; 3] = [Element::F32, Element::F16, Element::Bf16];

/// The value of an element, by the definition of its format.
fn value(element: Element, raw: &[u8]) -> f64 {
    let (bits, exponent, mantissa) = match element {
        Element::F32 => return f64::from(f32::from_le_bytes(raw.try_into().unwrap())),
        Element::F16 => (u32::from(u16::from_le_bytes(raw.try_into().unwrap())), 5, 10),
        Element::Bf16 => (u32::from(u16::from_le_bytes(raw.try_into().unwrap())), 8, 7),
        Element::F8E4m3 => (u32::from(raw[0]), 4, 3),
        Element::F8E5m2 => (u32::from(raw[0]), 5, 2),
    };
    let sign = if bits >> (exponent + mantissa) & 1 == 1 { -1.0 } else { 1.0 };
    let e = bits >> mantissa & ((1 << exponent) - 1);
    let m = f64::from(bits & ((1 << mantissa) - 1)) / f64::from(1 << mantissa);
    let bias = (1 << (exponent - 1)) - 1;
    if e == (1 << exponent) - 1 && element != Element::F8E4m3 {
        return if m == 0.0 { sign * f64::INFINITY } else { f64::NAN };
    }
    if element == Element::F8E4m3 && bits & 0x7f == 0x7f {
        return f64::NAN;
    }
    match e {
        0 => sign * m * 2f64.powi(1 - bias),
        e => sign * (1.0 + m) * 2f64.powi(e as i32 - bias),
    }
}

fn values(element: Element, bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(element.size().as_usize()).map(|raw| value(element, raw)).collect()
}

/// The distance of neighbouring numbers of a type near a value.
fn ulp(element: Element, near: f64) -> f64 {
    let (mantissa, least) = match element {
        Element::F32 => (23, -126),
        Element::F16 => (10, -14),
        _ => (7, -126),
    };
    2f64.powi((near.abs().max(f64::MIN_POSITIVE).log2().floor() as i32).max(least) - mantissa)
}

/// Random elements between -1 and 1, some of them tiny.
fn elements(rng: &mut Rng, element: Element, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..count {
        let sign = (rng.below(2) as u32) << 31;
        let bits = sign | (100 + rng.below(27) as u32) << 23 | rng.below(1 << 23) as u32;
        match element {
            Element::F32 => bytes.extend(bits.to_le_bytes()),
            Element::Bf16 => bytes.extend(((bits >> 16) as u16).to_le_bytes()),
            Element::F16 => {
                let half = sign >> 16 | (rng.below(15) as u32) << 10 | rng.below(1 << 10) as u32;
                bytes.extend((half as u16).to_le_bytes());
            }
            _ => bytes.push(rng.below(256) as u8),
        }
    }
    bytes
}

/// A part of one page after another.
struct Places<'a> {
    device: &'a Arc<dyn Device>,
    next: DeviceAddr,
}

impl Places<'_> {
    /// Puts bytes on the device, at a multiple of `align`.
    fn put(&mut self, bytes: &[u8], align: u64) -> DeviceAddr {
        let at = DeviceAddr::new(self.next.get().next_multiple_of(align));
        fill(self.device, at, bytes);
        self.next = at.offset(Bytes::new(bytes.len() as u64));
        at
    }
}

/// Runs a test with room on every device.
fn with_room(size: Bytes, mut test: impl FnMut(&Arc<dyn Device>, &mut Places<'_>)) {
    on_every_device(|device| {
        let size = size.checked_align_up(device.granularity()).unwrap();
        let range = Reservation::new(Arc::clone(device), size, device.granularity()).unwrap();
        let frame = frame_of(device, size);
        let page = Page::map(device, range.addr(), &frame);
        test(device, &mut Places { device, next: page.addr() });
    });
}

fn transform(device: &Arc<dyn Device>, transform: Transform) -> Result<(), DeviceError> {
    let stream = Stream::new(Arc::clone(device)).unwrap();
    let done = Event::new(Arc::clone(device)).unwrap();
    // SAFETY: the test has put everything on the device, and waits below.
    unsafe { device.transform(&transform, stream.handle()) }?;
    // SAFETY: the stream lives.
    unsafe { done.record(stream.handle()) }.unwrap();
    done.synchronize()
}

/// A run of elements of a weight, and the factors of what is added to it.
struct Case {
    element: Element,
    factor: Element,
    first: u64,
    count: u64,
    columns: u64,
    rank: u64,
    row_base: u64,
}

/// First element, elements, columns, rank, row base: rows that begin on the page before and end on the next, of lengths that are
/// no multiple of anything, longer than a kernel's tile and shorter; ranks of several of its rounds.
const SHAPES: [(u64, u64, u64, u64, u64); 8] = [
    (0, 64 * 40, 64, 16, 0),
    (24, 5000, 520, 16, 0),
    (1031, 4001, 333, 5, 2),
    (7, 1, 3, 1, 0),
    (0, 300, 1, 4, 0),
    (512 * 3 + 8, 512 * 37, 512, 33, 3),
    (0, 1030, 1030, 40, 0),
    (4096 * 70, 4096 * 3 + 8, 4096, 2, 69),
];

#[test]
fn products_of_low_rank_are_added_as_defined() {
    let mut rng = Rng::from_environment();
    let mut cases = Vec::new();
    for element in TARGETS {
        for (i, (first, count, columns, rank, row_base)) in SHAPES.into_iter().enumerate() {
            let factor = TARGETS[(i + element as usize) % 3];
            cases.push(Case { element, factor, first, count, columns, rank, row_base });
        }
    }
    for case in cases {
        let Case { element, factor, first, count, columns, rank, row_base } = case;
        let rows = (first + count).div_ceil(columns) - row_base;
        let weight = elements(&mut rng, element, count);
        let (up, down) =
            (elements(&mut rng, factor, rows * rank), elements(&mut rng, factor, rank * columns));
        let scale = elements(&mut rng, Element::F32, rank);
        let mut results = Vec::new();
        with_room(Bytes::mib(2), |device, places| {
            let guard = [0x5a; 16];
            let before = places.put(&guard, 16);
            // As far from a boundary as the element is in its weight.
            let size = element.size().get();
            let lead = places.put(&vec![0x5a; (16 + first * size % 16) as usize], 16);
            let at = places.put(&weight, 1);
            assert!(at.get() >= lead.get() && before.get() < at.get());
            let after = places.put(&guard, 1);
            let factors = Factors {
                up: places.put(&up, 16),
                down: places.put(&down, 16),
                scale: places.put(&scale, 16),
                element: factor,
                rank: rank as u32,
                columns: columns as u32,
                row_base: row_base as u32,
                rounding: Rounding::Once,
            };
            let add = AddLowRank { at, first, count, element, factors };
            transform(device, Transform::AddLowRank(add)).unwrap();
            assert!(read(device, after, Bytes::new(16)) == guard, "wrote behind its elements");
            results.push(read(device, at, Bytes::new(count * size)));
        });
        let what = format!("{element:?} {factor:?} {first} {count} {columns} {rank}");
        assert!(results.iter().all(|result| *result == results[0]), "devices differ: {what}");
        let (up, down) = (values(factor, &up), values(factor, &down));
        let scale = values(Element::F32, &scale);
        let (old, new) = (values(element, &weight), values(element, &results[0]));
        for n in 0..count {
            let (row, column) = ((first + n) / columns - row_base, (first + n) % columns);
            let terms = (0..rank).map(|k| {
                scale[k as usize] * up[(row * rank + k) as usize] * down[(k * columns + column) as usize]
            });
            let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)));
            let exact = old[n as usize] + sum;
            let close = 0.501 * ulp(element, exact) + size * rank as f64 * 2f64.powi(-23);
            let off = (new[n as usize] - exact).abs();
            assert!(off <= close, "{what}: element {n} is {} in place of {exact}", new[n as usize]);
        }
    }
}

/// The nearest of a type's values, what a conversion to it gives.
fn nearest(element: Element, value: f32) -> f32 {
    let exact = f64::from(value);
    if element == Element::F32 || !value.is_finite() || value == 0.0 {
        return value;
    }
    let unit = ulp(element, exact);
    let near = (exact / unit).round_ties_even() * unit;
    let overflows = element == Element::F16 && near.abs() > 65504.0;
    if overflows { f32::INFINITY.copysign(value) } else { (near as f32).copysign(value) }
}

/// Elements of float32 and of halfs, some of them too large for halfs and not numbers.
fn with_large_ones(rng: &mut Rng, element: Element, count: u64) -> Vec<u8> {
    let mut bytes = elements(rng, element, count);
    for raw in bytes.chunks_exact_mut(element.size().as_usize()) {
        let float = match rng.below(40) {
            0 => 70_000.0,
            1 => -65_519.9,
            2 => f32::NEG_INFINITY,
            3 => f32::NAN,
            4 => -0.0,
            _ => continue,
        };
        match element {
            Element::F32 => raw.copy_from_slice(&float.to_le_bytes()),
            Element::Bf16 => raw.copy_from_slice(&float.to_le_bytes()[2..]),
            _ => raw.copy_from_slice(&[0, if float.is_nan() { 0x7e } else { 0x7b }]),
        }
    }
    bytes
}

/// Factors whose products are added one after another, each rounded.
#[derive(Clone)]
struct Terms {
    through: Element,
    factor: Element,
    rank: u64,
    columns: u64,
    up: Vec<u8>,
    down: Vec<u8>,
    scale: Vec<u8>,
    ends: Vec<u32>,
    by: Option<f32>,
}

impl Terms {
    /// The same on a device.
    fn placed(&self, places: &mut Places<'_>, row_base: u64) -> Factors {
        let ends: Vec<u8> = self.ends.iter().flat_map(|end| end.to_le_bytes()).collect();
        Factors {
            up: places.put(&self.up, 16),
            down: places.put(&self.down, 16),
            scale: places.put(&self.scale, 16),
            element: self.factor,
            rank: self.rank as u32,
            columns: self.columns as u32,
            row_base: row_base as u32,
            rounding: Rounding::Each {
                through: self.through,
                terms: self.ends.len() as u32,
                ends: places.put(&ends, 16),
                by: self.by.map(|by| places.put(&by.to_le_bytes(), 16)),
            },
        }
    }

    /// What an element at a row of `up` and a column becomes.
    fn added(&self) -> impl Fn(f32, usize, usize) -> f32 {
        let (up, down) = (floats(self.factor, &self.up), floats(self.factor, &self.down));
        let scale = floats(Element::F32, &self.scale);
        let (rank, columns) = (self.rank as usize, self.columns as usize);
        move |value, row, column| {
            let mut value = nearest(self.through, value);
            let mut begin = 0;
            for (&end, &scale) in self.ends.iter().zip(&scale) {
                let sum = (begin..end as usize)
                    .fold(0.0_f32, |sum, k| up[row * rank + k].mul_add(down[k * columns + column], sum));
                value = nearest(self.through, value + nearest(self.through, scale * sum));
                begin = end as usize;
            }
            self.by.map_or(value, |by| nearest(self.through, value * by))
        }
    }
}

fn floats(element: Element, bytes: &[u8]) -> Vec<f32> {
    values(element, bytes).into_iter().map(|value| value as f32).collect()
}

#[test]
fn terms_are_added_one_after_another_each_rounded() {
    let mut rng = Rng::from_environment();
    let mut number = 0;
    for element in TARGETS {
        for through in [Element::F16, Element::F32] {
            for (first, count, columns, rank, row_base) in SHAPES {
                number += 1;
                let factor = TARGETS[number % 3];
                let rows = (first + count).div_ceil(columns) - row_base;
                let weight = with_large_ones(&mut rng, element, count);
                let (up, down) =
                    (elements(&mut rng, factor, rows * rank), elements(&mut rng, factor, rank * columns));
                let mut ends: Vec<u32> =
                    (1..rank as u32).filter(|_| rng.below(1 + rank / 3) == 0).chain([rank as u32]).collect();
                if number.is_multiple_of(4) {
                    ends = vec![rank as u32];
                }
                let mut scale = elements(&mut rng, Element::F32, ends.len() as u64);
                if number.is_multiple_of(3) {
                    // What is added is not finite either, or nothing.
                    let factor = [1e5_f32, 3e38, 0.0][number / 3 % 3];
                    scale[..4].copy_from_slice(&factor.to_le_bytes());
                }
                let by = [None, Some(0.37_f32), Some(f32::INFINITY), Some(1e-6)][number / 2 % 4];
                let terms = Terms { through, factor, rank, columns, up, down, scale, ends, by };
                let mut results = Vec::new();
                with_room(Bytes::mib(2), |device, places| {
                    let guard = [0x5a; 16];
                    let size = element.size().get();
                    // As far from a boundary as the element is in its weight.
                    places.put(&vec![0x5a; (16 + first * size % 16) as usize], 16);
                    let at = places.put(&weight, 1);
                    let after = places.put(&guard, 1);
                    let factors = terms.placed(places, row_base);
                    let add = AddLowRank { at, first, count, element, factors };
                    transform(device, Transform::AddLowRank(add)).unwrap();
                    assert!(read(device, after, Bytes::new(16)) == guard, "wrote behind its elements");
                    results.push(read(device, at, Bytes::new(count * size)));
                });
                let what = format!(
                    "{element:?} {through:?} {factor:?} {first} {count} {columns} {:?} {by:?}",
                    terms.ends
                );
                assert!(results.iter().all(|result| *result == results[0]), "devices differ: {what}");
                let added = terms.added();
                let (old, new) = (floats(element, &weight), floats(element, &results[0]));
                for n in 0..count as usize {
                    let (row, column) = (
                        ((first + n as u64) / columns - row_base) as usize,
                        ((first + n as u64) % columns) as usize,
                    );
                    let expected = nearest(element, added(old[n], row, column));
                    let is_same = match expected.is_nan() {
                        true => new[n].is_nan(),
                        false => new[n].to_bits() == expected.to_bits(),
                    };
                    assert!(is_same, "{what}: element {n} is {} in place of {expected}", new[n]);
                }
            }
        }
    }
}

#[test]
fn elements_are_converted_with_one_rounding_of_a_float32() {
    let mut rng = Rng::from_environment();
    for from_element in Element::ALL {
        for to_element in TARGETS {
            for (kind, first, count, columns) in
                [(0, 0, 4099, 1), (1, 0, 2048, 1), (2, 1500, 5003, 701), (2, 0, 3, 1)]
            {
                let from = elements(&mut rng, from_element, count);
                let rows: u64 = if kind == 2 { (first + count).div_ceil(columns) } else { 1 };
                let scale = elements(&mut rng, Element::F32, rows);
                let mut results = Vec::new();
                with_room(Bytes::mib(2), |device, places| {
                    let (at, source) = (places.put(&scale, 16), places.put(&from, 16));
                    let to = places.put(&vec![0x5a; (count * to_element.size().get()) as usize], 16);
                    let scale = match kind {
                        0 => Scale::None,
                        1 => Scale::One(at),
                        _ => Scale::Rows { at, first, columns },
                    };
                    let convert = Convert { to, to_element, from: source, from_element, count, scale };
                    transform(device, Transform::Convert(convert)).unwrap();
                    results.push(read(device, to, Bytes::new(count * to_element.size().get())));
                });
                let what = format!("{from_element:?} to {to_element:?}, scale {kind}");
                assert!(results.iter().all(|result| *result == results[0]), "devices differ: {what}");
                let scale = values(Element::F32, &scale);
                let (old, new) = (values(from_element, &from), values(to_element, &results[0]));
                for n in 0..count as usize {
                    let by = match kind {
                        0 => 1.0,
                        1 => scale[0],
                        _ => scale[((first + n as u64) / columns) as usize],
                    };
                    let exact = f64::from((old[n] * by) as f32);
                    let close = 0.5 * ulp(to_element, exact);
                    let overflows = to_element == Element::F16 && exact.abs() >= 65520.0;
                    let right = match exact.is_nan() {
                        true => new[n].is_nan(),
                        false if overflows => new[n] == f64::INFINITY.copysign(exact),
                        false => new[n] == exact || (new[n] - exact).abs() <= close,
                    };
                    assert!(right, "{what}: element {n} is {} in place of {exact}", new[n]);
                }
            }
        }
    }
}

#[test]
fn numbers_are_looked_up_by_the_nearest_half() {
    let mut rng = Rng::from_environment();
    let table = elements(&mut rng, Element::F32, 2 * Transform::LOOKED_UP as u64);
    let halves = [0_u16, 1, 0x03ff, 0x0400, 0x3c00, 0x7bff, 0x7c00].into_iter();
    let halves = halves.chain((0..20).map(|_| rng.below(0x7c01) as u16));
    let mut numbers: Vec<(f32, u16)> =
        halves.map(|half| (value(Element::F16, &half.to_le_bytes()) as f32, half)).collect();
    numbers.extend([(1.0 + 2f32.powi(-11), 0x3c00), (65_519.9, 0x7bff), (65_520.0, 0x7c00), (1e-9, 0)]);
    numbers.extend([(-1.0, 0x3c00), (f32::NAN, 0x7e00), (-f32::NAN, 0x7e00)]);
    with_room(Bytes::mib(2), |device, places| {
        let table_at = places.put(&table, 16);
        for &(number, half) in &numbers {
            let at = places.put(&number.to_le_bytes(), 4);
            let to = places.put(&[0x5a; 16], 4);
            transform(device, Transform::LookUp { number: at, table: table_at, to }).unwrap();
            let found = read(device, to, Bytes::new(16));
            let row = usize::from(half) * 8;
            assert_eq!(found[..8], table[row..row + 8], "{number}");
            assert_eq!(found[8..], [0x5a; 8], "{number}");
        }
        let (number, to) = (table_at, DeviceAddr::new(table_at.get() + 2));
        let error = transform(device, Transform::LookUp { number, table: table_at, to }).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{error}");
    });
}

#[test]
fn bytes_are_copied_and_nothing_is_done_without_elements() {
    let mut rng = Rng::from_environment();
    with_room(Bytes::mib(2), |device, places| {
        let bytes = rng.bytes(Bytes::new(100_003));
        let (from, to) = (places.put(&bytes, 16), places.put(&vec![1; 100_003], 16));
        let len = Bytes::new(100_003);
        transform(device, Transform::Copy { to, from, len }).unwrap();
        assert!(read(device, to, len) == bytes);
        transform(device, Transform::Copy { to: from, from: to, len: Bytes::ZERO }).unwrap();
    });
}

#[test]
fn what_no_device_can_do_is_refused() {
    with_room(Bytes::mib(2), |device, places| {
        let at = places.put(&[1; 64], 16);
        let convert = Convert {
            to: at,
            to_element: Element::F8E4m3,
            from: at,
            from_element: Element::F32,
            count: 1,
            scale: Scale::None,
        };
        let error = transform(device, Transform::Convert(convert)).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{error}");
        for (through, terms) in [(Element::Bf16, 1), (Element::F16, 0)] {
            let factors = Factors {
                up: at,
                down: at,
                scale: at,
                element: Element::F32,
                rank: 1,
                columns: 1,
                row_base: 0,
                rounding: Rounding::Each { through, terms, ends: at, by: None },
            };
            let add = AddLowRank { at, first: 0, count: 1, element: Element::F32, factors };
            let error = transform(device, Transform::AddLowRank(add)).unwrap_err();
            assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{error}");
        }
    });
}

/// Philox4x32-10 as its authors give it, word by word.
fn philox(mut counter: [u32; 4], seed: u64) -> [u32; 4] {
    for round in 0..10_u32 {
        let key = |half: u64, weyl: u32| (half as u32).wrapping_add(weyl.wrapping_mul(round));
        let (first, second) = (0xd251_1f53 * u64::from(counter[0]), 0xcd9e_8d57 * u64::from(counter[2]));
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key(seed, 0x9e37_79b9),
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key(seed >> 32, 0xbb67_ae85),
            first as u32,
        ];
    }
    counter
}

#[test]
fn philox_is_that_of_its_authors() {
    // Of the known answers that come with their paper.
    assert_eq!(philox([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(philox([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
}

#[test]
fn eight_bits_are_rounded_up_or_down_by_random_bytes() {
    let mut rng = Rng::from_environment();
    let shapes = [(3_u64, 8_u64, 1_u64, 256_u64), (70, 136, 5, 512), (300, 24, 16, 256), (33, 520, 40, 2048)];
    for element in [Element::F8E4m3, Element::F8E5m2] {
        for through in [Element::F16, Element::F32] {
            for (number, (rows, columns, rank, threads)) in shapes.into_iter().enumerate() {
                let (factor, count) = (TARGETS[number % 3], rows * columns);
                let stored = elements(&mut rng, element, count);
                let (up, down) =
                    (elements(&mut rng, factor, rows * rank), elements(&mut rng, factor, rank * columns));
                let ends = if rank > 4 { vec![rank as u32 / 3, rank as u32] } else { vec![rank as u32] };
                let scale = elements(&mut rng, Element::F32, ends.len() as u64);
                let first = [None, Some(0.013_f32), Some(1.7), None][number];
                let by = [Some(77.0_f32), Some(40.0), None, Some(f32::INFINITY)][number];
                let seed = rng.below(u64::MAX);
                let terms = Terms { through, factor, rank, columns, up, down, scale, ends, by };
                let mut results = Vec::new();
                with_room(Bytes::mib(2), |device, places| {
                    let guard = [0x5a; 16];
                    let scale = first.map(|first| places.put(&first.to_le_bytes(), 16));
                    let factors = terms.placed(places, 0);
                    let from = places.put(&stored, 16);
                    let to = places.put(&vec![0x5a; count as usize], 16);
                    let after = places.put(&guard, 1);
                    let sum = EightBitSum { from, element, first: 0, count, scale, factors };
                    let work = Requantize { sum, to, random: to, seed, threads };
                    transform(device, Transform::Requantize(work)).unwrap();
                    let at = places.put(&0.0_f32.to_le_bytes(), 4);
                    transform(device, Transform::Largest { sum, at }).unwrap();
                    assert!(read(device, after, Bytes::new(16)) == guard, "wrote behind its elements");
                    assert!(read(device, from, Bytes::new(count)) == stored, "wrote to what is stored");
                    let found = read(device, to, Bytes::new(count));
                    let largest = read(device, at, Bytes::new(4));
                    // In parts, where the elements are.
                    transform(device, Transform::Copy { to, from, len: Bytes::new(count) }).unwrap();
                    let part = 8 * (count / 24);
                    let random = places.put(&vec![0x5a; part as usize], 16);
                    let after_random = places.put(&guard, 1);
                    let at = places.put(&0.0_f32.to_le_bytes(), 4);
                    for first in (0..count).step_by(part as usize) {
                        let (from, count) = (to.offset(Bytes::new(first)), part.min(count - first));
                        let sum = EightBitSum { from, first, count, ..sum };
                        transform(device, Transform::Largest { sum, at }).unwrap();
                        let work = Requantize { sum, to: from, random, seed, threads };
                        transform(device, Transform::Requantize(work)).unwrap();
                    }
                    assert!(read(device, to, Bytes::new(count)) == found, "parts differ from the whole");
                    assert!(read(device, at, Bytes::new(4)) == largest, "parts have another largest one");
                    assert!(read(device, after, Bytes::new(16)) == guard, "wrote behind its elements");
                    assert!(read(device, after_random, Bytes::new(16)) == guard, "drew too many");
                    results.push((found, largest));
                });
                let what = format!(
                    "{element:?} {through:?} {factor:?} {rows} x {columns}, {rank}, {first:?} {by:?}"
                );
                assert!(results.iter().all(|result| *result == results[0]), "devices differ: {what}");
                let (rounded, largest) = &results[0];
                let added = terms.added();
                let unmultiplied = Terms { by: None, ..terms.clone() };
                let unmultiplied = unmultiplied.added();
                let old = floats(element, &stored).into_iter().map(|old| old * first.unwrap_or(1.0));
                let old: Vec<f32> = old.collect();
                let place = |n: usize| (n / columns as usize, n % columns as usize);
                let magnitudes = old.iter().enumerate().map(|(n, &old)| {
                    let (row, column) = place(n);
                    unmultiplied(old, row, column).abs()
                });
                let expected = magnitudes.fold(0.0, |a: f32, b| if a.is_nan() || b <= a { a } else { b });
                let largest = floats(Element::F32, largest)[0];
                assert!(largest == expected || (largest.is_nan() && expected.is_nan()), "{what}: {largest}");
                for n in 0..count as usize {
                    let (row, column) = place(n);
                    let value = added(old[n], row, column);
                    let (turn, thread) = (n as u64 / threads, n as u64 % threads);
                    let random =
                        philox([(turn / 4) as u32, 0, thread as u32, 0], seed)[(turn % 4) as usize] as u8;
                    let found = rounded[n];
                    let expected = round_by(element, value, random);
                    assert_eq!(found, expected, "{what}: element {n}, {value}, {random}");
                }
            }
        }
    }
}

/// By looking at all values of the type.
fn round_by(element: Element, value: f32, random: u8) -> u8 {
    let largest = if element == Element::F8E4m3 { 0x7e } else { 0x7b };
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return largest | 0x80;
    }
    if value == 0.0 {
        return 0;
    }
    let magnitude = f64::from(value.abs());
    let of = |code: u8| self::value(element, &[code]);
    let below = (0..=largest).take_while(|&code| of(code) <= magnitude).last().unwrap();
    if below == largest {
        return sign | largest;
    }
    // What one float32 holds of the sum.
    let spacing = of(below + 1) - of(below);
    let units = (magnitude / spacing) as f32 + f32::from(random) / 256.0;
    let is_above = f64::from(units) * spacing >= of(below + 1);
    sign | (below + u8::from(is_above))
}

#[test]
fn what_cannot_be_requantized_is_refused() {
    let device: Arc<dyn Device> =
        Arc::new(forebay_device::host::HostDevice::new(Default::default()).unwrap());
    let at = DeviceAddr::new(4096);
    let rounding = Rounding::Each { through: Element::F16, terms: 1, ends: at, by: None };
    let factors = Factors {
        up: at,
        down: at,
        scale: at,
        element: Element::F16,
        rank: 4,
        columns: 16,
        row_base: 0,
        rounding,
    };
    let sum = EightBitSum { from: at, element: Element::F8E4m3, first: 8, count: 24, scale: None, factors };
    let good = Requantize { sum, to: at, random: DeviceAddr::new(8192), seed: 1, threads: 256 };
    for work in [
        Requantize { threads: 0, ..good },
        Requantize { threads: 12, ..good },
        Requantize { to: DeviceAddr::new(4097), ..good },
        Requantize { random: DeviceAddr::new(8193), ..good },
        Requantize { random: at, ..good },
    ] {
        let error = transform(&device, Transform::Requantize(work)).unwrap_err();
        assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{work:?}: {error}");
    }
    let of_factors = |factors| EightBitSum { factors, ..sum };
    let refused = [
        EightBitSum { element: Element::F16, ..sum },
        EightBitSum { count: 33, ..sum },
        EightBitSum { first: 4, ..sum },
        EightBitSum { from: DeviceAddr::new(4097), ..sum },
        EightBitSum { count: 24, ..of_factors(Factors { columns: 12, ..factors }) },
        of_factors(Factors { rank: 0, ..factors }),
        of_factors(Factors { row_base: 1, ..factors }),
        of_factors(Factors { element: Element::F8E4m3, ..factors }),
        of_factors(Factors { rounding: Rounding::Once, ..factors }),
    ];
    for sum in refused {
        for work in [Transform::Requantize(Requantize { sum, ..good }), Transform::Largest { sum, at }] {
            let error = transform(&device, work).unwrap_err();
            assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{work:?}: {error}");
        }
    }
    let error = transform(&device, Transform::Largest { sum, at: DeviceAddr::new(4098) }).unwrap_err();
    assert!(matches!(error, DeviceError::Driver { code: 1, .. }), "{error}");
}

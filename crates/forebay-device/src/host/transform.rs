//! The host's arithmetic of [`Transform`]s: what the GPU's kernels compute, bit for bit.

use std::slice;

use forebay_core::Bytes;

use super::vm;
use crate::{
    AddLowRank, Convert, DeviceAddr, EightBitSum, Element, Factors, Requantize, Rounding, Scale, Transform,
};

/// Does the work now.
///
/// # Safety
/// As [`Device::transform`](crate::Device::transform), and everything before it in its stream is done.
pub(super) unsafe fn run(transform: Transform) {
    match transform {
        Transform::AddLowRank(add) => {
            let len = add.count * add.element.size().get();
            let (rank, columns) = (add.factors.rank as usize, u64::from(add.factors.columns));
            let base = u64::from(add.factors.row_base);
            let first_row = add.first / columns - base;
            let rows = (add.first + add.count).div_ceil(columns) - base - first_row;
            let size = add.factors.element.size().get();
            let rank_bytes = rank as u64 * size;
            // SAFETY: the weight's bytes are valid and nobody else's meanwhile, by the contract of this call.
            let weight = unsafe { bytes_mut(add.at, len) };
            let up = add.factors.up.offset(Bytes::new(first_row * rank_bytes));
            // SAFETY: the factors are valid and unchanged, by the contract of this call.
            let up = unsafe { bytes(up, rows * rank_bytes) };
            // SAFETY: as before.
            let down = unsafe { bytes(add.factors.down, rank_bytes * columns) };
            let (up, down) = (floats(add.factors.element, up), floats(add.factors.element, down));
            // SAFETY: as before.
            match unsafe { terms_of(&add.factors) } {
                None => {
                    // SAFETY: as before.
                    let scale = floats(Element::F32, unsafe { bytes(add.factors.scale, 4 * rank as u64) });
                    add_low_rank(&add, weight, &up, &down, &scale);
                }
                Some(terms) => add_each(&add, &terms, weight, &up, &down),
            }
        }
        Transform::Requantize(Requantize { sum, to, random, seed, threads }) => {
            // SAFETY: the caller's promise.
            let values = unsafe { sum_of(&sum) };
            // SAFETY: the results' place is valid and nobody else's meanwhile, by the contract of this call.
            let random = unsafe { bytes_mut(random, sum.count) };
            for (n, byte) in (sum.first..).zip(&mut *random) {
                *byte = random_byte(seed, threads, n);
            }
            let rounded: Vec<u8> = values
                .iter()
                .zip(random)
                .map(|(&value, &mut byte)| round_at_random(sum.element, value, byte))
                .collect();
            // SAFETY: as before; the random bytes, which may be there, are not read any more.
            unsafe { bytes_mut(to, sum.count) }.copy_from_slice(&rounded);
        }
        Transform::Largest { mut sum, at } => {
            if let Rounding::Each { by, .. } = &mut sum.factors.rounding {
                *by = None;
            }
            // SAFETY: the caller's promise.
            let values = unsafe { sum_of(&sum) };
            // SAFETY: the number is valid and nobody else's meanwhile, by the contract of this call.
            let number = unsafe { bytes_mut(at, 4) };
            // Of numbers without a sign the larger has the larger bits.
            let magnitudes = values.iter().map(|value| value.abs().to_bits());
            let largest = magnitudes.fold(load(Element::F32, number).to_bits(), u32::max);
            store(Element::F32, f32::from_bits(largest), number);
        }
        Transform::Convert(convert) => {
            // SAFETY: the results' place is valid and nobody else's meanwhile, by the contract of this call.
            let to = unsafe { bytes_mut(convert.to, convert.count * convert.to_element.size().get()) };
            // SAFETY: the elements are valid and unchanged, by the contract of this call.
            let from = unsafe { bytes(convert.from, convert.count * convert.from_element.size().get()) };
            let scales = match convert.scale {
                Scale::None => Vec::new(),
                // SAFETY: as before.
                Scale::One(at) => floats(Element::F32, unsafe { bytes(at, 4) }),
                Scale::Rows { at, first, columns } => {
                    let rows = (first + convert.count).div_ceil(columns);
                    // SAFETY: as before.
                    floats(Element::F32, unsafe { bytes(at, 4 * rows) })
                }
            };
            converted(&convert, from, &scales, to);
        }
        Transform::LookUp { number, table, to } => {
            let mut half = [0; 2];
            // SAFETY: the number is valid and unchanged, by the contract of this call.
            store(Element::F16, unsafe { one(number) }, &mut half);
            let row = u64::from(u16::from_le_bytes(half) & 0x7fff);
            // SAFETY: as before; the table has a row for every half.
            let found = unsafe { bytes(table.offset(Bytes::new(8 * row)), 8) };
            // SAFETY: valid and nobody else's meanwhile, by the contract of this call.
            unsafe { bytes_mut(to, 8) }.copy_from_slice(found);
        }
        Transform::Copy { to, from, len } => {
            // SAFETY: valid and nobody else's meanwhile, by the contract of this call.
            let to = unsafe { bytes_mut(to, len.get()) };
            // SAFETY: valid and unchanged, by the contract of this call.
            to.copy_from_slice(unsafe { bytes(from, len.get()) });
        }
    }
}

/// The elements of a sum.
///
/// # Safety
/// All that it is made of is readable and unchanged meanwhile.
unsafe fn sum_of(sum: &EightBitSum) -> Vec<f32> {
    let factors = sum.factors;
    // SAFETY: the caller's promise.
    let Some(terms) = (unsafe { terms_of(&factors) }) else {
        unreachable!("the device checks that there are terms")
    };
    let (size, rank) = (factors.element.size().get(), u64::from(factors.rank));
    let columns = u64::from(factors.columns);
    let first_row = sum.first / columns;
    let rows = (sum.first + sum.count).div_ceil(columns) - first_row;
    let up = factors.up.offset(Bytes::new(first_row * rank * size));
    // SAFETY: as before.
    let up = floats(factors.element, unsafe { bytes(up, rows * rank * size) });
    // SAFETY: as before.
    let down = unsafe { bytes(factors.down, rank * columns * size) };
    let down = floats(factors.element, down);
    // SAFETY: as before.
    let first = sum.scale.map_or(1.0, |at| unsafe { one(at) });
    // SAFETY: as before.
    let stored = unsafe { bytes(sum.from, sum.count) };
    let mut values: Vec<f32> = stored.iter().map(|&raw| load(sum.element, &[raw]) * first).collect();
    // SAFETY: as many bytes as there are floats.
    let raw = unsafe { slice::from_raw_parts_mut(values.as_mut_ptr().cast(), values.len() * 4) };
    let add = AddLowRank { at: sum.from, first: sum.first, count: sum.count, element: Element::F32, factors };
    add_each(&add, &terms, raw, &up, &down);
    values
}

/// # Safety
/// The range is readable and unchanged while the slice lives.
unsafe fn bytes<'a>(at: DeviceAddr, len: u64) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts(vm::pointer(at), Bytes::new(len).as_usize()) }
}

/// # Safety
/// The range is writable, and nobody else's while the slice lives.
unsafe fn bytes_mut<'a>(at: DeviceAddr, len: u64) -> &'a mut [u8] {
    // SAFETY: the caller's promise.
    unsafe { slice::from_raw_parts_mut(vm::pointer(at), Bytes::new(len).as_usize()) }
}

/// # Safety
/// There is a readable float32, unchanged meanwhile.
unsafe fn one(at: DeviceAddr) -> f32 {
    // SAFETY: the caller's promise.
    floats(Element::F32, unsafe { bytes(at, 4) })[0]
}

/// What is rounded after each term, if it is.
///
/// # Safety
/// The factors are readable and unchanged meanwhile.
unsafe fn terms_of(factors: &Factors) -> Option<Terms> {
    let Rounding::Each { through, terms, ends, by } = factors.rounding else { return None };
    let len = 4 * u64::from(terms);
    // SAFETY: the caller's promise.
    let scale = floats(Element::F32, unsafe { bytes(factors.scale, len) });
    // SAFETY: as before.
    let ends = unsafe { bytes(ends, len) }.chunks_exact(4).map(number).collect();
    // SAFETY: as before.
    Some(Terms { through, scale, ends, by: by.map(|at| unsafe { one(at) }) })
}

/// `up` begins with the row of the first element.
fn add_low_rank(add: &AddLowRank, weight: &mut [u8], up: &[f32], down: &[f32], scale: &[f32]) {
    let columns = add.factors.columns as usize;
    let mut sums = vec![0.0; columns];
    rows_of(add, weight, up, |up, row, column| {
        let sums = &mut sums[..row.len() / add.element.size().as_usize()];
        sums.fill(0.0);
        for (k, (up, scale)) in up.iter().zip(scale).enumerate() {
            multiply_add(scale * up, &down[k * columns + column..][..sums.len()], sums);
        }
        for (element, sum) in row.chunks_exact_mut(add.element.size().as_usize()).zip(&*sums) {
            store(add.element, load(add.element, element) + sum, element);
        }
    });
}

/// What [`Rounding::Each`] says.
struct Terms {
    through: Element,
    scale: Vec<f32>,
    ends: Vec<usize>,
    by: Option<f32>,
}

/// [`Rounding::Each`]; `up` as before.
fn add_each(add: &AddLowRank, terms: &Terms, weight: &mut [u8], up: &[f32], down: &[f32]) {
    let &Terms { through, ref scale, ref ends, by } = terms;
    let (columns, size) = (add.factors.columns as usize, add.element.size().as_usize());
    let (mut sums, mut values) = (vec![0.0; columns], vec![0.0; columns]);
    rows_of(add, weight, up, |up, row, column| {
        let (sums, values) = (&mut sums[..row.len() / size], &mut values[..row.len() / size]);
        for (value, element) in values.iter_mut().zip(row.chunks_exact(size)) {
            *value = rounded(through, load(add.element, element));
        }
        let mut begin = 0;
        for (scale, end) in scale.iter().zip(ends.iter().copied()) {
            sums.fill(0.0);
            for k in begin..end {
                multiply_add(up[k], &down[k * columns + column..][..sums.len()], sums);
            }
            for (value, sum) in values.iter_mut().zip(&*sums) {
                *value = rounded(through, *value + rounded(through, scale * sum));
            }
            begin = end;
        }
        if let Some(by) = by {
            values.iter_mut().for_each(|value| *value = rounded(through, *value * by));
        }
        for (element, value) in row.chunks_exact_mut(size).zip(&*values) {
            store(add.element, *value, element);
        }
    });
}

/// For each row with elements in the run: its row of `up`, the elements' bytes, and the column of the first of them.
fn rows_of(add: &AddLowRank, weight: &mut [u8], up: &[f32], mut work: impl FnMut(&[f32], &mut [u8], usize)) {
    let (columns, size) = (u64::from(add.factors.columns), add.element.size().as_usize());
    let mut rest = weight;
    let mut column = (add.first % columns) as usize;
    for up in up.chunks_exact(add.factors.rank as usize) {
        let count = (columns as usize - column).min(rest.len() / size);
        let (row, others) = rest.split_at_mut(count * size);
        work(up, row, column);
        (rest, column) = (others, 0);
    }
}

/// `sums[j] = fma(factor, row[j], sums[j])`.
fn multiply_add(factor: f32, row: &[f32], sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has these instructions.
        return unsafe { multiply_add_fma(factor, row, sums) };
    }
    multiply_add_inline(factor, row, sums);
}

/// A processor's own fused multiply-add; without it each is a call that takes some 20 ns, of the same result.
///
/// # Safety
/// The processor has these instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "fma,avx2")]
unsafe fn multiply_add_fma(factor: f32, row: &[f32], sums: &mut [f32]) {
    multiply_add_inline(factor, row, sums);
}

#[inline(always)]
fn multiply_add_inline(factor: f32, row: &[f32], sums: &mut [f32]) {
    for (sum, value) in sums.iter_mut().zip(row) {
        *sum = factor.mul_add(*value, *sum);
    }
}

fn converted(convert: &Convert, from: &[u8], scales: &[f32], to: &mut [u8]) {
    let sizes = (convert.from_element.size().as_usize(), convert.to_element.size().as_usize());
    let elements = from.chunks_exact(sizes.0).zip(to.chunks_exact_mut(sizes.1));
    for (n, (from, to)) in (0u64..).zip(elements) {
        let value = load(convert.from_element, from);
        let value = match convert.scale {
            Scale::None => value,
            Scale::One(_) => value * scales[0],
            Scale::Rows { first, columns, .. } => value * scales[((first + n) / columns) as usize],
        };
        store(convert.to_element, value, to);
    }
}

/// The random byte of element `n`: see [`Requantize`](crate::Requantize).
fn random_byte(seed: u64, threads: u64, n: u64) -> u8 {
    let (thread, word) = (n % threads, n / threads % 4);
    let mut counter = [(n / threads / 4) as u32, 0, thread as u32, (thread >> 32) as u32];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let wide = [0xd251_1f53 * u64::from(counter[0]), 0xcd9e_8d57 * u64::from(counter[2])];
        let [(high0, low0), (high1, low1)] = wide.map(|wide| ((wide >> 32) as u32, wide as u32));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter[word as usize] as u8
}

/// Rounds a value to eight bits, away from zero where its distance from the nearer neighbour says so together with the byte.
fn round_at_random(element: Element, value: f32, random: u8) -> u8 {
    let (mantissa, least, largest) = if element == Element::F8E4m3 { (3, -6, 0x7e) } else { (2, -14, 0x7b) };
    let (bits, sign) = (value.to_bits() & 0x7fff_ffff, (value.to_bits() >> 24) as u8 & 0x80);
    if value.is_nan() {
        return largest | 0x80;
    }
    if bits == 0 {
        return 0;
    }
    if bits >= 0x4780_0000 {
        // 65536 and more, which none has.
        return sign | largest;
    }
    let exponent = ((bits >> 23) as i32 - 127).max(least);
    let in_units = f32::from_bits(bits) * f32::from_bits(((127 + mantissa - exponent) as u32) << 23);
    // The exponent's field follows the mantissa's, so what is carried over comes out right.
    let units = (in_units + f32::from(random) / 256.0) as u32;
    let code = ((exponent - least) as u32) << mantissa;
    sign | (code + units).min(largest.into()) as u8
}

fn floats(element: Element, bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(element.size().as_usize()).map(|raw| load(element, raw)).collect()
}

fn number(raw: &[u8]) -> usize {
    u32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]) as usize
}

/// The nearest half where `through` is one. Without branches, for many at once.
#[inline(always)]
fn rounded(through: Element, value: f32) -> f32 {
    if through != Element::F16 {
        return value;
    }
    let (bits, sign) = (value.to_bits() & 0x7fff_ffff, value.to_bits() & 0x8000_0000);
    let normal = (bits + 0xfff + (bits >> 13 & 1)) & !0x1fff;
    // As in `float_to_half`.
    let magic = f32::from_bits((126 << 23) | 0x0040_0000);
    let small = ((f32::from_bits(bits) + magic) - magic).to_bits();
    let half = if bits < 0x3880_0000 { small } else { normal };
    let half = if bits >= 0x477f_f000 { 0x7f80_0000 } else { half };
    let half = if bits > 0x7f80_0000 { 0x7fc0_0000 } else { half };
    f32::from_bits(sign | half)
}

/// The value of an element's bytes.
fn load(element: Element, raw: &[u8]) -> f32 {
    let half = || u16::from_ne_bytes([raw[0], raw[1]]);
    match element {
        Element::F32 => f32::from_ne_bytes([raw[0], raw[1], raw[2], raw[3]]),
        Element::F16 => half_to_float(half()),
        Element::Bf16 => f32::from_bits(u32::from(half()) << 16),
        Element::F8E5m2 => half_to_float(u16::from(raw[0]) << 8),
        Element::F8E4m3 => {
            let (sign, rest) = (u32::from(raw[0] & 0x80) << 24, u32::from(raw[0] & 0x7f));
            if rest == 0x7f {
                return f32::from_bits(sign | 0x7fc0_0000);
            }
            // The exponent's bias is 7 in place of 127; exact, subnormal numbers included.
            f32::from_bits(sign | rest << 20) * f32::from_bits((120 + 127) << 23)
        }
    }
}

/// Rounds a value to an element's bytes; only for targets.
fn store(element: Element, value: f32, raw: &mut [u8]) {
    match element {
        Element::F32 => {
            let value = if value.is_nan() { f32::from_bits(0x7fc0_0000) } else { value };
            raw.copy_from_slice(&value.to_ne_bytes());
        }
        Element::F16 => raw.copy_from_slice(&float_to_half(value).to_ne_bytes()),
        Element::Bf16 => {
            let bits = value.to_bits();
            let rounded = if value.is_nan() { 0x7fc0 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 };
            raw.copy_from_slice(&(rounded as u16).to_ne_bytes());
        }
        Element::F8E4m3 | Element::F8E5m2 => unreachable!("the device checks that elements are targets"),
    }
}

fn half_to_float(half: u16) -> f32 {
    let (sign, rest) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    if rest >= 0x7c00 {
        // Infinities and NaN, quiet.
        let quiet = if rest > 0x7c00 { 0x0040_0000 } else { 0 };
        return f32::from_bits(sign | 0x7f80_0000 | (rest & 0x3ff) << 13 | quiet);
    }
    // The exponent's bias is 15 in place of 127; exact, subnormal numbers included.
    f32::from_bits(sign | rest << 13) * f32::from_bits((112 + 127) << 23)
}

fn float_to_half(value: f32) -> u16 {
    let (bits, sign) = (value.to_bits() & 0x7fff_ffff, (value.to_bits() >> 16 & 0x8000) as u16);
    if value.is_nan() {
        return 0x7e00;
    }
    // From 65520 on the nearest is infinity.
    if bits >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // Below the smallest normal number 2^-14: in units of 2^-24, rounded by the addition of 1.5 * 2^23 of them.
    if bits < 0x3880_0000 {
        let magic = f32::from_bits((126 << 23) | 0x0040_0000); // 1.5 * 2^-1: its last bit is 2^-24
        let rounded = (f32::from_bits(bits) + magic).to_bits() - magic.to_bits();
        return sign | rounded as u16;
    }
    let rounded = bits + 0xfff + (bits >> 13 & 1);
    sign | ((rounded - (112 << 23)) >> 13) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits_of(element: Element, value: f32) -> u16 {
        let mut raw = [0; 2];
        store(element, value, &mut raw);
        u16::from_ne_bytes(raw)
    }

    /// The nearest of a type's values, the even one where two are equally near, by looking at all of them.
    fn nearest(element: Element, value: f32) -> u16 {
        let infinity = if element == Element::F16 { 0x7c00 } else { 0x7f80 };
        // Infinity stands where the next number would.
        let at = |bits: u16| match bits == infinity {
            true if element == Element::F16 => 65536.0,
            true => 2f64.powi(128),
            false => f64::from(load(element, &bits.to_ne_bytes())),
        };
        let magnitude = f64::from(value.abs());
        let above = (0..=infinity).collect::<Vec<_>>().partition_point(|&bits| at(bits) < magnitude) as u16;
        let best = match above {
            0 => 0,
            above if above > infinity => infinity,
            above => {
                let (low, high) = (magnitude - at(above - 1), at(above) - magnitude);
                if low < high || (low == high && above % 2 == 1) { above - 1 } else { above }
            }
        };
        best | if value.is_sign_negative() { 0x8000 } else { 0 }
    }

    #[test]
    fn values_are_rounded_to_the_nearest_even_one() {
        let mut state = 7u64;
        for element in [Element::F16, Element::Bf16] {
            let mut values = vec![0.0, -0.0, f32::INFINITY, f32::MIN_POSITIVE, f32::MAX, f32::from_bits(1)];
            values.extend([65504.0, 65519.99, 65520.0, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8, 2f32.powi(-25)]);
            values.extend((0..3000).map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let bits = (state >> 32) as u32;
                // Half of them near the range of halfs, and many of them half-way between two.
                let bits = if bits & 1 == 0 { bits } else { bits & 0x8fff_ffff | 0x3000_0000 };
                f32::from_bits(if bits & 2 == 0 { bits } else { bits & 0xffff_f000 })
            }));
            for value in values.into_iter().filter(|value| !value.is_nan()) {
                assert_eq!(bits_of(element, value), nearest(element, value), "{element:?} {value:e}");
                let half = load(Element::F16, &bits_of(Element::F16, value).to_ne_bytes());
                assert_eq!(rounded(Element::F16, value).to_bits(), half.to_bits(), "{value:e}");
            }
            assert!(load(element, &bits_of(element, f32::NAN).to_ne_bytes()).is_nan());
            assert!(rounded(Element::F16, f32::NAN).is_nan());
        }
    }

    #[test]
    fn halfs_survive_the_way_there_and_back() {
        for element in [Element::F16, Element::Bf16] {
            for bits in 0..=u16::MAX {
                let value = load(element, &bits.to_ne_bytes());
                assert!(value.is_nan() || bits_of(element, value) == bits, "{element:?} {bits:#x}");
            }
        }
    }

    #[test]
    fn eight_bits_mean_what_their_formats_say() {
        let of = |element, raw: u8| load(element, &[raw]);
        let e4m3 = [(0x01, 2f32.powi(-9)), (0x08, 2f32.powi(-6)), (0x38, 1.0), (0xc4, -3.0), (0x7e, 448.0)];
        for (raw, value) in e4m3 {
            assert_eq!(of(Element::F8E4m3, raw), value, "{raw:#x}");
        }
        let e5m2 =
            [(0x01, 2f32.powi(-16)), (0x04, 2f32.powi(-14)), (0x3c, 1.0), (0xc2, -3.0), (0x7b, 57344.0)];
        for (raw, value) in e5m2 {
            assert_eq!(of(Element::F8E5m2, raw), value, "{raw:#x}");
        }
        assert!(of(Element::F8E4m3, 0xff).is_nan() && of(Element::F8E5m2, 0x7f).is_nan());
        assert_eq!(of(Element::F8E5m2, 0xfc), f32::NEG_INFINITY);
    }
}

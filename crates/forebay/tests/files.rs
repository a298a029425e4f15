//! Tensors of files that are asked for one by one are right, in whatever order they are asked for.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use common::{Random, Rig};
use forebay::device::host::HostConfig;
use forebay::device::{Device, DeviceAddr, Event, Stream};
use forebay::store::SourceFile;
use forebay::{Bytes, Engine, ExplicitVbar, FilePart, OnDevice, Use};

/// A safetensors file, and each tensor's place in it and bytes.
struct Tensors {
    file: tempfile::NamedTempFile,
    parts: Vec<(u64, Vec<u8>)>,
}

impl Tensors {
    fn new(random: &mut Random, sizes: &[usize]) -> Self {
        let mut end = 0;
        let entries = sizes.iter().enumerate().map(|(number, len)| {
            let begin = end;
            end += len;
            format!(r#""{number:05}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
        });
        let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
        file.write_all(header.as_bytes()).unwrap();
        let mut offset = 8 + header.len() as u64;
        let mut parts = Vec::new();
        for &size in sizes {
            let bytes: Vec<u8> = std::iter::repeat_with(|| random.next() as u8).take(size).collect();
            file.write_all(&bytes).unwrap();
            parts.push((offset, bytes));
            offset += size as u64;
        }
        Tensors { file, parts }
    }

    fn part(&self, number: usize) -> FilePart {
        let (offset, bytes) = &self.parts[number];
        let file = SourceFile::open(self.file.path()).unwrap();
        FilePart { file, offset: *offset, bytes: Bytes::new(bytes.len() as u64) }
    }
}

/// A place on the device, and a stream.
struct Place<'a> {
    engine: &'a Engine,
    device: &'a Arc<dyn Device>,
    vbar: ExplicitVbar,
    addr: DeviceAddr,
    stream: Stream,
}

const ROOM: Bytes = Bytes::mib(32);

impl<'a> Place<'a> {
    fn new(engine: &'a Arc<Engine>, rig: &'a Rig) -> Self {
        let vbar = engine.vbar("target", ROOM).unwrap();
        let addr = vbar.alloc(ROOM).unwrap();
        let stream = rig.stream();
        assert!(vbar.fault(addr, ROOM, Use::on(stream.handle())).unwrap().is_some());
        Place { engine, device: &rig.device, vbar, addr, stream }
    }

    /// Asks for tensors one after the other, without waiting for copies, each behind the one before.
    fn check(&self, tensors: &Tensors, order: &[usize]) {
        let (mut from, mut expected) = (self.addr, Vec::new());
        for &number in order {
            let part = tensors.part(number);
            // SAFETY: the place is faulted in, and this test's own.
            unsafe {
                self.engine.read_to_device(&part, OnDevice { addr: from, stream: self.stream.handle() })
            }
            .unwrap();
            expected.extend_from_slice(&tensors.parts[number].1);
            from = from.offset(part.bytes);
        }
        let mut found = vec![0; expected.len()];
        let event = Event::new(Arc::clone(self.device)).unwrap();
        let bytes = Bytes::new(found.len() as u64);
        // SAFETY: the place is faulted in, and `found` is awaited below.
        unsafe { self.device.copy_to_host(found.as_mut_ptr(), self.addr, bytes, self.stream.handle()) }
            .unwrap();
        // SAFETY: the stream lives.
        unsafe { event.record(self.stream.handle()) }.unwrap();
        event.synchronize().unwrap();
        assert!(found == expected, "other bytes in the order {order:?}");
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.vbar.unpin_everywhere(self.addr, ROOM).unwrap();
    }
}

const SIZES: [usize; 12] = [
    5 << 20,
    100,
    3 << 20,
    0,
    (2 << 20) + 777,
    1,
    9 << 20,
    4096,
    130 << 10,
    300 << 10,
    6 << 20,
    (1 << 20) - 3,
];

#[test]
fn tensors_are_right_in_any_order() {
    let mut random = Random::seeded();
    // What is read ahead has 16 MiB of it.
    let capacity = Bytes::mib(512);
    let slow = HostConfig { copy_delay: Duration::from_millis(2), capacity, ..HostConfig::default() };
    let rig = Rig::host(slow).unwrap_or_else(Rig::new);
    let engine = rig.engine(Bytes::mib(128));
    let tensors = Tensors::new(&mut random, &SIZES);
    let place = Place::new(&engine, &rig);
    let in_order: Vec<usize> = (0..SIZES.len()).collect();
    let in_blocks = [2, 0, 1, 5, 3, 4, 8, 6, 7, 11, 9, 10];
    for _ in 0..3 {
        place.check(&tensors, &in_order);
    }
    for _ in 0..3 {
        place.check(&tensors, &in_blocks);
    }
    for _ in 0..20 {
        let some: Vec<usize> = (0..6).map(|_| random.below(SIZES.len() as u64 - 1) as usize).collect();
        let total: usize = some.iter().map(|&number| SIZES[number]).sum();
        if total <= ROOM.as_usize() {
            place.check(&tensors, &some);
        }
    }
}

#[test]
fn files_that_take_turns_and_files_that_change_are_right() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let mut files: Vec<Tensors> = (0..20).map(|_| Tensors::new(&mut random, &SIZES[..5])).collect();
    let place = Place::new(&engine, &rig);
    for round in 0..3 {
        for tensors in &files {
            place.check(tensors, &[0, 1]);
            place.check(tensors, &[2, 4]);
        }
        // What was read ahead of this one is what it was.
        place.check(&files[round], &[0]);
        let other = Tensors::new(&mut random, &SIZES[..5]);
        std::thread::sleep(Duration::from_millis(20)); // so that its time differs
        std::fs::write(files[round].file.path(), std::fs::read(other.file.path()).unwrap()).unwrap();
        files[round].parts = other.parts;
        place.check(&files[round], &[1, 2, 4]);
    }
}

#[test]
fn several_threads_ask_at_once() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(256));
    let tensors = Tensors::new(&mut random, &SIZES);
    let orders: Vec<Vec<usize>> =
        (0..4).map(|_| (0..5).map(|_| random.below(6) as usize).collect()).collect();
    std::thread::scope(|scope| {
        for order in &orders {
            let (engine, rig, tensors) = (&engine, &rig, &tensors);
            scope.spawn(move || {
                let place = Place::new(engine, rig);
                (0..5).for_each(|_| place.check(tensors, order));
            });
        }
    });
}

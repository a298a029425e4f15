//! Tensors of files that are asked for one by one are right, in whatever order they are asked for.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use common::faulty::{Call, Failure, Faulty};
use common::{Random, Rig, eventually};
use forebay::device::host::HostConfig;
use forebay::device::{Device, DeviceAddr, Event, Stream};
use forebay::store::SourceFile;
use forebay::{
    Budget, Bytes, Engine, EngineConfig, EngineError, ExplicitVbar, FilePart, Growth, HostBuffer,
    HostBufferOptions, OnDevice, ReadBy, Use,
};

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

    /// Writes another file's contents to this one.
    fn overwrite(&mut self, other: Tensors) {
        std::thread::sleep(Duration::from_millis(20)); // so that its time differs
        std::fs::write(self.file.path(), std::fs::read(other.file.path()).unwrap()).unwrap();
        self.parts = other.parts;
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
    /// Pages of a model that runs.
    fn new(engine: &'a Arc<Engine>, rig: &'a Rig) -> Self {
        let place = Self::beside_models(engine, rig);
        place.vbar.begin_run();
        place
    }

    /// Memory that keeps nothing.
    fn beside_models(engine: &'a Arc<Engine>, rig: &'a Rig) -> Self {
        let vbar = engine.vbar("target", ROOM).unwrap();
        let addr = vbar.alloc(ROOM).unwrap();
        let place = Place { engine, device: &rig.device, vbar, addr, stream: rig.stream() };
        place.fault();
        place
    }

    fn fault(&self) {
        assert!(self.vbar.fault(self.addr, ROOM, Use::on(self.stream.handle())).unwrap().is_some());
    }

    fn unpin(&self) {
        self.vbar.unpin_everywhere(self.addr, ROOM).unwrap();
    }

    /// Asks for tensors one after the other, without waiting for copies, each behind the one before. How many of them the copy
    /// engine reads by itself.
    fn check(&self, tensors: &Tensors, order: &[usize]) -> usize {
        let (mut from, mut expected, mut by_copy_engine) = (self.addr, Vec::new(), 0);
        for &number in order {
            let part = tensors.part(number);
            let to = OnDevice { addr: from, stream: self.stream.handle() };
            // SAFETY: the place is faulted in, and this test's own.
            let by = unsafe { self.engine.read_to_device(&part, to) }.unwrap();
            by_copy_engine += usize::from(by == ReadBy::CopyEngine);
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
        by_copy_engine
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.unpin();
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
        files[round].overwrite(Tensors::new(&mut random, &SIZES[..5]));
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
                for _ in 0..5 {
                    place.check(tensors, order);
                }
            });
        }
    });
}

const ALL: [usize; 6] = [0, 1, 2, 3, 4, 5];
/// One of these has no bytes.
const SOME: usize = ALL.len() - 1;

/// Has the tensors asked for until the copy engine reads all of them, once the engine has looked at the host's memory.
fn register(place: &Place<'_>, tensors: &Tensors) {
    register_all_but(0, place, tensors);
}

fn register_all_but(missing: usize, place: &Place<'_>, tensors: &Tensors) {
    eventually("nothing is registered", || place.check(tensors, &ALL) == SOME - missing);
}

#[test]
fn what_is_asked_for_again_the_copy_engine_reads_by_itself_until_the_file_is_forgotten() {
    // Copies that are under way when their memory is to be given back.
    let slow = HostConfig { copy_delay: Duration::from_millis(2), registers: true, ..HostConfig::default() };
    let rig = Rig::host(slow).unwrap_or_else(Rig::new);
    let engine = rig.engine(Bytes::mib(128));
    let mut random = Random::seeded();
    let [one, other] = [Tensors::new(&mut random, &SIZES), Tensors::new(&mut random, &SIZES)];
    let place = Place::new(&engine, &rig);
    let registered = || engine.stats().registered;
    for _ in 0..3 {
        for tensors in [&one, &other] {
            assert_eq!(place.check(tensors, &ALL), 0, "the first time they are read");
            register(&place, tensors);
        }
        let both = registered();
        assert!(both > Bytes::mib(20), "{both}");
        assert_eq!((place.check(&one, &ALL), place.check(&other, &ALL)), (SOME, SOME));
        assert_eq!(registered(), both, "registered once");
        engine.forget_file(Some(one.part(0).file.stamp().file()));
        assert_eq!(place.check(&one, &ALL), 0, "forgotten");
        eventually("one file is not given back", || registered() < Bytes::new(both.get() * 2 / 3));
        assert_eq!(place.check(&other, &ALL), SOME, "the other is not");
        engine.forget_file(None);
        eventually("not everything is given back", || registered() == Bytes::ZERO);
    }
}

#[test]
fn what_is_asked_for_once_a_run_is_registered_in_the_third() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let place = Place::new(&engine, &rig);
    let mut random = Random::seeded();
    let [looked_at, once, again] = [(); 3].map(|()| Tensors::new(&mut random, &SIZES));
    register(&place, &looked_at);
    for by_copy_engine in [0, 0, SOME, SOME] {
        place.vbar.begin_run();
        assert_eq!(place.check(&once, &ALL), by_copy_engine);
    }
    for by_copy_engine in [[0, SOME], [SOME, SOME]] {
        place.vbar.begin_run();
        assert_eq!([place.check(&again, &ALL), place.check(&again, &ALL)], by_copy_engine);
    }
    assert_eq!(place.check(&looked_at, &ALL), SOME, "it stays so");
}

#[test]
fn what_does_not_stay_is_registered_before_it_is_asked_for_again() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let mut random = Random::seeded();
    let [passing, staying, lost] = [(); 3].map(|()| Tensors::new(&mut random, &SIZES));
    let bytes: Bytes = ALL.iter().map(|&number| passing.part(number).bytes).sum();
    let registered = || engine.stats().registered;

    let buffer = Place::beside_models(&engine, &rig);
    assert_eq!(buffer.check(&passing, &ALL), 0);
    eventually("what passes is not registered", || registered() >= bytes);
    assert_eq!(buffer.check(&passing, &ALL), SOME);
    let before = registered();
    assert!(before < bytes + Bytes::mib(1), "{before}");

    // In one page.
    let place = Place::new(&engine, &rig);
    assert_eq!(place.check(&staying, &ALL), 0);
    place.vbar.begin_run();
    assert_eq!(place.check(&lost, &ALL), 0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(registered(), before, "what stays is registered");
    place.unpin();
    assert_eq!(place.vbar.free(ROOM), ROOM);
    eventually("what left while its model ran is not registered", || registered() >= before + bytes);
    place.vbar.prioritize();
    place.fault();
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        registered() < before + bytes + Bytes::mib(1),
        "what left its model in an earlier run is registered"
    );
    assert_eq!((place.check(&lost, &ALL), place.check(&staying, &ALL)), (SOME, 0));
}

#[test]
fn what_a_model_kept_that_is_gone_is_not_registered() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let mut random = Random::seeded();
    let [gone, passing] = [(); 2].map(|()| Tensors::new(&mut random, &SIZES));
    assert_eq!(Place::new(&engine, &rig).check(&gone, &ALL), 0);
    // Behind whatever the model left.
    let buffer = Place::beside_models(&engine, &rig);
    assert_eq!(buffer.check(&passing, &ALL), 0);
    let bytes: Bytes = ALL.iter().map(|&number| passing.part(number).bytes).sum();
    eventually("what passes is not registered", || engine.stats().registered >= bytes);
    std::thread::sleep(Duration::from_millis(50));
    assert!(engine.stats().registered < bytes + Bytes::mib(1), "{}", engine.stats().registered);
}

#[test]
fn what_a_file_does_not_have_is_an_error_and_nothing_else_stops() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let place = Place::new(&engine, &rig);
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    assert_eq!(place.check(&tensors, &ALL), 0);
    let last = tensors.part(ALL[ALL.len() - 1]);
    let file_end = last.file.len().get();
    // Asked for twice: what the engine knows of it would be registered then.
    for (offset, bytes) in [(file_end, 1), (file_end - 1, 2), (0, u64::MAX - 9), (u64::MAX - 9, 9)] {
        for _ in 0..2 {
            let part = FilePart { file: Arc::clone(&last.file), offset, bytes: Bytes::new(bytes) };
            let to = OnDevice { addr: place.addr, stream: place.stream.handle() };
            // SAFETY: nothing is written, since nothing is read.
            let error = unsafe { engine.read_to_device(&part, to) }.unwrap_err();
            assert!(matches!(error, EngineError::Transfer { .. }), "{offset} {bytes}: {error}");
        }
    }
    place.check(&tensors, &ALL);
}

#[test]
fn a_file_is_open_once_however_many_of_its_parts_are_known() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let mut random = Random::seeded();
    let [staying, passing, again] = [(); 3].map(|()| Tensors::new(&mut random, &[4096; 200]));
    let all: Vec<_> = (0..200).collect();
    let [model, buffer] = [Place::new(&engine, &rig), Place::beside_models(&engine, &rig)];
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = open();
    assert_eq!(
        (model.check(&staying, &all), buffer.check(&passing, &all), model.check(&again, &all)),
        (0, 0, 0)
    );
    eventually("what is asked for again is not registered", || model.check(&again, &all) == all.len());
    eventually("what passes is not registered", || buffer.check(&passing, &all) == all.len());
    // Nothing is in the readers' hands any more; other threads open a few.
    assert!(open() < before + 20, "{} files are open, {before} before", open());
}

#[test]
fn what_is_read_ahead_takes_no_memory_from_weights() {
    let Some(rig) = Rig::host(HostConfig { capacity: Bytes::gib(2), ..HostConfig::default() }) else {
        return;
    };
    let config = EngineConfig { budget: Budget::Headroom(Bytes::mib(512)), ..EngineConfig::default() };
    let engine = Engine::new(Arc::clone(&rig.device), config).unwrap();
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    let place = Place::new(&engine, &rig);
    let (free, budget) = (engine.memory().unwrap().free, engine.budget().1);
    place.check(&tensors, &ALL);
    let ring = free.saturating_sub(engine.memory().unwrap().free);
    assert_eq!(ring, Bytes::mib(64), "a part of the device is what is read ahead");
    // The device's memory is looked at five times a second.
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!(engine.budget().1, budget);
    engine.set_budget(config.budget).unwrap();
    assert_eq!(engine.budget().1, budget, "set while it is there");
    engine.end_read_ahead();
    std::thread::sleep(Duration::from_millis(600));
    assert_eq!((engine.memory().unwrap().free, engine.budget().1), (free, budget));
}

#[test]
fn the_memory_to_read_ahead_is_given_back_once_the_copy_engine_reads_everything() {
    let capacity = Bytes::gib(2);
    let Some(rig) = Rig::host(HostConfig { capacity, registers: true, ..HostConfig::default() }) else {
        return;
    };
    let engine = rig.engine(Bytes::mib(128));
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    let place = Place::new(&engine, &rig);
    let free = || engine.memory().unwrap().free;
    let all = free();
    for _ in 0..2 {
        assert_eq!(place.check(&tensors, &ALL), 0, "the first time they are read");
        assert!(free() < all, "nothing is read ahead");
        register(&place, &tensors);
        for _ in 0..20 {
            place.check(&tensors, &ALL);
        }
        assert_eq!(free(), all);
        engine.forget_file(None);
    }
}

#[test]
fn what_was_registered_of_a_file_that_changes_is_given_back() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let mut random = Random::seeded();
    let mut tensors = Tensors::new(&mut random, &SIZES[..6]);
    let place = Place::new(&engine, &rig);
    register(&place, &tensors);
    tensors.overwrite(Tensors::new(&mut random, &SIZES[..6]));
    assert_eq!(place.check(&tensors, &ALL), 0, "another file");
    eventually("it stays registered", || engine.stats().registered == Bytes::ZERO);
    assert_eq!(place.check(&tensors, &ALL), SOME);
}

#[test]
fn no_more_is_registered_than_allowed_and_first_to_leave_is_what_the_application_has_a_copy_of() {
    let rig = Rig::new();
    let engine = rig.engine(Bytes::mib(128));
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    let place = Place::new(&engine, &rig);
    register(&place, &tensors);
    let registered = || engine.stats().registered;
    let all = registered();

    let growth = Growth { register: false, may_move: false };
    let buffer =
        HostBuffer::new(Some(&engine), HostBufferOptions { limit: ROOM, ahead: Bytes::ZERO }).unwrap();
    let part = tensors.part(0);
    buffer.extend(part.bytes, growth).unwrap();
    // SAFETY: the buffer is this test's own.
    unsafe { buffer.read(&part, Bytes::ZERO, None) }.unwrap();
    assert_eq!(place.check(&tensors, &[2]), 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(registered(), all, "given back beside what the application registers");
    engine.set_registered(Some(all.saturating_sub(Bytes::new(1))));
    eventually("what is copied stays registered", || registered() < all);
    assert!(registered() + part.bytes + Bytes::mib(1) > all, "{} of {all}", registered());

    let limit = Bytes::mib(4);
    engine.set_registered(Some(limit));
    eventually("more is registered than allowed", || registered() <= limit);
    for _ in 0..3 {
        let by_copy_engine = place.check(&tensors, &ALL);
        assert!((1..SOME).contains(&by_copy_engine), "{by_copy_engine}");
        assert!(registered() <= limit, "{}", registered());
    }
    engine.set_registered(Some(Bytes::ZERO));
    eventually("some is registered", || registered() == Bytes::ZERO);
    assert_eq!(place.check(&tensors, &ALL), 0);
}

/// An engine on a device that fails what it is told to.
fn faulty(rig: &Rig) -> (Arc<Faulty>, Arc<Engine>) {
    let faulty = Faulty::new(Arc::clone(&rig.device));
    let config = EngineConfig { budget: Budget::Fixed(Bytes::mib(128)), ..EngineConfig::default() };
    let device: Arc<dyn Device> = Arc::clone(&faulty) as _;
    (faulty, Engine::new(device, config).unwrap())
}

#[test]
fn what_a_device_refuses_to_register_is_read() {
    let rig = Rig::new();
    let (faulty, engine) = faulty(&rig);
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    let place = Place::new(&engine, &rig);
    faulty.fail(Call::RegisterHost, Failure::Refused, 0, 2);
    register_all_but(2, &place, &tensors);
    assert_eq!((faulty.hits(), engine.registers()), (2, true), "each is tried once");
    engine.forget_file(None);
    faulty.fail(Call::RegisterHost, Failure::Refused, 0, u32::MAX);
    for _ in 0..3 {
        assert_eq!(place.check(&tensors, &ALL), 0);
    }
    eventually("some stays registered", || engine.stats().registered == Bytes::ZERO);
    assert_eq!(
        (faulty.hits(), engine.registers()),
        (3, false),
        "after three in a row it is not asked any more"
    );
}

#[test]
fn what_may_still_be_copied_is_never_given_back_and_ends_with_the_engine() {
    let rig = Rig::new();
    let (faulty, engine) = faulty(&rig);
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    let place = Place::new(&engine, &rig);
    register(&place, &tensors);
    let to = OnDevice { addr: place.addr, stream: place.stream.handle() };
    faulty.fail(Call::Record, Failure::Refused, 0, 1);
    // SAFETY: the place is faulted in, and this test's own.
    unsafe { engine.read_to_device(&tensors.part(0), to) }.unwrap_err();
    assert_eq!(faulty.hits(), 1);
    engine.forget_file(None);
    eventually("it is in the books", || engine.stats().registered == Bytes::ZERO);
    assert_eq!(place.check(&tensors, &ALL), 0);
    assert_eq!(place.check(&tensors, &ALL), SOME, "what comes later is registered again");
    drop(place);
    assert_eq!(faulty.live().registered, SOME as i64 + 1);
    drop(engine);
    assert_eq!(faulty.live().registered, 1, "what a copy may read");
}

#[test]
fn nothing_stays_registered_when_the_engine_ends_while_it_is_asked() {
    let rig = Rig::new();
    let tensors = Tensors::new(&mut Random::seeded(), &SIZES);
    for round in 0..8 {
        let (faulty, engine) = faulty(&rig);
        let place = Place::new(&engine, &rig);
        register(&place, &tensors);
        engine.forget_file(None);
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (engine, tensors, stream) = (&engine, &tensors, rig.stream());
                let to =
                    OnDevice { addr: place.addr.offset(Bytes::mib(6) * number), stream: stream.handle() };
                scope.spawn(move || {
                    // SAFETY: the place is faulted in, and what is in it is looked at by nobody.
                    while unsafe { engine.read_to_device(&tensors.part(2), to) }.is_ok() {}
                    drop(stream);
                });
            }
            std::thread::sleep(Duration::from_micros(500 * round));
            engine.shut_down();
        });
        assert_eq!(faulty.live().registered, 0);
        drop(place);
    }
}

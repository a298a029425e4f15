//! Host memory that grows at one address: what is registered when, and what copies still find.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Rig, engine_on, eventually};
use forebay::device::host::{HostConfig, HostDevice};
use forebay::device::{Device, DeviceAddr, Event, Stream};
use forebay::store::SourceFile;
use forebay::{Bytes, Engine, EngineError, FilePart, Growth, HostBuffer, HostBufferOptions, OnDevice, Use};

const PIECE: Bytes = Bytes::mib(3);
const OWN: Growth = Growth { register: true, may_move: false };
const USERS: Growth = Growth { register: false, may_move: false };

fn options(limit: Bytes) -> HostBufferOptions {
    HostBufferOptions { limit, ahead: Bytes::mib(8) }
}

/// A host device that registers memory, and is slow to copy.
fn registering(copy_delay: Duration) -> Arc<HostDevice> {
    Arc::new(HostDevice::new(HostConfig { registers: true, copy_delay, ..HostConfig::default() }).unwrap())
}

fn engine(device: &Arc<HostDevice>) -> Arc<Engine> {
    engine_on(Arc::clone(device) as Arc<dyn Device>, Bytes::mib(64))
}

/// Whether the device takes a registration of the part: it refuses what is registered in any part.
fn is_free(device: &HostDevice, buffer: &HostBuffer, offset: Bytes, bytes: Bytes) -> bool {
    let first = buffer.range().base().wrapping_add(offset.as_usize());
    // SAFETY: the tests' buffers are larger than what they ask about, and the registration goes at once.
    let registered = unsafe { device.register_memory(first, bytes) }.is_ok();
    if registered {
        // SAFETY: registered just now.
        unsafe { device.unregister_host(first, bytes) }.unwrap();
    }
    registered
}

#[test]
fn growing_registers_in_large_pieces_ahead_of_need() {
    let device = registering(Duration::ZERO);
    let buffer = HostBuffer::new(Some(&engine(&device)), options(Bytes::mib(256))).unwrap();
    let (mut before, mut steps) = (Bytes::ZERO, 0);
    for _ in 0..40 {
        buffer.extend(PIECE, OWN).unwrap();
        let registered = buffer.registered();
        assert!(registered >= buffer.len());
        steps += u32::from(registered != before);
        before = registered;
    }
    assert!(steps <= 20, "{steps} registrations for 40 parts");
    buffer.truncate(Bytes::ZERO, true).unwrap();
    eventually("all is given back", || is_free(&device, &buffer, Bytes::ZERO, Bytes::mib(120)));
    assert_eq!(buffer.registered(), Bytes::ZERO);
    buffer.extend(PIECE, OWN).unwrap();
    assert!(buffer.registered() >= PIECE);
}

#[test]
fn what_its_user_registers_is_free_to_be_registered_and_given_up_when_it_shrinks() {
    let device = registering(Duration::ZERO);
    let buffer = HostBuffer::new(Some(&engine(&device)), options(Bytes::mib(256))).unwrap();
    buffer.extend(PIECE, OWN).unwrap();
    for part in 1..4 {
        buffer.extend(PIECE, USERS).unwrap();
        let first = buffer.range().base().wrapping_add((PIECE * part).as_usize());
        // SAFETY: the part is this test's own.
        unsafe { device.register_memory(first, PIECE) }.unwrap();
    }
    assert_eq!(buffer.registered(), PIECE);
    buffer.truncate(PIECE * 2, true).unwrap();
    eventually("what its user registered is given up", || is_free(&device, &buffer, PIECE * 2, PIECE * 2));
    assert!(!is_free(&device, &buffer, PIECE, PIECE));
    let first = buffer.range().base().wrapping_add(PIECE.as_usize());
    // SAFETY: registered above; from here on nobody needs it.
    unsafe { device.unregister_host(first, PIECE) }.unwrap();
    buffer.truncate(PIECE, false).unwrap();
    assert_eq!(buffer.registered(), PIECE);
    let kept = buffer.range();
    drop(buffer);
    drop(kept);
}

#[test]
fn copies_find_what_was_read_however_soon_the_buffer_shrinks_and_grows_again() {
    let rig = Rig::host(HostConfig {
        registers: true,
        copy_delay: Duration::from_millis(20),
        ..HostConfig::default()
    });
    let rig = rig.unwrap_or_else(Rig::new);
    let engine = rig.engine(Bytes::mib(64));
    let stream = rig.stream();
    let contents: Vec<u8> = (0..Bytes::mib(6).as_usize()).map(|i| (i * 31 / 7) as u8).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &contents).unwrap();
    let file = SourceFile::open(file.path()).unwrap();
    let part = FilePart { file, offset: 0, bytes: Bytes::mib(6) };
    let vbar = engine.vbar("target", Bytes::mib(32)).unwrap();
    let addr = vbar.alloc(part.bytes).unwrap();
    assert!(vbar.fault(addr, part.bytes, Use::on(stream.handle())).unwrap().is_some());
    let place = OnDevice { addr, stream: stream.handle() };
    for growth in [OWN, USERS] {
        let buffer = HostBuffer::new(Some(&engine), options(Bytes::mib(64))).unwrap();
        buffer.extend(part.bytes, growth).unwrap();
        // SAFETY: the place is faulted in, and this test's own.
        unsafe { buffer.read(&part, Bytes::ZERO, Some((&engine, place))) }.unwrap();
        buffer.truncate(Bytes::ZERO, true).unwrap();
        buffer.extend(part.bytes, growth).unwrap();
        let first = buffer.range().base();
        // SAFETY: the bytes are this test's own; copies of them have ended before the buffer grew again.
        unsafe { std::ptr::write_bytes(first, 0xEE, part.bytes.as_usize()) };
        drop(buffer);
        assert_eq!(read_back(&rig.device, addr, part.bytes, &stream), contents);
        // SAFETY: as above.
        unsafe { engine.read_to_device(&part, place) }.unwrap();
        assert_eq!(read_back(&rig.device, addr, part.bytes, &stream), contents);
    }
    vbar.unpin_everywhere(addr, part.bytes).unwrap();
}

#[test]
fn a_buffer_outlives_its_engine_and_grows_no_further_than_its_range() {
    let device = registering(Duration::ZERO);
    let engine = engine(&device);
    let buffer = HostBuffer::new(Some(&engine), options(Bytes::mib(8))).unwrap();
    buffer.extend(Bytes::mib(8), OWN).unwrap();
    assert!(matches!(buffer.extend(Bytes::new(1), OWN), Err(EngineError::Invalid(_))));
    assert!(matches!(buffer.truncate(Bytes::mib(9), true), Err(EngineError::Invalid(_))));
    let base = buffer.range().base();
    // SAFETY: the byte is in the buffer.
    unsafe { base.write(42) };
    buffer.extend(Bytes::mib(1), Growth { may_move: true, ..OWN }).unwrap();
    let moved = buffer.range();
    assert_ne!(moved.base(), base);
    // SAFETY: the byte is in the buffer.
    assert_eq!(unsafe { moved.base().read() }, 42);
    engine.shut_down();
    drop(engine);
    buffer.truncate(Bytes::mib(1), true).unwrap();
    // SAFETY: the byte is in the buffer.
    unsafe { moved.base().write(43) };
}

fn read_back(device: &Arc<dyn Device>, addr: DeviceAddr, bytes: Bytes, stream: &Stream) -> Vec<u8> {
    let mut read = vec![0; bytes.as_usize()];
    let event = Event::new(Arc::clone(device)).unwrap();
    // SAFETY: the place is faulted in, and `read` is awaited below.
    unsafe { device.copy_to_host(read.as_mut_ptr(), addr, bytes, stream.handle()) }.unwrap();
    // SAFETY: the stream lives.
    unsafe { event.record(stream.handle()) }.unwrap();
    event.synchronize().unwrap();
    read
}

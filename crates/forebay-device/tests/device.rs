//! What every device promises, on the host and on the device named by `FOREBAY_TEST_DEVICE` (such as `cuda:0`).

mod common;

use std::sync::Arc;

use common::{Page, Rng, fill, frame_of, on_every_device, read};
use forebay_core::Bytes;
use forebay_device::{DeviceError, Event, Frame, HostCopy, PinnedBuffer, Reservation, Stream, StreamHandle};

#[test]
fn a_tebibyte_of_addresses_costs_no_memory() {
    on_every_device(|device| {
        let before = device.memory().unwrap();
        let resident = common::resident_memory();
        let range = Reservation::new(Arc::clone(device), Bytes::gib(1024), Bytes::gib(1)).unwrap();
        assert_eq!(range.addr().get() % Bytes::gib(1).get(), 0);
        let taken = before.free.saturating_sub(device.memory().unwrap().free);
        assert!(taken <= Bytes::mib(64), "{taken} taken");
        let grown = common::resident_memory().saturating_sub(resident);
        assert!(grown <= Bytes::mib(64), "{grown} more resident");
    });
}

#[test]
fn a_frame_keeps_its_contents_at_another_address() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size * 4, size).unwrap();
        let frame = frame_of(device, size);
        let bytes = rng.bytes(size);
        let page = Page::map(device, range.addr(), &frame);
        fill(device, page.addr(), &bytes);
        for slot in [0, 3, 1, 1] {
            // At most one page holds the frame: the old one goes before the new one comes.
            page.move_to(range.addr().offset(size * slot));
            assert!(read(device, page.addr(), size) == bytes, "other bytes in slot {slot}");
        }
    });
}

#[test]
fn frames_change_places_under_a_stable_address() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size, size).unwrap();
        let frames = [frame_of(device, size), frame_of(device, size)];
        let contents = [rng.bytes(size), rng.bytes(size)];
        for (frame, bytes) in frames.iter().zip(&contents) {
            fill(device, Page::map(device, range.addr(), frame).addr(), bytes);
        }
        for turn in [0, 1, 1, 0, 1] {
            let page = Page::map(device, range.addr(), &frames[turn]);
            assert!(read(device, page.addr(), size) == contents[turn], "not the bytes of frame {turn}");
        }
    });
}

#[test]
fn adjacent_frames_are_opened_and_unmapped_in_one_call() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size * 3, size).unwrap();
        let frames = [frame_of(device, size * 2), frame_of(device, size)];
        // SAFETY: the frames are mapped nowhere else, side by side in a fresh reservation.
        unsafe { device.map(range.addr(), size * 2, frames[0].handle()) }.unwrap();
        // SAFETY: as above.
        unsafe { device.map(range.addr().offset(size * 2), size, frames[1].handle()) }.unwrap();
        // SAFETY: the whole range is mapped.
        unsafe { device.allow_access(range.addr(), size * 3) }.unwrap();
        let bytes = rng.bytes(size * 3);
        fill(device, range.addr(), &bytes);
        assert!(read(device, range.addr(), size * 3) == bytes);
        // SAFETY: two whole frames; `read` waited for its copy.
        unsafe { device.unmap(range.addr(), size * 3) }.unwrap();
    });
}

#[test]
fn parts_of_frames_and_taken_addresses_are_refused() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let half = device.granularity();
        let size = half * 2;
        let range = Reservation::new(Arc::clone(device), size * 2, half).unwrap();
        let (frame, other) = (frame_of(device, size), frame_of(device, size));
        let refused = |call: &str, result: Result<(), DeviceError>| match result {
            Err(DeviceError::Driver { .. }) => {}
            result => panic!("{call} gave {result:?}"),
        };

        // SAFETY: refused, and the range is free.
        refused("map half a frame", unsafe { device.map(range.addr(), half, frame.handle()) });
        let page = Page::map(device, range.addr(), &frame);
        let bytes = rng.bytes(size);
        fill(device, page.addr(), &bytes);
        // SAFETY: refused, and no work is pending.
        refused("unmap the first half", unsafe { device.unmap(range.addr(), half) });
        // SAFETY: refused, and no work is pending.
        refused("unmap the second half", unsafe { device.unmap(range.addr().offset(half), half) });
        // SAFETY: refused, so the frame that is there stays.
        refused("map over a frame", unsafe { device.map(range.addr(), size, other.handle()) });
        assert!(read(device, page.addr(), size) == bytes, "a refused call changed the contents");
    });
}

#[test]
fn a_device_without_room_says_how_much_was_wanted_and_free() {
    on_every_device(|device| {
        let before = device.memory().unwrap();
        let wanted = before.total.checked_align_up(device.granularity()).unwrap() + device.granularity();
        let error = Frame::new(Arc::clone(device), wanted).unwrap_err();
        assert!(error.is_out_of_memory(), "{error}");
        let DeviceError::OutOfMemory { wanted: said, free: Some(free), .. } = error else {
            panic!("no numbers: {error:?}");
        };
        assert_eq!(said, wanted);
        assert!(free <= before.total, "{free} of {}", before.total);
        frame_of(device, device.granularity());
    });
}

#[test]
fn a_released_frame_gives_its_room_back() {
    on_every_device(|device| {
        let size = Bytes::mib(32);
        let free = || device.memory().unwrap().free;
        let is_seen = || {
            let before = free();
            let frame = frame_of(device, size);
            let between = free();
            drop(frame);
            between + size <= before && free() + Bytes::mib(2) >= before
        };
        // Others take and give memory of the same device, so this is seen in a moment in which they do not.
        let start = std::time::Instant::now();
        while !is_seen() {
            assert!(start.elapsed() < std::time::Duration::from_secs(20), "{} free", free());
        }
    });
}

#[test]
fn an_event_never_recorded_is_complete() {
    on_every_device(|device| {
        let event = Event::new(Arc::clone(device)).unwrap();
        let stream = Stream::new(Arc::clone(device)).unwrap();
        assert!(event.is_complete().unwrap());
        event.synchronize().unwrap();
        // SAFETY: the stream lives.
        unsafe { event.wait_on(stream.handle()) }.unwrap();
        let done = Event::new(Arc::clone(device)).unwrap();
        // SAFETY: the stream lives.
        unsafe { done.record(stream.handle()) }.unwrap();
        done.synchronize().unwrap();
        assert!(done.is_complete().unwrap());
    });
}

#[test]
fn a_stream_that_waits_sees_the_other_streams_bytes() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = Bytes::mib(8);
        let range = Reservation::new(Arc::clone(device), size, size).unwrap();
        let frame = frame_of(device, size);
        let page = Page::map(device, range.addr(), &frame);
        let [writer, reader] = [(); 2].map(|()| Stream::new(Arc::clone(device)).unwrap());
        let [written, seen] = [(); 2].map(|()| Event::new(Arc::clone(device)).unwrap());
        let [from, to] = [(); 2].map(|()| PinnedBuffer::new(Arc::clone(device), size).unwrap());
        for round in 0..8 {
            let bytes = rng.bytes(size);
            // SAFETY: the last round's copies have completed: `seen` was waited for.
            unsafe { from.slice_mut(Bytes::ZERO, size) }.copy_from_slice(&bytes);
            // SAFETY: the buffer is untouched and the page mapped until `seen` has completed.
            unsafe { device.copy_to_device(page.addr(), from.as_ptr(), size, writer.handle()) }.unwrap();
            // SAFETY: the stream lives.
            unsafe { written.record(writer.handle()) }.unwrap();
            // SAFETY: the stream lives.
            unsafe { written.wait_on(reader.handle()) }.unwrap();
            // SAFETY: the buffer is untouched and the page mapped until `seen` has completed.
            unsafe { device.copy_to_host(to.as_ptr(), page.addr(), size, reader.handle()) }.unwrap();
            // SAFETY: the stream lives.
            unsafe { seen.record(reader.handle()) }.unwrap();
            seen.synchronize().unwrap();
            assert!(written.is_complete().unwrap());
            // SAFETY: the copy has completed.
            assert!(unsafe { to.slice(Bytes::ZERO, size) } == bytes, "round {round} saw other bytes");
        }
    });
}

/// Copies in and out of a few places on several streams, ordered by one event a place, against a plain model.
#[test]
fn events_order_random_copies_across_streams() {
    const PLACE: Bytes = Bytes::kib(64);
    const STEPS: u64 = 120;
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size, size).unwrap();
        let frame = frame_of(device, size);
        let page = Page::map(device, range.addr(), &frame);
        let streams = [(); 3].map(|()| Stream::new(Arc::clone(device)).unwrap());
        let mut places =
            [(); 4].map(|()| (vec![0; PLACE.as_usize()], Event::new(Arc::clone(device)).unwrap()));
        for (i, (bytes, _)) in places.iter_mut().enumerate() {
            *bytes = rng.bytes(PLACE);
            fill(device, page.addr().offset(PLACE * i as u64), bytes);
        }

        let buffer = PinnedBuffer::new(Arc::clone(device), PLACE * STEPS).unwrap();
        let mut expected = Vec::new();
        for step in 0..STEPS {
            let stream = streams[rng.below(3) as usize].handle();
            let place = rng.below(4);
            let (bytes, last) = &mut places[place as usize];
            let addr = page.addr().offset(PLACE * place);
            let slot = PLACE * step;
            // SAFETY: the stream lives.
            unsafe { last.wait_on(stream) }.unwrap();
            let way = rng.below(4);
            if way < 2 {
                *bytes = rng.bytes(PLACE);
                // SAFETY: no copy uses this slot yet.
                let from = unsafe { buffer.slice_mut(slot, PLACE) };
                from.copy_from_slice(bytes);
                let cut = Bytes::new(1 + rng.below(PLACE.get() - 1));
                let parts = [(Bytes::ZERO, cut), (cut, PLACE - cut)].map(|(at, len)| HostCopy {
                    dst: addr.offset(at),
                    src: from.as_ptr().wrapping_add(at.as_usize()),
                    len,
                });
                let copied = match way {
                    // SAFETY: the slot is used by this copy alone; all copies have completed before the page goes.
                    0 => unsafe { device.copy_to_device(addr, from.as_ptr(), PLACE, stream) },
                    // SAFETY: as above, of two.
                    _ => unsafe { device.copy_all_to_device(&parts, stream) },
                };
                copied.unwrap();
            } else {
                expected.push((step, bytes.clone()));
                let to = buffer.as_ptr().wrapping_add(slot.as_usize());
                // SAFETY: the slot is used by this copy alone; all copies have completed before the page goes.
                unsafe { device.copy_to_host(to, addr, PLACE, stream) }.unwrap();
            }
            // SAFETY: the stream lives.
            unsafe { last.record(stream) }.unwrap();
        }
        for (_, last) in &places {
            last.synchronize().unwrap();
        }
        for (step, bytes) in expected {
            // SAFETY: all copies have completed.
            assert!(unsafe { buffer.slice(PLACE * step, PLACE) } == bytes, "step {step} read other bytes");
        }
    });
}

#[test]
fn work_on_a_dropped_stream_still_completes() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = Bytes::mib(4);
        let range = Reservation::new(Arc::clone(device), size, size).unwrap();
        let frame = frame_of(device, size);
        let page = Page::map(device, range.addr(), &frame);
        let bytes = rng.bytes(size);
        let from = PinnedBuffer::new(Arc::clone(device), size).unwrap();
        // SAFETY: no copy is pending.
        unsafe { from.slice_mut(Bytes::ZERO, size) }.copy_from_slice(&bytes);
        let done = Event::new(Arc::clone(device)).unwrap();
        let stream = Stream::new(Arc::clone(device)).unwrap();
        // SAFETY: the buffer is untouched and the page mapped until `done` has completed.
        unsafe { device.copy_to_device(page.addr(), from.as_ptr(), size, stream.handle()) }.unwrap();
        // SAFETY: the stream lives.
        unsafe { done.record(stream.handle()) }.unwrap();
        drop(stream);
        done.synchronize().unwrap();
        assert!(read(device, page.addr(), size) == bytes);
    });
}

#[test]
fn the_default_stream_copies_too() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size, size).unwrap();
        let frame = frame_of(device, size);
        let page = Page::map(device, range.addr(), &frame);
        let bytes = rng.bytes(size);
        let done = Event::new(Arc::clone(device)).unwrap();
        // SAFETY: `bytes` lives and the page is mapped until `done` has completed.
        unsafe { device.copy_to_device(page.addr(), bytes.as_ptr(), size, StreamHandle::DEFAULT) }.unwrap();
        // SAFETY: the default stream always lives.
        unsafe { done.record(StreamHandle::DEFAULT) }.unwrap();
        done.synchronize().unwrap();
        assert!(read(device, page.addr(), size) == bytes);
    });
}

#[test]
fn threads_map_and_fill_side_by_side() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size * 16, size).unwrap();
        std::thread::scope(|scope| {
            for part in 0..4 {
                let (device, mut rng) = (Arc::clone(device), rng.fork());
                let first = range.addr().offset(size * 4 * part);
                scope.spawn(move || {
                    let frame = frame_of(&device, size);
                    let mut bytes = rng.bytes(size);
                    fill(&device, Page::map(&device, first, &frame).addr(), &bytes);
                    for _ in 0..10 {
                        let page = Page::map(&device, first.offset(size * rng.below(4)), &frame);
                        assert!(read(&device, page.addr(), size) == bytes, "another thread's bytes");
                        bytes = rng.bytes(size);
                        fill(&device, page.addr(), &bytes);
                    }
                });
            }
        });
    });
}

#[test]
fn thousands_of_cycles_leak_nothing() {
    if let Some(child) = common::in_child("thousands_of_cycles_leak_nothing") {
        return assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
    }
    on_every_device(|device| {
        let size = device.granularity();
        let range = Reservation::new(Arc::clone(device), size * 16, size).unwrap();
        let cycle = |i: u64| {
            let frame = frame_of(device, size);
            let page = Page::map(device, range.addr().offset(size * (i % 16)), &frame);
            if i.is_multiple_of(20) {
                fill(device, page.addr(), &[1; 64]);
            }
        };
        // A device may make what it keeps on first use, and stream threads may outlive their streams for a moment.
        (0..40).for_each(cycle);
        let free = device.memory().unwrap().free;
        let before = common::process_counts();
        (0..2000).for_each(cycle);
        let after = common::process_counts();
        assert!(after.files <= before.files, "{before:?} then {after:?}");
        assert!(after.mappings <= before.mappings + 16, "{before:?} then {after:?}");
        assert!(after.threads <= before.threads + 4, "{before:?} then {after:?}");
        // Other tests take memory of the same device for a while.
        let start = std::time::Instant::now();
        while device.memory().unwrap().free + Bytes::mib(4) < free {
            assert!(start.elapsed() < std::time::Duration::from_secs(20), "device memory was lost");
            std::thread::yield_now();
        }
    });
}

#[test]
fn pinned_memory_is_page_aligned_and_shared_between_threads() {
    let mut rng = Rng::from_environment();
    on_every_device(|device| {
        let size = Bytes::mib(1);
        let sizes = [Bytes::new(1), Bytes::new(4097), size];
        let [_, _, buffer] = sizes.map(|size| {
            let buffer = PinnedBuffer::new(Arc::clone(device), size).unwrap();
            assert_eq!(buffer.as_ptr().addr() % 4096, 0, "a buffer of {size} at {:p}", buffer.as_ptr());
            buffer
        });
        let bytes = rng.bytes(size);
        let half = Bytes::kib(512);
        std::thread::scope(|scope| {
            for (i, part) in bytes.chunks(half.as_usize()).enumerate() {
                let buffer = &buffer;
                // SAFETY: the two halves do not overlap, and nobody reads them yet.
                scope.spawn(move || unsafe { buffer.slice_mut(half * i as u64, half) }.copy_from_slice(part));
            }
        });
        // SAFETY: the writers have ended.
        assert!(unsafe { buffer.slice(Bytes::ZERO, size) } == bytes);
    });
}

#[test]
fn a_device_is_opened_by_name() {
    on_every_device(|device| {
        let opened = forebay_device::open(device.id()).unwrap();
        assert_eq!(opened.id(), device.id());
        assert!(!opened.name().is_empty());
    });
}

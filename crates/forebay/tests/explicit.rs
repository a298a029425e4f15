//! The explicit interface: fault, fill, use, unpin, and what pressure does to it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use common::gate::Gate;
use common::{Consumer, Random, Rig};
use forebay::device::{Device, DeviceAddr, Event, PinnedBuffer, StreamHandle};
use forebay::{Bytes, EngineError, ExplicitVbar, Signature, Use};

/// An explicit VBAR's page.
const PAGE: Bytes = Bytes::mib(32);

/// Faults pages of a VBAR, by number.
fn fault(vbar: &ExplicitVbar, first: u64, count: u64) -> Option<Signature> {
    vbar.fault(vbar.base().offset(PAGE * first), PAGE * count, Use::on(StreamHandle::DEFAULT)).unwrap()
}

fn unpin(vbar: &ExplicitVbar, first: u64, count: u64) {
    vbar.unpin(vbar.base().offset(PAGE * first), PAGE * count, StreamHandle::DEFAULT).unwrap();
}

/// A page is faulted, and unpinned behind what is in the stream by then. Whether it was there.
fn used(vbar: &ExplicitVbar, page: u64, stream: StreamHandle) -> bool {
    let at = vbar.base().offset(PAGE * page);
    let found = vbar.fault(at, PAGE, Use::on(stream)).unwrap();
    vbar.unpin_everywhere(at, PAGE).unwrap();
    found.is_some()
}

/// The pages that have memory, and those that are pinned.
fn pages(vbar: &ExplicitVbar) -> (Vec<usize>, Vec<usize>) {
    let residency = vbar.residency();
    let of = |wanted: fn(&(bool, bool)) -> bool| {
        residency.iter().enumerate().filter(|(_, page)| wanted(page)).map(|(number, _)| number).collect()
    };
    (of(|page| page.0), of(|page| page.1))
}

/// Something is done once the gate opens, and not before, where it stays closed for as long as a test wants.
fn done_behind(rig: &Rig, gate: Gate, is_done: &Receiver<()>) {
    if rig.host.is_some() {
        let early = is_done.recv_timeout(Duration::from_millis(150));
        assert_eq!(early, Err(RecvTimeoutError::Timeout));
    }
    gate.open();
    is_done.recv().unwrap();
}

/// Copies bytes to the device, and waits for it.
fn fill(device: &Arc<dyn Device>, to: DeviceAddr, bytes: &[u8], stream: StreamHandle) {
    let len = Bytes::new(bytes.len() as u64);
    let buffer = PinnedBuffer::new(Arc::clone(device), len).unwrap();
    let done = Event::new(Arc::clone(device)).unwrap();
    // SAFETY: the buffer is new and nobody else's.
    unsafe { buffer.slice_mut(Bytes::ZERO, len) }.copy_from_slice(bytes);
    // SAFETY: the page is pinned, and the buffer lives until the copy is done.
    unsafe { device.copy_to_device(to, buffer.as_ptr(), len, stream) }.unwrap();
    // SAFETY: the test keeps the stream alive.
    unsafe { done.record(stream) }.unwrap();
    done.synchronize().unwrap();
}

#[test]
fn allocations_are_aligned_and_end_with_the_range() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE);
    let vbar = engine.vbar("v", Bytes::new(10_000)).unwrap();
    let offset = |addr: DeviceAddr| addr.get() - vbar.base().get();
    assert_eq!(vbar.base().get() % PAGE.get(), 0);
    assert_eq!(offset(vbar.alloc(Bytes::new(1)).unwrap()), 0);
    assert_eq!(offset(vbar.alloc(Bytes::new(600)).unwrap()), 512);
    assert_eq!(offset(vbar.alloc(Bytes::new(8000)).unwrap()), 1536);
    let error = vbar.alloc(Bytes::new(1000)).unwrap_err();
    assert_eq!(error.to_string(), "VBAR \"v\" of 9.8 KiB has 464 B left, not 1000 B");
    assert!(matches!(vbar.alloc(Bytes::MAX), Err(EngineError::Invalid(_))));
    assert_eq!(offset(vbar.alloc(Bytes::new(272)).unwrap()), 9728);
    assert_eq!((vbar.allocated(), vbar.size()), (Bytes::new(10_000), Bytes::new(10_000)));
    assert!(matches!(engine.vbar("nothing", Bytes::ZERO), Err(EngineError::Invalid(_))));
    assert!(matches!(engine.vbar("everything", Bytes::MAX), Err(EngineError::Invalid(_))));
}

#[test]
fn allocations_of_many_threads_never_overlap() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE);
    let vbar = engine.vbar("v", PAGE * 2).unwrap();
    let mut ranges: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|thread| {
                let vbar = &vbar;
                scope.spawn(move || {
                    let sizes = (0..200).map(|i| 1 + (i * 7919 + thread * 13) % 5000);
                    sizes.map(|size| (vbar.alloc(Bytes::new(size)).unwrap().get(), size)).collect::<Vec<_>>()
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
}

#[test]
fn equal_signatures_mean_that_the_bytes_are_still_there() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 3);
    let vbar = engine.vbar("v", PAGE * 8).unwrap();
    let (writer, mut reader) = (rig.stream(), rig.consumer());
    let bytes = Arc::new(random.bytes(3 << 20));
    // Across the border of two pages.
    let addr = vbar.base().offset(PAGE - Bytes::mib(1));
    let len = Bytes::mib(3);
    let first = vbar.fault(addr, len, Use::on(writer.handle())).unwrap().unwrap();
    assert_eq!(first.serials().len(), 2);
    fill(&rig.device, addr, &bytes, writer.handle());
    vbar.unpin(addr, len, writer.handle()).unwrap();
    for _ in 0..3 {
        let again = vbar.fault(addr, len, Use::on(reader.stream())).unwrap().unwrap();
        assert_eq!(again, first);
        reader.read_at(addr, &bytes, "an explicit weight");
        vbar.unpin(addr, len, reader.stream()).unwrap();
    }
    let one = fault(&vbar, 0, 1).unwrap();
    let other = fault(&vbar, 1, 1).unwrap();
    assert_eq!([one.serials(), other.serials()].concat(), first.serials());
    assert!(one != other && one != first);
    unpin(&vbar, 0, 2);
    reader.check();

    assert_eq!(engine.make_room(PAGE * 2).unwrap(), PAGE * 2);
    assert!(vbar.fault(addr, len, Use::on(reader.stream())).unwrap().is_none(), "the watermark fell");
    vbar.prioritize();
    let lost = vbar.fault(addr, len, Use::on(reader.stream())).unwrap().unwrap();
    assert!(lost.serials().iter().zip(first.serials()).all(|(now, then)| now != then));
    vbar.unpin(addr, len, reader.stream()).unwrap();
}

#[test]
fn faults_above_the_watermark_are_refused_and_pin_nothing() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 2);
    let vbar = engine.vbar("v", PAGE * 4).unwrap();
    assert_eq!(vbar.watermark(), 4);
    assert!(fault(&vbar, 0, 1).is_some() && fault(&vbar, 1, 1).is_some());
    assert!(fault(&vbar, 2, 1).is_none());
    assert_eq!((vbar.watermark(), pages(&vbar)), (2, (vec![0, 1], vec![0, 1])));
    // Refused at once until the watermark opens, though nothing is pinned any more; what lies below stays.
    unpin(&vbar, 0, 2);
    assert!(fault(&vbar, 2, 2).is_none() && fault(&vbar, 1, 2).is_none());
    assert!(pages(&vbar).1.is_empty());
    assert_eq!(vbar.free(PAGE), PAGE);
    assert_eq!(pages(&vbar).0, [0]);
    vbar.prioritize();
    assert_eq!(vbar.watermark(), 4);
    assert!(fault(&vbar, 2, 1).is_some());
    unpin(&vbar, 2, 1);
    // A lower page takes a higher one's memory, never the other way round.
    assert!(fault(&vbar, 1, 1).is_some());
    unpin(&vbar, 1, 1);
    assert_eq!(pages(&vbar), (vec![0, 1], vec![]));
    assert!(fault(&vbar, 3, 1).is_none());
    // More than everything is refused as well.
    vbar.prioritize();
    assert!(fault(&vbar, 0, 4).is_none());
    assert!(pages(&vbar).1.is_empty());
}

#[test]
fn a_second_vbar_takes_the_memory_and_prioritize_takes_it_back() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 2);
    let (a, b) = (engine.vbar("a", PAGE * 2).unwrap(), engine.vbar("b", PAGE * 2).unwrap());
    a.prioritize();
    assert!(fault(&a, 0, 2).is_some());
    unpin(&a, 0, 2);
    assert!(fault(&b, 0, 1).is_none(), "of lower priority");
    b.prioritize();
    assert!(fault(&b, 0, 1).is_some());
    assert_eq!((pages(&a).0, pages(&b).0), (vec![0], vec![0]));
    assert_eq!(a.watermark(), 1);
    unpin(&b, 0, 1);
    assert!(fault(&a, 0, 1).is_some() && fault(&a, 1, 1).is_none());
    unpin(&a, 0, 1);
    a.prioritize();
    assert!(fault(&a, 0, 2).is_some());
    assert_eq!((pages(&a).0, pages(&b).0), (vec![0, 1], vec![]));
    unpin(&a, 0, 2);
    a.deprioritize();
    assert!(fault(&b, 0, 1).is_none(), "its watermark is down");
    b.prioritize();
    assert!(fault(&b, 0, 2).is_some());
    // What is pinned stays, whoever asks.
    a.prioritize();
    assert!(fault(&a, 0, 1).is_none());
    unpin(&b, 0, 2);
}

#[test]
fn a_lowered_watermark_gives_memory_up_and_its_limit_protects_the_rest() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 4);
    let vbar = engine.vbar("v", PAGE * 4).unwrap();
    assert!(fault(&vbar, 0, 4).is_some());
    unpin(&vbar, 0, 3);
    vbar.set_watermark(PAGE * 2);
    engine.settle().unwrap();
    assert_eq!(pages(&vbar), (vec![0, 1, 3], vec![3]), "the pinned page leaves later");
    unpin(&vbar, 3, 1);
    engine.settle().unwrap();
    assert_eq!(pages(&vbar), (vec![0, 1], vec![]));
    assert!(fault(&vbar, 2, 1).is_none());

    vbar.set_watermark_limit(PAGE);
    let other = engine.vbar("other", PAGE * 4).unwrap();
    assert!(fault(&other, 0, 3).is_some());
    assert!(fault(&other, 3, 1).is_none(), "the last page is protected");
    assert_eq!(pages(&vbar).0, [0]);
    vbar.set_watermark_limit(Bytes::ZERO);
    other.prioritize();
    assert!(fault(&other, 3, 1).is_some());
    unpin(&other, 0, 4);
    assert_eq!((pages(&vbar).0, other.free(Bytes::MAX)), (vec![], PAGE * 4));
}

#[test]
fn an_unpin_too_many_does_nothing_and_a_range_outside_is_invalid() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 2);
    let vbar = engine.vbar("v", PAGE * 2).unwrap();
    unpin(&vbar, 0, 2);
    assert!(fault(&vbar, 0, 1).is_some());
    (0..3).for_each(|_| unpin(&vbar, 0, 2));
    assert_eq!(pages(&vbar), (vec![0], vec![]));
    assert!(fault(&vbar, 0, 2).is_some() && fault(&vbar, 1, 1).is_some());
    unpin(&vbar, 0, 2);
    assert_eq!(pages(&vbar).1, [1], "the page faulted twice has a pin left");
    unpin(&vbar, 1, 1);
    let how = || Use::on(StreamHandle::DEFAULT);
    let ranges = [
        (vbar.base().offset(PAGE), PAGE * 2),
        (vbar.base().offset(PAGE * 2), Bytes::new(1)),
        (DeviceAddr::new(vbar.base().get() - 1), Bytes::new(2)),
        (vbar.base(), Bytes::ZERO),
        (vbar.base(), Bytes::MAX),
        (DeviceAddr::new(0), Bytes::new(1)),
        (DeviceAddr::new(u64::MAX), Bytes::new(2)),
    ];
    for (addr, len) in ranges {
        assert!(matches!(vbar.fault(addr, len, how()), Err(EngineError::Invalid(_))), "{addr:?} {len}");
        assert!(matches!(vbar.unpin(addr, len, how().stream), Err(EngineError::Invalid(_))));
    }
    assert!(pages(&vbar).1.is_empty());
}

#[test]
fn a_page_unpinned_before_its_stream_has_finished_stays_until_then() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let engine = rig.engine(PAGE);
    let (a, b) = (engine.vbar("a", PAGE).unwrap(), engine.vbar("b", PAGE).unwrap());
    let bytes = [Arc::new(random.bytes(1 << 20)), Arc::new(random.bytes(1 << 20))];
    for _ in 0..3 {
        let mut slow = rig.consumer();
        a.prioritize();
        assert!(a.fault(a.base(), PAGE, Use::on(slow.stream())).unwrap().is_some());
        fill(&rig.device, a.base(), &bytes[0], slow.stream());
        let gate = Gate::close(&rig, slow.stream());
        slow.read_at(a.base(), &bytes[0], "a page unpinned early");
        a.unpin(a.base(), PAGE, slow.stream()).unwrap();
        let (done, is_done) = mpsc::channel();
        std::thread::scope(|scope| {
            let (rig, b, bytes) = (&rig, &b, &bytes[1]);
            scope.spawn(move || {
                let mut consumer = rig.consumer();
                b.prioritize();
                assert!(b.fault(b.base(), PAGE, Use::on(consumer.stream())).unwrap().is_some());
                fill(&rig.device, b.base(), bytes, consumer.stream());
                consumer.read_at(b.base(), bytes, "the page that came next");
                b.unpin(b.base(), PAGE, consumer.stream()).unwrap();
                consumer.check();
                done.send(()).unwrap();
            });
            done_behind(rig, gate, &is_done);
        });
        slow.check();
    }
}

#[test]
fn a_vbar_that_is_not_used_any_more_is_not_waited_for_behind_what_others_do_in_its_streams() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 2);
    let (a, b) = (engine.vbar("a", PAGE * 2).unwrap(), engine.vbar("b", PAGE * 2).unwrap());
    let consumer = rig.consumer();
    let page_of = |vbar: &ExplicitVbar, page: u64| used(vbar, page, consumer.stream());
    assert!(page_of(&a, 0) && page_of(&a, 1));
    b.prioritize();
    assert!(page_of(&b, 0), "behind what was in the stream when the first page left");
    let gate = Gate::close(&rig, consumer.stream());
    assert!(page_of(&b, 1), "with the gate closed");
    assert_eq!((pages(&a).0, pages(&b).0), (vec![], vec![0, 1]));
    // Used in the stream once more, its pages leave behind the gate.
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(page_of(&b, 0));
            a.prioritize();
            assert!(page_of(&a, 0));
            done.send(()).unwrap();
        });
        done_behind(&rig, gate, &is_done);
    });
}

#[test]
fn a_page_is_not_waited_for_behind_what_came_after_its_last_use() {
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 3);
    let (a, b) = (engine.vbar("a", PAGE * 4).unwrap(), engine.vbar("b", PAGE * 3).unwrap());
    let consumer = rig.consumer();
    let page_of = |vbar: &ExplicitVbar, page: u64| used(vbar, page, consumer.stream());
    assert!(page_of(&a, 1) && page_of(&a, 2) && page_of(&a, 3));
    assert!(page_of(&a, 0), "the last one leaves for the first");
    let gate = Gate::close(&rig, consumer.stream());
    assert!(page_of(&a, 0), "used again, with the gate closed");
    b.prioritize();
    assert!(page_of(&b, 0) && page_of(&b, 1), "in place of pages that were not");
    assert_eq!((pages(&a).0, pages(&b).0), (vec![0], vec![0, 1]));
    let (done, is_done) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert!(page_of(&b, 2));
            done.send(()).unwrap();
        });
        done_behind(&rig, gate, &is_done);
    });
    assert_eq!((pages(&a).0, pages(&b).0), (vec![], vec![0, 1, 2]));
}

#[test]
fn a_vbar_dropped_with_pins_takes_them_along_but_not_under_its_streams() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let engine = rig.engine(PAGE * 2);
    let mut slow: Vec<Consumer> = (0..2).map(|_| rig.consumer()).collect();
    let bytes = Arc::new(random.bytes(1 << 20));
    let vbar = engine.vbar("v", PAGE * 2).unwrap();
    for consumer in &mut slow {
        assert!(vbar.fault(vbar.base(), PAGE * 2, Use::on(consumer.stream())).unwrap().is_some());
    }
    fill(&rig.device, vbar.base(), &bytes, slow[0].stream());
    let gates: Vec<_> = slow.iter().map(|consumer| Gate::close(&rig, consumer.stream())).collect();
    slow.iter_mut().for_each(|consumer| consumer.read_at(vbar.base(), &bytes, "a page of a dropped VBAR"));
    drop(vbar);
    gates.into_iter().for_each(Gate::open);
    slow.iter_mut().for_each(Consumer::check);
    engine.settle().unwrap();
    let stats = engine.stats();
    assert_eq!((stats.held, stats.vbars.len()), (stats.free_frames, 0), "{stats}");
}

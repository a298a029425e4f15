//! What the host device does beyond every device's promises: faults that end the process, poison, kernels.

#![allow(clippy::print_stderr, clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::os::unix::process::ExitStatusExt;
use std::ptr;
use std::sync::{Arc, mpsc};
use std::thread;

use common::{Page, Rng, fill, frame_of, in_child, read};
use forebay_core::Bytes;
use forebay_device::host::{HostConfig, HostDevice};
use forebay_device::{
    Device, DeviceError, Event, EventHandle, Frame, FrameHandle, Reservation, Stream, StreamHandle,
};

const PAGE: Bytes = Bytes::mib(2);
const SIGSEGV: i32 = 11;

fn open(config: HostConfig) -> (Arc<HostDevice>, Arc<dyn Device>) {
    let device = Arc::new(HostDevice::new(config).unwrap());
    (Arc::clone(&device), device)
}

fn record(event: &Event, stream: &Stream) {
    // SAFETY: the stream lives.
    unsafe { event.record(stream.handle()) }.unwrap();
}

/// Reads the last byte of the page.
fn touch(range: &Reservation) {
    let last = range.addr().offset(PAGE - Bytes::new(1)).get() as usize;
    // SAFETY: not sound: the test is about what the processor does.
    unsafe { ptr::read_volatile(ptr::with_exposed_provenance::<u8>(last)) };
}

/// Runs `body` in a process of its own, which must end after `body` called what it was given.
fn ends_in_a_segmentation_fault(test: &str, body: impl FnOnce(&dyn Fn())) {
    const REACHED: &str = "everything before the fault went well";
    match in_child(test) {
        Some(child) => {
            assert_eq!(child.status.signal(), Some(SIGSEGV), "{}", String::from_utf8_lossy(&child.stderr));
            assert!(String::from_utf8_lossy(&child.stderr).contains(REACHED), "a fault came too early");
        }
        None => body(&|| eprintln!("{REACHED}")),
    }
}

#[test]
fn a_reserved_address_faults() {
    ends_in_a_segmentation_fault("a_reserved_address_faults", |reached| {
        let (_, device) = open(HostConfig::default());
        let range = Reservation::new(device, PAGE, PAGE).unwrap();
        reached();
        touch(&range);
    });
}

#[test]
fn a_mapped_address_without_access_faults() {
    ends_in_a_segmentation_fault("a_mapped_address_without_access_faults", |reached| {
        let (_, device) = open(HostConfig::default());
        let range = Reservation::new(Arc::clone(&device), PAGE, PAGE).unwrap();
        let frame = frame_of(&device, PAGE);
        // SAFETY: a fresh frame in a fresh reservation.
        unsafe { device.map(range.addr(), PAGE, frame.handle()) }.unwrap();
        reached();
        touch(&range);
    });
}

#[test]
fn an_unmapped_address_faults_again() {
    ends_in_a_segmentation_fault("an_unmapped_address_faults_again", |reached| {
        let (_, device) = open(HostConfig::default());
        let range = Reservation::new(Arc::clone(&device), PAGE * 2, PAGE).unwrap();
        let frames = [frame_of(&device, PAGE), frame_of(&device, PAGE)];
        let page = Page::map(&device, range.addr(), &frames[0]);
        let beside = Page::map(&device, range.addr().offset(PAGE), &frames[1]);
        fill(&device, page.addr(), &[1; 64]);
        touch(&range);
        drop(page);
        assert_eq!(read(&device, beside.addr(), PAGE).len(), PAGE.as_usize());
        reached();
        touch(&range);
    });
}

#[test]
fn a_copy_to_an_unmapped_address_faults() {
    ends_in_a_segmentation_fault("a_copy_to_an_unmapped_address_faults", |reached| {
        let (_, device) = open(HostConfig::default());
        let range = Reservation::new(Arc::clone(&device), PAGE, PAGE).unwrap();
        reached();
        fill(&device, range.addr(), &[1; 64]);
    });
}

#[test]
fn poison_shows_until_a_page_is_filled_and_after_it_moved() {
    let (_, device) = open(HostConfig { poison: true, ..HostConfig::default() });
    let mut rng = Rng::from_environment();
    let range = Reservation::new(Arc::clone(&device), PAGE * 2, PAGE).unwrap();
    let frame = frame_of(&device, PAGE);
    let poison = vec![0xA5; PAGE.as_usize()];
    let bytes = rng.bytes(PAGE);

    let page = Page::map(&device, range.addr(), &frame);
    assert!(read(&device, page.addr(), PAGE) == poison);
    fill(&device, page.addr(), &bytes);
    assert!(read(&device, page.addr(), PAGE) == bytes);
    page.move_to(page.addr());
    assert!(read(&device, page.addr(), PAGE) == bytes, "the same address keeps its bytes");
    page.move_to(range.addr().offset(PAGE));
    assert!(read(&device, page.addr(), PAGE) == poison, "another address shows no old bytes");
}

#[test]
fn capacity_counts_every_frame() {
    let (_, device) = open(HostConfig { capacity: PAGE * 4, ..HostConfig::default() });
    let frames: Vec<Frame> = (0..3).map(|_| frame_of(&device, PAGE)).collect();
    assert_eq!((device.memory().unwrap().free, device.memory().unwrap().total), (PAGE, PAGE * 4));
    assert_eq!(
        Frame::new(Arc::clone(&device), PAGE * 2).unwrap_err(),
        DeviceError::OutOfMemory { call: "create_frame", wanted: PAGE * 2, free: Some(PAGE) }
    );
    drop(frames);
    frame_of(&device, PAGE * 4);
}

#[test]
fn what_breaks_a_contract_is_refused() {
    let (host, device) = open(HostConfig::default());
    let range = Reservation::new(Arc::clone(&device), PAGE * 2, PAGE).unwrap();
    let frame = frame_of(&device, PAGE);
    let page = Page::map(&device, range.addr(), &frame);
    let code = |result: Result<(), DeviceError>| match result {
        Err(DeviceError::Driver { code, .. }) => code,
        result => panic!("{result:?}"),
    };
    let second = range.addr().offset(PAGE);
    // SAFETY: the host device refuses streams it does not know.
    let unknown = unsafe { StreamHandle::from_raw(99) };
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.map(second, PAGE, frame.handle()) }), 1, "mapped twice");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.unmap(second, PAGE) }), 1, "nothing to unmap");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.map(second, PAGE, FrameHandle(99)) }), 1, "no such frame");
    let outside = second.offset(PAGE);
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.map(outside, PAGE, frame.handle()) }), 1, "outside the reservation");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.release_frame(frame.handle(), PAGE) }), 1, "still mapped");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.free_reservation(range.addr(), PAGE * 2) }), 1, "still in use");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.allow_access(range.addr(), PAGE * 2) }), 1, "half of it unmapped");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.destroy_event(EventHandle(99)) }), 1, "no such event");
    assert_eq!(code(device.give_back_stream(unknown)), 1, "no such stream");
    // SAFETY: refused before anything is done.
    assert_eq!(code(unsafe { device.free_pinned(ptr::null_mut(), PAGE) }), 1, "no such buffer");
    assert_eq!(code(host.launch(unknown, Box::new(|| {}))), 1, "no such stream");
    assert_eq!(code(Frame::new(Arc::clone(&device), PAGE + Bytes::new(1)).map(drop)), 1, "an odd size");
    assert_eq!(code(device.reserve(PAGE, Bytes::new(3)).map(drop)), 1, "an odd alignment");
    drop(page);
}

#[test]
fn a_wait_means_the_record_of_its_moment() {
    let (host, device) = open(HostConfig::default());
    let [a, b] = [(); 2].map(|()| Stream::new(Arc::clone(&device)).unwrap());
    let [event, b_done] = [(); 2].map(|()| Event::new(Arc::clone(&device)).unwrap());
    let (release, held) = mpsc::channel::<()>();

    record(&event, &a);
    // SAFETY: the stream lives.
    unsafe { event.wait_on(b.handle()) }.unwrap();
    record(&b_done, &b);
    host.launch(a.handle(), Box::new(move || held.recv().unwrap())).unwrap();
    record(&event, &a);

    // The second record waits for the kernel; whoever waited before it does not.
    b_done.synchronize().unwrap();
    assert!(!event.is_complete().unwrap());
    // SAFETY: the stream lives.
    unsafe { event.wait_on(b.handle()) }.unwrap();
    record(&b_done, &b);
    assert!(!b_done.is_complete().unwrap());
    release.send(()).unwrap();
    b_done.synchronize().unwrap();
    assert!(event.is_complete().unwrap());
}

#[test]
fn the_default_stream_is_the_caller() {
    let (host, device) = open(HostConfig::default());
    let caller = thread::current().id();
    let (told, ran_on) = mpsc::channel();
    host.launch(StreamHandle::DEFAULT, Box::new(move || told.send(thread::current().id()).unwrap())).unwrap();
    assert_eq!(ran_on.try_recv(), Ok(caller));

    let stream = Stream::new(Arc::clone(&device)).unwrap();
    let event = Event::new(Arc::clone(&device)).unwrap();
    let (release, held) = mpsc::channel::<()>();
    host.launch(stream.handle(), Box::new(move || held.recv().unwrap())).unwrap();
    record(&event, &stream);
    assert!(!event.is_complete().unwrap());
    thread::scope(|scope| {
        scope.spawn(move || release.send(()).unwrap());
        // SAFETY: the default stream always lives.
        unsafe { event.wait_on(StreamHandle::DEFAULT) }.unwrap();
        assert!(event.is_complete().unwrap());
    });
    // SAFETY: the default stream always lives.
    unsafe { event.record(StreamHandle::DEFAULT) }.unwrap();
    assert!(event.is_complete().unwrap());
}

#[test]
fn an_event_may_be_dropped_while_a_stream_waits_for_it() {
    let (host, device) = open(HostConfig::default());
    let [a, b] = [(); 2].map(|()| Stream::new(Arc::clone(&device)).unwrap());
    let event = Event::new(Arc::clone(&device)).unwrap();
    let (release, held) = mpsc::channel::<()>();
    let (told, order) = mpsc::channel();
    let first = told.clone();
    host.launch(a.handle(), Box::new(move || held.recv().and(Ok(first.send("a"))).unwrap().unwrap()))
        .unwrap();
    record(&event, &a);
    // SAFETY: the stream lives.
    unsafe { event.wait_on(b.handle()) }.unwrap();
    drop(event);
    host.launch(b.handle(), Box::new(move || told.send("b").unwrap())).unwrap();
    drop((a, b));
    release.send(()).unwrap();
    assert_eq!(order.iter().collect::<Vec<_>>(), ["a", "b"]);
}

#[test]
fn a_kernel_that_panics_loses_the_device() {
    let (host, device) = open(HostConfig::default());
    let stream = Stream::new(Arc::clone(&device)).unwrap();
    let event = Event::new(Arc::clone(&device)).unwrap();
    host.launch(stream.handle(), Box::new(|| panic!("a planted panic"))).unwrap();
    let (told, after) = mpsc::channel();
    // Refused where the panic came first; either way what follows reports the loss.
    let _ = host.launch(stream.handle(), Box::new(move || told.send(()).unwrap()));
    let _ = after.recv();
    // SAFETY: the stream lives.
    let error = unsafe { event.record(stream.handle()) }.unwrap_err();
    assert!(error.is_lost() && error.to_string().contains("a planted panic"), "{error}");
    assert!(event.is_complete().unwrap_err().is_lost());
}

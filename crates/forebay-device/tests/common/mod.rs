//! What the device tests share. Each test binary uses a part of it.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests end where their setting fails, and print seeds"
)]

use std::cell::Cell;
use std::env;
use std::fs;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forebay_core::Bytes;
use forebay_device::host::{HostConfig, HostDevice};
use forebay_device::{Device, DeviceAddr, Event, Frame, PinnedBuffer, Stream};

/// Runs `test` on a host device with slow copies, and on the device that `FOREBAY_TEST_DEVICE` names.
pub fn on_every_device(mut test: impl FnMut(&Arc<dyn Device>)) {
    // One test at a time: several look at how much memory is free.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = HostConfig {
        capacity: Bytes::mib(64),
        copy_delay: Duration::from_micros(500),
        ..HostConfig::default()
    };
    test(&(Arc::new(HostDevice::new(config).unwrap()) as Arc<dyn Device>));
    if let Ok(name) = env::var("FOREBAY_TEST_DEVICE") {
        test(&forebay_device::open(name.parse().unwrap()).unwrap());
    }
}

pub fn frame_of(device: &Arc<dyn Device>, size: Bytes) -> Frame {
    Frame::new(Arc::clone(device), size).unwrap()
}

/// A frame mapped at an address, until dropped. The tests wait for their copies before they drop it.
pub struct Page<'a> {
    device: &'a dyn Device,
    frame: &'a Frame,
    addr: Cell<DeviceAddr>,
}

impl<'a> Page<'a> {
    pub fn map(device: &'a Arc<dyn Device>, addr: DeviceAddr, frame: &'a Frame) -> Self {
        let page = Page { device: &**device, frame, addr: Cell::new(addr) };
        page.map_here();
        page
    }

    pub fn addr(&self) -> DeviceAddr {
        self.addr.get()
    }

    pub fn move_to(&self, addr: DeviceAddr) {
        self.unmap();
        self.addr.set(addr);
        self.map_here();
    }

    fn map_here(&self) {
        // SAFETY: tests map a frame once, at a free place of their own reservation.
        unsafe { self.device.map(self.addr(), self.frame.size(), self.frame.handle()) }.unwrap();
        // SAFETY: mapped just now.
        unsafe { self.device.allow_access(self.addr(), self.frame.size()) }.unwrap();
    }

    fn unmap(&self) {
        // SAFETY: one whole frame; the tests have waited for their copies.
        unsafe { self.device.unmap(self.addr(), self.frame.size()) }.unwrap();
    }
}

impl Drop for Page<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.unmap();
        }
    }
}

/// Copies `bytes` to the device, and waits for it.
pub fn fill(device: &Arc<dyn Device>, addr: DeviceAddr, bytes: &[u8]) {
    let len = Bytes::new(bytes.len() as u64);
    let stream = Stream::new(Arc::clone(device)).unwrap();
    let buffer = PinnedBuffer::new(Arc::clone(device), len).unwrap();
    // SAFETY: the buffer is new.
    unsafe { buffer.slice_mut(Bytes::ZERO, len) }.copy_from_slice(bytes);
    // SAFETY: the test has mapped the range; the copy completes below.
    unsafe { device.copy_to_device(addr, buffer.as_ptr(), len, stream.handle()) }.unwrap();
    finish(device, &stream);
}

/// Copies `len` bytes from the device, and waits for it.
pub fn read(device: &Arc<dyn Device>, addr: DeviceAddr, len: Bytes) -> Vec<u8> {
    let stream = Stream::new(Arc::clone(device)).unwrap();
    let buffer = PinnedBuffer::new(Arc::clone(device), len).unwrap();
    // SAFETY: the test has mapped the range; the copy completes below.
    unsafe { device.copy_to_host(buffer.as_ptr(), addr, len, stream.handle()) }.unwrap();
    finish(device, &stream);
    // SAFETY: the copy has completed.
    unsafe { buffer.slice(Bytes::ZERO, len) }.to_vec()
}

fn finish(device: &Arc<dyn Device>, stream: &Stream) {
    let done = Event::new(Arc::clone(device)).unwrap();
    // SAFETY: the stream lives.
    unsafe { done.record(stream.handle()) }.unwrap();
    done.synchronize().unwrap();
}

/// Random numbers (SplitMix64) from a seed that is printed, and can be given as `FOREBAY_TEST_SEED`.
pub struct Rng(u64);

impl Rng {
    pub fn from_environment() -> Self {
        let seed = match env::var("FOREBAY_TEST_SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        };
        println!("FOREBAY_TEST_SEED={seed}");
        Rng(seed)
    }

    pub fn fork(&mut self) -> Self {
        Rng(self.next())
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn bytes(&mut self, len: Bytes) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len.as_usize() + 8);
        while bytes.len() < len.as_usize() {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len.as_usize());
        bytes
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// Runs one test of this binary in a process of its own and gives what became of that; `None` where this is that
/// process.
pub fn in_child(test: &str) -> Option<Output> {
    const CHILD: &str = "FOREBAY_TEST_CHILD";
    if env::var(CHILD).is_ok_and(|running| running == test) {
        return None;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, test)
        .output();
    Some(output.unwrap())
}

/// What a process holds of things that leak.
#[derive(Debug)]
pub struct ProcessCounts {
    pub files: usize,
    pub mappings: usize,
    pub threads: usize,
}

pub fn process_counts() -> ProcessCounts {
    ProcessCounts {
        files: fs::read_dir("/proc/self/fd").unwrap().count(),
        mappings: fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
        threads: fs::read_dir("/proc/self/task").unwrap().count(),
    }
}

/// How much memory this process occupies.
pub fn resident_memory() -> Bytes {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    Bytes::kib(line.split_whitespace().nth(1).unwrap().parse().unwrap())
}

//! A model of random weights, uses of it that read the weights back on a stream, and the device the tests run on.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests end where their setting fails, and print their seed"
)]

pub mod faulty;
pub mod gate;
pub mod on_device;
pub mod refusing;
pub mod watchdog;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forebay::device::host::{HostConfig, HostDevice};
use forebay::device::{Device, DeviceAddr, Event, PinnedBuffer, Stream, StreamHandle};
use forebay::store::{Source, SourceFile};
use forebay::{
    Attachment, Budget, Bytes, Engine, EngineConfig, LayoutOptions, RingConfig, Use, WeightKind, WeightSpec,
};

/// The device under test: the one named by `FOREBAY_TEST_DEVICE`, else a host device that poisons its frames.
pub fn device() -> Arc<dyn Device> {
    Rig::new().device
}

/// The device under test, and what a host device can do beyond.
pub struct Rig {
    pub device: Arc<dyn Device>,
    /// The same device, if it is a host device.
    pub host: Option<Arc<HostDevice>>,
}

impl Rig {
    pub fn new() -> Self {
        let config =
            HostConfig { capacity: Bytes::gib(4), poison: true, registers: true, ..HostConfig::default() };
        Self::host(config).unwrap_or_else(|| {
            let name = std::env::var("FOREBAY_TEST_DEVICE").unwrap();
            Rig { device: forebay::device::open(name.parse().unwrap()).unwrap(), host: None }
        })
    }

    /// A host device of this kind; `None` where the tests run on another device, and the test has nothing to say.
    pub fn host(config: HostConfig) -> Option<Self> {
        match std::env::var("FOREBAY_TEST_DEVICE") {
            Ok(name) if name != "host" => {
                println!("not on {name}");
                None
            }
            _ => {
                let host = Arc::new(HostDevice::new(config).unwrap());
                Some(Rig { device: Arc::clone(&host) as Arc<dyn Device>, host: Some(host) })
            }
        }
    }

    pub fn engine(&self, budget: Bytes) -> Arc<Engine> {
        engine_on(Arc::clone(&self.device), budget)
    }

    pub fn stream(&self) -> Stream {
        Stream::new(Arc::clone(&self.device)).unwrap()
    }

    pub fn consumer(&self) -> Consumer {
        Consumer::new(&self.device)
    }
}

pub fn engine(budget: Bytes) -> Arc<Engine> {
    engine_on(device(), budget)
}

pub fn engine_on(device: Arc<dyn Device>, budget: Bytes) -> Arc<Engine> {
    try_engine_on(device, Budget::Fixed(budget)).unwrap()
}

/// A ring with this many readers.
pub fn readers(count: usize) -> RingConfig {
    RingConfig { readers: Some(count), ..RingConfig::default() }
}

pub fn try_engine_on(device: Arc<dyn Device>, budget: Budget) -> forebay::Result<Arc<Engine>> {
    let engine = Engine::new(device, EngineConfig { budget, ring: readers(3), ..EngineConfig::default() })?;
    watchdog::report_on(&engine);
    Ok(engine)
}

/// Waits for what an engine does in the background.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(20), "not so after 20 s: {what}");
        std::thread::yield_now();
    }
}

/// Checks that no page is pinned but for the small weights' `small` pages of 2 MiB: everything else can leave.
pub fn assert_no_pins(engine: &Engine, small: u64) {
    let pinned: Bytes = engine.stats().vbars.iter().map(|vbar| vbar.pinned).sum();
    assert_eq!(pinned, Bytes::mib(2) * small, "{}", engine.stats());
    engine.settle().unwrap();
    engine.make_room(Bytes::MAX).unwrap();
}

/// Random numbers from a seed that a failing test prints (xorshift64*, S. Vigna 2016).
///
/// The test that made it is watched for as long as it lives.
pub struct Random(u64, Option<watchdog::Watchdog>);

impl Random {
    /// From `FOREBAY_TEST_SEED`, else from the clock.
    pub fn seeded() -> Self {
        let clock =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
        let seed = std::env::var("FOREBAY_TEST_SEED").ok().map_or(clock, |seed| seed.parse().unwrap());
        println!("FOREBAY_TEST_SEED={seed}");
        Random(seed | 1, Some(watchdog::Watchdog::start(seed)))
    }

    /// Seeded, for a test that takes longer than others.
    pub fn seeded_for(limit: std::time::Duration) -> Self {
        let mut random = Self::seeded();
        random.1 = Some(watchdog::Watchdog::with_limit(random.0, limit));
        random
    }

    pub fn from_seed(seed: u64) -> Self {
        Random(seed | 1, None)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Bytes that are never zero.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..n.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(n);
        bytes.iter_mut().for_each(|byte| *byte |= 1);
        bytes
    }
}

/// Weights and what they hold.
pub struct Weights {
    pub contents: Vec<Arc<Vec<u8>>>,
    pub specs: Vec<WeightSpec>,
    pub file: tempfile::NamedTempFile,
}

impl Weights {
    /// Weights of the given sizes: every third one in memory, the others in one file.
    pub fn new(random: &mut Random, sizes: &[usize]) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let contents: Vec<_> = sizes.iter().map(|&size| Arc::new(random.bytes(size))).collect();
        for bytes in &contents {
            file.write_all(bytes).unwrap();
        }
        file.flush().unwrap();
        let opened = SourceFile::open(file.path()).unwrap();
        let mut offset = 0;
        let specs = contents.iter().enumerate().map(|(i, bytes)| {
            let len = Bytes::new(bytes.len() as u64);
            let source = match i % 3 {
                2 => Source::memory(Arc::new(bytes.to_vec())),
                _ => Source::file(&opened, offset, len),
            };
            offset += len.get();
            WeightSpec { name: format!("w{i}"), source, kind: WeightKind::Whole }
        });
        Weights { specs: specs.collect(), contents, file }
    }

    /// Weights that all lie in one file.
    pub fn in_a_file(random: &mut Random, sizes: &[usize]) -> Self {
        let mut weights = Weights::new(random, sizes);
        let file = SourceFile::open(weights.file.path()).unwrap();
        let mut offset = 0;
        for (spec, &size) in weights.specs.iter_mut().zip(sizes) {
            spec.source = Source::file(&file, offset, Bytes::new(size as u64));
            offset += size as u64;
        }
        weights
    }

    pub fn attach(&self, engine: &Arc<Engine>, name: &str) -> Attachment {
        self.try_attach(engine, name).unwrap()
    }

    pub fn try_attach(&self, engine: &Arc<Engine>, name: &str) -> forebay::Result<Attachment> {
        let options = LayoutOptions { page_size: Some(Bytes::mib(2)), ..LayoutOptions::default() };
        engine.attach(name, self.specs.clone(), options)
    }
}

/// The weights of a model as they are to be from now on, to be changed.
pub fn copy_of(weights: &Weights) -> Weights {
    Weights {
        contents: weights.contents.clone(),
        specs: weights.specs.clone(),
        file: tempfile::NamedTempFile::new().unwrap(),
    }
}

/// Uses each of a model's weights once, and checks what they are.
pub fn pass(model: &Attachment, now: &Weights, consumer: &mut Consumer) {
    for weight in 0..now.contents.len() {
        consumer.use_weight(model, now, weight).unwrap();
    }
    consumer.check();
}

/// What memory is in a stream's order. Its keeper is let go before that is known.
pub fn read<K>(rig: &Rig, keeper: K, at: DeviceAddr, len: usize, stream: StreamHandle) -> Vec<u8> {
    let len = Bytes::new(len as u64);
    let buffer = PinnedBuffer::new(Arc::clone(&rig.device), len).unwrap();
    let done = Event::new(Arc::clone(&rig.device)).unwrap();
    // SAFETY: the memory is there by its keeper, and the buffer lives until the copy has completed.
    unsafe { rig.device.copy_to_host(buffer.as_ptr(), at, len, stream) }.unwrap();
    drop(keeper);
    // SAFETY: the stream lives.
    unsafe { done.record(stream) }.unwrap();
    done.synchronize().unwrap();
    // SAFETY: the copy has completed.
    unsafe { buffer.slice(Bytes::ZERO, len) }.to_vec()
}

/// A stream whose "kernels" read weights back.
pub struct Consumer {
    device: Arc<dyn Device>,
    stream: StreamHandle,
    _own: Option<Stream>,
    reads: Vec<Read>,
}

struct Read {
    buffer: PinnedBuffer,
    done: Event,
    expected: Arc<Vec<u8>>,
    what: String,
}

static READS: AtomicU64 = AtomicU64::new(0);

impl Consumer {
    /// On a stream of its own.
    pub fn new(device: &Arc<dyn Device>) -> Self {
        let own = Stream::new(Arc::clone(device)).unwrap();
        Consumer { stream: own.handle(), _own: Some(own), device: Arc::clone(device), reads: Vec::new() }
    }

    /// On the default stream.
    pub fn on_default(device: &Arc<dyn Device>) -> Self {
        Self::borrowing(device, StreamHandle::DEFAULT)
    }

    /// On a stream that lives longer.
    pub fn borrowing(device: &Arc<dyn Device>, stream: StreamHandle) -> Self {
        Consumer { device: Arc::clone(device), stream, _own: None, reads: Vec::new() }
    }

    pub fn stream(&self) -> StreamHandle {
        self.stream
    }

    /// Acquires a weight, enqueues a read of it and releases it without waiting for the read.
    pub fn use_weight(
        &mut self,
        model: &Attachment,
        weights: &Weights,
        weight: usize,
    ) -> forebay::Result<()> {
        let pinned = model.acquire(weight, Use::on(self.stream()))?;
        self.read(model, weights, weight);
        drop(pinned);
        Ok(())
    }

    /// Enqueues a read of a pinned weight.
    pub fn read(&mut self, model: &Attachment, weights: &Weights, weight: usize) {
        let what = format!("{} w{weight}", model.name());
        self.read_at(model.address(weight).unwrap(), &weights.contents[weight], &what);
    }

    /// Enqueues a read of bytes that are pinned.
    pub fn read_at(&mut self, from: DeviceAddr, expected: &Arc<Vec<u8>>, what: &str) {
        let expected = Arc::clone(expected);
        let len = Bytes::new(expected.len() as u64);
        let buffer = PinnedBuffer::new(Arc::clone(&self.device), len).unwrap();
        let done = Event::new(Arc::clone(&self.device)).unwrap();
        // SAFETY: the weight is pinned in this stream's order; the buffer lives until the read was checked.
        unsafe { self.device.copy_to_host(buffer.as_ptr(), from, len, self.stream()) }.unwrap();
        // SAFETY: the stream lives as long as this consumer.
        unsafe { done.record(self.stream()) }.unwrap();
        let what = format!("read {} of {what}", READS.fetch_add(1, Ordering::Relaxed));
        self.reads.push(Read { buffer, done, expected, what });
        if self.reads.len() >= 16 {
            self.check();
        }
    }

    /// Waits for the reads and compares every byte.
    pub fn check(&mut self) {
        for read in self.reads.drain(..) {
            read.done.synchronize().unwrap();
            // SAFETY: the only copy to the buffer has completed.
            let got = unsafe { read.buffer.slice(Bytes::ZERO, read.buffer.size()) };
            if let Some(at) = got.iter().zip(&*read.expected).position(|(got, want)| got != want) {
                panic!("{}: byte {at} is {:#x}, not {:#x}", read.what, got[at], read.expected[at]);
            }
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check();
        }
        for read in self.reads.drain(..) {
            read.done.synchronize().ok();
        }
    }
}

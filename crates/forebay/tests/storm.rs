//! Several threads do everything at once, in an order that a seed decides, and every byte is right.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use common::{Consumer, Random, Rig, Weights};
use forebay::device::host::HostConfig;
use forebay::device::{Device, Event, PinnedBuffer, StreamHandle};
use forebay::{
    Attachment, Ballast, Budget, Bytes, Engine, EngineError, ExplicitVbar, Leases, Result, Signature, Use,
    View,
};

const MIB: usize = 1 << 20;
const THREADS: usize = 4;
/// How long the storm blows, unless `FOREBAY_STORM_STEPS` says how many steps each thread makes.
const TIME: Duration = Duration::from_secs(8);
/// Of the host device: less than threads, models and spikes want together.
const CAPACITY: Bytes = Bytes::mib(224);
/// An explicit VBAR's page.
const EXPLICIT_PAGE: Bytes = Bytes::mib(32);

struct Model {
    attachment: Attachment,
    weights: Arc<Weights>,
}

struct World {
    engine: Arc<Engine>,
    kinds: Vec<Arc<Weights>>,
    models: RwLock<Vec<Arc<Model>>>,
    steps: AtomicU64,
    refusals: AtomicU64,
    /// Spikes that got what they asked for.
    spikes: AtomicU64,
}

/// One thread's part.
struct Sailor<'a> {
    world: &'a World,
    random: Random,
    consumers: [Consumer; 2],
    views: Vec<(View, Arc<Vec<u8>>)>,
    explicit: ExplicitVbar,
    /// What each page of the explicit VBAR holds, as of a signature.
    filled: HashMap<u64, (Signature, Arc<Vec<u8>>)>,
    device: Arc<dyn Device>,
    /// Memory that others have at this moment.
    spikes: Vec<Ballast>,
}

impl World {
    fn attach(&self, random: &mut Random) -> Result<()> {
        let weights = Arc::clone(&self.kinds[random.below(self.kinds.len() as u64) as usize]);
        let attachment = weights.try_attach(&self.engine, "model")?;
        self.models.write().unwrap().push(Arc::new(Model { attachment, weights }));
        Ok(())
    }

    fn some_model(&self, random: &mut Random) -> Option<Arc<Model>> {
        let models = self.models.read().unwrap();
        let number = random.below(models.len().max(1) as u64) as usize;
        models.get(number).cloned()
    }
}

impl Sailor<'_> {
    fn step(&mut self) -> Result<()> {
        let Some(model) = self.world.some_model(&mut self.random) else {
            return self.world.attach(&mut self.random);
        };
        let count = model.weights.contents.len() as u64;
        let weight = self.random.below(count) as usize;
        let engine = &self.world.engine;
        match self.random.below(100) {
            0..41 => self.use_some(&[(&model, weight)]),
            41..45 => self.spike(),
            45..55 => {
                let Some(other) = self.world.some_model(&mut self.random) else { return Ok(()) };
                let second = self.random.below(other.weights.contents.len() as u64) as usize;
                self.use_some(&[(&model, weight), (&other, second), (&model, (weight + 1) % count as usize)])
            }
            55..65 => self.look_at_views(&model, weight),
            65..68 => {
                let pages = 12 + self.random.below(40);
                engine.set_budget(Budget::Fixed(Bytes::mib(2) * pages))
            }
            68..70 => {
                let usable = engine.memory()?.free + engine.stats().held;
                let pages = 12 + self.random.below(40);
                engine.set_budget(Budget::Headroom(usable.saturating_sub(Bytes::mib(2) * pages)))
            }
            70..74 => engine.make_room(Bytes::mib(self.random.below(40))).map(drop),
            74..78 if self.world.models.read().unwrap().len() < 4 => self.world.attach(&mut self.random),
            74..78 => {
                let mut models = self.world.models.write().unwrap();
                let number = self.random.below(models.len() as u64) as usize;
                let gone = models.swap_remove(number);
                drop(models);
                match self.random.below(4) {
                    0 => gone.attachment.detach(),
                    1 | 2 => gone.attachment.park(),
                    _ => drop(gone),
                }
                Ok(())
            }
            78..82 => model.attachment.discard(weight),
            82..86 => {
                let attachment = &model.attachment;
                if weight.is_multiple_of(2) {
                    attachment.prioritize()
                } else {
                    attachment.deprioritize()
                }
                Ok(())
            }
            86..87 => {
                let limits = [None, Some(Bytes::ZERO), Some(Bytes::mib(9)), None];
                engine.set_registered(limits[self.random.below(4) as usize]);
                if self.random.below(8) == 0 {
                    engine.clear_parked();
                }
                Ok(())
            }
            87..88 => {
                let stats = engine.stats();
                assert!(stats.free_frames <= stats.held, "{stats}");
                Ok(())
            }
            88..89 => engine.settle(),
            _ => self.use_explicit(),
        }
    }

    fn use_some(&mut self, which: &[(&Arc<Model>, usize)]) -> Result<()> {
        let weights: Vec<_> = which.iter().map(|(model, weight)| (&model.attachment, *weight)).collect();
        let consumer = &mut self.consumers[self.random.below(2) as usize];
        let pinned = impatiently(consumer.stream(), |how| self.world.engine.acquire(&weights, how))?;
        which.iter().for_each(|(model, weight)| consumer.read(&model.attachment, &model.weights, *weight));
        drop(pinned);
        Ok(())
    }

    /// Somebody else takes memory, and gives it back some spikes later.
    fn spike(&mut self) -> Result<()> {
        let engine = &self.world.engine;
        if self.spikes.len() == 2 || self.random.below(3) == 0 {
            self.spikes.clear();
            return Ok(());
        }
        let bytes = Bytes::mib(2 + 2 * self.random.below(40));
        let leases = if self.random.below(2) == 0 { Leases::Ask } else { Leases::Await };
        engine.room_for(bytes, leases)?;
        // Another thread may have been faster.
        match engine.ballast(bytes) {
            Ok(ballast) => {
                self.spikes.push(ballast);
                self.world.spikes.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(EngineError::Device(error)) if error.is_out_of_memory() => {
                self.spikes.clear();
                let squeezed = engine.squeeze()?;
                drop(squeezed);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn look_at_views(&mut self, model: &Model, weight: usize) -> Result<()> {
        let consumer = &mut self.consumers[0];
        if self.views.len() < 2 {
            let view = impatiently(consumer.stream(), |how| model.attachment.view(weight, how))?;
            self.views.push((view, Arc::clone(&model.weights.contents[weight])));
        }
        self.views.iter().for_each(|(view, bytes)| consumer.read_at(view.address(), bytes, "a view"));
        if self.random.below(2) == 0 {
            let number = self.random.below(self.views.len() as u64) as usize;
            drop(self.views.swap_remove(number));
        }
        Ok(())
    }

    fn use_explicit(&mut self) -> Result<()> {
        let page = self.random.below(2);
        let consumer = &mut self.consumers[0];
        let stream = consumer.stream();
        let (addr, len) = (self.explicit.base().offset(EXPLICIT_PAGE * page), Bytes::mib(1));
        if self.random.below(4) == 0 {
            self.explicit.prioritize();
        }
        let faulted = impatiently(stream, |how| self.explicit.fault(addr, len, how))?;
        let Some(signature) = faulted else { return Ok(()) };
        if self.filled.get(&page).is_none_or(|(then, _)| *then != signature) {
            let bytes = Arc::new(self.random.bytes(MIB));
            fill(&self.device, addr.get(), &bytes, stream);
            self.filled.insert(page, (signature, bytes));
        }
        consumer.read_at(addr, &self.filled[&page].1, "an explicit page");
        self.explicit.unpin(addr, len, stream)
    }
}

/// With everything pinned by the views of threads that wait themselves, waiting longer would help nobody.
fn impatiently<T>(stream: StreamHandle, call: impl FnOnce(Use<'_>) -> T) -> T {
    let since = Instant::now();
    call(Use { stream, interrupted: &|| since.elapsed() > Duration::from_millis(300) })
}

fn fill(device: &Arc<dyn Device>, to: u64, bytes: &[u8], stream: StreamHandle) {
    let len = Bytes::new(bytes.len() as u64);
    let buffer = PinnedBuffer::new(Arc::clone(device), len).unwrap();
    let done = Event::new(Arc::clone(device)).unwrap();
    // SAFETY: the buffer is new and nobody else's.
    unsafe { buffer.slice_mut(Bytes::ZERO, len) }.copy_from_slice(bytes);
    let to = forebay::device::DeviceAddr::new(to);
    // SAFETY: the page is pinned, and the buffer lives until the copy is done.
    unsafe { device.copy_to_device(to, buffer.as_ptr(), len, stream) }.unwrap();
    // SAFETY: the test keeps the stream alive.
    unsafe { done.record(stream) }.unwrap();
    done.synchronize().unwrap();
}

#[test]
fn everything_at_once_is_right() {
    let steps: Option<u64> = std::env::var("FOREBAY_STORM_STEPS").ok().map(|steps| steps.parse().unwrap());
    let limit = steps.map_or(60, |steps| 60 + steps / 10);
    let mut random = Random::seeded_for(Duration::from_secs(limit));
    let small = HostConfig { capacity: CAPACITY, poison: true, registers: true, ..HostConfig::default() };
    let rig = Rig::host(small).unwrap_or_else(Rig::new);
    let kinds: [&[usize]; 3] = [
        &[3 * MIB, 100, 2 * MIB, 5 * MIB, 70_000, MIB],
        &[2 * MIB; 8],
        &[4096, 7 * MIB, MIB, 300_000, 3 * MIB, (2 * MIB) - 512, 200],
    ];
    let world = World {
        engine: rig.engine(Bytes::mib(64)),
        kinds: kinds
            .iter()
            .enumerate()
            .map(|(i, sizes)| match i {
                1 => Arc::new(Weights::in_a_file(&mut random, sizes)),
                _ => Arc::new(Weights::new(&mut random, sizes)),
            })
            .collect(),
        models: RwLock::default(),
        steps: AtomicU64::new(0),
        refusals: AtomicU64::new(0),
        spikes: AtomicU64::new(0),
    };
    // Streams live longer than the models that use them.
    let streams: Vec<_> = (0..THREADS).map(|_| rig.stream()).collect();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for stream in &streams {
            let (world, rig) = (&world, &rig);
            let seed = random.next();
            scope.spawn(move || {
                let mut sailor = Sailor {
                    world,
                    random: Random::from_seed(seed),
                    consumers: [
                        Consumer::borrowing(&rig.device, stream.handle()),
                        Consumer::on_default(&rig.device),
                    ],
                    views: Vec::new(),
                    explicit: world.engine.vbar("explicit", EXPLICIT_PAGE * 2).unwrap(),
                    filled: HashMap::new(),
                    device: Arc::clone(&rig.device),
                    spikes: Vec::new(),
                };
                let mut done = 0;
                while steps.map_or_else(|| start.elapsed() < TIME, |steps| done < steps) {
                    done += 1;
                    match sailor.step() {
                        Ok(()) => {}
                        Err(
                            EngineError::TooLarge { .. }
                            | EngineError::AllPinned { .. }
                            | EngineError::Interrupted { .. }
                            | EngineError::Detached { .. },
                        ) => drop(world.refusals.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => panic!("{error}"),
                    }
                }
                world.steps.fetch_add(done, Ordering::Relaxed);
            });
        }
    });
    println!(
        "{:?} steps, {:?} refused, {:?} spikes\n{}",
        world.steps,
        world.refusals,
        world.spikes,
        world.engine.stats()
    );
    assert!(world.spikes.load(Ordering::Relaxed) > 0, "nobody else got memory");
    world.models.write().unwrap().clear();
    world.engine.clear_parked();
    world.engine.settle().unwrap();
    let stats = world.engine.stats();
    assert_eq!((stats.held, stats.vbars.len()), (stats.free_frames, 0), "{stats}");
    assert!(world.refusals.load(Ordering::Relaxed) < world.steps.load(Ordering::Relaxed));
    let engine = world.engine;
    drop(world.models);
    engine.make_room(Bytes::MAX).unwrap();
    assert_eq!(engine.stats().held, Bytes::ZERO);
}

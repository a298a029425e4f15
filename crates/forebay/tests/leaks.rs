//! Models that come and go leave nothing behind. Alone in its file: it counts what the whole process has.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::fs;
use std::time::Duration;

use common::{Random, Rig, Weights};
use forebay::Bytes;
use forebay::device::host::HostConfig;

#[derive(Debug)]
struct Holdings {
    mappings: usize,
    address_space: u64,
    resident: u64,
    descriptors: usize,
    threads: u64,
}

impl Holdings {
    fn now() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let number = |key: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        Holdings {
            mappings: fs::read_to_string("/proc/self/maps").unwrap().lines().count(),
            address_space: number("VmSize:") << 10,
            resident: number("VmRSS:") << 10,
            descriptors: open_descriptors(),
            threads: number("Threads:"),
        }
    }
}

/// The fewest of some looks: a thread of the engine may just be reading what the system tells of its memory. What is leaked
/// is open in all of them.
fn open_descriptors() -> usize {
    let look = || {
        std::thread::sleep(Duration::from_millis(5));
        fs::read_dir("/proc/self/fd").unwrap().count()
    };
    (0..20).map(|_| look()).min().unwrap()
}

#[test]
fn five_thousand_models_that_come_and_go_leave_nothing_behind() {
    let mut random = Random::seeded();
    let config = HostConfig { capacity: Bytes::mib(64), ..HostConfig::default() };
    let rig = Rig::host(config).unwrap_or_else(Rig::new);
    let weights = Weights::new(&mut random, &[100_000, 100, 300_000]);
    let engine = rig.engine(Bytes::mib(8));
    let mut consumer = rig.consumer();
    let mut rounds = |from: u32, to: u32| {
        for round in from..to {
            let model = weights.attach(&engine, "model");
            consumer.use_weight(&model, &weights, (round % 3) as usize).unwrap();
            if round % 5 == 0 {
                let view = model.view(0, forebay::Use::on(consumer.stream())).unwrap();
                drop(model);
                drop(view);
            }
        }
        consumer.check();
        engine.make_room(Bytes::MAX).unwrap();
        engine.settle().unwrap();
    };
    rounds(0, 500);
    let before = Holdings::now();
    rounds(500, 5000);
    let after = Holdings::now();
    println!("{before:?}\n{after:?}");
    let stats = engine.stats();
    assert_eq!((stats.held, stats.vbars.len()), (Bytes::ZERO, 0), "{stats}");
    if rig.host.is_some() {
        assert_eq!(rig.device.memory().unwrap().free, Bytes::mib(64));
    }
    assert_eq!((before.descriptors, before.threads), (after.descriptors, after.threads));
    assert!(after.mappings <= before.mappings + 20, "{} mappings more", after.mappings - before.mappings);
    assert!(after.address_space <= before.address_space + (64 << 20), "{before:?} {after:?}");
    assert!(after.resident <= before.resident + (4 << 20), "{before:?} {after:?}");
}

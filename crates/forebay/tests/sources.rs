//! Sources that change, end early or cannot be read: an error for who uses them, and for nobody else.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Consumer, Random, Rig, Weights, assert_no_pins};
use forebay::device::StreamHandle;
use forebay::store::{Source, SourceFile, StoreError};
use forebay::{Attachment, Bytes, EngineError, LayoutOptions, Use, WeightKind, WeightSpec};

const MIB: usize = 1 << 20;
const PAGE: Bytes = Bytes::mib(2);

fn spec(name: &str, source: Source, kind: WeightKind) -> WeightSpec {
    WeightSpec { name: name.into(), source, kind }
}

fn options() -> LayoutOptions {
    LayoutOptions { page_size: Some(PAGE), ..LayoutOptions::default() }
}

/// The error of using a weight: its name and what its source said.
fn refusal(model: &Attachment, weight: usize) -> (String, StoreError) {
    match model.acquire(weight, Use::on(StreamHandle::DEFAULT)) {
        Err(EngineError::Source { weight, error, .. }) => (weight, *error),
        other => panic!("{other:?}"),
    }
}

fn pass(consumer: &mut Consumer, model: &Attachment, weights: &Weights) {
    (0..weights.contents.len()).for_each(|weight| consumer.use_weight(model, weights, weight).unwrap());
}

fn restore_times(path: &Path, modified: std::time::SystemTime) {
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_times(FileTimes::new().set_modified(modified))
        .unwrap();
}

#[test]
fn a_truncated_file_fails_its_own_weights_until_it_is_whole_again() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    // w2 and w5 lie in memory.
    let weights = Weights::new(&mut random, &[2 * MIB, 4 * MIB, 2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB]);
    let other = Weights::new(&mut random, &[2 * MIB, 3 * MIB]);
    let engine = rig.engine(PAGE * 3);
    let (model, beside) = (weights.attach(&engine, "model"), other.attach(&engine, "beside"));
    let mut consumer = rig.consumer();
    pass(&mut consumer, &model, &weights);
    pass(&mut consumer, &beside, &other);
    consumer.check();

    let path = weights.file.path();
    let (bytes, modified) = (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap());
    weights.file.as_file().set_len(3 << 20).unwrap();
    for _ in 0..2 {
        for weight in [1, 3, 4] {
            model.discard(weight).unwrap();
            let (name, error) = refusal(&model, weight);
            assert_eq!(name, format!("w{weight}"));
            assert!(error.to_string().contains(&*path.to_string_lossy()), "{error}");
            assert!(matches!(error, StoreError::Changed { .. } | StoreError::Truncated { .. }), "{error}");
            consumer.use_weight(&model, &weights, 2).unwrap();
            consumer.use_weight(&model, &weights, 5).unwrap();
        }
        pass(&mut consumer, &beside, &other);
    }
    weights.file.as_file().write_all_at(&bytes, 0).unwrap();
    restore_times(path, modified);
    (0..3).for_each(|_| pass(&mut consumer, &model, &weights));
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn a_file_overwritten_in_place_is_an_error_and_not_a_mix() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB, 2 * MIB]);
    let engine = rig.engine(PAGE * 2);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    consumer.use_weight(&model, &weights, 0).unwrap();
    // Read ahead or not: from now on only what is there already may be used.
    engine.settle().unwrap();
    weights.file.as_file().write_all_at(&random.bytes(100), 2 << 20).unwrap();
    restore_times(weights.file.path(), std::time::UNIX_EPOCH);
    (0..2).for_each(|weight| model.discard(weight).unwrap());
    engine.settle().unwrap();
    for weight in [0, 1, 0] {
        let (name, error) = refusal(&model, weight);
        assert_eq!(name, format!("w{weight}"));
        assert!(matches!(&error, StoreError::Changed { path, .. } if path == weights.file.path()), "{error}");
    }
    assert_no_pins(&engine, 0);
}

#[test]
fn a_file_deleted_or_replaced_by_rename_goes_on_being_read() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB, 3 * MIB, MIB, 5 * MIB]);
    let engine = rig.engine(PAGE * 4);
    let model = weights.attach(&engine, "model");
    let mut consumer = rig.consumer();
    let replacement = weights.file.path().with_extension("new");
    fs::write(&replacement, random.bytes(20 * MIB)).unwrap();
    fs::rename(&replacement, weights.file.path()).unwrap();
    (0..3).for_each(|_| pass(&mut consumer, &model, &weights));
    fs::remove_file(weights.file.path()).unwrap();
    (0..3).for_each(|_| pass(&mut consumer, &model, &weights));
    consumer.check();
    // The harness wants to delete the file itself.
    fs::write(weights.file.path(), []).unwrap();
}

#[test]
fn what_cannot_be_read_is_named_and_its_neighbours_on_other_pages_go_on() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB]);
    let file = SourceFile::open(weights.file.path()).unwrap();
    let no_pages = SourceFile::from_open(File::open("/proc/self/mem").unwrap(), "unmapped memory").unwrap();
    let in_memory = Arc::new(random.bytes(MIB));
    let specs = vec![
        spec("whole page", weights.specs[0].source.clone(), WeightKind::Whole),
        spec("in memory", Source::memory(Arc::clone(&in_memory) as _), WeightKind::Whole),
        spec("past the end", Source::file(&file, 3 << 19, Bytes::mib(1)), WeightKind::Whole),
        spec("at the end of numbers", Source::file(&file, u64::MAX - 5, Bytes::mib(2)), WeightKind::Whole),
        spec("unreadable", Source::file(&no_pages, 0, Bytes::mib(2)), WeightKind::Whole),
    ];
    let engine = rig.engine(PAGE * 8);
    let model = engine.attach("model", specs, options()).unwrap();
    let mut consumer = rig.consumer();
    for _ in 0..3 {
        consumer.use_weight(&model, &weights, 0).unwrap();
        // Shares its page with a weight that cannot be read, which is the one to be named.
        for weight in [1, 2] {
            let (name, error) = refusal(&model, weight);
            assert_eq!(name, "past the end");
            assert!(
                matches!(error, StoreError::Truncated { wanted, length, .. } if (wanted, length) == (5 << 19, 4 << 19)),
                "{error}"
            );
        }
        let (name, error) = refusal(&model, 3);
        assert_eq!(name, "at the end of numbers");
        assert!(matches!(error, StoreError::Truncated { .. }), "{error}");
        let (name, error) = refusal(&model, 4);
        assert_eq!(name, "unreadable");
        assert!(error.to_string().contains("unmapped memory"), "{error}");
    }
    consumer.check();
    assert_no_pins(&engine, 0);
}

#[test]
fn small_weights_that_cannot_be_read_fail_the_attachment_and_leave_nothing() {
    let rig = Rig::new();
    let mut random = Random::seeded();
    let good = Weights::new(&mut random, &[100, 2 * MIB]);
    let file = SourceFile::open(good.file.path()).unwrap();
    let engine = rig.engine(PAGE * 2);
    for _ in 0..3 {
        let small = spec("small", Source::file(&file, 3 << 20, Bytes::new(100)), WeightKind::Whole);
        let error = engine.attach("model", vec![small], options()).unwrap_err();
        assert!(matches!(&error, EngineError::Source { weight, .. } if weight == "small"), "{error}");
    }
    engine.settle().unwrap();
    assert!(engine.stats().vbars.is_empty(), "{}", engine.stats());
    let model = good.attach(&engine, "good");
    let mut consumer = rig.consumer();
    pass(&mut consumer, &model, &good);
    consumer.check();
}

#[test]
fn a_table_is_resident_only_when_everything_before_it_fits_and_read_by_rows_otherwise() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[2 * MIB, 2 * MIB, 6 * MIB, 4 * MIB, 100]);
    let mut specs = weights.specs.clone();
    specs[2].kind = WeightKind::Table;
    specs[3].kind = WeightKind::Table;
    // A page of small weights, two of whole ones, the smaller table on two, the larger one on three.
    for (pages, kept) in [(8, [true, true]), (7, [false, true]), (5, [false, true]), (4, [false, false])] {
        let engine = rig.engine(PAGE * pages);
        let model = engine.attach("model", specs.clone(), options()).unwrap();
        assert_eq!([model.is_kept(2).unwrap(), model.is_kept(3).unwrap()], kept, "{pages} pages");
        assert!(model.is_kept(0).unwrap() && model.is_kept(4).unwrap());
        let mut consumer = rig.consumer();
        for weight in [0, 1, 4] {
            consumer.use_weight(&model, &weights, weight).unwrap();
        }
        for (table, kept) in [(2, kept[0]), (3, kept[1])] {
            if kept {
                consumer.use_weight(&model, &weights, table).unwrap();
            }
            let row_bytes = 4096;
            let rows: Vec<u64> =
                (0..50).map(|_| random.below((weights.contents[table].len() / row_bytes) as u64)).collect();
            let mut out = vec![0; rows.len() * row_bytes];
            model.read_rows(table, Bytes::new(row_bytes as u64), &rows, &mut out).unwrap();
            for (row, got) in rows.iter().zip(out.chunks(row_bytes)) {
                let at = *row as usize * row_bytes;
                assert!(got == &weights.contents[table][at..at + row_bytes], "row {row}");
            }
        }
        assert_eq!(model.stats().looked_up, Bytes::new(2 * 50 * 4096));
        consumer.check();
    }
}

#[test]
fn rows_that_do_not_exist_or_do_not_fit_are_refused_by_value() {
    let mut random = Random::seeded();
    let rig = Rig::new();
    let weights = Weights::new(&mut random, &[MIB]);
    let mut specs = weights.specs.clone();
    specs[0].kind = WeightKind::Table;
    let engine = rig.engine(PAGE);
    let model = engine.attach("model", specs, options()).unwrap();
    let mut out = vec![1; 4096];
    let mut refused = |row_bytes, rows: &[u64], len: usize| match model.read_rows(
        0,
        Bytes::new(row_bytes),
        rows,
        &mut out[..len],
    ) {
        Err(EngineError::Source { weight, error, .. }) if weight == "w0" => *error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(4096, &[256], 4096), StoreError::NoSuchRow { row: 256, rows: 256, .. }));
    assert!(matches!(refused(4096, &[u64::MAX], 4096), StoreError::NoSuchRow { .. }));
    assert!(matches!(refused(4096, &[0], 4095), StoreError::BufferSize { .. }));
    assert!(matches!(refused(1000, &[0], 1000), StoreError::RowSize { .. }));
    assert!(matches!(refused(0, &[0], 0), StoreError::RowSize { .. }));
    assert!(matches!(model.read_rows(1, Bytes::new(1), &[], &mut []), Err(EngineError::Invalid(_))));
    assert!(matches!(model.is_kept(1), Err(EngineError::Invalid(_))));
    weights.file.as_file().set_len(10).unwrap();
    assert!(matches!(refused(4096, &[0], 4096), StoreError::Changed { .. }));
}

//! Reading from files and memory alike: ranges, rows and page windows.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forebay_core::Bytes;
use forebay_store::{MemoryRange, Segment, Source, SourceFile, StoreError, read_rows, read_segments};
use proptest::prelude::*;

use crate::data::{Random, folder, write};

/// The same bytes as every kind of source there is; the file's are preceded by others.
fn sources(folder: &std::path::Path, bytes: &[u8]) -> Vec<Source> {
    let path = write(folder, "file", &[b"before", bytes, b"after"].concat());
    let file = SourceFile::open(path).expect("a file");
    let owner: Arc<[u8]> = bytes.into();
    // SAFETY: the owner keeps the bytes where they are, and nobody can write to them.
    let range = unsafe { MemoryRange::new(owner.as_ptr(), owner.len(), Arc::clone(&owner)) };
    vec![
        Source::file(&file, 6, Bytes::new(bytes.len() as u64)),
        Source::memory(Arc::new(bytes.to_vec())),
        Source::memory(Arc::new(Box::<[u8]>::from(bytes))),
        Source::memory(Arc::new(range)),
    ]
}

#[test]
fn all_sources_read_alike() {
    let (folder, mut random) = (folder(), Random::new());
    let bytes = random.bytes(1000);
    for source in sources(folder.path(), &bytes) {
        assert_eq!(source.len(), Bytes::new(1000));
        let part = source.slice(100, Bytes::new(500)).unwrap().slice(50, Bytes::new(100)).unwrap();
        for (source, start) in [(&source, 0), (&part, 150)] {
            let mut read = vec![0; 40];
            source.read_at(60, &mut read).unwrap();
            assert_eq!(read, bytes[start + 60..][..40], "{source:?}");
        }
        part.read_at(100, &mut []).unwrap();
        part.verify().unwrap();
        for (offset, len) in [(61, 40), (100, 1), (u64::MAX, 1)] {
            let wanted = StoreError::OutOfRange { of: part.describe(), offset, len, bytes: 100 };
            assert_eq!(part.read_at(offset, &mut vec![0; len as usize]).unwrap_err(), wanted);
            assert_eq!(part.slice(offset, Bytes::new(len)).unwrap_err(), wanted);
        }
        let place = if source.is_file() { "file@6" } else { "CPU memory" };
        assert!(source.describe().ends_with(place), "{}", source.describe());
    }
}

#[test]
fn a_file_source_past_the_end_is_told_when_it_is_read() {
    let folder = folder();
    let file = SourceFile::open(write(folder.path(), "file", b"0123456789")).unwrap();
    for (offset, bytes) in [(5, 10), (u64::MAX, 10), (u64::MAX - 3, u64::MAX)] {
        let source = Source::file(&file, offset, Bytes::new(bytes));
        let error = source.read_at(4, &mut [0; 6]).unwrap_err();
        assert!(matches!(error, StoreError::Truncated { length: 10, .. }), "{error}");
    }
}

#[test]
fn memory_keeps_its_owner_until_the_last_source_goes() {
    struct Owner(Vec<u8>, Arc<AtomicBool>);
    impl Drop for Owner {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }
    let dropped = Arc::new(AtomicBool::new(false));
    let owner = Owner(Random::new().bytes(100), Arc::clone(&dropped));
    let (start, bytes) = (owner.0.as_ptr(), owner.0.clone());
    // SAFETY: the owner's vector stays as it is until the owner is dropped.
    let range = unsafe { MemoryRange::new(start, 100, owner) };
    let source = Source::memory(Arc::new(range));
    let part = source.slice(10, Bytes::new(20)).unwrap();
    drop(source);
    assert!(!dropped.load(Ordering::SeqCst));
    let mut read = [0; 20];
    part.read_at(0, &mut read).unwrap();
    assert_eq!(read, bytes[10..30]);
    drop(part);
    assert!(dropped.load(Ordering::SeqCst));
}

#[test]
fn rows_come_in_the_order_asked_for() {
    let (folder, mut random) = (folder(), Random::new());
    let table = random.bytes(50 * 24);
    for source in sources(folder.path(), &table) {
        for wanted in [0, 1, 3, 200] {
            let mut rows: Vec<u64> = (0..wanted).map(|_| random.below(50)).collect();
            rows.extend([7, 8, 9, 9, 8, 48, 49, 0]);
            let mut out = vec![0; rows.len() * 24];
            read_rows(&source, 24, &rows, &mut out).unwrap();
            let naive: Vec<u8> =
                rows.iter().flat_map(|&row| &table[row as usize * 24..][..24]).copied().collect();
            assert_eq!(out, naive);
        }
        read_rows(&source, 24, &[], &mut []).unwrap();
    }
}

#[test]
fn rows_are_checked_before_anything_is_read() {
    let of = "CPU memory".to_owned();
    let source = Source::memory(Arc::new(Random::new().bytes(100)));
    let mut out = [7; 20];
    let no_row = |row| StoreError::NoSuchRow { of: of.clone(), row, rows: 10 };
    assert_eq!(read_rows(&source, 10, &[0, 10], &mut out).unwrap_err(), no_row(10));
    assert_eq!(read_rows(&source, 10, &[u64::MAX, 0], &mut out).unwrap_err(), no_row(u64::MAX));
    assert_eq!(out, [7; 20]);
    let error = read_rows(&source, 10, &[1], &mut out).unwrap_err();
    let (wanted, len) = (Bytes::new(10), Bytes::new(20));
    assert_eq!(error, StoreError::BufferSize { of: of.clone(), wanted, len });
    for row_bytes in [0, 30, 101] {
        let error = read_rows(&source, row_bytes, &[0], &mut out).unwrap_err();
        assert_eq!(error, StoreError::RowSize { of: of.clone(), row_bytes, bytes: 100 });
    }
}

#[test]
fn a_segment_longer_than_its_source_is_an_error() {
    let source = Source::memory(Arc::new(Random::new().bytes(100)));
    let segment =
        |source_offset, dst_offset, len| Segment { source: source.clone(), source_offset, dst_offset, len };
    let mut page = [0; 64];
    for bad in
        [segment(90, 0, 20), segment(u64::MAX, 0, 20), segment(0, u64::MAX, 20), segment(u64::MAX, 2, 20)]
    {
        let base = bad.dst_offset.clamp(0, 4);
        let error = read_segments(&[bad], base, &mut page).unwrap_err();
        assert!(matches!(error, StoreError::OutOfRange { .. }), "{error}");
    }
    read_segments(&[segment(0, 64, 10)], 0, &mut page).unwrap();
    assert_eq!(page, [0; 64], "a segment outside the window is not read");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]

    #[test]
    fn windows_put_together_are_the_page(
        pieces in prop::collection::vec((0_u64..200, 1_u64..300, 0_u64..40), 0..8),
        window in 1_usize..500,
        seed in any::<prop::sample::Index>(),
    ) {
        let (folder, mut random) = (folder(), Random::new());
        let bytes = random.bytes(500);
        let sources = sources(folder.path(), &bytes);
        let mut segments = Vec::new();
        let mut end = 0;
        for (source_offset, len, gap) in pieces {
            let source = sources[random.below(4) as usize].clone();
            segments.push(Segment { source, source_offset, dst_offset: end + gap, len });
            end += gap + len;
        }
        let mut naive = vec![0xee; end as usize + 30];
        for segment in &segments {
            naive[segment.dst_offset as usize..][..segment.len as usize]
                .copy_from_slice(&bytes[segment.source_offset as usize..][..segment.len as usize]);
        }
        let turn = seed.index(segments.len().max(1));
        segments.rotate_left(turn);

        let mut page = vec![0xee; naive.len()];
        for (number, part) in page.chunks_mut(window).enumerate() {
            read_segments(&segments, (number * window) as u64, part).unwrap();
        }
        prop_assert_eq!(page, naive);
    }
}

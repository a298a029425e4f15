//! Files that change, go away or cannot be read while they are in use.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;

use forebay_core::Bytes;
use forebay_store::{Advice, Checkpoint, DirectBuffer, MappedFile, SourceFile, StoreError};
use memmap2::MmapOptions;

use crate::data::{Random, folder, serialize, tensors, write};

#[test]
fn reads_are_exact_wherever_they_start() {
    let (folder, mut random) = (folder(), Random::new());
    let bytes = random.bytes(10_000);
    let file = SourceFile::open(write(folder.path(), "file", &bytes)).unwrap();
    assert_eq!(file.len(), Bytes::new(10_000));
    for _ in 0..200 {
        let start = random.below(10_001) as usize;
        let end = start + random.below((10_001 - start) as u64) as usize;
        let mut read = vec![0; end - start];
        file.read_exact_at(start as u64, &mut read).unwrap();
        assert_eq!(read, bytes[start..end]);
    }
    for advice in [Advice::WillNeed, Advice::Random, Advice::DontNeed] {
        file.advise(0, None, advice);
    }
    file.verify().unwrap();
}

#[test]
fn a_read_past_the_end_says_where_the_end_is() {
    let folder = folder();
    let path = write(folder.path(), "file", &Random::new().bytes(100));
    let file = SourceFile::open(&path).unwrap();
    let mut buffer = [0; 10];
    for (offset, wanted) in [(91, 101), (100, 110), (5000, 5010), (u64::MAX, u64::MAX)] {
        let truncated = StoreError::Truncated { path: path.clone(), tensor: None, wanted, length: 100 };
        assert_eq!(file.read_exact_at(offset, &mut buffer).unwrap_err(), truncated);
        assert_eq!(file.check_range(offset, Bytes::new(10)).unwrap_err(), truncated);
    }
    for (offset, len) in [(0, 100), (90, 10), (100, 0)] {
        file.check_range(offset, Bytes::new(len)).unwrap();
    }
}

#[test]
fn a_file_truncated_in_use_is_an_error_with_numbers() {
    let folder = folder();
    let path = write(folder.path(), "file", &Random::new().bytes(100));
    let file = SourceFile::open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(40).unwrap();

    let error = file.read_exact_at(30, &mut [0; 20]).unwrap_err();
    assert_eq!(error, StoreError::Truncated { path: path.clone(), tensor: None, wanted: 50, length: 40 });
    assert_eq!(file.check_range(30, Bytes::new(20)).unwrap_err(), error);
    let changed = StoreError::Changed { path, what: "size 100 -> 40".into() };
    assert_eq!(file.verify().unwrap_err(), changed);
    assert_eq!(MappedFile::map(&file).unwrap_err(), changed);
}

#[test]
fn a_file_overwritten_in_place_is_noticed() {
    let (folder, mut random) = (folder(), Random::new());
    let path = write(folder.path(), "model.safetensors", &serialize(&tensors(&mut random, "x"), None));
    let checkpoint = Checkpoint::open(&path).unwrap();
    checkpoint.verify().unwrap();
    File::options().write(true).open(&path).unwrap().write_all(b"other").unwrap();

    let changed = StoreError::Changed { path, what: "modification time".into() };
    assert_eq!(checkpoint.verify().unwrap_err(), changed);
    assert_eq!(checkpoint.tensors()[0].source().verify().unwrap_err(), changed);
}

#[test]
fn a_file_deleted_or_replaced_goes_on_being_read() {
    let (folder, mut random) = (folder(), Random::new());
    for replace in [false, true] {
        let bytes = random.bytes(5000);
        let path = write(folder.path(), "file", &bytes);
        let file = SourceFile::open(&path).unwrap();
        if replace {
            fs::rename(write(folder.path(), "other", &random.bytes(10)), &path).unwrap();
        } else {
            fs::remove_file(&path).unwrap();
        }

        let mut read = vec![0; 5000];
        file.read_exact_at(0, &mut read).unwrap();
        assert_eq!(read, bytes);
        file.verify().unwrap();
    }
}

#[test]
fn an_unreadable_range_is_told_with_its_offset() {
    let folder = folder();
    let page = rustix::param::page_size();
    let short = File::open(write(folder.path(), "file", &Random::new().bytes(page))).unwrap();
    // The second page is past the file's end, so reading it through the process's memory fails half-way.
    let map = MmapOptions::new().len(2 * page).map_raw_read_only(&short).unwrap();
    let bad = (map.as_ptr().addr() + page) as u64;
    let memory = SourceFile::open("/proc/self/mem").unwrap();

    let error = memory.read_exact_at(bad - 16, &mut [0; 48]).unwrap_err();
    match &error {
        StoreError::Read { offset, len, .. } => assert_eq!((*offset, *len), (bad, 32)),
        other => panic!("{other}"),
    }
    assert!(error.to_string().contains(&bad.to_string()), "{error}");
}

#[test]
fn only_regular_files_are_opened() {
    let folder = folder();
    let path = folder.path().to_owned();
    let error = SourceFile::open(&path).unwrap_err();
    assert_eq!(error, StoreError::NotRegular { path, kind: "a directory" });
    assert!(matches!(SourceFile::open("/dev/zero"), Err(StoreError::NotRegular { kind: "a device", .. })));
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(SourceFile::open(&pipe), Err(StoreError::NotRegular { kind: "a pipe", .. })));
}

#[test]
fn the_descriptor_is_not_inherited() {
    let folder = folder();
    let file = SourceFile::open(write(folder.path(), "file", b"bytes")).unwrap();
    let flags = rustix::io::fcntl_getfd(file.as_fd()).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
}

#[test]
fn a_mapping_shows_the_file() {
    let (folder, mut random) = (folder(), Random::new());
    let bytes = random.bytes(20_000);
    let file = SourceFile::open(write(folder.path(), "file", &bytes)).unwrap();
    let mapped = MappedFile::map(&file).unwrap();
    assert_eq!(mapped.len(), file.len());
    mapped.populate(5000, Bytes::new(10_000)).unwrap();
    // SAFETY: only this test knows the file, and it does not change it.
    let part = unsafe { mapped.range(123, Bytes::new(10_000)) }.unwrap();
    assert_eq!(part, &bytes[123..10_123]);
    assert_eq!(mapped.ptr_at(123, Bytes::new(1)).unwrap(), part.as_ptr());

    for (offset, len) in [(20_000, 1), (0, 20_001), (u64::MAX, 1), (1, u64::MAX)] {
        let error = mapped.ptr_at(offset, Bytes::new(len)).unwrap_err();
        assert!(matches!(error, StoreError::OutOfRange { bytes: 20_000, .. }), "{error}");
        assert_eq!(mapped.populate(offset, Bytes::new(len)).unwrap_err(), error);
    }
}

#[test]
fn populating_a_file_truncated_in_use_is_an_error_and_not_a_signal() {
    let folder = folder();
    let page = rustix::param::page_size();
    let path = write(folder.path(), "file", &Random::new().bytes(4 * page));
    let mapped = MappedFile::map(&SourceFile::open(&path).unwrap()).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(page as u64).unwrap();
    let error = mapped.populate(0, mapped.len()).unwrap_err();
    assert!(matches!(error, StoreError::Map { .. }), "{error}");
}

#[test]
fn an_empty_file_maps_to_nothing() {
    let folder = folder();
    let file = SourceFile::open(write(folder.path(), "file", b"")).unwrap();
    let mapped = MappedFile::map(&file).unwrap();
    assert!(mapped.is_empty() && file.is_empty());
    // SAFETY: the range has no bytes.
    assert_eq!(unsafe { mapped.range(0, Bytes::ZERO) }.unwrap(), b"");
}

#[test]
fn a_file_just_written_is_cached_to_its_last_byte() {
    let folder = folder();
    for len in [1, 4096, 300_001] {
        let file = SourceFile::open(write(folder.path(), "file", &Random::new().bytes(len))).unwrap();
        let mapped = MappedFile::map(&file).unwrap();
        assert_eq!(mapped.cached().unwrap(), Some(Bytes::new(len as u64)));
    }
}

#[test]
fn reads_past_the_cache_are_right_at_any_place_and_leave_nothing_in_it() {
    for folder in [std::env::temp_dir(), "/dev/shm".into()] {
        let mut file = tempfile::NamedTempFile::new_in(folder).unwrap();
        let bytes: Vec<u8> =
            (0..5_000_123_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
        file.write_all(&bytes).unwrap();
        file.as_file().sync_all().unwrap();
        let opened = SourceFile::open(file.path()).unwrap();
        let mut through = DirectBuffer::default();
        for cached in [true, false] {
            for (offset, len) in
                [(0, 5_000_123), (1, 4096), (4095, 2), (4096, 8192), (3_000_000, 2_000_123), (5, 0)]
            {
                if !cached {
                    opened.advise(0, None, Advice::DontNeed);
                }
                let mut got = vec![0; len];
                opened.read_past_cache(offset as u64, &mut got, &mut through).unwrap();
                assert!(got == bytes[offset..offset + len], "{len} bytes at {offset}, cached: {cached}");
            }
        }
        let mut got = vec![0; 100];
        let past_the_end = opened.read_past_cache(5_000_100, &mut got, &mut through).unwrap_err();
        assert!(matches!(past_the_end, StoreError::Truncated { .. }), "{past_the_end}");
        file.as_file().set_len(1000).unwrap();
        let truncated = opened.read_past_cache(900, &mut got[..], &mut through);
        assert!(truncated.is_ok(), "900 to 1000 are still there");
        let truncated = opened.read_past_cache(901, &mut got, &mut through).unwrap_err();
        assert!(matches!(truncated, StoreError::Truncated { .. }), "{truncated}");
    }
}

//! Finding the file behind mapped memory, and only where it holds the same bytes.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use forebay_store::{ProcessMaps, mapped_source};
use memmap2::{MmapMut, MmapOptions};
use rustix::mm::{MprotectFlags, mprotect};

use crate::data::{Random, folder, write};

const PAGES: usize = 6;

/// A file of some pages and a bit, and a private writable mapping of it from its second page on.
struct Mapped {
    folder: tempfile::TempDir,
    path: PathBuf,
    bytes: Vec<u8>,
    map: MmapMut,
    page: usize,
}

impl Mapped {
    fn new() -> Mapped {
        let (folder, page) = (folder(), rustix::param::page_size());
        let bytes = Random::new().bytes(PAGES * page + 100);
        let path = write(folder.path(), "model with spaces\nand lines.safetensors", &bytes);
        let file = File::open(&path).expect("a readable file");
        // SAFETY: only this test knows the file, and it does not change it while the mapping is looked at.
        let map = unsafe { MmapOptions::new().offset(page as u64).map_copy(&file) }.expect("a mapping");
        Mapped { folder, path, bytes, map, page }
    }

    fn addr(&self, offset: usize) -> usize {
        self.map.as_ptr().addr() + offset
    }

    fn touch_all(&self) {
        assert!(self.map.iter().map(|&byte| u64::from(byte)).sum::<u64>() > 0);
    }

    #[track_caller]
    fn assert_found(&self, start: usize, len: usize) {
        let (file, offset) = mapped_source(self.addr(start), len).expect("an unmodified range has a file");
        assert_eq!(file.path(), self.path);
        assert_eq!(offset as usize, self.page + start);
        let mut read = vec![0; len];
        file.read_exact_at(offset, &mut read).expect("the range is inside the file");
        assert_eq!(read, self.map[start..start + len]);
        assert_eq!(read, self.bytes[self.page + start..][..len]);
    }

    #[track_caller]
    fn assert_unknown(&self, start: usize, len: usize) {
        assert!(mapped_source(self.addr(start), len).is_none());
    }
}

#[test]
fn pages_of_a_traced_range_leave_the_process_and_come_back() {
    let mut mapped = Mapped::new();
    mapped.touch_all();
    let (page, changed) = (mapped.page, 3 * mapped.page + 7);
    mapped.map[changed] ^= 0xff;
    let maps = ProcessMaps::snapshot().unwrap();
    // From the middle of a page to the middle of the next but one: the one between is dropped.
    let range = (mapped.addr(page / 2), 2 * page);
    assert!(maps.source_of(range.0, range.1).is_some());
    assert_eq!(resident(&mapped), [true; PAGES - 1]);
    // SAFETY: traced above, and not written to.
    unsafe { maps.drop_pages(range.0, range.1) };
    assert_eq!(resident(&mapped), [true, false, true, true, true]);
    // SAFETY: less than a memory page.
    unsafe { maps.drop_pages(mapped.addr(10), page / 2) };
    let mut expected = mapped.bytes[page..].to_vec();
    expected[changed] ^= 0xff;
    assert_eq!(mapped.map[..], expected);
}

/// Which whole pages of the mapping the process has in its memory.
fn resident(mapped: &Mapped) -> Vec<bool> {
    use std::os::unix::fs::FileExt;
    let pagemap = File::open("/proc/self/pagemap").expect("the page table of this process");
    let entry = |page: usize| {
        let mut entry = [0; 8];
        let at = mapped.addr(page * mapped.page) / mapped.page * entry.len();
        pagemap.read_exact_at(&mut entry, at as u64).expect("an entry for each page");
        u64::from_ne_bytes(entry) >> 63 == 1
    };
    (0..PAGES - 1).map(entry).collect()
}

#[test]
fn an_unmodified_private_mapping_is_traced_to_its_file() {
    let mapped = Mapped::new();
    let len = mapped.map.len();
    mapped.assert_found(0, len);
    mapped.touch_all();
    mapped.assert_found(0, len);
    mapped.assert_found(mapped.page + 7, 1);
    mapped.assert_found(len - 1, 1);
}

#[test]
fn a_page_written_to_is_not_the_files() {
    let mut mapped = Mapped::new();
    mapped.touch_all();
    let page = mapped.page;
    let byte = &mut mapped.map[2 * page + 5];
    *byte = byte.wrapping_add(1);

    mapped.assert_unknown(0, mapped.map.len());
    mapped.assert_unknown(2 * page + 5, 1);
    mapped.assert_unknown(2 * page, 1);
    mapped.assert_unknown(2 * page - 1, 2);
    mapped.assert_unknown(3 * page - 1, 1);
    mapped.assert_found(0, 2 * page);
    mapped.assert_found(3 * page, mapped.map.len() - 3 * page);
}

#[test]
fn ranges_that_are_not_wholly_in_the_file_are_unknown() {
    let mapped = Mapped::new();
    let len = mapped.map.len();
    mapped.assert_unknown(0, 0);
    mapped.assert_unknown(0, len + 1);
    mapped.assert_unknown(len, 1);
    mapped.assert_unknown(0, 1 << 40);
    assert!(mapped_source(usize::MAX, 2).is_none());
    assert!(mapped_source(0, 1).is_none());
    assert!(mapped_source(0, usize::MAX).is_none());
}

#[test]
fn adjacent_areas_of_one_file_are_one_range() {
    let mapped = Mapped::new();
    let middle = mapped.map.as_ptr().wrapping_add(2 * mapped.page).cast_mut();
    // SAFETY: the page belongs to the mapping, and is only read from here on.
    unsafe { mprotect(middle.cast(), mapped.page, MprotectFlags::READ) }.unwrap();
    mapped.assert_found(0, mapped.map.len());
    mapped.assert_found(2 * mapped.page - 3, 6);
}

#[test]
fn shared_mappings_count_when_nobody_writes_through_them() {
    let (folder, mut random) = (folder(), Random::new());
    let path = write(folder.path(), "file", &random.bytes(5000));
    let file = File::options().read(true).write(true).open(&path).unwrap();
    // SAFETY: only this test knows the file, and it does not change it.
    let read_only = unsafe { MmapOptions::new().map(&file) }.unwrap();
    // SAFETY: as above.
    let writable = unsafe { MmapOptions::new().map_mut(&file) }.unwrap();
    let (found, offset) = mapped_source(read_only.as_ptr().addr() + 10, 4000).unwrap();
    assert_eq!((found.path(), offset), (path.as_path(), 10));
    assert!(mapped_source(writable.as_ptr().addr(), 100).is_none());
}

#[test]
fn memory_without_a_file_is_unknown() {
    let anonymous = MmapMut::map_anon(10_000).unwrap();
    assert!(mapped_source(anonymous.as_ptr().addr(), 10_000).is_none());
    let heap = Random::new().bytes(10_000);
    assert!(mapped_source(heap.as_ptr().addr(), heap.len()).is_none());
    let stack = [1_u8; 100];
    assert!(mapped_source(stack.as_ptr().addr(), stack.len()).is_none());

    let memfd = rustix::fs::memfd_create("weights", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memfd, 4096).unwrap();
    // SAFETY: only this test knows the file, and it does not change it.
    let map = unsafe { MmapOptions::new().map(&memfd) }.unwrap();
    assert!(mapped_source(map.as_ptr().addr(), 4096).is_none());
    let zeros = File::open("/dev/zero").unwrap();
    // SAFETY: a device that gives zeros for ever.
    let map = unsafe { MmapOptions::new().len(4096).map_copy_read_only(&zeros) }.unwrap();
    assert!(mapped_source(map.as_ptr().addr(), 4096).is_none());
}

#[test]
fn a_file_that_is_gone_or_replaced_is_unknown() {
    for replace in [false, true] {
        let mapped = Mapped::new();
        let before = ProcessMaps::snapshot().unwrap();
        if replace {
            // The same bytes, and still another file.
            fs::rename(write(mapped.folder.path(), "other", &mapped.bytes), &mapped.path).unwrap();
        } else {
            fs::remove_file(&mapped.path).unwrap();
        }
        mapped.assert_unknown(0, 100);
        assert!(before.source_of(mapped.addr(0), 100).is_none(), "the path leads to another file by now");
    }
}

#[test]
fn bytes_past_the_end_of_the_file_are_unknown() {
    let mapped = Mapped::new();
    File::options().write(true).open(&mapped.path).unwrap().set_len(2 * mapped.page as u64).unwrap();
    mapped.assert_unknown(0, mapped.page + 1);
    assert!(mapped_source(mapped.addr(0), mapped.page).is_some());
}

#[test]
fn a_snapshot_opens_each_file_once() {
    let mapped = Mapped::new();
    let maps = ProcessMaps::snapshot().unwrap();
    let (first, _) = maps.source_of(mapped.addr(0), 10).unwrap();
    for offset in 1..1000 {
        let (file, at) = maps.source_of(mapped.addr(offset), 10).unwrap();
        assert!(Arc::ptr_eq(&file, &first));
        assert_eq!(at as usize, mapped.page + offset);
    }
}

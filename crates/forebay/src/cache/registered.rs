//! One page's bytes where they are in the page cache, registered with the device: the copy engine reads them by itself.
//!
//! Every page has mappings of its own, so that pages are registered and given back one by one even where they meet in a
//! memory page of the file.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forebay_core::Bytes;
use forebay_device::{Device, DeviceAddr, DeviceError, HostCopy, Registration, StreamHandle};
use forebay_store::{FileStamp, MappedFile, Segment, SourceFile, SourceKind, StoreError};

use crate::Result;

/// Parts of files that are nearer to each other than this are registered together.
const GAP: u64 = 1 << 20;
/// A page whose bytes lie scattered over more places than this, or in shorter runs, is better gathered in the ring: a copy
/// of 1 MiB reaches 44 of 55 GB/s, one of 256 KiB a third of it.
const MOST_PARTS: usize = 16;
const LEAST_RUN: u64 = 256 << 10;

/// See the module's documentation. Dropping it may block until the device is idle; no copy may be pending then.
#[derive(Debug)]
pub(crate) struct RegisteredPage {
    parts: Vec<Registration<MappedFile>>,
    runs: Vec<Run>,
    /// Nobody can know when a copy of it ends.
    stays: AtomicBool,
}

/// A run of bytes in the page cache and its place in the page.
#[derive(Debug)]
struct Run {
    from: *const u8,
    to: Bytes,
    len: Bytes,
}

// SAFETY: the addresses lie in `parts`, which any thread may read.
unsafe impl Send for RegisteredPage {}
// SAFETY: nothing is written through a shared reference.
unsafe impl Sync for RegisteredPage {}

/// Why a page was not registered.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotRegistered {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    File(#[from] StoreError),
}

impl NotRegistered {
    /// Whether the device registers nothing.
    pub(super) fn is_for_good(&self) -> bool {
        matches!(self, NotRegistered::Device(error) if error.is_unsupported())
    }

    /// Whether the device refused, not the system.
    pub(super) fn is_the_devices(&self) -> bool {
        matches!(self, NotRegistered::Device(_))
    }
}

/// Where a page's bytes are in files, told without mapping anything.
#[derive(Debug)]
pub(crate) struct PagePlan {
    runs: Vec<FileRun>,
    parts: Vec<FilePart>,
}

/// A page's parts of files in memory.
#[derive(Debug)]
pub(crate) struct MappedPage<'a> {
    plan: &'a PagePlan,
    parts: Vec<MappedFile>,
}

/// Bytes that follow each other in a file and in the page.
#[derive(Debug)]
struct FileRun {
    file: Arc<SourceFile>,
    from: u64,
    to: Bytes,
    len: u64,
}

/// A part of a file that is registered in one go. Parts have no memory page in common.
#[derive(Clone, Debug)]
struct FilePart {
    file: Arc<SourceFile>,
    from: u64,
    end: u64,
}

/// What tells the bytes of one page from those of another: files as they were opened, and runs in them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageKey(Vec<RunKey>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RunKey {
    file: FileStamp,
    from: u64,
    to: Bytes,
    len: u64,
}

impl PagePlan {
    /// `None` where the page has other sources than files, or is too scattered to gain by it.
    pub(crate) fn of(segments: &[Segment]) -> Option<PagePlan> {
        let mut runs: Vec<FileRun> = Vec::new();
        for segment in segments {
            let SourceKind::File { file, offset } = segment.source.kind() else { return None };
            let from = offset.checked_add(segment.source_offset)?;
            match runs.last_mut() {
                Some(last) if last.goes_on_at(file, from, segment.dst_offset) => last.len += segment.len,
                _ => {
                    let (file, to) = (Arc::clone(file), Bytes::new(segment.dst_offset));
                    runs.push(FileRun { file, from, to, len: segment.len });
                }
            }
        }
        let total: u64 = runs.iter().map(|run| run.len).sum();
        if runs.is_empty() || total / (runs.len() as u64) < LEAST_RUN {
            return None;
        }
        let mut by_place: Vec<&FileRun> = runs.iter().collect();
        by_place.sort_unstable_by_key(|run| (Arc::as_ptr(&run.file).addr(), run.from));
        let mut parts: Vec<FilePart> = Vec::new();
        for FileRun { file, from, len, .. } in by_place {
            let (from, end) = (*from, from + len);
            match parts.last_mut() {
                Some(last) if Arc::ptr_eq(&last.file, file) && from <= last.end + GAP => {
                    last.end = last.end.max(end);
                }
                _ => parts.push(FilePart { file: Arc::clone(file), from, end }),
            }
        }
        if parts.len() > MOST_PARTS {
            return None;
        }
        Some(PagePlan { runs, parts })
    }

    /// Of one part of a file, however small.
    pub(crate) fn of_part(file: &Arc<SourceFile>, from: u64, len: Bytes) -> PagePlan {
        let end = from.saturating_add(len.get());
        let run = FileRun { file: Arc::clone(file), from, to: Bytes::ZERO, len: len.get() };
        PagePlan { runs: vec![run], parts: vec![FilePart { file: Arc::clone(file), from, end }] }
    }

    pub(crate) fn key(&self) -> PageKey {
        let key = |run: &FileRun| RunKey { file: run.file.stamp(), from: run.from, to: run.to, len: run.len };
        PageKey(self.runs.iter().map(key).collect())
    }

    /// Maps and populates every part. Reads what is not in the page cache yet.
    ///
    /// # Errors
    /// Why a file cannot be mapped.
    pub(crate) fn map(&self) -> std::result::Result<MappedPage<'_>, StoreError> {
        let map = |FilePart { file, from, end }: &FilePart| {
            let len = Bytes::new(end - from);
            let part = MappedFile::map_part(file, *from, len)?;
            part.populate(*from, len)?;
            Ok(part)
        };
        let parts = self.parts.iter().map(map).collect::<std::result::Result<_, _>>()?;
        Ok(MappedPage { plan: self, parts })
    }

    /// Bytes that would be registered.
    pub(crate) fn size(&self) -> Bytes {
        let page = rustix::param::page_size() as u64;
        let pages = |part: &FilePart| part.end.next_multiple_of(page) - part.first_page(page);
        self.parts.iter().map(|part| Bytes::new(pages(part))).sum()
    }
}

impl FileRun {
    fn goes_on_at(&self, file: &Arc<SourceFile>, from: u64, to: u64) -> bool {
        Arc::ptr_eq(&self.file, file) && self.from + self.len == from && self.to.get() + self.len == to
    }
}

impl FilePart {
    /// Where the memory page begins that its first byte is in.
    fn first_page(&self, page: u64) -> u64 {
        self.from - self.from % page
    }
}

impl MappedPage<'_> {
    /// Registers the parts. The driver lets nobody else in meanwhile.
    ///
    /// # Errors
    /// What the device refuses.
    pub(crate) fn register(
        self,
        device: &Arc<dyn Device>,
    ) -> std::result::Result<RegisteredPage, DeviceError> {
        let page = rustix::param::page_size() as u64;
        let mut made = RegisteredPage { parts: Vec::new(), runs: Vec::new(), stays: AtomicBool::new(false) };
        for part in self.parts {
            let whole_pages = Bytes::new(part.len().get().next_multiple_of(page));
            let first = part.as_ptr();
            // SAFETY: the mapping is this page's own, and its last memory page is mapped whole. Whoever drops the page waits
            // for its copies.
            made.parts.push(unsafe { Registration::new(Arc::clone(device), part, first, whole_pages)? });
        }
        for FileRun { file, from, to, len } in &self.plan.runs {
            let len = Bytes::new(*len);
            let parts = made.parts.iter().map(Registration::memory);
            let mut of_file = parts.filter(|part| Arc::ptr_eq(part.file(), file));
            // Every run lies in one of the parts.
            let from = of_file.find_map(|part| part.ptr_at(*from, len).ok()).expect("a part has the run");
            made.runs.push(Run { from, to: *to, len });
        }
        Ok(made)
    }
}

impl RegisteredPage {
    /// Enqueues the copies to the page at `to`.
    ///
    /// # Errors
    /// What the device reports. Some of the copies may be enqueued then.
    ///
    /// # Safety
    /// The page is mapped and stays so, and `self` is not dropped, until what is in the stream now has completed.
    pub(crate) unsafe fn copy_to(
        &self,
        device: &dyn Device,
        to: DeviceAddr,
        stream: StreamHandle,
    ) -> Result<()> {
        let copies: Vec<_> = (self.runs.iter())
            .map(|run| HostCopy { dst: to.offset(run.to), src: run.from, len: run.len })
            .collect();
        // SAFETY: the runs lie in registered mappings that live as long as `self`, and in the page, each in a place of its own;
        // the caller keeps both until the copies have completed.
        unsafe { device.copy_all_to_device(&copies, stream) }.map_err(Into::into)
    }

    /// It stays registered for ever: the device does not tell when a copy of it ends.
    pub(crate) fn stay(&self) {
        self.stays.store(true, Ordering::Release);
    }

    /// Gives it back, unless it is to stay.
    pub(crate) fn give_back(self) {
        if self.stays.load(Ordering::Acquire) {
            mem::forget(self);
        }
    }

    /// Bytes copied each time.
    pub(crate) fn bytes(&self) -> Bytes {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Bytes registered.
    pub(crate) fn size(&self) -> Bytes {
        self.parts.iter().map(Registration::size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_device::host::{HostConfig, HostDevice};
    use forebay_store::Source;
    use std::io::Write;

    /// A file and segments of it, each (source offset, place in the page, length).
    fn plan(bytes: &[u8], segments: &[(u64, u64, u64)]) -> (tempfile::NamedTempFile, Option<PagePlan>) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let opened = SourceFile::open(file.path()).unwrap();
        let segments: Vec<_> = segments
            .iter()
            .map(|&(offset, dst_offset, len)| Segment {
                source: Source::file(&opened, offset, Bytes::new(len)),
                source_offset: 0,
                dst_offset,
                len,
            })
            .collect();
        (file, PagePlan::of(&segments))
    }

    fn registered(
        device: &Arc<dyn Device>,
        plan: &PagePlan,
    ) -> std::result::Result<RegisteredPage, DeviceError> {
        plan.map().unwrap().register(device)
    }

    #[test]
    fn neighbours_in_file_and_page_are_one_run_and_near_parts_one_registration() {
        let bytes = vec![7; 3 << 20];
        let half = 1 << 19;
        let (_file, plan) =
            plan(&bytes, &[(8, 0, half), (8 + half, half, half), (8 + 2 * half + 100, 2 * half, half)]);
        let plan = plan.unwrap();
        assert_eq!(
            plan.runs.iter().map(|run| (run.from, run.to.get(), run.len)).collect::<Vec<_>>(),
            [(8, 0, 2 * half), (8 + 2 * half + 100, 2 * half, half)]
        );
        assert_eq!(plan.parts.len(), 1);
    }

    #[test]
    fn scattered_pages_and_memory_are_left_to_the_ring() {
        let small: Vec<_> = (0..20).map(|i| (i * 100_000, i * 65_536, 65_536)).collect();
        assert!(plan(&vec![1; 2 << 20], &small).1.is_none());
        let memory = Segment {
            source: Source::memory(Arc::new(vec![1; 1 << 20])),
            source_offset: 0,
            dst_offset: 0,
            len: 1 << 20,
        };
        assert!(PagePlan::of(&[memory]).is_none());
    }

    #[test]
    fn pages_that_meet_in_a_memory_page_are_registered_each() {
        let device: Arc<dyn Device> =
            Arc::new(HostDevice::new(HostConfig { registers: true, ..HostConfig::default() }).unwrap());
        let len = (1 << 20) + 100;
        let bytes = vec![3; 2 * len as usize];
        let (_file, first) = plan(&bytes, &[(0, 0, len)]);
        let file = Arc::clone(&first.as_ref().unwrap().runs[0].file);
        let second = PagePlan {
            runs: vec![FileRun { file: Arc::clone(&file), from: len, to: Bytes::ZERO, len }],
            parts: vec![FilePart { file, from: len, end: 2 * len }],
        };
        let first = registered(&device, &first.unwrap()).unwrap();
        let second = registered(&device, &second).unwrap();
        assert_eq!((first.bytes(), second.bytes()), (Bytes::new(len), Bytes::new(len)));
    }

    #[test]
    fn what_is_copied_is_what_the_file_has() {
        let device: Arc<dyn Device> =
            Arc::new(HostDevice::new(HostConfig { registers: true, ..HostConfig::default() }).unwrap());
        // Two weights, of which the second lies a little further on in the page, and one from far away.
        let (before, half, far) = (3 * 4096 + 8, (5 << 20) + 5000, 16 << 20);
        let segments = [(before, 0, half), (before + half, half + 64, half), (far, 2 * half + 64, half)];
        let bytes: Vec<u8> = (0..far + half).map(|at| (at * 7 / 5 % 251) as u8).collect();
        let (_file, plan) = plan(&bytes, &segments);
        let plan = plan.unwrap();
        assert_eq!(plan.parts.len(), 2);
        let made = registered(&device, &plan).unwrap();
        assert_eq!((made.bytes(), made.size()), (Bytes::new(3 * half), plan.size()));
        for (run, (from, to, len)) in made.runs.iter().zip(segments) {
            assert_eq!((run.to.get(), run.len.get()), (to, len));
            // SAFETY: in the mapping that `made` keeps.
            let found = unsafe { std::slice::from_raw_parts(run.from, run.len.as_usize()) };
            assert!(found == &bytes[from as usize..(from + len) as usize]);
        }
        assert_eq!(made.runs.len(), segments.len());
    }

    #[test]
    fn a_device_that_registers_nothing_says_so() {
        let device: Arc<dyn Device> = Arc::new(HostDevice::new(HostConfig::default()).unwrap());
        let (_file, plan) = plan(&vec![3; 1 << 20], &[(0, 0, 1 << 20)]);
        assert!(registered(&device, &plan.unwrap()).unwrap_err().is_unsupported());
    }
}

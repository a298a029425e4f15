//! Which file is behind memory that this process has mapped already.
//!
//! Loaders hand over tensors that are views of a mapped file. Read from the file instead, their memory stays the
//! page cache's own and may be given back at any moment.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::mm;

use crate::error::{Result, StoreError};
use crate::file::SourceFile;
use crate::mapped::MappedFile;

const MAPS: &str = "/proc/self/maps";
const PAGEMAP: &str = "/proc/self/pagemap";

/// The file whose bytes are at `addr..addr + len` of this process, and the offset of the first one.
///
/// As [`ProcessMaps::source_of`], for a single range; `None` also where the memory map cannot be read.
pub fn mapped_source(addr: usize, len: usize) -> Option<(Arc<SourceFile>, u64)> {
    ProcessMaps::snapshot().ok()?.source_of(addr, len)
}

/// The process's memory map at one moment, to look many ranges up in. Each file behind it is opened once.
#[derive(Debug)]
pub struct ProcessMaps {
    areas: Vec<Area>,
    /// `None` where the system hides it; then only shared mappings are traced.
    pagemap: Option<File>,
    /// By identity; `None` for those that cannot be used. A leaf lock; files are opened under it.
    files: Mutex<HashMap<FileId, Option<Arc<SourceFile>>>>,
}

impl ProcessMaps {
    /// Reads the memory map.
    ///
    /// # Errors
    /// [`StoreError::ProcessMaps`].
    pub fn snapshot() -> Result<ProcessMaps> {
        let pagemap = File::open(PAGEMAP).inspect_err(|error| {
            tracing::debug!(%error, "{PAGEMAP} cannot be opened; private mappings are not traced to files");
        });
        Ok(ProcessMaps { areas: read_maps()?, pagemap: pagemap.ok(), files: Mutex::default() })
    }

    /// The file whose bytes are at `addr..addr + len`, and the offset of the first one, where reading the file is
    /// sure to give the same bytes.
    ///
    /// That is: the range lies in one regular file, mapped shared and read-only, or mapped privately with no page
    /// of the range written to; and the file is still at the path it was mapped from. `None` for everything else.
    ///
    /// The range must have been mapped when the snapshot was taken, and ever since, and must not be written to
    /// afterwards.
    pub fn source_of(&self, addr: usize, len: usize) -> Option<(Arc<SourceFile>, u64)> {
        let end = addr.checked_add(len)?;
        let areas = self.areas_of(addr, end)?;
        let first = &areas[0];
        let unmodified = areas.iter().all(|area| match area.access {
            Access::SharedRead => true,
            Access::SharedWrite => false,
            Access::Private => self.is_unmodified(addr.max(area.start), end.min(area.end)),
        });
        if !unmodified {
            return None;
        }
        let file = self.file_of(first)?;
        let offset = first.offset.checked_add((addr - first.start) as u64)?;
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= file.len().get());
        inside.then_some((file, offset))
    }

    /// Takes the pages of a range out of the process's memory, but for those that it shares with its neighbours. They stay in
    /// the page cache, are found there when they are touched again, and until then the kernel may reclaim them: what is
    /// mapped counts as in use. Advice only: a refusal is ignored.
    ///
    /// # Safety
    /// [`source_of`](Self::source_of) found a file behind the range, and nobody wrote to it since.
    pub unsafe fn drop_pages(&self, addr: usize, len: usize) {
        let page = rustix::param::page_size();
        let (first, end) = (addr.next_multiple_of(page), (addr + len) / page * page);
        if first >= end {
            return;
        }
        let at = std::ptr::with_exposed_provenance_mut(first);
        // SAFETY: the pages are a file's, unmodified, as the caller promises: the same bytes come back.
        if let Err(error) = unsafe { mm::madvise(at, end - first, mm::Advice::LinuxDontNeed) } {
            tracing::debug!(%error, "mapped pages stay in the process's memory");
        }
    }

    /// The areas that `addr..end` lies in, where they are adjacent parts of one file. Never empty.
    fn areas_of(&self, addr: usize, end: usize) -> Option<&[Area]> {
        let first = self.areas.partition_point(|area| area.end <= addr);
        let count = self.areas[first..].iter().take_while(|area| area.start < end).count();
        let areas = &self.areas[first..first + count];
        let covered = areas.first()?.start <= addr && areas.last()?.end >= end;
        let joined = areas.windows(2).all(|pair| pair[0].continues_in(&pair[1]));
        (covered && joined && addr < end).then_some(areas)
    }

    /// Whether no page of the range was written to. Pages that are not present never were.
    fn is_unmodified(&self, start: usize, end: usize) -> bool {
        const ENTRY: usize = 8;
        const PRESENT: u64 = 1 << 63;
        const SWAPPED: u64 = 1 << 62;
        const OF_FILE: u64 = 1 << 61;

        let Some(pagemap) = &self.pagemap else { return false };
        let page = rustix::param::page_size();
        let (first, last) = (start / page, end.div_ceil(page));
        let mut buffer = vec![0_u8; (last - first).min(8192) * ENTRY];
        let mut at = first;
        while at < last {
            let part = &mut buffer[..(last - at).min(8192) * ENTRY];
            if pagemap.read_exact_at(part, (at * ENTRY) as u64).is_err() {
                return false;
            }
            let (entries, _) = part.as_chunks::<ENTRY>();
            let copied = |entry: u64| entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0;
            if entries.iter().any(|entry| copied(u64::from_ne_bytes(*entry))) {
                return false;
            }
            at += entries.len();
        }
        true
    }

    fn file_of(&self, area: &Area) -> Option<Arc<SourceFile>> {
        self.files.lock().entry(area.file).or_insert_with(|| area.open()).clone()
    }
}

/// A file as the memory map identifies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Private,
    SharedRead,
    SharedWrite,
}

/// A line of the memory map that has a file behind it.
#[derive(Debug)]
struct Area {
    start: usize,
    end: usize,
    access: Access,
    offset: u64,
    file: FileId,
    path: PathBuf,
}

impl Area {
    fn continues_in(&self, next: &Area) -> bool {
        let offset = self.offset + (self.end - self.start) as u64;
        self.end == next.start && self.file == next.file && offset == next.offset
    }

    /// The file at the area's path, if it is still the one that is mapped.
    fn open(&self) -> Option<Arc<SourceFile>> {
        let file = SourceFile::open(&self.path).ok()?;
        let by_stat = FileId {
            major: rustix::fs::major(file.dev()),
            minor: rustix::fs::minor(file.dev()),
            inode: file.inode(),
        };
        (by_stat == self.file || id_in_maps(&file)? == self.file).then_some(file)
    }
}

/// How the memory map identifies `file`. Layered file systems (overlayfs, btrfs) answer `stat` differently.
fn id_in_maps(file: &Arc<SourceFile>) -> Option<FileId> {
    let mapped = MappedFile::map(file).ok().filter(|mapped| !mapped.is_empty())?;
    let areas = read_maps().ok()?;
    areas.iter().find(|area| area.start == mapped.as_ptr().addr()).map(|area| area.file)
}

/// The areas that have a path, in the order of their addresses.
fn read_maps() -> Result<Vec<Area>> {
    let text = fs::read(MAPS)
        .map_err(|error| StoreError::ProcessMaps { path: PathBuf::from(MAPS), reason: error.into() })?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(parse_line).collect())
}

/// `7f00-7f10 r--p 00001000 fd:01 1234    /path`; `None` for an area that no file that can be opened is behind.
fn parse_line(line: &[u8]) -> Option<Area> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|&byte| byte == b' ')?;
        let (field, after) = rest.split_at(end);
        rest = after.trim_ascii_start();
        std::str::from_utf8(field).ok()
    };
    let (start, end) = field()?.split_once('-')?;
    let access = field()?.as_bytes();
    let offset = field()?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?;
    let path = path_of(rest)?;
    Some(Area {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
        access: match access {
            [_, b'w', _, b's'] => Access::SharedWrite,
            [_, _, _, b's'] => Access::SharedRead,
            _ => Access::Private,
        },
        offset: u64::from_str_radix(offset, 16).ok()?,
        file: FileId {
            major: u32::from_str_radix(major, 16).ok()?,
            minor: u32::from_str_radix(minor, 16).ok()?,
            inode: inode.parse().ok()?,
        },
        path,
    })
}

/// The path of a line, unless it is a name such as `[heap]` or that of a file which is gone.
fn path_of(text: &[u8]) -> Option<PathBuf> {
    if !text.starts_with(b"/") || text.ends_with(b" (deleted)") {
        return None;
    }
    // The kernel writes a line feed as \012, and nothing else so.
    let mut path = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        if let Some(after) = rest.strip_prefix(b"\\012") {
            path.push(b'\n');
            rest = after;
        } else {
            path.push(byte);
            rest = after;
        }
    }
    Some(PathBuf::from(OsString::from_vec(path)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{Access, id_in_maps, parse_line};
    use crate::file::SourceFile;

    #[test]
    fn a_line_of_the_memory_map_is_understood() {
        let line =
            b"7f00a000-7f00c000 r--p 00002000 fd:01 1234                       /a b/c\\012d.safetensors";
        let area = parse_line(line).unwrap();
        assert_eq!((area.start, area.end, area.offset), (0x7f00_a000, 0x7f00_c000, 0x2000));
        assert_eq!((area.file.major, area.file.minor, area.file.inode), (0xfd, 1, 1234));
        assert_eq!(area.access, Access::Private);
        assert_eq!(area.path, Path::new("/a b/c\nd.safetensors"));
    }

    #[test]
    fn a_file_is_known_by_its_identity_in_the_memory_map() {
        let folder = tempfile::tempdir().unwrap();
        let id_of = |name: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, name).unwrap();
            id_in_maps(&SourceFile::open(&path).unwrap()).unwrap()
        };
        assert_eq!(id_of("one"), id_of("one"));
        assert_ne!(id_of("one"), id_of("other"));
    }

    #[test]
    fn areas_without_a_file_are_left_out() {
        for line in [
            "7f00a000-7f00c000 rw-p 00000000 00:00 0 ",
            "7f00a000-7f00c000 rw-p 00000000 00:00 0                          [heap]",
            "7f00a000-7f00c000 rw-s 00000000 00:01 7                          /memfd:x (deleted)",
            "7f00a000-7f00c000 r--p 00000000 fd:01 7                          /gone.safetensors (deleted)",
            "not a line",
            "",
        ] {
            assert!(parse_line(line.as_bytes()).is_none(), "{line}");
        }
    }
}

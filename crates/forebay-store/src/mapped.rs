//! A file, or a part of one, mapped for reading.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use forebay_core::Bytes;
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use rustix::fs::Access;

use crate::error::{Result, StoreError};
use crate::file::SourceFile;

/// Pages that the kernel is asked about at once: 4 GiB of 4 KiB pages, in an answer of 1 MiB.
const ASKED: usize = 1 << 20;

/// A read-only, shared mapping of a file or of a part of it: its pages are the page cache's own, and nothing is copied.
/// Offsets are the file's.
///
/// Mapping reads nothing and takes the same time whatever the file's size. Touching bytes of a file that was
/// truncated meanwhile raises SIGBUS, so looking at them is `unsafe` here; addresses are free to take.
#[derive(Debug)]
pub struct MappedFile {
    file: Arc<SourceFile>,
    map: MmapRaw,
    /// Where in the file the mapping begins.
    start: u64,
}

impl MappedFile {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// [`StoreError::Changed`] where the file is no longer as it was opened, [`StoreError::Map`] where the
    /// operating system refuses.
    pub fn map(file: &Arc<SourceFile>) -> Result<MappedFile> {
        Self::map_part(file, 0, file.len())
    }

    /// Maps the memory pages that `len` bytes at `offset` lie on, as far as the file goes.
    ///
    /// # Errors
    /// As [`map`](Self::map); [`StoreError::OutOfRange`] for a part that the file does not have.
    pub fn map_part(file: &Arc<SourceFile>, offset: u64, len: Bytes) -> Result<MappedFile> {
        file.verify()?;
        check(file, 0, file.len(), offset, len)?;
        let page = rustix::param::page_size() as u64;
        let start = offset - offset % page;
        let end = (offset + len.get()).next_multiple_of(page).min(file.len().get());
        let options = MmapOptions::new().offset(start).len(Bytes::new(end - start).as_usize()).to_owned();
        match options.map_raw_read_only(&file.as_fd()) {
            Ok(map) => Ok(MappedFile { file: Arc::clone(file), map, start }),
            Err(error) => Err(map_error(file, offset, len, error)),
        }
    }

    /// The mapped file.
    pub fn file(&self) -> &Arc<SourceFile> {
        &self.file
    }

    /// Where the mapping's first byte is, at a memory page. Valid for [`len`](Self::len) bytes while `self` lives.
    pub fn as_ptr(&self) -> *const u8 {
        self.map.as_ptr()
    }

    /// The length of the mapping: up to the end of a memory page, or of the file when it was opened.
    pub fn len(&self) -> Bytes {
        Bytes::new(self.map.len() as u64)
    }

    /// Whether there is nothing in the mapping.
    pub fn is_empty(&self) -> bool {
        self.map.len() == 0
    }

    /// Where `len` bytes at `offset` are, checked to be inside the mapping.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`].
    pub fn ptr_at(&self, offset: u64, len: Bytes) -> Result<*const u8> {
        let at = check(&self.file, self.start, self.len(), offset, len)?;
        Ok(self.as_ptr().wrapping_add(at.as_usize()))
    }

    /// The `len` bytes at `offset`, checked to be inside the mapping.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`].
    ///
    /// # Safety
    /// While the slice lives nobody may change these bytes of the file, nor truncate it before their end.
    pub unsafe fn range(&self, offset: u64, len: Bytes) -> Result<&[u8]> {
        let start = self.ptr_at(offset, len)?;
        // SAFETY: `ptr_at` checked that the range is inside the mapping, which lives as long as `self`; the caller
        // vouches for the file.
        Ok(unsafe { std::slice::from_raw_parts(start, len.as_usize()) })
    }

    /// Brings a range into the page cache and into the page table, and returns when it is there.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`]; [`StoreError::Map`] where the file became shorter, its disk is unreadable, or
    /// the kernel is older than 5.14.
    pub fn populate(&self, offset: u64, len: Bytes) -> Result<()> {
        let at = check(&self.file, self.start, self.len(), offset, len)?;
        self.map
            .advise_range(Advice::PopulateRead, at.as_usize(), len.as_usize())
            .map_err(|error| map_error(&self.file, offset, len, error))
    }

    /// Takes the mapping's pages out of the process's memory. They stay in the page cache, and are found there when they are
    /// touched again.
    ///
    /// # Errors
    /// [`StoreError::Map`] where the kernel refuses, as for pages that a device was given.
    pub fn drop_pages(&self) -> Result<()> {
        // SAFETY: the mapping is shared and read-only, so a page that is touched again has the same bytes.
        unsafe { self.map.unchecked_advise(UncheckedAdvice::DontNeed) }
            .map_err(|error| map_error(&self.file, self.start, self.len(), error))
    }

    /// How much of the mapping is in the page cache, as far as the kernel tells: `None` where the file is neither this
    /// process's own nor writable by it, for which every page would count as cached. Reads nothing.
    ///
    /// # Errors
    /// [`StoreError::Map`] where the kernel cannot be asked.
    pub fn cached(&self) -> Result<Option<Bytes>> {
        if !self.may_ask() {
            return Ok(None);
        }
        let page = rustix::param::page_size();
        let len = self.len().as_usize();
        let mut cached = 0;
        let mut answer = Vec::new();
        for start in (0..len).step_by(ASKED * page) {
            let part = (len - start).min(ASKED * page);
            answer.resize(part.div_ceil(page), 0u8);
            let first = self.as_ptr().wrapping_add(start).cast_mut().cast();
            // SAFETY: the range lies in the mapping, which lives as long as `self` and starts at a page, as `start`
            // does; the answer has a byte for each of its pages.
            if unsafe { libc::mincore(first, part, answer.as_mut_ptr()) } != 0 {
                let error = io::Error::last_os_error();
                return Err(map_error(&self.file, start as u64, Bytes::new(part as u64), error));
            }
            let pages = answer.iter().filter(|entry| **entry & 1 == 1).count();
            // The last page may be a part of one.
            cached += (pages * page).min(part);
        }
        Ok(Some(Bytes::new(cached as u64)))
    }

    /// What the kernel itself asks before it tells.
    fn may_ask(&self) -> bool {
        let own = rustix::process::geteuid().as_raw();
        rustix::fs::fstat(&*self.file).is_ok_and(|stat| stat.st_uid == own)
            || rustix::fs::access(self.file.path(), Access::WRITE_OK).is_ok()
    }
}

/// Where `len` bytes at `offset` of the file lie in a part of it that has `bytes` bytes from `start` on.
fn check(file: &SourceFile, start: u64, bytes: Bytes, offset: u64, len: Bytes) -> Result<Bytes> {
    let at = offset
        .checked_sub(start)
        .filter(|at| at.checked_add(len.get()).is_some_and(|end| end <= bytes.get()));
    at.map(Bytes::new).ok_or_else(|| StoreError::OutOfRange {
        of: file.path().display().to_string(),
        offset,
        len: len.get(),
        bytes: start + bytes.get(),
    })
}

fn map_error(file: &SourceFile, offset: u64, len: Bytes, error: std::io::Error) -> StoreError {
    StoreError::Map { path: file.path().to_owned(), offset, len: len.get(), reason: error.into() }
}

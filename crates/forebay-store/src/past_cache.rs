//! Reading past the page cache, so that what is read once takes no place from what is read again and again.
//!
//! A file that is read in a circle and does not fit into the page cache is never found there: the kernel gives up what is
//! needed next. Whoever reads one part of it through the cache and the rest past it finds the one part every time.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;

use crate::error::Result;
use crate::file::{Advice, SourceFile};
use crate::source::{Source, SourceKind};

/// What offsets, lengths and addresses of direct reads are multiples of: enough for every disk with pages of 4 KiB.
const ALIGNMENT: usize = 4096;

/// Bytes read at once: disks reach their rate with less.
const PIECE: usize = 2 << 20;

/// Memory that direct reads go through, made at the first one.
#[derive(Default)]
pub struct DirectBuffer(Vec<u8>);

impl DirectBuffer {
    /// The aligned part.
    fn aligned(&mut self) -> &mut [u8] {
        if self.0.is_empty() {
            self.0 = vec![0; PIECE + 2 * ALIGNMENT];
        }
        let skip = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[skip..skip + PIECE + ALIGNMENT]
    }
}

impl Source {
    /// As [`read_at`](Source::read_at), but leaves nothing of what it reads in the page cache.
    ///
    /// # Errors
    /// As `read_at`.
    pub fn read_past_cache(&self, offset: u64, dst: &mut [u8], through: &mut DirectBuffer) -> Result<()> {
        match self.kind() {
            SourceKind::File { file, offset: start } => {
                self.check(offset, dst.len() as u64)?;
                file.read_past_cache(start.saturating_add(offset), dst, through)
            }
            SourceKind::Memory { .. } => self.read_at(offset, dst),
        }
    }
}

impl SourceFile {
    /// The same file, whatever has its name by now, opened once more for reads past the page cache (`O_DIRECT`), of whole
    /// memory pages into memory that starts at one.
    ///
    /// # Errors
    /// Where the file system refuses.
    pub fn open_direct(&self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed())
            .open(format!("/proc/self/fd/{}", self.as_fd().as_raw_fd()))
    }

    /// As [`read_exact_at`](SourceFile::read_exact_at), but leaves nothing of what it reads in the page cache. A range that
    /// is there already is taken from there, and given up. Where the file system has no direct reads the bytes go through
    /// the cache, and are given up as well.
    ///
    /// # Errors
    /// As `read_exact_at`.
    pub fn read_past_cache(&self, offset: u64, dst: &mut [u8], through: &mut DirectBuffer) -> Result<()> {
        let Some(len) = NonZeroU64::new(dst.len() as u64) else { return self.read_exact_at(offset, dst) };
        let cached = Cached::of(self.as_fd(), offset, len.get());
        let direct = self.direct().filter(|_| cached != Cached::All);
        let is_read =
            direct.is_some_and(|direct| read_direct(direct, offset, dst, through.aligned()).is_ok());
        if !is_read {
            // In the cache, truncated, or not to be read directly: the plain read finds out, with its own errors.
            self.read_exact_at(offset, dst)?;
        }
        if !is_read || cached != Cached::None {
            self.advise(offset, Some(len), Advice::DontNeed);
        }
        Ok(())
    }
}

/// How much of a range is in the page cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cached {
    None,
    Some,
    All,
}

impl Cached {
    /// `None` where the kernel does not tell: before Linux 6.5, and for files that are not the process's own. (A read that
    /// must not wait would not do: it starts to read from disk.)
    fn of(file: BorrowedFd<'_>, offset: u64, len: u64) -> Cached {
        let page = rustix::param::page_size() as u64;
        let pages = (offset + len - 1) / page - offset / page + 1;
        match cached_pages(file, offset, len) {
            0 => Cached::None,
            cached if cached < pages => Cached::Some,
            _ => Cached::All,
        }
    }
}

fn cached_pages(file: BorrowedFd<'_>, offset: u64, len: u64) -> u64 {
    /// `struct cachestat`: pages in the cache, dirty ones, those being written, those evicted, and evicted lately.
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        others: [u64; 4],
    }
    const CACHESTAT: libc::c_long = 451;
    let (range, mut counts) = ([offset, len], Counts::default());
    // SAFETY: the descriptor is open, and both structures are laid out as the kernel says and live through the call.
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), &raw mut counts, 0) };
    if result == 0 { counts.cached } else { 0 }
}

fn read_direct(file: &File, offset: u64, dst: &mut [u8], through: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < dst.len() {
        let from = offset + done as u64;
        let skip = (from % ALIGNMENT as u64) as usize;
        let wanted = (dst.len() - done).min(through.len() - skip);
        let got = read_aligned(
            file,
            from - skip as u64,
            &mut through[..(skip + wanted).next_multiple_of(ALIGNMENT)],
        )?;
        if got < skip + wanted {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        dst[done..done + wanted].copy_from_slice(&through[skip..skip + wanted]);
        done += wanted;
    }
    Ok(())
}

/// Fills the buffer, up to the end of the file.
fn read_aligned(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(read) => got += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        // Only the end of the file ends a direct read at an odd place.
        if !got.is_multiple_of(ALIGNMENT) {
            break;
        }
    }
    Ok(got)
}

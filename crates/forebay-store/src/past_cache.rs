//! Reading past the page cache, so that what is read once takes no place from what is read again and again.
//!
//! A file that is read in a circle and does not fit into the page cache is never found there: the kernel gives up what is
//! needed next. Whoever reads one part of it through the cache and the rest past it finds the one part every time.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSliceMut};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};

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
    /// As [`read_exact_at`](SourceFile::read_exact_at), but leaves nothing of what it reads in the page cache. What is
    /// there already is taken from there, and given up. Where the file system has no direct reads the bytes go through
    /// the cache, and are given up as well.
    ///
    /// # Errors
    /// As `read_exact_at`.
    pub fn read_past_cache(&self, offset: u64, dst: &mut [u8], through: &mut DirectBuffer) -> Result<()> {
        let cached = self.read_cached(offset, dst);
        self.give_up(offset, cached);
        let (offset, dst) = (offset + cached as u64, &mut dst[cached..]);
        if dst.is_empty() {
            return Ok(());
        }
        let read = self.direct().map(|direct| read_direct(direct, offset, dst, through.aligned()));
        match read {
            Some(Ok(())) => Ok(()),
            // Truncated, or not to be read directly: the plain read finds out, with its own errors.
            Some(Err(_)) | None => {
                self.read_exact_at(offset, dst)?;
                self.give_up(offset, dst.len());
                Ok(())
            }
        }
    }

    /// The bytes from `offset` on that are in the page cache; how many.
    fn read_cached(&self, offset: u64, dst: &mut [u8]) -> usize {
        let mut got = 0;
        while got < dst.len() {
            let mut rest = [IoSliceMut::new(&mut dst[got..])];
            match rustix::io::preadv2(self, &mut rest, offset + got as u64, ReadWriteFlags::NOWAIT) {
                Ok(0) => break,
                Ok(read) => got += read,
                Err(Errno::INTR) => {}
                // Not there, or the file system cannot tell.
                Err(_) => break,
            }
        }
        got
    }

    fn give_up(&self, offset: u64, len: usize) {
        if let Some(len) = NonZeroU64::new(len as u64) {
            self.advise(offset, Some(len), Advice::DontNeed);
        }
    }
}

/// The same file, whatever has its name by now, for direct reads. `None` where that is refused.
pub(crate) fn open_direct(file: &File) -> Option<File> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::DIRECT | OFlags::NONBLOCK).bits().cast_signed())
        .open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
    opened.inspect_err(|error| tracing::debug!(%error, "no direct reads")).ok()
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

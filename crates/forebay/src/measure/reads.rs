//! From the page cache, and from a disk past it.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forebay_core::Bytes;
use forebay_store::{SourceFile, StoreError};
use rustix::io::Errno;

use super::{DiskError, Rate};

/// What a thread reads at once, as readers do.
const CHUNK: Bytes = Bytes::mib(2);

/// No more of a file is read from its disk than this.
const PART: Bytes = Bytes::gib(1);

/// How long a disk is read from at most.
const DISK_LIMIT: Duration = Duration::from_secs(1);

/// How long what is cached is read again and again.
const CACHED_TIME: Duration = Duration::from_millis(500);

/// Buffers start at multiples of this, as reads past the page cache want it.
const ALIGNMENT: usize = 4096;

/// File systems that are memory: `TMPFS_MAGIC`, `RAMFS_MAGIC`. A read past the cache is one of the cache there.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// The rate at which `threads` threads read the file's beginning once it is in the page cache. What of it is not there
/// is read from disk first, up to 1 GiB or a second.
///
/// # Errors
/// What [`SourceFile::read_exact_at`] reports.
pub fn page_cache(file: &SourceFile, threads: usize) -> Result<Rate, StoreError> {
    let read = |offset, buffer: &mut [u8], len: usize| file.read_exact_at(offset, &mut buffer[..len]);
    let warm = Reads { part: file.len().min(PART), again: false, limit: DISK_LIMIT }.run(threads, read)?;
    Reads { part: warm.bytes, again: true, limit: CACHED_TIME }.run(threads, read)
}

/// The rate at which `threads` threads read the file's beginning from its disk, past the page cache: up to 1 GiB or a
/// second.
///
/// # Errors
/// [`DiskError::Unmeasurable`] where the file system is memory or refuses, and what reading reports.
pub fn disk(file: &SourceFile, threads: usize) -> Result<Rate, DiskError> {
    let unmeasurable = |reason: String| DiskError::Unmeasurable { path: file.path().to_owned(), reason };
    let system = rustix::fs::fstatfs(file.as_fd());
    if system.is_ok_and(|system| IN_MEMORY.contains(&(system.f_type as u64))) {
        return Err(unmeasurable("its file system is memory".to_owned()));
    }
    let refused = |error: io::Error| unmeasurable(format!("its file system refuses ({error})"));
    let direct = file.open_direct().map_err(refused)?;
    let read = |offset, buffer: &mut [u8], len| {
        read_direct(&direct, offset, buffer, len).map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::INVAL | Errno::OPNOTSUPP) => refused(error),
            _ => {
                let (path, len) = (file.path().to_owned(), len as u64);
                DiskError::Store(StoreError::Read { path, offset, len, reason: error.into() })
            }
        })
    };
    Reads { part: file.len().min(PART), again: false, limit: DISK_LIMIT }.run(threads, read)
}

/// Reads `len` bytes and up to the next multiple of the alignment where the file goes on: such reads have no other end
/// than the file's.
fn read_direct(file: &File, offset: u64, buffer: &mut [u8], len: usize) -> io::Result<()> {
    let end = len.next_multiple_of(ALIGNMENT);
    let mut got = 0;
    while got < len {
        match file.read_at(&mut buffer[got..end], offset + got as u64) {
            Ok(0) => {
                return Err(io::Error::new(ErrorKind::UnexpectedEof, "the file was truncated meanwhile"));
            }
            Ok(read) => got += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads of a file's beginning by several threads, chunk by chunk.
struct Reads {
    part: Bytes,
    /// From the start again after the end, for as long as it may.
    again: bool,
    limit: Duration,
}

impl Reads {
    /// `read` gets an offset, a buffer of a chunk, and how many bytes are wanted. All chunks before the last one that
    /// was read were read.
    fn run<E: Send>(
        &self,
        threads: usize,
        read: impl Fn(u64, &mut [u8], usize) -> Result<(), E> + Sync,
    ) -> Result<Rate, E> {
        let chunks = self.part.pages_of(CHUNK);
        let (next, bytes, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        let start = Instant::now();
        let work = || {
            let mut buffer = Buffer::new();
            while start.elapsed() < self.limit && !failed.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if chunks == 0 || number >= chunks && !self.again {
                    break;
                }
                let offset = CHUNK * (number % chunks);
                let len = (self.part - offset).min(CHUNK);
                read(offset.get(), buffer.chunk(), len.as_usize())
                    .inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
                bytes.fetch_add(len.get(), Ordering::Relaxed);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        Ok(Rate { bytes: Bytes::new(bytes.into_inner()), time: start.elapsed() })
    }
}

/// A chunk of memory that starts where reads past the page cache want it.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Buffer(vec![0; CHUNK.as_usize() + ALIGNMENT])
    }

    fn chunk(&mut self) -> &mut [u8] {
        let skip = self.0.as_ptr().addr().next_multiple_of(ALIGNMENT) - self.0.as_ptr().addr();
        &mut self.0[skip..skip + CHUNK.as_usize()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    fn file_in(folder: &Path, bytes: usize) -> Arc<SourceFile> {
        let path = folder.join("model");
        fs::write(&path, vec![1; bytes]).unwrap();
        SourceFile::open(path).unwrap()
    }

    #[test]
    fn files_of_any_length_are_read_to_their_end() {
        let folder = tempfile::tempdir().unwrap();
        for bytes in [0, 1, 4095, 5 << 20, (5 << 20) + 1] {
            let file = file_in(folder.path(), bytes);
            assert!(page_cache(&file, 3).unwrap().bytes.get() >= bytes as u64, "{bytes}");
            match disk(&file, 3) {
                Ok(rate) => assert_eq!(rate.bytes, Bytes::new(bytes as u64)),
                Err(error) => assert!(matches!(error, DiskError::Unmeasurable { .. }), "{error}"),
            }
        }
    }

    #[test]
    fn a_file_in_memory_has_no_disk() {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
        let file = file_in(folder.path(), 10);
        let error = disk(&file, 1).unwrap_err().to_string();
        assert!(
            error.ends_with("model cannot be read past the page cache: its file system is memory"),
            "{error}"
        );
    }

    #[test]
    fn a_file_cut_short_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = file_in(folder.path(), 5 << 20);
        File::options().write(true).open(file.path()).unwrap().set_len(100).unwrap();
        let named = file.path().display().to_string();
        assert!(page_cache(&file, 2).unwrap_err().to_string().contains(&named));
        assert!(disk(&file, 2).unwrap_err().to_string().contains(&named));
    }
}

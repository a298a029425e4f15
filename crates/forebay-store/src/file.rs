//! A file that weights are read from.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use forebay_core::Bytes;
use rustix::fs::OFlags;

use crate::error::{Result, StoreError};

/// An open file, and what it was like when it was opened.
///
/// The descriptor is kept for life, so a file that is deleted or replaced by a rename goes on being read from its
/// old inode. A file changed in place is an error: [`verify`](Self::verify) sees it, and a read past a new, nearer
/// end fails instead of raising a signal.
#[derive(Debug)]
pub struct SourceFile {
    file: File,
    path: PathBuf,
    opened: FileStamp,
    /// For reads past the page cache, opened at the first one.
    direct: OnceLock<Option<File>>,
}

impl SourceFile {
    /// Opens the file at `path` for reading. The descriptor is not inherited by child processes.
    ///
    /// # Errors
    /// [`StoreError::Open`], or [`StoreError::NotRegular`] for a directory, pipe or device.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<SourceFile>> {
        let path = path.as_ref();
        // Without NONBLOCK, opening a pipe waits for a writer; regular files do not heed it.
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|error| StoreError::Open { path: path.to_owned(), reason: error.into() })?;
        Self::from_open(file, path)
    }

    /// Takes over a file that is already open for reading; `path` is how messages name it.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_open(file: File, path: impl Into<PathBuf>) -> Result<Arc<SourceFile>> {
        let path = path.into();
        let metadata = match file.metadata() {
            Ok(metadata) => metadata,
            Err(error) => return Err(StoreError::Open { path, reason: error.into() }),
        };
        if !metadata.is_file() {
            return Err(StoreError::NotRegular { path, kind: kind_of(&metadata) });
        }
        Ok(Arc::new(SourceFile { file, path, opened: FileStamp::of(&metadata), direct: OnceLock::new() }))
    }

    /// The path the file was opened by. Another file may be there by now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The length when the file was opened.
    pub fn len(&self) -> Bytes {
        Bytes::new(self.opened.len)
    }

    /// Whether the file was empty when it was opened.
    pub fn is_empty(&self) -> bool {
        self.opened.len == 0
    }

    /// What it was like when it was opened. Files with equal stamps have equal contents.
    pub fn stamp(&self) -> FileStamp {
        self.opened
    }

    /// The device the file is on.
    pub fn dev(&self) -> u64 {
        self.opened.dev
    }

    /// The inode on that device. It stays this file's own for as long as the file is open.
    pub fn inode(&self) -> u64 {
        self.opened.inode
    }

    /// The modification time when the file was opened, in nanoseconds since the epoch.
    pub fn mtime_ns(&self) -> i128 {
        self.opened.mtime_ns
    }

    /// Fills `dst` with the bytes at `offset`, in as few system calls as the kernel allows.
    ///
    /// # Errors
    /// [`StoreError::Truncated`] where the file ends before the range does, [`StoreError::Read`] where the
    /// operating system cannot read it. `dst` then holds unspecified bytes.
    pub fn read_exact_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        let wanted = offset.saturating_add(dst.len() as u64);
        if wanted > i64::MAX.cast_unsigned() {
            return Err(self.truncated(wanted));
        }
        let mut at = offset;
        let mut rest = dst;
        while !rest.is_empty() {
            match self.file.read_at(rest, at) {
                Ok(0) => return Err(self.truncated(wanted)),
                Ok(read) => {
                    at += read as u64;
                    rest = &mut rest[read..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let len = rest.len() as u64;
                    return Err(StoreError::Read {
                        path: self.path.clone(),
                        offset: at,
                        len,
                        reason: error.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Asks whether the file has all of a range now: one `fstat`.
    ///
    /// # Errors
    /// [`StoreError::Truncated`] where the file ends before the range does.
    pub fn check_range(&self, offset: u64, len: Bytes) -> Result<()> {
        let wanted = offset.saturating_add(len.get());
        if wanted <= self.len_now() { Ok(()) } else { Err(self.truncated(wanted)) }
    }

    /// Writes all of `bytes` at `offset`. The file was opened for writing as well, and [`verify`](Self::verify) finds it
    /// changed from then on.
    ///
    /// # Errors
    /// [`StoreError::Write`], with a part of the bytes written.
    pub fn write_all_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| StoreError::Write {
            path: self.path.clone(),
            offset,
            len: bytes.len() as u64,
            reason: error.into(),
        })
    }

    /// Asks whether the file is still as it was when it was opened: one `fstat`.
    ///
    /// The time of the last status change is not compared: deleting or renaming the file moves it, and neither
    /// harms what is read.
    ///
    /// # Errors
    /// [`StoreError::Changed`] where its length or its modification time is another, [`StoreError::Read`] where
    /// it cannot be asked.
    pub fn verify(&self) -> Result<()> {
        let now = self.stamp_now().map_err(|error| StoreError::Read {
            path: self.path.clone(),
            offset: 0,
            len: 0,
            reason: error.into(),
        })?;
        let what = if now.len != self.opened.len {
            format!("size {} -> {}", self.opened.len, now.len)
        } else if now.mtime_ns != self.opened.mtime_ns {
            "modification time".to_owned()
        } else {
            return Ok(());
        };
        Err(StoreError::Changed { path: self.path.clone(), what })
    }

    /// Tells the kernel how a range will be used; `None` means up to the end. Advice only: a refusal is ignored.
    pub fn advise(&self, offset: u64, len: Option<NonZeroU64>, advice: Advice) {
        let advice = match advice {
            Advice::WillNeed => rustix::fs::Advice::WillNeed,
            Advice::Random => rustix::fs::Advice::Random,
            Advice::Normal => rustix::fs::Advice::Normal,
            Advice::DontNeed => rustix::fs::Advice::DontNeed,
        };
        if let Err(error) = rustix::fs::fadvise(&self.file, offset, len, advice) {
            tracing::debug!(path = %self.path.display(), offset, %error, "advice on a file was refused");
        }
    }

    pub(crate) fn direct(&self) -> Option<&File> {
        let open = || self.open_direct().inspect_err(|error| tracing::debug!(%error, "no direct reads")).ok();
        self.direct.get_or_init(open).as_ref()
    }

    fn truncated(&self, wanted: u64) -> StoreError {
        StoreError::Truncated { path: self.path.clone(), tensor: None, wanted, length: self.len_now() }
    }

    fn len_now(&self) -> u64 {
        self.stamp_now().map_or(self.opened.len, |now| now.len)
    }

    fn stamp_now(&self) -> io::Result<FileStamp> {
        self.file.metadata().map(|metadata| FileStamp::of(&metadata))
    }
}

impl AsFd for SourceFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// How a range of a file will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Soon: start reading it into the page cache now.
    WillNeed,
    /// Not in order: reading ahead of what is asked for is wasted.
    Random,
    /// As far as is known, like any other; undoes [`Random`](Advice::Random).
    Normal,
    /// Not soon: its place in the page cache may go to others.
    DontNeed,
}

/// What tells one state of a file from another, and from those of other files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileStamp {
    /// Bytes.
    pub len: u64,
    /// The modification time, in nanoseconds since the epoch.
    pub mtime_ns: i128,
    /// The device that the file is on.
    pub dev: u64,
    /// The inode on that device.
    pub inode: u64,
}

impl FileStamp {
    /// The file, in whatever state: its device and inode.
    pub fn file(self) -> (u64, u64) {
        (self.dev, self.inode)
    }

    fn of(metadata: &Metadata) -> FileStamp {
        let mtime_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        FileStamp { len: metadata.len(), mtime_ns, dev: metadata.dev(), inode: metadata.ino() }
    }
}

fn kind_of(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else {
        "of another kind"
    }
}

//! Where a weight's bytes come from.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use forebay_core::Bytes;

use crate::error::{Result, StoreError};
use crate::file::SourceFile;

/// A run of bytes to fill a weight from. Cloning shares the file or the memory.
///
/// ```
/// use forebay_store::Source;
/// let source = Source::memory(std::sync::Arc::new(vec![1, 2, 3, 4]));
/// let mut middle = [0; 2];
/// source.read_at(1, &mut middle)?;
/// assert_eq!(middle, [2, 3]);
/// # Ok::<(), forebay_store::StoreError>(())
/// ```
#[derive(Clone)]
pub struct Source {
    kind: SourceKind,
    bytes: Bytes,
}

/// What a [`Source`] reads from.
#[derive(Clone)]
pub enum SourceKind {
    /// A range of a file.
    File {
        /// The file.
        file: Arc<SourceFile>,
        /// Where in the file the source starts.
        offset: u64,
    },
    /// A range of CPU memory.
    Memory {
        /// The memory.
        memory: Arc<dyn Memory>,
        /// Where in the memory the source starts.
        offset: u64,
    },
}

impl Source {
    /// `bytes` bytes of `file` from `offset` on. Whether the file has them shows when they are read.
    pub fn file(file: &Arc<SourceFile>, offset: u64, bytes: Bytes) -> Source {
        Source { kind: SourceKind::File { file: Arc::clone(file), offset }, bytes }
    }

    /// All of `memory`.
    pub fn memory(memory: Arc<dyn Memory>) -> Source {
        let bytes = Bytes::new(memory.len() as u64);
        Source { kind: SourceKind::Memory { memory, offset: 0 }, bytes }
    }

    /// What the bytes are read from.
    pub fn kind(&self) -> &SourceKind {
        &self.kind
    }

    /// The number of bytes.
    pub fn len(&self) -> Bytes {
        self.bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == Bytes::ZERO
    }

    /// Whether the bytes come from a file.
    pub fn is_file(&self) -> bool {
        matches!(self.kind, SourceKind::File { .. })
    }

    /// Fills `dst` with the bytes from `offset` on.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`], or what [`SourceFile::read_exact_at`] returns.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.check(offset, dst.len() as u64)?;
        match &self.kind {
            SourceKind::File { file, offset: start } => file.read_exact_at(start.saturating_add(offset), dst),
            SourceKind::Memory { memory, offset: start } => {
                let from = memory.as_ptr().wrapping_add(Bytes::new(start + offset).as_usize());
                // SAFETY: `check` and `slice` keep the range inside the memory, whose bytes are readable and not
                // written to while it lives (`Memory`'s contract); `dst` is exclusive, so the two do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(from, dst.as_mut_ptr(), dst.len()) };
                Ok(())
            }
        }
    }

    /// The part of `len` bytes from `offset` on.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`].
    pub fn slice(&self, offset: u64, len: Bytes) -> Result<Source> {
        self.check(offset, len.get())?;
        let mut part = self.clone();
        part.bytes = len;
        match &mut part.kind {
            SourceKind::File { offset: start, .. } => *start = start.saturating_add(offset),
            SourceKind::Memory { offset: start, .. } => *start += offset,
        }
        Ok(part)
    }

    /// Asks whether the source is still what it was. Memory always is; a file as [`SourceFile::verify`] says.
    ///
    /// # Errors
    /// As [`SourceFile::verify`].
    pub fn verify(&self) -> Result<()> {
        match &self.kind {
            SourceKind::File { file, .. } => file.verify(),
            SourceKind::Memory { .. } => Ok(()),
        }
    }

    /// Whether both come from the same open file.
    pub fn shares_file_with(&self, other: &Source) -> bool {
        match (&self.kind, &other.kind) {
            (SourceKind::File { file, .. }, SourceKind::File { file: other, .. }) => Arc::ptr_eq(file, other),
            _ => false,
        }
    }

    /// Whether both are the same range of the same file, unchanged between the times at which the two were opened. Memory
    /// never is.
    pub fn has_bytes_of(&self, other: &Source) -> bool {
        match (&self.kind, &other.kind) {
            (
                SourceKind::File { file, offset },
                SourceKind::File { file: other_file, offset: other_offset },
            ) => file.stamp() == other_file.stamp() && offset == other_offset && self.bytes == other.bytes,
            _ => false,
        }
    }

    /// How messages name this source: `model.safetensors@1234`, or `CPU memory`.
    pub fn describe(&self) -> String {
        match &self.kind {
            SourceKind::File { file, offset } => format!("{}@{offset}", file.path().display()),
            SourceKind::Memory { .. } => "CPU memory".to_owned(),
        }
    }

    pub(crate) fn check(&self, offset: u64, len: u64) -> Result<()> {
        let bytes = self.bytes.get();
        if offset.checked_add(len).is_some_and(|end| end <= bytes) {
            return Ok(());
        }
        Err(StoreError::OutOfRange { of: self.describe(), offset, len, bytes })
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({}, {})", self.describe(), self.bytes)
    }
}

/// CPU memory that a source can read.
///
/// # Safety
/// From the moment an object is shared as a source until it is dropped, [`as_ptr`](Self::as_ptr) and
/// [`len`](Self::len) return the same values, the bytes they span are initialised and readable from any thread,
/// and nobody writes to them.
pub unsafe trait Memory: Send + Sync {
    /// The first byte.
    fn as_ptr(&self) -> *const u8;
    /// How many bytes there are.
    fn len(&self) -> usize;
    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: a vector behind a shared reference neither moves its elements nor lets them be written to.
unsafe impl Memory for Vec<u8> {
    fn as_ptr(&self) -> *const u8 {
        Vec::as_ptr(self)
    }

    fn len(&self) -> usize {
        Vec::len(self)
    }
}

// SAFETY: a boxed slice behind a shared reference neither moves its elements nor lets them be written to.
unsafe impl Memory for Box<[u8]> {
    fn as_ptr(&self) -> *const u8 {
        <[u8]>::as_ptr(self)
    }

    fn len(&self) -> usize {
        <[u8]>::len(self)
    }
}

/// Memory that someone else owns, and the owner that keeps it alive.
pub struct MemoryRange {
    start: *const u8,
    len: usize,
    _owner: Box<dyn Any + Send + Sync>,
}

impl MemoryRange {
    /// The `len` bytes at `start`; `owner` is dropped with the range.
    ///
    /// # Safety
    /// Until `owner` is dropped the bytes are initialised, readable from any thread, and not written to.
    pub unsafe fn new(start: *const u8, len: usize, owner: impl Any + Send + Sync) -> MemoryRange {
        MemoryRange { start, len, _owner: Box::new(owner) }
    }
}

// SAFETY: the caller of `new` vouches that the bytes are readable from any thread while the owner lives.
unsafe impl Send for MemoryRange {}
// SAFETY: as for `Send`; nothing is mutable through a shared reference.
unsafe impl Sync for MemoryRange {}

// SAFETY: start and length never change, and the caller of `new` vouches for the bytes while the owner lives.
unsafe impl Memory for MemoryRange {
    fn as_ptr(&self) -> *const u8 {
        self.start
    }

    fn len(&self) -> usize {
        self.len
    }
}

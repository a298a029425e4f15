//! What can go wrong with a source, in words for the person who owns the file.

use std::path::PathBuf;
use std::{fmt, io};

use forebay_core::Bytes;

/// The result of working with sources.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;

/// Why a source could not be opened, understood or read.
///
/// Each variant names the file and, where there is one, the tensor, and ends with the value that was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A file could not be opened.
    #[error("cannot open {}: {reason}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        reason: IoReason,
    },

    /// Something other than a regular file was given where weights are read.
    #[error("weights are read from regular files, and {} is {kind}", path.display())]
    NotRegular {
        /// What was given.
        path: PathBuf,
        /// What it is, for example `a directory`.
        kind: &'static str,
    },

    /// The file is not a safetensors file at all.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    NotSafetensors {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        reason: String,
    },

    /// The header as a whole could not be understood.
    #[error("the header of {} cannot be read; copy or download the file again: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The header describes a tensor that cannot be.
    #[error("the header of {} describes tensor `{tensor}` in a way that cannot be: {reason}", path.display())]
    InvalidTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A tensor's element type is not one that is known here.
    #[error(
        "tensor `{tensor}` in {} has an element type this version does not know; a newer version may: {dtype}",
        path.display()
    )]
    UnknownDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type, as the file spells it.
        dtype: String,
    },

    /// The same tensor is given twice, so which one is meant cannot be known.
    #[error("{} gives the same tensor twice: `{tensor}`", path.display())]
    DuplicateTensor {
        /// The file whose entry is the second one.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },

    /// The file ends before something it should hold.
    #[error(
        "{} ends too early; copy or download it again: {} up to byte {wanted}, the file has {length}",
        path.display(),
        tensor.as_ref().map_or_else(|| "the read goes".to_owned(), |tensor| format!("tensor `{tensor}` goes"))
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The first tensor that does not fit, where it is known.
        tensor: Option<String>,
        /// The offset in the file that had to be there, exclusive.
        wanted: u64,
        /// The file's length in bytes.
        length: u64,
    },

    /// The file was changed in place after it was opened.
    #[error("{} changed while it was in use; load the model again: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What changed, for example `size 10 -> 5` or `modification time`.
        what: String,
    },

    /// A range of the file could not be read.
    #[error("cannot read {len} bytes at offset {offset} of {}: {reason}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Where the part that failed starts.
        offset: u64,
        /// How many bytes were still wanted.
        len: u64,
        /// What the operating system said.
        reason: IoReason,
    },

    /// The operating system could not write a part of a file.
    #[error("cannot write {len} bytes at offset {offset} of {}: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Where the part starts.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// What the operating system said.
        reason: IoReason,
    },

    /// A file could not be mapped, or its mapping not populated.
    #[error("cannot map {len} bytes at offset {offset} of {}: {reason}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Where the range starts.
        offset: u64,
        /// The range's length in bytes.
        len: u64,
        /// What the operating system said.
        reason: IoReason,
    },

    /// An index of shards could not be understood.
    #[error("the index {} cannot be read: {reason}", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// An index names a shard that is not there.
    #[error(
        "{} puts tensor `{tensor}` in a file that is not beside it; download the missing file: {shard}",
        index.display()
    )]
    MissingShard {
        /// The index.
        index: PathBuf,
        /// The file it names.
        shard: String,
        /// The first tensor that needs it.
        tensor: String,
    },

    /// An index says that a tensor is in a shard, and it is not.
    #[error(
        "{} puts tensor `{tensor}` in a file that does not hold it; index and shards may be of different \
         downloads: {shard}",
        index.display()
    )]
    MissingTensor {
        /// The index.
        index: PathBuf,
        /// The file it names.
        shard: String,
        /// The tensor.
        tensor: String,
    },

    /// An index names a shard outside its own folder.
    #[error(
        "{} puts tensor `{tensor}` in a file outside its own folder, which is not followed: {shard}",
        index.display()
    )]
    ShardOutside {
        /// The index.
        index: PathBuf,
        /// The name that leaves the folder.
        shard: String,
        /// The first tensor that needs it.
        tensor: String,
    },

    /// A folder holds no safetensors file.
    #[error("no `*.safetensors` or `*.safetensors.index.json` in the folder {}", path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
    },

    /// A folder holds several checkpoints, so which one is meant cannot be known.
    #[error("{} holds several checkpoints; name one of them: {}", path.display(), candidates.join(", "))]
    Ambiguous {
        /// The folder.
        path: PathBuf,
        /// File names, sorted.
        candidates: Vec<String>,
    },

    /// A range that is not inside its source was asked for.
    #[error("{len} bytes at offset {offset} were wanted from {of}, which has {bytes} bytes")]
    OutOfRange {
        /// The source, as [`Source::describe`](crate::Source::describe) names it.
        of: String,
        /// Where the range starts.
        offset: u64,
        /// The range's length in bytes.
        len: u64,
        /// The source's length in bytes.
        bytes: u64,
    },

    /// A row that the table does not have was asked for.
    #[error("row {row} was wanted from the table in {of}, whose number of rows is {rows}")]
    NoSuchRow {
        /// The source, as [`Source::describe`](crate::Source::describe) names it.
        of: String,
        /// The row.
        row: u64,
        /// How many rows there are.
        rows: u64,
    },

    /// A source is not a whole number of rows long.
    #[error("the table in {of} is not a whole number of rows of {row_bytes} bytes: {bytes} bytes")]
    RowSize {
        /// The source, as [`Source::describe`](crate::Source::describe) names it.
        of: String,
        /// The length of one row.
        row_bytes: u64,
        /// The source's length in bytes.
        bytes: u64,
    },

    /// The caller's buffer does not have the size of what goes into it.
    #[error("what was wanted from {of} takes {wanted} bytes; the buffer has {len} bytes")]
    BufferSize {
        /// The source, as [`Source::describe`](crate::Source::describe) names it.
        of: String,
        /// The size the buffer must have.
        wanted: Bytes,
        /// The size it has.
        len: Bytes,
    },

    /// The process's own memory map could not be read.
    #[error("cannot read {}, so the files behind mapped tensors stay unknown: {reason}", path.display())]
    ProcessMaps {
        /// The file of the proc file system.
        path: PathBuf,
        /// What the operating system said.
        reason: IoReason,
    },

    /// A thread of a reader pool could not be started.
    #[error("cannot start reader thread {thread}: {reason}")]
    ReaderThread {
        /// The thread's name.
        thread: String,
        /// What the operating system, or the panic of the thread's set-up, said.
        reason: String,
    },
}

/// What the operating system said: an [`io::Error`] that can be cloned and compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoReason {
    /// The kind of error.
    pub kind: io::ErrorKind,
    /// Its message.
    pub text: String,
}

impl From<io::Error> for IoReason {
    fn from(error: io::Error) -> Self {
        IoReason { kind: error.kind(), text: error.to_string() }
    }
}

impl fmt::Display for IoReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

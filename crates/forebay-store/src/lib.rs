//! Sources of weights: where a weight's bytes come from, and how they are read.
//!
//! This crate opens checkpoints, finds the file behind memory that is already mapped, and reads ranges with
//! every length checked. It knows nothing of devices, pages or residency.
//!
//! Invariants:
//! * A file is read through the descriptor it was opened with. Deleting it, or renaming another over it, changes
//!   nothing; truncating or overwriting it in place is an error, never wrong bytes passed on in silence where
//!   [`SourceFile::verify`] is asked, and never a signal where bytes are read.
//! * Nothing is allocated on the word of a file before that word is checked against the file's real length.
//! * Weights are read-only: no mapping is writable and no file is opened for writing.
//!
//! ```
//! # fn main() -> forebay_store::Result<()> {
//! # let dir = tempfile::tempdir().expect("a temporary folder");
//! # let path = dir.path().join("model.safetensors");
//! # let header = br#"{"w":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}   "#;
//! # let mut file = (header.len() as u64).to_le_bytes().to_vec();
//! # file.extend_from_slice(header);
//! # file.extend_from_slice(b"abc");
//! # std::fs::write(&path, file).expect("a file");
//! use forebay_store::Checkpoint;
//!
//! let checkpoint = Checkpoint::open(&path)?;
//! let weight = checkpoint.get("w").expect("the file has a tensor `w`");
//! let mut bytes = [0; 3];
//! weight.source().read_at(0, &mut bytes)?;
//! assert_eq!(&bytes, b"abc");
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod diagnose;
mod dtype;
mod error;
mod file;
mod mapped;
mod ordered;
mod past_cache;
mod provenance;
mod readers;
mod rows;
mod safetensors;
mod segments;
mod source;

pub use checkpoint::Checkpoint;
pub use dtype::{Dtype, UnknownDtypeName};
pub use error::{IoReason, Result, StoreError};
pub use file::{Advice, FileStamp, SourceFile};
pub use mapped::MappedFile;
pub use past_cache::DirectBuffer;
pub use provenance::{ProcessMaps, mapped_source};
pub use readers::{ReaderPool, Urgency};
pub use rows::read_rows;
pub use safetensors::{TensorEntry, ranges_as_used};
pub use segments::{Segment, read_segments, read_segments_past_cache};
pub use source::{Memory, MemoryRange, Source, SourceKind};

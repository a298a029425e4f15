//! One safetensors file: its header, read and checked, as a list of tensors.
//!
//! The format is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. The
//! `safetensors` crate validates the header; this module checks it against the real file and names the tensor at
//! fault.

use std::collections::BTreeMap;
use std::sync::Arc;

use forebay_core::Bytes;
use safetensors::tensor::Metadata;
use serde::de::IgnoredAny;

use crate::diagnose::first_fault;
use crate::dtype::Dtype;
use crate::error::{Result, StoreError};
use crate::file::SourceFile;
use crate::ordered::Ordered;
use crate::source::Source;

/// The longest header, and the longest index, that is read: the format's own limit.
pub(crate) const MAX_HEADER: Bytes = Bytes::new(100_000_000);

/// The key under which a header keeps free text, beside the tensors.
pub(crate) const METADATA_KEY: &str = "__metadata__";

/// Bytes of the length before the header.
const LENGTH_BYTES: u64 = 8;

/// How a file starts that stands for one kept elsewhere by Git LFS.
const LFS_POINTER: &[u8; 8] = b"version ";

/// A tensor of a checkpoint, and where its bytes are.
#[derive(Clone, Debug)]
pub struct TensorEntry {
    /// Its name in the checkpoint.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its dimensions, slowest first; none for a scalar.
    pub shape: Vec<u64>,
    /// The file that holds it.
    pub file: Arc<SourceFile>,
    /// Where in the file it starts.
    pub offset: u64,
    /// Its size.
    pub bytes: Bytes,
}

impl TensorEntry {
    /// The tensor's bytes as a source.
    pub fn source(&self) -> Source {
        Source::file(&self.file, self.offset, self.bytes)
    }
}

/// What a header says, checked.
#[derive(Debug)]
pub(crate) struct Header {
    /// Tensors in the order of their bytes.
    pub(crate) tensors: Vec<TensorEntry>,
    /// The free text.
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of `file`: afterwards every tensor's bytes are inside the file, side by side.
pub(crate) fn read_header(file: &Arc<SourceFile>) -> Result<Header> {
    let (text, data_start) = header_text(file)?;
    let metadata = parse(file, &text)?;
    let mut tensors = entries(file, &metadata, data_start)?;
    tensors.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    check_length(file, &tensors, data_start)?;
    let metadata = metadata.metadata().clone().unwrap_or_default().into_iter().collect();
    Ok(Header { tensors, metadata })
}

/// Where the tensors of an open safetensors file are, in the order in which a model probably uses them: offsets and lengths.
///
/// That is the order of their bytes, unless they are sorted by name, as safetensors' own writer sorts those of each dtype:
/// then it is that of the names with their numbers taken as numbers, so that block 2 comes before block 10.
///
/// # Errors
/// [`StoreError::NotSafetensors`] for another file, and others as for [`Checkpoint::open`](crate::Checkpoint::open).
pub fn ranges_as_used(file: &Arc<SourceFile>) -> Result<Vec<(u64, Bytes)>> {
    let mut tensors = read_header(file)?.tensors;
    if tensors.windows(2).all(|pair| pair[0].dtype != pair[1].dtype || pair[0].name < pair[1].name) {
        tensors.sort_by(|one, other| parts_of(&one.name).cmp(parts_of(&other.name)));
    }
    Ok(tensors.iter().map(|tensor| (tensor.offset, tensor.bytes)).collect())
}

/// A part of a tensor's name.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum NamePart<'a> {
    Number(u64),
    Text(&'a str),
}

fn parts_of(name: &str) -> impl Iterator<Item = NamePart<'_>> {
    name.split('.').map(|part| part.parse().map_or(NamePart::Text(part), NamePart::Number))
}

/// The header's text, and where the tensors' bytes start.
fn header_text(file: &SourceFile) -> Result<(String, u64)> {
    let not_safetensors =
        |reason: String| StoreError::NotSafetensors { path: file.path().to_owned(), reason };
    let length = file.len().get();
    if length < LENGTH_BYTES {
        return Err(not_safetensors(format!("it starts with {LENGTH_BYTES} bytes, and this has {length}")));
    }
    let mut start = [0; LENGTH_BYTES as usize];
    file.read_exact_at(0, &mut start)?;
    if &start == LFS_POINTER {
        return Err(not_safetensors(
            "it is a Git LFS pointer; fetch the file itself with `git lfs pull`".into(),
        ));
    }
    let header = u64::from_le_bytes(start);
    if header > MAX_HEADER.get() {
        return Err(not_safetensors(format!(
            "its first bytes announce a header of {header} bytes, and the limit is {}",
            MAX_HEADER.get()
        )));
    }
    let data_start = LENGTH_BYTES + header;
    if data_start > length {
        return Err(StoreError::Truncated {
            path: file.path().to_owned(),
            tensor: None,
            wanted: data_start,
            length,
        });
    }
    let mut bytes = vec![0; Bytes::new(header).as_usize()];
    file.read_exact_at(LENGTH_BYTES, &mut bytes)?;
    match String::from_utf8(bytes) {
        Ok(text) => Ok((text, data_start)),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            Err(header_error(file, format!("it is not UTF-8 from its byte {valid} on")))
        }
    }
}

fn parse(file: &SourceFile, text: &str) -> Result<Metadata> {
    let names: Ordered<IgnoredAny> =
        serde_json::from_str(text).map_err(|error| header_error(file, format!("it is not JSON: {error}")))?;
    if let Some(tensor) = names.duplicate() {
        return Err(StoreError::DuplicateTensor { path: file.path().to_owned(), tensor: tensor.to_owned() });
    }
    serde_json::from_str(text).map_err(|error| {
        first_fault(file.path(), text).unwrap_or_else(|| header_error(file, error.to_string()))
    })
}

fn entries(file: &Arc<SourceFile>, metadata: &Metadata, data_start: u64) -> Result<Vec<TensorEntry>> {
    let entry = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let dtype = info.dtype.to_string().parse::<Dtype>();
        let dtype = match dtype {
            Ok(dtype) => dtype,
            Err(unknown) => {
                let path = file.path().to_owned();
                return Err(StoreError::UnknownDtype { path, tensor: name, dtype: unknown.0 });
            }
        };
        let (begin, end) = info.data_offsets;
        let Some(offset) = data_start.checked_add(begin as u64) else {
            return Err(truncated(file, name, u64::MAX));
        };
        Ok(TensorEntry {
            name,
            dtype,
            shape: info.shape.iter().map(|&dim| dim as u64).collect(),
            file: Arc::clone(file),
            offset,
            bytes: Bytes::new((end - begin) as u64),
        })
    };
    metadata.tensors().into_iter().map(entry).collect()
}

/// Checks that the file ends where its last tensor does.
fn check_length(file: &SourceFile, tensors: &[TensorEntry], data_start: u64) -> Result<()> {
    let length = file.len().get();
    let mut end = data_start;
    for tensor in tensors {
        end = tensor.offset.saturating_add(tensor.bytes.get());
        if end > length {
            return Err(truncated(file, tensor.name.clone(), end));
        }
    }
    if end < length {
        let extra = length - end;
        return Err(header_error(file, format!("the bytes that belong to no tensor number {extra}")));
    }
    Ok(())
}

fn truncated(file: &SourceFile, tensor: String, wanted: u64) -> StoreError {
    let (path, length) = (file.path().to_owned(), file.len().get());
    StoreError::Truncated { path, tensor: Some(tensor), wanted, length }
}

fn header_error(file: &SourceFile, reason: String) -> StoreError {
    StoreError::Header { path: file.path().to_owned(), reason }
}

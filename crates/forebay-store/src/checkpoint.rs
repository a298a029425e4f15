//! A checkpoint: the tensors of one safetensors file, or of the shards that an index names.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use forebay_core::Bytes;

use crate::error::{Result, StoreError};
use crate::file::SourceFile;
use crate::ordered::Ordered;
use crate::safetensors::{Header, MAX_HEADER, TensorEntry, read_header};

const FILE_SUFFIX: &str = ".safetensors";
const INDEX_SUFFIX: &str = ".safetensors.index.json";

/// The tensors of a model on disk. Opening reads headers only.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Arc<SourceFile>>,
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an `*.safetensors.index.json`, or a folder that holds one or the other.
    ///
    /// In a folder an index goes before files. Shards are opened in the order in which the index first names
    /// them; a shard's tensor that the index puts in another shard is left out.
    ///
    /// # Errors
    /// Any of [`StoreError`]'s variants about files, headers and indexes: see each.
    pub fn open(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        if path.is_dir() {
            return Self::open(find_in_folder(path)?);
        }
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::open_index(path);
        }
        let mut checkpoint = Self::empty(path);
        checkpoint.add(&SourceFile::open(path)?, |_| true)?;
        Ok(checkpoint)
    }

    /// The file or index that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in the order of their bytes: file by file, offset by offset.
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorEntry> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The size of all tensors together.
    pub fn total_bytes(&self) -> Bytes {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The files, in the order of the tensors.
    pub fn files(&self) -> &[Arc<SourceFile>] {
        &self.files
    }

    /// The free text of the files' headers. Where shards differ, the first one's.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Asks whether every file is still as it was when it was opened.
    ///
    /// # Errors
    /// As [`SourceFile::verify`].
    pub fn verify(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.verify())
    }

    fn empty(path: &Path) -> Checkpoint {
        Checkpoint {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            metadata: BTreeMap::new(),
        }
    }

    fn open_index(path: &Path) -> Result<Checkpoint> {
        let weight_map = read_index(path)?;
        let shard_of: HashMap<&str, &str> =
            weight_map.iter().map(|(tensor, shard)| (tensor.as_str(), shard.as_str())).collect();
        let mut checkpoint = Self::empty(path);
        let mut opened = HashSet::new();
        for (tensor, shard) in &weight_map {
            if opened.insert(shard) {
                let file = open_shard(path, shard, tensor)?;
                checkpoint.add(&file, |name| shard_of.get(name).is_none_or(|listed| listed == shard))?;
            }
        }
        let absent = weight_map.iter().find(|(tensor, _)| checkpoint.get(tensor).is_none());
        if let Some((tensor, shard)) = absent {
            let (shard, tensor) = (shard.clone(), tensor.clone());
            return Err(StoreError::MissingTensor { index: path.to_owned(), shard, tensor });
        }
        Ok(checkpoint)
    }

    /// Adds those tensors of `file` whose name `belongs`.
    fn add(&mut self, file: &Arc<SourceFile>, belongs: impl Fn(&str) -> bool) -> Result<()> {
        let Header { tensors, metadata } = read_header(file)?;
        for tensor in tensors.into_iter().filter(|tensor| belongs(&tensor.name)) {
            if self.by_name.insert(tensor.name.clone(), self.tensors.len()).is_some() {
                return Err(StoreError::DuplicateTensor {
                    path: file.path().to_owned(),
                    tensor: tensor.name,
                });
            }
            self.tensors.push(tensor);
        }
        for (key, value) in metadata {
            self.metadata.entry(key).or_insert(value);
        }
        self.files.push(Arc::clone(file));
        Ok(())
    }
}

/// The index, or else the one file, that `folder` holds.
fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let unreadable =
        |error| StoreError::Open { path: folder.to_owned(), reason: std::io::Error::into(error) };
    let (mut indexes, mut files) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            continue;
        }
        if name.ends_with(INDEX_SUFFIX) {
            indexes.push(entry.file_name());
        } else if name.ends_with(FILE_SUFFIX) {
            files.push(entry.file_name());
        }
    }
    let mut candidates = if indexes.is_empty() { files } else { indexes };
    candidates.sort();
    match candidates.as_slice() {
        [] => Err(StoreError::NoCheckpoint { path: folder.to_owned() }),
        [one] => Ok(folder.join(one)),
        several => {
            let candidates = several.iter().map(|name| name.to_string_lossy().into_owned()).collect();
            Err(StoreError::Ambiguous { path: folder.to_owned(), candidates })
        }
    }
}

/// The part of an index that matters here.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: Ordered<String>,
}

/// Tensor and shard, in the order of the document.
fn read_index(path: &Path) -> Result<Vec<(String, String)>> {
    let fault = |reason: String| StoreError::Index { path: path.to_owned(), reason };
    let file = SourceFile::open(path)?;
    if file.len() > MAX_HEADER {
        return Err(fault(format!("its limit is {MAX_HEADER}, and it has {}", file.len())));
    }
    let mut text = vec![0; file.len().as_usize()];
    file.read_exact_at(0, &mut text)?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| fault(error.to_string()))?;
    if let Some(tensor) = index.weight_map.duplicate() {
        return Err(StoreError::DuplicateTensor { path: path.to_owned(), tensor: tensor.to_owned() });
    }
    let Ordered(weight_map) = index.weight_map;
    if weight_map.is_empty() {
        return Err(fault("its `weight_map` names no tensor".to_owned()));
    }
    Ok(weight_map)
}

fn open_shard(index: &Path, shard: &str, tensor: &str) -> Result<Arc<SourceFile>> {
    let relative = Path::new(shard);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
    if shard.is_empty() || !inside {
        let (shard, tensor) = (shard.to_owned(), tensor.to_owned());
        return Err(StoreError::ShardOutside { index: index.to_owned(), shard, tensor });
    }
    let folder = index.parent().unwrap_or(Path::new(""));
    SourceFile::open(folder.join(relative)).map_err(|error| match error {
        StoreError::Open { reason, .. } if reason.kind == std::io::ErrorKind::NotFound => {
            let (shard, tensor) = (shard.to_owned(), tensor.to_owned());
            StoreError::MissingShard { index: index.to_owned(), shard, tensor }
        }
        other => other,
    })
}

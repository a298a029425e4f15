//! What unit tests share.

use std::io::Write;
use std::sync::Arc;

use forebay_core::Bytes;
use forebay_store::{Source, SourceFile};

use crate::{Attachment, Engine, LayoutOptions, WeightKind, WeightSpec};

/// A model of some weights of a page each, all of them the same bytes of a file.
pub(crate) fn attach_pages(
    engine: &Arc<Engine>,
    page: Bytes,
    count: usize,
) -> Result<Attachment, Box<dyn std::error::Error>> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&vec![7; page.as_usize()])?;
    let source = Source::file(&SourceFile::open(file.path())?, 0, page);
    let weight = |n| WeightSpec { name: format!("w{n}"), source: source.clone(), kind: WeightKind::Whole };
    let options = LayoutOptions { page_size: Some(page), ..LayoutOptions::default() };
    Ok(engine.attach("model", (0..count).map(weight).collect(), options)?)
}

/// A safetensors file of bytes.
pub(crate) fn tensor_file(contents: &[Vec<u8>]) -> std::io::Result<tempfile::NamedTempFile> {
    let mut end = 0;
    let entries = contents.iter().enumerate().map(|(number, bytes)| {
        let (begin, len) = (end, bytes.len());
        end += len;
        format!(r#""{number:05}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{begin},{end}]}}"#)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    contents.iter().try_for_each(|bytes| file.write_all(bytes))?;
    Ok(file)
}

//! The pieces a page is filled from, read one window at a time.

use crate::error::{Result, StoreError};
use crate::past_cache::DirectBuffer;
use crate::source::Source;

/// A piece of a page: `len` bytes of `source` that belong at `dst_offset` of the page.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Where the bytes come from.
    pub source: Source,
    /// Where in the source they start.
    pub source_offset: u64,
    /// Where in the page they go.
    pub dst_offset: u64,
    /// How many bytes there are.
    pub len: u64,
}

/// Fills `dst`, the window of a page that starts at `dst_base`, from those parts of `segments` that fall in it.
///
/// Segments may come in any order. Bytes of the window that belong to no segment, such as padding between weights,
/// stay as they are. So pages can be filled by several readers, a window each.
///
/// # Errors
/// What [`Source::read_at`] returns. [`StoreError::OutOfRange`] also where a segment reaches past the end of the
/// number range.
pub fn read_segments(segments: &[Segment], dst_base: u64, dst: &mut [u8]) -> Result<()> {
    each_part(segments, dst_base, dst, |source, from, part| source.read_at(from, part))
}

/// As [`read_segments`], but leaves nothing of what it reads in the page cache.
///
/// # Errors
/// As `read_segments`.
pub fn read_segments_past_cache(
    segments: &[Segment],
    dst_base: u64,
    dst: &mut [u8],
    through: &mut DirectBuffer,
) -> Result<()> {
    each_part(segments, dst_base, dst, |source, from, part| source.read_past_cache(from, part, through))
}

/// Has every part of the window read that belongs to a segment.
fn each_part(
    segments: &[Segment],
    dst_base: u64,
    dst: &mut [u8],
    mut read: impl FnMut(&Source, u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let window_end = dst_base.saturating_add(dst.len() as u64);
    for segment in segments {
        let segment_end = segment.dst_offset.checked_add(segment.len).ok_or_else(|| past_all(segment))?;
        let start = segment.dst_offset.max(dst_base);
        let end = segment_end.min(window_end);
        if start >= end {
            continue;
        }
        let skipped = start - segment.dst_offset;
        let from = segment.source_offset.checked_add(skipped).ok_or_else(|| past_all(segment))?;
        // Both are at most `dst.len()`, so they fit.
        let window = (start - dst_base) as usize..(end - dst_base) as usize;
        read(&segment.source, from, &mut dst[window])?;
    }
    Ok(())
}

fn past_all(segment: &Segment) -> StoreError {
    StoreError::OutOfRange {
        of: segment.source.describe(),
        offset: segment.source_offset,
        len: segment.len,
        bytes: segment.source.len().get(),
    }
}

//! Looking rows of a table up at its source, as an embedding does.

use forebay_core::Bytes;

use crate::error::{Result, StoreError};
use crate::source::Source;

/// Reads the given `rows` of the table in `source`, each `row_bytes` long, into `out`, one after another.
///
/// Rows may come in any order and more than once; a run of consecutive rows is one read. Nothing is read unless
/// every row exists.
///
/// # Errors
/// [`StoreError::RowSize`] where the source is not a whole number of rows, [`StoreError::BufferSize`] where `out`
/// is not exactly as long as the rows, [`StoreError::NoSuchRow`], or what [`Source::read_at`] returns.
pub fn read_rows(source: &Source, row_bytes: u64, rows: &[u64], out: &mut [u8]) -> Result<()> {
    let row = check(source, row_bytes, rows, out.len())?;
    let mut rest = out;
    for run in rows.chunk_by(|&before, &after| before + 1 == after) {
        let (here, after) = rest.split_at_mut(run.len() * row);
        source.read_at(run[0] * row_bytes, here)?;
        rest = after;
    }
    Ok(())
}

/// Checks all that can be checked without reading; returns the length of a row.
fn check(source: &Source, row_bytes: u64, rows: &[u64], out_len: usize) -> Result<usize> {
    let bytes = source.len().get();
    if row_bytes == 0 || !bytes.is_multiple_of(row_bytes) {
        return Err(StoreError::RowSize { of: source.describe(), row_bytes, bytes });
    }
    let table_rows = bytes / row_bytes;
    if let Some(&row) = rows.iter().find(|&&row| row >= table_rows) {
        return Err(StoreError::NoSuchRow { of: source.describe(), row, rows: table_rows });
    }
    let wanted = row_bytes.saturating_mul(rows.len() as u64);
    if wanted != out_len as u64 {
        let (wanted, len) = (Bytes::new(wanted), Bytes::new(out_len as u64));
        return Err(StoreError::BufferSize { of: source.describe(), wanted, len });
    }
    Ok(Bytes::new(row_bytes).as_usize())
}

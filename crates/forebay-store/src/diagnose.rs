//! Which tensor of a refused header is at fault, and why.
//!
//! Runs only after the `safetensors` crate has refused a header; it names what that crate's errors leave out.

use std::path::Path;

use serde_json::{Map, Value};

use crate::dtype::Dtype;
use crate::error::StoreError;
use crate::ordered::Ordered;
use crate::safetensors::METADATA_KEY;

/// The first fault of the header `text` that can be laid to one tensor.
pub(crate) fn first_fault(path: &Path, text: &str) -> Option<StoreError> {
    let Ordered(members) = serde_json::from_str::<Ordered<Value>>(text).ok()?;
    let tensors = members.iter().filter(|(name, _)| name != METADATA_KEY);
    let mut ranges = Vec::new();
    for (name, value) in tensors {
        match range_of(value) {
            Ok((begin, end)) => ranges.push((begin, end, name)),
            Err(Fault::Dtype(dtype)) => {
                return Some(StoreError::UnknownDtype { path: path.into(), tensor: name.clone(), dtype });
            }
            Err(Fault::Other(reason)) => return Some(invalid(path, name, reason)),
        }
    }
    ranges.sort();
    misplaced(&ranges).map(|(name, reason)| invalid(path, name, reason))
}

enum Fault {
    Dtype(String),
    Other(String),
}

/// The range of a tensor's bytes in the data section, where its description holds together.
fn range_of(value: &Value) -> Result<(u64, u64), Fault> {
    let other = |reason: String| Err(Fault::Other(reason));
    let Value::Object(fields) = value else {
        return other(format!("an object was wanted, and there is {value}"));
    };
    let dtype = match fields.get("dtype") {
        Some(Value::String(name)) => name.parse::<Dtype>().map_err(|unknown| Fault::Dtype(unknown.0))?,
        found => return other(format!("`dtype` is not a name: {}", shown(found))),
    };
    let shape = numbers(fields, "shape")?;
    let offsets = numbers(fields, "data_offsets")?;
    let &[begin, end] = offsets.as_slice() else {
        return other(format!("`data_offsets` is not a pair of numbers: {offsets:?}"));
    };
    if begin > end {
        return other(format!("`data_offsets` end before they begin: {offsets:?}"));
    }
    match dtype.size_of(&shape) {
        Some(size) if size.get() == end - begin => Ok((begin, end)),
        Some(size) => other(format!(
            "{dtype} of shape {shape:?} takes {} bytes, and `data_offsets` give it {}",
            size.get(),
            end - begin
        )),
        None => other(format!(
            "{dtype} of this shape does not take a whole number of bytes below 2^61: {shape:?}"
        )),
    }
}

fn numbers(fields: &Map<String, Value>, key: &str) -> Result<Vec<u64>, Fault> {
    let found = fields.get(key);
    let list = found.and_then(Value::as_array);
    let numbers = list.and_then(|list| list.iter().map(Value::as_u64).collect());
    numbers.ok_or_else(|| Fault::Other(format!("`{key}` is not a list of whole numbers: {}", shown(found))))
}

fn shown(value: Option<&Value>) -> String {
    value.map_or_else(|| "nothing".to_owned(), Value::to_string)
}

/// The first of the sorted ranges that does not start where the one before it ends.
fn misplaced<'a>(ranges: &[(u64, u64, &'a String)]) -> Option<(&'a str, String)> {
    let mut expected = 0;
    for &(begin, end, name) in ranges {
        if begin != expected {
            let how = if begin < expected { "overlap those before them" } else { "leave a hole before them" };
            return Some((name, format!("its bytes {how}, which end at {expected}: {begin}..{end}")));
        }
        expected = end;
    }
    None
}

fn invalid(path: &Path, tensor: &str, reason: String) -> StoreError {
    StoreError::InvalidTensor { path: path.to_owned(), tensor: tensor.to_owned(), reason }
}

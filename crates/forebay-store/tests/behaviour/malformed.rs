//! Headers that are cut, lie, or are not headers.

use forebay_store::{Checkpoint, StoreError};
use proptest::prelude::*;

use crate::data::{Random, folder, serialize, tensors, with_header, write};

/// Opens a file of these bytes, which must fail with a message that names it.
#[track_caller]
fn refused(bytes: &[u8]) -> StoreError {
    let folder = folder();
    let path = write(folder.path(), "model.safetensors", bytes);
    let error = Checkpoint::open(&path).expect_err("a file that is not whole or not sound");
    assert!(error.to_string().contains(path.to_str().expect("a plain path")), "{error}");
    error
}

#[test]
fn every_prefix_of_a_file_is_an_error() {
    let (folder, mut random) = (folder(), Random::new());
    let bytes = serialize(&tensors(&mut random, "layer"), None);
    let path = write(folder.path(), "whole.safetensors", &bytes);
    let whole = Checkpoint::open(&path).unwrap();
    let data_start = whole.tensors()[0].offset as usize;

    for length in 0..bytes.len() {
        let error = refused(&bytes[..length]);
        match error {
            StoreError::NotSafetensors { .. } => assert!(length < 8, "{length}"),
            StoreError::Truncated { tensor: None, wanted, length: named, .. } => {
                assert!((8..data_start).contains(&length));
                assert_eq!((wanted as usize, named as usize), (data_start, length));
            }
            StoreError::Truncated { tensor: Some(tensor), wanted, length: named, .. } => {
                let end = |entry: &&_| {
                    let entry: &forebay_store::TensorEntry = entry;
                    entry.offset as usize + entry.bytes.as_usize()
                };
                let first = whole.tensors().iter().find(|entry| end(entry) > length).unwrap();
                assert_eq!(tensor, first.name, "the first tensor that does not fit is named");
                assert_eq!((wanted as usize, named as usize), (end(&first), length));
            }
            other => panic!("{length}: {other}"),
        }
    }
}

#[test]
fn bytes_after_the_last_tensor_are_an_error() {
    let mut bytes = serialize(&tensors(&mut Random::new(), "layer"), None);
    bytes.extend_from_slice(&[1, 2, 3]);
    let error = refused(&bytes);
    assert!(matches!(error, StoreError::Header { .. }) && error.to_string().ends_with(" 3"), "{error}");
}

#[test]
fn a_header_longer_than_allowed_is_refused_before_it_is_read() {
    for length in [u64::MAX, u64::MAX - 7, 1 << 63, 100_000_001] {
        let error = refused(&[&length.to_le_bytes()[..], b"{}"].concat());
        assert!(matches!(error, StoreError::NotSafetensors { .. }), "{error}");
    }
    let error = refused(&[&100_000_000_u64.to_le_bytes()[..], b"{}"].concat());
    assert!(matches!(error, StoreError::Truncated { wanted: 100_000_008, length: 10, .. }), "{error}");
}

#[test]
fn a_git_lfs_pointer_says_what_to_do() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    assert!(refused(pointer).to_string().contains("git lfs pull"));
}

#[test]
fn an_unknown_element_type_is_named_with_its_tensor() {
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                      "b":{"dtype":"Q4_K","shape":[1],"data_offsets":[1,2]}}"#;
    match refused(&with_header(header, b"xy")) {
        StoreError::UnknownDtype { tensor, dtype, .. } => assert_eq!((&*tensor, &*dtype), ("b", "Q4_K")),
        other => panic!("{other}"),
    }
}

#[test]
fn a_tensor_given_twice_is_named() {
    let twice = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                     "a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    match refused(&with_header(twice, b"x")) {
        StoreError::DuplicateTensor { tensor, .. } => assert_eq!(tensor, "a"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_lie_about_a_tensor_is_told_with_its_name() {
    let good = r#""good":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}"#;
    let cases = [
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[2,6]}"#, "overlap"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[6,10]}"#, "hole"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[8,4]}"#, "end before they begin"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[-4,4]}"#, "data_offsets"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[4,8.5]}"#, "data_offsets"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[4]}"#, "pair"),
        (r#"{"dtype":"U8","shape":[4],"data_offsets":[4,99999999999999999999]}"#, "data_offsets"),
        (r#"{"dtype":"U8","shape":[5],"data_offsets":[4,8]}"#, "takes 5 bytes"),
        (r#"{"dtype":"F4","shape":[3],"data_offsets":[4,6]}"#, "whole number of bytes"),
        (r#"{"dtype":"U8","shape":[-4],"data_offsets":[4,8]}"#, "shape"),
        (r#"{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[4,8]}"#, "2^61"),
        (r#"{"dtype":7,"shape":[4],"data_offsets":[4,8]}"#, "dtype"),
        (r#"{"shape":[4],"data_offsets":[4,8]}"#, "dtype"),
        (r#"{"dtype":"U8","data_offsets":[4,8]}"#, "shape"),
        (r#""text""#, "object"),
        ("null", "object"),
    ];
    for (description, reason) in cases {
        let header = format!(r#"{{{good},"bad":{description}}}"#);
        match refused(&with_header(header.as_bytes(), b"12345678")) {
            StoreError::InvalidTensor { tensor, reason: told, .. } => {
                assert_eq!(tensor, "bad", "{description}");
                assert!(told.contains(reason), "{description}: {told}");
            }
            other => panic!("{description}: {other}"),
        }
    }
}

#[test]
fn a_tensor_past_the_end_of_the_file_is_named() {
    for (shape, end) in [("16", "16"), ("2305843009213693951", "2305843009213693951")] {
        let header = format!(r#"{{"far":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,{end}]}}}}"#);
        match refused(&with_header(header.as_bytes(), b"12345678")) {
            StoreError::Truncated { tensor, .. } => assert_eq!(tensor.as_deref(), Some("far")),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn what_is_not_a_json_object_is_no_header() {
    let deep = "[".repeat(100_000);
    let headers: [&[u8]; 9] = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{\"a\"}",
        b"{\"\xff\xfe\":1}",
        b"{}{}",
        br#"{"__metadata__":{"a":1}}"#,
        deep.as_bytes(),
    ];
    for header in headers {
        let error = refused(&with_header(header, b""));
        assert!(matches!(error, StoreError::Header { .. }), "{error}");
    }
}

#[test]
fn a_file_without_tensors_is_a_checkpoint_without_tensors() {
    let folder = folder();
    let path = write(folder.path(), "model.safetensors", &with_header(b"{}", b""));
    assert!(Checkpoint::open(&path).unwrap().tensors().is_empty());
}

fn sound_or_refused(bytes: &[u8]) {
    let folder = folder();
    let path = write(folder.path(), "model.safetensors", bytes);
    match Checkpoint::open(&path) {
        Ok(checkpoint) => {
            for entry in checkpoint.tensors() {
                let mut read = vec![0; entry.bytes.as_usize()];
                entry.source().read_at(0, &mut read).expect("an accepted tensor can be read");
            }
        }
        Err(error) => assert!(error.to_string().contains(path.to_str().expect("a plain path")), "{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn a_damaged_header_is_refused_or_still_sound(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let mut bytes = serialize(&tensors(&mut Random::new(), "layer"), None);
        let header = 8 + bytes[..8].iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte));
        for (place, byte) in damage {
            bytes[place.index(header)] = byte;
        }
        sound_or_refused(&bytes);
    }

    #[test]
    fn a_header_with_damaged_numbers_is_refused_or_still_sound(
        place in any::<prop::sample::Index>(),
        digits in "-?[0-9]{1,21}|\\[\\]|1e9|null",
    ) {
        let bytes = serialize(&tensors(&mut Random::new(), "layer"), None);
        let header = 8 + bytes[..8].iter().rev().fold(0, |length, &byte| length << 8 | usize::from(byte));
        let text = std::str::from_utf8(&bytes[8..header]).unwrap();
        let numbers: Vec<_> = text.match_indices(|c: char| c.is_ascii_digit()).collect();
        let (at, _) = numbers[place.index(numbers.len())];
        let text = format!("{}{digits}{}", &text[..at], &text[at + 1..]);
        sound_or_refused(&with_header(text.as_bytes(), &bytes[header..]));
    }
}

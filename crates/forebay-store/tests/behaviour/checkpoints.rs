//! Opening checkpoints that are as they should be, or whose parts do not fit together.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;

use forebay_store::{Checkpoint, SourceFile, StoreError, ranges_as_used};
use safetensors::{Dtype, SafeTensors};

use crate::data::{Random, Tensor, folder, serialize, tensors, with_header, write};

#[track_caller]
fn assert_holds(checkpoint: &Checkpoint, tensors: &[Tensor]) {
    assert_eq!(checkpoint.tensors().len(), tensors.len());
    for tensor in tensors {
        let entry = checkpoint.get(&tensor.name).expect("every tensor is found");
        assert_eq!(entry.dtype.name(), tensor.dtype.to_string());
        assert_eq!(entry.shape, tensor.shape.iter().map(|&dim| dim as u64).collect::<Vec<_>>());
        assert_eq!(entry.bytes.as_usize(), tensor.data.len());
        let mut read = vec![0; tensor.data.len()];
        entry.source().read_at(0, &mut read).expect("a whole file");
        assert_eq!(read, tensor.data, "{}", tensor.name);
    }
}

fn index(entries: &[(&str, &str)]) -> String {
    let mut text = String::from(r#"{"metadata": {"total_size": 1}, "weight_map": {"#);
    for (number, (tensor, shard)) in entries.iter().enumerate() {
        let comma = if number == 0 { "" } else { "," };
        write!(text, "{comma}\"{tensor}\": \"{shard}\"").expect("a string takes any text");
    }
    text + "}}"
}

#[test]
fn a_single_file_reads_as_it_was_written() {
    let (folder, mut random) = (folder(), Random::new());
    let tensors = tensors(&mut random, "layer");
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = serialize(&tensors, Some(metadata));
    let path = write(folder.path(), "model.safetensors", &bytes);

    let checkpoint = Checkpoint::open(&path).unwrap();

    assert_holds(&checkpoint, &tensors);
    assert_eq!(checkpoint.metadata()["format"], "pt");
    assert_eq!(checkpoint.path(), path);
    let total: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    assert_eq!(checkpoint.total_bytes().as_usize(), total);
    checkpoint.verify().unwrap();
    let theirs = SafeTensors::deserialize(&bytes).unwrap();
    for entry in checkpoint.tensors() {
        let range = entry.offset as usize..entry.offset as usize + entry.bytes.as_usize();
        assert_eq!(&bytes[range], theirs.tensor(&entry.name).unwrap().data());
    }
    assert!(checkpoint.tensors().is_sorted_by_key(|entry| entry.offset), "entries follow the file");
}

/// The names of a file's tensors in the order in which they are expected to be used.
fn names_as_used(path: &Path) -> Vec<String> {
    let checkpoint = Checkpoint::open(path).expect("a whole file");
    let named = |(offset, _): (u64, _)| {
        let entry = checkpoint.tensors().iter().find(|entry| entry.offset == offset);
        entry.expect("a tensor begins there").name.clone()
    };
    let file = SourceFile::open(path).expect("it was written");
    ranges_as_used(&file).expect("a whole file").into_iter().map(named).collect()
}

#[test]
fn tensors_that_their_writer_sorted_are_expected_by_the_numbers_in_their_names() {
    let (folder, mut random) = (folder(), Random::new());
    let mut tensor = |name: &str, dtype| Tensor::random(&mut random, name, dtype, &[3]);
    let mut sorted = vec![];
    for block in ["10", "2", "x", "1"] {
        sorted.push(tensor(&format!("blocks.{block}.a.scale"), Dtype::F32));
        sorted.push(tensor(&format!("blocks.{block}.a.weight"), Dtype::F16));
        sorted.push(tensor(&format!("blocks.{block}.b.weight"), Dtype::F16));
    }
    let path = write(folder.path(), "sorted.safetensors", &serialize(&sorted, None));
    let expected = ["1", "2", "10", "x"]
        .map(|block| ["a.scale", "a.weight", "b.weight"].map(|name| format!("blocks.{block}.{name}")));
    assert_eq!(names_as_used(&path), expected.concat());
}

#[test]
fn tensors_in_an_order_of_their_own_are_expected_in_that() {
    let folder = folder();
    let names = ["blocks.2.mod", "blocks.2.attn", "blocks.10.mod", "blocks.10.attn"];
    let entries = names.iter().enumerate().map(|(number, name)| {
        format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{number},{}]}}"#, number + 1)
    });
    let header = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    let path = write(folder.path(), "own.safetensors", &with_header(header.as_bytes(), &[0; 4]));
    assert_eq!(names_as_used(&path), names);
}

#[test]
fn the_order_of_tensors_is_the_same_every_time() {
    let (folder, mut random) = (folder(), Random::new());
    let empty = |name: String| Tensor::random(&mut random, &name, safetensors::Dtype::F32, &[0]);
    let tensors: Vec<_> = (0..40).map(|number| format!("empty.{number:02}")).map(empty).collect();
    let path = write(folder.path(), "model.safetensors", &serialize(&tensors, None));
    let names = || -> Vec<_> {
        Checkpoint::open(&path).unwrap().tensors().iter().map(|entry| entry.name.clone()).collect()
    };
    assert_eq!(names(), tensors.iter().map(|tensor| tensor.name.clone()).collect::<Vec<_>>());
}

#[test]
fn shards_follow_the_index_and_a_folder_finds_it() {
    let (folder, mut random) = (folder(), Random::new());
    let (first, second) = (tensors(&mut random, "z"), tensors(&mut random, "a"));
    write(folder.path(), "part-1.safetensors", &serialize(&first, None));
    write(folder.path(), "part-2.safetensors", &serialize(&second, None));
    let entries: Vec<_> = (first.iter().map(|tensor| (tensor.name.as_str(), "part-1.safetensors")))
        .chain(second.iter().map(|tensor| (tensor.name.as_str(), "part-2.safetensors")))
        .collect();
    let path = write(folder.path(), "model.safetensors.index.json", index(&entries).as_bytes());

    for opened in [folder.path(), &path] {
        let checkpoint = Checkpoint::open(opened).unwrap();
        assert_holds(&checkpoint, &[first.clone(), second.clone()].concat());
        assert_eq!(checkpoint.path(), path);
        let files: Vec<_> = checkpoint.files().iter().map(|file| file.path().file_name().unwrap()).collect();
        assert_eq!(files, ["part-1.safetensors", "part-2.safetensors"]);
        let in_first = checkpoint.tensors().iter().take_while(|entry| entry.name.starts_with("z.")).count();
        assert_eq!(in_first, first.len());
    }
}

#[test]
fn a_tensor_in_two_shards_is_taken_from_the_one_the_index_names() {
    let (folder, mut random) = (folder(), Random::new());
    let (stale, meant) = (tensors(&mut random, "x"), tensors(&mut random, "x"));
    let other = tensors(&mut random, "y");
    write(folder.path(), "1.safetensors", &serialize(&[stale, other.clone()].concat(), None));
    write(folder.path(), "2.safetensors", &serialize(&meant, None));
    let mut entries = vec![("y.bias", "1.safetensors")];
    entries.extend(meant.iter().map(|tensor| (tensor.name.as_str(), "2.safetensors")));
    write(folder.path(), "m.safetensors.index.json", index(&entries).as_bytes());

    assert_holds(&Checkpoint::open(folder.path()).unwrap(), &[other, meant].concat());
}

#[test]
fn a_tensor_in_two_shards_that_the_index_leaves_open_is_an_error() {
    let (folder, mut random) = (folder(), Random::new());
    let tensors = tensors(&mut random, "x");
    for shard in ["1.safetensors", "2.safetensors"] {
        let own = Tensor { name: shard.to_owned(), ..tensors[0].clone() };
        write(folder.path(), shard, &serialize(&[own, tensors[1].clone()], None));
    }
    let entries = ["1.safetensors", "2.safetensors"].map(|shard| (shard, shard));
    write(folder.path(), "m.safetensors.index.json", index(&entries).as_bytes());

    let error = Checkpoint::open(folder.path()).unwrap_err();
    let path = folder.path().join("2.safetensors");
    assert_eq!(error, StoreError::DuplicateTensor { path, tensor: "x.bias".into() });
}

#[test]
fn a_folder_holds_one_checkpoint() {
    let (folder, mut random) = (folder(), Random::new());
    let path = folder.path().to_owned();
    assert_eq!(Checkpoint::open(&path).unwrap_err(), StoreError::NoCheckpoint { path: path.clone() });

    let tensors = tensors(&mut random, "x");
    write(&path, "model.safetensors", &serialize(&tensors, None));
    write(&path, "notes.txt", b"not weights");
    assert_holds(&Checkpoint::open(&path).unwrap(), &tensors);

    write(&path, "model.fp16.safetensors", &serialize(&tensors, None));
    let candidates = vec!["model.fp16.safetensors".to_owned(), "model.safetensors".to_owned()];
    assert_eq!(Checkpoint::open(&path).unwrap_err(), StoreError::Ambiguous { path, candidates });
}

#[test]
fn a_missing_shard_is_named_with_a_tensor_that_needs_it() {
    let (folder, mut random) = (folder(), Random::new());
    let tensors = tensors(&mut random, "x");
    write(folder.path(), "1.safetensors", &serialize(&tensors, None));
    let entries = [("x.bias", "1.safetensors"), ("y.bias", "2.safetensors")];
    let index = write(folder.path(), "m.safetensors.index.json", index(&entries).as_bytes());

    let error = Checkpoint::open(&index).unwrap_err();
    assert!(error.to_string().ends_with("2.safetensors"), "{error}");
    let (shard, tensor) = ("2.safetensors".into(), "y.bias".into());
    assert_eq!(error, StoreError::MissingShard { index, shard, tensor });
}

#[test]
fn a_tensor_that_its_shard_lacks_is_an_error() {
    let (folder, mut random) = (folder(), Random::new());
    write(folder.path(), "1.safetensors", &serialize(&tensors(&mut random, "x"), None));
    let entries = [("x.bias", "1.safetensors"), ("y.bias", "1.safetensors")];
    let index = write(folder.path(), "m.safetensors.index.json", index(&entries).as_bytes());

    let (shard, tensor) = ("1.safetensors".into(), "y.bias".into());
    assert_eq!(Checkpoint::open(&index).unwrap_err(), StoreError::MissingTensor { index, shard, tensor });
}

#[test]
fn shards_outside_the_folder_are_refused() {
    let (folder, mut random) = (folder(), Random::new());
    let bytes = serialize(&tensors(&mut random, "x"), None);
    let outside = write(folder.path(), "outside.safetensors", &bytes);
    let inside = folder.path().join("model");
    std::fs::create_dir(&inside).unwrap();
    for shard in
        ["../outside.safetensors", "a/../../outside.safetensors", outside.to_str().unwrap(), "", "./x"]
    {
        let text = index(&[("x.bias", shard)]);
        let index = write(&inside, "m.safetensors.index.json", text.as_bytes());
        let error = Checkpoint::open(&index).unwrap_err();
        assert_eq!(error, StoreError::ShardOutside { index, shard: shard.into(), tensor: "x.bias".into() });
    }
}

#[test]
fn a_shard_that_is_a_link_elsewhere_is_followed() {
    let (folder, mut random) = (folder(), Random::new());
    let tensors = tensors(&mut random, "x");
    let blob = write(folder.path(), "blob", &serialize(&tensors, None));
    let snapshot = folder.path().join("snapshot");
    std::fs::create_dir(&snapshot).unwrap();
    std::os::unix::fs::symlink(blob, snapshot.join("1.safetensors")).unwrap();
    write(&snapshot, "m.safetensors.index.json", index(&[("x.bias", "1.safetensors")]).as_bytes());

    assert_holds(&Checkpoint::open(&snapshot).unwrap(), &tensors);
}

#[test]
fn an_index_that_is_none_is_an_error_that_names_it() {
    let folder = folder();
    for text in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"weight_map": []}"#,
        r#"{"weight_map": {}}"#,
        r#"{"weight_map": {"x": 1}}"#,
        r#"{"weight_map": {"x": null}}"#,
        "\u{feff}{}",
    ] {
        let path = write(folder.path(), "m.safetensors.index.json", text.as_bytes());
        let error = Checkpoint::open(&path).unwrap_err();
        assert!(matches!(&error, StoreError::Index { path: named, .. } if *named == path), "{text}: {error}");
    }
    let text = r#"{"weight_map": {"x": "1.safetensors", "x": "2.safetensors"}}"#;
    let path = write(folder.path(), "m.safetensors.index.json", text.as_bytes());
    assert_eq!(
        Checkpoint::open(&path).unwrap_err(),
        StoreError::DuplicateTensor { path, tensor: "x".into() }
    );
}

#[test]
fn a_path_with_nothing_at_it_is_an_error_that_names_it() {
    let path = folder().path().join("gone.safetensors");
    let error = Checkpoint::open(&path).unwrap_err();
    assert!(matches!(&error, StoreError::Open { reason, .. } if reason.kind == std::io::ErrorKind::NotFound));
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}

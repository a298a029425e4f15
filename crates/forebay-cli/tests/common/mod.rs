//! Runs the program, and writes models for it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

pub const MIB: usize = 1 << 20;

pub fn forebay(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forebay")).args(args).output().unwrap()
}

/// The output of a run that succeeds.
pub fn told(args: &[&str]) -> String {
    let output = forebay(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    assert_eq!(errors, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn json(args: &[&str]) -> Value {
    serde_json::from_str(&told(args)).unwrap()
}

/// The exit code and what is told on standard error by a run that fails.
pub fn fails(args: &[&str]) -> (i32, String) {
    let output = forebay(args);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Eight layers of 3 MiB with their biases, and a table of 8 MiB.
pub fn model(folder: &Path) -> PathBuf {
    let bytes: Vec<u8> = (0..8 * MIB).map(|i| (i >> 8) as u8).collect();
    let mut tensors =
        vec![("embed.weight".to_owned(), TensorView::new(Dtype::BF16, vec![4096, 1024], &bytes).unwrap())];
    for layer in 0..8 {
        let weight = TensorView::new(Dtype::F32, vec![1024, 768], &bytes[..3 * MIB]).unwrap();
        let bias = TensorView::new(Dtype::F32, vec![1024], &bytes[..4096]).unwrap();
        tensors.push((format!("layers.{layer}.weight"), weight));
        tensors.push((format!("layers.{layer}.bias"), bias));
    }
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(tensors, None, &path).unwrap();
    path
}

/// An index that names one of the tensors and the one file that holds all.
pub fn index(folder: &Path) -> PathBuf {
    let path = folder.join("model.safetensors.index.json");
    fs::write(&path, r#"{"weight_map": {"layers.0.weight": "model.safetensors"}}"#).unwrap();
    path
}

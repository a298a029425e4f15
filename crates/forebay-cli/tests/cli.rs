//! The program as its users run it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

const MIB: usize = 1 << 20;

fn forebay(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forebay")).args(args).output().unwrap()
}

/// The output of a run that succeeds.
fn told(args: &[&str]) -> String {
    let output = forebay(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    assert_eq!(errors, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&told(args)).unwrap()
}

/// The exit code and what is told on standard error by a run that fails.
fn fails(args: &[&str]) -> (i32, String) {
    let output = forebay(args);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

/// Eight layers of 3 MiB with their biases, and a table of 8 MiB.
fn model(folder: &Path) -> PathBuf {
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
fn index(folder: &Path) -> PathBuf {
    let path = folder.join("model.safetensors.index.json");
    fs::write(&path, r#"{"weight_map": {"layers.0.weight": "model.safetensors"}}"#).unwrap();
    path
}

#[test]
fn help_and_version_are_told_on_standard_output() {
    for args in [&["--help"][..], &["doctor", "--help"], &["inspect", "--help"], &["run", "--help"]] {
        assert!(told(args).contains("Examples:\n  forebay "), "{args:?}");
    }
    assert_eq!(told(&["--version"]).trim(), concat!("forebay ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn doctor_finds_that_the_host_works() {
    let text = told(&["doctor"]);
    assert!(text.lines().any(|line| line.starts_with("host") && line.contains("works")), "{text}");
    let checks = json(&["doctor", "--json"]);
    let names: Vec<_> = checks["checks"].as_array().unwrap().iter().map(|check| &check["name"]).collect();
    assert_eq!(names[..2], ["host", "CUDA driver"]);
    assert_eq!(checks["checks"][0]["status"], "works");
}

#[test]
fn inspect_groups_tensors_and_shows_what_a_budget_keeps() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let text = told(&["inspect", path.to_str().unwrap(), "--budget", "28MiB"]);
    assert!(text.contains("17 tensors of 32 MiB in 1 file\nlargest: embed.weight, 8 MiB\n"), "{text}");
    assert!(
        text.contains("     8  F32           [1024, 768]               24 MiB   74.9%  layers.*.weight\n"),
        "{text}"
    );
    assert!(
        text.contains("layout: 17 pages of 2 MiB, 1 of them for small tensors and always resident\n"),
        "{text}"
    );
    assert!(text.contains("needs:  at least 10 MiB, all of it 34 MiB\n"), "{text}");
    assert!(text.contains("\n█") && text.contains("░"), "{text}");

    let report = json(&["inspect", path.to_str().unwrap(), "--budget", "1GiB", "--json"]);
    assert_eq!(report["tensors"], 17);
    assert_eq!(report["groups"].as_array().unwrap().len(), 3);
    assert_eq!(report["budget"]["streamed_bytes_a_pass"], 0);
    assert_eq!(report["budget"]["picture"], "█".repeat(17));
}

#[test]
fn inspect_takes_folders_indexes_tables_and_small_budgets() {
    let folder = tempfile::tempdir().unwrap();
    model(folder.path());
    let path = folder.path().to_str().unwrap();
    assert_eq!(json(&["inspect", path, "--json"])["tensors"], 17);
    assert_eq!(json(&["inspect", path, "--json", "--page-size", "32MiB"])["layout"]["pages"], 2);
    let text = told(&["inspect", path, "--budget", "8MiB"]);
    assert!(text.ends_with("budget: 8 MiB is too little by 2 MiB\n"), "{text}");
    let text = told(&["inspect", path, "--budget", "8MiB", "--table", "embed.weight"]);
    assert!(text.contains("░····\n"), "{text}");
    let index = index(folder.path());
    assert_eq!(
        json(&["inspect", index.to_str().unwrap(), "--json"])["bytes"],
        3 * MIB + 8 * MIB + 7 * 3 * MIB + 8 * 4096
    );
}

#[test]
fn run_times_every_pass_within_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let path = path.to_str().unwrap();
    let report = json(&["run", path, "--budget", "12MiB", "--passes", "2", "--json"]);
    let passes = report["passes"].as_array().unwrap();
    assert_eq!(passes.len(), 2);
    for pass in passes {
        let held = pass["resident_bytes"].as_u64().unwrap() + pass["streamed_bytes"].as_u64().unwrap();
        assert!(held <= 12 * MIB as u64, "{pass}");
        assert!(pass["copied_bytes"].as_u64().unwrap() >= 20 * MIB as u64, "{pass}");
        assert!(pass["seconds"].as_f64().unwrap() > 0.0, "{pass}");
    }
    let text = told(&["run", path, "--budget", "64MiB"]);
    assert!(
        text.contains("17 tensors, 32 MiB, 17 pages of 2 MiB\nhost (host memory), budget 64 MiB\n"),
        "{text}"
    );
    let second = text.lines().find(|line| line.starts_with("   2")).unwrap();
    assert!(second.contains("0 B") && second.contains("34 MiB"), "nothing is copied again: {text}");
    told(&["run", path, "--budget", "8MiB", "--table", "embed.weight"]);
}

#[test]
fn wrong_usage_names_the_value_and_ends_with_2() {
    for (args, named) in [
        (&["run", "x", "--budget", "NaN"][..], "\"NaN\""),
        (&["run", "x", "--budget", "-1GiB"], "\"-1GiB\""),
        (&["run", "x", "--budget", "8G"], "\"8G\""),
        (&["run", "x", "--budget", "99999999999999GiB"], "\"99999999999999GiB\""),
        (&["inspect", "x", "--page-size", "3MiB"], "3 MiB"),
        (&["run", "x", "--passes", "0"], "'0'"),
        (&["run", "x", "--device", "gpu"], "\"gpu\""),
        (&["fly"], "'fly'"),
        (&["inspect"], "<PATH>"),
        (&[], "Usage:"),
    ] {
        let (code, errors) = fails(args);
        assert_eq!(code, 2, "{args:?}: {errors}");
        assert!(errors.contains(named), "{args:?}: {errors}");
    }
}

#[test]
fn failures_name_the_file_and_the_numbers_and_end_with_1() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let path = path.to_str().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let file = folder.path().join(name);
        fs::write(&file, bytes).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let whole = fs::read(path).unwrap();
    let truncated = write("truncated.safetensors", &whole[..whole.len() - 1]);
    let garbage = write("garbage.safetensors", b"not a checkpoint at all");
    let empty = write("empty.safetensors", b"");
    let nowhere = folder.path().join("nowhere.safetensors");
    for command in ["inspect", "run"] {
        for file in [&truncated, &garbage, &empty, nowhere.to_str().unwrap()] {
            let (code, errors) = fails(&[command, file]);
            assert_eq!(code, 1, "{errors}");
            assert!(errors.starts_with("error: ") && errors.contains(file), "{errors}");
            assert!(!errors.contains("panicked"), "{errors}");
        }
    }
    let (code, errors) = fails(&["run", path, "--budget", "4MiB"]);
    assert_eq!(code, 1);
    assert!(errors.contains("the budget is 4 MiB, of which 2 MiB cannot leave"), "{errors}");
    let (code, errors) = fails(&["run", path, "--budget", "1MiB"]);
    assert_eq!((code, errors.as_str()), (1, "error: a budget holds at least one page of 2 MiB: 1 MiB\n"));
    let (code, errors) = fails(&["run", path, "--device", "cuda:4000"]);
    assert_eq!(code, 1);
    assert!(errors.ends_with("cuda:4000\n"), "{errors}");
    let (code, errors) = fails(&["inspect", path, "--table", "layers.9.weight"]);
    assert_eq!((code, errors), (1, format!("error: {path} has no tensor \"layers.9.weight\"\n")));
}

#[test]
fn a_reader_that_has_enough_ends_the_program_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    for command in ["inspect", "run"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_forebay"))
            .args([command, path.to_str().unwrap(), "--budget", "64MiB"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut errors = String::new();
        child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        assert_eq!((child.wait().unwrap().code(), errors.as_str()), (Some(0), ""), "{command}");
    }
}

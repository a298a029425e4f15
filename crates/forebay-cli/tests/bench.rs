//! `forebay bench` as its users run it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use common::{MIB, fails, index, json, model, told};
use serde_json::Value;

/// The bytes of [`model`]'s weights.
const BYTES: u64 = (32 * MIB + 8 * 4096) as u64;

fn bytes(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("no number of bytes: {value}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("no number: {value}"))
}

/// Eight more layers, in a folder of their own.
fn second_model(folder: &Path) -> PathBuf {
    let folder = folder.join("second");
    fs::create_dir(&folder).unwrap();
    model(&folder)
}

/// A bench that goes on until something happens to it, and has told of its first pass.
fn running(path: &Path, steps: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_forebay"))
        .args(["bench", path.to_str().unwrap(), "--device", "host", "--free", "12MiB", "--steps", steps])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.trim_start().starts_with("first ") {
        line.clear();
        assert!(told.read_line(&mut line).unwrap() > 0, "the program ended before its first pass");
    }
    (child, told)
}

/// The exit code, the rest of the output and the errors.
fn ended(mut child: Child, mut told: BufReader<ChildStdout>) -> (Option<i32>, String, String) {
    let (mut rest, mut errors) = (String::new(), String::new());
    told.read_to_string(&mut rest).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    (child.wait().unwrap().code(), rest, errors)
}

#[test]
fn the_numbers_are_consistent() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let path = path.to_str().unwrap();
    let args = ["bench", path, "--device", "host", "--free", "24MiB", "--steps", "3", "--compute", "2.5"];
    let report = json(&[&args[..], &["--json"]].concat());
    assert_eq!(report["device"]["id"], "host");
    assert_eq!(
        (&report["memory"]["bytes"], &report["memory"]["chosen_by"]),
        (&(24 * MIB).into(), &"argument".into())
    );
    assert_eq!(report["compute_seconds_a_step"], 0.0025);
    let link = number(&report["link"]["bytes_per_s"]);
    assert!(link > 0.0 && bytes(&report["link"]["measured_bytes"]) >= 2 * MIB as u64, "{report}");

    let [model] = &report["models"].as_array().unwrap()[..] else { panic!("{report}") };
    assert_eq!(
        (&model["path"], &model["tensors"], &model["bytes"]),
        (&path.into(), &17.into(), &BYTES.into())
    );
    let length = fs::metadata(path).unwrap().len();
    assert_eq!(model["files"]["bytes"], length);
    // A system may take pages back at any moment.
    assert!((1..=length).contains(&bytes(&model["files"]["cached_bytes_at_start"])), "{model}");
    let disk = &model["files"]["disk"];
    assert!(
        disk["bytes_per_s"].is_f64() != disk["reason"].is_string(),
        "a rate, or why there is none: {disk}"
    );
    assert!(number(&model["page_cache"]["bytes_per_s"]) > 0.0);

    let passes = model["passes"].as_array().unwrap();
    let kinds: Vec<_> = passes.iter().map(|pass| pass["pass"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["first", "1", "2", "3"]);
    let first = &passes[0];
    assert!(bytes(&first["copied_bytes"]) >= BYTES, "{first}");
    assert!((number(&first["limit_seconds"]) - BYTES as f64 / link).abs() < 1e-6, "{first}");
    for pass in passes {
        let (seconds, copied) = (number(&pass["seconds"]), bytes(&pass["copied_bytes"]));
        assert!((number(&pass["copied_bytes_per_s"]) - copied as f64 / seconds).abs() < 1.0, "{pass}");
        assert!(bytes(&pass["resident_bytes"]) <= 24 * MIB as u64, "{pass}");
        // What is read ahead for the next pass comes on top, as much as there is memory and time for.
        assert!(copied <= BYTES + 24 * MIB as u64, "{pass}");
        assert!(
            (number(&pass["times_limit"]) - seconds / number(&pass["limit_seconds"])).abs() < 1e-3,
            "{pass}"
        );
    }
    let copied: u64 = passes.iter().map(|pass| bytes(&pass["copied_bytes"])).sum();
    assert!(copied < 4 * BYTES, "what stayed was copied again: {model}");
    for pass in &passes[1..] {
        assert!(
            (number(&pass["limit_seconds"]) - bytes(&pass["copied_bytes"]) as f64 / link).abs() < 1e-6,
            "{pass}"
        );
    }

    let prediction = &model["prediction"];
    assert!(number(&prediction["assumed_bytes_per_s"]) <= link);
    let sizes = prediction["sizes"].as_array().unwrap();
    let memory: Vec<_> = sizes.iter().map(|size| bytes(&size["memory_bytes"]) / MIB as u64).collect();
    assert_eq!(memory, [16, 24, 32, 64]);
    let falls = |name: &str| sizes.is_sorted_by(|a, b| number(&a[name]) >= number(&b[name]));
    assert!(
        falls("streamed_bytes_a_step") && falls("predicted_seconds_a_step") && falls("limit_seconds_a_step")
    );
    for size in sizes {
        assert_eq!(bytes(&size["resident_bytes"]) + bytes(&size["streamed_bytes_a_step"]), BYTES, "{size}");
        assert!(number(&size["predicted_seconds_a_step"]) >= number(&size["limit_seconds_a_step"]), "{size}");
        assert!(
            number(&size["limit_seconds_a_step"]) >= 0.0025,
            "no step is shorter than its computing: {size}"
        );
        assert_eq!(size["measured_seconds_a_step"].is_f64(), size["memory_bytes"] == 24 * MIB, "{size}");
    }
    let largest = sizes.last().unwrap();
    assert_eq!(
        (bytes(&largest["streamed_bytes_a_step"]), number(&largest["predicted_seconds_a_step"])),
        (0, 0.0025)
    );
}

#[test]
fn what_fits_is_copied_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let text =
        told(&["bench", path.to_str().unwrap(), "--device", "host", "--budget", "64MiB", "--steps", "1"]);
    assert!(
        text.starts_with(&format!("{}: 17 tensors, 32 MiB, 17 pages of 2 MiB, ", path.display())),
        "{text}"
    );
    assert!(text.contains("% in the page cache\n"), "{text}");
    assert!(text.contains("host (host memory): 64 MiB for weights; everything fits\n"), "{text}");
    let step = text.lines().find(|line| line.starts_with("     1 ")).unwrap();
    assert!(step.contains(" 0 B ") && step.contains("  -  ") && step.contains("34 MiB"), "{text}");
    assert!(text.contains(" GB/s of the first pass, reads from disk included\n"), "{text}");
}

#[test]
fn without_a_size_a_model_that_fits_is_streamed_in_a_quarter() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let text = told(&["bench", path.to_str().unwrap(), "--device", "host"]);
    assert!(text.contains("all of it would fit in 34 MiB, so a quarter shows how it streams\n"), "{text}");
    let table = ["--table", "embed.weight", "--page-size", "2MiB", "--free", "8MiB", "--steps", "1"];
    told(&[&["bench", path.to_str().unwrap(), "--device", "host"][..], &table].concat());
}

#[test]
fn several_models_take_turns_and_then_return() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (model(folder.path()), second_model(folder.path()));
    let args = ["--device", "host", "--free", "44MiB", "--steps", "2"];
    let args = [&["bench", one.to_str().unwrap(), two.to_str().unwrap()], &args[..]].concat();
    let report = json(&[&args[..], &["--json"]].concat());
    let models = report["models"].as_array().unwrap();
    assert_eq!(
        models.iter().map(|model| &model["path"]).collect::<Vec<_>>(),
        [one.to_str().unwrap(), two.to_str().unwrap()]
    );
    for model in models {
        let passes = model["passes"].as_array().unwrap();
        let kinds: Vec<_> = passes.iter().map(|pass| pass["pass"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["first", "1", "2", "return"]);
        assert!(bytes(&passes[0]["copied_bytes"]) >= BYTES, "{model}");
        assert_eq!(passes[2]["copied_bytes"], 0, "each fits while it is its turn: {model}");
    }
    let returned = bytes(&models[0]["passes"][3]["copied_bytes"]);
    assert!(returned > 0 && returned < BYTES, "some of it had stayed, but not all: {returned}");

    let text = told(&args);
    let turns = |path: &Path| text.lines().filter(|line| *line == path.to_str().unwrap()).count();
    assert_eq!((turns(&one), turns(&two)), (3, 3), "passes, return and prediction: {text}");
}

#[test]
fn a_file_that_is_deleted_meanwhile_is_still_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (child, told) = running(&path, "20");
    fs::remove_file(&path).unwrap();
    let (code, rest, errors) = ended(child, told);
    assert_eq!((code, errors.as_str()), (Some(0), ""), "{rest}");
    assert!(rest.contains("\n    20 ") && rest.contains("page cache"), "{rest}");
}

#[test]
fn a_file_that_is_cut_short_meanwhile_ends_it_with_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let (child, told) = running(&path, "4000000000");
    fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let (code, _, errors) = ended(child, told);
    assert_eq!(code, Some(1), "{errors}");
    assert!(errors.starts_with("error: pass ") && errors.contains(path.to_str().unwrap()), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
}

#[test]
fn what_cannot_be_done_is_told_with_its_values() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    let nowhere = folder.path().join("nowhere.safetensors");
    let (path, nowhere) = (path.to_str().unwrap(), nowhere.to_str().unwrap());
    let host = |args: &[&str]| fails(&[&["bench", "--device", "host"], args].concat());

    let (code, errors) = host(&[path, "--free", "4MiB"]);
    let little =
        "error: --free is too little for one operation at a time, which takes 10 MiB, 6 MiB more: 4 MiB\n";
    assert_eq!((code, errors.as_str()), (1, little));
    let (code, errors) = host(&[path, nowhere]);
    assert_eq!(code, 1);
    assert!(errors.starts_with(&format!("error: cannot open {nowhere}: ")), "{errors}");
    let (code, errors) = host(&[path, "--table", "layers.9.weight"]);
    assert_eq!((code, errors), (1, format!("error: {path} has no tensor \"layers.9.weight\"\n")));

    let index = index(folder.path());
    fs::remove_file(path).unwrap();
    let (code, errors) = host(&[index.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(errors.contains("download the missing file: model.safetensors"), "{errors}");
}

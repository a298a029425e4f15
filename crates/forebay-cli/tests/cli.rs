//! The program as its users run it.
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

mod common;

use std::fs;
use std::io::Read;
use std::process::{Command, Stdio};

use common::{MIB, fails, index, json, model, told};

#[test]
fn help_and_version_are_told_on_standard_output() {
    for args in [&["--help"][..], &["doctor", "--help"], &["inspect", "--help"], &["bench", "--help"]] {
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
fn wrong_usage_names_the_value_and_ends_with_2() {
    for (args, named) in [
        (&["inspect", "x", "--budget", "NaN"][..], "\"NaN\""),
        (&["bench", "x", "--free", "-1GiB"], "\"-1GiB\""),
        (&["bench", "x", "--free", "8G"], "\"8G\""),
        (&["bench", "x", "--free", "99999999999999GiB"], "\"99999999999999GiB\""),
        (&["inspect", "x", "--page-size", "3MiB"], "3 MiB"),
        (&["bench", "x", "--steps", "0"], "'0'"),
        (&["bench", "x", "--steps", "-1"], "'-1'"),
        (&["bench", "x", "--compute", "-1"], "\"-1\""),
        (&["bench", "x", "--compute", "inf"], "\"inf\""),
        (&["bench", "x", "--compute", "2s"], "\"2s\""),
        (&["bench"], "<MODEL>"),
        (&["bench", "x", "--device", "gpu"], "\"gpu\""),
        (&["fly"], "'fly'"),
        (&["inspect"], "<MODEL>"),
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
    for command in ["inspect", "bench"] {
        for file in [&truncated, &garbage, &empty, nowhere.to_str().unwrap()] {
            let (code, errors) = fails(&[command, file]);
            assert_eq!(code, 1, "{errors}");
            assert!(errors.starts_with("error: ") && errors.contains(file), "{errors}");
            assert!(!errors.contains("panicked"), "{errors}");
        }
    }
    let (code, errors) = fails(&["bench", path, "--device", "cuda:4000"]);
    assert_eq!(code, 1);
    assert!(errors.ends_with("cuda:4000\n"), "{errors}");
    let (code, errors) = fails(&["inspect", path, "--table", "layers.9.weight"]);
    assert_eq!((code, errors), (1, format!("error: {path} has no tensor \"layers.9.weight\"\n")));
}

#[test]
fn a_reader_that_has_enough_ends_the_program_quietly() {
    let folder = tempfile::tempdir().unwrap();
    let path = model(folder.path());
    for command in ["inspect", "bench"] {
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

//! Imports of shared objects that are compiled here, linked in each of the ways that linkers know.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used, reason = "tests end where their setting fails")]

use std::ffi::c_void;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use forebay_imports::{Import, ImportError};
use libloading::os::unix::{Library, RTLD_LAZY, RTLD_NOW};

const RUNTIME: &str = "int cudaMalloc(void **at, unsigned long size) { *at = (void *)size; return 0; }";
const CALLER: &str = "extern int cudaMalloc(void **, unsigned long);
    unsigned long allocate(unsigned long size) { void *at = 0; int code = cudaMalloc(&at, size); return code ? 0 : (unsigned long)at; }";

type Malloc = unsafe extern "C" fn(*mut *mut c_void, usize) -> i32;

static ORIGINAL: AtomicUsize = AtomicUsize::new(0);
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// One thread at a time has the counters.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

unsafe extern "C" fn replacement(at: *mut *mut c_void, size: usize) -> i32 {
    ASKED.fetch_add(size, Ordering::Relaxed);
    // SAFETY: the original of the object under test.
    let original: Malloc = unsafe { std::mem::transmute(ORIGINAL.load(Ordering::Acquire)) };
    // SAFETY: passed on as it came.
    unsafe { original(at, size) }
}

/// Compiles a caller of this name, linked with these flags, against a runtime of its own.
fn caller(folder: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let runtime = compile(folder, &format!("runtime_{name}"), RUNTIME, &[]);
    let link = [runtime.to_str().unwrap().to_owned(), format!("-Wl,-rpath,{}", folder.display())];
    let flags: Vec<&str> = link.iter().map(String::as_str).chain(flags.iter().copied()).collect();
    compile(folder, name, CALLER, &flags)
}

fn compile(folder: &Path, name: &str, text: &str, flags: &[&str]) -> PathBuf {
    let source = folder.join(format!("{name}.c"));
    std::fs::write(&source, text).unwrap();
    let object = folder.join(format!("lib{name}.so"));
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".to_owned());
    let mut command = Command::new(compiler);
    command.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&object).arg(&source).args(flags);
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    object
}

fn allocate(library: &Library, size: usize) -> usize {
    // SAFETY: the function compiled above.
    let call = unsafe { library.get::<unsafe extern "C" fn(usize) -> usize>(b"allocate").unwrap() };
    // SAFETY: as declared.
    unsafe { call(size) }
}

#[test]
fn calls_go_elsewhere_and_back_however_the_object_was_linked() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    let ways: [(&str, &[&str], i32); 5] = [
        ("lazy", &["-Wl,-z,lazy"], RTLD_LAZY),
        ("bound", &["-Wl,-z,lazy"], RTLD_NOW),
        ("relro", &["-Wl,-z,relro,-z,now"], RTLD_NOW),
        ("noplt", &["-fno-plt", "-Wl,-z,relro,-z,now"], RTLD_NOW),
        ("norelro", &["-Wl,-z,norelro"], RTLD_NOW),
    ];
    for (name, flags, binding) in ways {
        let path = caller(folder.path(), name, flags);
        // SAFETY: what was compiled above does nothing when loaded.
        let library = unsafe { Library::open(Some(&path), binding).unwrap() };
        for round in 1..4_usize {
            // Bound on the first call, in the case of a lazy one after it was redirected.
            let import = Import::find(path.file_name().unwrap().to_str().unwrap(), "cudaMalloc").unwrap();
            ORIGINAL.store(import.original() as usize, Ordering::Release);
            ASKED.store(0, Ordering::Relaxed);
            // SAFETY: the same signature, and part of this program.
            let redirection = unsafe { import.redirect(replacement as *mut c_void) }.unwrap();
            for call in 1..4 {
                assert_eq!(allocate(&library, 100 * round), 100 * round, "{name}");
                assert_eq!(
                    ASKED.load(Ordering::Relaxed),
                    call * 100 * round,
                    "{name}: the redirection was lost"
                );
            }
            assert!(redirection.undo().unwrap(), "{name}");
            assert_eq!(allocate(&library, 7), 7, "{name}");
            assert_eq!(ASKED.load(Ordering::Relaxed), 300 * round, "{name}: it was not undone");
        }
    }
}

#[test]
fn what_somebody_else_redirected_meanwhile_is_left() {
    unsafe extern "C" fn other(at: *mut *mut c_void, _size: usize) -> i32 {
        // SAFETY: a place for the result.
        unsafe { *at = 99 as *mut c_void };
        0
    }
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    let path = caller(folder.path(), "stacked", &["-Wl,-z,now"]);
    // SAFETY: what was compiled above does nothing when loaded.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW).unwrap() };
    let import = Import::find("libstacked.so", "cudaMalloc").unwrap();
    ORIGINAL.store(import.original() as usize, Ordering::Release);
    // SAFETY: the same signature, and part of this program.
    let first = unsafe { import.redirect(replacement as *mut c_void) }.unwrap();
    let again = Import::find("libstacked.so", "cudaMalloc").unwrap();
    assert_eq!(again.original() as usize, replacement as *const () as usize);
    // SAFETY: the same signature, and part of this program.
    let second = unsafe { again.redirect(other as *mut c_void) }.unwrap();
    assert!(!first.undo().unwrap());
    assert_eq!(allocate(&library, 5), 99);
    assert!(second.undo().unwrap());
    assert_eq!(allocate(&library, 5), 5);
}

#[test]
fn what_is_missing_is_named() {
    let error = Import::find("libnothing_of_this_name.so", "cudaMalloc").unwrap_err();
    assert_eq!(error.to_string(), "no shared object of this name is loaded: libnothing_of_this_name.so");
    let folder = tempfile::tempdir().unwrap();
    let path = caller(folder.path(), "other", &[]);
    // SAFETY: what was compiled above does nothing when loaded.
    let _library = unsafe { Library::open(Some(&path), RTLD_NOW).unwrap() };
    let error = Import::find("libother.so", "cudaMallocAsync").unwrap_err();
    assert!(
        matches!(&error, ImportError::NotImported { function, .. } if function == "cudaMallocAsync"),
        "{error}"
    );
    // It has the function, and calls it by no slot.
    let error = Import::find("libruntime_other.so", "cudaMalloc").unwrap_err();
    assert!(matches!(error, ImportError::NotImported { .. }), "{error}");
}

#[test]
fn an_object_that_was_looked_at_stays_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = caller(folder.path(), "kept", &[]);
    // SAFETY: what was compiled above does nothing when loaded.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW).unwrap() };
    let import = Import::find("libkept.so", "cudaMalloc").unwrap();
    drop(library);
    assert!(Import::find("libkept.so", "cudaMalloc").is_ok());
    drop(import);
    assert_eq!(
        Import::find("libkept.so", "cudaMalloc").unwrap_err(),
        ImportError::NotLoaded { object: "libkept.so".to_owned() }
    );
}

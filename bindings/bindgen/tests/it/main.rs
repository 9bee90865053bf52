//! The Swift that is committed is what the generator writes for the library as it is now, the wheel's library has the same
//! surface, and its Python is made light.
//! `MKA_WRITE=1 cargo test -p mka-bindgen` writes it anew.

use std::path::{Path, PathBuf};
use std::process::Command;

// Cargo builds what is only named in a manifest no library for: the generator reads this one.
use mka_bindings as _;

/// Where cargo puts the libraries that this test depends on.
fn library(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let name = format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    this.parent().unwrap().join(name)
}

/// The generator's files of `kind` for a library by name, without spaces at the ends of lines.
fn generated(library: &Path, kind: &str) -> Vec<(String, String)> {
    let folder = tempfile::tempdir().unwrap();
    let mut generator = Command::new(env!("CARGO_BIN_EXE_uniffi-bindgen-swift"));
    let status = generator.arg(library).arg(folder.path()).arg(kind).status().unwrap();
    assert!(status.success());
    let files = std::fs::read_dir(folder.path()).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), lines.join("\n") + "\n")
    });
    files.collect()
}

#[test]
fn the_committed_swift_is_what_the_generator_writes() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR")).join("../swift");
    for (kind, folder) in [("--swift-sources", "MKABindings"), ("--headers", "CMKA")] {
        for (name, text) in generated(&library("mka_bindings"), kind) {
            let path = package.join("Sources").join(folder).join(&name);
            if std::env::var_os("MKA_WRITE").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            let committed = std::fs::read_to_string(&path).unwrap();
            assert!(
                committed == text,
                "{name} is out of date: `MKA_WRITE=1 cargo test -p mka-bindgen` writes it anew"
            );
        }
    }
}

#[test]
fn the_library_of_the_wheel_has_the_whole_surface() {
    let [of_the_wheel, alone] =
        ["mka_python", "mka_bindings"].map(|name| generated(&library(name), "--swift-sources"));
    assert!(of_the_wheel == alone, "mka_python has another surface than mka_bindings");
}

#[test]
fn the_generated_python_imports_no_asyncio_and_makes_no_dataclass() {
    let folder = tempfile::tempdir().unwrap();
    let generate = |language: &str| {
        Command::new(env!("CARGO_BIN_EXE_uniffi-bindgen"))
            .args(["generate", "--no-format", "--language", language, "--out-dir"])
            .arg(folder.path())
            .arg("--library")
            .arg(library("mka_python"))
            .output()
            .unwrap()
    };
    assert!(generate("python").status.success());
    let text = std::fs::read_to_string(folder.path().join("mka_bindings.py")).unwrap();
    let asyncio: Vec<&str> = text.lines().filter(|line| line.contains("import asyncio")).collect();
    assert_eq!(asyncio, ["        import asyncio"]);
    assert!(!text.contains("dataclass"));
    assert!(text.contains("class NativeEngine"));
    assert!(!generate("cobol").status.success());
}

//! Sets `MKA_BUILD_REVISION`: the commit that the evaluations are built from, with "+changes" where their sources are not
//! its own; empty where git does not know them, as in a source archive, where nothing else is asked and the build goes on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the program is made of, from the workspace's root: a change of it is a change of the program, which is compiled
/// again with this.
const SOURCES: [&str; 15] = [
    "Cargo.lock",
    "Cargo.toml",
    "engine/Cargo.toml",
    "engine/src",
    "evals/Cargo.toml",
    "evals/build.rs",
    "evals/data",
    "evals/src",
    "kernels/Cargo.toml",
    "kernels/build.rs",
    "kernels/cuda",
    "kernels/src",
    "memory/Cargo.toml",
    "memory/src",
    ".cargo",
];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let package = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let revision = package.parent().and_then(revision).unwrap_or_default();
    println!("cargo:rustc-env=MKA_BUILD_REVISION={revision}");
}

fn revision(root: &Path) -> Option<String> {
    // A copy within another repository is of none of its commits.
    let top = PathBuf::from(git(root, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    // Where HEAD of this tree points, and each time that it moved: of other trees' branches nothing.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(root, &["rev-parse", "--git-path", name]) {
            watch(&root.join(path));
        }
    }
    if let Some(branch) = git(root, &["symbolic-ref", "--quiet", "HEAD"])
        && let Some(path) = git(root, &["rev-parse", "--git-path", &branch])
    {
        watch(&root.join(path));
    }
    for source in SOURCES {
        watch(&root.join(source));
    }
    let commit = git(root, &["rev-parse", "--short=12", "HEAD"])?;
    let status = ["--no-optional-locks", "status", "--porcelain", "--"];
    let changes = git(root, &[&status[..], &SOURCES[..]].concat());
    Some(match changes {
        Some(changes) if changes.is_empty() => commit,
        _ => format!("{commit}+changes"),
    })
}

/// A path that is not there would count as changed in every build.
fn watch(path: &Path) {
    if path.exists() {
        println!("cargo:rerun-if-changed={}", path.display());
    }
}

/// What git says; None where there is no git, or it refuses.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").current_dir(root).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

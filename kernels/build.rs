//! Compiles `cuda/*.cu` into one fat binary each where the feature `cuda` is on, and lists them for `src/cuda.rs`.
//! Uses no network. A file is compiled again only if it, a header beside it, the flags or nvcc changed.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for A100 and Hopper (the `a` set, which wgmma needs), and PTX for every other card since A100.
const TARGETS: &[&str] = &[
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
];

/// Of files whose name ends in `_sm90`: machine code for compute capability 9.0 alone.
const TARGETS_SM90: &[&str] = &["-gencode=arch=compute_90a,code=sm_90a"];

const FLAGS: &[&str] = &["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--compress-mode=size"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Without nvcc nothing depends on where it is: a change of PATH would compile the whole workspace again.
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=cuda");
    for name in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if let Err(message) = compile() {
        // One line a cause: cargo prefixes each.
        for line in message.lines() {
            println!("cargo:error={line}");
        }
        std::process::exit(1);
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = find_nvcc()?;
    let version = run(Command::new(&nvcc).arg("--version"))?;
    let (mut sources, mut headers) = (Vec::new(), Vec::new());
    let folder = fs::read_dir("cuda").map_err(|e| format!("read cuda/: {e}"))?;
    for entry in folder {
        let path = entry.map_err(|e| format!("read cuda/: {e}"))?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    sources.sort();
    headers.sort();
    let mut shared = DefaultHasher::new();
    (&version, FLAGS, TARGETS, TARGETS_SM90).hash(&mut shared);
    for header in &headers {
        read(header)?.hash(&mut shared);
    }
    let shared = shared.finish();

    let mut list = String::from("pub(super) static FATBINS: &[(&str, &[u8])] = &[\n");
    let mut jobs = Vec::new();
    for source in &sources {
        let mut hasher = DefaultHasher::new();
        (shared, read(source)?).hash(&mut hasher);
        let stem = source.file_stem().and_then(|stem| stem.to_str()).ok_or("name of a source")?;
        let fatbin = out.join(format!("{stem}-{:016x}.fatbin", hasher.finish()));
        if !fatbin.exists() {
            jobs.push((source.clone(), fatbin.clone()));
        }
        writeln!(list, "    ({stem:?}, include_bytes!({:?})),", fatbin.display().to_string())
            .map_err(|e| e.to_string())?;
    }
    list.push_str("];\n");
    compile_all(&nvcc, &jobs)?;
    fs::write(out.join("fatbins.rs"), list).map_err(|e| format!("write fatbins.rs: {e}"))
}

/// Compiles on as many threads as cargo gave this build.
fn compile_all(nvcc: &Path, jobs: &[(PathBuf, PathBuf)]) -> Result<(), String> {
    let threads = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let worker = || -> Result<(), String> {
        while let Some((source, fatbin)) =
            jobs.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
        {
            // Written under another name first: a build that is killed leaves no half file behind.
            let partial = fatbin.with_extension("partial");
            let mut command = Command::new(nvcc);
            command.args(FLAGS).args(targets(source)).arg("-o").arg(&partial).arg(source);
            run(&mut command)?;
            fs::rename(&partial, fatbin).map_err(|e| format!("{}: {e}", fatbin.display()))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|_| Err("a compiling thread panicked".into()))
        })
    })
}

fn targets(source: &Path) -> &'static [&'static str] {
    let stem = source.file_stem().and_then(|stem| stem.to_str());
    if stem.is_some_and(|stem| stem.ends_with("_sm90")) { TARGETS_SM90 } else { TARGETS }
}

fn find_nvcc() -> Result<PathBuf, String> {
    let mut candidates = Vec::new();
    candidates.extend(env::var_os("NVCC").map(PathBuf::from));
    candidates
        .extend(env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin").join("nvcc")));
    candidates.extend(
        env::split_paths(&env::var_os("PATH").unwrap_or_default())
            .map(|folder| folder.join("nvcc")),
    );
    candidates.push(PathBuf::from("/usr/local/cuda/bin/nvcc"));
    candidates.iter().find(|path| path.is_file()).cloned().ok_or_else(|| {
        "feature `cuda` of mka-kernels: expected nvcc at $NVCC, in $CUDA_HOME/bin, on PATH or in /usr/local/cuda/bin, found none\n\
         install the CUDA 13.0 toolkit, or run kernels/scripts/cuda_setup.sh and source kernels/scripts/cuda_env.sh"
            .to_owned()
    })
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))
}

fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("run {command:?}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!(
            "{command:?}: {}\n{}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        ))
    }
}

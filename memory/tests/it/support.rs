//! Opening stores and filling them, for all tests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mka_memory::{
    Backend, Commit, Committed, EncryptionKey, HashedEmbedder, NewTurn, Role, Scope, Store,
    StoreOptions,
};

/// Both databases: a test that depends on what is on the disk passes with each.
pub(crate) const BACKENDS: [Backend; 2] = [Backend::Sled, Backend::Redb];

pub(crate) fn open(path: &Path) -> Store {
    try_open(path).unwrap()
}

pub(crate) fn try_open(path: &Path) -> mka_memory::Result<Store> {
    open_with(path, StoreOptions::default())
}

pub(crate) fn open_with(path: &Path, options: StoreOptions) -> mka_memory::Result<Store> {
    Store::open(path, Arc::new(HashedEmbedder::new()), options)
}

/// A store that keeps its records in `backend` if it is new.
pub(crate) fn open_as(path: &Path, backend: Backend) -> Store {
    open_with(path, StoreOptions { backend, ..StoreOptions::default() }).unwrap()
}

/// A store that is encrypted with a key of `byte`s.
pub(crate) fn keyed(path: &Path, byte: u8) -> mka_memory::Result<Store> {
    let key = Some(EncryptionKey::new([byte; 32]));
    open_with(path, StoreOptions { key, ..StoreOptions::default() })
}

pub(crate) fn trip() -> Scope {
    Scope::user("ada").session("trip")
}

/// Commits turns of one role.
pub(crate) fn say(store: &Store, scope: &Scope, role: Role, texts: &[&str]) -> Committed {
    let turns = texts.iter().map(|text| NewTurn::new(role, *text)).collect();
    store.commit(scope, Commit { turns, ..Commit::default() }).unwrap()
}

/// Every file below `path`.
pub(crate) fn files(path: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(self::files(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The files below `path` that hold `needle`, letter case aside.
pub(crate) fn files_with(path: &Path, needle: &str) -> Vec<PathBuf> {
    let needle = needle.to_ascii_lowercase();
    let holds = |file: &PathBuf| -> std::io::Result<bool> {
        let bytes = std::fs::read(file)?.to_ascii_lowercase();
        Ok(bytes.windows(needle.len()).any(|window| window == needle.as_bytes()))
    };
    loop {
        let files = files(path).into_iter();
        let held = files.map(|file| Ok(holds(&file)?.then_some(file)));
        match held.collect::<std::io::Result<Vec<_>>>() {
            // Replaced by another since it was listed: an index is written in the background.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            held => return held.unwrap().into_iter().flatten().collect(),
        }
    }
}

/// Text that is different for every number, of about `words` words.
pub(crate) fn prose(number: u64, words: usize) -> String {
    const WORDS: [&str; 24] = [
        "river", "engine", "window", "garden", "letter", "market", "winter", "signal", "copper",
        "harbor", "the", "of", "and", "quietly", "carried", "opened", "between", "under", "seven",
        "morning", "painted", "promise", "travels", "slowly",
    ];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let mut text = format!("Note {number} begins.");
    for word in 0..words {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let pick = WORDS[(state >> 33) as usize % WORDS.len()];
        text.push(' ');
        text.push_str(pick);
        if word % 7 == 3 {
            text.push_str(&format!("{}", (state >> 40) % 10_000));
        }
        if word % 14 == 13 {
            text.push('.');
        }
    }
    text
}

/// Copies the files of a folder and of those in it.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for file in files(from) {
        let to = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&file, &to).unwrap();
    }
}

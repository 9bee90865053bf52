//! What is written beside the place that it takes once it is whole: its name, and what writers that died left there.
//! Knows nothing of what is written.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::{Error, Result};

/// Calls of this process so far.
static NUM_NAMED: AtomicU64 = AtomicU64::new(0);
/// Held from looking for leftovers until what is made is locked.
static MAKING: Mutex<()> = Mutex::new(());

/// What is made beside `path` under a name that nothing has: one that was cancelled may write on beside the one that follows
/// it, and one that died may have left what it wrote under the same number of a process.
///
/// `make` makes it at the path that it is given, which must not be there, and says by a lock that somebody writes it. What
/// others left is removed first, for none of this process is between making and locking then.
pub(super) fn beside<T>(
    path: &Path,
    make: impl Fn(&Path) -> std::io::Result<T>,
) -> Result<(PathBuf, T)> {
    let name = path.file_name().ok_or_else(|| {
        Error::invalid(format!("write: expected a name at the end of {}", path.display()))
    })?;
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    remove_left(path);
    loop {
        let number = NUM_NAMED.fetch_add(1, Ordering::Relaxed);
        let mut name = name.to_owned();
        name.push(format!(".{}-{number}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        match make(&partial) {
            Ok(made) => return Ok((partial, made)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => return Err(Error::io("create", &partial, source)),
        }
    }
}

/// The folder that `path` lies in.
pub(super) fn folder_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// Removes what was left beside `path` for it: who still writes there holds a lock, on the file itself or on `LOCK` in the
/// folder. What cannot be locked, read or removed stays.
fn remove_left(path: &Path) {
    let Ok(entries) = std::fs::read_dir(folder_of(path)) else { return };
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_str().is_some_and(|left| is_partial(name, left)) {
            continue;
        }
        let left = entry.path();
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let locked = if is_folder { left.join("LOCK") } else { left.clone() };
        if !is_unused(&locked) {
            continue;
        }
        let removed =
            if is_folder { std::fs::remove_dir_all(&left) } else { std::fs::remove_file(&left) };
        if let Err(error) = removed {
            tracing::warn!(path = %left.display(), %error, "leftover not removed");
        }
    }
}

/// Whether `left` is what a process names a partial `name`.
fn is_partial(name: &str, left: &str) -> bool {
    let middle = left.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
    let middle = middle.and_then(|rest| rest.strip_suffix(".partial"));
    let numbers = middle.and_then(|middle| middle.split_once('-'));
    numbers.is_some_and(|(process, number)| {
        process.parse::<u32>().is_ok() && number.parse::<u64>().is_ok()
    })
}

/// Whether nobody holds the file's lock.
fn is_unused(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.is_ok_and(|file| file.try_lock().is_ok())
}

//! What is written beside the place that it takes once it is whole: its name, and what writers that died left there.
//! Knows nothing of what is written.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Calls of this process so far.
static NUM_NAMED: AtomicU64 = AtomicU64::new(0);

/// A path beside `path` that no other call has: one that was cancelled may write on beside the one that follows it.
pub(super) fn beside(path: &Path) -> Result<PathBuf> {
    let mut name = path.file_name().map(ToOwned::to_owned).ok_or_else(|| {
        Error::invalid(format!("write: expected a name at the end of {}", path.display()))
    })?;
    let number = NUM_NAMED.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{number}.partial", std::process::id()));
    Ok(path.with_file_name(name))
}

/// Removes what other processes left beside `path` for it: who still writes there holds a lock, on the file itself or on
/// `LOCK` in the folder. What cannot be locked, read or removed stays.
pub(super) fn remove_left(path: &Path) {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let Ok(entries) = std::fs::read_dir(parent.unwrap_or(Path::new("."))) else { return };
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().to_str().is_some_and(|left| is_of_another(name, left)) {
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

/// Whether `left` is what another process names a partial `name`. Calls of this one clear up by themselves.
fn is_of_another(name: &str, left: &str) -> bool {
    let middle = left.strip_prefix(name).and_then(|rest| rest.strip_prefix('.'));
    let middle = middle.and_then(|rest| rest.strip_suffix(".partial"));
    let numbers = middle.and_then(|middle| middle.split_once('-'));
    numbers.is_some_and(|(process, number)| {
        number.parse::<u64>().is_ok()
            && process.parse::<u32>().is_ok_and(|process| process != std::process::id())
    })
}

/// Whether nobody holds the file's lock.
fn is_unused(path: &Path) -> bool {
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.is_ok_and(|file| file.try_lock().is_ok())
}

//! Which database a store has: the two that come with the crate, told apart by their files.
//! Knows nothing of what a record means.

mod redb_file;
mod sled_tree;

use std::fs::File;
use std::path::Path;

use self::redb_file::RedbFile;
use self::sled_tree::SledTree;
use super::segment::sync_folder;
use crate::{Backend, Error, Result, Storage};

/// The folder of the database inside a store's folder.
pub(super) const FOLDER: &str = "db";

/// Where a new database is made before it takes its place: one that is half made is never opened.
const NEW_FOLDER: &str = "db.make";

/// Opens the database in the store's folder `path`: the one that is there, or a new one of the kind `backend`.
pub(super) fn open(path: &Path, backend: Backend) -> Result<Box<dyn Storage>> {
    sled_tree::finish_swap(path)?;
    let folder = path.join(FOLDER);
    let new = path.join(NEW_FOLDER);
    remove_folder(&new)?;
    if !folder.exists() {
        drop(open_in(&new, backend)?);
        sync_files(&new)?;
        rename(&new, &folder)?;
        sync_folder(path)?;
    }
    open_in(&folder, present(&folder).unwrap_or(backend))
}

fn open_in(folder: &Path, backend: Backend) -> Result<Box<dyn Storage>> {
    Ok(match backend {
        Backend::Sled => Box::new(SledTree::open(folder)?),
        Backend::Redb => Box::new(RedbFile::open(folder)?),
    })
}

/// Makes a folder's files durable, and their names.
fn sync_files(folder: &Path) -> Result<()> {
    let failed = |source| Error::io("sync", folder, source);
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_file() {
            File::open(entry.path()).and_then(|file| file.sync_all()).map_err(failed)?;
        }
    }
    sync_folder(folder)
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|source| Error::io("rename", from, source))
}

pub(super) fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", folder, error))
        }
        _ => Ok(()),
    }
}

/// The database in `folder`, told by its file.
pub(super) fn present(folder: &Path) -> Option<Backend> {
    if folder.join(redb_file::FILE).exists() {
        Some(Backend::Redb)
    } else if folder.join(sled_tree::FILE).exists() {
        Some(Backend::Sled)
    } else {
        None
    }
}

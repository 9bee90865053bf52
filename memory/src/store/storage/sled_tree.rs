//! sled as the database of small records: one tree, one atomic and durable batch at a time.
//! Knows nothing of what a record means.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{remove_folder, rename};
use crate::storage::{RecordChange, Visit};
use crate::store::segment::sync_folder;
use crate::{Error, ErrorKind, Result, Storage};

/// sled's one data file.
pub(super) const FILE: &str = "db";
/// sled's page cache. Records are read once, at open: a small one serves.
const CACHE_BYTES: u64 = 16 << 20;
/// Records copied in one batch while compacting: bounds its memory.
const COPY_RECORDS: usize = 4096;
/// Starting a program takes milliseconds, on a loaded machine some hundred of them.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The open database.
pub(super) struct SledTree {
    folder: PathBuf,
    /// None only if compaction failed between closing the old files and opening the new ones.
    db: Option<sled::Db>,
}

impl SledTree {
    /// Opens or creates the database in `folder`.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        remove_unfinished_snapshots(folder)?;
        let is_new = !folder.join(FILE).exists();
        let db = guard("open", folder, || open_unlocked(&config(folder)))?;
        if is_new {
            sync_folder(folder)?;
        }
        Ok(Self { folder: folder.to_owned(), db: Some(db) })
    }

    /// Copies every record to a new database in `new`, whose files are on the disk when this returns.
    fn copy_to(&self, new: &Path) -> Result<()> {
        remove_folder(new)?;
        let mut copy = Self::open(new)?;
        let mut batch = Vec::new();
        self.scan(&[], &mut |key, value| {
            batch.push((key.to_vec(), Some(value.to_vec())));
            if batch.len() == COPY_RECORDS {
                copy.write(&batch)?;
                batch.clear();
            }
            Ok(())
        })?;
        copy.write(&batch)?;
        drop(copy);
        super::sync_files(new)
    }

    fn db(&self) -> Result<&sled::Db> {
        self.db.as_ref().ok_or_else(|| {
            Error::new(
                ErrorKind::Storage,
                format!(
                    "records {}: an earlier compaction failed, open the store again",
                    self.folder.display()
                ),
            )
        })
    }
}

impl Storage for SledTree {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let db = self.db()?;
        guard("read", &self.folder, || Ok(db.get(key)?.map(|value| value.to_vec())))
    }

    fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> Result<()> {
        let db = self.db()?;
        let mut entries = guard("read", &self.folder, || Ok(db.range(from..)))?;
        while let Some((key, value)) = guard("read", &self.folder, || entries.next().transpose())? {
            each(&key, &value)?;
        }
        Ok(())
    }

    fn write(&mut self, changes: &[RecordChange]) -> Result<()> {
        let db = self.db()?;
        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.insert(key.as_slice(), value.as_slice()),
                None => batch.remove(key.as_slice()),
            }
        }
        guard("write", &self.folder, || {
            db.apply_batch(batch)?;
            db.flush()
        })?;
        sync(&self.folder)
    }

    fn disk_bytes(&self) -> Result<u64> {
        let db = self.db()?;
        guard("read", &self.folder, || db.size_on_disk())
    }

    /// sled never shrinks its files: what is alive is copied to a new folder that takes the old one's place.
    fn compact(&mut self) -> Result<()> {
        let (new, old) = (beside(&self.folder, "new"), beside(&self.folder, "old"));
        let parent = self.folder.parent().unwrap_or(Path::new(".")).to_owned();
        let copied = self.copy_to(&new).and_then(|()| sync_folder(&parent));
        if copied.is_err() {
            // It may have failed for lack of the room that the copy takes. The next one removes what stays.
            let _ = remove_folder(&new);
            return copied;
        }
        self.db = None;
        if let Err(error) = rename(&self.folder, &old) {
            // Nothing was moved: the old one goes on.
            *self = Self::open(&self.folder)?;
            let _ = remove_folder(&new);
            return Err(error);
        }
        sync_folder(&parent)?;
        finish_swap(&parent)?;
        *self = Self::open(&self.folder)?;
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.folder
    }
}

fn config(folder: &Path) -> sled::Config {
    sled::Config::new().path(folder).cache_capacity(CACHE_BYTES).flush_every_ms(None)
}

/// Syncs what a flush wrote: on Linux sled flushes with sync_file_range alone, which neither writes the file's size
/// nor empties the drive's cache.
fn sync(folder: &Path) -> Result<()> {
    let file = folder.join(FILE);
    File::open(&file)
        .and_then(|file| file.sync_all())
        .map_err(|source| Error::io("sync", &file, source))
}

/// `db` with a suffix: the folder that a compaction writes, or the one that it replaces.
fn beside(folder: &Path, suffix: &str) -> PathBuf {
    folder.with_extension(suffix)
}

/// Completes or undoes a compaction that was interrupted, in the store's folder `path`.
///
/// The old folder is moved away only after the new one is whole and on the disk:
/// where both are there the old one counts, where the old one is gone the new one takes its place.
pub(super) fn finish_swap(path: &Path) -> Result<()> {
    let folder = path.join(super::FOLDER);
    let (new, old) = (beside(&folder, "new"), beside(&folder, "old"));
    if !folder.exists() && new.exists() {
        rename(&new, &folder)?;
        sync_folder(path)?;
    }
    remove_folder(&new)?;
    remove_folder(&old)
}

/// Opens the database, waiting for sled's own lock on its file.
///
/// The store's lock is held by now, so no other store has the database open. What may still hold sled's lock is a
/// process that another thread is starting just now: it has a copy of the file until it runs its program.
fn open_unlocked(config: &sled::Config) -> sled::Result<sled::Db> {
    let started = Instant::now();
    loop {
        match config.open() {
            // sled has no error kind of its own for this.
            Err(sled::Error::Io(error))
                if error.to_string().starts_with("could not acquire lock")
                    && started.elapsed() < LOCK_PATIENCE =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

/// sled cannot open a folder where it died while writing a snapshot; the unfinished file holds nothing needed.
fn remove_unfinished_snapshots(folder: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "generating") {
            std::fs::remove_file(&path)
                .map_err(|source| Error::io("open: remove", &path, source))?;
        }
    }
    Ok(())
}

/// Runs a call into sled, which answers some damage with a panic instead of an error.
fn guard<T>(operation: &str, path: &Path, call: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    let failed = |kind, text: String| {
        Error::new(kind, format!("{operation} records {}: {text}", path.display()))
    };
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => {
            let kind = match source {
                // The last two are how sled reports some damage to its own settings and pages.
                sled::Error::Corruption { .. }
                | sled::Error::Unsupported(_)
                | sled::Error::ReportableBug(_) => ErrorKind::Corrupted,
                _ => ErrorKind::Storage,
            };
            Err(failed(kind, source.to_string()).with_source(source))
        }
        Err(_) => Err(failed(ErrorKind::Corrupted, "the database cannot be read".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_fails_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let mut tree = SledTree::open(&parent.path().join("db")).unwrap();
        tree.write(&[(vec![1], Some(vec![2]))]).unwrap();
        let db = tree.db.take();
        // What is to be copied cannot be read.
        assert!(tree.compact().is_err());
        assert!(!parent.path().join("db.new").exists());
        tree.db = db;
        tree.compact().unwrap();
        assert_eq!(tree.get(&[1]).unwrap(), Some(vec![2]));
    }

    #[test]
    fn a_database_that_cannot_be_moved_goes_on() {
        let parent = tempfile::tempdir().unwrap();
        let mut tree = SledTree::open(&parent.path().join("db")).unwrap();
        std::fs::create_dir_all(parent.path().join("db.old/full")).unwrap();
        assert!(tree.compact().is_err());
        assert!(!parent.path().join("db.new").exists());
        tree.write(&[(vec![1], Some(vec![2]))]).unwrap();
        assert_eq!(tree.get(&[1]).unwrap(), Some(vec![2]));
    }
}

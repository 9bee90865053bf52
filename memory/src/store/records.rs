//! The database of small records: one sled tree, one atomic and durable batch at a time.
//! Knows nothing of what a record means; keys and values come encoded by `format`.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::format::{Key, Record};
use crate::{Error, ErrorKind, Result};

/// sled's page cache. Records are read once, at open: a small one serves.
const CACHE_BYTES: u64 = 16 << 20;

/// Starting a program takes milliseconds, on a loaded machine some hundred of them.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// One change of a batch.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    pub(crate) key: Key,
    /// None removes the record.
    pub(crate) record: Option<Record>,
}

impl Change {
    pub(crate) fn put(key: Key, record: Record) -> Self {
        Self { key, record: Some(record) }
    }

    pub(crate) fn remove(key: Key) -> Self {
        Self { key, record: None }
    }
}

/// The open database.
pub(crate) struct Records {
    db: sled::Db,
    /// sled's one data file, to be synced after each flush.
    file: PathBuf,
}

impl Records {
    /// Opens or creates the database in `folder`.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        remove_unfinished_snapshots(folder)?;
        let config =
            sled::Config::new().path(folder).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let db = guard("open", folder, || open_unlocked(&config))?;
        Ok(Self { db, file: folder.join("db") })
    }

    /// Every key and value, as stored.
    pub(crate) fn scan(&self) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        guard("read", &self.file, || {
            self.db
                .iter()
                .map(|entry| entry.map(|(key, value)| (key.to_vec(), value.to_vec())))
                .collect::<sled::Result<Vec<_>>>()
        })
    }

    /// Applies all changes or none; they are on the disk when this returns.
    /// After an error it is unknown which of the two happened, until the store is opened again.
    pub(crate) fn write(&self, changes: &[Change]) -> Result<()> {
        let mut batch = sled::Batch::default();
        for change in changes {
            let key = change.key.encode();
            match &change.record {
                Some(record) => batch.insert(key, record.encode(&change.key)),
                None => batch.remove(key),
            }
        }
        guard("write", &self.file, || {
            self.db.apply_batch(batch)?;
            self.db.flush()
        })?;
        // On Linux sled flushes with sync_file_range alone, which neither writes the file's size
        // nor empties the drive's cache.
        File::open(&self.file)
            .and_then(|file| file.sync_all())
            .map_err(|source| Error::io("sync", &self.file, source))
    }
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

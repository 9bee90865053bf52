//! redb as the database of small records: one table in one file, one synced transaction a batch.
//! Knows nothing of what a record means.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, TableDefinition};

use crate::storage::{RecordChange, Visit};
use crate::store::segment::sync_folder;
use crate::{Error, ErrorKind, Result, Storage};

/// redb's one file.
pub(super) const FILE: &str = "records.redb";
/// redb's page cache. Records are read once, at open: a small one serves.
const CACHE_BYTES: usize = 16 << 20;
const TABLE: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("records");

/// The open database.
pub(super) struct RedbFile {
    file: PathBuf,
    /// None only while it is dropped.
    db: Option<Database>,
}

impl RedbFile {
    /// Opens or creates the database in `folder`.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|source| Error::io("create", folder, source))?;
        let file = folder.join(FILE);
        let is_new = !file.exists();
        let db = guard("open", &file, || {
            let mut db = Database::builder().set_cache_size(CACHE_BYTES).create(&file)?;
            // redb trusts its free lists and its tree until they lead it astray, in a commit or in closing.
            // What the check repairs by going back one commit, the store's own log shows.
            db.check_integrity()?;
            // A table that was never written cannot be read.
            let transaction = db.begin_write()?;
            transaction.open_table(TABLE)?;
            transaction.commit()?;
            Ok(db)
        })?;
        if is_new {
            sync_folder(folder)?;
        }
        Ok(Self { file, db: Some(db) })
    }

    fn db(&self) -> std::result::Result<&Database, redb::Error> {
        self.db.as_ref().ok_or(redb::Error::DatabaseClosed)
    }
}

impl Drop for RedbFile {
    /// Closing writes what redb knows of free pages; where that is damaged it panics. No record is in it.
    fn drop(&mut self) {
        let db = self.db.take();
        let _ = guard("close", &self.file, || {
            drop(db);
            Ok(())
        });
    }
}

impl Storage for RedbFile {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        guard("read", &self.file, || {
            let table = self.db()?.begin_read()?.open_table(TABLE)?;
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        })
    }

    fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> Result<()> {
        let mut entries = guard("read", &self.file, || {
            Ok(self.db()?.begin_read()?.open_table(TABLE)?.range(from..)?)
        })?;
        while let Some((key, value)) =
            guard("read", &self.file, || Ok(entries.next().transpose()?))?
        {
            // Where a record's bytes lie is read from the page only now, and damage makes that panic too.
            let (key, value) = guard("read", &self.file, || Ok((key.value(), value.value())))?;
            each(key, value)?;
        }
        Ok(())
    }

    fn write(&mut self, changes: &[RecordChange]) -> Result<()> {
        guard("write", &self.file, || {
            let transaction = self.db()?.begin_write()?;
            {
                let mut table = transaction.open_table(TABLE)?;
                for (key, value) in changes {
                    match value {
                        Some(value) => table.insert(key.as_slice(), value.as_slice())?,
                        None => table.remove(key.as_slice())?,
                    };
                }
            }
            Ok(transaction.commit()?)
        })
    }

    fn disk_bytes(&self) -> Result<u64> {
        let metadata = std::fs::metadata(&self.file);
        metadata.map(|m| m.len()).map_err(|source| Error::io("read", &self.file, source))
    }

    fn compact(&mut self) -> Result<()> {
        // One call moves what it can; it says whether another may free more.
        while guard("compact", &self.file, || {
            Ok(self.db.as_mut().ok_or(redb::Error::DatabaseClosed)?.compact()?)
        })? {}
        Ok(())
    }

    fn path(&self) -> &Path {
        &self.file
    }
}

/// Runs a call into redb; some damage makes it panic instead of returning an error.
fn guard<T>(
    operation: &str,
    path: &Path,
    call: impl FnOnce() -> std::result::Result<T, redb::Error>,
) -> Result<T> {
    let failed = |kind, text: String| {
        Error::new(kind, format!("{operation} records {}: {text}", path.display()))
    };
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(source)) => {
            let kind = match &source {
                redb::Error::Corrupted(_) | redb::Error::UpgradeRequired(_) => ErrorKind::Corrupted,
                // redb answers a file that is not its own with this kind of I/O error.
                redb::Error::Io(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof
                    ) =>
                {
                    ErrorKind::Corrupted
                }
                _ => ErrorKind::Storage,
            };
            Err(failed(kind, source.to_string()).with_source(source))
        }
        Err(_) => Err(failed(ErrorKind::Corrupted, "the database cannot be read".into())),
    }
}

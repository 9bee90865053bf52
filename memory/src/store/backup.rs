//! Backups: a copy of the store as it is at one moment, made while it is open.
//! Knows nothing of what the files hold; an encrypted store's copy is encrypted.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::lock::Lock;
use super::segment::{Segment, sync_folder};
use super::{Store, partial, storage};
use crate::{Cancel, Error, Result};

/// Bytes copied at once.
const PIECE_BYTES: u64 = 4 << 20;
/// Records written to the copy's database at once.
const BATCH_RECORDS: usize = 4096;

/// What a backup wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Backup {
    /// Segment files.
    pub segments: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Records of the database.
    pub records: usize,
}

impl Store {
    /// Copies the store to `folder`, which does not exist yet: whole commits only, as of one moment during the call.
    ///
    /// The copy is a store: open it to restore it. It appears under its name when all of it is on the disk; until then it is
    /// beside it, as `NAME.PROCESS-NUMBER.partial`. What processes that died left under such a name of it is removed.
    /// Readers and writers go on meanwhile; writers wait while the database's records are read.
    /// [`forget`](Self::forget) does not reach into backups.
    ///
    /// # Errors
    /// `InvalidArgument` if there is something at `folder`; `Storage`; `Cancelled`. After one nothing is at `folder`.
    pub fn backup(&self, folder: &Path, cancel: &Cancel) -> Result<Backup> {
        if folder.exists() {
            return Err(Error::invalid(format!(
                "backup: expected nothing at {}",
                folder.display()
            )));
        }
        let name = folder.file_name().ok_or_else(|| {
            Error::invalid(format!(
                "backup: expected the name of a folder at the end of {}",
                folder.display()
            ))
        })?;
        // Beside the folder, and not in it, if the path ends with a slash.
        let folder = &folder.with_file_name(name);
        let parent = partial::folder_of(folder);
        std::fs::create_dir_all(parent).map_err(|source| Error::io("create", parent, source))?;
        // The lock says that somebody writes here. A file system without locks needs none: nobody removes what cannot be locked.
        let (partial, _lock) = &partial::beside(folder, |partial| {
            std::fs::create_dir(partial)?;
            Ok(Lock::take(partial).ok())
        })?;
        let done = self.copy_as(partial, folder, cancel);
        if done.is_err() {
            // The error that counts is the first one.
            let _ = storage::remove_folder(partial);
        }
        done
    }

    /// Copies to `partial`, which then is called `folder`.
    fn copy_as(&self, partial: &Path, folder: &Path, cancel: &Cancel) -> Result<Backup> {
        let done = self.copy_to(partial, cancel)?;
        std::fs::rename(partial, folder).map_err(|source| Error::io("rename", partial, source))?;
        sync_folder(partial::folder_of(folder))?;
        Ok(done)
    }

    fn copy_to(&self, folder: &Path, cancel: &Cancel) -> Result<Backup> {
        let segments_folder = folder.join("segments");
        std::fs::create_dir_all(&segments_folder)
            .map_err(|source| Error::io("create", &segments_folder, source))?;
        let (records, segments) = {
            let writer = self.writer()?;
            let state = self.read();
            let lengths =
                state.segments.values().map(|segment| Ok((segment.clone(), segment.len()?)));
            (writer.records.scan_raw()?, lengths.collect::<Result<Vec<_>>>()?)
        };
        let mut done = Backup { segments: segments.len(), records: records.len(), bytes: 0 };
        for (segment, len) in segments {
            copy_segment(&segment, len, &segments_folder, cancel)?;
            done.bytes += len;
        }
        let database = self.path.join(storage::FOLDER);
        let backend = storage::present(&database).unwrap_or(self.options.backend);
        let mut copy = storage::open(folder, backend)?;
        for batch in records.chunks(BATCH_RECORDS) {
            cancel.check("backup")?;
            copy.write(batch)?;
        }
        drop(copy);
        sync_folder(&segments_folder)?;
        sync_folder(folder)?;
        Ok(done)
    }
}

fn copy_segment(segment: &Segment, len: u64, folder: &Path, cancel: &Cancel) -> Result<()> {
    let name = segment.path().file_name().unwrap_or_default();
    let path = folder.join(name);
    let mut file = File::create(&path).map_err(|source| Error::io("create", &path, source))?;
    let mut at = 0;
    while at < len {
        cancel.check("backup")?;
        let piece = segment.read_raw(at, PIECE_BYTES.min(len - at) as usize)?;
        file.write_all(&piece).map_err(|source| Error::io("write", &path, source))?;
        at += piece.len() as u64;
    }
    file.sync_all().map_err(|source| Error::io("sync", &path, source))
}

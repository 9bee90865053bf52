//! The lock that keeps a second writer out of a store's folder.
//! Knows nothing of what the folder holds.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// Held as long as the store is open or a page of it is mapped; the operating system lets go of it when the process dies.
#[derive(Debug)]
pub(crate) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing alone is not enough: a process that another thread is starting just now holds a copy of the file
        // until it runs its program, and the lock with it.
        if let Err(error) = self.file.unlock() {
            tracing::warn!(%error, "lock not released before the file closes");
        }
    }
}

impl Lock {
    /// Takes the lock in `folder`, or says who has it.
    pub(crate) fn take(folder: &Path) -> Result<Self> {
        let path = folder.join("LOCK");
        let failed = |source| Error::io("open: lock file", &path, source);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                // The text is a help, not the lock: an unreadable one changes nothing.
                let _ = file.read_to_string(&mut pid);
                let pid = pid.trim();
                let pid = if pid.is_empty() { "unknown" } else { pid };
                return Err(Error::new(
                    ErrorKind::Locked,
                    format!(
                        "open {}: expected to be its only user, locked by pid {pid}",
                        folder.display()
                    ),
                ));
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let mut lock = Self { file };
        let written = lock
            .file
            .set_len(0)
            .and_then(|()| lock.file.rewind())
            .and_then(|()| write!(lock.file, "{}", std::process::id()));
        written.map_err(failed)?;
        Ok(lock)
    }
}

//! The folder of what is derived: each file is written whole beside its place, synced and renamed into it.
//! Knows no bytes of theirs; a file that is lost is made anew.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::segment::sync_folder;
use crate::vectors::Held;
use crate::{Error, Result};

/// A file mapped into memory.
struct Mapped(memmap2::Mmap);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The folder. Who changes it holds its lock, from the moment on at which the state is looked at for what to write:
/// whoever forgets something removes files after that, and what is written later knows of it.
#[derive(Debug, Clone)]
pub(super) struct IndexFolder {
    path: PathBuf,
    changing: Arc<Mutex<()>>,
}

/// The right to change the folder.
pub(super) struct Changing<'a> {
    folder: &'a IndexFolder,
    _lock: MutexGuard<'a, ()>,
}

impl IndexFolder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, changing: Arc::default() }
    }

    pub(super) fn lock(&self) -> Changing<'_> {
        let lock = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        Changing { folder: self, _lock: lock }
    }

    /// The names of its files.
    pub(super) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// Bytes of the files whose names end so.
    pub(super) fn disk_bytes(&self, ending: &str) -> u64 {
        let names = self.names().into_iter().filter(|name| name.ends_with(ending));
        names.filter_map(|name| std::fs::metadata(self.path.join(name)).ok()).map(|m| m.len()).sum()
    }

    /// A file, mapped; none if there is none.
    pub(super) fn map(&self, name: &str) -> Result<Option<Held>> {
        let path = self.path.join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::io("open", &path, source)),
        };
        // SAFETY: the file is this store's own, its folder is locked, and a file of it is never changed in place: it is
        // replaced by renaming another over it, which leaves the mapped one as it is.
        let mapped = unsafe { memmap2::Mmap::map(&file) };
        let mapped = mapped.map_err(|source| Error::io("map", &path, source))?;
        Ok(Some(Arc::new(Mapped(mapped))))
    }
}

impl Changing<'_> {
    /// Puts a file in its place, or leaves the one that is there.
    pub(super) fn replace(
        &self,
        name: &str,
        write: impl FnOnce(&mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()>,
    ) -> Result<()> {
        let folder = &self.folder.path;
        let (path, started) = (folder.join(name), folder.join(format!("{name}.new")));
        std::fs::create_dir_all(folder).map_err(|source| Error::io("create", folder, source))?;
        let written = File::create(&started).and_then(|file| {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            write(&mut |bytes| out.write_all(bytes))?;
            out.flush()?;
            out.get_ref().sync_all()
        });
        if let Err(source) = written {
            // What is left of it is removed at the next opening, if not now.
            let _ = std::fs::remove_file(&started);
            return Err(Error::io("write", &started, source));
        }
        std::fs::rename(&started, &path).map_err(|source| Error::io("rename", &path, source))?;
        sync_folder(folder)
    }

    /// Removes the files that are there of these, for good.
    pub(super) fn remove(&self, names: &[String]) -> Result<()> {
        let mut any = false;
        for name in names {
            let path = self.folder.path.join(name);
            match std::fs::remove_file(&path) {
                Ok(()) => any = true,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::io("remove", &path, source)),
            }
        }
        if any { sync_folder(&self.folder.path) } else { Ok(()) }
    }
}

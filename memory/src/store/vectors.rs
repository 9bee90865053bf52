//! The files that graphs are kept in, one a partition: written whole, renamed into place, mapped when read.
//! Knows no bytes (see `format::vectors`); a file that is lost or damaged is built anew.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::Store;
use super::segment::sync_folder;
use super::state::{PartitionKey, State};
use crate::format::vectors::{GraphFile, GraphHead};
use crate::partition::VectorName;
use crate::vectors::Held;
use crate::{Error, Result};

/// A file mapped into memory.
struct Mapped(memmap2::Mmap);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The folder of the graphs, and whose vectors they are over.
#[derive(Debug, Clone)]
pub(super) struct GraphFolder {
    path: PathBuf,
    /// One file is written at a time, each from names that are newer than those of the one before.
    writing: Arc<Mutex<()>>,
}

impl GraphFolder {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path, writing: Arc::default() }
    }

    /// Writes the graph of a partition, if it has one. Vectors that are gone leave no byte in it.
    /// The state is locked only while names are taken down: whoever forgets something meanwhile writes once more.
    pub(super) fn write(&self, state: &RwLock<State>, key: &PartitionKey) -> Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (head, graph, names) = {
            let state = state.read().unwrap_or_else(PoisonError::into_inner);
            let sealed = state.partitions.get(key).and_then(|partition| partition.sealed());
            let Some((graph, names)) = sealed else { return Ok(()) };
            (head(&state, key), graph, names)
        };
        let path = self.path.join(file_name(&head));
        let started = path.with_extension("new");
        std::fs::create_dir_all(&self.path)
            .map_err(|source| Error::io("create", &self.path, source))?;
        let failed = |source| Error::io("write", &started, source);
        let file = File::create(&started).map_err(failed)?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        GraphFile::write(&head, &graph, &names, &mut |bytes| out.write_all(bytes))
            .and_then(|()| out.flush())
            .and_then(|()| out.get_ref().sync_all())
            .map_err(failed)?;
        std::fs::rename(&started, &path).map_err(|source| Error::io("rename", &path, source))?;
        sync_folder(&self.path)
    }

    /// Bytes of its files.
    pub(super) fn disk_bytes(&self) -> u64 {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum()
    }

    fn remove(&self, name: &str) -> Result<()> {
        let path = self.path.join(name);
        std::fs::remove_file(&path).map_err(|source| Error::io("remove", &path, source))
    }
}

impl Store {
    /// Takes the graphs on the disk in. What does not fit is removed, and is built anew when it is due.
    pub(super) fn load_graphs(&self) {
        let Some(folder) = self.indexer.folder() else { return };
        let Ok(entries) = std::fs::read_dir(&folder.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Err(error) = self.load_graph(folder, &name) {
                tracing::warn!(file = name, %error, "a graph is built anew");
                if let Err(error) = folder.remove(&name) {
                    tracing::warn!(%error, "a graph that is of no use stays on the disk");
                }
            }
        }
    }

    fn load_graph(&self, folder: &GraphFolder, name: &str) -> Result<()> {
        let path = folder.path.join(name);
        let mut state = self.write();
        let key = state.partitions.keys().find(|key| file_name(&head(&state, key)) == name);
        let Some(key) = key.cloned() else {
            return Err(Error::corrupted(format!("read {}: nothing of its kind", path.display())));
        };
        let file = File::open(&path).map_err(|source| Error::io("open", &path, source))?;
        // SAFETY: the file is this store's own, its folder is locked, and a graph file is never changed in place: it is
        // replaced by renaming another over it, which leaves the mapped one as it is.
        let mapped = unsafe { memmap2::Mmap::map(&file) };
        let mapped = mapped.map_err(|source| Error::io("map", &path, source))?;
        let held: Held = Arc::new(Mapped(mapped));
        let GraphFile { graph, names } = GraphFile::read(&held, &head(&state, &key))
            .map_err(|error| Error::corrupted(format!("read {}: {error}", path.display())))?;
        let Some(partition) = state.partitions.get_mut(&key) else { return Ok(()) };
        let row = |name: VectorName| {
            name.and_then(|(id, at)| partition.row_of(id, at)).unwrap_or(u32::MAX)
        };
        let rows: Vec<u32> = names.into_iter().map(row).collect();
        partition.seal(Arc::new(graph), rows);
        Ok(())
    }

    /// Writes every graph that has lost rows anew without them: what was forgotten is in no file then.
    pub(super) fn rewrite_graphs(&self) -> Result<()> {
        let Some(folder) = self.indexer.folder() else { return Ok(()) };
        let partitions = self.read();
        let lossy = partitions.partitions.iter().filter(|(_, partition)| partition.has_lost_rows());
        let lossy: Vec<PartitionKey> = lossy.map(|(key, _)| key.clone()).collect();
        drop(partitions);
        lossy.iter().try_for_each(|key| folder.write(&self.state, key))
    }

    /// Removes every graph's file: some may hold what must not be there.
    pub(super) fn remove_graphs(&self) -> Result<()> {
        let Some(folder) = self.indexer.folder() else { return Ok(()) };
        let Ok(entries) = std::fs::read_dir(&folder.path) else { return Ok(()) };
        for entry in entries.flatten() {
            folder.remove(&entry.file_name().to_string_lossy())?;
        }
        Ok(())
    }
}

fn head(state: &State, (user, agent): &PartitionKey) -> GraphHead {
    let store = &state.store;
    GraphHead::new(store.seed, &store.embedder, store.dim, user, agent.as_deref())
}

fn file_name(head: &GraphHead) -> String {
    format!("{:016x}.graph", head.partition)
}

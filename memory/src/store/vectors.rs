//! The files that graphs are kept in, one a partition: mapped when the store opens, written anew when vectors go.
//! Knows no bytes (see `format::vectors`); a file that is lost or damaged is built anew.

use std::collections::HashMap;
use std::sync::Arc;

use super::Store;
use super::folder::IndexFolder;
use super::images;
use super::state::{PartitionKey, State};
use super::state_lock::StateLock;
use crate::format::vectors::{GraphFile, IndexHead};
use crate::partition::VectorName;
use crate::{Error, Result};

pub(super) const GRAPH_ENDING: &str = ".graph";

/// Writes the graph of a partition, if it has one. Vectors that are gone leave no byte in it.
/// The state is locked only while names are taken down: whoever forgets something meanwhile writes once more.
pub(super) fn write_graph(
    folder: &IndexFolder,
    state: &StateLock<State>,
    key: &PartitionKey,
) -> Result<()> {
    let changing = folder.lock();
    let (head, graph, names) = {
        let state = state.read();
        let sealed = state.partitions.get(key).and_then(|partition| partition.sealed());
        let Some((graph, names)) = sealed else { return Ok(()) };
        (head(&state, key), graph, names)
    };
    changing.replace(&file_name(&head), |out| GraphFile::write(&head, &graph, &names, out))
}

impl Store {
    /// Takes the graphs on the disk in. What does not fit is removed, and is built anew when it is due.
    pub(super) fn load_graphs(&self) {
        let Some(folder) = self.indexer.folder() else { return };
        let state = self.read();
        let named = state.partitions.keys().flat_map(|key| {
            let head = head(&state, key);
            [file_name(&head), images::file_name(&head)].map(|name| (name, key.clone()))
        });
        let keys: HashMap<String, PartitionKey> = named.collect();
        drop(state);
        for name in folder.names() {
            let loaded = self.load_graph(folder, &name, keys.get(&name));
            let Err(error) = loaded else { continue };
            tracing::warn!(file = name, %error, "a file of the index is made anew");
            if let Err(error) = folder.lock().remove(&[name]) {
                tracing::warn!(%error, "a file of the index that is of no use stays on the disk");
            }
        }
    }

    fn load_graph(
        &self,
        folder: &IndexFolder,
        name: &str,
        key: Option<&PartitionKey>,
    ) -> Result<()> {
        let Some(key) = key else {
            return Err(Error::corrupted(format!("read {name}: nothing of its kind")));
        };
        if name.ends_with(images::IMAGE_ENDING) {
            // It was read before the partition was there.
            return Ok(());
        }
        let Some(held) = folder.map(name)? else { return Ok(()) };
        let mut state = self.write();
        let GraphFile { graph, names } = GraphFile::read(&held, &head(&state, key))
            .map_err(|error| Error::corrupted(format!("read {name}: {error}")))?;
        let Some(partition) = state.partitions.get_mut(key) else { return Ok(()) };
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
        lossy.iter().try_for_each(|key| write_graph(folder, &self.state, key))
    }
}

/// What the files of a partition must say they are of.
pub(super) fn head(state: &State, (user, agent): &PartitionKey) -> IndexHead {
    let store = &state.store;
    IndexHead::new(store.seed, &store.embedder, store.dim, user, agent.as_deref())
}

fn file_name(head: &IndexHead) -> String {
    format!("{:016x}{GRAPH_ENDING}", head.partition)
}

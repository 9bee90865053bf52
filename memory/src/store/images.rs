//! The files that what recall searches is kept in, one a user and agent: written at closing and as the store grows.
//! Knows no bytes (see `format::image`); an image that is lost, damaged or old costs time at the next opening.

use super::Store;
use super::folder::IndexFolder;
use super::state::{PartitionKey, State};
use super::state_lock::StateLock;
use super::vectors::head;
use crate::Result;
use crate::format::image::{Image, ImageSpan, ImageTurn};
use crate::format::vectors::IndexHead;
use crate::partition::Partition;

/// While the store is open an image is written anew once it lacks so many chunks and vectors, of all there are. After a
/// crash they are made from the log, in about 25 µs each. Writing takes about 1 µs for each there is: between two
/// images half as much comes in, and in large stores a sixteenth, so that an opening does not take much longer there.
fn max_unsaved_open(all: u64) -> u64 {
    (all / 16).max(50_000.min(all / 2))
}

/// The same when the store is closed: whoever opens it next should not have to wait.
fn max_unsaved_closed(all: u64) -> u64 {
    all / 64
}

pub(super) const IMAGE_ENDING: &str = ".image";

/// The image of a partition that was written last; none if there is none that can be used.
pub(super) fn read_image(folder: &IndexFolder, head: &IndexHead) -> Option<Image> {
    let name = file_name(head);
    let read = folder
        .map(&name)
        .and_then(|held| held.map(|held| Image::decode(held.as_ref().as_ref(), head)).transpose());
    match read {
        Ok(image) => image,
        Err(error) => {
            tracing::warn!(file = name, %error, "the index is made from the log");
            if let Err(error) = folder.lock().remove(&[name]) {
                tracing::warn!(%error, "an image that is of no use stays on the disk");
            }
            None
        }
    }
}

/// The partitions whose images are to be written.
fn due(
    state: &State,
    image_vectors: usize,
    max_unsaved: fn(u64) -> u64,
) -> impl Iterator<Item = &PartitionKey> {
    // Vectors that another embedder made are not in the index, and nobody could tell from an image that they are to come.
    let can = state.without_vectors.is_empty();
    let is_due = move |partition: &Partition| {
        let num_vectors = partition.num_vectors().0;
        num_vectors > 0
            && num_vectors >= image_vectors
            && partition.num_unsaved() > max_unsaved((num_vectors + partition.len()) as u64)
    };
    let partitions = state.partitions.iter().filter(move |_| can);
    partitions.filter(move |(_, partition)| is_due(partition)).map(|(key, _)| key)
}

/// The partition whose image is to be written next while the store is open.
pub(super) fn next_due_open(state: &State, image_vectors: usize) -> Option<PartitionKey> {
    due(state, image_vectors, max_unsaved_open).next().cloned()
}

/// Writes the image of a partition. The state can be read and not be changed while its bytes are made.
pub(super) fn write_image(
    folder: &IndexFolder,
    state: &StateLock<State>,
    key: &PartitionKey,
) -> Result<()> {
    let changing = folder.lock();
    let (head, bytes, num_changes) = {
        let state = state.read_long();
        let Some(partition) = state.partitions.get(key) else { return Ok(()) };
        let head = head(&state, key);
        let (slots, codes, postings) = partition.image();
        let turns = turns(&state, key, partition);
        let bytes = Image::encode(&head, &turns, &slots, codes, postings);
        (head, bytes, partition.num_changes())
    };
    changing.replace(&file_name(&head), |out| out(&bytes))?;
    let mut state = state.write();
    if let Some(partition) = state.partitions.get_mut(key) {
        partition.set_saved(Some(num_changes));
    }
    Ok(())
}

/// The turns of a partition that have chunks.
fn turns(state: &State, key: &PartitionKey, partition: &Partition) -> Vec<((u64, u64), ImageTurn)> {
    let mut turns = Vec::new();
    for (id, session) in state.sessions_of(key) {
        for (&turn, turn_state) in &session.turns {
            let record = &turn_state.record;
            let (Some(body), Some(chunks)) = (&record.body, &record.chunks) else { continue };
            let holds = |span: &crate::format::ChunkSpan| {
                let chunk = partition.get(span.id).filter(|_| !span.near);
                chunk.is_some_and(|chunk| chunk.home == (id, turn) && !chunk.vectors.is_empty())
            };
            let spans = turn_state.chunks.iter();
            let spans: Vec<ImageSpan> =
                spans.map(|span| ImageSpan { span: *span, holds: holds(span) }).collect();
            // A turn that is damaged has none.
            if !spans.is_empty() {
                let made = ImageTurn { body: body.hash, chunks: chunks.hash, spans };
                turns.push(((id, turn), made));
            }
        }
    }
    turns
}

impl Store {
    /// Writes the images that an opening would miss most.
    pub(super) fn write_images_at_closing(&self) {
        let Some(folder) = self.indexer.folder() else { return };
        let state = self.read();
        let due: Vec<PartitionKey> =
            due(&state, self.options.image_vectors, max_unsaved_closed).cloned().collect();
        drop(state);
        for key in due {
            if let Err(error) = write_image(folder, &self.state, &key) {
                tracing::warn!(%error, "an image of the index could not be written");
                return;
            }
        }
    }

    /// Removes the images of these partitions: they hold words that must not be there any more.
    pub(super) fn remove_images(&self, keys: &[PartitionKey]) -> Result<()> {
        let Some(folder) = self.indexer.folder() else { return Ok(()) };
        let changing = folder.lock();
        let names: Vec<String> = {
            let state = self.read();
            keys.iter().map(|key| file_name(&head(&state, key))).collect()
        };
        // One that was not finished is nobody's: it could be one of these.
        let started = folder.names().into_iter().filter(|name| name.ends_with(".new"));
        changing.remove(&names.into_iter().chain(started).collect::<Vec<_>>())?;
        let mut state = self.write();
        for key in keys {
            state.partitions.get_mut(key).into_iter().for_each(|it| it.set_saved(None));
        }
        Ok(())
    }

    /// Reads every image as an opening would: its partition, and what it holds or why it is of no use.
    pub(super) fn images(&self) -> Vec<(PartitionKey, Result<Image>)> {
        let Some(folder) = self.indexer.folder() else { return Vec::new() };
        let state = self.read();
        let heads = state.partitions.keys().map(|key| (key.clone(), head(&state, key)));
        let heads: Vec<(PartitionKey, IndexHead)> = heads.collect();
        drop(state);
        let read = |(key, head): (PartitionKey, IndexHead)| {
            let held = folder.map(&file_name(&head)).transpose()?;
            Some((key, held.and_then(|held| Image::decode(held.as_ref().as_ref(), &head))))
        };
        heads.into_iter().filter_map(read).collect()
    }
}

pub(super) fn file_name(head: &IndexHead) -> String {
    format!("{:016x}{IMAGE_ENDING}", head.partition)
}

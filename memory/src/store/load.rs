//! Loading: records are checked, what they refer to is read, and the indexes are derived from it.
//! Knows nothing of search, and writes nothing.

mod chunks;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use self::chunks::Homes;
use super::StoreOptions;
use super::folder::IndexFolder;
use super::images::read_image;
use super::records::{Change, Entry};
use super::segment::Segment;
use super::state::{PartitionKey, State, partition_key};
use super::vectors::head;
use crate::format::image::Image;
use crate::format::{Body, ChunkSpan, Key, Kind, Record, StoreRecord, TurnRecord};
use crate::partition::{Partition, Place, Version};
use crate::summary::Summary;
use crate::{Embedder, Result, Scope};

/// What reading a store's files gives.
pub(super) struct Loaded {
    pub(super) state: State,
    /// Turns whose chunks were made anew, and are to be written.
    pub(super) stale: BTreeSet<(u64, u64)>,
    /// Sessions whose summary was made anew.
    pub(super) stale_summaries: BTreeSet<u64>,
}

/// Reads what the records refer to, and derives everything else from it, but for what the images in `folder` know.
pub(super) fn load(
    record: StoreRecord,
    segments: BTreeMap<u32, Arc<Segment>>,
    entries: Vec<Entry>,
    embedder: &dyn Embedder,
    options: &StoreOptions,
    folder: Option<&IndexFolder>,
) -> Result<Loaded> {
    let mut loader = Loader {
        folder,
        partitions: Vec::new(),
        numbers: HashMap::new(),
        tag: record.tag(),
        state: State::new(record, segments),
        embedder,
        options,
        homes: Homes::default(),
        near: Vec::new(),
        has_foreign: false,
        stale: BTreeSet::new(),
        stale_summaries: BTreeSet::new(),
    };
    loader.records(entries);
    loader.sessions();
    loader.near_places();
    loader.complete_vectors()?;
    loader.versions();
    loader.summaries();
    loader.orphans()?;
    let Loader { state, stale, stale_summaries, .. } = loader;
    Ok(Loaded { state, stale, stale_summaries })
}

/// A partition while it is read.
struct Known {
    key: PartitionKey,
    image: Option<Image>,
}

struct Loader<'a> {
    state: State,
    folder: Option<&'a IndexFolder>,
    /// Partitions by the numbers that they have here.
    partitions: Vec<Known>,
    numbers: HashMap<PartitionKey, usize>,
    embedder: &'a dyn Embedder,
    options: &'a StoreOptions,
    /// The embedder's tag.
    tag: u64,
    /// Chunks read so far, indexed once their places are known.
    homes: Homes,
    /// Places that hold nearly the text of a chunk, with their own text.
    near: Vec<(usize, Place, ChunkSpan, Box<str>)>,
    /// Some vectors are another embedder's: what has none waits for [`Store::reembed`].
    has_foreign: bool,
    /// Turns whose chunks' record is damaged or incomplete.
    stale: BTreeSet<(u64, u64)>,
    /// Sessions whose summary is damaged or missing.
    stale_summaries: BTreeSet<u64>,
}

impl Loader<'_> {
    /// Decodes the database; a damaged record is noted and skipped.
    fn records(&mut self, entries: Vec<Entry>) {
        for (key_bytes, value) in entries {
            let key = Key::decode(&key_bytes);
            if matches!(key, Ok(Key::Store)) {
                // It was read first, and may have been brought up to date.
                continue;
            }
            let record =
                key.as_ref().ok().map(|key| value.and_then(|value| Record::decode(key, &value)));
            match (key, record) {
                (Ok(key), Some(Ok(record))) => self.state.apply(&Change::put(key, record)),
                (Ok(key), Some(Err(error))) => {
                    self.state.refs_lost = true;
                    self.state.damaged.push(format!("{key:?}: {error}"));
                    if let Key::Turn(session, turn) = key {
                        let session = self.state.session_mut(session);
                        session.num_turns = session.num_turns.max(turn + 1);
                    }
                }
                _ => {
                    self.state.refs_lost = true;
                    self.state.damaged.push("a record of the database has an unknown key".into());
                }
            }
        }
        for segment in self.state.segments.values() {
            // A crash may leave a segment half made: nothing refers to it, and it is removed.
            if self.state.is_live(segment.number()) && !segment.header_is_intact() {
                let text = format!("{}: header does not match", segment.path().display());
                self.state.damaged.push(text);
            }
        }
    }

    /// Names every session and reads its turns.
    fn sessions(&mut self) {
        let ids: Vec<u64> = self.state.sessions.keys().copied().collect();
        // A repair of an earlier version could leave two with one name: the later one was the one in use.
        for &id in ids.iter().rev() {
            let text = match self.state.told_scope(id) {
                Ok(scope) if self.state.name(id, scope.clone()) => continue,
                Ok(scope) => {
                    let text = format!("session {id}: another session has its name, {scope}");
                    self.state.shared_names.insert(scope);
                    text
                }
                Err(error) => format!("session {id}: its names are lost: {error}"),
            };
            self.state.damaged.push(text);
        }
        for id in ids {
            let scope = self.state.sessions.get(&id).and_then(|session| session.scope.clone());
            if let Some(scope) = scope {
                self.turns(id, &scope);
            }
        }
    }

    fn turns(&mut self, id: u64, scope: &Scope) {
        let Some(session) = self.state.sessions.get(&id) else { return };
        let turns: Vec<(u64, TurnRecord)> =
            session.turns.iter().map(|(turn, state)| (*turn, state.record)).collect();
        let num_missing = session.num_turns - turns.len() as u64;
        if num_missing > 0 {
            self.state.damaged.push(format!("session {id}: {num_missing} turns are lost"));
        }
        for (turn, record) in turns {
            let order = self.state.orders.entry(scope.user_id().to_owned()).or_default();
            *order = (*order).max(record.order + 1);
            let Some(body) = &record.body else { continue };
            let bytes = self.state.read(body);
            match bytes.and_then(|bytes| Body::decode(body.kind, &bytes)) {
                Ok(read) if read.head.belongs_to(id, turn, &record) => {
                    self.turn(id, scope, turn, record, (body, read));
                }
                Ok(_) => {
                    let text =
                        format!("session {id}, turn {turn}: its text is that of another turn");
                    self.state.damaged.push(text);
                }
                Err(error) => {
                    self.state.damaged.push(format!("session {id}, turn {turn}: {error}"));
                }
            }
        }
    }

    /// The number of a scope's partition; its image is read when it is first asked for.
    fn partition(&mut self, scope: &Scope) -> usize {
        let key = partition_key(scope);
        if let Some(&number) = self.numbers.get(&key) {
            return number;
        }
        let image = self.folder.and_then(|folder| read_image(folder, &head(&self.state, &key)));
        let num_slots = image.as_ref().map_or(0, |image| image.slots.len());
        self.homes.reserve(num_slots);
        self.partitions.push(Known { key: key.clone(), image });
        self.numbers.insert(key, self.partitions.len() - 1);
        self.partitions.len() - 1
    }

    /// Lets the turns with a subject supersede each other.
    fn versions(&mut self) {
        let dim = self.state.dim();
        let State { sessions, partitions, .. } = &mut self.state;
        let mut told: BTreeMap<PartitionKey, Vec<(&str, Version)>> = BTreeMap::new();
        for (&id, session) in sessions.iter() {
            let Some(scope) = &session.scope else { continue };
            let turns = session.turns.iter();
            let mut versions =
                turns.filter_map(|(&turn, state)| state.version(id, turn)).peekable();
            if versions.peek().is_some() {
                told.entry(partition_key(scope)).or_default().extend(versions);
            }
        }
        for (key, versions) in told {
            let partition = partitions.entry(key).or_insert_with(|| Partition::new(dim));
            partition.add_versions(versions);
        }
    }

    /// Looks behind the last record in use for turns that the database does not know.
    /// One commit's turns were being written when the process died, and nobody was told that they are stored.
    /// Turns of several commits were stored: the database went back to an earlier state by itself.
    /// Their numbers are given to nobody else: a repair would take one's turns for the other's.
    fn orphans(&mut self) -> Result<()> {
        let state = &self.state;
        let live_ends = state.live_ends();
        let mut commits = BTreeSet::new();
        let mut sessions = BTreeSet::new();
        for segment in state.segments.values() {
            let end = live_ends.get(&segment.number()).copied().unwrap_or(0);
            // Pages of windows that were written since lie there by the hundred megabytes: only their headers are read.
            // A turn is missed under two faults at once: the database went back, and the length of a record that is no
            // turn is damaged so that it leads to a header behind that turn.
            segment.walk_of(end, Kind::is_body, |blob, payload| {
                let Ok(body) = Body::decode(blob.kind, payload) else { return };
                let is_unknown = match state.sessions.get(&body.head.session) {
                    Some(session) => body.head.turn >= session.num_turns,
                    // Once an erasure is done no byte of an erased session is left.
                    None => {
                        !state.store.purge_pending || body.head.session >= state.store.next_session
                    }
                };
                if is_unknown {
                    commits.insert(body.head.commit);
                    sessions.insert(body.head.session);
                }
            })?;
        }
        let behind = |numbers: &BTreeSet<u64>| numbers.last().map_or(0, |it| it.saturating_add(1));
        let store = &mut self.state.store;
        store.next_session = store.next_session.max(behind(&sessions));
        self.state.next_commit = self.state.next_commit.max(behind(&commits));
        if commits.len() > 1 {
            self.state.refs_lost = true;
            self.state.damaged.push(format!(
                "the database lost its latest records: the segments hold {} commits that it does not know",
                commits.len()
            ));
        }
        Ok(())
    }

    /// Reads every session's running means, or computes them from its chunks.
    fn summaries(&mut self) {
        let ids: Vec<u64> = self.state.sessions.keys().copied().collect();
        for id in ids {
            let Some(session) = self.state.sessions.get(&id) else { continue };
            let Some(blob) = session.record.and_then(|record| record.summary) else { continue };
            let bytes = self.state.read(&blob);
            let stored =
                bytes.and_then(|bytes| Summary::decode(blob.kind, &bytes, &self.state.store));
            let summary = match stored {
                Ok(Some(summary)) => summary,
                _ => {
                    self.stale_summaries.insert(id);
                    self.state.summarize(session, |_| true)
                }
            };
            self.state.session_mut(id).summary = summary;
        }
    }
}

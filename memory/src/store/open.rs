//! Opening: the folder is locked, its records are read, and what reading found to be missing or left over is settled.
//! Knows nothing of what is derived from the records (see `load`); after it, memory and disk agree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::folder::IndexFolder;
use super::indexing::Indexer;
use super::load::{Loaded, load};
use super::lock::Lock;
use super::queries::Queries;
use super::records::{Change, Entry, Records};
use super::segment::{Appender, SEGMENT_BYTES, Segment, sync_folder};
use super::state_lock::StateLock;
use super::{Store, StoreOptions, Writer, storage};
use crate::format::{
    Key, Kind, Record, SEGMENT_HEADER_BYTES, SessionRecord, StoreRecord, TurnChunks, TurnRecord,
    VERSION, record_version,
};
use crate::words::Terms;
use crate::{Embedder, Error, ErrorKind, Result, Storage};

/// The longest identity of an embedder: it is kept in one database record.
const MAX_IDENTITY_BYTES: usize = 1024;
/// The most numbers per vector.
const MAX_DIM: usize = 1 << 16;

/// See [`Store::open`].
pub(super) fn open(
    path: &Path,
    embedder: Arc<dyn Embedder>,
    options: StoreOptions,
    storage: Option<Box<dyn Storage>>,
) -> Result<Store> {
    check(&*embedder, &options)?;
    std::fs::create_dir_all(path).map_err(|source| Error::io("open", path, source))?;
    let lock = Lock::take(path)?;
    let storage = match storage {
        Some(storage) => storage,
        None => storage::open(path, options.backend)?,
    };
    let (records, entries) = Records::open(storage, options.key.as_ref())?;
    let is_new = entries.is_empty();
    let (record, is_changed) = store_record(path, &entries, &*embedder, &options)?;
    let (appender, segments) = Appender::open(&path.join("segments"), records.cipher())?;
    // Graphs and images hold vectors and words in the clear.
    let folder = options.key.is_none().then(|| IndexFolder::new(path.join("index")));
    if let Some(folder) = folder.as_ref().filter(|_| record.purge_pending) {
        // Some of its files may hold what must not be there.
        folder.lock().remove(&folder.names())?;
    }
    let next_session = record.next_session;
    let Loaded { state, stale, stale_summaries } =
        load(record, segments, entries, &*embedder, &options, folder.as_ref())?;
    // Numbers of sessions that the database lost are passed over, by later openings too.
    let is_changed = is_changed || state.store.next_session != next_session;
    let store = Store {
        path: path.to_owned(),
        embedder,
        options,
        state: Arc::new(StateLock::new(state)),
        indexer: Indexer::new(folder),
        queries: Queries::default(),
        writer: Mutex::new(Writer { appender, records, terms: Terms::new(), broken: false }),
        lock: Arc::new(lock),
    };
    if is_new {
        sync_folder(path)?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_folder(parent)?;
        }
    }
    if is_new || is_changed {
        let record = store.read().store.clone();
        let change = Change::put(Key::Store, Record::Store(record));
        drop(store.publish(&mut *store.writer()?, &[change])?);
    }
    store.load_graphs();
    store.settle(&stale, &stale_summaries)?;
    store.index_in_background();
    Ok(store)
}

fn check(embedder: &dyn Embedder, options: &StoreOptions) -> Result<()> {
    if options.chunk_words == 0 {
        return Err(Error::invalid("open: expected chunk_words of at least 1, got 0"));
    }
    let (identity, dim) = (embedder.identity(), embedder.dim());
    if identity.is_empty() || identity.len() > MAX_IDENTITY_BYTES {
        return Err(Error::invalid(format!(
            "open: expected an embedder identity of 1 to {MAX_IDENTITY_BYTES} bytes, got {}",
            identity.len()
        )));
    }
    if dim == 0 || dim > MAX_DIM {
        return Err(Error::invalid(format!("open: expected 1 to {MAX_DIM} dimensions, got {dim}")));
    }
    Ok(())
}

/// The store's own record: read and compared, or made for a new store; and whether it has to be written.
fn store_record(
    path: &Path,
    entries: &[Entry],
    embedder: &dyn Embedder,
    options: &StoreOptions,
) -> Result<(StoreRecord, bool)> {
    let (identity, dim) = (embedder.identity(), embedder.dim());
    if entries.is_empty() {
        let has_segments = std::fs::read_dir(path.join("segments"))
            .is_ok_and(|mut entries| entries.next().is_some());
        if has_segments {
            return Err(Error::corrupted(format!(
                "open {}: the database is empty, but there are segments: every record is lost",
                path.display()
            )));
        }
        let mut record = StoreRecord {
            seed: options.seed,
            dim: dim as u32,
            embedder: identity,
            next_session: 1,
            purge_pending: false,
            untagged: 0,
        };
        record.untagged = record.tag();
        return Ok((record, true));
    }
    let key = Key::Store.encode();
    let value = entries.iter().find(|(known, _)| *known == key).map(|(_, value)| value);
    let Some(value) = value else {
        return Err(Error::corrupted(format!(
            "open {}: the store's own record is lost",
            path.display()
        )));
    };
    let lost =
        |error: &Error| Error::new(error.kind(), format!("open {}: {error}", path.display()));
    let value = value.as_ref().map_err(lost)?;
    let record =
        Record::decode(&Key::Store, value).map_err(|error| lost(&error).with_source(error))?;
    match record {
        Record::Store(record) if record.embedder == identity && record.dim as usize == dim => {
            // A store of an earlier version takes the present one: programs of that version refuse it from here on.
            let is_old = record_version(value) < VERSION;
            Ok((record, is_old))
        }
        Record::Store(record) if options.reembed => {
            Ok((StoreRecord { embedder: identity, dim: dim as u32, ..record }, true))
        }
        Record::Store(record) => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "open {}: expected embedder `{}` of {} dimensions, which made its vectors, got `{identity}` of {dim}",
                path.display(),
                record.embedder,
                record.dim
            ),
        )),
        _ => Err(Error::corrupted("open: the store's own record is of another kind")),
    }
}

impl Store {
    /// After loading: finds the place to append, drops what nothing refers to, writes what was made anew.
    fn settle(&self, stale: &BTreeSet<(u64, u64)>, stale_summaries: &BTreeSet<u64>) -> Result<()> {
        let mut writer = self.writer()?;
        let (mut unused, highest, last, purge_pending) = {
            let state = self.read();
            let unused: Vec<Arc<Segment>> = state
                .segments
                .values()
                .filter(|segment| !state.refs_lost && !state.is_live(segment.number()))
                .cloned()
                .collect();
            let last =
                state.segments.values().rfind(|segment| state.is_live(segment.number())).cloned();
            let live_ends = state.live_ends();
            let end = |segment: &Arc<Segment>| live_ends.get(&segment.number()).copied();
            let last = last.and_then(|segment| Some((end(&segment)?, segment)));
            let highest = state.segments.last_key_value().map(|(number, _)| *number);
            let last = last.filter(|_| !state.refs_lost);
            (unused, highest, last, state.store.purge_pending)
        };
        // The one with the highest number stays: else that number would be given again, and a receipt may name it.
        let empty = unused.pop_if(|segment| Some(segment.number()) == highest);
        for segment in unused {
            self.write().segments.remove(&segment.number());
            writer.appender.remove(&segment)?;
        }
        if let Some((end, segment)) = last {
            let len = segment.len()?;
            if segment.header_is_intact()
                && (SEGMENT_HEADER_BYTES..=len.min(SEGMENT_BYTES)).contains(&end)
            {
                writer.appender.resume(segment, end)?;
            }
        }
        if let Some(segment) = empty {
            // A crash may have left it half made.
            if !segment.header_is_intact() {
                segment.mend_header()?;
            }
            writer.appender.resume(segment, SEGMENT_HEADER_BYTES)?;
        }
        let changes = self.made_anew(&mut writer, stale, stale_summaries)?;
        if !changes.is_empty() {
            drop(self.publish(&mut writer, &changes)?);
        }
        if purge_pending {
            self.purge(&mut writer)?;
        }
        Ok(())
    }

    /// Appends the chunks and summaries that were made anew, and lists the records that refer to them.
    pub(super) fn made_anew(
        &self,
        writer: &mut Writer,
        turns: &BTreeSet<(u64, u64)>,
        summaries: &BTreeSet<u64>,
    ) -> Result<Vec<Change>> {
        let state = self.read();
        let mut changes = BTreeMap::new();
        for &(id, turn) in turns {
            let Some(session) = state.sessions.get(&id) else { continue };
            let Some(turn_state) = session.turns.get(&turn) else { continue };
            let partition = session.scope.as_ref().and_then(|scope| state.partition(scope));
            let rows = turn_state.chunks.iter().map(|&span| {
                let chunk = partition.and_then(|partition| partition.get(span.id));
                let home = chunk.filter(|chunk| chunk.home == (id, turn) && !span.near);
                (span, home.map_or(&[][..], |chunk| &chunk.vectors))
            });
            let payload = TurnChunks::encode(id, turn, state.store.tag(), rows);
            let blob = writer.appender.append(Kind::Chunks, &payload)?;
            let record = TurnRecord { chunks: Some(blob), ..turn_state.record };
            changes.insert(Key::Turn(id, turn), Record::Turn(record));
        }
        for &id in summaries {
            let Some(session) = state.sessions.get(&id) else { continue };
            let Some(record) = session.record else { continue };
            let blob = writer
                .appender
                .append(Kind::Summary, &session.summary.encode(state.store.tag()))?;
            let record = SessionRecord { summary: Some(blob), ..record };
            changes.insert(Key::Session(id), Record::Session(record));
        }
        Ok(changes.into_iter().map(|(key, record)| Change::put(key, record)).collect())
    }
}

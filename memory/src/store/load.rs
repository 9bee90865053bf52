//! Opening: records are read and checked, indexes rebuilt, what is derived and damaged made anew.
//! Knows nothing of search; after it, memory and disk agree.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

use super::commit::start_of;
use super::indexing::Indexer;
use super::lock::Lock;
use super::queries::Queries;
use super::records::{Change, Records};
use super::segment::{Appender, SEGMENT_BYTES, Segment, sync_folder};
use super::state::{ChunkSpan, State, TurnState, partition_key, place};
use super::vectors::GraphFolder;
use super::{Store, StoreOptions, Writer};
use crate::format::{
    Body, Key, Kind, Record, SEGMENT_HEADER_BYTES, StoreRecord, TurnChunk, TurnChunks, TurnRecord,
    decode_names,
};
use crate::partition::{Chunk, Partition, chunk_id};
use crate::summary::Summary;
use crate::words::Terms;
use crate::{Embedder, Error, ErrorKind, Result, Role, Scope, chunk};

/// The longest identity of an embedder: it is kept in one database record.
const MAX_IDENTITY_BYTES: usize = 1024;
/// The most numbers per vector.
const MAX_DIM: usize = 1 << 16;

/// See [`Store::open`].
pub(super) fn open(
    path: &Path,
    embedder: Arc<dyn Embedder>,
    options: StoreOptions,
) -> Result<Store> {
    check(&*embedder, &options)?;
    std::fs::create_dir_all(path).map_err(|source| Error::io("open", path, source))?;
    let lock = Lock::take(path)?;
    let records = Records::open(&path.join("db"))?;
    let entries = records.scan()?;
    let is_new = entries.is_empty();
    let store = store_record(path, &entries, &*embedder, &options)?;
    let (appender, segments) = Appender::open(&path.join("segments"))?;
    let mut loader = Loader {
        state: State::new(store.clone(), segments),
        embedder: &*embedder,
        options: &options,
        terms: Terms::new(),
        homes: HashMap::new(),
        stale: BTreeSet::new(),
        stale_summaries: BTreeSet::new(),
    };
    loader.records(entries);
    loader.sessions();
    loader.complete_vectors()?;
    loader.summaries();
    loader.orphans()?;
    let Loader { state, stale, stale_summaries, .. } = loader;
    let store = Store {
        embedder,
        options,
        state: Arc::new(RwLock::new(state)),
        indexer: Indexer::new(Some(GraphFolder::new(path.join("index")))),
        queries: Queries::default(),
        writer: Mutex::new(Writer { appender, records, broken: false }),
        _lock: lock,
    };
    if is_new {
        sync_folder(path)?;
        sync_folder(&path.join("db"))?;
        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            sync_folder(parent)?;
        }
        let record = store.read().store.clone();
        let change = Change::put(Key::Store, Record::Store(record));
        drop(store.publish(&mut *store.writer()?, &[change])?);
    }
    if store.read().store.purge_pending {
        store.remove_graphs()?;
    } else {
        store.load_graphs();
    }
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

/// The store's own record: read and compared, or made for a new store.
fn store_record(
    path: &Path,
    entries: &[(Vec<u8>, Vec<u8>)],
    embedder: &dyn Embedder,
    options: &StoreOptions,
) -> Result<StoreRecord> {
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
        return Ok(StoreRecord {
            seed: options.seed,
            dim: dim as u32,
            embedder: identity,
            next_session: 1,
            purge_pending: false,
        });
    }
    let key = Key::Store.encode();
    let value = entries.iter().find(|(known, _)| *known == key).map(|(_, value)| value);
    let Some(value) = value else {
        return Err(Error::corrupted(format!(
            "open {}: the store's own record is lost",
            path.display()
        )));
    };
    let record = Record::decode(&Key::Store, value).map_err(|error| {
        Error::new(error.kind(), format!("open {}: {error}", path.display())).with_source(error)
    })?;
    match record {
        Record::Store(record) if record.embedder == identity && record.dim as usize == dim => {
            Ok(record)
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

struct Loader<'a> {
    state: State,
    embedder: &'a dyn Embedder,
    options: &'a StoreOptions,
    terms: Terms,
    /// Chunks read so far, by partition and identity; indexed once their places are known.
    homes: HashMap<(super::state::PartitionKey, u128), Chunk>,
    /// Turns whose chunks' record is damaged or incomplete.
    stale: BTreeSet<(u64, u64)>,
    /// Sessions whose summary is damaged or missing.
    stale_summaries: BTreeSet<u64>,
}

impl Loader<'_> {
    /// Decodes the database; a damaged record is noted and skipped.
    fn records(&mut self, entries: Vec<(Vec<u8>, Vec<u8>)>) {
        for (key_bytes, value) in entries {
            let key = Key::decode(&key_bytes);
            let record = key.as_ref().ok().map(|key| Record::decode(key, &value));
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
            if !segment.header_is_intact() {
                let text = format!("{}: header does not match", segment.path().display());
                self.state.damaged.push(text);
            }
        }
    }

    /// Names every session and reads its turns.
    fn sessions(&mut self) {
        let ids: Vec<u64> = self.state.sessions.keys().copied().collect();
        for id in ids {
            match self.scope_of(id) {
                Ok(scope) => {
                    self.state.name(id, scope.clone());
                    self.turns(id, &scope);
                }
                Err(error) => {
                    self.state.damaged.push(format!("session {id}: its names are lost: {error}"));
                }
            }
        }
    }

    fn scope_of(&self, id: u64) -> Result<Scope> {
        let record = self.state.sessions.get(&id).and_then(|session| session.record);
        let record = record.ok_or_else(|| Error::corrupted("its record is missing"))?;
        let (user, agent, session) = decode_names(&self.state.read(&record.names)?)?;
        let scope = Scope::user(user).session(session);
        Ok(match agent {
            Some(agent) => scope.agent(agent),
            None => scope,
        })
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
            let body = self.state.read(body).and_then(|bytes| Body::decode(&bytes));
            match body {
                Ok(body) if body.head.belongs_to(id, turn, &record) => {
                    self.turn(id, scope, turn, record, body);
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

    /// Takes one turn's chunks in; cuts it again if their record is damaged.
    fn turn(&mut self, id: u64, scope: &Scope, turn: u64, record: TurnRecord, body: Body) {
        let remembered = record.remember && record.role != Role::Recalled;
        let chunks = match record.chunks.filter(|_| remembered) {
            None => Vec::new(),
            Some(blob) => match self.chunks_of(&blob, &body) {
                Ok(chunks) => chunks,
                Err(error) => {
                    tracing::warn!(session = id, turn, %error, "chunks of a turn are made anew");
                    self.stale.insert((id, turn));
                    self.cut(scope, &body.text)
                }
            },
        };
        self.state.next_commit = self.state.next_commit.max(body.head.commit.saturating_add(1));
        let partition = partition_key(scope);
        let mut spans: Vec<ChunkSpan> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let span = (chunk.id, chunk.start, chunk.end);
            let known = self.homes.entry((partition.clone(), chunk.id)).or_insert_with(|| Chunk {
                id: chunk.id,
                text: body.text[chunk.start as usize..chunk.end as usize].into(),
                vectors: Box::default(),
                home: (id, turn),
                places: Vec::new(),
            });
            if known.vectors.is_empty() && !chunk.vectors.is_empty() {
                known.vectors = chunk.vectors.into();
                known.home = (id, turn);
            }
            if !record.retracted {
                known.places.push(place(id, turn, &span, &record));
            }
            spans.push(span);
        }
        if !record.retracted && !spans.is_empty() {
            self.state.partition_mut(scope).set_metadata(id, turn, &body.metadata);
        }
        let session = self.state.session_mut(id);
        if record.role == Role::User && !record.retracted {
            session.last_user_text = start_of(&body.text).into();
        }
        let source = body.source.map(String::into_boxed_str);
        session.turns.insert(turn, TurnState { record, chunks: spans, source });
    }

    /// The stored chunks of a turn, if they fit its text, each other and the dimension.
    fn chunks_of(&self, blob: &crate::format::BlobRef, body: &Body) -> Result<Vec<TurnChunk>> {
        let stored = TurnChunks::decode(&self.state.read(blob)?)?;
        let fits = (stored.session, stored.turn) == (body.head.session, body.head.turn)
            && stored.chunks.iter().all(|chunk| {
                let range = chunk.start as usize..chunk.end as usize;
                body.text.get(range).is_some_and(|text| !text.is_empty())
                    && chunk.vectors.len().is_multiple_of(self.state.dim())
            });
        if fits {
            return Ok(stored.chunks);
        }
        Err(Error::corrupted("chunks of a turn: they do not fit its text"))
    }

    fn cut(&self, scope: &Scope, text: &str) -> Vec<TurnChunk> {
        let partition = partition_key(scope);
        let spans = chunk::spans(text, self.options.chunk_words);
        let chunk = |span: chunk::Span| {
            let id = chunk_id(self.state.store.seed, &text[span.bytes.clone()], |id| {
                self.homes.get(&(partition.clone(), id)).map(|chunk| &*chunk.text)
            });
            let (start, end) = (span.bytes.start as u64, span.bytes.end as u64);
            TurnChunk { id, start, end, vectors: Vec::new() }
        };
        spans.into_iter().map(chunk).collect()
    }

    /// Embeds chunks whose vectors are lost, then indexes all that have a place.
    fn complete_vectors(&mut self) -> Result<()> {
        let dim = self.state.dim();
        for ((key, _), mut chunk) in std::mem::take(&mut self.homes) {
            let Some(first) = chunk.places.iter().min_by_key(|place| place.order) else { continue };
            if chunk.vectors.is_empty() {
                chunk.home = (first.session, first.turn);
                self.stale.insert(chunk.home);
                let units: Vec<&str> = chunk::spans(&chunk.text, self.options.chunk_words.max(1))
                    .into_iter()
                    .flat_map(|span| span.units)
                    .map(|unit| &chunk.text[unit])
                    .collect();
                let rows = self.embedder.embed(&units)?;
                if rows.len() != units.len() * dim {
                    return Err(Error::new(
                        ErrorKind::Incompatible,
                        format!(
                            "open: expected {} numbers of the embedder, got {}",
                            units.len() * dim,
                            rows.len()
                        ),
                    ));
                }
                chunk.vectors = rows.into();
            }
            chunk.places.sort_by_key(|place| (place.order, place.start));
            let partition = self.state.partitions.entry(key).or_insert_with(|| Partition::new(dim));
            partition.insert(&self.terms, chunk);
        }
        Ok(())
    }

    /// Looks behind the last record in use for turns that the database does not know.
    /// One commit's turns were being written when the process died, and nobody was told that they are stored.
    /// Turns of several commits were stored: the database went back to an earlier state by itself.
    fn orphans(&mut self) -> Result<()> {
        let state = &self.state;
        let live_ends = state.live_ends();
        let mut commits = BTreeSet::new();
        for segment in state.segments.values() {
            let end = live_ends.get(&segment.number()).copied().unwrap_or(0);
            segment.walk(end, |kind, payload| {
                let body = (kind == Kind::Body).then(|| Body::decode(payload).ok()).flatten();
                let Some(body) = body else { return };
                let is_unknown = match state.sessions.get(&body.head.session) {
                    Some(session) => body.head.turn >= session.num_turns,
                    None => body.head.session >= state.store.next_session,
                };
                if is_unknown {
                    commits.insert(body.head.commit);
                }
            })?;
        }
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
            let stored =
                self.state.read(&blob).and_then(|bytes| Summary::decode(&bytes, self.state.dim()));
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

impl Store {
    /// After loading: finds the place to append, drops what nothing refers to, writes what was made anew.
    fn settle(&self, stale: &BTreeSet<(u64, u64)>, stale_summaries: &BTreeSet<u64>) -> Result<()> {
        let mut writer = self.writer()?;
        let (unused, last, purge_pending) = {
            let state = self.read();
            let is_live = |number: &u32| state.live_bytes.get(number).is_some_and(|&live| live > 0);
            let unused: Vec<Arc<Segment>> = state
                .segments
                .values()
                .filter(|segment| !state.refs_lost && !is_live(&segment.number()))
                .cloned()
                .collect();
            let last = state.segments.values().rfind(|segment| is_live(&segment.number())).cloned();
            let live_ends = state.live_ends();
            let end = |segment: &Arc<Segment>| live_ends.get(&segment.number()).copied();
            let last = last.and_then(|segment| Some((end(&segment)?, segment)));
            (unused, last.filter(|_| !state.refs_lost), state.store.purge_pending)
        };
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
            let rows = turn_state.chunks.iter().map(|&(chunk, start, end)| {
                let chunk_state = partition.and_then(|partition| partition.get(chunk));
                let home = chunk_state.filter(|chunk| chunk.home == (id, turn));
                (chunk, start, end, home.map_or(&[][..], |chunk| &chunk.vectors))
            });
            let payload = TurnChunks::encode(id, turn, rows);
            let blob = writer.appender.append(Kind::Chunks, &payload)?;
            let record = TurnRecord { chunks: Some(blob), ..turn_state.record };
            changes.insert(Key::Turn(id, turn), Record::Turn(record));
        }
        for &id in summaries {
            let Some(session) = state.sessions.get(&id) else { continue };
            let Some(record) = session.record else { continue };
            let blob = writer.appender.append(Kind::Summary, &session.summary.encode())?;
            let record = crate::format::SessionRecord { summary: Some(blob), ..record };
            changes.insert(Key::Session(id), Record::Session(record));
        }
        Ok(changes.into_iter().map(|(key, record)| Change::put(key, record)).collect())
    }
}

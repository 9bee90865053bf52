//! Opening: records are read and checked, indexes rebuilt, what is derived and damaged made anew.
//! Knows nothing of search; after it, memory and disk agree.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

use super::commit::start_of;
use super::folder::IndexFolder;
use super::held::HeldVectors;
use super::images::read_image;
use super::indexing::Indexer;
use super::lock::Lock;
use super::queries::Queries;
use super::records::{Change, Entry, Records};
use super::segment::{Appender, SEGMENT_BYTES, Segment, sync_folder};
use super::state::{PartitionKey, State, TurnState, partition_key};
use super::vectors::head;
use super::{Store, StoreOptions, Writer, storage};
use crate::format::image::{Image, ImageSpan};
use crate::format::{
    BlobRef, Body, ChunkSpan, Key, Kind, Record, SEGMENT_HEADER_BYTES, StoreRecord, TurnChunk,
    TurnChunks, TurnRecord, VERSION, decode_names, record_version,
};
use crate::partition::{Chunk, Partition, Place, Vectors, chunk_id};
use crate::summary::Summary;
use crate::words::Terms;
use crate::{Embedder, Error, ErrorKind, Result, Role, Scope, Storage, chunk};

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
    let records = Records::open(storage, options.key.as_ref())?;
    let entries = records.scan()?;
    let is_new = entries.is_empty();
    let (record, is_changed) = store_record(path, &entries, &*embedder, &options)?;
    let (appender, segments) = Appender::open(&path.join("segments"), records.cipher())?;
    // Graphs and images hold vectors and words in the clear.
    let folder = options.key.is_none().then(|| IndexFolder::new(path.join("index")));
    if let Some(folder) = folder.as_ref().filter(|_| record.purge_pending) {
        // Some of its files may hold what must not be there.
        folder.lock().remove(&folder.names())?;
    }
    let Loaded { state, stale, stale_summaries } =
        load(record, segments, entries, &*embedder, &options, folder.as_ref())?;
    let store = Store {
        path: path.to_owned(),
        embedder,
        options,
        state: Arc::new(RwLock::new(state)),
        indexer: Indexer::new(folder),
        queries: Queries::default(),
        writer: Mutex::new(Writer { appender, records, terms: Terms::new(), broken: false }),
        _lock: lock,
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

/// A partition while it is read.
struct Known {
    key: PartitionKey,
    image: Option<Image>,
}

/// A chunk of a turn, and its vectors if the turn's record holds them.
struct Found {
    span: ChunkSpan,
    vectors: Vectors,
}

/// The chunks of partitions, in the order in which they are found.
#[derive(Default)]
struct Homes {
    chunks: Vec<(usize, Chunk)>,
    /// Where a chunk is among them, by the number of its partition and its identity.
    places: HashMap<(usize, u128), usize>,
}

impl Homes {
    fn get(&self, partition: usize, id: u128) -> Option<&Chunk> {
        self.places.get(&(partition, id)).map(|&at| &self.chunks[at].1)
    }

    fn get_mut(&mut self, partition: usize, id: u128) -> Option<&mut Chunk> {
        self.places.get(&(partition, id)).map(|&at| &mut self.chunks[at].1)
    }

    /// The chunk, which is new with this text and this home if it was not found before.
    fn enter(
        &mut self,
        partition: usize,
        id: u128,
        text: impl FnOnce() -> Box<str>,
        home: (u64, u64),
    ) -> &mut Chunk {
        let Self { chunks, places } = self;
        let at = *places.entry((partition, id)).or_insert_with(|| {
            // Most stand in one place, and a vector that grows by itself makes room for four.
            let (text, places) = (text(), Vec::with_capacity(1));
            chunks.push((partition, Chunk { id, text, vectors: Vectors::default(), home, places }));
            chunks.len() - 1
        });
        &mut chunks[at].1
    }
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
        let names = decode_names(record.names.kind, &self.state.read(&record.names)?)?;
        if names.id.is_some_and(|known| known != id) {
            return Err(Error::corrupted("they are those of another session"));
        }
        let scope = Scope::user(names.user).session(names.session);
        Ok(match names.agent {
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
        self.homes.chunks.reserve(num_slots);
        self.homes.places.reserve(num_slots);
        self.partitions.push(Known { key: key.clone(), image });
        self.numbers.insert(key, self.partitions.len() - 1);
        self.partitions.len() - 1
    }

    /// A turn's chunks as the image knows them, and where their vectors are; none if it does not know these records.
    fn imaged(
        &self,
        partition: usize,
        turn: (u64, u64),
        (body_blob, blob): (&BlobRef, &BlobRef),
        body: &Body,
    ) -> Option<(Vec<Found>, Option<Arc<HeldVectors>>)> {
        let image = self.partitions[partition].image.as_ref()?;
        let made = image.turns.get(&turn).filter(|made| made.is_of(body_blob, blob))?;
        let fits = |span: &ChunkSpan| {
            body.text.get(span.start as usize..span.end as usize).is_some_and(|it| !it.is_empty())
        };
        if !made.spans.iter().all(|it| fits(&it.span)) {
            return None;
        }
        let mut held = None;
        if made.spans.iter().any(|it| it.holds) {
            held = Some(Arc::new(HeldVectors::new(self.state.segment(blob).ok()?, *blob)));
        }
        let found = |(at, it): (usize, &ImageSpan)| {
            let held = held.clone().filter(|_| it.holds && !it.span.near);
            let vectors = held.map(|held| Vectors::Elsewhere(held, at as u32)).unwrap_or_default();
            Found { span: it.span, vectors }
        };
        Some((made.spans.iter().enumerate().map(found).collect(), held))
    }

    /// Takes one turn's chunks in; cuts it again if their record is damaged.
    fn turn(
        &mut self,
        id: u64,
        scope: &Scope,
        turn: u64,
        record: TurnRecord,
        (body_blob, body): (&BlobRef, Body),
    ) {
        let remembered = record.remember && record.role != Role::Recalled;
        let partition = self.partition(scope);
        let (mut chunks, mut held) = (Vec::new(), None);
        if let Some(blob) = record.chunks.filter(|_| remembered) {
            if let Some(imaged) = self.imaged(partition, (id, turn), (body_blob, &blob), &body) {
                (chunks, held) = imaged;
            } else {
                chunks = self.chunks_of(&blob, &body).unwrap_or_else(|error| {
                    tracing::warn!(session = id, turn, %error, "chunks of a turn are made anew");
                    self.stale.insert((id, turn));
                    self.cut(partition, &body.text)
                });
            }
        }
        self.state.next_commit = self.state.next_commit.max(body.head.commit.saturating_add(1));
        let source = body.source.map(String::into_boxed_str);
        let subject = body.subject.map(String::into_boxed_str);
        let expires_ms = body.expires_ms;
        let mut state = TurnState { source, subject, expires_ms, held, ..TurnState::new(record) };
        for Found { span, vectors } in chunks {
            let text = &body.text[span.start as usize..span.end as usize];
            let place = state.place(id, turn, &span);
            state.chunks.push(span);
            if span.near {
                if !record.retracted {
                    self.near.push((partition, place, span, text.into()));
                }
                continue;
            }
            let known = self.homes.enter(partition, span.id, || text.into(), (id, turn));
            if known.vectors.is_empty() && !vectors.is_empty() {
                known.vectors = vectors;
                known.home = (id, turn);
            }
            if !record.retracted {
                known.places.push(place);
            }
        }
        if !record.retracted && !state.chunks.is_empty() {
            self.state.partition_mut(scope).set_metadata(id, turn, &body.metadata);
        }
        let session = self.state.session_mut(id);
        if record.role == Role::User && !record.retracted {
            session.last_user_text = start_of(&body.text).into();
        }
        session.turns.insert(turn, state);
    }

    /// The stored chunks of a turn, if they fit its text, each other and the dimension.
    /// Those of another embedder come without vectors.
    fn chunks_of(&mut self, blob: &BlobRef, body: &Body) -> Result<Vec<Found>> {
        let mut stored = TurnChunks::decode(blob.kind, &self.state.read(blob)?)?;
        if stored.embedder.unwrap_or(self.state.store.untagged) != self.tag {
            self.has_foreign |= stored.chunks.iter().any(|chunk| !chunk.vectors.is_empty());
            stored.chunks.iter_mut().for_each(|chunk| chunk.vectors.clear());
        }
        let fits = (stored.session, stored.turn) == (body.head.session, body.head.turn)
            && stored.chunks.iter().all(|chunk| {
                let range = chunk.start as usize..chunk.end as usize;
                body.text.get(range).is_some_and(|text| !text.is_empty())
                    && chunk.vectors.len().is_multiple_of(self.state.dim())
            });
        if fits {
            let found = |chunk: TurnChunk| {
                let TurnChunk { id, start, end, near, vectors } = chunk;
                Found { span: ChunkSpan { id, start, end, near }, vectors: vectors.into() }
            };
            return Ok(stored.chunks.into_iter().map(found).collect());
        }
        Err(Error::corrupted("chunks of a turn: they do not fit its text"))
    }

    fn cut(&self, partition: usize, text: &str) -> Vec<Found> {
        let spans = chunk::spans(text, self.options.chunk_words);
        let chunk = |span: chunk::Span| {
            let id = chunk_id(self.state.store.seed, &text[span.bytes.clone()], |id| {
                self.homes.get(partition, id).map(|chunk| &*chunk.text)
            });
            let (start, end) = (span.bytes.start as u64, span.bytes.end as u64);
            let span = ChunkSpan { id, start, end, near: false };
            Found { span, vectors: Vectors::default() }
        };
        spans.into_iter().map(chunk).collect()
    }

    /// Adds the places that hold nearly a chunk's text; one whose chunk is gone becomes a chunk of its own.
    fn near_places(&mut self) {
        for (partition, place, span, text) in std::mem::take(&mut self.near) {
            let has_home = |chunk: &&mut Chunk| chunk.places.iter().any(|place| !place.near);
            let known = self.homes.get_mut(partition, span.id).filter(has_home);
            if let Some(chunk) = known {
                chunk.places.push(place);
                continue;
            }
            let id = chunk_id(self.state.store.seed, &text, |id| {
                self.homes.get(partition, id).map(|chunk| &*chunk.text)
            });
            let home = (place.session, place.turn);
            let chunk = self.homes.enter(partition, id, || text, home);
            chunk.places.push(Place { near: false, ..place });
            self.stale.insert(home);
            let turn = self.state.session_mut(home.0).turns.get_mut(&home.1);
            for known in turn.into_iter().flat_map(|turn| &mut turn.chunks) {
                if *known == span {
                    *known = ChunkSpan { id, near: false, ..span };
                }
            }
        }
    }

    /// Lets the turns with a subject supersede each other.
    fn versions(&mut self) {
        let dim = self.state.dim();
        let State { sessions, partitions, .. } = &mut self.state;
        for (&id, session) in sessions.iter() {
            let Some(scope) = &session.scope else { continue };
            for (&turn, state) in &session.turns {
                if let Some((subject, version)) = state.version(id, turn) {
                    let partition = partitions.entry(partition_key(scope));
                    let partition = partition.or_insert_with(|| Partition::new(dim));
                    partition.add_version(subject, version);
                }
            }
        }
    }

    /// Embeds chunks whose vectors are lost, then indexes all that have a place.
    fn complete_vectors(&mut self) -> Result<()> {
        let dim = self.state.dim();
        let mut chunks: Vec<Vec<Chunk>> = self.partitions.iter().map(|_| Vec::new()).collect();
        for (partition, mut chunk) in std::mem::take(&mut self.homes).chunks {
            let homes = chunk.places.iter().filter(|place| !place.near);
            let Some(first) = homes.min_by_key(|place| place.order) else { continue };
            if chunk.vectors.is_empty() && self.has_foreign {
                chunk.home = (first.session, first.turn);
                self.state.without_vectors.insert(chunk.home);
            } else if chunk.vectors.is_empty() {
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
            chunks[partition].push(chunk);
        }
        for (known, chunks) in std::mem::take(&mut self.partitions).into_iter().zip(chunks) {
            if chunks.is_empty() {
                continue;
            }
            let partition = self.state.partitions.entry(known.key);
            let partition = partition.or_insert_with(|| Partition::new(dim));
            match known.image {
                Some(image) => partition.restore(image, chunks),
                None => partition.insert_all(chunks),
            }
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
            segment.walk(end, |blob, payload| {
                let Ok(body) = Body::decode(blob.kind, payload) else { return };
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

impl Store {
    /// After loading: finds the place to append, drops what nothing refers to, writes what was made anew.
    fn settle(&self, stale: &BTreeSet<(u64, u64)>, stale_summaries: &BTreeSet<u64>) -> Result<()> {
        let mut writer = self.writer()?;
        let (unused, last, purge_pending) = {
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
            let record = crate::format::SessionRecord { summary: Some(blob), ..record };
            changes.insert(Key::Session(id), Record::Session(record));
        }
        Ok(changes.into_iter().map(|(key, record)| Change::put(key, record)).collect())
    }
}

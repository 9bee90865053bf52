//! Checking a store against its own checksums and its indexes against the log, and mending what can be derived.
//! Knows nothing of search; it reads the files as an opening does and compares.

mod names;

use std::collections::{BTreeMap, BTreeSet};

use self::names::{FoundNames, LOST_AND_FOUND, free_name};
use super::load::load;
use super::records::{Change, Entry};
use super::state::{PartitionKey, State};
use super::{Store, Writer};
use crate::format::{
    BlobRef, Body, ChunkSpan, Key, Kind, Record, SessionRecord, TurnChunks, TurnRecord,
    decode_names, encode_names,
};
use crate::partition::Partition;
use crate::summary::Summary;
use crate::{Cancel, Result, Role, Scope, chunk};

/// What became of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// It can be derived from what is intact: [`Store::doctor`] with `repair` does it.
    Possible,
    /// It was derived anew.
    Done,
    /// It cannot be derived; with `repair` its place is left empty, so that the rest is whole.
    Lost,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// What it is, and where.
    pub what: String,
    /// What became of it.
    pub repair: Repair,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Checkup {
    /// Records of the database that were read.
    pub records: usize,
    /// Records of segments that they refer to, all of them read.
    pub blobs: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Chunks in the indexes that were compared with the log.
    pub chunks: usize,
    /// What is not as it should be; empty for a store that is whole.
    pub problems: Vec<Problem>,
}

/// What a repair needs to know besides the text of the problems.
#[derive(Default)]
struct Findings {
    /// Turns whose record is damaged or missing.
    turns: BTreeSet<(u64, u64)>,
    /// Turns whose text is damaged.
    bodies: BTreeSet<(u64, u64)>,
    /// Sessions whose record or names are damaged.
    sessions: BTreeSet<u64>,
    /// Sessions whose summary is damaged or missing.
    summaries: BTreeSet<u64>,
    /// Keys of records that are lost for good.
    lost: BTreeSet<Key>,
    /// Keys that are none of this format.
    unknown_keys: Vec<Vec<u8>>,
    /// Segments whose header is damaged.
    headers: Vec<u32>,
}

/// Intact records of the segments that a repair can use.
#[derive(Default)]
struct Salvage {
    bodies: BTreeMap<(u64, u64), (BlobRef, Body)>,
    chunks: BTreeMap<(u64, u64), BlobRef>,
    names: FoundNames,
}

impl Store {
    /// Reads every record and compares every checksum; derives the indexes anew and compares them with those in use.
    ///
    /// With `repair` what can be derived is made anew: chunks, vectors and summaries from the log, turns and names whose
    /// database record is lost from the segments, indexes from all of it. A turn that is lost is left as a forgotten
    /// one, and a snapshot with a lost part is removed, so that the store is whole afterwards and says what it lost here.
    /// A turn whose record was lost comes back as retracted if a neighbour is: that is not written anywhere else.
    /// A session whose names are nowhere becomes `session N` of the user `lost+found`. One that comes back where another
    /// session has its name by now gets one that says so: `NAME (lost+found, session N)`.
    /// Where two sessions were given one number, as earlier versions did once the database had lost records, nothing comes
    /// back that could be the other one's; its bytes stay.
    ///
    /// # Errors
    /// `Cancelled`, between two steps; `Storage`; what the embedder reports.
    ///
    /// # Cost
    /// Reads all files, and holds the indexes twice for a moment. Readers go on; writers wait.
    pub fn doctor(&self, repair: bool, cancel: &Cancel) -> Result<Checkup> {
        let mut writer = self.writer()?;
        let mut checkup = Checkup::default();
        let mut findings = Findings::default();
        let entries = writer.records.scan()?;
        checkup.records = entries.len();
        self.check_files(&entries, &mut checkup, &mut findings, cancel)?;
        cancel.check("doctor")?;
        if self.read().refs_lost {
            self.check_unknown(&mut checkup, &mut findings)?;
        }
        cancel.check("doctor")?;
        self.check_indexes(entries, &mut checkup)?;
        for (key, image) in self.images() {
            if let Err(error) = image {
                let what = format!("image of {}: {error}", partition_name(&key));
                checkup.note(what, Repair::Possible);
            }
        }
        if !repair || checkup.problems.is_empty() {
            return Ok(checkup);
        }
        cancel.check("doctor")?;
        let mended = self.mend(&mut writer, &findings, &mut checkup);
        if mended.is_err() {
            writer.appender.abandon();
        }
        mended?;
        Ok(checkup)
    }

    /// Every record of the database and every record of a segment that one refers to.
    fn check_files(
        &self,
        entries: &[Entry],
        checkup: &mut Checkup,
        findings: &mut Findings,
        cancel: &Cancel,
    ) -> Result<()> {
        let state = self.read_long();
        let mut present: BTreeSet<(u64, u64)> = BTreeSet::new();
        for (key_bytes, value) in entries {
            cancel.check("doctor")?;
            let Ok(key) = Key::decode(key_bytes) else {
                checkup.note("a record of the database has an unknown key".into(), Repair::Lost);
                findings.unknown_keys.push(key_bytes.clone());
                continue;
            };
            let record = match value {
                Ok(value) => Record::decode(&key, value),
                Err(error) => Err(crate::Error::corrupted(error.to_string())),
            };
            match record {
                Err(error) => findings.damaged(checkup, key, &error.to_string()),
                Ok(record) => {
                    if let Key::Turn(session, turn) = key {
                        present.insert((session, turn));
                    }
                    for blob in record.refs() {
                        checkup.blobs += 1;
                        checkup.bytes += blob.record_bytes();
                        if let Err(error) = check_blob(&state, blob) {
                            findings.damaged_blob(checkup, key, blob.kind, &error.to_string());
                        }
                    }
                }
            }
        }
        for (&id, session) in &state.sessions {
            let missing = (0..session.num_turns).filter(|turn| !present.contains(&(id, *turn)));
            for turn in
                missing.filter(|turn| !findings.turns.contains(&(id, *turn))).collect::<Vec<_>>()
            {
                findings.damaged(checkup, Key::Turn(id, turn), "it is missing");
            }
            if findings.sessions.contains(&id) {
                continue;
            }
            if session.record.is_none() {
                findings.damaged(checkup, Key::Session(id), "it is missing");
            } else if session.scope.is_none() {
                findings.damaged(checkup, Key::Session(id), "its names are those of another one");
            }
        }
        let segments = state.segments.values().filter(|segment| state.is_live(segment.number()));
        for segment in segments.filter(|segment| !segment.header_is_intact()) {
            let what = format!("{}: header does not match", segment.path().display());
            checkup.note(what, Repair::Possible);
            findings.headers.push(segment.number());
        }
        Ok(())
    }

    /// Turns of the segments that the database does not know: it lost its latest records.
    fn check_unknown(&self, checkup: &mut Checkup, findings: &mut Findings) -> Result<()> {
        let state = self.read_long();
        let mut unknown = BTreeSet::new();
        let mut names = FoundNames::default();
        for segment in state.segments.values() {
            // Every payload is read: a damaged length hides no turn behind it.
            segment.walk(0, |blob, payload| {
                names.note(blob, payload);
                let Ok(body) = Body::decode(blob.kind, payload) else { return };
                let known = state.sessions.get(&body.head.session);
                if known.is_none_or(|session| body.head.turn >= session.num_turns) {
                    unknown.insert((body.head.session, body.head.turn));
                }
            })?;
        }
        let (shared, unknown): (BTreeSet<_>, BTreeSet<_>) =
            unknown.into_iter().partition(|(id, _)| names.is_shared(&state, *id));
        let shared: BTreeSet<u64> = shared.into_iter().map(|(id, _)| id).collect();
        for id in shared {
            let what = format!("session {id}: another session with its number has turns here");
            checkup.note(what, Repair::Lost);
        }
        for (id, turn) in unknown {
            findings.damaged(checkup, Key::Turn(id, turn), "the database does not know it");
            if !state.sessions.contains_key(&id) && !findings.sessions.contains(&id) {
                findings.damaged(checkup, Key::Session(id), "the database does not know it");
            }
        }
        Ok(())
    }

    /// The indexes in use against ones that are derived from the files.
    fn check_indexes(&self, entries: Vec<Entry>, checkup: &mut Checkup) -> Result<()> {
        let (store, segments) = {
            let state = self.read();
            (state.store.clone(), state.segments.clone())
        };
        let derived = load(store, segments, entries, &*self.embedder, &self.options, None)?.state;
        let state = self.read_long();
        let keys: BTreeSet<&PartitionKey> =
            state.partitions.keys().chain(derived.partitions.keys()).collect();
        let empty = Partition::new(self.dim());
        for key in keys {
            let used = state.partitions.get(key).unwrap_or(&empty);
            let log = derived.partitions.get(key).unwrap_or(&empty);
            checkup.chunks += used.len();
            let differing = used.differing(log);
            if differing > 0 {
                let name = partition_name(key);
                let what = format!("index of {name}: {differing} chunks differ from the log");
                checkup.note(what, Repair::Possible);
            }
        }
        for (number, live) in &derived.live_bytes {
            let counted = state.live_bytes.get(number).copied().unwrap_or(0);
            if counted != *live {
                let what =
                    format!("segment {number:06}: {counted} bytes counted as in use, {live} are");
                checkup.note(what, Repair::Possible);
            }
        }
        Ok(())
    }

    /// Writes what can be derived, leaves empty places for what is lost, and takes the result over.
    fn mend(&self, writer: &mut Writer, findings: &Findings, checkup: &mut Checkup) -> Result<()> {
        for number in &findings.headers {
            if let Some(segment) = self.read().segments.get(number) {
                segment.mend_header()?;
            }
        }
        let salvage = self.salvage(findings)?;
        let mut changes = self.replacements(writer, findings, &salvage, checkup)?;
        let mut store = self.read().store.clone();
        let highest = findings.sessions.iter().max().map_or(0, |id| id + 1);
        store.next_session = store.next_session.max(highest);
        changes.push(Change::put(Key::Store, Record::Store(store)));
        writer.records.remove_unknown(&findings.unknown_keys)?;
        drop(self.publish(writer, &changes)?);
        let entries = writer.records.scan()?;
        let (store, segments) = {
            let state = self.read();
            (state.store.clone(), state.segments.clone())
        };
        let mut loaded = load(store, segments, entries, &*self.embedder, &self.options, None)?;
        loaded.stale_summaries.extend(&findings.summaries);
        for &id in &loaded.stale_summaries {
            let Some(session) = loaded.state.sessions.get(&id) else { continue };
            let summary = loaded.state.summarize(session, |_| true);
            loaded.state.session_mut(id).summary = summary;
        }
        let keys: Vec<PartitionKey> = self.read().partitions.keys().cloned().collect();
        *self.write() = loaded.state;
        self.remove_images(&keys)?;
        let changes = self.made_anew(writer, &loaded.stale, &loaded.stale_summaries)?;
        drop(self.publish(writer, &changes)?);
        self.load_graphs();
        self.index_in_background();
        for problem in checkup.problems.iter_mut().filter(|it| it.repair == Repair::Possible) {
            problem.repair = Repair::Done;
        }
        Ok(())
    }

    /// What the segments hold of the turns and names whose database record is lost.
    fn salvage(&self, findings: &Findings) -> Result<Salvage> {
        let mut salvage = Salvage::default();
        if findings.turns.is_empty() && findings.sessions.is_empty() {
            return Ok(salvage);
        }
        let segments: Vec<_> = self.read().segments.values().cloned().collect();
        for segment in segments {
            segment.walk(0, |blob, payload| {
                salvage.names.note(blob, payload);
                if let Ok(body) = Body::decode(blob.kind, payload) {
                    let turn = (body.head.session, body.head.turn);
                    if findings.turns.contains(&turn) {
                        salvage.bodies.insert(turn, (blob, body));
                    }
                } else if let Ok(chunks) = TurnChunks::decode(blob.kind, payload) {
                    salvage.chunks.insert((chunks.session, chunks.turn), blob);
                }
            })?;
        }
        let state = self.read();
        let Salvage { bodies, chunks, names } = &mut salvage;
        bodies.retain(|(id, _), _| !names.is_shared(&state, *id));
        chunks.retain(|(id, _), _| !names.is_shared(&state, *id));
        Ok(salvage)
    }

    /// The records that take the place of damaged ones.
    fn replacements(
        &self,
        writer: &mut Writer,
        findings: &Findings,
        salvage: &Salvage,
        checkup: &mut Checkup,
    ) -> Result<Vec<Change>> {
        let state = self.read();
        let mut changes = Vec::new();
        for key in &findings.lost {
            changes.push(Change::remove(*key));
            let (Key::Page(id, _) | Key::Snapshot(id)) = *key else { continue };
            let Some(session) = state.sessions.get(&id) else { continue };
            let is_evicted = |page: &u64| session.pages.get(page).is_some_and(|it| it.evicted > 0);
            if matches!(key, Key::Page(_, page) if is_evicted(page)) {
                continue;
            }
            // A snapshot without one of its pages is none.
            changes.push(Change::remove(Key::Snapshot(id)));
            let pages = session.pages.keys();
            changes.extend(pages.map(|page| Change::remove(Key::Page(id, *page))));
        }
        let mut given: BTreeSet<Scope> = BTreeSet::new();
        for &id in &findings.sessions {
            let known = state.sessions.get(&id).and_then(|session| session.scope.as_ref());
            let found = salvage.names.of(&state, id);
            let told = known.or(found.map(|(scope, _)| scope)).cloned();
            // One whose name another has is not known by it.
            let told = told.or_else(|| state.told_scope(id).ok()).unwrap_or_else(|| {
                checkup.note(format!("session {id}: its names are nowhere"), Repair::Lost);
                Scope::user(LOST_AND_FOUND).session(format!("session {id}"))
            });
            let is_taken = |scope: &Scope| {
                given.contains(scope) || state.by_scope.get(scope).is_some_and(|other| *other != id)
            };
            let scope = free_name(&told, id, is_taken);
            if scope != told {
                let what = format!("session {id}: another one has its name, it is {scope} now");
                checkup.note(what, Repair::Done);
            }
            let names = match found {
                Some((told, blob)) if *told == scope => *blob,
                _ => {
                    let session = scope.session_id().unwrap_or_default();
                    let (user, agent) = (scope.user_id(), scope.agent_id());
                    let payload = encode_names(id, user, agent, session);
                    writer.appender.append(Kind::Names, &payload)?
                }
            };
            given.insert(scope);
            let record = SessionRecord { names, summary: Some(self.no_summary(writer, &state)?) };
            changes.push(Change::put(Key::Session(id), Record::Session(record)));
        }
        for &(id, turn) in findings.turns.iter().chain(&findings.bodies) {
            let intact = state.sessions.get(&id).and_then(|session| session.turns.get(&turn));
            let record = match (salvage.bodies.get(&(id, turn)), intact) {
                (Some((blob, body)), _) => {
                    let near = [turn.wrapping_sub(1), turn + 1];
                    let is_retracted = |turn: &u64| {
                        let turns = state.sessions.get(&id).map(|session| &session.turns);
                        turns
                            .and_then(|turns| turns.get(turn))
                            .is_some_and(|it| it.record.retracted)
                    };
                    TurnRecord {
                        role: body.head.role,
                        time_ms: body.head.time_ms,
                        order: body.head.order,
                        remember: body.head.remember,
                        retracted: near.iter().any(is_retracted),
                        body: Some(*blob),
                        chunks: self.chunks_for(writer, &state, (id, turn), body, salvage)?,
                    }
                }
                (None, known) => {
                    if findings.turns.contains(&(id, turn)) {
                        let what = format!("session {id}, turn {turn}: its text is nowhere");
                        checkup.note(what, Repair::Lost);
                    }
                    let empty = TurnRecord {
                        role: Role::System,
                        time_ms: 0,
                        order: 0,
                        remember: false,
                        retracted: false,
                        body: None,
                        chunks: None,
                    };
                    let record = known.map_or(empty, |known| known.record);
                    TurnRecord { body: None, chunks: None, ..record }
                }
            };
            changes.push(Change::put(Key::Turn(id, turn), Record::Turn(record)));
        }
        Ok(changes)
    }

    /// An empty summary, to be computed once the session's turns are read.
    fn no_summary(&self, writer: &mut Writer, state: &State) -> Result<BlobRef> {
        writer.appender.append(Kind::Summary, &Summary::new(state.dim()).encode(state.store.tag()))
    }

    /// The chunks of a turn whose record was lost: the ones that were stored, or the turn cut again.
    fn chunks_for(
        &self,
        writer: &mut Writer,
        state: &State,
        turn: (u64, u64),
        body: &Body,
        salvage: &Salvage,
    ) -> Result<Option<BlobRef>> {
        if !body.head.remember || body.head.role == Role::Recalled {
            return Ok(None);
        }
        if let Some(blob) = salvage.chunks.get(&turn) {
            return Ok(Some(*blob));
        }
        let spans = chunk::spans(&body.text, self.options.chunk_words);
        let rows = spans.iter().map(|span| {
            let text = &body.text[span.bytes.clone()];
            // An opening compares texts; one that another chunk's identity belongs to is told apart there.
            let id = crate::partition::chunk_id(state.store.seed, text, |_| None);
            let (start, end) = (span.bytes.start as u64, span.bytes.end as u64);
            (ChunkSpan { id, start, end, near: false }, &[][..])
        });
        let payload = TurnChunks::encode(turn.0, turn.1, state.store.tag(), rows);
        writer.appender.append(Kind::Chunks, &payload).map(Some)
    }
}

impl Checkup {
    fn note(&mut self, what: String, repair: Repair) {
        self.problems.push(Problem { what, repair });
    }
}

impl Findings {
    /// A damaged or missing record of the database.
    fn damaged(&mut self, checkup: &mut Checkup, key: Key, why: &str) {
        let repair = match key {
            Key::Turn(id, turn) => {
                self.turns.insert((id, turn));
                Repair::Possible
            }
            Key::Session(id) => {
                self.sessions.insert(id);
                self.summaries.insert(id);
                Repair::Possible
            }
            Key::Snapshot(_) | Key::Page(..) => {
                self.lost.insert(key);
                Repair::Lost
            }
            // An opening would not have got so far; the record is in memory and is written with the repair.
            Key::Store => Repair::Possible,
        };
        checkup.note(format!("{}: its record: {why}", name(key)), repair);
    }

    /// A damaged record of a segment.
    fn damaged_blob(&mut self, checkup: &mut Checkup, key: Key, kind: Kind, why: &str) {
        let repair = match (key, kind) {
            (Key::Turn(..), Kind::Chunks | Kind::ChunksV1) => Repair::Possible,
            (Key::Turn(id, turn), _) => {
                self.bodies.insert((id, turn));
                Repair::Lost
            }
            (Key::Session(id), Kind::Summary | Kind::SummaryV1) => {
                self.summaries.insert(id);
                Repair::Possible
            }
            (Key::Session(id), _) => {
                self.sessions.insert(id);
                self.summaries.insert(id);
                Repair::Possible
            }
            _ => {
                self.lost.insert(key);
                Repair::Lost
            }
        };
        checkup.note(format!("{}: {kind:?}: {why}", name(key)), repair);
    }
}

fn partition_name((user, agent): &PartitionKey) -> String {
    format!("{user}/{}", agent.as_deref().unwrap_or("*"))
}

fn name(key: Key) -> String {
    match key {
        Key::Store => "the store".into(),
        Key::Session(id) => format!("session {id}"),
        Key::Turn(id, turn) => format!("session {id}, turn {turn}"),
        Key::Snapshot(id) => format!("session {id}, snapshot"),
        Key::Page(id, page) => format!("session {id}, page {page}"),
    }
}

/// Reads a record of a segment as an opening would.
fn check_blob(state: &State, blob: &BlobRef) -> Result<()> {
    let payload = state.read(blob)?;
    match blob.kind {
        Kind::Names | Kind::NamesV1 => decode_names(blob.kind, &payload).map(|_| ()),
        Kind::Body | Kind::BodyV1 => Body::decode(blob.kind, &payload).map(|_| ()),
        Kind::Chunks | Kind::ChunksV1 => TurnChunks::decode(blob.kind, &payload).map(|_| ()),
        Kind::Summary | Kind::SummaryV1 => {
            Summary::decode(blob.kind, &payload, &state.store).map(|_| ())
        }
        Kind::Page | Kind::State => Ok(()),
    }
}

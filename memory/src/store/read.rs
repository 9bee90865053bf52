//! Reading back: turns, snapshots, pages, and lists of what a scope holds.
//! Knows nothing of search; no lock is held while files are read.

use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;

use super::Store;
use super::images::IMAGE_ENDING;
use super::page_bytes::PageBytes;
use super::segment::Segment;
use super::state::{Session, State};
use super::vectors::GRAPH_ENDING;
use crate::format::{BlobRef, Body, Key, Record, SEGMENT_HEADER_BYTES, TurnRecord};
use crate::partition::{Chunk, Partition, Place};
use crate::tags::Accepted;
use crate::{
    ChunkId, Error, ErrorKind, Filter, Metadata, Result, Scope, Snapshot, Source, Turn, TurnId,
};

/// Threads that read a snapshot at most: beyond them memory is the limit.
const MAX_READERS: usize = 8;

/// A remembered piece of text, for a list of what memory holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ChunkInfo {
    /// Identity of the text.
    pub id: ChunkId,
    /// The text.
    pub text: String,
    /// The first place inside the scope where it was said.
    pub first: Source,
    /// The latest one.
    pub latest: Source,
    /// How often the scope holds it.
    pub count: u32,
}

/// A session, for a list of sessions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Its scope: user, agent, session.
    pub scope: Scope,
    /// Length of its log, retracted and forgotten turns included.
    pub num_turns: u64,
    /// Time of its latest turn, in milliseconds since the Unix epoch.
    pub last_time_ms: Option<i64>,
    /// Tokens in the stream at its snapshot, if it has one.
    pub position: Option<u64>,
    /// Its stored pages, evicted ones included.
    pub num_pages: usize,
}

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// Sessions of all users.
    pub sessions: usize,
    /// Turns, retracted and forgotten ones included.
    pub turns: u64,
    /// Distinct chunks that can be recalled.
    pub chunks: usize,
    /// Their sentence vectors.
    pub vectors: usize,
    /// Those of them that an opening left on the disk, and that no recall has looked at since.
    pub vectors_unread: usize,
    /// Those of them that searches without a filter find by a graph instead of scanning codes.
    pub vectors_in_graphs: usize,
    /// Distinct words, summed over the (user, agent) pairs.
    pub terms: usize,
    /// Turns that hold chunks without vectors, found by words alone until [`Store::reembed`] is through with them.
    pub turns_to_embed: usize,
    /// Subjects that something is known about.
    pub subjects: usize,
    /// Turns that a newer turn of the same subject superseded.
    pub superseded: usize,
    /// Places of chunks beyond their first: text that was said again, word by word or nearly so.
    pub duplicates: usize,
    /// Identity of the embedder that makes the vectors.
    pub embedder: String,
    /// Whether what is written is encrypted.
    pub encrypted: bool,
    /// Stored pages, evicted ones included.
    pub pages: usize,
    /// Segment files.
    pub segments: usize,
    /// Bytes in segment files that are in use.
    pub live_bytes: u64,
    /// Bytes in segment files that compaction will free.
    pub dead_bytes: u64,
    /// What was found damaged when the store was opened and could not be made anew: one text for each loss.
    pub damaged: Vec<String>,
}

/// What a store takes on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DiskUsage {
    /// Bytes of the segment files.
    pub segment_bytes: u64,
    /// Bytes of the database's files.
    pub database_bytes: u64,
    /// Bytes of the graphs' files, which can be made anew.
    pub graph_bytes: u64,
    /// Bytes of the images of the index, which can be made anew.
    pub image_bytes: u64,
    /// Bytes in use: records of the segments, keys and values of the database, and 16 bytes for each of the latter.
    pub live_bytes: u64,
}

impl Store {
    /// The turns of the scope's session in `range`, as far as there are any; a forgotten turn has no text left.
    ///
    /// # Errors
    /// `Corrupted` if one of them is damaged: the text names it.
    pub fn turns(&self, scope: &Scope, range: Range<TurnId>) -> Result<Vec<Turn>> {
        scope.check_session("turns")?;
        let mut found = Vec::new();
        {
            let state = self.read();
            let Some((_, session)) = state.session(scope) else { return Ok(Vec::new()) };
            for id in range.start..range.end.min(session.num_turns) {
                let turn = session
                    .turns
                    .get(&id)
                    .ok_or_else(|| lost_turn(scope, id, "its record is damaged"))?;
                let body = turn.record.body.map(|blob| open(&state, blob)).transpose()?;
                found.push((id, turn.record, body));
            }
        }
        let mut turns = Vec::with_capacity(found.len());
        for (id, record, body) in found {
            let body = body.map(|body| read_body(scope, id, body)).transpose()?;
            let Some(body) = body else {
                turns.push(forgotten_turn(id, &record));
                continue;
            };
            let Body { text, tokens, source, subject, expires_ms, metadata, .. } = body;
            turns.push(Turn {
                id,
                role: record.role,
                text,
                time_ms: record.time_ms,
                tokens,
                source,
                remember: record.remember,
                subject,
                expires_ms,
                metadata,
                retracted: record.retracted,
                forgotten: false,
            });
        }
        Ok(turns)
    }

    /// Length of the log of the scope's session; 0 if there is no such session.
    pub fn num_turns(&self, scope: &Scope) -> Result<u64> {
        scope.check_session("num_turns")?;
        Ok(self.read().session(scope).map_or(0, |(_, session)| session.num_turns))
    }

    /// The state that the scope's session was last committed with; none if it never was.
    ///
    /// # Errors
    /// `Incompatible` if another model wrote it; `Corrupted` if a part of it is damaged: the log is still there.
    pub fn snapshot(&self, scope: &Scope, fingerprint: [u8; 16]) -> Result<Option<Snapshot>> {
        let Some(open) = self.open_snapshot(scope, fingerprint)? else { return Ok(None) };
        let pages = open.read_pages()?;
        Ok(Some(Snapshot { position: open.position, state: open.state, pages }))
    }

    /// [`Store::snapshot`] whose pages are read later, or beside other work.
    ///
    /// # Errors
    /// As [`Store::snapshot`].
    pub fn open_snapshot(
        &self,
        scope: &Scope,
        fingerprint: [u8; 16],
    ) -> Result<Option<OpenSnapshot>> {
        scope.check_session("snapshot")?;
        let (record, state_blob, pages) = {
            let state = self.read();
            let Some((id, session)) = state.session(scope) else { return Ok(None) };
            let Some(Record::Snapshot(record)) = state.record(&Key::Snapshot(id)) else {
                return Ok(None);
            };
            if record.fingerprint != fingerprint {
                return Err(Error::new(
                    ErrorKind::Incompatible,
                    format!(
                        "snapshot of {scope}: expected fingerprint {:032x}, got {:032x}",
                        u128::from_be_bytes(fingerprint),
                        u128::from_be_bytes(record.fingerprint)
                    ),
                ));
            }
            let window = session.pages.iter().filter(|(_, page)| page.evicted == 0);
            let pages = window.map(|(page, record)| Ok((*page, open(&state, record.blob)?)));
            (record, open(&state, record.state)?, pages.collect::<Result<Vec<_>>>()?)
        };
        if pages.len() as u64 != record.num_window_pages {
            return Err(Error::corrupted(format!(
                "snapshot of {scope}: expected {} pages in its window, got {}",
                record.num_window_pages,
                pages.len()
            )));
        }
        let (position, state) = (record.position, read(state_blob)?);
        Ok(Some(OpenSnapshot { position, state, pages }))
    }

    /// One stored page of the scope's session, in its window or evicted and kept; none if it is not stored.
    ///
    /// # Errors
    /// `Corrupted` if it is damaged.
    pub fn page(&self, scope: &Scope, page: u64) -> Result<Option<Vec<u8>>> {
        self.open_page(scope, page)?.map(read).transpose()
    }

    /// [`Store::page`] in memory of the caller's, such as a device copies from; its length, and none if it is not stored.
    /// A page of another length than `out` is not read.
    ///
    /// # Errors
    /// `Corrupted` if it is damaged; what is in `out` then is unknown.
    pub fn page_into(&self, scope: &Scope, page: u64, out: &mut [u8]) -> Result<Option<usize>> {
        let Some((segment, blob)) = self.open_page(scope, page)? else { return Ok(None) };
        let len = segment.payload_len(&blob);
        if len == out.len() {
            segment.read_into(&blob, out)?;
        }
        Ok(Some(len))
    }

    /// [`Store::page`] where it lies in its file, checked; in memory of its own in an encrypted store, and where a process
    /// maps 16,384 pages already.
    ///
    /// What is mapped stays as it is whatever the store does, and keeps the folder locked. Its segment's file takes room on
    /// the disk as long, without a name once the store removed it, with all that was in it: what is forgotten meanwhile is
    /// gone from the disk once the map is. A file system that fails to read it again later ends the program.
    ///
    /// # Errors
    /// `Corrupted` if it is damaged.
    pub fn map_page(&self, scope: &Scope, page: u64) -> Result<Option<PageBytes>> {
        let open = self.open_page(scope, page)?;
        open.map(|(segment, blob)| segment.map(&blob, &self.lock)).transpose()
    }

    fn open_page(&self, scope: &Scope, page: u64) -> Result<Option<OpenBlob>> {
        scope.check_session("page")?;
        let state = self.read();
        let record = state.session(scope).and_then(|(_, session)| session.pages.get(&page));
        record.map(|record| open(&state, record.blob)).transpose()
    }

    /// Indexes of the stored pages of the scope's session, ascending, evicted and kept ones included.
    pub fn pages(&self, scope: &Scope) -> Result<Vec<u64>> {
        scope.check_session("pages")?;
        let state = self.read();
        let pages =
            state.session(scope).map(|(_, session)| session.pages.keys().copied().collect());
        Ok(pages.unwrap_or_default())
    }

    /// The chunks of a scope in the order in which they were first said; `range` counts from 0.
    ///
    /// With a `filter` those of turns whose metadata it accepts: `first`, `latest` and `count` of a chunk then know no
    /// other turn.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed scope, or a filter as [`Store::recall`] refuses it.
    pub fn chunks(
        &self,
        scope: &Scope,
        range: Range<usize>,
        filter: Option<&Filter>,
    ) -> Result<Vec<ChunkInfo>> {
        scope.check("chunks")?;
        filter.map_or(Ok(()), |filter| filter.check("chunks"))?;
        let state = self.read();
        let mut sessions: Vec<u64> = state.sessions_in(scope).map(|(id, ..)| id).collect();
        sessions.sort_unstable();
        let mut accepted: Vec<Accepted<'_>> = Vec::new();
        if let Some(filter) = filter {
            let partitions = state.partitions_in(scope);
            accepted.extend(partitions.map(|(_, partition)| partition.tags().accepted(filter)));
        }
        let visible = |place: &&Place| {
            sessions.binary_search(&place.session).is_ok()
                // A session's turns are those of one partition.
                && (filter.is_none()
                    || accepted.iter().any(|accepted| accepted.contains(place.session, place.turn)))
        };
        let mut chunks: Vec<(&Place, &Chunk)> = state
            .partitions_in(scope)
            .flat_map(|(_, partition)| partition.iter())
            .filter_map(|(_, chunk)| Some((chunk.places.iter().find(visible)?, chunk)))
            .collect();
        chunks.sort_by_key(|(first, _)| (first.order, first.start));
        let chunks =
            chunks.into_iter().skip(range.start).take(range.end.saturating_sub(range.start));
        let info = |(first, chunk): (&Place, &Chunk)| {
            let latest = chunk.places.iter().rfind(visible).unwrap_or(first);
            Some(ChunkInfo {
                id: ChunkId(chunk.id),
                text: chunk.text.to_string(),
                first: source(&state, first)?,
                latest: source(&state, latest)?,
                count: chunk.places.iter().filter(visible).count() as u32,
            })
        };
        Ok(chunks.filter_map(info).collect())
    }

    /// The users of whom there is a session, in the order of their names.
    pub fn users(&self) -> Vec<String> {
        let state = self.read();
        let mut users: Vec<&str> = state.by_scope.keys().map(Scope::user_id).collect();
        users.dedup();
        users.into_iter().map(str::to_owned).collect()
    }

    /// The sessions of a scope, by name.
    pub fn sessions(&self, scope: &Scope) -> Result<Vec<SessionInfo>> {
        scope.check("sessions")?;
        let state = self.read();
        let info = |(_, scope, session): (u64, &Scope, &Session)| SessionInfo {
            scope: scope.clone(),
            num_turns: session.num_turns,
            last_time_ms: session.turns.last_key_value().map(|(_, turn)| turn.record.time_ms),
            position: session.snapshot.map(|snapshot| snapshot.position),
            num_pages: session.pages.len(),
        };
        Ok(state.sessions_in(scope).map(info).collect())
    }

    /// What the store takes on the disk.
    ///
    /// # Errors
    /// `Storage`.
    ///
    /// # Cost
    /// Reads every record of the database; writers wait.
    pub fn disk_usage(&self) -> Result<DiskUsage> {
        let writer = self.writer()?;
        let state = self.read();
        let lengths = state.segments.values().map(|segment| segment.len());
        let derived = |ending| self.indexer.folder().map_or(0, |folder| folder.disk_bytes(ending));
        Ok(DiskUsage {
            segment_bytes: lengths.sum::<Result<u64>>()?,
            database_bytes: writer.records.disk_bytes()?,
            graph_bytes: derived(GRAPH_ENDING),
            image_bytes: derived(IMAGE_ENDING),
            live_bytes: state.live_bytes.values().sum::<u64>() + writer.records.live_bytes()?,
        })
    }

    /// Numbers about the whole store.
    pub fn stats(&self) -> Stats {
        let state = self.read();
        let partitions = state.partitions.values();
        let live_bytes = state.live_bytes.values().sum();
        let lengths = state.segments.values().filter_map(|segment| segment.len().ok());
        let stored: u64 = lengths.map(|len| len.saturating_sub(SEGMENT_HEADER_BYTES)).sum();
        Stats {
            sessions: state.by_scope.len(),
            turns: state.sessions.values().map(|session| session.num_turns).sum(),
            chunks: partitions.clone().map(|partition| partition.len()).sum(),
            vectors: partitions.clone().map(|partition| partition.num_vectors().0).sum(),
            vectors_unread: partitions.clone().map(|partition| partition.num_unread()).sum(),
            vectors_in_graphs: partitions.clone().map(|partition| partition.num_vectors().1).sum(),
            terms: partitions.clone().map(|partition| partition.words().num_terms()).sum(),
            turns_to_embed: state.without_vectors.len(),
            subjects: partitions.clone().map(|partition| partition.num_subjects().0).sum(),
            superseded: partitions.clone().map(|partition| partition.num_subjects().1).sum(),
            duplicates: partitions.clone().map(|partition| partition.num_duplicates()).sum(),
            embedder: state.store.embedder.clone(),
            encrypted: self.options.key.is_some(),
            pages: state.sessions.values().map(|session| session.pages.len()).sum(),
            segments: state.segments.len(),
            live_bytes,
            dead_bytes: stored.saturating_sub(live_bytes),
            damaged: state.damaged.clone(),
        }
    }
}

/// A session's snapshot whose pages were not read yet; what is committed meanwhile changes nothing of it.
#[derive(Debug)]
pub struct OpenSnapshot {
    /// Tokens in the stream at this point.
    pub position: u64,
    /// Opaque bytes of the caller.
    pub state: Vec<u8>,
    pages: Vec<(u64, OpenBlob)>,
}

impl OpenSnapshot {
    /// The pages of the window, by ascending index.
    ///
    /// # Errors
    /// `Corrupted` if one is damaged.
    pub fn read_pages(&self) -> Result<Vec<(u64, Vec<u8>)>> {
        read_side_by_side(&self.pages)
    }
}

/// A blob together with its open file: readable after the lock is let go, even if compaction removes the file.
pub(super) type OpenBlob = (Arc<Segment>, BlobRef);

pub(super) fn open(state: &State, blob: BlobRef) -> Result<OpenBlob> {
    Ok((state.segment(&blob)?, blob))
}

fn read((segment, blob): OpenBlob) -> Result<Vec<u8>> {
    segment.read(&blob)
}

/// Reads a window's pages, hundred megabytes of a model's, on a few threads at once, this one among them; on fewer where
/// the system gives no more.
fn read_side_by_side(pages: &[(u64, OpenBlob)]) -> Result<Vec<(u64, Vec<u8>)>> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_READERS));
    let mut parts = pages.chunks(pages.len().div_ceil(threads).max(1));
    let Some(first) = parts.next() else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let rest: Vec<_> = parts
            .map(|part| {
                let thread = std::thread::Builder::new();
                (part, thread.spawn_scoped(scope, move || read_all(part)))
            })
            .collect();
        let mut all = read_all(first)?;
        for (part, thread) in rest {
            let read = match thread {
                Ok(thread) => {
                    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                }
                // The system refused it.
                Err(_) => read_all(part),
            };
            all.extend(read?);
        }
        Ok(all)
    })
}

fn read_all(pages: &[(u64, OpenBlob)]) -> Result<Vec<(u64, Vec<u8>)>> {
    pages.iter().map(|(page, (segment, blob))| Ok((*page, segment.read(blob)?))).collect()
}

/// A turn's body; an error names the turn.
pub(super) fn read_body(scope: &Scope, turn: TurnId, blob: OpenBlob) -> Result<Body> {
    let kind = blob.1.kind;
    let body = read(blob).and_then(|bytes| Body::decode(kind, &bytes));
    body.map_err(|error| lost_turn(scope, turn, &error.to_string()).with_source(error))
}

/// What is left of an erased turn.
fn forgotten_turn(id: TurnId, record: &TurnRecord) -> Turn {
    Turn {
        id,
        role: record.role,
        text: String::new(),
        time_ms: record.time_ms,
        tokens: Vec::new(),
        source: None,
        remember: record.remember,
        subject: None,
        expires_ms: None,
        metadata: Metadata::new(),
        retracted: record.retracted,
        forgotten: true,
    }
}

fn lost_turn(scope: &Scope, turn: TurnId, why: &str) -> Error {
    Error::corrupted(format!("turn {turn} of {scope} is lost: {why}"))
}

/// Where a chunk was said, in words; none if its session has no name.
pub(super) fn source(state: &State, place: &Place) -> Option<Source> {
    let session = state.sessions.get(&place.session)?;
    let scope = session.scope.as_ref()?;
    let turn = session.turns.get(&place.turn);
    let tags = state.partition(scope).map(Partition::tags);
    let metadata = tags.and_then(|tags| tags.metadata((place.session, place.turn)));
    Some(Source {
        user: scope.user_id().to_owned(),
        agent: scope.agent_id().map(str::to_owned),
        session: scope.session_id()?.to_owned(),
        turn: place.turn,
        role: place.role,
        bytes: place.start..place.end,
        time_ms: place.time_ms,
        name: turn.and_then(|turn| turn.source.as_deref()).map(str::to_owned),
        subject: turn.and_then(|turn| turn.subject.as_deref()).map(str::to_owned),
        expires_ms: turn.and_then(|turn| turn.expires_ms),
        metadata: metadata.cloned().unwrap_or_default(),
    })
}

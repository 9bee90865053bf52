//! Every byte that reaches the disk: records, payloads, checksums, versions. Drawn in docs/format.md.
//! Knows no file, index or lock; it turns values into bytes and back, and refuses bytes it did not write.

mod fields;
pub(crate) mod vectors;

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128_with_seed};

use self::fields::{
    Reader, put_bytes, put_floats, put_metadata, put_option, put_option_ref, put_ref, put_u32,
    put_u64, role_code,
};
use crate::{Error, ErrorKind, Metadata, Result, Role};

/// Version of everything in this file; another one is refused as [`ErrorKind::Incompatible`].
pub(crate) const VERSION: u32 = 1;
/// First bytes of a segment file.
pub(crate) const SEGMENT_MAGIC: [u8; 8] = *b"mka-seg\n";
/// First bytes of a record in a segment file.
pub(crate) const RECORD_MAGIC: [u8; 4] = *b"mkaR";
/// Magic (8), version (4), number of the segment (4).
pub(crate) const SEGMENT_HEADER_BYTES: u64 = 16;
/// Magic (4), kind (1), zero (3), length (4), hash (8).
pub(crate) const RECORD_HEADER_BYTES: u64 = 20;
/// The longest payload of a record: 1 GiB, so that a length fits 32 bits with room to spare.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 1 << 30;

/// What the payload of a segment record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Names of a session's scope.
    Names,
    /// A turn: text, source, tokens.
    Body,
    /// A turn's chunks and their vectors: derived from its body.
    Chunks,
    /// A page of a session's cache.
    Page,
    /// A snapshot's opaque state.
    State,
    /// A session's running means: derived from its chunks.
    Summary,
}

impl Kind {
    fn code(self) -> u8 {
        match self {
            Self::Names => 1,
            Self::Body => 2,
            Self::Chunks => 3,
            Self::Page => 4,
            Self::State => 5,
            Self::Summary => 6,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Names, Self::Body, Self::Chunks, Self::Page, Self::State, Self::Summary]
            .into_iter()
            .find(|kind| kind.code() == code)
    }
}

/// Where a payload lies, and what its bytes must hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlobRef {
    pub(crate) segment: u32,
    /// Of the record's header, from the start of the file.
    pub(crate) offset: u64,
    /// Of the payload alone.
    pub(crate) len: u32,
    pub(crate) hash: u64,
    pub(crate) kind: Kind,
}

impl BlobRef {
    /// Bytes that the record takes in its segment.
    pub(crate) fn record_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES + u64::from(self.len)
    }
}

/// The hash of a payload; the kind is its seed, so that one kind never passes for another.
pub(crate) fn payload_hash(kind: Kind, payload: &[u8]) -> u64 {
    xxh3_64_with_seed(payload, u64::from(kind.code()))
}

/// The header of a segment file.
pub(crate) fn segment_header(number: u32) -> [u8; SEGMENT_HEADER_BYTES as usize] {
    let mut header = [0; SEGMENT_HEADER_BYTES as usize];
    header[..8].copy_from_slice(&SEGMENT_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..].copy_from_slice(&number.to_le_bytes());
    header
}

/// The header of a segment record.
pub(crate) fn record_header(kind: Kind, len: u32, hash: u64) -> [u8; RECORD_HEADER_BYTES as usize] {
    let mut header = [0; RECORD_HEADER_BYTES as usize];
    header[..4].copy_from_slice(&RECORD_MAGIC);
    header[4] = kind.code();
    header[8..12].copy_from_slice(&len.to_le_bytes());
    header[12..].copy_from_slice(&hash.to_le_bytes());
    header
}

/// Reads a record's header: kind, length, hash.
pub(crate) fn parse_record_header(header: &[u8]) -> Result<(Kind, u32, u64)> {
    let mut reader = Reader::new(header, "record header");
    if reader.array()? != RECORD_MAGIC {
        return Err(Error::corrupted("record header: expected its magic, got other bytes"));
    }
    let kind = reader.kind()?;
    if reader.array()? != [0u8; 3] {
        return Err(Error::corrupted("record header: expected three zero bytes"));
    }
    let parsed = (kind, reader.u32()?, reader.u64()?);
    reader.finish()?;
    Ok(parsed)
}

// --- payloads of segment records ---

/// What a turn's payload says about itself: the log can be read from the segments alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TurnHead {
    pub(crate) session: u64,
    pub(crate) turn: u64,
    /// Number of the commit that appended it.
    pub(crate) commit: u64,
    pub(crate) order: u64,
    pub(crate) time_ms: i64,
    pub(crate) role: Role,
    pub(crate) remember: bool,
}

impl TurnHead {
    /// Whether this is the turn that a database record is about.
    pub(crate) fn belongs_to(&self, session: u64, turn: u64, record: &TurnRecord) -> bool {
        (self.session, self.turn) == (session, turn)
            && (self.order, self.time_ms, self.role, self.remember)
                == (record.order, record.time_ms, record.role, record.remember)
    }
}

/// A turn's payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Body {
    pub(crate) head: TurnHead,
    pub(crate) source: Option<String>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) metadata: Metadata,
}

impl Body {
    /// The same fields as those of the struct, borrowed. Without metadata it ends after the tokens, as bodies did
    /// before there was any.
    pub(crate) fn encode(
        head: &TurnHead,
        source: Option<&str>,
        text: &str,
        tokens: &[u32],
        metadata: &Metadata,
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + text.len() + tokens.len() * 4);
        put_u64(&mut out, head.session);
        put_u64(&mut out, head.turn);
        put_u64(&mut out, head.commit);
        put_u64(&mut out, head.order);
        put_u64(&mut out, head.time_ms as u64);
        out.push(role_code(head.role));
        out.push(u8::from(head.remember));
        put_option(&mut out, source);
        put_bytes(&mut out, text.as_bytes());
        put_u32(&mut out, tokens.len() as u32);
        tokens.iter().for_each(|&token| put_u32(&mut out, token));
        put_metadata(&mut out, metadata);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "turn");
        let head = TurnHead {
            session: reader.u64()?,
            turn: reader.u64()?,
            commit: reader.u64()?,
            order: reader.u64()?,
            time_ms: reader.u64()? as i64,
            role: reader.role()?,
            remember: reader.flag()?,
        };
        let source = reader.option()?;
        let text = reader.text()?;
        let num_tokens = reader.u32()? as usize;
        let tokens = reader.numbers(num_tokens, u32::from_le_bytes)?;
        let metadata = reader.metadata()?;
        reader.finish()?;
        Ok(Self { head, source, text, tokens, metadata })
    }
}

/// One chunk of a turn.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TurnChunk {
    pub(crate) id: u128,
    /// Bytes of the turn's text.
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// One vector per sentence, row-major; empty if another turn holds them.
    pub(crate) vectors: Vec<f32>,
}

/// A turn's chunks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TurnChunks {
    pub(crate) session: u64,
    pub(crate) turn: u64,
    pub(crate) chunks: Vec<TurnChunk>,
}

impl TurnChunks {
    /// `chunks`: id, start, end and vectors `(sentences, dim)` of each.
    pub(crate) fn encode<'a>(
        session: u64,
        turn: u64,
        chunks: impl ExactSizeIterator<Item = (u128, u64, u64, &'a [f32])>,
    ) -> Vec<u8> {
        let mut out = Vec::new();
        put_u64(&mut out, session);
        put_u64(&mut out, turn);
        put_u32(&mut out, chunks.len() as u32);
        for (id, start, end, vectors) in chunks {
            out.extend_from_slice(&id.to_le_bytes());
            put_u64(&mut out, start);
            put_u64(&mut out, end);
            put_floats(&mut out, vectors);
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "chunks of a turn");
        let (session, turn) = (reader.u64()?, reader.u64()?);
        let num_chunks = reader.u32()? as usize;
        let mut chunks = Vec::new();
        for _ in 0..num_chunks {
            let id = u128::from_le_bytes(reader.array()?);
            let (start, end) = (reader.u64()?, reader.u64()?);
            chunks.push(TurnChunk { id, start, end, vectors: reader.floats()? });
        }
        reader.finish()?;
        Ok(Self { session, turn, chunks })
    }
}

/// The names of a session's scope: user, agent, session.
pub(crate) fn encode_names(user: &str, agent: Option<&str>, session: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_bytes(&mut out, user.as_bytes());
    put_option(&mut out, agent);
    put_bytes(&mut out, session.as_bytes());
    out
}

/// Reads what [`encode_names`] wrote.
pub(crate) fn decode_names(bytes: &[u8]) -> Result<(String, Option<String>, String)> {
    let mut reader = Reader::new(bytes, "names of a session");
    let names = (reader.text()?, reader.option()?, reader.text()?);
    reader.finish()?;
    Ok(names)
}

/// A session's running means: how many vectors went in, and one mean per rate.
pub(crate) fn encode_summary(count: u64, means: &[Vec<f32>]) -> Vec<u8> {
    let mut out = Vec::new();
    put_u64(&mut out, count);
    put_u32(&mut out, means.len() as u32);
    means.iter().for_each(|mean| put_floats(&mut out, mean));
    out
}

/// Reads what [`encode_summary`] wrote.
pub(crate) fn decode_summary(bytes: &[u8]) -> Result<(u64, Vec<Vec<f32>>)> {
    let mut reader = Reader::new(bytes, "summary");
    let count = reader.u64()?;
    let mut means = Vec::new();
    for _ in 0..reader.u32()? {
        means.push(reader.floats()?);
    }
    reader.finish()?;
    Ok((count, means))
}

// --- records of the database ---

/// Facts about the whole store, written at creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreRecord {
    pub(crate) seed: u64,
    pub(crate) dim: u32,
    pub(crate) embedder: String,
    /// Number of the next session; never used twice.
    pub(crate) next_session: u64,
    /// A `forget` was recorded but its bytes may still be in the segments.
    pub(crate) purge_pending: bool,
}

/// A session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SessionRecord {
    pub(crate) names: BlobRef,
    pub(crate) summary: Option<BlobRef>,
}

/// A turn, without its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TurnRecord {
    pub(crate) role: Role,
    pub(crate) time_ms: i64,
    /// Its place among all turns of its user, in the order of commits.
    pub(crate) order: u64,
    pub(crate) remember: bool,
    pub(crate) retracted: bool,
    /// None only for a forgotten turn.
    pub(crate) body: Option<BlobRef>,
    pub(crate) chunks: Option<BlobRef>,
}

/// A session's snapshot, without its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SnapshotRecord {
    pub(crate) fingerprint: [u8; 16],
    pub(crate) position: u64,
    pub(crate) num_window_pages: u64,
    pub(crate) state: BlobRef,
}

/// A page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRecord {
    pub(crate) blob: BlobRef,
    /// 0 while the page is in the window; else its place among the session's evictions.
    pub(crate) evicted: u64,
}

/// The key of a database record: sorted by session, then by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Store,
    Session(u64),
    Turn(u64, u64),
    Snapshot(u64),
    Page(u64, u64),
}

/// A database record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Record {
    Store(StoreRecord),
    Session(SessionRecord),
    Turn(TurnRecord),
    Snapshot(SnapshotRecord),
    Page(PageRecord),
}

impl Key {
    pub(crate) fn encode(&self) -> Vec<u8> {
        // Big-endian numbers: the database's order is the numbers' order.
        let mut out = Vec::with_capacity(17);
        match *self {
            Self::Store => out.push(b'm'),
            Self::Session(session) => {
                out.push(b's');
                out.extend_from_slice(&session.to_be_bytes());
            }
            Self::Turn(session, turn) => {
                out.push(b't');
                out.extend_from_slice(&session.to_be_bytes());
                out.extend_from_slice(&turn.to_be_bytes());
            }
            Self::Snapshot(session) => {
                out.push(b'n');
                out.extend_from_slice(&session.to_be_bytes());
            }
            Self::Page(session, page) => {
                out.push(b'p');
                out.extend_from_slice(&session.to_be_bytes());
                out.extend_from_slice(&page.to_be_bytes());
            }
        }
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "key");
        let prefix = reader.u8()?;
        let mut number = || Ok::<u64, Error>(u64::from_be_bytes(reader.array()?));
        let key = match prefix {
            b'm' => Self::Store,
            b's' => Self::Session(number()?),
            b't' => Self::Turn(number()?, number()?),
            b'n' => Self::Snapshot(number()?),
            b'p' => Self::Page(number()?, number()?),
            other => {
                return Err(Error::corrupted(format!("key: unknown prefix {other:#04x}")));
            }
        };
        reader.finish()?;
        Ok(key)
    }
}

impl Record {
    /// The value under `key`: version, fields, checksum over key and value.
    pub(crate) fn encode(&self, key: &Key) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        put_u32(&mut out, VERSION);
        match self {
            Self::Store(record) => {
                put_u64(&mut out, record.seed);
                put_u32(&mut out, record.dim);
                put_u64(&mut out, record.next_session);
                out.push(u8::from(record.purge_pending));
                put_bytes(&mut out, record.embedder.as_bytes());
            }
            Self::Session(record) => {
                put_ref(&mut out, &record.names);
                put_option_ref(&mut out, record.summary.as_ref());
            }
            Self::Turn(record) => {
                out.push(role_code(record.role));
                out.push(u8::from(record.remember) | u8::from(record.retracted) << 1);
                put_u64(&mut out, record.time_ms as u64);
                put_u64(&mut out, record.order);
                put_option_ref(&mut out, record.body.as_ref());
                put_option_ref(&mut out, record.chunks.as_ref());
            }
            Self::Snapshot(record) => {
                out.extend_from_slice(&record.fingerprint);
                put_u64(&mut out, record.position);
                put_u64(&mut out, record.num_window_pages);
                put_ref(&mut out, &record.state);
            }
            Self::Page(record) => {
                put_u64(&mut out, record.evicted);
                put_ref(&mut out, &record.blob);
            }
        }
        let sum = checksum(key, &out);
        put_u64(&mut out, sum);
        out
    }

    /// Reads the value under `key`; the version is looked at before the checksum,
    /// so that a newer format says so.
    pub(crate) fn decode(key: &Key, bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(bytes, "database record");
        let version = reader.u32()?;
        let fields_end = bytes.len().checked_sub(8).filter(|&end| end >= 4).ok_or_else(|| {
            Error::corrupted(format!(
                "database record: expected a checksum, got {} bytes",
                bytes.len()
            ))
        })?;
        let (fields, sum) = bytes.split_at(fields_end);
        let intact = sum == checksum(key, fields).to_le_bytes();
        if !intact {
            return Err(Error::corrupted("database record: checksum does not match"));
        }
        if version != VERSION {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!("database record: expected format version {VERSION}, got {version}"),
            ));
        }
        let mut reader = Reader::new(&fields[4..], "database record");
        let record = match key {
            Key::Store => Self::Store(StoreRecord {
                seed: reader.u64()?,
                dim: reader.u32()?,
                next_session: reader.u64()?,
                purge_pending: reader.flag()?,
                embedder: reader.text()?,
            }),
            Key::Session(_) => Self::Session(SessionRecord {
                names: reader.blob_ref()?,
                summary: reader.option_ref()?,
            }),
            Key::Turn(..) => {
                let role = reader.role()?;
                let flags = reader.u8()?;
                Self::Turn(TurnRecord {
                    role,
                    remember: flags & 1 != 0,
                    retracted: flags & 2 != 0,
                    time_ms: reader.u64()? as i64,
                    order: reader.u64()?,
                    body: reader.option_ref()?,
                    chunks: reader.option_ref()?,
                })
            }
            Key::Snapshot(_) => Self::Snapshot(SnapshotRecord {
                fingerprint: reader.array()?,
                position: reader.u64()?,
                num_window_pages: reader.u64()?,
                state: reader.blob_ref()?,
            }),
            Key::Page(..) => {
                Self::Page(PageRecord { evicted: reader.u64()?, blob: reader.blob_ref()? })
            }
        };
        reader.finish()?;
        Ok(record)
    }

    /// The blobs that the record names.
    pub(crate) fn refs(&self) -> impl Iterator<Item = &BlobRef> {
        let pair = match self {
            Self::Store(_) => [None, None],
            Self::Session(record) => [Some(&record.names), record.summary.as_ref()],
            Self::Turn(record) => [record.body.as_ref(), record.chunks.as_ref()],
            Self::Snapshot(record) => [Some(&record.state), None],
            Self::Page(record) => [Some(&record.blob), None],
        };
        pair.into_iter().flatten()
    }

    /// The same, to be pointed elsewhere.
    pub(crate) fn refs_mut(&mut self) -> impl Iterator<Item = &mut BlobRef> {
        let pair = match self {
            Self::Store(_) => [None, None],
            Self::Session(record) => [Some(&mut record.names), record.summary.as_mut()],
            Self::Turn(record) => [record.body.as_mut(), record.chunks.as_mut()],
            Self::Snapshot(record) => [Some(&mut record.state), None],
            Self::Page(record) => [Some(&mut record.blob), None],
        };
        pair.into_iter().flatten()
    }
}

/// The hash that identifies an erased turn in a receipt.
pub(crate) fn turn_digest(seed: u64, session: u64, turn: u64, text: &str) -> u128 {
    let mut bytes = Vec::with_capacity(17 + text.len());
    bytes.push(b't');
    put_u64(&mut bytes, session);
    put_u64(&mut bytes, turn);
    bytes.extend_from_slice(text.as_bytes());
    xxh3_128_with_seed(&bytes, seed)
}

/// The hash that identifies an erased chunk of a session in a receipt.
pub(crate) fn chunk_digest(seed: u64, session: u64, turn: u64, id: u128) -> u128 {
    let mut bytes = Vec::with_capacity(33);
    bytes.push(b'c');
    put_u64(&mut bytes, session);
    put_u64(&mut bytes, turn);
    bytes.extend_from_slice(&id.to_le_bytes());
    xxh3_128_with_seed(&bytes, seed)
}

fn checksum(key: &Key, fields: &[u8]) -> u64 {
    let mut bytes = key.encode();
    bytes.extend_from_slice(fields);
    xxh3_64_with_seed(&bytes, u64::from(VERSION))
}

#[cfg(test)]
mod tests;

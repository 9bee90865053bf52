//! Payloads of segment records: turns, chunks, names, summaries. Kinds of version 1 are read, those of the present one written.
//! Knows no header and no record of the database.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::fields::{
    Reader, put_bytes, put_floats, put_metadata, put_option, put_u32, put_u64, role_code,
};
use super::{Kind, TurnRecord};
use crate::{Error, Metadata, NewTurn, Result, Role, Scope};

/// A chunk in a turn's record, without its floats: identity, start, end, whether it is near, how many floats.
const CHUNK_BYTES: usize = 16 + 8 + 8 + 1 + 4;

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
    /// What the turn is a fact about: the newest one of a subject supersedes the others.
    pub(crate) subject: Option<String>,
    /// When it stops being recalled, in milliseconds since the Unix epoch.
    pub(crate) expires_ms: Option<i64>,
    pub(crate) metadata: Metadata,
}

impl Body {
    /// The payload of a new turn. Without metadata it ends before the field, as it did when there was none yet.
    pub(crate) fn encode(head: &TurnHead, turn: &NewTurn) -> Vec<u8> {
        let (text, tokens) = (&turn.text, &turn.tokens);
        let mut out = Vec::with_capacity(64 + text.len() + tokens.len() * 4);
        put_u64(&mut out, head.session);
        put_u64(&mut out, head.turn);
        put_u64(&mut out, head.commit);
        put_u64(&mut out, head.order);
        put_u64(&mut out, head.time_ms as u64);
        out.push(role_code(head.role));
        out.push(u8::from(head.remember));
        put_option(&mut out, turn.source.as_deref());
        put_bytes(&mut out, text.as_bytes());
        put_u32(&mut out, tokens.len() as u32);
        tokens.iter().for_each(|&token| put_u32(&mut out, token));
        put_option(&mut out, turn.subject.as_deref());
        out.push(u8::from(turn.expires_ms.is_some()));
        turn.expires_ms.iter().for_each(|time_ms| put_u64(&mut out, *time_ms as u64));
        put_metadata(&mut out, &turn.metadata);
        out
    }

    /// Reads the payload of a record of this kind.
    pub(crate) fn decode(kind: Kind, bytes: &[u8]) -> Result<Self> {
        expect(kind, &[Kind::Body, Kind::BodyV1])?;
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
        let (mut subject, mut expires_ms, mut metadata) = (None, None, Metadata::new());
        if kind == Kind::Body {
            subject = reader.option()?;
            expires_ms = reader.flag()?.then(|| reader.u64()).transpose()?.map(|ms| ms as i64);
            metadata = reader.metadata()?;
        }
        reader.finish()?;
        Ok(Self { head, source, text, tokens, subject, expires_ms, metadata })
    }
}

/// A chunk of a turn: identity, and bytes of the turn's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkSpan {
    pub(crate) id: u128,
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The text is nearly that of the chunk `id`, not the same.
    pub(crate) near: bool,
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
    /// The text is nearly that of the chunk `id`, which stands in another turn.
    pub(crate) near: bool,
}

/// A turn's chunks.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct TurnChunks {
    pub(crate) session: u64,
    pub(crate) turn: u64,
    /// Tag of the embedder whose vectors these are; none in a record of version 1.
    pub(crate) embedder: Option<u64>,
    pub(crate) chunks: Vec<TurnChunk>,
}

impl TurnChunks {
    /// `chunks`: each with its vectors `(sentences, dim)`.
    pub(crate) fn encode<'a>(
        session: u64,
        turn: u64,
        embedder: u64,
        chunks: impl ExactSizeIterator<Item = (ChunkSpan, &'a [f32])>,
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(28);
        put_u64(&mut out, session);
        put_u64(&mut out, turn);
        put_u64(&mut out, embedder);
        put_u32(&mut out, chunks.len() as u32);
        for (span, vectors) in chunks {
            out.reserve(CHUNK_BYTES + vectors.len() * 4);
            out.extend_from_slice(&span.id.to_le_bytes());
            put_u64(&mut out, span.start);
            put_u64(&mut out, span.end);
            out.push(u8::from(span.near));
            put_floats(&mut out, vectors);
        }
        out
    }

    /// Reads the payload of a record of this kind.
    pub(crate) fn decode(kind: Kind, bytes: &[u8]) -> Result<Self> {
        expect(kind, &[Kind::Chunks, Kind::ChunksV1])?;
        let is_current = kind == Kind::Chunks;
        let mut reader = Reader::new(bytes, "chunks of a turn");
        let (session, turn) = (reader.u64()?, reader.u64()?);
        let embedder = is_current.then(|| reader.u64()).transpose()?;
        let num_chunks = reader.u32()? as usize;
        let mut chunks = Vec::new();
        for _ in 0..num_chunks {
            let id = u128::from_le_bytes(reader.array()?);
            let (start, end) = (reader.u64()?, reader.u64()?);
            let near = is_current && reader.flag()?;
            chunks.push(TurnChunk { id, start, end, vectors: reader.floats()?, near });
        }
        reader.finish()?;
        Ok(Self { session, turn, embedder, chunks })
    }
}

/// A session's number, and the names of its scope: user, agent, session.
pub(crate) fn encode_names(id: u64, user: &str, agent: Option<&str>, session: &str) -> Vec<u8> {
    let mut out = Vec::new();
    put_u64(&mut out, id);
    put_bytes(&mut out, user.as_bytes());
    put_option(&mut out, agent);
    put_bytes(&mut out, session.as_bytes());
    out
}

/// What [`encode_names`] wrote: the session's number (none in a record of version 1) and its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) id: Option<u64>,
    pub(crate) user: String,
    pub(crate) agent: Option<String>,
    pub(crate) session: String,
}

impl Names {
    /// The scope that they name.
    pub(crate) fn into_scope(self) -> Scope {
        let scope = Scope::user(self.user).session(self.session);
        match self.agent {
            Some(agent) => scope.agent(agent),
            None => scope,
        }
    }
}

/// Reads the payload of a record of this kind.
pub(crate) fn decode_names(kind: Kind, bytes: &[u8]) -> Result<Names> {
    expect(kind, &[Kind::Names, Kind::NamesV1])?;
    let mut reader = Reader::new(bytes, "names of a session");
    let id = (kind == Kind::Names).then(|| reader.u64()).transpose()?;
    let names =
        Names { id, user: reader.text()?, agent: reader.option()?, session: reader.text()? };
    reader.finish()?;
    Ok(names)
}

/// A session's running means: whose vectors went in, how many, and one mean per rate.
pub(crate) fn encode_summary(embedder: u64, count: u64, means: &[Vec<f32>]) -> Vec<u8> {
    let mut out = Vec::new();
    put_u64(&mut out, embedder);
    put_u64(&mut out, count);
    put_u32(&mut out, means.len() as u32);
    means.iter().for_each(|mean| put_floats(&mut out, mean));
    out
}

/// Reads what [`encode_summary`] wrote: the embedder's tag (none in a record of version 1), count and means.
#[allow(clippy::type_complexity)]
pub(crate) fn decode_summary(
    kind: Kind,
    bytes: &[u8],
) -> Result<(Option<u64>, u64, Vec<Vec<f32>>)> {
    expect(kind, &[Kind::Summary, Kind::SummaryV1])?;
    let mut reader = Reader::new(bytes, "summary");
    let embedder = (kind == Kind::Summary).then(|| reader.u64()).transpose()?;
    let count = reader.u64()?;
    let mut means = Vec::new();
    for _ in 0..reader.u32()? {
        means.push(reader.floats()?);
    }
    reader.finish()?;
    Ok((embedder, count, means))
}

/// Refuses a payload of another kind than the ones that can be read as what is wanted.
fn expect(kind: Kind, readable: &[Kind]) -> Result<()> {
    if readable.contains(&kind) {
        return Ok(());
    }
    Err(Error::corrupted(format!("record: expected one of {readable:?}, got {kind:?}")))
}

/// The tag of an embedder in the records that hold its vectors.
pub(crate) fn embedder_tag(identity: &str, dim: usize) -> u64 {
    xxh3_64_with_seed(identity.as_bytes(), dim as u64)
}

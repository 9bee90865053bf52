//! What memory gives back, as plain records.
//! Knows no call: each record is made from its twin in the engine.

use crate::error::MkaError;
use crate::filter::{MetadataValue, metadata};
use crate::scope::{Role, Scope};
use std::collections::HashMap;

/// How far a recalled text may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum Trust {
    /// The host wrote it.
    Host,
    /// The user said it.
    User,
    /// A model generated it.
    Model,
    /// It stood in a document, or a tool gave it back: anyone may have written it.
    Document,
}

impl From<mka::Trust> for Trust {
    fn from(from: mka::Trust) -> Self {
        match from {
            mka::Trust::Host => Self::Host,
            mka::Trust::User => Self::User,
            mka::Trust::Model => Self::Model,
            _ => Self::Document,
        }
    }
}

/// What a score is made of.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Why {
    /// BM25 of the query's words.
    pub bm25: f32,
    /// Share of the query's words, weighted by how rare they are, that the chunk holds.
    pub coverage: f32,
    /// Place by words alone, from 1; none if no word occurs.
    pub bm25_rank: Option<u32>,
    /// Cosine of the query and the chunk's best sentence.
    pub cosine: f32,
    /// Place by cosine alone, from 1.
    pub cosine_rank: u32,
    /// What was added for being recent.
    pub recency: f32,
    /// The query was completed from the session's latest turns.
    pub follow_up: bool,
}

/// Where a chunk was said.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Source {
    /// Whose memory.
    pub user: String,
    /// Which agent's, if any.
    pub agent: Option<String>,
    /// In which session.
    pub session: String,
    /// In which turn.
    pub turn: u64,
    /// By whom.
    pub role: Role,
    /// First byte in the turn's text.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
    /// When, milliseconds since 1970.
    pub time_ms: i64,
    /// Name of the document, if the turn has one.
    pub name: Option<String>,
    /// What the turn is a fact about, if anything was named.
    pub subject: Option<String>,
    /// When the turn stops being recalled, milliseconds since 1970.
    pub expires_ms: Option<i64>,
    /// The turn's metadata.
    pub metadata: HashMap<String, MetadataValue>,
}

impl From<mka::Source> for Source {
    fn from(from: mka::Source) -> Self {
        Self {
            user: from.user,
            agent: from.agent,
            session: from.session,
            turn: from.turn,
            role: from.role.into(),
            start: from.bytes.start,
            end: from.bytes.end,
            time_ms: from.time_ms,
            name: from.name,
            subject: from.subject,
            expires_ms: from.expires_ms,
            metadata: metadata(from.metadata),
        }
    }
}

/// A remembered piece of text that answers a query.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Hit {
    /// Identity of the text: 32 hexadecimal digits.
    pub chunk: String,
    /// The text.
    pub text: String,
    /// The fused score; higher is better.
    pub score: f32,
    /// How likely the hit is about the query at all, 0 to 1; a threshold for it is chosen by trial.
    pub relevance: f32,
    /// What the score is made of.
    pub why: Why,
    /// Where the text was said.
    pub source: Source,
    /// How far the text may be believed.
    pub trust: Trust,
    /// How often the scope holds this text, near duplicates included.
    pub count: u32,
    /// A newer turn of the same subject superseded it.
    pub stale: bool,
}

impl From<mka::Hit> for Hit {
    fn from(from: mka::Hit) -> Self {
        Self {
            chunk: from.chunk.to_string(),
            text: from.text,
            score: from.score,
            relevance: from.relevance,
            why: Why {
                bm25: from.why.bm25,
                coverage: from.why.coverage,
                bm25_rank: from.why.bm25_rank,
                cosine: from.why.cosine,
                cosine_rank: from.why.cosine_rank,
                recency: from.why.recency,
                follow_up: from.why.follow_up,
            },
            source: from.source.into(),
            trust: from.trust.into(),
            count: from.count,
            stale: from.stale,
        }
    }
}

/// Every element converted.
pub(crate) fn all<A, B: From<A>>(values: Vec<A>) -> Vec<B> {
    values.into_iter().map(Into::into).collect()
}

/// Text assembled for a model that lives elsewhere.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Context {
    /// Quoted, attributed memories under a header; empty if nothing was found.
    pub text: String,
    /// Tokens of `text`: never above the budget.
    pub tokens: u64,
    /// The memories in it, best first.
    pub hits: Vec<Hit>,
}

impl From<mka::Context> for Context {
    fn from(from: mka::Context) -> Self {
        Self { text: from.text, tokens: from.tokens as u64, hits: all(from.hits) }
    }
}

/// A kind of sensitive text, by its form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum Sensitive {
    /// A private key in PEM form.
    PrivateKey,
    /// A token of a known service, or a JSON web token.
    Token,
    /// A password, secret or key after a word that says so.
    Password,
    /// A payment card's number.
    Card,
    /// An international bank account number.
    BankAccount,
    /// A United States social security number.
    SocialSecurity,
    /// An address of mail.
    Email,
    /// A phone number with its international prefix.
    Phone,
    /// Of a kind that this surface does not know.
    Other,
}

impl From<mka::Sensitive> for Sensitive {
    fn from(from: mka::Sensitive) -> Self {
        match from {
            mka::Sensitive::PrivateKey => Self::PrivateKey,
            mka::Sensitive::Token => Self::Token,
            mka::Sensitive::Password => Self::Password,
            mka::Sensitive::Card => Self::Card,
            mka::Sensitive::BankAccount => Self::BankAccount,
            mka::Sensitive::SocialSecurity => Self::SocialSecurity,
            mka::Sensitive::Email => Self::Email,
            mka::Sensitive::Phone => Self::Phone,
            _ => Self::Other,
        }
    }
}

/// Something in a turn that looks sensitive.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Finding {
    /// Which of the call's turns, from 0.
    pub turn: u64,
    /// What it looks like.
    pub kind: Sensitive,
    /// First byte in the turn's text.
    pub start: u64,
    /// The byte after the last.
    pub end: u64,
}

impl From<mka::Finding> for Finding {
    fn from(from: mka::Finding) -> Self {
        Self {
            turn: from.turn as u64,
            kind: from.kind.into(),
            start: from.bytes.start as u64,
            end: from.bytes.end as u64,
        }
    }
}

/// What remembering did.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Committed {
    /// Numbers of the appended turns.
    pub turns: Vec<u64>,
    /// Chunks that were new to the scope.
    pub chunks_added: u64,
    /// Chunks whose text the scope already held.
    pub chunks_deduplicated: u64,
    /// Chunks whose text was nearly one that the session already held.
    pub chunks_nearly_duplicated: u64,
    /// What looks like a secret or like personal data in the turns.
    pub findings: Vec<Finding>,
}

impl From<mka::Committed> for Committed {
    fn from(from: mka::Committed) -> Self {
        Self {
            turns: from.turns,
            chunks_added: from.chunks_added as u64,
            chunks_deduplicated: from.chunks_deduplicated as u64,
            chunks_nearly_duplicated: from.chunks_nearly_duplicated as u64,
            findings: all(from.findings),
        }
    }
}

/// What was erased, without the erased text.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Receipt {
    /// Hash over the digests and counts.
    pub id: u64,
    /// The scope that was searched, as text.
    pub scope: String,
    /// Turns erased.
    pub turns: u64,
    /// Chunks that left memory.
    pub chunks: u64,
    /// Key/value pages dropped.
    pub pages: u64,
    /// Bytes of text erased.
    pub bytes: u64,
    /// The whole receipt as JSON, with the digests that `verify` checks: what to keep of it.
    pub record: String,
}

impl TryFrom<mka::Receipt> for Receipt {
    type Error = MkaError;

    fn try_from(from: mka::Receipt) -> Result<Self, MkaError> {
        let record = serde_json::to_string(&from)
            .map_err(|error| MkaError::Internal(format!("forget: write receipt: {error}")))?;
        Ok(Self {
            id: from.id,
            scope: from.scope,
            turns: from.turns as u64,
            chunks: from.chunks as u64,
            pages: from.pages as u64,
            bytes: from.bytes,
            record,
        })
    }
}

/// The engine's receipt from its JSON.
pub(crate) fn receipt(record: &str) -> Result<mka::Receipt, MkaError> {
    serde_json::from_str(record).map_err(|error| {
        MkaError::InvalidArgument(format!(
            "verify: record is no receipt: {error}, expected the record of one that forget returned"
        ))
    })
}

/// A remembered piece of text, for a list of what memory holds.
#[derive(Debug, Clone, uniffi::Record)]
pub struct ChunkInfo {
    /// Identity of the text: 32 hexadecimal digits.
    pub id: String,
    /// The text.
    pub text: String,
    /// The first place where it was said.
    pub first: Source,
    /// The latest one.
    pub latest: Source,
    /// How often the scope holds it.
    pub count: u32,
}

impl From<mka::ChunkInfo> for ChunkInfo {
    fn from(from: mka::ChunkInfo) -> Self {
        Self {
            id: from.id.to_string(),
            text: from.text,
            first: from.first.into(),
            latest: from.latest.into(),
            count: from.count,
        }
    }
}

/// A turn as it stands in the log.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Turn {
    /// Its number within the session.
    pub id: u64,
    /// Who produced it.
    pub role: Role,
    /// Its text; empty if the turn was forgotten.
    pub text: String,
    /// When, milliseconds since 1970.
    pub time_ms: i64,
    /// What it added to the model's token stream.
    pub num_tokens: u64,
    /// Where the text comes from.
    pub source: Option<String>,
    /// Whether it may be recalled, as it was committed.
    pub remember: bool,
    /// What it is a fact about.
    pub subject: Option<String>,
    /// When it stops being recalled, milliseconds since 1970.
    pub expires_ms: Option<i64>,
    /// What it was marked with.
    pub metadata: HashMap<String, MetadataValue>,
    /// Superseded by a later commit: kept in the log, no longer recalled.
    pub retracted: bool,
    /// Erased: only its place in the log is left.
    pub forgotten: bool,
}

impl From<mka::Turn> for Turn {
    fn from(from: mka::Turn) -> Self {
        Self {
            id: from.id,
            role: from.role.into(),
            text: from.text,
            time_ms: from.time_ms,
            num_tokens: from.tokens.len() as u64,
            source: from.source,
            remember: from.remember,
            subject: from.subject,
            expires_ms: from.expires_ms,
            metadata: metadata(from.metadata),
            retracted: from.retracted,
            forgotten: from.forgotten,
        }
    }
}

/// A session, for a list of sessions.
#[derive(Debug, Clone, uniffi::Record)]
pub struct SessionInfo {
    /// User, agent, session.
    pub scope: Scope,
    /// Length of its log, retracted and forgotten turns included.
    pub num_turns: u64,
    /// Time of its latest turn, milliseconds since 1970.
    pub last_time_ms: Option<i64>,
    /// Tokens in its model's stream, if it has one.
    pub stream_tokens: Option<u64>,
    /// Its stored key/value pages, evicted ones included.
    pub num_pages: u64,
}

impl From<mka::SessionInfo> for SessionInfo {
    fn from(from: mka::SessionInfo) -> Self {
        Self {
            scope: (&from.scope).into(),
            num_turns: from.num_turns,
            last_time_ms: from.last_time_ms,
            stream_tokens: from.position,
            num_pages: from.num_pages as u64,
        }
    }
}

/// Rows of 32-bit floats in one block of bytes, so that they cross the border as a whole.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Vectors {
    /// `(rows, dim)`, row-major, in the machine's byte order.
    pub data: Vec<u8>,
    /// Numbers of one row.
    pub dim: u64,
}

impl Vectors {
    pub(crate) fn new(values: &[f32], dim: usize) -> Self {
        let data = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        Self { data, dim: dim as u64 }
    }
}

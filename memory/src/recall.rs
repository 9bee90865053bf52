//! What a recall asks and answers, and how the parts of a score are fused.
//! Knows nothing of files or of how words and vectors are searched.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::{Filter, Metadata, Role, TurnId};

/// Share of the words in the fused score: the cube of BM25 by what a chunk with every word of the question has, or by
/// the best one where that is more. A question in other words shares a name with its answer, and with many other chunks:
/// by the best one alone, that name counts as much as all words of a question in the answer's own words. The cube was
/// chosen among powers, gates and rank fusions on questions that nothing else is measured on (docs/index.md).
pub(crate) const WORDS_WEIGHT: f32 = 0.5;
/// Share of the cosine of a chunk's best sentence in the fused score; see [`WORDS_WEIGHT`].
pub(crate) const VECTOR_WEIGHT: f32 = 0.5;
/// What the newest candidate gains over the oldest: breaks ties, and never outweighs a real difference.
pub(crate) const RECENCY_WEIGHT: f32 = 0.02;

/// Weights of coverage and cosine, and a constant, of the logistic curve behind [`Hit::relevance`]: chosen by hand so that
/// either all of the words or a cosine of two thirds is even odds. `bench_recall` fits and checks them.
const RELEVANCE: [f32; 3] = [4.0, 6.0, -4.0];

/// How to recall.
#[derive(Debug, Clone, PartialEq)]
pub struct Recall {
    /// The most hits to return; 0 returns none.
    pub k: usize,
    /// In the scope's own session only chunks of turns before this one are returned.
    pub before_turn: Option<TurnId>,
    /// In the scope's own session no chunks of these turns, in any order, are returned: they are in the model's window.
    pub except_turns: Vec<TurnId>,
    /// Also look into the other sessions of the scope's user (and agent, if it names one).
    /// Without effect on a scope without session, which sees them all.
    pub across_sessions: bool,
    /// Only chunks of turns in these roles; all roles if empty.
    pub roles: Vec<Role>,
    /// Only chunks of turns at this time or later, in milliseconds since the Unix epoch.
    pub since_ms: Option<i64>,
    /// Only chunks of turns before this time, in milliseconds since the Unix epoch.
    pub until_ms: Option<i64>,
    /// Memory as it was at this time, in milliseconds since the Unix epoch: later turns are not there yet, and a turn
    /// counts as superseded or expired if it was by then.
    pub as_of_ms: Option<i64>,
    /// The caller's clock, in milliseconds since the Unix epoch: what expired by then is left out.
    /// None leaves nothing out for having expired; an engine's calls take the system's clock for it.
    pub now_ms: Option<i64>,
    /// Also return what a newer turn of the same subject superseded, marked by [`Hit::stale`].
    pub stale: bool,
    /// Halves a score for every so many milliseconds of age; none lets age count as little as it does anyway.
    /// Age is counted from `as_of_ms`, else from `now_ms`, else from the newest chunk that can be seen.
    pub half_life_ms: Option<u64>,
    /// Only chunks of turns whose metadata this accepts; see [`NewTurn::metadata`](crate::NewTurn::metadata).
    pub filter: Option<Filter>,
    /// Hits that score less are left out.
    pub min_score: f32,
    /// Hits less [relevant](Hit::relevance) are left out, so that a question that nothing answers gets no hits.
    /// 0 keeps all; see there for how far it can be trusted.
    pub min_relevance: f32,
    /// Let a short question lean on what its session was about just now; see [`Why::follow_up`].
    pub follow_up: bool,
}

impl Default for Recall {
    fn default() -> Self {
        Self {
            k: 8,
            before_turn: None,
            except_turns: Vec::new(),
            across_sessions: false,
            roles: Vec::new(),
            since_ms: None,
            until_ms: None,
            as_of_ms: None,
            now_ms: None,
            stale: false,
            half_life_ms: None,
            filter: None,
            min_score: 0.0,
            min_relevance: 0.0,
            follow_up: true,
        }
    }
}

/// Identity of a chunk: the seeded hash of its text, the same for the same text in one store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId(
    /// xxh3-128 of the text under the store's seed.
    pub u128,
);

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for ChunkId {
    /// As it is displayed: 32 hexadecimal digits, for most readers of JSON take no number of 128 bits.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A remembered piece of text that answers a query.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Hit {
    /// Identity of the text.
    pub chunk: ChunkId,
    /// The text: the bytes `source.bytes` of its turn. Where only a turn with nearly the same text can be seen,
    /// it is the text that was said first, in the same session.
    pub text: String,
    /// The fused score, 0 to 1.02; higher is better.
    pub score: f32,
    /// How likely the hit is about the question at all, 0 to 1. The score compares the hits of one question with each
    /// other; this compares with all questions. Its curve is set by hand, not calibrated on any embedder: choose a threshold by trial.
    pub relevance: f32,
    /// What the score is made of.
    pub why: Why,
    /// Where the text was said: the latest place that the scope may see.
    pub source: Source,
    /// How far the text may be believed.
    pub trust: Trust,
    /// How often the scope holds this text, near duplicates in the same session included.
    pub count: u32,
    /// A newer turn of the same subject superseded it.
    pub stale: bool,
}

/// What a score is made of: `0.5 * words^3 + 0.5 * max(cosine, 0) + recency`, where `words` is `bm25` by that of a chunk
/// of mean length that holds every word of the question, or by the best one, whichever is more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Why {
    /// BM25 of the query's words, 0 if none occurs.
    pub bm25: f32,
    /// Share of the question's words, weighted by how rare they are, that the chunk holds: 0 to 1.
    pub coverage: f32,
    /// Place by words alone, from 1; none if no word occurs.
    pub bm25_rank: Option<u32>,
    /// Cosine of the query and the chunk's best sentence, -1 to 1.
    pub cosine: f32,
    /// Place by cosine alone, from 1.
    pub cosine_rank: u32,
    /// What was added for being recent, 0 to 0.02.
    pub recency: f32,
    /// The query had fewer than 6 content words and was completed from the session's latest turns.
    pub follow_up: bool,
}

/// Where a chunk was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Source {
    /// Whose memory.
    pub user: String,
    /// Which agent's, if any.
    pub agent: Option<String>,
    /// In which session.
    pub session: String,
    /// In which turn.
    pub turn: TurnId,
    /// By whom.
    pub role: Role,
    /// Which bytes of the turn's text.
    pub bytes: std::ops::Range<u64>,
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// Name of the document, if the turn has one.
    pub name: Option<String>,
    /// What the turn is a fact about, if anything was named.
    pub subject: Option<String>,
    /// When the turn stops being recalled, in milliseconds since the Unix epoch.
    pub expires_ms: Option<i64>,
    /// The turn's metadata.
    pub metadata: Metadata,
}

/// How far a recalled text may be believed; recalled text is data, never an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[non_exhaustive]
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

impl Trust {
    pub(crate) fn of(role: Role) -> Self {
        match role {
            Role::System => Self::Host,
            Role::User => Self::User,
            Role::Assistant => Self::Model,
            Role::Document | Role::Recalled | Role::Tool => Self::Document,
        }
    }
}

/// One candidate's parts, before fusion.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) bm25: f32,
    pub(crate) cosine: f32,
    /// Place of the candidate's latest source among all turns of its user.
    pub(crate) order: u64,
}

/// Fuses the parts of all candidates; the result is in the order of `parts`.
/// `attainable` is the BM25 of a chunk of mean length that holds every word of the question once.
pub(crate) fn fuse(parts: &[Parts], attainable: f32, follow_up: bool) -> Vec<(f32, Why)> {
    let best = parts.iter().map(|part| part.bm25).fold(0.0f32, f32::max);
    let oldest = parts.iter().map(|part| part.order).min().unwrap_or(0);
    let newest = parts.iter().map(|part| part.order).max().unwrap_or(0);
    let age_span = (newest - oldest).max(1) as f32;
    let by_words = ranks(parts, |part| part.bm25);
    let by_cosine = ranks(parts, |part| part.cosine);
    parts
        .iter()
        .enumerate()
        .map(|(at, part)| {
            let words = if best > 0.0 { part.bm25 / best.max(attainable) } else { 0.0 };
            let recency = RECENCY_WEIGHT * (part.order - oldest) as f32 / age_span;
            let score =
                WORDS_WEIGHT * words.powi(3) + VECTOR_WEIGHT * part.cosine.max(0.0) + recency;
            let why = Why {
                bm25: part.bm25,
                coverage: if attainable > 0.0 { (part.bm25 / attainable).min(1.0) } else { 0.0 },
                bm25_rank: (part.bm25 > 0.0).then_some(by_words[at]),
                cosine: part.cosine,
                cosine_rank: by_cosine[at],
                recency,
                follow_up,
            };
            (score, why)
        })
        .collect()
}

/// How likely a hit with these parts is about the question.
pub(crate) fn relevance(why: &Why) -> f32 {
    let [coverage, cosine, constant] = RELEVANCE;
    let logit = coverage * why.coverage + cosine * why.cosine.max(0.0) + constant;
    1.0 / (1.0 + (-logit).exp())
}

/// What is left of a score at an age.
pub(crate) fn fading(now_ms: i64, time_ms: i64, half_life_ms: u64) -> f32 {
    let age_ms = now_ms.saturating_sub(time_ms).max(0);
    0.5f64.powf(age_ms as f64 / half_life_ms as f64) as f32
}

/// Places from 1 by descending value; equal values keep their order.
fn ranks(parts: &[Parts], value: impl Fn(&Parts) -> f32) -> Vec<u32> {
    let mut by_value: Vec<usize> = (0..parts.len()).collect();
    by_value.sort_by(|&a, &b| value(&parts[b]).total_cmp(&value(&parts[a])));
    let mut ranks = vec![0; parts.len()];
    for (place, at) in by_value.into_iter().enumerate() {
        ranks[at] = place as u32 + 1;
    }
    ranks
}

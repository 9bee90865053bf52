//! The bytes in which a stream's events cross the border to Swift in one piece.
//! Knows no object and no pointer; `swift/Sources/MKA/Packed.swift` is the other side, and the two are changed together.
//!
//! Numbers are little-endian without padding. All texts of a block of hits stand behind its fixed parts as one UTF-8
//! text, their lengths counted in code points: the other side decodes once and cuts.

use crate::events::StopReason;
use crate::open::Batch;
use crate::scope::Role;

/// What an absent text has for its length.
const NONE: u32 = u32::MAX;

/// Kinds of events.
const TOKEN: u8 = 1;
const RECALLED: u8 = 2;
const DONE: u8 = 3;
const PROGRESS: u8 = 4;
const FED: u8 = 5;

/// An event that can be packed.
trait Pack {
    /// Appends the event; nothing if this surface does not know its kind.
    fn pack(self, out: &mut Vec<u8>);
}

/// A batch of events, one behind the other.
pub(crate) fn events(batch: Batch) -> Vec<u8> {
    match batch {
        Batch::Turn(events) => all(events),
        Batch::Feed(events) => all(events),
    }
}

fn all<T: Pack>(batch: Vec<T>) -> Vec<u8> {
    let mut out = Vec::with_capacity(32 * batch.len());
    for event in batch {
        event.pack(&mut out);
    }
    out
}

impl Pack for mka::Event {
    fn pack(self, out: &mut Vec<u8>) {
        match self {
            Self::Token(token) => {
                out.push(TOKEN);
                u32(out, token.text.len());
                out.extend_from_slice(token.text.as_bytes());
            }
            Self::Recalled(found) => {
                let block = hits(&found);
                out.push(RECALLED);
                u32(out, block.len());
                out.extend_from_slice(&block);
            }
            Self::Done(usage) => {
                out.push(DONE);
                pack_usage(usage, out);
            }
            _ => {}
        }
    }
}

fn pack_usage(usage: mka::Usage, out: &mut Vec<u8>) {
    out.push(match StopReason::from(usage.stop) {
        StopReason::EndOfTurn => 0,
        StopReason::MaxTokens => 1,
        StopReason::StopString => 2,
    });
    for tokens in [
        usage.prompt_tokens as u64,
        usage.reused_tokens as u64,
        usage.recalled_tokens as u64,
        usage.generated_tokens as u64,
        usage.stream_tokens,
    ] {
        out.extend(tokens.to_le_bytes());
    }
    out.push(usage.answer_turn.is_some().into());
    out.extend(usage.answer_turn.unwrap_or(0).to_le_bytes());
    let Some(pages) = usage.pages else { return out.push(0) };
    out.push(1);
    out.extend((pages.stored_tokens as u64).to_le_bytes());
    out.extend((pages.recalled_tokens as u64).to_le_bytes());
    for layers in [&pages.share, &pages.recovered] {
        u32(out, layers.len());
        out.extend(layers.iter().flat_map(|share| share.to_le_bytes()));
    }
}

impl Pack for mka::FeedEvent {
    fn pack(self, out: &mut Vec<u8>) {
        let numbers: &[u64] = match self {
            Self::Progress { fed_bytes, committed_bytes, total_bytes } => {
                out.push(PROGRESS);
                &[fed_bytes, committed_bytes, total_bytes]
            }
            Self::Done(fed) => {
                out.push(FED);
                &[
                    fed.bytes,
                    fed.model_tokens,
                    fed.chunks_added as u64,
                    fed.chunks_deduplicated as u64,
                ]
            }
            _ => return,
        };
        out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    }
}

/// The number of hits, the fixed part of each, then the text of all.
fn hits(hits: &[mka::Hit]) -> Vec<u8> {
    let mut out = Vec::with_capacity(hits.len() * 256);
    let mut text = String::new();
    u32(&mut out, hits.len());
    for hit in hits {
        pack_hit(hit, &mut out, &mut text);
    }
    out.extend_from_slice(text.as_bytes());
    out
}

/// The identity, always of 32 digits, and seven texts go to `text`; what is left is fixed.
///
/// First what most callers ask for, the length of the other six texts included: who does not ask for the rest skips it.
fn pack_hit(hit: &mka::Hit, out: &mut Vec<u8>, text: &mut String) {
    let (source, why) = (&hit.source, &hit.why);
    let metadata = marks(&source.metadata);
    let whose = [
        Some(source.user.as_str()),
        source.agent.as_deref(),
        Some(source.session.as_str()),
        source.name.as_deref(),
        source.subject.as_deref(),
        Some(metadata.as_str()),
    ];
    let lengths = whose.map(|part| part.map(|part| part.chars().count()));
    text.push_str(&hit.chunk.to_string());
    text.push_str(&hit.text);
    text.extend(whose.into_iter().flatten());
    u32(out, hit.text.chars().count());
    u32(out, lengths.into_iter().flatten().sum());
    out.extend(hit.score.to_le_bytes());
    out.extend(hit.relevance.to_le_bytes());
    out.push(crate::records::Trust::from(hit.trust) as u8);
    out.extend(hit.count.to_le_bytes());
    out.push(hit.stale.into());

    for length in lengths {
        match length {
            Some(length) => u32(out, length),
            None => out.extend(NONE.to_le_bytes()),
        }
    }
    out.extend(why.bm25.to_le_bytes());
    out.extend(why.coverage.to_le_bytes());
    // Places are counted from 1.
    out.extend(why.bm25_rank.unwrap_or(0).to_le_bytes());
    out.extend(why.cosine.to_le_bytes());
    out.extend(why.cosine_rank.to_le_bytes());
    out.extend(why.recency.to_le_bytes());
    out.push(why.follow_up.into());
    out.extend(source.turn.to_le_bytes());
    out.push(Role::from(source.role) as u8);
    out.extend(source.bytes.start.to_le_bytes());
    out.extend(source.bytes.end.to_le_bytes());
    out.extend(source.time_ms.to_le_bytes());
    out.push(source.expires_ms.is_some().into());
    out.extend(source.expires_ms.unwrap_or(0).to_le_bytes());
}

/// Metadata as one text: each key, a letter for its value's kind, and the value, each with its length and a colon before it.
/// A value of a kind that this surface does not know is left out.
fn marks(metadata: &mka::Metadata) -> String {
    let mut out = String::new();
    let mut text = |part: &str| {
        out.push_str(&part.chars().count().to_string());
        out.push(':');
        out.push_str(part);
    };
    for (key, value) in metadata {
        let (kind, value) = match value {
            mka::Value::Flag(flag) => ("f", u8::from(*flag).to_string()),
            mka::Value::Number(number) => ("n", number.to_string()),
            mka::Value::Text(text) => ("t", text.clone()),
            _ => continue,
        };
        text(key);
        text(kind);
        text(&value);
    }
    out
}

/// A length; what is longer than the format can say was cut by the store long before.
fn u32(out: &mut Vec<u8>, length: usize) {
    out.extend(u32::try_from(length).unwrap_or(NONE - 1).to_le_bytes());
}

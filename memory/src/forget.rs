//! What to erase, and the receipt that it is gone.
//! Knows nothing of where the bytes lie.

use serde::{Deserialize, Serialize};

use crate::{Filter, TurnId};

/// What to erase within a scope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Forget {
    /// Every turn whose text, source name, subject or metadata contains this text, letter case aside.
    Matching(String),
    /// Every turn whose metadata this accepts; a filter that accepts every turn, or none, whatever their metadata, is refused.
    /// Turns without the key, those of a chat too, are what a `not` of it accepts. What a session quoted goes with the turns
    /// that it was quoted from. A turn that is damaged goes only if memory still knows metadata of it that is accepted;
    /// [`Forget::Matching`] takes each damaged one for what is meant.
    Filter(Filter),
    /// One turn of the scope's session.
    Turn(TurnId),
    /// These turns of the scope's session, one at least, at the price of one.
    Turns(Vec<TurnId>),
    /// Every turn before this time, in milliseconds since the Unix epoch.
    Before(i64),
    /// Every turn whose time to be recalled was over at this time, in milliseconds since the Unix epoch.
    Expired(i64),
    /// The scope's session, with its place in the log. What its forks got from it goes with it; what it got from the session
    /// that it was forked from stays there.
    Session,
    /// Every session of the scope, with its place in the log, and with what forks got from one.
    Everything,
}

impl Forget {
    /// Every turn whose text, source name, subject or metadata contains `text`, letter case aside.
    pub fn matching(text: impl Into<String>) -> Self {
        Self::Matching(text.into())
    }

    /// Every turn whose metadata `filter` accepts.
    pub fn filter(filter: Filter) -> Self {
        Self::Filter(filter)
    }

    /// One turn of the scope's session.
    pub fn turn(turn: TurnId) -> Self {
        Self::Turn(turn)
    }

    /// These turns of the scope's session.
    pub fn turns(turns: impl IntoIterator<Item = TurnId>) -> Self {
        Self::Turns(turns.into_iter().collect())
    }

    /// Every turn before `time_ms`, in milliseconds since the Unix epoch.
    pub fn before(time_ms: i64) -> Self {
        Self::Before(time_ms)
    }

    /// Every turn that had expired at `now_ms`, in milliseconds since the Unix epoch.
    pub fn expired(now_ms: i64) -> Self {
        Self::Expired(now_ms)
    }

    /// The scope's session.
    pub fn session() -> Self {
        Self::Session
    }

    /// Every session of the scope.
    pub fn everything() -> Self {
        Self::Everything
    }
}

/// What was erased, without the erased text; [`Store::verify`](crate::Store::verify) checks it against the files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Receipt {
    /// Hash over the digests and counts.
    pub id: u64,
    /// The scope that was searched, as text.
    pub scope: String,
    /// What was asked. It is the caller's own text, and is not kept by the store.
    pub selector: Forget,
    /// Turns erased.
    pub turns: usize,
    /// Chunks that left memory: their text stood in no other turn.
    pub chunks: usize,
    /// K/V pages dropped: all of every session that lost a turn.
    pub pages: usize,
    /// Bytes of text erased.
    pub bytes: u64,
    /// One digest for each erased turn and each erased chunk, seeded by the store.
    pub digests: Vec<u128>,
    /// Numbers of the segment files that held erased bytes and were deleted.
    pub segments: Vec<u32>,
}

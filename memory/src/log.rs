//! What a caller writes and reads back: turns, snapshots, commits.
//! Knows nothing of files, indexes or scores; it is plain data.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{Finding, Metadata, NewPage, Value};

/// Who produced a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Role {
    /// Instructions of the host.
    System,
    /// A human's message.
    User,
    /// The model's answer.
    Assistant,
    /// A document fed to the session.
    Document,
    /// Text that memory gave back to the model: logged, but never chunked, embedded or recalled again.
    Recalled,
    /// What a tool gave back to the model that called it: remembered as a document is.
    Tool,
}

/// The number of a turn within its session, from 0.
pub type TurnId = u64;

/// A turn to be appended to a session's log.
///
/// ```
/// use mka_memory::{NewTurn, Role};
///
/// let turn = NewTurn::new(Role::User, "I live in Oslo.").subject("home city").metadata("kind", "fact");
/// assert_eq!(turn.subject.as_deref(), Some("home city"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTurn {
    /// Who produced it.
    pub role: Role,
    /// Its text.
    pub text: String,
    /// When, in milliseconds since the Unix epoch, as the caller's clock has it. The store takes it as it is; an engine's
    /// calls take 0 for now.
    pub time_ms: i64,
    /// What this turn added to the model's token stream; may be empty.
    pub tokens: Vec<u32>,
    /// Where the text comes from: a file name, a URL.
    pub source: Option<String>,
    /// Whether it can be recalled later. Without effect on [`Role::Recalled`], which never can.
    pub remember: bool,
    /// What it is a fact about, as `home city`, 1 to 256 bytes. Among the turns of one user and agent with the same
    /// subject the newest by time (by order, if times are equal) wins: the others are stale. They stay in the log,
    /// and recall leaves them out unless it is asked for them or for an earlier time.
    pub subject: Option<String>,
    /// When it stops being recalled, in milliseconds since the Unix epoch; never, if none.
    /// The text stays in the log until [`Forget::Expired`](crate::Forget::Expired) erases it.
    pub expires_ms: Option<i64>,
    /// What [`Recall::filter`](crate::Recall::filter) asks for: at most 256 keys of 1 to 256 bytes.
    pub metadata: Metadata,
}

impl NewTurn {
    /// A turn at time 0, which an engine's calls take for now, without tokens; remembered if a user, the assistant, a
    /// document or a tool speaks.
    pub fn new(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            text: text.into(),
            time_ms: 0,
            tokens: Vec::new(),
            source: None,
            remember: !matches!(role, Role::System | Role::Recalled),
            subject: None,
            expires_ms: None,
            metadata: Metadata::new(),
        }
    }

    /// Says when it was said, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn at(mut self, time_ms: i64) -> Self {
        self.time_ms = time_ms;
        self
    }

    /// Says where the text comes from: a file name, a URL.
    #[must_use]
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Says whether it can be recalled later.
    #[must_use]
    pub fn remember(mut self, remember: bool) -> Self {
        self.remember = remember;
        self
    }

    /// Says what it is a fact about.
    #[must_use]
    pub fn subject(mut self, subject: impl Into<String>) -> Self {
        self.subject = Some(subject.into());
        self
    }

    /// Says when it stops being recalled, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn expires_ms(mut self, time_ms: i64) -> Self {
        self.expires_ms = Some(time_ms);
        self
    }

    /// Sets one key of its metadata.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.metadata.insert(key.into(), value.into());
        self
    }
}

/// A turn as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Turn {
    /// Its number within the session.
    pub id: TurnId,
    /// Who produced it.
    pub role: Role,
    /// Its text; empty if the turn was forgotten.
    pub text: String,
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: i64,
    /// What it added to the model's token stream.
    pub tokens: Vec<u32>,
    /// Where the text comes from.
    pub source: Option<String>,
    /// Whether it may be recalled, as it was committed.
    pub remember: bool,
    /// What it is a fact about.
    pub subject: Option<String>,
    /// When it stops being recalled, in milliseconds since the Unix epoch.
    pub expires_ms: Option<i64>,
    /// What it was marked with.
    pub metadata: Metadata,
    /// Superseded by a later commit: kept in the log, no longer recalled.
    pub retracted: bool,
    /// Erased by [`Store::forget`](crate::Store::forget): only its place in the log is left.
    pub forgotten: bool,
}

/// The state of a model's session, to go on from after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Identity of the model and cache layout that can read it.
    pub fingerprint: [u8; 16],
    /// Tokens in the stream at this point.
    pub position: u64,
    /// Opaque bytes of the caller.
    pub state: Vec<u8>,
    /// New or rewritten pages: index and bytes.
    pub pages: Vec<(u64, NewPage)>,
    /// Indexes of the pages that must be loadable for the session to go on.
    /// A stored page that is not named here any more is evicted:
    /// kept while [`StoreOptions::evicted_page_bytes`](crate::StoreOptions::evicted_page_bytes) allows it.
    pub window: Vec<u64>,
    /// Stored pages of a lower index, outside the window, are of no use to the session any more: they are removed.
    pub first_page: u64,
}

/// A session's state as it was last committed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Tokens in the stream at this point.
    pub position: u64,
    /// Opaque bytes of the caller.
    pub state: Vec<u8>,
    /// The pages of the window, by ascending index.
    pub pages: Vec<(u64, Vec<u8>)>,
}

/// What one call of [`Store::commit`](crate::Store::commit) changes, all of it or nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commit {
    /// Turns to append, in order.
    pub turns: Vec<NewTurn>,
    /// The session's new state, if it changed.
    pub snapshot: Option<NewSnapshot>,
    /// These turns are superseded before `turns` are appended:
    /// they stay in the log, marked, and are no longer recalled.
    /// What others appended since the caller looked at the log lies behind the range, and stays.
    /// Without a `snapshot`, the session's own and its pages are removed if this supersedes a turn: they hold what it said.
    pub retract: Option<Range<TurnId>>,
}

/// What a commit did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Committed {
    /// Numbers of the appended turns.
    pub turns: Vec<TurnId>,
    /// Chunks that were new to the scope.
    pub chunks_added: usize,
    /// Chunks whose text the scope already held: counted there, not stored again.
    pub chunks_deduplicated: usize,
    /// Chunks whose text was nearly one that the session already held: counted there, not stored again.
    pub chunks_nearly_duplicated: usize,
    /// What looks like a secret or like personal data in the turns, by turn and place.
    pub findings: Vec<Finding>,
}

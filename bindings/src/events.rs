//! Events of a turn and of a feed, and the objects that a foreign caller pulls them from.
//! Knows no session; how to pull is in `pull`.

use crate::error::MkaError;
use crate::pull::Pull;
use crate::records::{Hit, all};
use crate::wait::{wait, wait_at_most};
use std::time::Duration;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum StopReason {
    /// The model ended its turn.
    EndOfTurn,
    /// `max_new_tokens` were generated.
    MaxTokens,
    /// A stop string appeared.
    StopString,
}

/// What one turn cost, in tokens.
#[derive(Debug, Clone, uniffi::Record)]
pub struct Usage {
    /// Tokens that the first new token could attend to.
    pub prompt_tokens: u64,
    /// Of these, tokens that cost nothing because they were there already.
    pub reused_tokens: u64,
    /// Of these, tokens of text recalled for this turn.
    pub recalled_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens in the session's stream now.
    pub stream_tokens: u64,
    /// Why the answer ended.
    pub stop: StopReason,
}

impl From<mka::Usage> for Usage {
    fn from(from: mka::Usage) -> Self {
        Self {
            prompt_tokens: from.prompt_tokens as u64,
            reused_tokens: from.reused_tokens as u64,
            recalled_tokens: from.recalled_tokens as u64,
            generated_tokens: from.generated_tokens as u64,
            stream_tokens: from.stream_tokens,
            stop: match from.stop {
                mka::StopReason::EndOfTurn => StopReason::EndOfTurn,
                mka::StopReason::StopString => StopReason::StopString,
                _ => StopReason::MaxTokens,
            },
        }
    }
}

/// What happens while a turn is answered.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum Event {
    /// Memories that were put before the message.
    Recalled {
        /// Best first.
        hits: Vec<Hit>,
    },
    /// A piece of the answer: whole UTF-8.
    Token {
        /// What it adds to the answer.
        text: String,
    },
    /// The turn is on disk; nothing follows.
    Done {
        /// What it cost.
        usage: Usage,
    },
}

impl Event {
    /// None for an event that this surface does not know.
    fn new(event: mka::Event) -> Option<Self> {
        match event {
            mka::Event::Recalled(hits) => Some(Self::Recalled { hits: all(hits) }),
            mka::Event::Token(token) => Some(Self::Token { text: token.text }),
            mka::Event::Done(usage) => Some(Self::Done { usage: usage.into() }),
            _ => None,
        }
    }
}

/// What feeding a document did.
#[derive(Debug, Clone, uniffi::Record)]
pub struct FeedSummary {
    /// Bytes taken in.
    pub bytes: u64,
    /// Tokens that ran through the model.
    pub model_tokens: u64,
    /// Chunks added to text memory.
    pub chunks_added: u64,
    /// Chunks that were there already.
    pub chunks_deduplicated: u64,
}

/// What happens while a document is fed.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum FeedEvent {
    /// Bytes taken in so far.
    Progress {
        /// Bytes taken in so far.
        fed_bytes: u64,
        /// Bytes that are on disk.
        committed_bytes: u64,
        /// Bytes of the document.
        total_bytes: u64,
    },
    /// The whole document is on disk; nothing follows.
    Done {
        /// What feeding did.
        summary: FeedSummary,
    },
}

impl FeedEvent {
    /// None for an event that this surface does not know.
    fn new(event: mka::FeedEvent) -> Option<Self> {
        match event {
            mka::FeedEvent::Progress { fed_bytes, committed_bytes, total_bytes } => {
                Some(Self::Progress { fed_bytes, committed_bytes, total_bytes })
            }
            mka::FeedEvent::Done(summary) => Some(Self::Done {
                summary: FeedSummary {
                    bytes: summary.bytes,
                    model_tokens: summary.model_tokens,
                    chunks_added: summary.chunks_added as u64,
                    chunks_deduplicated: summary.chunks_deduplicated as u64,
                },
            }),
            _ => None,
        }
    }
}

/// The events of one turn; dropping it cancels the turn within one token.
#[derive(uniffi::Object)]
pub struct NativeEvents {
    pub(crate) pull: Pull<mka::Events>,
}

#[uniffi::export]
impl NativeEvents {
    /// Every event that is ready, at least one; none after the last.
    pub async fn next_batch(&self) -> Result<Option<Vec<Event>>, MkaError> {
        let batch = self.pull.batch().await?;
        Ok(batch.map(|events| events.into_iter().filter_map(Event::new).collect()))
    }

    /// Every event that is ready within `limit_ms`, perhaps none yet; none at all after the last. Blocks the thread.
    pub fn next_batch_blocking(&self, limit_ms: u32) -> Result<Option<Vec<Event>>, MkaError> {
        let limit = Duration::from_millis(limit_ms.into());
        wait_at_most(self.next_batch(), limit).unwrap_or(Ok(Some(Vec::new())))
    }

    /// Stops the turn within one token, from any thread; the stream then ends.
    pub fn cancel(&self) {
        self.pull.cancel();
    }

    /// Stops the turn and waits until what was generated is on disk.
    pub async fn close(&self) {
        self.pull.close().await;
    }

    /// `close`, blocking the thread.
    pub fn close_blocking(&self) {
        wait(self.pull.close());
    }
}

/// The progress of one document; dropping it cancels at the next block, keeping what was fed.
#[derive(uniffi::Object)]
pub struct NativeFeed {
    pub(crate) pull: Pull<mka::Feed>,
}

#[uniffi::export]
impl NativeFeed {
    /// Every event that is ready, at least one; none after the last.
    pub async fn next_batch(&self) -> Result<Option<Vec<FeedEvent>>, MkaError> {
        let batch = self.pull.batch().await?;
        Ok(batch.map(|events| events.into_iter().filter_map(FeedEvent::new).collect()))
    }

    /// Every event that is ready within `limit_ms`, perhaps none yet; none at all after the last. Blocks the thread.
    pub fn next_batch_blocking(&self, limit_ms: u32) -> Result<Option<Vec<FeedEvent>>, MkaError> {
        let limit = Duration::from_millis(limit_ms.into());
        wait_at_most(self.next_batch(), limit).unwrap_or(Ok(Some(Vec::new())))
    }

    /// Stops at the next block, from any thread; the stream then ends.
    pub fn cancel(&self) {
        self.pull.cancel();
    }

    /// Stops and waits until the session stands at what was committed.
    pub async fn close(&self) {
        self.pull.close().await;
    }

    /// `close`, blocking the thread.
    pub fn close_blocking(&self) {
        wait(self.pull.close());
    }
}

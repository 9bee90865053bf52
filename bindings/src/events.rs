//! Events of a turn and of a feed, and the objects that a foreign caller pulls them from.
//! Knows no session; how to pull is in `pull`.

use crate::error::MkaError;
use crate::foreign::counted;
use crate::numbered::Entry;
use crate::open::{Batch, Pulled, STREAMS};
use crate::pull::Pull;
use crate::records::{Hit, all};
use crate::wait::{wait, wait_at_most};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::Waker;
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

impl From<mka::StopReason> for StopReason {
    fn from(from: mka::StopReason) -> Self {
        match from {
            mka::StopReason::EndOfTurn => Self::EndOfTurn,
            mka::StopReason::StopString => Self::StopString,
            _ => Self::MaxTokens,
        }
    }
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
    /// What was recalled inside attention; none where the turn's policy recalls no pages.
    pub pages: Option<PageUsage>,
    /// The answer's turn in the session's log, behind that of its message.
    pub answer_turn: Option<u64>,
}

/// What recall inside attention did for a turn.
#[derive(Debug, Clone, uniffi::Record)]
pub struct PageUsage {
    /// Tokens of the stream whose keys and values are stored and can be chosen.
    pub stored_tokens: u64,
    /// Tokens that each key/value head recalled for a query.
    pub recalled_tokens: u64,
    /// For each layer, the share of the answer's attention that went to recalled tokens.
    pub share: Vec<f32>,
    /// For each layer, the estimated share of the attention to all stored tokens that the recalled ones hold.
    pub recovered: Vec<f32>,
}

impl From<mka::PageUsage> for PageUsage {
    fn from(from: mka::PageUsage) -> Self {
        Self {
            stored_tokens: from.stored_tokens as u64,
            recalled_tokens: from.recalled_tokens as u64,
            share: from.share,
            recovered: from.recovered,
        }
    }
}

impl From<mka::Usage> for Usage {
    fn from(from: mka::Usage) -> Self {
        Self {
            prompt_tokens: from.prompt_tokens as u64,
            reused_tokens: from.reused_tokens as u64,
            recalled_tokens: from.recalled_tokens as u64,
            generated_tokens: from.generated_tokens as u64,
            stream_tokens: from.stream_tokens,
            stop: from.stop.into(),
            pages: from.pages.map(Into::into),
            answer_turn: from.answer_turn,
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

/// Does something when it is dropped, after what was made later.
struct AtEnd<F: Fn()>(F);

impl<F: Fn()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// A stream that a foreign caller pulls: one object for each kind of event, with the same calls.
macro_rules! pulled {
    ($(#[$doc:meta])* pub struct $name:ident of $stream:ty, $event:ident in $batch:ident) => {
        $(#[$doc])*
        #[derive(uniffi::Object)]
        pub struct $name {
            pull: Pull<$stream>,
            entry: OnceLock<Entry<Weak<dyn Pulled>>>,
            /// Whom the last poll promised to wake.
            polled: Mutex<Option<Waker>>,
        }

        impl $name {
            pub(crate) fn new(pull: Pull<$stream>) -> Self {
                Self { pull, entry: OnceLock::new(), polled: Mutex::default() }
            }

            /// A waiter whose stream was taken away asks again, and sees its end.
            fn wake(&self) {
                let polled = self.polled.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(waker) = polled {
                    waker.wake();
                }
            }
        }

        impl Pulled for $name {
            fn wait(&self, limit: Duration) -> Result<Option<Batch>, MkaError> {
                let batch = wait_at_most(self.pull.batch(), limit);
                Ok(batch.unwrap_or(Ok(Some(Vec::new())))?.map(Batch::$batch))
            }

            fn poll(&self, waker: &Waker) -> Result<Option<Batch>, MkaError> {
                *self.polled.lock().unwrap_or_else(PoisonError::into_inner) = Some(waker.clone());
                Ok(self.pull.poll(waker)?.map(Batch::$batch))
            }
        }

        #[uniffi::export]
        impl $name {
            /// Every event that is ready, at least one; none after the last.
            pub async fn next_batch(&self) -> Result<Option<Vec<$event>>, MkaError> {
                let batch = counted(self.pull.batch()).await?;
                Ok(batch.map(|events| events.into_iter().filter_map(<$event>::new).collect()))
            }

            /// Every event that is ready within `limit_ms`, perhaps none yet; none at all after the last.
            /// Blocks the thread.
            pub fn next_batch_blocking(
                &self,
                limit_ms: u32,
            ) -> Result<Option<Vec<$event>>, MkaError> {
                let limit = Duration::from_millis(limit_ms.into());
                wait_at_most(self.next_batch(), limit).unwrap_or(Ok(Some(Vec::new())))
            }

            /// Its number for plain calls.
            pub fn number(self: Arc<Self>) -> u64 {
                let stream = || Arc::downgrade(&self) as Weak<dyn Pulled>;
                self.entry.get_or_init(|| Entry::new(&STREAMS, stream())).number
            }

            /// Stops the work, from any thread; the stream then ends.
            pub fn cancel(&self) {
                // A reader that was cancelled cancels before each poll, until the worker has stopped: woken each time, it
                // would not sleep.
                if self.pull.cancel() {
                    self.wake();
                }
            }

            /// Stops the work and waits until the session stands at what was done; an error of the work that was not
            /// read is given here.
            pub async fn close(&self) -> Result<(), MkaError> {
                // A close that is itself cancelled has taken the place of the waiter, too.
                let _woken = AtEnd(|| self.wake());
                counted(self.pull.close()).await
            }

            /// `close`, blocking the thread.
            pub fn close_blocking(&self) -> Result<(), MkaError> {
                let closed = wait(self.pull.close());
                self.wake();
                closed
            }
        }
    };
}

pulled! {
    /// The events of one turn; dropping it cancels the turn within one token.
    pub struct NativeEvents of mka::Events, Event in Turn
}

pulled! {
    /// The progress of one document; dropping it cancels at the next block, keeping what was fed.
    pub struct NativeFeed of mka::Feed, FeedEvent in Feed
}

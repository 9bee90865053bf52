//! What a caller sees while a session works: streams of events that cancel their work when dropped.
//! Knows no model; a stream is the receiving end of a channel that the worker thread fills.

use crate::error::{Error, Result};
use crate::pages::PageUsage;
use futures_core::Stream;
use mka_memory::{Hit, TurnId};
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

/// One piece of an answer: whole UTF-8, usually one token of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Token {
    /// The text that this piece adds to the answer.
    pub text: String,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The model ended its turn, or the answer is all that its grammar allows.
    EndOfTurn,
    /// `max_new_tokens` were generated.
    MaxTokens,
    /// A stop string appeared; it is not part of the answer.
    StopString,
}

/// What one turn cost, in tokens.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Usage {
    /// Tokens that the first new token could attend to: sinks, window and the new prompt.
    pub prompt_tokens: usize,
    /// Of these, tokens whose keys and values were there already and cost nothing.
    pub reused_tokens: usize,
    /// Of these, tokens of text recalled from memory for this turn.
    pub recalled_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Tokens in the session's stream now, windows and all.
    pub stream_tokens: u64,
    /// Why the answer ended.
    pub stop: StopReason,
    /// What was recalled inside attention; None where the turn's policy recalls no pages.
    pub pages: Option<PageUsage>,
    /// The answer's turn in the session's log, behind that of its message; None where the log has none.
    pub answer_turn: Option<TurnId>,
}

/// What happens while a turn is answered.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// Memories that were put before the message, best first.
    Recalled(Vec<Hit>),
    /// A piece of the answer.
    Token(Token),
    /// The turn is on disk; nothing follows.
    Done(Usage),
}

/// What happens while a document is fed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeedEvent {
    /// Bytes taken in so far; those committed survive a crash.
    Progress {
        /// Bytes of the document taken in so far.
        fed_bytes: u64,
        /// Bytes of the document that are on disk.
        committed_bytes: u64,
        /// Bytes of the document.
        total_bytes: u64,
    },
    /// The whole document is on disk; nothing follows.
    Done(FeedSummary),
}

/// What feeding a document did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FeedSummary {
    /// Bytes taken in.
    pub bytes: u64,
    /// Tokens that ran through the model.
    pub model_tokens: u64,
    /// Chunks added to text memory.
    pub chunks_added: usize,
    /// Chunks that were there already and were counted, not stored.
    pub chunks_deduplicated: usize,
}

/// Stops the work of a stream from anywhere, while somebody else waits for the stream's next event.
///
/// A turn ends within one token: the model chooses at most one more after the call. A feed ends at its next block.
/// What was sent before can still be read; then the stream ends, behind an error if the work failed, and whoever has seen
/// its end knows that the work is on disk or taken back.
#[derive(Debug, Clone)]
pub struct Canceller(Arc<Steered>);

#[derive(Debug, Default)]
struct Steered {
    cancelled: AtomicBool,
    /// Told of the cancellation: a worker that waits for its caller.
    waiting: Notify,
    generated_tokens: AtomicUsize,
    /// The work is done, or the stream was dropped.
    over: AtomicBool,
}

impl Canceller {
    /// Stops the work; without effect on a stream that ended.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.0.waiting.notify_waiters();
    }

    /// Whether [`Canceller::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    /// Whether the work goes on, and whoever holds the stream wants it to: it may wait for them to read.
    pub(crate) fn is_awaited(&self) -> bool {
        !self.0.over.load(Ordering::Acquire) && !self.is_cancelled()
    }

    /// Tokens that the model has chosen so far; some may wait to be read. Of a feed none.
    pub fn generated_tokens(&self) -> usize {
        self.0.generated_tokens.load(Ordering::Acquire)
    }
}

/// The sending end that a worker thread holds; closed when the caller dropped the stream.
pub(crate) struct Sink<T> {
    channel: mpsc::Sender<Result<T>>,
    canceller: Canceller,
}

impl<T> Sink<T> {
    /// Whether the caller is gone or wants no more: the work should stop at its next safe point.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.channel.is_closed() || self.canceller.is_cancelled()
    }

    /// Counts a token that the model chose.
    pub(crate) fn count_token(&self) {
        self.canceller.0.generated_tokens.fetch_add(1, Ordering::AcqRel);
    }

    /// Sends an event; false if the caller is gone or wants no more.
    ///
    /// A caller that is behind is waited for until it cancels: it may never read, and whoever closes the engine waits.
    pub(crate) fn send(&self, event: T) -> bool {
        if self.canceller.is_cancelled() {
            return false;
        }
        let item = match self.channel.try_send(Ok(event)) {
            Err(TrySendError::Full(item)) => item,
            sent => return sent.is_ok(),
        };
        let mut cancelled = pin!(self.canceller.0.waiting.notified());
        let mut room = pin!(self.channel.reserve());
        let permit = block_on(poll_fn(|cx| {
            let told = cancelled.as_mut().poll(cx).is_ready();
            if told || self.canceller.is_cancelled() {
                return Poll::Ready(None);
            }
            room.as_mut().poll(cx).map(std::result::Result::ok)
        }));
        permit.map(|permit| permit.send(item)).is_some()
    }
}

/// Blocks the thread until `future` is ready.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(Thread);

    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        std::thread::park();
    }
}

/// The events of one turn, a [`Stream`]; dropping it cancels the turn within one token.
///
/// What was generated before the cancellation is kept as the turn's answer.
#[derive(Debug)]
#[must_use = "a stream that is dropped cancels its work"]
pub struct Events(Receiver<Event>);

/// The progress of what is taken in, a [`Stream`]; dropping it cancels at the next block, keeping what was committed.
#[derive(Debug)]
#[must_use = "a stream that is dropped cancels its work"]
pub struct Feed(Receiver<FeedEvent>);

#[derive(Debug)]
struct Receiver<T> {
    channel: mpsc::Receiver<Result<T>>,
    canceller: Canceller,
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.canceller.0.over.store(true, Ordering::Release);
    }
}

/// Events that a worker may be ahead of its caller.
const AHEAD: usize = 64;

/// Runs `work` on a thread of its own and streams what it sends; its result is the stream's last item.
///
/// `work` is consumed before that item is sent: whoever has seen it knows that the worker holds nothing any more.
fn spawn<T: Send + 'static>(
    work: impl FnOnce(&Sink<T>) -> Result<Option<T>> + Send + 'static,
) -> Receiver<T> {
    let (sender, channel) = mpsc::channel(AHEAD + 1);
    let canceller = Canceller(Arc::default());
    let failed = sender.clone();
    // The last item has a place of its own: a caller that cancelled and is behind is told of an error all the same.
    let place = sender.clone().try_reserve_owned().expect("the channel is new and empty");
    let sink = Sink { channel: sender, canceller: canceller.clone() };
    let spawned = std::thread::Builder::new().name("mka-session".into()).spawn(move || {
        // Of what a panic leaves half-way the work says so itself, by the locks that it held.
        let done = catch_unwind(AssertUnwindSafe(|| work(&sink)));
        let done = done.unwrap_or_else(|payload| Err(Error::panicked("session", &*payload)));
        let last = done.transpose();
        sink.canceller.0.over.store(true, Ordering::Release);
        if let Some(last) = last {
            // A caller that is gone does not need it.
            drop(place.send(last));
        }
    });
    if let Err(source) = spawned {
        let error =
            Error::new(crate::ErrorKind::OutOfMemory, format!("start worker thread: {source}"));
        // The channel is new and empty: there is room.
        let _ = failed.try_send(Err(error.with_source(source)));
    }
    Receiver { channel, canceller }
}

impl Events {
    pub(crate) fn spawn(
        work: impl FnOnce(&Sink<Event>) -> Result<Option<Event>> + Send + 'static,
    ) -> Self {
        Self(spawn(work))
    }

    /// What cancels the turn without dropping the stream.
    pub fn canceller(&self) -> Canceller {
        self.0.canceller.clone()
    }

    /// The next event; None after the last. The same as `StreamExt::next`, without the trait.
    pub async fn next(&mut self) -> Option<Result<Event>> {
        self.0.channel.recv().await
    }

    /// The next event, blocking the thread; not to be called from async code.
    pub fn next_blocking(&mut self) -> Option<Result<Event>> {
        self.0.channel.blocking_recv()
    }

    /// Runs the turn to its end: the whole answer as it was streamed, without
    /// [`SendOptions::answer_prefix`](crate::SendOptions), and its cost.
    ///
    /// # Errors
    /// The turn's own error.
    pub async fn text(mut self) -> Result<(String, Usage)> {
        let mut answer = String::new();
        while let Some(event) = self.next().await {
            match event? {
                Event::Token(token) => answer.push_str(&token.text),
                Event::Done(usage) => return Ok((answer, usage)),
                Event::Recalled(_) => {}
            }
        }
        Err(Error::cancelled("send"))
    }
}

impl Feed {
    pub(crate) fn spawn(
        work: impl FnOnce(&Sink<FeedEvent>) -> Result<Option<FeedEvent>> + Send + 'static,
    ) -> Self {
        Self(spawn(work))
    }

    /// What cancels the feed without dropping the stream.
    pub fn canceller(&self) -> Canceller {
        self.0.canceller.clone()
    }

    /// The next event; None after the last.
    pub async fn next(&mut self) -> Option<Result<FeedEvent>> {
        self.0.channel.recv().await
    }

    /// The next event, blocking the thread; not to be called from async code.
    pub fn next_blocking(&mut self) -> Option<Result<FeedEvent>> {
        self.0.channel.blocking_recv()
    }

    /// Feeds to the end.
    ///
    /// # Errors
    /// The feed's own error.
    pub async fn finish(mut self) -> Result<FeedSummary> {
        while let Some(event) = self.next().await {
            if let FeedEvent::Done(summary) = event? {
                return Ok(summary);
            }
        }
        Err(Error::cancelled("feed"))
    }
}

impl Stream for Events {
    type Item = Result<Event>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.channel.poll_recv(cx)
    }
}

impl Stream for Feed {
    type Item = Result<FeedEvent>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.channel.poll_recv(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    #[test]
    fn a_panic_of_the_work_is_the_streams_last_item() {
        let mut feed = Feed::spawn(|_| panic!("as the test wants"));
        let error = feed.next_blocking().and_then(Result::err);
        assert_eq!(error.map(|error| error.kind()), Some(ErrorKind::Internal));
        assert!(feed.next_blocking().is_none());
    }

    #[test]
    fn an_error_behind_all_that_may_wait_reaches_a_caller_that_cancelled() {
        let sent = Arc::new(AtomicUsize::new(0));
        let sending = sent.clone();
        let mut feed = Feed::spawn(move |sink| {
            let progress = FeedEvent::Progress { fed_bytes: 0, committed_bytes: 0, total_bytes: 0 };
            while sink.send(progress.clone()) {
                sending.fetch_add(1, Ordering::AcqRel);
            }
            Err(Error::model("as the test wants"))
        });
        while sent.load(Ordering::Acquire) < AHEAD {
            std::thread::yield_now();
        }
        feed.canceller().cancel();
        let items: Vec<_> = std::iter::from_fn(|| feed.next_blocking()).collect();
        assert_eq!(items.len(), AHEAD + 1);
        let last = items.into_iter().next_back().and_then(Result::err);
        assert_eq!(last.map(|error| error.kind()), Some(ErrorKind::Model));
    }
}

//! Pulling a stream of the engine in batches, with a cancel that reaches it while somebody waits.
//! Knows no event.

use crate::error::MkaError;
use futures_core::Stream;
use mka::{Canceller, ErrorKind};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker, ready};
use tokio::sync::Mutex;

/// A stream of the engine, as far as it is pulled here.
pub(crate) trait Source: Stream<Item = mka::Result<Self::Event>> + Unpin {
    /// What it gives.
    type Event;
    /// What errors call its work.
    const OPERATION: &'static str;

    fn canceller(&self) -> Canceller;

    /// Whether `event` is the last of a stream that went well.
    fn is_last(event: &Self::Event) -> bool;
}

impl Source for mka::Events {
    type Event = mka::Event;
    const OPERATION: &'static str = "send";

    fn canceller(&self) -> Canceller {
        self.canceller()
    }

    fn is_last(event: &mka::Event) -> bool {
        matches!(event, mka::Event::Done(_))
    }
}

impl Source for mka::Feed {
    type Event = mka::FeedEvent;
    const OPERATION: &'static str = "feed";

    fn canceller(&self) -> Canceller {
        self.canceller()
    }

    fn is_last(event: &mka::FeedEvent) -> bool {
        matches!(event, mka::FeedEvent::Done(_))
    }
}

/// Whether a stream still holds its session, and what stops it.
pub(crate) struct Activity {
    canceller: Canceller,
    ended: AtomicBool,
}

impl Activity {
    pub(crate) fn generated_tokens(&self) -> u64 {
        self.canceller.generated_tokens() as u64
    }

    pub(crate) fn is_busy(&self) -> bool {
        !self.ended.load(Ordering::Acquire)
    }

    /// Whether nobody had cancelled before.
    pub(crate) fn cancel(&self) -> bool {
        let first = !self.canceller.is_cancelled();
        self.canceller.cancel();
        self.end();
        first
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// A stream being pulled by one caller at a time, in the order in which they come.
pub(crate) struct Pull<S: Source> {
    state: Mutex<State<S>>,
    activity: Arc<Activity>,
}

struct State<S> {
    /// None once the stream has ended.
    stream: Option<S>,
    /// An error behind events that had to be handed out first.
    failed: Option<mka::Error>,
}

impl<S: Source> Drop for Pull<S> {
    fn drop(&mut self) {
        // The stream is dropped with it, which cancels its work.
        self.activity.end();
    }
}

impl<S: Source> Pull<S> {
    pub(crate) fn new(stream: S) -> Self {
        let canceller = stream.canceller();
        let activity = Arc::new(Activity { canceller, ended: AtomicBool::new(false) });
        Self { state: Mutex::new(State { stream: Some(stream), failed: None }), activity }
    }

    pub(crate) fn activity(&self) -> Arc<Activity> {
        self.activity.clone()
    }

    /// Every event that is ready, at least one; None after the last.
    pub(crate) async fn batch(&self) -> Result<Option<Vec<S::Event>>, MkaError> {
        let mut state = self.state.lock().await;
        let batch = poll_fn(|cx| state.poll_batch(cx)).await;
        self.settle(&state, batch)
    }

    /// Every event that is ready; an empty batch if none is yet, and then `waker` is woken; None after the last, and for
    /// a second reader.
    pub(crate) fn poll(&self, waker: &Waker) -> Result<Option<Vec<S::Event>>, MkaError> {
        let Ok(mut state) = self.state.try_lock() else { return Ok(None) };
        match state.poll_batch(&mut Context::from_waker(waker)) {
            Poll::Ready(batch) => self.settle(&state, batch),
            Poll::Pending => Ok(Some(Vec::new())),
        }
    }

    fn settle(
        &self,
        state: &State<S>,
        batch: mka::Result<Batch<S::Event>>,
    ) -> Result<Option<Vec<S::Event>>, MkaError> {
        if state.stream.is_none() {
            self.activity.end();
        }
        match batch {
            // Whoever cancelled knows.
            Err(error) if is_cancelled(&error) && self.activity.canceller.is_cancelled() => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
            Ok(Batch::Events(events)) => Ok(Some(events)),
            Ok(Batch::End { whole }) if whole || self.activity.canceller.is_cancelled() => Ok(None),
            Ok(Batch::End { .. }) => Err(MkaError::Internal(format!(
                "{}: the worker stopped without a result",
                S::OPERATION
            ))),
        }
    }

    /// Stops the work; whoever reads sees what was on its way, an error of the work included, then the end.
    ///
    /// Whether nobody had cancelled before.
    pub(crate) fn cancel(&self) -> bool {
        self.activity.cancel()
    }

    /// Stops the work and waits for its end; an error of the work that nobody has read yet is given here.
    /// One that is itself cancelled leaves the stream to the next call; who polled the stream before it is to be woken.
    pub(crate) async fn close(&self) -> Result<(), MkaError> {
        self.activity.cancel();
        let mut state = self.state.lock().await;
        poll_fn(|cx| state.poll_end(cx)).await;
        match state.failed.take() {
            Some(error) if !is_cancelled(&error) => Err(error.into()),
            _ => Ok(()),
        }
    }
}

fn is_cancelled(error: &mka::Error) -> bool {
    error.kind() == ErrorKind::Cancelled
}

enum Batch<T> {
    Events(Vec<T>),
    /// `whole`: the last event was handed out before.
    End {
        whole: bool,
    },
}

impl<S: Source> State<S> {
    /// Whoever polls is woken when there is more to ask for, the stream's end included.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<mka::Result<Batch<S::Event>>> {
        if let Some(error) = self.failed.take() {
            return Poll::Ready(Err(error));
        }
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(Ok(Batch::End { whole: true }));
        };
        let mut events = Vec::new();
        loop {
            match Pin::new(&mut *stream).poll_next(cx) {
                Poll::Ready(Some(Ok(event))) => {
                    let last = S::is_last(&event);
                    events.push(event);
                    if last {
                        self.stream = None;
                        cx.waker().wake_by_ref();
                        break;
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    self.stream = None;
                    if events.is_empty() {
                        return Poll::Ready(Err(error));
                    }
                    self.failed = Some(error);
                    cx.waker().wake_by_ref();
                    break;
                }
                Poll::Ready(None) if events.is_empty() => {
                    self.stream = None;
                    return Poll::Ready(Ok(Batch::End { whole: false }));
                }
                Poll::Pending if events.is_empty() => return Poll::Pending,
                // Asked again at the next call: it says the same.
                Poll::Ready(None) => {
                    cx.waker().wake_by_ref();
                    break;
                }
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(Batch::Events(events)))
    }

    /// Drops the events until the stream has ended; an error among them waits in `failed`.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(stream) = &mut self.stream {
            match ready!(Pin::new(stream).poll_next(cx)) {
                Some(Ok(_)) => {}
                Some(Err(error)) => self.failed = Some(error),
                None => self.stream = None,
            }
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// What each poll gives, then the end.
    struct Pieces(VecDeque<Poll<Option<mka::Result<u32>>>>);

    impl Stream for Pieces {
        type Item = mka::Result<u32>;

        fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
            self.0.pop_front().unwrap_or(Poll::Ready(None))
        }
    }

    impl Source for Pieces {
        type Event = u32;
        const OPERATION: &'static str = "send";

        fn canceller(&self) -> Canceller {
            unreachable!("no pull holds it")
        }

        fn is_last(_: &u32) -> bool {
            false
        }
    }

    #[test]
    fn a_close_that_is_left_keeps_the_stream_and_its_error_for_the_next_one() {
        let error = "none".parse::<mka::Device>().unwrap_err();
        let kind = error.kind();
        let pieces = [
            Poll::Ready(Some(Ok(1))),
            Poll::Pending,
            Poll::Ready(Some(Err(error))),
            Poll::Pending,
            Poll::Ready(Some(Ok(2))),
        ];
        let mut state = State { stream: Some(Pieces(pieces.into())), failed: None };
        let mut close = || state.poll_end(&mut Context::from_waker(Waker::noop()));
        assert_eq!([close(), close(), close()], [Poll::Pending, Poll::Pending, Poll::Ready(())]);
        assert!(state.stream.is_none());
        assert_eq!(state.failed.map(|error| error.kind()), Some(kind));
    }
}

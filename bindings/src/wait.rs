//! Waiting for a future on a plain thread, with or without a limit.
//! Knows no runtime: the engine's futures only wait for channels.

use std::cell::Cell;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

thread_local! {
    static POLLS: Cell<bool> = const { Cell::new(false) };
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Whether this thread polls for `wait` or `wait_at_most`: the waker is this file's, not a foreign one.
pub(crate) fn polls_here() -> bool {
    POLLS.get()
}

fn poll<T>(future: Pin<&mut impl Future<Output = T>>, waker: &Waker) -> Poll<T> {
    let before = POLLS.replace(true);
    let result = future.poll(&mut Context::from_waker(waker));
    POLLS.set(before);
    result
}

/// Blocks the thread until `future` is ready.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        if let Poll::Ready(output) = poll(future.as_mut(), &waker) {
            return output;
        }
        std::thread::park();
    }
}

/// Blocks the thread until `future` is ready, for at most `limit`; then the future is dropped.
pub(crate) fn wait_at_most<T>(future: impl Future<Output = T>, limit: Duration) -> Option<T> {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let start = Instant::now();
    loop {
        if let Poll::Ready(output) = poll(future.as_mut(), &waker) {
            return Some(output);
        }
        let left = limit.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
        std::thread::park_timeout(left);
    }
}

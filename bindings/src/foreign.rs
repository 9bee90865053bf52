//! Calls from threads of the library into a foreign language: counted, and none after the last.
//! Knows no event and no message.
//!
//! An interpreter that goes away ends every thread that waits to get in, in the midst of Rust's frames, which aborts the
//! process. So whoever runs one calls [`shut_down`] before it goes.

use crate::wait::polls_here;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};

struct Calls {
    running: usize,
    closed: bool,
}

static CALLS: Mutex<Calls> = Mutex::new(Calls { running: 0, closed: false });
static IDLE: Condvar = Condvar::new();

fn calls() -> MutexGuard<'static, Calls> {
    CALLS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A call that is under way.
pub(crate) struct Call(());

impl Drop for Call {
    fn drop(&mut self) {
        let mut calls = calls();
        calls.running -= 1;
        if calls.running == 0 {
            IDLE.notify_all();
        }
    }
}

/// Begins a call; None after [`shut_down`].
pub(crate) fn call() -> Option<Call> {
    let mut calls = calls();
    if calls.closed {
        return None;
    }
    calls.running += 1;
    Some(Call(()))
}

/// Waits until no thread of the library is inside the foreign language; none goes there afterwards.
///
/// For the last moments of a process: futures that wait then are never woken, and messages are lost.
#[uniffi::export]
pub fn shut_down() {
    let mut calls = calls();
    calls.closed = true;
    while calls.running > 0 {
        calls = IDLE.wait(calls).unwrap_or_else(PoisonError::into_inner);
    }
}

/// `future`, whose waker is foreign code where it is polled by a foreign caller.
pub(crate) async fn counted<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    poll_fn(|cx| {
        if polls_here() {
            return future.as_mut().poll(cx);
        }
        let waker = Waker::from(Arc::new(Counted(cx.waker().clone())));
        future.as_mut().poll(&mut Context::from_waker(&waker))
    })
    .await
}

struct Counted(Waker);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(_call) = call() {
            self.0.wake_by_ref();
        }
    }
}

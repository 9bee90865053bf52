//! Blocking work off the caller's thread, awaited on whatever runtime the caller has.
//! Knows no session and no store.

use crate::error::{Error, ErrorKind, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A thread that has nothing to do waits this long for more: starting one costs as much as a short recall.
const IDLE: Duration = Duration::from_secs(10);

/// Where the threads come from, and the process that they are in: a fork has none of its parent's.
static THREADS: Mutex<Option<(u32, Handle)>> = Mutex::new(None);

fn threads() -> std::io::Result<Handle> {
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if let Some((owner, handle)) = &*threads
        && *owner == process
    {
        return Ok(handle.clone());
    }
    // Only its threads for blocking work are used: nobody drives it, so it has neither timer nor polling.
    let runtime =
        Builder::new_current_thread().thread_name("mka-worker").thread_keep_alive(IDLE).build()?;
    let handle = runtime.handle().clone();
    // It lasts as long as the process: a runtime that is dropped waits for its threads.
    std::mem::forget(runtime);
    *threads = Some((process, handle.clone()));
    Ok(handle)
}

/// Runs blocking `work` on a thread of the library's and awaits its result. The work goes on if nobody waits any more.
///
/// # Errors
/// The work's own; `OutOfMemory` if no thread can be started; `Internal` if the work panicked.
pub(crate) async fn offload<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let handle = threads().map_err(|source| no_thread(operation, source))?;
    offload_on(&handle, operation, work).await
}

fn no_thread(operation: &str, source: std::io::Error) -> Error {
    Error::new(ErrorKind::OutOfMemory, format!("{operation}: {source}")).with_source(source)
}

/// [`offload`] on a thread of `handle`'s.
async fn offload_on<T: Send + 'static>(
    handle: &Handle,
    operation: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = oneshot::channel();
    let begin = move || {
        let done = catch_unwind(AssertUnwindSafe(work));
        let done = done.unwrap_or_else(|payload| Err(Error::panicked(operation, &*payload)));
        // Nobody may wait any more.
        let _ = sender.send(done);
    };
    // tokio panics where the system gives it no thread, and keeps what it was given for a thread to come: what failed here
    // would be done later. So the work stays where it can be taken back, unless a thread has just begun it after all.
    let waiting = Arc::new(Mutex::new(Some(begin)));
    let taken = waiting.clone();
    let spawned = catch_unwind(AssertUnwindSafe(|| {
        handle.spawn_blocking(move || {
            if let Some(begin) = taken_from(&taken) {
                begin();
            }
        });
    }));
    if spawned.is_err() && taken_from(&waiting).is_some() {
        return Err(no_thread(operation, std::io::ErrorKind::OutOfMemory.into()));
    }
    drop(waiting);
    // An error where the threads went away with their runtime, before it began.
    receiver.await.unwrap_or_else(|_| Err(Error::cancelled(operation)))
}

fn taken_from<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::block_on as wait;

    #[test]
    fn work_is_done_off_the_callers_thread_and_its_result_comes_back() {
        let here = std::thread::current().id();
        let there = wait(offload("test", || Ok(std::thread::current().id()))).unwrap();
        assert_ne!(here, there);
        let error = wait(offload::<()>("test", || Err(Error::cancelled("inner")))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_panic_of_the_work_is_an_error_and_the_next_work_runs() {
        let fixed = wait(offload::<()>("test", || panic!("as the test wants"))).unwrap_err();
        let who = "test".to_owned();
        let made = wait(offload::<()>("test", move || panic!("as the {who} wants"))).unwrap_err();
        for error in [fixed, made] {
            assert_eq!(error.kind(), ErrorKind::Internal);
            assert_eq!(error.to_string(), "test: the library panicked: as the test wants");
        }
        assert_eq!(wait(offload("test", || Ok(3))).unwrap(), 3);
    }

    #[test]
    fn work_that_no_thread_can_be_started_for_is_not_done_later() {
        // More than any address space has room for.
        let runtime = Builder::new_current_thread().thread_stack_size(usize::MAX / 4 + 1).build();
        let runtime = runtime.unwrap();
        let held = Arc::new(());
        let own = held.clone();
        let work = move || Ok(Arc::strong_count(&own));
        let error = wait(offload_on(runtime.handle(), "test", work)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert_eq!(Arc::strong_count(&held), 1);
        runtime.shutdown_background();
    }

    #[test]
    fn many_at_once_wait_for_each_other() {
        let together = std::sync::Arc::new(std::sync::Barrier::new(16));
        let waiting: Vec<_> = (0..16)
            .map(|_| {
                let together = together.clone();
                std::thread::spawn(move || {
                    wait(offload("test", move || Ok(together.wait().is_leader()))).unwrap()
                })
            })
            .collect();
        let leaders = waiting.into_iter().filter_map(|each| each.join().ok()).filter(|is| *is);
        assert_eq!(leaders.count(), 1);
    }
}

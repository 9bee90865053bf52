//! Splitting a product over the threads of the current rayon pool, with the caller at work from the start.
//! Knows nothing of matrices.
//!
//! A decode step makes about 200 products of 10 to 50 µs. Handing each to the pool and waiting for it would cost a switch of
//! thread a product, so the caller works through the tasks itself, invited threads join if they come in time, and the caller
//! waits only for threads that have taken a task.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Set in [`Job::state`] once the caller lets no more threads in; the bits below count the threads inside.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Spins of the waiting caller before it offers its core to others: a few microseconds.
const SPINS: u32 = 200;

struct Job {
    /// Dangling once the job is closed and empty.
    work: *const (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    state: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `work` is `Sync` and is used only between entering and leaving, while `run` keeps it alive.
unsafe impl Send for Job {}
// SAFETY: as above; everything else is atomic or locked.
unsafe impl Sync for Job {}

/// Runs `work` once for each of `0..tasks`, on this thread and on those of the pool that come in time.
///
/// # Panics
/// With the panic of `work`, on any thread.
pub(super) fn run(tasks: usize, work: &(dyn Fn(usize) + Sync)) {
    let helpers = rayon::current_num_threads().min(tasks).saturating_sub(1);
    if helpers == 0 {
        (0..tasks).for_each(work);
        return;
    }
    // SAFETY: only the lifetime changes. Threads use `work` inside the job, and `Closing` does not let this function end, not
    // even by a panic, before the job is closed and empty.
    let work: *const (dyn Fn(usize) + Sync) = unsafe {
        std::mem::transmute::<&(dyn Fn(usize) + Sync), &'static (dyn Fn(usize) + Sync)>(work)
    };
    let job = Arc::new(Job {
        work,
        tasks,
        next: AtomicUsize::new(0),
        state: AtomicUsize::new(0),
        panic: Mutex::new(None),
    });
    for _ in 0..helpers {
        let job = job.clone();
        rayon::spawn(move || job.help());
    }
    let closing = Closing(&job);
    job.take_tasks();
    drop(closing);
    let panic = job.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

impl Job {
    /// Works on the job unless it is closed.
    fn help(&self) {
        let enter = |state: usize| (state & CLOSED == 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_tasks())) {
            *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
        }
        self.state.fetch_sub(1, Ordering::Release);
    }

    /// Takes tasks until none is left; called by the owner and between entering and leaving.
    fn take_tasks(&self) {
        // SAFETY: the job is not both closed and empty here, so `run` has not returned and `work` is alive.
        let work = unsafe { &*self.work };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= self.tasks {
                return;
            }
            work(task);
        }
    }
}

/// Closes the job and waits for the threads inside, when dropped.
struct Closing<'a>(&'a Job);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.state.load(Ordering::Acquire) != CLOSED {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_its_writes_are_seen() {
        for round in 0..2000 {
            let counts: Vec<AtomicUsize> = (0..round % 17).map(|_| AtomicUsize::new(0)).collect();
            run(counts.len(), &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }

    #[test]
    fn a_panic_of_any_task_reaches_the_caller_after_all_have_left() {
        for bad in [0, 7, 63] {
            let result = catch_unwind(|| run(64, &|task| assert_ne!(task, bad)));
            assert!(result.is_err());
        }
    }

    #[test]
    fn calls_from_many_threads_and_from_inside_the_pool_all_finish() {
        let sum = |n: usize| {
            let total = AtomicUsize::new(0);
            run(n, &|task| {
                total.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(total.into_inner(), n * n.saturating_sub(1) / 2);
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..300).for_each(sum));
            }
            scope.spawn(|| rayon::scope(|pool| (0..50).for_each(|_| pool.spawn(|_| sum(40)))));
        });
    }
}

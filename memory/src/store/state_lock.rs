//! The lock of the state. Who only looks never waits for a look that takes long.
//! Knows nothing of what it locks.

use std::ops::Deref;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A lock for many readers or one writer, and for long reads.
///
/// The standard lock lets no reader in once a writer waits: beside a read of seconds one commit would keep every recall
/// waiting. So writers wait for long reads elsewhere, in front of it.
///
/// Whoever holds one of its guards begins no long read and does not write: a writer that waits for the guard may be what
/// that would wait for.
#[derive(Debug)]
pub(super) struct StateLock<T> {
    state: RwLock<T>,
    /// Held by a long read, and by a writer until it has the lock. Taken before it.
    long_read: Mutex<()>,
}

impl<T> StateLock<T> {
    pub(super) fn new(state: T) -> Self {
        Self { state: RwLock::new(state), long_read: Mutex::new(()) }
    }

    // The state changes only by what leaves it whole if a thread dies elsewhere.

    pub(super) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A read beside which others begin, though a writer waits. One at a time.
    pub(super) fn read_long(&self) -> LongRead<'_, T> {
        let waiting = self.long_read.lock().unwrap_or_else(PoisonError::into_inner);
        LongRead { state: self.read(), _waiting: waiting }
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, T> {
        let _waiting = self.long_read.lock().unwrap_or_else(PoisonError::into_inner);
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a long read looks at.
pub(super) struct LongRead<'a, T> {
    state: RwLockReadGuard<'a, T>,
    _waiting: MutexGuard<'a, ()>,
}

impl<T> Deref for LongRead<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.state
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn readers_come_in_beside_a_long_read_that_a_writer_waits_for() {
        let lock = &StateLock::new(1);
        std::thread::scope(|threads| {
            let long = lock.read_long();
            threads.spawn(|| *lock.write() += 1);
            // The writer is at the lock by then.
            std::thread::sleep(Duration::from_millis(50));
            let (sender, receiver) = std::sync::mpsc::channel();
            threads.spawn(move || sender.send(*lock.read()));
            assert_eq!(receiver.recv_timeout(Duration::from_secs(20)), Ok(1));
            assert_eq!(*long, 1);
        });
        assert_eq!(*lock.read(), 2);
        assert_eq!(*lock.read_long(), 2);
    }
}

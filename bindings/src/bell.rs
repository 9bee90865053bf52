//! How threads of the library tell an event loop that something is ready: numbers, and a descriptor that the loop watches.
//! Knows no event and no foreign code: a worker that rings enters no interpreter.

use crate::error::MkaError;
use crate::numbered::Entry;
use crate::open::BELLS;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Wake, Waker};

/// The bell of one event loop.
///
/// The pipe holds one byte, or is about to, while there are numbers that were not taken, and none otherwise.
#[derive(uniffi::Object)]
pub struct NativeBell {
    reader: PipeReader,
    writer: PipeWriter,
    rung: Mutex<Vec<u64>>,
    /// Held by who takes.
    taking: Mutex<()>,
    entry: OnceLock<Entry<Weak<NativeBell>>>,
}

#[uniffi::export]
impl NativeBell {
    /// A bell that nobody has rung.
    #[uniffi::constructor]
    pub fn new() -> Result<Arc<Self>, MkaError> {
        let (reader, writer) = std::io::pipe()
            .map_err(|source| MkaError::Storage(format!("open a pipe for events: {source}")))?;
        let (rung, taking, entry) = (Mutex::default(), Mutex::default(), OnceLock::new());
        Ok(Arc::new(Self { reader, writer, rung, taking, entry }))
    }

    /// Its number for plain calls.
    pub fn number(self: Arc<Self>) -> u64 {
        self.entry.get_or_init(|| Entry::new(&BELLS, Arc::downgrade(&self))).number
    }

    /// The descriptor that can be read while somebody has rung; it is open as long as the bell exists. None where an event
    /// loop cannot watch a pipe.
    pub fn descriptor(&self) -> Option<i32> {
        #[cfg(unix)]
        return Some(std::os::fd::AsRawFd::as_raw_fd(&self.reader));
        #[cfg(not(unix))]
        None
    }
}

impl NativeBell {
    fn rung(&self) -> MutexGuard<'_, Vec<u64>> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ring(&self, number: u64) {
        let mut rung = self.rung();
        let first = rung.is_empty();
        rung.push(number);
        // Whoever is told by the byte takes the lock next: it is not held while they are told.
        drop(rung);
        if first {
            // Both ends are open as long as the bell is: writing a byte into an empty pipe does not fail.
            let _ = (&self.writer).write_all(&[0]);
        }
    }

    /// Everybody who has rung since the last call.
    pub fn take(&self) -> Vec<u64> {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        // Who finds numbers finds their byte, or waits the moment until it is written.
        if self.rung().is_empty() || (&self.reader).read_exact(&mut [0]).is_err() {
            return Vec::new();
        }
        std::mem::take(&mut *self.rung())
    }

    /// A waker that rings `number`.
    pub fn waker(self: Arc<Self>, number: u64) -> Waker {
        Waker::from(Arc::new(Ringing { bell: self, number }))
    }
}

struct Ringing {
    bell: Arc<NativeBell>,
    number: u64,
}

impl Wake for Ringing {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.bell.ring(self.number);
    }
}

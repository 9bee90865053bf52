//! Objects of the surface by their numbers, for who calls too often for uniffi's price: plain C functions (`direct`), and
//! the module of Python's wheel (`python/native`).
//! Knows no foreign language and no bytes.

use crate::bell::NativeBell;
use crate::error::MkaError;
use crate::memory::NativeMemory;
use crate::numbered::Numbered;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Duration;

/// Events of a stream that came at once.
#[derive(Debug)]
pub enum Batch {
    /// Of a turn.
    Turn(Vec<mka::Event>),
    /// Of a document being fed.
    Feed(Vec<mka::FeedEvent>),
}

/// A stream whose events can be had without uniffi.
pub trait Pulled: Send + Sync {
    /// What is ready within `limit`, perhaps nothing; None at the end.
    fn wait(&self, limit: Duration) -> Result<Option<Batch>, MkaError>;

    /// What is ready; nothing, and then `waker` is woken; None at the end.
    fn poll(&self, waker: &Waker) -> Result<Option<Batch>, MkaError>;
}

pub(crate) static STREAMS: Numbered<Weak<dyn Pulled>> = Numbered::new();
pub(crate) static MEMORIES: Numbered<Weak<NativeMemory>> = Numbered::new();
pub(crate) static BELLS: Numbered<Weak<NativeBell>> = Numbered::new();

fn gone(what: &str) -> MkaError {
    MkaError::InvalidArgument(format!("{what}: its number is unknown, expected one that is open"))
}

/// The stream with this number.
pub fn stream(number: u64) -> Result<Arc<dyn Pulled>, MkaError> {
    STREAMS.get(number).and_then(|stream| stream.upgrade()).ok_or_else(|| gone("stream"))
}

/// The memory with this number.
pub fn memory(number: u64) -> Result<Arc<NativeMemory>, MkaError> {
    MEMORIES.get(number).and_then(|memory| memory.upgrade()).ok_or_else(|| gone("memory"))
}

/// The bell with this number.
pub fn bell(number: u64) -> Result<Arc<NativeBell>, MkaError> {
    BELLS.get(number).and_then(|bell| bell.upgrade()).ok_or_else(|| gone("bell"))
}

/// What `work` gives; a panic in it is an error of the library.
pub fn without_panic<T>(work: impl FnOnce() -> Result<T, MkaError>) -> Result<T, MkaError> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(MkaError::Internal("a call of the library panicked".into())))
}

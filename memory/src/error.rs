//! The one error of this crate: a kind to branch on, a text to read, the cause kept as source.
//! Knows no layer in particular; storage, format and arguments all report through it.

use std::fmt;
use std::path::Path;

/// What a caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument is outside its range: correct the call.
    InvalidArgument,
    /// The thing asked for does not exist: a turn, a page.
    NotFound,
    /// The store is already open, here or in another process; the text names its pid.
    Locked,
    /// Bytes on disk are damaged; the text says which and what is lost.
    Corrupted,
    /// Intact, but made by another model, embedder or format version.
    Incompatible,
    /// Memory ran out.
    OutOfMemory,
    /// Reading or writing failed: disk full, permission, path.
    Storage,
    /// The work was cancelled by its caller.
    Cancelled,
}

/// An error of the memory: operation, expected, got.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of every fallible call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; public because an [`Embedder`](crate::Embedder) written elsewhere reports through it.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// The same error with its cause attached.
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    pub(crate) fn corrupted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupted, message)
    }

    /// An I/O failure at `path`.
    pub(crate) fn io(operation: &str, path: &Path, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Storage, format!("{operation} {}: {source}", path.display()))
            .with_source(source)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

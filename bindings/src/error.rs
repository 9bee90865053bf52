//! The error as foreign languages see it: one variant a kind, each with its text.
//! Knows no operation.

use mka::ErrorKind;
use std::fmt;

/// An error of mka: the variant says what the caller can do, the text says operation, expected and got.
#[derive(Debug, uniffi::Error)]
#[uniffi(flat_error)]
pub enum MkaError {
    /// An argument is outside its range: correct the call.
    InvalidArgument(String),
    /// The thing asked for does not exist: a file, a model, a turn.
    NotFound(String),
    /// Somebody else has it: another process the store, another handle or stream the session.
    Locked(String),
    /// Bytes on disk are damaged.
    Corrupted(String),
    /// Intact, but made by another model, embedder or format version.
    Incompatible(String),
    /// The model's files or its forward pass are at fault.
    Model(String),
    /// The device is missing or failed.
    Device(String),
    /// Memory ran out.
    OutOfMemory(String),
    /// Reading or writing failed.
    Storage(String),
    /// The work was cancelled by its caller, or words that it may have read were forgotten meanwhile.
    Cancelled(String),
    /// A fault of the library itself: please report it.
    Internal(String),
}

impl MkaError {
    /// A call on an engine or session that was closed.
    pub(crate) fn closed(operation: &str, what: &str) -> Self {
        Self::InvalidArgument(format!("{operation}: the {what} is closed, expected an open one"))
    }

    /// The name of its variant.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::InvalidArgument(_) => "InvalidArgument",
            Self::NotFound(_) => "NotFound",
            Self::Locked(_) => "Locked",
            Self::Corrupted(_) => "Corrupted",
            Self::Incompatible(_) => "Incompatible",
            Self::Model(_) => "Model",
            Self::Device(_) => "Device",
            Self::OutOfMemory(_) => "OutOfMemory",
            Self::Storage(_) => "Storage",
            Self::Cancelled(_) => "Cancelled",
            Self::Internal(_) => "Internal",
        }
    }
}

impl fmt::Display for MkaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InvalidArgument(text)
            | Self::NotFound(text)
            | Self::Locked(text)
            | Self::Corrupted(text)
            | Self::Incompatible(text)
            | Self::Model(text)
            | Self::Device(text)
            | Self::OutOfMemory(text)
            | Self::Storage(text)
            | Self::Cancelled(text)
            | Self::Internal(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for MkaError {}

impl From<mka::Error> for MkaError {
    fn from(error: mka::Error) -> Self {
        let text = error.to_string();
        match error.kind() {
            ErrorKind::InvalidArgument => Self::InvalidArgument(text),
            ErrorKind::NotFound => Self::NotFound(text),
            ErrorKind::Locked => Self::Locked(text),
            ErrorKind::Corrupted => Self::Corrupted(text),
            ErrorKind::Incompatible => Self::Incompatible(text),
            ErrorKind::Model => Self::Model(text),
            ErrorKind::Device => Self::Device(text),
            ErrorKind::OutOfMemory => Self::OutOfMemory(text),
            ErrorKind::Storage => Self::Storage(text),
            ErrorKind::Cancelled => Self::Cancelled(text),
            // `Internal`, and what this surface does not know yet.
            _ => Self::Internal(text),
        }
    }
}

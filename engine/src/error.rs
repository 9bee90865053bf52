//! The one error of the engine: a kind to branch on, a text to read, the cause kept as source.
//! Knows no layer in particular; every layer below converts into it here.

use std::any::Any;
use std::fmt;
use std::path::Path;

/// What a caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument is outside its range: correct the call.
    InvalidArgument,
    /// The thing asked for does not exist: a file, a model, a turn.
    NotFound,
    /// Somebody else has it: another process the store, another handle or stream the session.
    Locked,
    /// Bytes on disk are damaged; the text says which file and what is lost.
    Corrupted,
    /// Intact, but made by another model, embedder or format version.
    Incompatible,
    /// The model's files or its forward pass are at fault.
    Model,
    /// The device is missing or failed.
    Device,
    /// Memory ran out.
    OutOfMemory,
    /// Reading or writing failed: disk full, permission, path.
    Storage,
    /// The work was cancelled by its caller, or words that it may have read were forgotten meanwhile.
    Cancelled,
    /// A fault of the library itself: please report it.
    Internal,
}

/// An error of the engine: operation, expected, got.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The result of every fallible call of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    pub(crate) fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    pub(crate) fn model(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Model, message)
    }

    pub(crate) fn cancelled(operation: &str) -> Self {
        Self::new(ErrorKind::Cancelled, format!("{operation}: cancelled"))
    }

    /// A panic in `operation`, by what it left.
    pub(crate) fn panicked(operation: &str, payload: &(dyn Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("without a text");
        Self::new(ErrorKind::Internal, format!("{operation}: the library panicked: {text}"))
    }

    /// An I/O failure at `path`; a missing file is [`ErrorKind::NotFound`], anything else [`ErrorKind::Storage`].
    pub(crate) fn io(operation: &str, path: &Path, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Storage,
        };
        Self::new(kind, format!("{operation} {}: {source}", path.display())).with_source(source)
    }

    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
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

impl From<candle_core::Error> for Error {
    fn from(source: candle_core::Error) -> Self {
        Self::new(kind_of(&source), format!("tensor operation: {source}")).with_source(source)
    }
}

/// What a caller can do about a tensor operation that failed: a card's own failures are the device's, all else the model's.
fn kind_of(error: &candle_core::Error) -> ErrorKind {
    use candle_core::Error as Cause;
    match error {
        Cause::Context { inner, .. }
        | Cause::WithPath { inner, .. }
        | Cause::WithBacktrace { inner, .. } => kind_of(inner),
        Cause::WrappedContext { wrapped, .. } => {
            wrapped.downcast_ref::<Cause>().map_or(ErrorKind::Model, kind_of)
        }
        #[cfg(feature = "cuda")]
        Cause::Cuda(cause) => kind_on_card(&**cause),
        _ => ErrorKind::Model,
    }
}

#[cfg(feature = "cuda")]
fn kind_on_card(cause: &(dyn std::error::Error + Send + Sync + 'static)) -> ErrorKind {
    use candle_core::cuda_backend::CudaError;
    use candle_core::cuda_backend::cudarc::driver::{DriverError, sys::CUresult};
    match cause.downcast_ref::<CudaError>() {
        Some(
            CudaError::Cuda(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
            | CudaError::Load { cuda: DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY), .. },
        ) => ErrorKind::OutOfMemory,
        // What an operation was asked for, not what the card did.
        Some(
            CudaError::UnsupportedDtype { .. }
            | CudaError::MatMulNonContiguous { .. }
            | CudaError::UnexpectedDType { .. },
        ) => ErrorKind::Model,
        _ => ErrorKind::Device,
    }
}

impl From<mka_memory::Error> for Error {
    fn from(source: mka_memory::Error) -> Self {
        use mka_memory::ErrorKind as Kind;
        let kind = match source.kind() {
            Kind::InvalidArgument => ErrorKind::InvalidArgument,
            Kind::NotFound => ErrorKind::NotFound,
            Kind::Locked => ErrorKind::Locked,
            Kind::Corrupted => ErrorKind::Corrupted,
            Kind::Incompatible => ErrorKind::Incompatible,
            Kind::OutOfMemory => ErrorKind::OutOfMemory,
            Kind::Cancelled => ErrorKind::Cancelled,
            _ => ErrorKind::Storage,
        };
        Self::new(kind, source.to_string()).with_source(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_tensor_operation_is_the_models_whatever_is_said_beside_it() {
        let refused = || candle_core::Error::Msg("shapes".to_owned());
        for error in [refused(), refused().context("a launch"), refused().with_path("file")] {
            assert_eq!(kind_of(&error), ErrorKind::Model);
        }
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_cards_failure_is_the_devices_and_its_lack_of_room_one_of_memory() {
        use candle_core::cuda_backend::CudaError;
        use candle_core::cuda_backend::cudarc::driver::{DriverError, sys::CUresult};
        let failed = |code| candle_core::Error::from(CudaError::Cuda(DriverError(code)));
        for (code, kind) in [
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, ErrorKind::OutOfMemory),
            (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, ErrorKind::Device),
        ] {
            assert_eq!(kind_of(&failed(code)), kind);
            assert_eq!(kind_of(&failed(code).context("a launch").with_path("file")), kind);
        }
        let refused = CudaError::UnsupportedDtype { dtype: candle_core::DType::I64, op: "sum" };
        assert_eq!(kind_of(&refused.into()), ErrorKind::Model);
    }
}

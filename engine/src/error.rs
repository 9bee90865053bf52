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

    /// Memory that `operation` asked for and did not get: there is none, or the device failed.
    pub(crate) fn no_room(operation: &str, source: candle_core::Error) -> Self {
        let kind = match kind_of(&source) {
            ErrorKind::Device => ErrorKind::Device,
            _ => ErrorKind::OutOfMemory,
        };
        Self::new(kind, format!("{operation}: {source}")).with_source(source)
    }

    /// A device that `operation` did not open: it is not there or failed, or has no room.
    pub(crate) fn no_device(operation: &str, source: candle_core::Error) -> Self {
        let kind = match kind_of(&source) {
            ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
            _ => ErrorKind::Device,
        };
        Self::new(kind, format!("{operation}: {source}")).with_source(source)
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
    use candle_core::cuda_backend::cudarc::cublas::{result::CublasError, sys::cublasStatus_t};
    use candle_core::cuda_backend::cudarc::curand::{result::CurandError, sys::curandStatus_t};
    use candle_core::cuda_backend::cudarc::driver::{DriverError, sys::CUresult};
    // Of an operation that there is not for a card candle has a text alone.
    let Some(cause) = cause.downcast_ref::<CudaError>() else { return ErrorKind::Model };
    match cause {
        CudaError::Cuda(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
        | CudaError::Load { cuda: DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY), .. }
        | CudaError::Cublas(CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED))
        | CudaError::Curand(CurandError(curandStatus_t::CURAND_STATUS_ALLOCATION_FAILED)) => {
            ErrorKind::OutOfMemory
        }
        // What an operation was asked for, not what the card did.
        CudaError::UnsupportedDtype { .. }
        | CudaError::MatMulNonContiguous { .. }
        | CudaError::UnexpectedDType { .. } => ErrorKind::Model,
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

    #[test]
    fn what_says_nothing_of_a_card_is_what_was_asked_for() {
        let refused = || candle_core::Error::Msg("none".to_owned());
        assert_eq!(Error::no_room("allocate 3 pages", refused()).kind(), ErrorKind::OutOfMemory);
        let error = Error::no_device("open cuda:0", refused());
        assert_eq!(
            (error.kind(), error.to_string()),
            (ErrorKind::Device, "open cuda:0: none".to_owned())
        );
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn a_cards_failure_is_the_devices_and_its_lack_of_room_one_of_memory() {
        use candle_core::cuda_backend::CudaError;
        use candle_core::cuda_backend::cudarc::cublas::{result::CublasError, sys::cublasStatus_t};
        use candle_core::cuda_backend::cudarc::curand::{result::CurandError, sys::curandStatus_t};
        use candle_core::cuda_backend::cudarc::driver::{DriverError, sys::CUresult};
        use cublasStatus_t::{CUBLAS_STATUS_ALLOC_FAILED, CUBLAS_STATUS_EXECUTION_FAILED};
        use curandStatus_t::{CURAND_STATUS_ALLOCATION_FAILED, CURAND_STATUS_LAUNCH_FAILURE};
        let driver = |code| CudaError::Cuda(DriverError(code));
        let blas = |code| CudaError::Cublas(CublasError(code));
        let rand = |code| CudaError::Curand(CurandError(code));
        type Failure<'a> = &'a dyn Fn() -> CudaError;
        let cases: [(Failure<'_>, ErrorKind); 6] = [
            (&|| driver(CUresult::CUDA_ERROR_OUT_OF_MEMORY), ErrorKind::OutOfMemory),
            (&|| driver(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS), ErrorKind::Device),
            (&|| blas(CUBLAS_STATUS_ALLOC_FAILED), ErrorKind::OutOfMemory),
            (&|| blas(CUBLAS_STATUS_EXECUTION_FAILED), ErrorKind::Device),
            (&|| rand(CURAND_STATUS_ALLOCATION_FAILED), ErrorKind::OutOfMemory),
            (&|| rand(CURAND_STATUS_LAUNCH_FAILURE), ErrorKind::Device),
        ];
        for (failure, kind) in cases {
            let failed = || candle_core::Error::from(failure());
            assert_eq!(kind_of(&failed()), kind);
            assert_eq!(kind_of(&failed().context("a launch").with_path("file")), kind);
            // Where memory is asked for and where a device is opened it is the same.
            assert_eq!(Error::no_room("allocate", failed()).kind(), kind);
            assert_eq!(Error::no_device("open", failed()).kind(), kind);
        }
        let refused = CudaError::UnsupportedDtype { dtype: candle_core::DType::I64, op: "sum" };
        assert_eq!(kind_of(&refused.into()), ErrorKind::Model);
        // As candle has it of an operation without a kernel.
        let missing = candle_core::Error::Cuda("no cuda implementation for silu-mul".into());
        assert_eq!(kind_of(&missing), ErrorKind::Model);
    }
}

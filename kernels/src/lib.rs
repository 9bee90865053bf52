//! Pure functions on tensors.

mod error;
pub mod packed;

pub use error::{Error, ErrorKind, Result};

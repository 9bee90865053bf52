//! mka.
mod error;
#[allow(dead_code, reason = "read by the model loader")]
mod gguf;
pub use error::{Error, ErrorKind, Result};

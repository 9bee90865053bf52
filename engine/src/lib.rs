//! mka.
mod error;
#[allow(dead_code, reason = "read by the model loader")]
mod gguf;
#[allow(dead_code, reason = "used by the session")]
mod template;
#[cfg(test)]
mod testing;
#[allow(dead_code, reason = "used by the session")]
mod tokenizer;
pub use error::{Error, ErrorKind, Result};

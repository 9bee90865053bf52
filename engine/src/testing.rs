//! What tests need of the machine: a real model where one has been fetched.
//! Knows no network: it looks into the cache and says why a test is skipped.

use std::path::PathBuf;

/// The SmolLM2 GGUF file in the cache; `None`, with the reason printed, where it is not there.
pub(crate) fn smollm2_gguf() -> Option<PathBuf> {
    let cache = std::env::var_os("MKA_CACHE").map(PathBuf::from).or_else(|| {
        let base = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
        Some(base.join("mka"))
    })?;
    let path = cache.join("models/SmolLM2-135M-Instruct-Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {} (fetch the model first)", path.display());
    None
}

//! What tests need of the machine: a real model where one has been fetched.
//! Knows no network: it looks into the cache and says why a test is skipped.

use std::path::PathBuf;

/// The SmolLM2 GGUF file in the cache; `None`, with the reason printed, where it is not there.
pub(crate) fn smollm2_gguf() -> Option<PathBuf> {
    cached("SmolLM2-135M-Instruct-Q4_1.gguf")
}

/// The folder of the MiniLM embedder in the cache; `None`, with the reason printed, where it is not there.
pub(crate) fn minilm_folder() -> Option<PathBuf> {
    cached("all-MiniLM-L6-v2")
}

fn cached(name: &str) -> Option<PathBuf> {
    let path = crate::hub::cache_folder().ok()?.join("models").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {} (fetch the model first)", path.display());
    None
}

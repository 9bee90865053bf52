//! One binary for every test of the engine's public API, over a tiny seeded model.

mod architecture;
mod bad_input;
mod both;
mod disk;
mod fork;
mod kill;
mod memory;
mod pages;
mod parallel;
mod session;
mod training;

use mka::{Engine, Event, Events, MemoryConfig, ModelSource, Scope, Usage};
use std::path::{Path, PathBuf};

/// A model of two layers with a byte vocabulary and a chat template, 256 tokens long (tests/data/golden/make_golden.py).
pub(crate) fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/gguf/model.gguf")
}

/// An engine over `folder` with the tiny model and a window of `window_tokens`.
pub(crate) fn engine(folder: &Path, window_tokens: usize) -> Engine {
    let mut config = MemoryConfig::with_window(window_tokens);
    config.block_tokens = 64;
    Engine::builder(folder.join("store"))
        .model(ModelSource::path(tiny_model()))
        .memory(config)
        .open_blocking()
        .unwrap()
}

pub(crate) fn trip() -> Scope {
    Scope::user("ada").session("trip")
}

/// Runs a turn to its end.
pub(crate) fn finish(mut events: Events) -> mka::Result<(String, Usage)> {
    let mut text = String::new();
    while let Some(event) = events.next_blocking() {
        match event? {
            Event::Token(token) => text.push_str(&token.text),
            Event::Done(usage) => return Ok((text, usage)),
            _ => {}
        }
    }
    panic!("the stream ended without Done");
}

/// Waits for a future on this thread.
pub(crate) fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

//! Long-context memory for local language models: sessions that never run out of context.
//!
//! An [`Engine`] owns a model, its tokenizer and a memory folder; a [`Session`] is one conversation whose stream may
//! grow without end at constant memory. Recent tokens are attended exactly (the window), older text is recalled by
//! words and vectors, and everything is on disk before a turn is done.
//!
//! ```no_run
//! use mka::{Device, Engine, Event, Forget, ModelSource, Recall, Scope};
//!
//! # async fn run() -> mka::Result<()> {
//! let engine = Engine::builder("agent.mka") // created if missing; Locked if in use
//!     .model(ModelSource::hub("HuggingFaceTB/SmolLM2-135M-Instruct")) // or a folder or GGUF
//!     .device(Device::auto())
//!     .open()
//!     .await?;
//! let mut chat = engine.session(Scope::user("ada").session("trip")).await?; // continues where it stopped
//! let mut events = chat.send("What did we decide about Kyoto?");
//! while let Some(event) = events.next().await {
//!     match event? {
//!         Event::Recalled(hits) => eprintln!("{} memories", hits.len()),
//!         Event::Token(token) => print!("{}", token.text),
//!         Event::Done(usage) => eprintln!("reused {} of {} tokens", usage.reused_tokens, usage.prompt_tokens),
//!         _ => {}
//!     }
//! } // dropping `events` cancels
//! let hits = engine.memory().recall(&Scope::user("ada"), "hotel in Kyoto", Recall::default()).await?;
//! let receipt = engine.memory().forget(&Scope::user("ada"), Forget::matching("passport")).await?;
//! # Ok(())
//! # }
//! ```
//!
//! Models are trained in [`training`]. What it does not do yet: see Limits in the README.

mod answering;
mod appending;
mod attention;
mod blocking;
mod cache;
mod conversation;
mod embedding;
mod engine;
mod error;
mod feeding;
mod forgets;
mod generation;
mod gguf;
mod grammar;
mod heap;
mod hub;
mod memory;
mod models;
mod offload;
mod options;
mod pages;
pub mod parallel;
mod prompt;
mod quote;
mod sampling;
mod session;
mod snapshot;
mod stream;
mod template;
#[cfg(test)]
mod testing;
mod tokenizer;
mod tools;
pub mod training;

pub use embedding::{EmbedderPrecision, EmbedderSource};
pub use engine::{Device, Engine, EngineBuilder, MemoryConfig};
pub use error::{Error, ErrorKind, Result};
pub use feeding::{FeedMode, FeedOptions};
pub use grammar::Grammar;
pub use hub::ModelSource;
pub use memory::{Context, MemoryHandle};
pub use pages::{
    LandmarkScan, PageConfig, PagePrecision, PageRule, PageUsage, Prefill, RecallPolicy,
};
pub use quote::Quote;
pub use sampling::Sampling;
pub use session::{SendOptions, Session};
pub use stream::{
    Canceller, Event, Events, Feed, FeedEvent, FeedSummary, StopReason, Token, Usage,
};
pub use tools::{ToolCall, ToolResult, tool_calls};

pub use mka_memory::{
    Backend, Backup, Checkup, ChunkId, ChunkInfo, Committed, DiskUsage, EncryptionKey, Exported,
    Filter, Finding, Forget, Hit, Hygiene, Imported, Metadata, NewTurn, Policy, Problem, Recall,
    Receipt, Repair, Role, Scope, Sensitive, SessionInfo, Source, Stats, Trust, Turn, TurnId,
    Value, Why,
};

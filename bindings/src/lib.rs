//! The uniffi surface of mka: conversion only, no logic.
//! Knows the public API of the engine and nothing below it.
//!
//! Every call has an async form and one that blocks, named `..._blocking`; work runs on threads of the engine, never on
//! the thread that polls. Streams are pulled in batches: what is ready comes in one call, which costs a foreign caller
//! as much as a single event. Where even one uniffi call is dear, `direct` takes its place for Swift, and the module in
//! `python/native` for Python. The packages in `python/` and `swift/` put the languages' own forms on top.

mod bell;
mod caller;
mod config;
mod direct;
mod engine;
mod error;
mod events;
mod filter;
mod foreign;
mod grammar;
mod log;
mod memory;
mod mirrored;
mod numbered;
pub mod open;
mod options;
mod packed;
mod pull;
mod recalling;
mod records;
mod scope;
mod session;
mod tools;
mod upkeep;
mod wait;

pub use bell::NativeBell;
pub use caller::Caller;
pub use config::{
    Backend, EmbedderPrecision, EmbedderSource, EngineConfig, Hygiene, LandmarkScan, ModelSource,
    PageConfig, PagePrecision, PageRule, Policy, Prefill, Quote, RecallPolicy,
};
pub use direct::{Reply, mka_direct_free, mka_direct_poll_for};
pub use engine::NativeEngine;
pub use error::MkaError;
pub use events::{
    Event, FeedEvent, FeedSummary, NativeEvents, NativeFeed, PageUsage, StopReason, Usage,
};
pub use filter::{Filter, MetadataValue};
pub use foreign::shut_down;
pub use grammar::Grammar;
pub use log::{LogLevel, LogSink, forward_logs};
pub use memory::NativeMemory;
pub use options::{FeedMode, FeedOptions, Forget, NewTurn, RecallOptions, SendOptions};
pub use recalling::Recalling;
pub use records::{
    ChunkInfo, Committed, Context, Finding, Hit, Receipt, Sensitive, SessionInfo, Source, Trust,
    Turn, Vectors, Why,
};
pub use scope::{Role, Scope};
pub use session::NativeSession;
pub use tools::{ToolCall, ToolResult, tool_calls};
pub use upkeep::{Backup, Checkup, DiskUsage, Exported, Imported, Problem, Repair, Stats};

uniffi::setup_scaffolding!();

/// Version of the library behind the bindings.
#[uniffi::export]
pub fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// Names of the devices that this build can use here, the fastest last; each is understood by `EngineConfig::device`.
#[uniffi::export]
pub fn available_devices() -> Vec<String> {
    mka::Device::available().iter().map(ToString::to_string).collect()
}

//! What an agent's sessions remember, in one folder: a turn log, chunks found by words and by vectors, cache pages.
//! Knows no model, tokenizer or weights: a vector is `&[f32]`, a page is bytes, a token is a `u32`.
//!
//! ```
//! use std::sync::Arc;
//! use mka_memory::{Commit, Forget, HashedEmbedder, NewTurn, Recall, Role, Scope, Store, StoreOptions};
//!
//! # fn main() -> mka_memory::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("agent.mka");
//! let store = Store::open(path, Arc::new(HashedEmbedder::new()), StoreOptions::default())?;
//! let trip = Scope::user("ada").session("trip");
//! let turn = NewTurn::new(Role::User, "We booked the Gion hotel in Kyoto.");
//! store.commit(&trip, Commit { turns: vec![turn], ..Commit::default() })?;
//!
//! let hits = store.recall(&Scope::user("ada"), "hotel in Kyoto", &Recall::default())?;
//! assert_eq!(hits[0].text, "We booked the Gion hotel in Kyoto.");
//!
//! let receipt = store.forget(&Scope::user("ada"), &Forget::matching("Gion"))?;
//! store.verify(&receipt)?;
//! # Ok(())
//! # }
//! ```
//!
//! What it does not do: generate text, count tokens, tell the time, or reach a network.
//! The format on disk and what each call promises are in `docs/format.md`.

mod cancel;
mod chunk;
mod cipher;
mod embedder;
mod error;
mod filter;
mod forget;
mod format;
mod hashed;
mod hygiene;
mod log;
mod partition;
mod recall;
mod scope;
mod sentence;
mod storage;
mod store;
mod summary;
mod tags;
mod vectors;
mod words;

pub use cancel::Cancel;
pub use cipher::EncryptionKey;
pub use embedder::Embedder;
pub use error::{Error, ErrorKind, Result};
pub use filter::{ENGINE_KEYS, Filter, MAX_METADATA_ENTRIES, Metadata, Value, check_metadata};
pub use forget::{Forget, Receipt};
pub use hashed::HashedEmbedder;
pub use hygiene::{Finding, Hygiene, Policy, Sensitive};
pub use log::{Commit, Committed, NewSnapshot, NewTurn, Role, Snapshot, Turn, TurnId};
pub use recall::{ChunkId, Hit, Recall, Source, Trust, Why};
pub use scope::Scope;
pub use sentence::{is_line_break, sentences};
pub use storage::{Backend, RecordChange, Storage, Visit};
pub use store::{
    Backup, Checkup, ChunkInfo, DiskUsage, Exported, Imported, NewPage, OpenSnapshot, PageBytes,
    Problem, Reembedded, Repair, SessionInfo, Stats, Store, StoreOptions,
};
pub use vectors::{RowSet, VectorIndex};

//! The engine's handle on memory: the store's calls, off the async threads.
//! Knows no model.

use crate::engine::Shared;
use crate::error::Result;
use crate::stream::offload;
use mka_memory::{
    ChunkInfo, Commit, Committed, Forget, Hit, NewTurn, Recall, Receipt, Scope, Stats,
};
use std::ops::Range;
use std::sync::Arc;

/// Remember, recall and forget, over every session of the engine.
#[derive(Clone)]
pub struct MemoryHandle {
    shared: Arc<Shared>,
}

impl MemoryHandle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Appends `turns` to the session of `scope` as text memory, durable when it returns; the model reads none of it.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope names no session; `Storage`.
    pub async fn remember(&self, scope: &Scope, turns: Vec<NewTurn>) -> Result<Committed> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        let commit = Commit { turns, ..Commit::default() };
        offload("remember", move || Ok(shared.store.commit(&scope, commit)?)).await
    }

    /// The memories of `scope` that answer `query` best, best first.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed.
    pub async fn recall(&self, scope: &Scope, query: &str, options: Recall) -> Result<Vec<Hit>> {
        let (shared, scope, query) = (self.shared.clone(), scope.clone(), query.to_owned());
        offload("recall", move || Ok(shared.store.recall(&scope, &query, &options)?)).await
    }

    /// Erases what `selector` names from log, chunks, vectors, words, pages and summaries, and says what went.
    ///
    /// # Errors
    /// `Storage`.
    pub async fn forget(&self, scope: &Scope, selector: Forget) -> Result<Receipt> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("forget", move || Ok(shared.store.forget(&scope, &selector)?)).await
    }

    /// Checks that what `receipt` names is in no file of the store.
    ///
    /// # Errors
    /// `Corrupted` if it is still there.
    pub async fn verify(&self, receipt: Receipt) -> Result<()> {
        let shared = self.shared.clone();
        offload("verify", move || Ok(shared.store.verify(&receipt)?)).await
    }

    /// Chunks of `scope` in the order in which they were first said; `range` counts from 0.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed.
    pub async fn chunks(&self, scope: &Scope, range: Range<usize>) -> Result<Vec<ChunkInfo>> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("chunks", move || Ok(shared.store.chunks(&scope, range)?)).await
    }

    /// Counts and bytes of the store.
    pub fn stats(&self) -> Stats {
        self.shared.store.stats()
    }
}

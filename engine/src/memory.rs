//! The engine's handle on memory: the store's calls, off the async threads.
//! Knows no model.

use crate::engine::Shared;
use crate::error::Result;
use crate::quote::{self, Quotation, Quote};
use crate::stream::offload;
use mka_memory::{
    ChunkInfo, Commit, Committed, Forget, Hit, NewTurn, Recall, Receipt, Scope, SessionInfo, Stats,
    Turn, TurnId,
};
use std::ops::Range;
use std::sync::Arc;

/// Text assembled for a model that lives elsewhere.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Context {
    /// Quoted, attributed memories under a header, in the order in which they were said; empty if nothing was found.
    pub text: String,
    /// Tokens of `text`: never above the budget.
    pub tokens: usize,
    /// The memories in it, best first.
    pub hits: Vec<Hit>,
}

/// [`MemoryHandle::context`] and [`crate::Session::context`]; the future borrows nothing.
pub(crate) fn context(
    shared: Arc<Shared>,
    scope: Scope,
    query: &str,
    budget_tokens: usize,
) -> impl Future<Output = Result<Context>> + Send + use<> {
    let query = query.to_owned();
    offload("context", move || {
        let options = Recall { k: 32, across_sessions: true, ..Recall::default() };
        let hits = shared.store.recall(&scope, &query, &options)?;
        let quotations = Quotation::of(&hits, &query, Quote::Passage);
        let count = |text: &str| shared.count_tokens(text);
        let (text, chosen) = quote::assemble(&quotations, budget_tokens, count)?;
        let hits = chosen.into_iter().map(|i| hits[i].clone()).collect();
        Ok(Context { tokens: shared.count_tokens(&text)?, text, hits })
    })
}

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

    /// What `scope` holds on `query`, laid out for another model within `budget_tokens`, headers included.
    ///
    /// Counted with the model's own tokenizer; an engine without one counts a token for every two bytes.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed.
    pub async fn context(
        &self,
        scope: &Scope,
        query: &str,
        budget_tokens: usize,
    ) -> Result<Context> {
        context(self.shared.clone(), scope.clone(), query, budget_tokens).await
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

    /// Turns `range` of the log of the scope's session, as far as it goes; retracted and forgotten ones are marked.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope names no session; `Corrupted` naming the turn that is damaged.
    pub async fn turns(&self, scope: &Scope, range: Range<TurnId>) -> Result<Vec<Turn>> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("turns", move || Ok(shared.store.turns(&scope, range)?)).await
    }

    /// The sessions of `scope`, by name.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed.
    pub async fn sessions(&self, scope: &Scope) -> Result<Vec<SessionInfo>> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("sessions", move || Ok(shared.store.sessions(&scope)?)).await
    }

    /// One unit vector a text, by the store's embedder: `(texts, dim)`, row-major, and `dim`.
    ///
    /// # Errors
    /// `Incompatible` if the embedder breaks its word.
    pub async fn embed(&self, texts: Vec<String>) -> Result<(Vec<f32>, usize)> {
        let shared = self.shared.clone();
        offload("embed", move || {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            Ok((shared.store.embed(&texts)?, shared.store.dim()))
        })
        .await
    }

    /// Counts and bytes of the store.
    pub fn stats(&self) -> Stats {
        self.shared.store.stats()
    }
}

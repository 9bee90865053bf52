//! Memory over every session: remember, recall, forget, lists.
//! Knows no model.

use crate::config::{Forget, NewTurn, RecallOptions, Scope};
use crate::engine::NativeEngine;
use crate::error::MkaError;
use crate::records::{
    ChunkInfo, Committed, Context, Hit, Receipt, SessionInfo, Stats, Turn, Vectors, all, receipt,
};
use crate::wait::wait;
use std::sync::Arc;

/// The memory of every scope of an engine.
#[derive(uniffi::Object)]
pub struct NativeMemory {
    engine: Arc<NativeEngine>,
}

impl NativeMemory {
    pub(crate) fn new(engine: Arc<NativeEngine>) -> Self {
        Self { engine }
    }

    fn handle(&self, operation: &str) -> Result<mka::MemoryHandle, MkaError> {
        Ok(self.engine.open_engine(operation)?.memory())
    }
}

#[uniffi::export]
impl NativeMemory {
    /// Appends `turns` to the session of `scope` as text memory, durable when it returns.
    pub async fn remember(&self, scope: Scope, turns: Vec<NewTurn>) -> Result<Committed, MkaError> {
        let memory = self.handle("remember")?;
        Ok(memory.remember(&scope.into(), all(turns)).await?.into())
    }

    /// `remember`, blocking the thread.
    pub fn remember_blocking(
        &self,
        scope: Scope,
        turns: Vec<NewTurn>,
    ) -> Result<Committed, MkaError> {
        wait(self.remember(scope, turns))
    }

    /// The memories of `scope` that answer `query` best, best first.
    pub async fn recall(
        &self,
        scope: Scope,
        query: String,
        options: RecallOptions,
    ) -> Result<Vec<Hit>, MkaError> {
        let memory = self.handle("recall")?;
        Ok(all(memory.recall(&scope.into(), &query, options.into()).await?))
    }

    /// `recall`, blocking the thread.
    pub fn recall_blocking(
        &self,
        scope: Scope,
        query: String,
        options: RecallOptions,
    ) -> Result<Vec<Hit>, MkaError> {
        wait(self.recall(scope, query, options))
    }

    /// What `scope` holds on `query`, laid out for another model within `budget_tokens`.
    pub async fn context(
        &self,
        scope: Scope,
        query: String,
        budget_tokens: u64,
    ) -> Result<Context, MkaError> {
        let budget = usize::try_from(budget_tokens).unwrap_or(usize::MAX);
        let memory = self.handle("context")?;
        Ok(memory.context(&scope.into(), &query, budget).await?.into())
    }

    /// `context`, blocking the thread.
    pub fn context_blocking(
        &self,
        scope: Scope,
        query: String,
        budget_tokens: u64,
    ) -> Result<Context, MkaError> {
        wait(self.context(scope, query, budget_tokens))
    }

    /// Erases what `selector` names, and says what went.
    pub async fn forget(&self, scope: Scope, selector: Forget) -> Result<Receipt, MkaError> {
        let memory = self.handle("forget")?;
        memory.forget(&scope.into(), selector.into()).await?.try_into()
    }

    /// `forget`, blocking the thread.
    pub fn forget_blocking(&self, scope: Scope, selector: Forget) -> Result<Receipt, MkaError> {
        wait(self.forget(scope, selector))
    }

    /// Checks that what the receipt names is in no file of the store; `record` is the receipt's own.
    pub async fn verify(&self, record: String) -> Result<(), MkaError> {
        let memory = self.handle("verify")?;
        Ok(memory.verify(receipt(&record)?).await?)
    }

    /// `verify`, blocking the thread.
    pub fn verify_blocking(&self, record: String) -> Result<(), MkaError> {
        wait(self.verify(record))
    }

    /// Chunks of `scope` from number `start` to before `end`, in the order in which they were first said.
    pub async fn chunks(
        &self,
        scope: Scope,
        start: u64,
        end: u64,
    ) -> Result<Vec<ChunkInfo>, MkaError> {
        let memory = self.handle("chunks")?;
        let index = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
        Ok(all(memory.chunks(&scope.into(), index(start)..index(end)).await?))
    }

    /// `chunks`, blocking the thread.
    pub fn chunks_blocking(
        &self,
        scope: Scope,
        start: u64,
        end: u64,
    ) -> Result<Vec<ChunkInfo>, MkaError> {
        wait(self.chunks(scope, start, end))
    }

    /// Turns of the session of `scope` from number `start` to before `end`.
    pub async fn turns(&self, scope: Scope, start: u64, end: u64) -> Result<Vec<Turn>, MkaError> {
        let memory = self.handle("turns")?;
        Ok(all(memory.turns(&scope.into(), start..end).await?))
    }

    /// `turns`, blocking the thread.
    pub fn turns_blocking(
        &self,
        scope: Scope,
        start: u64,
        end: u64,
    ) -> Result<Vec<Turn>, MkaError> {
        wait(self.turns(scope, start, end))
    }

    /// The sessions of `scope`, by name.
    pub async fn sessions(&self, scope: Scope) -> Result<Vec<SessionInfo>, MkaError> {
        let memory = self.handle("sessions")?;
        Ok(all(memory.sessions(&scope.into()).await?))
    }

    /// `sessions`, blocking the thread.
    pub fn sessions_blocking(&self, scope: Scope) -> Result<Vec<SessionInfo>, MkaError> {
        wait(self.sessions(scope))
    }

    /// One unit vector a text, by the store's embedder.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Vectors, MkaError> {
        let (rows, dim) = self.handle("embed")?.embed(texts).await?;
        Ok(Vectors::new(&rows, dim))
    }

    /// `embed`, blocking the thread.
    pub fn embed_blocking(&self, texts: Vec<String>) -> Result<Vectors, MkaError> {
        wait(self.embed(texts))
    }

    /// Counts and bytes of the store.
    pub fn stats(&self) -> Result<Stats, MkaError> {
        Ok(self.handle("stats")?.stats().into())
    }
}

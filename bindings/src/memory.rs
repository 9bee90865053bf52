//! Memory over every session: remember, recall, forget, lists, and looking after the store.
//! Knows no model.

use crate::engine::NativeEngine;
use crate::error::MkaError;
use crate::filter::Filter;
use crate::foreign::counted;
use crate::mirrored::count;
use crate::numbered::Entry;
use crate::open::MEMORIES;
use crate::options::{Forget, NewTurn, RecallOptions};
use crate::records::{
    ChunkInfo, Committed, Context, Hit, Receipt, SessionInfo, Turn, Vectors, all, receipt,
};
use crate::scope::Scope;
use crate::upkeep::{Backup, Checkup, DiskUsage, Exported, Imported, Stats};
use crate::wait::wait;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::task::Poll;
use tokio::sync::Notify;

/// The memory of every scope of an engine.
#[derive(uniffi::Object)]
pub struct NativeMemory {
    engine: Arc<NativeEngine>,
    entry: OnceLock<Entry<Weak<NativeMemory>>>,
    long: LongWork,
}

impl NativeMemory {
    pub(crate) fn new(engine: Arc<NativeEngine>) -> Self {
        Self { engine, entry: OnceLock::new(), long: LongWork::default() }
    }

    /// The engine's own memory; `operation` is what an error names.
    pub fn handle(&self, operation: &str) -> Result<mka::MemoryHandle, MkaError> {
        Ok(self.engine.open_engine(operation)?.memory())
    }
}

#[uniffi::export]
impl NativeMemory {
    /// Its number for plain calls.
    pub fn number(self: Arc<Self>) -> u64 {
        self.entry.get_or_init(|| Entry::new(&MEMORIES, Arc::downgrade(&self))).number
    }

    /// The same memory as an object of its own, for work that its `cancel` ends.
    pub fn twin(&self) -> Arc<NativeMemory> {
        Arc::new(Self::new(self.engine.clone()))
    }

    /// Ends export, import, backup and doctor of this object with `Cancelled`, those that come later too; for a language
    /// whose cancelled tasks do not drop what they wait for.
    pub fn cancel(&self) {
        self.long.cancel();
    }

    /// Appends `turns` to the session of `scope` as text memory, durable when it returns.
    pub async fn remember(&self, scope: Scope, turns: Vec<NewTurn>) -> Result<Committed, MkaError> {
        let memory = self.handle("remember")?;
        Ok(counted(memory.remember(&scope.into(), all(turns))).await?.into())
    }

    /// `remember`, blocking the thread.
    pub fn remember_blocking(
        &self,
        scope: Scope,
        turns: Vec<NewTurn>,
    ) -> Result<Committed, MkaError> {
        wait(self.remember(scope, turns))
    }

    /// Remembers `new_turn` in the session of `scope`, then erases `turn` of it.
    pub async fn replace(
        &self,
        scope: Scope,
        turn: u64,
        new_turn: NewTurn,
    ) -> Result<Committed, MkaError> {
        let memory = self.handle("replace")?;
        Ok(counted(memory.replace(&scope.into(), turn, new_turn.into())).await?.into())
    }

    /// `replace`, blocking the thread.
    pub fn replace_blocking(
        &self,
        scope: Scope,
        turn: u64,
        new_turn: NewTurn,
    ) -> Result<Committed, MkaError> {
        wait(self.replace(scope, turn, new_turn))
    }

    /// The memories of `scope` that answer `query` best, best first.
    pub async fn recall(
        &self,
        scope: Scope,
        query: String,
        options: RecallOptions,
    ) -> Result<Vec<Hit>, MkaError> {
        let memory = self.handle("recall")?;
        Ok(all(counted(memory.recall(&scope.into(), &query, options.into())).await?))
    }

    /// `recall`, blocking the thread.
    pub fn recall_blocking(
        &self,
        scope: Scope,
        query: String,
        options: RecallOptions,
    ) -> Result<Vec<Hit>, MkaError> {
        let memory = self.handle("recall")?;
        Ok(all(memory.recall_blocking(&scope.into(), &query, options.into())?))
    }

    /// What a recall with `options` finds on `query` in `scope`, laid out for another model within `budget_tokens`.
    pub async fn context(
        &self,
        scope: Scope,
        query: String,
        budget_tokens: u64,
        options: RecallOptions,
    ) -> Result<Context, MkaError> {
        let memory = self.handle("context")?;
        let (scope, budget) = (mka::Scope::from(scope), count(budget_tokens));
        let options = options.over(mka::Context::recall());
        Ok(counted(memory.context_with(&scope, &query, budget, options)).await?.into())
    }

    /// `context`, blocking the thread.
    pub fn context_blocking(
        &self,
        scope: Scope,
        query: String,
        budget_tokens: u64,
        options: RecallOptions,
    ) -> Result<Context, MkaError> {
        wait(self.context(scope, query, budget_tokens, options))
    }

    /// Erases what `selector` names, and says what went.
    pub async fn forget(&self, scope: Scope, selector: Forget) -> Result<Receipt, MkaError> {
        let memory = self.handle("forget")?;
        counted(memory.forget(&scope.into(), selector.into())).await?.try_into()
    }

    /// `forget`, blocking the thread.
    pub fn forget_blocking(&self, scope: Scope, selector: Forget) -> Result<Receipt, MkaError> {
        wait(self.forget(scope, selector))
    }

    /// Checks that what the receipt names is in no file of the store; `record` is the receipt's own.
    pub async fn verify(&self, record: String) -> Result<(), MkaError> {
        let memory = self.handle("verify")?;
        Ok(counted(memory.verify(receipt(&record)?)).await?)
    }

    /// `verify`, blocking the thread.
    pub fn verify_blocking(&self, record: String) -> Result<(), MkaError> {
        wait(self.verify(record))
    }

    /// Chunks of `scope` from number `start` to before `end`, in the order in which they were first said; with a `filter`
    /// those of turns whose metadata it accepts.
    pub async fn chunks(
        &self,
        scope: Scope,
        start: u64,
        end: u64,
        filter: Option<Filter>,
    ) -> Result<Vec<ChunkInfo>, MkaError> {
        let memory = self.handle("chunks")?;
        let (scope, filter) = (mka::Scope::from(scope), filter.map(mka::Filter::from));
        let chunks = memory.chunks(&scope, count(start)..count(end), filter.as_ref());
        Ok(all(counted(chunks).await?))
    }

    /// `chunks`, blocking the thread.
    pub fn chunks_blocking(
        &self,
        scope: Scope,
        start: u64,
        end: u64,
        filter: Option<Filter>,
    ) -> Result<Vec<ChunkInfo>, MkaError> {
        wait(self.chunks(scope, start, end, filter))
    }

    /// Turns of the session of `scope` from number `start` to before `end`.
    pub async fn turns(&self, scope: Scope, start: u64, end: u64) -> Result<Vec<Turn>, MkaError> {
        let memory = self.handle("turns")?;
        Ok(all(counted(memory.turns(&scope.into(), start..end)).await?))
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

    /// The users of whom there is a session, in the order of their names.
    pub fn users(&self) -> Result<Vec<String>, MkaError> {
        Ok(self.handle("users")?.users())
    }

    /// The sessions of `scope`, by name.
    pub async fn sessions(&self, scope: Scope) -> Result<Vec<SessionInfo>, MkaError> {
        let memory = self.handle("sessions")?;
        Ok(all(counted(memory.sessions(&scope.into())).await?))
    }

    /// `sessions`, blocking the thread.
    pub fn sessions_blocking(&self, scope: Scope) -> Result<Vec<SessionInfo>, MkaError> {
        wait(self.sessions(scope))
    }

    /// One unit vector a text, by the store's embedder.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Vectors, MkaError> {
        let memory = self.handle("embed")?;
        let (rows, dim) = counted(memory.embed(texts)).await?;
        Ok(Vectors::new(&rows, dim))
    }

    /// `embed`, blocking the thread.
    pub fn embed_blocking(&self, texts: Vec<String>) -> Result<Vectors, MkaError> {
        wait(self.embed(texts))
    }

    /// Writes the log of `scope`, or of every user without one, into the file `path` as lines of JSON.
    pub async fn export(&self, scope: Option<Scope>, path: String) -> Result<Exported, MkaError> {
        let memory = self.handle("export")?;
        let scope = scope.map(mka::Scope::from);
        let work = memory.export(scope.as_ref(), path);
        Ok(counted(self.long.wait_for("export", work)).await?.into())
    }

    /// `export`, blocking the thread.
    pub fn export_blocking(
        &self,
        scope: Option<Scope>,
        path: String,
    ) -> Result<Exported, MkaError> {
        wait(self.export(scope, path))
    }

    /// Appends the turns of an exported file to the sessions that they come from; those that are held are skipped.
    pub async fn import_log(&self, path: String) -> Result<Imported, MkaError> {
        let memory = self.handle("import")?;
        Ok(counted(self.long.wait_for("import", memory.import(path))).await?.into())
    }

    /// `import_log`, blocking the thread.
    pub fn import_log_blocking(&self, path: String) -> Result<Imported, MkaError> {
        wait(self.import_log(path))
    }

    /// Copies the store as it is at one moment to the folder `path`, which does not exist yet.
    pub async fn backup(&self, path: String) -> Result<Backup, MkaError> {
        let memory = self.handle("backup")?;
        Ok(counted(self.long.wait_for("backup", memory.backup(path))).await?.into())
    }

    /// `backup`, blocking the thread.
    pub fn backup_blocking(&self, path: String) -> Result<Backup, MkaError> {
        wait(self.backup(path))
    }

    /// Compares every checksum, and the indexes with the log; with `repair`, makes anew what can be derived.
    pub async fn doctor(&self, repair: bool) -> Result<Checkup, MkaError> {
        let memory = self.handle("doctor")?;
        Ok(counted(self.long.wait_for("doctor", memory.doctor(repair))).await?.into())
    }

    /// `doctor`, blocking the thread.
    pub fn doctor_blocking(&self, repair: bool) -> Result<Checkup, MkaError> {
        wait(self.doctor(repair))
    }

    /// Gives all space on the disk back that nothing uses.
    pub async fn compact(&self) -> Result<(), MkaError> {
        let memory = self.handle("compact")?;
        Ok(counted(memory.compact()).await?)
    }

    /// `compact`, blocking the thread.
    pub fn compact_blocking(&self) -> Result<(), MkaError> {
        wait(self.compact())
    }

    /// What the store takes on the disk, and how much of it is in use.
    pub async fn disk_usage(&self) -> Result<DiskUsage, MkaError> {
        let memory = self.handle("disk_usage")?;
        Ok(counted(memory.disk_usage()).await?.into())
    }

    /// `disk_usage`, blocking the thread.
    pub fn disk_usage_blocking(&self) -> Result<DiskUsage, MkaError> {
        wait(self.disk_usage())
    }

    /// Counts and bytes of the store.
    pub fn stats(&self) -> Result<Stats, MkaError> {
        Ok(self.handle("stats")?.stats().into())
    }
}

/// What ends the long work of one object.
#[derive(Default)]
struct LongWork {
    cancelled: AtomicBool,
    told: Notify,
}

impl LongWork {
    fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.told.notify_waiters();
    }

    /// What `work` gives, unless it is cancelled first: it is dropped then, which ends it.
    async fn wait_for<T>(
        &self,
        operation: &str,
        work: impl Future<Output = mka::Result<T>>,
    ) -> Result<T, MkaError> {
        let mut told = pin!(self.told.notified());
        let mut work = pin!(work);
        poll_fn(|cx| {
            let is_told = told.as_mut().poll(cx).is_ready();
            if is_told || self.cancelled.load(Ordering::Acquire) {
                return Poll::Ready(Err(MkaError::Cancelled(format!("{operation}: cancelled"))));
            }
            work.as_mut().poll(cx).map_err(MkaError::from)
        })
        .await
    }
}

//! The calls that wait, blocking the thread that makes them: for a program without an async runtime.
//! Knows no work of a call: each waits for the async one of its name.

use crate::error::Result;
use crate::memory::{Context, MemoryHandle};
use crate::session::Session;
use crate::stream::{Events, Feed, FeedSummary, Usage, block_on};
use mka_memory::{
    Backup, Checkup, ChunkInfo, Committed, DiskUsage, Exported, Filter, Forget, Imported, NewTurn,
    Recall, Receipt, Scope, SessionInfo, Turn, TurnId,
};
use std::ops::Range;
use std::path::PathBuf;

impl MemoryHandle {
    /// [`MemoryHandle::remember`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::remember`].
    pub fn remember_blocking(&self, scope: &Scope, turns: Vec<NewTurn>) -> Result<Committed> {
        block_on(self.remember(scope, turns))
    }

    /// [`MemoryHandle::replace`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::replace`].
    pub fn replace_blocking(&self, scope: &Scope, turn: TurnId, new: NewTurn) -> Result<Committed> {
        block_on(self.replace(scope, turn, new))
    }

    /// [`MemoryHandle::context`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::context`].
    pub fn context_blocking(
        &self,
        scope: &Scope,
        query: &str,
        budget_tokens: usize,
    ) -> Result<Context> {
        block_on(self.context(scope, query, budget_tokens))
    }

    /// [`MemoryHandle::context_with`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::context_with`].
    pub fn context_with_blocking(
        &self,
        scope: &Scope,
        query: &str,
        budget_tokens: usize,
        options: Recall,
    ) -> Result<Context> {
        block_on(self.context_with(scope, query, budget_tokens, options))
    }

    /// [`MemoryHandle::forget`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::forget`].
    pub fn forget_blocking(&self, scope: &Scope, selector: Forget) -> Result<Receipt> {
        block_on(self.forget(scope, selector))
    }

    /// [`MemoryHandle::verify`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::verify`].
    pub fn verify_blocking(&self, receipt: Receipt) -> Result<()> {
        block_on(self.verify(receipt))
    }

    /// [`MemoryHandle::chunks`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::chunks`].
    pub fn chunks_blocking(
        &self,
        scope: &Scope,
        range: Range<usize>,
        filter: Option<&Filter>,
    ) -> Result<Vec<ChunkInfo>> {
        block_on(self.chunks(scope, range, filter))
    }

    /// [`MemoryHandle::turns`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::turns`].
    pub fn turns_blocking(&self, scope: &Scope, range: Range<TurnId>) -> Result<Vec<Turn>> {
        block_on(self.turns(scope, range))
    }

    /// [`MemoryHandle::sessions`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::sessions`].
    pub fn sessions_blocking(&self, scope: &Scope) -> Result<Vec<SessionInfo>> {
        block_on(self.sessions(scope))
    }

    /// [`MemoryHandle::embed`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::embed`].
    pub fn embed_blocking(&self, texts: Vec<String>) -> Result<(Vec<f32>, usize)> {
        block_on(self.embed(texts))
    }

    /// [`MemoryHandle::export`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::export`].
    pub fn export_blocking(
        &self,
        scope: Option<&Scope>,
        path: impl Into<PathBuf>,
    ) -> Result<Exported> {
        block_on(self.export(scope, path))
    }

    /// [`MemoryHandle::import`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::import`].
    pub fn import_blocking(&self, path: impl Into<PathBuf>) -> Result<Imported> {
        block_on(self.import(path))
    }

    /// [`MemoryHandle::backup`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::backup`].
    pub fn backup_blocking(&self, path: impl Into<PathBuf>) -> Result<Backup> {
        block_on(self.backup(path))
    }

    /// [`MemoryHandle::doctor`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::doctor`].
    pub fn doctor_blocking(&self, repair: bool) -> Result<Checkup> {
        block_on(self.doctor(repair))
    }

    /// [`MemoryHandle::compact`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::compact`].
    pub fn compact_blocking(&self) -> Result<()> {
        block_on(self.compact())
    }

    /// [`MemoryHandle::disk_usage`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`MemoryHandle::disk_usage`].
    pub fn disk_usage_blocking(&self) -> Result<DiskUsage> {
        block_on(self.disk_usage())
    }
}

impl Session {
    /// [`Session::rewind`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Session::rewind`].
    pub fn rewind_blocking(&mut self, turn: TurnId) -> Result<()> {
        block_on(self.rewind(turn))
    }

    /// [`Session::fork`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Session::fork`].
    pub fn fork_blocking(&self, name: &str) -> Result<Self> {
        block_on(self.fork(name))
    }

    /// [`Session::context`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Session::context`].
    pub fn context_blocking(&self, query: &str, budget_tokens: usize) -> Result<Context> {
        block_on(self.context(query, budget_tokens))
    }

    /// [`Session::peek_logits`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Session::peek_logits`].
    pub fn peek_logits_blocking(&mut self, text: &str) -> Result<Vec<f32>> {
        block_on(self.peek_logits(text))
    }
}

impl Events {
    /// [`Events::text`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Events::text`].
    pub fn text_blocking(self) -> Result<(String, Usage)> {
        block_on(self.text())
    }
}

impl Feed {
    /// [`Feed::finish`], blocking the thread; not to be called from async code.
    ///
    /// # Errors
    /// As [`Feed::finish`].
    pub fn finish_blocking(self) -> Result<FeedSummary> {
        block_on(self.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Engine, ErrorKind, Recall, Role};

    const FACT: &str = "The key lies under the mat.";

    #[test]
    fn a_program_without_a_runtime_remembers_recalls_and_forgets() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::builder(folder.path().join("store")).open_blocking().unwrap();
        let memory = engine.memory();
        let (ada, trip) = (Scope::user("ada"), Scope::user("ada").session("trip"));
        let turns = vec![NewTurn::new(Role::User, FACT), NewTurn::new(Role::User, "It rains.")];
        assert_eq!(memory.remember_blocking(&trip, turns).unwrap().turns, [0, 1]);
        let hits = memory.recall_blocking(&ada, "under the mat", Recall::default()).unwrap();
        assert_eq!(hits[0].text, FACT);
        let context = memory.context_blocking(&ada, "under the mat", 200).unwrap();
        assert!(context.text.contains(FACT) && context.tokens <= 200, "{context:?}");
        let turns = memory.turns_blocking(&trip, 0..9).unwrap();
        assert_eq!(
            turns.iter().map(|turn| turn.text.as_str()).collect::<Vec<_>>(),
            [FACT, "It rains."]
        );
        assert_eq!(memory.chunks_blocking(&ada, 0..9, None).unwrap().len(), 2);
        assert_eq!(memory.sessions_blocking(&ada).unwrap().len(), 1);
        let exported = memory.export_blocking(Some(&ada), folder.path().join("log.jsonl")).unwrap();
        assert_eq!(exported.turns, 2);
        assert_eq!(memory.import_blocking(folder.path().join("log.jsonl")).unwrap().skipped, 2);

        let receipt = memory.forget_blocking(&ada, Forget::matching("mat")).unwrap();
        assert_eq!(receipt.turns, 1);
        memory.verify_blocking(receipt).unwrap();
        assert!(memory.turns_blocking(&trip, 0..1).unwrap()[0].forgotten);
        memory.compact_blocking().unwrap();
        assert_eq!(memory.doctor_blocking(false).unwrap().problems, []);
        assert!(memory.disk_usage_blocking().unwrap().live_bytes > 0);
    }

    #[test]
    fn a_session_is_used_without_a_runtime() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::builder(folder.path().join("store")).open_blocking().unwrap();
        let mut chat = engine.session_blocking(Scope::user("ada").session("trip")).unwrap();
        let fed = chat.feed(FACT).finish_blocking().unwrap();
        assert_eq!((fed.bytes, fed.model_tokens), (FACT.len() as u64, 0));
        assert!(chat.context_blocking("under the mat", 200).unwrap().text.contains(FACT));
        let mut fork = chat.fork_blocking("other").unwrap();
        fork.rewind_blocking(0).unwrap();
        assert_eq!((chat.num_turns().unwrap(), fork.num_turns().unwrap()), (1, 1));
        assert!(!fork.context_blocking("under the mat", 200).unwrap().text.is_empty());
        let error = chat.send("hello").text_blocking().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

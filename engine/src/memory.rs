//! The engine's handle on memory: the store's calls, off the async threads.
//! Knows no model.

use crate::engine::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::offload::offload;
use crate::quote::{self, Quotation, Quote};
use crate::session::now_ms;
use mka_memory::{
    Backup, Cancel, Checkup, ChunkInfo, Commit, Committed, DiskUsage, ENGINE_KEYS, Exported,
    Filter, Forget, Hit, Imported, Metadata, NewTurn, Recall, Receipt, Scope, SessionInfo, Stats,
    Turn, TurnId,
};
use std::io::BufReader;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Sentences embedded again at once: some tenths of a second with a small model.
const REEMBED_SENTENCES: usize = 32;

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

impl Context {
    /// How [`MemoryHandle::context`] recalls: 32 memories at most, however many fit the budget. What
    /// [`MemoryHandle::context_with`] is to do otherwise is set in it.
    ///
    /// ```
    /// use mka::{Context, Filter, Recall};
    ///
    /// let notes = Recall { filter: Some(Filter::eq("kind", "note")), ..Context::recall() };
    /// ```
    pub fn recall() -> Recall {
        Recall { k: 32, ..Recall::default() }
    }
}

/// [`crate::Session::context`], which looks into every session of its user; the future borrows nothing.
pub(crate) fn context(
    shared: Arc<Shared>,
    scope: Scope,
    query: &str,
    budget_tokens: usize,
) -> impl Future<Output = Result<Context>> + Send + use<> {
    let options = Recall { across_sessions: true, ..Context::recall() };
    assemble(shared, scope, query, budget_tokens, options)
}

/// What is recalled on `query`, as text within the budget; the future borrows nothing.
fn assemble(
    shared: Arc<Shared>,
    scope: Scope,
    query: &str,
    budget_tokens: usize,
    options: Recall,
) -> impl Future<Output = Result<Context>> + Send + use<> {
    let query = query.to_owned();
    offload("context", move || {
        let options = said_by_now(options);
        let hits = shared.store.recall(&scope, &query, &options)?;
        let quotations = Quotation::of(&hits, &query, Quote::Passage);
        let count = |text: &str| shared.count_tokens(text);
        let (text, chosen) = quote::assemble(&quotations, budget_tokens, count)?;
        let hits = chosen.into_iter().map(|i| hits[i].clone()).collect();
        Ok(Context { tokens: shared.count_tokens(&text)?, text, hits })
    })
}

/// Gives a recall without a clock the system's.
fn said_by_now(options: Recall) -> Recall {
    Recall { now_ms: options.now_ms.or_else(|| Some(now_ms())), ..options }
}

/// Gives turns without a time that of now: a half-life, `since_ms` and [`Forget::before`] would take them for the oldest.
pub(crate) fn said_now(turns: &mut [NewTurn], now_ms: i64) {
    turns.iter_mut().filter(|turn| turn.time_ms == 0).for_each(|turn| turn.time_ms = now_ms);
}

/// Refuses metadata that no turn can have, and keys that are the engine's own.
pub(crate) fn check_metadata(operation: &str, metadata: &Metadata) -> Result<()> {
    if let Some(key) = metadata.keys().find(|key| key.starts_with(ENGINE_KEYS)) {
        return Err(Error::invalid(format!(
            "{operation}: metadata {key:?}, expected a key that does not begin with {ENGINE_KEYS:?}, as the engine's own do"
        )));
    }
    Ok(mka_memory::check_metadata(operation, metadata)?)
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
    /// A turn of time 0, as [`NewTurn::new`] makes it, was said now.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope names no session; `Storage`.
    pub async fn remember(&self, scope: &Scope, turns: Vec<NewTurn>) -> Result<Committed> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("remember", move || remember(&shared, &scope, turns)).await
    }

    /// Remembers `new` in the session of `scope`, as [`MemoryHandle::remember`] does, then erases `turn` of that session, as
    /// [`MemoryHandle::forget`] does: a fact that is put right, whose old words are in no file afterwards.
    ///
    /// `new` is on the disk before anything is erased: where that fails both are there, and the turn can be forgotten again.
    /// It stands at the end of the log and has a number of its own; `turn` keeps its number, role and time. Nothing else of
    /// the user is forgotten in between.
    ///
    /// # Errors
    /// `NotFound` if the log does not reach to `turn`, and `Corrupted` as [`MemoryHandle::forget`] has it: then nothing is
    /// remembered; those of `remember` and `forget`.
    pub async fn replace(&self, scope: &Scope, turn: TurnId, new: NewTurn) -> Result<Committed> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        // Both in one piece of work, which goes on if nobody waits any more.
        offload("replace", move || {
            if scope.session_id().is_none() {
                let what = format!("replace: scope {scope}, expected one that names a session");
                return Err(Error::invalid(what));
            }
            replace(&shared, &scope, turn, || remember(&shared, &scope, vec![new]))
        })
        .await
    }

    /// The memories of `scope` that answer `query` best, best first.
    /// What has expired by now is left out; `now_ms` of the options is the system's clock, if it is none.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed.
    pub async fn recall(&self, scope: &Scope, query: &str, options: Recall) -> Result<Vec<Hit>> {
        let (memory, scope, query) = (self.clone(), scope.clone(), query.to_owned());
        offload("recall", move || memory.recall_blocking(&scope, &query, options)).await
    }

    /// [`MemoryHandle::recall`] on the thread that calls, which it blocks; not to be called from async code.
    ///
    /// # Errors
    /// Those of `recall`.
    pub fn recall_blocking(&self, scope: &Scope, query: &str, options: Recall) -> Result<Vec<Hit>> {
        Ok(self.shared.store.recall(scope, query, &said_by_now(options))?)
    }

    /// What `scope` holds on `query`, laid out for another model within `budget_tokens`, headers included: the 32 best memories
    /// at most.
    ///
    /// As in `recall`, a scope with a session is confined to that session; one without sees every session of its user.
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
        self.context_with(scope, query, budget_tokens, Context::recall()).await
    }

    /// [`MemoryHandle::context`] of what a recall with `options` finds: among certain turns, from a time on, with a least
    /// relevance; `k` is how many memories may be in it.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope or the options are malformed.
    pub async fn context_with(
        &self,
        scope: &Scope,
        query: &str,
        budget_tokens: usize,
        options: Recall,
    ) -> Result<Context> {
        assemble(self.shared.clone(), scope.clone(), query, budget_tokens, options).await
    }

    /// Erases what `selector` names from log, chunks, vectors, words, pages and summaries, and says what went.
    ///
    /// Files that [`MemoryHandle::export`] or [`MemoryHandle::backup`] wrote before are not reached.
    ///
    /// Sessions that are open drop what they hold in memory, and what they map of removed files, before their next turn and
    /// go on from what is left. A turn or feed of the same user that is under way ends with `Cancelled` if anything was
    /// erased: it may have read the words.
    ///
    /// # Errors
    /// `InvalidArgument` for a selector that needs a session and a scope without one, for no turns, an empty text, or a filter
    /// that accepts every turn or none; `NotFound` for a turn beyond the log; `Corrupted`, and nothing is erased, where two
    /// sessions of the user have one name, which [`MemoryHandle::doctor`] mends; `Storage`.
    pub async fn forget(&self, scope: &Scope, selector: Forget) -> Result<Receipt> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("forget", move || forget(&shared, &scope, &selector)).await
    }

    /// Checks that what `receipt` names is in no file of the store.
    ///
    /// # Errors
    /// `Corrupted` if it is still there.
    pub async fn verify(&self, receipt: Receipt) -> Result<()> {
        let shared = self.shared.clone();
        offload("verify", move || Ok(shared.store.verify(&receipt)?)).await
    }

    /// Chunks of `scope` in the order in which they were first said; `range` counts from 0. With a `filter` those of turns
    /// whose metadata it accepts, which `first`, `latest` and `count` of a chunk then know alone.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope or the filter is malformed.
    pub async fn chunks(
        &self,
        scope: &Scope,
        range: Range<usize>,
        filter: Option<&Filter>,
    ) -> Result<Vec<ChunkInfo>> {
        let (shared, scope, filter) = (self.shared.clone(), scope.clone(), filter.cloned());
        offload("chunks", move || Ok(shared.store.chunks(&scope, range, filter.as_ref())?)).await
    }

    /// The turns of the scope's session in `range`, as far as there are any; a forgotten turn has no text left.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope names no session; `Corrupted` if a turn is damaged.
    pub async fn turns(&self, scope: &Scope, range: Range<TurnId>) -> Result<Vec<Turn>> {
        let (shared, scope) = (self.shared.clone(), scope.clone());
        offload("turns", move || Ok(shared.store.turns(&scope, range)?)).await
    }

    /// The users of whom there is a session, in the order of their names.
    pub fn users(&self) -> Vec<String> {
        self.shared.store.users()
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

    /// Writes the log of `scope`, or of every user if it is none, into the file `path` as lines of JSON.
    /// The file appears when all of it is on the disk. Dropping the future cancels.
    ///
    /// It is clear text, of an encrypted store too, and no `forget` reaches it.
    ///
    /// # Errors
    /// `InvalidArgument` if the scope is malformed; `Storage`.
    pub async fn export(
        &self,
        scope: Option<&Scope>,
        path: impl Into<PathBuf>,
    ) -> Result<Exported> {
        let (shared, scope, path) = (self.shared.clone(), scope.cloned(), path.into());
        cancellable("export", move |cancel| {
            Ok(shared.store.export_file(scope.as_ref(), &path, cancel)?)
        })
        .await
    }

    /// Appends the turns of an exported file to the sessions that they come from; those that are held are skipped.
    /// Dropping the future cancels: what was imported stays, and another import goes on from there.
    ///
    /// # Errors
    /// `InvalidArgument` for a line that is none of an export, with its number; `NotFound` if there is no such file.
    pub async fn import(&self, path: impl Into<PathBuf>) -> Result<Imported> {
        let (shared, path) = (self.shared.clone(), path.into());
        cancellable("import", move |cancel| {
            let file =
                std::fs::File::open(&path).map_err(|source| Error::io("import", &path, source))?;
            Ok(shared.store.import(&mut BufReader::new(file), cancel)?)
        })
        .await
    }

    /// Copies the store as it is at one moment to the folder `path`, which does not exist yet; sessions go on meanwhile.
    /// The copy is a store to be opened. Dropping the future cancels.
    ///
    /// The copy of an encrypted store is encrypted, under the same key; of a plain one it is plain. No `forget` reaches it.
    ///
    /// # Errors
    /// `InvalidArgument` if there is something at `path`; `Storage`.
    pub async fn backup(&self, path: impl Into<PathBuf>) -> Result<Backup> {
        let (shared, path) = (self.shared.clone(), path.into());
        cancellable("backup", move |cancel| Ok(shared.store.backup(&path, cancel)?)).await
    }

    /// Reads every record, compares every checksum, and compares the indexes with the log; with `repair`, makes anew
    /// what can be derived and leaves empty what is lost. Dropping the future cancels a check.
    ///
    /// # Errors
    /// `Storage`.
    pub async fn doctor(&self, repair: bool) -> Result<Checkup> {
        let shared = self.shared.clone();
        cancellable("doctor", move |cancel| Ok(shared.store.doctor(repair, cancel)?)).await
    }

    /// Gives all space on the disk back that nothing uses.
    ///
    /// # Errors
    /// `Corrupted` if the database lost records; `Storage`.
    pub async fn compact(&self) -> Result<()> {
        let shared = self.shared.clone();
        offload("compact", move || Ok(shared.store.compact_all()?)).await
    }

    /// What the store takes on the disk, and how much of it is in use.
    ///
    /// # Errors
    /// `Storage`.
    pub async fn disk_usage(&self) -> Result<DiskUsage> {
        let shared = self.shared.clone();
        offload("disk_usage", move || Ok(shared.store.disk_usage()?)).await
    }

    /// Counts and bytes of the store.
    pub fn stats(&self) -> Stats {
        self.shared.store.stats()
    }
}

/// [`MemoryHandle::remember`] on the thread that calls.
fn remember(shared: &Shared, scope: &Scope, mut turns: Vec<NewTurn>) -> Result<Committed> {
    said_now(&mut turns, now_ms());
    Ok(shared.store.commit(scope, Commit { turns, ..Commit::default() })?)
}

/// [`MemoryHandle::forget`] on the thread that calls.
fn forget(shared: &Shared, scope: &Scope, selector: &Forget) -> Result<Receipt> {
    // What is refused here erased nothing: answers under way go on.
    shared.store.check_forget(scope)?;
    let forget = || shared.store.forget(scope, selector);
    let receipt = shared.forgets.during(scope, forget, has_erased);
    receipt.map_err(|error| shared.failed(error.into()))
}

/// [`MemoryHandle::replace`] on the thread that calls, with what `remember` does for the new turn.
///
/// Both are one forgetting, which no other of the user comes between: behind one of the whole session, `turn` would be the
/// number of the new turn itself.
fn replace<T>(
    shared: &Shared,
    scope: &Scope,
    turn: TurnId,
    remember: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let work = || -> Result<(T, mka_memory::Result<Receipt>)> {
        let num_turns = shared.store.num_turns(scope)?;
        if turn >= num_turns {
            let what = format!("replace: turn {turn} of {scope}, expected one below {num_turns}");
            return Err(Error::new(ErrorKind::NotFound, what));
        }
        // Before the new turn is stored: a refusal stays one until the store is repaired, however often it is tried.
        shared.store.check_forget(scope)?;
        let remembered = remember()?;
        Ok((remembered, shared.store.forget(scope, &Forget::Turn(turn))))
    };
    let replaced = shared.forgets.during(scope, work, |replaced| match replaced {
        Ok((_, receipt)) => has_erased(receipt),
        Err(_) => false,
    });
    let (remembered, receipt) = replaced?;
    receipt.map_err(|error| shared.failed(error.into()))?;
    Ok(remembered)
}

/// Whether what sessions hold of a user is out of date.
fn has_erased(receipt: &mka_memory::Result<Receipt>) -> bool {
    use mka_memory::ErrorKind::{InvalidArgument, NotFound};
    match receipt {
        Ok(receipt) => receipt.turns + receipt.chunks + receipt.pages > 0,
        // It may have failed behind what it erased.
        Err(error) => !matches!(error.kind(), InvalidArgument | NotFound),
    }
}

/// Cancels the work once the caller's future is dropped.
struct CancelOnDrop(Cancel);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// [`offload`] for work that can be cancelled.
async fn cancellable<T: Send + 'static>(
    operation: &'static str,
    work: impl FnOnce(&Cancel) -> Result<T> + Send + 'static,
) -> Result<T> {
    let cancel = Cancel::new();
    let _guard = CancelOnDrop(cancel.clone());
    offload(operation, move || work(&cancel)).await
}

/// Embeds again what another embedder had embedded, on a thread of its own that works `share` of the time.
/// An engine that is dropped closes at the end of its present step, within a second or so with a small model.
/// It ends with its work, with the engine, or with an error, which the next opening would meet again.
pub(crate) fn reembed_in_background(shared: Weak<Shared>, share: f32) -> Result<()> {
    let work = move || {
        while let Some(shared) = shared.upgrade() {
            let started = Instant::now();
            match shared.store.reembed(REEMBED_SENTENCES) {
                Ok(step) if step.turns_left == 0 => break,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "embedding again stopped");
                    break;
                }
            }
            drop(shared);
            let rest = started.elapsed().as_secs_f32() * (1.0 / share - 1.0);
            // Nothing of the engine is held meanwhile.
            std::thread::sleep(Duration::from_secs_f32(rest));
        }
    };
    let spawned = std::thread::Builder::new().name("mka-reembed".into()).spawn(work);
    spawned.map(|_| ()).map_err(|source| {
        Error::new(ErrorKind::OutOfMemory, format!("open: {source}")).with_source(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Engine;
    use mka_memory::Role;

    #[test]
    fn a_session_is_not_forgotten_while_one_of_its_turns_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let engine = Engine::builder(folder.path()).open_blocking().unwrap();
        let (shared, trip) = (&engine.shared, &Scope::user("ada").session("trip"));
        let told = |text: &str| remember(shared, trip, vec![NewTurn::new(Role::User, text)]);
        told("The badger hides at Elm Street.").unwrap();
        let replaced = std::thread::scope(|threads| {
            let replaced = replace(shared, trip, 0, || {
                let forgetting = threads.spawn(move || forget(shared, trip, &Forget::Session));
                std::thread::sleep(Duration::from_millis(100));
                assert!(!forgetting.is_finished());
                told("The badger hides at Oak Street.")
            });
            replaced.unwrap()
        });
        assert_eq!(replaced.turns, [1]);
        // The session went with both of its turns; in between, turn 0 would have been the new one.
        assert_eq!(shared.store.num_turns(trip).unwrap(), 0);
    }
}

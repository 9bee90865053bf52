//! The store: one folder, one writer, many readers. Only this file and its parts do I/O.
//! Knows no bytes (see `format`) and no search (see `words`, `vectors`).

mod commit;
mod compact;
mod erase;
mod indexing;
mod load;
mod lock;
mod queries;
mod read;
mod records;
mod search;
mod segment;
mod state;
mod vectors;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub use read::{ChunkInfo, SessionInfo, Stats};

use self::indexing::Indexer;
use self::lock::Lock;
use self::queries::Queries;
use self::records::{Change, Records};
use self::segment::Appender;
use self::state::State;
use crate::words::Terms;
use crate::{Embedder, Error, ErrorKind, Result};

/// How many texts go to the embedder at once: bounds its memory, and is enough to fill its batches.
const EMBED_BATCH: usize = 256;

/// How a store works. All but `seed` may differ from one opening to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Bytes of evicted pages that each session keeps, oldest dropped first; 0 drops a page once it leaves the window.
    pub evicted_page_bytes: u64,
    /// Words of a chunk, about three quarters of its tokens; at least 1.
    pub chunk_words: usize,
    /// Seed of the chunks' identities. Used when the store is created, and kept in it.
    /// A secret seed keeps others from crafting texts whose identities collide.
    pub seed: u64,
    /// From so many sentence vectors of one user and agent on, a graph (HNSW) is built over them in the background, and
    /// searches without a filter walk it instead of scanning codes; never, with `usize::MAX`.
    pub graph_vectors: usize,
    /// Threads that one scan of more than 131,072 vectors may use; at least 1.
    pub scan_threads: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            evicted_page_bytes: 0,
            chunk_words: 96,
            seed: 0x6d6b_615f_7365_6564,
            graph_vectors: 250_000,
            scan_threads: std::thread::available_parallelism().map_or(1, |n| n.get().min(4)),
        }
    }
}

/// A memory on disk: the turn logs, chunks, pages and summaries of any number of scopes.
///
/// All methods block; all may be called from many threads at once.
/// Readers do not wait for the writer's I/O, nor anyone for the embedder of another.
pub struct Store {
    embedder: Arc<dyn Embedder>,
    options: StoreOptions,
    state: Arc<RwLock<State>>,
    indexer: Indexer,
    queries: Queries,
    writer: Mutex<Writer>,
    _lock: Lock,
}

/// What only one thread at a time may use.
struct Writer {
    appender: Appender,
    records: Records,
    /// A write failed in a way that leaves the disk's state unknown.
    broken: bool,
}

impl Store {
    /// Opens the store in the folder `path`, which is created if missing.
    ///
    /// # Errors
    /// `Locked` if it is open already, with the pid in the text; `Incompatible` if it was made with another embedder or
    /// format version; `Corrupted` if its database cannot be read; `InvalidArgument` for options out of range.
    /// Damage to single records does not keep a store from opening: see [`Stats::damaged`].
    ///
    /// # Cost
    /// Reads every turn and vector once, and indexes the words.
    pub fn open(
        path: impl AsRef<Path>,
        embedder: Arc<dyn Embedder>,
        options: StoreOptions,
    ) -> Result<Self> {
        load::open(path.as_ref(), embedder, options)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        // State changes only by `apply`, which leaves it whole if a thread dies elsewhere.
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer, unless an earlier write left the disk in an unknown state.
    fn writer(&self) -> Result<MutexGuard<'_, Writer>> {
        let writer = self.writer.lock().map_err(|_| {
            Error::new(
                ErrorKind::Storage,
                "write: an earlier write was interrupted, open the store again",
            )
        })?;
        if writer.broken {
            return Err(Error::new(
                ErrorKind::Storage,
                "write: an earlier write failed half-way, open the store again",
            ));
        }
        Ok(writer)
    }

    /// Makes everything appended durable, then the changes, then shows both to readers.
    fn publish(
        &self,
        writer: &mut Writer,
        changes: &[Change],
    ) -> Result<RwLockWriteGuard<'_, State>> {
        let created = writer.appender.finish()?;
        if let Err(error) = writer.records.write(changes) {
            writer.broken = true;
            return Err(error);
        }
        let mut state = self.write();
        for segment in created {
            state.segments.insert(segment.number(), segment);
        }
        changes.iter().for_each(|change| state.apply(change));
        Ok(state)
    }

    /// One vector per text, checked: `(texts, dim)` row-major.
    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        let dim = self.embedder.dim();
        let mut rows = Vec::with_capacity(texts.len() * dim);
        for batch in texts.chunks(EMBED_BATCH) {
            let embedded = self.embedder.embed(batch)?;
            if embedded.len() != batch.len() * dim {
                return Err(Error::new(
                    ErrorKind::Incompatible,
                    format!(
                        "embed: expected {} vectors of {dim} numbers from `{}`, got {} numbers",
                        batch.len(),
                        self.embedder.identity(),
                        embedded.len()
                    ),
                ));
            }
            if embedded.iter().any(|value| !value.is_finite()) {
                return Err(Error::new(
                    ErrorKind::Incompatible,
                    format!("embed: expected finite numbers from `{}`", self.embedder.identity()),
                ));
            }
            rows.extend_from_slice(&embedded);
        }
        Ok(rows)
    }

    fn terms(&self) -> Terms {
        Terms::new()
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("options", &self.options).finish_non_exhaustive()
    }
}

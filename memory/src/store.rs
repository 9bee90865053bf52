//! The store: one folder, one writer, many readers. Only this file and its parts do I/O.
//! Knows no bytes (see `format`) and no search (see `words`, `vectors`).

mod backup;
mod commit;
mod compact;
mod doctor;
mod erase;
mod folder;
mod fork;
mod held;
mod images;
mod indexing;
mod load;
mod lock;
mod near;
mod open;
mod page_bytes;
mod partial;
mod queries;
mod quotes;
mod read;
mod records;
mod reembed;
mod runs;
mod search;
mod segment;
mod state;
mod state_lock;
mod storage;
mod transfer;
mod vectors;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, RwLockReadGuard, RwLockWriteGuard};

pub use backup::Backup;
pub use doctor::{Checkup, Problem, Repair};
pub use page_bytes::{NewPage, PageBytes};
pub use read::{ChunkInfo, DiskUsage, OpenSnapshot, SessionInfo, Stats};
pub use reembed::Reembedded;
pub use transfer::{Exported, Imported};

use self::indexing::Indexer;
use self::lock::Lock;
use self::queries::Queries;
use self::records::{Change, Records};
use self::segment::Appender;
use self::state::State;
use self::state_lock::{LongRead, StateLock};
use crate::words::Terms;
use crate::{Backend, Embedder, EncryptionKey, Error, ErrorKind, Hygiene, Result, Storage};

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
    /// Which database keeps the small records. Used when the store is created; one that exists keeps what it has.
    pub backend: Backend,
    /// Encrypts everything that is written: texts, names, vectors, pages and the database's values.
    /// Given when the store is created, and at every opening from then on.
    pub key: Option<EncryptionKey>,
    /// Takes another embedder over instead of refusing it: the store opens at once, and finds by words alone what
    /// [`Store::reembed`] has not embedded again yet. Vectors of two embedders are never mixed.
    pub reembed: bool,
    /// What is not stored twice, and what is not stored at all.
    pub hygiene: Hygiene,
    /// From so many sentence vectors of one user and agent on, a graph (HNSW) is built over them in the background, and
    /// searches without a filter walk it instead of scanning codes; never, with `usize::MAX`.
    pub graph_vectors: usize,
    /// From so many sentence vectors of one user and agent on, what recall searches is kept in a file of its own, so that
    /// an opening need not make it from the log; never, with `usize::MAX`, and never in an encrypted store.
    pub image_vectors: usize,
    /// Threads that one scan of more than 131,072 vectors may use; at least 1.
    pub scan_threads: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            evicted_page_bytes: 0,
            chunk_words: 96,
            seed: 0x6d6b_615f_7365_6564,
            backend: Backend::default(),
            key: None,
            reembed: false,
            hygiene: Hygiene::default(),
            graph_vectors: 250_000,
            image_vectors: 4_096,
            scan_threads: std::thread::available_parallelism().map_or(1, |n| n.get().min(4)),
        }
    }
}

/// A memory on disk: the turn logs, chunks, pages and summaries of any number of scopes.
///
/// All methods block; all may be called from many threads at once.
/// Readers do not wait for the writer's I/O, nor anyone for the embedder of another.
pub struct Store {
    path: PathBuf,
    embedder: Arc<dyn Embedder>,
    options: StoreOptions,
    state: Arc<StateLock<State>>,
    indexer: Indexer,
    queries: Queries,
    writer: Mutex<Writer>,
    /// Held by what is mapped, too.
    lock: Arc<Lock>,
}

/// What only one thread at a time may use.
struct Writer {
    appender: Appender,
    records: Records,
    /// Keeps the stems of words that were said lately.
    terms: Terms,
    /// A write failed in a way that leaves the disk's state unknown.
    broken: bool,
}

impl Store {
    /// Opens the store in the folder `path`, which is created if missing.
    ///
    /// # Errors
    /// `Locked` if it is open already, with the pid in the text; `Incompatible` if it was made with another embedder or
    /// a later format version; `Corrupted` if its database cannot be read; `InvalidArgument` for options out of range
    /// and for a key that is missing, wrong or not expected.
    /// Damage to single records does not keep a store from opening: see [`Stats::damaged`].
    ///
    /// # Cost
    /// Reads the text of every turn. Words and vectors are indexed as far as no image of the index knows them, see
    /// [`StoreOptions::image_vectors`]: those of a large store that was closed hardly at all. Vectors that an image knows
    /// stay on the disk, turn by turn, until a recall looks at one of the turn's.
    pub fn open(
        path: impl AsRef<Path>,
        embedder: Arc<dyn Embedder>,
        options: StoreOptions,
    ) -> Result<Self> {
        open::open(path.as_ref(), embedder, options, None)
    }

    /// [`Store::open`], with a database of the caller's for the small records; the folder keeps the segments.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(
        path: impl AsRef<Path>,
        embedder: Arc<dyn Embedder>,
        options: StoreOptions,
        storage: Box<dyn Storage>,
    ) -> Result<Self> {
        open::open(path.as_ref(), embedder, options, Some(storage))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    /// [`read`](Self::read) for a look of more than some milliseconds; see [`StateLock`].
    fn read_long(&self) -> LongRead<'_, State> {
        self.state.read_long()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write()
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
        if !changes.is_empty()
            && let Err(error) = writer.records.write(changes)
        {
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

    /// Numbers of one vector of the store's embedder.
    pub fn dim(&self) -> usize {
        self.embedder.dim()
    }

    /// One vector per text, checked: `(texts, dim)` row-major.
    ///
    /// # Errors
    /// `Incompatible` if the embedder gives another number of vectors, or one that is not finite.
    pub fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
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

impl Drop for Store {
    /// Stops what goes on in the background, and leaves the index for the next opening to find.
    fn drop(&mut self) {
        self.indexer.stop();
        if !std::thread::panicking() {
            self.write_images_at_closing();
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("options", &self.options).finish_non_exhaustive()
    }
}

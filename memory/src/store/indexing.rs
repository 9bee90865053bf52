//! The background thread that builds graphs: one at a time, giving way to searches, stopped when the store is dropped.
//! Knows nothing of how a graph is built or walked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Store;
use super::state::{PartitionKey, State};
use super::vectors::GraphFolder;
use crate::Result;
use crate::vectors::{NotBuilt, build};

/// Rows read under one lock of the state: about a millisecond.
const BATCH_ROWS: usize = 512;
/// How long a build waits for searches before it goes on for a while: a store that is always searched gets its graph.
const PATIENCE: Duration = Duration::from_millis(20);

/// The thread, and what it and the store tell each other.
pub(super) struct Indexer {
    /// Where graphs are kept; none if they are not.
    folder: Option<GraphFolder>,
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    running: AtomicBool,
    num_searching: AtomicUsize,
    /// Builds that ended without a sound graph: not tried again until the store is opened again.
    num_failed: AtomicUsize,
}

/// A search is under way as long as this lives.
pub(super) struct Searching(Arc<Shared>);

impl Drop for Searching {
    fn drop(&mut self) {
        self.0.num_searching.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Indexer {
    pub(super) fn new(folder: Option<GraphFolder>) -> Self {
        Self { folder, shared: Arc::default(), thread: Mutex::default() }
    }

    pub(super) fn folder(&self) -> Option<&GraphFolder> {
        self.folder.as_ref()
    }

    pub(super) fn searching(&self) -> Searching {
        self.shared.num_searching.fetch_add(1, Ordering::Relaxed);
        Searching(self.shared.clone())
    }

    /// Waits until no build is under way.
    fn wait(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the builder is noted where it is caught; there is nothing to add here.
            let _ = thread.join();
        }
    }
}

impl Drop for Indexer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wait();
    }
}

impl Store {
    /// Waits until every graph that is due is built, or could not be built.
    ///
    /// Builds go on in the background by themselves; this is for whoever wants to measure, or to close the store with
    /// its graphs on the disk.
    pub fn finish_indexing(&self) {
        self.indexer.wait();
        while self.index_in_background() {
            self.indexer.wait();
        }
    }

    /// Starts the thread if a graph is due and it does not run; whether it runs now.
    pub(super) fn index_in_background(&self) -> bool {
        let shared = &self.indexer.shared;
        let graph_vectors = self.options.graph_vectors;
        if shared.num_failed.load(Ordering::Relaxed) > 0
            || next_due(&self.read(), graph_vectors).is_none()
        {
            return false;
        }
        let mut thread = self.indexer.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.running.swap(true, Ordering::Relaxed) {
            return true;
        }
        let (state, shared) = (self.state.clone(), shared.clone());
        let folder = self.indexer.folder.clone();
        let work = move || {
            let done = work(&state, graph_vectors, folder.as_ref(), &shared);
            if let Err(error) = done {
                shared.num_failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "a graph could not be kept");
            }
            shared.running.store(false, Ordering::Relaxed);
        };
        match std::thread::Builder::new().name("mka-index".into()).spawn(work) {
            // The thread before this one has ended, or is about to.
            Ok(started) => {
                *thread = Some(started);
                true
            }
            Err(error) => {
                self.indexer.shared.running.store(false, Ordering::Relaxed);
                tracing::warn!(%error, "the thread that builds graphs did not start");
                false
            }
        }
    }
}

fn next_due(state: &State, graph_vectors: usize) -> Option<PartitionKey> {
    let mut due = state.partitions.iter().filter(|(_, p)| p.is_build_due(graph_vectors));
    due.next().map(|(key, _)| key.clone())
}

/// Builds what is due, until nothing is.
fn work(
    state: &RwLock<State>,
    graph_vectors: usize,
    folder: Option<&GraphFolder>,
    shared: &Shared,
) -> Result<()> {
    let read = || state.read().unwrap_or_else(PoisonError::into_inner);
    let write = || state.write().unwrap_or_else(PoisonError::into_inner);
    loop {
        let Some(key) = next_due(&read(), graph_vectors) else { return Ok(()) };
        let started = write().partitions.get_mut(&key).and_then(|p| p.start_build(graph_vectors));
        let Some(mut job) = started else { return Ok(()) };
        let padded = read().partitions.get(&key).map_or(0, |partition| partition.padded());
        let mut bytes = vec![0i8; job.rows.len() * padded];
        for (rows, out) in
            job.rows.chunks_mut(BATCH_ROWS).zip(bytes.chunks_mut(BATCH_ROWS * padded))
        {
            let state = read();
            let Some(partition) = state.partitions.get(&key) else { break };
            for (row, out) in rows.iter_mut().zip(out.chunks_exact_mut(padded)) {
                if !partition.quantize(*row, out) {
                    *row = u32::MAX;
                }
            }
        }
        let keep_going = || {
            let mut waited = Duration::ZERO;
            while shared.num_searching.load(Ordering::Relaxed) > 0 && waited < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
                waited += Duration::from_millis(1);
            }
            !shared.stop.load(Ordering::Relaxed)
        };
        let built = build(bytes, padded, 1, &keep_going);
        let mut guard = write();
        // The indexes may have been derived anew meanwhile: their rows have other numbers.
        let Some(partition) = guard.partitions.get_mut(&key).filter(|p| p.is_building()) else {
            continue;
        };
        match built {
            Ok(graph) => partition.seal(Arc::new(graph), job.rows),
            Err(why) => {
                partition.give_up();
                if why == NotBuilt::Failed {
                    shared.num_failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!("a graph was not sound: searches go on scanning");
                }
                return Ok(());
            }
        }
        drop(guard);
        if let Some(folder) = folder {
            folder.write(state, &key)?;
        }
    }
}

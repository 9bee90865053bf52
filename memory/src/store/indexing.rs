//! The background thread that builds graphs and writes images: one at a time, giving way to searches, until the store closes.
//! Knows nothing of how a graph is built or walked.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Store;
use super::folder::IndexFolder;
use super::images::{next_due_open, write_image};
use super::state::{PartitionKey, State};
use super::state_lock::StateLock;
use super::vectors::write_graph;
use crate::Result;
use crate::vectors::{NotBuilt, build};

/// Rows read under one lock of the state: about a millisecond.
const BATCH_ROWS: usize = 512;
/// How long a build waits for searches before it goes on for a while: a store that is always searched gets its graph.
const PATIENCE: Duration = Duration::from_millis(20);

/// The thread, and what it and the store tell each other.
pub(super) struct Indexer {
    /// Where graphs and images are kept; none if they are not.
    folder: Option<IndexFolder>,
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
    /// The same of images.
    num_images_failed: AtomicUsize,
}

/// A search is under way as long as this lives.
pub(super) struct Searching(Arc<Shared>);

impl Drop for Searching {
    fn drop(&mut self) {
        self.0.num_searching.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Indexer {
    pub(super) fn new(folder: Option<IndexFolder>) -> Self {
        Self { folder, shared: Arc::default(), thread: Mutex::default() }
    }

    pub(super) fn folder(&self) -> Option<&IndexFolder> {
        self.folder.as_ref()
    }

    pub(super) fn searching(&self) -> Searching {
        self.shared.num_searching.fetch_add(1, Ordering::Relaxed);
        Searching(self.shared.clone())
    }

    /// Ends what goes on, and lets nothing begin any more.
    pub(super) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wait();
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
        self.stop();
    }
}

impl Store {
    /// Waits until every graph and image that is due is made, or could not be made.
    ///
    /// That goes on in the background by itself; this is for whoever wants to measure, or to close the store with
    /// its graphs on the disk.
    pub fn finish_indexing(&self) {
        self.indexer.wait();
        while self.index_in_background() {
            self.indexer.wait();
        }
    }

    /// Starts the thread if something is due and it does not run; whether it runs now.
    pub(super) fn index_in_background(&self) -> bool {
        let shared = &self.indexer.shared;
        let least = (self.options.graph_vectors, self.options.image_vectors);
        if next_due(&self.read(), shared, self.indexer.folder(), least).is_none() {
            return false;
        }
        let mut thread = self.indexer.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if shared.running.swap(true, Ordering::Relaxed) {
            return true;
        }
        let (state, shared) = (self.state.clone(), shared.clone());
        let folder = self.indexer.folder.clone();
        let work = move || {
            let done = work(&state, least, folder.as_ref(), &shared);
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

/// What is made in the background.
enum Due {
    Image(PartitionKey),
    Graph(PartitionKey),
}

/// What is due next, for stores of at least so many vectors: a graph, an image.
fn next_due(
    state: &State,
    shared: &Shared,
    folder: Option<&IndexFolder>,
    (graph_vectors, image_vectors): (usize, usize),
) -> Option<Due> {
    let can = |failed: &AtomicUsize| failed.load(Ordering::Relaxed) == 0;
    if folder.is_some()
        && can(&shared.num_images_failed)
        && let Some(key) = next_due_open(state, image_vectors)
    {
        return Some(Due::Image(key));
    }
    let mut due = state.partitions.iter().filter(|(_, p)| p.is_build_due(graph_vectors));
    due.next().filter(|_| can(&shared.num_failed)).map(|(key, _)| Due::Graph(key.clone()))
}

/// Makes what is due, until nothing is.
fn work(
    state: &StateLock<State>,
    least: (usize, usize),
    folder: Option<&IndexFolder>,
    shared: &Shared,
) -> Result<()> {
    let graph_vectors = least.0;
    let read = || state.read();
    let write = || state.write();
    loop {
        if shared.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let due = next_due(&read(), shared, folder, least);
        let key = match (due, folder) {
            (Some(Due::Graph(key)), _) => key,
            (Some(Due::Image(key)), Some(folder)) => {
                if let Err(error) = write_image(folder, state, &key) {
                    shared.num_images_failed.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(%error, "an image of the index could not be written");
                }
                continue;
            }
            _ => return Ok(()),
        };
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
            write_graph(folder, state, &key)?;
        }
    }
}

//! The engine: weights, tokenizer and store of one memory folder, shared by its sessions.
//! Knows no turn of a conversation; that is the session's.

mod model;
#[cfg(test)]
mod tests;

pub(crate) use model::Model;

use crate::cache::CacheShape;
use crate::embedding::{EmbedderPrecision, EmbedderSource};
use crate::error::{Error, ErrorKind, Result};
use crate::forgets::Forgets;
use crate::hub::ModelSource;
use crate::memory::MemoryHandle;
use crate::offload::offload;
use crate::pages::{FillMemory, PageConfig, PageRule, PageShape, PageStore, RecallPolicy};
use crate::parallel::{self, Collective, TensorGroup};
use crate::quote::Quote;
use crate::session::{Session, now_ms};
use crate::stream::Canceller;
use mka_memory::{Backend, EncryptionKey, Hygiene, Scope, Store, StoreOptions};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use xxhash_rust::xxh3::xxh3_64;

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Device {
    /// The processor, every core.
    #[default]
    Cpu,
    /// The CUDA device of this ordinal; needs a build with the feature `cuda`.
    Cuda(usize),
}

impl Device {
    /// The fastest device of this machine that this build supports: the first CUDA device, or else the processor.
    pub fn auto() -> Self {
        Self::available().pop().unwrap_or_default()
    }

    /// Every device of this machine that this build supports, the fastest last.
    pub fn available() -> Vec<Self> {
        #[cfg(feature = "cuda")]
        let cuda = {
            use candle_core::cuda_backend::cudarc::driver::CudaContext;
            // Without a driver this is an error: no device.
            (0..CudaContext::device_count().unwrap_or(0).max(0) as usize).rev().map(Self::Cuda)
        };
        #[cfg(not(feature = "cuda"))]
        let cuda = std::iter::empty();
        std::iter::once(Self::Cpu).chain(cuda).collect()
    }

    pub(crate) fn open(self) -> Result<candle_core::Device> {
        match self {
            Self::Cpu => Ok(candle_core::Device::Cpu),
            // One explicit stream, whichever thread a turn runs on.
            Self::Cuda(ordinal) => {
                #[cfg(feature = "cuda")]
                let opened = mka_kernels::cuda::open(ordinal);
                #[cfg(not(feature = "cuda"))]
                let opened = candle_core::Device::new_cuda_with_stream(ordinal);
                opened.map_err(|source| {
                    let built = if cfg!(feature = "cuda") {
                        ""
                    } else {
                        ": this build lacks the feature `cuda`"
                    };
                    Error::no_device(&format!("open {self}{built}"), source)
                })
            }
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = Error;

    /// `auto`, `cpu`, `cuda` (the first) or `cuda:N`.
    fn from_str(text: &str) -> Result<Self> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::auto()),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => {
                Err(Error::invalid(format!("device {text:?}: expected auto, cpu, cuda or cuda:N")))
            }
        }
    }
}

/// How much of a session is attended exactly, and how much is recalled.
///
/// ```
/// use mka::{MemoryConfig, PageConfig, PagePrecision, RecallPolicy};
///
/// let pages = PageConfig::default().tokens(1024).precision(PagePrecision::Int8);
/// let config = MemoryConfig::with_window(1024).recall(RecallPolicy::Both).recall_k(4).pages(pages);
/// assert_eq!((config.window_tokens, config.pages.tokens), (1024, 1024));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryConfig {
    /// Recent tokens attended exactly, rounded to whole pages of 64; at least 64, at most the model's trained length.
    pub window_tokens: usize,
    /// Most tokens of one forward pass while a prompt is read; beyond the model's trained length it is that.
    pub block_tokens: usize,
    /// Memories looked up for each message; 0 recalls nothing.
    pub recall_k: usize,
    /// Most tokens of recalled text put before a message, headers included.
    pub recall_tokens: usize,
    /// How much of each recalled passage a session quotes to its model; `context` quotes whole passages.
    pub quote: Quote,
    /// Bytes of evicted key/value pages kept on disk for each session, 2 GiB by default; with 0 a session that is opened again
    /// recalls none of them inside attention, and goes on bit for bit only where none would be recalled.
    pub evicted_page_bytes: u64,
    /// How older tokens come back, where [`SendOptions`](crate::SendOptions) does not say; pages are kept with
    /// [`RecallPolicy::Pages`] and [`RecallPolicy::Both`] alone.
    pub recall: RecallPolicy,
    /// Recall inside attention.
    pub pages: PageConfig,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            window_tokens: 2048,
            block_tokens: 512,
            recall_k: 8,
            recall_tokens: 768,
            quote: Quote::default(),
            evicted_page_bytes: 2 << 30,
            recall: RecallPolicy::default(),
            pages: PageConfig::default(),
        }
    }
}

impl MemoryConfig {
    /// The default with a window of `window_tokens`.
    pub fn with_window(window_tokens: usize) -> Self {
        Self { window_tokens, ..Self::default() }
    }

    fn check(&self) -> Result<()> {
        if self.window_tokens < mka_kernels::PAGE_TOKENS {
            return Err(Error::invalid(format!(
                "open: window_tokens {}, expected at least {}",
                self.window_tokens,
                mka_kernels::PAGE_TOKENS
            )));
        }
        if self.block_tokens == 0 {
            return Err(Error::invalid("open: block_tokens 0, expected at least 1"));
        }
        Ok(())
    }
}

/// What every handle of one engine shares.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) model: Option<Model>,
    pub(crate) config: MemoryConfig,
    device: Device,
    /// Who holds the sessions that are open, one handle an id.
    open: Mutex<HashMap<Scope, Holder>>,
    released: Condvar,
    /// Sessions that were open when something of their user was forgotten hold too much.
    pub(crate) forgets: Forgets,
    /// What stored pages go to the model's device through.
    pub(crate) fill_memory: Arc<FillMemory>,
    // The last field: it says so when everything above is dropped.
    closed: Closed,
}

/// Who holds an open session.
enum Holder {
    Handle,
    /// Its handle was dropped; what is left are streams that may still work.
    Streams(Vec<Canceller>),
}

/// Tells whoever waits that the last handle is gone and the store with it.
#[derive(Clone, Default)]
struct Latch(Arc<(Mutex<bool>, Condvar)>);

impl Latch {
    fn wait(&self) {
        let (open, opened) = &*self.0;
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        while !*open {
            open = opened.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Closed(Latch);

impl Drop for Closed {
    fn drop(&mut self) {
        let (open, opened) = &*self.0.0;
        *open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        opened.notify_all();
    }
}

impl Shared {
    /// The model, or an error that says how to give one.
    pub(crate) fn model(&self, operation: &str) -> Result<&Model> {
        self.model.as_ref().ok_or_else(|| {
            Error::invalid(format!(
                "{operation}: the engine has no model, expected one given to EngineBuilder::model"
            ))
        })
    }

    /// Of a stream of which every token sees the first `sink_pages` pages, beside its window.
    pub(crate) fn cache_shape(&self, model: &Model, sink_pages: u64) -> CacheShape {
        // The cache has room for a block: what a caller names must not size it.
        let block = self.config.block_tokens.min(model.decoder.config.trained_tokens);
        let window = self.config.window_tokens;
        CacheShape { sink_pages, ..model.decoder.cache_shape(window, block) }
    }

    /// A store for the pages that leave a window, none in it yet; None where they are not recalled.
    pub(crate) fn page_store(&self, model: &Model, shape: PageShape) -> Option<PageStore> {
        self.config.recall.has_pages().then(|| {
            let mut pages =
                PageStore::new(shape, self.config.pages.clone(), model.decoder.device());
            pages.set_fill_memory(self.fill_memory.clone());
            pages
        })
    }

    /// Marks a session as open; the claim is released by [`Shared::release`].
    ///
    /// A session whose handle was dropped is waited for where its streams were cancelled: they end within a token. One that
    /// somebody still reads may never end.
    pub(crate) fn claim(&self, scope: &Scope) -> Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let held = loop {
            match open.get(scope) {
                None => {
                    open.insert(scope.clone(), Holder::Handle);
                    return Ok(());
                }
                Some(Holder::Handle) => break "open already, expected one handle at a time",
                Some(Holder::Streams(streams)) if streams.iter().any(Canceller::is_awaited) => {
                    break "a stream of it is open, expected it read to its end or dropped";
                }
                Some(Holder::Streams(_)) => {
                    open = self.released.wait(open).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        Err(Error::new(ErrorKind::Locked, format!("session {scope}: {held}")))
    }

    /// Says that no handle holds the session any more, but `streams` may.
    pub(crate) fn closing(&self, scope: &Scope, streams: Vec<Canceller>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(holder) = open.get_mut(scope) {
            *holder = Holder::Streams(streams);
        }
    }

    /// Says that no worker holds it either.
    pub(crate) fn release(&self, scope: &Scope) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(scope);
        self.released.notify_all();
    }

    /// Milliseconds since 1970; where processes share the model, those of the first, so that all recall the same.
    pub(crate) fn now_ms(&self) -> Result<i64> {
        match self.group() {
            Some(group) => Ok(group.first(now_ms() as u64)? as i64),
            None => Ok(now_ms()),
        }
    }

    /// The processes that share the model; None where there is one, or no model.
    pub(crate) fn group(&self) -> Option<&TensorGroup> {
        self.model.as_ref().map(|model| &model.decoder.group).filter(|group| !group.is_alone())
    }

    /// [`Shared::failed`], and then `undo`: what to tell of both.
    pub(crate) fn undone(&self, error: Error, undo: impl FnOnce() -> Result<()>) -> Error {
        let error = self.failed(error);
        match undo() {
            // A group that has ended says so at the next call; what ended it is the news.
            Err(undone) if self.group().is_none() => undone,
            _ => error,
        }
    }

    /// `error`, after which processes that share the model share it no more where they may not all have met it: none is
    /// then waited for.
    pub(crate) fn failed(&self, error: Error) -> Error {
        use ErrorKind::{Cancelled, Incompatible, InvalidArgument, Locked, NotFound};
        let is_everywhere =
            matches!(error.kind(), Cancelled | Incompatible | InvalidArgument | Locked | NotFound);
        if let Some(group) = self.group().filter(|_| !is_everywhere) {
            group.end();
        }
        error
    }

    /// Tokens of `text`: by the model's tokenizer, or without a model an upper estimate of one for two bytes.
    pub(crate) fn count_tokens(&self, text: &str) -> Result<usize> {
        match &self.model {
            Some(model) => model.tokenizer.count(text),
            None => Ok(text.len().div_ceil(2)),
        }
    }
}

/// Who shares the model.
enum Processes {
    Alone,
    Given(Box<dyn Collective>),
    /// Those that the environment names.
    Named,
}

/// How an engine is opened.
#[must_use]
pub struct EngineBuilder {
    path: PathBuf,
    model: Option<ModelSource>,
    /// None: the process's own where several share the model, else the fastest.
    device: Option<Device>,
    embedder: EmbedderSource,
    embedder_precision: EmbedderPrecision,
    memory: MemoryConfig,
    store: StoreOptions,
    reembed_share: Option<f32>,
    processes: Processes,
    quiet: bool,
}

impl EngineBuilder {
    /// The language model. Without one, memory alone works: remember, recall, forget.
    ///
    /// The files of the model are mapped and must not change while the engine is open.
    pub fn model(mut self, source: ModelSource) -> Self {
        self.model = Some(source);
        self
    }

    /// Where the model runs; [`Device::auto`] by default, or [`parallel::local_device`] where processes share the model.
    pub fn device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// What turns sentences into vectors; a store keeps the embedder that it was made with.
    pub fn embedder(mut self, source: EmbedderSource) -> Self {
        self.embedder = source;
        self
    }

    /// How a sentence encoder multiplies; [`EmbedderSource::Hashed`] has no weights and takes no notice.
    pub fn embedder_precision(mut self, precision: EmbedderPrecision) -> Self {
        self.embedder_precision = precision;
        self
    }

    /// Window and recall.
    pub fn memory(mut self, config: MemoryConfig) -> Self {
        self.memory = config;
        self
    }

    /// Which database keeps the small records of a new store; one that exists keeps what it has.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.store.backend = backend;
        self
    }

    /// Encrypts everything that memory writes. Given when the store is created, and at every opening from then on.
    pub fn encryption_key(mut self, key: EncryptionKey) -> Self {
        self.store.key = Some(key);
        self
    }

    /// What memory does not store twice, and what it does not store at all.
    pub fn hygiene(mut self, hygiene: Hygiene) -> Self {
        self.store.hygiene = hygiene;
        self
    }

    /// Takes another embedder over than the one that the store was made with, instead of refusing it.
    /// The engine opens at once and recalls by words alone what is not embedded again yet; a thread does that, working
    /// `share` of the time, more than 0 and at most 1. [`Stats::turns_to_embed`](crate::Stats) says how much is left.
    pub fn reembed(mut self, share: f32) -> Self {
        self.reembed_share = Some(share);
        self
    }

    /// Shares one model with the other processes of `processes`, each of which has its heads and its part of the MLP's
    /// inner width, on a device of its own ([`parallel`](crate::parallel) says what that asks of a program).
    ///
    /// Process 0 keeps its memory at the path that was given, process `n` beside it, at the path with `.n` behind it.
    pub fn tensor_parallel(mut self, processes: Box<dyn Collective>) -> Self {
        self.processes = Processes::Given(processes);
        self
    }

    /// [`EngineBuilder::tensor_parallel`] with the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name;
    /// alone where they name none. Opening waits for the others.
    pub fn tensor_parallel_from_env(mut self) -> Self {
        self.processes = Processes::Named;
        self
    }

    /// Shows no progress bar while files are fetched.
    pub fn quiet(mut self, quiet: bool) -> Self {
        self.quiet = quiet;
        self
    }

    /// Opens the engine, fetching the model first if it is not in the cache folder.
    ///
    /// # Errors
    /// `Locked` with the holder's process id if the store is open elsewhere; `Incompatible` if it was made with another
    /// embedder, or a later version, or if the tokenizer has more tokens than the model; `InvalidArgument` for a
    /// [`MemoryConfig`] that the model's trained length has no room for, for a key that is not the store's, and, where
    /// processes share the model, for what they cannot share; `NotFound` naming every place where the model was looked for;
    /// `Model`, `Device` and `OutOfMemory` of the model; `Storage` and `Corrupted` of the store.
    pub async fn open(self) -> Result<Engine> {
        offload("open", move || self.open_blocking()).await
    }

    /// [`EngineBuilder::open`], blocking the thread.
    ///
    /// # Errors
    /// As [`EngineBuilder::open`].
    pub fn open_blocking(self) -> Result<Engine> {
        self.memory.check()?;
        if let Some(share) = self.reembed_share.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
            return Err(Error::invalid(format!(
                "open: expected a share of more than 0 and at most 1 to embed again, got {share}"
            )));
        }
        let device = match (self.device, &self.processes) {
            (Some(device), _) => device,
            (None, Processes::Alone) => Device::auto(),
            (None, _) => parallel::local_device()?,
        };
        let processes = match self.processes {
            Processes::Given(processes) => Some(processes),
            Processes::Named => parallel::group_from_env(device)?,
            Processes::Alone => None,
        };
        let group = processes.map_or_else(|| Ok(TensorGroup::alone()), TensorGroup::new)?;
        if !group.is_alone() {
            check_shared(&self.memory, self.model.is_some(), self.reembed_share.is_some())?;
        }
        let mut progress = crate::hub::terminal_progress(self.quiet || group.index() > 0);
        let model = match &self.model {
            Some(source) => {
                let opened = device.open()?;
                tracing::info!(%device, "open model");
                Some(Model::load(&crate::hub::resolve(source, &mut progress)?, &opened, &group)?)
            }
            None => None,
        };
        if let Some(model) = &model {
            let trained = model.decoder.config.trained_tokens;
            if self.memory.window_tokens > trained {
                return Err(Error::invalid(format!(
                    "open: window_tokens {}, expected at most the model's trained length {trained}",
                    self.memory.window_tokens
                )));
            }
            if self.memory.recall.has_pages() {
                self.memory.pages.check(self.memory.window_tokens, trained)?;
            }
        }
        let embedder = self.embedder.load(self.embedder_precision, &mut progress)?;
        let options = StoreOptions {
            evicted_page_bytes: self.memory.evicted_page_bytes,
            reembed: self.reembed_share.is_some(),
            ..self.store
        };
        let mut path = self.path.into_os_string();
        if group.index() > 0 {
            path.push(format!(".{}", group.index()));
        }
        group.agree(&[
            ("the version", xxh3_64(env!("CARGO_PKG_VERSION").as_bytes())),
            ("MemoryConfig", xxh3_64(format!("{:?}", self.memory).as_bytes())),
            ("the embedder", xxh3_64(embedder.identity().as_bytes())),
        ])?;
        let store = Store::open(Path::new(&path), embedder, options)?;
        if !group.is_alone() && store.stats().turns_to_embed > 0 {
            return Err(Error::invalid(
                "open: tensor_parallel: a store that is not embedded to its end, expected it opened alone until it is",
            ));
        }
        let config = self.memory;
        let open = Mutex::new(HashMap::new());
        let released = Condvar::new();
        let closed = Closed(Latch::default());
        let forgets = Forgets::default();
        let fill_memory = Arc::default();
        let shared = Arc::new(Shared {
            store,
            model,
            config,
            device,
            open,
            released,
            forgets,
            fill_memory,
            closed,
        });
        if let Some(model) = &shared.model
            && let Some(pages) = shared.page_store(model, shared.cache_shape(model, 1).pages())
        {
            pages.expect(1);
        }
        // Whoever opened it without a share goes on where an earlier opening stopped, at half speed.
        if shared.store.stats().turns_to_embed > 0 {
            let share = self.reembed_share.unwrap_or(0.5);
            crate::memory::reembed_in_background(Arc::downgrade(&shared), share)?;
        }
        Ok(Engine { shared })
    }
}

/// Refuses what processes that share a model cannot do alike.
fn check_shared(memory: &MemoryConfig, has_model: bool, reembeds: bool) -> Result<()> {
    let rule = memory.pages.rule;
    let one_choice =
        memory.recall.has_pages() && matches!(rule, PageRule::InfLlm | PageRule::TokenSelect);
    let refused = match () {
        () if !has_model => "an engine with a model".to_owned(),
        () if reembeds => "no embedding in the background beside it".into(),
        () if one_choice => format!(
            "a rule by which each key/value head chooses for itself, got {rule:?}, which chooses for all heads at once"
        ),
        () => return Ok(()),
    };
    Err(Error::invalid(format!("open: tensor_parallel: expected {refused}")))
}

/// An open memory folder with its model: cheap to clone, shared by every session.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts to open the memory folder at `path`, which is created if missing.
    pub fn builder(path: impl Into<PathBuf>) -> EngineBuilder {
        EngineBuilder {
            path: path.into(),
            model: None,
            device: None,
            embedder: EmbedderSource::default(),
            embedder_precision: EmbedderPrecision::default(),
            memory: MemoryConfig::default(),
            store: StoreOptions::default(),
            reembed_share: None,
            processes: Processes::Alone,
            quiet: false,
        }
    }

    /// Opens the session of `scope`, which must name one: new, or continued where it stopped, without reading its
    /// stream again.
    ///
    /// # Errors
    /// `Locked` if a handle of the session is open, or a stream of it that is neither read to its end nor dropped;
    /// `InvalidArgument` if the scope names no session; `OutOfMemory`, `Model` or `Device` if the model's device has no room
    /// or fails, `Storage` if the store cannot be read.
    pub async fn session(&self, scope: Scope) -> Result<Session> {
        let shared = self.shared.clone();
        offload("session", move || Session::open(shared, scope)).await
    }

    /// [`Engine::session`], blocking the thread.
    ///
    /// # Errors
    /// As [`Engine::session`].
    pub fn session_blocking(&self, scope: Scope) -> Result<Session> {
        Session::open(self.shared.clone(), scope)
    }

    /// Drops this handle and waits until the store is closed: for the last call and stream at work, and for every
    /// other handle, which its holder must drop. Then the folder can be opened again.
    pub async fn close(self) -> Result<()> {
        offload("close", move || {
            self.close_blocking();
            Ok(())
        })
        .await
    }

    /// [`Engine::close`], blocking the thread.
    pub fn close_blocking(self) {
        let closed = self.shared.closed.0.clone();
        drop(self);
        closed.wait();
    }

    /// The memory of every scope: remember, recall, forget.
    pub fn memory(&self) -> MemoryHandle {
        MemoryHandle::new(self.shared.clone())
    }

    /// Tokens of `text` as the model counts them; without a model one for every two bytes, as [`MemoryHandle::context`] counts.
    ///
    /// # Errors
    /// `Model` if the model's tokenizer fails.
    pub fn count_tokens(&self, text: &str) -> Result<usize> {
        self.shared.count_tokens(text)
    }

    /// Where the model runs.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// Bytes of keys and values of one token, f32; None without a model. A session holds half as much again on the device for
    /// each token that it has room for, since keys lie there before RoPE, too: `docs/recall.md`, "What a session takes".
    pub fn kv_bytes_per_token(&self) -> Option<usize> {
        let config = &self.shared.model.as_ref()?.decoder.config;
        // Keys and values, f32.
        Some(config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4)
    }

    /// Name of the model's folder or file; None without a model.
    pub fn model_name(&self) -> Option<&str> {
        self.shared.model.as_ref().map(|model| model.name.as_str())
    }

    /// The folder or GGUF file that the model was loaded from, of one of the hub where the cache has it; None without a model.
    pub fn model_path(&self) -> Option<&Path> {
        self.shared.model.as_ref().map(|model| model.path.as_path())
    }

    /// Tokens that the model was trained on at once; None without a model.
    pub fn trained_tokens(&self) -> Option<usize> {
        self.shared.model.as_ref().map(|model| model.decoder.config.trained_tokens)
    }
}

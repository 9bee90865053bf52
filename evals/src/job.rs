//! One piece of work, mostly in a process apart: feed a text, ask a question, measure.
//! Knows no task; a process apart makes "restarted in between" true and peak memory a process's own.

mod process;

pub(crate) use process::{serve, spawn, spawn_kept};

use futures_util::StreamExt;
use mka::{
    Device, Engine, Event, FeedEvent, FeedOptions, LandmarkScan, MemoryConfig, ModelSource,
    PageConfig, PagePrecision, PageRule, Prefill, RecallPolicy, Sampling, Scope, SendOptions,
    Session,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Instant;

pub(crate) type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// The name of the device that `device` of a command line is on this machine: that of `auto` is another one elsewhere.
pub(crate) fn device_name(device: &str) -> Result<String> {
    Ok(device.parse::<Device>()?.to_string())
}

/// How a session of a job remembers; each variant is a policy of the engine, with its rule where there are several.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Memory {
    /// Sinks and window alone.
    #[default]
    Off,
    /// Passages of text.
    Text,
    /// Pages inside attention.
    Pages,
    /// Both of them.
    Both,
    /// InfLLM's rule over the same pages.
    #[value(name = "infllm")]
    InfLlm,
    /// Quest's rule over the same pages.
    Quest,
    /// TokenSelect's rule over the same pages.
    #[value(name = "tokenselect")]
    TokenSelect,
}

impl Memory {
    fn configure(self, config: &mut MemoryConfig) {
        let (policy, rule) = match self {
            Self::Off => (RecallPolicy::Off, PageRule::Mka),
            Self::Text => (RecallPolicy::Text, PageRule::Mka),
            Self::Pages => (RecallPolicy::Pages, PageRule::Mka),
            Self::Both => (RecallPolicy::Both, PageRule::Mka),
            Self::InfLlm => (RecallPolicy::Pages, PageRule::InfLlm),
            Self::Quest => (RecallPolicy::Pages, PageRule::Quest),
            Self::TokenSelect => (RecallPolicy::Pages, PageRule::TokenSelect),
        };
        config.recall = policy;
        config.pages.rule = rule;
        if matches!(policy, RecallPolicy::Pages | RecallPolicy::Both) {
            // The process that is asked recalls what the one before it was fed: every page goes to the disk, and those
            // of a million tokens of the default model (24 GB) may be in memory.
            config.pages.bytes = 32 << 30;
            config.evicted_page_bytes = 64 << 30;
        }
        // The words of a question are no part of the rules that are compared with.
        config.pages.lexical = rule == PageRule::Mka;
    }
}

/// How stored keys and values are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum Precision {
    F32,
    Bf16,
    Int8,
    Int4,
}

/// What is scored to choose among stored tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub(crate) enum PageScan {
    Flat,
    TwoLevel,
    SignHash,
    KeyCodes,
}

/// Recall inside attention, where it is not as the engine has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
#[group(skip)]
pub(crate) struct PageOptions {
    /// Decoded tokens that a choice of stored tokens serves at most.
    #[arg(long)]
    pub(crate) page_reuse: Option<usize>,
    /// Layers below this one choose nothing.
    #[arg(long)]
    pub(crate) page_first_layer: Option<usize>,
    /// Tokens to either side of a stored one whose votes count for it.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page_reach: Option<usize>,
    /// What a question's queries asked for is forgotten once it is read.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) page_drop_votes: bool,
    /// A prompt's blocks attend to every stored token up to the model's trained length.
    #[arg(long)]
    pub(crate) page_dense: bool,
    /// What is fed is read with sinks and window alone, once for all rules of choosing and streaming; the question recalls.
    #[arg(long)]
    #[serde(default)]
    pub(crate) page_windowed_feed: bool,
    /// The rare words of a question pin no stored tokens.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) page_no_pins: bool,
    /// Tokens that are not recalled enter the softmax through the means of their pages.
    #[arg(long)]
    pub(crate) page_estimate: bool,
    /// Positions are those of the stream up to the model's trained length, although not every stored token is recalled.
    // Always written: a run from before positions were compact is another one.
    #[arg(long)]
    #[serde(default)]
    pub(crate) page_exact: bool,
    /// MiB of a CUDA device for the stored pages of a session.
    #[arg(long)]
    pub(crate) page_device_mib: Option<u64>,
    /// MiB of host memory for the stored pages of a session and their index; all of them fit the default, 32768.
    #[arg(long)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) page_host_mib: Option<u64>,
    /// How stored keys and values are held.
    #[arg(long)]
    pub(crate) page_precision: Option<Precision>,
    /// What is scored to choose among stored tokens; on a card that has them flat, two-level and sign-hash score every
    /// landmark, key-codes every key.
    #[arg(long)]
    pub(crate) page_scan: Option<PageScan>,
}

impl PageOptions {
    fn configure(&self, config: &mut PageConfig) {
        if let Some(steps) = self.page_reuse {
            config.reuse_steps = Some(steps);
        }
        if let Some(layer) = self.page_first_layer {
            config.first_layer = layer;
        }
        if let Some(tokens) = self.page_reach {
            config.vote_reach = tokens;
        }
        config.keep_votes &= !self.page_drop_votes;
        if self.page_dense {
            config.prefill = Prefill::Dense;
        }
        config.lexical &= !self.page_no_pins;
        config.estimate |= self.page_estimate;
        config.compact &= !self.page_exact;
        if let Some(mib) = self.page_device_mib {
            config.device_bytes = mib << 20;
        }
        if let Some(mib) = self.page_host_mib {
            config.bytes = mib << 20;
        }
        if let Some(precision) = self.page_precision {
            config.precision = match precision {
                Precision::F32 => PagePrecision::F32,
                Precision::Bf16 => PagePrecision::Bf16,
                Precision::Int8 => PagePrecision::Int8,
                Precision::Int4 => PagePrecision::Int4,
            };
        }
        if let Some(scan) = self.page_scan {
            config.scan = match scan {
                PageScan::Flat => LandmarkScan::Flat,
                PageScan::TwoLevel => LandmarkScan::TwoLevel,
                PageScan::SignHash => LandmarkScan::SignHash,
                PageScan::KeyCodes => LandmarkScan::KeyCodes,
            };
        }
    }
}

/// What to do.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) store: PathBuf,
    /// The session of the store; none: the one that most jobs have.
    #[serde(default)]
    pub(crate) session: Option<String>,
    /// Sessions that begin as forks of it once it was fed.
    #[serde(default)]
    pub(crate) forks: Vec<String>,
    pub(crate) model: String,
    pub(crate) window: usize,
    /// Where the model runs, as the command line says it; none: the fastest device.
    pub(crate) device: Option<String>,
    /// Whether the processes that the environment names share the model.
    #[serde(default)]
    pub(crate) tensor_parallel: bool,
    pub(crate) memory: Memory,
    /// Memories looked up for the question, where text is recalled; none: the engine's own number.
    #[serde(default)]
    pub(crate) recall_k: Option<usize>,
    /// Tokens that attention recalls, where pages are; 0 is the engine's own number.
    pub(crate) page_tokens: usize,
    #[serde(default)]
    pub(crate) page_options: PageOptions,
    /// Text file to feed first.
    pub(crate) feed: Option<PathBuf>,
    /// Feed through the model; else as text memory.
    pub(crate) through_model: bool,
    pub(crate) ask: Option<Ask>,
    /// Whether what is fed and asked is a bare text to go on with, outside the chat template.
    pub(crate) completion: bool,
    /// Whether the session is then closed and opened again by the engine as it runs, and asked once more.
    #[serde(default)]
    pub(crate) reopen: bool,
    /// Text whose next-token logits are fingerprinted, last.
    pub(crate) peek: Option<String>,
}

impl Job {
    /// The device, where it is not left to the engine.
    fn named_device(&self) -> Option<&str> {
        self.device.as_deref().filter(|device| *device != "auto")
    }
}

/// A question, answered greedily.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Ask {
    pub(crate) message: String,
    pub(crate) answer_prefix: String,
    pub(crate) max_new_tokens: usize,
    /// The answer ends before the first of these.
    pub(crate) stop: Vec<String>,
    /// Whether the message goes on in the message of what was fed.
    pub(crate) joined: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Tokens attended exactly: those of the job, at most the model's trained length.
    pub(crate) window: usize,
    /// Of engine and session, the model among it.
    pub(crate) open_s: f64,
    /// Of the session alone: its window, and what its pages need.
    pub(crate) session_s: f64,
    /// The same of the session alone, by an engine that runs, and from the question to its first token then.
    pub(crate) reopen_s: f64,
    pub(crate) reopened_first_token_s: f64,
    pub(crate) feed_s: f64,
    pub(crate) fed_tokens: u64,
    pub(crate) chunks: usize,
    pub(crate) output: String,
    /// From the call to the first token of the answer, recall included.
    pub(crate) first_token_s: f64,
    pub(crate) decode_tokens_per_s: f64,
    pub(crate) prompt_tokens: usize,
    pub(crate) reused_tokens: usize,
    pub(crate) recalled_tokens: usize,
    pub(crate) generated_tokens: usize,
    /// FNV-1a of the bits of every logit.
    pub(crate) logits_hash: Option<u64>,
    pub(crate) peak_rss_bytes: u64,
    /// Bytes of keys and values that the model keeps for each token of its window.
    pub(crate) kv_bytes_per_token: usize,
    /// Where the model ran.
    pub(crate) device: String,
}

impl Outcome {
    /// Refuses a text that was fed to be attended to whole and is not.
    ///
    /// # Errors
    /// If what was fed and `more_tokens` are longer than the window: its beginning would be left out, and what is measured
    /// would be of another prompt.
    pub(crate) fn check_window(&self, more_tokens: usize) -> Result<()> {
        let tokens = self.fed_tokens as usize + more_tokens;
        if tokens <= self.window {
            return Ok(());
        }
        Err(format!(
            "prompt: {} tokens and {more_tokens} for the question and its answer, expected at most {} together: the window",
            self.fed_tokens, self.window
        )
        .into())
    }
}

/// Runs `job` in this process.
pub(crate) async fn run(job: &Job) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let started = Instant::now();
    let mut builder = Engine::builder(&job.store)
        .model(job.model.parse::<ModelSource>()?)
        .memory(memory_config(job))
        .quiet(true);
    if let Some(device) = job.named_device() {
        builder = builder.device(device.parse()?);
    }
    if job.tensor_parallel {
        builder = builder.tensor_parallel_from_env();
    }
    let engine = builder.open().await?;
    let name = job.session.as_deref().unwrap_or("sample");
    let opening = Instant::now();
    let mut session = engine.session(Scope::user("evals").session(name)).await?;
    outcome.session_s = opening.elapsed().as_secs_f64();
    outcome.open_s = started.elapsed().as_secs_f64();
    outcome.window = engine.trained_tokens().map_or(job.window, |most| most.min(job.window));
    outcome.device = engine.device().to_string();
    outcome.kv_bytes_per_token = engine.kv_bytes_per_token().unwrap_or(0);
    if let Some(path) = &job.feed {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let options = match job.through_model {
            true => FeedOptions::through_model(),
            false => FeedOptions::text(),
        }
        .completion(job.completion);
        let options = match job.page_options.page_windowed_feed {
            true => options.recall(RecallPolicy::Off),
            false => options,
        };
        let started = Instant::now();
        let mut feed = session.feed_with(text, options);
        while let Some(event) = feed.next().await {
            if let FeedEvent::Done(summary) = event? {
                outcome.fed_tokens = summary.model_tokens;
                outcome.chunks = summary.chunks_added;
            }
        }
        outcome.feed_s = started.elapsed().as_secs_f64();
    }
    for name in &job.forks {
        session.fork(name).await?;
    }
    if let Some(ask) = &job.ask {
        asked(&mut session, job, ask, &mut outcome).await?;
        if job.reopen {
            drop(session);
            let started = Instant::now();
            session = engine.session(Scope::user("evals").session(name)).await?;
            outcome.reopen_s = started.elapsed().as_secs_f64();
            let mut again = Outcome::default();
            asked(&mut session, job, ask, &mut again).await?;
            outcome.reopened_first_token_s = again.first_token_s;
        }
    }
    if let Some(text) = &job.peek {
        let logits = session.peek_logits(text).await?;
        let hash = logits
            .iter()
            .flat_map(|x| x.to_bits().to_le_bytes())
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        outcome.logits_hash = Some(hash);
    }
    outcome.peak_rss_bytes = peak_rss_bytes();
    Ok(outcome)
}

/// How the engine of `job` remembers.
fn memory_config(job: &Job) -> MemoryConfig {
    let mut config = MemoryConfig::with_window(job.window);
    job.memory.configure(&mut config);
    if let Some(k) = job.recall_k {
        config.recall_k = k;
    }
    if job.page_tokens > 0 {
        config.pages.tokens = job.page_tokens;
    }
    job.page_options.configure(&mut config.pages);
    config
}

/// Asks, and notes what the answer was and how long it took.
async fn asked(session: &mut Session, job: &Job, ask: &Ask, outcome: &mut Outcome) -> Result<()> {
    let started = Instant::now();
    let mut first = None;
    let mut last = 0.0;
    let mut events =
        std::pin::pin!(session.send_with(ask.message.as_str(), send_options(job, ask)));
    while let Some(event) = StreamExt::next(&mut events).await {
        match event? {
            Event::Token(token) => {
                last = started.elapsed().as_secs_f64();
                first.get_or_insert(last);
                outcome.output.push_str(&token.text);
            }
            Event::Done(usage) => {
                outcome.prompt_tokens = usage.prompt_tokens;
                outcome.reused_tokens = usage.reused_tokens;
                outcome.recalled_tokens = usage.recalled_tokens;
                outcome.generated_tokens = usage.generated_tokens;
            }
            _ => {}
        }
    }
    outcome.first_token_s = first.unwrap_or_else(|| started.elapsed().as_secs_f64());
    // Up to the last token that was seen: what comes after it is the commit.
    let decoded = outcome.generated_tokens.saturating_sub(1) as f64;
    let seconds = last - outcome.first_token_s;
    outcome.decode_tokens_per_s = if seconds > 0.0 { decoded / seconds } else { 0.0 };
    Ok(())
}

/// How the engine is asked.
fn send_options(job: &Job, ask: &Ask) -> SendOptions {
    let options = SendOptions::default()
        .sampling(Sampling::default())
        .completion(job.completion)
        .joined(ask.joined)
        .answer_prefix(&ask.answer_prefix)
        .max_new_tokens(ask.max_new_tokens);
    ask.stop.iter().fold(options, |options, stop| options.stop(stop))
}

/// Most resident memory of this process so far; 0 where the system does not say.
///
/// From `/proc`, not `getrusage`: the latter counts what the parent had before this program was started.
pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next());
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Counts [`peak_rss_bytes`] from now on, where the system can.
fn forget_peak_rss() {
    // proc(5): 5 sets the peak to what is resident now.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// A folder that is removed when it is dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("mka-evals-{}-{name}", std::process::id()));
        // What an earlier run with this process id left is not ours to keep.
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        &self.0
    }

    /// Writes a file of the folder.
    pub(crate) fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::write(&path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A folder that cannot be removed is the system's to clean: it lies in its temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// An error and what caused it, but for causes that the text before them says already.
pub(crate) fn described(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

/// Revision of the sources that this program was built from, with a mark if they were changed since; the environment's
/// MKA_REVISION where it says one.
pub(crate) fn revision() -> String {
    match (std::env::var("MKA_REVISION"), env!("MKA_BUILD_REVISION")) {
        (Ok(revision), _) => revision,
        (_, "") => format!("version {}", env!("CARGO_PKG_VERSION")),
        (_, built) => built.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What an error says, and its cause.
    #[derive(Debug)]
    struct Caused(&'static str, Option<Box<Caused>>);

    impl std::fmt::Display for Caused {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str(self.0)
        }
    }

    impl std::error::Error for Caused {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            self.1.as_ref().map(|cause| cause.as_ref() as &(dyn std::error::Error + 'static))
        }
    }

    #[test]
    fn an_error_is_told_with_the_causes_that_it_does_not_name() {
        let disk = Caused("disk full", None);
        let write = Caused("write a.txt: disk full", Some(Box::new(disk)));
        let save = Caused("save", Some(Box::new(write)));
        assert_eq!(described(&save), "save: write a.txt: disk full");
        let plain: Box<dyn std::error::Error> = "book.txt: \"quoted\"".into();
        assert_eq!(described(plain.as_ref()), "book.txt: \"quoted\"");
    }

    #[test]
    fn a_device_is_known_by_the_name_that_it_has_itself() {
        assert_eq!(device_name("auto").unwrap(), Device::auto().to_string());
        for (device, name) in [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:3", "cuda:3")] {
            assert_eq!(device_name(device).unwrap(), name);
        }
        assert!(device_name("tpu").is_err());
    }

    #[test]
    fn a_prompt_longer_than_the_window_is_refused() {
        let outcome = Outcome { fed_tokens: 4000, window: 4096, ..Outcome::default() };
        outcome.check_window(96).unwrap();
        let error = outcome.check_window(97).unwrap_err().to_string();
        assert!(error.contains("4000 tokens and 97") && error.contains("at most 4096"), "{error}");
    }

    #[test]
    fn text_is_looked_up_as_often_as_the_engine_does_unless_it_is_said() {
        let engines_own = MemoryConfig::default().recall_k;
        assert!(engines_own > 0);
        for memory in [Memory::Text, Memory::Both] {
            for (recall_k, expected) in [(None, engines_own), (Some(3), 3), (Some(0), 0)] {
                let config = memory_config(&Job { memory, recall_k, ..Job::default() });
                assert_eq!(config.recall_k, expected, "{memory:?} {recall_k:?}");
                assert_ne!(config.recall, RecallPolicy::Off);
            }
        }
    }
}

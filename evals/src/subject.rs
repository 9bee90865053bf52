//! What is measured: text in, text out, and what it took.
//! Knows no benchmark and no log.

mod endpoint;
mod local;
mod way;

pub(crate) use local::{Model, SCAFFOLD_TOKENS};

use crate::job::{Outcome, PageOptions, Result, Scratch};
use crate::sample::Sample;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// A way to answer a sample.
pub(crate) trait Subject: Sync {
    /// The name that logs and tables carry.
    fn name(&self) -> &str;

    /// Whether the sample is within what the subject can be asked; the others are no part of its results.
    fn fits(&self, sample: &Sample) -> bool;

    /// Answers, with nothing kept from samples before; `fed` is what subjects before this one left of the same sample.
    fn answer(&self, sample: &Sample, fed: &mut Option<Fed>) -> Result<Answer>;
}

/// A context that was fed once for several subjects, each of which has a session of its own name to go on with.
pub(crate) struct Fed {
    /// The context that was fed.
    context: String,
    /// Where the sessions are, until the last subject has answered.
    scratch: Scratch,
    outcome: Outcome,
}

/// What a subject said and what it took; 0 where it does not say.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub(crate) output: String,
    /// Of the benchmark's prompt, whatever the subject made of it: [`prompt_hash`].
    pub(crate) prompt_hash: String,
    /// Tokens that the answer's first one attends to.
    pub(crate) prompt_tokens: usize,
    /// Tokens of the prompt that were read before the question came.
    pub(crate) reused_tokens: usize,
    pub(crate) recalled_tokens: usize,
    pub(crate) generated_tokens: usize,
    /// From the question to the first token of the answer: opening of a session that was fed before, reading of what was not
    /// and recall included.
    pub(crate) first_token_s: f64,
    /// Of that the opening of the session; 0 where the question finds none to open.
    #[serde(default)]
    pub(crate) session_s: f64,
    pub(crate) decode_tokens_per_s: f64,
    /// Taking in the context before the question.
    pub(crate) feed_s: f64,
    pub(crate) peak_rss_bytes: u64,
}

/// What fixes the subjects of a run.
#[derive(clap::Args, Debug, Clone, Serialize)]
#[group(skip)]
pub(crate) struct Options {
    /// Model folder, GGUF file or repository id; it also counts the tokens of the samples.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    pub(crate) model: String,
    /// Local subjects: full, truncate, streaming, mka (text), pages, both, infllm, quest, tokenselect.
    #[arg(long, value_delimiter = ',', default_value = "truncate,mka")]
    pub(crate) subjects: Vec<String>,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    pub(crate) window: usize,
    /// Memories that mka and both look up for a question.
    #[arg(long, default_value_t = 8)]
    pub(crate) recall_k: usize,
    /// Tokens that attention recalls for each key/value head: pages, both and the rules compared with them.
    #[arg(long, default_value_t = 2048)]
    pub(crate) page_tokens: usize,
    #[command(flatten)]
    pub(crate) page_options: PageOptions,
    /// Feed mka through the model rather than as text memory.
    #[arg(long)]
    pub(crate) through_model: bool,
    /// The question goes on in the message of the context that was fed, so that every subject reads the prompt that full
    /// and truncate read; else it is a message of its own.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) joined: bool,
    /// Where the model runs: auto, cpu, cuda or cuda:N; of several the samples take one each in turn.
    #[arg(long, value_delimiter = ',', default_value = "auto")]
    pub(crate) device: Vec<String>,
    /// Threads of each local sample; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    pub(crate) threads: usize,
    /// One process does all samples of a job, each with the engine and its store opened again, in the place of processes
    /// for each: what a CUDA device takes to start is taken once.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) keep_processes: bool,
    /// A server of this machine with OpenAI's interface: name=http://127.0.0.1:8000/v1,model.
    #[arg(long, value_name = "NAME=URL,MODEL")]
    pub(crate) endpoint: Vec<String>,
    /// Send the first words of the answer as a last message of the assistant, not as a line of the user's.
    #[arg(long)]
    pub(crate) endpoint_prefill: bool,
}

/// The subjects that `options` name, over `model`.
///
/// # Errors
/// If there is none, one has no such name or two have the same.
pub(crate) fn open(options: &Options, model: &Arc<Model>) -> Result<Vec<Box<dyn Subject>>> {
    let mut subjects: Vec<Box<dyn Subject>> = Vec::new();
    for name in &options.subjects {
        subjects.push(Box::new(local::Local::new(name, options, model.clone())?));
    }
    for endpoint in &options.endpoint {
        subjects.push(Box::new(endpoint::Endpoint::parse(endpoint, options.endpoint_prefill)?));
    }
    if subjects.is_empty() {
        return Err(format!(
            "subjects: none, expected --subjects ({}) or --endpoint",
            way::names().join(", ")
        )
        .into());
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = subjects.iter().find(|subject| !names.insert(subject.name().to_owned())) {
        return Err(format!("subjects: {} twice, expected each once", twice.name()).into());
    }
    Ok(subjects)
}

/// Fingerprint of what the benchmark asks: equal where two subjects had the same prompt before them.
pub(crate) fn prompt_hash(sample: &Sample) -> String {
    let prompt = [sample.context.as_str(), &sample.question, &sample.answer_prefix].concat();
    format!("{:016x}", xxh3_64(prompt.as_bytes()))
}

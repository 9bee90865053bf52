//! The commands that run a benchmark: which files, which samples, which subjects, one folder.
//! Knows no rule of a benchmark and no way to answer.

use crate::job::{self, Result};
use crate::longbench::{self, LongBench};
use crate::ruler::{self, Ruler};
use crate::sample::Benchmark;
use crate::subject::Model;
use crate::{fingerprint, run, subject};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct RulerArgs {
    /// Lengths of the samples in the model's tokens, question and answer included.
    #[arg(long, value_delimiter = ',', default_value = "4096,8192")]
    lengths: Vec<usize>,
    /// Names of tasks; none: all thirteen, of `needle` niah_single_1 and niah_single_2.
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    /// Samples of each task and length.
    #[arg(long, default_value_t = 10)]
    samples: usize,
    /// Seed of everything that is drawn.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Text files whose prose is the essay haystack.
    #[arg(long, alias = "haystack", value_delimiter = ',')]
    essays: Vec<PathBuf>,
    /// SQuAD v2.0 dev as JSON, plain or gzipped: qa_1.
    #[arg(long)]
    squad: Option<PathBuf>,
    /// HotpotQA dev distractor as JSON, plain or gzipped: qa_2.
    #[arg(long)]
    hotpot: Option<PathBuf>,
    /// Depths of the needles in percent; none: RULER's rule.
    #[arg(long, value_delimiter = ',')]
    depths: Vec<f64>,
    /// Text file of one word a line, for cwe beyond the built-in words.
    #[arg(long)]
    words: Option<PathBuf>,
    #[command(flatten)]
    subject: subject::Options,
    #[command(flatten)]
    run: run::Options,
}

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct LongBenchArgs {
    /// Folder of the official JSONL files; of v2 also the file itself.
    #[arg(long)]
    data: PathBuf,
    /// v1, e (lengths spread evenly) or v2 (multiple choice).
    #[arg(long, value_enum, default_value = "v1")]
    version: longbench::Version,
    /// Names of tasks; none: all whose file is there, of v2 those without reasoning.
    #[arg(long, value_delimiter = ',')]
    tasks: Vec<String>,
    #[command(flatten)]
    subject: subject::Options,
    #[command(flatten)]
    run: run::Options,
}

/// RULER's tasks; `default_tasks` where the user names none.
pub(crate) fn run_ruler(args: RulerArgs, default_tasks: &[&str]) -> Result<()> {
    let tasks = match args.tasks.is_empty() {
        true => default_tasks.iter().map(|name| (*name).to_owned()).collect(),
        false => args.tasks,
    };
    let config = ruler::Config {
        lengths: args.lengths,
        tasks,
        samples: args.samples,
        seed: args.seed,
        essays: args.essays,
        squad: args.squad,
        hotpot: args.hotpot,
        depths: args.depths,
        words: args.words,
        scaffold_tokens: subject::SCAFFOLD_TOKENS,
    };
    let benchmark = Ruler::open(config.clone())?;
    let options = run::Options { threshold: Some(ruler::EFFECTIVE_PERCENT), ..args.run };
    start(&benchmark, &args.subject, &options, json!(config))
}

/// LongBench v1, E or v2.
pub(crate) fn run_longbench(args: LongBenchArgs) -> Result<()> {
    let config = longbench::Config {
        data: args.data,
        version: args.version,
        tasks: args.tasks,
        limit: args.run.limit,
    };
    let header = json!({ "data": config.data, "version": config.version, "tasks": config.tasks });
    start(&LongBench::open(config)?, &args.subject, &args.run, header)
}

fn start(
    benchmark: &dyn Benchmark,
    subject: &subject::Options,
    options: &run::Options,
    config: serde_json::Value,
) -> Result<()> {
    let model = Arc::new(Model::open(&subject.model)?);
    let subjects = subject::open(subject, &model)?;
    let names = subject.device.iter().map(|device| job::device_name(device));
    let device = names.collect::<Result<Vec<_>>>()?;
    let header = json!({
        "config": config,
        "data_files": fingerprint::of_files(benchmark.files())?,
        "subjects": subject::Options { device, ..subject.clone() },
        "model": model.name,
        "model_files": fingerprint::of_model(&model.path)?,
        "trained_tokens": model.trained_tokens,
    });
    run::run(benchmark, &subjects, &|text| model.count_tokens(text), options, header)
}

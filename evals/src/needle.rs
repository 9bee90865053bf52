//! RULER's niah_single_1 and niah_single_2: one needle, noise or prose around it, asked at the end.
//! Knows no model; a subject is a way to run a sample.
//!
//! Source: RULER (arXiv 2404.06654), its published templates and `string_match_all`. Where this differs: keys come from
//! word lists of our own, depths are spread evenly over the samples, and `mka` and `truncate` are given the context and
//! the question in two processes.

use crate::job::{self, Ask, Job, Outcome, Result, Scratch};
use indicatif::{ProgressBar, ProgressStyle};
use mka::{Engine, ModelSource};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(clap::Args, Debug, Clone, Serialize)]
pub(crate) struct Args {
    /// Model folder, GGUF file or repository id.
    #[arg(long, default_value = "HuggingFaceTB/SmolLM2-135M-Instruct")]
    model: String,
    /// Lengths of the samples in the model's tokens, question and answer included.
    #[arg(long, value_delimiter = ',', default_value = "4096,8192")]
    lengths: Vec<usize>,
    /// niah_single_1 (noise) and niah_single_2 (prose).
    #[arg(long, value_delimiter = ',', default_value = "niah_single_1,niah_single_2")]
    tasks: Vec<String>,
    /// full (dense), truncate (window alone), mka.
    #[arg(long, value_delimiter = ',', default_value = "truncate,mka")]
    subjects: Vec<String>,
    /// Samples of each task and length.
    #[arg(long, default_value_t = 10)]
    samples: usize,
    /// Depths of the needle in percent; none: spread evenly over the samples.
    #[arg(long, value_delimiter = ',')]
    depths: Vec<f64>,
    /// Seed of keys, values and places.
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// Tokens attended exactly.
    #[arg(long, default_value_t = 2048)]
    window: usize,
    /// Memories looked up for a question.
    #[arg(long, default_value_t = 8)]
    recall_k: usize,
    /// Feed `mka` through the model rather than as text memory.
    #[arg(long)]
    through_model: bool,
    /// Text files whose prose is the haystack of niah_single_2.
    #[arg(long, value_delimiter = ',')]
    haystack: Vec<PathBuf>,
    /// Longest answer in tokens; RULER allows 128.
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// Samples run side by side.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Threads of each sample; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Folder for the log and the table.
    #[arg(long, default_value = "runs/needle")]
    out: PathBuf,
}

const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
const ADJECTIVES: &[&str] = &[
    "amber", "brisk", "calm", "dapper", "eager", "faint", "gentle", "hollow", "icy", "jolly",
    "keen", "lively", "mellow", "narrow", "odd", "plain", "quiet", "rapid", "shy", "tidy", "urban",
    "vivid", "warm", "young", "zesty", "bitter", "clever", "dusty", "early", "fuzzy", "glossy",
    "humble", "ideal", "jagged", "knotty", "lunar",
];
const NOUNS: &[&str] = &[
    "anchor", "badger", "canyon", "dolphin", "ember", "falcon", "garden", "harbor", "island",
    "jacket", "kettle", "lantern", "meadow", "needle", "orchard", "pebble", "quarry", "ribbon",
    "saddle", "timber", "umbrella", "valley", "walnut", "yarrow", "zipper", "basket", "cellar",
    "drum", "engine", "feather", "glacier", "hammer",
];

/// One sample, the same for every subject.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    task: String,
    length: usize,
    index: usize,
    depth_percent: f64,
    key: String,
    value: String,
    /// Tokens of the whole prompt with the room for the answer: at most `length`.
    tokens: usize,
    #[serde(skip)]
    context: String,
}

#[derive(Serialize)]
struct Record<'a> {
    subject: &'a str,
    #[serde(flatten)]
    sample: &'a Sample,
    correct: bool,
    #[serde(flatten)]
    feed: FeedCost,
    outcome: Outcome,
}

#[derive(Serialize)]
struct FeedCost {
    feed_s: f64,
    feed_peak_rss_bytes: u64,
}

impl Sample {
    fn intro(&self) -> &'static str {
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about \
         the number afterwards.\n"
    }

    fn question(&self) -> String {
        format!("What is the special magic number for {} mentioned in the provided text?", self.key)
    }

    fn answer_prefix(&self) -> String {
        format!(" The special magic number for {} mentioned in the provided text is", self.key)
    }

    fn document(&self) -> String {
        format!("{}{}", self.intro(), self.context)
    }
}

fn needle(key: &str, value: &str) -> String {
    format!("One of the special magic numbers for {key} is: {value}.")
}

/// The haystack of `units` units with the needle at `depth` percent.
fn context(task: &str, prose: &[&str], units: usize, needle: &str, depth: f64) -> String {
    if task == "niah_single_1" {
        let mut lines = vec![NOISE; units];
        lines.insert((units as f64 * depth / 100.0).round() as usize, needle);
        return lines.join("\n");
    }
    let words: Vec<&str> = prose.iter().copied().cycle().take(units).collect();
    let text = words.join(" ");
    let mut sentences: Vec<&str> = Vec::new();
    let mut start = 0;
    for (at, _) in text.match_indices(['.', '!', '?']) {
        if text[at + 1..].starts_with(' ') {
            sentences.push(&text[start..=at]);
            start = at + 2;
        }
    }
    sentences.push(&text[start.min(text.len())..]);
    sentences.insert((sentences.len() as f64 * depth / 100.0).round() as usize, needle);
    sentences.join(" ")
}

fn sample(
    args: &Args,
    engine: &Engine,
    prose: &[&str],
    task: &str,
    length: usize,
    index: usize,
) -> Result<Sample> {
    let task_number = if task == "niah_single_1" { 1 } else { 2 };
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    rng.set_stream(((length as u64) << 20) | ((index as u64) << 2) | task_number);
    let adjective = ADJECTIVES.choose(&mut rng).ok_or("no adjectives")?;
    let noun = NOUNS.choose(&mut rng).ok_or("no nouns")?;
    let depth_percent = match args.depths.is_empty() {
        true => (index as f64 + 0.5) / args.samples as f64 * 100.0,
        false => args.depths[index % args.depths.len()],
    };
    let mut sample = Sample {
        task: task.to_owned(),
        length,
        index,
        depth_percent,
        key: format!("{adjective}-{noun}"),
        value: rng.random_range(1_000_000..10_000_000).to_string(),
        tokens: 0,
        context: String::new(),
    };
    let needle = needle(&sample.key, &sample.value);
    // Scaffold of the chat template: 64 tokens are more than any of them takes.
    let fixed = args.max_new_tokens + 64 + engine.count_tokens(&sample.answer_prefix())?;
    let tokens_of = |sample: &Sample| -> Result<usize> {
        Ok(fixed + engine.count_tokens(&format!("{}\n{}", sample.document(), sample.question()))?)
    };
    let build = |sample: &mut Sample, units: usize| -> Result<usize> {
        sample.context = context(task, prose, units, &needle, depth_percent);
        sample.tokens = tokens_of(sample)?;
        Ok(sample.tokens)
    };
    // Tokens grow almost linearly with units: a secant step or two, then single steps below the limit.
    let empty = build(&mut sample, 0)?;
    if empty > length {
        return Err(
            format!("needle: length {length}, expected at least {empty} for the template").into()
        );
    }
    let probe = 64;
    let mut per_unit = (build(&mut sample, probe)? - empty).max(1) as f64 / probe as f64;
    let mut units = 0;
    for _ in 0..12 {
        let tokens = build(&mut sample, units)?;
        let slack = length as f64 - tokens as f64;
        if tokens <= length && slack < (length as f64 * 0.005).max(2.0 * per_unit) {
            return Ok(sample);
        }
        if units > 0 {
            per_unit = (tokens - empty).max(1) as f64 / units as f64;
        }
        let step = (slack / per_unit).floor() as i64;
        units = usize::try_from(units as i64 + if step == 0 { -1 } else { step }).unwrap_or(0);
    }
    while build(&mut sample, units)? > length {
        units -= 1;
    }
    Ok(sample)
}

fn run_sample(
    args: &Args,
    subject: &str,
    sample: &Sample,
    trained: usize,
) -> Result<(FeedCost, Outcome)> {
    let scratch =
        Scratch::new(&format!("{subject}-{}-{}-{}", sample.task, sample.length, sample.index))?;
    let text = scratch.path().join("context.txt");
    std::fs::write(&text, sample.document())?;
    let base = Job {
        store: scratch.path().join("store"),
        model: args.model.clone(),
        window: args.window,
        recall_k: if subject == "mka" { args.recall_k } else { 0 },
        ..Job::default()
    };
    let ask = Ask {
        message: sample.question(),
        answer_prefix: sample.answer_prefix(),
        max_new_tokens: args.max_new_tokens,
        ..Ask::default()
    };
    if subject == "full" {
        let job =
            Job { window: trained, feed: Some(text), through_model: true, ask: Some(ask), ..base };
        let outcome = job::spawn(&job, args.threads)?;
        let cost = FeedCost { feed_s: outcome.feed_s, feed_peak_rss_bytes: outcome.peak_rss_bytes };
        return Ok((cost, outcome));
    }
    let through_model = args.through_model && subject == "mka";
    let fed = job::spawn(&Job { feed: Some(text), through_model, ..base.clone() }, args.threads)?;
    // The process that fed has ended: what is answered comes from disk.
    let outcome = job::spawn(&Job { ask: Some(ask), ..base }, args.threads)?;
    Ok((FeedCost { feed_s: fed.feed_s, feed_peak_rss_bytes: fed.peak_rss_bytes }, outcome))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    for task in &args.tasks {
        if !["niah_single_1", "niah_single_2"].contains(&task.as_str()) {
            return Err(
                format!("needle: task {task:?}, expected niah_single_1 or niah_single_2").into()
            );
        }
    }
    for subject in &args.subjects {
        if !["full", "truncate", "mka"].contains(&subject.as_str()) {
            return Err(
                format!("needle: subject {subject:?}, expected full, truncate or mka").into()
            );
        }
    }
    let mut text = String::new();
    for path in &args.haystack {
        let bytes = std::fs::read(path).map_err(|e| format!("haystack {}: {e}", path.display()))?;
        text.push_str(&String::from_utf8_lossy(&bytes));
        text.push(' ');
    }
    let prose: Vec<&str> = text.split_whitespace().collect();
    if prose.is_empty() && args.tasks.iter().any(|task| task == "niah_single_2") {
        return Err("needle: niah_single_2 needs --haystack with text files".into());
    }
    let scratch = Scratch::new("tokenizer")?;
    let engine = Engine::builder(scratch.path().join("store"))
        .model(args.model.parse::<ModelSource>()?)
        .open_blocking()?;
    let trained = engine.trained_tokens().ok_or("needle: no model")?;

    std::fs::create_dir_all(&args.out)?;
    let mut log = std::fs::File::create(args.out.join("samples.jsonl"))?;
    let header = serde_json::json!({
        "revision": job::revision(), "config": args, "model": engine.model_name(), "trained_tokens": trained,
        "metric": "string_match_all",
    });
    std::fs::write(args.out.join("run.json"), serde_json::to_string_pretty(&header)?)?;

    let mut work = Vec::new();
    for &length in &args.lengths {
        for task in &args.tasks {
            for index in 0..args.samples {
                for subject in &args.subjects {
                    if subject != "full" || length <= trained {
                        work.push((length, task, index, subject));
                    }
                }
            }
        }
    }
    let bar = ProgressBar::new(work.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta} left {msg}")?);
    let next = AtomicUsize::new(0);
    let results = Mutex::new((BTreeMap::<(usize, &str, &str), Tally>::new(), &mut log));
    std::thread::scope(|threads| -> Result<()> {
        let workers: Vec<_> = (0..args.jobs.max(1))
            .map(|_| {
                threads.spawn(|| -> Result<(), String> {
                    while let Some((length, task, index, subject)) =
                        work.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let one = || -> Result<()> {
                            let sample = sample(args, &engine, &prose, task, *length, *index)?;
                            let (feed, outcome) = run_sample(args, subject, &sample, trained)?;
                            let correct = outcome.output.to_lowercase().contains(&sample.value);
                            let mut results = results.lock().map_err(|_| "a worker panicked")?;
                            let (table, log) = &mut *results;
                            table
                                .entry((*length, task, subject))
                                .or_default()
                                .add(correct, &feed, &outcome);
                            let record =
                                Record { subject, sample: &sample, correct, feed, outcome };
                            writeln!(log, "{}", serde_json::to_string(&record)?)?;
                            Ok(())
                        };
                        one().map_err(|e| {
                            format!("{subject} {task} {length} sample {index}: {e}")
                        })?;
                        bar.inc(1);
                    }
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a worker panicked")??;
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let (table, _) = results.into_inner().map_err(|_| "a worker panicked")?;
    let text = render(&table);
    std::fs::write(args.out.join("table.md"), &text)?;
    print!("{text}");
    Ok(())
}

#[derive(Default)]
struct Tally {
    samples: usize,
    correct: usize,
    feed_s: f64,
    first_token_s: f64,
    decode: f64,
    peak: u64,
}

impl Tally {
    fn add(&mut self, correct: bool, feed: &FeedCost, outcome: &Outcome) {
        self.samples += 1;
        self.correct += usize::from(correct);
        self.feed_s += feed.feed_s;
        self.first_token_s += outcome.first_token_s;
        self.decode += outcome.decode_tokens_per_s;
        self.peak = self.peak.max(feed.feed_peak_rss_bytes).max(outcome.peak_rss_bytes);
    }
}

fn render(table: &BTreeMap<(usize, &str, &str), Tally>) -> String {
    let mut text = String::from(
        "| length | task | subject | right | % | feed s | first token s | decode tok/s | peak MiB |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for ((length, task, subject), tally) in table {
        let n = tally.samples as f64;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "| {length} | {task} | {subject} | {}/{} | {:.0} | {:.1} | {:.2} | {:.1} | {} |",
            tally.correct,
            tally.samples,
            tally.correct as f64 / n * 100.0,
            tally.feed_s / n,
            tally.first_token_s / n,
            tally.decode / n,
            tally.peak >> 20
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_needle_lies_at_its_depth_in_both_haystacks() {
        let prose: Vec<&str> = "One two three. Four five six! Seven eight?".split(' ').collect();
        let text = context("niah_single_2", &prose, 40, "NEEDLE.", 0.0);
        assert!(text.starts_with("NEEDLE. One two three."));
        let text = context("niah_single_2", &prose, 16, "NEEDLE.", 100.0);
        assert!(text.ends_with("NEEDLE."), "{text}");
        let lines = context("niah_single_1", &[], 10, "NEEDLE.", 50.0);
        assert_eq!(lines.lines().position(|line| line == "NEEDLE."), Some(5));
        assert_eq!(lines.lines().count(), 11);
    }

    #[test]
    fn the_template_is_rulers() {
        assert_eq!(
            needle("fuzzy-badger", "1234567"),
            "One of the special magic numbers for fuzzy-badger is: 1234567."
        );
    }
}

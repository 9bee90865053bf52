//! A run: every sample of a benchmark through every subject, into one folder that can be gone on with.
//! Knows no task, no model and no way to answer.
//!
//! A command flattens [`Options`] and [`crate::subject::Options`] into its arguments, opens a benchmark, and ends with
//!
//! ```text
//! let model = Arc::new(subject::Model::open(&args.subject.model)?);
//! let subjects = subject::open(&args.subject, &model)?;
//! let header = json!({
//!     "config": args.config, "data_files": fingerprint::of_files(benchmark.files())?, "subjects": args.subject,
//!     "model": model.name, "model_files": fingerprint::of_model(&model.path)?, "trained_tokens": model.trained_tokens,
//! });
//! let options = run::Options { threshold: Some(85.6), ..args.run };
//! run::run(&benchmark, &subjects, &|text| model.count_tokens(text), &options, header)
//! ```
//!
//! The header holds everything that changes a score or a time, and nothing else: a folder goes on only under an equal
//! one. What the times mean is added here.

mod header;
pub(crate) mod log;
mod plot;
pub(crate) mod summary;

use crate::job::Result;
use crate::sample::{Benchmark, Cell, Metric, Sample};
use crate::subject::{Answer, Fed, Subject};
use indicatif::{ProgressBar, ProgressStyle};
use log::{Failure, Key, Log, Record};
use serde::de::DeserializeOwned;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use summary::Summary;

/// Where a run goes and how much of it; nothing of this changes a score.
#[derive(clap::Args, Debug, Clone)]
#[group(skip)]
pub(crate) struct Options {
    /// Folder of the run: a new one, or one to go on with.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Samples run side by side.
    #[arg(long, default_value_t = 1)]
    pub(crate) jobs: usize,
    /// Most samples of each task and group; none: all.
    #[arg(long)]
    pub(crate) limit: Option<usize>,
    /// Average (x100) that a length must reach to count as effective.
    #[arg(skip)]
    pub(crate) threshold: Option<f64>,
}

/// From when on the first token is waited for: in the header, so that no folder goes on that has it in another sense, as
/// those have that were begun when the opening of a session was left out.
const FIRST_TOKEN_S: &str = "from the question on, session_s in it";

/// A sample with the subjects that are to answer it, so that it is made once.
type Work<'a> = (Cell, Vec<&'a dyn Subject>);

/// Begins or goes on with the run in `out`, of a benchmark and its header: the log `file`, what it holds already, and the
/// revisions of all starts, of which this one is asked for samples up to a limit by so many jobs.
///
/// # Errors
/// If the folder holds another run, or cannot be written.
pub(crate) fn begin<R: DeserializeOwned>(
    out: &Path,
    file: &str,
    (benchmark, header): (&str, &serde_json::Value),
    (limit, jobs): (Option<usize>, usize),
) -> Result<(Log, Vec<R>, Vec<String>)> {
    std::fs::create_dir_all(out).map_err(|e| format!("{}: {e}", out.display()))?;
    let (log, done) = Log::open(out, file)?;
    if !done.is_empty() && !header::exists(out) {
        let what = file.trim_end_matches(".jsonl");
        return Err(format!("{}: {what} without run.json, expected both", out.display()).into());
    }
    let revisions = header::enter(out, benchmark, header, header::start(limit, jobs))?;
    Ok((log, done, revisions))
}

/// Runs what `options.out` does not hold yet, then writes tables and plots of all that it holds.
///
/// # Errors
/// If the folder holds another run, cannot be written, or a sample failed; the other samples are run all the same.
pub(crate) fn run(
    benchmark: &dyn Benchmark,
    subjects: &[Box<dyn Subject>],
    count_tokens: &(dyn Fn(&str) -> Result<usize> + Sync),
    options: &Options,
    mut header: serde_json::Value,
) -> Result<()> {
    header["first_token_s"] = FIRST_TOKEN_S.into();
    let out = &options.out;
    let asked = (options.limit, options.jobs);
    let (log, done, revisions) =
        begin::<Record>(out, log::FILE, (benchmark.name(), &header), asked)?;

    let done: HashSet<Key> = done.into_iter().map(|record| record.key).collect();
    let work = work(benchmark.cells(), subjects, options.limit, &done);
    let bar = ProgressBar::new(work.iter().map(|(_, subjects)| subjects.len() as u64).sum());
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {eta} left {msg}")?);
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let one = |(cell, subjects): &Work| -> Result<()> {
        // A sample that cannot be made is a failure of each that would have answered it.
        let sample = benchmark.sample(cell, count_tokens).map_err(|e| e.to_string());
        let mut fed = None;
        for subject in subjects {
            let key = key(*subject, cell);
            bar.set_message(format!("{} {} {}", key.subject, key.task, key.group));
            let answered = match &sample {
                Ok(sample) => answer(benchmark, *subject, sample, &mut fed),
                Err(error) => Err(error.clone().into()),
            };
            match answered {
                Ok(Some(record)) => log.append(&record)?,
                Ok(None) => {}
                Err(error) => {
                    let failure = Failure { key, error: error.to_string() };
                    log.append(&failure)?;
                    failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                }
            }
            bar.inc(1);
        }
        Ok(())
    };
    std::thread::scope(|threads| -> Result<()> {
        let workers: Vec<_> = (0..options.jobs.max(1))
            .map(|_| {
                threads.spawn(|| -> Result<(), String> {
                    while let Some(work) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                        one(work).map_err(|e| e.to_string())?;
                    }
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "run: a worker panicked")??;
        }
        Ok(())
    })?;
    bar.finish_and_clear();

    let summary = Summary::new(&log::read(out)?, benchmark.pools());
    let table = summary.render(benchmark.name(), &revisions, options.threshold);
    let path = out.join("table.md");
    std::fs::write(&path, &table).map_err(|e| format!("{}: {e}", path.display()))?;
    plot::write(out, benchmark.name(), &summary)?;
    print!("{table}");
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    for Failure { key: Key { subject, task, group, index }, error } in &failures {
        eprintln!("failed: {subject} {task} {group} sample {index}: {error}");
    }
    match failures.len() {
        0 => Ok(()),
        failed => {
            Err(format!("run: {failed} samples failed; the same command tries them again").into())
        }
    }
}

/// What is not done yet, in the order of the benchmark.
fn work<'a>(
    cells: Vec<Cell>,
    subjects: &'a [Box<dyn Subject>],
    limit: Option<usize>,
    done: &HashSet<Key>,
) -> Vec<Work<'a>> {
    let mut taken: HashMap<(String, String), usize> = HashMap::new();
    let mut seen = HashSet::new();
    let mut work = Vec::new();
    for cell in cells {
        // A task or length that is asked for twice has its samples once.
        if !seen.insert(cell.clone()) {
            continue;
        }
        let taken = taken.entry((cell.task.clone(), cell.group.clone())).or_default();
        *taken += 1;
        if limit.is_some_and(|limit| *taken > limit) {
            continue;
        }
        let subjects: Vec<&dyn Subject> = subjects
            .iter()
            .map(|subject| subject.as_ref())
            .filter(|subject| !done.contains(&key(*subject, &cell)))
            .collect();
        if !subjects.is_empty() {
            work.push((cell, subjects));
        }
    }
    work
}

/// `values` without repetitions, in their order.
pub(crate) fn each_once<T: Clone + PartialEq>(values: &[T]) -> Vec<T> {
    let mut once: Vec<T> = Vec::new();
    for value in values {
        if !once.contains(value) {
            once.push(value.clone());
        }
    }
    once
}

fn key(subject: &dyn Subject, cell: &Cell) -> Key {
    Key {
        subject: subject.name().to_owned(),
        task: cell.task.clone(),
        group: cell.group.clone(),
        index: cell.index,
    }
}

/// Asks and scores; None where the sample does not fit the subject.
fn answer(
    benchmark: &dyn Benchmark,
    subject: &dyn Subject,
    sample: &Sample,
    fed: &mut Option<Fed>,
) -> Result<Option<Record>> {
    if !subject.fits(sample) {
        return Ok(None);
    }
    let first = subject.answer(sample, fed)?;
    let next = benchmark.follow_up(&sample.cell, &first.output)?;
    let (reasoning, asked, answer) = match &next {
        None => (String::new(), sample, first),
        Some(next) => {
            // Asked apart: what `fed` holds was asked the first question.
            let second = subject.answer(next, &mut None)?;
            (first.output.clone(), next, both(first, second))
        }
    };
    let scored = |metric: &Metric| -> Result<f64> {
        let score = (metric.score)(&answer.output, &asked.references, &asked.classes);
        if !(0.0..=1.0).contains(&score) {
            return Err(format!("metric {}: score {score}, expected 0 to 1", metric.name).into());
        }
        Ok(score)
    };
    Ok(Some(Record {
        key: key(subject, &sample.cell),
        metric: asked.metric.name.to_owned(),
        score: scored(&asked.metric)?,
        also: match asked.metric.also {
            Some(metric) => Some((metric.name.to_owned(), scored(metric)?)),
            None => None,
        },
        references: asked.references.clone(),
        tokens: sample.tokens,
        reasoning,
        answer,
    }))
}

/// The second answer with the prompt and the times of the first, which had the text before it; tokens said and memory are of
/// both.
fn both(first: Answer, second: Answer) -> Answer {
    Answer {
        output: second.output,
        generated_tokens: first.generated_tokens + second.generated_tokens,
        peak_rss_bytes: first.peak_rss_bytes.max(second.peak_rss_bytes),
        ..first
    }
}

#[cfg(test)]
mod tests;

//! What a benchmark asks and how an answer is scored: the same sample for every subject.
//! Knows no model and no generator.

use crate::job::Result;
use serde::Serialize;
use std::path::Path;

/// One question over one context. The official prompt is `context` followed directly by `question`, in the chat
/// template if `chat`, with `answer_prefix` after the assistant's header.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) cell: Cell,
    /// What a subject with a memory is fed beforehand; ends with the separator that the template has there.
    pub(crate) context: String,
    /// What is asked of it afterwards.
    pub(crate) question: String,
    /// Words that the answer begins with; not part of the prediction.
    pub(crate) answer_prefix: String,
    pub(crate) references: Vec<String>,
    /// The labels of a classification; empty elsewhere.
    pub(crate) classes: Vec<String>,
    pub(crate) max_new_tokens: usize,
    pub(crate) stop: Vec<String>,
    /// Whether the prompt goes through the chat template.
    pub(crate) chat: bool,
    pub(crate) metric: Metric,
    /// Model tokens of the prompt in its template together with `max_new_tokens`; 0 where the benchmark sets no length.
    pub(crate) tokens: usize,
}

/// Which sample: with the seed and the data files it fixes every byte.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub(crate) struct Cell {
    pub(crate) task: String,
    /// Column of the summary: a length in tokens as digits (RULER), "all" or a bucket (LongBench).
    pub(crate) group: String,
    pub(crate) index: usize,
}

/// A score in 0..=1 of one prediction.
#[derive(Clone, Copy)]
pub(crate) struct Metric {
    /// The official name.
    pub(crate) name: &'static str,
    /// Prediction, references, classes.
    pub(crate) score: fn(&str, &[String], &[String]) -> f64,
    /// Another way to compute it that published numbers use too.
    pub(crate) also: Option<&'static Metric>,
}

impl Metric {
    pub(crate) const fn new(
        name: &'static str,
        score: fn(&str, &[String], &[String]) -> f64,
    ) -> Self {
        Self { name, score, also: None }
    }
}

impl std::fmt::Debug for Metric {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Samples whose mean the official table shows: of some tasks together, all of them or those of one group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pool {
    /// What its tasks have in common, and the column of the official table.
    pub(crate) names: [&'static str; 2],
    pub(crate) tasks: &'static [&'static str],
    /// None: all groups.
    pub(crate) group: Option<&'static str>,
}

impl Pool {
    pub(crate) fn holds(&self, task: &str, group: &str) -> bool {
        self.tasks.contains(&task) && self.group.is_none_or(|own| own == group)
    }
}

/// A set of samples that a run goes through.
pub(crate) trait Benchmark: Sync {
    /// The name that logs and tables carry.
    fn name(&self) -> &'static str;

    /// Every sample, in the order of the run.
    fn cells(&self) -> Vec<Cell>;

    /// The files that the samples are cut from.
    fn files(&self) -> Vec<&Path> {
        Vec::new()
    }

    /// In the order of the official table, where that has means over samples; empty: it has averages over tasks.
    fn pools(&self) -> Vec<Pool> {
        Vec::new()
    }

    /// Makes one sample; `count_tokens` is the model's own tokenizer without special tokens.
    ///
    /// # Errors
    /// If the length has no room for the template.
    fn sample(&self, cell: &Cell, count_tokens: &dyn Fn(&str) -> Result<usize>) -> Result<Sample>;

    /// What is asked once `answer` is there and scored in its place, where a task takes two questions.
    ///
    /// # Errors
    /// If the sample can no longer be made.
    fn follow_up(&self, _cell: &Cell, _answer: &str) -> Result<Option<Sample>> {
        Ok(None)
    }
}

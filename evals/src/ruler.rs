//! RULER's thirteen tasks at any length: which there are, what each needs, and samples that fill a length.
//! Knows no model: a tokenizer is a function that counts.
//!
//! Source: RULER (arXiv 2404.06654) and its repository; `docs/ruler.md` lists every rule with its file and every
//! difference.

mod coded;
mod haystack;
mod lexicon;
mod metric;
mod niah;
mod qa;
mod seed;
mod size;
mod tracing;
mod words;

use crate::job::Result;
use crate::sample::{Benchmark, Cell, Metric, Sample};
use haystack::Essay;
use lexicon::Lexicon;
use niah::{Hay, Niah, Token};
use qa::Qa;
use seed::Seed;
use serde::Serialize;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// What to generate and from which files.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Config {
    /// Lengths in model tokens, template and answer included.
    pub(crate) lengths: Vec<usize>,
    /// Names out of [`TASKS`].
    pub(crate) tasks: Vec<String>,
    /// Samples of each task and length.
    pub(crate) samples: usize,
    pub(crate) seed: u64,
    /// Text files whose prose is the essay haystack.
    pub(crate) essays: Vec<PathBuf>,
    /// SQuAD v2.0 dev as JSON, plain or gzipped.
    pub(crate) squad: Option<PathBuf>,
    /// HotpotQA dev distractor v1 as JSON, plain or gzipped.
    pub(crate) hotpot: Option<PathBuf>,
    /// Depths of the needles in percent; empty: the official rule.
    pub(crate) depths: Vec<f64>,
    /// Words for cwe past the built-in lists, one a line.
    pub(crate) words: Option<PathBuf>,
    /// Tokens that the chat template puts around a message.
    pub(crate) scaffold_tokens: usize,
}

impl Config {
    /// Whether a task lists words, of which the built-in ones may be too few.
    fn lists_words(&self) -> bool {
        self.tasks.iter().any(|name| name == "cwe")
    }
}

/// One of the thirteen.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) name: &'static str,
    /// RULER's `tokens_to_generate`.
    pub(crate) max_new_tokens: usize,
    pub(crate) metric: Metric,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Niah(Niah),
    Tracing,
    CommonWords,
    CodedWords,
    Squad,
    Hotpot,
}

/// The tasks of `synthetic.yaml`, in its order.
pub(crate) static TASKS: [Task; 13] = [
    needle("niah_single_1", Hay::Noise, Token::Words, Token::Numbers, [1, 1, 1]),
    needle("niah_single_2", Hay::Essay, Token::Words, Token::Numbers, [1, 1, 1]),
    needle("niah_single_3", Hay::Essay, Token::Words, Token::Uuids, [1, 1, 1]),
    needle("niah_multikey_1", Hay::Essay, Token::Words, Token::Numbers, [4, 1, 1]),
    needle("niah_multikey_2", Hay::Needles, Token::Words, Token::Numbers, [1, 1, 1]),
    needle("niah_multikey_3", Hay::Needles, Token::Uuids, Token::Uuids, [1, 1, 1]),
    needle("niah_multivalue", Hay::Essay, Token::Words, Token::Numbers, [1, 4, 1]),
    // The generator raises the number of keys to the number of queries: four.
    needle("niah_multiquery", Hay::Essay, Token::Words, Token::Numbers, [4, 1, 4]),
    task("vt", 30, metric::ALL, Kind::Tracing),
    task("cwe", 120, metric::ALL, Kind::CommonWords),
    task("fwe", 50, metric::ALL, Kind::CodedWords),
    task("qa_1", 32, metric::PART, Kind::Squad),
    task("qa_2", 32, metric::PART, Kind::Hotpot),
];

const fn task(name: &'static str, max_new_tokens: usize, metric: Metric, kind: Kind) -> Task {
    Task { name, max_new_tokens, metric, kind }
}

const fn needle(
    name: &'static str,
    hay: Hay,
    key: Token,
    value: Token,
    counts: [usize; 3],
) -> Task {
    let [num_keys, num_values, num_queries] = counts;
    let niah = Niah { hay, key, value, num_keys, num_values, num_queries };
    task(name, 128, metric::ALL, Kind::Niah(niah))
}

/// Llama2-7B's mean score in percent at 4K: what a length must reach to count as effective.
pub(crate) const EFFECTIVE_PERCENT: f64 = 85.6;

/// Drawings of a sample whose units are too large to fill the length, of which the fullest is taken; from the second
/// number on documents of the same article no longer come first, for a few of them may fill a short length in no order.
const ATTEMPTS: usize = 1024;
const MIXED_ATTEMPTS: usize = 64;

/// One sample whose haystack can still be of any size.
struct Draft<'a> {
    /// The context with a haystack of that many units; ends with the newline before the question.
    context: Box<dyn Fn(usize) -> String + 'a>,
    /// The sizes that the task allows.
    units: RangeInclusive<usize>,
    /// A unit that is the same every time: the first sentences of one more may fill what whole ones leave.
    repeated: Option<&'static str>,
    question: String,
    answer_prefix: String,
    references: Vec<String>,
}

impl Draft<'_> {
    /// The context of that many units, and `end` as one line more.
    fn filled(&self, units: usize, end: &str) -> String {
        let mut context = (self.context)(units);
        if !end.is_empty() {
            context.push_str(end);
            context.push('\n');
        }
        context
    }
}

/// `fit`, and as many of the first sentences of `repeated` as fit behind it where it leaves more than [`size::slack`].
fn fill(
    length: usize,
    fit: size::Fit,
    repeated: Option<&'static str>,
    measure: &dyn Fn(usize, &str) -> Result<usize>,
) -> Result<(size::Fit, &'static str)> {
    let mut filled = (fit, "");
    let Some(line) = repeated else { return Ok(filled) };
    for (stop, _) in line.match_indices('.') {
        if length - filled.0.tokens <= size::slack(length) {
            break;
        }
        let end = &line[..=stop];
        let tokens = measure(fit.units, end)?;
        if tokens > length {
            break;
        }
        filled = (size::Fit { tokens, ..fit }, end);
    }
    Ok(filled)
}

/// The benchmark, with the files that its tasks need read.
pub(crate) struct Ruler {
    config: Config,
    lexicon: Lexicon,
    essay: Option<Essay>,
    squad: Option<Qa>,
    hotpot: Option<Qa>,
}

impl Ruler {
    /// Reads what the chosen tasks need and nothing else.
    ///
    /// # Errors
    /// If a task is unknown, a file that a task needs is not given or cannot be read, or it holds too few questions.
    pub(crate) fn open(config: Config) -> Result<Self> {
        if let Some(depth) = config.depths.iter().find(|depth| !(0.0..=100.0).contains(*depth)) {
            return Err(format!("ruler: depth {depth}, expected percent from 0 to 100").into());
        }
        let mut ruler = Self {
            lexicon: Lexicon::open(config.words.as_deref().filter(|_| config.lists_words()))?,
            essay: None,
            squad: None,
            hotpot: None,
            config,
        };
        for name in &ruler.config.tasks {
            let missing =
                |flag: &str, what: &str| format!("ruler: {name} needs {flag} with {what}");
            match &find(name)?.kind {
                Kind::Niah(Niah { hay: Hay::Essay, .. }) if ruler.essay.is_none() => {
                    if ruler.config.essays.is_empty() {
                        return Err(missing("--essays", "text files of prose").into());
                    }
                    ruler.essay = Some(Essay::open(&ruler.config.essays)?);
                }
                Kind::Squad => {
                    let path = ruler.config.squad.as_deref();
                    let path =
                        path.ok_or_else(|| missing("--squad", "SQuAD v2.0 dev (dev-v2.0.json)"))?;
                    ruler.squad = Some(Qa::open_squad(path, ruler.config.samples)?);
                }
                Kind::Hotpot => {
                    let what = "HotpotQA dev distractor v1 (hotpot_dev_distractor_v1.json)";
                    let path = ruler.config.hotpot.as_deref();
                    let path = path.ok_or_else(|| missing("--hotpot", what))?;
                    ruler.hotpot = Some(Qa::open_hotpot(path, ruler.config.samples)?);
                }
                _ => {}
            }
        }
        Ok(ruler)
    }

    fn draft(
        &self,
        task: &Task,
        length: usize,
        index: usize,
        attempt: usize,
        count_tokens: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<Draft<'_>> {
        let seed = Seed::new(self.config.seed, task.name, length, index, attempt);
        let unread = || {
            format!("ruler: {} has no sample {index} with the files that were opened", task.name)
        };
        match &task.kind {
            Kind::Niah(niah) => {
                let depths: Vec<f64> = (0..niah.num_needles())
                    .filter_map(|needle| {
                        let depths = &self.config.depths;
                        depths.get((index + needle) % depths.len().max(1)).copied()
                    })
                    .collect();
                let essay = self.essay.as_ref();
                niah::draft(*niah, essay, &self.lexicon, depths, seed)
                    .ok_or_else(|| unread().into())
            }
            Kind::Tracing => tracing::draft(seed, count_tokens),
            Kind::CommonWords => Ok(words::draft(&self.lexicon, length, seed)),
            Kind::CodedWords => coded::draft(length, task.max_new_tokens, seed),
            Kind::Squad | Kind::Hotpot => {
                let qa = match &task.kind {
                    Kind::Squad => self.squad.as_ref(),
                    _ => self.hotpot.as_ref(),
                };
                let mixed = attempt >= MIXED_ATTEMPTS;
                Ok(qa.and_then(|qa| qa.draft(index, seed, mixed)).ok_or_else(unread)?)
            }
        }
    }
}

fn find(name: &str) -> Result<&'static Task> {
    Ok(TASKS.iter().find(|task| task.name == name).ok_or_else(|| {
        let names = TASKS.each_ref().map(|task| task.name).join(", ");
        format!("ruler: task {name:?}, expected one of {names}")
    })?)
}

impl Benchmark for Ruler {
    fn name(&self) -> &'static str {
        "ruler"
    }

    fn cells(&self) -> Vec<Cell> {
        let mut cells = Vec::new();
        for length in &self.config.lengths {
            for task in &self.config.tasks {
                cells.extend((0..self.config.samples).map(|index| Cell {
                    task: task.clone(),
                    group: length.to_string(),
                    index,
                }));
            }
        }
        cells
    }

    fn files(&self) -> Vec<&Path> {
        let config = &self.config;
        let files = [
            (config.squad.as_deref(), self.squad.is_some()),
            (config.hotpot.as_deref(), self.hotpot.is_some()),
            (config.words.as_deref(), config.lists_words()),
        ];
        let files = files.into_iter().filter_map(|(file, is_read)| file.filter(|_| is_read));
        let essays = config.essays.iter().filter(|_| self.essay.is_some()).map(PathBuf::as_path);
        essays.chain(files).collect()
    }

    fn sample(&self, cell: &Cell, count_tokens: &dyn Fn(&str) -> Result<usize>) -> Result<Sample> {
        let task = find(&cell.task)?;
        let length: usize = cell
            .group
            .parse()
            .map_err(|_| format!("ruler: group {:?}, expected a length in tokens", cell.group))?;
        let too_short = |tokens: usize| {
            let name = task.name;
            format!("ruler: {name} at length {length}, expected at least {tokens} for the template")
        };
        if length < task.max_new_tokens + self.config.scaffold_tokens {
            let tokens = task.max_new_tokens + self.config.scaffold_tokens;
            return Err(too_short(tokens).into());
        }
        let fit_draft = |attempt: usize| -> Result<_> {
            let draft = self.draft(task, length, cell.index, attempt, count_tokens)?;
            let fixed = task.max_new_tokens
                + self.config.scaffold_tokens
                + count_tokens(&draft.answer_prefix)?;
            let measure = |units: usize, end: &str| -> Result<usize> {
                Ok(fixed + count_tokens(&(draft.filled(units, end) + &draft.question))?)
            };
            let fit = size::largest(length, draft.units.clone(), &mut |units| measure(units, ""))?;
            let fit = match fit {
                Ok(fit) => Ok(fill(length, fit, draft.repeated, &measure)?),
                Err(too_large) => Err(too_large),
            };
            Ok((draft, fit))
        };
        let (mut draft, fit) = fit_draft(0)?;
        let (mut fit, mut end) = fit.map_err(|size::TooLarge(tokens)| too_short(tokens))?;
        // A line of uuids or a document is more than a hundredth of a short text: draw again until one fills it.
        for attempt in 1..ATTEMPTS {
            if length - fit.tokens <= size::slack(length) || fit.units == *draft.units.end() {
                break;
            }
            if let (other, Ok((fuller, its_end))) = fit_draft(attempt)?
                && fuller.tokens > fit.tokens
            {
                (draft, fit, end) = (other, fuller, its_end);
            }
        }
        if fit.units == *draft.units.end() && length - fit.tokens > size::slack(length) {
            return Err(format!(
                "ruler: {} at length {length} needs more than {} distinct words: give --words with a text file of one \
                 word a line",
                task.name, fit.units
            )
            .into());
        }
        Ok(Sample {
            cell: cell.clone(),
            context: draft.filled(fit.units, end),
            question: draft.question,
            answer_prefix: draft.answer_prefix,
            references: draft.references,
            classes: Vec::new(),
            max_new_tokens: task.max_new_tokens,
            stop: Vec::new(),
            chat: true,
            metric: task.metric,
            tokens: fit.tokens,
        })
    }
}

#[cfg(test)]
mod tests;

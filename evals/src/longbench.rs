//! LongBench v1, LongBench-E and LongBench v2 from the official data files, with the official prompts and metrics.
//! Knows no model: a run asks for samples and scores answers.

mod chinese;
mod cut;
mod fuzz;
#[cfg(test)]
mod golden;
mod metric;
mod multiple_choice;
mod records;
mod rouge;
mod task;

pub(crate) use cut::middle_cut;
pub(crate) use metric::CODE_SIM_LEVENSHTEIN;

use crate::job::Result;
use crate::sample::{Benchmark, Cell, Sample};
use records::{Place, Records};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V1,
    /// Lengths spread evenly; reported by length.
    V1E,
    V2,
}

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Folder of the official files: `<task>.jsonl`, `<task>_e.jsonl`, or `data.json` or `data.jsonl` of v2, which may
    /// also be named itself.
    pub(crate) data: PathBuf,
    pub(crate) version: Version,
    /// All if empty; for v2 those with the text and without reasoning.
    pub(crate) tasks: Vec<String>,
    /// Samples of each task and group, the first of the file.
    pub(crate) limit: Option<usize>,
}

/// The samples of one version.
pub(crate) struct LongBench {
    version: Version,
    prompts: task::Prompts,
    files: Vec<Records>,
    samples: Vec<Located>,
}

/// A sample and where its record lies.
struct Located {
    cell: Cell,
    file_idx: usize,
    place: Place,
}

impl LongBench {
    /// Goes through the data files once, so that a run of hours does not end at a bad record.
    ///
    /// # Errors
    /// If a task is unknown, a file is missing or a record is malformed.
    ///
    /// # Cost
    /// Reads every file that is asked for, up to the limit; keeps places, not texts.
    pub(crate) fn open(config: Config) -> Result<Self> {
        let mut opened = Self {
            version: config.version,
            prompts: task::Prompts::load()?,
            files: Vec::new(),
            samples: Vec::new(),
        };
        match config.version {
            Version::V1 | Version::V1E => opened.locate_tasks(&config)?,
            Version::V2 => opened.locate_choices(&config)?,
        }
        Ok(opened)
    }

    /// The second question of a task with reasoning, `v2_easy_cot` or `v2_hard_cot`: which letter follows from it.
    ///
    /// # Errors
    /// If `cell` is no such task's, or its record can no longer be read.
    pub(crate) fn conclusion(&self, cell: &Cell, reasoning: &str) -> Result<Sample> {
        let (_, _, prompting) = choice_task(&cell.task)?;
        if prompting != multiple_choice::Prompting::Cot {
            return Err(format!(
                "longbench: conclusion of {:?}, expected a task with reasoning",
                cell.task
            )
            .into());
        }
        Ok(multiple_choice::conclusion(cell, &self.record(cell)?, reasoning))
    }

    fn locate_tasks(&mut self, config: &Config) -> Result<()> {
        let has_lengths = config.version == Version::V1E;
        let tasks = || task::TASKS.iter().filter(|task| !has_lengths || task.has_lengths);
        check_names(&config.tasks, tasks().map(|task| task.name))?;
        for task in tasks().filter(|task| is_wanted(&config.tasks, task.name)) {
            let suffix = if has_lengths { "_e" } else { "" };
            let records = Records::new(config.data.join(format!("{}{suffix}.jsonl", task.name)));
            let group = |record: &task::Record| match has_lengths {
                true => length_group(record.length),
                false => "all",
            };
            let mut taken = Taken::new(config.limit);
            let mut index = 0;
            records.scan(|place, record: task::Record| {
                if taken.take(task.name, group(&record)) {
                    self.push(task.name, group(&record), index, place);
                }
                index += 1;
                // A file of one group is done when that is full.
                has_lengths || !taken.is_full(task.name, "all")
            })?;
            self.files.push(records);
        }
        Ok(())
    }

    fn locate_choices(&mut self, config: &Config) -> Result<()> {
        let names = multiple_choice::TASKS.iter().map(|(name, ..)| *name);
        check_names(&config.tasks, names.clone())?;
        let is_wanted = |name: &str| match config.tasks.is_empty() {
            true => multiple_choice::DEFAULT_TASKS.contains(&name),
            false => is_wanted(&config.tasks, name),
        };
        let records = Records::new(choices_file(&config.data));
        let mut taken = Taken::new(config.limit);
        let mut index = 0;
        records.scan(|place, record: multiple_choice::Record| {
            for (name, difficulty, _) in &multiple_choice::TASKS {
                let group = record.length.name();
                if is_wanted(name) && *difficulty == record.difficulty && taken.take(name, group) {
                    self.push(name, group, index, place);
                }
            }
            index += 1;
            true
        })?;
        self.files.push(records);
        // The file mixes difficulties; a run and its table go task by task.
        let order = |cell: &Cell| names.clone().position(|name| name == cell.task);
        self.samples.sort_by_key(|sample| order(&sample.cell));
        Ok(())
    }

    fn push(&mut self, task: &str, group: &str, index: usize, place: Place) {
        let cell = Cell { task: task.to_owned(), group: group.to_owned(), index };
        self.samples.push(Located { cell, file_idx: self.files.len(), place });
    }

    fn record<T: serde::de::DeserializeOwned>(&self, cell: &Cell) -> Result<T> {
        let located = self.samples.iter().find(|sample| sample.cell == *cell);
        let located = located.ok_or_else(|| format!("longbench: {cell:?} is not in this run"))?;
        self.files[located.file_idx].read(located.place)
    }
}

impl Benchmark for LongBench {
    fn name(&self) -> &'static str {
        match self.version {
            Version::V1 => "longbench",
            Version::V1E => "longbench_e",
            Version::V2 => "longbench_v2",
        }
    }

    fn cells(&self) -> Vec<Cell> {
        self.samples.iter().map(|sample| sample.cell.clone()).collect()
    }

    /// The prompt is whole, whatever its length: [`middle_cut`] is the caller's, who knows the model's window.
    fn sample(&self, cell: &Cell, _: &dyn Fn(&str) -> Result<usize>) -> Result<Sample> {
        if self.version != Version::V2 {
            return self.prompts.sample(cell, self.record(cell)?);
        }
        let (_, _, prompting) = choice_task(&cell.task)?;
        Ok(multiple_choice::sample(cell, &self.record(cell)?, prompting))
    }
}

/// How many samples of each task and group a run has already.
struct Taken<'a> {
    limit: usize,
    counts: HashMap<(&'a str, &'a str), usize>,
}

impl<'a> Taken<'a> {
    fn new(limit: Option<usize>) -> Self {
        Self { limit: limit.unwrap_or(usize::MAX), counts: HashMap::new() }
    }

    /// Counts one more, unless there are enough.
    fn take(&mut self, task: &'a str, group: &'a str) -> bool {
        let has_room = !self.is_full(task, group);
        *self.counts.entry((task, group)).or_default() += usize::from(has_room);
        has_room
    }

    fn is_full(&self, task: &str, group: &str) -> bool {
        self.counts.get(&(task, group)).copied().unwrap_or(0) >= self.limit
    }
}

/// LongBench-E's column for a length in words.
fn length_group(length: usize) -> &'static str {
    match length {
        0..4000 => "0-4k",
        4000..8000 => "4-8k",
        _ => "8k+",
    }
}

fn is_wanted(tasks: &[String], name: &str) -> bool {
    tasks.is_empty() || tasks.iter().any(|task| task == name)
}

fn check_names<'a>(tasks: &[String], known: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
    match tasks.iter().find(|task| !known.clone().any(|name| name == **task)) {
        Some(task) => {
            let known: Vec<&str> = known.collect();
            let expected = known.join(", ");
            Err(format!("longbench: unknown task {task:?}, expected one of {expected}").into())
        }
        None => Ok(()),
    }
}

type ChoiceTask = (&'static str, multiple_choice::Difficulty, multiple_choice::Prompting);

fn choice_task(name: &str) -> Result<ChoiceTask> {
    let task = multiple_choice::TASKS.iter().find(|(known, ..)| *known == name);
    task.copied().ok_or_else(|| format!("longbench: unknown task {name:?} of v2").into())
}

/// The file of v2 that `data` is or holds.
fn choices_file(data: &Path) -> PathBuf {
    if !data.is_dir() {
        return data.to_owned();
    }
    let lines = data.join("data.jsonl");
    if lines.exists() { lines } else { data.join("data.json") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tempfile::TempDir;

    fn v1_record(length: usize) -> Value {
        json!({
            "input": "Who?", "context": "Text.", "answers": ["Ada", "A. L."], "length": length, "dataset": "qasper",
            "language": "en", "all_classes": null, "_id": "0",
        })
    }

    fn v2_record(difficulty: &str, length: &str) -> Value {
        json!({
            "_id": "0", "domain": "d", "sub_domain": "s", "difficulty": difficulty, "length": length, "answer": "B",
            "question": "Which?", "choice_A": "a", "choice_B": "b", "choice_C": "c", "choice_D": "d", "context": "Text.",
        })
    }

    fn lines(records: &[Value]) -> String {
        records.iter().map(|record| format!("{record}\n")).collect()
    }

    /// Opens a folder with one file.
    fn open(
        file: &str,
        text: &str,
        version: Version,
        tasks: &[&str],
        limit: Option<usize>,
    ) -> (TempDir, Result<LongBench>) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(file), text).unwrap();
        let tasks = tasks.iter().map(|task| task.to_string()).collect();
        let config = Config { data: folder.path().to_owned(), version, tasks, limit };
        (folder, LongBench::open(config))
    }

    fn cells(bench: &LongBench) -> Vec<(String, String, usize)> {
        bench.cells().into_iter().map(|cell| (cell.task, cell.group, cell.index)).collect()
    }

    fn cell(task: &str, group: &str, index: usize) -> (String, String, usize) {
        (task.to_owned(), group.to_owned(), index)
    }

    #[test]
    fn samples_of_v1_are_the_lines_of_their_file() {
        let text = lines(&[v1_record(5), v1_record(9000), v1_record(5)]);
        let (_folder, bench) = open("qasper.jsonl", &text, Version::V1, &["qasper"], Some(2));
        let bench = bench.unwrap();
        assert_eq!(bench.name(), "longbench");
        assert_eq!(cells(&bench), [cell("qasper", "all", 0), cell("qasper", "all", 1)]);
        let sample = bench.sample(&bench.cells()[1], &|text| Ok(text.len())).unwrap();
        assert_eq!(sample.references, ["Ada", "A. L."]);
        assert!(sample.context.ends_with("\n\nArticle: Text.\n\n") && sample.chat);
        assert!(sample.question.ends_with("\n\nQuestion: Who?\n\nAnswer:"));
        assert_eq!((sample.metric.score)("Ada", &sample.references, &sample.classes), 1.0);
    }

    #[test]
    fn samples_of_longbench_e_are_grouped_by_length() {
        let lengths = [3999, 4000, 3, 7999, 8000];
        let text = lines(&lengths.map(v1_record));
        let (_folder, bench) = open("qasper_e.jsonl", &text, Version::V1E, &["qasper"], Some(1));
        let bench = bench.unwrap();
        assert_eq!(bench.name(), "longbench_e");
        let expected =
            [cell("qasper", "0-4k", 0), cell("qasper", "4-8k", 1), cell("qasper", "8k+", 4)];
        assert_eq!(cells(&bench), expected);
    }

    #[test]
    fn samples_of_v2_are_grouped_by_difficulty_and_length() {
        let records = [
            v2_record("hard", "short"),
            v2_record("easy", "long"),
            v2_record("hard", "medium"),
            v2_record("easy", "long"),
        ];
        let array = serde_json::to_string_pretty(&records).unwrap();
        for (file, text) in [("data.json", array), ("data.jsonl", lines(&records))] {
            let (_folder, bench) = open(file, &text, Version::V2, &[], None);
            let bench = bench.unwrap();
            assert_eq!(bench.name(), "longbench_v2");
            let expected = [
                cell("v2_easy", "long", 1),
                cell("v2_easy", "long", 3),
                cell("v2_hard", "short", 0),
                cell("v2_hard", "medium", 2),
            ];
            assert_eq!(cells(&bench), expected);
            let sample = bench.sample(&bench.cells()[0], &|text| Ok(text.len())).unwrap();
            assert_eq!(
                (sample.metric.score)("The correct answer is (B).", &sample.references, &[]),
                1.0
            );
        }
    }

    #[test]
    fn only_tasks_with_reasoning_have_a_conclusion() {
        let text = lines(&[v2_record("easy", "short")]);
        let tasks = ["v2_easy_cot", "v2_easy_no_context"];
        let (_folder, bench) = open("data.jsonl", &text, Version::V2, &tasks, None);
        let bench = bench.unwrap();
        let [alone, reasoned] = &bench.cells()[..] else { panic!("{:?}", bench.cells()) };
        assert!(
            bench.conclusion(reasoned, "so b").unwrap().question.contains("step by step: so b\n")
        );
        let error = bench.conclusion(alone, "so b").unwrap_err().to_string();
        assert!(error.contains("expected a task with reasoning"), "{error}");
    }

    #[test]
    fn bad_data_is_named() {
        let good = v1_record(1);
        let mut incomplete = good.clone();
        incomplete.as_object_mut().unwrap().remove("context");
        let mut unanswered = v2_record("easy", "short");
        unanswered["answer"] = json!("E");
        let cases = [
            (
                "qasper.jsonl",
                format!("{good}\n{{\"input\": \n"),
                Version::V1,
                "qasper.jsonl: line 2: EOF",
            ),
            (
                "qasper.jsonl",
                lines(&[good.clone(), good.clone(), incomplete]),
                Version::V1,
                "qasper.jsonl: line 3: missing field `context`",
            ),
            ("other.jsonl", lines(&[good]), Version::V1, "open "),
            (
                "data.jsonl",
                lines(&[unanswered]),
                Version::V2,
                "data.jsonl: line 1: unknown variant `E`",
            ),
            ("other.json", String::new(), Version::V2, "data.json: "),
        ];
        for (file, text, version, expected) in cases {
            let tasks: &[&str] = if version == Version::V2 { &[] } else { &["qasper"] };
            let (_folder, bench) = open(file, &text, version, tasks, None);
            let error = bench.err().unwrap().to_string();
            assert!(error.starts_with("longbench: ") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn unknown_tasks_are_refused() {
        let cases = [(Version::V1, "v2_easy"), (Version::V1E, "musique"), (Version::V2, "qasper")];
        for (version, task) in cases {
            let (_folder, bench) = open("data.jsonl", "", version, &["nothing", task], None);
            let error = bench.err().unwrap().to_string();
            assert!(error.contains("unknown task \"nothing\", expected one of "), "{error}");
            let (_folder, bench) = open("data.jsonl", "", version, &[task], None);
            assert!(bench.err().unwrap().to_string().contains(task));
        }
    }
}

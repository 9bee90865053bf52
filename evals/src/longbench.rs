//! LongBench v1, LongBench-E and LongBench v2 from the official data files, with the official prompts and metrics.
//! Knows no model: a run asks for samples and scores answers.

mod chinese;
mod fuzz;
#[cfg(test)]
mod golden;
mod metric;
mod multiple_choice;
mod records;
mod rouge;
mod task;
#[cfg(test)]
mod tests;

use crate::job::Result;
use crate::sample::{Benchmark, Cell, Pool, Sample};
use multiple_choice::Prompting;
use records::{Place, Records};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Which of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
pub(crate) enum Version {
    /// LongBench v1.
    V1,
    /// LongBench-E: lengths spread evenly, reported by length.
    #[value(name = "e")]
    V1E,
    /// LongBench v2: multiple choice.
    V2,
}

/// What to run.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    /// Folder of the official files: `<task>.jsonl`, `<task>_e.jsonl`, or `data.json` or `data.jsonl` of v2, which may
    /// also be named itself.
    pub(crate) data: PathBuf,
    pub(crate) version: Version,
    /// If empty all whose file is there; for v2 those with the text and without reasoning.
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
    /// If a task is unknown, the file of one that is named is missing, a record is malformed or no sample is left.
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
        if opened.samples.is_empty() {
            let data = config.data.display();
            return Err(format!("longbench: no samples in {data}, expected at least one").into());
        }
        Ok(opened)
    }

    fn locate_tasks(&mut self, config: &Config) -> Result<()> {
        let has_lengths = config.version == Version::V1E;
        let tasks = || task::TASKS.iter().filter(|task| !has_lengths || task.has_lengths);
        check_names(&config.tasks, tasks().map(|task| task.name))?;
        for task in tasks().filter(|task| is_wanted(&config.tasks, task.name)) {
            let suffix = if has_lengths { "_e" } else { "" };
            let path = config.data.join(format!("{}{suffix}.jsonl", task.name));
            // A task that is named must be there; of the others who has some runs those.
            if config.tasks.is_empty() && !path.exists() {
                continue;
            }
            let records = Records::new(path);
            let group = |record: &task::Record| match has_lengths {
                true => length_group(record.length),
                false => "all",
            };
            let mut taken = Taken::new(config.limit);
            let mut index = 0;
            records.scan(|place, record: task::Record| {
                record.check(task)?;
                if taken.take(task.name, group(&record)) {
                    self.push(task.name, group(&record), index, place);
                }
                index += 1;
                // A file of one group is done when that is full.
                Ok(has_lengths || !taken.is_full(task.name, "all"))
            })?;
            self.files.push(records);
        }
        Ok(())
    }

    fn locate_choices(&mut self, config: &Config) -> Result<()> {
        let names = multiple_choice::TASKS.iter().map(|task| task.name);
        check_names(&config.tasks, names.clone())?;
        let is_asked = |task: &&multiple_choice::Task| match config.tasks.is_empty() {
            true => task.prompting == Prompting::ZeroShot,
            false => is_wanted(&config.tasks, task.name),
        };
        let tasks: Vec<_> = multiple_choice::TASKS.iter().filter(is_asked).collect();
        let records = Records::new(choices_file(&config.data));
        let mut taken = Taken::new(config.limit);
        let mut index = 0;
        records.scan(|place, record: multiple_choice::Record| {
            let group = record.length.name();
            for task in tasks.iter().filter(|task| task.difficulty == record.difficulty) {
                if taken.take(task.name, group) {
                    self.push(task.name, group, index, place);
                }
            }
            index += 1;
            Ok(true)
        })?;
        self.files.push(records);
        // The file mixes difficulties; a run and its table go task by task.
        self.samples.sort_by_key(|sample| names.clone().position(|name| name == sample.cell.task));
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

    fn files(&self) -> Vec<&Path> {
        self.files.iter().map(Records::path).collect()
    }

    fn pools(&self) -> Vec<Pool> {
        match self.version {
            Version::V1 | Version::V1E => Vec::new(),
            Version::V2 => multiple_choice::pools(),
        }
    }

    /// The prompt is whole, whatever its length: cutting it is the subject's, which knows its window.
    fn sample(&self, cell: &Cell, _: &dyn Fn(&str) -> Result<usize>) -> Result<Sample> {
        if self.version != Version::V2 {
            return self.prompts.sample(cell, self.record(cell)?);
        }
        let prompting = choice_task(&cell.task)?.prompting;
        Ok(multiple_choice::sample(cell, &self.record(cell)?, prompting))
    }

    /// A task with reasoning asks which letter follows from it.
    fn follow_up(&self, cell: &Cell, answer: &str) -> Result<Option<Sample>> {
        if self.version != Version::V2 || choice_task(&cell.task)?.prompting != Prompting::Cot {
            return Ok(None);
        }
        Ok(Some(multiple_choice::conclusion(cell, &self.record(cell)?, answer)))
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

fn choice_task(name: &str) -> Result<&'static multiple_choice::Task> {
    let task = multiple_choice::TASKS.iter().find(|task| task.name == name);
    task.ok_or_else(|| format!("longbench: unknown task {name:?} of v2").into())
}

/// The file of v2 that `data` is or holds.
fn choices_file(data: &Path) -> PathBuf {
    if !data.is_dir() {
        return data.to_owned();
    }
    let lines = data.join("data.jsonl");
    if lines.exists() { lines } else { data.join("data.json") }
}

//! The lines of a run: one JSON object a finished sample, or whatever a run is made of, appended as it ends.
//! Knows no benchmark and no table.

use crate::job::Result;
use crate::subject::Answer;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Name of the log in its folder.
pub(crate) const FILE: &str = "samples.jsonl";

/// Which sample of which subject.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Key {
    pub(crate) subject: String,
    pub(crate) task: String,
    pub(crate) group: String,
    pub(crate) index: usize,
}

/// A finished sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    #[serde(flatten)]
    pub(crate) key: Key,
    pub(crate) metric: String,
    /// In 0..=1.
    pub(crate) score: f64,
    /// Name and value of the same score computed another way, where published numbers use both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) also: Option<(String, f64)>,
    pub(crate) references: Vec<String>,
    /// Tokens of prompt and room for the answer as the benchmark counts them; 0 where it sets no length.
    pub(crate) tokens: usize,
    /// What was said before the answer, where a task takes two questions.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) reasoning: String,
    #[serde(flatten)]
    pub(crate) answer: Answer,
}

/// A sample that failed: it is tried again when the run goes on.
#[derive(Debug, Serialize)]
pub(crate) struct Failure {
    #[serde(flatten)]
    pub(crate) key: Key,
    pub(crate) error: String,
}

/// The log of a run that goes on; another process cannot open it meanwhile.
pub(crate) struct Log {
    path: PathBuf,
    file: Mutex<File>,
}

impl Drop for Log {
    /// Unlocks before the file closes: a process that this one is just starting holds a copy of the file until it runs
    /// its program, and the lock with it.
    fn drop(&mut self) {
        let file = self.file.get_mut().unwrap_or_else(PoisonError::into_inner);
        // A lock that is not given back now goes with the last copy.
        let _ = file.unlock();
    }
}

impl Log {
    /// Opens or creates the log `file` in `folder`, cuts off the half line that a killed run left, and reads the rest.
    ///
    /// # Errors
    /// If another run has it open, or a line within is damaged.
    pub(crate) fn open<R: DeserializeOwned>(folder: &Path, file: &str) -> Result<(Self, Vec<R>)> {
        let path = folder.join(file);
        let named = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|e| named(&e))?;
        file.try_lock().map_err(|e| named(&format!("another run has it open ({e})")))?;
        let text = std::fs::read(&path).map_err(|e| named(&e))?;
        let whole = whole_lines(&text);
        if whole.len() < text.len() {
            file.set_len(whole.len() as u64).map_err(|e| named(&e))?;
        }
        let records = parse(whole).map_err(|e| named(&e))?;
        Ok((Self { path, file: Mutex::new(file) }, records))
    }

    /// Appends one line, which is on the disk when this returns.
    pub(crate) fn append(&self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // Every line goes to the file whole or not at all, so that a worker's panic leaves nothing to repair.
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = file.write_all(&text).and_then(|()| file.sync_data());
        written.map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

/// The finished samples in the log of `folder`, sorted.
///
/// # Errors
/// If there is no log, or a line is damaged.
pub(crate) fn read(folder: &Path) -> Result<Vec<Record>> {
    let path = folder.join(FILE);
    let named = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let text = std::fs::read(&path).map_err(|e| named(&e))?;
    let mut records: Vec<Record> = parse(whole_lines(&text)).map_err(|e| named(&e))?;
    records.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(records)
}

/// `text` without a last line that has no end.
fn whole_lines(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    &text[..end]
}

/// What is finished among the lines of `text`.
fn parse<R: DeserializeOwned>(text: &[u8]) -> Result<Vec<R>> {
    let mut records = Vec::new();
    for (i, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if line.is_empty() {
            continue;
        }
        let named = |e| format!("line {}: {e}", i + 1);
        let value: serde_json::Value = serde_json::from_slice(line).map_err(named)?;
        if value.get("error").is_none() {
            records.push(serde_json::from_value(value).map_err(named)?);
        }
    }
    Ok(records)
}

//! log.jsonl: one line a step.
//! Knows no model; a line that a kill cut off is left out, and steps that are done again are written again.

use super::held_out::Evaluation;
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What one optimizer step did; a line of log.jsonl.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepReport {
    /// From 1.
    pub step: u64,
    /// Mean over the step's tokens before the update, in nats; mixed with the divergence if the run distils.
    pub loss: f64,
    /// Of this step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Tokens of the step, over all processes.
    pub tokens: usize,
    /// Time of the step, its checkpoint and measurement not included.
    pub seconds: f64,
    /// Held-out loss after the step, where it was measured.
    pub held_out: Option<Evaluation>,
}

/// The steps of a run's log.jsonl; a last line that a kill cut off is left out.
///
/// # Errors
/// `NotFound` or `Storage` if it cannot be read.
pub fn read_log(path: &Path) -> Result<Vec<StepReport>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("read log", path, e))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

fn path_in(output: &Path) -> PathBuf {
    output.join("log.jsonl")
}

/// Adds a line to the log of the run in `output`.
pub(super) fn append(output: &Path, report: &StepReport) -> Result<()> {
    let path = path_in(output);
    let line = serde_json::to_string(report)
        .map_err(|e| Error::new(ErrorKind::Storage, format!("log: {e}")).with_source(e))?;
    std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{line}"))
        .map_err(|e| Error::io("write log", &path, e))
}

/// Removes the lines after `step`, which will be done again.
pub(super) fn cut(output: &Path, step: u64) -> Result<()> {
    let path = path_in(output);
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read log", &path, e))?;
    // The lines as they are: reading a number and writing it again may change its last digit.
    let kept: String = text
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .filter(|line| {
            serde_json::from_str::<StepReport>(line).is_ok_and(|report| report.step <= step)
        })
        .collect();
    let partial = path.with_extension("partial");
    std::fs::write(&partial, kept)
        .and_then(|()| std::fs::rename(&partial, &path))
        .map_err(|e| Error::io("write log", &path, e))
}

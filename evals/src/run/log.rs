//! The lines of a run: one JSON object a finished sample, or whatever a run is made of, appended as it ends.
//! Knows no benchmark and no table.

use crate::job::Result;
use crate::subject::Answer;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
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
    lines: Mutex<Lines<File>>,
}

impl Drop for Log {
    /// Unlocks before the file closes: a process that this one is just starting holds a copy of the file until it runs
    /// its program, and the lock with it.
    fn drop(&mut self) {
        let lines = self.lines.get_mut().unwrap_or_else(PoisonError::into_inner);
        // A lock that is not given back now goes with the last copy.
        let _ = lines.file.unlock();
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
        let lines = Lines { file, whole_bytes: whole.len() as u64, is_torn: false };
        Ok((Self { path, lines: Mutex::new(lines) }, records))
    }

    /// Appends one line, which is on the disk when this returns.
    pub(crate) fn append(&self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // Every line goes to the file whole or not at all, so that a worker's panic leaves nothing to repair.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.append(&text).map_err(|e| format!("{}: {e}", self.path.display()).into())
    }
}

/// What lines are appended to.
trait Tail: Write {
    /// Waits until what was written is on the disk.
    fn sync(&mut self) -> io::Result<()>;

    /// Leaves the first `len` bytes.
    fn cut(&mut self, len: u64) -> io::Result<()>;
}

impl Tail for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn cut(&mut self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

/// A file of whole lines, open at its end.
struct Lines<F> {
    file: F,
    /// Length of the lines that were appended whole.
    whole_bytes: u64,
    /// Whether more may stand there: the next line would go on in it.
    is_torn: bool,
}

impl<F: Tail> Lines<F> {
    /// # Errors
    /// If `line` is not on the disk; of it nothing stays in the file then, or nothing is appended before that is cut off.
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.file.cut(self.whole_bytes)?;
            self.is_torn = false;
        }
        let written = self.file.write_all(line).and_then(|()| self.file.sync());
        match &written {
            Ok(()) => self.whole_bytes += line.len() as u64,
            Err(_) => self.is_torn = self.file.cut(self.whole_bytes).is_err(),
        }
        written
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with room for so many bytes, of which a line that is too long takes what is left.
    struct Disk {
        bytes: Vec<u8>,
        room: usize,
        can_cut: bool,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room - self.bytes.len());
            self.bytes.extend(&bytes[..taken]);
            if taken == 0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Tail for Disk {
        fn sync(&mut self) -> io::Result<()> {
            Ok(())
        }

        fn cut(&mut self, len: u64) -> io::Result<()> {
            if !self.can_cut {
                return Err(io::ErrorKind::Other.into());
            }
            self.bytes.truncate(len as usize);
            Ok(())
        }
    }

    #[test]
    fn a_line_that_has_no_room_leaves_nothing_behind() {
        let file = Disk { bytes: Vec::new(), room: 10, can_cut: true };
        let mut lines = Lines { file, whole_bytes: 0, is_torn: false };
        lines.append(b"first\n").unwrap();
        lines.append(b"second\n").unwrap_err();
        assert_eq!(lines.file.bytes, b"first\n");
        lines.append(b"abc\n").unwrap();
        assert_eq!(lines.file.bytes, b"first\nabc\n");
    }

    #[test]
    fn half_a_line_that_cannot_be_cut_off_yet_is_cut_off_before_the_next() {
        let file = Disk { bytes: Vec::new(), room: 10, can_cut: false };
        let mut lines = Lines { file, whole_bytes: 0, is_torn: false };
        lines.append(b"first\n").unwrap();
        lines.append(b"second\n").unwrap_err();
        lines.file.room = 20;
        lines.append(b"third\n").unwrap_err();
        assert_eq!(lines.file.bytes, b"first\nseco");
        lines.file.can_cut = true;
        lines.append(b"third\n").unwrap();
        assert_eq!(lines.file.bytes, b"first\nthird\n");
    }
}

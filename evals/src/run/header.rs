//! The birth certificate of a run: what it measures, and every start with revision, machine and command line.
//! Knows no sample.

use crate::job::{self, Result};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

const FILE: &str = "run.json";

/// Enters a start into the `run.json` of `folder` and returns the revisions of all starts, each once.
///
/// # Errors
/// If the folder holds a run that measures something else: the error shows what differs.
pub(super) fn enter(
    folder: &Path,
    benchmark: &str,
    header: &Value,
    start: Value,
) -> Result<Vec<String>> {
    let path = folder.join(FILE);
    let named = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    // Written and read again, so that a number is compared as it is stored.
    let header: Value = serde_json::from_str(&header.to_string())?;
    let mut run = match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|e| named(&e))?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            json!({ "benchmark": benchmark, "header": header, "starts": [] })
        }
        Err(e) => return Err(named(&e).into()),
    };
    let mut differences = Vec::new();
    differ("benchmark", &run["benchmark"], &json!(benchmark), &mut differences);
    differ("header", &run["header"], &header, &mut differences);
    if !differences.is_empty() {
        let differences = differences.join("; ");
        return Err(named(&format!("another run, expected the same: {differences}")).into());
    }
    let starts = run["starts"].as_array_mut().ok_or_else(|| named(&"starts, expected a list"))?;
    starts.push(start);
    let mut revisions: Vec<String> = Vec::new();
    for start in starts {
        let revision = start["revision"].as_str().unwrap_or("unknown");
        if !revisions.iter().any(|known| known == revision) {
            revisions.push(revision.to_owned());
        }
    }
    // A new file in place of the old one, so that a kill leaves one of them whole.
    let temporary = folder.join(format!("{FILE}.new"));
    std::fs::write(&temporary, serde_json::to_vec_pretty(&run)?)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .map_err(|e| named(&e))?;
    Ok(revisions)
}

/// Whether `folder` holds a run.
pub(super) fn exists(folder: &Path) -> bool {
    folder.join(FILE).exists()
}

/// What is written down of a start.
pub(super) fn start(limit: Option<usize>, jobs: usize) -> Value {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "revision": job::revision(),
        "date": date(seconds),
        "command_line": std::env::args().collect::<Vec<_>>(),
        "device": {
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
            "arch": std::env::consts::ARCH,
            "os": std::env::consts::OS,
        },
        "limit": limit,
        "jobs": jobs,
    })
}

/// Every leaf in which two values differ, as `path: old in the folder, new now`.
fn differ(path: &str, old: &Value, new: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(old), Value::Object(new)) = (old, new) {
        let added = new.keys().filter(|key| !old.contains_key(*key));
        for key in old.keys().chain(added) {
            let path = format!("{path}.{key}");
            let [old, new] = [old, new].map(|map| map.get(key).unwrap_or(&Value::Null));
            differ(&path, old, new, differences);
        }
    } else if old != new {
        differences.push(format!("{path}: {old} in the folder, {new} now"));
    }
}

/// Seconds since 1970 as date and time in UTC.
///
/// Source: H. Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`: years begin in March, so that
/// a leap day is a year's last.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn another_run_in_the_folder_is_an_error_that_shows_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let header =
            json!({ "config": { "window": 2048, "depths": [0.1, 12.3] }, "model": "tiny" });
        let enter = |benchmark, header: &Value, revision| {
            enter(folder.path(), benchmark, header, json!({ "revision": revision }))
        };
        assert_eq!(enter("ruler", &header, "a").unwrap(), ["a"]);
        assert_eq!(enter("ruler", &header, "b").unwrap(), ["a", "b"]);
        assert_eq!(enter("ruler", &header, "a").unwrap(), ["a", "b"]);
        let other = json!({ "config": { "window": 4096, "depths": [0.1, 12.3], "seed": 1 }, "model": "tiny" });
        let error = enter("ruler", &other, "a").unwrap_err().to_string();
        assert!(error.contains("header.config.window: 2048 in the folder, 4096 now"), "{error}");
        assert!(error.contains("header.config.seed: null in the folder, 1 now"), "{error}");
        assert!(!error.contains("model") && !error.contains("depths"), "{error}");
        assert!(enter("longbench", &header, "a").unwrap_err().to_string().contains("longbench"));
    }
}

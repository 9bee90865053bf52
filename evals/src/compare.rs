//! Two subjects sample by sample: how much better one is than the other, and how sure that is.
//! Knows only the logs of runs.
//!
//! Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13: the percentile interval, over
//! pairs.

use crate::job::Result;
use crate::run::log::{self, Record};
use crate::run::summary::{Group, Mean};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Args {
    /// Folder of a run.
    a: PathBuf,
    /// Folder of another run; none: the same.
    b: Option<PathBuf>,
    /// Subject of A; needed where its run has several.
    #[arg(long)]
    subject_a: Option<String>,
    /// Subject of B; needed where its run has several.
    #[arg(long)]
    subject_b: Option<String>,
    /// Times that the pairs are drawn anew for the interval.
    #[arg(long, default_value_t = 10_000)]
    resamples: usize,
    /// Seed of the draws.
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Mismatches that are named one by one.
const MOST_NAMED: usize = 5;

type Cell<'a> = (&'a str, &'a str, usize);

pub(crate) fn run(args: &Args) -> Result<()> {
    print!("{}", compare(args)?);
    Ok(())
}

fn compare(args: &Args) -> Result<String> {
    if args.resamples == 0 {
        return Err("compare: resamples 0, expected at least 1".into());
    }
    let folder_b = args.b.as_ref().unwrap_or(&args.a);
    let (a, b) = (log::read(&args.a)?, log::read(folder_b)?);
    let (name_a, a) = choose(&args.a, &a, "--subject-a", args.subject_a.as_deref())?;
    let (name_b, b) = choose(folder_b, &b, "--subject-b", args.subject_b.as_deref())?;
    let pairs = Pairs::new(&a, &b);
    let mut text =
        format!("A: {name_a} of {}\nB: {name_b} of {}\n\n", args.a.display(), folder_b.display());
    text.push_str(&pairs.table(args));
    // Writing to a String cannot fail.
    let _ =
        writeln!(text, "\nWithout a pair: {} samples of A, {} of B.", pairs.only_a, pairs.only_b);
    if !pairs.unlike.is_empty() {
        let named = pairs.unlike.iter().take(MOST_NAMED);
        let named: Vec<_> = named.map(|(task, group, i)| format!("{task} {group} #{i}")).collect();
        let more = if pairs.unlike.len() > MOST_NAMED { ", ..." } else { "" };
        let _ = writeln!(
            text,
            "Left out, for A and B had different prompts or metrics: {} samples ({}{more}).",
            pairs.unlike.len(),
            named.join(", ")
        );
    }
    Ok(text)
}

/// The records of the one subject that is meant, by cell.
fn choose<'a>(
    folder: &Path,
    records: &'a [Record],
    flag: &str,
    wanted: Option<&str>,
) -> Result<(&'a str, BTreeMap<Cell<'a>, &'a Record>)> {
    let subjects: BTreeSet<&str> = records.iter().map(|r| r.key.subject.as_str()).collect();
    let mut candidates = subjects.iter().filter(|subject| wanted.is_none_or(|w| w == **subject));
    let (Some(name), None) = (candidates.next(), candidates.next()) else {
        let names: Vec<_> = subjects.into_iter().collect();
        let names = names.join(", ");
        let given = wanted.map_or("no subject given".to_owned(), |wanted| format!("no {wanted:?}"));
        return Err(
            format!("{}: {given}, expected {flag} with one of: {names}", folder.display()).into()
        );
    };
    let records = records.iter().filter(|record| record.key.subject == *name);
    let by_cell = records.map(|r| ((r.key.task.as_str(), r.key.group.as_str(), r.key.index), r));
    Ok((name, by_cell.collect()))
}

/// The scores of two subjects for the same cells and prompts.
#[derive(Debug, Default)]
struct Pairs<'a> {
    /// By task and group; in 0..=1.
    rows: BTreeMap<(&'a str, Group), Vec<(f64, f64)>>,
    only_a: usize,
    only_b: usize,
    /// Cells that were not the same question to both.
    unlike: Vec<Cell<'a>>,
}

impl<'a> Pairs<'a> {
    fn new(a: &BTreeMap<Cell<'a>, &'a Record>, b: &BTreeMap<Cell<'a>, &'a Record>) -> Self {
        let mut pairs = Self {
            only_b: b.keys().filter(|cell| !a.contains_key(*cell)).count(),
            ..Self::default()
        };
        for (cell, a) in a {
            let Some(b) = b.get(cell) else {
                pairs.only_a += 1;
                continue;
            };
            if a.answer.prompt_hash != b.answer.prompt_hash || a.metric != b.metric {
                pairs.unlike.push(*cell);
                continue;
            }
            let row = pairs.rows.entry((cell.0, Group::new(cell.1))).or_default();
            row.push((a.score, b.score));
        }
        pairs
    }

    fn table(&self, args: &Args) -> String {
        let mut text = String::from(
            "| task | group | n | mean A | mean B | B - A | 95 % interval |\n|---|---|---|---|---|---|---|\n",
        );
        let mut line = |task: &str, group: &str, pairs: &[(f64, f64)]| {
            let (mut a, mut b) = (Mean::default(), Mean::default());
            for pair in pairs {
                a.add(pair.0 * 100.0);
                b.add(pair.1 * 100.0);
            }
            if let (Some(a), Some(b)) = (a.value(), b.value()) {
                let (low, high) = interval(pairs, args.resamples, args.seed);
                let _ = writeln!(
                    text,
                    "| {task} | {group} | {} | {a:.1} | {b:.1} | {:+.1} | {low:+.1} to {high:+.1} |",
                    pairs.len(),
                    b - a,
                );
            }
        };
        for ((task, group), pairs) in &self.rows {
            line(task, &group.to_string(), pairs);
        }
        line("all", "all", &self.rows.values().flatten().copied().collect::<Vec<_>>());
        text
    }
}

/// Where 95 % of the mean differences B - A (x100) lie when as many pairs are drawn with putting back.
fn interval(pairs: &[(f64, f64)], resamples: usize, seed: u64) -> (f64, f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let differences: Vec<f64> = pairs.iter().map(|(a, b)| (b - a) * 100.0).collect();
    let n = differences.len();
    let mut means: Vec<f64> = (0..resamples)
        .map(|_| (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    // The same count is left out below and above.
    let out = (resamples as f64 * 0.025).floor() as usize;
    (means[out], means[resamples - 1 - out])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::log::Key;
    use crate::subject::Answer;

    fn record(subject: &str, group: &str, index: usize, score: f64) -> Record {
        Record {
            key: Key { subject: subject.into(), task: "task".into(), group: group.into(), index },
            metric: "match".into(),
            score,
            also: None,
            references: vec!["yes".into()],
            tokens: 0,
            reasoning: String::new(),
            answer: Answer { prompt_hash: format!("{group}-{index}"), ..Answer::default() },
        }
    }

    fn write(folder: &Path, records: &[Record]) {
        let lines: Vec<_> =
            records.iter().map(|r| serde_json::to_string(r).unwrap() + "\n").collect();
        std::fs::write(folder.join(log::FILE), lines.concat()).unwrap();
    }

    fn args(a: &Path, b: Option<&Path>, subjects: [Option<&str>; 2]) -> Args {
        let [subject_a, subject_b] = subjects.map(|subject| subject.map(str::to_owned));
        Args {
            a: a.into(),
            b: b.map(Into::into),
            subject_a,
            subject_b,
            resamples: 10_000,
            seed: 42,
        }
    }

    #[test]
    fn means_and_differences_are_those_done_by_hand() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Vec::new();
        for (index, (a, b)) in
            [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 0.0)].into_iter().enumerate()
        {
            records.push(record("old", "4096", index, a));
            records.push(record("new", "4096", index, b));
        }
        // Every pair differs by the same, so that the interval is that number.
        for index in 0..3 {
            records.push(record("old", "131072", index, 0.25));
            records.push(record("new", "131072", index, 0.5));
        }
        write(folder.path(), &records);
        let text = compare(&args(folder.path(), None, [Some("old"), Some("new")])).unwrap();
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| ")).collect();
        // Means of 4: (0 + 50 + 100 + 50) / 4 = 50 and 300 / 4 = 75. All 7: (200 + 75) / 7 = 39.3, (300 + 150) / 7 = 64.3.
        assert!(rows[1].starts_with("| task | 4096 | 4 | 50.0 | 75.0 | +25.0 | "), "{text}");
        assert_eq!(rows[2], "| task | 131072 | 3 | 25.0 | 50.0 | +25.0 | +25.0 to +25.0 |");
        assert!(rows[3].starts_with("| all | all | 7 | 39.3 | 64.3 | +25.0 | "), "{text}");
        assert!(
            text.contains("Without a pair: 0 samples of A, 0 of B.") && !text.contains("Left out")
        );
        assert_eq!(text, compare(&args(folder.path(), None, [Some("old"), Some("new")])).unwrap());
    }

    #[test]
    fn the_interval_is_that_of_the_binomial_where_differences_are_0_or_1() {
        // The mean of n draws that are 1 with p = 0.5: by the binomial distribution of n = 100, 95 % lie in 40..=60.
        let pairs: Vec<_> = (0..100).map(|i| (0.0, f64::from(i % 2))).collect();
        assert_eq!(interval(&pairs, 10_000, 42), (40.0, 60.0));
        let one = [(1.0, 0.0)];
        assert_eq!(interval(&one, 1, 0), (-100.0, -100.0));
    }

    #[test]
    fn samples_without_a_pair_or_with_another_prompt_are_told() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(a.path(), &[0, 1, 2, 3].map(|i| record("mka", "4096", i, 1.0)));
        let mut other = [1, 2, 3, 4, 5].map(|i| record("mka", "4096", i, 0.0));
        other[0].answer.prompt_hash = "another".into();
        other[1].metric = "another".into();
        write(b.path(), &other);
        let text = compare(&args(a.path(), Some(b.path()), [None, None])).unwrap();
        assert!(
            text.contains("| task | 4096 | 1 | 100.0 | 0.0 | -100.0 | -100.0 to -100.0 |"),
            "{text}"
        );
        assert!(text.contains("Without a pair: 1 samples of A, 2 of B."), "{text}");
        assert!(text.contains("metrics: 2 samples (task 4096 #1, task 4096 #2)."), "{text}");
    }

    #[test]
    fn a_subject_that_is_not_clear_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &[record("mka", "all", 0, 1.0), record("full", "all", 0, 1.0)]);
        for (subjects, expected) in [
            ([None, None], "no subject given, expected --subject-a with one of: full, mka"),
            (
                [Some("mka"), Some("streaming")],
                "no \"streaming\", expected --subject-b with one of: full, mka",
            ),
        ] {
            let error = compare(&args(folder.path(), None, subjects)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let nowhere = folder.path().join("nowhere");
        let error = compare(&args(&nowhere, None, [None, None])).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
    }
}

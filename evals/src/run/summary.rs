//! Means of a run by task, group and subject, and the tables that show them.
//! Knows only what the log holds, in sorted order: a run that was killed and went on has the same summary.

use super::log::Record;
use crate::sample::Pool;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// A column of the benchmark: lengths in the order of numbers, before names in that of letters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group(String);

impl Group {
    pub(crate) fn new(name: &str) -> Self {
        Self(name.to_owned())
    }

    /// Tokens, where the group is a length.
    pub(crate) fn length(&self) -> Option<u64> {
        self.0.parse().ok()
    }
}

impl Ord for Group {
    fn cmp(&self, other: &Self) -> Ordering {
        let length = |group: &Self| group.length().unwrap_or(u64::MAX);
        length(self).cmp(&length(other)).then_with(|| self.0.cmp(&other.0))
    }
}

impl PartialOrd for Group {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl std::fmt::Display for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A mean of the values that are known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mean {
    sum: f64,
    pub(crate) count: usize,
}

impl Mean {
    pub(crate) fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    /// Adds a measurement, for which 0 means that it was not made.
    fn add_measured(&mut self, value: f64) {
        if value > 0.0 {
            self.add(value);
        }
    }

    pub(crate) fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }

    fn show(&self, decimals: usize) -> String {
        self.value().map_or("-".into(), |value| format!("{value:.decimals$}"))
    }
}

/// What the samples of one subject and group took.
#[derive(Debug, Default)]
pub(super) struct Cost {
    samples: usize,
    feed_s: Mean,
    first_token_s: Mean,
    decode_tokens_per_s: Mean,
    pub(super) decode_ms: Mean,
    recalled_tokens: Mean,
    pub(super) peak_mib: Mean,
}

impl Cost {
    fn add(&mut self, record: &Record) {
        let answer = &record.answer;
        self.samples += 1;
        self.feed_s.add(answer.feed_s);
        self.first_token_s.add_measured(answer.first_token_s);
        self.decode_tokens_per_s.add_measured(answer.decode_tokens_per_s);
        self.decode_ms.add_measured(match answer.decode_tokens_per_s {
            speed if speed > 0.0 => 1000.0 / speed,
            _ => 0.0,
        });
        self.recalled_tokens.add(answer.recalled_tokens as f64);
        self.peak_mib.add_measured(answer.peak_rss_bytes as f64 / f64::from(1 << 20));
    }
}

/// The means of a run.
pub(super) struct Summary {
    pub(super) subjects: BTreeSet<String>,
    /// By task and group, then subject; in 0..=1.
    scores: BTreeMap<(String, Group), BTreeMap<String, Mean>>,
    /// The same for scores computed another way, with their name behind the task's.
    also: BTreeMap<(String, Group), BTreeMap<String, Mean>>,
    /// By group, then subject: over the means of the tasks; empty where samples are pooled.
    pub(super) averages: BTreeMap<Group, BTreeMap<String, Mean>>,
    /// Means over samples by subject, in the order of the benchmark's pools.
    pooled: Vec<(Pool, BTreeMap<String, Mean>)>,
    /// By subject and group.
    pub(super) costs: BTreeMap<(String, Group), Cost>,
}

impl Summary {
    /// `records` in sorted order, so that sums are rounded the same way every time; `pools` of the benchmark, in the place of
    /// averages over tasks.
    pub(super) fn new(records: &[Record], pools: Vec<Pool>) -> Self {
        let is_averaged = pools.is_empty();
        let mut summary = Self {
            subjects: BTreeSet::new(),
            scores: BTreeMap::new(),
            also: BTreeMap::new(),
            averages: BTreeMap::new(),
            pooled: pools.into_iter().map(|pool| (pool, BTreeMap::new())).collect(),
            costs: BTreeMap::new(),
        };
        for record in records {
            let (subject, group) = (record.key.subject.clone(), Group::new(&record.key.group));
            let row = summary.scores.entry((record.key.task.clone(), group.clone())).or_default();
            row.entry(subject.clone()).or_default().add(record.score);
            if let Some((name, score)) = &record.also {
                let task = format!("{}, {name}", record.key.task);
                let row = summary.also.entry((task, group.clone())).or_default();
                row.entry(subject.clone()).or_default().add(*score);
            }
            let key = &record.key;
            for (pool, row) in &mut summary.pooled {
                if pool.holds(&key.task, &key.group) {
                    row.entry(subject.clone()).or_default().add(record.score);
                }
            }
            summary.costs.entry((subject.clone(), group)).or_default().add(record);
            summary.subjects.insert(subject);
        }
        summary.pooled.retain(|(_, row)| !row.is_empty());
        for ((_, group), row) in summary.scores.iter().filter(|_| is_averaged) {
            let averages = summary.averages.entry(group.clone()).or_default();
            for (subject, mean) in row {
                if let Some(mean) = mean.value() {
                    averages.entry(subject.clone()).or_default().add(mean);
                }
            }
        }
        summary
    }

    /// The longest length at which the average of `subject` is at least `threshold` (x100).
    fn effective_length(&self, subject: &str, threshold: f64) -> Option<u64> {
        let reaches = |row: &BTreeMap<String, Mean>| {
            row.get(subject).and_then(Mean::value).is_some_and(|mean| mean * 100.0 >= threshold)
        };
        let lengths = self.averages.iter().filter(|(_, row)| reaches(row));
        lengths.filter_map(|(group, _)| group.length()).max()
    }

    /// All tables as Markdown.
    pub(super) fn render(
        &self,
        benchmark: &str,
        revisions: &[String],
        threshold: Option<f64>,
    ) -> String {
        let samples: usize = self.costs.values().map(|cost| cost.samples).sum();
        let mut text =
            format!("# {benchmark}\n\nRevision {}, {samples} samples.\n", revisions.join(", "));
        // Writing to a String cannot fail.
        let _ =
            writeln!(text, "\n## Mean score x100 (samples)\n\n| task | group |{}", self.header());
        for ((task, group), row) in self.scores.iter().chain(&self.also) {
            let _ = writeln!(text, "| {task} | {group} |{}", self.row(row));
        }
        if !self.averages.is_empty() {
            let _ = writeln!(
                text,
                "\n## Average over tasks x100 (tasks)\n\n| average | group |{}",
                self.header()
            );
        }
        for (group, row) in &self.averages {
            let _ = writeln!(text, "| average | {group} |{}", self.row(row));
        }
        if !self.pooled.is_empty() {
            let _ = writeln!(
                text,
                "\n## Mean over samples x100 (samples)\n\n| asked | samples |{}",
                self.header()
            );
        }
        for (Pool { names: [asked, column], .. }, row) in &self.pooled {
            let _ = writeln!(text, "| {asked} | {column} |{}", self.row(row));
        }
        if let Some(threshold) = threshold {
            let _ = writeln!(
                text,
                "\n## Effective length: the longest whose average is at least {threshold}\n"
            );
            text.push_str("| subject | tokens |\n|---|---|\n");
            for subject in &self.subjects {
                let length = self.effective_length(subject, threshold);
                let length = length.map_or("-".into(), |length| length.to_string());
                let _ = writeln!(text, "| {subject} | {length} |");
            }
        }
        text.push_str(
            "\n## Mean cost of a sample\n\n\
             | subject | group | samples | feed s | first token s | decode tok/s | recalled tokens | peak MiB |\n\
             |---|---|---|---|---|---|---|---|\n",
        );
        for ((subject, group), cost) in &self.costs {
            let _ = writeln!(
                text,
                "| {subject} | {group} | {} | {} | {} | {} | {} | {} |",
                cost.samples,
                cost.feed_s.show(2),
                cost.first_token_s.show(2),
                cost.decode_tokens_per_s.show(1),
                cost.recalled_tokens.show(0),
                cost.peak_mib.show(0),
            );
        }
        text
    }

    /// The subjects as column heads, and the line below them with two columns before.
    fn header(&self) -> String {
        let heads: String = self.subjects.iter().map(|subject| format!(" {subject} |")).collect();
        format!("{heads}\n|---|---|{}", "---|".repeat(self.subjects.len()))
    }

    fn row(&self, row: &BTreeMap<String, Mean>) -> String {
        let cell =
            |subject: &String| match row.get(subject).and_then(|m| Some((m.value()?, m.count))) {
                Some((mean, count)) => format!(" {:.1} ({count}) |", mean * 100.0),
                None => " - |".to_owned(),
            };
        self.subjects.iter().map(cell).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::log::Key;
    use super::*;
    use crate::subject::Answer;

    #[test]
    fn pooled_samples_weigh_alike_whatever_their_task() {
        let record = |task: &str, index, score| Record {
            key: Key { subject: "full".into(), task: task.into(), group: "short".into(), index },
            metric: "accuracy".into(),
            score,
            also: None,
            references: vec!["A".into()],
            tokens: 0,
            reasoning: String::new(),
            answer: Answer::default(),
        };
        let mut records = vec![record("v2_easy", 0, 1.0)];
        records.extend((1..4).map(|index| record("v2_hard", index, 0.0)));
        let pool = |column, tasks: &'static [&'static str], group| Pool {
            names: ["zero-shot", column],
            tasks,
            group,
        };
        let pools = vec![
            pool("overall", &["v2_easy", "v2_hard"], None),
            pool("hard", &["v2_hard"], None),
            pool("short", &["v2_easy", "v2_hard"], Some("short")),
            pool("long", &["v2_easy", "v2_hard"], Some("long")),
        ];
        let table = Summary::new(&records, pools).render("longbench_v2", &[], None);
        for line in [
            "## Mean over samples x100 (samples)",
            "| zero-shot | overall | 25.0 (4) |",
            "| zero-shot | hard | 0.0 (3) |",
            "| zero-shot | short | 25.0 (4) |",
            "| v2_easy | short | 100.0 (1) |",
        ] {
            assert!(table.lines().any(|l| l == line), "{line} in\n{table}");
        }
        assert!(!table.contains("average") && !table.contains("| zero-shot | long |"), "{table}");
        // Without pools it is the mean of the means of the tasks.
        let table = Summary::new(&records, Vec::new()).render("longbench_v2", &[], None);
        assert!(table.contains("| average | short | 50.0 (2) |"), "{table}");
    }

    #[test]
    fn lengths_stand_in_the_order_of_numbers_before_names() {
        let mut groups = ["all", "131072", "4096", "8k+", "16384"].map(Group::new);
        groups.sort();
        assert_eq!(groups.map(|group| group.0), ["4096", "16384", "131072", "8k+", "all"]);
    }
}

//! The 21 tasks of LongBench v1: prompts, answer lengths and metrics as the official configuration sets them.
//! Knows no file and no model.

use super::metric;
use crate::job::Result;
use crate::sample::{Cell, Metric, Sample};
use serde::Deserialize;
use std::collections::HashMap;

/// One task.
pub(super) struct Task {
    pub(super) name: &'static str,
    pub(super) metric: Metric,
    /// Whether LongBench-E has it.
    pub(super) has_lengths: bool,
}

/// A task that both sets have.
const fn both(name: &'static str, metric: Metric) -> Task {
    Task { name, metric, has_lengths: true }
}

/// A task that LongBench-E lacks.
const fn v1(name: &'static str, metric: Metric) -> Task {
    Task { name, metric, has_lengths: false }
}

/// In the official order.
pub(super) const TASKS: [Task; 21] = [
    v1("narrativeqa", metric::QA_F1),
    both("qasper", metric::QA_F1),
    both("multifieldqa_en", metric::QA_F1),
    v1("multifieldqa_zh", metric::QA_F1_ZH),
    both("hotpotqa", metric::QA_F1),
    both("2wikimqa", metric::QA_F1),
    v1("musique", metric::QA_F1),
    v1("dureader", metric::ROUGE_ZH),
    both("gov_report", metric::ROUGE),
    v1("qmsum", metric::ROUGE),
    both("multi_news", metric::ROUGE),
    v1("vcsum", metric::ROUGE_ZH),
    both("trec", metric::CLASSIFICATION_FIRST_LINE),
    both("triviaqa", metric::QA_F1_FIRST_LINE),
    both("samsum", metric::ROUGE_FIRST_LINE),
    v1("lsht", metric::CLASSIFICATION_FIRST_LINE),
    both("passage_count", metric::COUNT),
    both("passage_retrieval_en", metric::RETRIEVAL),
    v1("passage_retrieval_zh", metric::RETRIEVAL_ZH),
    both("lcc", metric::CODE_SIM),
    both("repobench-p", metric::CODE_SIM),
];

/// Tasks whose prompt is text to go on with: a chat template would hide that.
const WITHOUT_CHAT: [&str; 6] = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"];

/// One record of the official files.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    input: String,
    context: String,
    answers: Vec<String>,
    /// Words, or characters of a Chinese text.
    pub(super) length: usize,
    /// The labels of a classification; null elsewhere.
    all_classes: Option<Vec<String>>,
}

impl Record {
    /// Refuses a record that could only score 0 in `task`.
    pub(super) fn check(&self, task: &Task) -> Result<(), &'static str> {
        let has_classes = self.all_classes.as_ref().is_some_and(|classes| !classes.is_empty());
        if task.metric.name == metric::CLASSIFICATION.name && !has_classes {
            return Err("no `all_classes`, expected the labels of a classification");
        }
        if self.answers.is_empty() {
            return Err("no `answers`, expected at least one");
        }
        Ok(())
    }
}

/// The official configuration, by task.
pub(super) struct Prompts {
    templates: HashMap<String, String>,
    max_new_tokens: HashMap<String, usize>,
}

impl Prompts {
    /// # Errors
    /// If the files in the repository are no JSON.
    pub(super) fn load() -> Result<Self> {
        Ok(Self {
            templates: serde_json::from_str(include_str!(
                "../../data/longbench/dataset2prompt.json"
            ))?,
            max_new_tokens: serde_json::from_str(include_str!(
                "../../data/longbench/dataset2maxlen.json"
            ))?,
        })
    }

    /// The sample of `record` in the task that `cell` names.
    ///
    /// # Errors
    /// If there is no such task.
    pub(super) fn sample(&self, cell: &Cell, record: Record) -> Result<Sample> {
        let task = TASKS.iter().find(|task| task.name == cell.task);
        let template = self.templates.get(&cell.task);
        let max_new_tokens = self.max_new_tokens.get(&cell.task);
        let (Some(task), Some(template), Some(max_new_tokens)) = (task, template, max_new_tokens)
        else {
            return Err(format!("longbench: no task {:?} in the configuration", cell.task).into());
        };
        let (before, separator, after) = split(template);
        Ok(Sample {
            cell: cell.clone(),
            context: [before, &record.context, separator].concat(),
            question: after.replace("{input}", &record.input),
            answer_prefix: String::new(),
            references: record.answers,
            classes: record.all_classes.unwrap_or_default(),
            max_new_tokens: *max_new_tokens,
            // The model would go on with the next dialogue of the examples.
            stop: if task.name == "samsum" { vec!["\n".to_owned()] } else { Vec::new() },
            chat: !WITHOUT_CHAT.contains(&task.name),
            metric: task.metric,
            tokens: 0,
        })
    }
}

/// What stands before the context, the line breaks right after it, and the rest.
fn split(template: &str) -> (&str, &str, &str) {
    let (before, rest) = template.split_once("{context}").unwrap_or((template, ""));
    let after = rest.trim_start_matches('\n');
    (before, &rest[..rest.len() - after.len()], after)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(task: &str) -> Sample {
        let record = Record {
            input: "INPUT".to_owned(),
            context: "CONTEXT {input}".to_owned(),
            answers: vec!["yes".to_owned()],
            length: 7,
            all_classes: None,
        };
        let cell = Cell { task: task.to_owned(), group: "all".to_owned(), index: 0 };
        Prompts::load().unwrap().sample(&cell, record).unwrap()
    }

    #[test]
    fn context_and_question_are_the_official_prompt() {
        let prompts = Prompts::load().unwrap();
        assert_eq!(prompts.templates.len(), TASKS.len());
        for task in &TASKS {
            let template = &prompts.templates[task.name];
            let sample = sample(task.name);
            let prompt = sample.context + &sample.question;
            let official =
                template.replace("{input}", "INPUT").replace("{context}", "CONTEXT {input}");
            assert_eq!(prompt, official);
            assert!(!sample.question.is_empty() && !sample.question.starts_with('\n'));
            // Python's `format` would read any further brace.
            let plain = template.replace("{context}", "").replace("{input}", "");
            assert!(!plain.contains(['{', '}']), "{}", task.name);
        }
    }

    #[test]
    fn instructions_before_the_text_belong_to_the_context() {
        let cases = [
            ("qasper", "CONTEXT {input}\n\n", " Answer the question based on"),
            ("gov_report", "CONTEXT {input}\n\n", "Now, write a one-page summary"),
            ("trec", "CONTEXT {input}\n", "INPUT"),
            ("vcsum", "CONTEXT {input}\n\n", "会议总结："),
            ("lcc", "given below. \nCONTEXT {input}", "Next line of code:\n"),
            ("repobench-p", "CONTEXT {input}", "INPUTNext line of code:\n"),
        ];
        for (task, end, start) in cases {
            let sample = sample(task);
            assert!(sample.context.ends_with(end), "{}", sample.context);
            assert!(sample.question.starts_with(start), "{}", sample.question);
        }
    }

    #[test]
    fn six_tasks_are_continued_without_a_chat() {
        let without = TASKS.iter().filter(|task| !sample(task.name).chat).count();
        assert_eq!(without, WITHOUT_CHAT.len());
        assert_eq!(TASKS.iter().filter(|task| task.has_lengths).count(), 13);
        assert_eq!(sample("samsum").stop, ["\n"]);
        assert_eq!(sample("samsum").max_new_tokens, 128);
        assert_eq!(sample("gov_report").max_new_tokens, 512);
    }
}

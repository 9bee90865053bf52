//! LongBench v2: four choices about one text, the prompts around them and the letter in an answer.
//! Knows no file format and no model.

use super::metric::ACCURACY;
use super::rouge::is_space;
use crate::sample::{Cell, Pool, Sample};
use regex::Regex;
use serde::Deserialize;
use std::sync::LazyLock;

const ZERO_SHOT: &str = include_str!("../../data/longbench/0shot.txt");
const NO_CONTEXT: &str = include_str!("../../data/longbench/0shot_no_context.txt");
const COT: &str = include_str!("../../data/longbench/0shot_cot.txt");
const COT_ANSWER: &str = include_str!("../../data/longbench/0shot_cot_ans.txt");

/// What ends the text in the templates that have one: the question begins behind it.
const END_OF_TEXT: &str = "</text>\n\n";

const ANSWER_TOKENS: usize = 128;
const REASONING_TOKENS: usize = 1024;

/// How the question is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prompting {
    ZeroShot,
    /// Without the text: what the model knows already.
    NoContext,
    /// Reasoning first; [`conclusion`] asks for the letter afterwards.
    Cot,
}

/// A question about the records of one difficulty.
pub(super) struct Task {
    pub(super) name: &'static str,
    pub(super) difficulty: Difficulty,
    pub(super) prompting: Prompting,
}

const fn task(name: &'static str, difficulty: Difficulty, prompting: Prompting) -> Task {
    Task { name, difficulty, prompting }
}

/// Those with the text and without reasoning run if none is named.
pub(super) const TASKS: [Task; 6] = [
    task("v2_easy", Difficulty::Easy, Prompting::ZeroShot),
    task("v2_hard", Difficulty::Hard, Prompting::ZeroShot),
    task("v2_easy_no_context", Difficulty::Easy, Prompting::NoContext),
    task("v2_hard_no_context", Difficulty::Hard, Prompting::NoContext),
    task("v2_easy_cot", Difficulty::Easy, Prompting::Cot),
    task("v2_hard_cot", Difficulty::Hard, Prompting::Cot),
];

/// The columns of the official table, for each way to put the question.
///
/// Source: `result.py` of LongBench v2, which counts right answers among samples, whatever their task.
pub(super) fn pools() -> Vec<Pool> {
    static PROMPTINGS: [(&str, [&str; 2]); 3] = [
        ("zero-shot", ["v2_easy", "v2_hard"]),
        ("without the text", ["v2_easy_no_context", "v2_hard_no_context"]),
        ("with reasoning", ["v2_easy_cot", "v2_hard_cot"]),
    ];
    let of = |(name, tasks): &'static (&'static str, [&'static str; 2])| {
        let pool = |column, tasks: &'static [&'static str], group| Pool {
            names: [*name, column],
            tasks,
            group,
        };
        [
            pool("overall", &tasks[..], None),
            pool("easy", &tasks[..1], None),
            pool("hard", &tasks[1..], None),
            pool("short", &tasks[..], Some("short")),
            pool("medium", &tasks[..], Some("medium")),
            pool("long", &tasks[..], Some("long")),
        ]
    };
    PROMPTINGS.iter().flat_map(of).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Difficulty {
    Easy,
    Hard,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Length {
    Short,
    Medium,
    Long,
}

impl Length {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Short => "short",
            Self::Medium => "medium",
            Self::Long => "long",
        }
    }
}

/// The letter of the right choice.
#[derive(Debug, Clone, Copy, Deserialize)]
enum Letter {
    A,
    B,
    C,
    D,
}

/// One record of the official file.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    pub(super) difficulty: Difficulty,
    pub(super) length: Length,
    question: String,
    #[serde(rename = "choice_A")]
    choice_a: String,
    #[serde(rename = "choice_B")]
    choice_b: String,
    #[serde(rename = "choice_C")]
    choice_c: String,
    #[serde(rename = "choice_D")]
    choice_d: String,
    answer: Letter,
    context: String,
}

/// The sample of `record` under `prompting`.
pub(super) fn sample(cell: &Cell, record: &Record, prompting: Prompting) -> Sample {
    let (template, max_new_tokens) = match prompting {
        Prompting::ZeroShot => (ZERO_SHOT, ANSWER_TOKENS),
        Prompting::NoContext => (NO_CONTEXT, ANSWER_TOKENS),
        Prompting::Cot => (COT, REASONING_TOKENS),
    };
    fill(cell, record, template, "", max_new_tokens)
}

/// What asks for the letter after the model's `reasoning`; the text is left out of it.
pub(super) fn conclusion(cell: &Cell, record: &Record, reasoning: &str) -> Sample {
    fill(cell, record, COT_ANSWER, reasoning, ANSWER_TOKENS)
}

fn fill(
    cell: &Cell,
    record: &Record,
    template: &str,
    reasoning: &str,
    max_new_tokens: usize,
) -> Sample {
    let question_at = template.find(END_OF_TEXT).map_or(0, |at| at + END_OF_TEXT.len());
    let (context, question) = template.split_at(question_at);
    // One after the other, as the original does: a document that holds `$Q$` itself gets the question there.
    let fill = |part: &str| {
        let values = [
            ("$DOC$", &*record.context),
            ("$Q$", &record.question),
            ("$C_A$", &record.choice_a),
            ("$C_B$", &record.choice_b),
            ("$C_C$", &record.choice_c),
            ("$C_D$", &record.choice_d),
            ("$COT$", reasoning),
        ];
        values.iter().fold(part.to_owned(), |text, (name, value)| {
            text.replace(name, value.trim_matches(is_space))
        })
    };
    Sample {
        cell: cell.clone(),
        context: fill(context),
        question: fill(question),
        answer_prefix: String::new(),
        references: vec![format!("{:?}", record.answer)],
        classes: Vec::new(),
        max_new_tokens,
        stop: Vec::new(),
        chat: true,
        metric: ACCURACY,
        tokens: 0,
    }
}

static IN_PARENTHESES: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"The correct answer is \(([A-D])\)")
        .expect("the pattern is a constant that compiles")
});
static BARE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"The correct answer is ([A-D])").expect("the pattern is a constant that compiles")
});

/// The letter that the answer names, asterisks aside: in parentheses anywhere before a bare one.
pub(super) fn extract_answer(response: &str) -> Option<String> {
    let response = response.replace('*', "");
    let captures = IN_PARENTHESES.captures(&response).or_else(|| BARE.captures(&response))?;
    Some(captures[1].to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        serde_json::from_value(serde_json::json!({
            "difficulty": "easy", "length": "long", "question": " What? \n", "answer": "C", "context": "Once $Q$.\n\n",
            "choice_A": "one", "choice_B": " two", "choice_C": "three", "choice_D": "$C_A$",
        }))
        .unwrap()
    }

    fn cell() -> Cell {
        Cell { task: "v2_easy".to_owned(), group: "long".to_owned(), index: 0 }
    }

    #[test]
    fn context_ends_where_the_question_begins() {
        let sample = sample(&cell(), &record(), Prompting::ZeroShot);
        assert_eq!(
            sample.context,
            "Please read the following text and answer the question below.\n\n<text>\nOnce What?.\n</text>\n\n"
        );
        assert_eq!(
            sample.question,
            "What is the correct answer to this question: What?\nChoices:\n(A) one\n(B) two\n(C) three\n(D) $C_A$\n\n\
             Format your response as follows: \"The correct answer is (insert answer here)\"."
        );
        assert_eq!(sample.references, ["C"]);
    }

    #[test]
    fn prompts_without_the_text_are_all_question() {
        let alone = sample(&cell(), &record(), Prompting::NoContext);
        assert_eq!(alone.context, "");
        assert!(alone.question.starts_with("What is the correct answer to this question: What?\n"));
        let conclusion = conclusion(&cell(), &record(), " because \n");
        assert_eq!(conclusion.context, "");
        assert!(
            conclusion.question.contains("Let’s think step by step: because\n\nBased on the above")
        );
        assert_eq!(conclusion.max_new_tokens, 128);
        let reasoning = sample(&cell(), &record(), Prompting::Cot);
        assert!(reasoning.question.ends_with("Let’s think step by step:"));
        assert_eq!(reasoning.max_new_tokens, 1024);
    }

    #[test]
    fn every_task_is_in_the_pools_of_its_prompting() {
        let pools = pools();
        let named: Vec<_> = pools.iter().map(|pool| pool.names[1]).collect();
        assert_eq!(named[..6], ["overall", "easy", "hard", "short", "medium", "long"]);
        for task in &TASKS {
            let of = |group| {
                let pools = pools.iter().filter(|pool| pool.holds(task.name, group));
                pools.map(|pool| pool.names).collect::<Vec<_>>()
            };
            let prompting = match task.prompting {
                Prompting::ZeroShot => "zero-shot",
                Prompting::NoContext => "without the text",
                Prompting::Cot => "with reasoning",
            };
            let difficulty = match task.difficulty {
                Difficulty::Easy => "easy",
                Difficulty::Hard => "hard",
            };
            let expected = ["overall", difficulty, "medium"].map(|column| [prompting, column]);
            assert_eq!(of(Length::Medium.name()), expected);
        }
    }

    #[test]
    fn answers_in_parentheses_go_before_bare_ones() {
        let cases = [
            ("The correct answer is (B).", Some("B")),
            ("**The correct answer is (C)**", Some("C")),
            ("The correct answer is A, no: The correct answer is (D)", Some("D")),
            ("The correct answer is Amsterdam", Some("A")),
            ("the correct answer is (A)", None),
            ("The correct answer is (E)", None),
            ("", None),
        ];
        for (response, expected) in cases {
            assert_eq!(extract_answer(response).as_deref(), expected, "{response}");
        }
    }
}

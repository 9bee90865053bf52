//! The official metrics of LongBench, each as a [`Metric`] over all references.
//! Knows no data file and no prompt.

use super::fuzz::{difflib_percent, indel_percent};
use super::rouge::{is_space, rouge_l};
use super::{chinese, multiple_choice};
use crate::sample::Metric;
use regex::Regex;
use std::collections::HashMap;
use std::sync::LazyLock;

pub(crate) const QA_F1: Metric =
    Metric::new("qa_f1_score", |p, refs, _| best(refs, |r| qa_f1(p, r)));

pub(crate) const QA_F1_ZH: Metric =
    Metric::new("qa_f1_zh_score", |p, refs, _| best(refs, |r| qa_f1_zh(p, r)));

pub(crate) const ROUGE: Metric =
    Metric::new("rouge_score", |p, refs, _| best(refs, |r| rouge_l(p, r)));

pub(crate) const ROUGE_ZH: Metric =
    Metric::new("rouge_zh_score", |p, refs, _| best(refs, |r| rouge_zh(p, r)));

pub(crate) const CLASSIFICATION: Metric =
    Metric::new("classification_score", |p, refs, classes| {
        best(refs, |r| classification(p, r, classes))
    });

pub(crate) const COUNT: Metric =
    Metric::new("count_score", |p, refs, _| best(refs, |r| share_of_numbers(p, r)));

pub(crate) const RETRIEVAL: Metric =
    Metric::new("retrieval_score", |p, refs, _| best(refs, |r| retrieval(&PARAGRAPH, p, r)));

pub(crate) const RETRIEVAL_ZH: Metric =
    Metric::new("retrieval_zh_score", |p, refs, _| best(refs, |r| retrieval(&PARAGRAPH_ZH, p, r)));

/// Edit similarity as the official requirements compute it, which install no python-Levenshtein.
pub(crate) const CODE_SIM: Metric = Metric {
    name: "code_sim_score",
    score: |p, refs, _| best(refs, |r| difflib_percent(code_line(p), r) / 100.0),
    also: Some(&CODE_SIM_LEVENSHTEIN),
};

/// Edit similarity where python-Levenshtein is installed: to be named beside a number, for long lines differ much.
pub(crate) const CODE_SIM_LEVENSHTEIN: Metric =
    Metric::new("code_sim_score_levenshtein", |p, refs, _| {
        best(refs, |r| indel_percent(code_line(p), r) / 100.0)
    });

/// [`QA_F1`] of the prediction's first line: triviaqa, whose examples tempt a model to go on with another.
pub(crate) const QA_F1_FIRST_LINE: Metric =
    Metric::new(QA_F1.name, |p, refs, classes| (QA_F1.score)(first_line(p), refs, classes));

/// [`ROUGE`] of the prediction's first line: samsum.
pub(crate) const ROUGE_FIRST_LINE: Metric =
    Metric::new(ROUGE.name, |p, refs, classes| (ROUGE.score)(first_line(p), refs, classes));

/// [`CLASSIFICATION`] of the prediction's first line: trec and lsht.
pub(crate) const CLASSIFICATION_FIRST_LINE: Metric =
    Metric::new(CLASSIFICATION.name, |p, refs, classes| {
        (CLASSIFICATION.score)(first_line(p), refs, classes)
    });

/// LongBench v2: whether the letter that the answer names is the right one.
pub(crate) const ACCURACY: Metric = Metric::new("accuracy", |p, refs, _| {
    let choice = multiple_choice::extract_answer(p);
    best(refs, |r| f64::from(choice.as_deref() == Some(r)))
});

static NUMBER: LazyLock<Regex> = LazyLock::new(|| pattern(r"\d+"));
static PARAGRAPH: LazyLock<Regex> = LazyLock::new(|| pattern(r"Paragraph (\d+)"));
static PARAGRAPH_ZH: LazyLock<Regex> = LazyLock::new(|| pattern(r"段落(\d+)"));
/// Python's `\w`, which is narrower than this crate's: no combining marks.
static WORD: LazyLock<Regex> = LazyLock::new(|| pattern(r"[\p{L}\p{N}_]+"));

/// The punctuation, beside that of ASCII, which answers in Chinese are stripped of: the official list.
const CHINESE_PUNCTUATION: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

/// A regular expression of this module.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the patterns are constants that compile")
}

/// The best score over the references, 0 without any.
fn best(references: &[String], score: impl Fn(&str) -> f64) -> f64 {
    references.iter().map(|reference| score(reference)).fold(0.0, f64::max)
}

/// The first line that is not empty; the whole is empty if no line follows leading breaks.
fn first_line(prediction: &str) -> &str {
    let text = prediction.trim_start_matches('\n');
    text.split_once('\n').map_or(text, |(line, _)| line)
}

/// The first line without a backquote or a comment sign, as written; empty if there is none.
fn code_line(prediction: &str) -> &str {
    prediction
        .trim_start_matches('\n')
        .split('\n')
        .find(|line| !line.contains('`') && !line.contains('#') && !line.contains("//"))
        .unwrap_or("")
}

fn qa_f1(prediction: &str, reference: &str) -> f64 {
    token_f1(&english_words(prediction), &english_words(reference))
}

fn qa_f1_zh(prediction: &str, reference: &str) -> f64 {
    token_f1(&chinese_words(prediction), &chinese_words(reference))
}

fn rouge_zh(prediction: &str, reference: &str) -> f64 {
    let spaced = |text| chinese::words(text).join(" ");
    rouge_l(&spaced(prediction), &spaced(reference))
}

/// Lower case, without ASCII punctuation and articles.
fn english_words(text: &str) -> Vec<String> {
    let mut text = text.to_lowercase();
    text.retain(|c| !c.is_ascii_punctuation());
    let text = WORD.replace_all(&text, |word: &regex::Captures<'_>| match &word[0] {
        "a" | "an" | "the" => " ".to_owned(),
        word => word.to_owned(),
    });
    text.split(is_space).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Lower case, without punctuation and spaces; a word of only these is none.
fn chinese_words(text: &str) -> Vec<String> {
    let is_kept =
        |c: &char| !c.is_ascii_punctuation() && !CHINESE_PUNCTUATION.contains(*c) && !is_space(*c);
    let normalized = |word: &str| word.to_lowercase().chars().filter(is_kept).collect::<String>();
    chinese::words(text).into_iter().map(normalized).filter(|word| !word.is_empty()).collect()
}

/// Harmonic mean of the shares of tokens that both have, repetitions counted.
fn token_f1(prediction: &[String], reference: &[String]) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for token in reference {
        *left.entry(token).or_default() += 1;
    }
    let mut num_same = 0;
    for token in prediction {
        if let Some(count) = left.get_mut(token.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            num_same += 1;
        }
    }
    if num_same == 0 {
        return 0.0;
    }
    let precision = f64::from(num_same) / prediction.len() as f64;
    let recall = f64::from(num_same) / reference.len() as f64;
    (2.0 * precision * recall) / (precision + recall)
}

/// One over the number of classes that the prediction names, if the true one is among them.
///
/// Names that are part of the true one do not count against it. The original drops them from the list that it walks,
/// and so never looks at the one after a dropped one; published numbers carry that, and so does this.
fn classification(prediction: &str, reference: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&String> = classes.iter().filter(|c| prediction.contains(*c)).collect();
    let mut at = 0;
    while let Some(&name) = named.get(at) {
        if name != reference && reference.contains(name) {
            // The first of equal names goes, not the one at hand.
            named.remove(named.iter().position(|other| *other == name).unwrap_or(at));
        }
        at += 1;
    }
    match named.iter().any(|name| *name == reference) {
        true => 1.0 / named.len() as f64,
        false => 0.0,
    }
}

/// Share of the prediction's numbers that are `number`, digit for digit.
fn share_of_numbers(prediction: &str, number: &str) -> f64 {
    let (mut count, mut right) = (0u32, 0u32);
    for found in NUMBER.find_iter(prediction) {
        count += 1;
        right += u32::from(found.as_str() == number);
    }
    if count == 0 { 0.0 } else { f64::from(right) / f64::from(count) }
}

/// [`share_of_numbers`] for the number after the reference's word for paragraph; 0 if it has none.
fn retrieval(paragraph: &Regex, prediction: &str, reference: &str) -> f64 {
    match paragraph.captures(reference) {
        Some(captures) => share_of_numbers(prediction, &captures[1]),
        None => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn score(metric: Metric, prediction: &str, reference: &str) -> f64 {
        (metric.score)(prediction, &[reference.to_owned()], &[])
    }

    #[test]
    fn scores_of_single_references_are_the_official_ones() {
        let cases = [
            (QA_F1, "The cat, sat on a mat!", "cat sat", 2.0 / 3.0),
            (QA_F1, "Barack Hussein Obama II", "Barack Obama", 2.0 / 3.0),
            (QA_F1, "", "x", 0.0),
            (QA_F1_ZH, "北京大学", "北京", 0.0),
            (ROUGE_ZH, "今天天气很好。", "今天天气不错。", 0.571428566632653),
            (CODE_SIM, "return x + 1", "return x+1", 0.91),
            (CODE_SIM, "```python\nfoo(bar)\n```", "foo(baz)", 0.88),
            (CODE_SIM, "\n\n# c\n  x = 1\n", "x = 1", 0.83),
            (CODE_SIM, "abcd", "dcba", 0.25),
            (CODE_SIM, "", "x", 0.0),
            (COUNT, "There are 12, not 13 or 12", "12", 2.0 / 3.0),
            (RETRIEVAL, "Paragraph 15, 3", "Paragraph 15", 0.5),
            (RETRIEVAL_ZH, "段落3", "段落3", 1.0),
        ];
        for (metric, prediction, reference, expected) in cases {
            let score = score(metric, prediction, reference);
            assert!((score - expected).abs() < 1e-9, "{metric:?} {prediction:?}: {score}");
        }
    }

    #[test]
    fn classification_keeps_the_name_after_a_dropped_one() {
        let topics = ["Food", "Food Group", "City", "City Area", "Individual"];
        let abbreviations = ["Abb", "Abbr", "Abbrev"];
        let cases: [(&[&str], &str, &str, f64); 4] = [
            (&topics, "Food Group or City", "Food Group", 0.5),
            (&topics, "Food", "Food Group", 0.0),
            (&topics, "City Area City Food", "City", 1.0 / 3.0),
            (&abbreviations, "Abbrev", "Abbrev", 0.5),
        ];
        for (classes, prediction, reference, expected) in cases {
            let classes: Vec<String> = classes.iter().map(|class| class.to_string()).collect();
            assert_eq!(classification(prediction, reference, &classes), expected);
        }
    }

    #[test]
    fn the_best_reference_counts() {
        let references = ["Rome".to_owned(), "Paris, France".to_owned(), "Paris".to_owned()];
        assert_eq!((QA_F1.score)("paris", &references, &[]), 1.0);
        assert_eq!((QA_F1.score)("paris", &[], &[]), 0.0);
    }

    #[test]
    fn text_after_the_first_line_counts_only_where_the_benchmark_reads_it() {
        assert!(score(QA_F1, "\nParis\nand more words", "Paris") < 1.0);
        assert_eq!(score(QA_F1_FIRST_LINE, "\nParis\nand more words", "Paris"), 1.0);
        assert_eq!(first_line("\n\n a\nb"), " a");
        assert_eq!(first_line("\n"), "");
    }

    proptest! {
        #[test]
        fn scores_of_any_strings_are_shares(
            prediction in any_text(),
            references in prop::collection::vec(any_text(), 0..3),
            classes in prop::collection::vec("[a-c北京]{0,2}", 0..4),
        ) {
            let metrics = [
                QA_F1, QA_F1_ZH, ROUGE, ROUGE_ZH, CLASSIFICATION, COUNT, RETRIEVAL, RETRIEVAL_ZH, CODE_SIM,
                CODE_SIM_LEVENSHTEIN, QA_F1_FIRST_LINE, ROUGE_FIRST_LINE, CLASSIFICATION_FIRST_LINE, ACCURACY,
            ];
            for metric in metrics {
                let score = (metric.score)(&prediction, &references, &classes);
                prop_assert!((0.0..=1.0).contains(&score), "{:?}: {}", metric, score);
            }
        }
    }

    /// Any characters, or few, so that there is overlap.
    fn any_text() -> impl Strategy<Value = String> {
        prop_oneof![
            "\\PC{0,30}",
            "[a-c 1.\n`#北京大学。]{0,30}",
            "[ab]{190,260}",
            "(Paragraph |段落)[0-9]"
        ]
    }
}

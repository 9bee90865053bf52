//! Every metric against scores of the official code, which `tests/data/make_longbench_metrics.py` wrote.
//! Knows the metrics and that file only.

use super::{metric, task};
use crate::sample::Metric;
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Golden {
    /// Prediction, reference and score, by name of the metric.
    pairs: BTreeMap<String, Vec<(String, String, f64)>>,
    /// Label sets that the rows below name by their position.
    classes: Vec<Vec<String>>,
    /// Prediction, reference, label set and score.
    classification: Vec<(String, String, usize, f64)>,
    /// Task, prediction, references, label set and the score in per cent with two digits.
    tasks: Vec<(String, String, Vec<String>, usize, f64)>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/data/longbench_metrics.json")).unwrap()
}

#[test]
fn scores_of_pairs_are_the_official_ones() {
    let metrics = [
        metric::QA_F1,
        metric::QA_F1_ZH,
        metric::ROUGE,
        metric::ROUGE_ZH,
        metric::COUNT,
        metric::RETRIEVAL,
        metric::RETRIEVAL_ZH,
        metric::CODE_SIM,
        metric::CODE_SIM_LEVENSHTEIN,
        metric::ACCURACY,
    ];
    let golden = golden();
    assert_eq!(golden.pairs.len(), metrics.len());
    for metric in metrics {
        for (prediction, reference, expected) in &golden.pairs[metric.name] {
            assert_close(metric, prediction, std::slice::from_ref(reference), &[], *expected, 1e-9);
        }
    }
    for (prediction, reference, set, expected) in &golden.classification {
        let (reference, classes) = (std::slice::from_ref(reference), &golden.classes[*set]);
        assert_close(metric::CLASSIFICATION, prediction, reference, classes, *expected, 1e-9);
    }
}

#[test]
fn scores_of_tasks_are_the_official_ones() {
    let golden = golden();
    for (name, prediction, references, set, expected) in &golden.tasks {
        let task = task::TASKS.iter().find(|task| task.name == name).unwrap();
        let classes = &golden.classes[*set];
        // Half of the last digit, which the official code rounds away.
        assert_close(task.metric, prediction, references, classes, expected / 100.0, 5.0001e-5);
    }
}

fn assert_close(
    metric: Metric,
    prediction: &str,
    references: &[String],
    classes: &[String],
    expected: f64,
    tolerance: f64,
) {
    let score = (metric.score)(prediction, references, classes);
    let is_close = (score - expected).abs() <= tolerance;
    assert!(is_close, "{metric:?} {prediction:?} {references:?}: {score}, expected {expected}");
}

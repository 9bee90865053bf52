//! RULER's two scores: which of the references stand in the prediction.
//! Knows no task.
//!
//! Source: `scripts/eval/synthetic/constants.py`; the clean-up of predictions is `scripts/eval/evaluate.py`.

use crate::sample::Metric;

/// Share of the references that the prediction holds.
pub(super) const ALL: Metric = Metric::new("string_match_all", |prediction, references, _| {
    let found = found(prediction, references);
    found as f64 / references.len().max(1) as f64
});

/// 1 if the prediction holds any of the references.
pub(super) const PART: Metric = Metric::new("string_match_part", |prediction, references, _| {
    f64::from(found(prediction, references) > 0)
});

/// How many of `references` are in `prediction`, in whatever case. A number within a longer one counts, as it does
/// officially.
fn found(prediction: &str, references: &[String]) -> usize {
    let prediction = clean(prediction).to_lowercase();
    references.iter().filter(|reference| prediction.contains(&reference.to_lowercase())).count()
}

/// Control characters become newlines, and the ends are trimmed.
fn clean(prediction: &str) -> String {
    let text = prediction.trim().replace(|c: char| c < ' ', "\n");
    text.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(metric: Metric, prediction: &str, references: &[&str]) -> f64 {
        let references: Vec<String> = references.iter().map(|&text| text.to_owned()).collect();
        (metric.score)(prediction, &references, &[])
    }

    #[test]
    fn all_is_the_share_of_references_found() {
        let two_of_three = score(ALL, "AAAAA, BBBBB and CCCCC", &["aaaaa", "bbbbb", "ddddd"]);
        assert!((two_of_three - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(score(ALL, "1234567", &["1234567"]), 1.0);
        assert_eq!(score(ALL, "x", &["9"]), 0.0);
        assert_eq!(score(ALL, "", &[]), 0.0);
    }

    #[test]
    fn a_number_within_a_longer_number_counts() {
        assert_eq!(score(ALL, "12345678", &["1234567"]), 1.0);
    }

    #[test]
    fn part_asks_for_any_reference() {
        assert_eq!(score(PART, "It is Paris.", &["London", "paris"]), 1.0);
        assert_eq!(score(PART, "It is Rome.", &["London", "paris"]), 0.0);
    }

    #[test]
    fn control_characters_become_newlines() {
        assert_eq!(clean(" \u{1}one\ttwo\u{1f}\n "), "one\ntwo");
        assert_eq!(score(ALL, "one\ttwo", &["one two"]), 0.0);
        assert_eq!(score(ALL, "one\ttwo", &["one\ntwo"]), 1.0);
    }
}

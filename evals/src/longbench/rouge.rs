//! ROUGE-L at summary level with the arithmetic of PyPI `rouge` 1.0.1.
//! Knows no task and no language: words are what whitespace separates.

use std::collections::{HashMap, HashSet};

/// Keeps the quotient finite without overlap; the package's own constant, and so part of every published score.
const EPSILON: f64 = 1e-8;

/// F-measure of the union of longest common subsequences over sets of words.
///
/// A text without a sentence scores 0: there the package raises an error, which the benchmark counts as 0.
pub(super) fn rouge_l(prediction: &str, reference: &str) -> f64 {
    let mut ids = HashMap::new();
    let predicted = sentences(prediction, &mut ids);
    let expected = sentences(reference, &mut ids);
    if predicted.is_empty() || expected.is_empty() {
        return 0.0;
    }
    let mut common = HashSet::new();
    for expected in &expected {
        for predicted in &predicted {
            extend_with_subsequence(expected, predicted, &mut common);
        }
    }
    let num_words =
        |sentences: &[Vec<usize>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let precision = common.len() as f64 / num_words(&predicted);
    let recall = common.len() as f64 / num_words(&expected);
    2.0 * ((precision * recall) / (precision + recall + EPSILON))
}

/// Whether Python's `str.split` separates words here: it counts four control characters that Unicode does not.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

/// The sentences of `text` as numbers of their words.
///
/// A full stop ends a sentence wherever it stands. A sentence of spaces has one word, the empty one, as in the package.
fn sentences<'a>(text: &'a str, ids: &mut HashMap<&'a str, usize>) -> Vec<Vec<usize>> {
    let mut number = |word| {
        let next = ids.len();
        *ids.entry(word).or_insert(next)
    };
    text.split('.')
        .filter(|sentence| !sentence.is_empty())
        .map(|sentence| {
            let words = sentence.split(is_space).filter(|word| !word.is_empty());
            let words: Vec<usize> = words.map(&mut number).collect();
            if words.is_empty() { vec![number("")] } else { words }
        })
        .collect()
}

/// Adds the words of one longest common subsequence of `x` and `y`.
///
/// Which one of several is chosen changes the union, so the ties break as in the package: towards a shorter `y`.
fn extend_with_subsequence(x: &[usize], y: &[usize], common: &mut HashSet<usize>) {
    let width = y.len() + 1;
    let mut lengths = vec![0u32; (x.len() + 1) * width];
    for i in 1..=x.len() {
        for j in 1..=y.len() {
            lengths[i * width + j] = if x[i - 1] == y[j - 1] {
                lengths[(i - 1) * width + j - 1] + 1
            } else {
                lengths[(i - 1) * width + j].max(lengths[i * width + j - 1])
            };
        }
    }
    let (mut i, mut j) = (x.len(), y.len());
    while i > 0 && j > 0 {
        if x[i - 1] == y[j - 1] {
            common.insert(x[i - 1]);
            i -= 1;
            j -= 1;
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rouge_l;

    #[test]
    fn scores_are_those_of_the_package() {
        let cases = [
            (
                "the cat sat on the mat. a dog ran.",
                "the cat was on the mat. the dog ran away.",
                0.749999995,
            ),
            ("hello world", "hello there world", 0.7999999952),
            ("a a a b", "a b", 0.999999995),
            ("one two three. four five", "five four. three two one", 0.399999995),
            ("A b", "a b", 0.499999995),
            ("a.b", "a b", 0.999999995),
            ("", "x", 0.0),
            (".", "x", 0.0),
            ("x", ".", 0.0),
        ];
        for (prediction, reference, expected) in cases {
            let score = rouge_l(prediction, reference);
            assert!((score - expected).abs() < 1e-9, "{prediction:?} {reference:?}: {score}");
        }
    }
}

//! Similarity of two strings in whole per cent, as fuzzywuzzy gives it with and without python-Levenshtein.
//! Knows no code and no task.

use std::collections::HashMap;

/// From this many characters of the second string on, difflib ignores its popular characters.
const AUTOJUNK_FROM: usize = 200;

/// `fuzz.ratio` over Python's difflib: what the official requirements install.
pub(super) fn difflib_percent(a: &str, b: &str) -> f64 {
    percent(a, b, |a, b| {
        let total = (a.len() + b.len()) as f64;
        2.0 * num_matched(a, b) as f64 / total
    })
}

/// `fuzz.ratio` over python-Levenshtein: one minus the share of characters to insert and delete.
pub(super) fn indel_percent(a: &str, b: &str) -> f64 {
    percent(a, b, |a, b| {
        let total = a.len() + b.len();
        let distance = total - 2 * subsequence_len(a, b);
        1.0 - distance as f64 / total as f64
    })
}

/// Python rounds a half to the even neighbour; equal strings are alike even if empty.
fn percent(a: &str, b: &str, ratio: impl Fn(&[char], &[char]) -> f64) -> f64 {
    if a == b {
        return 100.0;
    }
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    (100.0 * ratio(&a, &b)).round_ties_even()
}

/// A span of both strings: `a[a_start..a_end]` and `b[b_start..b_end]`.
#[derive(Clone, Copy)]
struct Span {
    a_start: usize,
    a_end: usize,
    b_start: usize,
    b_end: usize,
}

/// Characters in difflib's matching blocks: the longest block first, then the same on either side of it.
fn num_matched(a: &[char], b: &[char]) -> usize {
    let positions = positions(b);
    let mut matched = 0;
    let mut spans = vec![Span { a_start: 0, a_end: a.len(), b_start: 0, b_end: b.len() }];
    while let Some(span) = spans.pop() {
        let block = longest_block(a, b, &positions, span);
        if block.a_start == block.a_end {
            continue;
        }
        matched += block.a_end - block.a_start;
        spans.push(Span { a_end: block.a_start, b_end: block.b_start, ..span });
        spans.push(Span { a_start: block.a_end, b_start: block.b_end, ..span });
    }
    matched
}

/// Where each character of `b` stands, in order, without the popular ones.
fn positions(b: &[char]) -> HashMap<char, Vec<usize>> {
    let mut positions: HashMap<char, Vec<usize>> = HashMap::new();
    for (at, &c) in b.iter().enumerate() {
        positions.entry(c).or_default().push(at);
    }
    if b.len() >= AUTOJUNK_FROM {
        let most = b.len() / 100 + 1;
        positions.retain(|_, at| at.len() <= most);
    }
    positions
}

/// The longest common block within `span`, the first in `a` and then in `b` among equals.
///
/// A block starts at an unpopular character, and then grows over popular ones on both sides.
fn longest_block(
    a: &[char],
    b: &[char],
    positions: &HashMap<char, Vec<usize>>,
    span: Span,
) -> Span {
    let mut best = Span {
        a_end: span.a_start,
        b_end: span.b_start,
        a_start: span.a_start,
        b_start: span.b_start,
    };
    // Length of the block that ends at the row's character of `a` and at each position of `b`.
    let mut ending: HashMap<usize, usize> = HashMap::new();
    for i in span.a_start..span.a_end {
        let mut ending_here = HashMap::new();
        let row = positions.get(&a[i]).map_or(&[][..], Vec::as_slice);
        for &j in row.iter().filter(|&&j| (span.b_start..span.b_end).contains(&j)) {
            let before = j.checked_sub(1).and_then(|j| ending.get(&j)).copied().unwrap_or(0);
            let length = before + 1;
            ending_here.insert(j, length);
            if length > best.a_end - best.a_start {
                best.a_end = i + 1;
                best.a_start = best.a_end - length;
                best.b_end = j + 1;
                best.b_start = best.b_end - length;
            }
        }
        ending = ending_here;
    }
    while best.a_start > span.a_start
        && best.b_start > span.b_start
        && a[best.a_start - 1] == b[best.b_start - 1]
    {
        best.a_start -= 1;
        best.b_start -= 1;
    }
    while best.a_end < span.a_end && best.b_end < span.b_end && a[best.a_end] == b[best.b_end] {
        best.a_end += 1;
        best.b_end += 1;
    }
    best
}

/// Length of the longest common subsequence.
fn subsequence_len(a: &[char], b: &[char]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for &x in a {
        let mut diagonal = 0;
        for j in 1..=b.len() {
            let above = row[j];
            row[j] = if x == b[j - 1] { diagonal + 1 } else { above.max(row[j - 1]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::{difflib_percent, indel_percent};

    #[test]
    fn popular_characters_are_ignored_only_without_levenshtein() {
        let a = "self.assertEqual(result.value, expected_value_for_case) ".repeat(5);
        let b = "self.assertNotEqual(result.value, other_expected_value) ".repeat(5);
        assert_eq!(difflib_percent(&a, &b), 4.0);
        assert_eq!(indel_percent(&a, &b), 84.0);
    }

    #[test]
    fn empty_strings_are_alike_and_unlike_any_other() {
        for percent in [difflib_percent, indel_percent] {
            assert_eq!(percent("", ""), 100.0);
            assert_eq!(percent("", "x"), 0.0);
            assert_eq!(percent("x", ""), 0.0);
        }
    }

    #[test]
    fn halves_round_to_the_even_neighbour() {
        // One of 16 characters pairs is 12.5 per cent, three of 16 are 37.5.
        assert_eq!(difflib_percent("abcdefgh", "a1234567"), 12.0);
        assert_eq!(difflib_percent("abcdefgh", "abc12345"), 38.0);
    }
}

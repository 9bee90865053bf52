//! What needles lie in: prose of any length cut into sentences, and lines.
//! Knows no needle but as text to put between.

use crate::job::Result;
use std::path::PathBuf;

/// The line that noise repeats.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// `num_lines` lines with `inserts` between them: each stands before the line of its place, or at the end if there is
/// none. Places ascend. Ends without a newline.
pub(super) fn lines_with(
    num_lines: usize,
    mut line: impl FnMut(&mut String),
    inserts: &[(usize, String)],
) -> String {
    let mut text = String::new();
    let mut inserts = inserts.iter().peekable();
    for line_idx in 0..=num_lines {
        while let Some((_, insert)) = inserts.next_if(|(place, _)| *place <= line_idx) {
            text.push_str(insert);
            text.push('\n');
        }
        if line_idx < num_lines {
            line(&mut text);
            text.push('\n');
        }
    }
    text.pop();
    text
}

/// Prose, repeated as often as a length needs.
pub(super) struct Essay {
    /// The words, one blank between two.
    text: String,
    /// Bytes of `text` up to the end of each word.
    word_ends: Vec<usize>,
    /// Words up to the end of each sentence; the word after the last one is the first.
    sentence_ends: Vec<usize>,
}

impl Essay {
    /// # Errors
    /// If a file cannot be read as UTF-8, or all of them hold no word.
    pub(super) fn open(paths: &[PathBuf]) -> Result<Self> {
        let mut text = String::new();
        for path in paths {
            let file = std::fs::read_to_string(path)
                .map_err(|e| format!("ruler: --essays {}: {e}", path.display()))?;
            text.push_str(&file);
            text.push(' ');
        }
        Self::new(&text).ok_or_else(|| {
            let paths: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            format!("ruler: --essays {}: expected prose, got no words", paths.join(", ")).into()
        })
    }

    /// None if `prose` has no word.
    pub(super) fn new(prose: &str) -> Option<Self> {
        let words: Vec<&str> = prose.split_whitespace().collect();
        let first = words.first()?;
        let mut essay =
            Self { text: String::new(), word_ends: Vec::new(), sentence_ends: Vec::new() };
        for (word_idx, word) in words.iter().enumerate() {
            if word_idx > 0 {
                essay.text.push(' ');
            }
            essay.text.push_str(word);
            essay.word_ends.push(essay.text.len());
            if ends_sentence(word, words.get(word_idx + 1).unwrap_or(first)) {
                essay.sentence_ends.push(word_idx + 1);
            }
        }
        Some(essay)
    }

    /// How many sentences the first `num_words` words are; one that they cut counts.
    pub(super) fn num_sentences(&self, num_words: usize) -> usize {
        let Some(last) = num_words.checked_sub(1) else { return 0 };
        let (rounds, word_idx) = (last / self.word_ends.len(), last % self.word_ends.len());
        let within = self.sentence_ends.partition_point(|&end| end <= word_idx);
        rounds * self.sentence_ends.len() + within + 1
    }

    /// Words before sentence `sentence_idx` of the first `num_words` words; all of them if there is no such sentence.
    pub(super) fn words_before(&self, sentence_idx: usize, num_words: usize) -> usize {
        if sentence_idx >= self.num_sentences(num_words) {
            return num_words;
        }
        let Some(before) = sentence_idx.checked_sub(1) else { return 0 };
        // A sentence begins after another one, so there are ends.
        let ends = self.sentence_ends.len();
        before / ends * self.word_ends.len() + self.sentence_ends[before % ends]
    }

    /// Appends the words from `from` to `to`, one blank between two.
    pub(super) fn push_words(&self, text: &mut String, from: usize, to: usize) {
        let num_words = self.word_ends.len();
        let mut from = from;
        while from < to {
            let round = from / num_words * num_words;
            let until = to.min(round + num_words);
            let start = match from - round {
                0 => 0,
                first => self.word_ends[first - 1] + 1,
            };
            text.push_str(&self.text[start..self.word_ends[until - round - 1]]);
            if until < to {
                text.push(' ');
            }
            from = until;
        }
    }
}

/// Words that end with a full stop and seldom end a sentence.
const ABBREVIATIONS: &[&str] =
    &["mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "vs.", "e.g.", "i.e.", "cf.", "no.", "vol."];

/// Whether a sentence ends between two words: after `.`, `!`, `?` or `…`, closing marks aside, unless the word is an
/// abbreviation or an initial, or the next one begins small.
fn ends_sentence(word: &str, next: &str) -> bool {
    let word = word.trim_end_matches(['"', '\'', '”', '’', ')', ']']);
    if !word.ends_with(['.', '!', '?', '…']) {
        return false;
    }
    let bare = word.trim_start_matches(['"', '\'', '“', '‘', '(', '[']);
    let initial = bare.len() == 2 && bare.starts_with(|c: char| c.is_ascii_uppercase() && c != 'I');
    let abbreviation = ABBREVIATIONS.contains(&bare.to_lowercase().as_str());
    let small = next.chars().find(|c| c.is_alphanumeric()).is_some_and(char::is_lowercase);
    !(bare.ends_with('.') && (initial || abbreviation || small))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(essay: &Essay, from: usize, to: usize) -> String {
        let mut text = String::new();
        essay.push_words(&mut text, from, to);
        text
    }

    #[test]
    fn prose_is_collapsed_and_repeated() {
        let essay = Essay::new(" One  two.\n\nThree ").expect("it has words");
        assert_eq!(words(&essay, 0, 0), "");
        assert_eq!(words(&essay, 1, 2), "two.");
        assert_eq!(words(&essay, 0, 3), "One two. Three");
        assert_eq!(words(&essay, 1, 8), "two. Three One two. Three One two.");
    }

    #[test]
    fn sentences_run_on_over_the_seam() {
        // The sentences are "A a.", "B b b.", "C A a.", "B b b.", "C ...".
        let essay = Essay::new("A a. B b b. C").expect("it has words");
        assert_eq!([0, 1, 2, 3, 6, 8, 9].map(|n| essay.num_sentences(n)), [0, 1, 1, 2, 3, 3, 4]);
        let starts = [0, 1, 2, 3, 4, 5].map(|sentence| essay.words_before(sentence, 12));
        assert_eq!(starts, [0, 2, 5, 8, 11, 12]);
    }

    #[test]
    fn prose_without_sentences_is_one() {
        let essay = Essay::new("no end").expect("it has words");
        assert_eq!(essay.num_sentences(5), 1);
        assert_eq!(essay.words_before(1, 5), 5);
    }

    #[test]
    fn sentences_end_at_marks_and_not_at_abbreviations() {
        for (word, next, ends) in [
            ("done.", "Then", true),
            ("done.\"", "\"Then", true),
            ("(really?)", "Then", true),
            ("done.", "then", false),
            ("What?", "he", true),
            ("Mr.", "Jones", false),
            ("J.", "Jones", false),
            ("done,", "Then", false),
            ("1984.", "2001", true),
        ] {
            assert_eq!(ends_sentence(word, next), ends, "{word} {next}");
        }
    }

    #[test]
    fn inserts_stand_before_their_line() {
        let inserts = [(0, "a".to_owned()), (2, "b".to_owned()), (2, "c".to_owned())];
        let text = lines_with(2, |text| text.push('-'), &inserts);
        assert_eq!(text, "a\n-\n-\nb\nc");
        assert_eq!(lines_with(0, |text| text.push('-'), &[]), "");
    }
}

//! The words that keys and lists are made of: wonderwords' lists, and the user's where those are too few.
//! Knows no task.

use crate::job::Result;
use std::collections::HashSet;
use std::path::Path;

const NOUNS: &str = include_str!("../../data/wonderwords/nounlist.txt");
const ADJECTIVES: &str = include_str!("../../data/wonderwords/adjectivelist.txt");
const VERBS: &str = include_str!("../../data/wonderwords/verblist.txt");

pub(super) struct Lexicon {
    pub(super) adjectives: Vec<&'static str>,
    pub(super) nouns: Vec<&'static str>,
    /// Nouns, adjectives and verbs.
    pub(super) words: Vec<&'static str>,
    /// Others, for where those are too few.
    pub(super) more_words: Vec<String>,
}

impl Lexicon {
    /// # Errors
    /// If `more_words` cannot be read as text.
    pub(super) fn open(more_words: Option<&Path>) -> Result<Self> {
        let text = match more_words {
            Some(path) => std::fs::read_to_string(path)
                .map_err(|e| format!("ruler: --words {}: {e}", path.display()))?,
            None => String::new(),
        };
        let mut words = distinct([NOUNS, ADJECTIVES, VERBS].into_iter().flat_map(str::lines));
        words.sort_unstable();
        let known: HashSet<&str> = words.iter().copied().collect();
        let more_words = distinct(text.lines()).into_iter().filter(|word| !known.contains(word));
        Ok(Self {
            more_words: more_words.map(str::to_owned).collect(),
            adjectives: distinct(ADJECTIVES.lines()),
            nouns: distinct(NOUNS.lines()),
            words,
        })
    }
}

/// The words of `lines`, each once, in their order.
fn distinct<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = HashSet::new();
    lines.map(str::trim).filter(|word| !word.is_empty() && seen.insert(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_are_those_of_wonderwords_3_0_1() {
        let lexicon = Lexicon::open(None).expect("no file is read");
        let sizes = [lexicon.nouns.len(), lexicon.adjectives.len(), lexicon.words.len()];
        assert_eq!(sizes, [6_782, 910, 8_166]);
        assert!(lexicon.words.contains(&"jalapeño"));
    }

    #[test]
    fn a_missing_word_file_is_named() {
        let error = Lexicon::open(Some(Path::new("/no/words.txt"))).err().expect("no such file");
        assert!(error.to_string().starts_with("ruler: --words /no/words.txt: "), "{error}");
    }
}

//! Which quotations hold an erased text, or a sentence of one.
//! Knows text alone.

use std::collections::{BTreeSet, HashSet};

use foldhash::fast::RandomState;

use crate::sentences;

/// Letters of the shortest sentence that is looked for in quotations.
const LEAST_LETTERS: usize = 8;
/// The same of one with digits: a number, a date.
const LEAST_WITH_DIGITS: usize = 4;
/// So many first bytes of what is looked for tell most places of a quotation from where it could begin.
const START_BYTES: usize = 8;

/// What is looked for in quotations, all of it at once: a user may have erased a hundred thousand sentences.
#[derive(Debug, Default)]
pub(super) struct Quotable {
    /// As letters, ascending; none begins with another one, because that one is found wherever it stands.
    texts: Vec<String>,
    /// Their first bytes, and how many those are.
    starts: HashSet<Box<[u8]>, RandomState>,
    start_lens: BTreeSet<usize>,
}

impl Quotable {
    /// What of these texts may stand in a quotation: all of each, or a sentence. One of few letters and no digit is said
    /// everywhere.
    pub(super) fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        Self::of_letters(texts.into_iter().flat_map(parts).collect())
    }

    fn of_letters(all: BTreeSet<String>) -> Self {
        let mut quotable = Self::default();
        for text in all {
            if quotable.texts.last().is_some_and(|last| text.starts_with(last.as_str())) {
                continue;
            }
            let start = &text.as_bytes()[..text.len().min(START_BYTES)];
            quotable.start_lens.insert(start.len());
            quotable.starts.insert(start.into());
            quotable.texts.push(text);
        }
        quotable
    }

    pub(super) fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// Whether a text quotes one of them.
    pub(super) fn is_in(&self, text: &str) -> bool {
        let text = letters(text);
        text.char_indices().any(|(at, _)| self.begins(&text[at..]))
    }

    /// Whether letters begin with one of them.
    fn begins(&self, rest: &str) -> bool {
        let is_start = |len: &usize| {
            let start = rest.as_bytes().get(..*len);
            start.is_some_and(|start| self.starts.contains(start))
        };
        if !self.start_lens.iter().any(is_start) {
            return false;
        }
        // Between a text and what begins with it there are only others that begin with it.
        let after = self.texts.partition_point(|known| known.as_str() <= rest);
        after > 0 && rest.starts_with(self.texts[after - 1].as_str())
    }
}

/// A text and its sentences as their letters, those that are looked for.
fn parts(text: &str) -> impl Iterator<Item = String> + '_ {
    let parts = sentences(text).into_iter().map(|sentence| letters(&text[sentence]));
    let told = parts.filter(|sentence| are_told(sentence));
    told.chain([letters(text)]).filter(|text| !text.is_empty())
}

/// Whether the letters of `text` are more than what is said everywhere.
pub(super) fn is_telling(text: &str) -> bool {
    are_told(&letters(text))
}

fn are_told(letters: &str) -> bool {
    let has_digit = letters.chars().any(char::is_numeric);
    letters.chars().count() >= if has_digit { LEAST_WITH_DIGITS } else { LEAST_LETTERS }
}

/// Letters and digits of a text, folded: what is left of a chunk however it was quoted.
fn letters(text: &str) -> String {
    fold(text.chars().filter(|c| c.is_alphanumeric()))
}

/// Text in lower case, the same for a part of a text as within it.
pub(super) fn folded(text: &str) -> String {
    fold(text.chars())
}

/// Characters in lower case, each by itself: `str::to_lowercase` writes a sigma as it stands in its word. A dot above an i
/// is what is left of a capital that had one.
fn fold(chars: impl Iterator<Item = char>) -> String {
    let mut folded = String::new();
    for c in chars.flat_map(char::to_lowercase) {
        match c {
            '\u{307}' if folded.ends_with('i') => {}
            'ς' => folded.push('σ'),
            c => folded.push(c),
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_sentence_is_found_however_it_was_quoted() {
        let erased = [
            "The key is under the stone. Bob ran.",
            "Room 12.",
            "τα κλειδια του κωστα, in İstanbul",
        ];
        let quotable = Quotable::new(erased);
        for (text, is_quoted) in [
            ("> THE KEY\n> is under the *stone*!", true),
            ("They said that the key is under the stone, once.", true),
            ("It was room 12, was it not?", true),
            ("ΤΑ ΚΛΕΙΔΙΑ ΤΟΥ ΚΩΣΤΑ, in ISTANBUL", true),
            ("The key is under the tree. Bob ran.", false),
            ("Bob ran.", false),
            ("", false),
        ] {
            assert_eq!(quotable.is_in(text), is_quoted, "{text}");
        }
        assert!(Quotable::new(["... !?", ""]).is_empty());
        assert!(!Quotable::default().is_in("Anything."));
    }

    proptest! {
        #[test]
        fn of_many_texts_one_is_found_where_it_stands(
            erased in prop::collection::btree_set("[abé]{1,12}", 0..20),
            text in "[abé]{0,60}",
        ) {
            let expected = erased.iter().any(|it| text.contains(it.as_str()));
            prop_assert_eq!(Quotable::of_letters(erased).is_in(&text), expected);
        }
    }
}

//! Common words extraction (cwe): ten words that a list repeats more often than the others.
//! Knows no tokens.
//!
//! Source: `scripts/data/synthetic/common_words_extraction.py` and `constants.py`.

use super::Draft;
use super::lexicon::Lexicon;
use super::seed::{Seed, Stream};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::fmt::Write as _;

const INTRO: &str = "Below is a numbered list of words. In these words, some appear more often than others. Memorize \
                     the ones that appear most often.\n";
const QUESTION: &str = "Question: What are the 10 most common words in the above list?";
const ANSWER_PREFIX: &str = " Answer: The top 10 words that appear most often in the list are:";

/// Words that are common.
const NUM_COMMON: usize = 10;

/// How often a list has its common and its other words.
#[derive(Debug, Clone, Copy)]
struct Repeats {
    common: usize,
    other: usize,
}

/// The worked example and the task, by length.
fn repeats(length: usize) -> (usize, Repeats, Repeats) {
    match length < 4_096 {
        true => (20, Repeats { common: 3, other: 1 }, Repeats { common: 6, other: 1 }),
        false => (40, Repeats { common: 10, other: 3 }, Repeats { common: 30, other: 3 }),
    }
}

/// A sample; a unit is a distinct word. Past the built-in words the user's join them.
pub(super) fn draft(lexicon: &Lexicon, length: usize, seed: Seed) -> Draft<'_> {
    let (example_words, example_repeats, repeats) = repeats(length);
    let mut words = lexicon.words.clone();
    let mut rng = seed.rng(Stream::Example);
    let (shown, _) = words.partial_shuffle(&mut rng, example_words);
    let example = list(shown, example_repeats, &mut rng) + QUESTION + ANSWER_PREFIX;
    let example = format!("{example} {}\n", numbered(&shown[..NUM_COMMON]));

    let mut rng = seed.rng(Stream::Answer);
    words.shuffle(&mut rng);
    let mut more_words: Vec<&str> = lexicon.more_words.iter().map(String::as_str).collect();
    more_words.shuffle(&mut rng);
    words.extend(more_words);
    Draft {
        units: NUM_COMMON..=words.len(),
        repeated: None,
        question: QUESTION.to_owned(),
        answer_prefix: ANSWER_PREFIX.to_owned(),
        references: words[..NUM_COMMON].iter().map(|&word| word.to_owned()).collect(),
        context: Box::new(move |num_words| {
            let rng = &mut seed.rng(Stream::Places);
            format!("{example}{}", list(&words[..num_words], repeats, rng))
        }),
    }
}

/// The text up to the question: the first words as the common ones and the others, repeated, shuffled and numbered.
fn list(words: &[&str], repeats: Repeats, rng: &mut ChaCha8Rng) -> String {
    let (common, other) = words.split_at(NUM_COMMON);
    let mut list = [common.repeat(repeats.common), other.repeat(repeats.other)].concat();
    list.shuffle(rng);
    format!("{INTRO}{}\n", numbered(&list))
}

/// `1. a 2. b`.
fn numbered(words: &[&str]) -> String {
    let mut text = String::new();
    for (word_idx, word) in words.iter().enumerate() {
        let blank = if word_idx > 0 { " " } else { "" };
        // Writing to a String cannot fail.
        let _ = write!(text, "{blank}{}. {word}", word_idx + 1);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn lexicon() -> Lexicon {
        let words = (0..40).map(|word| &*format!("w{word}").leak()).collect();
        let (adjectives, nouns) = (Vec::new(), Vec::new());
        Lexicon { adjectives, nouns, words, more_words: vec!["more".to_owned()] }
    }

    fn counts(list: &str) -> BTreeMap<&str, usize> {
        let mut counts = BTreeMap::new();
        for (word_idx, pair) in list.split(' ').collect::<Vec<_>>().chunks(2).enumerate() {
            assert_eq!(pair[0], format!("{}.", word_idx + 1));
            *counts.entry(pair[1]).or_default() += 1;
        }
        counts
    }

    #[test]
    fn the_text_is_the_template() {
        let words: Vec<String> = (0..11).map(|word| format!("w{word}")).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let repeats = Repeats { common: 1, other: 0 };
        let text = list(&words, repeats, &mut Seed::new(0, "cwe", 0, 0, 0).rng(Stream::Places));
        let (intro, list) = text.split_at(INTRO.len());
        assert_eq!(
            intro.to_owned() + QUESTION + ANSWER_PREFIX,
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones \
             that appear most often.\nQuestion: What are the 10 most common words in the above list? Answer: The top \
             10 words that appear most often in the list are:"
        );
        let list = list.strip_suffix('\n').expect("the list is a line");
        assert_eq!(counts(list).into_keys().collect::<Vec<_>>(), {
            let mut common = words[..10].to_vec();
            common.sort_unstable();
            common
        });
    }

    #[test]
    fn an_example_with_its_answer_comes_before_the_list() {
        let lexicon = lexicon();
        for (length, num_example, example_repeats, repeats) in
            [(4_095, 20, (3, 1), (6, 1)), (4_096, 40, (10, 3), (30, 3))]
        {
            let draft = draft(&lexicon, length, Seed::new(42, "cwe", length, 0, 0));
            let text = (draft.context)(12) + &draft.question;
            let lines: Vec<&str> = text.split('\n').collect();
            let [intro, example, answer, same_intro, list, question] = lines[..] else {
                panic!("six lines, got {text}");
            };
            assert_eq!((intro, question), (same_intro, QUESTION));
            let answer = answer
                .strip_prefix(QUESTION)
                .and_then(|rest| rest.strip_prefix(ANSWER_PREFIX)?.strip_prefix(' '));
            let (answer, example) = (counts(answer.expect("an answer")), counts(example));
            assert_eq!((answer.len(), example.len()), (10, num_example));
            assert!(example.iter().all(|(word, &count)| {
                count
                    == if answer.contains_key(word) { example_repeats.0 } else { example_repeats.1 }
            }));
            let list = counts(list);
            assert_eq!((draft.references.len(), list.len()), (10, 12));
            assert!(list.iter().all(|(word, &count)| {
                let common = draft.references.iter().any(|reference| reference == word);
                count == if common { repeats.0 } else { repeats.1 }
            }));
        }
    }

    #[test]
    fn words_of_the_user_come_after_the_built_in() {
        let lexicon = lexicon();
        let draft = draft(&lexicon, 4_096, Seed::new(42, "cwe", 4_096, 0, 0));
        assert_eq!(draft.units, 10..=41);
        assert_eq!((draft.context)(40).matches(". more").count(), 0);
        assert_eq!((draft.context)(41).matches(". more").count(), 3);
    }
}

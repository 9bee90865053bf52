//! Frequent words extraction (fwe): made-up words whose counts fall by a zeta law, the most frequent one shown as dots.
//! Knows no tokens.
//!
//! Source: `scripts/data/synthetic/freq_words_extraction.py` and `constants.py`.

use super::Draft;
use super::seed::{Seed, Stream};
use crate::job::Result;
use rand::Rng;
use rand::seq::SliceRandom;
use std::collections::BTreeSet;
use std::f64::consts::PI;

const INTRO: &str = "Read the following coded text and track the frequency of each coded word. Find the three most \
                     frequently appeared coded words. ";
const QUESTION: &str = "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three \
                        most frequently appeared words in the above coded text?";
const ANSWER_PREFIX: &str =
    " Answer: According to the coded text above, the three most frequently appeared words are:";

const WORD_LEN: usize = 6;

/// Tokens of the length, less the answer's, for each word of the vocabulary.
const TOKENS_PER_WORD: usize = 50;

/// What stands for the word of the first rank.
const DOTS: &str = "...";

/// The dots and the three answers.
const MIN_VOCABULARY: usize = 4;

/// The fewest words with one of the fourth rank among them: 16 times zeta(2) is 26.3.
const MIN_WORDS: usize = 27;

/// A sample; a unit is a word before the counts are rounded down.
///
/// # Errors
/// If the vocabulary that belongs to the length has no three words to ask for.
pub(super) fn draft(length: usize, max_new_tokens: usize, seed: Seed) -> Result<Draft<'static>> {
    let size = length.saturating_sub(max_new_tokens) / TOKENS_PER_WORD;
    if size < MIN_VOCABULARY {
        let least = MIN_VOCABULARY * TOKENS_PER_WORD + max_new_tokens;
        return Err(format!(
            "ruler: fwe at length {length}, expected at least {least} for a vocabulary of {MIN_VOCABULARY}"
        )
        .into());
    }
    let rng = &mut seed.rng(Stream::Answer);
    let mut distinct = BTreeSet::new();
    while distinct.len() < size {
        let word: String =
            (0..WORD_LEN).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
        distinct.insert(word);
    }
    let mut vocabulary: Vec<String> = distinct.into_iter().collect();
    vocabulary.shuffle(rng);
    vocabulary[0] = DOTS.to_owned();
    Ok(Draft {
        references: vocabulary[1..MIN_VOCABULARY].to_vec(),
        question: QUESTION.to_owned(),
        answer_prefix: ANSWER_PREFIX.to_owned(),
        units: MIN_WORDS..=usize::MAX,
        repeated: None,
        context: Box::new(move |num_words| context(&vocabulary, num_words, seed)),
    })
}

fn context(vocabulary: &[String], num_words: usize, seed: Seed) -> String {
    let mut words: Vec<&str> = Vec::new();
    for (word, rank) in vocabulary.iter().zip(1..) {
        words.extend(std::iter::repeat_n(word.as_str(), count(num_words, rank)));
    }
    words.shuffle(&mut seed.rng(Stream::Places));
    format!("{INTRO}{}\n", words.join(" "))
}

/// How often the word of a rank (from 1) stands among `num_words`: the zeta law with alpha 2, rounded down.
fn count(num_words: usize, rank: usize) -> usize {
    let zeta_2 = PI * PI / 6.0;
    (num_words as f64 * (rank as f64).powi(-2) / zeta_2) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_the_template() {
        let vocabulary = [DOTS, "aaaaaa"].map(str::to_owned);
        let text = context(&vocabulary, 2, Seed::new(42, "fwe", 4_096, 0, 0));
        assert_eq!(
            text + QUESTION + ANSWER_PREFIX,
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently \
             appeared coded words. ...\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What \
             are the three most frequently appeared words in the above coded text? Answer: According to the coded \
             text above, the three most frequently appeared words are:"
        );
    }

    #[test]
    fn counts_follow_the_zeta_law() {
        // 1000 / zeta(2) is 607.9.
        assert_eq!(
            [1, 2, 3, 4, 5, 24, 25].map(|rank| count(1_000, rank)),
            [607, 151, 67, 37, 24, 1, 0]
        );
        assert_eq!([count(MIN_WORDS - 1, 4), count(MIN_WORDS, 4), count(MIN_WORDS, 5)], [0, 1, 0]);
    }

    #[test]
    fn the_answers_are_the_ranks_after_the_dots() {
        let draft =
            draft(4_096, 50, Seed::new(42, "fwe", 4_096, 0, 0)).expect("the length has room");
        let text = (draft.context)(1_000);
        let times = |word: &str| text.split_whitespace().filter(|&other| other == word).count();
        assert_eq!(times(DOTS), 607);
        let answers: Vec<usize> = draft.references.iter().map(|word| times(word)).collect();
        assert_eq!(answers, [151, 67, 37]);
    }

    #[test]
    fn a_vocabulary_without_three_answers_is_an_error() {
        let error = draft(249, 50, Seed::new(42, "fwe", 249, 0, 0)).err().expect("three words");
        assert_eq!(
            error.to_string(),
            "ruler: fwe at length 249, expected at least 250 for a vocabulary of 4"
        );
    }
}

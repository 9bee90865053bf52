//! The built-in embedder: words, word pairs and character n-grams hashed into a vector.
//! Knows no file, weight or store.

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::vectors::normalize;
use crate::words::Terms;
use crate::{Embedder, Result};

/// Numbers per vector.
const DIM: usize = 384;
/// Positions that one feature sets: with one, two features that collide are one and the same.
const POSITIONS: u32 = 4;
/// A content word counts 1; what follows is relative to that.
const STOP_WORD_WEIGHT: f32 = 0.1;
/// A pair of neighbouring content words: order matters, but less than the words.
const PAIR_WEIGHT: f32 = 0.4;
/// One n-gram. A word of 6 letters has 15 of them: together they weigh about sqrt(15) * 0.2 = 0.77.
const NGRAM_WEIGHT: f32 = 0.2;
/// Lengths of the character n-grams, counted with one border mark on each side of the word.
const NGRAM_CHARS: std::ops::RangeInclusive<usize> = 3..=5;

/// Deterministic vectors from a text's surface, with no model and no file.
///
/// It finds what shares words, word stems or spelling with a question, not what paraphrases it.
/// 384 numbers; features are stemmed words, pairs of content words, and character 3- to 5-grams,
/// each hashed by xxh3 to 4 signed positions, as in feature hashing (Weinberger et al., 2009, arXiv 0902.2206);
/// repeated features count `1 + ln(n)`.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct HashedEmbedder {}

/// Kinds of features; each is hashed with its own seed.
#[derive(Clone, Copy)]
enum Feature {
    Word = 1,
    Pair = 2,
    Ngram = 3,
}

impl HashedEmbedder {
    /// The embedder; there is only one.
    pub fn new() -> Self {
        Self::default()
    }

    fn embed_one(&self, terms: &Terms, text: &str, scratch: &mut Scratch, row: &mut [f32]) {
        scratch.features.clear();
        let mut previous: Option<u64> = None;
        terms.words(text, |word, stop| {
            let hash = xxh3_64_with_seed(word.as_bytes(), Feature::Word as u64);
            scratch.features.push((hash, if stop { STOP_WORD_WEIGHT } else { 1.0 }));
            if stop {
                return;
            }
            if let Some(previous) = previous {
                let pair = [previous.to_le_bytes(), hash.to_le_bytes()].concat();
                let pair = xxh3_64_with_seed(&pair, Feature::Pair as u64);
                scratch.features.push((pair, PAIR_WEIGHT));
            }
            previous = Some(hash);
            scratch.ngrams(word);
        });
        if scratch.features.is_empty() {
            // No word at all: the text itself is the only feature, so that the vector has unit length.
            let hash = xxh3_64_with_seed(text.trim().as_bytes(), Feature::Word as u64);
            scratch.features.push((hash, 1.0));
        }
        scratch.features.sort_unstable_by_key(|(hash, _)| *hash);
        for run in scratch.features.chunk_by(|a, b| a.0 == b.0) {
            let (hash, weight) = run[0];
            let weight = weight * (1.0 + (run.len() as f32).ln());
            let mut bits = hash;
            for _ in 0..POSITIONS {
                // SplitMix64's step: independent 64 bits for each position.
                bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut mixed = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                mixed ^= mixed >> 31;
                let position = (((mixed >> 32) * DIM as u64) >> 32) as usize;
                row[position] += if mixed & 1 == 0 { weight } else { -weight };
            }
        }
        normalize(row);
        if row.iter().all(|&value| value == 0.0) {
            // Signs cancelled out, which needs all positions of all features to meet in pairs.
            row[0] = 1.0;
        }
    }
}

/// Buffers that one call reuses for all its texts.
#[derive(Default)]
struct Scratch {
    features: Vec<(u64, f32)>,
    word: String,
    /// Byte offset of each character of `word`, and its end.
    borders: Vec<usize>,
}

impl Scratch {
    fn ngrams(&mut self, word: &str) {
        self.word.clear();
        self.word.push('^');
        self.word.push_str(word);
        self.word.push('$');
        self.borders.clear();
        self.borders.extend(self.word.char_indices().map(|(at, _)| at));
        self.borders.push(self.word.len());
        for len in NGRAM_CHARS {
            for window in self.borders.windows(len + 1) {
                let gram = &self.word.as_bytes()[window[0]..window[len]];
                let hash = xxh3_64_with_seed(gram, Feature::Ngram as u64);
                self.features.push((hash, NGRAM_WEIGHT));
            }
        }
    }
}

impl Embedder for HashedEmbedder {
    fn identity(&self) -> String {
        format!("hashed-{DIM}-1")
    }

    fn dim(&self) -> usize {
        DIM
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        let terms = Terms::new();
        let mut scratch = Scratch::default();
        let mut rows = vec![0.0; texts.len() * DIM];
        for (text, row) in texts.iter().zip(rows.chunks_exact_mut(DIM)) {
            self.embed_one(&terms, text, &mut scratch, row);
        }
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vectors::dot;

    fn cosine(a: &str, b: &str) -> f32 {
        let rows = HashedEmbedder::new().embed(&[a, b]).unwrap();
        dot(&rows[..DIM], &rows[DIM..])
    }

    #[test]
    fn texts_that_share_words_are_closer_than_texts_that_do_not() {
        let question = "which hotel did we book in Kyoto";
        assert!(cosine(question, "We booked the Gion hotel in Kyoto.") > 0.5);
        assert!(cosine(question, "The invoice was paid on Friday.") < 0.15);
    }

    #[test]
    fn a_misspelt_word_is_still_close() {
        for (word, typo, other) in [
            ("restaurant", "restaurnt", "railway"),
            ("Hokkaido", "Hokaido", "Yokohama"),
            ("accommodation", "accomodation", "breakfast"),
        ] {
            let (near, far) = (cosine(word, typo), cosine(word, other));
            assert!(near > far + 0.2, "{word}: {near} {far}");
        }
    }

    #[test]
    fn known_text_has_its_known_vector() {
        // Stored vectors must stay comparable: whoever changes the features changes `identity`, too.
        let rows = HashedEmbedder::new().embed(&["fuzzy badger", ""]).unwrap();
        let bytes: Vec<u8> = rows.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(xxh3_64_with_seed(&bytes, 0), 1743751728975455156);
    }

    proptest! {
        #[test]
        fn every_text_has_a_vector_of_unit_length(text in "(?s).{0,200}") {
            let row = HashedEmbedder::new().embed(&[&text]).unwrap();
            prop_assert!((dot(&row, &row) - 1.0).abs() < 1e-5);
        }
    }
}

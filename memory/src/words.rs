//! Terms of a text, and BM25 over the chunks of one partition.
//! Knows nothing of vectors, scopes or storage; a chunk is the number of its slot.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;
use rust_stemmers::{Algorithm, Stemmer};
use unicode_segmentation::UnicodeSegmentation;
use xxhash_rust::xxh3::xxh3_64;

/// Term frequency saturation. Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009, 3.4.2.
const K1: f32 = 1.2;
/// Length normalisation; same source.
const B: f32 = 0.75;
/// Longer tokens are not names anyone asks for.
const MAX_TERM_BYTES: usize = 128;

/// English function words, unstemmed and sorted. They carry no topic: a query of content words ignores them.
const STOP_WORDS: [&str; 124] = [
    "a", "about", "after", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be",
    "because", "been", "before", "being", "but", "by", "can", "could", "d", "did", "do", "does",
    "doing", "don", "done", "else", "ever", "for", "from", "get", "had", "has", "have", "having",
    "he", "her", "here", "hers", "him", "his", "how", "i", "if", "in", "into", "is", "isn", "it",
    "its", "just", "ll", "m", "may", "me", "might", "mine", "more", "most", "must", "my", "no",
    "nor", "not", "now", "of", "off", "on", "one", "ones", "only", "or", "our", "ours", "out",
    "over", "please", "re", "s", "same", "shall", "she", "should", "so", "some", "such", "t",
    "tell", "than", "that", "the", "their", "them", "then", "there", "these", "they", "this",
    "those", "to", "too", "up", "us", "ve", "very", "was", "we", "were", "what", "when", "where",
    "which", "who", "whom", "whose", "why", "will", "with", "would", "you", "your", "yours",
];

/// Whether a lower-case word carries no topic.
pub(crate) fn is_stop_word(word: &str) -> bool {
    STOP_WORDS.binary_search(&word).is_ok()
}

/// Words whose stems are kept at hand: the words of a text of some books. Beyond it all are let go.
const KEPT_STEMS: usize = 1 << 16;

/// Turns text into terms; keeps the stems of words that it has seen.
pub(crate) struct Terms {
    stemmer: Stemmer,
    stems: RefCell<Stems>,
}

/// Terms by number, so that those of a text can be counted without touching their letters.
#[derive(Default)]
struct Stems {
    /// Number of the stem of each word, and whether the word is a stop word.
    words: HashMap<Box<str>, (u32, bool), RandomState>,
    numbers: HashMap<Box<str>, u32, RandomState>,
    terms: Vec<Box<str>>,
}

impl Stems {
    fn word(&mut self, stemmer: &Stemmer, word: &str) -> (u32, bool) {
        if let Some(known) = self.words.get(word) {
            return *known;
        }
        let known = (self.number(&stemmer.stem(word)), is_stop_word(word));
        self.words.insert(word.into(), known);
        known
    }

    fn number(&mut self, term: &str) -> u32 {
        if let Some(number) = self.numbers.get(term) {
            return *number;
        }
        let number = self.terms.len() as u32;
        self.terms.push(term.into());
        self.numbers.insert(term.into(), number);
        number
    }
}

impl Terms {
    pub(crate) fn new() -> Self {
        Self { stemmer: Stemmer::create(Algorithm::English), stems: RefCell::default() }
    }

    /// Calls `each` with every stemmed word and whether it is a stop word, in order.
    pub(crate) fn words(&self, text: &str, mut each: impl FnMut(&str, bool)) {
        let mut stems = self.stems.borrow_mut();
        if stems.terms.len() > KEPT_STEMS {
            *stems = Stems::default();
        }
        each_part(&text.to_lowercase(), |part| {
            let (number, is_stop) = stems.word(&self.stemmer, part);
            each(&stems.terms[number as usize], is_stop);
        });
    }

    /// Calls `each` with every token that holds several words, whole: `fuzzy-badger`, a UUID, an address.
    pub(crate) fn compounds(&self, text: &str, mut each: impl FnMut(&str)) {
        for token in text.split_whitespace() {
            // Before the ends are looked at: most tokens have none of these.
            if !token.bytes().any(|byte| b"-_@./:".contains(&byte)) {
                continue;
            }
            let token = token.trim_matches(|c: char| !c.is_alphanumeric());
            if token.len() > MAX_TERM_BYTES || !token.contains(['-', '_', '@', '.', '/', ':']) {
                continue;
            }
            each(&token.to_lowercase());
        }
    }

    /// Calls `each` with every term of a text, once, and how often it occurs; returns the number of words.
    fn count(&self, text: &str, mut each: impl FnMut(&str, u32)) -> u32 {
        let mut stems = self.stems.borrow_mut();
        if stems.terms.len() > KEPT_STEMS {
            *stems = Stems::default();
        }
        let mut numbers = Vec::with_capacity(text.len() / 4);
        each_part(&text.to_lowercase(), |part| numbers.push(stems.word(&self.stemmer, part).0));
        let num_words = numbers.len() as u32;
        self.compounds(text, |term| numbers.push(stems.number(term)));
        numbers.sort_unstable();
        for same in numbers.chunk_by(|a, b| a == b) {
            each(&stems.terms[same[0] as usize], same.len() as u32);
        }
        num_words
    }

    /// The distinct terms of a query and how many content words it has.
    /// Stop words are left out, unless there is nothing else.
    pub(crate) fn query(&self, text: &str) -> Query {
        let mut query = Query::default();
        let mut stops = Vec::new();
        self.words(text, |word, stop| {
            if stop {
                stops.push(word.to_owned());
            } else {
                query.content_words += 1;
                query.add(word, 1.0);
            }
        });
        self.compounds(text, |term| query.add(term, 1.0));
        if query.terms.is_empty() {
            stops.iter().for_each(|word| query.add(word, 1.0));
        }
        query
    }
}

/// Calls `each` with the words of a text in lower case; an inner `.`, `_`, `:` or apostrophe ends a word.
fn each_part<'a>(lower: &'a str, mut each: impl FnMut(&'a str)) {
    let each = |part: &'a str| {
        if !part.is_empty() && part.len() <= MAX_TERM_BYTES {
            each(part);
        }
    };
    if lower.is_ascii() { ascii_parts(lower, each) } else { unicode_parts(lower).for_each(each) }
}

/// Parts of the words of UAX 29.
fn unicode_parts(lower: &str) -> impl Iterator<Item = &str> {
    lower.unicode_words().flat_map(|word| word.split(['.', '_', ':', '\'', '’']))
}

/// What [`unicode_parts`] are where all is ASCII: letters and digits in a row, and `,` and `;` between two digits.
fn ascii_parts<'a>(lower: &'a str, mut each: impl FnMut(&'a str)) {
    let bytes = lower.as_bytes();
    let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
    let (mut start, mut at) = (0, 0);
    while at < bytes.len() {
        let stays = match bytes[at] {
            b',' | b';' => at > start && is_digit(at - 1) && is_digit(at + 1),
            byte => byte.is_ascii_alphanumeric(),
        };
        at += 1;
        if !stays {
            each(&lower[start..at - 1]);
            start = at;
        }
    }
    each(&lower[start..]);
}

/// Weighted terms to search for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Query {
    /// Each once, in the order of the text.
    pub(crate) terms: Vec<(String, f32)>,
    pub(crate) content_words: usize,
    /// Those of `terms`: a query may be as long as a document.
    known: HashSet<Box<str>, RandomState>,
}

impl Query {
    /// Adds a term unless the query has it.
    pub(crate) fn add(&mut self, term: &str, weight: f32) {
        if !self.known.contains(term) {
            self.known.insert(term.into());
            self.terms.push((term.to_owned(), weight));
        }
    }
}

/// Statistics of one or more indexes that are searched as one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Collection {
    num_chunks: u64,
    num_words: u64,
}

/// For each term the slots that hold it, and how often, in no order.
pub(crate) type Postings = HashMap<Box<str>, Vec<(u32, u32)>, RandomState>;

/// Inverted index of one partition.
#[derive(Debug, Default)]
pub(crate) struct Words {
    postings: Postings,
    /// Words per slot; 0 for a slot that is free or wordless.
    lengths: Vec<u32>,
    num_chunks: u64,
    num_words: u64,
}

impl Words {
    /// Indexes `text` under `slot`, which holds nothing yet.
    pub(crate) fn add(&mut self, terms: &Terms, slot: u32, text: &str) {
        let postings = &mut self.postings;
        let num_words = terms.count(text, |term, count| match postings.get_mut(term) {
            Some(known) => known.push((slot, count)),
            None => drop(postings.insert(term.into(), vec![(slot, count)])),
        });
        if self.lengths.len() <= slot as usize {
            self.lengths.resize(slot as usize + 1, 0);
        }
        self.lengths[slot as usize] = num_words;
        self.num_chunks += 1;
        self.num_words += u64::from(num_words);
    }

    /// Takes the slots out; each comes with its text, which names the postings to visit.
    pub(crate) fn remove(&mut self, terms: &Terms, removed: &[(u32, &str)]) {
        let slots: HashSet<u32> = removed.iter().map(|(slot, _)| *slot).collect();
        let mut visited = HashSet::new();
        for (slot, text) in removed {
            terms.count(text, |term, _| {
                if !visited.contains(term) {
                    visited.insert(Box::<str>::from(term));
                }
            });
            self.num_chunks -= 1;
            self.num_words -= u64::from(std::mem::take(&mut self.lengths[*slot as usize]));
        }
        for term in visited {
            if let Some(postings) = self.postings.get_mut(&term) {
                postings.retain(|(slot, _)| !slots.contains(slot));
                if postings.is_empty() {
                    self.postings.remove(&term);
                }
            }
        }
    }

    /// An index of these postings; `lengths` has the words of each slot, none for a slot that is free.
    pub(crate) fn restore(postings: Postings, lengths: &[Option<u32>]) -> Self {
        let used = lengths.iter().flatten();
        Self {
            postings,
            lengths: lengths.iter().map(|length| length.unwrap_or(0)).collect(),
            num_chunks: used.clone().count() as u64,
            num_words: used.map(|&length| u64::from(length)).sum(),
        }
    }

    /// Whether `other` counts the same words in the same chunks, whatever their slots.
    pub(crate) fn is_as(
        &self,
        other: &Self,
        id: impl Fn(u32) -> Option<u128>,
        other_id: impl Fn(u32) -> Option<u128>,
    ) -> bool {
        // Sums of hashes do not depend on the order of postings.
        fn sums(words: &Words, id: impl Fn(u32) -> Option<u128>) -> HashMap<&str, u64> {
            let hash = |&(slot, count): &(u32, u32)| {
                let length = words.length(slot);
                let bytes = [id(slot).unwrap_or(0), u128::from(count) << 32 | u128::from(length)];
                xxh3_64(&bytes.map(u128::to_le_bytes).concat())
            };
            let sum = |postings: &Vec<_>| postings.iter().map(hash).fold(0, u64::wrapping_add);
            words.postings.iter().map(|(term, postings)| (&**term, sum(postings))).collect()
        }
        (self.num_chunks, self.num_words) == (other.num_chunks, other.num_words)
            && sums(self, id) == sums(other, other_id)
    }

    /// Takes the slots out without their texts: visits every posting.
    pub(crate) fn remove_slots(&mut self, slots: &HashSet<u32>) {
        for &slot in slots {
            self.num_chunks -= 1;
            self.num_words -= u64::from(std::mem::take(&mut self.lengths[slot as usize]));
        }
        self.postings.retain(|_, postings| {
            postings.retain(|(slot, _)| !slots.contains(slot));
            !postings.is_empty()
        });
    }

    pub(crate) fn postings(&self) -> &Postings {
        &self.postings
    }

    /// Words of the text in a slot.
    pub(crate) fn length(&self, slot: u32) -> u32 {
        self.lengths.get(slot as usize).copied().unwrap_or(0)
    }

    /// Adds this index's size to the statistics of a search.
    pub(crate) fn collect(&self, collection: &mut Collection) {
        collection.num_chunks += self.num_chunks;
        collection.num_words += self.num_words;
    }

    /// How many chunks hold `term`.
    pub(crate) fn num_holding(&self, term: &str) -> u64 {
        self.postings.get(term).map_or(0, |postings| postings.len() as u64)
    }

    /// Number of distinct terms.
    pub(crate) fn num_terms(&self) -> usize {
        self.postings.len()
    }

    /// BM25 of every slot: terms come with weight times inverse document frequency.
    pub(crate) fn scores(&self, weighted: &[(String, f32)], collection: Collection) -> Vec<f32> {
        let mut scores = vec![0.0; self.lengths.len()];
        let mean_length = collection.mean_length();
        for (term, weight) in weighted {
            for &(slot, count) in self.postings.get(term.as_str()).into_iter().flatten() {
                let length = self.lengths[slot as usize] as f32 / mean_length;
                let count = count as f32;
                scores[slot as usize] +=
                    weight * count * (K1 + 1.0) / (count + K1 * (1.0 - B + B * length));
            }
        }
        scores
    }
}

impl Collection {
    fn mean_length(&self) -> f32 {
        (self.num_words as f32 / self.num_chunks.max(1) as f32).max(1.0)
    }

    /// Inverse document frequency of a term that `num_holding` chunks hold; never negative.
    pub(crate) fn rarity(&self, num_holding: u64) -> f32 {
        let (all, holding) = (self.num_chunks as f32, num_holding as f32);
        (1.0 + (all - holding + 0.5) / (holding + 0.5)).ln()
    }

    /// Whether a term that `num_holding` chunks hold tells them apart: at most a tenth of them do, or two.
    pub(crate) fn is_rare(&self, num_holding: u64) -> bool {
        num_holding > 0 && num_holding <= (self.num_chunks / 10).max(2)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index(texts: &[&str]) -> Words {
        let mut words = Words::default();
        for (slot, text) in texts.iter().enumerate() {
            words.add(&Terms::new(), slot as u32, text);
        }
        words
    }

    fn search(words: &Words, query: &str) -> Vec<f32> {
        let mut collection = Collection::default();
        words.collect(&mut collection);
        let weighted: Vec<(String, f32)> = Terms::new()
            .query(query)
            .terms
            .into_iter()
            .map(|(term, weight)| {
                let rarity = collection.rarity(words.num_holding(&term));
                (term, weight * rarity)
            })
            .collect();
        words.scores(&weighted, collection)
    }

    proptest! {
        #[test]
        fn words_of_ascii_are_those_of_unicode(text in "[a-c0-2.,;:_' \"\n-]{0,40}|[ -~\t\r\n]{0,60}") {
            let lower = text.to_lowercase();
            let (mut ascii, mut unicode) = (Vec::new(), Vec::new());
            ascii_parts(&lower, |part| ascii.push(part));
            unicode_parts(&lower).for_each(|part| unicode.push(part));
            for parts in [&mut ascii, &mut unicode] {
                parts.retain(|part| !part.is_empty());
            }
            prop_assert_eq!(ascii, unicode);
        }
    }

    #[test]
    fn stop_words_are_sorted_for_the_search() {
        assert!(STOP_WORDS.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(is_stop_word("the") && !is_stop_word("badger"));
    }

    #[test]
    fn the_score_is_the_published_formula() {
        // Two chunks of 3 and 1 words; "badger" stands once in the first.
        let scores = search(&index(&["badger likes honey", "rain"]), "badger");
        let rarity = (1.0f32 + (2.0 - 1.0 + 0.5) / (1.0 + 0.5)).ln();
        let expected = rarity * 2.2 / (1.0 + 1.2 * (0.25 + 0.75 * 3.0 / 2.0));
        assert!((scores[0] - expected).abs() < 1e-6, "{} {expected}", scores[0]);
        assert_eq!(scores[1], 0.0);
    }

    #[test]
    fn words_match_across_inflection_and_case() {
        let words = index(&["She was booking HOTELS.", "Nothing here."]);
        assert!(search(&words, "hotel bookings")[0] > 0.0);
    }

    #[test]
    fn identifiers_match_whole_and_in_parts() {
        let id = "6f1c9a52-7d1e-4c5b-9b57-2d0f5f0a1f10";
        let words = index(&[
            &format!("The key is {id}, and the code (fuzzy-badger)."),
            "A fuzzy thing and a badger, 7d1e and 4c5b.",
        ]);
        let whole = search(&words, id);
        assert!(whole[0] > whole[1]);
        let name = search(&words, "fuzzy-badger");
        assert!(name[0] > name[1] && name[1] > 0.0);
    }

    #[test]
    fn removing_leaves_the_index_as_if_never_added() {
        let texts = ["alpha beta", "beta gamma-ray", "gamma delta"];
        let mut words = index(&texts);
        words.remove(&Terms::new(), &[(1, texts[1])]);
        let mut fresh = Words::default();
        fresh.add(&Terms::new(), 0, texts[0]);
        fresh.add(&Terms::new(), 2, texts[2]);
        let lengths = [Some(words.length(0)), None, Some(words.length(2))];
        let restored = Words::restore(words.postings().clone(), &lengths);
        assert_eq!(search(&restored, "beta gamma"), search(&fresh, "beta gamma"));
        let mut unnamed = index(&texts);
        unnamed.remove_slots(&HashSet::from([1]));
        assert_eq!(unnamed.num_terms(), fresh.num_terms());
        assert_eq!(search(&unnamed, "beta gamma"), search(&fresh, "beta gamma"));
        assert_eq!(words.num_terms(), fresh.num_terms());
        assert_eq!(search(&words, "beta gamma"), search(&fresh, "beta gamma"));
    }

    #[test]
    fn a_query_has_each_term_once_in_the_order_of_its_text() {
        let mut query = Terms::new().query("Badgers dig; red-badger digs, a badger rests.");
        query.add("rest", 0.5);
        query.add("lake", 0.5);
        let terms: Vec<(&str, f32)> =
            query.terms.iter().map(|(term, weight)| (term.as_str(), *weight)).collect();
        let expected = ["badger", "dig", "red", "rest", "red-badger"].map(|term| (term, 1.0f32));
        assert_eq!(terms, [&expected[..], &[("lake", 0.5)]].concat());
        assert_eq!(query.content_words, 7);
    }

    #[test]
    fn a_query_of_stop_words_alone_keeps_them() {
        assert_eq!(Terms::new().query("who is it").content_words, 0);
        assert_eq!(Terms::new().query("who is it").terms.len(), 3);
        assert_eq!(Terms::new().query("who is ada").terms.len(), 1);
    }
}

//! Cuts a turn's text into chunks of about 128 tokens and their sentences.
//! Knows nothing of vectors, hashes or storage: text in, byte ranges out.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

/// A sentence shorter than this joins its neighbour: vectors of very short texts match everything. At 15 a fact of one
/// short sentence shared its vector with whatever came after it: of 366 questions in other words that were for choosing,
/// 0.896 were answered among the best five with 8, 0.861 with 15; 6 and 4 add vectors and find no more (docs/index.md).
const MIN_UNIT_WORDS: usize = 8;
/// A sentence longer than this is cut: one vector for much text blurs
/// (recall@5 0.80 with one vector for each sentence, 0.46 with one for a whole chunk).
const MAX_UNIT_WORDS: usize = 35;
/// Bounds a unit whatever its words are: 35 words of English are about 210 bytes.
const MAX_UNIT_BYTES: usize = 512;

/// A chunk: bytes of the text, and the bytes of its sentences within the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) bytes: Range<usize>,
    pub(crate) units: Vec<Range<usize>>,
}

/// Bytes and words of a stretch of text, trimmed of white space.
#[derive(Debug, Clone)]
struct Piece {
    bytes: Range<usize>,
    words: usize,
}

/// The chunks of `text`, each about `chunk_words` words, on sentence borders where there are any.
///
/// Every byte of the text that is not white space lies in exactly one sentence of exactly one chunk.
/// A paragraph border ends a chunk that is at least half full; no sentence crosses one.
pub(crate) fn spans(text: &str, chunk_words: usize) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut words = 0;
    for paragraph in paragraphs(text) {
        if words >= chunk_words.div_ceil(2) {
            words = 0;
        }
        for unit in units(text, paragraph) {
            let fits = words > 0 && words + unit.words <= chunk_words;
            match spans.last_mut() {
                Some(span) if fits => {
                    span.bytes.end = unit.bytes.end;
                    span.units.push(unit.bytes);
                    words += unit.words;
                }
                _ => {
                    spans.push(Span { bytes: unit.bytes.clone(), units: vec![unit.bytes] });
                    words = unit.words.max(1);
                }
            }
        }
    }
    spans
}

/// Stretches of text between blank lines.
fn paragraphs(text: &str) -> Vec<Range<usize>> {
    let mut paragraphs = Vec::new();
    let mut start = 0;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.trim().is_empty() {
            paragraphs.push(start..at);
            start = at + line.len();
        }
        at += line.len();
    }
    paragraphs.push(start..at);
    paragraphs.retain(|range| !range.is_empty());
    paragraphs
}

/// The sentences of one paragraph: short neighbours joined, long ones cut.
fn units(text: &str, paragraph: Range<usize>) -> Vec<Piece> {
    let mut units: Vec<Piece> = Vec::new();
    for (offset, sentence) in text[paragraph.clone()].split_sentence_bound_indices() {
        for piece in pieces(text, paragraph.start + offset, sentence) {
            match units.last_mut() {
                Some(last)
                    if (last.words < MIN_UNIT_WORDS || piece.words < MIN_UNIT_WORDS / 3)
                        && last.words + piece.words <= MAX_UNIT_WORDS
                        && piece.bytes.end - last.bytes.start <= MAX_UNIT_BYTES =>
                {
                    last.bytes.end = piece.bytes.end;
                    last.words += piece.words;
                }
                _ => units.push(piece),
            }
        }
    }
    units
}

/// One sentence in pieces of at most 35 words and 512 bytes, cut between words where possible.
fn pieces(text: &str, start: usize, sentence: &str) -> Vec<Piece> {
    let words: Vec<Piece> = words(start, sentence);
    let total: usize = words.iter().map(|word| word.words).sum();
    // Equal parts: 36 words become 18 and 18, not 35 and 1.
    let num_parts = total.div_ceil(MAX_UNIT_WORDS).max(1);
    let part_words = total.div_ceil(num_parts);
    let mut pieces: Vec<Piece> = Vec::new();
    for word in words {
        match pieces.last_mut() {
            Some(last)
                if last.words + word.words <= part_words
                    && word.bytes.end - last.bytes.start <= MAX_UNIT_BYTES =>
            {
                last.bytes.end = word.bytes.end;
                last.words += word.words;
            }
            _ => pieces.push(word),
        }
    }
    pieces.iter_mut().for_each(|piece| trim(text, &mut piece.bytes));
    pieces.retain(|piece| !piece.bytes.is_empty());
    pieces
}

/// Words of a sentence with the punctuation that follows them; none longer than 512 bytes.
fn words(start: usize, sentence: &str) -> Vec<Piece> {
    let mut words: Vec<Piece> = Vec::new();
    for (offset, part) in sentence.split_word_bound_indices() {
        let counts = usize::from(part.chars().any(char::is_alphanumeric));
        for range in cut(part) {
            let bytes = start + offset + range.start..start + offset + range.end;
            match words.last_mut() {
                Some(last) if counts == 0 && bytes.end - last.bytes.start <= MAX_UNIT_BYTES => {
                    last.bytes.end = bytes.end;
                }
                _ => words.push(Piece { bytes, words: counts }),
            }
        }
    }
    words
}

/// `part` in runs of at most 512 bytes, cut between characters.
fn cut(part: &str) -> Vec<Range<usize>> {
    let mut runs = Vec::with_capacity(1);
    let mut start = 0;
    while part.len() - start > MAX_UNIT_BYTES {
        let mut end = start + MAX_UNIT_BYTES;
        while !part.is_char_boundary(end) {
            end -= 1;
        }
        runs.push(start..end);
        start = end;
    }
    runs.push(start..part.len());
    runs
}

fn trim(text: &str, bytes: &mut Range<usize>) {
    let piece = &text[bytes.clone()];
    let end = bytes.start + piece.trim_end().len();
    bytes.start += piece.len() - piece.trim_start().len();
    bytes.end = end.max(bytes.start);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WORDS: usize = 96;

    fn num_words(text: &str) -> usize {
        text.unicode_words().count()
    }

    fn check(text: &str, chunk_words: usize) {
        let spans = spans(text, chunk_words);
        let mut at = 0;
        for span in &spans {
            assert_eq!(span.bytes.start, span.units[0].start);
            assert_eq!(span.bytes.end, span.units.last().unwrap().end);
            for unit in &span.units {
                assert!(text[at..unit.start].trim().is_empty(), "lost {:?}", &text[at..unit.start]);
                assert!(!text[unit.clone()].trim().is_empty());
                assert!(unit.len() <= MAX_UNIT_BYTES);
                at = unit.end;
            }
        }
        assert!(text[at..].trim().is_empty(), "lost {:?}", &text[at..]);
    }

    #[test]
    fn a_short_text_is_one_chunk_of_one_sentence() {
        let spans = spans("  The passport is in the drawer.  ", WORDS);
        assert_eq!(spans.len(), 1);
        assert_eq!((spans[0].bytes.clone(), spans[0].units.len()), (2..32, 1));
    }

    #[test]
    fn sentences_are_joined_to_units_and_units_packed_to_chunks() {
        let sentence = "The quick brown fox jumps over the lazy dog near the river bank. ";
        let text = sentence.repeat(40);
        let spans = spans(&text, WORDS);
        for span in &spans {
            assert!(num_words(&text[span.bytes.clone()]) <= WORDS);
            for unit in &span.units {
                assert!((13..=35).contains(&num_words(&text[unit.clone()])));
                assert!(text[unit.clone()].ends_with("bank."));
            }
        }
        assert!(spans.len() <= 40 * 13 / 70);
    }

    #[test]
    fn a_long_sentence_is_cut_into_equal_parts_between_words() {
        let text = "word ".repeat(100);
        let lengths: Vec<usize> = spans(&text, WORDS)
            .iter()
            .flat_map(|span| &span.units)
            .map(|unit| num_words(&text[unit.clone()]))
            .collect();
        assert_eq!(lengths.iter().sum::<usize>(), 100);
        assert!(lengths.iter().all(|&len| len <= MAX_UNIT_WORDS), "{lengths:?}");
    }

    #[test]
    fn an_unbroken_run_is_cut_at_characters() {
        check(&"é".repeat(5_000), WORDS);
        check(&"a".repeat(5_000), WORDS);
    }

    #[test]
    fn a_full_paragraph_ends_its_chunk() {
        let paragraph = "one two three four five six seven eight nine ten. ".repeat(6);
        let text = format!("{paragraph}\n\n{paragraph}");
        assert_eq!(spans(&text, WORDS).len(), 2);
    }

    #[test]
    fn white_space_alone_gives_no_chunk() {
        assert!(spans(" \n\t\n ", WORDS).is_empty());
        assert!(spans("", WORDS).is_empty());
    }

    proptest! {
        #[test]
        fn every_visible_byte_is_in_one_sentence_of_one_chunk(text in "(?s).{0,600}", chunk_words in 1usize..200) {
            check(&text, chunk_words);
        }

        #[test]
        fn prose_like_text_is_covered(words in prop::collection::vec("[a-zA-Z0-9\\-']{1,12}[.!?\n ]{1,3}", 0..200)) {
            check(&words.concat(), WORDS);
        }
    }
}

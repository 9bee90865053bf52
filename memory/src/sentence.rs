//! Sentences: what a quotation of a part of a chunk consists of, so that forgetting the chunk finds it.
//! Knows text alone.

use std::ops::Range;

/// The sentences of `text`, in order, ended by a mark and white space or by a line break; none is white space alone.
///
/// Who quotes a part of a chunk in a turn of [`Role::Recalled`](crate::Role::Recalled) quotes whole sentences of these:
/// [`Store::forget`](crate::Store::forget) looks for them.
pub fn sentences(text: &str) -> Vec<Range<usize>> {
    let mut sentences = Vec::new();
    let mut start = 0;
    let mut last = ' ';
    for (at, c) in text.char_indices() {
        let ended = c.is_whitespace() && matches!(last, '.' | '!' | '?' | '。');
        if (ended || is_line_break(c)) && !text[start..at].trim().is_empty() {
            sentences.push(start..at);
            start = at;
        }
        // A closing quotation mark or bracket belongs to the sentence.
        if !matches!(c, '"' | '\'' | ')' | '\u{201d}' | '\u{2019}') {
            last = c;
        }
    }
    if !text[start..].trim().is_empty() {
        sentences.push(start..text.len());
    }
    sentences
}

/// Whether `c` begins a new line, by Unicode or in a terminal.
pub fn is_line_break(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

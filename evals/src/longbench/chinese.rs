//! Chinese words as Python's jieba 0.42.1 cuts them in its default mode.
//! Knows no metric.

use jieba_rs::Jieba;
use regex::Regex;
use std::sync::LazyLock;

/// The dictionary takes a second to load, and only two metrics read it.
static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);

/// What Python's jieba takes for one token in a run of letters and digits that its dictionary lacks.
static UNKNOWN_WORD: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"[a-zA-Z0-9]+(?:\.[0-9]+)?%?").expect("the pattern is a constant that compiles")
});

/// Cuts `text` into words; together they are `text`.
///
/// The crate differs from the Python package outside plain Chinese, so two rules of the latter are applied around it:
/// which characters are looked up in the dictionary at all, and how a run that is no dictionary word is cut.
pub(super) fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if !is_looked_up(first) {
            let (character, tail) = rest.split_at(first.len_utf8());
            words.push(character);
            rest = tail;
            continue;
        }
        let end = rest.find(|c| !is_looked_up(c)).unwrap_or(rest.len());
        let (block, tail) = rest.split_at(end);
        for token in JIEBA.cut(block, true) {
            if token.word.is_ascii() && !JIEBA.has_word(token.word) {
                push_unknown(token.word, &mut words);
            } else {
                words.push(token.word);
            }
        }
        rest = tail;
    }
    words
}

/// The Python package's class of characters that may form words; newer ideographs are not among them.
fn is_looked_up(c: char) -> bool {
    matches!(c, '\u{4E00}'..='\u{9FD5}' | '+' | '#' | '&' | '.' | '_' | '%' | '-')
        || c.is_ascii_alphanumeric()
}

/// Cuts a run into its words and what stands between them.
fn push_unknown<'a>(run: &'a str, words: &mut Vec<&'a str>) {
    let mut end = 0;
    for word in UNKNOWN_WORD.find_iter(run) {
        if word.start() > end {
            words.push(&run[end..word.start()]);
        }
        words.push(word.as_str());
        end = word.end();
    }
    if end < run.len() {
        words.push(&run[end..]);
    }
}

#[cfg(test)]
mod tests {
    use super::words;
    use proptest::prelude::*;

    #[test]
    fn words_are_those_of_the_python_package() {
        let cases = [
            ("今天天气很好。", "今天天气/很/好/。"),
            ("他来到了网易杭研大厦", "他/来到/了/网易/杭研/大厦"),
            ("版本1.2.3-b", "版本/1.2/./3/-/b"),
            ("答案是段落15%", "答案/是/段落/15%"),
        ];
        for (text, expected) in cases {
            assert_eq!(words(text).join("/"), expected);
        }
    }

    proptest! {
        #[test]
        fn words_are_the_text(text in "[\u{4E00}-\u{9FFF}a-c0-2.%_ \\-，。]{0,40}") {
            prop_assert_eq!(words(&text).concat(), text);
        }
    }
}

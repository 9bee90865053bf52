//! Cutting a prompt: its beginning, or its two ends, where the benchmark expects the least to be lost.
//! Knows no tokenizer: it counts with the one that is given.

use crate::job::Result;

/// Bytes a token of text takes at least on average: where the search for a cut starts.
const BYTES_PER_TOKEN: usize = 4;

/// The first `bytes` of `text` or, where these end within a character, what is before it.
pub(crate) fn beginning(text: &str, bytes: usize) -> &str {
    &text[..text.floor_char_boundary(bytes)]
}

/// The first and the last `max_tokens` / 2 tokens of `prompt`; None if it has no more than `max_tokens`.
///
/// The cuts are at characters, where LongBench's own code cuts the token sequence and decodes it: a token that holds
/// half a character is dropped here, and replaced by a mark there.
///
/// # Errors
/// As `count_tokens`.
///
/// # Cost
/// Two searches of O(log n) counts; a count goes over little more than what is kept.
pub(crate) fn ends<'a>(
    prompt: &'a str,
    max_tokens: usize,
    count_tokens: &dyn Fn(&str) -> Result<usize>,
) -> Result<Option<(&'a str, &'a str)>> {
    if count_tokens(prompt)? <= max_tokens {
        return Ok(None);
    }
    let half = max_tokens / 2;
    let head = longest(prompt.len(), half, |len| {
        count_tokens(&prompt[..prompt.floor_char_boundary(len)])
    })?;
    let (head, rest) = prompt.split_at(prompt.floor_char_boundary(head));
    // The two parts may not overlap, even where a part has fewer tokens alone than in the whole.
    let tail = longest(rest.len(), half, |len| {
        count_tokens(&rest[rest.ceil_char_boundary(rest.len() - len)..])
    })?;
    Ok(Some((head, &rest[rest.ceil_char_boundary(rest.len() - tail)..])))
}

/// The greatest length up to `len` whose text has at most `max_tokens` tokens, if tokens grow with length.
fn longest(len: usize, max_tokens: usize, count: impl Fn(usize) -> Result<usize>) -> Result<usize> {
    let mut too_long = max_tokens.saturating_mul(BYTES_PER_TOKEN).max(1);
    let mut fits = 0;
    // A first guess that doubles keeps the counts short where the prompt is far over its limit.
    while too_long <= len && count(too_long)? <= max_tokens {
        fits = too_long;
        too_long = too_long.saturating_mul(2);
    }
    too_long = too_long.min(len + 1);
    while too_long - fits > 1 {
        let middle = fits + (too_long - fits) / 2;
        if count(middle)? <= max_tokens {
            fits = middle;
        } else {
            too_long = middle;
        }
    }
    Ok(fits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    fn middle_cut(
        prompt: &str,
        max_tokens: usize,
        count: &dyn Fn(&str) -> Result<usize>,
    ) -> Result<String> {
        let ends = ends(prompt, max_tokens, count)?;
        Ok(ends.map_or_else(|| prompt.to_owned(), |(head, tail)| [head, tail].concat()))
    }

    /// A token for each started group of three characters.
    fn count(text: &str) -> Result<usize> {
        Ok(text.chars().count().div_ceil(3))
    }

    #[test]
    fn short_prompts_stay_whole() {
        assert_eq!(middle_cut("abcdefgh", 3, &count).unwrap(), "abcdefgh");
        assert_eq!(middle_cut("", 0, &count).unwrap(), "");
    }

    #[test]
    fn first_and_last_halves_of_the_budget_are_kept() {
        assert_eq!(middle_cut("abcdefghijklm", 4, &count).unwrap(), "abcdefhijklm");
        assert_eq!(middle_cut("abcdefghijklm", 3, &count).unwrap(), "abcklm");
        assert_eq!(middle_cut("abcdefghijklm", 1, &count).unwrap(), "");
        assert_eq!(middle_cut("天气很好，我们去公园", 2, &count).unwrap(), "天气很去公园");
    }

    #[test]
    fn a_beginning_is_counted_in_bytes_and_splits_no_character() {
        for (bytes, expected) in [(0, ""), (1, "a"), (2, "a"), (3, "aé"), (4, "aéb"), (9, "aéb")]
        {
            assert_eq!(beginning("aéb", bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn counts_are_few_and_short() {
        let text = "a".repeat(3_000_000);
        let (num_counts, most_bytes) = (Cell::new(0), Cell::new(0));
        let counted = |part: &str| {
            num_counts.set(num_counts.get() + 1);
            if part.len() < text.len() {
                most_bytes.set(most_bytes.get().max(part.len()));
            }
            count(part)
        };
        assert_eq!(middle_cut(&text, 2_000, &counted).unwrap().len(), 6_000);
        assert!(num_counts.get() < 30, "{}", num_counts.get());
        assert!(most_bytes.get() <= 4_000, "{}", most_bytes.get());
    }

    #[test]
    fn errors_of_the_tokenizer_are_passed_on() {
        let failing = |_: &str| -> Result<usize> { Err("no tokenizer".into()) };
        assert!(middle_cut("abc", 1, &failing).is_err());
    }

    proptest! {
        #[test]
        fn parts_are_the_ends_of_the_prompt(text in "\\PC{0,80}", max_tokens in 0usize..40) {
            let cut = middle_cut(&text, max_tokens, &count).unwrap();
            prop_assert!(count(&cut).unwrap() <= max_tokens);
            let head: String = text.chars().zip(cut.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
            prop_assert!(text.ends_with(&cut[head.len()..]));
        }
    }
}

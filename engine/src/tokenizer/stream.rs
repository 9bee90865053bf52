//! Assembles text from tokens one at a time, whole characters only.
//! Knows no model and no stop conditions: it is told ids and returns text.

use super::Tokenizer;

/// Turns a stream of token ids into text; what it emits, joined, is the decoded sequence.
#[derive(Debug, Clone)]
pub(crate) struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes of a character that is not complete yet; at most three.
    pending: Vec<u8>,
    /// Whether a first blank is still to be dropped.
    at_start: bool,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        let at_start = tokenizer.strips_leading_space();
        Self { tokenizer, skip_special, pending: Vec::new(), at_start }
    }

    /// The same for tokens that go on in text: a first blank is theirs.
    pub(super) fn inside(self) -> Self {
        Self { at_start: false, ..self }
    }

    /// The text that `id` completes, `None` where it completes no character.
    ///
    /// Bytes that can no longer become a character are U+FFFD at once. Tokens that stand for no text
    /// and ids outside the vocabulary are passed over.
    pub(crate) fn push(&mut self, id: u32) -> Option<String> {
        if self.skip_special && self.tokenizer.is_hidden(id) {
            return None;
        }
        let bytes = self.tokenizer.token_bytes(id)?;
        let mut bytes = bytes.as_slice();
        if self.at_start && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.at_start = false;
        }
        self.pending.extend(bytes);
        let keep = incomplete_tail(&self.pending);
        let rest = self.pending.split_off(self.pending.len() - keep);
        let whole = std::mem::replace(&mut self.pending, rest);
        (!whole.is_empty()).then(|| String::from_utf8_lossy(&whole).into_owned())
    }

    /// What is left at the end of the stream: an unfinished character is U+FFFD.
    pub(crate) fn flush(&mut self) -> Option<String> {
        let rest = std::mem::take(&mut self.pending);
        (!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned())
    }
}

/// How many bytes at the end begin a character whose other bytes are still to come.
fn incomplete_tail(bytes: &[u8]) -> usize {
    let mut rest = bytes;
    loop {
        match std::str::from_utf8(rest) {
            Ok(_) => return 0,
            Err(error) => match error.error_len() {
                None => return rest.len() - error.valid_up_to(),
                Some(invalid) => rest = &rest[error.valid_up_to() + invalid..],
            },
        }
    }
}

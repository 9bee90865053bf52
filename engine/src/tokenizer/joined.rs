//! Text put behind text piece by piece, with the tokens that all of it at once would have.
//! Knows no template: it is told what is scaffold, whose control tokens count, and what is content, whose do not.

use std::borrow::Cow;

use tokenizers::pre_tokenizers::metaspace::PrependScheme;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use super::Tokenizer;
use super::pieces::Pieces;
use crate::Result;

/// The tokens of a text that grows at its end.
#[derive(Debug)]
pub(crate) struct Joined<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// The token before the next piece; `None` where that begins a document.
    last: Option<u32>,
    /// Whether a blank at the end of scaffold waits for the next piece: a word has one token with the blank before it.
    has_blank: bool,
}

impl<'a> Joined<'a> {
    /// A text behind the token `last`; `None` at the beginning of a stream.
    pub(crate) fn behind(tokenizer: &'a Tokenizer, last: Option<u32>) -> Self {
        Self { tokenizer, tokens: Vec::new(), last, has_blank: false }
    }

    /// Writes what begins every document. The piece behind it is the document's first.
    pub(crate) fn begin_document(&mut self) {
        self.tokens.extend(self.tokenizer.prefix());
        self.last = None;
    }

    /// Writes one token.
    pub(crate) fn token(&mut self, token: u32) {
        self.tokens.push(token);
        self.last = Some(token);
    }

    /// Writes text of a template, control tokens parsed.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn scaffold(&mut self, text: &str) -> Result<()> {
        self.push(text, true)
    }

    /// Writes text from outside, in which no control token is parsed.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn content(&mut self, text: &str) -> Result<()> {
        self.push(text, false)
    }

    /// The token before the next piece.
    pub(crate) fn last(&self) -> Option<u32> {
        self.last
    }

    /// Tokens written so far; a blank that waits is none yet.
    pub(crate) fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Hands over what is written, a blank that waits as a token of its own; what follows goes on behind it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn take(&mut self) -> Result<Vec<u32>> {
        if std::mem::take(&mut self.has_blank) {
            self.write(" ", true)?;
        }
        Ok(std::mem::take(&mut self.tokens))
    }

    fn push(&mut self, text: &str, is_scaffold: bool) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let text = match std::mem::take(&mut self.has_blank) {
            true => Cow::Owned(format!(" {text}")),
            false => Cow::Borrowed(text),
        };
        match text.strip_suffix(' ') {
            Some(rest) if is_scaffold => {
                self.has_blank = true;
                self.write(rest, true)
            }
            _ => self.write(&text, is_scaffold),
        }
    }

    fn write(&mut self, text: &str, special: bool) -> Result<()> {
        // Of a blank alone nothing is left, and no tokenizer is to put one of its own there.
        if text.is_empty() {
            return Ok(());
        }
        let ids = self.tokenizer.encode_behind(self.last, text, special)?;
        self.last = ids.last().copied().or(self.last);
        self.tokens.extend(ids);
        Ok(())
    }
}

impl Tokenizer {
    /// The ids of `text` where it stands behind the token `before`; `None` where it begins a document.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn encode_behind(
        &self,
        before: Option<u32>,
        text: &str,
        special: bool,
    ) -> Result<Vec<u32>> {
        match before {
            Some(before) if !self.begins_anew(before) => self.encode_inside(text, special),
            _ => self.encode(text, special),
        }
    }

    /// The ids of `text` where it stands behind other text.
    ///
    /// Vocabularies of SentencePiece put a blank of their own before a text: behind other text it is one that nobody wrote.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub(crate) fn encode_inside(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        if text.is_empty() || !self.has_own_blank() {
            return self.encode(text, special);
        }
        // A line break is a byte's piece there, which merges with nothing: what stands behind it is inside a text.
        let mut ids = self.encode(&format!("\n{text}"), special)?;
        let line_break = self.id(&self.inner.pieces.of_byte(b'\n'));
        // Before it is nothing, or the blank.
        let at = ids.iter().take(2).position(|id| Some(*id) == line_break);
        match at {
            Some(at) => {
                ids.drain(..=at);
                Ok(ids)
            }
            None => self.encode(text, special),
        }
    }

    /// Whether the tokenizer puts a blank of its own before a text, which its decoder takes off again or not.
    fn has_own_blank(&self) -> bool {
        use PrependScheme::{Always, First};
        let full = &self.inner.full;
        let may_prepend = |part: &PreTokenizerWrapper| prepends_by(part, &[First, Always]);
        matches!(self.inner.pieces, Pieces::Metaspace { .. })
            && (self.strips_leading_space()
                || full.get_normalizer().is_some_and(prepends)
                || full.get_pre_tokenizer().is_some_and(may_prepend))
    }

    /// Whether the tokenizer puts a blank of its own behind the token `before` as well: an added token ends what is
    /// normalized together.
    fn begins_anew(&self, before: u32) -> bool {
        let added = self.inner.full.get_added_vocabulary().get_added_tokens_decoder();
        let Some(token) = added.get(&before) else { return false };
        let by_normalizer = self.inner.full.get_normalizer().is_some_and(prepends);
        let always = |part: &PreTokenizerWrapper| prepends_by(part, &[PrependScheme::Always]);
        let by_pre_tokenizer = self.inner.full.get_pre_tokenizer().is_some_and(always);
        (by_normalizer && !token.normalized) || by_pre_tokenizer
    }
}

fn prepends(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::Prepend(_) => true,
        NormalizerWrapper::Sequence(sequence) => {
            let parts: &[NormalizerWrapper] = sequence.as_ref();
            parts.iter().any(prepends)
        }
        _ => false,
    }
}

/// Whether a part of `pre_tokenizer` puts a blank before a text by one of `schemes`.
fn prepends_by(pre_tokenizer: &PreTokenizerWrapper, schemes: &[PrependScheme]) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::Metaspace(metaspace) => schemes.contains(&metaspace.prepend_scheme),
        PreTokenizerWrapper::Sequence(sequence) => {
            let parts: &[PreTokenizerWrapper] = sequence.as_ref();
            parts.iter().any(|part| prepends_by(part, schemes))
        }
        _ => false,
    }
}

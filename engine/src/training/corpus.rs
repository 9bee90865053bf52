//! Text as rows of tokens: documents end to end, cut into sequences of one length, no padding.
//! Knows no model; the order follows from seed and step alone, so that a run can go on where it stopped.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;

/// How text becomes tokens.
pub(super) enum Vocabulary {
    /// A token a byte, and 256 for the end of a document.
    Bytes,
    /// A model's own; `end` closes a document.
    Model { tokenizer: Tokenizer, end: Option<u32> },
}

impl Vocabulary {
    /// Tokens that it can produce are below this.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Bytes => 257,
            Self::Model { tokenizer, .. } => tokenizer.vocab_size(),
        }
    }

    /// The same of the tokens that a text becomes, without special ones that no text has.
    pub(super) fn spoken_size(&self) -> usize {
        match self {
            Self::Bytes => self.size(),
            Self::Model { tokenizer, end } => {
                tokenizer.spoken_size().max(end.map_or(0, |end| end as usize + 1))
            }
        }
    }

    fn encode(&self, text: &str, into: &mut Vec<u32>) -> Result<()> {
        match self {
            Self::Bytes => {
                into.extend(text.bytes().map(u32::from));
                into.push(256);
            }
            Self::Model { tokenizer, end } => {
                // Pieces that a tokenizer can hold at once, cut where a paragraph ends.
                let mut last = None;
                for piece in paragraphs(text) {
                    let tokens = tokenizer.encode_behind(last, piece, false)?;
                    last = tokens.last().copied();
                    into.extend(tokens);
                }
                into.extend(*end);
            }
        }
        Ok(())
    }
}

/// `text` in pieces of about 64 KiB, each ending with a newline but the last.
fn paragraphs(text: &str) -> impl Iterator<Item = &str> {
    const PIECE: usize = 64 << 10;
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let from = (PIECE.min(rest.len())..=rest.len()).find(|at| rest.is_char_boundary(*at))?;
        let cut = rest[from..].find('\n').map_or(rest.len(), |at| from + at + 1);
        let (piece, after) = rest.split_at(cut);
        rest = after;
        Some(piece)
    })
}

/// The sequences of a set of files.
pub(super) struct Corpus {
    tokens: Vec<u32>,
    sequence_tokens: usize,
}

impl Corpus {
    /// Reads and encodes `files`.
    ///
    /// # Errors
    /// If a file cannot be read, or all of them are shorter than one sequence and its last target.
    pub(super) fn read(
        name: &str,
        files: &[PathBuf],
        vocabulary: &Vocabulary,
        sequence_tokens: usize,
    ) -> Result<Self> {
        let mut tokens = Vec::new();
        for path in files {
            let text =
                std::fs::read_to_string(path).map_err(|e| Error::io("read corpus", path, e))?;
            vocabulary.encode(&text, &mut tokens)?;
        }
        if tokens.len() <= sequence_tokens {
            return Err(Error::invalid(format!(
                "{name}: {} tokens in {} files, expected at least one sequence of {sequence_tokens} and one more",
                tokens.len(),
                files.len()
            )));
        }
        Ok(Self { tokens, sequence_tokens })
    }

    /// Whole sequences.
    pub(super) fn len(&self) -> usize {
        (self.tokens.len() - 1) / self.sequence_tokens
    }

    /// Sequence `index` in the order of the text: inputs and their targets, one token later.
    pub(super) fn sequence(&self, index: usize) -> (&[u32], &[u32]) {
        let start = index % self.len() * self.sequence_tokens;
        let end = start + self.sequence_tokens;
        (&self.tokens[start..end], &self.tokens[start + 1..=end])
    }

    /// Sequence `number` of an endless training order: every epoch holds each sequence once, shuffled by its own seed.
    pub(super) fn shuffled(&self, number: u64, seed: u64) -> usize {
        let (epoch, within) = (number / self.len() as u64, number % self.len() as u64);
        let mut order: Vec<usize> = (0..self.len()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(epoch);
        order.shuffle(&mut rng);
        order[within as usize]
    }

    /// Fingerprint of the tokens.
    pub(super) fn fingerprint(&self) -> u64 {
        let bytes: Vec<u8> = self.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
        xxhash_rust::xxh3::xxh3_64(&bytes)
    }
}

//! Text to token ids and back, for the vocabularies of tokenizer.json and of GGUF files.
//! Knows no model, session or template; its folder is the only place that names `tokenizers`.

use std::path::Path;
use std::sync::Arc;

use tokenizers::{
    DecoderWrapper, Model as _, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer as HfTokenizer, TokenizerImpl,
};

use crate::gguf::Gguf;
use crate::{Error, ErrorKind, Result};

mod joined;
mod json;
mod pieces;
mod pipeline;
mod sentencepiece;
mod shared;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use joined::Joined;
use pieces::Pieces;
use shared::{SharedModel, Sizes};
pub(crate) use stream::StreamDecoder;

type Core = TokenizerImpl<
    SharedModel,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// A tokenizer; cloning it is cheap, clones share one vocabulary.
#[derive(Clone)]
pub(crate) struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    /// Parses the strings of added tokens in the text into their ids.
    full: Core,
    /// Treats the strings of control tokens as any other text.
    plain: Core,
    pieces: Pieces,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    sizes: Sizes,
    special: SpecialIds,
}

/// What a vocabulary says of its own special tokens; `None` where it says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SpecialIds {
    /// Beginning of a document.
    pub(crate) bos: Option<u32>,
    /// End of a document or of generation.
    pub(crate) eos: Option<u32>,
    /// End of a turn.
    pub(crate) eot: Option<u32>,
    /// End of a message that waits for a tool.
    pub(crate) eom: Option<u32>,
    /// Unknown input.
    pub(crate) unk: Option<u32>,
    /// Padding.
    pub(crate) pad: Option<u32>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// `NotFound` or `Storage` where the file cannot be read, else as [`Self::from_bytes`].
    pub(crate) fn from_file(path: &Path) -> Result<Self> {
        let bytes =
            std::fs::read(path).map_err(|source| Error::io("reading tokenizer", path, source))?;
        Self::from_bytes(&bytes, path)
    }

    /// Reads the bytes of a `tokenizer.json`; `path` is only for the text of errors.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupted`] where the bytes are not a tokenizer, [`ErrorKind::Model`] where
    /// they are one of a kind that is not read here.
    pub(crate) fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        guarded(path, || {
            let tokenizer = json::parse(bytes, path)?;
            Self::new(tokenizer, path, SpecialIds::default(), None)
        })
    }

    /// Builds the tokenizer that a GGUF file carries in its metadata.
    ///
    /// # Errors
    /// [`ErrorKind::Model`] for a vocabulary or a pre-tokenizer that is not read here, by name;
    /// [`ErrorKind::Corrupted`] where vocabulary, merges and special ids contradict each other.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let built = pipeline::build(gguf)?;
        Self::new(built.tokenizer, gguf.path(), built.special, Some(built.prefix))
    }

    /// What a GGUF file says of its vocabulary, as the text of a tokenizer.json.
    ///
    /// # Errors
    /// As [`Self::from_gguf`].
    pub(crate) fn gguf_json(gguf: &Gguf) -> Result<String> {
        pipeline::build(gguf)?.tokenizer.to_string(true).map_err(|source| {
            Error::model(format!("tokenizer {}: {source}", gguf.path().display()))
        })
    }

    fn new(
        mut tokenizer: HfTokenizer,
        path: &Path,
        special: SpecialIds,
        prefix: Option<Vec<u32>>,
    ) -> Result<Self> {
        let wrong = |what: String| Error::model(format!("tokenizer {}: {what}", path.display()));
        // Files for training or embedding carry limits (128 tokens, padded) that would cut text.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|source| wrong(format!("lifting its length limit: {source}")))?;
        let pieces = Pieces::of(tokenizer.get_decoder()).map_err(wrong)?;
        let (prefix, suffix) = match prefix {
            Some(prefix) => (prefix, Vec::new()),
            None => json::surroundings(&tokenizer).map_err(wrong)?,
        };
        let sizes = Sizes::of(&tokenizer);
        let (full, plain) = shared::split(&tokenizer).map_err(wrong)?;
        let inner = Inner { full, plain, pieces, prefix, suffix, sizes, special };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The ids of `text`, nothing added before or after.
    ///
    /// With `special` false no control token comes out, whatever the text says: `<|im_end|>` in it
    /// becomes the pieces of those ten letters and signs. Text from outside is encoded this way.
    /// Added tokens that look like markup (`<tool_call>`) count as control tokens here, but for the tags of HTML.
    ///
    /// A byte that the vocabulary has no piece for is left out, as the model's own tokenizer
    /// leaves it out: SmolLM2 has none for six control characters (U+0004, U+0006, U+0013, U+0014,
    /// U+0016, U+001D) and for the planes 4 to 11 of Unicode, which are unassigned.
    ///
    /// # Errors
    /// [`ErrorKind::Model`] where the tokenizer fails, or cannot spell a control token's text.
    pub(crate) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let core = if special { &self.inner.full } else { &self.inner.plain };
        let encoding = core.encode_fast(text, false).map_err(|source| {
            Error::model(format!("encoding {} bytes of text: {source}", text.len()))
        })?;
        let ids = encoding.get_ids().to_vec();
        if special || !ids.iter().any(|&id| self.is_special(id)) {
            return Ok(ids);
        }
        // A control token whose text is one whole word of the text: the model finds it in its
        // vocabulary (`ignore_merges`), past the guard over added tokens. Spell it byte by byte.
        let mut spelled = Vec::with_capacity(ids.len() + 16);
        for id in ids {
            if self.is_special(id) {
                self.spell(id, &mut spelled)?;
            } else {
                spelled.push(id);
            }
        }
        Ok(spelled)
    }

    /// The ids of a rendered template, control tokens parsed.
    pub(crate) fn encode_with_specials(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, true)
    }

    /// The ids of a document as the tokenizer itself frames one: `[CLS] .. [SEP]` or `<s> ..`
    /// around the text, in which no control token is parsed.
    pub(crate) fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.inner.prefix.clone();
        ids.extend(self.encode(text, false)?);
        ids.extend(&self.inner.suffix);
        Ok(ids)
    }

    /// How many tokens `text` takes as text from outside.
    pub(crate) fn count(&self, text: &str) -> Result<usize> {
        Ok(self.encode(text, false)?.len())
    }

    /// The text of `ids`; ids outside the vocabulary give nothing, bytes that are not UTF-8 give
    /// U+FFFD. Equal to what a [`StreamDecoder`] emits for the same ids. `skip_special` leaves out the tokens that stand for no
    /// text ([`Self::is_hidden`]).
    ///
    /// # Errors
    /// [`ErrorKind::Model`] where a WordPiece decoder fails.
    pub(crate) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if self.inner.pieces == Pieces::WordPiece {
            return self.inner.full.decode(ids, skip_special).map_err(|source| {
                Error::model(format!("decoding {} tokens: {source}", ids.len()))
            });
        }
        let mut stream = StreamDecoder::new(self.clone(), skip_special);
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.flush());
        Ok(text)
    }

    /// The bytes one token stands for, not always whole UTF-8; `None` outside the vocabulary.
    pub(crate) fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        let added = self.inner.full.get_added_vocabulary().get_added_tokens_decoder();
        if let Some(token) = added.get(&id) {
            let content = match self.inner.pieces {
                // A run of blanks that the file adds (Gemma) is written as its other pieces are.
                Pieces::Metaspace { .. } if !token.special => token.content.replace('▁', " "),
                _ => token.content.clone(),
            };
            return Some(content.into_bytes());
        }
        let piece = self.inner.full.get_model().id_to_token(id)?;
        Some(self.inner.pieces.bytes(&piece))
    }

    /// The id of a token by its exact string in the vocabulary.
    pub(crate) fn id(&self, token: &str) -> Option<u32> {
        self.inner.full.token_to_id(token)
    }

    /// One past the largest id; a model's embedding may have more rows than this.
    pub(crate) fn vocab_size(&self) -> usize {
        self.inner.sizes.all
    }

    /// One past the largest id that text from outside may have: a model's embedding has at least as many rows.
    ///
    /// Files list special tokens behind them for what the model has no part of: Gemma 3's an image's, whose rows its text
    /// models lack.
    pub(crate) fn spoken_size(&self) -> usize {
        self.inner.sizes.spoken
    }

    /// Whether `id` is a control token, which [`Self::encode`] never makes from plain text.
    pub(crate) fn is_special(&self, id: u32) -> bool {
        let added = self.inner.plain.get_added_vocabulary();
        added
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| added.is_special_token(&token.content))
    }

    /// Whether `id` stands for no text: the file itself marks it as special.
    ///
    /// Fewer than those of [`Self::is_special`]: `<think>` and `<tool_call>` steer a model, and no text from outside may make
    /// them, but where their file lists them as ordinary they are part of what the model says.
    pub(crate) fn is_hidden(&self, id: u32) -> bool {
        let added = self.inner.full.get_added_vocabulary().get_added_tokens_decoder();
        added.get(&id).is_some_and(|token| token.special)
    }

    /// Whether a text is the bytes of its tokens, one behind the other: in every vocabulary but WordPiece's.
    pub(crate) fn is_reversible(&self) -> bool {
        self.inner.pieces != Pieces::WordPiece
    }

    /// What begins every document (`<s>`); empty for most chat models.
    pub(crate) fn prefix(&self) -> &[u32] {
        &self.inner.prefix
    }

    /// The special ids that the vocabulary itself names: GGUF files do, tokenizer.json does not.
    pub(crate) fn special_ids(&self) -> SpecialIds {
        self.inner.special
    }

    /// The control tokens that end an answer though neither the file's `eos` nor its `eot` names them: `eom`, and those
    /// known by their text.
    ///
    /// A GGUF file names one token of each kind where the model's own list has several: Qwen ends with `<|im_end|>` or
    /// `<|endoftext|>`, Llama 3 with `<|eot_id|>`, `<|eom_id|>` or `<|end_of_text|>`. llama.cpp finds them by their text,
    /// too (`special_eog_ids` in `llama-vocab.cpp`).
    pub(crate) fn ends_by_name(&self) -> Vec<u32> {
        const NAMES: [&str; 6] = [
            "<|eot_id|>",
            "<|eom_id|>",
            "<|im_end|>",
            "<|end|>",
            "<|endoftext|>",
            "<|end_of_text|>",
        ];
        let named = NAMES.iter().filter_map(|name| self.id(name)).filter(|&id| self.is_special(id));
        self.inner.special.eom.into_iter().chain(named).collect()
    }

    /// A decoder for one stream of generated tokens, those that stand for no text left out.
    pub(crate) fn stream(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone(), true)
    }

    /// The same for tokens that go on in text: a first blank is theirs.
    pub(crate) fn stream_inside(&self) -> StreamDecoder {
        self.stream().inside()
    }

    /// The text of `ids` that go on in text, those that stand for no text left out.
    pub(crate) fn decode_inside(&self, ids: &[u32]) -> String {
        let mut stream = self.stream_inside();
        let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        text.extend(stream.flush());
        text
    }

    fn strips_leading_space(&self) -> bool {
        matches!(self.inner.pieces, Pieces::Metaspace { strip_leading: true })
    }

    fn spell(&self, id: u32, out: &mut Vec<u32>) -> Result<()> {
        let bytes = self.token_bytes(id).unwrap_or_default();
        for byte in bytes {
            let piece = self.inner.pieces.of_byte(byte);
            match self.inner.full.get_model().token_to_id(&piece) {
                Some(spelled) if !self.is_special(spelled) => out.push(spelled),
                _ => {
                    return Err(Error::new(
                        ErrorKind::Model,
                        format!("spelling token {id}: the vocabulary has no piece {piece:?}"),
                    ));
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("pieces", &self.inner.pieces)
            .finish_non_exhaustive()
    }
}

/// Runs `load`, turning a panic of the library underneath into an error: `tokenizers` indexes maps by what a damaged
/// file names (a template that uses a special token which it does not define).
fn guarded(path: &Path, load: impl FnOnce() -> Result<Tokenizer>) -> Result<Tokenizer> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).unwrap_or_else(|_| {
        Err(Error::new(
            ErrorKind::Corrupted,
            format!("tokenizer {}: the file contradicts itself", path.display()),
        ))
    })
}

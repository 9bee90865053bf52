//! Rebuilds a tokenizer from the metadata of a GGUF file: byte-level BPE here, SentencePiece beside it.
//! Knows the pipelines that `tokenizer.ggml.pre` names, and refuses the ones it does not.
//!
//! GGUF stores the vocabulary and merges but only the name of what splits the text before them.
//! Each pipeline below is that of the model's own tokenizer.json.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{
    AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior,
    Tokenizer as HfTokenizer,
};

use super::{SpecialIds, sentencepiece};
use crate::gguf::Gguf;
use crate::{Error, ErrorKind, Result};

/// `pattern` of the Split in the tokenizer.json of Llama 3.
const LLAMA_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same of Qwen2 and Qwen2.5: digits one by one.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same of Phi-4-mini, which is that of o200k_base: words end where a capital follows a small letter.
const GPT4O_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same of Mistral Nemo: like it, digits one by one and no English endings.
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Values of `tokenizer.ggml.token_type`. Source: `llama_token_type` in llama.cpp, `llama.h`.
pub(super) const TYPE_NORMAL: i32 = 1;
const TYPE_UNKNOWN: i32 = 2;
const TYPE_CONTROL: i32 = 3;
const TYPE_USER_DEFINED: i32 = 4;

/// What the metadata amounts to.
pub(super) struct Built {
    pub(super) tokenizer: HfTokenizer,
    pub(super) special: SpecialIds,
    /// What begins a document.
    pub(super) prefix: Vec<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pipeline {
    Gpt2,
    /// Digits one by one: SmolLM2, Granite.
    SmolLm,
    Llama3,
    /// Llama 3's without its exceptions: Phi-4, SmolLM3.
    Dbrx,
    Qwen2,
    Gpt4o,
    Tekken,
}

impl Pipeline {
    /// Source of the aliases: `llama_vocab::impl::load` in llama.cpp, `llama-vocab.cpp`.
    fn named(pre: &str) -> Option<Self> {
        Some(match pre {
            "gpt-2" => Self::Gpt2,
            "smollm" | "refact" | "starcoder" => Self::SmolLm,
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => Self::Llama3,
            "dbrx" | "smaug-bpe" => Self::Dbrx,
            "qwen2" | "deepseek-r1-qwen" => Self::Qwen2,
            "gpt-4o" => Self::Gpt4o,
            "tekken" => Self::Tekken,
            _ => return None,
        })
    }

    /// Whether a piece that is in the vocabulary is a token whatever the merges say. Files with these often leave out whether
    /// a document has a first token, and mean yes.
    fn is_of_tiktoken(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    fn pre_tokenizer(self) -> tokenizers::Result<PreTokenizerWrapper> {
        let split_then_bytes = |pattern: &str| -> tokenizers::Result<Vec<PreTokenizerWrapper>> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            Ok(vec![split.into(), ByteLevel::new(false, true, false).into()])
        };
        let gpt2: PreTokenizerWrapper = ByteLevel::new(false, true, true).into();
        let steps = match self {
            Self::Gpt2 => vec![gpt2],
            Self::SmolLm => vec![Digits::new(true).into(), gpt2],
            Self::Llama3 | Self::Dbrx => split_then_bytes(LLAMA_SPLIT)?,
            Self::Qwen2 => split_then_bytes(QWEN2_SPLIT)?,
            Self::Gpt4o => split_then_bytes(GPT4O_SPLIT)?,
            Self::Tekken => split_then_bytes(TEKKEN_SPLIT)?,
        };
        Ok(Sequence::new(steps).into())
    }

    fn normalizer(self) -> Option<NormalizerWrapper> {
        (self == Self::Qwen2).then(|| NFC.into())
    }
}

/// Builds the tokenizer of `gguf`.
pub(super) fn build(gguf: &Gguf) -> Result<Built> {
    let refuse =
        |what: String| Error::model(format!("tokenizer {}: {what}", gguf.path().display()));
    match gguf.str("tokenizer.ggml.model")? {
        "gpt2" => {}
        "llama" => {
            let named = special_ids(gguf, gguf.strs("tokenizer.ggml.tokens")?.len())?;
            return sentencepiece::build(gguf, named);
        }
        model => {
            return Err(refuse(format!(
                "tokenizer.ggml.model {model:?}, expected \"gpt2\" (byte-level BPE) or \"llama\" (SentencePiece)"
            )));
        }
    }
    let pre = gguf.str("tokenizer.ggml.pre")?;
    let pipeline = Pipeline::named(pre).ok_or_else(|| {
        refuse(format!(
            "tokenizer.ggml.pre {pre:?}, expected gpt-2, smollm, refact, starcoder, llama-bpe, dbrx, smaug-bpe, qwen2, gpt-4o or tekken"
        ))
    })?;
    let tokens = gguf.strs("tokenizer.ggml.tokens")?;
    let vocab = vocabulary(gguf, tokens)?;
    let merges = merges(gguf, &vocab)?;
    let special = special_ids(gguf, tokens.len())?;
    let added = added_tokens(gguf, tokens, special)?;

    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pipeline.is_of_tiktoken())
        .build()
        .map_err(|source| refuse(format!("vocabulary: {source}")))?;
    let mut tokenizer = HfTokenizer::new(bpe);
    let pre_tokenizer =
        pipeline.pre_tokenizer().map_err(|source| refuse(format!("pre-tokenizer: {source}")))?;
    tokenizer
        .with_normalizer(pipeline.normalizer())
        .map_err(|source| refuse(format!("normalizer: {source}")))?
        .with_pre_tokenizer(Some(pre_tokenizer))
        .with_decoder(Some(ByteLevel::default()));
    tokenizer.add_tokens(added).map_err(|source| refuse(format!("special tokens: {source}")))?;

    let add_bos = match gguf.contains("tokenizer.ggml.add_bos_token") {
        true => gguf.bool("tokenizer.ggml.add_bos_token")?,
        false => pipeline.is_of_tiktoken(),
    };
    let prefix = special.bos.filter(|_| add_bos).into_iter().collect();
    Ok(Built { tokenizer, special, prefix })
}

pub(super) fn vocabulary(gguf: &Gguf, tokens: &[String]) -> Result<Vocab> {
    let mut vocab = Vocab::new();
    for (id, token) in tokens.iter().enumerate() {
        // A header holds at least eight bytes per token, so ids of a real file fit 32 bits.
        let id = u32::try_from(id).map_err(|_| corrupted(gguf, "more than 2^32 tokens"))?;
        if let Some(first) = vocab.insert(token.clone(), id) {
            return Err(corrupted(gguf, format!("token {id} repeats token {first}: {token:?}")));
        }
    }
    Ok(vocab)
}

/// Merges as pairs; each half and their concatenation are in the vocabulary.
fn merges(gguf: &Gguf, vocab: &Vocab) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for (rank, merge) in gguf.strs("tokenizer.ggml.merges")?.iter().enumerate() {
        // Pieces are in the byte-level alphabet, which has no blank.
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let joined = [*left, *right].concat();
            vocab.contains_key(*left) && vocab.contains_key(*right) && vocab.contains_key(&joined)
        });
        let (left, right) = pair.ok_or_else(|| {
            corrupted(
                gguf,
                format!("merge {rank}: expected two pieces that make a third, got {merge:?}"),
            )
        })?;
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}

fn special_ids(gguf: &Gguf, num_tokens: usize) -> Result<SpecialIds> {
    let read = |name: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        if !gguf.contains(&key) {
            return Ok(None);
        }
        match gguf.u32(&key)? {
            id if (id as usize) < num_tokens => Ok(Some(id)),
            id => Err(corrupted(gguf, format!("{key} is {id}, expected below {num_tokens}"))),
        }
    };
    Ok(SpecialIds {
        bos: read("bos")?,
        eos: read("eos")?,
        eot: read("eot")?,
        eom: read("eom")?,
        unk: read("unknown")?,
        pad: read("padding")?,
    })
}

/// Control tokens, and user-defined ones, which are matched in text but are not special.
pub(super) fn added_tokens(
    gguf: &Gguf,
    tokens: &[String],
    special: SpecialIds,
) -> Result<Vec<AddedToken>> {
    let types = token_types(gguf, tokens)?;
    let SpecialIds { bos, eos, eot, eom, unk: _, pad } = special;
    let mut added = HashMap::new();
    for (id, &kind) in types.iter().enumerate() {
        if matches!(kind, TYPE_UNKNOWN | TYPE_CONTROL | TYPE_USER_DEFINED) {
            added.insert(id, kind != TYPE_USER_DEFINED);
        }
    }
    for id in [bos, eos, eot, eom, pad].into_iter().flatten() {
        added.insert(id as usize, true);
    }
    let mut added: Vec<_> = added.into_iter().collect();
    added.sort_unstable();
    Ok(added
        .into_iter()
        .filter(|&(id, _)| !tokens[id].is_empty())
        .map(|(id, special)| AddedToken::from(tokens[id].clone(), special).normalized(false))
        .collect())
}

/// What kind each token is; all are normal where the file does not say.
pub(super) fn token_types(gguf: &Gguf, tokens: &[String]) -> Result<Vec<i32>> {
    let types = match gguf.contains("tokenizer.ggml.token_type") {
        true => gguf.i32s("tokenizer.ggml.token_type")?,
        false => vec![TYPE_NORMAL; tokens.len()],
    };
    match types.len() == tokens.len() {
        true => Ok(types),
        false => {
            let what = format!("{} token types, expected {}", types.len(), tokens.len());
            Err(corrupted(gguf, what))
        }
    }
}

pub(super) fn corrupted(gguf: &Gguf, what: impl std::fmt::Display) -> Error {
    let path = gguf.path().display();
    Error::new(ErrorKind::Corrupted, format!("tokenizer {path}: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    /// Pieces by the `regex` package of Python with the patterns of each tokenizer.json.
    #[test]
    fn each_pipeline_splits_as_its_pattern_does() {
        let text = "aParrot's 12345 eggs,  HTTP/\n don'T";
        let gpt2: &[&str] = &["aParrot", "'s", " 12345", " eggs", ",", " ", " HTTP", "/", "\n"];
        let gpt2 = [gpt2, &[" don", "'", "T"]].concat();
        let llama: &[&str] = &["aParrot", "'s", " ", "123", "45", " eggs", ",", " ", " HTTP"];
        let llama = [llama, &["/\n", " don", "'T"]].concat();
        let gpt4o: &[&str] = &["a", "Parrot's", " ", "123", "45", " eggs", ",", " ", " HTTP"];
        let gpt4o = [gpt4o, &["/\n", " don'T"]].concat();
        let tekken: &[&str] = &["a", "Parrot", "'s", " ", "1", "2", "3", "4", "5", " eggs", ","];
        let tekken = [tekken, &[" ", " HTTP", "/\n", " don", "'T"]].concat();
        for (name, expected) in [
            ("gpt-2", gpt2),
            ("llama-bpe", llama.clone()),
            ("dbrx", llama.clone()),
            ("smaug-bpe", llama),
            ("gpt-4o", gpt4o),
            ("tekken", tekken),
        ] {
            let splitter = Pipeline::named(name).unwrap().pre_tokenizer().unwrap();
            let mut split = PreTokenizedString::from(text);
            splitter.pre_tokenize(&mut split).unwrap();
            let pieces = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
            let pieces: Vec<&str> =
                pieces.iter().map(|(_, (from, to), _)| &text[*from..*to]).collect();
            assert_eq!(pieces, expected, "{name}");
        }
    }
}

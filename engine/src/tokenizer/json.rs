//! Reads the bytes of a tokenizer.json, which may come from anyone.
//! Knows the file's outline only; what it means is left to `tokenizers`.

use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;
use tokenizers::Tokenizer as HfTokenizer;

use crate::{Error, ErrorKind, Result};

/// The parts of the file that are checked before `tokenizers` sees it.
#[derive(Deserialize)]
struct Outline<'a> {
    #[serde(borrow)]
    model: Model<'a>,
    #[serde(default, rename = "decoder")]
    _decoder: serde_json::Value,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(default, borrow)]
    continuing_subword_prefix: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, rename = "type")]
    kind: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, rename = "vocab")]
    _vocab: IgnoredAny,
}

/// Parses a tokenizer; `path` is only for the text of errors.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<HfTokenizer> {
    let corrupted = |what: String| {
        Error::new(ErrorKind::Corrupted, format!("tokenizer {}: {what}", path.display()))
    };
    let outline: Outline<'_> =
        serde_json::from_slice(bytes).map_err(|source| corrupted(source.to_string()))?;
    // The builder of BPE models cuts this prefix off byte by byte, unchecked.
    if outline.model.kind.as_deref() != Some("WordPiece")
        && outline.model.continuing_subword_prefix.is_some_and(|prefix| !prefix.is_empty())
    {
        return Err(Error::model(format!(
            "tokenizer {}: continuing_subword_prefix outside WordPiece is not supported",
            path.display()
        )));
    }
    // The same builder indexes by the lengths of merges, and the readers of some parts `expect`
    // their input to be well formed: a panic there is damage in the file, not a bug to die of.
    match std::panic::catch_unwind(|| HfTokenizer::from_bytes(bytes)) {
        Ok(Ok(tokenizer)) => Ok(tokenizer),
        Ok(Err(source)) => Err(corrupted(source.to_string())),
        Err(_) => Err(corrupted("its vocabulary and merges contradict each other".to_owned())),
    }
}

/// The ids that a tokenizer's own post-processor puts before and after a text.
pub(super) fn surroundings(tokenizer: &HfTokenizer) -> Result<(Vec<u32>, Vec<u32>), String> {
    let encode = |special| {
        tokenizer
            .encode_fast("a", special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|source| format!("encoding one letter: {source}"))
    };
    let (bare, framed) = (encode(false)?, encode(true)?);
    if bare.is_empty() {
        return Ok((framed, Vec::new()));
    }
    let at = framed
        .windows(bare.len())
        .position(|window| window == bare)
        .ok_or("post-processor: expected tokens around the text, got other text")?;
    Ok((framed[..at].to_vec(), framed[at + bare.len()..].to_vec()))
}

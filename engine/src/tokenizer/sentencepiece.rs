//! Rebuilds the tokenizer of a SentencePiece vocabulary from the metadata of a GGUF file (Llama 2, Mistral v0.1, Phi-3).
//! Knows pieces and scores; nothing splits the text before them.
//!
//! GGUF has no merges for these: of two neighbours that make a piece, those of the best score are joined first
//! (`llm_tokenizer_spm` in llama.cpp, `llama-vocab.cpp`). Written as merges in that order it is the model's own tokenizer.json.

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{Prepend, Sequence as Normalizers};
use tokenizers::{DecoderWrapper, NormalizerWrapper, Tokenizer as HfTokenizer};

use super::SpecialIds;
use super::pipeline::{Built, TYPE_NORMAL, added_tokens, corrupted, token_types, vocabulary};
use crate::gguf::Gguf;
use crate::{Error, Result};

/// Builds the tokenizer of `gguf`, whose model is "llama". `named` are the special tokens that the file names.
pub(super) fn build(gguf: &Gguf, named: SpecialIds) -> Result<Built> {
    let refuse =
        |what: String| Error::model(format!("tokenizer {}: {what}", gguf.path().display()));
    let flag = |name: &str, otherwise: bool| match gguf.contains(name) {
        true => gguf.bool(name),
        false => Ok(otherwise),
    };
    if flag("tokenizer.ggml.remove_extra_whitespaces", false)? {
        return Err(refuse("remove_extra_whitespaces, expected false".to_owned()));
    }
    let tokens = gguf.strs("tokenizer.ggml.tokens")?;
    let vocab = vocabulary(gguf, tokens)?;
    // What llama.cpp takes where a file is silent.
    let usual = |id: u32| Some(id).filter(|id| (*id as usize) < tokens.len());
    let special = SpecialIds {
        bos: named.bos.or(usual(1)),
        eos: named.eos.or(usual(2)),
        unk: named.unk.or(usual(0)),
        ..named
    };
    let mut added = added_tokens(gguf, tokens, special)?;
    if gguf.str("general.architecture").is_ok_and(|name| name == "phi3") {
        // Most of Phi-3's take the white space behind them, which a GGUF file does not say: `llama_vocab::impl::load` in
        // llama.cpp knows them by the model, too.
        for token in &mut added {
            token.rstrip = !["<unk>", "<s>", "<|endoftext|>"].contains(&token.content.as_str());
        }
    }
    let merges = merges(gguf, tokens)?;

    let mut bpe = BPE::builder().vocab_and_merges(vocab, merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = special.unk {
        bpe = bpe.unk_token(tokens[unknown as usize].clone());
    }
    let bpe = bpe.build().map_err(|source| refuse(format!("vocabulary: {source}")))?;
    let mut tokenizer = HfTokenizer::new(bpe);
    let has_own_blank = flag("tokenizer.ggml.add_space_prefix", true)?;
    let replaced = |from: &str, to: &str| {
        Replace::new(from, to).map_err(|source| refuse(format!("blanks: {source}")))
    };
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![replaced("▁", " ")?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if has_own_blank {
        normalizers.push(Prepend::new("▁".to_owned()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(replaced(" ", "▁")?.into());
    tokenizer
        .with_normalizer(Some(Normalizers::new(normalizers)))
        .map_err(|source| refuse(format!("normalizer: {source}")))?
        .with_decoder(Some(Decoders::new(decoders)));
    tokenizer.add_tokens(added).map_err(|source| refuse(format!("special tokens: {source}")))?;

    let has_bos = flag("tokenizer.ggml.add_bos_token", true)?;
    let prefix = special.bos.filter(|_| has_bos).into_iter().collect();
    Ok(Built { tokenizer, special, prefix })
}

/// Pairs of pieces that make a piece, the best one first; of one piece in the order of its halves.
fn merges(gguf: &Gguf, tokens: &[String]) -> Result<Vec<(String, String)>> {
    let (types, scores) = (token_types(gguf, tokens)?, gguf.f32s("tokenizer.ggml.scores")?);
    if scores.len() != tokens.len() {
        let what = format!("{} scores, expected {}", scores.len(), tokens.len());
        return Err(corrupted(gguf, what));
    }
    let is_piece = |id: usize| types[id] == TYPE_NORMAL && !tokens[id].is_empty();
    let ids: HashMap<&str, usize> =
        (0..tokens.len()).filter(|id| is_piece(*id)).map(|id| (tokens[id].as_str(), id)).collect();
    let mut pairs = Vec::new();
    for (token, id) in &ids {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left), Some(right)) = (ids.get(left), ids.get(right)) {
                pairs.push((*id, *left, *right));
            }
        }
    }
    pairs.sort_unstable_by(|(a, a_left, a_right), (b, b_left, b_right)| {
        let by_score = scores[*b].total_cmp(&scores[*a]);
        by_score.then(a.cmp(b)).then(a_left.cmp(b_left)).then(a_right.cmp(b_right))
    });
    Ok(pairs
        .into_iter()
        .map(|(_, left, right)| (tokens[left].clone(), tokens[right].clone()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::super::{Joined, Tokenizer};
    use super::*;
    use crate::ErrorKind;
    use crate::gguf::writer::Writer;
    use crate::gguf::{Array, Value};
    use std::path::Path;

    /// The small vocabulary of `testing`, as a GGUF file carries one.
    fn writer() -> Writer {
        writer_with(&[])
    }

    /// The same with `controls` behind it.
    fn writer_with(controls: &[&str]) -> Writer {
        let json = crate::testing::sentencepiece("by its normalizer");
        let vocab = json["model"]["vocab"].as_object().unwrap();
        let mut tokens = vec![String::new(); vocab.len()];
        for (token, id) in vocab {
            tokens[id.as_u64().unwrap() as usize] = token.clone();
        }
        tokens.extend(controls.iter().map(|control| (*control).to_owned()));
        let kind = |id: usize, token: &String| match id {
            0 => 2,
            1 | 2 => 3,
            _ if controls.contains(&token.as_str()) => 3,
            _ if token.starts_with("<0x") => 6,
            _ => 1,
        };
        let types = tokens.iter().enumerate().map(|(id, token)| kind(id, token)).collect();
        // The longer, the better, but for the last piece, as the merges of the other file have it.
        let rank = |token: &String| match token.as_str() {
            "▁H" => 3.0,
            "▁He" => 2.0,
            "He" => 1.0,
            _ => -1000.0,
        };
        let scores = tokens.iter().map(rank).collect();
        Writer::default()
            .set("tokenizer.ggml.model", Value::Str("llama".into()))
            .strs("tokenizer.ggml.tokens", &tokens)
            .set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)))
            .set("tokenizer.ggml.scores", Value::Array(Array::F32(scores)))
    }

    fn read(writer: &Writer) -> Result<Tokenizer> {
        Tokenizer::from_gguf(&Gguf::parse(&writer.bytes(), Path::new("test.gguf"))?)
    }

    #[test]
    fn a_gguf_file_gives_the_tokens_of_the_tokenizer_json() {
        let json = crate::testing::sentencepiece("by its normalizer").to_string();
        let other = Tokenizer::from_bytes(json.as_bytes(), Path::new("t.json")).unwrap();
        let own = read(&writer()).unwrap();
        let texts = ["Hello", "He", " Hello", "a cat", "\n\nHello", "[INST] He: Hello", "", " "];
        let marked = ["</s>[INST] He</s>He", "<s>", "<s>\nHe"];
        let all = texts.map(|text| (text, false)).into_iter().chain(marked.map(|it| (it, true)));
        for (text, special) in all {
            let ids = own.encode(text, special).unwrap();
            assert_eq!(ids, other.encode(text, special).unwrap(), "{text:?}");
            assert_eq!(own.decode(&ids, false).unwrap(), other.decode(&ids, false).unwrap());
        }
        let special = own.special_ids();
        assert_eq!((special.bos, special.eos, special.unk), (Some(1), Some(2), Some(0)));
        assert_eq!(own.encode_with_specials("<s>He").unwrap().first(), Some(&1));
    }

    #[test]
    fn a_file_may_want_no_blank_of_the_tokenizers_own() {
        let writer = writer().set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
        let own = read(&writer).unwrap();
        let he = own.id("He").unwrap();
        assert_eq!(own.encode("He", false).unwrap(), [he]);
        assert_eq!(own.decode(&own.encode(" He", false).unwrap(), false).unwrap(), " He");
    }

    #[test]
    fn control_tokens_of_phi3_take_the_white_space_behind_them() {
        let of_architecture = |name: &str| {
            let writer = writer_with(&["<|user|>", "<|endoftext|>"]);
            read(&writer.set("general.architecture", Value::Str(name.into()))).unwrap()
        };
        let (phi3, llama) = (of_architecture("phi3"), of_architecture("llama"));
        let of = |pieces: &[&str]| -> Vec<u32> {
            pieces.iter().map(|piece| phi3.id(piece).unwrap()).collect()
        };
        assert_eq!(phi3.encode("<|user|>\n", true).unwrap(), of(&["<|user|>"]));
        assert_eq!(phi3.encode("</s> \n", true).unwrap(), of(&["</s>"]));
        for kept in ["<s>", "<|endoftext|>"] {
            let ids = phi3.encode(&format!("{kept}\n"), true).unwrap();
            assert_eq!(ids, of(&[kept, "▁", "<0x0A>"]));
        }
        let ids = llama.encode("<|user|>\n", true).unwrap();
        assert_eq!(ids, of(&["<|user|>", "▁", "<0x0A>"]));

        let mut joined = Joined::behind(&phi3, None);
        joined.scaffold("<|user|>\n").unwrap();
        joined.content("Hello").unwrap();
        assert_eq!(joined.take().unwrap(), of(&["<|user|>", "▁He", "l", "l", "o"]));
        let mut joined = Joined::behind(&llama, None);
        joined.scaffold("<|user|>\n").unwrap();
        joined.content("Hello").unwrap();
        let inside = of(&["<|user|>", "▁", "<0x0A>", "He", "l", "l", "o"]);
        assert_eq!(joined.take().unwrap(), inside);
    }

    #[test]
    fn what_such_a_file_may_not_say_is_refused() {
        let scores = |len: usize| Value::Array(Array::F32(vec![0.0; len]));
        for (key, value, kind, text) in [
            ("tokenizer.ggml.scores", scores(3), ErrorKind::Corrupted, "3 scores, expected"),
            ("tokenizer.ggml.scores", Value::U32(1), ErrorKind::Model, "array of f32"),
            (
                "tokenizer.ggml.remove_extra_whitespaces",
                Value::Bool(true),
                ErrorKind::Model,
                "remove_extra_whitespaces",
            ),
        ] {
            let mut writer = writer();
            writer.metadata.retain(|(name, _)| name != key);
            let error = read(&writer.set(key, value)).unwrap_err();
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    /// A vocabulary of llama.cpp's with its texts and their tokens beside it: `MKA_VOCAB=models/ggml-vocab-llama-spm.gguf`.
    #[test]
    fn a_vocabulary_of_llama_cpp_has_its_tokens() {
        let Some(path) = std::env::var_os("MKA_VOCAB").map(std::path::PathBuf::from) else {
            return eprintln!("skipped: MKA_VOCAB names no file");
        };
        let beside = |ending: &str| {
            let mut path = path.clone().into_os_string();
            path.push(ending);
            std::fs::read_to_string(path).unwrap()
        };
        let gguf = Gguf::parse(&std::fs::read(&path).unwrap(), &path).unwrap();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let (texts, tokens) = (beside(".inp"), beside(".out"));
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let (mut compared, mut other) = (0, 0);
        for (text, tokens) in texts.iter().zip(tokens.lines()) {
            let expected: Vec<u32> =
                tokens.split_whitespace().map(|id| id.parse().unwrap()).collect();
            let ids = tokenizer.encode(text, true).unwrap();
            compared += 1;
            if ids != expected {
                other += 1;
                eprintln!("{text:?}: {ids:?}, expected {expected:?}");
            }
        }
        assert_eq!(other, 0, "of {compared} texts");
        println!("{compared} texts have the tokens that llama.cpp gives them");
    }
}

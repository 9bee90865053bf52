//! What tests need: a real model where one has been fetched, a tokenizer where none is.
//! Knows no network: it looks into the cache and says why a test is skipped.

use serde_json::json;
use std::path::{Path, PathBuf};

/// The SmolLM2 GGUF file in the cache; `None`, with the reason printed, where it is not there.
pub(crate) fn smollm2_gguf() -> Option<PathBuf> {
    cached("SmolLM2-135M-Instruct-Q4_1.gguf")
}

/// The folder of the MiniLM embedder in the cache; `None`, with the reason printed, where it is not there.
pub(crate) fn minilm_folder() -> Option<PathBuf> {
    cached("all-MiniLM-L6-v2")
}

/// A small tokenizer.json of SentencePiece's kind, with `<s>` and `</s>`: where it puts a blank of its own is `own_blank`,
/// "by its normalizer" behind every special token, as Llama 2 and Mistral v0.1 have it, or by its pre-tokenizer "always",
/// "first" or "never".
pub(crate) fn sentencepiece(own_blank: &str) -> serde_json::Value {
    let added = |(id, content): (usize, &&str)| {
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        })
    };
    let specials = ["<unk>", "<s>", "</s>"];
    let pieces = [
        "<0x0A>", "▁", "[", "]", "/", ":", "I", "N", "S", "T", "H", "a", "c", "e", "l", "o", "t",
        "▁H", "▁He", "He",
    ];
    let vocab: serde_json::Map<String, serde_json::Value> = specials
        .iter()
        .chain(&pieces)
        .enumerate()
        .map(|(id, piece)| ((*piece).to_owned(), json!(id)))
        .collect();
    let by_normalizer = own_blank == "by its normalizer";
    let metaspace = json!({
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": own_blank, "split": false,
    });
    let normalizer = json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let chosen = |value: &serde_json::Value, is_chosen: bool| match is_chosen {
        true => value.clone(),
        false => serde_json::Value::Null,
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": specials.iter().enumerate().map(added).collect::<Vec<_>>(),
        "normalizer": chosen(&normalizer, by_normalizer),
        "pre_tokenizer": chosen(&metaspace, !by_normalizer),
        "post_processor": null,
        "decoder": if by_normalizer { decoder } else { metaspace.clone() },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "H"], ["▁H", "e"], ["H", "e"]],
        },
    })
}

/// A copy of the tiny model in `folder`, with another chat template.
pub(crate) fn tiny_model(folder: &Path, template: &str) -> PathBuf {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let bytes = std::fs::read(data.join("golden/gguf/model.gguf")).unwrap();
    let key = b"tokenizer.chat_template";
    let key_at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    // Behind the key stand the type of its value in 4 bytes, its length in 8, and its text.
    let at = key_at + key.len() + 4;
    let old = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    // Tensors lie at multiples of 32 bytes: a comment has them move by one.
    let fill = (old + 32 - (template.len() + "{##}".len()) % 32) % 32;
    let template = format!("{template}{{#{}#}}", " ".repeat(fill));
    let len = (template.len() as u64).to_le_bytes();
    let copy = [&bytes[..at], &len, template.as_bytes(), &bytes[at + 8 + old..]].concat();
    let path = folder.join("model.gguf");
    std::fs::write(&path, copy).unwrap();
    path
}

fn cached(name: &str) -> Option<PathBuf> {
    let path = crate::hub::cache_folder().ok()?.join("models").join(name);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: no {} (fetch the model first)", path.display());
    None
}

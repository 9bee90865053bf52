//! Tokens that a file adds to its vocabulary and calls ordinary: runs of blanks and line breaks, and tags, as Gemma has them.

use super::*;
use serde_json::json;

/// Added to the vocabulary, and in it.
const ADDED: [&str; 12] = [
    "\n",
    "\n\n",
    "\t",
    "▁▁",
    "▁▁▁",
    "<table>",
    "</td>",
    "<b>",
    "<s>",
    "<bbox>",
    "<think>",
    "<tool_call>",
];

/// A small tokenizer.json of Gemma's kind: nothing is put before a text, and blanks are `▁`.
fn gemma() -> Tokenizer {
    let specials = ["<pad>", "<eos>", "<bos>", "<unk>"].map(str::to_owned);
    let bytes = (0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>"));
    let signs = ('!'..='~').map(String::from);
    let pieces = specials.into_iter().chain(ADDED.map(str::to_owned)).chain(bytes).chain(signs);
    let vocab: serde_json::Map<String, Json> = pieces
        .chain(["▁", "▁▁▁▁"].map(str::to_owned))
        .enumerate()
        .map(|(id, piece)| (piece, json!(id)))
        .collect();
    let added = |(id, special): (usize, bool)| {
        let content = vocab.iter().find(|(_, own)| **own == json!(id)).unwrap().0;
        json!({
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": special,
        })
    };
    let added: Vec<Json> = (0..4 + ADDED.len()).map(|id| (id, id < 4)).map(added).collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
            "invert": false,
        },
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>",
            "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "ignore_merges": false, "vocab": vocab,
            "merges": [["▁▁", "▁▁"], ["▁", "▁"], ["▁▁", "▁"]],
        },
    });
    Tokenizer::from_bytes(file.to_string().as_bytes(), Path::new("t.json")).unwrap()
}

/// The text of `ids` as a stream of an answer gives it.
fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
    text.extend(stream.flush());
    text
}

#[test]
fn runs_of_blanks_that_a_file_adds_are_blanks_again() {
    let tokenizer = gemma();
    let of = |pieces: &[&str]| -> Vec<u32> {
        pieces.iter().map(|piece| tokenizer.id(piece).unwrap()).collect()
    };
    let cases: [(&str, &[&str]); 6] = [
        ("*   b", &["*", "▁▁▁", "b"]),
        ("a  b", &["a", "▁▁", "b"]),
        ("\n\n  x", &["\n\n", "▁▁", "x"]),
        ("     ", &["▁▁▁▁", "▁"]),
        ("\tx\n", &["\t", "x", "\n"]),
        (" é", &["▁", "<0xC3>", "<0xA9>"]),
    ];
    for (text, pieces) in cases {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, of(pieces), "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(streamed(&tokenizer, &ids), text);
        assert_eq!(tokenizer.decode_inside(&ids), text);
        // Nothing is put before a text, so that it has the same tokens behind another.
        assert_eq!(tokenizer.encode_inside(text, false).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn tags_of_html_are_text_and_other_ordinary_markup_is_guarded() {
    let tokenizer = gemma();
    for tag in ["<table>", "</td>", "<b>"] {
        let id = tokenizer.id(tag).unwrap();
        assert!(!tokenizer.is_special(id), "{tag}");
        assert_eq!(tokenizer.encode(tag, false).unwrap(), [id]);
    }
    for tag in ["<s>", "<bbox>", "<think>", "<tool_call>"] {
        let id = tokenizer.id(tag).unwrap();
        assert!(tokenizer.is_special(id) && !tokenizer.is_hidden(id), "{tag}");
        let ids = tokenizer.encode(tag, false).unwrap();
        assert!(ids.len() == tag.len() && !ids.contains(&id), "{tag}: {ids:?}");
        assert_eq!(tokenizer.encode_with_specials(tag).unwrap(), [id]);
    }
    let text = "<table><b>x</td> <think>";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
}

/// `MKA_TOKENIZER=tokenizer.json`, of a language model, is read and writes these texts as they are.
#[test]
fn texts_come_back_from_a_tokenizer_file() {
    const TEXTS: [&str; 14] = [
        "Hello, world!",
        " one blank before, two  within,   three, and behind    ",
        "\n\n  x\n\n\n\ny\n",
        "1.  **One**\n    *   two\n        *   three\n",
        "a\tb\t\tc\r\nd\r\n",
        "def f(x):\n    if x:\n\treturn x  # twice\n",
        "fn main() {\n    println!(\"{:>4}\", 0x1F + 1_000);\n}\n",
        "<table><tr><td>1</td></tr></table><b>bold</b><h1>\n<br/>",
        "<s>struck</s> <think>so</think> <tool_call>{\"a\": [1]}</tool_call>",
        "<|im_end|><|user|>[INST]<end_of_turn><unused7><bos>",
        "naïve Grüße, 東京, Привет, مرحبا, नमस्ते",
        "👩‍👩‍👧 👍🏽 🇫🇷",
        "3.14e-10 ≠ 12345678901234567890 €",
        "{\n  \"a b\": [null, true,  -1],\n  \"\": \"\\u00e9\"\n}",
    ];
    let Some(path) = std::env::var_os("MKA_TOKENIZER").map(PathBuf::from) else {
        return eprintln!("skipped: MKA_TOKENIZER names no file");
    };
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    let mut others = 0;
    for text in TEXTS {
        // The first blank may be the tokenizer's own by its file.
        let text = if tokenizer.strips_leading_space() { text.trim_start() } else { text };
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{text:?}");
        let decoded = [tokenizer.decode(&ids, false).unwrap(), streamed(&tokenizer, &ids)];
        if decoded.iter().any(|decoded| decoded != text) {
            others += 1;
            eprintln!("{text:?}: {ids:?}, {decoded:?}");
        }
    }
    assert_eq!(others, 0, "of {} texts", TEXTS.len());
    println!("{} texts come back", TEXTS.len());
}

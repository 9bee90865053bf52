//! What the tokenizer promises: the ids of the model's own pipeline, by either kind of file, and
//! no control token out of text from outside.

mod added;

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value as Json;

use super::*;
use crate::gguf::writer::Writer;
use crate::gguf::{Array, Value};

const PIPELINES: [&str; 3] = ["smollm", "llama-bpe", "qwen2"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer").join(name)
}

fn goldens() -> Vec<Json> {
    serde_json::from_slice(&std::fs::read(data("goldens.json")).unwrap()).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn from_json(pre: &str) -> Tokenizer {
    Tokenizer::from_file(&data(&format!("{pre}.json"))).unwrap()
}

/// The vocabulary of a fixture as a GGUF file would carry it.
fn writer(pre: &str) -> Writer {
    let json: Json =
        serde_json::from_slice(&std::fs::read(data(&format!("{pre}.json"))).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocab.len()];
    let mut types = vec![1; vocab.len()];
    for (token, id) in vocab {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    for added in json["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap() as usize;
        types[id] = if added["special"].as_bool().unwrap() { 3 } else { 4 };
    }
    let merges: Vec<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()))
        .collect();
    Writer::default()
        .set("tokenizer.ggml.model", Value::Str("gpt2".into()))
        .set("tokenizer.ggml.pre", Value::Str(pre.into()))
        .strs("tokenizer.ggml.tokens", &tokens)
        .strs("tokenizer.ggml.merges", &merges)
        .set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)))
        .set("tokenizer.ggml.bos_token_id", Value::U32(0))
        .set("tokenizer.ggml.eos_token_id", Value::U32(2))
}

fn try_gguf(writer: &Writer) -> Result<Tokenizer> {
    Tokenizer::from_gguf(&Gguf::parse(&writer.bytes(), Path::new("test.gguf"))?)
}

/// The same writer with one key given another value.
fn with(mut writer: Writer, key: &str, value: Value) -> Writer {
    writer.metadata.retain(|(name, _)| name != key);
    writer.set(key, value)
}

#[test]
fn both_kinds_of_file_give_the_golden_ids() {
    let goldens = goldens();
    assert!(goldens.len() >= 30);
    for pre in PIPELINES {
        let (json, gguf) = (from_json(pre), try_gguf(&writer(pre)).unwrap());
        assert_eq!(json.vocab_size(), gguf.vocab_size());
        for golden in &goldens {
            let text = golden["text"].as_str().unwrap();
            let plain = ids(&golden[pre]);
            let special = golden.get(format!("{pre}+special")).map_or(plain.clone(), ids);
            for (kind, tokenizer) in [("json", &json), ("gguf", &gguf)] {
                assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{kind} {pre} {text:?}");
                assert_eq!(
                    tokenizer.encode_with_specials(text).unwrap(),
                    special,
                    "{kind} {pre} {text:?}"
                );
                assert_eq!(tokenizer.count(text).unwrap(), plain.len());
            }
        }
    }
}

#[test]
fn decoding_undoes_encoding_but_for_unicode_normalization() {
    for pre in PIPELINES {
        let tokenizer = from_json(pre);
        for golden in goldens() {
            let text = golden["text"].as_str().unwrap();
            let decoded = tokenizer.decode(&ids(&golden[pre]), true).unwrap();
            if pre != "qwen2" || golden["qwen2"] == golden["llama-bpe"] {
                assert_eq!(decoded, text, "{pre}");
            }
            // Decoded text is normalized: it encodes to the same ids again.
            assert_eq!(tokenizer.encode(&decoded, false).unwrap(), ids(&golden[pre]), "{pre}");
        }
    }
}

#[test]
fn text_from_outside_never_makes_a_control_token() {
    for pre in PIPELINES {
        for tokenizer in [from_json(pre), try_gguf(&writer(pre)).unwrap()] {
            for marker in ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>"] {
                let id = tokenizer.id(marker).unwrap();
                assert!(tokenizer.is_special(id), "{marker}");
                for text in [marker.to_owned(), format!("x{marker}y"), marker.repeat(3)] {
                    assert!(tokenizer.encode_with_specials(&text).unwrap().contains(&id));
                    let plain = tokenizer.encode(&text, false).unwrap();
                    assert!(!plain.iter().any(|&id| tokenizer.is_special(id)), "{pre} {text}");
                    assert_eq!(tokenizer.decode(&plain, true).unwrap(), text);
                }
            }
        }
    }
}

#[test]
fn a_control_token_that_is_one_whole_word_is_spelled_out() {
    // `XYZZY` is in the vocabulary, made by no merge: with `ignore_merges` the model finds it whole.
    let plain = try_gguf(&writer("llama-bpe")).unwrap();
    let id = plain.id("XYZZY").unwrap();
    assert_eq!(plain.encode("XYZZY", false).unwrap(), [id]);
    let types = match &writer("llama-bpe").metadata[4] {
        (key, Value::Array(Array::I32(types))) if key.ends_with("token_type") => types.clone(),
        other => panic!("{other:?}"),
    };
    let mut types = types;
    types[id as usize] = 3;
    let control =
        with(writer("llama-bpe"), "tokenizer.ggml.token_type", Value::Array(Array::I32(types)));
    let tokenizer = try_gguf(&control).unwrap();
    assert_eq!(tokenizer.encode_with_specials("XYZZY").unwrap(), [id]);
    let ids = tokenizer.encode("XYZZY", false).unwrap();
    assert_eq!(ids.len(), 5);
    assert!(!ids.contains(&id));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "XYZZY");
}

#[test]
fn special_ids_and_document_frames_follow_the_file() {
    let json = from_json("llama-bpe");
    assert_eq!(json.prefix(), [0]);
    assert_eq!(json.special_ids(), SpecialIds::default());
    let mut framed = vec![0];
    framed.extend(json.encode("hotel", false).unwrap());
    assert_eq!(json.encode_document("hotel").unwrap(), framed);
    assert_eq!(from_json("smollm").prefix(), [] as [u32; 0]);

    // Absent, `add_bos_token` means yes for Llama 3 alone.
    let gguf = try_gguf(&writer("llama-bpe")).unwrap();
    assert_eq!(gguf.prefix(), [0]);
    assert_eq!(gguf.special_ids().bos, Some(0));
    assert_eq!(gguf.special_ids().eos, Some(2));
    assert_eq!(gguf.special_ids().eot, None);
    let no = Value::Bool(false);
    let silent = with(writer("llama-bpe"), "tokenizer.ggml.add_bos_token", no);
    assert!(try_gguf(&silent).unwrap().prefix().is_empty());
    assert!(try_gguf(&writer("qwen2")).unwrap().prefix().is_empty());
}

#[test]
fn ends_of_generation_are_found_by_their_text_and_by_the_key_for_tools() {
    let gguf = try_gguf(&writer("qwen2")).unwrap();
    let mut ends = gguf.ends_by_name();
    ends.sort_unstable();
    assert_eq!(ends, ["<|endoftext|>", "<|im_end|>"].map(|name| gguf.id(name).unwrap()));
    let tools = with(writer("qwen2"), "tokenizer.ggml.eom_token_id", Value::U32(1));
    let tools = try_gguf(&tools).unwrap();
    assert!(tools.ends_by_name().contains(&1));
    assert!(!gguf.ends_by_name().contains(&1));
}

#[test]
fn token_bytes_joined_are_the_text() {
    let tokenizer = from_json("smollm");
    let text = "naïve 東京 👩‍👩‍👧 <|im_end|>\r\n";
    let joined: Vec<u8> = tokenizer
        .encode_with_specials(text)
        .unwrap()
        .into_iter()
        .flat_map(|id| tokenizer.token_bytes(id).unwrap())
        .collect();
    assert_eq!(joined, text.as_bytes());
    assert_eq!(tokenizer.token_bytes(tokenizer.vocab_size() as u32), None);
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
}

#[test]
fn a_stream_emits_whole_characters_and_flushes_the_rest() {
    let tokenizer = from_json("smollm");
    let byte = |b: u8| tokenizer.id(&Pieces::ByteLevel.of_byte(b)).unwrap();
    let mut stream = tokenizer.stream();
    let emoji = "👍".as_bytes();
    assert_eq!(stream.push(byte(b'a')).as_deref(), Some("a"));
    assert_eq!(stream.push(byte(emoji[0])), None);
    assert_eq!(stream.push(byte(emoji[1])), None);
    assert_eq!(stream.push(byte(emoji[2])), None);
    assert_eq!(stream.push(byte(emoji[3])).as_deref(), Some("👍"));
    assert_eq!(stream.push(tokenizer.id("<|im_end|>").unwrap()), None);
    assert_eq!(stream.push(u32::MAX), None);
    // A byte that cannot follow ends the wait at once.
    assert_eq!(stream.push(byte(emoji[0])), None);
    assert_eq!(stream.push(byte(b'b')).as_deref(), Some("\u{fffd}b"));
    assert_eq!(stream.push(byte(0xff)).as_deref(), Some("\u{fffd}"));
    assert_eq!(stream.push(byte(emoji[0])), None);
    assert_eq!(stream.flush().as_deref(), Some("\u{fffd}"));
    assert_eq!(stream.flush(), None);
}

#[test]
fn added_tokens_that_the_file_calls_ordinary_stay_in_the_text() {
    for pre in PIPELINES {
        for tokenizer in [from_json(pre), try_gguf(&writer(pre)).unwrap()] {
            let call = tokenizer.id("<tool_call>").unwrap();
            let end = tokenizer.id("<|im_end|>").unwrap();
            assert!(tokenizer.is_special(call) && !tokenizer.is_hidden(call), "{pre}");
            assert!(tokenizer.is_special(end) && tokenizer.is_hidden(end), "{pre}");
            assert_eq!(tokenizer.decode(&[call, end], true).unwrap(), "<tool_call>", "{pre}");
            let mut stream = tokenizer.stream();
            assert_eq!(stream.push(call).as_deref(), Some("<tool_call>"), "{pre}");
            assert_eq!(stream.push(end), None, "{pre}");
        }
    }
}

#[test]
fn length_limits_of_the_file_are_lifted() {
    let mut json: Json =
        serde_json::from_slice(&std::fs::read(data("smollm.json")).unwrap()).unwrap();
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
    });
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"
    });
    let bytes = serde_json::to_vec(&json).unwrap();
    let tokenizer = Tokenizer::from_bytes(&bytes, Path::new("t.json")).unwrap();
    assert_eq!(tokenizer.encode("a", false).unwrap().len(), 1);
    assert_eq!(tokenizer.encode(&"a".repeat(300), false).unwrap().len(), 300);
}

#[test]
fn other_names_of_a_pipeline_are_that_pipeline() {
    for (other, pre) in [
        ("llama3", "llama-bpe"),
        ("falcon3", "llama-bpe"),
        ("deepseek-r1-qwen", "qwen2"),
        ("refact", "smollm"),
    ] {
        let named = with(writer(pre), "tokenizer.ggml.pre", Value::Str(other.into()));
        let (own, other) = (try_gguf(&writer(pre)).unwrap(), try_gguf(&named).unwrap());
        for golden in goldens() {
            let text = golden["text"].as_str().unwrap();
            assert_eq!(own.encode(text, false).unwrap(), other.encode(text, false).unwrap());
        }
        assert_eq!(own.special_ids(), other.special_ids());
    }
}

#[test]
fn vocabularies_that_are_not_read_here_are_refused_by_name() {
    let tokens = |values: &[&str]| {
        Value::Array(Array::Str(values.iter().map(|v| (*v).to_owned()).collect()))
    };
    let cases = [
        ("tokenizer.ggml.model", Value::Str("bert".into()), ErrorKind::Model, "expected \"gpt2\""),
        (
            "tokenizer.ggml.pre",
            Value::Str("deepseek-llm".into()),
            ErrorKind::Model,
            "\"deepseek-llm\", expected gpt-2, smollm, refact",
        ),
        ("tokenizer.ggml.pre", Value::U32(1), ErrorKind::Model, "expected string, got u32"),
        ("tokenizer.ggml.merges", tokens(&["a b c"]), ErrorKind::Corrupted, "merge 0"),
        ("tokenizer.ggml.merges", tokens(&["ab"]), ErrorKind::Corrupted, "merge 0"),
        (
            "tokenizer.ggml.merges",
            tokens(&["Ġcounterrevolutionary Ġcounterrevolutionary"]),
            ErrorKind::Corrupted,
            "two pieces that make a third",
        ),
        (
            "tokenizer.ggml.tokens",
            tokens(&["a", "b", "a"]),
            ErrorKind::Corrupted,
            "token 2 repeats token 0",
        ),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![1])),
            ErrorKind::Corrupted,
            "1 token types, expected",
        ),
        (
            "tokenizer.ggml.bos_token_id",
            Value::U32(9999),
            ErrorKind::Corrupted,
            "9999, expected below",
        ),
    ];
    for (key, value, kind, text) in cases {
        let error = try_gguf(&with(writer("smollm"), key, value)).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert!(error.to_string().contains("test.gguf"), "{error}");
    }
}

#[test]
fn damaged_tokenizer_files_are_errors() {
    let from = |bytes: &[u8]| Tokenizer::from_bytes(bytes, Path::new("t.json")).unwrap_err();
    let valid = std::fs::read_to_string(data("smollm.json")).unwrap();
    assert_eq!(from(b"").kind(), ErrorKind::Corrupted);
    assert_eq!(from(b"{}").kind(), ErrorKind::Corrupted);
    assert_eq!(from(&valid.as_bytes()[..valid.len() / 2]).kind(), ErrorKind::Corrupted);
    let prefixed =
        valid.replace("\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"");
    assert!(from(prefixed.as_bytes()).to_string().contains("continuing_subword_prefix"));
    // A merge longer than any token: past a buffer inside the BPE builder.
    let mut json: Json = serde_json::from_str(&valid).unwrap();
    let long = "Ġcounterrevolutionary";
    json["model"]["merges"].as_array_mut().unwrap().push(serde_json::json!([long, long]));
    let error = from(&serde_json::to_vec(&json).unwrap());
    assert_eq!(error.kind(), ErrorKind::Corrupted, "{error}");
    json["model"]["merges"] = serde_json::json!([]);
    json["decoder"] = Json::Null;
    let error = from(&serde_json::to_vec(&json).unwrap());
    assert!(error.to_string().contains("decoder: expected ByteLevel"), "{error}");
    let error = Tokenizer::from_file(Path::new("/nowhere/tokenizer.json")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("/nowhere/tokenizer.json"), "{error}");
}

/// Where a vocabulary of SentencePiece puts a blank of its own.
const OWN_BLANKS: [&str; 4] = ["by its normalizer", "always", "first", "never"];

fn sentencepiece(own_blank: &str) -> Tokenizer {
    let json = crate::testing::sentencepiece(own_blank).to_string();
    Tokenizer::from_bytes(json.as_bytes(), Path::new("t.json")).unwrap()
}

#[test]
fn a_text_behind_text_has_no_blank_that_nobody_wrote() {
    for own_blank in OWN_BLANKS {
        let tokenizer = sentencepiece(own_blank);
        let of = |pieces: &[&str]| -> Vec<u32> {
            pieces.iter().map(|piece| tokenizer.id(piece).unwrap()).collect()
        };
        let alone =
            if own_blank == "never" { &["He", "l", "l", "o"] } else { &["▁He", "l", "l", "o"] };
        assert_eq!(tokenizer.encode("Hello", false).unwrap(), of(alone), "{own_blank}");
        let inside = tokenizer.encode_inside("Hello", false).unwrap();
        assert_eq!(inside, of(&["He", "l", "l", "o"]), "{own_blank}");
        let blank = tokenizer.encode_inside(" Hello", false).unwrap();
        assert_eq!(blank, of(&["▁He", "l", "l", "o"]), "{own_blank}");
        let lines = tokenizer.encode_inside("\n\n", false).unwrap();
        assert_eq!(lines, of(&["<0x0A>", "<0x0A>"]), "{own_blank}");
        assert_eq!(tokenizer.encode_inside("", false).unwrap(), [] as [u32; 0]);
    }
}

#[test]
fn pieces_joined_have_the_tokens_of_the_whole_text() {
    let texts: [&[(&str, bool)]; 5] = [
        &[("<s>[INST] ", true), ("Hello", false), (" [/INST]", true)],
        &[("<s>", true), ("Hello cat", false), ("</s>", true), ("cat", false)],
        &[("<s>[INST]\n", true), ("Hello", false), ("</s>\n", true), ("cat", false)],
        &[("t: ", true), (" Hello", false), (" [/INST] ", true)],
        &[("t: ", true), (" ", true), ("", false), ("Hello", false)],
    ];
    for own_blank in OWN_BLANKS {
        let tokenizer = sentencepiece(own_blank);
        for pieces in texts {
            let whole: String = pieces.iter().map(|(text, _)| *text).collect();
            let mut joined = Joined::behind(&tokenizer, None);
            for (text, is_scaffold) in pieces {
                match is_scaffold {
                    true => joined.scaffold(text).unwrap(),
                    false => joined.content(text).unwrap(),
                }
            }
            let whole = tokenizer.encode_with_specials(&whole).unwrap();
            assert_eq!(joined.take().unwrap(), whole, "{own_blank} {pieces:?}");
        }
    }
    // Words of a byte-level vocabulary have one token with the blank before them, too.
    let tokenizer = from_json("smollm");
    let mut joined = Joined::behind(&tokenizer, None);
    joined.scaffold("the: ").unwrap();
    joined.content("hotel").unwrap();
    assert_eq!(joined.take().unwrap(), tokenizer.encode("the: hotel", false).unwrap());
    joined.scaffold(" the: ").unwrap();
    assert_eq!(joined.take().unwrap(), tokenizer.encode(" the: ", false).unwrap());
}

#[test]
fn an_answer_that_goes_on_in_text_keeps_its_first_blank() {
    let tokenizer = sentencepiece("by its normalizer");
    let ids = ["▁He", "l", "l", "o", "▁", "c"].map(|piece| tokenizer.id(piece).unwrap());
    assert_eq!(tokenizer.decode_inside(&ids), " Hello c");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Hello c");
    assert_eq!(tokenizer.stream_inside().push(ids[0]).as_deref(), Some(" He"));
    assert_eq!(tokenizer.stream().push(ids[0]).as_deref(), Some("He"));
}

/// The real model where it has been fetched; prints why it is skipped otherwise.
#[test]
fn the_real_smollm2_vocabulary_round_trips() {
    let Some(path) = crate::testing::smollm2_gguf() else { return };
    let bytes = std::fs::read(&path).unwrap();
    let tokenizer = Tokenizer::from_gguf(&Gguf::parse(&bytes, &path).unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    let expected: Vec<Vec<u32>> =
        serde_json::from_slice(&std::fs::read(data("smollm2.json")).unwrap()).unwrap();
    let goldens = goldens();
    assert_eq!(expected.len(), goldens.len());
    for (golden, expected) in goldens.iter().zip(expected) {
        let text = golden["text"].as_str().unwrap();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, expected, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    assert_eq!(tokenizer.encode_with_specials("<|im_start|>user\n").unwrap(), [1, 4093, 198]);
    assert_eq!(tokenizer.id("<|im_end|>"), Some(2));
    assert_eq!(tokenizer.special_ids().eos, Some(2));
    assert!(tokenizer.prefix().is_empty());
    let plain = tokenizer.encode("<|im_start|>", false).unwrap();
    assert!(plain.len() > 3 && plain.iter().all(|&id| !tokenizer.is_special(id)));
}

/// The embedder's vocabulary where it has been fetched: its file limits and pads to 128 tokens.
#[test]
fn the_real_minilm_vocabulary_frames_documents_whole() {
    let Some(folder) = crate::testing::minilm_folder() else { return };
    let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 30522);
    let ids = tokenizer.encode_document("Hello, world!").unwrap();
    assert_eq!(ids, [101, 7592, 1010, 2088, 999, 102]);
    assert_eq!(tokenizer.encode_document(&"hotel ".repeat(500)).unwrap().len(), 502);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello, world!");
    let injected = tokenizer.encode_document("a [SEP] b").unwrap();
    assert_eq!(injected.iter().filter(|&&id| id == 102).count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_round_trips_and_both_files_agree(text in "\\PC{0,40}|.{0,40}") {
        thread_local! {
            static BOTH: (Tokenizer, Tokenizer) =
                (from_json("smollm"), try_gguf(&writer("smollm")).unwrap());
        }
        BOTH.with(|(json, gguf)| {
            let ids = json.encode(&text, false).unwrap();
            assert_eq!(gguf.encode(&text, false).unwrap(), ids);
            assert_eq!(json.decode(&ids, false).unwrap(), text);
        });
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(ids in proptest::collection::vec(0u32..800, 0..40)) {
        thread_local!(static TOKENIZER: Tokenizer = from_json("smollm"));
        TOKENIZER.with(|tokenizer| {
            let bytes: Vec<u8> = ids
                .iter()
                .filter(|&&id| !tokenizer.is_hidden(id))
                .filter_map(|&id| tokenizer.token_bytes(id))
                .flatten()
                .collect();
            let decoded = tokenizer.decode(&ids, true).unwrap();
            assert_eq!(decoded, String::from_utf8_lossy(&bytes));
        });
    }

    #[test]
    fn flipped_bytes_of_a_tokenizer_file_never_panic(
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..128), 1..4),
    ) {
        let mut bytes = std::fs::read(data("llama-bpe.json")).unwrap();
        // Half of the flips go to the part outside the vocabulary, where the structure is.
        let outside = bytes.windows(9).position(|window| window == b"\"vocab\":{").unwrap();
        for (nth, (at, byte)) in flips.into_iter().enumerate() {
            let at = at.index(if nth % 2 == 0 { outside } else { bytes.len() });
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(&bytes, Path::new("t.json")) {
            let _ = tokenizer.encode("some text 123 <|im_end|>", false);
        }
    }
}

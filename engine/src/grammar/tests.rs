//! Answers that are held to a grammar, over the tiny model; and what is allowed next, over small vocabularies.

use super::*;
use crate::tokenizer::Tokenizer;
use crate::{
    Device, Engine, MemoryConfig, ModelSource, Scope, SendOptions, Session, StopReason, ToolResult,
};
use serde_json::Value;
use std::path::Path;

const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"$ref": "#/$defs/age"},
        "kind": {"enum": ["cat", "dog"]}
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": false,
    "$defs": {"age": {"type": "integer", "minimum": 0, "maximum": 120}}
}"##;

/// An engine in `folder` with the tiny model, of whose vocabulary every byte is a token.
fn open(folder: &Path) -> Engine {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/gguf/model.gguf");
    Engine::builder(folder.join("store"))
        .model(ModelSource::path(model))
        .device(Device::Cpu)
        .memory(MemoryConfig::with_window(128))
        .open_blocking()
        .unwrap()
}

fn session(engine: &Engine, name: &str) -> Session {
    engine.session_blocking(Scope::user("ada").session(name)).unwrap()
}

fn regex(pattern: &str) -> Grammar {
    Grammar::Regex(pattern.into())
}

fn lark(text: &str) -> Grammar {
    Grammar::Lark(text.into())
}

fn held_to(grammar: Grammar) -> SendOptions {
    SendOptions::default().recall_k(0).grammar(grammar)
}

/// What the model says in sessions `name`, greedily and by some seeds, with the reason why it ended.
fn answers(engine: &Engine, name: &str, options: &SendOptions) -> Vec<(String, StopReason)> {
    let drawn = (0..8).map(|seed| options.clone().temperature(1.0).seed(seed));
    let each = std::iter::once(options.clone()).chain(drawn).enumerate();
    let answer = |(i, options): (usize, SendOptions)| {
        let mut chat = session(engine, &format!("{name}-{i}"));
        let (text, usage) = chat.send_with("hello there", options).text_blocking().unwrap();
        (text, usage.stop)
    };
    each.map(answer).collect()
}

/// The text that `constraint` allows where the first token that it allows is taken each time.
fn walk(tokenizer: &Tokenizer, mut constraint: Constraint) -> String {
    let mut tokens = Vec::new();
    loop {
        let token = constraint.allowed.to_list()[0];
        tokens.push(token);
        if constraint.push(token).unwrap() {
            return tokenizer.decode_inside(&tokens);
        }
    }
}

fn compiler(tokenizer: &Tokenizer, padding: usize, ends: &[u32]) -> GrammarCompiler {
    GrammarCompiler::new(tokenizer, tokenizer.vocab_size() + padding, ends).unwrap()
}

fn sentencepiece(own_blank: &str) -> Tokenizer {
    let json = crate::testing::sentencepiece(own_blank).to_string();
    Tokenizer::from_bytes(json.as_bytes(), Path::new("t.json")).unwrap()
}

#[test]
fn answers_fit_the_schema_and_end_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    // White space is bounded: at twelve places there are at most 64 blanks.
    let options = held_to(Grammar::JsonSchema(SCHEMA.into())).max_new_tokens(1000);
    for (answer, stop) in answers(&engine, "held", &options) {
        assert_eq!(stop, StopReason::EndOfTurn, "{answer}");
        let json: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(json.as_object().unwrap().len(), 3, "{answer}");
        assert!(json["name"].as_str().unwrap().chars().count() <= 4, "{answer}");
        assert!(json["age"].as_u64().unwrap() <= 120, "{answer}");
        assert!(["cat", "dog"].contains(&json["kind"].as_str().unwrap()), "{answer}");
    }
    let any = held_to(Grammar::JsonObject).max_new_tokens(200);
    for (answer, stop) in answers(&engine, "any", &any) {
        assert!(answer.starts_with('{'), "{answer}");
        if stop == StopReason::EndOfTurn {
            assert!(serde_json::from_str::<Value>(&answer).unwrap().is_object(), "{answer}");
        }
    }
}

#[test]
fn answers_match_a_regular_expression_and_end_where_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    // Letters of two and three bytes are two and three tokens here, and `the` is one.
    let options = held_to(regex("^[a-f]{2,5}-(the|é漢|[0-9]{3})$")).max_new_tokens(40);
    for (answer, stop) in answers(&engine, "held", &options) {
        assert_eq!(stop, StopReason::EndOfTurn, "{answer}");
        let (head, tail) = answer.split_once('-').unwrap();
        assert!((2..=5).contains(&head.len()), "{answer}");
        assert!(head.bytes().all(|byte| (b'a'..=b'f').contains(&byte)), "{answer}");
        let is_number = tail.len() == 3 && tail.bytes().all(|byte| byte.is_ascii_digit());
        assert!(is_number || ["the", "é漢"].contains(&tail), "{answer}");
    }
}

#[test]
fn a_regular_expression_means_what_it_says_in_verbose_mode_and_with_slashes() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let verbose = "(?x)\n  [0-9]{2} # the / year\n  -\n\t[0-9]{2} # \\/ month\n";
    for (answer, stop) in answers(&engine, "verbose", &held_to(regex(verbose))) {
        let (year, month) = answer.split_once('-').unwrap();
        assert_eq!((year.len(), month.len(), stop), (2, 2, StopReason::EndOfTurn), "{answer:?}");
    }
    for (answer, _) in answers(&engine, "slashes", &held_to(regex("a/b\\/\n\tc"))) {
        assert_eq!(answer, "a/b/\n\tc");
    }
}

#[test]
fn an_answer_ends_by_its_grammar_its_limit_or_a_stop_string() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let mut chat = session(&engine, "trip");
    for (pattern, limit, stop, expected) in [
        ("[ab]{3}", 9, StopReason::EndOfTurn, 3),
        // The last token that there may be is the last one of the grammar.
        ("[ab]{3}", 3, StopReason::EndOfTurn, 3),
        ("[ab]{3}", 2, StopReason::MaxTokens, 2),
        ("[ab]{2}END[ab]{2}", 9, StopReason::StopString, 2),
        ("[ab]{3}", 0, StopReason::MaxTokens, 0),
    ] {
        let options = held_to(regex(pattern)).max_new_tokens(limit).stop("END");
        let (text, usage) = chat.send_with("hello", options).text_blocking().unwrap();
        assert_eq!((usage.stop, text.len()), (stop, expected), "{pattern} {limit}");
    }
}

#[test]
fn a_session_goes_on_behind_an_answer_that_its_grammar_ended() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let mut chat = session(&engine, "trip");
    let (text, _) = chat.send_with("hello", held_to(regex("[0-9]{4}"))).text_blocking().unwrap();
    let silent = SendOptions::default().recall_k(0).max_new_tokens(0);
    chat.send_with("and now?", silent).text_blocking().unwrap();
    let turns = engine.shared.store.turns(chat.scope(), 0..9).unwrap();
    assert_eq!(turns[1].text, text);
    let stream: Vec<u32> = turns.iter().flat_map(|turn| turn.tokens.clone()).collect();
    let tokenizer = &engine.shared.model("test").unwrap().tokenizer;
    let expected = format!(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(tokenizer.decode(&stream, false).unwrap(), expected);
}

#[test]
fn regenerate_and_results_of_tools_are_held_to_the_grammar_of_their_own_call() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let mut chat = session(&engine, "trip");
    let free = SendOptions::default().recall_k(0).max_new_tokens(6);
    let (first, _) = chat.send_with("hello", free.clone()).text_blocking().unwrap();
    let digits = held_to(regex("[0-9]{4}"));
    let (again, _) = chat.regenerate(digits.clone()).text_blocking().unwrap();
    assert!(again.len() == 4 && again.bytes().all(|byte| byte.is_ascii_digit()), "{again}");
    assert_eq!(chat.regenerate(free).text_blocking().unwrap().0, first);
    let results = vec![ToolResult::new("at 9:14")];
    let (said, _) = chat.send_tool(results, digits).text_blocking().unwrap();
    assert!(said.len() == 4 && said.bytes().all(|byte| byte.is_ascii_digit()), "{said}");
}

#[test]
fn what_does_not_compile_is_refused_before_anything_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let mut chat = session(&engine, "trip");
    let nested = |open: &str, close: &str| [open.repeat(300), close.repeat(300)].concat();
    let schema = |text: &str| Grammar::JsonSchema(text.into());
    let not = r#"{"type": "object", "properties": {"a": {"not": {"type": "string"}}}}"#;
    let refused = [
        (schema("{"), "no JSON"),
        (schema("7"), "expected a JSON schema"),
        (schema(not), "not"),
        (schema(r##"{"$ref": "#/$defs/none"}"##), "none"),
        (schema(r#"{"$ref": "https://example.com/schema.json"}"#), "example.com"),
        (schema(r#"{"type": "integer", "minimum": 3, "maximum": 2}"#), "expected a JSON schema"),
        (schema(&nested("{\"items\":", "}")), "no JSON"),
        (regex(""), "it allows no text"),
        (regex("()"), "expected a regular expression"),
        (regex("("), "expected a regular expression"),
        (regex(r"a\"), "a backslash at its end"),
        (regex("a\\\nb"), "a backslash at the end of a line"),
        (regex("(?=a)b"), "expected a regular expression"),
        (regex(&nested("(", ")")), "expected a regular expression"),
        (regex(&"a".repeat(2 << 20)), "2097152 bytes, more than 262144"),
        (lark(""), "expected a Lark grammar"),
        (lark("start: other"), "expected a Lark grammar"),
        (lark("start: <|im_end|>"), "expected a Lark grammar"),
        (lark("start: a \"b\"\na[stop=\"\"]: /.*/"), "a rule with `stop`"),
        (lark("start: a \"b\"\na[stop=\"c\"]: /.*/"), "a rule with `stop`"),
        (lark(&format!("start: {}", nested("(", ")"))), "expected a Lark grammar"),
    ];
    for (grammar, expected) in &refused {
        let sent = chat.send_with("hello", held_to(grammar.clone())).text_blocking();
        let error = sent.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        let text = error.to_string();
        assert!(text.starts_with("send: grammar: ") && text.contains(expected), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    }
    assert_eq!(chat.num_turns().unwrap(), 0);
    chat.send_with("hello", held_to(regex("[ab]"))).text_blocking().unwrap();
    for call in ["send_tool", "regenerate"] {
        let bad = held_to(regex("("));
        let events = match call {
            "send_tool" => chat.send_tool(vec![ToolResult::new("at 9:14")], bad),
            _ => chat.regenerate(bad),
        };
        let error = events.text_blocking().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().starts_with(&format!("{call}: grammar: ")), "{error}");
    }
    assert_eq!(chat.num_turns().unwrap(), 2);
}

#[test]
fn rules_and_schemas_that_each_lead_to_the_next_are_followed_however_many_there_are() {
    const LINKS: usize = 3000;
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let model = engine.shared.model("test").unwrap();
    let rules: String = (0..LINKS).map(|i| format!("r{i}: r{}\n", i + 1)).collect();
    let rules = lark(&format!("start: r0\n{rules}r{LINKS}: \"a\"\n"));
    let schema = |i: usize| format!(r##""s{i}": {{"$ref": "#/$defs/s{}"}}, "##, i + 1);
    let schemas: String = (0..LINKS).map(schema).collect();
    let last = format!(r#""s{LINKS}": {{"const": 7}}"#);
    let schemas =
        Grammar::JsonSchema(format!(r##"{{"$ref": "#/$defs/s0", "$defs": {{{schemas}{last}}}}}"##));
    for (grammar, text) in [(rules, "a"), (schemas, "7")] {
        let constraint = model.held_to("test", Some(&grammar)).unwrap().unwrap();
        assert_eq!(walk(&model.tokenizer, constraint), text);
    }
}

#[test]
fn a_token_may_span_parts_of_a_grammar() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let model = engine.shared.model("test").unwrap();
    let id = |token: &str| model.tokenizer.id(token).unwrap();
    let parts = lark("start: \"t\" end\nend: \"he\" | \"ha\"");
    let mut constraint = model.held_to("test", Some(&parts)).unwrap().unwrap();
    let mut allowed = constraint.allowed.to_list();
    allowed.sort_unstable();
    let mut expected = [id("t"), id("th"), id("the")];
    expected.sort_unstable();
    assert_eq!(allowed, expected);
    assert!(constraint.push(id("the")).unwrap());
    let again = model.held_to("test", None).unwrap();
    assert!(again.is_none());
}

#[test]
fn padding_is_never_allowed_and_an_end_only_where_the_text_is_complete() {
    let folder = tempfile::tempdir().unwrap();
    let engine = open(folder.path());
    let model = engine.shared.model("test").unwrap();
    let size = model.tokenizer.vocab_size();
    let compiler = compiler(&model.tokenizer, 64, &model.end_of_turn);
    let end = model.end_of_turn[0] as usize;
    let logits = |grammar: &Grammar| {
        let mut logits = vec![0.0f32; size + 64];
        compiler.compile("test", grammar).unwrap().mask(&mut logits);
        logits
    };
    let any = regex("(?s:.*)");
    let named = lark("start: <[*]> \"a\"");
    for (grammar, may_end) in [(&any, true), (&named, false)] {
        let logits = logits(grammar);
        assert!(logits[size..].iter().all(|logit| *logit == f32::NEG_INFINITY));
        assert_eq!(logits[end] == 0.0, may_end, "{grammar:?}");
    }
    // Any text holds every letter, and no control token.
    let logits = logits(&any);
    let start = model.tokenizer.id("<|im_start|>").unwrap() as usize;
    assert_eq!(logits[start], f32::NEG_INFINITY);
    assert_eq!(logits[model.tokenizer.id("the").unwrap() as usize], 0.0);
}

#[test]
fn vocabularies_of_sentencepiece_are_read_with_their_blanks_and_bytes() {
    for own_blank in ["by its normalizer", "always", "first", "never"] {
        let tokenizer = sentencepiece(own_blank);
        let ends = [tokenizer.id("</s>").unwrap()];
        let compiler = compiler(&tokenizer, 0, &ends);
        let held_to = |grammar: &Grammar| compiler.compile("test", grammar).unwrap();
        for text in ["Hello cat", " Hello\nHello", "[a]"] {
            let pattern = text.replace('[', r"\[").replace(']', r"\]");
            assert_eq!(walk(&tokenizer, held_to(&regex(&pattern))), text, "{own_blank}");
        }
        let allowed = held_to(&regex(" ?(Hello|Ha)")).allowed.to_list();
        for piece in ["H", "He", "▁", "▁H", "▁He"] {
            let id = tokenizer.id(piece).unwrap();
            assert!(allowed.contains(&id), "{own_blank}: {piece} of {allowed:?}");
        }
        // Of these letters the vocabulary has none, neither at the beginning nor behind others.
        let error = compiler.compile("test", &regex("xyz")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let text = "test: grammar: the model has no token for what must follow, expected a regular expression that an answer can be held to";
        assert_eq!(error.to_string(), text);
        let mut constraint = held_to(&regex("ax|ay"));
        let letter = constraint.allowed.to_list()[0];
        let error = constraint.push(letter).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
}

#[test]
fn a_vocabulary_whose_tokens_are_no_bytes_is_refused() {
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"a": 0, "##b": 1},
        },
    });
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), Path::new("t.json"));
    let refused = GrammarCompiler::new(&tokenizer.unwrap(), 2, &[]);
    assert!(refused.err().unwrap().contains("WordPiece"));
}

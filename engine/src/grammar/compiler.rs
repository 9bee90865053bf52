//! Grammars compiled for the tokens of one model.
//! Knows no answer: what is compiled starts at its beginning.

use super::{Constraint, Grammar, first_line, library_error};
use crate::error::{Error, ErrorKind, Result};
use crate::tokenizer::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{SimpleVob, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};
use serde_json::json;
use std::sync::Arc;

/// Longest grammar. Its rules, or the schemas that it refers to, may each lead to the next: the library follows them by calls
/// of its own, as deep as the text has rules.
const MAX_GRAMMAR_BYTES: usize = 1 << 18;
/// Stack for that, a byte of text. A rule takes 8 bytes at least and a schema 14, which leaves each 16 kB for the ten calls or
/// so that it costs. What is not used is address space alone.
const STACK_BYTES_A_BYTE: usize = 2 << 10;
/// Stack for what every grammar takes: schemas that are merged nest 128 deep in it, of 2.5 kB each, and calls of `regex-syntax`.
const STACK_BYTES: usize = 4 << 20;
/// States of a lexer, which lives as long as its answer: of 1 to 2 kB each, as llguidance says, they take at most 100 MB.
const MAX_LEXER_STATES: usize = 50_000;
/// A longer token is never chosen: a node of the trie counts its depth in 10 bits, of which the root and the mark of a control
/// token take one each.
const MAX_TOKEN_BYTES: usize = (1 << 10) - 2;
/// Bytes of all tokens: each may be a node of the trie, whose nodes are counted in 22 bits. 262,144 tokens of 8 bytes have
/// half as many.
const MAX_VOCABULARY_BYTES: usize = (1 << 22) - 2;
/// Tokens: a node has 24 bits for the number of one, of which all ones mean none.
const MAX_TOKENS: usize = (1 << 24) - 2;

/// Compiles grammars over a model's tokens, of which it keeps a trie.
///
/// The library underneath catches its own panics: at its first grammar it sets a panic hook, which hands every other panic to
/// the hook that was there.
pub(crate) struct GrammarCompiler {
    factory: ParserFactory,
    /// See [`Constraint`].
    known: SimpleVob,
    ends: Vec<u32>,
}

impl GrammarCompiler {
    /// Over the first `num_tokens` tokens of `tokenizer`, as many as a model has logits for, of which `ends` end a turn.
    ///
    /// # Errors
    /// What was found where tokens are no bytes of a text.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        num_tokens: usize,
        ends: &[u32],
    ) -> Result<Self, String> {
        if !tokenizer.is_reversible() {
            return Err("a vocabulary of WordPiece, whose tokens are no bytes of a text".to_owned());
        }
        if num_tokens > MAX_TOKENS {
            return Err(format!("a vocabulary of {num_tokens} tokens, more than {MAX_TOKENS}"));
        }
        let is_token = |end: &u32| (*end as usize) < num_tokens;
        let ends: Vec<u32> = ends.iter().copied().filter(is_token).collect();
        let mut words: Vec<Vec<u8>> =
            (0..num_tokens as u32).map(|id| word(tokenizer, id, &ends)).collect();
        // One beyond them stands for the end of the answer, whichever of the model's tokens it is closed by.
        words.push(Vec::new());
        let bytes: usize = words.iter().map(Vec::len).sum();
        if bytes > MAX_VOCABULARY_BYTES {
            return Err(format!("a vocabulary of {bytes} bytes, more than {MAX_VOCABULARY_BYTES}"));
        }
        let info = TokRxInfo::new(words.len() as u32, num_tokens as TokenId);
        let trie = TokTrie::from(&info, &words);
        let mut known = trie.alloc_token_set();
        for (id, word) in words.iter().enumerate() {
            if !word.is_empty() {
                known.allow_token(id as TokenId);
            }
        }
        let env: TokEnv = Arc::new(Tokens { trie, tokenizer: tokenizer.clone() });
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| first_line(&error))?;
        // What it has to say is in its errors; it would write to the host's standard error.
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, known, ends })
    }

    /// What holds an answer to `grammar`.
    ///
    /// # Errors
    /// `InvalidArgument`, in the name of `operation`, for what does not compile, or allows nothing that the model can say.
    pub(crate) fn compile(&self, operation: &str, grammar: &Grammar) -> Result<Constraint> {
        let refused = |got: String| {
            Error::invalid(format!("{operation}: grammar: {got}, expected {}", grammar.expected()))
        };
        let len = grammar.text().len();
        if len > MAX_GRAMMAR_BYTES {
            return Err(refused(format!("{len} bytes, more than {MAX_GRAMMAR_BYTES}")));
        }
        let top = match grammar {
            Grammar::JsonObject => of_schema(json!({"type": "object"})),
            Grammar::JsonSchema(schema) => {
                let schema = serde_json::from_str(schema)
                    .map_err(|error| refused(format!("no JSON: {error}")).with_source(error))?;
                of_schema(schema)
            }
            Grammar::Regex(pattern) => {
                TopLevelGrammar::from_lark(regex_as_lark(pattern).map_err(refused)?)
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let parser = on_stack(operation, STACK_BYTES + len * STACK_BYTES_A_BYTE, || {
            self.factory.create_parser(top)
        })?;
        let parser = parser
            .map_err(|error| library_error(refused, first_line(&error)).with_source(error))?;
        let lexemes = parser.parser.grammar().lexer_spec();
        if lexemes.has_stop {
            let got = "a rule with `stop`, which takes back what was said (`suffix` does not)";
            return Err(refused(got.to_owned()));
        }
        let may_force = !lexemes.no_forcing;
        let (known, ends) = (self.known.clone(), self.ends.clone());
        Constraint::new(Matcher::new(Ok(parser)), known, ends, may_force)
            .map_err(|got| library_error(refused, got))
    }
}

/// A Lark grammar of one regular expression, whatever it holds.
///
/// # Errors
/// What was found where it would be read as another one.
fn regex_as_lark(pattern: &str) -> Result<String, String> {
    // It would be the beginning of a comment.
    if pattern.is_empty() {
        return Err("it allows no text".to_owned());
    }
    let mut text = String::from("start: /");
    let mut chars = pattern.chars();
    while let Some(c) = chars.next() {
        match c {
            '/' => text.push_str("\\/"),
            '\\' => match chars.next() {
                None => return Err("a backslash at its end".to_owned()),
                Some('\n') => return Err("a backslash at the end of a line".to_owned()),
                Some(escaped) => text.extend([c, escaped]),
            },
            // Breaks of lines stay as they are: in verbose mode (`(?x)`) they end a comment.
            c => text.push(c),
        }
    }
    text.push('/');
    Ok(text)
}

/// White space between two parts of JSON, enough for a line and the indentation of thirty levels: without an end a small model
/// goes on with it.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// JSON that fits `schema`, unless that says itself by `x-guidance` how JSON is written.
fn of_schema(mut schema: serde_json::Value) -> TopLevelGrammar {
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": WHITE_SPACE}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// Runs `work` on a stack of `bytes`.
///
/// # Errors
/// `OutOfMemory` where there is no room for one.
fn on_stack<T: Send>(operation: &str, bytes: usize, work: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new().stack_size(bytes).spawn_scoped(scope, work);
        let thread = spawned.map_err(|source| {
            let what = format!("{operation}: grammar: a stack of {bytes} bytes: {source}");
            Error::new(ErrorKind::OutOfMemory, what).with_source(source)
        })?;
        thread.join().map_err(|payload| Error::panicked(operation, &*payload))
    })
}

/// What the token `id` adds to a text: nothing where it is never chosen for that.
fn word(tokenizer: &Tokenizer, id: u32, ends: &[u32]) -> Vec<u8> {
    let Some(bytes) = tokenizer.token_bytes(id) else { return Vec::new() };
    // An end closes the answer wherever it stands, whatever text it has.
    if ends.contains(&id) || bytes.len() > MAX_TOKEN_BYTES {
        return Vec::new();
    }
    let mark = TokTrie::SPECIAL_TOKEN_MARKER;
    if tokenizer.is_special(id) {
        // What steers a model is no text, though some of it is shown (`<think>`): a string of JSON may not hold it.
        return [&[mark], bytes.as_slice()].concat();
    }
    // The mark is a byte that no text holds.
    if bytes.contains(&mark) { Vec::new() } else { bytes }
}

/// A model's tokens as the library sees them.
struct Tokens {
    trie: TokTrie,
    tokenizer: Tokenizer,
}

impl Tokens {
    /// The tokens that `text` has within a text, by the model's own tokenizer.
    fn encode(&self, text: &str) -> Vec<TokenId> {
        let ids = self.tokenizer.encode_inside(text, false).unwrap_or_default();
        // A normalizer may change a text, and a vocabulary lack a byte of it: what must follow is then spelled as it goes.
        match self.trie.decode(&ids) == text.as_bytes() {
            true => ids,
            false => self.trie.greedy_tokenize(text.as_bytes()),
        }
    }
}

impl TokenizerEnv for Tokens {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// Where a grammar leaves one text alone, the model reads it in the tokens that it was trained on.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| self.encode(text))
    }
}

//! What an answer is held to: a grammar, and the tokens that it allows next.
//! Knows no session and no sampling; its folder is the only place that names `llguidance`.

mod compiler;
#[cfg(test)]
mod tests;

pub(crate) use compiler::GrammarCompiler;

use crate::error::{Error, ErrorKind, Result};
use llguidance::Matcher;
use llguidance::toktrie::{SimpleVob, TokenId};
use std::collections::VecDeque;

/// What an answer is held to, from its first token to its last: it is text of this form, and nothing before or behind it.
///
/// ```
/// use mka::{Grammar, SendOptions};
///
/// let schema = r#"{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}"#;
/// let options = SendOptions::default().grammar(Grammar::JsonSchema(schema.into()));
/// assert!(options.grammar.is_some());
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that fits this schema, itself JSON: of draft 2020-12, or of the one that its `$schema` names. Properties come in
    /// the schema's order. `$ref` leads to places of the same schema, as `#/$defs/city`. Refused are keywords that cannot be
    /// kept to while text is written (`not`, `if`, `uniqueItems`, `contains`, `dependentRequired` and others), and a `oneOf`
    /// whose parts may hold at once.
    JsonSchema(String),
    /// Text that this regular expression matches as a whole, in the syntax of Rust's crate `regex`; without look-around other
    /// than `^` and `$` at its ends.
    Regex(String),
    /// Text of a context-free grammar in Lark's notation, as llguidance reads it
    /// (<https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md>). A control token of the model that is no end of
    /// a turn may stand in it, as `<tool_call>`. Refused are rules with `stop`, which take text back; `suffix` does not.
    Lark(String),
}

impl Grammar {
    /// What a caller wrote.
    fn text(&self) -> &str {
        match self {
            Self::JsonObject => "",
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }

    /// What the text is to be.
    fn expected(&self) -> &'static str {
        match self {
            Self::JsonObject | Self::JsonSchema(_) => "a JSON schema that an answer can be held to",
            Self::Regex(_) => "a regular expression that an answer can be held to",
            Self::Lark(_) => "a Lark grammar that an answer can be held to",
        }
    }
}

/// Where an answer that is being written stands in its grammar.
pub(crate) struct Constraint {
    matcher: Matcher,
    /// Tokens that stand for text, or that a grammar may name; without padding and the ends of a turn.
    known: SimpleVob,
    /// Tokens that end a turn.
    ends: Vec<u32>,
    /// Whether the tokens of a text that the grammar leaves no choice of are the model's own for it.
    may_force: bool,
    /// Those of them that are still to come: found once, not at each of them.
    forced: VecDeque<TokenId>,
    /// Tokens that may come next.
    allowed: SimpleVob,
    is_complete: bool,
}

impl Constraint {
    /// The beginning of an answer; what was found where nothing may stand there.
    fn new(
        matcher: Matcher,
        known: SimpleVob,
        ends: Vec<u32>,
        may_force: bool,
    ) -> Result<Self, String> {
        let (allowed, forced) = (known.clone(), VecDeque::new());
        let is_complete = false;
        let mut constraint = Self { matcher, known, ends, may_force, forced, allowed, is_complete };
        constraint.find_allowed()?;
        match constraint.is_complete {
            true => Err("it allows no text".to_owned()),
            false => Ok(constraint),
        }
    }

    /// Puts the logits (vocab) of tokens that may not come next out of reach.
    pub(crate) fn mask(&self, logits: &mut [f32]) {
        for (token, logit) in logits.iter_mut().enumerate() {
            if !self.allowed.get(token) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }

    /// Goes on by `token`, which was allowed and ends no turn; whether the answer is complete: nothing may follow.
    ///
    /// # Errors
    /// `InvalidArgument` if the model has no token for what must follow, or finding it takes more than a grammar may.
    pub(crate) fn push(&mut self, token: u32) -> Result<bool> {
        let gone_on = self.matcher.consume_token(token).map_err(|error| first_line(&error));
        if self.forced.pop_front().is_some_and(|forced| forced != token) {
            self.forced.clear();
        }
        gone_on.and_then(|()| self.find_allowed()).map_err(|got| {
            let refused = |got| {
                Error::invalid(format!(
                    "generate: grammar: {got}, expected one that the model can go on in"
                ))
            };
            library_error(refused, got)
        })?;
        Ok(self.is_complete)
    }

    /// Finds what may come next, and whether that is nothing: of the tokens that the grammar goes on with those that stand for
    /// text, and the ends of a turn where it may end.
    fn find_allowed(&mut self) -> Result<(), String> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            self.is_complete = true;
            return Ok(());
        }
        let may_end = self.matcher.is_accepting().map_err(|error| first_line(&error))?;
        let nothing = || "the model has no token for what must follow".to_owned();
        if self.forced.is_empty() && self.may_force {
            self.forced = self.matcher.compute_ff_tokens().into();
        }
        let mut allowed = match self.forced.front() {
            Some(forced) => {
                let mut allowed = self.known.clone();
                allowed.set_all(false);
                allowed.allow_token(*forced);
                allowed
            }
            None => self.matcher.compute_mask().map_err(|error| {
                let got = first_line(&error);
                // The name of the library's reason where not even padding is left.
                if got.starts_with("NoExtension") { nothing() } else { got }
            })?,
        };
        // A grammar may name any number for a token, padding and ends too.
        allowed.and(&self.known);
        if allowed.is_zero() && !may_end {
            return Err(nothing());
        }
        self.is_complete = allowed.is_zero();
        if may_end {
            self.ends.iter().for_each(|end| allowed.allow_token(*end));
        }
        self.allowed = allowed;
        Ok(())
    }
}

/// The error that `refused` makes of what the library says, or one of ours where it panicked.
fn library_error(refused: impl Fn(String) -> Error, got: String) -> Error {
    let is_own = got.starts_with("panic");
    let error = refused(got);
    if is_own { Error::new(ErrorKind::Internal, error.to_string()) } else { error }
}

/// What an error of the library says, without the place in the grammar that it draws below, or a backtrace.
fn first_line(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim_end_matches('.').to_owned()
}

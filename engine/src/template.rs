//! Renders conversations through a model's own chat template, and says which part is whose.
//! Knows no tokenizer and no session: text in, text out.
//!
//! Templates are Jinja as `transformers` runs it (`trim_blocks`, `lstrip_blocks`, Python's string
//! methods, `raise_exception`, `strftime_now`, its own `tojson`). A template is one long string
//! in which the user's words and the control tokens meet; [`Segment`] keeps the two apart, so
//! that words are never encoded as control tokens.

use std::path::Path;

use serde::Serialize;

use crate::gguf::Gguf;
use crate::{Error, Result};

mod delta;
mod environment;
mod files;
#[cfg(test)]
mod tests;

pub(crate) use environment::Date;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub(crate) role: String,
    /// The words, untrusted: encoded without parsing control tokens.
    pub(crate) content: String,
}

impl Message {
    pub(crate) fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A stretch of rendered text by its author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// Written by the template: encoded with control tokens parsed.
    Scaffold(String),
    /// Written by the author of a message: encoded as plain text.
    Content(String),
}

impl Segment {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Scaffold(text) | Self::Content(text) => text,
        }
    }
}

/// How much of a conversation stands in the stream already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    /// Nothing.
    Start,
    /// The first `n` messages, rendered whole.
    After(usize),
    /// The first `n` messages, the generation prompt, and message `n` as the model generated it,
    /// without what closes it.
    AfterReply(usize),
}

/// A compiled chat template.
#[derive(Debug, Clone)]
pub(crate) struct ChatTemplate {
    environment: minijinja::Environment<'static>,
    source: String,
    bos_token: String,
    eos_token: String,
}

/// What base models without a template are given: names and colons, as in a printed dialogue.
const PLAIN: &str = r"{%- for message in messages -%}
{{ message.role | capitalize + ': ' + message.content | trim + '\n\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}";

impl ChatTemplate {
    /// Compiles a template; `bos_token` and `eos_token` are the strings it may name.
    ///
    /// # Errors
    /// [`Model`](crate::ErrorKind::Model) where the source is no valid template.
    pub(crate) fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        Ok(Self {
            environment: environment::build(source)?,
            source: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// The generic form for a model without a template: `User: ..`, `Assistant: ..`, a blank line
    /// between.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(crate) fn plain(bos_token: &str) -> Result<Self> {
        let source = format!("{{{{ bos_token }}}}{PLAIN}");
        Self::new(&source, bos_token, "")
    }

    /// The template of a HuggingFace folder: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json`; `None` where the model has none.
    ///
    /// # Errors
    /// `Storage` where a file cannot be read, `Corrupted` where it is not JSON, `Model` where the
    /// template is not valid or none of several is named `default`.
    pub(crate) fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let Some(found) = files::of_folder(folder)? else { return Ok(None) };
        Self::new(&found.source, &found.bos_token, &found.eos_token).map(Some)
    }

    /// The template of a GGUF file; `None` where it carries none.
    ///
    /// # Errors
    /// `Model` where the metadata or the template is not valid.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Option<Self>> {
        let Some(found) = files::of_gguf(gguf)? else { return Ok(None) };
        Self::new(&found.source, &found.bos_token, &found.eos_token).map(Some)
    }

    /// Lets the template ask for the day (`strftime_now`); without one, templates fall back to a
    /// date of their own. One stream needs one date: a later one changes text that stands already.
    pub(crate) fn with_date(mut self, date: Date) -> Self {
        environment::add_date(&mut self.environment, date);
        self
    }

    /// The whole conversation as one text, as `apply_chat_template` of `transformers` gives it.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) where the template refuses the
    /// conversation, with its own words; [`Model`](crate::ErrorKind::Model) where it fails.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let template =
            self.environment.get_template(environment::NAME).map_err(environment::error)?;
        let context = minijinja::context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            tools => (),
            documents => (),
        };
        template.render(context).map_err(environment::error)
    }

    /// The whole conversation, split by author. Joined, the segments are [`Self::render`].
    ///
    /// # Errors
    /// As [`Self::render`], and [`Model`](crate::ErrorKind::Model) where the template rewrites
    /// content in a way that cannot be followed.
    pub(crate) fn segments(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<Segment>> {
        self.turn_delta(messages, Position::Start, add_generation_prompt)
    }

    /// What to append to a stream that stands at `position`, split by author, so that the stream
    /// holds all of `messages`. Nothing that stands is rendered again.
    ///
    /// After [`Position::AfterReply`] the delta begins with what closes the reply (`<|im_end|>`):
    /// where the model generated that token itself and it is in the stream, leave it out once.
    ///
    /// Templates treat messages alike, so a caller with a long history may pass its first and its
    /// last messages only, as long as the roles alternate as in the whole.
    ///
    /// # Errors
    /// As [`Self::segments`]; [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for a
    /// position past the messages; [`Model`](crate::ErrorKind::Model) where the template is not
    /// prefix-stable: it renders the messages that stand differently once more of them follow.
    pub(crate) fn turn_delta(
        &self,
        messages: &[Message],
        position: Position,
        add_generation_prompt: bool,
    ) -> Result<Vec<Segment>> {
        delta::compute(self, messages, position, add_generation_prompt)
    }

    /// Whether any text occurs in the template's own source or tokens.
    fn names(&self, text: &str) -> bool {
        [&self.source, &self.bos_token, &self.eos_token].iter().any(|part| part.contains(text))
    }
}

/// An error of this template: nothing the caller passed is at fault.
fn wrong(what: impl std::fmt::Display) -> Error {
    Error::model(format!("chat template: {what}"))
}

//! The decode loop: one token at a time until the model, a limit, a stop string or the caller ends the answer.
//! Knows no store; its caller commits what it gives back.

use crate::conversation::Conversation;
use crate::engine::Model;
use crate::error::{Error, Result};
use crate::grammar::Constraint;
use crate::prompt::{self, Scaffold};
use crate::session::SendOptions;
use crate::snapshot::OpenTurn;
use crate::stream::{Event, Sink, StopReason, Token};
use crate::tokenizer::Joined;

/// Most tokens of an answer where the caller names no limit.
const MAX_NEW_TOKENS: usize = 512;

/// What the model is made to say to a document before it is asked about it.
const DOCUMENT_READ: &str = "I have read it.";

/// How an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    EndOfTurn(u32),
    /// The grammar allows nothing more: no token was chosen to close the turn.
    Complete,
    MaxTokens,
    Text,
    Cancelled,
}

impl Stop {
    /// The token by which the model closed its turn: chosen, but not in the stream yet.
    pub(crate) fn closed_by(&self) -> Option<u32> {
        match self {
            Self::EndOfTurn(token) => Some(*token),
            _ => None,
        }
    }

    /// The reason to report; None if the caller is gone.
    pub(crate) fn reason(&self) -> Option<StopReason> {
        match self {
            Self::EndOfTurn(_) | Self::Complete => Some(StopReason::EndOfTurn),
            Self::MaxTokens => Some(StopReason::MaxTokens),
            Self::Text => Some(StopReason::StopString),
            Self::Cancelled => None,
        }
    }
}

/// A generated answer: its text and the tokens that it added to the stream.
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) stop: Stop,
}

/// What stands before words of the user.
#[derive(Clone, Copy, Default)]
pub(crate) struct Before<'a> {
    /// Instructions, at the beginning of a session.
    pub(crate) system: Option<&'a str>,
    /// Whether they go on in a document that is open.
    pub(crate) joined: bool,
    /// The model's scaffold with the tools that a session is offered, at its beginning.
    pub(crate) offering: Option<&'a Scaffold>,
}

impl Before<'_> {
    /// Whether the words begin a session that is told something first.
    pub(crate) fn instructs(&self, open: OpenTurn) -> bool {
        open == OpenTurn::Start && (self.system.is_some() || self.offering.is_some())
    }
}

/// Writes what stands between what the stream holds and the next words of the user.
pub(crate) fn opening(
    text: &mut Joined<'_>,
    model: &Model,
    open: OpenTurn,
    before: Before<'_>,
) -> Result<()> {
    let Before { system, joined, offering } = before;
    let scaffold = offering.unwrap_or(&model.scaffold);
    let system = system.map(|system| prompt::shown(system, scaffold.trims.system));
    match open {
        OpenTurn::Start => {
            if scaffold.opening.is_empty() {
                // No template: the document begins as the tokenizer itself begins one.
                text.begin_document();
                if let (Some(system), Some((before, after))) = (system, &scaffold.system) {
                    text.content(&format!("{before}{system}{after}"))?;
                }
                return Ok(());
            }
            let Some(system) = system else {
                return text.scaffold(&scaffold.opening);
            };
            let (before, after) = scaffold.system.as_ref().ok_or_else(prompt::no_system)?;
            text.scaffold(before)?;
            text.content(system)?;
            text.scaffold(after)
        }
        OpenTurn::User if joined => Ok(()),
        // A base model has no turns: the document is followed by a paragraph.
        OpenTurn::User if scaffold.opening.is_empty() => text.content("\n\n"),
        OpenTurn::User | OpenTurn::Results | OpenTurn::Answered { .. } => {
            closing(text, model, open, &scaffold.to_user)
        }
    }
}

/// Closes what is open by what the template writes between an answer and what comes next.
pub(crate) fn closing(
    text: &mut Joined<'_>,
    model: &Model,
    open: OpenTurn,
    to_next: &str,
) -> Result<()> {
    match open {
        OpenTurn::Start => {}
        OpenTurn::User | OpenTurn::Results if model.scaffold.opening.is_empty() => {}
        OpenTurn::User | OpenTurn::Results => {
            // A question in the document's own message is taken for a part of the document.
            let scaffold = &model.scaffold;
            text.scaffold(match open {
                OpenTurn::Results => &scaffold.result.to_answer,
                _ => &scaffold.to_answer,
            })?;
            text.scaffold(&scaffold.answer_lead)?;
            text.content(DOCUMENT_READ)?;
        }
        OpenTurn::Answered { closed_by } => {
            if let Some(token) = closed_by {
                let next = model.tokenizer.encode_behind(text.last(), to_next, true)?;
                if next.first() != Some(&token) {
                    // The model ended its turn by another token than the template does: the stream keeps both.
                    text.token(token);
                }
            }
        }
    }
    text.scaffold(to_next)
}

/// Refuses what [`opening`] does, for who stores something before it is written.
pub(crate) fn check_opening(model: &Model, open: OpenTurn, system: Option<&str>) -> Result<()> {
    let scaffold = &model.scaffold;
    let is_written = open == OpenTurn::Start && !scaffold.opening.is_empty() && system.is_some();
    match is_written && scaffold.system.is_none() {
        true => Err(prompt::no_system()),
        false => Ok(()),
    }
}

/// [`opening`] of a text that stands outside the chat template.
pub(crate) fn bare_opening(text: &mut Joined<'_>, open: OpenTurn) {
    if open == OpenTurn::Start {
        text.begin_document();
    }
}

/// Generates an answer to a prompt of which all but `last_token` is in the stream, held to `constraint` if there is one.
///
/// Every token of the answer that is returned is in the stream.
pub(crate) fn generate(
    conversation: &mut Conversation,
    last_token: u32,
    options: &SendOptions,
    mut constraint: Option<Constraint>,
    sink: &Sink<Event>,
) -> Result<Answer> {
    let shared = conversation.shared.clone();
    let model = shared.model("generate")?;
    let limit = options.max_new_tokens.unwrap_or(MAX_NEW_TOKENS);
    // An answer that goes on in text may begin with a blank of its own, and of one that is held to a grammar every byte counts.
    let goes_on = options.completion || !options.answer_prefix.is_empty() || constraint.is_some();
    let mut decoder = match goes_on {
        true => model.tokenizer.stream_inside(),
        false => model.tokenizer.stream(),
    };
    let mut text = StopText::new(&options.stop);
    let mut tokens = Vec::new();
    let mut next = last_token;
    let stop = loop {
        let hidden = conversation
            .prefill(&[next], &mut || true)?
            .ok_or_else(|| Error::model("generate: no hidden state"))?;
        if tokens.len() == limit {
            break Stop::MaxTokens;
        }
        if conversation.is_cancelled_anywhere(sink.is_cancelled())? {
            break Stop::Cancelled;
        }
        let mut logits = conversation.logits(&hidden)?;
        if let Some(constraint) = &constraint {
            // Before `pick` filters: the most likely tokens that it keeps may all be ones that the grammar forbids.
            constraint.mask(&mut logits);
        }
        let recent = &conversation.state.recent_tokens;
        let token = options.sampling.pick(&mut logits, recent, conversation.position())?;
        if model.end_of_turn.contains(&token) {
            break Stop::EndOfTurn(token);
        }
        let is_complete = match &mut constraint {
            Some(constraint) => constraint.push(token)?,
            None => false,
        };
        tokens.push(token);
        sink.count_token();
        next = token;
        let piece = decoder.push(token).unwrap_or_default();
        let (piece, stopped) = text.push(&piece);
        if !piece.is_empty() {
            // A caller who is gone is noticed once the token is in the stream, so that log and cache agree.
            sink.send(Event::Token(Token { text: piece }));
        }
        if stopped || is_complete {
            conversation.prefill(&[next], &mut || true)?;
            break if stopped { Stop::Text } else { Stop::Complete };
        }
    };
    let rest = match stop {
        Stop::Text => String::new(),
        _ => text.finish(&decoder.flush().unwrap_or_default()),
    };
    if !rest.is_empty() && stop != Stop::Cancelled {
        sink.send(Event::Token(Token { text: rest }));
    }
    Ok(Answer { text: text.answer, tokens, stop })
}

/// Holds back text that may be the start of a stop string.
struct StopText<'a> {
    stops: Vec<&'a str>,
    answer: String,
    held: String,
}

impl<'a> StopText<'a> {
    fn new(stops: &'a [String]) -> Self {
        let stops = stops.iter().map(String::as_str).filter(|stop| !stop.is_empty()).collect();
        Self { stops, answer: String::new(), held: String::new() }
    }

    /// Adds a piece: what can be shown now, and whether a stop string is complete.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        let first = self.stops.iter().filter_map(|stop| self.held.find(stop)).min();
        if let Some(at) = first {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            self.answer.push_str(&shown);
            return (shown, true);
        }
        let starts = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let keep = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| starts(&self.held[*at..]))
            .unwrap_or(self.held.len());
        let shown: String = self.held.drain(..keep).collect();
        self.answer.push_str(&shown);
        (shown, false)
    }

    /// Ends the text with `tail`: what was held back is part of the answer after all.
    fn finish(&mut self, tail: &str) -> String {
        self.held.push_str(tail);
        let shown = std::mem::take(&mut self.held);
        self.answer.push_str(&shown);
        shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_strings_across_pieces_end_the_text_and_are_not_in_it() {
        let stops = ["END".to_owned(), "\n\n".to_owned()];
        let mut text = StopText::new(&stops);
        assert_eq!(text.push("a\n"), ("a".into(), false));
        assert_eq!(text.push("b E"), ("\nb ".into(), false));
        assert_eq!(text.push("N"), (String::new(), false));
        assert_eq!(text.push("Dx"), (String::new(), true));
        assert_eq!(text.answer, "a\nb ");
    }

    #[test]
    fn text_that_only_looked_like_a_stop_is_shown_at_the_end() {
        let stops = ["END".to_owned()];
        let mut text = StopText::new(&stops);
        assert_eq!(text.push("é EN"), ("é ".into(), false));
        assert_eq!(text.finish("!"), "EN!");
        assert_eq!(text.answer, "é EN!");
    }
}

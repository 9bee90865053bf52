//! Tells a template's own text from the messages' words, and new text from what stands.
//! Knows templates only by what they render: nothing here reads their source.
//!
//! Each message's words are replaced by a sentinel, a string that occurs nowhere else; what the
//! template renders around the sentinels is its own. Where words end is never searched for in
//! text that holds words, so no message can imitate the scaffold.

use super::{ChatTemplate, Message, Position, Segment, wrong};
use crate::{Error, Result};

/// One piece of a rendering in which sentinels stand for words.
enum Part<'a> {
    Scaffold(&'a str),
    Content(usize),
}

struct Sentinels {
    stem: String,
}

impl Sentinels {
    /// A stem that occurs in no message and not in the template.
    fn new(template: &ChatTemplate, messages: &[Message]) -> Self {
        let mut number = 0usize;
        loop {
            // Letters and digits only: nothing a template would trim, split at or escape.
            let stem = format!("mka{number}message");
            let taken = template.names(&stem)
                || messages.iter().any(|m| m.content.contains(&stem) || m.role.contains(&stem));
            if !taken {
                return Self { stem };
            }
            number += 1;
        }
    }

    fn of(&self, message_idx: usize) -> String {
        format!("{}{message_idx}end", self.stem)
    }

    /// The messages with sentinels for words. Empty words stay: templates may test for them.
    fn replace(&self, messages: &[Message]) -> Vec<Message> {
        let mut replaced = messages.to_vec();
        for (idx, message) in replaced.iter_mut().enumerate() {
            if !message.content.is_empty() {
                message.content = self.of(idx);
            }
        }
        replaced
    }

    fn split<'a>(&self, rendered: &'a str) -> Result<Vec<Part<'a>>> {
        let mut parts = Vec::new();
        let mut rest = rendered;
        while let Some(at) = rest.find(&self.stem) {
            let after = &rest[at + self.stem.len()..];
            let digits = after.bytes().take_while(u8::is_ascii_digit).count();
            let idx = after[..digits].parse().ok().filter(|_| after[digits..].starts_with("end"));
            let idx = idx.ok_or_else(|| wrong("it cuts the content of messages into pieces"))?;
            parts.push(Part::Scaffold(&rest[..at]));
            parts.push(Part::Content(idx));
            rest = &after[digits + "end".len()..];
        }
        parts.push(Part::Scaffold(rest));
        Ok(parts)
    }
}

pub(super) fn compute(
    template: &ChatTemplate,
    messages: &[Message],
    position: Position,
    add_generation_prompt: bool,
) -> Result<Vec<Segment>> {
    let (Position::After(standing) | Position::AfterReply(standing)) = position else {
        let sentinels = Sentinels::new(template, messages);
        let masked = template.render(&sentinels.replace(messages), add_generation_prompt)?;
        let rendered = template.render(messages, add_generation_prompt)?;
        let render_one = |one: &[Message]| template.render(one, add_generation_prompt);
        return fill(&sentinels, messages, &masked, &rendered, render_one);
    };
    let is_reply = matches!(position, Position::AfterReply(_));
    if standing + usize::from(is_reply) > messages.len() {
        return Err(Error::invalid(format!(
            "chat template: position {position:?}, expected at most {} messages",
            messages.len()
        )));
    }
    let sentinels = Sentinels::new(template, messages);
    let mask = |idx: usize| sentinels.of(idx);
    // The tail that a rendering of `all` adds to what stands of it.
    let tail = |all: &[Message]| -> Result<String> {
        let mut all = all.to_vec();
        if is_reply {
            // The stream holds the reply as generated, trimmed or not: only its end counts.
            all[standing].content = mask(standing);
        }
        let before = if standing == 0 && !is_reply {
            String::new()
        } else {
            template.render(&all[..standing], is_reply)?
        };
        let whole = template.render(&all, add_generation_prompt)?;
        let unstable = || {
            wrong(format!(
                "not prefix-stable: with {} messages, the first {standing} render differently",
                all.len()
            ))
        };
        let mut rest = whole.strip_prefix(before.as_str()).ok_or_else(unstable)?;
        if is_reply {
            // Some templates put a blank before a reply that the model generates itself.
            rest = rest.trim_start().strip_prefix(&mask(standing)).ok_or_else(unstable)?;
        }
        Ok(rest.to_owned())
    };
    let masked = tail(&sentinels.replace(messages))?;
    let rendered = tail(messages)?;
    fill(&sentinels, messages, &masked, &rendered, tail)
}

/// Puts the words back: `masked` and `rendered` are one text with sentinels and with words.
/// `render_one` renders the same stretch of a conversation for a closer look.
fn fill(
    sentinels: &Sentinels,
    messages: &[Message],
    masked: &str,
    rendered: &str,
    render_one: impl Fn(&[Message]) -> Result<String>,
) -> Result<Vec<Segment>> {
    let parts = sentinels.split(masked)?;
    if let Some(segments) = match_words(&parts, messages, rendered) {
        return Ok(segments);
    }
    // The template changes words by more than blanks at their ends. One at a time, among
    // sentinels, each shows what becomes of it between scaffolds whose length is known.
    let all_masked = sentinels.replace(messages);
    let mut changed: Vec<String> = messages.iter().map(|m| m.content.clone()).collect();
    for part in &parts {
        let Part::Content(idx) = *part else { continue };
        let mut one = all_masked.clone();
        one[idx].content.clone_from(&messages[idx].content);
        let seen = render_one(&one)?;
        let word = sentinels.of(idx);
        let between = masked.split_once(&word).and_then(|(before, after)| {
            seen.strip_prefix(before).and_then(|rest| rest.strip_suffix(after))
        });
        let between = between
            .ok_or_else(|| wrong(format!("content of message {idx} changes the text around it")))?;
        changed[idx] = between.to_owned();
    }
    let mut segments = Vec::new();
    for part in parts {
        match part {
            Part::Scaffold(text) => push(&mut segments, Segment::Scaffold(text.to_owned())),
            Part::Content(idx) => push(&mut segments, Segment::Content(changed[idx].clone())),
        }
    }
    let joined: String = segments.iter().map(Segment::text).collect();
    if joined != rendered {
        return Err(wrong("it rewrites the content of messages depending on each other"));
    }
    Ok(segments)
}

/// Walks `rendered` along `parts`, each message's words as they are or trimmed at either end.
fn match_words(parts: &[Part<'_>], messages: &[Message], rendered: &str) -> Option<Vec<Segment>> {
    let mut segments = Vec::new();
    let mut rest = rendered;
    for (part_idx, part) in parts.iter().enumerate() {
        match *part {
            Part::Scaffold(text) => {
                rest = rest.strip_prefix(text)?;
                push(&mut segments, Segment::Scaffold(text.to_owned()));
            }
            Part::Content(idx) => {
                let content = messages.get(idx)?.content.as_str();
                let next = match parts.get(part_idx + 1) {
                    Some(Part::Scaffold(text)) => *text,
                    _ => "",
                };
                let is_last = part_idx + 2 >= parts.len();
                let forms = [content, content.trim(), content.trim_start(), content.trim_end()];
                let (word, after) = forms.into_iter().find_map(|form| {
                    let after = rest.strip_prefix(form)?;
                    let fits = if is_last { after == next } else { after.starts_with(next) };
                    fits.then_some((form, after))
                })?;
                push(&mut segments, Segment::Content(word.to_owned()));
                rest = after;
            }
        }
    }
    rest.is_empty().then_some(segments)
}

fn push(segments: &mut Vec<Segment>, segment: Segment) {
    if !segment.text().is_empty() {
        segments.push(segment);
    }
}

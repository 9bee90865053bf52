//! What stands between the words of user and model: the scaffold of a chat template.
//! Knows no tokenizer and no cache.

mod tools;

pub(crate) use tools::{ResultScaffold, no_place, no_system};

use crate::error::{Error, Result};
use crate::template::{ChatTemplate, Message, Tool};

/// The fixed text around the contents of a conversation, so that a turn is appended and never rendered again.
///
/// A conversation is `opening u B a C u B a C ..`: u and a are contents, B and C scaffold. Between B and an answer that was
/// not generated may stand a blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scaffold {
    /// Before the first user message, where no system message is given.
    pub(crate) opening: String,
    /// Before and after a given system message, up to the first user message.
    pub(crate) system: Option<(String, String)>,
    /// Between a user message and the answer.
    pub(crate) to_answer: String,
    /// White space that the template writes before an answer and the prompt for one lacks: the model generates it, so it is
    /// written before answers that it did not generate alone.
    pub(crate) answer_lead: String,
    /// Between an answer and the next user message.
    pub(crate) to_user: String,
    /// Whose contents are shown without the white space around them.
    pub(crate) trims: Trims,
    /// Around the results of tools.
    pub(crate) result: ResultScaffold,
}

/// Whose contents a template cuts white space off, at both ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Trims {
    pub(crate) system: bool,
    pub(crate) user: bool,
    pub(crate) answer: bool,
}

impl Scaffold {
    /// Reads the scaffold off a template by rendering marked contents.
    ///
    /// # Errors
    /// If the template drops, reorders or repeats a message: such a template cannot be continued.
    pub(crate) fn new(template: &ChatTemplate) -> Result<Self> {
        let roles = ["user", "assistant", "user"];
        let turns = parts(template, &roles)?;
        let [opening, to_answer, to_user, again] = turns.as_slice() else {
            return Err(Error::model("chat template: expected four parts around three messages"));
        };
        if to_answer != again && !again.starts_with(to_answer.as_str()) {
            // Some templates write a generation prompt that differs from a past answer's header; the prompt is what
            // the model was trained to continue, so it stands before every answer.
            tracing::debug!(past = ?to_answer, prompt = ?again, "answer header differs");
        }
        let lead = to_answer.strip_prefix(again.as_str());
        let lead = lead.filter(|lead| lead.trim().is_empty()).unwrap_or_default();
        let mut trims = match trimmed(template, &roles)[..] {
            [first, answer, last] => Trims { system: false, user: first && last, answer },
            _ => Trims::default(),
        };
        // Some templates show instructions only while the last message is the user's (Mistral's of 2024).
        let system_roles: [&[&str]; 2] = [&["system", "user", "assistant"], &["system", "user"]];
        let system = system_roles.into_iter().find_map(|roles| {
            let parts = parts(template, roles).ok()?;
            trims.system = trimmed(template, roles).first() == Some(&true);
            Some((parts.first()?.clone(), parts.get(1)?.clone()))
        });
        let result = ResultScaffold::of(template.for_tools())
            .unwrap_or_else(|| ResultScaffold::users(to_user, again, trims.user));
        Ok(Self {
            opening: opening.clone(),
            system,
            to_answer: again.clone(),
            answer_lead: lead.to_owned(),
            to_user: to_user.clone(),
            trims,
            result,
        })
    }

    /// For a model without a chat template: paragraphs and plain labels.
    pub(crate) fn plain() -> Self {
        Self {
            opening: String::new(),
            system: Some((String::new(), "\n\n".into())),
            to_answer: "\n".into(),
            answer_lead: String::new(),
            to_user: "\n\n".into(),
            trims: Trims::default(),
            result: ResultScaffold::users("\n\n", "\n", false),
        }
    }
}

/// `content` as a template shows it that cuts white space off both its ends, if it `trims`. A content of nothing else stays
/// as it is.
pub(crate) fn shown(content: &str, trims: bool) -> &str {
    match content.trim() {
        inner if trims && !inner.is_empty() => inner,
        _ => content,
    }
}

/// `text` of a template without a blank at its end, which is a part of the first word of the content behind it.
pub(crate) fn without_last_blank(text: &str) -> &str {
    text.strip_suffix(' ').unwrap_or(text)
}

/// [`shown`] of a content whose beginning stands elsewhere already.
pub(crate) fn shown_end(content: &str, trims: bool) -> &str {
    match content.trim_end() {
        inner if trims && !inner.is_empty() => inner,
        _ => content,
    }
}

/// Where contents stand in a template. None holds these, and they carry no blank that a template could trim.
pub(crate) const MARKS: [&str; 4] = ["@mka:0@", "@mka:1@", "@mka:2@", "@mka:3@"];

/// Messages by up to four `roles`, each with a mark for its content.
fn marked(roles: &[&str]) -> Vec<Message> {
    roles.iter().zip(MARKS).map(|(role, mark)| Message::new(*role, mark)).collect()
}

/// What `template` writes around the contents of messages by `roles`: one part more than there are messages.
fn parts(template: &ChatTemplate, roles: &[&str]) -> Result<Vec<String>> {
    parts_of(template, &marked(roles), &[])
}

/// What `template` writes around the contents of `messages`, which are marks, with `tools`.
fn parts_of(template: &ChatTemplate, messages: &[Message], tools: &[Tool]) -> Result<Vec<String>> {
    let text = template.render(messages, tools, true)?;
    let mut rest = text.as_str();
    let mut parts = Vec::new();
    for mark in MARKS.into_iter().take(messages.len()) {
        let (before, after) = rest.split_once(mark).ok_or_else(|| {
            Error::model(
                "chat template: a message is dropped or moved, expected each once in order",
            )
        })?;
        parts.push(before.to_owned());
        rest = after;
    }
    parts.push(rest.to_owned());
    Ok(parts)
}

/// Of which of the messages by `roles` the template cuts white space off both ends; empty where it cannot render them.
fn trimmed(template: &ChatTemplate, roles: &[&str]) -> Vec<bool> {
    // A tab outside: scaffold ends and begins with blanks and line breaks.
    let marked = roles.iter().zip(MARKS);
    let messages: Vec<Message> =
        marked.map(|(role, mark)| Message::new(*role, format!("\t {mark} \t"))).collect();
    let Ok(text) = template.render(&messages, &[], true) else { return Vec::new() };
    let shows = |content: &str| text.contains(content);
    let is_trimmed =
        |mark: &str| shows(mark) && !shows(&format!("\t {mark}")) && !shows(&format!("{mark} \t"));
    MARKS.into_iter().take(messages.len()).map(is_trimmed).collect()
}

//! What stands between the words of user and model: the scaffold of a chat template.
//! Knows no tokenizer and no cache.

use crate::error::{Error, Result};
use crate::template::{ChatTemplate, Message};

/// The fixed text around the contents of a conversation, so that a turn is appended and never rendered again.
///
/// A conversation is `opening u B a C u B a C ..`: u and a are contents, B and C scaffold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scaffold {
    /// Before the first user message, where no system message is given.
    pub(crate) opening: String,
    /// Before and after a given system message, up to the first user message.
    pub(crate) system: Option<(String, String)>,
    /// Between a user message and the answer.
    pub(crate) to_answer: String,
    /// Between an answer and the next user message.
    pub(crate) to_user: String,
}

impl Scaffold {
    /// Reads the scaffold off a template by rendering marked contents.
    ///
    /// # Errors
    /// If the template drops, reorders or repeats a message: such a template cannot be continued.
    pub(crate) fn new(template: &ChatTemplate) -> Result<Self> {
        // No template holds these, and they carry no blank that a template could trim.
        const MARKS: [&str; 3] = ["@mka:0@", "@mka:1@", "@mka:2@"];
        let split = |roles: [&str; 3]| -> Result<Vec<String>> {
            let messages: Vec<Message> = roles
                .iter()
                .zip(MARKS)
                .map(|(role, content)| Message::new(*role, content))
                .collect();
            let text = template.render(&messages, true)?;
            let mut rest = text.as_str();
            let mut parts = Vec::new();
            for mark in MARKS {
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
        };
        let turns = split(["user", "assistant", "user"])?;
        let [opening, to_answer, to_user, again] = turns.as_slice() else {
            return Err(Error::model("chat template: expected four parts around three messages"));
        };
        if to_answer != again && !again.starts_with(to_answer.as_str()) {
            // Some templates write a generation prompt that differs from a past answer's header; the prompt is what
            // the model was trained to continue, so it stands before every answer.
            tracing::debug!(past = ?to_answer, prompt = ?again, "answer header differs");
        }
        let system = split(["system", "user", "assistant"])
            .ok()
            .and_then(|parts| Some((parts.first()?.clone(), parts.get(1)?.clone())));
        Ok(Self {
            opening: opening.clone(),
            system,
            to_answer: again.clone(),
            to_user: to_user.clone(),
        })
    }

    /// For a model without a chat template: paragraphs and plain labels.
    pub(crate) fn plain() -> Self {
        Self {
            opening: String::new(),
            system: Some((String::new(), "\n\n".into())),
            to_answer: "\n".into(),
            to_user: "\n\n".into(),
        }
    }
}

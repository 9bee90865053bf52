//! Taking in what was said elsewhere, turn by turn, as if it had been said here; nothing is generated.
//! Knows neither sampling nor recalled text.

use crate::conversation::{self, Conversation, note_opening};
use crate::error::{Error, Result};
use crate::feeding::COMMIT_TOKENS;
use crate::generation::{self, Before};
use crate::memory::said_now;
use crate::prompt;
use crate::snapshot::OpenTurn;
use crate::stream::{FeedEvent, FeedSummary, Sink};
use crate::tokenizer::Joined;
use mka_memory::{NewTurn, Role};

/// Reads `turns` behind what the stream holds, and commits them.
///
/// # Errors
/// `InvalidArgument` if a turn has no text or a role that stands in no conversation; `Cancelled` if the caller wants no more:
/// what was committed stays.
pub(crate) fn append(
    conversation: &mut Conversation,
    mut turns: Vec<NewTurn>,
    sink: &Sink<FeedEvent>,
) -> Result<FeedSummary> {
    let shared = conversation.shared.clone();
    let model = shared.model("append")?;
    check(&turns, conversation.state.open)?;
    said_now(&mut turns, shared.now_ms()?);
    conversation.set_policy("append", shared.config.recall)?;
    conversation.last_prompt = None;
    let total_bytes = turns.iter().map(|turn| turn.text.len() as u64).sum();
    let mut summary = FeedSummary {
        bytes: total_bytes,
        model_tokens: 0,
        chunks_added: 0,
        chunks_deduplicated: 0,
    };
    let (mut taken_bytes, mut committed_bytes, mut uncommitted) = (0, 0, 0);
    let (mut waiting, mut starts) = (Vec::new(), Vec::new());
    let mut system = None;
    let mut before = match conversation.state.open {
        OpenTurn::Answered { .. } => conversation.last_role()?,
        OpenTurn::Start | OpenTurn::User | OpenTurn::Results => None,
    };
    let last = turns.len().saturating_sub(1);
    for (i, mut turn) in turns.into_iter().enumerate() {
        taken_bytes += turn.text.len() as u64;
        let is_answer = turn.role == Role::Assistant;
        let mut read = Vec::new();
        if turn.role == Role::System {
            system = Some(turn.text);
        } else {
            let is_awaited = is_answer && before.is_some_and(conversation::is_asked);
            before = Some(turn.role);
            let mut opening_tokens = None;
            let mut text = Joined::behind(&model.tokenizer, conversation.last_token());
            // An answer behind results that broke off answers those.
            let ends_results = is_answer && conversation.state.open == OpenTurn::Results;
            if !is_awaited && !ends_results {
                // An answer behind an open document answers that.
                let (open, system) = (conversation.state.open, system.take());
                let stands =
                    Before { system: system.as_deref(), joined: is_answer, ..Before::default() };
                generation::opening(&mut text, model, open, stands)?;
                opening_tokens = stands.instructs(open).then_some(text.num_tokens());
                conversation.keep_opening(text.num_tokens())?;
            }
            if is_answer && !is_awaited {
                let mut message = NewTurn::new(Role::User, "");
                (message.time_ms, message.remember) = (turn.time_ms, false);
                let scaffold = &model.scaffold;
                text.scaffold(match ends_results {
                    true => &scaffold.result.to_answer,
                    false => &scaffold.to_answer,
                })?;
                message.tokens = text.take()?;
                read.push(message);
            }
            if is_answer {
                text.scaffold(&model.scaffold.answer_lead)?;
            }
            let trims = model.scaffold.trims;
            let trims = if is_answer { trims.answer } else { trims.user };
            text.content(prompt::shown(&turn.text, trims))?;
            if !is_answer {
                text.scaffold(&model.scaffold.to_answer)?;
            }
            turn.tokens = text.take()?;
            read.push(turn);
            if let (Some(tokens), Some(first)) = (opening_tokens, read.first_mut()) {
                note_opening(first, tokens);
            }
        }
        for turn in read {
            starts.push(Some(conversation.position()));
            conversation.prefill(&turn.tokens, &mut || !sink.is_cancelled())?;
            conversation.state.open = OpenTurn::Answered { closed_by: None };
            uncommitted += turn.tokens.len();
            summary.model_tokens += turn.tokens.len() as u64;
            waiting.push(turn);
        }
        if i == last || uncommitted >= COMMIT_TOKENS || conversation.pages_wait() {
            let starts = std::mem::take(&mut starts);
            let done = conversation.commit(std::mem::take(&mut waiting), &starts, None)?;
            summary.chunks_added += done.chunks_added;
            summary.chunks_deduplicated += done.chunks_deduplicated;
            (committed_bytes, uncommitted) = (taken_bytes, 0);
        }
        let goes_on =
            sink.send(FeedEvent::Progress { fed_bytes: taken_bytes, committed_bytes, total_bytes });
        if conversation.is_cancelled_anywhere(!goes_on)? {
            return Err(Error::cancelled("append"));
        }
    }
    Ok(summary)
}

fn check(turns: &[NewTurn], open: OpenTurn) -> Result<()> {
    if turns.iter().all(|turn| turn.role == Role::System) {
        return Err(Error::invalid("append: no message, expected one at least"));
    }
    for (i, turn) in turns.iter().enumerate() {
        let wanted = match turn.role {
            Role::User | Role::Assistant => None,
            Role::System if i == 0 && open == OpenTurn::Start => None,
            Role::System => Some("instructions before everything else in a new session alone"),
            _ => Some("one of user, assistant or system"),
        };
        if let Some(wanted) = wanted {
            return Err(Error::invalid(format!(
                "append: turn {i} has role {:?}, expected {wanted}",
                turn.role
            )));
        }
        if turn.text.is_empty() {
            return Err(Error::invalid(format!("append: turn {i} is empty, expected text")));
        }
    }
    Ok(())
}

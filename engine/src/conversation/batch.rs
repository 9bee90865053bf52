//! Results of tools that were given together: one message of several turns, to which a session goes back as one, and of which
//! some may be forgotten.
//! Knows no cache and no answer.

use super::Conversation;
use crate::engine::Model;
use crate::error::Result;
use crate::prompt::without_last_blank;
use crate::tokenizer::Joined;
use mka_memory::{NewTurn, Role, Turn, TurnId, Value};

/// Metadata of a turn of such results that is not the first of them.
const CONTINUES: &str = "mka.result_continues";
/// The same of one that is not the last.
const GOES_ON: &str = "mka.result_goes_on";

/// Notes that `turn` is the one with index `at` of `of` turns of results that are given together.
pub(crate) fn note_batch(turn: &mut NewTurn, at: usize, of: usize) {
    for (key, is_so) in [(CONTINUES, at > 0), (GOES_ON, at + 1 < of)] {
        if is_so {
            turn.metadata.insert(key.to_owned(), Value::from(true));
        }
    }
}

fn is_marked(turn: &Turn, key: &str) -> bool {
    turn.role == Role::Tool && turn.metadata.get(key) == Some(&Value::from(true))
}

/// Writes what the template has around results where the first or the last of some that were given together is not among
/// `turns`, which follow each other but for a gap before the index `gap`.
///
/// # Errors
/// As [`crate::tokenizer::Tokenizer::encode`].
pub(super) fn mend(model: &Model, turns: &mut [Turn], gap: Option<usize>) -> Result<()> {
    let tokenizer = &model.tokenizer;
    let scaffold = &model.scaffold.result;
    let between = tokenizer.encode_inside(without_last_blank(&scaffold.between), true)?;
    for i in 0..turns.len() {
        let before = i.checked_sub(1).filter(|_| gap != Some(i)).map(|before| &turns[before]);
        if let Some(before) = before.filter(|before| !is_marked(before, GOES_ON))
            && is_marked(&turns[i], CONTINUES)
        {
            let last = before.tokens.last().copied();
            let to_result =
                tokenizer.encode_behind(last, without_last_blank(&scaffold.to_result), true)?;
            // The section of a result has nothing before it.
            let has_between = turns[i].tokens.starts_with(&between);
            let written = if has_between { between.len() } else { 0 };
            turns[i].tokens.splice(..written, to_result);
        }
        let is_followed = match turns.get(i + 1) {
            Some(next) => gap == Some(i + 1) || is_marked(next, CONTINUES),
            None => false,
        };
        if is_marked(&turns[i], GOES_ON) && !is_followed {
            let last = turns[i].tokens.last().copied();
            let close = |text: &str| {
                let mut written = Joined::behind(tokenizer, last);
                written.scaffold(text)?;
                written.take()
            };
            // What was read behind results that broke off has closed them.
            let written = close(without_last_blank(&scaffold.to_answer))?;
            if turns.get(i + 1).is_none_or(|next| !next.tokens.starts_with(&written)) {
                turns[i].tokens.extend(close(&scaffold.to_answer)?);
            }
        }
    }
    Ok(())
}

impl Conversation {
    /// The first turn of the results that turn `turn` was given together with, or their quotation stands before; `turn` where
    /// it is none of them. What a forgotten one was marked with is gone: it belongs to the one before it.
    pub(super) fn first_of_batch(&self, turn: TurnId) -> TurnId {
        // What cannot be read belongs to nothing.
        let read = |id: TurnId| self.live_turn(id).ok().flatten();
        let is_quotation = |id: TurnId| read(id).is_some_and(|turn| turn.role == Role::Recalled);
        let continues = |id: TurnId| {
            read(id).is_some_and(|turn| {
                is_marked(&turn, CONTINUES) || turn.role == Role::Tool && turn.forgotten
            })
        };
        // What was remembered while long results were read lies between them.
        let is_beside = |id: TurnId| {
            read(id).is_some_and(|turn| {
                let may_be_forgotten = matches!(turn.role, Role::User | Role::Document);
                let is_told = turn.role != Role::Recalled && !turn.forgotten;
                turn.tokens.is_empty() && (may_be_forgotten || is_told)
            })
        };
        let mut first = turn + TurnId::from(is_quotation(turn));
        while continues(first) {
            let quotes = first > 0 && is_quotation(first - 1);
            let mut before = first.checked_sub(1 + TurnId::from(quotes));
            while let Some(id) = before.filter(|id| is_beside(*id)) {
                before = id.checked_sub(1);
            }
            let is_result = |id: &TurnId| read(*id).is_some_and(|turn| turn.role == Role::Tool);
            match before.filter(is_result) {
                Some(before) => first = before,
                None => break,
            }
        }
        first.min(turn)
    }
}

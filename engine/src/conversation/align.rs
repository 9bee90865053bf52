//! How processes that share a model stay at one place: in a session's log, in its stream, and when a caller wants no more.
//! Knows the log and the group; what is taken back or run is its caller's matter.

use super::Conversation;
use crate::error::{Error, ErrorKind, Result};
use mka_memory::TurnId;
use xxhash_rust::xxh3::Xxh3;

/// Turns that processes which share a model take back at most to hold the same: more than two commits of a feed.
const MOST_TAKEN_BACK: u64 = 1024;
/// Turns of the log that are read at once.
const TURNS_AT_ONCE: usize = 256;

impl Conversation {
    /// Where processes share the model and do not hold the same of this session, the turn before which all of them do:
    /// one may have ended before the last commit, or have lost its snapshot, which `position` (of the snapshot, or
    /// u64::MAX for none) tells.
    ///
    /// # Errors
    /// `Incompatible` if they differ by more than a commit that not all of them made, or one cannot read its log.
    pub(super) fn common_end(&self, position: u64) -> Result<Option<TurnId>> {
        let group = &self.shared.model("session")?.decoder.group;
        let read = self.beginnings();
        if !group.all(read.is_ok(), || 0)? {
            // Every process hears of it, and the group goes on with its other sessions.
            let what = |who| format!("session {}: {who} cannot read its log", self.scope);
            return Err(match read.err() {
                Some(error) => {
                    let what = format!("{}: {error}", what("this process"));
                    Error::new(ErrorKind::Incompatible, what).with_source(error)
                }
                None => Error::new(ErrorKind::Incompatible, what("another process")),
            });
        }
        let beginnings = read?;
        let (least, most) = group.range(beginnings.len() as u64)?;
        // The longest beginning that all of them hold, by halves.
        let (mut common, mut differs) = (0, least + 1);
        while common + 1 < differs {
            let middle = (common + differs) / 2;
            match group.same(beginnings[middle as usize - 1].1)? {
                true => common = middle,
                false => differs = middle,
            }
        }
        // A missed commit leaves out an end of the log, or the last answer's successor.
        let is_missed = least - common <= 1 && most - common <= MOST_TAKEN_BACK;
        if !is_missed || common == 0 && most > 0 {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "session {}: the processes hold the same {common} turns of {least} to {most}, expected the same log in the folder of each",
                    self.scope
                ),
            ));
        }
        // A snapshot at another place is another stream, even where the log is the same.
        let has_snapshot = position != u64::MAX || common == 0;
        let same = group.same(position)? && has_snapshot && beginnings.len() as u64 == common;
        if group.all(same, || common)? {
            return Ok(None);
        }
        let after = beginnings.get(common as usize).map(|(turn, _)| *turn);
        Ok(Some(after.map_or_else(|| self.shared.store.num_turns(&self.scope), Ok)?))
    }

    /// The turns that were not taken back, each with a hash of all up to it.
    fn beginnings(&self) -> Result<Vec<(TurnId, u64)>> {
        let num_turns = self.shared.store.num_turns(&self.scope)?;
        let (mut hash, mut beginnings) = (Xxh3::new(), Vec::new());
        for from in (0..num_turns).step_by(TURNS_AT_ONCE) {
            let to = num_turns.min(from + TURNS_AT_ONCE as u64);
            let turns = self.shared.store.turns(&self.scope, from..to)?;
            for turn in turns.iter().filter(|turn| !turn.retracted) {
                hash.update(turn.text.as_bytes());
                turn.tokens.iter().for_each(|token| hash.update(&token.to_le_bytes()));
                hash.update(&(turn.text.len() as u64).to_le_bytes());
                beginnings.push((turn.id, hash.digest()));
            }
        }
        Ok(beginnings)
    }

    /// Refuses a `turn` that is another place in the log of another process: after an alignment they may count apart.
    pub(super) fn check_turn(&self, turn: TurnId, num_turns: TurnId) -> Result<()> {
        let Some(group) = self.shared.group() else { return Ok(()) };
        let before = match turn > num_turns {
            true => u64::MAX,
            false => self.beginnings()?.iter().filter(|(id, _)| *id < turn).count() as u64,
        };
        match group.same(before)? {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "rewind: turn {turn} is not the same turn in each process, expected one that is"
                ),
            )),
        }
    }

    /// Whether the caller has cancelled, `here` or in another process that shares the model.
    pub(crate) fn is_cancelled_anywhere(&self, here: bool) -> Result<bool> {
        match self.shared.group() {
            Some(group) => Ok(!group.all(!here, || self.position())?),
            None => Ok(here),
        }
    }
}

/// A hash of `tokens` and where they stand in the stream.
pub(super) fn place(position: u64, tokens: &[u32]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&position.to_le_bytes());
    tokens.iter().for_each(|token| hash.update(&token.to_le_bytes()));
    hash.digest()
}

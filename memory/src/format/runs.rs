//! Runs: the records of turns that came together, side by side in one value of the database.
//! Knows nothing of what a record says: each has its own version and checksum, under the key of its turn.

use std::ops::Range;

use super::fields::Reader;
use super::records::Key;
use crate::{Error, Result};

/// First byte of a run's key.
const PREFIX: u8 = b'r';
/// The most turns of a run: a turn's record takes 82 bytes, and what it takes in an encrypted store is sealed once.
/// A value of 2.7 KB lies inline in a page of sled, and changing one turn writes no more than that.
pub(crate) const MAX_RUN_TURNS: usize = 32;

/// Which turns a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RunKey {
    pub(crate) session: u64,
    pub(crate) first_turn: u64,
    /// At least 1; it is in the key, so that it is known how many turns are lost with a damaged value.
    pub(crate) num_turns: u16,
}

impl RunKey {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(19);
        out.push(PREFIX);
        out.extend_from_slice(&self.session.to_be_bytes());
        out.extend_from_slice(&self.first_turn.to_be_bytes());
        out.extend_from_slice(&self.num_turns.to_be_bytes());
        out
    }

    /// The run under a key of the database; none if it is the key of something else.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes, "key of a run");
        if reader.u8().ok()? != PREFIX {
            return None;
        }
        let session = u64::from_be_bytes(reader.array().ok()?);
        let first_turn = u64::from_be_bytes(reader.array().ok()?);
        let num_turns = u16::from_be_bytes(reader.array().ok()?);
        reader.finish().ok()?;
        let fits = (1..=MAX_RUN_TURNS).contains(&usize::from(num_turns))
            && first_turn.checked_add(u64::from(num_turns)).is_some();
        fits.then_some(Self { session, first_turn, num_turns })
    }

    pub(crate) fn turns(&self) -> Range<u64> {
        self.first_turn..self.first_turn + u64::from(self.num_turns)
    }

    /// The key that each of its turns has by itself.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key> + use<> {
        let session = self.session;
        self.turns().map(move |turn| Key::Turn(session, turn))
    }
}

/// The records of a run's turns, in order; nothing where a turn was removed.
pub(crate) fn encode_run(records: &[Option<Vec<u8>>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(records.iter().flatten().map(|it| it.len() + 2).sum());
    for record in records {
        let record = record.as_deref().unwrap_or_default();
        out.extend_from_slice(&(record.len() as u16).to_le_bytes());
        out.extend_from_slice(record);
    }
    out
}

/// The records of the run under `key`.
pub(crate) fn decode_run(key: &RunKey, bytes: &[u8]) -> Result<Vec<Option<Vec<u8>>>> {
    let mut rest = bytes;
    let mut records = Vec::with_capacity(usize::from(key.num_turns));
    for _ in 0..key.num_turns {
        let taken = rest.split_at_checked(2).and_then(|(len, rest)| {
            rest.split_at_checked(usize::from(u16::from_le_bytes([len[0], len[1]])))
        });
        let Some((record, left)) = taken else {
            return Err(Error::corrupted("run of turns: it ends before its last record"));
        };
        records.push((!record.is_empty()).then(|| record.to_vec()));
        rest = left;
    }
    if !rest.is_empty() {
        return Err(Error::corrupted("run of turns: it goes on behind its last record"));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_of_runs_read_back_and_nothing_else_is_one() {
        let key = RunKey { session: 3, first_turn: 70, num_turns: 3 };
        assert_eq!(RunKey::decode(&key.encode()), Some(key));
        assert!(key.keys().eq([70, 71, 72].map(|turn| Key::Turn(3, turn))));
        for wrong in [
            RunKey { num_turns: 0, ..key },
            RunKey { num_turns: MAX_RUN_TURNS as u16 + 1, ..key },
            RunKey { first_turn: u64::MAX, ..key },
        ] {
            assert_eq!(RunKey::decode(&wrong.encode()), None);
        }
        assert_eq!(RunKey::decode(&Key::Turn(3, 70).encode()), None);
        let records = vec![Some(vec![1; 90]), None, Some(vec![2])];
        let value = encode_run(&records);
        assert_eq!(decode_run(&key, &value).unwrap(), records);
        for len in 0..value.len() {
            assert!(decode_run(&key, &value[..len]).is_err());
        }
        assert!(decode_run(&key, &[&value[..], &[0]].concat()).is_err());
    }
}

//! Which turns lie together in one value of the database: those of one commit, up to 32 of them.
//! Knows nothing of what a record says. A turn's record is in a run or under its own key, never both.
//!
//! A database takes a value in for about the same price whatever its length, and sled rewrites a page of them for each:
//! with a value a turn most of the time of a large commit went there.

use std::collections::{BTreeMap, HashMap};

use crate::Result;
use crate::format::{Key, MAX_RUN_TURNS, RunKey, decode_run, encode_run};

/// Stands for a record that was lost with its run: it is too short to be one, and is reported as damaged.
const LOST: [u8; 1] = [0xff];

/// A key with its value as it is before it is sealed; none to remove it.
pub(super) type Plain = (Vec<u8>, Option<Vec<u8>>);

/// The runs that a database holds.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Number of turns of each run, by session and first turn.
    lengths: BTreeMap<(u64, u64), u16>,
    /// A turn from this one on has no record yet, by session.
    next_turns: HashMap<u64, u64>,
}

/// What a batch does to the database, and to the list of runs once the database has it.
pub(super) struct Packed {
    pub(super) batch: Vec<Plain>,
    added: Vec<RunKey>,
    removed: Vec<RunKey>,
    next_turns: HashMap<u64, u64>,
}

impl Runs {
    /// Takes note of a key that the database holds.
    pub(super) fn note(&mut self, key: &[u8]) {
        if let Some(run) = RunKey::decode(key) {
            self.lengths.insert((run.session, run.first_turn), run.num_turns);
            self.note_turns(run.session, run.turns().end);
        } else if let Ok(Key::Turn(session, turn)) = Key::decode(key) {
            self.note_turns(session, turn.saturating_add(1));
        }
    }

    fn note_turns(&mut self, session: u64, end: u64) {
        let next = self.next_turns.entry(session).or_default();
        *next = (*next).max(end);
    }

    /// The run that holds a turn.
    fn of(&self, session: u64, turn: u64) -> Option<RunKey> {
        let (&(_, first_turn), &num_turns) =
            self.lengths.range((session, 0)..=(session, turn)).next_back()?;
        let run = RunKey { session, first_turn, num_turns };
        run.turns().contains(&turn).then_some(run)
    }

    /// The batch that carries out `changes`: turns that are new become runs, and runs that change are written anew.
    /// `read` gives the value of a run.
    pub(super) fn pack(
        &self,
        changes: Vec<(Key, Option<Vec<u8>>)>,
        read: &dyn Fn(&RunKey) -> Result<Option<Vec<u8>>>,
    ) -> Result<Packed> {
        let mut packed = Packed {
            batch: Vec::with_capacity(changes.len()),
            added: Vec::new(),
            removed: Vec::new(),
            next_turns: HashMap::new(),
        };
        let mut changed: BTreeMap<RunKey, BTreeMap<u64, Option<Vec<u8>>>> = BTreeMap::new();
        let mut fresh: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
        for (key, value) in changes {
            let Key::Turn(session, turn) = key else {
                packed.batch.push((key.encode(), value));
                continue;
            };
            if let Some(run) = self.of(session, turn) {
                changed.entry(run).or_default().insert(turn, value);
            } else if turn < self.next_turns.get(&session).copied().unwrap_or(0) {
                packed.batch.push((key.encode(), value));
            } else if let Some(value) = value {
                let end = turn.saturating_add(1);
                let next = packed.next_turns.entry(session).or_default();
                *next = (*next).max(end);
                fresh.insert((session, turn), value);
            } else {
                fresh.remove(&(session, turn));
            }
        }
        packed.put_fresh(fresh);
        for (run, changes) in changed {
            packed.put_changed(run, changes, read)?;
        }
        Ok(packed)
    }

    /// The database has taken a batch in.
    pub(super) fn done(&mut self, packed: Packed) {
        for run in packed.removed {
            self.lengths.remove(&(run.session, run.first_turn));
        }
        for run in packed.added {
            self.lengths.insert((run.session, run.first_turn), run.num_turns);
        }
        for (session, end) in packed.next_turns {
            self.note_turns(session, end);
        }
    }
}

impl Packed {
    /// Puts new turns into runs of neighbours; one that has none lies under its own key.
    fn put_fresh(&mut self, fresh: BTreeMap<(u64, u64), Vec<u8>>) {
        let mut fresh = fresh.into_iter().peekable();
        while let Some(((session, first_turn), value)) = fresh.next() {
            let mut records = vec![Some(value)];
            while records.len() < MAX_RUN_TURNS {
                let turn = first_turn.saturating_add(records.len() as u64);
                let Some((_, value)) = fresh.next_if(|(key, _)| *key == (session, turn)) else {
                    break;
                };
                records.push(Some(value));
            }
            if records.len() == 1 {
                self.batch.push((Key::Turn(session, first_turn).encode(), records.pop().flatten()));
                continue;
            }
            let run = RunKey { session, first_turn, num_turns: records.len() as u16 };
            self.batch.push((run.encode(), Some(encode_run(&records))));
            self.added.push(run);
        }
    }

    fn put_changed(
        &mut self,
        run: RunKey,
        changes: BTreeMap<u64, Option<Vec<u8>>>,
        read: &dyn Fn(&RunKey) -> Result<Option<Vec<u8>>>,
    ) -> Result<()> {
        let known = match read(&run) {
            Ok(value) => value.map(|value| decode_run(&run, &value)).transpose(),
            Err(error) => Err(error),
        };
        let mut records = match known {
            Ok(Some(records)) => records,
            Ok(None) => vec![Some(LOST.to_vec()); run.num_turns.into()],
            Err(error) if error.kind() == crate::ErrorKind::Corrupted => {
                vec![Some(LOST.to_vec()); run.num_turns.into()]
            }
            Err(error) => return Err(error),
        };
        for (turn, value) in changes {
            records[(turn - run.first_turn) as usize] = value;
        }
        if records.iter().all(Option::is_none) {
            self.batch.push((run.encode(), None));
            self.removed.push(run);
        } else {
            self.batch.push((run.encode(), Some(encode_run(&records))));
        }
        Ok(())
    }
}

/// The records of a run under the keys of their turns, as if each lay there by itself.
pub(super) fn expand(run: &RunKey, value: Result<Vec<u8>>) -> Vec<(Vec<u8>, Result<Vec<u8>>)> {
    let keys = run.keys().map(|key| key.encode());
    match value.and_then(|value| decode_run(run, &value)) {
        Ok(records) => {
            keys.zip(records).filter_map(|(key, record)| Some((key, Ok(record?)))).collect()
        }
        Err(error) => {
            let lost = |key| {
                let text = format!("the run of turns that it lies in: {error}");
                (key, Err(crate::Error::new(error.kind(), text)))
            };
            keys.map(lost).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A database, and the runs that it is known to hold.
    #[derive(Default)]
    struct Twin {
        values: BTreeMap<Vec<u8>, Vec<u8>>,
        runs: Runs,
    }

    impl Twin {
        fn write(&mut self, changes: Vec<(Key, Option<Vec<u8>>)>) {
            let read = |run: &RunKey| Ok(self.values.get(&run.encode()).cloned());
            let packed = self.runs.pack(changes, &read).unwrap();
            for (key, value) in packed.batch.clone() {
                match value {
                    Some(value) => self.values.insert(key, value),
                    None => self.values.remove(&key),
                };
            }
            self.runs.done(packed);
        }

        /// Every record under its own key; a key that comes twice is an error.
        fn records(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
            let mut records = BTreeMap::new();
            for (key, value) in &self.values {
                let found = match RunKey::decode(key) {
                    Some(run) => expand(&run, Ok(value.clone())),
                    None => vec![(key.clone(), Ok(value.clone()))],
                };
                for (key, value) in found {
                    assert!(records.insert(key, value.unwrap()).is_none());
                }
            }
            records
        }
    }

    fn put(turns: std::ops::Range<u64>) -> Vec<(Key, Option<Vec<u8>>)> {
        turns.map(|turn| (Key::Turn(1, turn), Some(vec![turn as u8; 82]))).collect()
    }

    proptest! {
        /// Turns come, change and go in batches; now and then the database is opened anew.
        #[test]
        fn a_database_with_runs_holds_what_one_without_holds(
            batches in prop::collection::vec(
                (prop::collection::vec((1u64..3, 0u64..90, 0u8..8), 1..50), any::<bool>(), 0u64..40),
                1..12,
            ),
        ) {
            let (mut twin, mut model) = (Twin::default(), BTreeMap::new());
            let mut next = 0;
            for (changes, opens, num_new) in batches {
                let mut batch = Vec::new();
                for turn in next..next + num_new {
                    batch.push((Key::Turn(2, turn), Some(vec![9; 40])));
                }
                next += num_new;
                for (session, turn, value) in changes {
                    // What was removed is put again as well: that is how `doctor` fills an empty place.
                    batch.push((Key::Turn(session, turn), (value > 1).then(|| vec![value; 30])));
                    batch.push((Key::Page(session, turn), (value > 3).then(|| vec![value; 5])));
                }
                for (key, value) in batch.clone() {
                    match value {
                        Some(value) => model.insert(key.encode(), value),
                        None => model.remove(&key.encode()),
                    };
                }
                twin.write(batch);
                prop_assert_eq!(&twin.records(), &model);
                if opens {
                    twin.runs = Runs::default();
                    twin.values.keys().for_each(|key| twin.runs.note(key));
                }
            }
        }
    }

    #[test]
    fn a_large_commit_takes_few_values_and_none_is_long() {
        let mut twin = Twin::default();
        twin.write(put(0..1_000));
        twin.write(put(1_000..1_001));
        assert_eq!(twin.values.len(), 1_000usize.div_ceil(MAX_RUN_TURNS) + 1);
        assert!(twin.values.values().all(|value| value.len() <= 4096));
        twin.write((0..1_000).map(|turn| (Key::Turn(1, turn), None)).collect());
        assert_eq!(twin.values.len(), 1);
    }

    #[test]
    fn turns_that_are_lost_with_their_run_stay_damaged_until_they_are_written_anew() {
        let mut twin = Twin::default();
        twin.write(put(0..8));
        for value in twin.values.values_mut() {
            value.truncate(5);
        }
        let (key, value) = twin.values.first_key_value().unwrap();
        let lost = expand(&RunKey::decode(key).unwrap(), Ok(value.clone()));
        assert_eq!(lost.iter().filter(|(_, value)| value.is_err()).count(), 8);
        twin.write(put(2..3));
        let records = twin.records();
        assert_eq!(records.len(), 8);
        assert_eq!(records.values().filter(|value| **value == LOST).count(), 7);
        assert!(crate::format::Record::decode(&Key::Turn(1, 0), &LOST).is_err());
        twin.write(put(0..8));
        assert!(twin.records().values().all(|value| value.len() == 82));
    }
}

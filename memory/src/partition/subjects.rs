//! What was said about each subject, and when a newer turn took the place of an older one.
//! Knows no chunks: it says whose places are to be marked, and whoever holds them marks them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Where a version stands among those of its subject: time, order, session and turn.
pub(crate) type VersionKey = (i64, u64, (u64, u64));

/// A turn that says something about a subject.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version {
    pub(crate) time_ms: i64,
    pub(crate) order: u64,
    /// Session and turn.
    pub(crate) turn: (u64, u64),
    /// The turn's chunks.
    pub(crate) chunks: Vec<u128>,
}

impl Version {
    fn key(&self) -> VersionKey {
        (self.time_ms, self.order, self.turn)
    }

    /// When it was said, among all turns of the user.
    fn moment(&self) -> (i64, u64) {
        (self.time_ms, self.order)
    }

    /// Whether both are one statement, which a fork has as its original does.
    fn is_same(&self, other: &Self) -> bool {
        self.moment() == other.moment()
    }
}

/// The subjects of one (user, agent) pair.
///
/// What changes them takes `mark`, which is called with each version that another one follows than before, or none, and
/// with the time of that one: `i64::MAX` for none.
#[derive(Debug, Default)]
pub(super) struct Subjects {
    /// Versions of each, oldest first.
    by_name: HashMap<Box<str>, Vec<Version>>,
    /// Chunks of the versions that another one superseded, one chunk as often as it stands in them.
    num_superseded_chunks: usize,
}

impl Subjects {
    /// Subjects, and the versions that a newer one superseded.
    pub(super) fn counts(&self) -> (usize, usize) {
        let num = self.by_name.values().map(|versions| superseded(versions).len()).sum();
        (self.by_name.len(), num)
    }

    /// Chunks of superseded versions, at least as many as there are.
    pub(super) fn num_superseded_chunks(&self) -> usize {
        self.num_superseded_chunks
    }

    /// Takes a version in: it supersedes older ones, and newer ones supersede it.
    pub(super) fn add(
        &mut self,
        subject: &str,
        version: Version,
        mut mark: impl FnMut(&Version, i64),
    ) {
        let versions = self.by_name.entry(subject.into()).or_default();
        let num_before = version.chunks.len() + num_newest_chunks(versions);
        let at = versions.partition_point(|known| *known < version);
        versions.insert(at, version);
        let own = statement(versions, at);
        mark(&versions[at], time_of(versions.get(own.end)));
        // Its copies are followed by what they were followed by before, and so is what precedes them.
        if own.len() == 1 && at > 0 {
            let time_ms = time_of(versions.get(at));
            versions[statement(versions, at - 1)].iter().for_each(|it| mark(it, time_ms));
        }
        self.num_superseded_chunks += num_before;
        self.num_superseded_chunks -= num_newest_chunks(versions);
    }

    /// Takes many in, and marks each version of their subjects once.
    pub(super) fn add_all(
        &mut self,
        versions: Vec<(&str, Version)>,
        mut mark: impl FnMut(&Version, i64),
    ) {
        let mut added: BTreeMap<&str, Vec<Version>> = BTreeMap::new();
        for (subject, version) in versions {
            added.entry(subject).or_default().push(version);
        }
        for (subject, added) in added {
            let versions = self.by_name.entry(subject.into()).or_default();
            self.num_superseded_chunks -= num_chunks(superseded(versions));
            versions.extend(added);
            versions.sort_unstable();
            self.num_superseded_chunks += num_chunks(superseded(versions));
            let mut time_ms = time_of(None);
            for (at, version) in versions.iter().enumerate().rev() {
                if let Some(next) = versions.get(at + 1).filter(|next| !next.is_same(version)) {
                    time_ms = time_of(Some(next));
                }
                mark(version, time_ms);
            }
        }
    }

    /// Takes a version out, if it is there.
    pub(super) fn remove(
        &mut self,
        subject: &str,
        key: VersionKey,
        mut mark: impl FnMut(&Version, i64),
    ) {
        let Some(versions) = self.by_name.get_mut(subject) else { return };
        let at = versions.partition_point(|known| known.key() < key);
        if versions.get(at).is_none_or(|known| known.key() != key) {
            return;
        }
        self.num_superseded_chunks += num_newest_chunks(versions);
        let removed = versions.remove(at);
        self.num_superseded_chunks -= removed.chunks.len() + num_newest_chunks(versions);
        let is_copy = |known: &Version| known.is_same(&removed);
        // What precedes it is followed by a copy of it, or else by what follows it.
        if at > 0 && !is_copy(&versions[at - 1]) && !versions.get(at).is_some_and(is_copy) {
            let time_ms = time_of(versions.get(at));
            versions[statement(versions, at - 1)].iter().for_each(|it| mark(it, time_ms));
        }
        if versions.is_empty() {
            self.by_name.remove(subject);
        }
    }
}

/// The time from which on something gives way to the version that follows it.
fn time_of(next: Option<&Version>) -> i64 {
    // The last of all times says that none came.
    next.map_or(i64::MAX, |next| next.time_ms.min(i64::MAX - 1))
}

/// The versions that are one statement with the one at `at`, which is there.
fn statement(versions: &[Version], at: usize) -> Range<usize> {
    let moment = versions[at].moment();
    let start = versions.partition_point(|known| known.moment() < moment);
    start..versions.partition_point(|known| known.moment() <= moment)
}

/// The versions that a newer one superseded, of those of one subject.
fn superseded(versions: &[Version]) -> &[Version] {
    match versions.len() {
        0 => versions,
        len => &versions[..statement(versions, len - 1).start],
    }
}

fn num_chunks(versions: &[Version]) -> usize {
    versions.iter().map(|version| version.chunks.len()).sum()
}

/// Chunks of the versions that none superseded.
fn num_newest_chunks(versions: &[Version]) -> usize {
    num_chunks(&versions[superseded(versions).len()..])
}

#[cfg(test)]
mod tests {
    use std::collections::btree_map::Entry;

    use proptest::prelude::*;

    use super::*;

    /// Some are of one time, and those of one number in several sessions are one statement.
    fn version(session: u64, number: u64) -> Version {
        let time_ms = [5, 1, 3, 3, i64::MAX, i64::MIN][number as usize];
        let chunks = (0..number % 4).map(u128::from).collect();
        Version { time_ms, order: number, turn: (session, number), chunks }
    }

    /// The time of the earliest version after `version`, by a look at each.
    fn expected(versions: &BTreeMap<(u64, u64), Version>, version: &Version) -> i64 {
        let later = versions.values().filter(|other| other.moment() > version.moment());
        time_of(later.min_by_key(|other| other.moment()))
    }

    proptest! {
        #[test]
        fn each_version_gives_way_to_the_next_one_whatever_comes_and_goes(
            steps in prop::collection::vec((0u64..3, 0u64..6, any::<bool>()), 0..60),
        ) {
            let mut subjects = Subjects::default();
            let mut held: BTreeMap<(u64, u64), Version> = BTreeMap::new();
            let mut marks = BTreeMap::new();
            for (session, number, comes) in steps {
                let version = version(session, number);
                let turn = version.turn;
                if !comes {
                    subjects.remove("x", version.key(), |it, time_ms| {
                        marks.insert(it.turn, time_ms);
                    });
                    held.remove(&turn);
                    marks.remove(&turn);
                } else if let Entry::Vacant(free) = held.entry(turn) {
                    free.insert(version.clone());
                    subjects.add("x", version, |it, time_ms| {
                        marks.insert(it.turn, time_ms);
                    });
                }
                let wanted: BTreeMap<(u64, u64), i64> =
                    held.iter().map(|(turn, it)| (*turn, expected(&held, it))).collect();
                prop_assert_eq!(&marks, &wanted);
                let newest = held.values().map(Version::moment).max();
                let older = held.values().filter(|it| Some(it.moment()) != newest);
                let num_chunks: usize = older.clone().map(|it| it.chunks.len()).sum();
                prop_assert_eq!(subjects.num_superseded_chunks(), num_chunks);
                prop_assert_eq!(subjects.counts(), (usize::from(!held.is_empty()), older.count()));
                // All at once, or the second half of them.
                for known in [0, held.len() / 2] {
                    let mut loaded = Subjects::default();
                    let mut loaded_marks = BTreeMap::new();
                    let all: Vec<_> = held.values().map(|it| ("x", it.clone())).collect();
                    let (first, second) = all.split_at(known);
                    for part in [first, second] {
                        loaded.add_all(part.to_vec(), |it, time_ms| {
                            loaded_marks.insert(it.turn, time_ms);
                        });
                    }
                    prop_assert_eq!(&loaded_marks, &wanted);
                    prop_assert_eq!(loaded.num_superseded_chunks(), num_chunks);
                }
            }
        }
    }

    #[test]
    fn a_version_marks_itself_and_the_one_before_it() {
        let mut subjects = Subjects::default();
        let version = |number: u64| Version {
            time_ms: number as i64 * 7919 % 5_003,
            order: number,
            turn: (1, number),
            chunks: vec![u128::from(number)],
        };
        let mut num_marks = 0;
        for number in 0..5_000 {
            subjects.add("x", version(number), |_, _| num_marks += 1);
        }
        assert!(num_marks <= 2 * 5_000, "{num_marks}");
        assert_eq!(subjects.counts(), (1, 4_999));
        for number in 0..5_000 {
            subjects.remove("x", version(number).key(), |_, _| num_marks += 1);
        }
        assert!(num_marks <= 3 * 5_000, "{num_marks}");
        assert_eq!((subjects.counts(), subjects.num_superseded_chunks()), ((0, 0), 0));
    }
}

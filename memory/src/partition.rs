//! The chunks of one (user, agent) pair in memory: text, vectors, words, and where each was said.
//! Knows nothing of files; everything here is derived from the log.

use std::collections::HashMap;

use xxhash_rust::xxh3::{xxh3_64, xxh3_128_with_seed};

use crate::Role;
use crate::hygiene::gist;
use crate::words::{Terms, Words};

/// One place where a chunk's text was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) session: u64,
    pub(crate) turn: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) order: u64,
    pub(crate) role: Role,
    pub(crate) time_ms: i64,
    /// When it stops being recalled; `i64::MAX` for never.
    pub(crate) expires_ms: i64,
    /// Time of the turn that superseded it, the first one if there are several; `i64::MAX` if none did.
    pub(crate) superseded_ms: i64,
    /// The place holds nearly the chunk's text, not the same.
    pub(crate) near: bool,
}

/// The moment that a recall looks at memory from.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moment {
    /// Memory as it was at this time; as it is, if none.
    pub(crate) as_of_ms: Option<i64>,
    /// The caller's clock.
    pub(crate) now_ms: Option<i64>,
}

impl Place {
    /// Whether the place existed and had not expired.
    pub(crate) fn exists(&self, moment: Moment) -> bool {
        moment.as_of_ms.is_none_or(|as_of| self.time_ms <= as_of)
            && moment.as_of_ms.or(moment.now_ms).is_none_or(|at| at < self.expires_ms)
    }

    /// Whether a newer turn of the same subject had taken its place.
    pub(crate) fn is_stale(&self, moment: Moment) -> bool {
        self.superseded_ms <= moment.as_of_ms.unwrap_or(i64::MAX - 1)
    }
}

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

/// A chunk in memory.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) id: u128,
    pub(crate) text: Box<str>,
    /// One row per sentence, `(n, dim)`.
    pub(crate) vectors: Box<[f32]>,
    /// The session and turn whose record holds the vectors.
    pub(crate) home: (u64, u64),
    /// By ascending order, and one at least is not `near`; places of retracted and forgotten turns are not among them.
    pub(crate) places: Vec<Place>,
}

/// The chunks of one (user, agent) pair.
#[derive(Debug, Default)]
pub(crate) struct Partition {
    slots: Vec<Option<Chunk>>,
    free: Vec<u32>,
    by_id: HashMap<u128, u32>,
    words: Words,
    /// The latest chunk of each gist, by the gist's hash; see [`gist`].
    by_gist: HashMap<u64, u32>,
    /// What was said about each subject, oldest first.
    subjects: HashMap<Box<str>, Vec<Version>>,
}

impl Partition {
    pub(crate) fn words(&self) -> &Words {
        &self.words
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Subjects, and the turns about one that a newer turn superseded.
    pub(crate) fn num_subjects(&self) -> (usize, usize) {
        (self.subjects.len(), self.subjects.values().map(|versions| versions.len() - 1).sum())
    }

    /// Places beyond the first of each chunk.
    pub(crate) fn num_duplicates(&self) -> usize {
        self.iter().map(|(_, chunk)| chunk.places.len().saturating_sub(1)).sum()
    }

    /// The chunks with their slots, in no meaningful order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Chunk)> {
        self.slots
            .iter()
            .enumerate()
            .filter_map(|(slot, chunk)| chunk.as_ref().map(|chunk| (slot as u32, chunk)))
    }

    pub(crate) fn get(&self, id: u128) -> Option<&Chunk> {
        self.slots[*self.by_id.get(&id)? as usize].as_ref()
    }

    pub(crate) fn get_mut(&mut self, id: u128) -> Option<&mut Chunk> {
        self.slots[*self.by_id.get(&id)? as usize].as_mut()
    }

    /// Puts a chunk in that is not there yet.
    pub(crate) fn insert(&mut self, terms: &Terms, chunk: Chunk) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.words.add(terms, slot, &chunk.text);
        if let Some(hash) = gist_hash(&gist(&chunk.text)) {
            self.by_gist.insert(hash, slot);
        }
        self.by_id.insert(chunk.id, slot);
        self.slots[slot as usize] = Some(chunk);
    }

    /// A chunk that says what `text` says in nearly the same words, and stands in a place that `fits`.
    pub(crate) fn near(&self, text: &str, fits: impl Fn(&Place) -> bool) -> Option<&Chunk> {
        let wanted = gist(text);
        let slot = *self.by_gist.get(&gist_hash(&wanted)?)?;
        self.slots[slot as usize].as_ref().filter(|chunk| {
            // Two gists may share a hash.
            chunk.places.iter().any(|place| !place.near && fits(place))
                && gist(&chunk.text) == wanted
        })
    }

    /// Adds a place to a chunk; false if the chunk is unknown.
    pub(crate) fn add_place(&mut self, id: u128, place: Place) -> bool {
        let Some(chunk) = self.get_mut(id) else { return false };
        let at = chunk.places.partition_point(|known| known.order <= place.order);
        chunk.places.insert(at, place);
        true
    }

    /// Takes out the places of one turn in the chunks `ids`; returns the ids whose text stands nowhere any more.
    /// They stay until [`remove`](Self::remove).
    pub(crate) fn remove_places(
        &mut self,
        ids: impl Iterator<Item = u128>,
        session: u64,
        turn: u64,
    ) -> Vec<u128> {
        let mut bare = Vec::new();
        for id in ids {
            let Some(chunk) = self.get_mut(id) else { continue };
            let before = chunk.places.len();
            chunk.places.retain(|place| (place.session, place.turn) != (session, turn));
            if chunk.places.iter().all(|place| place.near) && before > 0 {
                bare.push(id);
            }
        }
        bare
    }

    /// Lets a turn speak about its subject: it supersedes older ones, and newer ones supersede it.
    pub(crate) fn add_version(&mut self, subject: &str, version: Version) {
        let versions = self.subjects.entry(subject.into()).or_default();
        let at = versions.partition_point(|known| *known < version);
        versions.insert(at, version);
        self.supersede(subject);
    }

    /// Takes a turn's word about its subject back.
    pub(crate) fn remove_version(&mut self, subject: &str, turn: (u64, u64)) {
        if let Some(versions) = self.subjects.get_mut(subject) {
            versions.retain(|version| version.turn != turn);
            if versions.is_empty() {
                self.subjects.remove(subject);
            } else {
                self.supersede(subject);
            }
        }
    }

    /// Marks the places of every turn about a subject with the time at which the next one came.
    fn supersede(&mut self, subject: &str) {
        let Some(versions) = self.subjects.get(subject).cloned() else { return };
        for (at, version) in versions.iter().enumerate() {
            let superseded_ms = versions.get(at + 1).map_or(i64::MAX, |next| next.time_ms);
            for chunk in &version.chunks {
                let Some(chunk) = self.get_mut(*chunk) else { continue };
                let places = chunk.places.iter_mut();
                places
                    .filter(|place| (place.session, place.turn) == version.turn)
                    .for_each(|place| place.superseded_ms = superseded_ms);
            }
        }
    }

    /// Gives a chunk that has none its vectors.
    pub(crate) fn set_vectors(&mut self, id: u128, vectors: Box<[f32]>) {
        if let Some(chunk) = self.get_mut(id) {
            chunk.vectors = vectors;
        }
    }

    /// How many chunks differ from those of `other`, or are in one of the two alone; words that count differently count
    /// as one more. For a check: it visits every chunk.
    pub(crate) fn differing(&self, other: &Self, terms: &Terms) -> usize {
        let mut differing = other.by_id.keys().filter(|id| self.get(**id).is_none()).count();
        let mut words = self.words.num_terms() != other.words.num_terms();
        for (_, chunk) in self.iter() {
            let same = other.get(chunk.id).is_some_and(|known| {
                let mut ordered = [chunk.places.clone(), known.places.clone()];
                ordered
                    .iter_mut()
                    .for_each(|places| places.sort_by_key(|p| (p.order, p.start, p.session)));
                chunk.text == known.text
                    && chunk.vectors == known.vectors
                    && ordered[0] == ordered[1]
            });
            differing += usize::from(!same);
            terms.words(&chunk.text, |word, _| {
                words |= self.words.num_holding(word) != other.words.num_holding(word);
            });
        }
        differing + usize::from(words)
    }

    /// Takes chunks out, with their words.
    pub(crate) fn remove(&mut self, terms: &Terms, ids: &[u128]) {
        let mut removed = Vec::new();
        for id in ids {
            let Some(slot) = self.by_id.remove(id) else { continue };
            if let Some(chunk) = self.slots[slot as usize].take() {
                if let Some(hash) = gist_hash(&gist(&chunk.text))
                    && self.by_gist.get(&hash) == Some(&slot)
                {
                    self.by_gist.remove(&hash);
                }
                removed.push((slot, chunk));
                self.free.push(slot);
            }
        }
        let texts: Vec<(u32, &str)> =
            removed.iter().map(|(slot, chunk)| (*slot, &*chunk.text)).collect();
        self.words.remove(terms, &texts);
    }
}

fn gist_hash(gist: &str) -> Option<u64> {
    (!gist.is_empty()).then(|| xxh3_64(gist.as_bytes()))
}

/// The identity of `text`: its seeded hash, or the next free one if `text_of` knows another text under it.
pub(crate) fn chunk_id<'a>(
    seed: u64,
    text: &str,
    text_of: impl Fn(u128) -> Option<&'a str>,
) -> u128 {
    let mut seed = seed;
    loop {
        let id = xxh3_128_with_seed(text.as_bytes(), seed);
        match text_of(id) {
            Some(other) if other != text => seed = seed.wrapping_add(1),
            _ => return id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collision_of_hashes_gives_two_identities() {
        let first = chunk_id(7, "one", |_| None);
        let second = chunk_id(7, "one", |id| (id == first).then_some("another text"));
        assert_ne!(first, second);
        assert_eq!(chunk_id(7, "one", |_| Some("one")), first);
    }
}

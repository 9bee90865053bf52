//! The chunks of one (user, agent) pair in memory: text, vectors, words, and where each was said.
//! Knows nothing of files; everything here is derived from the log.

use std::collections::HashMap;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::Role;
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
    /// Never empty, by ascending order; places of retracted and forgotten turns are not among them.
    pub(crate) places: Vec<Place>,
}

/// The chunks of one (user, agent) pair.
#[derive(Debug, Default)]
pub(crate) struct Partition {
    slots: Vec<Option<Chunk>>,
    free: Vec<u32>,
    by_id: HashMap<u128, u32>,
    words: Words,
}

impl Partition {
    pub(crate) fn words(&self) -> &Words {
        &self.words
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
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
        self.by_id.insert(chunk.id, slot);
        self.slots[slot as usize] = Some(chunk);
    }

    /// Adds a place to a chunk; false if the chunk is unknown.
    pub(crate) fn add_place(&mut self, id: u128, place: Place) -> bool {
        let Some(chunk) = self.get_mut(id) else { return false };
        let at = chunk.places.partition_point(|known| known.order <= place.order);
        chunk.places.insert(at, place);
        true
    }

    /// Takes out the places of one turn in the chunks `ids`; returns the ids that are left without any.
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
            if chunk.places.is_empty() && before > 0 {
                bare.push(id);
            }
        }
        bare
    }

    /// Takes chunks out, with their words.
    pub(crate) fn remove(&mut self, terms: &Terms, ids: &[u128]) {
        let mut removed = Vec::new();
        for id in ids {
            let Some(slot) = self.by_id.remove(id) else { continue };
            if let Some(chunk) = self.slots[slot as usize].take() {
                removed.push((slot, chunk));
                self.free.push(slot);
            }
        }
        let texts: Vec<(u32, &str)> =
            removed.iter().map(|(slot, chunk)| (*slot, &*chunk.text)).collect();
        self.words.remove(terms, &texts);
    }
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

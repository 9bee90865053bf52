//! The chunks of one (user, agent) pair in memory: text, vectors, words, and where each was said.
//! Knows nothing of files; everything here is derived from the log.

use std::collections::HashMap;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::Role;
use crate::filter::Metadata;
use crate::tags::{Accepted, Tags};
use crate::vectors::{Bits, Graph, Index, Job, dot_fast};
use crate::words::{Terms, Words};

/// Up to so many chunks every one is scored exactly: that takes less than a millisecond.
const EXHAUSTIVE_CHUNKS: usize = 1_000;
/// Sentence vectors asked for to get one chunk: its neighbours' sentences are often close, too.
const ROWS_PER_CHUNK: usize = 2;

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

/// What a search asks of a partition.
pub(crate) struct Wanted<'a> {
    /// The question's vector.
    pub(crate) query: &'a [f32],
    /// BM25 of every slot.
    pub(crate) scores: &'a [f32],
    /// Chunks wanted by words, and as many by vectors.
    pub(crate) num: usize,
    pub(crate) threads: usize,
    /// Only chunks that stand in these turns.
    pub(crate) among: Option<&'a Accepted<'a>>,
    /// Only these chunks.
    pub(crate) visible: Option<&'a dyn Fn(&Chunk) -> bool>,
}

/// The chunks of one (user, agent) pair.
#[derive(Debug)]
pub(crate) struct Partition {
    dim: usize,
    slots: Vec<Option<Chunk>>,
    free: Vec<u32>,
    by_id: HashMap<u128, u32>,
    words: Words,
    tags: Tags,
    index: Index,
    /// The index's row of each vector of a slot.
    rows: Vec<Box<[u32]>>,
    /// The slot of each row of the index, and which of the chunk's vectors it is.
    owners: Vec<(u32, u32)>,
}

impl Partition {
    /// No chunks yet; their vectors have `dim` numbers.
    pub(crate) fn new(dim: usize) -> Self {
        Self {
            dim,
            slots: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            words: Words::default(),
            tags: Tags::default(),
            index: Index::new(dim),
            rows: Vec::new(),
            owners: Vec::new(),
        }
    }

    pub(crate) fn tags(&self) -> &Tags {
        &self.tags
    }

    /// Takes in a turn's metadata, before or after its chunks.
    pub(crate) fn set_metadata(&mut self, session: u64, turn: u64, metadata: &Metadata) {
        self.tags.set((session, turn), metadata);
    }

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
        self.index_rows(slot, &chunk.vectors);
        chunk.places.iter().for_each(|place| self.tags.add((place.session, place.turn), slot));
        self.by_id.insert(chunk.id, slot);
        self.slots[slot as usize] = Some(chunk);
    }

    /// Gives the vectors of a slot, which has none in the index yet, their rows.
    fn index_rows(&mut self, slot: u32, vectors: &[f32]) {
        let mut rows = Vec::with_capacity(vectors.len() / self.dim);
        for (at, vector) in vectors.chunks_exact(self.dim).enumerate() {
            let row = self.index.insert(vector);
            if self.owners.len() <= row as usize {
                self.owners.resize(row as usize + 1, (0, 0));
            }
            self.owners[row as usize] = (slot, at as u32);
            rows.push(row);
        }
        if self.rows.len() <= slot as usize {
            self.rows.resize(slot as usize + 1, Box::default());
        }
        self.rows[slot as usize] = rows.into();
    }

    /// The vector of a row of the index, if it lives.
    fn vector(&self, row: u32) -> Option<&[f32]> {
        let &(slot, at) = self.owners.get(row as usize)?;
        let is_owner = self.rows.get(slot as usize)?.get(at as usize) == Some(&row);
        let chunk = self.slots.get(slot as usize)?.as_ref().filter(|_| is_owner)?;
        chunk.vectors.get(at as usize * self.dim..(at as usize + 1) * self.dim)
    }

    /// The chunks worth scoring for a question: all of a small partition, else the best by words and the best by
    /// vectors of those that are wanted.
    pub(crate) fn candidates(&self, wanted: &Wanted<'_>) -> Vec<(u32, &Chunk)> {
        if self.len() <= EXHAUSTIVE_CHUNKS {
            return self.iter().collect();
        }
        let chunk = |slot: u32| Some((slot, self.slots.get(slot as usize)?.as_ref()?));
        let visible = match (wanted.among, wanted.visible) {
            (Some(among), _) => Some(self.visible(wanted, among.slots().filter_map(chunk))),
            (None, Some(_)) => Some(self.visible(wanted, self.iter())),
            (None, None) => None,
        };
        let mut slots = self.best_by_words(wanted, visible.as_ref());
        slots.extend(self.best_by_vectors(wanted, visible.as_ref()));
        slots.sort_unstable();
        slots.dedup();
        slots.into_iter().filter_map(chunk).collect()
    }

    /// The slots of those chunks that are wanted.
    fn visible<'a>(
        &self,
        wanted: &Wanted<'_>,
        chunks: impl Iterator<Item = (u32, &'a Chunk)>,
    ) -> Bits {
        let mut bits = Bits::none(self.slots.len());
        chunks
            .filter(|(_, chunk)| wanted.visible.is_none_or(|visible| visible(chunk)))
            .for_each(|(slot, _)| bits.insert(slot as usize));
        bits
    }

    fn best_by_words(&self, wanted: &Wanted<'_>, visible: Option<&Bits>) -> Vec<u32> {
        let scores = wanted.scores.iter().enumerate();
        let scored = scores
            .filter(|&(slot, &score)| score > 0.0 && visible.is_none_or(|bits| bits.contains(slot)))
            .map(|(slot, &score)| (score, slot as u32));
        greatest(scored.collect(), wanted.num)
    }

    fn best_by_vectors(&self, wanted: &Wanted<'_>, visible: Option<&Bits>) -> Vec<u32> {
        let allowed = visible.map(|slots| {
            let mut bits = Bits::none(self.index.capacity());
            let rows = slots.iter().filter_map(|slot| self.rows.get(slot));
            rows.flatten().for_each(|&row| bits.insert(row as usize));
            bits
        });
        let num_rows = wanted.num * ROWS_PER_CHUNK;
        let rows = self.index.candidates(wanted.query, num_rows, allowed.as_ref(), wanted.threads);
        let mut best: HashMap<u32, f32> = HashMap::new();
        for row in rows {
            let Some(vector) = self.vector(row) else { continue };
            let cosine = dot_fast(wanted.query, vector);
            let known = best.entry(self.owners[row as usize].0).or_insert(cosine);
            *known = known.max(cosine);
        }
        greatest(best.into_iter().map(|(slot, cosine)| (cosine, slot)).collect(), wanted.num)
    }

    /// Starts a build if this many vectors lack a good graph: the rows to build it over.
    pub(crate) fn start_build(&mut self, graph_vectors: usize) -> Option<Job> {
        self.index.start_build(graph_vectors)
    }

    /// Whether [`start_build`](Self::start_build) would start one.
    pub(crate) fn is_build_due(&self, graph_vectors: usize) -> bool {
        self.index.is_build_due(graph_vectors)
    }

    /// Bytes of a row as the graph keeps it.
    pub(crate) fn padded(&self) -> usize {
        self.index.padded()
    }

    /// A row's vector as the graph keeps it, into `out: (padded)`; false if the row is gone.
    pub(crate) fn quantize(&self, row: u32, out: &mut [i8]) -> bool {
        let vector = self.vector(row);
        vector.iter().for_each(|vector| self.index.quantize(vector, out));
        vector.is_some()
    }

    /// Searches go through the graph from now on; see [`Index::seal`].
    pub(crate) fn seal(&mut self, graph: Arc<Graph>, rows: Vec<u32>) {
        self.index.seal(graph, rows);
    }

    /// A build has ended without a graph.
    pub(crate) fn give_up(&mut self) {
        self.index.give_up();
    }

    /// Vectors that the index holds, and how many of them the graph finds.
    pub(crate) fn num_vectors(&self) -> (usize, usize) {
        (self.index.len(), self.index.num_sealed())
    }

    /// The graph, and for each of its positions the chunk and which of its vectors stands there; none if it is gone.
    pub(crate) fn sealed(&self) -> Option<(Arc<Graph>, Vec<Option<(u128, u32)>>)> {
        let (graph, rows) = self.index.sealed()?;
        let name = |row: &u32| {
            self.vector(*row)?;
            let (slot, at) = self.owners[*row as usize];
            Some((self.slots[slot as usize].as_ref()?.id, at))
        };
        Some((graph.clone(), rows.iter().map(name).collect()))
    }

    /// Whether vectors of the graph are gone.
    pub(crate) fn has_lost_rows(&self) -> bool {
        self.index.sealed().is_some_and(|(_, rows)| rows.len() > self.index.num_sealed())
    }

    /// The row of a chunk's vector.
    pub(crate) fn row_of(&self, id: u128, at: u32) -> Option<u32> {
        self.rows.get(*self.by_id.get(&id)? as usize)?.get(at as usize).copied()
    }

    /// Adds a place to a chunk; false if the chunk is unknown.
    pub(crate) fn add_place(&mut self, id: u128, place: Place) -> bool {
        let Some(&slot) = self.by_id.get(&id) else { return false };
        let Some(chunk) = &mut self.slots[slot as usize] else { return false };
        self.tags.add((place.session, place.turn), slot);
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
        self.tags.remove((session, turn));
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
                let rows = std::mem::take(&mut self.rows[slot as usize]);
                rows.iter().for_each(|&row| self.index.remove(row));
                removed.push((slot, chunk));
                self.free.push(slot);
            }
        }
        let texts: Vec<(u32, &str)> =
            removed.iter().map(|(slot, chunk)| (*slot, &*chunk.text)).collect();
        self.words.remove(terms, &texts);
    }
}

/// The numbers of the `num` greatest scores.
fn greatest(mut scored: Vec<(f32, u32)>, num: usize) -> Vec<u32> {
    if num < scored.len() {
        scored.select_nth_unstable_by(num, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored.truncate(num);
    }
    scored.into_iter().map(|(_, number)| number).collect()
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

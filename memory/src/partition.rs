//! The chunks of one (user, agent) pair in memory: text, vectors, words, and where each was said.
//! Knows nothing of files; everything here is derived from the log.

mod image;
mod place;
mod rows;
mod subjects;
mod vectors;

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128_with_seed};

use self::place::supersede;
pub(crate) use self::place::{Moment, Place};
use self::rows::Rows;
use self::subjects::Subjects;
pub(crate) use self::subjects::{Version, VersionKey};
pub(crate) use self::vectors::{Elsewhere, Vectors};
use crate::filter::Metadata;
use crate::hygiene::gist;
use crate::tags::{Accepted, Tags};
use crate::vectors::{Bits, Graph, Job, dot_fast};
use crate::words::{Terms, Words};

/// Up to so many chunks every one is scored exactly: that takes less than a millisecond.
const EXHAUSTIVE_CHUNKS: usize = 1_000;
/// Fewer chunks are indexed in some ten milliseconds: not worth a second thread.
const MANY_CHUNKS: usize = 1_000;
/// Sentence vectors asked for to get one chunk: its neighbours' sentences are often close, too.
const ROWS_PER_CHUNK: usize = 2;

/// A chunk in memory.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) id: u128,
    pub(crate) text: Box<str>,
    /// One row per sentence, `(n, dim)`.
    pub(crate) vectors: Vectors,
    /// The session and turn whose record holds the vectors.
    pub(crate) home: (u64, u64),
    /// By ascending order and session, and one at least is not `near`; places of retracted and forgotten turns are not
    /// among them.
    pub(crate) places: Vec<Place>,
}

/// What a vector is called beyond one opening: its chunk, and which of the chunk's it is; none if it is gone.
pub(crate) type VectorName = Option<(u128, u32)>;

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
    slots: Vec<Option<Chunk>>,
    free: Vec<u32>,
    by_id: HashMap<u128, u32, RandomState>,
    words: Words,
    /// The latest chunk of each gist, by the gist's hash; see [`gist`].
    by_gist: HashMap<u64, u32, RandomState>,
    /// Hash of the gist of each slot; 0 if there is none.
    gists: Vec<u64>,
    subjects: Subjects,
    /// Places that expire at some time.
    num_expiring: usize,
    tags: Tags,
    rows: Rows,
    /// Chunks and vectors that came or went.
    num_changes: u64,
    /// How many of them the last image knows; none if there is no image.
    saved: Option<u64>,
}

impl Partition {
    /// No chunks yet; their vectors have `dim` numbers.
    pub(crate) fn new(dim: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::default(),
            words: Words::default(),
            tags: Tags::default(),
            rows: Rows::new(dim),
            by_gist: HashMap::default(),
            gists: Vec::new(),
            num_changes: 0,
            saved: None,
            subjects: Subjects::default(),
            num_expiring: 0,
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

    /// Subjects, and the turns about one that a newer turn superseded.
    pub(crate) fn num_subjects(&self) -> (usize, usize) {
        self.subjects.counts()
    }

    /// Chunks of superseded turns, at least as many as there are.
    pub(crate) fn num_superseded_chunks(&self) -> usize {
        self.subjects.num_superseded_chunks()
    }

    /// Places that expire at some time, or have.
    pub(crate) fn num_expiring(&self) -> usize {
        self.num_expiring
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

    fn get_mut(&mut self, id: u128) -> Option<&mut Chunk> {
        self.slots[*self.by_id.get(&id)? as usize].as_mut()
    }

    /// Moves a chunk's vectors to another turn's record; false if there are none to move.
    pub(crate) fn set_home(&mut self, id: u128, home: (u64, u64)) -> bool {
        self.get_mut(id).is_some_and(|chunk| {
            chunk.home = home;
            if !chunk.vectors.is_here() {
                // The record that holds them goes.
                chunk.vectors = chunk.vectors.to_vec().into();
            }
            !chunk.vectors.is_empty()
        })
    }

    /// Puts a chunk in that is not there yet.
    pub(crate) fn insert(&mut self, terms: &Terms, chunk: Chunk) {
        let gist = gist_hash(&gist(&chunk.text));
        self.insert_with_gist(terms, chunk, gist);
    }

    /// The same, of a chunk whose [`gist_hash`] is known.
    pub(crate) fn insert_with_gist(&mut self, terms: &Terms, chunk: Chunk, gist: Option<u64>) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.words.add(terms, slot, &chunk.text);
        self.rows.insert(slot, &chunk.vectors);
        self.put_new(slot, chunk, gist);
    }

    /// Puts many chunks in that are not there yet, in less time than one by one: words and vectors side by side.
    pub(crate) fn insert_all(&mut self, chunks: Vec<Chunk>) {
        if chunks.len() < MANY_CHUNKS {
            let terms = Terms::new();
            chunks.into_iter().for_each(|chunk| self.insert(&terms, chunk));
            return;
        }
        let first = self.slots.len() as u32;
        let Self { words, rows, .. } = self;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let terms = Terms::new();
                (first..)
                    .zip(&chunks)
                    .for_each(|(slot, chunk)| words.add(&terms, slot, &chunk.text));
            });
            (first..).zip(&chunks).for_each(|(slot, chunk)| rows.insert(slot, &chunk.vectors));
        });
        self.slots.resize_with(first as usize + chunks.len(), || None);
        for (slot, chunk) in (first..).zip(chunks) {
            let gist = gist_hash(&gist(&chunk.text));
            self.put_new(slot, chunk, gist);
        }
    }

    /// What [`insert`](Self::insert) does beside words and vectors.
    fn put_new(&mut self, slot: u32, chunk: Chunk, gist: Option<u64>) {
        if self.gists.len() <= slot as usize {
            self.gists.resize(slot as usize + 1, 0);
        }
        self.gists[slot as usize] = gist.unwrap_or(0);
        self.num_changes += 1 + self.rows.of_slot(slot).len() as u64;
        self.put(slot, chunk);
    }

    /// Puts a chunk into a slot whose words, rows and gist are there.
    fn put(&mut self, slot: u32, chunk: Chunk) {
        for place in &chunk.places {
            self.tags.add((place.session, place.turn), slot);
            self.num_expiring += usize::from(place.expires());
        }
        if self.gists[slot as usize] != 0 {
            self.by_gist.insert(self.gists[slot as usize], slot);
        }
        self.by_id.insert(chunk.id, slot);
        self.slots[slot as usize] = Some(chunk);
    }

    /// The vector of a row of the index, if it lives.
    fn vector(&self, row: u32) -> Option<&[f32]> {
        let (slot, at) = self.rows.owner(row)?;
        let (chunk, dim) = (self.slots.get(slot as usize)?.as_ref()?, self.rows.dim());
        chunk.vectors.get(at as usize * dim..(at as usize + 1) * dim)
    }

    /// The chunks worth scoring for a question: all of a small partition, else the best by words and the best by
    /// vectors of those that are wanted.
    pub(crate) fn candidates(&self, wanted: &Wanted<'_>) -> Vec<(u32, &Chunk)> {
        if self.len() <= EXHAUSTIVE_CHUNKS {
            return self.iter().collect();
        }
        let chunk = |slot: u32| Some((slot, self.slots.get(slot as usize)?.as_ref()?));
        let visible = match (wanted.among, wanted.visible) {
            (Some(among), Some(sees)) => {
                Some(self.visible(among.slots().filter_map(chunk).filter(|(_, it)| sees(it))))
            }
            (None, Some(sees)) => Some(self.visible(self.iter().filter(|(_, it)| sees(it)))),
            (Some(among), None) => {
                let mut bits = Bits::none(self.slots.len());
                among.slots().for_each(|slot| bits.insert(slot as usize));
                Some(bits)
            }
            (None, None) => None,
        };
        let mut slots = self.best_by_words(wanted, visible.as_ref());
        slots.extend(self.best_by_vectors(wanted, visible.as_ref()));
        slots.sort_unstable();
        slots.dedup();
        slots.into_iter().filter_map(chunk).collect()
    }

    /// The slots of these chunks.
    fn visible<'a>(&self, chunks: impl Iterator<Item = (u32, &'a Chunk)>) -> Bits {
        let mut bits = Bits::none(self.slots.len());
        chunks.for_each(|(slot, _)| bits.insert(slot as usize));
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
            let mut bits = Bits::none(self.rows.index.capacity());
            let rows = slots.iter().flat_map(|slot| self.rows.of_slot(slot as u32));
            rows.for_each(|&row| bits.insert(row as usize));
            bits
        });
        let num_rows = wanted.num.saturating_mul(ROWS_PER_CHUNK);
        let index = &self.rows.index;
        let rows = index.candidates(wanted.query, num_rows, allowed.as_ref(), wanted.threads);
        let mut best: HashMap<u32, f32> = HashMap::new();
        for row in rows {
            let owner = self.rows.owner(row).zip(self.vector(row));
            let Some(((slot, _), vector)) = owner else { continue };
            let cosine = dot_fast(wanted.query, vector);
            let known = best.entry(slot).or_insert(cosine);
            *known = known.max(cosine);
        }
        greatest(best.into_iter().map(|(slot, cosine)| (cosine, slot)).collect(), wanted.num)
    }

    /// Starts a build if this many vectors lack a good graph: the rows to build it over.
    pub(crate) fn start_build(&mut self, graph_vectors: usize) -> Option<Job> {
        self.rows.index.start_build(graph_vectors)
    }

    /// Whether [`start_build`](Self::start_build) would start one.
    pub(crate) fn is_build_due(&self, graph_vectors: usize) -> bool {
        self.rows.index.is_build_due(graph_vectors)
    }

    /// Whether a build that was started has not ended.
    pub(crate) fn is_building(&self) -> bool {
        self.rows.index.is_building()
    }

    /// Bytes of a row as the graph keeps it.
    pub(crate) fn padded(&self) -> usize {
        self.rows.index.padded()
    }

    /// A row's vector as the graph keeps it, into `out: (padded)`; false if the row is gone.
    pub(crate) fn quantize(&self, row: u32, out: &mut [i8]) -> bool {
        let vector = self.vector(row);
        vector.iter().for_each(|vector| self.rows.index.quantize(vector, out));
        vector.is_some()
    }

    /// Searches go through the graph from now on; see [`Index::seal`].
    pub(crate) fn seal(&mut self, graph: Arc<Graph>, rows: Vec<u32>) {
        self.rows.index.seal(graph, rows);
    }

    /// A build has ended without a graph.
    pub(crate) fn give_up(&mut self) {
        self.rows.index.give_up();
    }

    /// Vectors that the index holds, and how many of them the graph finds.
    pub(crate) fn num_vectors(&self) -> (usize, usize) {
        (self.rows.index.len(), self.rows.index.num_sealed())
    }

    /// Vectors that were left where the log has them.
    pub(crate) fn num_unread(&self) -> usize {
        let unread = self.iter().filter(|(_, chunk)| !chunk.vectors.is_read());
        unread.map(|(slot, _)| self.rows.of_slot(slot).len()).sum()
    }

    /// The graph, and for each of its positions the chunk and which of its vectors stands there; none if it is gone.
    pub(crate) fn sealed(&self) -> Option<(Arc<Graph>, Vec<VectorName>)> {
        let (graph, rows) = self.rows.index.sealed()?;
        let name = |row: &u32| {
            let (slot, at) = self.rows.owner(*row)?;
            Some((self.slots[slot as usize].as_ref()?.id, at))
        };
        Some((graph.clone(), rows.iter().map(name).collect()))
    }

    /// Whether vectors of the graph are gone.
    pub(crate) fn has_lost_rows(&self) -> bool {
        self.rows.index.sealed().is_some_and(|(_, rows)| rows.len() > self.rows.index.num_sealed())
    }

    /// The row of a chunk's vector.
    pub(crate) fn row_of(&self, id: u128, at: u32) -> Option<u32> {
        self.rows.of_slot(*self.by_id.get(&id)?).get(at as usize).copied()
    }

    /// A chunk whose text has the gist `wanted`, and which stands in a place that `fits`.
    pub(crate) fn near(&self, wanted: &str, fits: impl Fn(&Place) -> bool) -> Option<&Chunk> {
        let slot = *self.by_gist.get(&gist_hash(wanted)?)?;
        self.slots[slot as usize].as_ref().filter(|chunk| {
            // Two gists may share a hash.
            chunk.places.iter().any(|place| !place.near && fits(place))
                && gist(&chunk.text) == wanted
        })
    }

    /// Adds a place to a chunk; false if the chunk is unknown.
    pub(crate) fn add_place(&mut self, id: u128, place: Place) -> bool {
        let Some(&slot) = self.by_id.get(&id) else { return false };
        let Some(chunk) = &mut self.slots[slot as usize] else { return false };
        self.tags.add((place.session, place.turn), slot);
        self.num_expiring += usize::from(place.expires());
        let key = |place: &Place| (place.order, place.session);
        let at = chunk.places.partition_point(|known| key(known) <= key(&place));
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
        self.tags.remove((session, turn));
        for id in ids {
            let Some(chunk) = self.get_mut(id) else { continue };
            let before = chunk.places.len();
            let mut num_expiring = 0;
            chunk.places.retain(|place| {
                let stays = (place.session, place.turn) != (session, turn);
                num_expiring += usize::from(!stays && place.expires());
                stays
            });
            if chunk.places.iter().all(|place| place.near) && before > 0 {
                bare.push(id);
            }
            self.num_expiring -= num_expiring;
        }
        bare
    }

    /// Lets a turn speak about its subject: it supersedes older ones, and newer ones supersede it.
    pub(crate) fn add_version(&mut self, subject: &str, version: Version) {
        let Self { subjects, by_id, slots, .. } = self;
        subjects.add(subject, version, |version, time_ms| mark(by_id, slots, version, time_ms));
    }

    /// The same of many turns, in less time than one by one.
    pub(crate) fn add_versions(&mut self, versions: Vec<(&str, Version)>) {
        let Self { subjects, by_id, slots, .. } = self;
        subjects.add_all(versions, |version, time_ms| mark(by_id, slots, version, time_ms));
    }

    /// Takes a turn's word about its subject back.
    pub(crate) fn remove_version(&mut self, subject: &str, key: VersionKey) {
        let Self { subjects, by_id, slots, .. } = self;
        subjects.remove(subject, key, |version, time_ms| mark(by_id, slots, version, time_ms));
    }

    /// Gives a chunk that has none its vectors.
    pub(crate) fn set_vectors(&mut self, id: u128, vectors: Vec<f32>) {
        let Some(&slot) = self.by_id.get(&id) else { return };
        self.rows.remove(slot);
        self.rows.insert(slot, &vectors);
        self.num_changes += 1 + self.rows.of_slot(slot).len() as u64;
        if let Some(chunk) = &mut self.slots[slot as usize] {
            chunk.vectors = vectors.into();
        }
    }

    /// How many chunks differ from those of `other`, or are in one of the two alone; words that count differently count
    /// as one more. For a check: it visits every chunk.
    pub(crate) fn differing(&self, other: &Self) -> usize {
        let mut differing = other.by_id.keys().filter(|id| self.get(**id).is_none()).count();
        for (_, chunk) in self.iter() {
            let same = other.get(chunk.id).is_some_and(|known| {
                let mut ordered = [chunk.places.clone(), known.places.clone()];
                ordered
                    .iter_mut()
                    .for_each(|places| places.sort_by_key(|p| (p.order, p.start, p.session)));
                chunk.text == known.text
                    && *chunk.vectors == *known.vectors
                    && ordered[0] == ordered[1]
                    && self.is_indexed(chunk)
                    && self.has_index_of(chunk.id, other)
                    && chunk.places.iter().all(|place| {
                        let turn = (place.session, place.turn);
                        self.tags.metadata(turn) == other.tags.metadata(turn)
                    })
            });
            differing += usize::from(!same);
        }
        let id = |partition: &Self, slot: u32| {
            partition.slots.get(slot as usize)?.as_ref().map(|chunk| chunk.id)
        };
        let words = self.words.is_as(&other.words, |slot| id(self, slot), |slot| id(other, slot));
        differing + usize::from(!words)
    }

    /// Whether codes and gist of a chunk are those that `other` has.
    fn has_index_of(&self, id: u128, other: &Self) -> bool {
        let Some((&own, &slot)) = self.by_id.get(&id).zip(other.by_id.get(&id)) else {
            return false;
        };
        let (rows, others) = (self.rows.of_slot(own), other.rows.of_slot(slot));
        let (codes, other_codes) = (self.rows.index.codes(), other.rows.index.codes());
        self.gists[own as usize] == other.gists[slot as usize]
            && rows.len() == others.len()
            && rows.iter().zip(others).all(|(&a, &b)| codes.code(a).eq(other_codes.code(b)))
    }

    /// Whether each of a chunk's vectors has its row, and no more.
    fn is_indexed(&self, chunk: &Chunk) -> bool {
        let num_rows = self.by_id.get(&chunk.id).map_or(0, |slot| self.rows.of_slot(*slot).len());
        num_rows * self.rows.dim() == chunk.vectors.len()
            && chunk.vectors.chunks_exact(self.rows.dim()).enumerate().all(|(at, vector)| {
                let row = self.row_of(chunk.id, at as u32);
                row.and_then(|row| self.vector(row)) == Some(vector)
            })
    }

    /// Takes chunks out, with their words.
    pub(crate) fn remove(&mut self, terms: &Terms, ids: &[u128]) {
        let mut removed = Vec::new();
        for id in ids {
            let Some(slot) = self.by_id.remove(id) else { continue };
            if let Some(chunk) = self.slots[slot as usize].take() {
                self.num_changes += 1 + self.rows.of_slot(slot).len() as u64;
                self.rows.remove(slot);
                let expiring = chunk.places.iter().filter(|place| place.expires());
                self.num_expiring -= expiring.count();
                let gist = std::mem::take(&mut self.gists[slot as usize]);
                if self.by_gist.get(&gist) == Some(&slot) {
                    self.by_gist.remove(&gist);
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

/// Says in the places of a version's turn when the next one came.
fn mark(
    by_id: &HashMap<u128, u32, RandomState>,
    slots: &mut [Option<Chunk>],
    version: &Version,
    superseded_ms: i64,
) {
    for id in &version.chunks {
        let Some(&slot) = by_id.get(id) else { continue };
        let Some(chunk) = &mut slots[slot as usize] else { continue };
        supersede(&mut chunk.places, version.order, version.turn, superseded_ms);
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

/// The hash of a [`gist`]; none of an empty one.
pub(crate) fn gist_hash(gist: &str) -> Option<u64> {
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

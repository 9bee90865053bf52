//! The chunks of turns while a store is loaded: taken from images and records, or cut and embedded anew.
//! Knows nothing of sessions beyond the turn that it is given.

use std::collections::HashMap;
use std::sync::Arc;

use super::Loader;
use crate::format::image::ImageSpan;
use crate::format::{BlobRef, Body, ChunkSpan, TurnChunk, TurnChunks, TurnRecord};
use crate::partition::{Chunk, Partition, Place, Vectors, chunk_id};
use crate::store::commit::start_of;
use crate::store::held::HeldVectors;
use crate::store::state::TurnState;
use crate::{Error, ErrorKind, Result, Role, Scope, chunk};

/// A chunk of a turn, and its vectors if the turn's record holds them.
struct Found {
    span: ChunkSpan,
    vectors: Vectors,
}

/// The chunks of partitions, in the order in which they are found.
#[derive(Default)]
pub(super) struct Homes {
    chunks: Vec<(usize, Chunk)>,
    /// Where a chunk is among them, by the number of its partition and its identity.
    places: HashMap<(usize, u128), usize>,
}

impl Homes {
    /// Makes room for so many more.
    pub(super) fn reserve(&mut self, num_chunks: usize) {
        self.chunks.reserve(num_chunks);
        self.places.reserve(num_chunks);
    }

    fn get(&self, partition: usize, id: u128) -> Option<&Chunk> {
        self.places.get(&(partition, id)).map(|&at| &self.chunks[at].1)
    }

    fn get_mut(&mut self, partition: usize, id: u128) -> Option<&mut Chunk> {
        self.places.get(&(partition, id)).map(|&at| &mut self.chunks[at].1)
    }

    /// The chunk, which is new with this text and this home if it was not found before.
    fn enter(
        &mut self,
        partition: usize,
        id: u128,
        text: impl FnOnce() -> Box<str>,
        home: (u64, u64),
    ) -> &mut Chunk {
        let Self { chunks, places } = self;
        let at = *places.entry((partition, id)).or_insert_with(|| {
            // Most stand in one place, and a vector that grows by itself makes room for four.
            let (text, places) = (text(), Vec::with_capacity(1));
            chunks.push((partition, Chunk { id, text, vectors: Vectors::default(), home, places }));
            chunks.len() - 1
        });
        &mut chunks[at].1
    }
}

impl Loader<'_> {
    /// A turn's chunks as the image knows them, and where their vectors are; none if it does not know these records.
    fn imaged(
        &self,
        partition: usize,
        turn: (u64, u64),
        (body_blob, blob): (&BlobRef, &BlobRef),
        body: &Body,
    ) -> Option<(Vec<Found>, Option<Arc<HeldVectors>>)> {
        let image = self.partitions[partition].image.as_ref()?;
        let made = image.turns.get(&turn).filter(|made| made.is_of(body_blob, blob))?;
        let fits = |span: &ChunkSpan| {
            body.text.get(span.start as usize..span.end as usize).is_some_and(|it| !it.is_empty())
        };
        if !made.spans.iter().all(|it| fits(&it.span)) {
            return None;
        }
        let mut held = None;
        if made.spans.iter().any(|it| it.holds) {
            held = Some(Arc::new(HeldVectors::new(self.state.segment(blob).ok()?, *blob)));
        }
        let found = |(at, it): (usize, &ImageSpan)| {
            let held = held.clone().filter(|_| it.holds && !it.span.near);
            let vectors = held.map(|held| Vectors::Elsewhere(held, at as u32)).unwrap_or_default();
            Found { span: it.span, vectors }
        };
        Some((made.spans.iter().enumerate().map(found).collect(), held))
    }

    /// Takes one turn's chunks in; cuts it again if their record is damaged.
    pub(super) fn turn(
        &mut self,
        id: u64,
        scope: &Scope,
        turn: u64,
        record: TurnRecord,
        (body_blob, body): (&BlobRef, Body),
    ) {
        let remembered = record.remember && record.role != Role::Recalled;
        let partition = self.partition(scope);
        let (mut chunks, mut held) = (Vec::new(), None);
        if let Some(blob) = record.chunks.filter(|_| remembered) {
            if let Some(imaged) = self.imaged(partition, (id, turn), (body_blob, &blob), &body) {
                (chunks, held) = imaged;
            } else {
                chunks = self.chunks_of(&blob, &body).unwrap_or_else(|error| {
                    tracing::warn!(session = id, turn, %error, "chunks of a turn are made anew");
                    self.stale.insert((id, turn));
                    self.cut(partition, &body.text)
                });
            }
        }
        self.state.next_commit = self.state.next_commit.max(body.head.commit.saturating_add(1));
        let source = body.source.map(String::into_boxed_str);
        let subject = body.subject.map(String::into_boxed_str);
        let expires_ms = body.expires_ms;
        let mut state = TurnState { source, subject, expires_ms, held, ..TurnState::new(record) };
        for Found { span, vectors } in chunks {
            let text = &body.text[span.start as usize..span.end as usize];
            let place = state.place(id, turn, &span);
            state.chunks.push(span);
            if span.near {
                if !record.retracted {
                    self.near.push((partition, place, span, text.into()));
                }
                continue;
            }
            let known = self.homes.enter(partition, span.id, || text.into(), (id, turn));
            if known.vectors.is_empty() && !vectors.is_empty() {
                known.vectors = vectors;
                known.home = (id, turn);
            }
            if !record.retracted {
                known.places.push(place);
            }
        }
        if !record.retracted && !state.chunks.is_empty() {
            self.state.partition_mut(scope).set_metadata(id, turn, &body.metadata);
        }
        let session = self.state.session_mut(id);
        if record.role == Role::User && !record.retracted {
            session.last_user_text = start_of(&body.text).into();
        }
        session.turns.insert(turn, state);
    }

    /// The stored chunks of a turn, if they fit its text, each other and the dimension.
    /// Those of another embedder come without vectors.
    fn chunks_of(&mut self, blob: &BlobRef, body: &Body) -> Result<Vec<Found>> {
        let mut stored = TurnChunks::decode(blob.kind, &self.state.read(blob)?)?;
        if stored.embedder.unwrap_or(self.state.store.untagged) != self.tag {
            self.has_foreign |= stored.chunks.iter().any(|chunk| !chunk.vectors.is_empty());
            stored.chunks.iter_mut().for_each(|chunk| chunk.vectors.clear());
        }
        let fits = (stored.session, stored.turn) == (body.head.session, body.head.turn)
            && stored.chunks.iter().all(|chunk| {
                let range = chunk.start as usize..chunk.end as usize;
                body.text.get(range).is_some_and(|text| !text.is_empty())
                    && chunk.vectors.len().is_multiple_of(self.state.dim())
            });
        if fits {
            let found = |chunk: TurnChunk| {
                let TurnChunk { id, start, end, near, vectors } = chunk;
                Found { span: ChunkSpan { id, start, end, near }, vectors: vectors.into() }
            };
            return Ok(stored.chunks.into_iter().map(found).collect());
        }
        Err(Error::corrupted("chunks of a turn: they do not fit its text"))
    }

    fn cut(&self, partition: usize, text: &str) -> Vec<Found> {
        let spans = chunk::spans(text, self.options.chunk_words);
        let chunk = |span: chunk::Span| {
            let id = chunk_id(self.state.store.seed, &text[span.bytes.clone()], |id| {
                self.homes.get(partition, id).map(|chunk| &*chunk.text)
            });
            let (start, end) = (span.bytes.start as u64, span.bytes.end as u64);
            let span = ChunkSpan { id, start, end, near: false };
            Found { span, vectors: Vectors::default() }
        };
        spans.into_iter().map(chunk).collect()
    }

    /// Adds the places that hold nearly a chunk's text; one whose chunk is gone becomes a chunk of its own.
    pub(super) fn near_places(&mut self) {
        for (partition, place, span, text) in std::mem::take(&mut self.near) {
            let has_home = |chunk: &&mut Chunk| chunk.places.iter().any(|place| !place.near);
            let known = self.homes.get_mut(partition, span.id).filter(has_home);
            if let Some(chunk) = known {
                chunk.places.push(place);
                continue;
            }
            let id = chunk_id(self.state.store.seed, &text, |id| {
                self.homes.get(partition, id).map(|chunk| &*chunk.text)
            });
            let home = (place.session, place.turn);
            let chunk = self.homes.enter(partition, id, || text, home);
            chunk.places.push(Place { near: false, ..place });
            self.stale.insert(home);
            let turn = self.state.session_mut(home.0).turns.get_mut(&home.1);
            for known in turn.into_iter().flat_map(|turn| &mut turn.chunks) {
                if *known == span {
                    *known = ChunkSpan { id, near: false, ..span };
                }
            }
        }
    }

    /// Embeds chunks whose vectors are lost, then indexes all that have a place.
    pub(super) fn complete_vectors(&mut self) -> Result<()> {
        let dim = self.state.dim();
        let mut chunks: Vec<Vec<Chunk>> = self.partitions.iter().map(|_| Vec::new()).collect();
        for (partition, mut chunk) in std::mem::take(&mut self.homes).chunks {
            let homes = chunk.places.iter().filter(|place| !place.near);
            let Some(first) = homes.min_by_key(|place| place.order) else { continue };
            if chunk.vectors.is_empty() && self.has_foreign {
                chunk.home = (first.session, first.turn);
                self.state.without_vectors.insert(chunk.home);
            } else if chunk.vectors.is_empty() {
                chunk.home = (first.session, first.turn);
                self.stale.insert(chunk.home);
                let units: Vec<&str> = chunk::spans(&chunk.text, self.options.chunk_words.max(1))
                    .into_iter()
                    .flat_map(|span| span.units)
                    .map(|unit| &chunk.text[unit])
                    .collect();
                let rows = self.embedder.embed(&units)?;
                if rows.len() != units.len() * dim {
                    return Err(Error::new(
                        ErrorKind::Incompatible,
                        format!(
                            "open: expected {} numbers of the embedder, got {}",
                            units.len() * dim,
                            rows.len()
                        ),
                    ));
                }
                chunk.vectors = rows.into();
            }
            chunk.places.sort_by_key(|place| (place.order, place.session, place.start));
            chunks[partition].push(chunk);
        }
        for (known, chunks) in std::mem::take(&mut self.partitions).into_iter().zip(chunks) {
            if chunks.is_empty() {
                continue;
            }
            let partition = self.state.partitions.entry(known.key);
            let partition = partition.or_insert_with(|| Partition::new(dim));
            match known.image {
                Some(image) => partition.restore(image, chunks),
                None => partition.insert_all(chunks),
            }
        }
        Ok(())
    }
}

//! Near duplicates: found before they are stored, and made chunks of their own once the text that they repeat is gone.
//! Knows nothing of search.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::read::{open, read_body};
use super::records::Change;
use super::state::PartitionKey;
use super::{Store, Writer};
use crate::format::{ChunkSpan, Key, Kind, Record, TurnChunks, TurnRecord};
use crate::partition::{Chunk, Partition, chunk_id};
use crate::{Result, Scope, TurnId, chunk};

/// A turn whose near duplicates lost the text that they repeat.
struct Orphaned {
    scope: Scope,
    turn: (u64, TurnId),
    record: TurnRecord,
    text: String,
    chunks: Vec<ChunkSpan>,
}

impl Store {
    /// The chunk whose text has the gist `said`, if `session` holds it in a turn that is none of `except`.
    pub(super) fn near<'a>(
        &self,
        partition: &'a Partition,
        said: &str,
        session: u64,
        except: Option<&Range<TurnId>>,
    ) -> Option<&'a Chunk> {
        if !self.options.hygiene.near_duplicates {
            return None;
        }
        partition.near(said, |place| {
            place.session == session && except.is_none_or(|except| !except.contains(&place.turn))
        })
    }

    /// Makes what nearly repeated a removed chunk a chunk of its own: `removed` by partition.
    pub(super) fn promote(
        &self,
        writer: &mut Writer,
        removed: &[(PartitionKey, Vec<u128>)],
    ) -> Result<()> {
        for (key, ids) in removed.iter().filter(|(_, ids)| !ids.is_empty()) {
            let ids: HashSet<u128> = ids.iter().copied().collect();
            for orphaned in self.orphaned(key, &ids)? {
                self.promote_one(writer, orphaned, &ids)?;
            }
        }
        Ok(())
    }

    fn orphaned(&self, key: &PartitionKey, removed: &HashSet<u128>) -> Result<Vec<Orphaned>> {
        let state = self.read();
        let mut orphaned = BTreeMap::new();
        for (id, session) in state.sessions_of(key) {
            let Some(scope) = &session.scope else { continue };
            for (&turn, turn_state) in &session.turns {
                let repeats = |span: &ChunkSpan| span.near && removed.contains(&span.id);
                let record = turn_state.record;
                let Some(blob) = record.body.filter(|_| !record.retracted) else { continue };
                if turn_state.chunks.iter().any(repeats) {
                    let blob = open(&state, blob)?;
                    let chunks = turn_state.chunks.clone();
                    orphaned.insert((id, turn), (scope.clone(), record, blob, chunks));
                }
            }
        }
        drop(state);
        let read = |(turn, (scope, record, blob, chunks)): ((u64, u64), (Scope, _, _, _))| {
            let text = read_body(&scope, turn.1, blob)?.text;
            Ok(Orphaned { scope, turn, record, text, chunks })
        };
        orphaned.into_iter().map(read).collect()
    }

    fn promote_one(
        &self,
        writer: &mut Writer,
        orphaned: Orphaned,
        removed: &HashSet<u128>,
    ) -> Result<()> {
        let Orphaned { scope, turn, record, text, mut chunks } = orphaned;
        // What becomes a chunk of its own: text and vectors; none of those that another turn holds by now.
        let mut fresh: Vec<(u128, &str, Vec<f32>)> = Vec::new();
        for span in chunks.iter_mut().filter(|span| span.near && removed.contains(&span.id)) {
            let part = &text[span.start as usize..span.end as usize];
            let (id, is_known) = {
                let state = self.read();
                let partition = state.partition(&scope);
                let id = chunk_id(state.store.seed, part, |id| {
                    let fresh = fresh.iter().find(|(known, ..)| *known == id);
                    let stored = partition.and_then(|partition| partition.get(id));
                    stored.map(|chunk| &*chunk.text).or(fresh.map(|(_, text, _)| *text))
                });
                (id, partition.is_some_and(|partition| partition.get(id).is_some()))
            };
            if !is_known && !fresh.iter().any(|(known, ..)| *known == id) {
                let units = chunk::spans(part, self.options.chunk_words);
                let units: Vec<&str> =
                    units.into_iter().flat_map(|span| span.units).map(|unit| &part[unit]).collect();
                fresh.push((id, part, self.embed(&units)?));
            }
            (span.id, span.near) = (id, false);
        }
        let blob = {
            let state = self.read();
            let partition = state.partition(&scope);
            let rows = chunks.iter().map(|&span| {
                let new = fresh.iter().find(|(id, ..)| *id == span.id);
                let held = partition.and_then(|partition| partition.get(span.id));
                let held = held.filter(|chunk| chunk.home == turn && !span.near);
                let vectors = new.map(|(.., vectors)| vectors.as_slice());
                (span, vectors.or(held.map(|chunk| &*chunk.vectors)).unwrap_or_default())
            });
            let payload = TurnChunks::encode(turn.0, turn.1, state.store.tag(), rows);
            writer.appender.append(Kind::Chunks, &payload)?
        };
        let record = TurnRecord { chunks: Some(blob), ..record };
        let change = Change::put(Key::Turn(turn.0, turn.1), Record::Turn(record));
        let mut guard = self.publish(writer, &[change])?;
        let state = &mut *guard;
        let session = state.sessions.get_mut(&turn.0);
        let Some(turn_state) = session.and_then(|session| session.turns.get_mut(&turn.1)) else {
            return Ok(());
        };
        let changed: Vec<ChunkSpan> =
            chunks.iter().filter(|span| !turn_state.chunks.contains(span)).copied().collect();
        turn_state.chunks = chunks;
        let places: Vec<_> =
            changed.iter().map(|span| (span.id, turn_state.place(turn.0, turn.1, span))).collect();
        let key = turn_state.version_key(turn.0, turn.1);
        let version = turn_state
            .version(turn.0, turn.1)
            .map(|(subject, version)| (subject.to_owned(), version));
        let terms = self.terms();
        let partition = state.partition_mut(&scope);
        for (id, text, vectors) in fresh {
            let (text, vectors) = (text.into(), vectors.into());
            partition.insert(&terms, Chunk { id, text, vectors, home: turn, places: Vec::new() });
        }
        for (id, place) in places {
            partition.add_place(id, place);
        }
        if let Some((subject, version)) = version {
            partition.remove_version(&subject, key);
            partition.add_version(&subject, version);
        }
        Ok(())
    }
}

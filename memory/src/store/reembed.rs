//! Embedding again: chunks whose vectors another embedder made get those of the present one, a few at a time.
//! Knows nothing of search.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::records::Change;
use super::state::State;
use super::{Store, Writer};
use crate::format::{Key, Kind, Record, SessionRecord, TurnChunks, TurnRecord};
use crate::{Result, Scope, chunk};

/// How far embedding again has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Reembedded {
    /// Sentences embedded by this call.
    pub sentences: usize,
    /// Turns that still hold chunks without vectors.
    pub turns_left: usize,
}

/// A chunk that waits: its identity, and its bytes of the turn's text.
struct Waiting {
    turn: (u64, u64),
    scope: Scope,
    id: u128,
    start: u64,
    end: u64,
}

/// Vectors of each turn's chunks by their identity, one a sentence, row-major.
type NewVectors = BTreeMap<((u64, u64), u128), Vec<f32>>;

impl Store {
    /// Embeds about `max_sentences` sentences of chunks whose vectors were another embedder's; see
    /// [`StoreOptions::reembed`](crate::StoreOptions::reembed). Call it until no turn is left: the caller paces it.
    ///
    /// What was done is on the disk; a crash loses nothing of it. Nobody waits while the embedder works.
    ///
    /// # Errors
    /// Whatever the embedder reports; `Storage`.
    pub fn reembed(&self, max_sentences: usize) -> Result<Reembedded> {
        let waiting = self.waiting(max_sentences.max(1));
        // Sentences of the turn's whole text, as they were when it was committed: a chunk alone may be cut otherwise.
        let mut texts = BTreeMap::new();
        for chunk in &waiting {
            if let Entry::Vacant(text) = texts.entry(chunk.turn) {
                let turns = self.turns(&chunk.scope, chunk.turn.1..chunk.turn.1 + 1)?;
                text.insert(turns.into_iter().next().map_or_else(String::new, |turn| turn.text));
            }
        }
        let sentences: BTreeMap<(u64, u64), Vec<Range<usize>>> = texts
            .iter()
            .map(|(turn, text)| {
                let spans = chunk::spans(text, self.options.chunk_words);
                (*turn, spans.into_iter().flat_map(|span| span.units).collect())
            })
            .collect();
        let mut units = Vec::new();
        let mut counts = Vec::with_capacity(waiting.len());
        for chunk in &waiting {
            let before = units.len();
            let text = texts[&chunk.turn].as_str();
            // A text that was cut by other rules has sentences across the borders of its chunks: each takes its part.
            let part = |unit: &Range<usize>| {
                let (start, end) = (chunk.start as usize, chunk.end as usize);
                text.get(unit.start.max(start)..unit.end.min(end)).filter(|x| !x.trim().is_empty())
            };
            units.extend(sentences[&chunk.turn].iter().filter_map(part));
            counts.push(units.len() - before);
        }
        let rows = self.embed(&units)?;
        let mut vectors = NewVectors::new();
        let mut rest = rows.as_slice();
        for (chunk, count) in waiting.iter().zip(counts) {
            let (own, tail) = rest.split_at(count * self.embedder.dim());
            vectors.insert((chunk.turn, chunk.id), own.to_vec());
            rest = tail;
        }
        let turns: BTreeMap<(u64, u64), &Scope> =
            waiting.iter().map(|chunk| (chunk.turn, &chunk.scope)).collect();
        let mut writer = self.writer()?;
        let was_pending = !self.read().without_vectors.is_empty();
        let stored = self.store_vectors(&mut writer, &turns, vectors);
        if stored.is_err() {
            writer.appender.abandon();
        }
        stored?;
        let turns_left = self.read().without_vectors.len();
        if turns_left == 0 && was_pending {
            self.renew_summaries(&mut writer)?;
        }
        Ok(Reembedded { sentences: units.len(), turns_left })
    }

    /// The chunks of the first turns that wait, whole turns, until there are enough sentences.
    fn waiting(&self, max_sentences: usize) -> Vec<Waiting> {
        let state = self.read();
        let mut waiting = Vec::new();
        let mut num_words = 0;
        for &turn in &state.without_vectors {
            // A sentence has about 25 words.
            if num_words > max_sentences.saturating_mul(25) {
                break;
            }
            let Some(session) = state.sessions.get(&turn.0) else { continue };
            let (Some(scope), Some(turn_state)) = (&session.scope, session.turns.get(&turn.1))
            else {
                continue;
            };
            let Some(partition) = state.partition(scope) else { continue };
            let mut seen = BTreeSet::new();
            let spans = turn_state.chunks.iter().filter(|span| !span.near && seen.insert(span.id));
            for span in spans {
                let Some(chunk) = partition.get(span.id) else { continue };
                if chunk.home == turn && chunk.vectors.is_empty() {
                    num_words += chunk.text.split_whitespace().count();
                    let (scope, start, end) = (scope.clone(), span.start, span.end);
                    waiting.push(Waiting { turn, scope, id: span.id, start, end });
                }
            }
            if waiting.last().is_none_or(|last| last.turn != turn) {
                // Its chunks went, or moved, since they were found waiting: nothing to embed, but to be crossed off.
                waiting.push(Waiting { turn, scope: scope.clone(), id: 0, start: 0, end: 0 });
            }
        }
        waiting
    }

    fn store_vectors(
        &self,
        writer: &mut Writer,
        turns: &BTreeMap<(u64, u64), &Scope>,
        mut vectors: NewVectors,
    ) -> Result<()> {
        let mut changes = Vec::new();
        {
            let state = self.read();
            for (&turn, scope) in turns {
                let session = state.sessions.get(&turn.0);
                let Some(turn_state) = session.and_then(|session| session.turns.get(&turn.1))
                else {
                    continue;
                };
                if turn_state.record.chunks.is_none() {
                    continue;
                }
                let partition = state.partition(scope);
                let rows = turn_state.chunks.iter().map(|&span| {
                    let chunk = partition.and_then(|partition| partition.get(span.id));
                    let held = chunk.filter(|chunk| chunk.home == turn && !span.near);
                    let new = held.and(vectors.get(&(turn, span.id)));
                    let held = held.map(|chunk| &*chunk.vectors);
                    (span, new.map(Vec::as_slice).or(held).unwrap_or_default())
                });
                let payload = TurnChunks::encode(turn.0, turn.1, state.store.tag(), rows);
                let blob = writer.appender.append(Kind::Chunks, &payload)?;
                let record = TurnRecord { chunks: Some(blob), ..turn_state.record };
                changes.push(Change::put(Key::Turn(turn.0, turn.1), Record::Turn(record)));
            }
        }
        let mut state = self.publish(writer, &changes)?;
        for (&turn, &scope) in turns {
            let ids: BTreeSet<u128> =
                vectors.range((turn, 0)..=(turn, u128::MAX)).map(|((_, id), _)| *id).collect();
            let partition = state.partition_mut(scope);
            for &id in &ids {
                let is_held = partition.get(id).is_some_and(|chunk| chunk.home == turn);
                if let Some(own) = vectors.remove(&(turn, id)).filter(|_| is_held) {
                    partition.set_vectors(id, own);
                }
            }
            if !still_waits(&state, turn, scope, &ids) {
                state.without_vectors.remove(&turn);
            }
        }
        Ok(())
    }

    /// Computes every session's running means from the vectors that its chunks have now.
    fn renew_summaries(&self, writer: &mut Writer) -> Result<()> {
        let mut changes = Vec::new();
        let mut summaries = Vec::new();
        {
            let state = self.read();
            for (&id, session) in &state.sessions {
                let Some(record) = session.record.filter(|record| record.summary.is_some()) else {
                    continue;
                };
                let summary = state.summarize(session, |_| true);
                let payload = summary.encode(state.store.tag());
                let blob = writer.appender.append(Kind::Summary, &payload)?;
                let record = SessionRecord { summary: Some(blob), ..record };
                changes.push(Change::put(Key::Session(id), Record::Session(record)));
                summaries.push((id, summary));
            }
        }
        let mut state = self.publish(writer, &changes)?;
        for (id, summary) in summaries {
            state.session_mut(id).summary = summary;
        }
        Ok(())
    }
}

/// Whether a turn holds a chunk without vectors besides the `embedded` ones: a turn that held it was forgotten meanwhile.
fn still_waits(state: &State, turn: (u64, u64), scope: &Scope, embedded: &BTreeSet<u128>) -> bool {
    let turn_state = state.sessions.get(&turn.0).and_then(|session| session.turns.get(&turn.1));
    let Some((turn_state, partition)) = turn_state.zip(state.partition(scope)) else {
        return false;
    };
    let spans = turn_state.chunks.iter();
    let mut others = spans.filter(|span| !span.near && !embedded.contains(&span.id));
    others.any(|span| {
        let chunk = partition.get(span.id);
        chunk.is_some_and(|chunk| chunk.home == turn && chunk.vectors.is_empty())
    })
}

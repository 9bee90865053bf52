//! Planning a commit: everything long is appended, what changes is listed; nothing of it counts until it is published.
//! Knows nothing of how it is published, and changes no index.

use std::collections::HashMap;
use std::ops::Range;

use super::{Cut, Embedded, Entry, Fresh, Plan};
use crate::format::{
    Body, ChunkSpan, Key, Kind, Record, SessionRecord, StoreRecord, TurnChunks, TurnHead,
    TurnRecord, encode_names,
};
use crate::hygiene::gist;
use crate::partition::{Partition, chunk_id, gist_hash};
use crate::store::records::Change;
use crate::store::state::{Session, State, counts_in_summary};
use crate::store::{Store, Writer};
use crate::summary::Summary;
use crate::{Commit, Error, ErrorKind, Result, Role, Scope, TurnId};

impl Store {
    /// Appends everything long, and lists what changes; nothing of it counts until it is published.
    pub(super) fn plan<'a>(
        &self,
        writer: &mut Writer,
        scope: &Scope,
        commit: &'a Commit,
        cuts: &[Cut<'a>],
        mut embedded: Embedded<'a>,
    ) -> Result<Plan<'a>> {
        let state = self.read();
        let known = state.session(scope);
        let session = known.map_or(state.store.next_session, |(id, _)| id);
        let known = known.map(|(_, session)| session);
        let first_turn = known.map_or(0, |session| session.num_turns);
        let mut plan = Plan {
            session,
            is_new: known.is_none(),
            first_turn,
            changes: Vec::new(),
            spans: Vec::new(),
            fresh: Vec::new(),
            fresh_at: HashMap::default(),
            fresh_by_gist: self.options.hygiene.near_duplicates.then(HashMap::default),
            num_deduplicated: 0,
            num_nearly_duplicated: 0,
            retracted: Vec::new(),
            next_order: state.next_order(scope.user_id()),
            summary: None,
        };
        let retract = commit.retract.as_ref();
        if let Some(turns) = retract {
            plan.retract(known, turns)?;
        }
        let mut summary = match known {
            Some(session) if plan.retracted.is_empty() => session.summary.clone(),
            Some(session) => {
                state.summarize(session, |turn| retract.is_none_or(|own| !own.contains(&turn)))
            }
            None => Summary::new(state.dim()),
        };
        let before = summary.clone();
        for (turn, cut) in (first_turn..).zip(cuts) {
            let near = |partition: &'_ Partition, said: &str| {
                Some(self.near(partition, said, session, retract)?.id)
            };
            plan.turn(writer, &state, scope, turn, cut, &near, &mut embedded, &mut summary)?;
        }
        match &commit.snapshot {
            Some(snapshot) => {
                plan.snapshot(writer, known, snapshot, self.options.evicted_page_bytes)?;
            }
            // What is stored was made of the turns that are taken back, too.
            None if !plan.retracted.is_empty() => {
                let known = known.into_iter();
                plan.changes.extend(known.flat_map(|known| known.without_snapshot(session)));
            }
            None => {}
        }
        let changed = before != summary || !plan.retracted.is_empty();
        plan.session(writer, &state, scope, known, changed.then_some(summary))?;
        Ok(plan)
    }
}

impl<'a> Plan<'a> {
    pub(super) fn put(&mut self, key: Key, record: Record) {
        self.changes.push(Change::put(key, record));
    }

    fn retract(&mut self, known: Option<&Session>, turns: &Range<TurnId>) -> Result<()> {
        if turns.start > turns.end {
            return Err(Error::invalid(format!(
                "commit: expected to retract turns in their order, got {turns:?}"
            )));
        }
        if turns.end > self.first_turn {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "commit: expected to retract turns up to {}, got {turns:?}",
                    self.first_turn
                ),
            ));
        }
        let known = known.iter().flat_map(|session| session.turns.range(turns.clone()));
        for (&turn, state) in known {
            if !state.record.retracted {
                let record = TurnRecord { retracted: true, ..state.record };
                self.put(Key::Turn(self.session, turn), Record::Turn(record));
                self.retracted.push(turn);
            }
        }
        Ok(())
    }

    /// The chunk whose text has the gist `said`: one that is stored, or an earlier one of this commit.
    fn twin(
        &self,
        said: &str,
        partition: Option<&Partition>,
        near: &dyn Fn(&Partition, &str) -> Option<u128>,
    ) -> Option<u128> {
        if let Some(twin) = partition.and_then(|partition| near(partition, said)) {
            return Some(twin);
        }
        let &at = self.fresh_by_gist.as_ref()?.get(&gist_hash(said)?)?;
        // Two gists may share a hash.
        Some(&self.fresh[at]).filter(|fresh| fresh.said.as_deref() == Some(said)).map(|it| it.id)
    }

    #[allow(clippy::too_many_arguments)]
    fn turn(
        &mut self,
        writer: &mut Writer,
        state: &State,
        scope: &Scope,
        turn: TurnId,
        cut: &Cut<'a>,
        near: &dyn Fn(&Partition, &str) -> Option<u128>,
        embedded: &mut Embedded<'a>,
        summary: &mut Summary,
    ) -> Result<()> {
        let new = cut.turn;
        let head = TurnHead {
            session: self.session,
            turn,
            commit: state.next_commit,
            order: cut.order.unwrap_or(self.next_order),
            time_ms: new.time_ms,
            role: new.role,
            remember: cut.remember,
        };
        let body = match cut.entry {
            Entry::Forgotten => None,
            _ => Some(writer.appender.append(Kind::Body, &Body::encode(&head, new))?),
        };
        let partition = state.partition(scope);
        let mut spans: Vec<ChunkSpan> = Vec::with_capacity(cut.spans.len());
        // Where each chunk's vectors are among `fresh`; none if an earlier turn holds them.
        let mut homes: Vec<Option<usize>> = Vec::with_capacity(cut.spans.len());
        for span in &cut.spans {
            let text: &'a str = &new.text[span.bytes.clone()];
            let id = chunk_id(state.store.seed, text, |id| {
                let stored = partition.and_then(|partition| partition.get(id));
                let fresh = self.fresh_at.get(&id).map(|&at| self.fresh[at].text);
                stored.map(|chunk| &*chunk.text).or(fresh)
            });
            let stored = partition.and_then(|partition| partition.get(id));
            let mut chunk_span = ChunkSpan {
                id,
                start: span.bytes.start as u64,
                end: span.bytes.end as u64,
                near: false,
            };
            let is_new = stored.is_none() && !self.fresh_at.contains_key(&id);
            // Only a store that looks for near duplicates needs it.
            let said = (is_new && self.fresh_by_gist.is_some()).then(|| gist(text));
            let twin = said.as_ref().and_then(|said| self.twin(said, partition, near));
            if let Some(twin) = twin {
                let stored = partition.and_then(|partition| partition.get(twin));
                let fresh = self.fresh_at.get(&twin).map(|&at| &*self.fresh[at].vectors);
                push(
                    summary,
                    new.role,
                    stored.map(|it| &*it.vectors).or(fresh).unwrap_or_default(),
                );
                (chunk_span.id, chunk_span.near) = (twin, true);
                spans.push(chunk_span);
                homes.push(None);
                self.num_nearly_duplicated += 1;
                continue;
            }
            spans.push(chunk_span);
            match (stored, self.fresh_at.get(&id).copied()) {
                (Some(chunk), _) => {
                    push(summary, new.role, &chunk.vectors);
                    homes.push(None);
                    self.num_deduplicated += 1;
                }
                (None, Some(at)) => {
                    push(summary, new.role, &self.fresh[at].vectors);
                    homes.push(None);
                    self.num_deduplicated += 1;
                }
                (None, None) => {
                    let vectors = embedded.remove(text).unwrap_or_default();
                    push(summary, new.role, &vectors);
                    homes.push(Some(self.fresh.len()));
                    self.fresh_at.insert(id, self.fresh.len());
                    let hash = said.as_deref().and_then(gist_hash);
                    if let (Some(gists), Some(hash)) = (&mut self.fresh_by_gist, hash) {
                        gists.insert(hash, self.fresh.len());
                    }
                    self.fresh.push(Fresh { id, text, vectors, turn, said });
                }
            }
        }
        let chunks = if spans.is_empty() {
            None
        } else {
            let rows = spans
                .iter()
                .zip(&homes)
                .map(|(&span, home)| (span, home.map_or(&[][..], |at| &self.fresh[at].vectors)));
            let payload = TurnChunks::encode(self.session, turn, state.store.tag(), rows);
            Some(writer.appender.append(Kind::Chunks, &payload)?)
        };
        let record = TurnRecord {
            role: new.role,
            time_ms: new.time_ms,
            order: head.order,
            remember: cut.remember,
            retracted: cut.entry == Entry::Retracted,
            body,
            chunks,
        };
        self.next_order = self.next_order.max(head.order + 1);
        self.put(Key::Turn(self.session, turn), Record::Turn(record));
        self.spans.push(spans);
        Ok(())
    }

    fn session(
        &mut self,
        writer: &mut Writer,
        state: &State,
        scope: &Scope,
        known: Option<&Session>,
        summary: Option<Summary>,
    ) -> Result<()> {
        let old = known.and_then(|session| session.record);
        if old.is_some() && summary.is_none() {
            return Ok(());
        }
        let names = match old {
            Some(old) => old.names,
            None => {
                let session = scope.session_id().unwrap_or_default();
                let names = encode_names(self.session, scope.user_id(), scope.agent_id(), session);
                let store = StoreRecord {
                    next_session: state.store.next_session + 1,
                    ..state.store.clone()
                };
                self.put(Key::Store, Record::Store(store));
                writer.appender.append(Kind::Names, &names)?
            }
        };
        let blob = match &summary {
            Some(summary) => {
                Some(writer.appender.append(Kind::Summary, &summary.encode(state.store.tag()))?)
            }
            None => old.and_then(|old| old.summary),
        };
        let record = SessionRecord { names, summary: blob };
        self.put(Key::Session(self.session), Record::Session(record));
        self.summary = summary;
        Ok(())
    }
}

fn push(summary: &mut Summary, role: Role, rows: &[f32]) {
    if counts_in_summary(role) {
        summary.push(rows);
    }
}

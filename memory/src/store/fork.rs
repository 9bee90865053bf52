//! Forking: a second session with the turns of one, and with references to the same pages and the same state.
//! Knows nothing of what a page or a state holds.
//!
//! Turns are copied, because their payloads name their session; pages, which are some thousand times larger, are not.
//! A copy keeps its turn's place among all turns of the user (`order`), which no other turn has: by it copies are known.

use std::collections::{BTreeMap, HashMap};

use super::erase::Erasure;
use super::read::{open, read_body};
use super::records::Change;
use super::state::TurnState;
use super::{Store, Writer};
use crate::format::{
    Body, ChunkSpan, Key, Kind, Record, SessionRecord, StoreRecord, TurnChunks, TurnHead,
    TurnRecord, encode_names,
};
use crate::{Error, ErrorKind, Metadata, NewTurn, Result, Role, Scope, TurnId};

/// A turn of the new session, as far as memory keeps it.
struct Copied {
    turn: TurnId,
    state: TurnState,
    metadata: Metadata,
}

/// A fork that lies in the segments, and is to be published.
struct Fork {
    id: u64,
    parent: u64,
    changes: Vec<Change>,
    turns: Vec<Copied>,
    last_user_text: Box<str>,
}

/// What a turn and its copies have in common, and no other turn of the user has.
pub(super) type Said = (u64, TurnId, i64, Role);

/// What is common to a turn and its copies; none of a forgotten turn.
pub(super) fn said(turn: TurnId, record: &TurnRecord) -> Option<Said> {
    record.body.map(|_| (record.order, turn, record.time_ms, record.role))
}

impl Store {
    /// Begins the session `name` of the same user and agent as a copy of the scope's session: its log with the numbers of
    /// its turns, its snapshot and its pages. From then on each goes its own way. Returns the new session's scope.
    ///
    /// Atomic, and durable when it returns, as [`Store::commit`]. Turns are copied; the bytes of the state and of the
    /// pages are shared, until neither session needs them. Each counts them within its own
    /// [`StoreOptions::evicted_page_bytes`](crate::StoreOptions::evicted_page_bytes).
    /// A copied turn keeps its time and its age, and speaks about its subject together with its original.
    ///
    /// # Errors
    /// `NotFound` if the scope's session has nothing stored; `InvalidArgument` if `name` is taken or no name of a session;
    /// `Corrupted` if one of the turns is damaged; `Storage`. Nothing changes on an error, except as for [`Store::commit`].
    ///
    /// # Cost
    /// Two syncs of the disk; reads and writes the session's texts and tokens once, about 10 bytes for each token of its
    /// stream, and a record of 60 bytes for each page. No text is embedded.
    pub fn fork(&self, scope: &Scope, name: &str) -> Result<Scope> {
        scope.check_session("fork")?;
        let to = scope.clone().session(name);
        to.check_session("fork")?;
        let mut writer = self.writer()?;
        let planned = self.plan_fork(&mut writer, scope, &to);
        let done = planned.and_then(|fork| self.carry_out_fork(&mut writer, &to, fork));
        match &done {
            Ok(()) => {
                self.compact_one(&mut writer);
                self.index_in_background();
            }
            Err(_) => writer.appender.abandon(),
        }
        done.map(|()| to)
    }

    /// Appends everything long, and lists what changes; nothing of it counts until it is published.
    fn plan_fork(&self, writer: &mut Writer, scope: &Scope, to: &Scope) -> Result<Fork> {
        let mut bodies = Vec::new();
        let (mut fork, summary, commit, tag) = {
            let state = self.read();
            let Some((parent, session)) = state.session(scope) else {
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("fork: session {scope} holds nothing yet, expected one with a turn"),
                ));
            };
            if state.session(to).is_some() {
                return Err(Error::invalid(format!(
                    "fork: session {to} is there already, expected a name that is not taken"
                )));
            }
            for turn in 0..session.num_turns {
                let known = session.turns.get(&turn).ok_or_else(|| {
                    Error::corrupted(format!(
                        "fork: turn {turn} of {scope} is lost, expected a session that `doctor` finds whole"
                    ))
                })?;
                let body = known.record.body.map(|blob| open(&state, blob)).transpose()?;
                bodies.push((turn, known.record, known.chunks.clone(), body));
            }
            let id = state.store.next_session;
            let store = StoreRecord { next_session: id + 1, ..state.store.clone() };
            let mut changes = vec![Change::put(Key::Store, Record::Store(store))];
            let snapshot = session.snapshot.map(Record::Snapshot);
            changes.extend(snapshot.map(|record| Change::put(Key::Snapshot(id), record)));
            let pages = session.pages.iter();
            changes
                .extend(pages.map(|(page, record)| {
                    Change::put(Key::Page(id, *page), Record::Page(*record))
                }));
            let last_user_text = session.last_user_text.clone();
            let fork = Fork { id, parent, changes, turns: Vec::new(), last_user_text };
            let summary = session.record.and_then(|record| record.summary);
            let summary = summary.map(|_| session.summary.encode(state.store.tag()));
            (fork, summary, state.next_commit, state.store.tag())
        };
        let summary = summary.map(|bytes| writer.appender.append(Kind::Summary, &bytes));
        let session = to.session_id().unwrap_or_default();
        let names = encode_names(fork.id, to.user_id(), to.agent_id(), session);
        let names = writer.appender.append(Kind::Names, &names)?;
        let record = SessionRecord { names, summary: summary.transpose()? };
        fork.changes.push(Change::put(Key::Session(fork.id), Record::Session(record)));
        for (turn, record, chunks, body) in bodies {
            let body = body.map(|body| read_body(scope, turn, body)).transpose()?;
            fork.turn(writer, turn, (record, chunks, body), (commit, tag))?;
        }
        Ok(fork)
    }

    fn carry_out_fork(&self, writer: &mut Writer, to: &Scope, fork: Fork) -> Result<()> {
        let mut guard = self.publish(writer, &fork.changes)?;
        let state = &mut *guard;
        state.name(fork.id, to.clone());
        state.next_commit += 1;
        let summary = state.sessions.get(&fork.parent).map(|parent| parent.summary.clone());
        let session = state.session_mut(fork.id);
        session.last_user_text = fork.last_user_text;
        if let Some(summary) = summary {
            session.summary = summary;
        }
        for copied in &fork.turns {
            session.turns.insert(copied.turn, copied.state.clone());
        }
        let partition = state.partition_mut(to);
        for Copied { turn, state, metadata } in &fork.turns {
            for span in &state.chunks {
                partition.add_place(span.id, state.place(fork.id, *turn, span));
            }
            if !state.chunks.is_empty() {
                partition.set_metadata(fork.id, *turn, metadata);
            }
        }
        // After all places: a version marks those of its turn.
        for Copied { turn, state, .. } in &fork.turns {
            if let Some((subject, version)) = state.version(fork.id, *turn) {
                partition.add_version(subject, version);
            }
        }
        Ok(())
    }

    /// The order of a turn of the scope's session, if it is the one that was said like this.
    pub(super) fn order_of(
        &self,
        scope: &Scope,
        turn: TurnId,
        time_ms: i64,
        role: Role,
    ) -> Option<u64> {
        let state = self.read();
        let record = state.session(scope)?.1.turns.get(&turn)?.record;
        let is_it = said(turn, &record) == Some((record.order, turn, time_ms, role));
        is_it.then_some(record.order)
    }

    /// Adds the copies of what is to be erased: all of them, but not what a whole session got from an older one.
    pub(super) fn add_copies(&self, scope: &Scope, erasure: &mut Erasure) -> Result<()> {
        let state = self.read();
        let mut holders: HashMap<Said, Vec<u64>> = HashMap::new();
        for &(id, turn) in erasure.turns.keys() {
            let known = state.sessions.get(&id).and_then(|session| session.turns.get(&turn));
            let known = known.and_then(|known| said(turn, &known.record));
            holders.extend(known.map(|known| (known, Vec::new())));
        }
        let user = Scope::user(scope.user_id());
        let mut sessions = BTreeMap::new();
        for (id, session_scope, session) in state.sessions_in(&user) {
            for (&turn, known) in &session.turns {
                let known = said(turn, &known.record);
                if let Some(holders) = known.and_then(|known| holders.get_mut(&known)) {
                    holders.push(id);
                    sessions.insert(id, (session_scope, session));
                }
            }
        }
        for ((_, turn, ..), holders) in holders {
            // A session that is forked is older than its forks.
            let owner = holders.iter().min();
            let is_erased = |id: &u64| erasure.turns.contains_key(&(*id, turn));
            if !erasure.whole.is_empty() && !owner.is_some_and(is_erased) {
                continue;
            }
            let copies: Vec<u64> = holders.iter().copied().filter(|id| !is_erased(id)).collect();
            for id in copies {
                let Some((session_scope, session)) = sessions.get(&id) else { continue };
                let Some(body) = self.body(&state, session_scope, session, turn) else { continue };
                erasure.turns.insert((id, turn), body.map(|body| body.text));
            }
        }
        Ok(())
    }
}

impl Fork {
    /// Appends the copy of a turn: its record, chunks and body, none if it was forgotten.
    fn turn(
        &mut self,
        writer: &mut Writer,
        turn: TurnId,
        (record, chunks, body): (TurnRecord, Vec<ChunkSpan>, Option<Body>),
        (commit, tag): (u64, u64),
    ) -> Result<()> {
        let key = Key::Turn(self.id, turn);
        let Some(body) = body else {
            self.changes.push(Change::put(key, Record::Turn(record)));
            return Ok(());
        };
        let head = TurnHead { session: self.id, turn, commit, ..body.head };
        let Body { text, tokens, source, subject, expires_ms, metadata, .. } = body;
        let new = NewTurn {
            role: record.role,
            text,
            time_ms: record.time_ms,
            tokens,
            source,
            remember: record.remember,
            subject,
            expires_ms,
            metadata,
        };
        let body = writer.appender.append(Kind::Body, &Body::encode(&head, &new))?;
        // What was taken back is searched by nobody; the vectors of the others lie in the original's record.
        let spans = if record.retracted { Vec::new() } else { chunks };
        let chunks = match spans.is_empty() {
            true => None,
            false => {
                let rows = spans.iter().map(|span| (*span, &[][..]));
                let payload = TurnChunks::encode(self.id, turn, tag, rows);
                Some(writer.appender.append(Kind::Chunks, &payload)?)
            }
        };
        let record = TurnRecord { body: Some(body), chunks, ..record };
        self.changes.push(Change::put(key, Record::Turn(record)));
        let mut state = TurnState::new(record);
        state.chunks = spans;
        state.source = new.source.map(String::into_boxed_str);
        state.subject = new.subject.map(String::into_boxed_str);
        state.expires_ms = new.expires_ms;
        self.turns.push(Copied { turn, state, metadata: new.metadata });
        Ok(())
    }
}

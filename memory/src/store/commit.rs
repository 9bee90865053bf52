//! Commits: turns, snapshot and retraction of one session, all of it or nothing.
//! Knows nothing of search; it plans under the writer's lock and applies after the disk has it.

mod pages;

use std::collections::{BTreeSet, HashMap};

use self::pages::check_pages;
use super::records::Change;
use super::state::{Session, State, counts_in_summary};
use super::{Store, Writer};
use crate::filter::check_metadata;
use crate::format::{
    Body, ChunkSpan, Key, Kind, Record, SessionRecord, StoreRecord, TurnChunks, TurnHead,
    TurnRecord, encode_names,
};
use crate::hygiene::{Verdict, gist};
use crate::partition::{Chunk, Partition, chunk_id};
use crate::summary::Summary;
use crate::vectors::normalize;
use crate::{Commit, Committed, Error, ErrorKind, NewTurn, Result, Role, Scope, TurnId, chunk};

/// How much of a user turn is kept at hand for the short question that may follow.
const LAST_USER_TEXT_BYTES: usize = 2048;

/// The longest subject of a turn.
const MAX_SUBJECT_BYTES: usize = 256;

/// How a turn enters the log: as a new one does, or as it stood in another log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    New,
    Retracted,
    Forgotten,
}

/// A turn cut into chunks, before the writer's lock is taken.
struct Cut<'a> {
    turn: &'a NewTurn,
    entry: Entry,
    /// Whether it may be recalled.
    remember: bool,
    spans: Vec<chunk::Span>,
}

/// What a commit will do to the indexes once it is on the disk.
struct Plan<'a> {
    session: u64,
    is_new: bool,
    first_turn: TurnId,
    changes: Vec<Change>,
    /// The chunks of each appended turn.
    spans: Vec<Vec<ChunkSpan>>,
    /// Chunks that the partition does not know: identity, text, vectors, turn.
    fresh: Vec<(u128, &'a str, Vec<f32>, TurnId)>,
    /// Where a chunk is among `fresh`.
    fresh_at: HashMap<u128, usize>,
    /// The chunk of `fresh` that says a gist first; not kept where near duplicates are stored.
    fresh_by_gist: Option<HashMap<String, u128>>,
    num_deduplicated: usize,
    num_nearly_duplicated: usize,
    retracted: Vec<TurnId>,
    next_order: u64,
    summary: Option<Summary>,
}

impl Store {
    /// Applies `commit` to the scope's session, which is made if it does not exist.
    ///
    /// Atomic, and durable when it returns: after a crash at any moment the session holds all of it or nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for a scope without session, a page named twice, or a window page that is neither given nor
    /// stored; `NotFound` if `retract` is beyond the log; `Storage` if the disk refuses. Nothing changes on an error,
    /// except that after a `Storage` error from the database itself the store must be opened again to be written.
    ///
    /// # Cost
    /// Two syncs of the disk, and the embedding of chunks that are new to the scope.
    pub fn commit(&self, scope: &Scope, commit: Commit) -> Result<Committed> {
        scope.check_session("commit")?;
        if let Some(snapshot) = &commit.snapshot {
            check_pages(snapshot)?;
        }
        if commit.turns.is_empty() && commit.snapshot.is_none() && commit.retract.is_none() {
            return Ok(Committed::default());
        }
        let verdict = self.examine(&commit)?;
        let turns = commit.turns.iter().zip(&verdict.withheld);
        let cuts = turns.map(|(turn, withheld)| self.cut(turn, Entry::New, *withheld)).collect();
        let mut done = self.commit_cuts(scope, &commit, cuts, HashMap::new())?;
        done.findings = verdict.findings;
        Ok(done)
    }

    /// Appends turns whose vectors are ready: `vectors` has one for each turn, `(turns, dim)`, scaled to unit length here.
    ///
    /// Each turn is one chunk: its text is not cut, and the embedder is not asked. The vectors are to be what the store's
    /// embedder gives for such texts, because questions are embedded by it, and so are the texts if the vectors on the disk
    /// are damaged or [`Store::reembed`] takes another embedder over. Otherwise it is as [`Store::commit`]: what is known
    /// is counted, and the vector of a turn that is not to be remembered is left out.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use mka_memory::{HashedEmbedder, NewTurn, Recall, Role, Scope, Store, StoreOptions};
    /// # fn main() -> mka_memory::Result<()> {
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let store = Store::open(folder.path(), Arc::new(HashedEmbedder::new()), StoreOptions::default())?;
    /// let texts = ["Herons nest by the lake.", "The bridge is closed."];
    /// let vectors = store.embed(&texts)?; // or from where they were made before
    /// let turns = texts.map(|text| NewTurn::new(Role::Document, text)).into();
    /// store.commit_embedded(&Scope::user("ada").session("birds"), turns, &vectors)?;
    /// let hits = store.recall(&Scope::user("ada"), "where do herons nest", &Recall::default())?;
    /// assert_eq!(hits[0].text, texts[0]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Store::commit`]; `InvalidArgument` if the numbers do not make one finite vector a turn, or a turn that is to be
    /// remembered has no text.
    pub fn commit_embedded(
        &self,
        scope: &Scope,
        turns: Vec<NewTurn>,
        vectors: &[f32],
    ) -> Result<Committed> {
        scope.check_session("commit_embedded")?;
        let dim = self.dim();
        if vectors.len() != turns.len() * dim || vectors.iter().any(|number| !number.is_finite()) {
            return Err(Error::invalid(format!(
                "commit_embedded: expected {} vectors of {dim} finite numbers, got {} numbers",
                turns.len(),
                vectors.len()
            )));
        }
        if turns.is_empty() {
            return Ok(Committed::default());
        }
        let commit = Commit { turns, ..Commit::default() };
        let verdict = self.examine(&commit)?;
        let mut embedded = HashMap::with_capacity(commit.turns.len());
        let mut cuts = Vec::with_capacity(commit.turns.len());
        let turns = commit.turns.iter().zip(&verdict.withheld).zip(vectors.chunks_exact(dim));
        for (at, ((turn, withheld), vector)) in turns.enumerate() {
            let (remember, text) = (turn.remember && !withheld, turn.text.trim());
            let mut spans = Vec::new();
            if remember && turn.role != Role::Recalled {
                if text.is_empty() {
                    return Err(Error::invalid(format!(
                        "commit_embedded: expected a text with each vector, turn {at} has none"
                    )));
                }
                let start = turn.text.len() - turn.text.trim_start().len();
                let bytes = start..start + text.len();
                embedded.entry(text).or_insert_with(|| {
                    let mut vector = vector.to_vec();
                    normalize(&mut vector);
                    vector
                });
                spans.push(chunk::Span { bytes: bytes.clone(), units: vec![bytes] });
            }
            cuts.push(Cut { turn, entry: Entry::New, remember, spans });
        }
        let mut done = self.commit_cuts(scope, &commit, cuts, embedded)?;
        done.findings = verdict.findings;
        Ok(done)
    }

    /// Checks what is asked of every new turn, and looks for what is not to be stored.
    fn examine(&self, commit: &Commit) -> Result<Verdict> {
        commit.turns.iter().try_for_each(|turn| check_metadata(&turn.metadata))?;
        commit.turns.iter().try_for_each(check_subject)?;
        self.options.hygiene.examine(&commit.turns)
    }

    /// Appends turns of another store's log as they stood there.
    pub(super) fn append_log(
        &self,
        scope: &Scope,
        turns: &[(NewTurn, Entry)],
    ) -> Result<Committed> {
        turns.iter().try_for_each(|(turn, _)| check_metadata(&turn.metadata))?;
        let cuts = turns.iter().map(|(turn, entry)| self.cut(turn, *entry, false)).collect();
        self.commit_cuts(scope, &Commit::default(), cuts, HashMap::new())
    }

    /// `embedded`: vectors of chunks, by their text, that the embedder need not make.
    fn commit_cuts<'a>(
        &self,
        scope: &Scope,
        commit: &'a Commit,
        cuts: Vec<Cut<'a>>,
        mut embedded: HashMap<&'a str, Vec<f32>>,
    ) -> Result<Committed> {
        self.embed_unknown(scope, &cuts, commit.retract, &mut embedded)?;
        let mut writer = self.writer()?;
        // A chunk that was known may have been forgotten meanwhile.
        self.embed_unknown(scope, &cuts, commit.retract, &mut embedded)?;
        let planned = self.plan(&mut writer, scope, commit, &cuts, embedded);
        let done = planned.and_then(|plan| self.carry_out(&mut writer, scope, &cuts, plan));
        match &done {
            Ok(_) => {
                self.compact_one(&mut writer);
                self.index_in_background();
            }
            Err(_) => writer.appender.abandon(),
        }
        done
    }

    fn cut<'a>(&self, turn: &'a NewTurn, entry: Entry, withheld: bool) -> Cut<'a> {
        let remember = turn.remember && !withheld;
        let spans = if remember && turn.role != Role::Recalled && entry == Entry::New {
            chunk::spans(&turn.text, self.options.chunk_words)
        } else {
            Vec::new()
        };
        Cut { turn, entry, remember, spans }
    }

    /// Embeds the sentences of all chunks that neither the partition nor `embedded` has.
    fn embed_unknown<'a>(
        &self,
        scope: &Scope,
        cuts: &[Cut<'a>],
        retract: Option<TurnId>,
        embedded: &mut HashMap<&'a str, Vec<f32>>,
    ) -> Result<()> {
        let mut unknown: Vec<(&'a str, Vec<&'a str>)> = Vec::new();
        {
            let state = self.read();
            let partition = state.partition(scope);
            let mut seen = BTreeSet::new();
            for cut in cuts {
                for span in &cut.spans {
                    let text = &cut.turn.text[span.bytes.clone()];
                    if embedded.contains_key(text) {
                        continue;
                    }
                    let id = known_id(state.store.seed, text, partition);
                    let is_known = partition.is_some_and(|partition| {
                        let session = state.session(scope).map(|(session, _)| session);
                        let is_near =
                            |session| self.near(partition, text, session, retract).is_some();
                        partition.get(id).is_some() || session.is_some_and(is_near)
                    });
                    if !is_known && seen.insert(text) {
                        let units = span.units.iter().map(|unit| &cut.turn.text[unit.clone()]);
                        unknown.push((text, units.collect()));
                    }
                }
            }
        }
        let texts: Vec<&str> = unknown.iter().flat_map(|(_, units)| units).copied().collect();
        let rows = self.embed(&texts)?;
        let mut rest = rows.as_slice();
        for (text, units) in unknown {
            let (vectors, tail) = rest.split_at(units.len() * self.embedder.dim());
            embedded.insert(text, vectors.to_vec());
            rest = tail;
        }
        Ok(())
    }

    /// Appends everything long, and lists what changes; nothing of it counts until it is published.
    fn plan<'a>(
        &self,
        writer: &mut Writer,
        scope: &Scope,
        commit: &'a Commit,
        cuts: &[Cut<'a>],
        mut embedded: HashMap<&'a str, Vec<f32>>,
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
            fresh_at: HashMap::new(),
            fresh_by_gist: self.options.hygiene.near_duplicates.then(HashMap::new),
            num_deduplicated: 0,
            num_nearly_duplicated: 0,
            retracted: Vec::new(),
            next_order: state.next_order(scope.user_id()),
            summary: None,
        };
        if let Some(from) = commit.retract {
            plan.retract(known, from)?;
        }
        let mut summary = match known {
            Some(session) if plan.retracted.is_empty() => session.summary.clone(),
            Some(session) => state.summarize(session, |turn| Some(turn) < commit.retract),
            None => Summary::new(state.dim()),
        };
        let before = summary.clone();
        for (turn, cut) in (first_turn..).zip(cuts) {
            let near = |partition: &'_ Partition, text: &str| {
                Some(self.near(partition, text, session, commit.retract)?.id)
            };
            plan.turn(writer, &state, scope, turn, cut, &near, &mut embedded, &mut summary)?;
        }
        if let Some(snapshot) = &commit.snapshot {
            plan.snapshot(writer, known, snapshot, self.options.evicted_page_bytes)?;
        }
        let changed = before != summary || !plan.retracted.is_empty();
        plan.session(writer, &state, scope, known, changed.then_some(summary))?;
        Ok(plan)
    }

    fn carry_out(
        &self,
        writer: &mut Writer,
        scope: &Scope,
        cuts: &[Cut<'_>],
        plan: Plan<'_>,
    ) -> Result<Committed> {
        let mut guard = self.publish(writer, &plan.changes)?;
        let state = &mut *guard;
        if plan.is_new {
            state.name(plan.session, scope.clone());
        }
        state.next_commit += 1;
        state.orders.insert(scope.user_id().to_owned(), plan.next_order);
        let turns: Vec<TurnId> = (plan.first_turn..).take(cuts.len()).collect();
        let mut places = Vec::new();
        let mut versions = Vec::new();
        let mut dropped = Vec::new();
        let mut silenced = Vec::new();
        if let Some(session) = state.sessions.get_mut(&plan.session) {
            for ((&id, cut), spans) in turns.iter().zip(cuts).zip(plan.spans) {
                let Some(turn) = session.turns.get_mut(&id) else { continue };
                turn.chunks = spans;
                if cut.entry == Entry::Forgotten {
                    continue;
                }
                turn.source = cut.turn.source.as_deref().map(Box::from);
                turn.subject = cut.turn.subject.as_deref().map(Box::from);
                turn.expires_ms = cut.turn.expires_ms;
                places.extend(
                    turn.chunks.iter().map(|span| (span.id, turn.place(plan.session, id, span))),
                );
                versions.extend(
                    turn.version(plan.session, id)
                        .map(|(subject, version)| (subject.to_owned(), version)),
                );
                if cut.turn.role == Role::User && cut.entry == Entry::New {
                    session.last_user_text = start_of(&cut.turn.text).into();
                }
            }
            for turn in &plan.retracted {
                let Some(state) = session.turns.get(turn) else { continue };
                dropped.extend(state.chunks.iter().map(|chunk| (*turn, chunk.id)));
                silenced.extend(state.subject.clone().map(|subject| (subject, *turn)));
            }
            if let Some(summary) = plan.summary {
                session.summary = summary;
            }
        }
        let committed = Committed {
            turns,
            chunks_added: plan.fresh.len(),
            chunks_deduplicated: plan.num_deduplicated,
            chunks_nearly_duplicated: plan.num_nearly_duplicated,
            findings: Vec::new(),
        };
        let partition = state.partition_mut(scope);
        for (id, text, vectors, turn) in plan.fresh {
            let home = (plan.session, turn);
            let (text, vectors) = (text.into(), vectors.into());
            let chunk = Chunk { id, text, vectors, home, places: Vec::with_capacity(1) };
            partition.insert(&writer.terms, chunk);
        }
        for (id, place) in places {
            partition.add_place(id, place);
        }
        for (&turn, cut) in committed.turns.iter().zip(cuts) {
            if !cut.spans.is_empty() {
                partition.set_metadata(plan.session, turn, &cut.turn.metadata);
            }
        }
        // After the new places: a text that is retracted and said again keeps its chunk.
        let mut bare = Vec::new();
        for (turn, id) in dropped {
            bare.extend(partition.remove_places(std::iter::once(id), plan.session, turn));
        }
        partition.remove(&writer.terms, &bare);
        for (subject, turn) in silenced {
            partition.remove_version(&subject, (plan.session, turn));
        }
        for (subject, version) in versions {
            partition.add_version(&subject, version);
        }
        drop(guard);
        if !plan.retracted.is_empty() {
            self.refresh_last_user_text(plan.session);
        }
        if let Err(error) = self.promote(writer, &[(scope.clone(), bare)]) {
            // The commit is durable; the next opening makes up for it.
            writer.appender.abandon();
            tracing::warn!(%error, "near duplicates of retracted text are not recalled");
        }
        Ok(committed)
    }

    /// Reads the start of a session's latest user turn anew, after that turn may have been taken back.
    pub(super) fn refresh_last_user_text(&self, id: u64) {
        let latest = {
            let state = self.read();
            let session = state.sessions.get(&id);
            let turns = session.into_iter().flat_map(|session| session.turns.values().rev());
            let mut spoken = turns
                .filter(|turn| turn.record.role == Role::User && !turn.record.retracted)
                .filter_map(|turn| turn.record.body);
            // A damaged turn is passed over, as it is when the store is opened.
            spoken.find_map(|body| Body::decode(body.kind, &state.read(&body).ok()?).ok())
        };
        if let Some(session) = self.write().sessions.get_mut(&id) {
            session.last_user_text = latest.as_ref().map_or("", |body| start_of(&body.text)).into();
        }
    }
}

impl<'a> Plan<'a> {
    fn put(&mut self, key: Key, record: Record) {
        self.changes.push(Change::put(key, record));
    }

    fn retract(&mut self, known: Option<&Session>, from: TurnId) -> Result<()> {
        if from > self.first_turn {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "commit: expected to retract from a turn up to {}, got {from}",
                    self.first_turn
                ),
            ));
        }
        for (&turn, state) in known.iter().flat_map(|session| session.turns.range(from..)) {
            if !state.record.retracted {
                let record = TurnRecord { retracted: true, ..state.record };
                self.put(Key::Turn(self.session, turn), Record::Turn(record));
                self.retracted.push(turn);
            }
        }
        Ok(())
    }

    /// The chunk that says what `text` says: one that is stored, or an earlier one of this commit.
    fn twin(
        &self,
        text: &str,
        partition: Option<&Partition>,
        near: &dyn Fn(&Partition, &str) -> Option<u128>,
    ) -> Option<u128> {
        let gists = self.fresh_by_gist.as_ref()?;
        if let Some(twin) = partition.and_then(|partition| near(partition, text)) {
            return Some(twin);
        }
        let said = gist(text);
        gists.get(&said).filter(|_| !said.is_empty()).copied()
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
        embedded: &mut HashMap<&'a str, Vec<f32>>,
        summary: &mut Summary,
    ) -> Result<()> {
        let new = cut.turn;
        let head = TurnHead {
            session: self.session,
            turn,
            commit: state.next_commit,
            order: self.next_order,
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
                let fresh = self.fresh_at.get(&id).map(|&at| self.fresh[at].1);
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
            let twin = is_new.then(|| self.twin(text, partition, near)).flatten();
            if let Some(twin) = twin {
                let stored = partition.and_then(|partition| partition.get(twin));
                let fresh = self.fresh_at.get(&twin).map(|&at| &*self.fresh[at].2);
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
                    push(summary, new.role, &self.fresh[at].2);
                    homes.push(None);
                    self.num_deduplicated += 1;
                }
                (None, None) => {
                    let vectors = embedded.remove(text).unwrap_or_default();
                    push(summary, new.role, &vectors);
                    homes.push(Some(self.fresh.len()));
                    self.fresh_at.insert(id, self.fresh.len());
                    if let Some(gists) = &mut self.fresh_by_gist {
                        gists.insert(gist(text), id);
                    }
                    self.fresh.push((id, text, vectors, turn));
                }
            }
        }
        let chunks = if spans.is_empty() {
            None
        } else {
            let rows = spans
                .iter()
                .zip(&homes)
                .map(|(&span, home)| (span, home.map_or(&[][..], |at| &self.fresh[at].2)));
            let payload = TurnChunks::encode(self.session, turn, state.store.tag(), rows);
            Some(writer.appender.append(Kind::Chunks, &payload)?)
        };
        let record = TurnRecord {
            role: new.role,
            time_ms: new.time_ms,
            order: self.next_order,
            remember: cut.remember,
            retracted: cut.entry == Entry::Retracted,
            body,
            chunks,
        };
        self.next_order += 1;
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

fn check_subject(turn: &NewTurn) -> Result<()> {
    match turn.subject.as_ref().map(String::len) {
        None | Some(1..=MAX_SUBJECT_BYTES) => Ok(()),
        Some(len) => Err(Error::invalid(format!(
            "commit: expected a subject of 1 to {MAX_SUBJECT_BYTES} bytes, got {len}"
        ))),
    }
}

fn known_id(seed: u64, text: &str, partition: Option<&Partition>) -> u128 {
    chunk_id(seed, text, |id| Some(&*partition?.get(id)?.text))
}

fn push(summary: &mut Summary, role: Role, rows: &[f32]) {
    if counts_in_summary(role) {
        summary.push(rows);
    }
}

/// The first bytes of a text, cut at a character.
pub(super) fn start_of(text: &str) -> &str {
    let mut end = text.len().min(LAST_USER_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

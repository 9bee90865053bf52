//! Forgetting: what a selector names leaves the log, the indexes, the pages, the summaries and the files.
//! Knows nothing of search; the receipt holds digests, never the text.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use xxhash_rust::xxh3::xxh3_64;

use super::quotes::{Quotable, folded, is_telling};
use super::read::{open, read_body};
use super::records::Change;
use super::state::{PartitionKey, Session, State, TurnState, partition_key};
use super::{Store, Writer};
use crate::filter::ENGINE_KEYS;
use crate::format::{
    Body, Key, Kind, Record, StoreRecord, TurnChunks, TurnRecord, chunk_digest, turn_digest,
};
use crate::partition::{Chunk, Place};
use crate::summary::Summary;
use crate::{Error, Forget, Receipt, Result, Role, Scope, TurnId};

/// Turns to erase, each with its text; none if the text is damaged and cannot be read.
type Erased = BTreeMap<(u64, u64), Option<String>>;

/// What an erasure does, before it is carried out.
#[derive(Default)]
pub(super) struct Erasure {
    pub(super) turns: Erased,
    /// Sessions that lose their place in the log, too.
    pub(super) whole: BTreeSet<u64>,
    /// Chunks whose vectors must move to another turn's record: session of the partition, identity, new home.
    moved: BTreeMap<(u64, u128), (u64, u64)>,
    summaries: BTreeMap<u64, Summary>,
    receipt: Option<Receipt>,
}

impl Store {
    /// Erases what `selector` names within `scope`, and compacts until its bytes are in no file of the store.
    ///
    /// An erased turn keeps its number, role and time, and nothing else; `Session` and `Everything` remove even that.
    /// Backups and exports that were made before are files of the caller's, and keep it.
    /// A session that loses a turn loses its snapshot and pages, which may hold the text, and its summary is made anew.
    /// A turn that was told before a [`fork`](Self::fork) is one turn: it is erased in every session that holds it.
    /// Only where a whole session is forgotten, what it got from the session that it was forked from stays there.
    /// Turns in which memory quoted an erased chunk, or a sentence of it, back to a model ([`Role::Recalled`]) are erased with
    /// it, in all sessions of the user: a sentence of eight letters at least, or four with a digit. A turn that is damaged and cannot be read counts as matching any text.
    /// What a model said about the text in its own words is found by `Matching` alone.
    ///
    /// In a store whose database lost records, the bytes that only those referred to go as well.
    /// Bytes that the file system or the drive keeps after a file is removed are beyond this library's reach. A removed
    /// segment lasts, without a name, as long as a page of it is mapped ([`map_page`](Self::map_page)).
    ///
    /// # Errors
    /// `InvalidArgument` for an empty text, a filter that accepts every turn or none, no turns, or a selector that needs a
    /// session and a scope without one; `NotFound` for a turn beyond the log, and then none of the others goes; `Corrupted`
    /// while two sessions of the user have one name, as a repair of an earlier version could leave them: `doctor` with
    /// repair gives each its own. If it fails half-way, the rest is done when the store is opened next.
    ///
    /// # Cost
    /// Reads every turn of the scope for `Matching`; rewrites every segment that holds unused bytes.
    pub fn forget(&self, scope: &Scope, selector: &Forget) -> Result<Receipt> {
        match selector {
            Forget::Turn(_) | Forget::Turns(_) | Forget::Session => {
                scope.check_session("forget")?;
            }
            _ => scope.check("forget")?,
        }
        if matches!(selector, Forget::Turns(turns) if turns.is_empty()) {
            return Err(Error::invalid("forget: expected one turn at least, got none"));
        }
        if matches!(selector, Forget::Matching(text) if text.is_empty()) {
            return Err(Error::invalid("forget: expected a text to match, got an empty one"));
        }
        if let Forget::Filter(filter) = selector {
            filter.check("forget")?;
            if let Some(accepts) = filter.constant() {
                let which = if accepts { "every" } else { "no" };
                return Err(Error::invalid(format!(
                    "forget: expected a filter that depends on a key, got one that accepts {which} turn"
                )));
            }
        }
        let mut writer = self.writer()?;
        let mut erasure = self.select(scope, selector)?;
        self.add_copies(scope, &mut erasure)?;
        self.add_quotes(scope, &mut erasure)?;
        let changes = match self.plan_erasure(&mut writer, scope, selector, &mut erasure) {
            Ok(changes) => changes,
            Err(error) => {
                writer.appender.abandon();
                return Err(error);
            }
        };
        let mut receipt =
            erasure.receipt.take().ok_or_else(|| Error::invalid("forget: nothing was planned"))?;
        let removed = self.carry_out_erasure(&mut writer, &changes, erasure)?;
        let touched: Vec<PartitionKey> = removed.iter().map(|(key, _)| key.clone()).collect();
        self.remove_images(&touched)?;
        self.promote(&mut writer, &removed)?;
        receipt.segments = self.purge(&mut writer)?;
        self.index_in_background();
        Ok(receipt)
    }

    /// Checks the files against a receipt: no record of an erased turn or chunk is left, used or unused, no image of the
    /// index knows one, and the segments that held them are gone.
    ///
    /// # Errors
    /// `Corrupted` if something is left: the text says how much.
    ///
    /// # Cost
    /// Reads every segment and every image once.
    pub fn verify(&self, receipt: &Receipt) -> Result<()> {
        let (seed, segments) = {
            let state = self.read();
            (state.store.seed, state.segments.values().cloned().collect::<Vec<_>>())
        };
        let digests: BTreeSet<u128> = receipt.digests.iter().copied().collect();
        let mut found = BTreeSet::new();
        for segment in &segments {
            if receipt.segments.contains(&segment.number()) {
                return Err(Error::corrupted(format!(
                    "verify: expected segment {:06} to be gone, it is there",
                    segment.number()
                )));
            }
            segment.walk(0, |blob, payload| match blob.kind {
                Kind::Body | Kind::BodyV1 => {
                    if let Ok(body) = Body::decode(blob.kind, payload) {
                        found.insert(turn_digest(
                            seed,
                            body.head.session,
                            body.head.turn,
                            &body.text,
                        ));
                    }
                }
                Kind::Chunks | Kind::ChunksV1 => {
                    if let Ok(turn) = TurnChunks::decode(blob.kind, payload) {
                        let chunks = turn.chunks.iter();
                        found
                            .extend(chunks.map(|chunk| {
                                chunk_digest(seed, turn.session, turn.turn, chunk.id)
                            }));
                    }
                }
                _ => {}
            })?;
        }
        for (_, image) in self.images() {
            for ((session, turn), made) in image?.turns {
                let spans = made.spans.iter();
                found.extend(spans.map(|it| chunk_digest(seed, session, turn, it.span.id)));
            }
        }
        match digests.intersection(&found).count() {
            0 => Ok(()),
            left => Err(Error::corrupted(format!(
                "verify: expected none of {} erased records in the files, found {left}",
                digests.len()
            ))),
        }
    }

    /// That [`Store::forget`] would find every session of the scope's user.
    ///
    /// # Errors
    /// `Corrupted` where two of them have one name, which [`Store::doctor`] mends.
    pub fn check_forget(&self, scope: &Scope) -> Result<()> {
        check_names(&self.read(), scope)
    }

    /// The turns that the selector names.
    fn select(&self, scope: &Scope, selector: &Forget) -> Result<Erasure> {
        let mut erasure = Erasure::default();
        let needle = match selector {
            Forget::Matching(text) => folded(text),
            _ => String::new(),
        };
        let wanted: BTreeSet<TurnId> = match selector {
            Forget::Turn(turn) => [*turn].into(),
            Forget::Turns(turns) => turns.iter().copied().collect(),
            _ => BTreeSet::new(),
        };
        let state = self.read_long();
        check_names(&state, scope)?;
        for (id, session_scope, session) in state.sessions_in(scope) {
            if let Some(&last) = wanted.last()
                && last >= session.num_turns
            {
                return Err(not_found(session_scope, last, session.num_turns));
            }
            if matches!(selector, Forget::Session | Forget::Everything) {
                erasure.whole.insert(id);
            }
            for (&turn, turn_state) in &session.turns {
                let is_candidate = match selector {
                    Forget::Turn(_) | Forget::Turns(_) => wanted.contains(&turn),
                    Forget::Before(time_ms) => turn_state.record.time_ms < *time_ms,
                    Forget::Expired(now_ms) => {
                        turn_state.expires_ms.is_some_and(|expires| expires <= *now_ms)
                    }
                    // A quotation's metadata is the engine's own.
                    Forget::Filter(_) => turn_state.record.role != Role::Recalled,
                    Forget::Matching(_) | Forget::Session | Forget::Everything => true,
                };
                if !is_candidate {
                    continue;
                }
                let Some(body) = self.body(&state, session_scope, session, turn) else { continue };
                // What cannot be read may be what is meant.
                let matches = |matches: &dyn Fn(&Body) -> bool| body.as_ref().is_none_or(matches);
                let is_meant = match selector {
                    Forget::Matching(_) => matches(&|body| holds(body, &needle)),
                    // Of a text that cannot be read the metadata may be in memory: what it says counts, and no guess.
                    Forget::Filter(filter) => {
                        let known = || {
                            let tags = state.partition(session_scope)?.tags();
                            tags.metadata((id, turn))
                        };
                        let metadata = match &body {
                            Some(body) => Some(&body.metadata),
                            None => known(),
                        };
                        metadata.is_some_and(|metadata| filter.accepts(metadata))
                    }
                    _ => true,
                };
                if is_meant {
                    erasure.turns.insert((id, turn), body.map(|body| body.text));
                }
            }
        }
        if let Some(&last) = wanted.last()
            && state.session(scope).is_none()
        {
            return Err(not_found(scope, last, 0));
        }
        Ok(erasure)
    }

    /// A turn's body: none if it is forgotten already, `Some(None)` if it is damaged.
    pub(super) fn body(
        &self,
        state: &State,
        scope: &Scope,
        session: &Session,
        turn: u64,
    ) -> Option<Option<Body>> {
        let blob = session.turns.get(&turn)?.record.body?;
        Some(open(state, blob).and_then(|blob| read_body(scope, turn, blob)).ok())
    }

    /// Adds the turns in which a chunk that will be gone was quoted back to a model.
    fn add_quotes(&self, scope: &Scope, erasure: &mut Erasure) -> Result<()> {
        let state = self.read_long();
        let mut texts: Vec<&str> = bare_chunks(&state, erasure).map(|chunk| &*chunk.text).collect();
        // A turn that was taken back has no chunk in memory any more, and may have been quoted before.
        for (&(session_id, turn), text) in &erasure.turns {
            let session = state.sessions.get(&session_id);
            let partition = session.and_then(|s| state.partition(s.scope.as_ref()?));
            let turn = session.and_then(|session| session.turns.get(&turn));
            let (Some(turn), Some(text)) = (turn, text) else { continue };
            let role = turn.record.role;
            let was_told = turn.record.retracted && turn.record.remember && role != Role::Recalled;
            // It came from an export; or it is the user's, which is quoted before long results though it is not recalled.
            let may_be_quoted = was_told || role == Role::User && is_telling(text);
            if turn.chunks.is_empty() && may_be_quoted {
                texts.push(text);
            }
            for span in &turn.chunks {
                let is_gone = partition.is_none_or(|partition| partition.get(span.id).is_none());
                let part = text.get(span.start as usize..span.end as usize);
                texts.extend(part.filter(|_| is_gone));
            }
        }
        let quotable = Quotable::new(texts);
        if quotable.is_empty() {
            return Ok(());
        }
        let user = Scope::user(scope.user_id());
        for (id, session_scope, session) in state.sessions_in(&user) {
            let quotes =
                session.turns.iter().filter(|(_, turn)| turn.record.role == Role::Recalled);
            for (&turn, _) in quotes {
                if erasure.turns.contains_key(&(id, turn)) {
                    continue;
                }
                let Some(body) = self.body(&state, session_scope, session, turn) else { continue };
                if body.as_ref().is_none_or(|body| quotable.is_in(&body.text)) {
                    erasure.turns.insert((id, turn), body.map(|body| body.text));
                }
            }
        }
        Ok(())
    }

    /// Lists the changes, appends what other turns must hold from now on, and drafts the receipt.
    fn plan_erasure(
        &self,
        writer: &mut Writer,
        scope: &Scope,
        selector: &Forget,
        erasure: &mut Erasure,
    ) -> Result<Vec<Change>> {
        let state = self.read();
        let seed = state.store.seed;
        let mut digests = Vec::new();
        let mut num_pages = 0;
        for (&(id, turn), text) in &erasure.turns {
            let Some(turn_state) = state.sessions.get(&id).and_then(|s| s.turns.get(&turn)) else {
                continue;
            };
            digests.extend(text.as_ref().map(|text| turn_digest(seed, id, turn, text)));
            digests.extend(
                turn_state.chunks.iter().map(|chunk| chunk_digest(seed, id, turn, chunk.id)),
            );
        }
        // A text that stands with two agents is counted once.
        let bare: BTreeSet<u128> = bare_chunks(&state, erasure).map(|chunk| chunk.id).collect();
        let num_chunks = bare.len();
        erasure.moved = moved_chunks(&state, erasure);

        let mut changes = Vec::new();
        for &(id, turn) in erasure.turns.keys() {
            let Some(turn_state) = state.sessions.get(&id).and_then(|s| s.turns.get(&turn)) else {
                continue;
            };
            if !erasure.whole.contains(&id) {
                let record = TurnRecord { body: None, chunks: None, ..turn_state.record };
                changes.push(Change::put(Key::Turn(id, turn), Record::Turn(record)));
            }
        }
        let affected: BTreeSet<u64> =
            erasure.turns.keys().map(|(id, _)| *id).chain(erasure.whole.iter().copied()).collect();
        for &id in &affected {
            let Some(session) = state.sessions.get(&id) else { continue };
            num_pages += session.pages.len();
            changes.extend(session.without_snapshot(id));
            if erasure.whole.contains(&id) {
                // Turns whose record is damaged have a key, too.
                changes
                    .extend((0..session.num_turns).map(|turn| Change::remove(Key::Turn(id, turn))));
                changes.push(Change::remove(Key::Session(id)));
            } else {
                let turns = &erasure.turns;
                let summary = state.summarize(session, |turn| !turns.contains_key(&(id, turn)));
                erasure.summaries.insert(id, summary);
            }
        }
        for (&id, summary) in &erasure.summaries {
            if let Some(record) = state.sessions.get(&id).and_then(|session| session.record) {
                let blob =
                    writer.appender.append(Kind::Summary, &summary.encode(state.store.tag()))?;
                let record = crate::format::SessionRecord { summary: Some(blob), ..record };
                changes.push(Change::put(Key::Session(id), Record::Session(record)));
            }
        }
        changes.extend(rehomed(&state, writer, erasure)?);
        let store = StoreRecord { purge_pending: true, ..state.store.clone() };
        changes.push(Change::put(Key::Store, Record::Store(store)));

        let bytes = erasure.turns.values().flatten().map(|text| text.len() as u64).sum();
        let mut all: Vec<u8> = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
        all.extend(format!("{} {num_chunks} {num_pages} {bytes}", erasure.turns.len()).bytes());
        erasure.receipt = Some(Receipt {
            id: xxh3_64(&all),
            scope: scope.to_string(),
            selector: selector.clone(),
            turns: erasure.turns.len(),
            chunks: num_chunks,
            pages: num_pages,
            bytes,
            digests,
            segments: Vec::new(),
        });
        Ok(changes)
    }

    /// Carries the changes out; returns the chunks whose text stands nowhere any more, by partition.
    fn carry_out_erasure(
        &self,
        writer: &mut Writer,
        changes: &[Change],
        erasure: Erasure,
    ) -> Result<Vec<(PartitionKey, Vec<u128>)>> {
        // Chunks of erased turns, before the records that name them go.
        let mut dropped = Vec::new();
        {
            let state = self.read();
            for &(id, turn) in erasure.turns.keys() {
                let Some(session) = state.sessions.get(&id) else { continue };
                let (Some(scope), Some(turn_state)) = (&session.scope, session.turns.get(&turn))
                else {
                    continue;
                };
                let ids: Vec<u128> = turn_state.chunks.iter().map(|chunk| chunk.id).collect();
                let key = turn_state.version_key(id, turn);
                let told = turn_state.subject.clone().map(|subject| (subject, key));
                dropped.push((scope.clone(), id, turn, ids, told));
            }
        }
        let mut guard = self.publish(writer, changes)?;
        let state = &mut *guard;
        let terms = self.terms();
        let mut affected = BTreeSet::new();
        let mut bare: BTreeMap<PartitionKey, Vec<u128>> = BTreeMap::new();
        for (scope, id, turn, ids, told) in dropped {
            let partition = state.partition_mut(&scope);
            let left = partition.remove_places(ids.into_iter(), id, turn);
            if let Some((subject, key)) = told {
                partition.remove_version(&subject, key);
            }
            bare.entry(partition_key(&scope)).or_default().extend(left);
            affected.insert(id);
            if let Some(session) = state.sessions.get_mut(&id)
                && let Some(turn) = session.turns.get_mut(&turn)
            {
                *turn = TurnState::new(turn.record);
            }
        }
        // All of a partition at once: a removal visits every posting of its words.
        for (key, ids) in &bare {
            if let Some(partition) = state.partitions.get_mut(key) {
                partition.remove(&terms, ids);
            }
        }
        for (&(_, chunk), &home) in &erasure.moved {
            let scope = state.sessions.get(&home.0).and_then(|session| session.scope.clone());
            let Some(scope) = scope else { continue };
            if !state.partition_mut(&scope).set_home(chunk, home) {
                state.without_vectors.insert(home);
            }
        }
        state.without_vectors.retain(|turn| !erasure.turns.contains_key(turn));
        for (id, summary) in erasure.summaries {
            state.session_mut(id).summary = summary;
        }
        drop(guard);
        affected.into_iter().for_each(|id| self.refresh_last_user_text(id));
        Ok(bare.into_iter().collect())
    }
}

/// The chunks of erased turns that no other turn holds.
fn bare_chunks<'a>(state: &'a State, erasure: &'a Erasure) -> impl Iterator<Item = &'a Chunk> {
    chunks_of(state, erasure).filter(move |chunk| {
        let is_erased = |place: &Place| erasure.turns.contains_key(&(place.session, place.turn));
        chunk.places.iter().all(|place| place.near || is_erased(place))
    })
}

/// The chunks that stay, but whose vectors lie in the record of an erased turn: with the turn that takes them over.
fn moved_chunks(state: &State, erasure: &Erasure) -> BTreeMap<(u64, u128), (u64, u64)> {
    let is_erased = |home: &(u64, u64)| erasure.turns.contains_key(home);
    chunks_of(state, erasure)
        .filter(|chunk| is_erased(&chunk.home))
        .filter_map(|chunk| {
            let heir = chunk
                .places
                .iter()
                .filter(|place| !place.near)
                .map(|place| (place.session, place.turn))
                .find(|home| !is_erased(home));
            Some(((chunk.home.0, chunk.id), heir?))
        })
        .collect()
}

/// Every chunk in memory of the erased turns, once: one may stand in thousands of them, and is compared with all of its places.
fn chunks_of<'a>(state: &'a State, erasure: &'a Erasure) -> impl Iterator<Item = &'a Chunk> {
    let mut seen: BTreeMap<PartitionKey, HashSet<u128>> = BTreeMap::new();
    let mut chunks = Vec::new();
    for (id, turn) in erasure.turns.keys() {
        let Some(session) = state.sessions.get(id) else { continue };
        let (Some(scope), Some(turn)) = (&session.scope, session.turns.get(turn)) else {
            continue;
        };
        let Some(partition) = state.partition(scope) else { continue };
        let seen = seen.entry(partition_key(scope)).or_default();
        let new = turn.chunks.iter().filter(|span| seen.insert(span.id));
        chunks.extend(new.filter_map(|span| partition.get(span.id)));
    }
    chunks.into_iter()
}

/// Appends the chunks of every turn that takes vectors over.
fn rehomed(state: &State, writer: &mut Writer, erasure: &Erasure) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    let heirs: BTreeSet<(u64, u64)> = erasure.moved.values().copied().collect();
    for (id, turn) in heirs {
        let Some(session) = state.sessions.get(&id) else { continue };
        let Some(turn_state) = session.turns.get(&turn) else { continue };
        let partition = session.scope.as_ref().and_then(|scope| state.partition(scope));
        let rows = turn_state.chunks.iter().map(|&span| {
            let chunk = partition.and_then(|partition| partition.get(span.id)).filter(|chunk| {
                let heir = erasure.moved.get(&(chunk.home.0, span.id));
                chunk.home == (id, turn) || heir == Some(&(id, turn))
            });
            (span, chunk.map_or(&[][..], |chunk| &chunk.vectors))
        });
        let payload = TurnChunks::encode(id, turn, state.store.tag(), rows);
        let blob = writer.appender.append(Kind::Chunks, &payload)?;
        let record = TurnRecord { chunks: Some(blob), ..turn_state.record };
        changes.push(Change::put(Key::Turn(id, turn), Record::Turn(record)));
    }
    Ok(changes)
}

/// Whether a turn's text or anything that stands beside it holds `needle`, which is [`folded`].
fn holds(body: &Body, needle: &str) -> bool {
    let holds = |text: &str| folded(text).contains(needle);
    holds(&body.text)
        || body.source.as_deref().is_some_and(holds)
        || body.subject.as_deref().is_some_and(holds)
        || body.metadata.iter().any(|(key, value)| {
            // A quotation's are the engine's own.
            let is_callers = body.head.role != Role::Recalled && !key.starts_with(ENGINE_KEYS);
            (is_callers && holds(key)) || matches!(value, crate::Value::Text(text) if holds(text))
        })
}

/// Of two sessions with one name only one is found by it; the other may hold a copy or a quotation as well.
fn check_names(state: &State, scope: &Scope) -> Result<()> {
    match state.shared_names.iter().find(|name| name.user_id() == scope.user_id()) {
        None => Ok(()),
        Some(name) => Err(Error::corrupted(format!(
            "forget: expected one session named {name}, got several; doctor with repair gives each its own name"
        ))),
    }
}

fn not_found(scope: &Scope, turn: u64, num_turns: u64) -> Error {
    Error::new(
        crate::ErrorKind::NotFound,
        format!("forget: expected a turn of {scope} below {num_turns}, got {turn}"),
    )
}

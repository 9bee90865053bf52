//! What an open store holds in memory: the records, and the indexes derived from them.
//! Knows no file beyond handles to read from; changes reach it after they reached the disk.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::held::HeldVectors;
use super::records::Change;
use super::segment::Segment;
use crate::format::{
    BlobRef, ChunkSpan, Key, PageRecord, Record, SessionRecord, SnapshotRecord, StoreRecord,
    TurnRecord, decode_names,
};
use crate::partition::{Partition, Place, Version, VersionKey};
use crate::summary::Summary;
use crate::{Error, Result, Role, Scope};

/// A turn in memory, without its text.
#[derive(Debug, Clone)]
pub(crate) struct TurnState {
    pub(crate) record: TurnRecord,
    pub(crate) chunks: Vec<ChunkSpan>,
    /// Name of the document that the text comes from.
    pub(crate) source: Option<Box<str>>,
    pub(crate) subject: Option<Box<str>>,
    pub(crate) expires_ms: Option<i64>,
    /// Vectors of its chunks that were left on the disk.
    pub(crate) held: Option<Arc<HeldVectors>>,
}

impl TurnState {
    pub(crate) fn new(record: TurnRecord) -> Self {
        Self {
            record,
            chunks: Vec::new(),
            source: None,
            subject: None,
            expires_ms: None,
            held: None,
        }
    }

    /// The place of one of its chunks.
    pub(crate) fn place(&self, session: u64, turn: u64, span: &ChunkSpan) -> Place {
        Place {
            session,
            turn,
            start: span.start,
            end: span.end,
            order: self.record.order,
            role: self.record.role,
            time_ms: self.record.time_ms,
            expires_ms: self.expires_ms.unwrap_or(i64::MAX),
            superseded_ms: i64::MAX,
            near: span.near,
        }
    }

    /// What it says about its subject; none if it has no subject, or was taken back.
    pub(crate) fn version(&self, session: u64, turn: u64) -> Option<(&str, Version)> {
        let subject = self.subject.as_deref().filter(|_| !self.record.retracted)?;
        let chunks = self.chunks.iter().map(|span| span.id).collect();
        let (time_ms, order, turn) = self.version_key(session, turn);
        Some((subject, Version { time_ms, order, turn, chunks }))
    }

    /// Where that stands among all that is said about the subject.
    pub(crate) fn version_key(&self, session: u64, turn: u64) -> VersionKey {
        (self.record.time_ms, self.record.order, (session, turn))
    }
}

/// A session in memory.
#[derive(Debug)]
pub(crate) struct Session {
    /// None if the record of its names is damaged: then nobody can ask for it, and nothing of it is removed.
    pub(crate) scope: Option<Scope>,
    pub(crate) record: Option<SessionRecord>,
    /// Gaps are damaged records.
    pub(crate) turns: BTreeMap<u64, TurnState>,
    pub(crate) num_turns: u64,
    pub(crate) snapshot: Option<SnapshotRecord>,
    pub(crate) pages: BTreeMap<u64, PageRecord>,
    pub(crate) summary: Summary,
    /// The start of the latest user turn, for short questions that lean on it.
    pub(crate) last_user_text: Box<str>,
}

impl Session {
    /// The changes that remove snapshot and pages of this session, whose id is `id`.
    pub(crate) fn without_snapshot(&self, id: u64) -> impl Iterator<Item = Change> {
        let pages = self.pages.keys().map(move |&page| Change::remove(Key::Page(id, page)));
        pages.chain(self.snapshot.map(|_| Change::remove(Key::Snapshot(id))))
    }
}

/// Key of a partition: user and agent.
pub(crate) type PartitionKey = (String, Option<String>);

/// Everything that readers share.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) store: StoreRecord,
    pub(crate) sessions: BTreeMap<u64, Session>,
    pub(crate) by_scope: BTreeMap<Scope, u64>,
    /// Names that more than one session has, as a repair of an earlier version could leave them: only one of these sessions
    /// has a scope.
    pub(crate) shared_names: BTreeSet<Scope>,
    pub(crate) partitions: BTreeMap<PartitionKey, Partition>,
    /// Next order of each user's turns.
    pub(crate) orders: HashMap<String, u64>,
    /// Number of the next commit that appends turns.
    pub(crate) next_commit: u64,
    pub(crate) segments: BTreeMap<u32, Arc<Segment>>,
    /// Bytes of each segment that records refer to, those of several records once.
    pub(crate) live_bytes: HashMap<u32, u64>,
    /// How many records refer to each page and state, by segment and offset: sessions that were forked share them.
    holders: HashMap<(u32, u64), u32, RandomState>,
    /// Turns that hold chunks whose vectors are another embedder's: they have none until they are embedded again.
    pub(crate) without_vectors: BTreeSet<(u64, u64)>,
    /// What is damaged, one text each.
    pub(crate) damaged: Vec<String>,
    /// A damaged database record may refer to bytes that look unused: nothing is removed on its own.
    pub(crate) refs_lost: bool,
}

impl State {
    pub(crate) fn new(store: StoreRecord, segments: BTreeMap<u32, Arc<Segment>>) -> Self {
        Self {
            store,
            sessions: BTreeMap::new(),
            by_scope: BTreeMap::new(),
            shared_names: BTreeSet::new(),
            partitions: BTreeMap::new(),
            orders: HashMap::new(),
            next_commit: 1,
            segments,
            live_bytes: HashMap::new(),
            holders: HashMap::default(),
            without_vectors: BTreeSet::new(),
            damaged: Vec::new(),
            refs_lost: false,
        }
    }

    /// Numbers per vector.
    pub(crate) fn dim(&self) -> usize {
        self.store.dim as usize
    }

    /// The session that a full scope names.
    pub(crate) fn session(&self, scope: &Scope) -> Option<(u64, &Session)> {
        let id = *self.by_scope.get(scope)?;
        Some((id, self.sessions.get(&id)?))
    }

    /// The sessions inside a scope, in the order of their names.
    pub(crate) fn sessions_in<'a>(
        &'a self,
        scope: &'a Scope,
    ) -> impl Iterator<Item = (u64, &'a Scope, &'a Session)> {
        self.by_scope
            .range(Scope::user(scope.user_id())..)
            .take_while(|(known, _)| known.user_id() == scope.user_id())
            .filter(|(known, _)| scope.contains(known))
            .filter_map(|(known, id)| Some((*id, known, self.sessions.get(id)?)))
    }

    /// The partitions that a scope, its session aside, may see.
    pub(crate) fn partitions_in<'a>(
        &'a self,
        scope: &'a Scope,
    ) -> impl Iterator<Item = (&'a PartitionKey, &'a Partition)> {
        let from = (scope.user_id().to_owned(), None);
        self.partitions.range(from..).take_while(|((user, _), _)| user == scope.user_id()).filter(
            |((_, agent), _)| scope.agent_id().is_none() || agent.as_deref() == scope.agent_id(),
        )
    }

    /// The sessions whose chunks a partition holds, in the order of their names.
    pub(crate) fn sessions_of<'a>(
        &'a self,
        (user, agent): &'a PartitionKey,
    ) -> impl Iterator<Item = (u64, &'a Session)> {
        let from = match agent {
            Some(agent) => Scope::user(user).agent(agent),
            None => Scope::user(user),
        };
        let is_of =
            move |scope: &Scope| scope.user_id() == user && scope.agent_id() == agent.as_deref();
        self.by_scope
            .range(from..)
            .take_while(move |(known, _)| is_of(known))
            .filter_map(|(_, id)| Some((*id, self.sessions.get(id)?)))
    }

    /// Whether a record refers into the segment.
    pub(crate) fn is_live(&self, segment: u32) -> bool {
        self.live_bytes.get(&segment).is_some_and(|&live| live > 0)
    }

    pub(crate) fn segment(&self, blob: &BlobRef) -> Result<Arc<Segment>> {
        self.segments.get(&blob.segment).cloned().ok_or_else(|| {
            Error::corrupted(format!("read: segment {:06} is missing", blob.segment))
        })
    }

    pub(crate) fn read(&self, blob: &BlobRef) -> Result<Vec<u8>> {
        self.segment(blob)?.read(blob)
    }

    /// The record under a key, as it was last applied.
    pub(crate) fn record(&self, key: &Key) -> Option<Record> {
        match *key {
            Key::Store => Some(Record::Store(self.store.clone())),
            Key::Session(id) => self.sessions.get(&id)?.record.map(Record::Session),
            Key::Turn(id, turn) => {
                self.sessions.get(&id)?.turns.get(&turn).map(|turn| Record::Turn(turn.record))
            }
            Key::Snapshot(id) => self.sessions.get(&id)?.snapshot.map(Record::Snapshot),
            Key::Page(id, page) => {
                self.sessions.get(&id)?.pages.get(&page).copied().map(Record::Page)
            }
        }
    }

    /// Every record that refers into `segment`.
    pub(crate) fn records_in(&self, segment: u32) -> Vec<(Key, Record)> {
        let records = self.keys().filter_map(|key| Some((key, self.record(&key)?)));
        records.filter(|(_, record)| record.refs().any(|blob| blob.segment == segment)).collect()
    }

    /// Every key that holds a record.
    fn keys(&self) -> impl Iterator<Item = Key> {
        self.sessions.iter().flat_map(|(&id, session)| {
            let turns = session.turns.keys().map(move |&turn| Key::Turn(id, turn));
            let pages = session.pages.keys().map(move |&page| Key::Page(id, page));
            [Key::Session(id), Key::Snapshot(id)].into_iter().chain(turns).chain(pages)
        })
    }

    /// The end of the last record that is referred to, by segment.
    pub(crate) fn live_ends(&self) -> HashMap<u32, u64> {
        let mut ends = HashMap::new();
        for record in self.keys().filter_map(|key| self.record(&key)) {
            for blob in record.refs() {
                let end: &mut u64 = ends.entry(blob.segment).or_default();
                *end = (*end).max(blob.offset.saturating_add(blob.record_bytes()));
            }
        }
        ends
    }

    /// Takes a change of the database in, and keeps count of live bytes.
    pub(crate) fn apply(&mut self, change: &Change) {
        if let Some(old) = self.record(&change.key) {
            old.refs().for_each(|blob| self.let_go(blob));
        }
        change.record.iter().flat_map(Record::refs).for_each(|blob| self.hold(blob));
        match (&change.key, &change.record) {
            (Key::Store, Some(Record::Store(store))) => self.store = store.clone(),
            (&Key::Session(id), Some(Record::Session(record))) => {
                self.session_mut(id).record = Some(*record);
            }
            (&Key::Turn(id, turn), Some(Record::Turn(record))) => {
                let place = record.chunks.and_then(|blob| Some((blob, self.segment(&blob).ok()?)));
                let session = self.session_mut(id);
                session.num_turns = session.num_turns.max(turn + 1);
                let known = session.turns.entry(turn).or_insert_with(|| TurnState::new(*record));
                known.record = *record;
                if let (Some(held), Some((blob, segment))) = (&known.held, place) {
                    held.moved(&segment, &blob);
                }
            }
            (&Key::Snapshot(id), Some(Record::Snapshot(record))) => {
                self.session_mut(id).snapshot = Some(*record);
            }
            (&Key::Page(id, page), Some(Record::Page(record))) => {
                self.session_mut(id).pages.insert(page, *record);
            }
            (&Key::Session(id), None) => {
                if let Some(scope) = self.sessions.remove(&id).and_then(|session| session.scope) {
                    self.by_scope.remove(&scope);
                }
            }
            (&Key::Turn(id, turn), None) => {
                self.sessions.get_mut(&id).map(|session| session.turns.remove(&turn));
            }
            (&Key::Snapshot(id), None) => {
                self.sessions.get_mut(&id).map(|session| session.snapshot.take());
            }
            (&Key::Page(id, page), None) => {
                self.sessions.get_mut(&id).map(|session| session.pages.remove(&page));
            }
            // `Record::decode` gives each key its own record, and the store's is never removed.
            _ => {}
        }
    }

    /// Counts a record that refers to `blob`.
    fn hold(&mut self, blob: &BlobRef) {
        if blob.kind.is_shared() {
            let holders = self.holders.entry((blob.segment, blob.offset)).or_default();
            *holders += 1;
            if *holders > 1 {
                return;
            }
        }
        *self.live_bytes.entry(blob.segment).or_default() += blob.record_bytes();
    }

    /// Counts a record less that refers to `blob`.
    fn let_go(&mut self, blob: &BlobRef) {
        if let Entry::Occupied(mut holders) = self.holders.entry((blob.segment, blob.offset)) {
            *holders.get_mut() -= 1;
            if *holders.get() > 0 {
                return;
            }
            holders.remove();
        }
        let live = self.live_bytes.entry(blob.segment).or_default();
        *live = live.saturating_sub(blob.record_bytes());
    }

    /// The session with this id, made if it is not known.
    pub(crate) fn session_mut(&mut self, id: u64) -> &mut Session {
        let dim = self.dim();
        self.sessions.entry(id).or_insert_with(|| Session {
            scope: None,
            record: None,
            turns: BTreeMap::new(),
            num_turns: 0,
            snapshot: None,
            pages: BTreeMap::new(),
            summary: Summary::new(dim),
            last_user_text: "".into(),
        })
    }

    /// The scope that a session's own record names, whether it is found by it or not.
    pub(super) fn told_scope(&self, id: u64) -> Result<Scope> {
        let record = self.sessions.get(&id).and_then(|session| session.record);
        let record = record.ok_or_else(|| Error::corrupted("its record is missing"))?;
        let names = decode_names(record.names.kind, &self.read(&record.names)?)?;
        if names.id.is_some_and(|known| known != id) {
            return Err(Error::corrupted("they are those of another session"));
        }
        Ok(names.into_scope())
    }

    /// Names a session, so that it can be found by scope; false if another session has that name, which keeps it.
    pub(crate) fn name(&mut self, id: u64, scope: Scope) -> bool {
        let is_free = *self.by_scope.entry(scope.clone()).or_insert(id) == id;
        if is_free {
            self.session_mut(id).scope = Some(scope);
        }
        is_free
    }

    /// The partition of a scope, made if it is not known.
    pub(crate) fn partition_mut(&mut self, scope: &Scope) -> &mut Partition {
        let dim = self.dim();
        self.partitions.entry(partition_key(scope)).or_insert_with(|| Partition::new(dim))
    }

    pub(crate) fn partition(&self, scope: &Scope) -> Option<&Partition> {
        self.partitions.get(&partition_key(scope))
    }

    /// The next order for a turn of `user`.
    pub(crate) fn next_order(&self, user: &str) -> u64 {
        self.orders.get(user).copied().unwrap_or(0)
    }

    /// The running means over the turns of a session that `keep` accepts and that are not retracted.
    pub(crate) fn summarize(&self, session: &Session, keep: impl Fn(u64) -> bool) -> Summary {
        let mut summary = Summary::new(self.dim());
        let Some(partition) = session.scope.as_ref().and_then(|scope| self.partition(scope)) else {
            return summary;
        };
        let turns = session.turns.iter().filter(|(id, turn)| {
            keep(**id) && !turn.record.retracted && counts_in_summary(turn.record.role)
        });
        for span in turns.flat_map(|(_, turn)| &turn.chunks) {
            if let Some(chunk) = partition.get(span.id) {
                summary.push(&chunk.vectors);
            }
        }
        summary
    }
}

/// Whether turns of this role say what a session is about.
pub(crate) fn counts_in_summary(role: Role) -> bool {
    !matches!(role, Role::System | Role::Recalled)
}

/// The partition that a session's chunks belong to.
pub(crate) fn partition_key(scope: &Scope) -> PartitionKey {
    (scope.user_id().to_owned(), scope.agent_id().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sessions_of_a_partition_are_those_of_its_user_and_agent_alone() {
        let record = StoreRecord {
            seed: 1,
            dim: 2,
            embedder: "test".into(),
            next_session: 1,
            purge_pending: false,
            untagged: 0,
        };
        let mut state = State::new(record, BTreeMap::new());
        let scopes: Vec<Scope> = ["ad", "ada", "ada/", "adam"]
            .into_iter()
            .flat_map(|user| {
                [Scope::user(user), Scope::user(user).agent("a"), Scope::user(user).agent("b")]
            })
            .flat_map(|scope| [scope.clone().session("one"), scope.session("two")])
            .collect();
        (0..).zip(&scopes).for_each(|(id, scope)| assert!(state.name(id, scope.clone())));
        for scope in &scopes {
            let key = partition_key(scope);
            let found: Vec<u64> = state.sessions_of(&key).map(|(id, _)| id).collect();
            let is_of = |(_, other): &(u64, &Scope)| partition_key(other) == key;
            let expected: Vec<u64> = (0..).zip(&scopes).filter(is_of).map(|(id, _)| id).collect();
            assert_eq!(found, expected, "{scope}");
        }
        assert!(!state.name(99, scopes[0].clone()));
        assert_eq!(state.session(&scopes[0]).map(|(id, _)| id), Some(0));
    }
}

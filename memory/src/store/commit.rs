//! Commits: turns, snapshot and retraction of one session, all of it or nothing.
//! Knows nothing of search; it plans under the writer's lock (see `plan`) and applies after the disk has it (`apply`).

mod apply;
mod pages;
mod plan;

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use foldhash::fast::RandomState;

pub(super) use self::apply::start_of;
use self::pages::check_pages;
use super::Store;
use super::records::Change;
use crate::filter::check_metadata;
use crate::format::ChunkSpan;
use crate::hygiene::{Verdict, gist};
use crate::partition::{Partition, chunk_id};
use crate::summary::Summary;
use crate::vectors::normalize;
use crate::{Commit, Committed, Error, NewTurn, Result, Role, Scope, TurnId, chunk};

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
    /// Its place among all turns of the user, if it has one; else behind them all.
    order: Option<u64>,
    spans: Vec<chunk::Span>,
}

/// A chunk that is new to the partition.
struct Fresh<'a> {
    id: u128,
    text: &'a str,
    vectors: Vec<f32>,
    turn: TurnId,
    /// What it says; none where near duplicates are stored.
    said: Option<String>,
}

/// Vectors of chunks by their text.
type Embedded<'a> = HashMap<&'a str, Vec<f32>, RandomState>;

/// What a commit will do to the indexes once it is on the disk.
struct Plan<'a> {
    session: u64,
    is_new: bool,
    first_turn: TurnId,
    changes: Vec<Change>,
    /// The chunks of each appended turn.
    spans: Vec<Vec<ChunkSpan>>,
    /// Chunks that the partition does not know.
    fresh: Vec<Fresh<'a>>,
    /// Where a chunk is among `fresh`.
    fresh_at: HashMap<u128, usize, RandomState>,
    /// The chunk of `fresh` that says a gist first, by the gist's hash; not kept where near duplicates are stored.
    fresh_by_gist: Option<HashMap<u64, usize, RandomState>>,
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
    /// stored; `NotFound` if `retract` ends beyond the log; `Storage` if the disk refuses. Nothing changes on an error,
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
        let mut done = self.commit_cuts(scope, &commit, cuts, Embedded::default(), |_| {})?;
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
        let mut embedded =
            Embedded::with_capacity_and_hasher(commit.turns.len(), RandomState::default());
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
            cuts.push(Cut { turn, entry: Entry::New, remember, order: None, spans });
        }
        let mut done = self.commit_cuts(scope, &commit, cuts, embedded, |_| {})?;
        done.findings = verdict.findings;
        Ok(done)
    }

    /// Checks what is asked of every new turn, and looks for what is not to be stored.
    fn examine(&self, commit: &Commit) -> Result<Verdict> {
        commit.turns.iter().try_for_each(|turn| check_metadata("commit", &turn.metadata))?;
        commit.turns.iter().try_for_each(check_subject)?;
        self.options.hygiene.examine(&commit.turns)
    }

    /// Appends turns of another store's log as they stood there. `orders` gives each its order, if that is known; it is
    /// asked while nobody else writes.
    pub(super) fn append_log(
        &self,
        scope: &Scope,
        turns: &[(NewTurn, Entry)],
        orders: impl FnOnce() -> Vec<Option<u64>>,
    ) -> Result<Committed> {
        turns.iter().try_for_each(|(turn, _)| check_metadata("commit", &turn.metadata))?;
        let cuts = turns.iter().map(|(turn, entry)| self.cut(turn, *entry, false)).collect();
        self.commit_cuts(scope, &Commit::default(), cuts, Embedded::default(), |cuts| {
            for (cut, order) in cuts.iter_mut().zip(orders()) {
                cut.order = order;
            }
        })
    }

    /// `embedded`: vectors of chunks, by their text, that the embedder need not make. `place` is called while nobody else
    /// writes, before anything is planned.
    fn commit_cuts<'a>(
        &self,
        scope: &Scope,
        commit: &'a Commit,
        mut cuts: Vec<Cut<'a>>,
        mut embedded: Embedded<'a>,
        place: impl FnOnce(&mut [Cut<'a>]),
    ) -> Result<Committed> {
        self.embed_unknown(scope, &cuts, commit.retract.as_ref(), &mut embedded)?;
        let mut writer = self.writer()?;
        place(&mut cuts);
        // A chunk that was known may have been forgotten meanwhile.
        self.embed_unknown(scope, &cuts, commit.retract.as_ref(), &mut embedded)?;
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
        Cut { turn, entry, remember, order: None, spans }
    }

    /// Embeds the sentences of all chunks that neither the partition nor `embedded` has.
    fn embed_unknown<'a>(
        &self,
        scope: &Scope,
        cuts: &[Cut<'a>],
        retract: Option<&Range<TurnId>>,
        embedded: &mut Embedded<'a>,
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
                            |session| self.near(partition, &gist(text), session, retract).is_some();
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

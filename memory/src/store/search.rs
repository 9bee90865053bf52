//! Recall: which chunks a scope may see, scored by words and by vectors, fused.
//! Knows no file; everything it needs is in memory.

use std::collections::HashSet;

use super::Store;
use super::read::source;
use super::state::State;
use crate::partition::{Chunk, Moment, Partition, Place, Wanted};
use crate::recall::{Parts, fading, fuse, relevance};
use crate::summary::{FOLLOW_UP_TERM_WEIGHT, FOLLOW_UP_TERMS, FOLLOW_UP_WORDS};
use crate::tags::Accepted;
use crate::vectors::best;
use crate::words::{Collection, Query};
use crate::{ChunkId, Error, Hit, Recall, Result, Scope, Trust, TurnId};

/// Chunks scored for each hit asked for, by words and as many by vectors, where there are too many to score them all;
/// and the fewest. A chunk whose fused score is among the best is among the best of one of the two.
const CANDIDATES_PER_HIT: usize = 8;
const MIN_CANDIDATES: usize = 64;
/// So many times more where age counts: what fades is among the best by words or vectors, and may not be among all.
const FADING_CANDIDATES: usize = 4;

impl Store {
    /// The chunks that answer `query` best, best first.
    ///
    /// A scope with a session sees that session, and with `across_sessions` the others of its user (and agent) too;
    /// a scope without session sees all its sessions. Never a chunk of another user.
    ///
    /// # Errors
    /// `InvalidArgument` for a malformed scope or a `min_score` that is not a number; and whatever the embedder reports.
    ///
    /// # Cost
    /// One embedding of the query (none if it is among the latest), a look at every chunk that holds one of its words, and a scan of the one-bit codes of
    /// all sentence vectors that the scope may see, or a walk of their graph: see [`StoreOptions::graph_vectors`].
    ///
    /// [`StoreOptions::graph_vectors`]: crate::StoreOptions::graph_vectors
    pub fn recall(&self, scope: &Scope, query: &str, options: &Recall) -> Result<Vec<Hit>> {
        scope.check("recall")?;
        if options.min_score.is_nan() || options.min_relevance.is_nan() {
            return Err(Error::invalid(
                "recall: expected min_score and min_relevance to be numbers",
            ));
        }
        options.filter.iter().try_for_each(|filter| filter.check("recall"))?;
        if options.half_life_ms == Some(0) {
            return Err(Error::invalid("recall: expected half_life_ms of at least 1, got 0"));
        }
        if options.k == 0 || query.trim().is_empty() {
            return Ok(Vec::new());
        }
        let terms = self.terms();
        let mut words = terms.query(query);
        let mut vector = self.embed_query(query)?;
        let _searching = self.indexer.searching();
        let state = self.read();
        let mut view = View::new(&state, scope, options);
        let partitions = view.partitions();
        view.accept(&partitions);
        let mut collection = Collection::default();
        partitions.iter().for_each(|partition| partition.words().collect(&mut collection));
        let num_holding = |term: &str| -> u64 {
            partitions.iter().map(|partition| partition.words().num_holding(term)).sum()
        };
        let mut follow_up = false;
        if options.follow_up
            && words.content_words < FOLLOW_UP_WORDS
            && let Some((_, session)) = state.session(scope)
        {
            follow_up = true;
            session.summary.sharpen(&mut vector);
            let latest = terms.query(&session.last_user_text);
            add_rare(&mut words, latest, collection, num_holding);
        }
        let weighted: Vec<(String, f32)> = words
            .terms
            .into_iter()
            .map(|(term, weight)| {
                let rarity = collection.rarity(num_holding(&term));
                (term, weight * rarity)
            })
            .collect();

        let mut candidates: Vec<(&Chunk, &Place, Parts)> = Vec::new();
        for (at, partition) in partitions.iter().enumerate() {
            let scores = partition.words().scores(&weighted, collection);
            let visible = |chunk: &Chunk| chunk.places.iter().any(|place| view.sees(place));
            let fading = options.half_life_ms.map_or(1, |_| FADING_CANDIDATES);
            // A caller who wants every hit may ask for more than there can be of anything.
            let num = CANDIDATES_PER_HIT.saturating_mul(options.k).max(MIN_CANDIDATES);
            let num = num.saturating_mul(fading);
            // A few chunks that may not be seen are passed over; many would leave no room for the others.
            let num_hidden = view.num_hidden(partition).filter(|hidden| *hidden <= num);
            let wanted = Wanted {
                query: &vector,
                scores: &scores,
                num: num.saturating_add(num_hidden.unwrap_or(0)),
                threads: self.options.scan_threads,
                among: view.accepted.get(at),
                visible: if num_hidden.is_some() { None } else { Some(&visible) },
            };
            for (slot, chunk) in partition.candidates(&wanted) {
                // A place with the very text, unless only near ones are seen.
                let exact = chunk.places.iter().rfind(|place| !place.near && view.sees(place));
                let place = exact.or_else(|| chunk.places.iter().rfind(|place| view.sees(place)));
                let Some(place) = place else { continue };
                let bm25 = scores.get(slot as usize).copied().unwrap_or(0.0);
                let cosine = best(&vector, &chunk.vectors);
                candidates.push((chunk, place, Parts { bm25, cosine, order: place.order }));
            }
        }
        let parts: Vec<Parts> = candidates.iter().map(|(_, _, parts)| *parts).collect();
        let attainable: f32 = weighted.iter().map(|(_, weight)| weight).sum();
        let mut fused = fuse(&parts, attainable, follow_up);
        if let Some(half_life_ms) = options.half_life_ms {
            let newest = candidates.iter().map(|(_, place, _)| place.time_ms).max().unwrap_or(0);
            let now = options.as_of_ms.or(options.now_ms).unwrap_or(newest);
            for ((score, _), (_, place, _)) in fused.iter_mut().zip(&candidates) {
                *score *= fading(now, place.time_ms, half_life_ms);
            }
        }
        let mut order: Vec<usize> = (0..candidates.len())
            .filter(|&at| {
                fused[at].0 >= options.min_score
                    && relevance(&fused[at].1) >= options.min_relevance
                    && (parts[at].bm25 > 0.0 || parts[at].cosine > 0.0)
            })
            .collect();
        order.sort_by(|&a, &b| {
            fused[b]
                .0
                .total_cmp(&fused[a].0)
                .then_with(|| candidates[a].0.id.cmp(&candidates[b].0.id))
        });
        let mut seen = HashSet::new();
        let hits =
            order.into_iter().filter(|&at| seen.insert(&candidates[at].0.text)).filter_map(|at| {
                let (chunk, place, _) = candidates[at];
                let (score, why) = fused[at];
                let stale = place.is_stale(view.moment);
                Some(Hit {
                    chunk: ChunkId(chunk.id),
                    text: chunk.text.to_string(),
                    score,
                    relevance: relevance(&why),
                    why,
                    source: source(&state, place)?,
                    trust: Trust::of(place.role),
                    count: chunk.places.iter().filter(|place| view.sees(place)).count() as u32,
                    stale,
                })
            });
        Ok(hits.take(options.k).collect())
    }
}

/// Completes a short question with the rarest words of the latest user turn.
fn add_rare(
    query: &mut Query,
    latest: Query,
    collection: Collection,
    num_holding: impl Fn(&str) -> u64,
) {
    let mut rare: Vec<(u64, String)> = latest
        .terms
        .into_iter()
        .map(|(term, _)| (num_holding(&term), term))
        .filter(|(num_holding, _)| collection.is_rare(*num_holding))
        .collect();
    rare.sort();
    for (_, term) in rare.into_iter().take(FOLLOW_UP_TERMS) {
        query.add(&term, FOLLOW_UP_TERM_WEIGHT);
    }
}

/// What a scope and its options let a recall see.
struct View<'a> {
    state: &'a State,
    scope: &'a Scope,
    options: &'a Recall,
    moment: Moment,
    /// The scope's own session, if it names one that exists.
    own: Option<u64>,
    /// The turns of it that are left out, ascending.
    except: Vec<TurnId>,
    /// What the filter accepts, one for each partition; empty if there is no filter.
    accepted: Vec<Accepted<'a>>,
}

impl<'a> View<'a> {
    fn new(state: &'a State, scope: &'a Scope, options: &'a Recall) -> Self {
        let moment = Moment { as_of_ms: options.as_of_ms, now_ms: options.now_ms };
        let own = state.session(scope).map(|(id, _)| id);
        let mut except = options.except_turns.clone();
        except.sort_unstable();
        except.dedup();
        Self { state, scope, options, moment, own, except, accepted: Vec::new() }
    }

    /// Evaluates the filter over the turns of each partition.
    fn accept(&mut self, partitions: &[&'a Partition]) {
        let filters = self.options.filter.iter();
        let accepted =
            filters.flat_map(|filter| partitions.iter().map(move |p| p.tags().accepted(filter)));
        self.accepted = accepted.collect();
    }

    /// The partitions with anything to see; statistics of words come from these and no others.
    fn partitions(&self) -> Vec<&'a Partition> {
        if self.scope.session_id().is_some() && !self.options.across_sessions {
            return self.state.partition(self.scope).into_iter().collect();
        }
        self.state.partitions_in(self.scope).map(|(_, partition)| partition).collect()
    }

    /// How many chunks that the filter accepts may not be seen, at most; none if they would have to be counted one by one.
    fn num_hidden(&self, partition: &Partition) -> Option<usize> {
        let options = self.options;
        let sees_all = (self.scope.session_id().is_none() || options.across_sessions)
            && options.roles.is_empty()
            && options.since_ms.is_none()
            && options.until_ms.is_none()
            && options.as_of_ms.is_none();
        if !sees_all {
            return None;
        }
        let own = self.own.and_then(|own| self.state.sessions.get(&own));
        let left_out: usize = own.map_or(0, |session| {
            let later = options.before_turn.map(|before| session.turns.range(before..));
            let later = later.into_iter().flatten().map(|(_, turn)| turn);
            let except = self.except.iter().filter_map(|turn| session.turns.get(turn));
            later.chain(except).map(|turn| turn.chunks.len()).sum()
        });
        let superseded = if options.stale { 0 } else { partition.num_superseded_chunks() };
        let expiring = options.now_ms.map_or(0, |_| partition.num_expiring());
        Some(left_out + superseded + expiring)
    }

    fn sees(&self, place: &Place) -> bool {
        let options = self.options;
        let in_sessions = match self.scope.session_id() {
            None => true,
            Some(_) if self.own == Some(place.session) => {
                options.before_turn.is_none_or(|before| place.turn < before)
                    && self.except.binary_search(&place.turn).is_err()
            }
            Some(_) => options.across_sessions,
        };
        in_sessions
            && (options.roles.is_empty() || options.roles.contains(&place.role))
            && options.since_ms.is_none_or(|since| place.time_ms >= since)
            && options.until_ms.is_none_or(|until| place.time_ms < until)
            && place.exists(self.moment)
            && (options.stale || !place.is_stale(self.moment))
            // A session's turns are those of one partition.
            && (options.filter.is_none()
                || self.accepted.iter().any(|accepted| accepted.contains(place.session, place.turn)))
    }
}

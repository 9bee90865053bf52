//! Recall: which chunks a scope may see, scored by words and by vectors, fused.
//! Knows no file; everything it needs is in memory.

use std::collections::HashSet;

use super::Store;
use super::read::source;
use super::state::State;
use crate::partition::{Chunk, Moment, Partition, Place};
use crate::recall::{Parts, fading, fuse};
use crate::summary::{FOLLOW_UP_TERM_WEIGHT, FOLLOW_UP_TERMS, FOLLOW_UP_WORDS};
use crate::vectors::best;
use crate::words::{Collection, Query};
use crate::{ChunkId, Error, Hit, Recall, Result, Scope, Trust};

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
    /// One embedding of the query, and a scan of every sentence vector that the scope may see.
    pub fn recall(&self, scope: &Scope, query: &str, options: &Recall) -> Result<Vec<Hit>> {
        scope.check("recall")?;
        if options.min_score.is_nan() {
            return Err(Error::invalid("recall: expected min_score to be a number"));
        }
        if options.half_life_ms == Some(0) {
            return Err(Error::invalid("recall: expected half_life_ms of at least 1, got 0"));
        }
        if options.k == 0 || query.trim().is_empty() {
            return Ok(Vec::new());
        }
        let terms = self.terms();
        let mut words = terms.query(query);
        let mut vector = self.embed(&[query])?;
        let state = self.read();
        let view = View::new(&state, scope, options);
        let partitions = view.partitions();
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
        for partition in &partitions {
            let scores = partition.words().scores(&weighted, collection);
            for (slot, chunk) in partition.iter() {
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
        let mut fused = fuse(&parts, follow_up);
        if let Some(half_life_ms) = options.half_life_ms {
            let newest = candidates.iter().map(|(_, place, _)| place.time_ms).max().unwrap_or(0);
            let now = options.as_of_ms.or(options.now_ms).unwrap_or(newest);
            for ((score, _), (_, place, _)) in fused.iter_mut().zip(&candidates) {
                *score *= fading(now, place.time_ms, half_life_ms);
            }
        }
        let mut order: Vec<usize> = (0..candidates.len())
            .filter(|&at| {
                fused[at].0 >= options.min_score && (parts[at].bm25 > 0.0 || parts[at].cosine > 0.0)
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
}

impl<'a> View<'a> {
    fn new(state: &'a State, scope: &'a Scope, options: &'a Recall) -> Self {
        let moment = Moment { as_of_ms: options.as_of_ms, now_ms: options.now_ms };
        Self { state, scope, options, moment, own: state.session(scope).map(|(id, _)| id) }
    }

    /// The partitions with anything to see; statistics of words come from these and no others.
    fn partitions(&self) -> Vec<&'a Partition> {
        if self.scope.session_id().is_some() && !self.options.across_sessions {
            return self.state.partition(self.scope).into_iter().collect();
        }
        self.state.partitions_in(self.scope).map(|(_, partition)| partition).collect()
    }

    fn sees(&self, place: &Place) -> bool {
        let options = self.options;
        let in_sessions = match self.scope.session_id() {
            None => true,
            Some(_) if self.own == Some(place.session) => {
                options.before_turn.is_none_or(|before| place.turn < before)
            }
            Some(_) => options.across_sessions,
        };
        in_sessions
            && (options.roles.is_empty() || options.roles.contains(&place.role))
            && options.since_ms.is_none_or(|since| place.time_ms >= since)
            && options.until_ms.is_none_or(|until| place.time_ms < until)
            && place.exists(self.moment)
            && (options.stale || !place.is_stale(self.moment))
    }
}

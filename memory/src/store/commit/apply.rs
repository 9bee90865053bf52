//! Carrying a plan out: the disk takes it, then the indexes do.
//! Knows nothing of how it was planned.

use super::{Cut, Entry, Fresh, Plan};
use crate::format::Body;
use crate::partition::{Chunk, gist_hash};
use crate::store::state::partition_key;
use crate::store::{Store, Writer};
use crate::{Committed, Result, Role, Scope, TurnId};

/// How much of a user turn is kept at hand for the short question that may follow.
const LAST_USER_TEXT_BYTES: usize = 2048;

impl Store {
    pub(super) fn carry_out(
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
                let key = state.version_key(plan.session, *turn);
                silenced.extend(state.subject.clone().map(|subject| (subject, key)));
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
        for Fresh { id, text, vectors, turn, said } in plan.fresh {
            let home = (plan.session, turn);
            let (text, vectors) = (text.into(), vectors.into());
            let chunk = Chunk { id, text, vectors, home, places: Vec::with_capacity(1) };
            match said {
                Some(said) => {
                    partition.insert_with_gist(&writer.terms, chunk, gist_hash(&said));
                }
                None => partition.insert(&writer.terms, chunk),
            }
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
        for (subject, key) in silenced {
            partition.remove_version(&subject, key);
        }
        for (subject, version) in versions {
            partition.add_version(&subject, version);
        }
        drop(guard);
        if !plan.retracted.is_empty() {
            self.refresh_last_user_text(plan.session);
        }
        if let Err(error) = self.promote(writer, &[(partition_key(scope), bare)]) {
            // The commit is durable; the next opening makes up for it.
            writer.appender.abandon();
            tracing::warn!(%error, "near duplicates of retracted text are not recalled");
        }
        Ok(committed)
    }

    /// Reads the start of a session's latest user turn anew, after that turn may have been taken back.
    pub(in crate::store) fn refresh_last_user_text(&self, id: u64) {
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

/// The first bytes of a text, cut at a character.
pub(in crate::store) fn start_of(text: &str) -> &str {
    let mut end = text.len().min(LAST_USER_TEXT_BYTES);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

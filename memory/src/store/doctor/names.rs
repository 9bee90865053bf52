//! The names that segments hold of each session, and the one that a repair gives where another session has it by now.
//! Knows nothing of turns, and writes nothing.

use std::collections::BTreeMap;

use crate::Scope;
use crate::format::{BlobRef, decode_names};
use crate::store::state::State;

/// Whose a session becomes if nothing says any more whose it was.
pub(super) const LOST_AND_FOUND: &str = "lost+found";

/// Bytes of a session's name that one which says that it was found again begins with.
const FOUND_NAME_BYTES: usize = 160;

/// What the names in the segments say of each session's number.
#[derive(Default)]
pub(super) struct FoundNames(BTreeMap<u64, Found>);

/// What they say of one number.
enum Found {
    /// One session has it: the latest of its names, and the record of that.
    One(Scope, BlobRef),
    /// Two sessions were given it.
    Several,
}

impl FoundNames {
    /// Takes note of a record of names; of any other kind nothing.
    pub(super) fn note(&mut self, blob: BlobRef, payload: &[u8]) {
        let Ok(names) = decode_names(blob.kind, payload) else { return };
        let Some(id) = names.id else { return };
        let scope = names.into_scope();
        let found = match self.0.remove(&id) {
            None => Found::One(scope, blob),
            Some(Found::One(known, place)) if is_one_session(id, &known, &scope) => {
                // The name that a repair gave succeeds the one that the session was told by.
                if is_found_name(&known, id) && !is_found_name(&scope, id) {
                    Found::One(known, place)
                } else {
                    Found::One(scope, blob)
                }
            }
            Some(_) => Found::Several,
        };
        self.0.insert(id, found);
    }

    /// Whether another session than the one that the database knows was given this number, or two were.
    pub(super) fn is_shared(&self, state: &State, id: u64) -> bool {
        match self.0.get(&id) {
            None => false,
            Some(Found::Several) => true,
            Some(Found::One(scope, _)) => {
                let known = state.sessions.get(&id).and_then(|session| session.scope.as_ref());
                known.is_some_and(|known| !is_one_session(id, known, scope))
            }
        }
    }

    /// A session's names, and the record of them.
    pub(super) fn of(&self, state: &State, id: u64) -> Option<(&Scope, &BlobRef)> {
        match self.0.get(&id)? {
            Found::One(scope, blob) if !self.is_shared(state, id) => Some((scope, blob)),
            _ => None,
        }
    }
}

/// The name of session `id`: the one that it was `told` by, or if another session has that one by now, one that says so.
pub(super) fn free_name(told: &Scope, id: u64, is_taken: impl Fn(&Scope) -> bool) -> Scope {
    if !is_taken(told) {
        return told.clone();
    }
    let start = start(told, id);
    let mut names = (1..).map(|number| told.clone().session(found_name(start, id, number)));
    names.find(|scope| !is_taken(scope)).expect("there are more numbers than sessions")
}

/// The name number `number`, from 1 on, of session `id` where another one has the name that begins with `start`.
fn found_name(start: &str, id: u64, number: u64) -> String {
    let number = if number > 1 { format!(", {number}") } else { String::new() };
    format!("{start} ({LOST_AND_FOUND}, session {id}{number})")
}

/// What a name begins with that [`found_name`] made; None for any other.
fn start_of_found_name(name: &str, id: u64) -> Option<&str> {
    let (start, _) = name.rsplit_once(" (")?;
    let (_, last) = name.strip_suffix(')')?.rsplit_once(", ")?;
    // The first name ends with no number.
    let number = last.parse().unwrap_or(1);
    (found_name(start, id, number) == name).then_some(start)
}

fn is_found_name(scope: &Scope, id: u64) -> bool {
    start_of_found_name(scope.session_id().unwrap_or_default(), id).is_some()
}

/// The start that all names have which session `id` had or may be given.
fn start(scope: &Scope, id: u64) -> &str {
    let name = scope.session_id().unwrap_or_default();
    let told = start_of_found_name(name, id).unwrap_or(name);
    &told[..told.floor_char_boundary(FOUND_NAME_BYTES)]
}

/// Whether two names under one number are those of one session: the same, or one that a repair gave in the place of the other.
fn is_one_session(id: u64, one: &Scope, other: &Scope) -> bool {
    let is_renamed = || {
        (is_found_name(one, id) || is_found_name(other, id))
            && one.user_id() == other.user_id()
            && one.agent_id() == other.agent_id()
            && start(one, id) == start(other, id)
    };
    one == other || is_renamed()
}

//! Scopes: whatever two users do, neither ever sees the other's memory.

use mka_memory::{Cancel, Commit, Forget, NewTurn, Recall, Role, Scope, Store};
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::open;

#[derive(Debug, Clone)]
enum Action {
    Say { user: usize, agent: usize, session: usize, word: usize, shared: bool },
    Retract { user: usize, agent: usize, session: usize, turn: u64 },
    ForgetWord { user: usize, word: usize },
    ForgetSession { user: usize, agent: usize, session: usize },
    Reopen,
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let place = || (0usize..2, 0usize..2, 0usize..2);
    let action = prop_oneof![
        6 => (place(), 0usize..4, any::<bool>()).prop_map(|((user, agent, session), word, shared)| Action::Say { user, agent, session, word, shared }),
        1 => (place(), 0u64..4).prop_map(|((user, agent, session), turn)| Action::Retract { user, agent, session, turn }),
        1 => (0usize..2, 0usize..4).prop_map(|(user, word)| Action::ForgetWord { user, word }),
        1 => place().prop_map(|(user, agent, session)| Action::ForgetSession { user, agent, session }),
        1 => Just(Action::Reopen),
    ];
    prop::collection::vec(action, 1..14)
}

const USERS: [&str; 2] = ["ada", "bob"];
const WORDS: [&str; 4] = ["heron", "walrus", "badger", "otter"];

fn scope(user: usize, agent: usize, session: usize) -> Scope {
    let scope = Scope::user(USERS[user]).session(["one", "two"][session]);
    if agent == 0 { scope } else { scope.agent("bot") }
}

/// What may be seen: (user, agent, session, text), live turns only.
type Model = Vec<(usize, usize, usize, String)>;

fn check(store: &Store, model: &Model) {
    let texts = |scope: &Scope, across_sessions: bool| -> Vec<String> {
        let options = Recall { k: 999, across_sessions, ..Recall::default() };
        let hits = store.recall(scope, "heron walrus badger otter note", &options).unwrap();
        let mut texts: Vec<String> = hits.into_iter().map(|hit| hit.text).collect();
        texts.sort();
        texts
    };
    let expected = |keep: &dyn Fn(usize, usize, usize) -> bool| -> Vec<String> {
        let kept = model.iter().filter(|(user, agent, session, _)| keep(*user, *agent, *session));
        let mut texts: Vec<String> = kept.map(|(.., text)| text.clone()).collect();
        texts.sort();
        texts.dedup();
        texts
    };
    for (user, name) in USERS.iter().enumerate() {
        assert_eq!(texts(&Scope::user(*name), false), expected(&|u, _, _| u == user));
        assert_eq!(
            texts(&Scope::user(*name).agent("bot"), false),
            expected(&|u, a, _| u == user && a == 1)
        );
        for (agent, session) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let scope = scope(user, agent, session);
            assert_eq!(
                texts(&scope, false),
                expected(&|u, a, s| (u, a, s) == (user, agent, session))
            );
            let across = expected(&|u, a, _| u == user && (agent == 0 || a == agent));
            assert_eq!(texts(&scope, true), across);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn two_users_never_see_each_other(actions in actions()) {
        let folder = tempfile::tempdir().unwrap();
        let mut store = open(folder.path());
        let mut model: Vec<(usize, usize, usize, u64, String)> = Vec::new();
        for action in actions {
            match action {
                Action::Say { user, agent, session, word, shared } => {
                    let scope = scope(user, agent, session);
                    let text = if shared {
                        format!("A note on the {}.", WORDS[word])
                    } else {
                        format!("A note on the {} of {}.", WORDS[word], USERS[user])
                    };
                    let turns = vec![NewTurn::new(Role::User, text.clone())];
                    let committed = store.commit(&scope, Commit { turns, ..Commit::default() }).unwrap();
                    model.push((user, agent, session, committed.turns[0], text));
                }
                Action::Retract { user, agent, session, turn } => {
                    let scope = scope(user, agent, session);
                    let length = store.num_turns(&scope).unwrap();
                    let turn = turn.min(length);
                    store.commit(&scope, Commit { retract: Some(turn..length), ..Commit::default() }).unwrap();
                    model.retain(|known| (known.0, known.1, known.2) != (user, agent, session) || known.3 < turn);
                }
                Action::ForgetWord { user, word } => {
                    let receipt = store.forget(&Scope::user(USERS[user]), &Forget::matching(WORDS[word])).unwrap();
                    store.verify(&receipt).unwrap();
                    model.retain(|known| known.0 != user || !known.4.contains(WORDS[word]));
                }
                Action::ForgetSession { user, agent, session } => {
                    store.forget(&scope(user, agent, session), &Forget::session()).unwrap();
                    model.retain(|known| (known.0, known.1, known.2) != (user, agent, session));
                }
                Action::Reopen => {
                    drop(store);
                    store = open(folder.path());
                }
            }
            prop_assert!(store.stats().damaged.is_empty());
        }
        let model: Model = model.into_iter().map(|(u, a, s, _, text)| (u, a, s, text)).collect();
        check(&store, &model);
        let stats = store.stats();
        drop(store);
        let store = open(folder.path());
        check(&store, &model);
        prop_assert_eq!(store.stats().chunks, stats.chunks);
        prop_assert_eq!(store.stats().live_bytes, stats.live_bytes);
    }
}

/// Everything that a scope can be asked for, looked through for what belongs to somebody else.
fn look_for_leaks(store: &Store, rng: &mut ChaCha8Rng, operation: u64) {
    let user = rng.random_range(0..2);
    let (owner, other) = (USERS[user], USERS[1 - user]);
    let scope = match rng.random_range(0..3) {
        0 => Scope::user(owner),
        1 => Scope::user(owner).agent("bot"),
        _ => scope(user, rng.random_range(0..2), rng.random_range(0..2)),
    };
    let options = Recall {
        k: rng.random_range(1..40),
        across_sessions: rng.random(),
        stale: rng.random(),
        as_of_ms: rng.random_bool(0.3).then(|| rng.random_range(0..operation as i64 + 2)),
        now_ms: Some(operation as i64),
        ..Recall::default()
    };
    let query = format!("note on the {} of {other}", WORDS[rng.random_range(0..4)]);
    for hit in store.recall(&scope, &query, &options).unwrap() {
        assert_eq!(hit.source.user, owner, "operation {operation}");
        assert!(!hit.text.contains(other), "operation {operation}: {}", hit.text);
        let is_inside =
            scope.agent_id().is_none() || hit.source.agent.as_deref() == scope.agent_id();
        assert!(is_inside || scope.session_id().is_some(), "operation {operation}");
        let own = hit.source.session == scope.session_id().unwrap_or(&hit.source.session);
        assert!(own || options.across_sessions, "operation {operation}");
    }
    for chunk in store.chunks(&scope, 0..50, None).unwrap() {
        assert!(chunk.first.user == owner && !chunk.text.contains(other), "operation {operation}");
    }
    for session in store.sessions(&scope).unwrap() {
        assert_eq!(session.scope.user_id(), owner, "operation {operation}");
    }
    if operation.is_multiple_of(50) {
        let mut out = Vec::new();
        store.export(&scope, &mut out, &Cancel::new()).unwrap();
        assert!(!String::from_utf8(out).unwrap().contains(other), "operation {operation}");
    }
}

/// `MKA_SCOPE_OPERATIONS` sets how many; every operation is followed by a look for leaks.
#[test]
fn two_users_fuzzed_leak_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let operations = number("MKA_SCOPE_OPERATIONS").unwrap_or(400);
    let seed = number("MKA_SCOPE_SEED").unwrap_or(5);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path());
    for operation in 0..operations {
        let (user, word) = (rng.random_range(0..2), WORDS[rng.random_range(0..4)]);
        let name = USERS[user];
        let own = scope(user, rng.random_range(0..2), rng.random_range(0..2));
        match rng.random_range(0..100) {
            0..70 => {
                let text =
                    format!("A note on the {word} of {name}, number {}.", rng.random_range(0..30));
                let mut turn = NewTurn::new(Role::User, text);
                turn.time_ms = operation as i64;
                turn.subject = rng.random_bool(0.3).then(|| word.to_owned());
                turn.expires_ms = rng.random_bool(0.1).then_some(operation as i64 + 9);
                store.commit(&own, Commit { turns: vec![turn], ..Commit::default() }).unwrap();
            }
            70..85 => {
                let length = store.num_turns(&own).unwrap();
                let retract = Some(length.saturating_sub(rng.random_range(0..3))..length);
                store.commit(&own, Commit { retract, ..Commit::default() }).unwrap();
            }
            85..92 => {
                let selector = match rng.random_range(0..3) {
                    0 => Forget::matching(word),
                    1 => Forget::expired(operation as i64),
                    _ => Forget::before(operation as i64 - 100),
                };
                store.forget(&Scope::user(name), &selector).unwrap();
            }
            92..98 => drop(store.forget(&own, &Forget::session()).unwrap()),
            _ => {
                drop(store);
                store = open(folder.path());
            }
        }
        look_for_leaks(&store, &mut rng, operation);
    }
    let checkup = store.doctor(false, &Cancel::new()).unwrap();
    assert!(checkup.problems.is_empty(), "{:?}", checkup.problems);
    println!(
        "{operations} operations of two users from seed {seed}, no leak; {} chunks",
        store.stats().chunks
    );
}

//! Facts that change and facts that end: supersession, memory as of a time, expiry, fading.

use mka_memory::{Cancel, Commit, ErrorKind, Forget, NewTurn, Recall, Role, Scope, Store};

use crate::support::{files_with, open, say, trip};

fn told(store: &Store, scope: &Scope, subject: &str, text: &str, time_ms: i64) {
    let mut turn = NewTurn::new(Role::User, text);
    (turn.subject, turn.time_ms) = (Some(subject.into()), time_ms);
    store.commit(scope, Commit { turns: vec![turn], ..Commit::default() }).unwrap();
}

fn found(store: &Store, scope: &Scope, options: Recall) -> Vec<String> {
    let hits = store.recall(scope, "where is my home city", &options).unwrap();
    let mut texts: Vec<String> = hits.into_iter().map(|hit| hit.text).collect();
    texts.sort();
    texts
}

fn as_of(time_ms: i64) -> Recall {
    Recall { as_of_ms: Some(time_ms), ..Recall::default() }
}

#[test]
fn the_newest_turn_of_a_subject_wins_and_the_others_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let home = Scope::user("ada").session("home");
    told(&store, &trip(), "home", "My home city is Rome.", 100);
    told(&store, &home, "home", "My home city is Oslo.", 300);
    // Said later, about an earlier time.
    told(&store, &trip(), "home", "My home city is Bern.", 200);
    told(&store, &trip(), "work", "My work city is Turin.", 50);
    let ada = Scope::user("ada");
    let check = |store: &Store| {
        assert_eq!(
            found(store, &ada, Recall::default()),
            ["My home city is Oslo.", "My work city is Turin."]
        );
        assert_eq!(
            found(store, &ada, as_of(250)),
            ["My home city is Bern.", "My work city is Turin."]
        );
        assert_eq!(
            found(store, &ada, as_of(200)),
            ["My home city is Bern.", "My work city is Turin."]
        );
        assert_eq!(
            found(store, &ada, as_of(199)),
            ["My home city is Rome.", "My work city is Turin."]
        );
        assert_eq!(found(store, &ada, as_of(10)), Vec::<String>::new());
        let options = Recall { stale: true, ..Recall::default() };
        let hits = store.recall(&ada, "home city", &options).unwrap();
        let stale: Vec<bool> = ["Rome", "Bern", "Oslo", "Turin"]
            .iter()
            .map(|city| hits.iter().find(|hit| hit.text.contains(city)).unwrap().stale)
            .collect();
        assert_eq!(stale, [true, true, false, false]);
        assert_eq!((store.stats().subjects, store.stats().superseded), (2, 2));
        assert_eq!(store.turns(&trip(), 0..9).unwrap()[0].text, "My home city is Rome.");
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn what_superseded_gives_way_when_it_is_taken_back_or_forgotten() {
    for forget in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        told(&store, &trip(), "home", "My home city is Rome.", 100);
        told(&store, &trip(), "home", "My home city is Oslo.", 200);
        assert_eq!(found(&store, &trip(), Recall::default()), ["My home city is Oslo."]);
        if forget {
            store.forget(&trip(), &Forget::turn(1)).unwrap();
        } else {
            store.commit(&trip(), Commit { retract: Some(1..2), ..Commit::default() }).unwrap();
        }
        assert_eq!(found(&store, &trip(), Recall::default()), ["My home city is Rome."]);
        drop(store);
        assert_eq!(
            found(&open(folder.path()), &trip(), Recall::default()),
            ["My home city is Rome."]
        );
    }
}

#[test]
fn subjects_of_other_users_and_agents_are_others() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (bot, bob) =
        (Scope::user("ada").agent("bot").session("trip"), Scope::user("bob").session("trip"));
    told(&store, &trip(), "home", "My home city is Rome.", 100);
    told(&store, &bot, "home", "My home city is Oslo.", 200);
    told(&store, &bob, "home", "My home city is Bern.", 300);
    assert_eq!(found(&store, &trip(), Recall::default()), ["My home city is Rome."]);
    assert_eq!(found(&store, &bot, Recall::default()), ["My home city is Oslo."]);
    assert_eq!(found(&store, &bob, Recall::default()), ["My home city is Bern."]);
}

/// Facts that change several times, as in FactConsolidation of MemoryAgentBench: the latest one is found, always.
#[test]
fn of_a_hundred_changing_facts_only_the_latest_is_recalled() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let code = |person: u64, version: u64| (person * 7919 + version * 104_729) % 90_000 + 10_000;
    for version in 0..4 {
        for person in 0..100 {
            let text =
                format!("The locker of person{person} has the code {}.", code(person, version));
            told(
                &store,
                &trip(),
                &format!("locker {person}"),
                &text,
                (version * 100 + person) as i64,
            );
        }
    }
    for person in 0..100 {
        let query = format!("what is the locker code of person{person}");
        let recall = |options: &Recall| store.recall(&trip(), &query, options).unwrap();
        let latest = recall(&Recall { k: 1, ..Recall::default() });
        assert!(latest[0].text.contains(&code(person, 3).to_string()), "{:?}", latest[0].text);
        let all = recall(&Recall { k: 500, ..Recall::default() });
        for version in 0..3 {
            assert!(!all.iter().any(|hit| {
                hit.text
                    .contains(&format!("person{person} has the code {}.", code(person, version)))
            }));
        }
        let then = recall(&Recall { k: 1, as_of_ms: Some(199), ..Recall::default() });
        assert!(then[0].text.contains(&code(person, 1).to_string()), "{:?}", then[0].text);
    }
}

#[test]
fn what_expired_is_left_out_until_it_is_erased() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut turn = NewTurn::new(Role::User, "My home city is Lima this week.");
    (turn.time_ms, turn.expires_ms) = (100, Some(200));
    store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    say(&store, &trip(), Role::User, &["My home is a city flat."]);
    let check = |store: &Store| {
        let num = |options: Recall| found(store, &trip(), options).len();
        assert_eq!(num(Recall::default()), 2);
        assert_eq!(num(Recall { now_ms: Some(199), ..Recall::default() }), 2);
        assert_eq!(num(Recall { now_ms: Some(200), ..Recall::default() }), 1);
        // As of a time counts, not the clock.
        assert_eq!(num(Recall { now_ms: Some(900), ..as_of(150) }), 2);
        assert_eq!(store.turns(&trip(), 0..1).unwrap()[0].expires_ms, Some(200));
    };
    check(&store);
    drop(store);
    let store = open(folder.path());
    check(&store);
    assert_eq!(store.forget(&trip(), &Forget::expired(199)).unwrap().turns, 0);
    assert_eq!(store.forget(&trip(), &Forget::expired(200)).unwrap().turns, 1);
    assert!(files_with(folder.path(), "Lima").is_empty());
}

#[test]
fn at_the_end_of_time_stands_what_never_ends() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut turn = NewTurn::new(Role::User, "My home city is Lima this week.");
    (turn.time_ms, turn.expires_ms) = (100, Some(200));
    store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    told(&store, &trip(), "home", "My home city is Rome.", 100);
    told(&store, &trip(), "home", "My home city is Oslo.", 200);
    told(&store, &trip(), "work", "My work city is Turin.", 100);
    told(&store, &trip(), "work", "My work city is Bern.", i64::MAX);
    let latest = ["My home city is Oslo.", "My work city is Bern."];
    let check = |store: &Store| {
        assert_eq!(found(store, &trip(), as_of(i64::MAX)), latest);
        let now = Recall { now_ms: Some(i64::MAX), ..Recall::default() };
        assert_eq!(found(store, &trip(), now.clone()), latest);
        assert_eq!(found(store, &trip(), Recall { stale: true, ..now }).len(), 4);
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn scores_fade_where_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for (text, time_ms) in [("My home city is Rome.", 0), ("There is a city for cats.", 1000)] {
        let mut turn = NewTurn::new(Role::User, text);
        turn.time_ms = time_ms;
        store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    }
    let first = |options: &Recall| {
        let options = Recall { follow_up: false, ..options.clone() };
        store.recall(&trip(), "my home city is", &options).unwrap().remove(0)
    };
    let plain = first(&Recall::default());
    assert!(plain.text.contains("Rome"));
    let fading = Recall { half_life_ms: Some(100), now_ms: Some(1000), ..Recall::default() };
    assert!(first(&fading).text.contains("cats"));
    let slow = Recall {
        half_life_ms: Some(1000),
        now_ms: Some(1000),
        follow_up: false,
        ..Recall::default()
    };
    let hits = store.recall(&trip(), "my home city is", &slow).unwrap();
    let rome = hits.iter().find(|hit| hit.text.contains("Rome")).unwrap();
    assert!((rome.score - plain.score / 2.0).abs() < 1e-6);
    let zero = Recall { half_life_ms: Some(0), ..Recall::default() };
    assert_eq!(
        store.recall(&trip(), "home", &zero).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
}

#[test]
fn a_subject_has_a_length() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for subject in [String::new(), "x".repeat(257)] {
        let mut turn = NewTurn::new(Role::User, "x");
        turn.subject = Some(subject);
        let commit = Commit { turns: vec![turn], ..Commit::default() };
        assert_eq!(store.commit(&trip(), commit).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

//! Forks: what they share, how they part, and that neither keeps what the other's owner had forgotten.

use std::collections::BTreeMap;
use std::path::Path;

use mka_memory::{
    Cancel, Commit, ErrorKind, Forget, NewSnapshot, NewTurn, Recall, Repair, Role, Scope, Store,
    StoreOptions,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{BACKENDS, files_with, keyed, open, open_with, prose, say, trip};

const MODEL: [u8; 16] = [7; 16];
const PAGE_BYTES: usize = 4000;

fn other() -> Scope {
    Scope::user("ada").session("other")
}

/// A page of this number, as `writer` writes it.
fn page(number: u64, writer: u64) -> Vec<u8> {
    let mut bytes = vec![number as u8; PAGE_BYTES];
    bytes[..8].copy_from_slice(&writer.to_le_bytes());
    bytes
}

/// Commits one turn and the page `number`; the window is the last two pages.
fn page_turn(store: &Store, scope: &Scope, text: &str, number: u64, writer: u64) {
    let window: Vec<u64> = (number.saturating_sub(1)..=number).collect();
    let stored = store.pages(scope).unwrap();
    let missing = window.iter().filter(|it| **it == number || !stored.contains(it));
    let snapshot = NewSnapshot {
        fingerprint: MODEL,
        position: number,
        state: [number, writer].iter().flat_map(|x| x.to_le_bytes()).collect(),
        pages: missing.map(|number| (*number, page(*number, writer).into())).collect(),
        window,
        first_page: 0,
    };
    let turns = vec![NewTurn::new(Role::User, text)];
    store.commit(scope, Commit { turns, snapshot: Some(snapshot), retract: None }).unwrap();
}

fn recalled(store: &Store, scope: &Scope, query: &str) -> String {
    let hits = store.recall(scope, query, &Recall::default()).unwrap();
    hits.into_iter().map(|hit| format!("{}: {}\n", hit.source.session, hit.text)).collect()
}

/// Everything of a session that a caller can read.
fn contents(store: &Store, scope: &Scope) -> String {
    let turns = store.turns(scope, 0..999).unwrap();
    let snapshot = store.snapshot(scope, MODEL).unwrap();
    let pages: Vec<_> = store.pages(scope).unwrap();
    let pages: Vec<_> = pages.iter().map(|it| (it, store.page(scope, *it).unwrap())).collect();
    format!("{turns:?} {snapshot:?} {pages:?}")
}

fn is_whole(store: &Store) {
    assert_eq!(store.doctor(false, &Cancel::new()).unwrap().problems, []);
}

fn keeping(path: &Path) -> Store {
    let options = StoreOptions { evicted_page_bytes: 1 << 20, ..StoreOptions::default() };
    open_with(path, options).unwrap()
}

#[test]
fn a_fork_holds_what_was_told_before_it_and_each_recalls_its_own_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path());
    let mut fact = NewTurn::new(Role::User, "The harbor is closed on Monday.");
    (fact.time_ms, fact.tokens, fact.source) = (5, vec![1, 2], Some("port.md".into()));
    fact.metadata.insert("place".into(), "harbor".into());
    store.commit(&trip(), Commit { turns: vec![fact], ..Commit::default() }).unwrap();
    say(&store, &trip(), Role::Assistant, &["I do not know the bridge."]);
    let turns = vec![NewTurn::new(Role::Assistant, "The bridge is open.")];
    store.commit(&trip(), Commit { turns, retract: Some(1..2), ..Commit::default() }).unwrap();
    for number in 0..6 {
        page_turn(&store, &trip(), &prose(number, 30), number, 0);
    }
    let before = store.stats();
    assert_eq!(store.fork(&trip(), "other").unwrap(), other());
    let after = store.stats();
    assert_eq!(contents(&store, &other()), contents(&store, &trip()));
    assert_eq!((after.pages, after.chunks), (2 * before.pages, before.chunks));
    // Texts and a summary of some kilobytes, beside six pages.
    assert!(after.live_bytes - before.live_bytes < 3 * PAGE_BYTES as u64, "pages were copied");
    assert!(recalled(&store, &other(), "is the harbor closed").starts_with("other: The harbor"));
    assert!(recalled(&store, &trip(), "is the harbor closed").starts_with("trip: The harbor"));
    assert!(!recalled(&store, &other(), "bridge").contains("do not know"));

    page_turn(&store, &trip(), "Walnuts are in the pantry.", 6, 1);
    page_turn(&store, &other(), "Plums are in the cellar.", 6, 2);
    let check = |store: &Store| {
        assert!(recalled(store, &trip(), "where are walnuts").contains("pantry"));
        assert!(!recalled(store, &trip(), "where are plums").contains("cellar"));
        assert!(recalled(store, &other(), "where are plums").contains("cellar"));
        assert!(!recalled(store, &other(), "where are walnuts").contains("pantry"));
        assert!(recalled(store, &other(), "is the harbor closed").contains("Monday"));
        for (scope, writer) in [(trip(), 1), (other(), 2)] {
            let snapshot = store.snapshot(&scope, MODEL).unwrap().unwrap();
            assert_eq!(snapshot.pages, [(5, page(5, 0)), (6, page(6, writer))]);
            assert_eq!(store.page(&scope, 2).unwrap(), Some(page(2, 0)));
        }
        is_whole(store);
    };
    check(&store);
    drop(store);
    check(&keeping(folder.path()));
}

#[test]
fn bytes_that_sessions_share_are_counted_and_compacted_once() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path());
    for number in 0..20 {
        page_turn(&store, &trip(), &prose(number, 20), number, 0);
    }
    store.compact_all().unwrap();
    let alone = store.stats().live_bytes;
    for name in ["a", "b", "c"] {
        store.fork(&trip(), name).unwrap();
    }
    let shared = store.stats().live_bytes;
    assert!(shared - alone < 20 * PAGE_BYTES as u64, "{alone} alone, {shared} of four");
    store.compact_all().unwrap();
    let stats = store.stats();
    assert_eq!((stats.live_bytes, stats.dead_bytes), (shared, 0));
    is_whole(&store);
    drop(store);
    let store = keeping(folder.path());
    assert_eq!(store.stats().live_bytes, shared);
    let c = Scope::user("ada").session("c");
    assert_eq!(contents(&store, &c), contents(&store, &trip()));
    // The last one that holds a page keeps it, and nothing of it stays behind.
    for name in ["a", "b"] {
        store.forget(&Scope::user("ada").session(name), &Forget::Session).unwrap();
    }
    assert_eq!(store.stats().dead_bytes, 0);
    assert_eq!(contents(&store, &c), contents(&store, &trip()));
    store.forget(&c, &Forget::Session).unwrap();
    let stats = store.stats();
    assert_eq!(stats.dead_bytes, 0);
    assert!(stats.live_bytes <= alone, "{} of {alone}", stats.live_bytes);
    assert_eq!(store.page(&trip(), 3).unwrap(), Some(page(3, 0)));
}

#[test]
fn the_budget_of_one_session_lets_go_of_no_page_of_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        StoreOptions { evicted_page_bytes: 4 * PAGE_BYTES as u64, ..StoreOptions::default() };
    let store = open_with(folder.path(), options).unwrap();
    for number in 0..6 {
        page_turn(&store, &trip(), &prose(number, 20), number, 0);
    }
    store.fork(&trip(), "other").unwrap();
    for number in 6..20 {
        page_turn(&store, &trip(), &prose(number, 20), number, 1);
    }
    assert_eq!(store.page(&trip(), 3).unwrap(), None);
    store.compact_all().unwrap();
    assert_eq!(store.page(&other(), 3).unwrap(), Some(page(3, 0)));
    assert_eq!(store.pages(&other()).unwrap(), [0, 1, 2, 3, 4, 5]);
    // A retraction on one side stays there.
    let retract = Some(0..store.num_turns(&trip()).unwrap());
    store.commit(&trip(), Commit { retract, ..Commit::default() }).unwrap();
    assert!(recalled(&store, &trip(), &prose(2, 20)).is_empty());
    assert!(recalled(&store, &other(), &prose(2, 20)).contains("Note 2 begins"));
    is_whole(&store);
}

#[test]
fn a_turn_that_was_told_before_the_fork_is_forgotten_on_both_sides() {
    const SECRET: &str = "walrus-4711";
    for selector in [Forget::Turn(1), Forget::matching(SECRET), Forget::Session] {
        for from_fork in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let store = keeping(folder.path());
            page_turn(&store, &trip(), "The garden has a gate.", 0, 0);
            page_turn(&store, &trip(), &format!("The code is {SECRET}."), 1, 0);
            store.fork(&trip(), "other").unwrap();
            store.fork(&other(), "third").unwrap();
            page_turn(&store, &trip(), "Walnuts are in the pantry.", 2, 1);
            page_turn(&store, &other(), "Plums are in the cellar.", 2, 2);
            let quote = format!("> The code is {SECRET}.");
            say(&store, &Scope::user("ada").session("far"), Role::Recalled, &[&quote]);
            let scope = if from_fork { other() } else { trip() };
            let receipt = store.forget(&scope, &selector).unwrap();
            store.verify(&receipt).unwrap();
            is_whole(&store);
            assert_eq!(store.stats().dead_bytes, 0);
            if selector == Forget::Session && from_fork {
                // What the fork got stays where it came from, and where else it went.
                assert_eq!(store.num_turns(&other()).unwrap(), 0);
                assert!(recalled(&store, &trip(), "what is the code").contains(SECRET));
                let third = Scope::user("ada").session("third");
                assert!(recalled(&store, &third, "what is the code").contains(SECRET));
                assert_eq!(store.page(&trip(), 1).unwrap(), Some(page(1, 0)));
                continue;
            }
            assert!(files_with(folder.path(), SECRET).is_empty(), "{selector:?} {from_fork}");
            assert_eq!(store.pages(&trip()).unwrap(), [0u64; 0]);
            assert_eq!(store.pages(&other()).unwrap(), [0u64; 0]);
            assert!(store.turns(&other(), 1..2).unwrap()[0].forgotten);
            assert!(recalled(&store, &other(), "where are plums").contains("cellar"));
            let has_gate = recalled(&store, &other(), "garden gate").contains("gate");
            assert_eq!(has_gate, selector != Forget::Session);
        }
    }
}

#[test]
fn what_one_side_forgets_of_its_own_leaves_the_others_pages() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path());
    page_turn(&store, &trip(), "The garden has a gate.", 0, 0);
    page_turn(&store, &trip(), "The gate is green.", 1, 0);
    store.fork(&trip(), "other").unwrap();
    page_turn(&store, &trip(), "Walnuts are in the pantry.", 2, 1);
    page_turn(&store, &other(), "Plums are in the cellar.", 2, 2);
    // The same number, but another turn.
    let before = contents(&store, &trip());
    store.forget(&other(), &Forget::Turn(2)).unwrap();
    assert_eq!(contents(&store, &trip()), before);
    assert_eq!(store.pages(&other()).unwrap(), [0u64; 0]);
    assert_eq!(store.stats().dead_bytes, 0);
    is_whole(&store);
}

#[test]
fn a_fork_says_about_a_subject_what_its_original_says() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let fact = |text: &str, time_ms: i64| {
        let mut turn = NewTurn::new(Role::User, text);
        (turn.subject, turn.time_ms) = (Some("home".into()), time_ms);
        Commit { turns: vec![turn], ..Commit::default() }
    };
    store.commit(&trip(), fact("I live in Lyon.", 1)).unwrap();
    store.commit(&trip(), fact("I live in Ghent.", 2)).unwrap();
    let counts = |store: &Store| {
        let stats = store.stats();
        (stats.subjects, stats.superseded)
    };
    assert_eq!(counts(&store), (1, 1));
    store.fork(&trip(), "other").unwrap();
    let check = |store: &Store| {
        assert_eq!(counts(store), (1, 2));
        for scope in [trip(), other()] {
            let found = recalled(store, &scope, "where do I live");
            assert!(found.contains("Ghent") && !found.contains("Lyon"), "{found}");
        }
        is_whole(store);
    };
    check(&store);
    drop(store);
    let store = open(folder.path());
    check(&store);
    store.commit(&other(), fact("I live in Porto.", 3)).unwrap();
    assert_eq!(counts(&store), (1, 4));
    assert!(!recalled(&store, &trip(), "where do I live").contains("Ghent"));
    is_whole(&store);
}

#[test]
fn what_cannot_be_forked_is_refused_and_nothing_changes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let refused = |scope: &Scope, name: &str| {
        let error = store.fork(scope, name).unwrap_err();
        (error.kind(), error.to_string())
    };
    let (kind, text) = refused(&trip(), "other");
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(text.contains("ada/*/trip holds nothing yet, expected"), "{text}");
    say(&store, &trip(), Role::User, &["Hello."]);
    say(&store, &other(), Role::User, &["Good evening."]);
    let (kind, text) = refused(&trip(), "other");
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(text.contains("ada/*/other is there already, expected"), "{text}");
    assert_eq!(refused(&trip(), "trip").0, ErrorKind::InvalidArgument);
    assert_eq!(refused(&trip(), "").0, ErrorKind::InvalidArgument);
    assert_eq!(refused(&trip(), &"x".repeat(300)).0, ErrorKind::InvalidArgument);
    assert_eq!(refused(&Scope::user("ada"), "other").0, ErrorKind::InvalidArgument);
    // The name of another agent's session is not taken.
    let bot = Scope::user("ada").agent("bot").session("trip");
    say(&store, &bot, Role::User, &["Beep."]);
    assert_eq!(
        store.fork(&bot, "other").unwrap(),
        Scope::user("ada").agent("bot").session("other")
    );
    assert_eq!(store.stats().sessions, 4);
    is_whole(&store);
}

#[test]
fn a_damaged_turn_keeps_its_session_from_being_forked_until_it_is_mended() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The heron nests.", "The bridge is closed."]);
    let segment = crate::support::files(&folder.path().join("segments")).pop().unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    let at = bytes.windows(5).position(|window| window == b"heron").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let error = store.fork(&trip(), "other").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupted);
    assert_eq!(store.num_turns(&other()).unwrap(), 0);
    let checkup = store.doctor(true, &Cancel::new()).unwrap();
    assert!(checkup.problems.iter().any(|it| it.repair == Repair::Lost));
    store.fork(&trip(), "other").unwrap();
    let turns = store.turns(&other(), 0..9).unwrap();
    assert_eq!((turns[0].forgotten, turns[1].text.as_str()), (true, "The bridge is closed."));
    is_whole(&store);
}

#[test]
fn an_encrypted_session_is_forked_and_exports_and_backups_hold_both() {
    let folder = tempfile::tempdir().unwrap();
    let store = keyed(&folder.path().join("store"), 9).unwrap();
    page_turn(&store, &trip(), "The garden has a gate.", 0, 0);
    page_turn(&store, &trip(), "The gate is green.", 1, 0);
    store.fork(&trip(), "other").unwrap();
    page_turn(&store, &other(), "Plums are in the cellar.", 2, 2);
    store.compact_all().unwrap();
    store.backup(&folder.path().join("copy"), &Cancel::new()).unwrap();
    let mut lines = Vec::new();
    store.export(&Scope::user("ada"), &mut lines, &Cancel::new()).unwrap();
    let copy = keyed(&folder.path().join("copy"), 9).unwrap();
    let imported = open(&folder.path().join("imported"));
    imported.import(&mut lines.as_slice(), &Cancel::new()).unwrap();
    for scope in [trip(), other()] {
        assert_eq!(contents(&copy, &scope), contents(&store, &scope));
        let turns = |store: &Store| store.turns(&scope, 0..9).unwrap();
        assert_eq!(turns(&imported), turns(&store));
    }
    is_whole(&copy);
    // A turn that was one before is one in the store that took the log over.
    is_whole(&imported);
    let receipt = imported.forget(&other(), &Forget::Turn(1)).unwrap();
    imported.verify(&receipt).unwrap();
    assert!(files_with(&folder.path().join("imported"), "green").is_empty());
    assert!(imported.turns(&trip(), 1..2).unwrap()[0].forgotten);
    // Alone a fork is a session like any other.
    let mut lines = Vec::new();
    store.export(&other(), &mut lines, &Cancel::new()).unwrap();
    let alone = open(&folder.path().join("alone"));
    alone.import(&mut lines.as_slice(), &Cancel::new()).unwrap();
    assert_eq!(alone.turns(&other(), 0..9).unwrap(), store.turns(&other(), 0..9).unwrap());
    assert!(!String::from_utf8(lines).unwrap().contains("copy_of"));
}

#[test]
fn a_fork_of_a_long_session_copies_its_texts_and_shares_its_pages() {
    const TOKENS: u64 = 128 << 10;
    const TURNS: u64 = 64;
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path());
    let turns = (0..TURNS).map(|number| {
        // Three quarters of a word for each token.
        let mut turn =
            NewTurn::new(Role::Document, prose(number, (TOKENS / TURNS * 3 / 4) as usize));
        turn.tokens = (0..TOKENS as u32 / TURNS as u32).collect();
        turn
    });
    let snapshot = NewSnapshot {
        fingerprint: MODEL,
        position: TOKENS,
        state: vec![1; 1000],
        pages: (0..2 * TOKENS / 64)
            .map(|number| (number, page(number, 0)[..64].to_vec().into()))
            .collect(),
        window: (0..32).collect(),
        first_page: 0,
    };
    let commit = Commit { turns: turns.collect(), snapshot: Some(snapshot), retract: None };
    store.commit(&trip(), commit).unwrap();
    let before = store.stats();
    let start = std::time::Instant::now();
    store.fork(&trip(), "other").unwrap();
    let took = start.elapsed();
    let after = store.stats();
    let added = after.live_bytes - before.live_bytes;
    println!(
        "a fork of {TOKENS} tokens, {} pages and landmarks: {took:?}, {added} bytes",
        before.pages
    );
    assert_eq!(after.pages, 2 * before.pages);
    assert!(added < 16 * TOKENS, "{added} bytes for {TOKENS} tokens");
}

/// What a session should hold: turns (text, retracted, forgotten) with the number of the saying, and pages of its window.
#[derive(Clone, Default)]
struct Model {
    turns: Vec<(u64, String, bool, bool)>,
    window: Vec<(u64, Vec<u8>)>,
    next_page: u64,
}

#[test]
fn sessions_that_fork_talk_retract_and_forget_at_random_are_as_a_model_of_them_says() {
    let seed = std::env::var("MKA_FORK_SEED").map_or(5, |n| n.parse().expect("a number"));
    println!("seed {seed}");
    for backend in BACKENDS {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let options = StoreOptions {
                backend,
                evicted_page_bytes: 6 * PAGE_BYTES as u64,
                ..StoreOptions::default()
            };
            open_with(folder.path(), options).unwrap()
        };
        let mut store = open();
        let scope = |name: &str| Scope::user("ada").session(name);
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        models.insert("s000".into(), Model::default());
        let (mut num_said, mut num_sessions, mut most) = (0, 1, 1);
        for step in 0..180 {
            most = most.max(models.len());
            let at = rng.random_range(0..models.len());
            let name = models.keys().nth(at).unwrap().clone();
            let mut model = models[&name].clone();
            let own = scope(&name);
            let mut is_gone = false;
            match rng.random_range(0..11) {
                0..5 => {
                    let text = prose(num_said, 12);
                    let number = model.next_page;
                    page_turn(&store, &own, &text, number, num_said);
                    model.window.retain(|(page, _)| *page + 1 == number);
                    if model.window.is_empty() && number > 0 {
                        model.window.push((number - 1, page(number - 1, num_said)));
                    }
                    model.window.push((number, page(number, num_said)));
                    model.turns.push((num_said, text, false, false));
                    model.next_page += 1;
                    num_said += 1;
                }
                5..7 if !model.turns.is_empty() && models.len() < 7 => {
                    let fork = format!("s{num_sessions:03}");
                    store.fork(&own, &fork).unwrap();
                    models.insert(fork, model.clone());
                    num_sessions += 1;
                }
                7 if !model.turns.is_empty() => {
                    let from = rng.random_range(0..model.turns.len());
                    let retract = Some(from as u64..model.turns.len() as u64);
                    store.commit(&own, Commit { retract, ..Commit::default() }).unwrap();
                    if model.turns[from..].iter().any(|turn| !turn.2) {
                        model.window.clear();
                    }
                    model.turns[from..].iter_mut().for_each(|turn| turn.2 = true);
                }
                8 if !model.turns.is_empty() => {
                    let turn = rng.random_range(0..model.turns.len());
                    let (said, was_forgotten) = (model.turns[turn].0, model.turns[turn].3);
                    let receipt = store.forget(&own, &Forget::Turn(turn as u64)).unwrap();
                    store.verify(&receipt).unwrap();
                    assert_eq!(store.stats().dead_bytes, 0);
                    let holds = |model: &&mut Model| model.turns.iter().any(|it| it.0 == said);
                    models.insert(name.clone(), model.clone());
                    for model in models.values_mut().filter(|_| !was_forgotten).filter(holds) {
                        let turn = model.turns.iter_mut().find(|it| it.0 == said).unwrap();
                        (turn.1, turn.3) = (String::new(), true);
                        model.window.clear();
                    }
                    model = models[&name].clone();
                }
                9 if !model.turns.is_empty() && rng.random_bool(0.5) => {
                    let receipt = store.forget(&own, &Forget::Session).unwrap();
                    store.verify(&receipt).unwrap();
                    assert_eq!(store.stats().dead_bytes, 0);
                    // What an older session holds is that one's, and stays where else it is.
                    let older = models.range(..name.clone()).flat_map(|(_, it)| &it.turns);
                    let own = model.turns.iter().filter(|turn| !turn.3).map(|turn| turn.0);
                    let own: Vec<u64> =
                        own.filter(|said| !older.clone().any(|it| it.0 == *said)).collect();
                    models.remove(&name);
                    for model in models.values_mut() {
                        let turns = model.turns.iter_mut().filter(|it| own.contains(&it.0));
                        let num = turns.map(|it| (it.1, it.3) = (String::new(), true)).count();
                        if num > 0 {
                            model.window.clear();
                        }
                    }
                    if models.is_empty() {
                        models.insert(format!("s{num_sessions:03}"), Model::default());
                        num_sessions += 1;
                    }
                    is_gone = true;
                }
                _ => {
                    drop(store);
                    store = open();
                }
            }
            if !is_gone {
                models.insert(name, model);
            }
            for (name, model) in &models {
                let turns = store.turns(&scope(name), 0..999).unwrap();
                let turns: Vec<_> =
                    turns.iter().map(|it| (it.text.clone(), it.retracted, it.forgotten)).collect();
                let expected: Vec<_> =
                    model.turns.iter().map(|it| (it.1.clone(), it.2, it.3)).collect();
                assert_eq!(turns, expected, "seed {seed}, step {step}, {name}");
                let snapshot = store.snapshot(&scope(name), MODEL).unwrap();
                let window = snapshot.map_or_else(Vec::new, |snapshot| snapshot.pages);
                assert_eq!(window, model.window, "seed {seed}, step {step}, {name}");
                let live = model.turns.iter().rfind(|it| !it.2 && !it.3);
                if let Some((_, text, ..)) = live {
                    assert!(recalled(&store, &scope(name), text).contains(text.as_str()));
                }
            }
            is_whole(&store);
        }
        assert!(most > 4, "{most} sessions at most");
    }
}

//! The vector index in a store: many chunks, graphs in the background and on the disk, filters, scopes.
//! Knows nothing of the crate's inside.

use std::path::Path;
use std::sync::Arc;

use mka_memory::{
    Cancel, Commit, Embedder, Filter, Forget, HashedEmbedder, NewTurn, Recall, Role, Scope, Store,
    StoreOptions,
};

use crate::support::{files, prose, trip};

/// A graph from 1,000 vectors on: what takes 250,000 otherwise.
fn open(path: &Path, graph_vectors: usize) -> Store {
    let options = StoreOptions { graph_vectors, ..StoreOptions::default() };
    Store::open(path, Arc::new(HashedEmbedder::new()), options).unwrap()
}

fn fact(number: usize) -> String {
    format!(
        "{} The locker of guest number {number} opens with code {}.",
        prose(number as u64, 6),
        number * 7919
    )
}

/// `num` facts, ten a session, marked with their number and its last digit.
fn fill(store: &Store, scope: &Scope, num: usize) {
    for start in (0..num).step_by(10) {
        let turns = (start..(start + 10).min(num)).map(|number| {
            let mut turn = NewTurn::new(Role::User, fact(number));
            turn.metadata.insert("number".into(), (number as i32).into());
            turn.metadata.insert("digit".into(), format!("d{}", number % 10).into());
            turn.time_ms = number as i64;
            turn
        });
        let scope = scope.clone().session(format!("s{}", start / 100));
        store.commit(&scope, Commit { turns: turns.collect(), ..Commit::default() }).unwrap();
    }
}

/// A store with a graph over all of these facts.
fn filled(path: &Path, scopes: &[(&Scope, usize)]) -> Store {
    let store = open(path, usize::MAX);
    scopes.iter().for_each(|(scope, num)| fill(&store, scope, *num));
    drop(store);
    let store = open(path, 1_000);
    store.finish_indexing();
    assert_eq!(store.stats().vectors_in_graphs, store.stats().vectors);
    store
}

fn top(store: &Store, scope: &Scope, query: &str, options: &Recall) -> Vec<String> {
    store.recall(scope, query, options).unwrap().into_iter().map(|hit| hit.text).collect()
}

fn finds(store: &Store, scope: &Scope, numbers: impl Iterator<Item = usize>) -> usize {
    numbers
        .filter(|&number| {
            let query = format!("which code opens the locker of guest number {number}");
            top(store, scope, &query, &Recall::default()).contains(&fact(number))
        })
        .count()
}

#[test]
fn many_chunks_are_found_by_the_scan_and_by_the_graph_before_and_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = open(folder.path(), usize::MAX);
    fill(&store, &ada, 1_500);
    assert_eq!((store.stats().chunks, store.stats().vectors_in_graphs), (1_500, 0));
    assert_eq!(finds(&store, &ada, (0..1_500).step_by(30)), 50);
    drop(store);

    let store = open(folder.path(), 1_000);
    store.finish_indexing();
    assert_eq!(store.stats().vectors_in_graphs, 1_500);
    assert_eq!(finds(&store, &ada, (0..1_500).step_by(30)), 50);
    // New rows are found beside the graph.
    let turn = NewTurn::new(Role::User, "The zebra crossing is closed for repairs until Thursday.");
    store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    let asked = "is the zebra crossing open";
    assert!(top(&store, &ada, asked, &Recall::default())[0].contains("zebra"));
    drop(store);

    // The graph is read, not built.
    let store = open(folder.path(), 1_000);
    assert_eq!(store.stats().vectors_in_graphs, 1_500);
    assert_eq!(finds(&store, &ada, (0..1_500).step_by(30)), 50);
    assert!(top(&store, &ada, asked, &Recall::default())[0].contains("zebra"));
}

#[test]
fn a_lost_or_damaged_graph_is_built_anew() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    drop(filled(folder.path(), &[(&ada, 1_100)]));
    let graph = || files(&folder.path().join("index")).pop().unwrap();
    let whole = std::fs::read(graph()).unwrap();
    let mut damages: Vec<Vec<u8>> = Vec::new();
    for at in [0, 9, 33, 50, 70, whole.len() / 3, whole.len() - 1] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        damages.push(damaged);
    }
    damages.extend([0, 40, whole.len() - 1].map(|len| whole[..len].to_vec()));
    for damaged in damages {
        std::fs::write(graph(), damaged).unwrap();
        let store = open(folder.path(), usize::MAX);
        assert_eq!(store.stats().vectors_in_graphs, 0);
        assert!(store.stats().damaged.is_empty());
        assert!(files(&folder.path().join("index")).is_empty());
        assert_eq!(finds(&store, &ada, (0..1_100).step_by(110)), 10);
        drop(store);
        std::fs::write(folder.path().join("index/0.graph"), b"junk").unwrap();
        std::fs::write(folder.path().join("index/half.new"), &whole[..1_000]).unwrap();
        let store = open(folder.path(), 1_000);
        store.finish_indexing();
        assert!(store.stats().vectors_in_graphs >= 1_000);
        assert_eq!(files(&folder.path().join("index")).len(), 1);
    }
}

#[test]
fn what_is_forgotten_leaves_the_graph_and_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = filled(folder.path(), &[(&ada, 1_200)]);
    let index = folder.path().join("index");
    let before = std::fs::read(files(&index).pop().unwrap()).unwrap();
    let forgotten = fact(605);
    let receipt = store.forget(&ada, &Forget::matching("guest number 605 ")).unwrap();
    assert_eq!((receipt.turns, receipt.chunks), (1, 1));
    store.verify(&receipt).unwrap();
    let after = std::fs::read(files(&index).pop().unwrap()).unwrap();
    assert!(before != after && before.len() == after.len());
    let zeros =
        |bytes: &[u8]| bytes.chunks_exact(64).filter(|row| row.iter().all(|b| *b == 0)).count();
    assert!(zeros(&after) >= zeros(&before) + 5, "the row of 384 bytes is still there");
    let options = Recall { k: 50, ..Recall::default() };
    assert!(!top(&store, &ada, &forgotten, &options).contains(&forgotten));
    assert_eq!(finds(&store, &ada, (0..1_200).step_by(40)), 30);
    // Beyond a fifth the graph is built anew.
    let old = store.stats().vectors_in_graphs;
    assert_eq!(old, 1_199);
    for digit in ["1", "2", "3"] {
        let sessions = Scope::user("ada").session(format!("s{digit}"));
        store.forget(&sessions, &Forget::session()).unwrap();
    }
    store.finish_indexing();
    let stats = store.stats();
    assert_eq!((stats.vectors, stats.vectors_in_graphs), (899, 899));
    drop(store);
    let store = open(folder.path(), usize::MAX);
    assert_eq!(store.stats().vectors_in_graphs, 899);
    assert!(!top(&store, &ada, &forgotten, &options).contains(&forgotten));
}

/// Whether a filter keeps the fact of a number.
type Keeps = fn(usize) -> bool;

#[test]
fn filters_are_applied_before_the_best_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let mut store = filled(folder.path(), &[(&ada, 1_500)]);
    for reopened in [false, true] {
        if reopened {
            drop(store);
            store = open(folder.path(), 1_000);
        }
        // The best by far is not among the allowed: what is found must be the best of those.
        let query = "which code opens the locker of guest number 777";
        let cases: [(Filter, Keeps); 5] = [
            (Filter::eq("digit", "d3"), |n| n % 10 == 3),
            (Filter::range("number", 100, 115), |n| (100..=115).contains(&n)),
            (Filter::eq("number", 42), |n| n == 42),
            (Filter::any_of("digit", ["d1", "d2"]).and(Filter::at_least("number", 1_400)), |n| {
                (n % 10 == 1 || n % 10 == 2) && n >= 1_400
            }),
            (Filter::has("digit").and(Filter::at_most("number", 1_490).not()), |n| n > 1_490),
        ];
        for (filter, keeps) in cases {
            let options = Recall { k: 2_000, filter: Some(filter.clone()), ..Recall::default() };
            let mut found = top(&store, &ada, query, &options);
            let mut expected: Vec<String> = (0..1_500).filter(|&n| keeps(n)).map(fact).collect();
            found.sort();
            expected.sort();
            assert_eq!(found, expected, "{filter:?}");
            let best = Recall { k: 3, filter: Some(filter), ..Recall::default() };
            assert!(top(&store, &ada, query, &best).iter().all(|text| expected.contains(text)));
        }
        let nothing = Recall { filter: Some(Filter::eq("absent", true)), ..Recall::default() };
        assert!(top(&store, &ada, query, &nothing).is_empty());
        let everything =
            Recall { k: 1, filter: Some(Filter::eq("absent", true).not()), ..Recall::default() };
        assert_eq!(top(&store, &ada, query, &everything), [fact(777)]);
        let turn = &store.turns(&Scope::user("ada").session("s0"), 7..8).unwrap()[0];
        assert_eq!(turn.metadata["number"], 7.into());
    }
    let wrong = Recall { filter: Some(Filter::eq("x", f64::NAN)), ..Recall::default() };
    assert!(store.recall(&ada, "x", &wrong).is_err());
    let mut turn = NewTurn::new(Role::User, "x");
    turn.metadata.insert("x".into(), f64::NAN.into());
    assert!(store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).is_err());
}

#[test]
fn every_chunk_is_found_where_there_is_no_limit() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = filled(folder.path(), &[(&ada, 1_200)]);
    let mut expected: Vec<String> = (0..1_200).map(fact).collect();
    expected.sort();
    for k in [usize::MAX / 8 + 2, usize::MAX / 16 + 1, usize::MAX] {
        let now = Recall { k, now_ms: Some(30_000), ..Recall::default() };
        let mut found = top(&store, &ada, "the locker of a guest", &now);
        found.sort();
        assert_eq!(found, expected, "{k}");
        let filter = Some(Filter::eq("digit", "d3"));
        let fading = Recall { filter, half_life_ms: Some(1_000_000), ..now };
        assert_eq!(top(&store, &ada, "the locker of a guest", &fading).len(), 120);
    }
}

#[test]
fn a_session_among_many_sees_its_own_chunks_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (ada, bob) = (Scope::user("ada"), Scope::user("bob"));
    let store = filled(folder.path(), &[(&ada, 1_300), (&bob, 1_100)]);
    assert_eq!(store.stats().vectors_in_graphs, 2_400);
    for session in [0, 5, 12] {
        let scope = Scope::user("ada").session(format!("s{session}"));
        let options = Recall { k: 500, ..Recall::default() };
        let hits = store.recall(&scope, "the locker of guest number 1", &options).unwrap();
        assert_eq!(hits.len(), 100);
        assert!(
            hits.iter()
                .all(|hit| hit.source.user == "ada" && hit.source.session == format!("s{session}"))
        );
        let early = Recall { before_turn: Some(10), until_ms: Some(session * 100 + 5), ..options };
        assert_eq!(store.recall(&scope, "the locker of guest", &early).unwrap().len(), 5);
    }
    let hits = store.recall(&bob, "the locker of guest number 1234", &Recall::default()).unwrap();
    assert!(hits.iter().all(|hit| hit.source.user == "bob"));
    store.forget(&bob, &Forget::everything()).unwrap();
    assert!(store.recall(&bob, "locker", &Recall::default()).unwrap().is_empty());
    assert_eq!(finds(&store, &ada, (0..1_300).step_by(130)), 10);
}

#[test]
fn searches_and_commits_go_on_while_a_graph_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = open(folder.path(), 1_000);
    fill(&store, &ada, 1_000);
    // The build has begun: what comes and goes meanwhile is right during it and after it.
    for number in 1_000..1_100 {
        let turns = vec![NewTurn::new(Role::User, fact(number))];
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        assert_eq!(finds(&store, &ada, std::iter::once(number)), 1);
    }
    store.forget(&Scope::user("ada").session("s4"), &Forget::session()).unwrap();
    store.finish_indexing();
    assert!(store.stats().vectors_in_graphs >= 900);
    assert_eq!(finds(&store, &ada, 1_000..1_100), 100);
    assert_eq!(finds(&store, &ada, 400..500), 0);
    // Dropping the store stops a build and waits for it.
    fill(&store, &Scope::user("bob"), 1_000);
    drop(store);
    assert_eq!(finds(&open(folder.path(), usize::MAX), &ada, 1_000..1_010), 10);
}

#[test]
fn what_is_embedded_again_is_in_the_index() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    drop(filled(folder.path(), &[(&ada, 1_200)]));
    let embedder = Arc::new(Renamed(HashedEmbedder::new()));
    let options = StoreOptions { reembed: true, graph_vectors: 1_000, ..StoreOptions::default() };
    let store = Store::open(folder.path(), embedder, options).unwrap();
    // The graph was over the other embedder's vectors.
    assert_eq!((store.stats().vectors, store.stats().vectors_in_graphs), (0, 0));
    assert!(files(&folder.path().join("index")).is_empty());
    assert_eq!(finds(&store, &ada, (0..1_200).step_by(60)), 20);
    while store.reembed(200).unwrap().turns_left > 0 {}
    store.finish_indexing();
    let stats = store.stats();
    assert_eq!((stats.vectors, stats.vectors_in_graphs), (1_200, 1_200));
    // No word in common with the facts, but their letters: what the vectors alone find.
    let hits = store.recall(&ada, "lockerz guestz numberz", &Recall::default()).unwrap();
    assert!(hits.iter().all(|hit| hit.why.cosine > 0.1) && !hits.is_empty());
    assert_eq!(finds(&store, &ada, (0..1_200).step_by(60)), 20);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

/// The hashed embedder under another name.
struct Renamed(HashedEmbedder);

impl Embedder for Renamed {
    fn identity(&self) -> String {
        "renamed".into()
    }

    fn dim(&self) -> usize {
        self.0.dim()
    }

    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        self.0.embed(texts)
    }
}

#[test]
fn what_is_stale_or_expired_leaves_the_others_their_room() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = open(folder.path(), 1_000);
    fill(&store, &ada, 1_200);
    // First so few that they are passed over, then more than are looked at.
    for rounds in [20, 400] {
        let told = (0..rounds).map(|round| {
            let mut turn = NewTurn::new(Role::User, format!("The zebra's key is {round}."));
            (turn.subject, turn.time_ms) = (Some("zebra key".into()), 10_000 + round);
            turn
        });
        let fading = (0..rounds).map(|round| {
            let mut turn = NewTurn::new(Role::User, format!("The zebra's lock is {round} now."));
            turn.expires_ms = Some(20_000 - round);
            turn
        });
        let turns = told.chain(fading).collect();
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        store.finish_indexing();
        let zebra = |options: Recall| {
            let hits = top(&store, &ada, "what is the key of the zebra", &options);
            hits.into_iter().filter(|text| text.contains("zebra")).count()
        };
        let now = Recall { now_ms: Some(30_000), k: 1, ..Recall::default() };
        let latest = format!("The zebra's key is {}.", rounds - 1);
        assert_eq!(top(&store, &ada, "what is the key of the zebra", &now), [latest]);
        assert_eq!(zebra(Recall { k: 9_999, ..now.clone() }), 1);
        let then = Recall { as_of_ms: Some(10_004), k: 1, ..Recall::default() };
        assert_eq!(
            top(&store, &ada, "what is the key of the zebra", &then),
            ["The zebra's key is 4."]
        );
        let all = Recall { stale: true, k: 9_999, ..Recall::default() };
        assert_eq!(zebra(all), 2 * rounds as usize);
    }
    // In one session of many, what is in its window is not recalled, and everything else is.
    let options = Recall { across_sessions: true, ..Recall::default() };
    let all = (0..store.num_turns(&trip()).unwrap()).collect();
    for own in [
        Recall { before_turn: Some(0), ..options.clone() },
        Recall { except_turns: all, ..options.clone() },
    ] {
        let hits = top(&store, &trip(), "what is the zebra", &own);
        assert!(hits.iter().all(|text| !text.contains("zebra")));
        assert_eq!(top(&store, &trip(), &fact(77), &Recall { k: 1, ..own }), [fact(77)]);
    }
}

#[test]
fn a_repair_gives_the_index_and_the_graph_back() {
    let folder = tempfile::tempdir().unwrap();
    let ada = Scope::user("ada");
    let store = filled(folder.path(), &[(&ada, 1_200)]);
    let segment = files(&folder.path().join("segments")).remove(0);
    let mut bytes = std::fs::read(&segment).unwrap();
    let code = fact(40);
    let at = bytes.windows(code.len()).position(|window| window == code.as_bytes()).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    assert!(!store.doctor(true, &Cancel::new()).unwrap().problems.is_empty());
    store.finish_indexing();
    let stats = store.stats();
    assert_eq!((stats.vectors, stats.vectors_in_graphs), (1_199, 1_199));
    assert_eq!(finds(&store, &ada, (1..1_200).step_by(39)), 30);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

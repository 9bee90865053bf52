//! Stores of earlier format versions: opened, brought up to date, and refused by nobody but the earlier program.
//! `tests/data/store-v1` was written by version 1: turns of all kinds, a retracted and a forgotten one, a snapshot;
//! `tests/data/store-v2` by version 2: the same, and a turn with metadata and a subject;
//! `tests/data/store-v3` by version 3: the same, with turns that lie together in runs.

use std::path::Path;

use mka_memory::{Cancel, Commit, Filter, Forget, NewTurn, Recall, Role, Scope, Store};

use crate::support::{copy_folder, files_with, open, trip};

/// A copy of a stored sample, to be written to.
fn sample(folder: &Path, name: &str) -> std::path::PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let target = folder.join("store");
    copy_folder(&source, &target);
    target
}

fn check(store: &Store) {
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    let turns = store.turns(&trip(), 0..99).unwrap();
    let told: Vec<(Role, &str, bool, bool)> =
        turns.iter().map(|t| (t.role, t.text.as_str(), t.retracted, t.forgotten)).collect();
    let hotel = "We booked the Gion hotel in Kyoto.";
    let guide = "Kyoto has temples.\n\nThe ferry to Naoshima leaves at nine.";
    let quote = "> We booked the Gion hotel in Kyoto.";
    assert_eq!(
        told[..7],
        [
            (Role::User, hotel, false, false),
            (Role::Document, guide, false, false),
            (Role::Assistant, "The hotel costs too much.", true, false),
            (Role::Assistant, "The hotel is paid for.", false, false),
            (Role::Recalled, quote, false, false),
            (Role::User, "", false, true),
            (Role::User, hotel, false, false),
        ]
    );
    assert_eq!(turns[1].tokens, [1, 2, 70_000]);
    assert_eq!((turns[1].source.as_deref(), turns[1].time_ms), (Some("guide.md"), 20));
    let snapshot = store.snapshot(&trip(), [1; 16]).unwrap().unwrap();
    assert_eq!((snapshot.position, snapshot.state), (64, vec![5; 30]));
    assert_eq!(snapshot.pages, [(0, vec![6; 200]), (1, vec![7; 200])]);
    let hits = store.recall(&trip(), "which hotel?", &Recall::default()).unwrap();
    assert!(hits.iter().any(|hit| hit.text == hotel && hit.count == 2));
    let bot = Scope::user("ada").agent("bot").session("work");
    assert_eq!(store.recall(&bot, "tomatoes", &Recall::default()).unwrap().len(), 1);
}

#[test]
fn a_store_of_version_1_is_read_written_and_forgotten_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path(), "store-v1");
    {
        let store = open(&path);
        check(&store);
        let checkup = store.doctor(false, &Cancel::new()).unwrap();
        assert!(checkup.problems.is_empty(), "{:?}", checkup.problems);
        let mut turn = NewTurn::new(Role::User, "Written by a later version.");
        turn.metadata.insert("version".into(), 2.into());
        store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
        check(&store);
    }
    let store = open(&path);
    check(&store);
    let marked = |filter| {
        let options = Recall { filter: Some(filter), ..Recall::default() };
        store.recall(&trip(), "hotel, later version", &options).unwrap()
    };
    assert_eq!(marked(Filter::eq("version", 2))[0].text, "Written by a later version.");
    // Turns of the earlier version have no metadata, and are there where none is asked for.
    assert!(marked(Filter::has("version").not()).iter().all(|hit| hit.source.turn < 7));
    // Records of both versions, compacted together.
    let receipt = store.forget(&trip(), &Forget::matching("Naoshima")).unwrap();
    store.verify(&receipt).unwrap();
    assert!(files_with(&path, "Naoshima").is_empty());
    drop(store);
    let store = open(&path);
    assert!(store.turns(&trip(), 1..2).unwrap()[0].forgotten);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

#[test]
fn a_store_of_version_2_goes_on_with_runs_of_turns_beside_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path(), "store-v2");
    let texts: Vec<String> = (0..70).map(|number| format!("Parcel {number} is here.")).collect();
    {
        let store = open(&path);
        check(&store);
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        let options = Recall { filter: Some(Filter::eq("place", "Kyoto")), ..Recall::default() };
        let hits = store.recall(&trip(), "what is paid for?", &options).unwrap();
        assert_eq!(hits[0].text, "The hotel is paid for.");
        let turns = texts.iter().map(|text| NewTurn::new(Role::User, text)).collect();
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        // One of a run, and all from another one on.
        store.forget(&trip(), &Forget::matching("Parcel 3 is")).unwrap();
        store.commit(&trip(), Commit { retract: Some(60..77), ..Commit::default() }).unwrap();
    }
    let store = open(&path);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    let turns = store.turns(&trip(), 7..99).unwrap();
    assert_eq!(turns.len(), texts.len());
    for (turn, text) in turns.iter().zip(&texts) {
        let forgotten = text.starts_with("Parcel 3 ");
        assert_eq!((turn.forgotten, turn.retracted), (forgotten, turn.id >= 60), "{turn:?}");
        assert_eq!(turn.text, if forgotten { "" } else { text });
    }
}

#[test]
fn a_session_of_a_store_of_version_3_is_forked() {
    let folder = tempfile::tempdir().unwrap();
    let path = sample(folder.path(), "store-v3");
    let fork = {
        let store = open(&path);
        check(&store);
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        store.fork(&trip(), "other").unwrap()
    };
    let store = open(&path);
    check(&store);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    assert_eq!(store.turns(&fork, 0..99).unwrap(), store.turns(&trip(), 0..99).unwrap());
    assert_eq!(store.snapshot(&fork, [1; 16]).unwrap(), store.snapshot(&trip(), [1; 16]).unwrap());
    store.compact_all().unwrap();
    let receipt = store.forget(&trip(), &Forget::matching("Naoshima")).unwrap();
    store.verify(&receipt).unwrap();
    assert!(files_with(&path, "Naoshima").is_empty());
}

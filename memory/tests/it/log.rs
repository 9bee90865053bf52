//! The turn log: what is committed is read back, in order, after reopening too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mka_memory::{
    Cancel, Commit, Embedder, ErrorKind, Filter, Forget, HashedEmbedder, NewTurn, Recall, Role,
    Scope, Store, StoreOptions, Trust,
};

use crate::support::{open, prose, say, trip, try_open};

#[test]
fn turns_read_back_as_committed_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let mut turn =
        NewTurn::new(Role::Document, "Kyoto has temples.\n\nAnd trains: 100 % on time. 京都");
    turn.time_ms = 1_700_000_000_000;
    turn.tokens = vec![1, 2, 70_000];
    turn.source = Some("guide.md".into());
    {
        let store = open(folder.path());
        say(&store, &trip(), Role::User, &["", "Hello."]);
        let turns = vec![turn.clone()];
        let committed = store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        assert_eq!(committed.turns, [2]);
    }
    let store = open(folder.path());
    assert_eq!(store.num_turns(&trip()).unwrap(), 3);
    let turns = store.turns(&trip(), 1..99).unwrap();
    assert_eq!(turns.len(), 2);
    assert_eq!((turns[0].id, turns[0].text.as_str()), (1, "Hello."));
    let read = &turns[1];
    assert_eq!((read.role, read.time_ms, &read.text), (turn.role, turn.time_ms, &turn.text));
    assert_eq!((&read.tokens, &read.source), (&turn.tokens, &turn.source));
    assert!(!read.retracted && !read.forgotten);
}

#[test]
fn what_a_tool_gave_back_is_remembered_as_a_document_is() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    say(&open(folder.path()), &trip(), Role::Tool, &["The ferry to Naoshima leaves at nine."]);
    let store = open(folder.path());
    let turn = store.turns(&trip(), 0..9).unwrap().remove(0);
    assert!(turn.role == Role::Tool && turn.remember);
    let found = |store: &Store, roles: Vec<Role>| {
        let hits = store.recall(&trip(), "ferry", &Recall { roles, ..Recall::default() }).unwrap();
        hits.into_iter().map(|hit| (hit.source.role, hit.trust)).collect::<Vec<_>>()
    };
    let expected = [(Role::Tool, Trust::Document)];
    assert_eq!(found(&store, Vec::new()), expected);
    assert_eq!(found(&store, vec![Role::Document]), []);
    let mut lines = Vec::new();
    store.export_all(&mut lines, &Cancel::new()).unwrap();
    let copy = open(other.path());
    assert_eq!(copy.import(&mut &lines[..], &Cancel::new()).unwrap().turns, 1);
    assert_eq!(found(&copy, vec![Role::Tool]), expected);
}

#[test]
fn a_second_opening_is_locked_and_names_the_pid() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let error = try_open(folder.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    drop(store);
    open(folder.path());
}

#[test]
fn a_store_reopens_at_once_while_the_program_starts_others() {
    let folder = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // A start that fails has forked all the same.
                let _ = std::process::Command::new("true").status();
            }
        });
        let reopened = std::panic::catch_unwind(|| {
            for _ in 0..100 {
                open(folder.path());
            }
        });
        done.store(true, Ordering::Relaxed);
        reopened.unwrap();
    });
}

struct Other;

impl Embedder for Other {
    fn identity(&self) -> String {
        "other-2".into()
    }
    fn dim(&self) -> usize {
        2
    }
    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        Ok([1.0, 0.0].repeat(texts.len()))
    }
}

#[test]
fn another_embedder_is_refused_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let identity = HashedEmbedder::new().identity();
    drop(open(folder.path()));
    let error = Store::open(folder.path(), Arc::new(Other), StoreOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Incompatible);
    assert!(
        error.to_string().contains("other-2") && error.to_string().contains(&identity),
        "{error}"
    );
}

#[test]
fn malformed_scopes_and_commits_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let turns = || vec![NewTurn::new(Role::User, "x")];
    for scope in [
        Scope::user(""),
        Scope::user("a").session(""),
        Scope::user("a".repeat(257)).session("s"),
        Scope::user("a"),
    ] {
        let commit = Commit { turns: turns(), ..Commit::default() };
        assert_eq!(store.commit(&scope, commit).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    let commit = Commit { retract: Some(0..1), ..Commit::default() };
    assert_eq!(store.commit(&trip(), commit).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(store.turns(&trip(), 0..10).unwrap().is_empty());
}

#[test]
fn a_retracted_turn_stays_in_the_log_and_is_not_recalled() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The code is heron.", "The code is badger.", "Thanks."]);
    let turns =
        vec![NewTurn::new(Role::User, "The code is walrus."), NewTurn::new(Role::User, "Thanks.")];
    let committed =
        store.commit(&trip(), Commit { turns, retract: Some(1..3), ..Commit::default() }).unwrap();
    assert_eq!(committed.turns, [3, 4]);
    let check = |store: &Store| {
        let turns = store.turns(&trip(), 0..9).unwrap();
        let retracted: Vec<bool> = turns.iter().map(|turn| turn.retracted).collect();
        assert_eq!(retracted, [false, true, true, false, false]);
        assert_eq!(turns[1].text, "The code is badger.");
        let hits = store.recall(&trip(), "code badger thanks", &Recall::default()).unwrap();
        assert!(hits.iter().all(|hit| !hit.text.contains("badger")));
        let thanks = hits.iter().find(|hit| hit.text == "Thanks.").unwrap();
        assert_eq!((thanks.source.turn, thanks.count), (4, 1));
        assert_eq!(store.chunks(&trip(), 0..9, None).unwrap().len(), 3);
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn a_retraction_leaves_what_was_told_behind_its_turns() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The code is heron.", "The code is badger."]);
    say(&store, &trip(), Role::User, &["The bridge is closed."]);
    let turns = vec![NewTurn::new(Role::User, "The code is walrus.")];
    let committed =
        store.commit(&trip(), Commit { turns, retract: Some(1..2), ..Commit::default() }).unwrap();
    assert_eq!(committed.turns, [3]);
    for (retract, kind) in
        [(2..5, ErrorKind::NotFound), (committed.turns[0]..2, ErrorKind::InvalidArgument)]
    {
        let commit = Commit { retract: Some(retract), ..Commit::default() };
        assert_eq!(store.commit(&trip(), commit).unwrap_err().kind(), kind);
    }
    let check = |store: &Store| {
        let turns = store.turns(&trip(), 0..9).unwrap();
        let retracted: Vec<bool> = turns.iter().map(|turn| turn.retracted).collect();
        assert_eq!(retracted, [false, true, false, false]);
        let hits = store.recall(&trip(), "code badger bridge", &Recall::default()).unwrap();
        assert!(hits.iter().any(|hit| hit.text == "The bridge is closed."));
        assert!(hits.iter().all(|hit| !hit.text.contains("badger")));
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn the_same_text_is_stored_once_with_a_count() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let text = prose(7, 300);
    let first = say(&store, &trip(), Role::Document, &[&text, &text]);
    assert_eq!(first.chunks_added, first.chunks_deduplicated);
    let again = say(&store, &Scope::user("ada").session("home"), Role::Document, &[&text]);
    assert_eq!((again.chunks_added, again.chunks_deduplicated), (0, first.chunks_added));
    let check = |store: &Store| {
        assert_eq!(store.stats().chunks, first.chunks_added);
        let everywhere = store.recall(&Scope::user("ada"), &text, &Recall::default()).unwrap();
        assert!(everywhere.iter().all(|hit| hit.count == 3 && hit.source.session == "home"));
        let here = store.recall(&trip(), &text, &Recall::default()).unwrap();
        assert!(here.iter().all(|hit| hit.count == 2 && hit.source.turn == 1));
    };
    check(&store);
    let stats = store.stats();
    drop(store);
    let store = open(folder.path());
    check(&store);
    assert_eq!(store.stats(), stats);
}

#[test]
fn recalled_text_is_never_remembered_however_often_it_returns() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The passport is in the blue drawer."]);
    let before = store.stats();
    for _ in 0..20 {
        let hits = store.recall(&trip(), "where is the passport", &Recall::default()).unwrap();
        let mut turn = NewTurn::new(Role::Recalled, format!("> {}", hits[0].text));
        turn.remember = true;
        store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    }
    let after = store.stats();
    assert_eq!((after.chunks, after.vectors), (before.chunks, before.vectors));
    assert_eq!(after.turns, 21);
}

#[test]
fn many_threads_read_while_one_writes() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The first note."]);
    std::thread::scope(|threads| {
        for _ in 0..3 {
            threads.spawn(|| {
                for _ in 0..30 {
                    let num_turns = store.num_turns(&trip()).unwrap();
                    let turns = store.turns(&trip(), 0..num_turns).unwrap();
                    assert_eq!(turns.len() as u64, num_turns);
                    assert!(!store.recall(&trip(), "note", &Recall::default()).unwrap().is_empty());
                }
            });
        }
        for number in 0..15 {
            say(&store, &trip(), Role::Document, &[&prose(number, 60)]);
        }
    });
    assert_eq!(store.num_turns(&trip()).unwrap(), 16);
}

#[test]
fn chunks_are_listed_by_the_metadata_of_their_turns() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let turn = |text: &str, kind: &str| {
        let mut turn = NewTurn::new(Role::User, text);
        turn.metadata = [("kind".to_owned(), kind.into())].into();
        turn
    };
    let planner = Scope::user("ada").agent("planner").session("trip");
    for (scope, turns) in [
        (trip(), vec![turn("The heron nests here.", "note"), turn("The wolf left.", "draft")]),
        (planner, vec![turn("The otter swims.", "note"), turn("The heron nests here.", "draft")]),
        (Scope::user("bob").session("trip"), vec![turn("The lynx sleeps.", "note")]),
        (trip(), vec![turn("The heron nests here.", "draft")]),
    ] {
        store.commit(&scope, Commit { turns, ..Commit::default() }).unwrap();
    }
    say(&store, &trip(), Role::User, &["Nobody is marked."]);
    let check = |store: &Store| {
        let listed = |scope: &Scope, filter: &Filter| -> Vec<(String, u64, u64, u32)> {
            let chunks = store.chunks(scope, 0..99, Some(filter)).unwrap().into_iter();
            chunks.map(|it| (it.text, it.first.turn, it.latest.turn, it.count)).collect()
        };
        let ada = Scope::user("ada");
        let heron = || "The heron nests here.".to_owned();
        let notes = Filter::eq("kind", "note");
        let expected = [(heron(), 0, 0, 1), ("The otter swims.".to_owned(), 0, 0, 1)];
        assert_eq!(listed(&ada, &notes), expected);
        let drafts = Filter::eq("kind", "draft");
        assert_eq!(
            listed(&trip(), &drafts),
            [("The wolf left.".to_owned(), 1, 1, 1), (heron(), 2, 2, 1)]
        );
        assert_eq!(listed(&trip(), &notes.clone().or(drafts))[0], (heron(), 0, 2, 2));
        let unmarked = Filter::has("kind").not();
        assert_eq!(listed(&ada, &unmarked), [("Nobody is marked.".to_owned(), 3, 3, 1)]);
        // The range counts what is accepted.
        let second = store.chunks(&ada, 1..2, Some(&notes)).unwrap();
        assert_eq!(second[0].text, "The otter swims.");
        let deep = (0..100).fold(Filter::has("x"), |filter, _| filter.not());
        let error = store.chunks(&ada, 0..9, Some(&deep)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().starts_with("chunks:"), "{error}");
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn users_are_listed_while_a_session_of_them_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert!(store.users().is_empty());
    for scope in [
        Scope::user("bob").agent("planner").session("a"),
        Scope::user("ada").session("b"),
        Scope::user("bob").session("a"),
        Scope::user("ada").session("a"),
    ] {
        say(&store, &scope, Role::User, &["Hello."]);
    }
    assert_eq!(store.users(), ["ada", "bob"]);
    store.forget(&Scope::user("ada").session("a"), &Forget::session()).unwrap();
    assert_eq!(store.users(), ["ada", "bob"]);
    store.forget(&Scope::user("ada"), &Forget::everything()).unwrap();
    assert_eq!(store.users(), ["bob"]);
    drop(store);
    assert_eq!(open(folder.path()).users(), ["bob"]);
}

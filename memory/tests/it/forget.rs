//! Forgetting: the bytes leave every file, and the receipt can be checked.

use mka_memory::{
    Cancel, Commit, ErrorKind, Filter, Forget, NewSnapshot, NewTurn, Recall, Receipt, Role, Scope,
    Value,
};

use crate::support::{BACKENDS, files, files_with, open, open_as, prose, say, trip};

const SECRET: &str = "passport XK-99-1234";

#[test]
fn after_forget_the_bytes_are_in_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let home = Scope::user("ada").session("home");
    let told = format!("My {SECRET} expires in May.");
    say(&store, &trip(), Role::User, &["Hello there.", &told, "Unrelated talk about trains."]);
    say(&store, &trip(), Role::Document, &[&prose(1, 500)]);
    say(&store, &home, Role::User, &[&format!("Again, {SECRET}!"), "Home talk."]);
    say(&store, &home, Role::Recalled, &[&format!("> {told}")]);
    let snapshot = NewSnapshot {
        fingerprint: [1; 16],
        position: 4,
        state: format!("state with {SECRET}").into(),
        pages: vec![(0, format!("page with {SECRET}").into_bytes().into())],
        window: vec![0],
        first_page: 0,
    };
    store
        .commit(&trip(), Commit { snapshot: Some(snapshot.clone()), ..Commit::default() })
        .unwrap();
    // The first page's bytes are unused from here on; they must go all the same.
    let snapshot =
        NewSnapshot { pages: vec![(0, b"rewritten".to_vec().into())], state: vec![], ..snapshot };
    store.commit(&trip(), Commit { snapshot: Some(snapshot), ..Commit::default() }).unwrap();
    let others = Scope::user("bob").session("trip");
    say(&store, &others, Role::User, &["Bob was here."]);
    assert!(!files_with(folder.path(), SECRET).is_empty());

    let receipt = store.forget(&Scope::user("ada"), &Forget::matching("PASSPORT xk-99")).unwrap();
    assert_eq!((receipt.turns, receipt.chunks, receipt.pages), (3, 2, 1));
    assert!(receipt.bytes > 60 && !receipt.segments.is_empty());
    assert_eq!(files_with(folder.path(), SECRET), Vec::<std::path::PathBuf>::new());
    store.verify(&receipt).unwrap();
    let written = serde_json::to_string(&receipt).unwrap();
    assert_eq!(serde_json::from_str::<Receipt>(&written).unwrap(), receipt);

    let check = |store: &mka_memory::Store| {
        let turns = store.turns(&trip(), 0..9).unwrap();
        assert_eq!(turns.len(), 4);
        assert!(turns[1].forgotten && turns[1].text.is_empty() && turns[1].role == Role::User);
        assert_eq!(turns[2].text, "Unrelated talk about trains.");
        assert_eq!(store.snapshot(&trip(), [1; 16]).unwrap(), None);
        assert_eq!(store.turns(&others, 0..9).unwrap()[0].text, "Bob was here.");
        let hits = store.recall(&Scope::user("ada"), SECRET, &Recall::default()).unwrap();
        assert!(hits.iter().all(|hit| !hit.text.contains("XK-99")));
        assert_eq!(store.stats().dead_bytes, 0);
        assert!(store.stats().damaged.is_empty());
    };
    check(&store);
    drop(store);
    let store = open(folder.path());
    check(&store);
    store.verify(&receipt).unwrap();
    assert_eq!(files_with(folder.path(), SECRET), Vec::<std::path::PathBuf>::new());
}

#[test]
fn verify_refuses_a_receipt_whose_text_is_still_there() {
    let folder = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["Keep this.", SECRET]);
    drop(store);
    let segments = folder.path().join("segments");
    for file in crate::support::files(&segments) {
        std::fs::copy(&file, copy.path().join(file.file_name().unwrap())).unwrap();
    }
    let store = open(folder.path());
    let mut receipt = store.forget(&trip(), &Forget::turn(1)).unwrap();
    store.verify(&receipt).unwrap();
    drop(store);
    // A segment of before the erasure comes back under a number of its own: nothing refers to it.
    receipt.segments.clear();
    let store = open(folder.path());
    std::fs::copy(copy.path().join("000001.seg"), segments.join("000001.seg")).unwrap();
    store.verify(&receipt).unwrap();
    drop(store);
    let store = open(folder.path());
    store.verify(&receipt).unwrap();
    assert_eq!(files_with(folder.path(), SECRET), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_receipt_holds_however_the_store_goes_on() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let ada = Scope::user("ada");
        let mut receipts: Vec<Receipt> = Vec::new();
        let check = |store: &mka_memory::Store, receipts: &[Receipt]| {
            receipts.iter().for_each(|receipt| store.verify(receipt).unwrap());
            assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        };
        for round in 0..3 {
            let store = open_as(folder.path(), backend);
            check(&store, &receipts);
            say(&store, &trip(), Role::User, &[&format!("This is round {round}.")]);
            check(&store, &receipts);
            let receipt = store.forget(&ada, &Forget::everything()).unwrap();
            assert!(!receipt.segments.is_empty());
            receipts.push(receipt);
            check(&store, &receipts);
            // There is nothing to erase, and no segment to rewrite.
            let again = store.forget(&ada, &Forget::everything()).unwrap();
            assert!(again.segments.is_empty());
            store.compact_all().unwrap();
            assert_eq!((store.stats().segments, store.stats().dead_bytes), (1, 0));
        }
        // As a crash leaves a segment that was begun.
        let segment = files(&folder.path().join("segments")).pop().unwrap();
        std::fs::write(&segment, b"mka").unwrap();
        let store = open_as(folder.path(), backend);
        say(&store, &trip(), Role::User, &["It goes on."]);
        check(&store, &receipts);
        drop(store);
        assert_eq!(files(&folder.path().join("segments")), [segment]);
        let store = open_as(folder.path(), backend);
        assert_eq!(store.turns(&trip(), 0..9).unwrap()[0].text, "It goes on.");
        check(&store, &receipts);
    }
}

#[test]
fn a_message_that_is_not_recalled_is_forgotten_where_it_was_quoted() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), backend);
        let asked = NewTurn::new(Role::User, "The door code is 4711, why?").remember(false);
        let quoted = NewTurn::new(Role::Recalled, "[user]\n> The door code is 4711, why?\n");
        let turns = vec![asked, quoted, NewTurn::new(Role::User, "code").remember(false)];
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        // What is said everywhere takes nothing else with it.
        assert_eq!(store.forget(&trip(), &Forget::turn(2)).unwrap().turns, 1, "{backend:?}");
        let receipt = store.forget(&trip(), &Forget::turn(0)).unwrap();
        assert_eq!(receipt.turns, 2, "{backend:?}");
        let turns = store.turns(&trip(), 0..9).unwrap();
        assert!(turns.len() == 3 && turns[1].forgotten && turns[1].text.is_empty());
        assert_eq!(files_with(folder.path(), "4711"), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_number_is_given_once_though_a_commit_that_began_a_segment_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["It is about to be forgotten."]);
    // More than a segment holds, and a page of the window that nobody gave.
    let text = "-".repeat(8 << 20);
    let turns = (0..10).map(|_| NewTurn::new(Role::Recalled, text.as_str())).collect();
    let snapshot = NewSnapshot {
        fingerprint: [1; 16],
        position: 0,
        state: Vec::new(),
        pages: Vec::new(),
        window: vec![3],
        first_page: 0,
    };
    let refused = Commit { turns, snapshot: Some(snapshot), ..Commit::default() };
    let error = store.commit(&trip(), refused).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let receipt = store.forget(&Scope::user("ada"), &Forget::everything()).unwrap();
    assert!(!receipt.segments.is_empty());
    drop(store);
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["It goes on."]);
    store.verify(&receipt).unwrap();
}

#[test]
fn a_chunk_that_another_turn_holds_survives_with_its_vectors() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let text = "The blue heron nests by the northern lake.";
    say(&store, &trip(), Role::User, &[text, text, "Something else entirely."]);
    let receipt = store.forget(&trip(), &Forget::turn(0)).unwrap();
    assert_eq!((receipt.turns, receipt.chunks), (1, 0));
    let ask = |store: &mka_memory::Store| {
        store.recall(&trip(), "blue heron", &Recall::default()).unwrap()
    };
    let hits = ask(&store);
    assert_eq!((hits[0].text.as_str(), hits[0].count, hits[0].source.turn), (text, 1, 1));
    store.verify(&receipt).unwrap();
    drop(store);
    let store = open(folder.path());
    assert_eq!(ask(&store), hits);
    assert!(store.stats().damaged.is_empty());
}

#[test]
fn forgetting_a_session_leaves_no_trace_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let named = Scope::user("ada").session("secret-project-falcon");
    say(&store, &named, Role::User, &["Falcon flies at dawn."]);
    say(&store, &trip(), Role::User, &["Trains."]);
    let receipt = store.forget(&named, &Forget::session()).unwrap();
    assert_eq!(receipt.turns, 1);
    drop(store);
    assert!(files_with(folder.path(), "falcon").is_empty());
    let store = open(folder.path());
    assert_eq!(store.num_turns(&named).unwrap(), 0);
    assert_eq!(store.sessions(&Scope::user("ada")).unwrap().len(), 1);
    say(&store, &named, Role::User, &["A fresh start."]);
    assert_eq!(store.turns(&named, 0..9).unwrap()[0].text, "A fresh start.");
    store.verify(&receipt).unwrap();
    let receipt = store.forget(&Scope::user("ada"), &Forget::everything()).unwrap();
    assert_eq!(receipt.turns, 2);
    assert!(store.sessions(&Scope::user("ada")).unwrap().is_empty());
    assert_eq!(store.stats().live_bytes, 0);
}

#[test]
fn forgetting_by_time_and_bad_selectors() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for number in 0..4 {
        let mut turn = NewTurn::new(Role::User, format!("Day {number}."));
        turn.time_ms = number * 100;
        store.commit(&trip(), Commit { turns: vec![turn], ..Commit::default() }).unwrap();
    }
    assert_eq!(store.forget(&Scope::user("ada"), &Forget::before(200)).unwrap().turns, 2);
    let forgotten: Vec<bool> =
        store.turns(&trip(), 0..9).unwrap().iter().map(|turn| turn.forgotten).collect();
    assert_eq!(forgotten, [true, true, false, false]);
    let kind = |scope: Scope, selector: Forget| store.forget(&scope, &selector).unwrap_err().kind();
    assert_eq!(kind(trip(), Forget::matching("")), ErrorKind::InvalidArgument);
    assert_eq!(kind(Scope::user("ada"), Forget::session()), ErrorKind::InvalidArgument);
    assert_eq!(kind(trip(), Forget::turn(4)), ErrorKind::NotFound);
    assert_eq!(kind(trip(), Forget::turns([2, 4])), ErrorKind::NotFound);
    assert_eq!(kind(Scope::user("bob").session("trip"), Forget::turns([0])), ErrorKind::NotFound);
    assert_eq!(kind(trip(), Forget::turns([])), ErrorKind::InvalidArgument);
    assert_eq!(kind(Scope::user("ada"), Forget::turns([2])), ErrorKind::InvalidArgument);
    assert!(!store.turns(&trip(), 2..3).unwrap()[0].forgotten);
    assert_eq!(store.forget(&Scope::user("eve"), &Forget::everything()).unwrap().turns, 0);
}

#[test]
fn several_turns_are_erased_at_once() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), backend);
        let told = ["The otter is 1.", "The heron is 2.", "The badger is 3.", "The wolf is 4."];
        say(&store, &trip(), Role::User, &told);
        let home = Scope::user("ada").session("home");
        say(&store, &home, Role::User, &["The lynx is 5."]);
        // One is named twice.
        let both = Forget::turns([2, 0, 2]);
        let receipt = store.forget(&trip(), &both).unwrap();
        assert_eq!((receipt.turns, receipt.chunks), (2, 2), "{backend:?}");
        assert_eq!(receipt.selector, both);
        store.verify(&receipt).unwrap();
        let written = serde_json::to_string(&receipt).unwrap();
        assert_eq!(serde_json::from_str::<Receipt>(&written).unwrap(), receipt);
        for gone in ["otter", "badger"] {
            assert_eq!(files_with(folder.path(), gone), Vec::<std::path::PathBuf>::new());
        }
        let turns = store.turns(&trip(), 0..9).unwrap();
        let forgotten: Vec<bool> = turns.iter().map(|turn| turn.forgotten).collect();
        assert_eq!(forgotten, [true, false, true, false]);
        assert!(!store.turns(&home, 0..1).unwrap()[0].forgotten);
    }
}

#[test]
fn what_several_sessions_share_goes_with_the_last_of_them() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), backend);
        let (ada, bob) = (Scope::user("ada"), Scope::user("bob").session("s"));
        let shared = ["The blue heron nests by the lake.", "The old mill is for sale."];
        for number in 0..6 {
            let own = format!("Number {number} is about otters.");
            let scope = ada.clone().session(format!("s{number}"));
            let scope = if number < 4 { scope } else { scope.agent("bot") };
            say(&store, &scope, Role::User, &[shared[0], &own, shared[1], shared[0]]);
        }
        say(&store, &bob, Role::User, &shared);
        let ask = |scope: &Scope| store.recall(scope, "blue heron", &Recall::default()).unwrap();
        // Vectors and words stay as long as one turn holds the text.
        let first = store.forget(&ada.clone().session("s0"), &Forget::session()).unwrap();
        assert_eq!((first.turns, first.chunks), (4, 1), "{backend:?}");
        let hits = ask(&ada);
        assert!(hits.iter().any(|hit| hit.text == shared[0] && hit.why.cosine > 0.0), "{hits:?}");
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        let rest = store.forget(&ada, &Forget::everything()).unwrap();
        assert_eq!((rest.turns, rest.chunks), (20, 7), "{backend:?}");
        store.verify(&first).unwrap();
        store.verify(&rest).unwrap();
        assert!(ask(&ada).is_empty());
        assert_eq!(ask(&bob)[0].text, shared[0]);
        assert_eq!(store.stats().chunks, 2);
        assert!(files_with(folder.path(), "otters").is_empty());
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        drop(store);
        let store = open_as(folder.path(), backend);
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    }
}

#[test]
fn a_summary_is_made_anew_without_the_forgotten_turn() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (with, without) = (open(folders[0].path()), open(folders[1].path()));
    say(&with, &trip(), Role::User, &["Greenhouse tomatoes.", SECRET, "Sailboat rigging."]);
    with.forget(&trip(), &Forget::matching(SECRET)).unwrap();
    say(&without, &trip(), Role::User, &["Greenhouse tomatoes.", "Sailboat rigging."]);
    let scores = |store: &mka_memory::Store| -> Vec<f32> {
        let hits = store.recall(&trip(), "what about it?", &Recall::default()).unwrap();
        hits.iter().map(|hit| hit.why.cosine).collect()
    };
    assert_eq!(scores(&with), scores(&without));
    drop(with);
    assert_eq!(scores(&open(folders[0].path())), scores(&without));
}

#[test]
fn a_text_in_the_subject_or_the_metadata_is_found_and_erased_with_its_turn() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let turn = |text: &str| NewTurn::new(Role::User, text);
    let mut turns =
        vec![turn("It is 1234."), turn("It is 5678."), turn("It is 9999."), turn("Hi.")];
    turns[0].subject = Some("Passport number".into());
    turns[1].metadata.insert("kind".into(), "old PASSPORT".into());
    turns[2].metadata.insert("passport".into(), true.into());
    store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
    let receipt = store.forget(&trip(), &Forget::matching("passport")).unwrap();
    assert_eq!(receipt.turns, 3);
    store.verify(&receipt).unwrap();
    assert!(files_with(folder.path(), "passport").is_empty());
    assert!(store.turns(&trip(), 0..1).unwrap()[0].metadata.is_empty());
    assert_eq!(store.turns(&trip(), 3..4).unwrap()[0].text, "Hi.");
}

#[test]
fn a_text_is_found_whatever_the_case_of_its_letters_and_where_a_word_ends() {
    for (text, needle) in [
        ("Ο ΚΩΣΤΑΣ μένει εδώ.", "ΚΩΣ"),
        ("Ο ΚΩΣΤΑΣ μένει εδώ.", "κωστας"),
        ("Ο Κωστας μένει εδώ.", "ΚΩΣΤΑΣ Μ"),
        ("Ada moved to İstanbul.", "istanbul"),
        ("Ada moved to I\u{307}STANBUL.", "İstanbul"),
        ("Ada moved to istanbul.", "İSTANBUL"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        say(&store, &trip(), Role::User, &[text, "Bob stays."]);
        let receipt = store.forget(&trip(), &Forget::matching(needle)).unwrap();
        let turns = store.turns(&trip(), 0..9).unwrap();
        assert_eq!(receipt.turns, 1, "{needle} in {text}");
        assert!(turns[0].forgotten && !turns[1].forgotten, "{needle} in {text}");
    }
}

#[test]
fn what_a_filter_accepts_is_erased_whether_or_not_it_can_be_recalled() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let turn = |text: &str, marks: &[(&str, i32)], remember: bool| {
            let mut turn = NewTurn::new(Role::User, text);
            turn.metadata =
                marks.iter().map(|(key, it)| ((*key).to_owned(), (*it).into())).collect();
            turn.remember = remember;
            turn
        };
        let store = open_as(folder.path(), backend);
        let turns = vec![
            turn("The red team met in Oslo.", &[("team", 1), ("year", 2024)], true),
            turn("The red team left nothing behind.", &[("team", 1)], false),
            turn("The blue team met in Rome.", &[("team", 2), ("year", 2026)], true),
            turn("Nobody met in Paris.", &[], true),
        ];
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        say(&store, &trip(), Role::Recalled, &["> The red team met in Oslo."]);
        let ada = Scope::user("ada");
        let none = store.forget(&ada, &Forget::filter(Filter::eq("team", 3))).unwrap();
        assert_eq!(none.turns, 0);
        let red = Forget::filter(Filter::eq("team", 1));
        let receipt = store.forget(&ada, &red).unwrap();
        // Both, and the quotation.
        assert_eq!((receipt.turns, receipt.chunks), (3, 1), "{backend:?}");
        store.verify(&receipt).unwrap();
        assert_eq!(receipt.selector, red);
        let written = serde_json::to_string(&receipt).unwrap();
        assert_eq!(serde_json::from_str::<Receipt>(&written).unwrap(), receipt);
        for left in ["Oslo", "nothing behind"] {
            assert_eq!(files_with(folder.path(), left), Vec::<std::path::PathBuf>::new());
        }
        let turns = store.turns(&trip(), 0..9).unwrap();
        let forgotten: Vec<bool> = turns.iter().map(|turn| turn.forgotten).collect();
        assert_eq!(forgotten, [true, true, false, false, true]);
        // A turn without the key is one that the `not` accepts.
        let rest = Forget::filter(Filter::has("year").not());
        assert_eq!(store.forget(&ada, &rest).unwrap().turns, 1);
        let deep = (0..100).fold(Filter::has("x"), |filter, _| filter.not());
        let error = store.forget(&ada, &Forget::filter(deep)).unwrap_err();
        assert!(
            error.kind() == ErrorKind::InvalidArgument && error.to_string().starts_with("forget:")
        );
        assert_eq!(store.recall(&ada, "team met", &Recall::default()).unwrap().len(), 1);
    }
}

#[test]
fn a_filter_that_accepts_every_turn_erases_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["The key lies under the mat."]);
    let all = Filter::And(Vec::new());
    let none = Filter::Or(Vec::new());
    for (filter, got) in [
        (all.clone(), "every"),
        (none.clone(), "no"),
        (none.clone().not(), "every"),
        (all.clone().and(all.clone().not()), "no"),
        (Filter::any_of("kind", Vec::<Value>::new()).not(), "every"),
        (Filter::any_of("kind", Vec::<Value>::new()), "no"),
        (Filter::Or(vec![all, Filter::has("kind")]), "every"),
    ] {
        let error = store.forget(&trip(), &Forget::filter(filter)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        let expected =
            format!("expected a filter that depends on a key, got one that accepts {got} turn");
        assert!(error.to_string().contains(&expected), "{error}");
    }
    assert!(!store.turns(&trip(), 0..1).unwrap()[0].forgotten);
}

#[test]
fn a_hit_says_what_stands_beside_its_turn() {
    let folder = tempfile::tempdir().unwrap();
    let mut fact = NewTurn::new(Role::User, "The key lies under the mat.");
    fact.metadata = [("room".to_owned(), "hall".into())].into();
    (fact.subject, fact.expires_ms) = (Some("key".to_owned()), Some(9000));
    let plain = NewTurn::new(Role::User, "The mat lies before the door.");
    {
        let store = open(folder.path());
        let turns = vec![fact.clone(), plain];
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
    }
    let store = open(folder.path());
    let hits = store.recall(&trip(), "key under the mat", &Recall::default()).unwrap();
    assert_eq!(hits[0].source.metadata, fact.metadata);
    assert_eq!(hits[0].source.subject, fact.subject);
    assert_eq!(hits[0].source.expires_ms, fact.expires_ms);
    let source = &hits[1].source;
    assert!(source.metadata.is_empty() && source.subject.is_none() && source.expires_ms.is_none());
}

#[test]
fn keys_of_an_engine_match_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut answer = NewTurn::new(Role::Assistant, "It is in Oslo.");
    answer.metadata =
        [(format!("{}answer_completion", mka_memory::ENGINE_KEYS), true.into())].into();
    let mut told = NewTurn::new(Role::User, "Where is it?");
    told.metadata = [("answered".to_owned(), true.into())].into();
    let turns = vec![answer, told];
    store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
    let receipt = store.forget(&Scope::user("ada"), &Forget::matching("answer")).unwrap();
    assert_eq!(receipt.turns, 1);
    assert_eq!(store.turns(&trip(), 0..1).unwrap()[0].text, "It is in Oslo.");
}

//! Write hygiene: what says the same again is counted, what is sensitive is flagged, withheld or refused.

use std::path::Path;

use mka_memory::{
    Cancel, Commit, ErrorKind, Forget, Hygiene, NewTurn, Policy, Recall, Role, Scope, Sensitive,
    Store, StoreOptions,
};

use crate::support::{files, files_with, open, open_with, prose, say, trip};

const FACT: &str = "We booked the Gion hotel in Kyoto for the first week of April.";
const AGAIN: &str = "> we booked the GION hotel, in Kyoto,\n> for first week of April!";

fn with(path: &Path, hygiene: Hygiene) -> Store {
    open_with(path, StoreOptions { hygiene, ..StoreOptions::default() }).unwrap()
}

fn bytes(path: &Path) -> u64 {
    files(path).iter().map(|file| file.metadata().unwrap().len()).sum()
}

#[test]
fn near_duplicates_are_counted_and_not_stored() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &[FACT]);
    let done = say(&store, &trip(), Role::Assistant, &[AGAIN, FACT]);
    assert_eq!(
        (done.chunks_added, done.chunks_deduplicated, done.chunks_nearly_duplicated),
        (0, 1, 1)
    );
    let check = |store: &Store| {
        let hits = store.recall(&trip(), "Gion hotel", &Recall::default()).unwrap();
        assert_eq!((hits.len(), hits[0].count, hits[0].text.as_str()), (1, 3, FACT));
        assert_eq!((store.stats().chunks, store.stats().duplicates), (1, 2));
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    };
    check(&store);
    drop(store);
    check(&open(folder.path()));
}

#[test]
fn another_session_keeps_a_text_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let home = Scope::user("ada").session("home");
    say(&store, &trip(), Role::User, &[FACT]);
    assert_eq!(say(&store, &home, Role::User, &[AGAIN]).chunks_added, 1);
    assert_eq!(store.recall(&home, "Gion", &Recall::default()).unwrap()[0].text, AGAIN);
}

#[test]
fn what_nearly_repeated_a_text_stays_when_the_text_goes() {
    for forget in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        say(&store, &trip(), Role::User, &["Hello there.", AGAIN]);
        say(&store, &trip(), Role::User, &[FACT, "Something else."]);
        // The one that was said first is the chunk.
        if forget {
            store.forget(&trip(), &Forget::turn(1)).unwrap();
        } else {
            let turns =
                vec![NewTurn::new(Role::User, "Hello there."), NewTurn::new(Role::User, FACT)];
            let retract = Some(0..4);
            store.commit(&trip(), Commit { turns, retract, ..Commit::default() }).unwrap();
        }
        let check = |store: &Store| {
            let hits = store.recall(&trip(), "Gion hotel", &Recall::default()).unwrap();
            assert_eq!((hits[0].text.as_str(), hits[0].count), (FACT, 1), "{hits:?}");
            assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        };
        check(&store);
        if forget {
            assert!(files_with(folder.path(), "GION hotel, in").is_empty());
        }
        drop(store);
        check(&open(folder.path()));
    }
}

#[test]
fn near_duplicates_are_stored_where_that_is_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let mut hygiene = Hygiene::default();
    hygiene.near_duplicates = false;
    let store = with(folder.path(), hygiene);
    assert_eq!(say(&store, &trip(), Role::User, &[FACT, AGAIN]).chunks_added, 2);
    assert_eq!(
        say(
            &store,
            &trip(),
            Role::User,
            &["we booked the gion hotel in kyoto for the first week of april"]
        )
        .chunks_added,
        1
    );
}

/// A model that says what memory gave it, one passage a turn, which is remembered, given to it again, and so on.
#[test]
fn a_feedback_loop_of_a_thousand_turns_keeps_memory_flat() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &[FACT, "My sister lands in Osaka at nine.", &prose(1, 150)]);
    let before = store.stats();
    let database = || bytes(&folder.path().join("db"));
    let mut after_100 = (0, 0);
    for turn in 0..1000 {
        let hits = store.recall(&trip(), "hotel Osaka sister note", &Recall::default()).unwrap();
        let quoted: Vec<String> =
            hits.iter().map(|hit| format!("> {}", hit.text.to_uppercase())).collect();
        let pick = turn % hits.len();
        let answer = if turn % 2 == 0 { quoted[pick].clone() } else { hits[pick].text.clone() };
        let turns = vec![
            NewTurn::new(Role::Recalled, quoted.join("\n")),
            NewTurn::new(Role::Assistant, answer),
        ];
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        if turn == 100 {
            after_100 = (bytes(&folder.path().join("segments")), database());
        }
    }
    let after = store.stats();
    // A chunk may be cut in another place than it was within its text; cut again, it is the same.
    assert!(after.chunks <= before.chunks + 2, "{} from {}", after.chunks, before.chunks);
    assert!(after.vectors <= before.vectors + 6, "{} from {}", after.vectors, before.vectors);
    let segments = bytes(&folder.path().join("segments"));
    println!(
        "2,000 turns: {} chunks from {}, {} vectors from {}; log {} bytes a turn; database {} bytes, {} after 100",
        after.chunks,
        before.chunks,
        after.vectors,
        before.vectors,
        (segments - after_100.0) / 1800,
        database(),
        after_100.1
    );
    // The log grows by what was said, and by nothing else: no vector among it.
    assert!((segments - after_100.0) / 1800 < 4_000);
}

#[test]
fn sensitive_turns_are_flagged_withheld_or_refused() {
    let told = "My password is hunter2222 and my mail is ada@example.org.";
    let commit = |store: &Store| {
        let turns = vec![NewTurn::new(Role::User, "Hello."), NewTurn::new(Role::User, told)];
        store.commit(&trip(), Commit { turns, ..Commit::default() })
    };
    let policy = |secrets, personal| {
        let mut hygiene = Hygiene::default();
        (hygiene.secrets, hygiene.personal) = (secrets, personal);
        hygiene
    };
    let found = |store: &Store| {
        let hits = store.recall(&trip(), "password mail", &Recall::default()).unwrap();
        hits.iter().filter(|hit| hit.text.contains("hunter")).count()
    };

    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let findings = commit(&store).unwrap().findings;
    let kinds: Vec<(usize, Sensitive)> = findings.iter().map(|it| (it.turn, it.kind)).collect();
    assert_eq!(kinds, [(1, Sensitive::Password), (1, Sensitive::Email)]);
    assert_eq!(&told[findings[1].bytes.clone()], "ada@example.org");
    assert_eq!(found(&store), 1);

    let folder = tempfile::tempdir().unwrap();
    let store = with(folder.path(), policy(Policy::Withhold, Policy::Flag));
    assert_eq!(commit(&store).unwrap().findings.len(), 2);
    assert_eq!(found(&store), 0);
    let turn = store.turns(&trip(), 1..2).unwrap().remove(0);
    assert!(turn.text == told && !turn.remember);
    drop(store);
    assert_eq!(found(&open(folder.path())), 0);

    let folder = tempfile::tempdir().unwrap();
    let store = with(folder.path(), policy(Policy::Ignore, Policy::Refuse));
    let error = commit(&store).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(!error.to_string().contains("ada@"), "{error}");
    assert_eq!(store.num_turns(&trip()).unwrap(), 0);
    drop(store);
    assert!(files_with(folder.path(), "hunter2222").is_empty());
}

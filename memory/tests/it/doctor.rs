//! The doctor: finds every kind of damage, mends what can be derived, and says what is lost.

use std::path::Path;

use mka_memory::{
    Cancel, Checkup, Commit, ErrorKind, Forget, NewSnapshot, Recall, Repair, Role, Scope, Store,
};
use proptest::prelude::*;

use crate::damage::{apply, harm};
use crate::support::{copy_folder, files, files_with, open, prose, say, trip, try_open};

fn fill(path: &Path) -> Vec<String> {
    let store = open(path);
    let texts: Vec<String> = (0..6).map(|number| prose(number, 120)).collect();
    for text in &texts {
        say(&store, &trip(), Role::Document, &[text]);
    }
    let snapshot = NewSnapshot {
        fingerprint: [1; 16],
        position: 9,
        state: vec![5; 300],
        pages: vec![(0, vec![6; 2000].into())],
        window: vec![0],
        first_page: 0,
    };
    store.commit(&trip(), Commit { snapshot: Some(snapshot), ..Commit::default() }).unwrap();
    say(&store, &Scope::user("bob").session("x"), Role::User, &["Bob likes the seaside."]);
    texts
}

fn check(store: &Store, repair: bool) -> Checkup {
    store.doctor(repair, &Cancel::new()).unwrap()
}

/// Flips a bit of the first occurrence of `needle`, some bytes behind its start, in the segment.
fn damage(path: &Path, needle: &[u8], behind: usize) {
    let file = files(&path.join("segments")).remove(0);
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.windows(needle.len()).position(|window| window == needle).unwrap();
    bytes[at + behind] ^= 4;
    std::fs::write(&file, bytes).unwrap();
}

fn repairs(checkup: &Checkup) -> Vec<Repair> {
    checkup.problems.iter().map(|problem| problem.repair).collect()
}

#[test]
fn a_whole_store_has_no_problems_and_every_record_is_read() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let store = open(folder.path());
    let checkup = check(&store, false);
    assert_eq!(checkup.problems, []);
    // The store, 2 sessions, 7 turns, a snapshot and a page; names, summary, text, chunks, state and page of them.
    assert_eq!((checkup.records, checkup.blobs), (1 + 2 + 7 + 1 + 1, 4 + 14 + 2));
    assert_eq!(checkup.bytes, store.stats().live_bytes);
    assert_eq!(checkup.chunks, store.stats().chunks);
}

#[test]
fn damage_while_the_store_is_open_is_found_and_derived_parts_are_mended() {
    let folder = tempfile::tempdir().unwrap();
    let texts = fill(folder.path());
    let store = open(folder.path());
    let query = &texts[3][..60];
    let before = store.recall(&trip(), query, &Recall::default()).unwrap();
    // The chunks of a turn follow its text in the segment.
    damage(folder.path(), texts[3].as_bytes(), texts[3].len() + 200);
    assert_eq!(repairs(&check(&store, false)), [Repair::Possible]);
    assert_eq!(repairs(&check(&store, true)), [Repair::Done]);
    assert_eq!(check(&store, false).problems, []);
    assert_eq!(store.recall(&trip(), query, &Recall::default()).unwrap(), before);
    drop(store);
    let store = open(folder.path());
    assert_eq!(check(&store, false).problems, []);
    assert_eq!(store.recall(&trip(), query, &Recall::default()).unwrap(), before);
}

#[test]
fn a_lost_text_is_named_and_its_place_is_left_empty() {
    let folder = tempfile::tempdir().unwrap();
    let texts = fill(folder.path());
    damage(folder.path(), texts[2].as_bytes(), 50);
    let store = open(folder.path());
    assert_eq!(store.turns(&trip(), 2..3).unwrap_err().kind(), ErrorKind::Corrupted);
    let checkup = check(&store, true);
    assert_eq!(repairs(&checkup), [Repair::Lost]);
    assert!(checkup.problems[0].what.contains("turn 2"), "{checkup:?}");
    for store in [store, open_again(folder.path())] {
        let turns = store.turns(&trip(), 0..9).unwrap();
        assert!(turns[2].forgotten && turns[3].text == texts[3]);
        assert_eq!(store.stats().damaged, Vec::<String>::new());
        assert_eq!(check(&store, false).problems, []);
    }
}

/// The loop above holds the first store until it is done with it.
fn open_again(path: &Path) -> Store {
    let copy = path.join("again");
    std::fs::create_dir(&copy).unwrap();
    for folder in ["db", "segments"] {
        std::fs::create_dir(copy.join(folder)).unwrap();
        for file in files(&path.join(folder)) {
            std::fs::copy(&file, copy.join(folder).join(file.file_name().unwrap())).unwrap();
        }
    }
    open(&copy)
}

#[test]
fn a_damaged_page_takes_its_snapshot_with_it_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    damage(folder.path(), &[6; 2000], 100);
    let store = open(folder.path());
    assert_eq!(store.snapshot(&trip(), [1; 16]).unwrap_err().kind(), ErrorKind::Corrupted);
    assert_eq!(repairs(&check(&store, true)), [Repair::Lost]);
    assert_eq!(store.snapshot(&trip(), [1; 16]).unwrap(), None);
    assert_eq!(store.turns(&trip(), 0..9).unwrap().len(), 6);
    assert_eq!(check(&store, false).problems, []);
}

#[test]
fn records_that_the_database_lost_come_back_from_the_segments() {
    let folder = tempfile::tempdir().unwrap();
    let earlier = tempfile::tempdir().unwrap();
    let texts = fill(folder.path());
    let db = folder.path().join("db");
    for file in files(&db) {
        std::fs::copy(&file, earlier.path().join(file.file_name().unwrap())).unwrap();
    }
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["One more."]);
    say(&store, &Scope::user("carl").session("new"), Role::User, &["And another one."]);
    drop(store);
    // The database goes back in time: the segments hold two commits that it does not know.
    for file in files(&db) {
        std::fs::remove_file(file).unwrap();
    }
    for file in files(earlier.path()) {
        std::fs::copy(&file, db.join(file.file_name().unwrap())).unwrap();
    }
    let store = open(folder.path());
    assert!(!store.stats().damaged.is_empty());
    let checkup = check(&store, true);
    assert!(!checkup.problems.is_empty());
    assert!(checkup.problems.iter().all(|problem| problem.repair == Repair::Done), "{checkup:?}");
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    let turns = store.turns(&trip(), 0..9).unwrap();
    assert_eq!((turns[5].text.as_str(), turns[6].text.as_str()), (texts[5].as_str(), "One more."));
    let carl = Scope::user("carl").session("new");
    assert_eq!(store.turns(&carl, 0..9).unwrap()[0].text, "And another one.");
    let hits = store.recall(&carl, "another", &Recall::default()).unwrap();
    assert_eq!(hits.len(), 1);
    assert_eq!(check(&store, false).problems, []);
}

/// The database goes back to the copy of it in `earlier`.
fn go_back(path: &Path, earlier: &Path) {
    std::fs::remove_dir_all(path.join("db")).unwrap();
    copy_folder(earlier, &path.join("db"));
}

/// What is said to a session, turn by turn.
fn told(store: &Store, scope: &Scope) -> Vec<String> {
    store.turns(scope, 0..99).unwrap().into_iter().map(|turn| turn.text).collect()
}

const LOST: [&str; 3] = ["Carl hides his key.", "It lies in the boot.", "The boot is red."];

/// Fills a store whose database then lost the session `scope`.
fn lose(path: &Path, scope: &Scope) {
    let earlier = tempfile::tempdir().unwrap();
    fill(path);
    copy_folder(&path.join("db"), earlier.path());
    let store = open(path);
    for text in LOST {
        say(&store, scope, Role::User, &[text]);
    }
    drop(store);
    go_back(path, earlier.path());
}

#[test]
fn the_numbers_of_a_lost_session_are_not_given_to_another_user() {
    let folder = tempfile::tempdir().unwrap();
    let [carl, dora] = ["carl", "dora"].map(|user| Scope::user(user).session("new"));
    lose(folder.path(), &carl);
    let store = open(folder.path());
    say(&store, &dora, Role::User, &["Dora waters the tomatoes."]);
    say(&store, &Scope::user("dora").session("next"), Role::User, &["Dora has a cat."]);
    drop(store);
    // What is lost is still noted, and still there, though others have written since.
    let store = open(folder.path());
    assert!(store.stats().damaged[0].contains("3 commits"), "{:?}", store.stats().damaged);
    let checkup = check(&store, true);
    assert!(checkup.problems.iter().all(|problem| problem.repair == Repair::Done), "{checkup:?}");
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    assert_eq!(check(&store, false).problems, []);
    assert_eq!(told(&store, &dora), ["Dora waters the tomatoes."]);
    assert_eq!(told(&store, &carl), LOST);
    let hits = store.recall(&Scope::user("dora"), "the key in the red boot", &Recall::default());
    assert!(hits.unwrap().iter().all(|hit| hit.text.starts_with("Dora")));
}

#[test]
fn a_session_that_comes_back_where_another_has_its_name_is_found_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let carl = Scope::user("carl");
    let new = carl.clone().session("new");
    lose(folder.path(), &new);
    let store = open(folder.path());
    say(&store, &new, Role::User, &["Carl has moved."]);
    let checkup = check(&store, true);
    assert!(checkup.problems.iter().all(|problem| problem.repair == Repair::Done), "{checkup:?}");
    let found = carl.clone().session("new (lost+found, session 3)");
    assert!(checkup.problems.iter().any(|problem| problem.what.contains(&found.to_string())));
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    assert_eq!(check(&store, false).problems, []);
    assert_eq!(store.sessions(&carl).unwrap().len(), 2);
    assert_eq!(told(&store, &new), ["Carl has moved."]);
    assert_eq!(told(&store, &found), LOST);
    let receipt = store.forget(&carl, &Forget::everything()).unwrap();
    assert_eq!(receipt.turns, 4);
    store.verify(&receipt).unwrap();
    assert!(store.recall(&carl, "the red boot", &Recall::default()).unwrap().is_empty());
    for text in LOST {
        assert_eq!(files_with(folder.path(), text), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn of_two_sessions_with_one_number_neither_gets_the_turns_of_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    fill(folder.path());
    copy_folder(folder.path(), other.path());
    let store = open(other.path());
    let [carl, dora] = ["carl", "dora"].map(|user| Scope::user(user).session("new"));
    for text in LOST {
        say(&store, &carl, Role::User, &[text]);
    }
    drop(store);
    let store = open(folder.path());
    say(&store, &dora, Role::User, &["Dora waters the tomatoes."]);
    drop(store);
    // As a version that gave the number of a lost session again left it.
    let mut segment = std::fs::read(other.path().join("segments/000001.seg")).unwrap();
    // Magic (8), version (4), number (4).
    segment[12..16].copy_from_slice(&2u32.to_le_bytes());
    std::fs::write(folder.path().join("segments/000002.seg"), segment).unwrap();
    let store = open(folder.path());
    assert!(!store.stats().damaged.is_empty());
    let checkup = check(&store, true);
    assert_eq!(repairs(&checkup), [Repair::Lost], "{checkup:?}");
    for store in [store, open_again(folder.path())] {
        assert_eq!(told(&store, &dora), ["Dora waters the tomatoes."]);
        let hits =
            store.recall(&Scope::user("dora"), "the key in the red boot", &Recall::default());
        assert!(hits.unwrap().iter().all(|hit| hit.text.starts_with("Dora")));
    }
    assert_eq!(files_with(&folder.path().join("segments"), LOST[2]).len(), 1);
}

/// Changes the length of the record of `page` so that it ends where the record of the turn that says `text` begins.
fn lead_to(path: &Path, page: &[u8], text: &str) {
    const MAGIC: &[u8] = b"mkaR";
    let file = files_with(&path.join("segments"), text).remove(0);
    let mut bytes = std::fs::read(&file).unwrap();
    let payload = bytes.windows(page.len()).rposition(|window| window == page).unwrap();
    let said = bytes.windows(text.len()).position(|window| window == text.as_bytes()).unwrap();
    let next = bytes[..said].windows(MAGIC.len()).rposition(|window| window == MAGIC).unwrap();
    // Magic (4), kind (1), zero (3), length (4), hash (8).
    assert_eq!(&bytes[payload - 20..payload - 16], MAGIC);
    let len = u32::try_from(next - payload).unwrap();
    bytes[payload - 12..payload - 8].copy_from_slice(&len.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn a_turn_behind_a_page_whose_length_leads_beyond_it_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let earlier = tempfile::tempdir().unwrap();
    fill(folder.path());
    let db = folder.path().join("db");
    copy_folder(&db, earlier.path());
    let page = vec![8; 2000];
    let said = [("trip", "One more."), ("carl", "Passed over."), ("dora", "And another one.")];
    let scopes = said.map(|(name, _)| match name {
        "trip" => trip(),
        _ => Scope::user(name).session("new"),
    });
    let store = open(folder.path());
    say(&store, &scopes[0], Role::User, &[said[0].1]);
    let snapshot = NewSnapshot {
        fingerprint: [1; 16],
        position: 10,
        state: vec![5; 300],
        pages: vec![(1, page.clone().into())],
        window: vec![0, 1],
        first_page: 0,
    };
    store.commit(&trip(), Commit { snapshot: Some(snapshot), ..Commit::default() }).unwrap();
    say(&store, &scopes[1], Role::User, &[said[1].1]);
    say(&store, &scopes[2], Role::User, &[said[2].1]);
    drop(store);
    lead_to(folder.path(), &page, said[2].1);
    std::fs::remove_dir_all(&db).unwrap();
    copy_folder(earlier.path(), &db);
    let store = open(folder.path());
    // Of the three commits an opening sees those that are not passed over.
    let damaged = store.stats().damaged;
    assert!(damaged.iter().any(|what| what.contains("2 commits")), "{damaged:?}");
    let checkup = check(&store, true);
    assert!(checkup.problems.iter().all(|problem| problem.repair == Repair::Done), "{checkup:?}");
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    for ((_, text), scope) in said.iter().zip(&scopes) {
        assert_eq!(store.turns(scope, 0..9).unwrap().last().unwrap().text, *text);
    }
    assert_eq!(check(&store, false).problems, []);
}

#[test]
fn a_check_can_be_cancelled() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    let cancel = Cancel::new();
    cancel.cancel();
    assert_eq!(open(folder.path()).doctor(true, &cancel).unwrap_err().kind(), ErrorKind::Cancelled);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_damage_a_repaired_store_is_whole_and_tells_the_truth(harms in prop::collection::vec(harm(), 1..3), which in 0usize..3, at in any::<prop::sample::Index>()) {
        let folder = tempfile::tempdir().unwrap();
        let texts = fill(folder.path());
        let target = if which == 0 { "db" } else { "segments" };
        let files = files(&folder.path().join(target));
        apply(&files[at.index(files.len())], &harms);
        let Ok(store) = try_open(folder.path()) else { return Ok(()) };
        check(&store, true);
        prop_assert_eq!(check(&store, false).problems, []);
        drop(store);
        let store = open(folder.path());
        prop_assert_eq!(store.stats().damaged, Vec::<String>::new());
        prop_assert_eq!(check(&store, false).problems, []);
        for turn in store.turns(&trip(), 0..99).unwrap() {
            prop_assert!(turn.forgotten || turn.text == texts[turn.id as usize]);
        }
    }
}

//! Damaged files: a store says what is lost, makes anew what it can, and never panics or invents.

use std::path::{Path, PathBuf};

use mka_memory::{Backend, Commit, ErrorKind, NewSnapshot, NewTurn, Recall, Role, Scope};
use proptest::prelude::*;

use crate::support::{BACKENDS, copy_folder, files, open, open_as, prose, say, trip, try_open};

fn fill(path: &Path) -> Vec<String> {
    fill_as(path, Backend::Sled)
}

fn fill_as(path: &Path, backend: Backend) -> Vec<String> {
    let store = open_as(path, backend);
    let texts: Vec<String> = (0..6).map(|number| prose(number, 120)).collect();
    for text in &texts {
        say(&store, &trip(), Role::Document, &[text]);
    }
    let snapshot = NewSnapshot {
        fingerprint: [1; 16],
        position: 9,
        state: vec![5; 300],
        pages: vec![(0, vec![6; 2000].into()), (1, vec![7; 2000].into())],
        window: vec![0, 1],
        first_page: 0,
    };
    store.commit(&trip(), Commit { snapshot: Some(snapshot), ..Commit::default() }).unwrap();
    say(&store, &Scope::user("bob").session("x"), Role::User, &["Bob likes the seaside."]);
    texts
}

fn segment(path: &Path) -> PathBuf {
    files(&path.join("segments")).remove(0)
}

/// Flips a bit of the last occurrence of `needle` in the segment.
fn damage(path: &Path, needle: &[u8]) {
    let file = segment(path);
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.windows(needle.len()).rposition(|window| window == needle).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&file, bytes).unwrap();
}

#[test]
fn a_damaged_turn_is_named_and_the_rest_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let texts = fill(folder.path());
    damage(folder.path(), texts[2].as_bytes());
    let store = open(folder.path());
    assert_eq!(store.stats().damaged.len(), 1);
    let error = store.turns(&trip(), 0..6).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupted);
    assert!(error.to_string().contains("turn 2"), "{error}");
    assert_eq!(store.turns(&trip(), 3..6).unwrap()[0].text, texts[3]);
    let hits = store.recall(&trip(), &texts[2], &Recall { k: 99, ..Recall::default() }).unwrap();
    assert!(!hits.is_empty() && hits.iter().all(|hit| hit.source.turn != 2));
    say(&store, &trip(), Role::User, &["Life goes on."]);
    assert_eq!(store.turns(&trip(), 6..7).unwrap()[0].text, "Life goes on.");
}

#[test]
fn damaged_chunks_and_vectors_are_made_anew_from_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let texts = fill(folder.path());
    let query = &texts[3][..60];
    let before = open(folder.path()).recall(&trip(), query, &Recall::default()).unwrap();
    // The chunks of a turn follow its text in the segment.
    let file = segment(folder.path());
    let mut bytes = std::fs::read(&file).unwrap();
    let text = texts[3].as_bytes();
    let at = bytes.windows(text.len()).position(|window| window == text).unwrap();
    bytes[at + text.len() + 200] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    for _ in 0..2 {
        let store = open(folder.path());
        assert_eq!(store.stats().damaged, Vec::<String>::new());
        assert_eq!(store.recall(&trip(), query, &Recall::default()).unwrap(), before);
    }
    assert!(std::fs::read(&file).unwrap().len() > at + text.len());
}

#[test]
fn a_damaged_page_or_state_is_corrupted_and_the_log_is_there() {
    for needle in [&[5u8; 300][..], &[7u8; 2000][..]] {
        let folder = tempfile::tempdir().unwrap();
        fill(folder.path());
        damage(folder.path(), needle);
        let store = open(folder.path());
        assert_eq!(store.snapshot(&trip(), [1; 16]).unwrap_err().kind(), ErrorKind::Corrupted);
        assert_eq!(store.turns(&trip(), 0..6).unwrap().len(), 6);
    }
}

#[test]
fn a_missing_segment_is_named_and_the_store_opens() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    std::fs::remove_file(segment(folder.path())).unwrap();
    let store = open(folder.path());
    assert!(!store.stats().damaged.is_empty());
    assert_eq!(store.num_turns(&trip()).unwrap(), 0);
    say(&store, &trip(), Role::User, &["A new start."]);
    drop(store);
    assert_eq!(open(folder.path()).turns(&trip(), 0..1).unwrap()[0].text, "A new start.");
}

#[test]
fn a_store_whose_database_is_gone_does_not_pretend_to_be_new() {
    let folder = tempfile::tempdir().unwrap();
    fill(folder.path());
    std::fs::remove_dir_all(folder.path().join("db")).unwrap();
    assert_eq!(try_open(folder.path()).unwrap_err().kind(), ErrorKind::Corrupted);
}

#[test]
fn a_database_that_went_back_in_time_is_noticed_and_nothing_is_cut_off() {
    let folder = tempfile::tempdir().unwrap();
    let earlier = tempfile::tempdir().unwrap();
    fill(folder.path());
    let db = folder.path().join("db");
    for file in files(&db) {
        std::fs::copy(&file, earlier.path().join(file.file_name().unwrap())).unwrap();
    }
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["One more."]);
    say(&store, &Scope::user("carl").session("new"), Role::User, &["And another one."]);
    drop(store);
    for file in files(&db) {
        std::fs::remove_file(file).unwrap();
    }
    for file in files(earlier.path()) {
        std::fs::copy(&file, db.join(file.file_name().unwrap())).unwrap();
    }
    let store = open(folder.path());
    assert!(store.stats().damaged[0].contains("2 commits"), "{:?}", store.stats().damaged);
    say(&store, &trip(), Role::User, &["Written later."]);
    assert_eq!(store.turns(&trip(), 6..7).unwrap()[0].text, "Written later.");
    assert_eq!(crate::support::files_with(folder.path(), "And another one.").len(), 1);
}

#[derive(Debug, Clone)]
pub(crate) enum Harm {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Zero(prop::sample::Index, usize),
}

pub(crate) fn harm() -> impl Strategy<Value = Harm> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        3 => (at(), 0u8..8).prop_map(|(at, bit)| Harm::Flip(at, bit)),
        1 => at().prop_map(Harm::Cut),
        1 => (at(), 1usize..3000).prop_map(|(at, len)| Harm::Zero(at, len)),
    ]
}

pub(crate) fn apply(file: &Path, harms: &[Harm]) {
    let mut bytes = std::fs::read(file).unwrap();
    for harm in harms {
        if bytes.is_empty() {
            break;
        }
        match harm {
            Harm::Flip(at, bit) => {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            Harm::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Harm::Zero(at, len) => {
                let at = at.index(bytes.len());
                let end = (at + len).min(bytes.len());
                bytes[at..end].fill(0);
            }
        }
    }
    std::fs::write(file, bytes).unwrap();
}

/// Whatever a damaged store says is either an error or the truth.
fn check_truth(path: &Path, texts: &[String]) {
    let Ok(store) = try_open(path) else { return };
    let num_turns = store.num_turns(&trip()).unwrap();
    for turn in 0..num_turns {
        if let Ok(turns) = store.turns(&trip(), turn..turn + 1) {
            assert_eq!(turns[0].text, texts[turn as usize]);
        }
    }
    for hit in store
        .recall(&trip(), "river engine window", &Recall { k: 99, ..Recall::default() })
        .unwrap()
    {
        let bytes = hit.source.bytes.start as usize..hit.source.bytes.end as usize;
        assert_eq!(hit.text, texts[hit.source.turn as usize][bytes]);
    }
    if let Ok(Some(snapshot)) = store.snapshot(&trip(), [1; 16]) {
        assert_eq!((snapshot.state, snapshot.pages.len()), (vec![5; 300], 2));
    }
    for chunk in store.chunks(&Scope::user("bob"), 0..9, None).unwrap() {
        assert_eq!(chunk.text, "Bob likes the seaside.");
    }
    let turns = vec![NewTurn::new(Role::User, "After the damage.")];
    let committed = store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
    drop(store);
    let store = open(path);
    let id = committed.turns[0];
    assert_eq!(store.turns(&trip(), id..id + 1).unwrap()[0].text, "After the damage.");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_damage_to_a_segment_gives_the_truth_or_an_error(harms in prop::collection::vec(harm(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let texts = fill(folder.path());
        apply(&segment(folder.path()), &harms);
        check_truth(folder.path(), &texts);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_damage_to_the_database_gives_the_truth_or_an_error(harms in prop::collection::vec(harm(), 1..3), which in any::<prop::sample::Index>(), backend in 0usize..2) {
        let folder = tempfile::tempdir().unwrap();
        let texts = fill_as(folder.path(), BACKENDS[backend]);
        let files = files(&folder.path().join("db"));
        apply(&files[which.index(files.len())], &harms);
        check_truth(folder.path(), &texts);
    }
}

/// Bytes of a database's file in which a bit is flipped.
const FLIPPED: usize = 200;

/// A flipped bit in every part of the database's file: pages of records, trees, free lists and headers. `MKA_FLIP_ALL`
/// asks for every byte that is not zero.
#[test]
fn a_flipped_bit_anywhere_in_the_database_gives_the_truth_or_an_error() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let texts = fill_as(folder.path(), backend);
        let file = |path: &Path| {
            path.join("db").join(if backend == Backend::Sled { "db" } else { "records.redb" })
        };
        let whole = std::fs::read(file(folder.path())).unwrap();
        // What is zero is mostly free; how much is not differs from run to run with what sled's thread has written.
        let used: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] != 0).collect();
        assert!(used.len() > 100, "{backend:?}: {} bytes", used.len());
        let every = std::env::var_os("MKA_FLIP_ALL").is_some();
        let step = if every { 1 } else { used.len().div_ceil(FLIPPED) };
        for &at in used.iter().step_by(step) {
            let copy = tempfile::tempdir().unwrap();
            copy_folder(folder.path(), copy.path());
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(file(copy.path()), bytes).unwrap();
            check_truth(copy.path(), &texts);
        }
    }
}

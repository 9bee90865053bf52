//! Snapshots and pages: what a session goes on from.

use mka_memory::{
    Commit, ErrorKind, HashedEmbedder, NewSnapshot, NewTurn, Role, Store, StoreOptions,
};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::support::{open, trip};

const MODEL: [u8; 16] = [1; 16];

fn page(number: u64) -> Vec<u8> {
    vec![number as u8; 1000]
}

fn commit(store: &Store, snapshot: NewSnapshot) -> mka_memory::Result<()> {
    let turns = vec![NewTurn::new(Role::User, "Go on.")];
    store.commit(&trip(), Commit { turns, snapshot: Some(snapshot), retract: None }).map(|_| ())
}

fn snapshot(position: u64, pages: &[u64], window: &[u64]) -> NewSnapshot {
    NewSnapshot {
        fingerprint: MODEL,
        position,
        state: position.to_le_bytes().to_vec(),
        pages: pages.iter().map(|&number| (number, page(number).into())).collect(),
        window: window.to_vec(),
        first_page: 0,
    }
}

fn keeping(path: &Path, evicted_page_bytes: u64) -> Store {
    let options = StoreOptions { evicted_page_bytes, ..StoreOptions::default() };
    Store::open(path, Arc::new(HashedEmbedder::new()), options).unwrap()
}

fn check(store: &Store, position: u64, window: &[u64]) {
    let read = store.snapshot(&trip(), MODEL).unwrap().unwrap();
    assert_eq!((read.position, read.state), (position, position.to_le_bytes().to_vec()));
    let pages: Vec<(u64, Vec<u8>)> = window.iter().map(|&number| (number, page(number))).collect();
    assert_eq!(read.pages, pages);
}

#[test]
fn the_latest_snapshot_is_read_back_after_reopening() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert_eq!(store.snapshot(&trip(), MODEL).unwrap(), None);
    commit(&store, snapshot(64, &[0, 1], &[0, 1])).unwrap();
    commit(&store, snapshot(192, &[3, 2], &[3, 0, 2])).unwrap();
    check(&store, 192, &[0, 2, 3]);
    drop(store);
    let store = open(folder.path());
    check(&store, 192, &[0, 2, 3]);
    assert_eq!(store.pages(&trip()).unwrap(), [0, 2, 3]);
}

#[test]
fn a_window_of_any_number_of_pages_is_read_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for count in [0, 1, 2, 7, 8, 9, 17] {
        let pages: Vec<u64> = (0..count).collect();
        commit(&store, snapshot(count, &pages, &pages)).unwrap();
        check(&store, count, &pages);
    }
}

#[test]
fn a_snapshot_that_is_open_is_read_as_it_was_whatever_is_committed_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    assert!(store.open_snapshot(&trip(), MODEL).unwrap().is_none());
    commit(&store, snapshot(64, &[0, 1], &[0, 1])).unwrap();
    let before = store.open_snapshot(&trip(), MODEL).unwrap().unwrap();
    let mut after = snapshot(128, &[1, 2], &[1, 2]);
    after.pages[0].1 = vec![9; after.pages[0].1.num_bytes()].into();
    commit(&store, after).unwrap();
    store.compact_all().unwrap();
    assert_eq!((before.position, before.state.as_slice()), (64, &64u64.to_le_bytes()[..]));
    assert_eq!(before.read_pages().unwrap(), [(0, page(0)), (1, page(1))]);
    let read = store.open_snapshot(&trip(), MODEL).unwrap().unwrap().read_pages().unwrap();
    assert_eq!(read, [(1, vec![9; 1000]), (2, page(2))]);
}

#[test]
fn a_retraction_without_a_snapshot_removes_what_was_made_of_the_turns_it_takes_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path(), 1 << 20);
    let retract = |store: &Store, turn: u64, snapshot: Option<NewSnapshot>| {
        let commit = Commit { turns: Vec::new(), snapshot, retract: Some(turn..2) };
        store.commit(&trip(), commit).unwrap();
    };
    commit(&store, snapshot(64, &[0, 1], &[0, 1])).unwrap();
    commit(&store, snapshot(128, &[2], &[1, 2])).unwrap();
    store.fork(&trip(), "other").unwrap();
    // Nothing is taken back: nothing goes.
    retract(&store, 2, None);
    check(&store, 128, &[1, 2]);
    retract(&store, 1, Some(snapshot(64, &[], &[0, 1])));
    check(&store, 64, &[0, 1]);
    // Turn 1 was taken back before.
    retract(&store, 1, None);
    check(&store, 64, &[0, 1]);
    retract(&store, 0, None);
    let is_gone = |store: &Store| {
        assert_eq!(store.snapshot(&trip(), MODEL).unwrap(), None);
        assert_eq!(store.pages(&trip()).unwrap(), Vec::<u64>::new());
        let other = trip().session("other");
        assert_eq!(store.snapshot(&other, MODEL).unwrap().unwrap().position, 128);
        assert_eq!(store.page(&other, 0).unwrap(), Some(page(0)));
    };
    is_gone(&store);
    drop(store);
    let store = keeping(folder.path(), 1 << 20);
    is_gone(&store);
    commit(&store, snapshot(64, &[0, 1], &[0, 1])).unwrap();
    check(&store, 64, &[0, 1]);
}

#[test]
fn pages_below_the_first_of_use_are_removed_and_a_fork_keeps_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path(), 1 << 20);
    let other = trip().session("other");
    commit(&store, snapshot(192, &[0, 1, 2], &[1, 2])).unwrap();
    store.fork(&trip(), "other").unwrap();
    let next = NewSnapshot { first_page: 40, ..snapshot(128, &[40, 41], &[41]) };
    commit(&store, next).unwrap();
    let holds = |store: &Store| {
        check(store, 128, &[41]);
        assert_eq!(store.pages(&trip()).unwrap(), [40, 41]);
        assert_eq!(store.pages(&other).unwrap(), [0, 1, 2]);
        assert_eq!(store.page(&other, 0).unwrap(), Some(page(0)));
    };
    holds(&store);
    store.compact_all().unwrap();
    holds(&store);
    drop(store);
    let store = keeping(folder.path(), 1 << 20);
    holds(&store);
    // A page of the window stays, wherever it lies.
    let next = NewSnapshot { first_page: 50, ..snapshot(192, &[50], &[41, 50]) };
    commit(&store, next).unwrap();
    check(&store, 192, &[41, 50]);
    assert_eq!(store.pages(&trip()).unwrap(), [41, 50]);
}

#[test]
fn another_model_is_refused_and_replaces_every_page() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path(), 1 << 20);
    commit(&store, snapshot(64, &[0, 1], &[0, 1])).unwrap();
    assert_eq!(store.snapshot(&trip(), [2; 16]).unwrap_err().kind(), ErrorKind::Incompatible);
    let other = NewSnapshot { fingerprint: [2; 16], ..snapshot(9, &[1], &[0, 1]) };
    assert_eq!(commit(&store, other).unwrap_err().kind(), ErrorKind::InvalidArgument);
    check(&store, 64, &[0, 1]);
    let other = NewSnapshot { fingerprint: [2; 16], ..snapshot(9, &[1], &[1]) };
    commit(&store, other).unwrap();
    assert_eq!(store.pages(&trip()).unwrap(), [1]);
    assert_eq!(store.snapshot(&trip(), [2; 16]).unwrap().unwrap().pages.len(), 1);
}

#[test]
fn a_window_page_that_is_nowhere_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    commit(&store, snapshot(64, &[0], &[0])).unwrap();
    assert_eq!(
        commit(&store, snapshot(65, &[1], &[0, 1, 2])).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    assert_eq!(
        commit(&store, snapshot(65, &[1, 1], &[0])).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    check(&store, 64, &[0]);
    assert_eq!(store.num_turns(&trip()).unwrap(), 1);
    drop(store);
    check(&open(folder.path()), 64, &[0]);
}

#[test]
fn evicted_pages_are_kept_within_their_budget_oldest_dropped_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path(), 2_500);
    commit(&store, snapshot(1, &[0, 1, 2], &[0, 1, 2])).unwrap();
    commit(&store, snapshot(2, &[3], &[2, 3])).unwrap();
    assert_eq!(store.pages(&trip()).unwrap(), [0, 1, 2, 3]);
    commit(&store, snapshot(3, &[4], &[3, 4])).unwrap();
    assert_eq!(store.pages(&trip()).unwrap(), [1, 2, 3, 4]);
    assert_eq!(store.page(&trip(), 1).unwrap(), Some(page(1)));
    assert_eq!(store.page(&trip(), 0).unwrap(), None);
    let mut out = vec![7; page(1).len()];
    assert_eq!(store.page_into(&trip(), 1, &mut out).unwrap(), Some(out.len()));
    assert_eq!(out, page(1));
    // One of another length is left where it is.
    for len in [0, out.len() - 1, out.len() + 1] {
        let mut other = vec![7; len];
        assert_eq!(store.page_into(&trip(), 1, &mut other).unwrap(), Some(out.len()));
        assert_eq!(other, vec![7; len]);
    }
    assert_eq!(store.page_into(&trip(), 0, &mut out).unwrap(), None);
    assert_eq!(out, page(1));
    // An evicted page may come back into the window.
    commit(&store, snapshot(4, &[], &[1, 4])).unwrap();
    check(&store, 4, &[1, 4]);
    drop(store);
    let store = open(folder.path());
    check(&store, 4, &[1, 4]);
    commit(&store, snapshot(5, &[], &[4])).unwrap();
    assert_eq!(store.pages(&trip()).unwrap(), [4]);
}

#[test]
fn a_mapped_page_is_the_page_and_stays_it_when_its_file_goes() {
    let folder = tempfile::tempdir().unwrap();
    let store = keeping(folder.path(), 2_500);
    commit(&store, snapshot(1, &[0, 1], &[0, 1])).unwrap();
    let mut mapped = store.map_page(&trip(), 1).unwrap().unwrap();
    assert!(mapped.is_mapped());
    assert_eq!(*mapped, *page(1));
    assert!(store.map_page(&trip(), 7).unwrap().is_none());
    // The first pages go with the segments that hold them.
    for number in 2..6 {
        commit(&store, snapshot(number, &[number], &[number])).unwrap();
    }
    store.compact_all().unwrap();
    assert!(store.map_page(&trip(), 1).unwrap().is_none());
    assert_eq!(*mapped, *page(1));
    let mut own = mapped.clone();
    assert!(!own.is_mapped());
    own.to_mut()[0] = 9;
    mapped.truncate(10);
    assert_eq!((&mapped[..], own[0], mapped[0]), (&page(1)[..10], 9, 1));
    // Who opens the folder may cut off and write over what lies under a map.
    drop(store);
    let again = || Store::open(folder.path(), Arc::new(HashedEmbedder::new()), Default::default());
    assert_eq!(again().unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(mapped.to_mut(), &page(1)[..10]);
    assert!(!mapped.is_mapped());
    again().unwrap();
}

#[test]
fn a_page_that_is_damaged_or_cut_off_is_an_error_mapped_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    commit(&store, snapshot(1, &[0, 1], &[0, 1])).unwrap();
    let segments = std::fs::read_dir(folder.path().join("segments")).unwrap();
    let segment = segments.map(|entry| entry.unwrap().path()).next().unwrap();
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&segment).unwrap();
    let bytes = std::fs::read(&segment).unwrap();
    let at = bytes.windows(1000).position(|bytes| bytes == page(1)).unwrap();
    let both = |store: &Store| {
        let mut out = vec![0; 1000];
        let mapped = store.map_page(&trip(), 1).err();
        [mapped, store.page_into(&trip(), 1, &mut out).err()].map(|error| Some(error?.kind()))
    };
    for (at, byte) in [(at + 500, 7), (at - 1, 0xff)] {
        file.write_all_at(&[byte], at as u64).unwrap();
        assert_eq!(both(&store), [Some(ErrorKind::Corrupted); 2]);
        file.write_all_at(&bytes[at..at + 1], at as u64).unwrap();
    }
    assert_eq!(both(&store), [None; 2]);
    file.set_len(at as u64 + 999).unwrap();
    assert_eq!(both(&store), [Some(ErrorKind::Corrupted); 2]);
}

#[test]
fn dropped_pages_are_freed_by_compaction() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let big = |number: u64| NewSnapshot {
        pages: vec![(number, vec![number as u8; 9 << 20].into())],
        ..snapshot(number, &[], &[number])
    };
    for number in 0..24 {
        commit(&store, big(number)).unwrap();
    }
    let stats = store.stats();
    assert!(stats.segments <= 3 && stats.dead_bytes < 130 << 20, "{stats:?}");
    assert_eq!(store.snapshot(&trip(), MODEL).unwrap().unwrap().pages[0].1.len(), 9 << 20);
    assert_eq!(store.turns(&trip(), 0..99).unwrap().len(), 24);
    drop(store);
    assert_eq!(open(folder.path()).turns(&trip(), 0..99).unwrap().len(), 24);
}

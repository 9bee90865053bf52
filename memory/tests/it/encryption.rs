//! Encryption at rest: what is written can be read with its key alone.

use std::path::Path;

use mka_memory::{
    Backend, Cancel, Commit, EncryptionKey, ErrorKind, Forget, NewSnapshot, Recall, Role, Scope,
    StoreOptions,
};

use crate::support::{BACKENDS, files, files_with, keyed, open_with, prose, say, trip, try_open};

const SECRET: &str = "walrus-4711";

fn keyed_as(path: &Path, backend: Backend) -> mka_memory::Store {
    let key = Some(EncryptionKey::new([7; 32]));
    open_with(path, StoreOptions { key, backend, ..StoreOptions::default() }).unwrap()
}

#[test]
fn an_encrypted_store_keeps_its_graphs_off_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        key: Some(EncryptionKey::new([7; 32])),
        graph_vectors: 1_000,
        ..StoreOptions::default()
    };
    let store = open_with(folder.path(), options).unwrap();
    let texts: Vec<String> = (0..1_000).map(|number| prose(number, 6)).collect();
    say(&store, &trip(), Role::User, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    store.finish_indexing();
    assert!(store.stats().vectors_in_graphs >= 1_000);
    assert!(!folder.path().join("index").exists());
    assert_eq!(store.recall(&trip(), &texts[70], &Recall::default()).unwrap()[0].text, texts[70]);
}

#[test]
fn nothing_that_was_said_is_in_the_files_and_all_of_it_comes_back() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let named = Scope::user("ada-lovelace").session("falcon-trip");
        let store = keyed_as(folder.path(), backend);
        let text = format!("The code is {SECRET}, said Babbage.");
        say(&store, &named, Role::User, &[&text, &prose(1, 200)]);
        let snapshot = NewSnapshot {
            fingerprint: *b"fingerprint-of-a",
            position: 3,
            state: b"state-of-the-model".to_vec(),
            pages: vec![(0, b"page-of-the-model".repeat(20).into())],
            window: vec![0],
            first_page: 0,
        };
        store.commit(&named, Commit { snapshot: Some(snapshot), ..Commit::default() }).unwrap();
        assert!(store.stats().encrypted);
        drop(store);
        let embedder = mka_memory::Embedder::identity(&mka_memory::HashedEmbedder::new());
        for needle in [
            SECRET,
            "Babbage",
            "lovelace",
            "falcon",
            "Note 1",
            "state-of",
            "page-of",
            "fingerprint",
            &embedder,
        ] {
            assert_eq!(
                files_with(folder.path(), needle),
                Vec::<std::path::PathBuf>::new(),
                "{needle}"
            );
        }
        let store = keyed_as(folder.path(), backend);
        assert_eq!(store.turns(&named, 0..1).unwrap()[0].text, text);
        let hits = store.recall(&named, "what code?", &Recall::default()).unwrap();
        assert_eq!(hits[0].text, text);
        let snapshot = store.snapshot(&named, *b"fingerprint-of-a").unwrap().unwrap();
        assert_eq!(snapshot.state, b"state-of-the-model");
        let page = b"page-of-the-model".repeat(20);
        let mut out = vec![0; page.len()];
        assert_eq!(store.page_into(&named, 0, &mut out).unwrap(), Some(page.len()));
        assert_eq!(out, page);
        let own = store.map_page(&named, 0).unwrap().unwrap();
        assert!(*own == *page && !own.is_mapped());
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    }
}

#[test]
fn a_key_that_is_wrong_missing_or_not_expected_is_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (sealed, plain) = (folder.path().join("sealed"), folder.path().join("plain"));
    say(&keyed(&sealed, 7).unwrap(), &trip(), Role::User, &["Hello."]);
    say(&try_open(&plain).unwrap(), &trip(), Role::User, &["Hello."]);
    for (error, reason) in [
        (keyed(&sealed, 8).unwrap_err(), "got another one"),
        (try_open(&sealed).unwrap_err(), "got none"),
        (keyed(&plain, 7).unwrap_err(), "not encrypted"),
    ] {
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert_eq!(keyed(&sealed, 7).unwrap().num_turns(&trip()).unwrap(), 1);
    assert_eq!(try_open(&plain).unwrap().num_turns(&trip()).unwrap(), 1);
}

/// The plain bytes were never there; what is gone is the sealed record, and a receipt finds that out with the key.
#[test]
fn forgetting_removes_sealed_records_as_it_does_plain_ones() {
    let folder = tempfile::tempdir().unwrap();
    let store = keyed(folder.path(), 7).unwrap();
    say(&store, &trip(), Role::User, &["Keep this.", &format!("The code is {SECRET}.")]);
    let segments = folder.path().join("segments");
    let before: Vec<Vec<u8>> =
        files(&segments).iter().map(|file| std::fs::read(file).unwrap()).collect();
    let receipt = store.forget(&trip(), &Forget::matching(SECRET)).unwrap();
    assert_eq!(receipt.turns, 1);
    store.verify(&receipt).unwrap();
    assert_eq!(store.stats().dead_bytes, 0);
    // No stretch of the old segments is left beyond the record that stays and what all headers share.
    let after: Vec<u8> =
        files(&segments).iter().flat_map(|file| std::fs::read(file).unwrap()).collect();
    let kept = before
        .concat()
        .windows(32)
        .step_by(8)
        .filter(|part| after.windows(32).any(|known| known == *part))
        .count();
    let all = before.concat().len() / 8;
    assert!(kept < all, "{kept} of {all}");
    drop(store);
    let store = keyed(folder.path(), 7).unwrap();
    store.verify(&receipt).unwrap();
    assert!(store.turns(&trip(), 1..2).unwrap()[0].forgotten);
}

#[test]
fn a_changed_bit_of_a_sealed_record_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    say(&keyed(folder.path(), 7).unwrap(), &trip(), Role::User, &[&prose(1, 100), "Second."]);
    let file = files(&folder.path().join("segments")).remove(0);
    let mut bytes = std::fs::read(&file).unwrap();
    // Inside the first turn's text.
    bytes[200] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let store = keyed(folder.path(), 7).unwrap();
    assert_eq!(store.stats().damaged.len(), 1);
    assert_eq!(store.turns(&trip(), 0..1).unwrap_err().kind(), ErrorKind::Corrupted);
    assert_eq!(store.turns(&trip(), 1..2).unwrap()[0].text, "Second.");
}

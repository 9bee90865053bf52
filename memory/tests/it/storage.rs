//! The seam to the database: another one fits behind it, and one that fails half-way does no harm.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use mka_memory::{
    Backend, Cancel, Commit, Error, ErrorKind, Forget, HashedEmbedder, NewTurn, Recall,
    RecordChange, Role, Storage, Store, StoreOptions, Visit,
};

use crate::support::{BACKENDS, open, open_as, say, trip};

/// A database in memory that fails at its n-th write, before or after it applied the batch.
#[derive(Clone, Default)]
struct Failing {
    records: Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>,
    writes_left: Arc<Mutex<Option<u64>>>,
    applies: bool,
    /// Bytes that its files take and do not need.
    garbage: u64,
    /// How often it failed to give them back; it does not try, if that is none.
    failed_compactions: Option<Arc<Mutex<u64>>>,
    /// Whether it is closed by a compaction that fails.
    closes: bool,
}

impl Failing {
    fn check(&self) -> mka_memory::Result<()> {
        let failed = self.failed_compactions.iter().any(|failed| *failed.lock().unwrap() > 0);
        if self.closes && failed {
            return Err(Error::new(ErrorKind::Storage, "the database is closed"));
        }
        Ok(())
    }
}

impl Storage for Failing {
    fn get(&self, key: &[u8]) -> mka_memory::Result<Option<Vec<u8>>> {
        self.check()?;
        Ok(self.records.lock().unwrap().get(key).cloned())
    }

    fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> mka_memory::Result<()> {
        let records = self.records.lock().unwrap();
        records.range(from.to_vec()..).try_for_each(|(key, value)| each(key, value))
    }

    fn write(&mut self, changes: &[RecordChange]) -> mka_memory::Result<()> {
        self.check()?;
        let mut writes_left = self.writes_left.lock().unwrap();
        let fails = *writes_left == Some(0);
        *writes_left = writes_left.map(|left| left.saturating_sub(1));
        if !fails || self.applies {
            let mut records = self.records.lock().unwrap();
            for (key, value) in changes.iter().cloned() {
                assert!(key.len() <= 32 && value.as_ref().is_none_or(|value| value.len() <= 4096));
                match value {
                    Some(value) => records.insert(key, value),
                    None => records.remove(&key),
                };
            }
        }
        if fails {
            return Err(Error::new(ErrorKind::Storage, "write: the cable was pulled"));
        }
        Ok(())
    }

    fn disk_bytes(&self) -> mka_memory::Result<u64> {
        let records = self.records.lock().unwrap();
        Ok(self.garbage + records.values().map(|value| value.len() as u64).sum::<u64>())
    }

    fn compact(&mut self) -> mka_memory::Result<()> {
        let Some(failed) = &self.failed_compactions else { return Ok(()) };
        *failed.lock().unwrap() += 1;
        Err(Error::new(ErrorKind::Storage, "compact: no space left on the device"))
    }

    fn path(&self) -> &Path {
        Path::new("memory")
    }
}

fn open_failing(path: &Path, storage: &Failing) -> mka_memory::Result<Store> {
    let embedder = Arc::new(HashedEmbedder::new());
    Store::open_with(path, embedder, StoreOptions::default(), Box::new(storage.clone()))
}

#[test]
fn a_database_that_fails_leaves_whole_commits_and_a_store_that_says_so() {
    for applies in [false, true] {
        for fails_at in 0..4 {
            let folder = tempfile::tempdir().unwrap();
            let storage = Failing { applies, ..Failing::default() };
            let store = open_failing(folder.path(), &storage).unwrap();
            *storage.writes_left.lock().unwrap() = Some(fails_at);
            let mut acknowledged = 0;
            for number in 0..6 {
                let turns = vec![NewTurn::new(Role::User, format!("Number {number}."))];
                match store.commit(&trip(), Commit { turns, ..Commit::default() }) {
                    Ok(_) => acknowledged += 1,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Storage),
                }
            }
            assert_eq!(acknowledged, fails_at);
            // What is stored can be read on.
            assert_eq!(store.turns(&trip(), 0..9).unwrap().len() as u64, acknowledged);
            drop(store);
            *storage.writes_left.lock().unwrap() = None;
            let store = open_failing(folder.path(), &storage).unwrap();
            let num_turns = store.num_turns(&trip()).unwrap();
            assert_eq!(num_turns, acknowledged + u64::from(applies));
            assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
            say(&store, &trip(), Role::User, &["Life goes on."]);
            let hits = store.recall(&trip(), "life", &Recall::default()).unwrap();
            assert_eq!(hits[0].source.turn, num_turns);
        }
    }
}

#[test]
fn a_database_that_cannot_be_compacted_is_written_on_unless_that_closed_it() {
    for closes in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let failed = Arc::new(Mutex::new(0));
        let failed_compactions = Some(failed.clone());
        let storage =
            Failing { garbage: 100 << 20, failed_compactions, closes, ..Failing::default() };
        let store = open_failing(folder.path(), &storage).unwrap();
        let commit = |number: u64| {
            let turns = vec![NewTurn::new(Role::User, format!("Number {number}."))];
            store.commit(&trip(), Commit { turns, ..Commit::default() })
        };
        commit(0).unwrap();
        assert_eq!(*failed.lock().unwrap(), 1);
        if closes {
            let error = commit(1).unwrap_err();
            assert!(error.kind() == ErrorKind::Storage && error.to_string().contains("open"));
        } else {
            // The files have not grown since.
            (1..4).for_each(|number| drop(commit(number).unwrap()));
            assert_eq!(*failed.lock().unwrap(), 1);
            assert_eq!(store.compact_all().unwrap_err().kind(), ErrorKind::Storage);
            commit(4).unwrap();
            let receipt = store.forget(&trip(), &Forget::turn(0)).unwrap();
            store.verify(&receipt).unwrap();
        }
        let num_turns = store.num_turns(&trip()).unwrap();
        assert_eq!(num_turns, if closes { 1 } else { 5 });
        assert_eq!(store.turns(&trip(), num_turns - 1..num_turns).unwrap().len(), 1);
    }
}

#[test]
fn sleds_database_is_written_on_after_a_compaction_that_failed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_as(folder.path(), Backend::Sled);
    say(&store, &trip(), Role::User, &["Hello."]);
    let new = folder.path().join("db.new");
    std::fs::write(&new, b"no folder").unwrap();
    assert_eq!(store.compact_all().unwrap_err().kind(), ErrorKind::Storage);
    say(&store, &trip(), Role::User, &["Again."]);
    std::fs::remove_file(&new).unwrap();
    store.compact_all().unwrap();
    drop(store);
    assert_eq!(open(folder.path()).turns(&trip(), 1..2).unwrap()[0].text, "Again.");
}

#[test]
fn a_store_keeps_the_database_that_it_was_created_with() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        say(&open_as(folder.path(), backend), &trip(), Role::User, &["Hello."]);
        let has_redb = folder.path().join("db/records.redb").exists();
        assert_eq!(has_redb, backend == Backend::Redb);
        // Opened without saying which.
        assert_eq!(open(folder.path()).turns(&trip(), 0..1).unwrap()[0].text, "Hello.");
        assert_eq!(folder.path().join("db/records.redb").exists(), has_redb);
        assert_ne!(folder.path().join("db/db").exists(), has_redb);
    }
}

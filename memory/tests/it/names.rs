//! Sessions of one name: a repair gives one of them another, and it keeps its turns under that.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};

use mka_memory::{
    Cancel, Checkup, ErrorKind, Forget, HashedEmbedder, RecordChange, Repair, Role, Scope, Storage,
    Store, StoreOptions, Visit,
};

use crate::support::{copy_folder, files_with, say, trip};

type Records = BTreeMap<Vec<u8>, Vec<u8>>;

/// A database in memory, whose records a test may change while no store has it open.
#[derive(Clone, Default)]
struct Database(Arc<Mutex<Records>>);

impl Storage for Database {
    fn get(&self, key: &[u8]) -> mka_memory::Result<Option<Vec<u8>>> {
        Ok(self.0.lock().unwrap().get(key).cloned())
    }

    fn scan(&self, from: &[u8], each: &mut Visit<'_>) -> mka_memory::Result<()> {
        let records = self.0.lock().unwrap();
        records.range(from.to_vec()..).try_for_each(|(key, value)| each(key, value))
    }

    fn write(&mut self, changes: &[RecordChange]) -> mka_memory::Result<()> {
        let mut records = self.0.lock().unwrap();
        for (key, value) in changes.iter().cloned() {
            match value {
                Some(value) => records.insert(key, value),
                None => records.remove(&key),
            };
        }
        Ok(())
    }

    fn disk_bytes(&self) -> mka_memory::Result<u64> {
        Ok(self.0.lock().unwrap().values().map(|value| value.len() as u64).sum())
    }

    fn compact(&mut self) -> mka_memory::Result<()> {
        Ok(())
    }

    fn path(&self) -> &Path {
        Path::new("memory")
    }
}

impl Database {
    fn of(records: &Records) -> Self {
        Self(Arc::new(Mutex::new(records.clone())))
    }

    fn open(&self, path: &Path) -> Store {
        let embedder = Arc::new(HashedEmbedder::new());
        let options = StoreOptions::default();
        Store::open_with(path, embedder, options, Box::new(self.clone())).unwrap()
    }

    fn records(&self) -> Records {
        self.0.lock().unwrap().clone()
    }
}

const LOST: [&str; 3] = ["Carl hides his key.", "It lies in the boot.", "The boot is red."];

/// The number of the session that is lost.
const ID: u64 = 2;

fn carl() -> Scope {
    Scope::user("carl")
}

/// The one of the sessions named so that is in use.
fn new() -> Scope {
    carl().session("new")
}

/// What a repair names the other one.
fn found() -> Scope {
    carl().session("new (lost+found, session 2)")
}

/// Whether the record under `key` is one of the lost session, of one of `kinds`.
fn is_lost(key: &[u8], kinds: &[u8]) -> bool {
    kinds.contains(&key[0]) && key.get(1..9) == Some(&ID.to_be_bytes()[..])
}

/// A store whose database lost a session, and where another one of its name was told since: the database before and after.
fn lose(path: &Path) -> (Records, Records) {
    let database = Database::default();
    let store = database.open(path);
    say(&store, &trip(), Role::User, &["Ada packs her bag."]);
    drop(store);
    let earlier = database.records();
    let store = database.open(path);
    for text in LOST {
        say(&store, &new(), Role::User, &[text]);
    }
    drop(store);
    let later = database.records();
    let database = Database::of(&earlier);
    say(&database.open(path), &new(), Role::User, &["Carl has moved."]);
    (later, database.records())
}

fn check(store: &Store, repair: bool) -> Checkup {
    store.doctor(repair, &Cancel::new()).unwrap()
}

fn told(store: &Store, scope: &Scope) -> Vec<String> {
    store.turns(scope, 0..99).unwrap().into_iter().map(|turn| turn.text).collect()
}

/// Repairs what is damaged; nothing of any session is lost by it.
fn repair(path: &Path, database: &Database, fault: &str) {
    let store = database.open(path);
    assert!(!store.stats().damaged.is_empty(), "{fault}");
    let checkup = check(&store, true);
    assert!(!checkup.problems.is_empty(), "{fault}");
    let is_done = checkup.problems.iter().all(|problem| problem.repair == Repair::Done);
    assert!(is_done, "{fault}: {checkup:?}");
    drop(store);
    let store = database.open(path);
    assert_eq!(store.stats().damaged, Vec::<String>::new(), "{fault}");
    assert_eq!(check(&store, false).problems, [], "{fault}");
    assert_eq!(store.sessions(&carl()).unwrap().len(), 2, "{fault}");
    assert_eq!(told(&store, &new()), ["Carl has moved."], "{fault}");
    assert_eq!(told(&store, &found()), LOST, "{fault}");
}

#[test]
fn a_session_that_a_repair_renamed_keeps_its_turns_through_the_next_fault() {
    let folder = tempfile::tempdir().unwrap();
    let (_, unrepaired) = lose(folder.path());
    let database = Database::of(&unrepaired);
    repair(folder.path(), &database, "the session is lost");
    let repaired = database.records();
    // Flips a bit in the checksum of the records of the lost session of these kinds: of the last turn's, where several lie
    // together.
    let damaged = |kinds: &[u8]| {
        let mut records = repaired.clone();
        for (_, value) in records.iter_mut().filter(|(key, _)| is_lost(key, kinds)) {
            *value.last_mut().unwrap() ^= 4;
        }
        records
    };
    let faults = [
        ("a turn's record is damaged", damaged(b"tr")),
        ("the session's record is damaged", damaged(b"s")),
        // The repair's records of the segments were written, those of the database were not.
        ("the repair was interrupted", unrepaired.clone()),
    ];
    for (fault, records) in faults {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(folder.path(), copy.path());
        repair(copy.path(), &Database::of(&records), fault);
    }
}

#[test]
fn forget_is_refused_while_two_sessions_have_one_name() {
    let folder = tempfile::tempdir().unwrap();
    let (later, mut records) = lose(folder.path());
    // As a repair left it that brought a session back under a name which another one had by then.
    records.extend(later.into_iter().filter(|(key, _)| is_lost(key, b"str")));
    let database = Database::of(&records);
    let store = database.open(folder.path());
    assert!(store.stats().damaged[0].contains("another session has its name"));
    for (scope, selector) in [(carl(), Forget::everything()), (new(), Forget::turn(0))] {
        let error = store.forget(&scope, &selector).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupted);
        assert!(error.to_string().contains("doctor"), "{error}");
        let error = store.check_forget(&scope).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupted);
    }
    store.check_forget(&trip()).unwrap();
    assert_eq!(told(&store, &new()), ["Carl has moved."]);
    // Nobody else's are in doubt.
    assert_eq!(store.forget(&trip(), &Forget::turn(0)).unwrap().turns, 1);
    drop(store);
    repair(folder.path(), &database, "two sessions have one name");
    let store = database.open(folder.path());
    let receipt = store.forget(&carl(), &Forget::everything()).unwrap();
    assert_eq!(receipt.turns, 4);
    store.verify(&receipt).unwrap();
    for text in LOST {
        assert_eq!(files_with(folder.path(), text), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn a_session_whose_number_another_one_had_too_stays_its_users() {
    let folder = tempfile::tempdir().unwrap();
    let (later, mut records) = lose(folder.path());
    records.extend(later.into_iter().filter(|(key, _)| is_lost(key, b"str")));
    // What a session of the same number, which an earlier version gave twice, left in the segments.
    let other = tempfile::tempdir().unwrap();
    let store = Database::default().open(other.path());
    say(&store, &trip(), Role::User, &["Ada packs her bag."]);
    say(&store, &carl().session("plan"), Role::User, &["Carl plans."]);
    drop(store);
    let segments = folder.path().join("segments");
    let number = std::fs::read_dir(&segments).unwrap().count() as u32 + 1;
    let mut segment = std::fs::read(other.path().join("segments/000001.seg")).unwrap();
    // Magic (8), version (4), number (4).
    segment[12..16].copy_from_slice(&number.to_le_bytes());
    std::fs::write(segments.join(format!("{number:06}.seg")), segment).unwrap();
    let database = Database::of(&records);
    check(&database.open(folder.path()), true);
    let store = database.open(folder.path());
    assert_eq!(told(&store, &new()), ["Carl has moved."]);
    assert_eq!(told(&store, &found()), LOST);
    assert!(store.sessions(&Scope::user("lost+found")).unwrap().is_empty());
    assert_eq!(store.forget(&carl(), &Forget::everything()).unwrap().turns, 4);
}

//! Export, import and backup: what leaves a store comes back as it was.

use std::path::Path;
use std::sync::Arc;

use mka_memory::{
    Cancel, Commit, ErrorKind, Filter, Forget, HashedEmbedder, NewTurn, Recall, Role, Scope, Store,
    StoreOptions, Value,
};

use crate::support::{BACKENDS, files, keyed, open, open_as, prose, say, trip};

fn fill(store: &Store) {
    let bot = Scope::user("ada").agent("bot").session("work");
    let mut guide =
        NewTurn::new(Role::Document, "Kyoto has \"temples\".\n\nThe ferry leaves at nine.");
    (guide.time_ms, guide.tokens, guide.source) = (20, vec![1, 70_000], Some("guide.md".into()));
    (guide.subject, guide.expires_ms) = (Some("ferry".into()), Some(99));
    let marks = [("kind", "guide".into()), ("open", true.into()), ("year", 2025.into())];
    // Two numbers that a fast reader of JSON rounds, and two that it does not.
    let numbers = [0.1 + 0.2, std::f64::consts::E * 1e200, 19.99, -0.0];
    let numbers = ["a", "b", "c", "d"].into_iter().zip(numbers.map(Value::from));
    guide.metadata =
        marks.into_iter().chain(numbers).map(|(key, value)| (key.to_owned(), value)).collect();
    let commit = |turns, retract| {
        store.commit(&trip(), Commit { turns, retract, ..Commit::default() }).unwrap();
    };
    commit(vec![NewTurn::new(Role::User, "We booked the Gion hotel."), guide], None);
    commit(vec![NewTurn::new(Role::Assistant, "It is too dear.")], None);
    commit(vec![NewTurn::new(Role::Assistant, "It is paid for.")], Some(2..3));
    say(store, &trip(), Role::Recalled, &["> We booked the Gion hotel."]);
    say(
        store,
        &trip(),
        Role::User,
        &["My locker code is walrus-4711.", "we booked the GION hotel"],
    );
    say(store, &bot, Role::User, &["Water the tomatoes."]);
    say(store, &Scope::user("bob").session("trip"), Role::User, &["Bob was here."]);
    store.forget(&trip(), &Forget::matching("walrus-4711")).unwrap();
}

/// Everything that the three sessions hold, and what is found in them.
fn contents(store: &Store) -> String {
    let mut contents = String::new();
    for scope in [
        trip(),
        Scope::user("ada").agent("bot").session("work"),
        Scope::user("bob").session("trip"),
    ] {
        contents += &format!("{:?}\n", store.turns(&scope, 0..99).unwrap());
        contents += &format!("{:?}\n", store.chunks(&scope, 0..99, None).unwrap());
        let hits = store.recall(&scope, "hotel ferry tomatoes Bob", &Recall::default()).unwrap();
        contents += &format!("{hits:?}\n");
        let marked = Recall {
            filter: Some(Filter::eq("a", 0.1 + 0.2).and(Filter::at_least("b", 1e200))),
            ..Recall::default()
        };
        contents += &format!("{:?}\n", store.recall(&scope, "ferry", &marked).unwrap());
    }
    contents
}

fn exported(store: &Store) -> Vec<u8> {
    let mut out = Vec::new();
    let exported = store.export_all(&mut out, &Cancel::new()).unwrap();
    assert_eq!(exported.turns as usize, out.split(|byte| *byte == b'\n').count() - 2);
    assert!(exported.lost.is_empty());
    out
}

#[test]
fn what_is_exported_can_be_imported_and_is_the_same() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = open(folders[0].path());
    fill(&store);
    let lines = exported(&store);
    let other = open(folders[1].path());
    let imported = other.import(&mut &lines[..], &Cancel::new()).unwrap();
    assert_eq!((imported.turns, imported.skipped), (9, 0));
    assert_eq!(contents(&other), contents(&store));
    assert!(contents(&other).matches("The ferry leaves at nine.").count() >= 4);
    assert_eq!(exported(&other), lines);
    // Again: nothing changes.
    let again = other.import(&mut &lines[..], &Cancel::new()).unwrap();
    assert_eq!((again.turns, again.skipped), (0, 9));
    drop(other);
    let other = open(folders[1].path());
    assert_eq!(contents(&other), contents(&store));
    assert!(other.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

fn told(store: &Store, session: &str, text: &str) {
    let mut turn = NewTurn::new(Role::User, text);
    turn.subject = Some("home".into());
    let commit = Commit { turns: vec![turn], ..Commit::default() };
    store.commit(&Scope::user("ada").session(session), commit).unwrap();
}

fn home(store: &Store) -> Vec<String> {
    let options = Recall { follow_up: false, ..Recall::default() };
    let hits = store.recall(&Scope::user("ada"), "which city is home", &options).unwrap();
    hits.into_iter().map(|hit| hit.text).filter(|text| text.contains("home")).collect()
}

#[test]
fn turns_of_several_sessions_keep_their_order() {
    let folders = [(); 4].map(|()| tempfile::tempdir().unwrap());
    let stores = folders.each_ref().map(|folder| open(folder.path()));
    let [store, copy, other, again] = &stores;
    told(store, "first", "My home city is Rome.");
    told(store, "second", "My home city is Oslo.");
    told(store, "third", "My home city is Bern.");
    // All at one time: the one that was said last counts, and its session is the oldest one.
    told(store, "first", "My home city is Lima.");
    store.fork(&Scope::user("ada").session("first"), "fork").unwrap();
    let lines = exported(store);
    assert_eq!(home(store), ["My home city is Lima."]);
    copy.import(&mut &lines[..], &Cancel::new()).unwrap();
    assert_eq!(home(copy), ["My home city is Lima."]);
    assert_eq!(exported(copy), lines);
    // Behind what is there.
    for number in 0..9 {
        told(other, "own", &format!("My home city is number {number}."));
    }
    other.import(&mut &lines[..], &Cancel::new()).unwrap();
    assert_eq!(home(other), ["My home city is Lima."]);
    told(other, "own", "My home city is Cork.");
    assert_eq!(home(other), ["My home city is Cork."]);
    // In two parts.
    let end = lines.iter().enumerate().filter(|(_, byte)| **byte == b'\n').nth(2).unwrap().0;
    again.import(&mut &lines[..=end], &Cancel::new()).unwrap();
    assert_eq!(again.import(&mut &lines[..], &Cancel::new()).unwrap().skipped, 2);
    assert_eq!(home(again), ["My home city is Lima."]);
    assert_eq!(exported(again), lines);
    for store in &stores {
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    }
    drop(stores);
    assert_eq!(home(&open(folders[1].path())), ["My home city is Lima."]);
    assert_eq!(home(&open(folders[2].path())), ["My home city is Cork."]);
}

/// Lines that an import reads while another writes to its store: before each one a turn is told.
struct Beside<'a> {
    store: &'a Store,
    lines: &'a [u8],
}

impl std::io::Read for Beside<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        told(self.store, "live", &format!("My home city is {} lines away.", self.lines.len()));
        let line = self.lines.split_inclusive(|byte| *byte == b'\n').next().unwrap_or_default();
        let len = line.len().min(out.len());
        out[..len].copy_from_slice(&line[..len]);
        self.lines = &self.lines[len..];
        Ok(len)
    }
}

#[test]
fn an_import_beside_another_writer_gives_an_order_once() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (store, other) = (open(folders[0].path()), open(folders[1].path()));
    for (session, city) in [("a", "Rome"), ("b", "Oslo"), ("a", "Bern"), ("c", "Lima")] {
        told(&store, session, &format!("My home city is {city}."));
    }
    let lines = exported(&store);
    let mut input = std::io::BufReader::new(Beside { store: &other, lines: &lines });
    assert_eq!(other.import(&mut input, &Cancel::new()).unwrap().turns, 4);
    let all = exported(&other);
    let orders = all.split(|byte| *byte == b'\n').skip(1).filter(|line| !line.is_empty());
    let orders: Vec<u64> = orders
        .map(|line| {
            let line: serde_json::Value = serde_json::from_slice(line).unwrap();
            line["order"].as_u64().unwrap()
        })
        .collect();
    let given_once: std::collections::BTreeSet<u64> = orders.iter().copied().collect();
    assert_eq!(given_once.len(), orders.len(), "{orders:?}");
    assert!(other.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

#[test]
fn lines_of_version_1_are_in_the_order_of_their_lines() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lines = String::from("{\"format\":\"mka-memory log\",\"version\":1}\n");
    for (session, city) in [("b", "Rome"), ("a", "Oslo")] {
        lines += &format!(
            r#"{{"user":"ada","session":"{session}","turn":0,"role":"User","time_ms":0,"text":"My home city is {city}.","subject":"home","remember":true}}"#
        );
        lines.push('\n');
    }
    store.import(&mut lines.as_bytes(), &Cancel::new()).unwrap();
    assert_eq!(home(&store), ["My home city is Oslo."]);
    // An order that there is no room behind, and one that another turn has.
    let mut lines = String::from("{\"format\":\"mka-memory log\",\"version\":2}\n");
    for (session, order, city) in [("c", u64::MAX, "Bern"), ("d", 0, "Lima"), ("e", 0, "Cork")] {
        lines += &format!(
            r#"{{"user":"ada","session":"{session}","turn":0,"role":"User","time_ms":0,"order":{order},"text":"My home city is {city}.","subject":"home","remember":true}}"#
        );
        lines.push('\n');
    }
    store.import(&mut lines.as_bytes(), &Cancel::new()).unwrap();
    assert_eq!(home(&store), ["My home city is Cork."]);
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
}

#[test]
fn an_export_of_one_scope_holds_nothing_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    fill(&store);
    let mut out = Vec::new();
    let scope = Scope::user("ada").agent("bot");
    let exported = store.export(&scope, &mut out, &Cancel::new()).unwrap();
    assert_eq!((exported.sessions, exported.turns), (1, 1));
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("tomatoes") && !text.contains("Gion") && !text.contains("bob"));
}

#[test]
fn an_export_to_a_file_appears_whole_or_not_at_all() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    fill(&store);
    let path = folder.path().join("log.jsonl");
    store.export_file(None, &path, &Cancel::new()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), exported(&store));
    let cancel = Cancel::new();
    cancel.cancel();
    let error = store.export_file(Some(&trip()), &path, &cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(std::fs::read(&path).unwrap(), exported(&store));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn what_another_process_left_is_removed_and_what_it_still_writes_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    fill(&store);
    let partial = |name: &str, number: u64| {
        folder.path().join(format!("{name}.{}-{number}.partial", u32::MAX))
    };
    let mut locked = Vec::new();
    for number in 0..2 {
        let copy = partial("copy", number);
        std::fs::create_dir(&copy).unwrap();
        for path in [partial("log", number), copy.join("LOCK")] {
            let file = std::fs::File::create(path).unwrap();
            if number == 1 {
                file.lock().unwrap();
                locked.push(file);
            }
        }
    }
    store.export_file(None, &folder.path().join("log"), &Cancel::new()).unwrap();
    store.backup(&folder.path().join("copy"), &Cancel::new()).unwrap();
    for name in ["log", "copy"] {
        assert!(!partial(name, 0).exists() && partial(name, 1).exists(), "{name}");
    }
    // The store, what was written, and what is still being written.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 5);
    drop(locked);
}

#[test]
fn an_import_that_was_interrupted_is_gone_on_with() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let store = open(folders[0].path());
    let texts: Vec<String> = (0..200).map(|number| prose(number, 20)).collect();
    say(&store, &trip(), Role::Document, &texts.iter().map(String::as_str).collect::<Vec<_>>());
    let lines = exported(&store);
    let other = open(folders[1].path());
    let cut = lines.len() * 2 / 3;
    let error = other.import(&mut &lines[..cut], &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let held = other.num_turns(&trip()).unwrap();
    assert!(held > 0 && held < 200, "{held}");
    let imported = other.import(&mut &lines[..], &Cancel::new()).unwrap();
    assert_eq!((imported.skipped, imported.turns), (held, 200 - held));
    assert_eq!(exported(&other), lines);
}

#[test]
fn the_turns_of_lines_before_one_that_is_refused_are_stored() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    say(&store, &trip(), Role::User, &["One.", "Two.", "Three."]);
    let lines = String::from_utf8(exported(&store)).unwrap();
    let skips = lines.lines().last().unwrap().replace("\"turn\":2", "\"turn\":9");
    for refused in ["{}", "no JSON", &skips] {
        let folder = tempfile::tempdir().unwrap();
        let other = open(folder.path());
        let input = format!("{lines}{refused}\n");
        let error = other.import(&mut input.as_bytes(), &Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains("line 5"), "{error}");
        assert_eq!(other.turns(&trip(), 0..9).unwrap(), store.turns(&trip(), 0..9).unwrap());
        assert_eq!(other.import(&mut lines.as_bytes(), &Cancel::new()).unwrap().skipped, 3);
    }
}

#[test]
fn lines_that_are_none_of_an_export_are_refused_by_number() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let refused = |lines: &str| {
        let error = store.import(&mut lines.as_bytes(), &Cancel::new()).unwrap_err();
        (error.kind(), error.to_string())
    };
    let header = r#"{"format":"mka-memory log","version":1}"#;
    let turn = r#"{"user":"ada","session":"trip","turn":1,"role":"User","time_ms":0,"text":"x","remember":true}"#;
    assert_eq!(refused("").0, ErrorKind::InvalidArgument);
    assert_eq!(refused("{}").0, ErrorKind::InvalidArgument);
    assert_eq!(refused(r#"{"format":"mka-memory log","version":9}"#).0, ErrorKind::Incompatible);
    let (kind, text) = refused(&format!("{header}\n\n{turn}\n"));
    assert_eq!(kind, ErrorKind::InvalidArgument);
    assert!(text.contains("line 3") && text.contains("expected turn 0"), "{text}");
    let (_, text) = refused(&format!("{header}\n{{\"user\":3}}\n"));
    assert!(text.contains("line 2"), "{text}");
    say(&store, &trip(), Role::User, &["a", "b"]);
    let (_, text) = refused(&format!("{header}\n{turn}\n"));
    assert!(text.contains("as the store holds it"), "{text}");
    // Latin-1.
    let lines = [header.as_bytes(), b"\n{\"user\":\"Andr\xe9\"}\n"].concat();
    let error = store.import(&mut &lines[..], &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("line 2"), "{error}");
}

#[test]
fn a_backup_of_an_open_store_is_a_store_of_whole_commits() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(&folder.path().join("store"), backend);
        fill(&store);
        let before = contents(&store);
        let copies: Vec<_> =
            (0..4).map(|number| folder.path().join(format!("copy-{number}"))).collect();
        std::thread::scope(|threads| {
            threads.spawn(|| {
                for number in 0..30 {
                    let turns = vec![
                        NewTurn::new(Role::Document, prose(2 * number, 60)),
                        NewTurn::new(Role::Document, prose(2 * number + 1, 60)),
                    ];
                    let busy = Scope::user("zed").session("busy");
                    store.commit(&busy, Commit { turns, ..Commit::default() }).unwrap();
                }
            });
            for copy in &copies {
                store.backup(copy, &Cancel::new()).unwrap();
            }
        });
        for copy in &copies {
            let copy = open_as(copy, backend);
            assert_eq!(contents(&copy), before);
            let checkup = copy.doctor(false, &Cancel::new()).unwrap();
            assert!(checkup.problems.is_empty(), "{:?}", checkup.problems);
            let busy = Scope::user("zed").session("busy");
            assert!(copy.num_turns(&busy).unwrap().is_multiple_of(2));
            say(&copy, &busy, Role::User, &["The copy goes its own way."]);
        }
        let error = store.backup(&copies[0], &Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn a_backup_that_is_cancelled_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    fill(&store);
    let cancel = Cancel::new();
    cancel.cancel();
    let error = store.backup(&folder.path().join("copy"), &cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_backup_to_a_path_that_ends_with_a_slash_is_the_folder_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    fill(&store);
    let slash = format!("{}/", folder.path().join("copy").display());
    store.backup(Path::new(&slash), &Cancel::new()).unwrap();
    let error = store.backup(Path::new(&slash), &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(contents(&open(&folder.path().join("copy"))), contents(&store));
    let nowhere = folder.path().join("nowhere/..");
    let error = store.backup(&nowhere, &Cancel::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn a_backup_of_an_encrypted_store_is_encrypted() {
    let folder = tempfile::tempdir().unwrap();
    let store = keyed(&folder.path().join("store"), 7).unwrap();
    fill(&store);
    let copy = folder.path().join("copy");
    store.backup(&copy, &Cancel::new()).unwrap();
    assert!(crate::support::files_with(&copy, "Gion").is_empty() && !files(&copy).is_empty());
    assert_eq!(open_plain(&copy).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(contents(&keyed(&copy, 7).unwrap()), contents(&store));
}

fn open_plain(path: &Path) -> mka_memory::Result<Store> {
    Store::open(path, Arc::new(HashedEmbedder::new()), StoreOptions::default())
}

#[test]
fn nothing_is_written_into_what_a_process_of_the_same_number_left() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    say(&store, &trip(), Role::User, &["The hotel is the Sakura Inn."]);
    let copy = folder.path().join("copy");
    let left: Vec<_> = (0..50)
        .map(|number| {
            let left = folder.path().join(format!("copy.{}-{number}.partial", std::process::id()));
            std::fs::create_dir_all(left.join("segments")).unwrap();
            std::fs::write(left.join("segments/000009.seg"), "what was forgotten").unwrap();
            left
        })
        .collect();
    store.backup(&copy, &Cancel::new()).unwrap();
    assert!(copy.join("segments").exists() && !copy.join("segments/000009.seg").exists());
    // Those that nobody's lock says to be at work at are gone; without a lock of theirs they stay, and are not written to.
    for left in left.iter().filter(|left| left.exists()) {
        assert_eq!(std::fs::read_dir(left.join("segments")).unwrap().count(), 1);
    }
}

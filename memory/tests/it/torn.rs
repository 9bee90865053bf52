//! Crashes in the middle of every write: a scripted run dies at its n-th write, torn, with and without a power loss.
//! Each step of it leaves an image of the index, so that those are written in the middle of it, too.
//! The disk that lies is `disk`; the test binary runs itself again as the process that dies.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use mka_memory::{Backend, Cancel, Commit, Forget, NewSnapshot, NewTurn, Role, Scope, Store};

use crate::disk::{self, Crash};
use crate::images::imaged;
use crate::support::{BACKENDS, files_with, prose, say, trip};

const FOLDER: &str = "MKA_TORN_FOLDER";
const SECRET: &str = "walrus-4711";

/// What the scripted run does, one acknowledged step after the other.
const STEPS: [fn(&Store); 11] = [
    |store| page_turn(store, 0),
    |store| page_turn(store, 1),
    |store| {
        say(
            store,
            &trip(),
            Role::User,
            &[&format!("The code is {SECRET}."), "The code is secret."],
        );
    },
    |store| {
        let turns = vec![NewTurn::new(Role::Assistant, prose(7, 40))];
        store.commit(&trip(), Commit { turns, retract: Some(3..4), ..Commit::default() }).unwrap();
    },
    |store| page_turn(store, 2),
    |store| {
        store.fork(&trip(), "other").unwrap();
    },
    |store| {
        let receipt = store.forget(&trip(), &Forget::matching(SECRET)).unwrap();
        store.verify(&receipt).unwrap();
    },
    |store| page_turn(store, 3),
    |store| {
        store.fork(&trip(), "third").unwrap();
    },
    |store| store.compact_all().unwrap(),
    |store| page_turn(store, 4),
];

fn page_turn(store: &Store, number: u64) {
    let snapshot = NewSnapshot {
        fingerprint: [7; 16],
        position: number,
        state: number.to_le_bytes().to_vec(),
        // The whole window: an erasure before may have taken the pages that were there.
        pages: (number.saturating_sub(1)..=number)
            .map(|page| (page, vec![page as u8; 1500].into()))
            .collect(),
        window: (number.saturating_sub(1)..=number).collect(),
        first_page: 0,
    };
    let turns = vec![NewTurn::new(Role::Document, prose(number, 60))];
    store.commit(&trip(), Commit { turns, snapshot: Some(snapshot), retract: None }).unwrap();
}

/// Everything that the store holds, as text.
fn contents(store: &Store) -> String {
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    let mut all = String::new();
    for session in store.sessions(&Scope::user("ada")).unwrap() {
        let scope = session.scope;
        let turns = store.turns(&scope, 0..99).unwrap();
        let chunks = store.chunks(&scope, 0..99, None).unwrap();
        // A session that lost a turn has no snapshot until the next one.
        let snapshot = store.snapshot(&scope, [7; 16]).unwrap();
        all += &format!("{scope}\n{turns:?}\n{chunks:?}\n{snapshot:?}\n");
    }
    // Pages that sessions share are counted once, whichever moment the process died at.
    assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
    all
}

fn backend_name(backend: Backend) -> &'static str {
    if backend == Backend::Redb { "redb" } else { "sled" }
}

/// Runs the script in `folder` until it dies; returns how many steps were acknowledged, and the writes if it did not die.
fn run(folder: &Path, backend: Backend, crash: &Crash) -> (usize, Option<u64>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "torn::the_scripted_run", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .env("MKA_TORN_BACKEND", backend_name(backend))
        .env("MKA_TORN_CRASH", crash.encode())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (mut acknowledged, mut num_writes) = (0, None);
    for line in BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap) {
        acknowledged += usize::from(line == "acknowledged");
        num_writes = num_writes.or(line.strip_prefix("writes ").map(|n| n.parse().unwrap()));
    }
    child.wait().unwrap();
    (acknowledged, num_writes)
}

/// The child's side; without the variables there is nothing to do.
#[test]
fn the_scripted_run() {
    let Some(folder) = std::env::var_os(FOLDER) else { return };
    let folder = Path::new(&folder);
    let is_redb = std::env::var("MKA_TORN_BACKEND").unwrap() == "redb";
    disk::arm(folder, Crash::decode(&std::env::var("MKA_TORN_CRASH").unwrap()));
    let store = imaged(folder, if is_redb { Backend::Redb } else { Backend::Sled });
    for step in STEPS {
        step(&store);
        println!("\nacknowledged");
        // The image that is due is written before the next step: the writes come in one order.
        store.finish_indexing();
    }
    drop(store);
    println!("\nwrites {}", disk::num_writes());
    println!("\nended");
}

fn torn(backend: Backend, power_loss: bool) {
    // What the store holds after each step, of a run that does not die.
    let folder = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    let store = imaged(folder.path(), backend);
    expected.push(contents(&store));
    for step in STEPS {
        step(&store);
        expected.push(contents(&store));
    }
    drop(store);

    let whole = tempfile::tempdir().unwrap();
    let never = Crash { at_write: u64::MAX, seed: 0, power_loss };
    let (acknowledged, num_writes) = run(whole.path(), backend, &never);
    assert_eq!(acknowledged, STEPS.len());
    let num_writes = num_writes.unwrap();

    let all = std::env::var_os("MKA_TORN_ALL").is_some();
    // Few by default: every one takes a process.
    let stride = if all { 1 } else { (num_writes / 9).max(1) as usize };
    let (mut kept, mut dropped, mut tried) = (0, 0, 0);
    for at_write in (0..num_writes).step_by(stride) {
        let folder = tempfile::tempdir().unwrap();
        let crash = Crash { at_write, seed: at_write * 31 + 7, power_loss };
        let (acknowledged, ended) = run(folder.path(), backend, &crash);
        assert_eq!(ended, None, "write {at_write} of {num_writes} did not come");
        let store = imaged(folder.path(), backend);
        store.finish_indexing();
        let found = contents(&store);
        let at = expected[acknowledged..].iter().take(2).position(|known| *known == found);
        let Some(at) = at else {
            panic!(
                "{backend:?}, write {at_write} of {num_writes}: after {acknowledged} acknowledged steps the store holds\n{found}\nexpected\n{}",
                expected[acknowledged]
            );
        };
        kept += usize::from(at == 1);
        dropped += usize::from(at == 0);
        tried += 1;
        // After the step that erases it, or once an opening completed that step, it is in no file.
        if !found.contains(SECRET) && acknowledged + at >= 7 {
            assert_eq!(files_with(folder.path(), SECRET), Vec::<std::path::PathBuf>::new());
        }
        let before = store.num_turns(&trip()).unwrap();
        say(&store, &trip(), Role::User, &["Life goes on."]);
        drop(store);
        let store = imaged(folder.path(), backend);
        assert_eq!(store.turns(&trip(), before..before + 1).unwrap()[0].text, "Life goes on.");
        assert_eq!(store.stats().damaged, Vec::<String>::new());
    }
    println!(
        "{backend:?}, power loss {power_loss}: died at {tried} of {num_writes} writes; the step that was interrupted was there whole {kept} times, and not at all {dropped} times"
    );
}

#[test]
fn dying_in_any_write_loses_nothing_acknowledged_and_serves_nothing_torn() {
    BACKENDS.into_iter().for_each(|backend| torn(backend, false));
}

#[test]
fn losing_power_in_any_write_loses_nothing_acknowledged_and_serves_nothing_torn() {
    BACKENDS.into_iter().for_each(|backend| torn(backend, true));
}

//! Crashes and full disks: what was acknowledged is there, nothing is there by half.
//! The test binary runs itself again as the process that dies.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mka_memory::{Backend, Commit, ErrorKind, Forget, NewSnapshot, NewTurn, Role, Scope, Store};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::support::{BACKENDS, files_with, open_as, prose, trip};

const CHILD: &str = "MKA_CRASH_CHILD";
const IS_REDB: &str = "MKA_CRASH_REDB";
const TURNS_PER_COMMIT: u64 = 3;
/// Kills of one store before another is begun: each kill opens the store twice, and an opening reads all of it.
const CYCLES_PER_STORE: u64 = 40;

/// Runs `test` of this binary as a child that works in `folder`, with a database of this kind.
fn child(test: &str, folder: &Path, backend: Backend) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, folder)
        .env(IS_REDB, (backend == Backend::Redb).to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The folder to work in, if this process is the child.
fn child_folder() -> Option<std::path::PathBuf> {
    std::env::var_os(CHILD).map(Into::into)
}

/// The child's store.
fn open_child(folder: &Path) -> Store {
    let is_redb = std::env::var(IS_REDB).unwrap() == "true";
    open_as(folder, if is_redb { Backend::Redb } else { Backend::Sled })
}

/// The `number`th commit: its turns and pages can be told from the number.
fn numbered(number: u64) -> Commit {
    let turn =
        |part: u64| NewTurn::new(Role::Document, prose(number * TURNS_PER_COMMIT + part, 150));
    let snapshot = NewSnapshot {
        fingerprint: [7; 16],
        position: number,
        state: number.to_le_bytes().to_vec(),
        pages: vec![(number, vec![number as u8; 3000].into())],
        window: (number.saturating_sub(2)..=number).collect(),
        first_page: 0,
    };
    Commit {
        turns: (0..TURNS_PER_COMMIT).map(turn).collect(),
        snapshot: Some(snapshot),
        retract: None,
    }
}

fn next_number(store: &Store) -> u64 {
    store.num_turns(&trip()).unwrap() / TURNS_PER_COMMIT
}

/// Checks that the store holds whole commits only, each exactly once; returns how many.
fn check(store: &Store) -> u64 {
    let num_turns = store.num_turns(&trip()).unwrap();
    assert_eq!(num_turns % TURNS_PER_COMMIT, 0, "half a commit");
    assert_eq!(store.stats().damaged, Vec::<String>::new());
    for turn in store.turns(&trip(), 0..num_turns).unwrap() {
        assert_eq!(turn.text, prose(turn.id, 150));
    }
    let chunks = store.chunks(&Scope::user("ada"), 0..usize::MAX, None).unwrap();
    assert!(chunks.iter().all(|chunk| chunk.count == 1), "a chunk is there twice");
    let mut turns: Vec<u64> = chunks.iter().map(|chunk| chunk.first.turn).collect();
    turns.dedup();
    assert_eq!(turns.len() as u64, num_turns, "a turn without chunks");
    let number = num_turns / TURNS_PER_COMMIT;
    if let Some(last) = number.checked_sub(1) {
        let snapshot = store.snapshot(&trip(), [7; 16]).unwrap().unwrap();
        assert_eq!((snapshot.position, snapshot.state), (last, last.to_le_bytes().to_vec()));
        let window: Vec<(u64, Vec<u8>)> =
            (last.saturating_sub(2)..=last).map(|page| (page, vec![page as u8; 3000])).collect();
        assert_eq!(snapshot.pages, window);
    }
    number
}

#[test]
fn killed_at_any_moment_every_acknowledged_turn_is_there() {
    if let Some(folder) = child_folder() {
        let store = open_child(&folder);
        println!("\nopened");
        for number in next_number(&store).. {
            store.commit(&trip(), numbered(number)).unwrap();
            println!("\nacknowledged {number}");
        }
    }
    BACKENDS.into_iter().for_each(kill_writers);
}

fn kill_writers(backend: Backend) {
    let cycles = std::env::var("MKA_KILL_CYCLES").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut done, mut commits) = (0, 0);
    while done < cycles {
        let here = (cycles - done).min(CYCLES_PER_STORE);
        commits += kill_writers_of_one_store(backend, here, &mut rng);
        done += here;
        println!("{backend:?}: {done} kills, {commits} commits of {TURNS_PER_COMMIT} turns");
    }
    assert!(commits >= cycles * 2 / 5);
}

/// Kills so many writers of a new store one after another; returns how many commits it holds in the end.
fn kill_writers_of_one_store(backend: Backend, cycles: u64, rng: &mut ChaCha8Rng) -> u64 {
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    let number_of = |line: &str| line.strip_prefix("acknowledged ")?.parse::<u64>().ok();
    for cycle in 0..cycles {
        let mut child = child(
            "crash::killed_at_any_moment_every_acknowledged_turn_is_there",
            folder.path(),
            backend,
        );
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Some children die while opening, most while committing; some not before they have committed, so that the
        // store grows on a machine that is busy, too.
        if cycle % 5 != 4 {
            lines.by_ref().find(|line| line.as_ref().unwrap() == "opened").unwrap().unwrap();
        }
        if cycle % 5 < 2 {
            let first = lines.by_ref().find_map(|line| number_of(&line.unwrap()));
            acknowledged = first.unwrap() + 1;
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..60_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        for line in lines.map(Result::unwrap) {
            acknowledged = number_of(&line).map_or(acknowledged, |number| number + 1);
        }
        let stored = check(&open_as(folder.path(), backend));
        assert!(
            stored >= acknowledged,
            "cycle {cycle}: {acknowledged} acknowledged, {stored} stored"
        );
        acknowledged = stored;
    }
    acknowledged
}

#[test]
fn killed_while_forgetting_the_bytes_are_gone_after_the_next_opening_or_all_is_there() {
    const SECRET: &str = "walrus-4711";
    if let Some(folder) = child_folder() {
        let store = open_child(&folder);
        println!("\nopened");
        store.forget(&trip(), &Forget::matching(SECRET)).unwrap();
        println!("\nforgotten");
    }
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let mut outcomes = (0, 0);
    for cycle in 0..8 {
        let backend = BACKENDS[cycle % 2];
        let folder = tempfile::tempdir().unwrap();
        {
            let store = open_as(folder.path(), backend);
            for number in 0..6 {
                store.commit(&trip(), numbered(number)).unwrap();
            }
            let turns = vec![NewTurn::new(Role::User, format!("The code is {SECRET}."))];
            store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        }
        let mut child = child(
            "crash::killed_while_forgetting_the_bytes_are_gone_after_the_next_opening_or_all_is_there",
            folder.path(),
            backend,
        );
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.by_ref().find(|line| line.as_ref().unwrap() == "opened").unwrap().unwrap();
        std::thread::sleep(Duration::from_micros(rng.random_range(0..12_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let acknowledged = lines.map(Result::unwrap).any(|line| line == "forgotten");
        let store = open_as(folder.path(), backend);
        let turns = store.turns(&trip(), 0..99).unwrap();
        assert_eq!(turns.len(), 19);
        if turns[18].forgotten {
            outcomes.0 += 1;
            assert!(files_with(folder.path(), SECRET).is_empty());
        } else {
            outcomes.1 += 1;
            assert!(!acknowledged && turns[18].text.contains(SECRET));
        }
        assert!(turns[..18].iter().all(|turn| turn.text == prose(turn.id, 150)));
    }
    println!("{} forgotten, {} untouched", outcomes.0, outcomes.1);
}

#[test]
fn a_full_disk_is_a_storage_error_and_loses_nothing() {
    if let Some(folder) = child_folder() {
        let limit: u64 = std::fs::read_to_string(folder.join("limit")).unwrap().parse().unwrap();
        let store = open_child(&folder.join("store"));
        let rlimit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
        // SAFETY: `rlimit` is a valid struct for the call's duration; ignoring a signal installs no handler.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &rlimit), 0);
        }
        for number in next_number(&store).. {
            match store.commit(&trip(), numbered(number)) {
                Ok(_) => println!("\nacknowledged {number}"),
                Err(error) => {
                    println!("\nrefused {:?} {error}", error.kind());
                    assert_eq!(error.kind(), ErrorKind::Storage);
                    // What is stored can still be read, and a further write does no harm.
                    assert!(store.turns(&trip(), 0..number * TURNS_PER_COMMIT).is_ok());
                    let _ = store.commit(&trip(), numbered(number));
                    break;
                }
            }
        }
        println!("\nended");
        std::process::exit(0);
    }
    // Below sled's file, below the segment, and between.
    let sled = [300_000u64, 540_000, 700_000, 1_200_000].map(|limit| (limit, Backend::Sled));
    let redb = [1_060_000, 1_700_000].map(|limit| (limit, Backend::Redb));
    for (limit, backend) in sled.into_iter().chain(redb) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("limit"), limit.to_string()).unwrap();
        drop(open_as(&folder.path().join("store"), backend));
        let test = "crash::a_full_disk_is_a_storage_error_and_loses_nothing";
        let mut child = child(test, folder.path(), backend);
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            lines.map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let (mut acknowledged, mut refused, mut ended) = (0, false, false);
        while let Ok(line) =
            receiver.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            if let Some(number) = line.strip_prefix("acknowledged ") {
                acknowledged = number.parse::<u64>().unwrap() + 1;
            }
            refused |= line.starts_with("refused Storage");
            ended |= line == "ended";
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(refused && ended, "limit {limit}: refused {refused}, ended {ended}");
        let store = open_as(&folder.path().join("store"), backend);
        let stored = check(&store);
        assert!(stored == acknowledged || stored == acknowledged + 1, "{stored} {acknowledged}");
        store.commit(&trip(), numbered(stored)).unwrap();
        drop(store);
        assert_eq!(check(&open_as(&folder.path().join("store"), backend)), stored + 1);
    }
}

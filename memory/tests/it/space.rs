//! Space: what was overwritten and erased is given back, in the segments and in the database.

use mka_memory::{Cancel, Commit, Forget, NewSnapshot, NewTurn, Recall, Role, Scope};

use crate::support::{BACKENDS, open_as, prose, trip};

fn commits() -> u64 {
    std::env::var("MKA_SPACE_COMMITS").ok().and_then(|n| n.parse().ok()).unwrap_or(60)
}

/// Pages are overwritten by every commit, then half of the sessions are erased.
#[test]
fn after_overwriting_and_deleting_half_the_disk_holds_little_more_than_what_is_alive() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), backend);
        let session = |number: u64| Scope::user("ada").session(format!("session-{number}"));
        let mut number = 0;
        for round in 0..3 {
            for owner in 0..10 {
                for _ in 0..commits() / 10 {
                    number += 1;
                    let snapshot = NewSnapshot {
                        fingerprint: [1; 16],
                        position: number,
                        state: vec![round; 1000],
                        pages: (0..4)
                            .map(|page| (page, prose(number * 4 + page, 2_000).into_bytes().into()))
                            .collect(),
                        window: (0..4).collect(),
                        first_page: 0,
                    };
                    let turns = vec![NewTurn::new(Role::Document, prose(number, 300))];
                    let commit = Commit { turns, snapshot: Some(snapshot), retract: None };
                    store.commit(&session(owner), commit).unwrap();
                }
            }
        }
        let overwritten = store.disk_usage().unwrap();
        for owner in 0..5 {
            store.forget(&session(owner), &Forget::session()).unwrap();
        }
        let erased = store.disk_usage().unwrap();
        store.compact_all().unwrap();
        let compacted = store.disk_usage().unwrap();
        let ratio = |usage: mka_memory::DiskUsage| {
            (usage.segment_bytes + usage.database_bytes) as f64 / usage.live_bytes as f64
        };
        println!(
            "{backend:?}, {number} commits: {:.2} x live after overwriting, {:.2} after erasing half, {:.2} compacted ({compacted:?})",
            ratio(overwritten),
            ratio(erased),
            ratio(compacted)
        );
        assert!(compacted.segment_bytes as f64 <= 1.01 * compacted.live_bytes as f64);
        // sled's smallest database takes 1 MB, whatever is in it.
        let spare = 1_600_000.0 / compacted.live_bytes as f64;
        assert!(ratio(erased) <= 1.5 + spare, "{erased:?}");
        assert!(ratio(compacted) <= 1.5 + spare, "{compacted:?}");
        assert!(store.doctor(false, &Cancel::new()).unwrap().problems.is_empty());
        let turns = store.num_turns(&session(7)).unwrap();
        drop(store);
        let store = open_as(folder.path(), backend);
        assert_eq!(store.num_turns(&session(7)).unwrap(), turns);
        assert_eq!(store.num_turns(&session(2)).unwrap(), 0);
        assert!(
            !store.recall(&Scope::user("ada"), "river", &Recall::default()).unwrap().is_empty()
        );
    }
}

/// sled gives back no space by itself: a database that grew to three times what it holds is written anew.
#[test]
fn a_database_that_grew_is_compacted_while_the_store_is_written() {
    for backend in BACKENDS {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), backend);
        let turns: Vec<NewTurn> = (0..10_000)
            .map(|number| {
                let mut turn = NewTurn::new(Role::System, format!("Line {number}."));
                turn.remember = false;
                turn
            })
            .collect();
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        let full = store.disk_usage().unwrap();
        store.forget(&trip(), &Forget::session()).unwrap();
        let after = store.disk_usage().unwrap();
        println!(
            "{backend:?}: database {} bytes with 10,000 turns, {} without",
            full.database_bytes, after.database_bytes
        );
        assert!(after.database_bytes <= 4 << 20, "{after:?}");
        assert!(after.segment_bytes < 10_000, "{after:?}");
        let done = store.commit(
            &trip(),
            Commit { turns: vec![NewTurn::new(Role::User, "Again.")], ..Commit::default() },
        );
        done.unwrap();
        drop(store);
        let store = open_as(folder.path(), backend);
        assert_eq!(store.turns(&trip(), 0..9).unwrap()[0].text, "Again.");
    }
}

/// A process that died between the two renames of a compaction, or before the first one.
#[test]
fn a_compaction_that_was_interrupted_is_completed_or_undone() {
    for moved in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let store = open_as(folder.path(), BACKENDS[0]);
        store
            .commit(
                &trip(),
                Commit { turns: vec![NewTurn::new(Role::User, "Hello.")], ..Commit::default() },
            )
            .unwrap();
        drop(store);
        let (db, new) = (folder.path().join("db"), folder.path().join("db.new"));
        if moved {
            std::fs::rename(&db, &new).unwrap();
            std::fs::create_dir(folder.path().join("db.old")).unwrap();
        } else {
            std::fs::create_dir(&new).unwrap();
            std::fs::write(new.join("db"), b"half of a database").unwrap();
        }
        let store = open_as(folder.path(), BACKENDS[0]);
        assert_eq!(store.turns(&trip(), 0..9).unwrap()[0].text, "Hello.");
        assert!(!new.exists() && !folder.path().join("db.old").exists());
    }
}

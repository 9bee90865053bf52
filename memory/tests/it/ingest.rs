//! How fast text is taken in. Printed, with a generous bound; set `MKA_INGEST_TOKENS` for a longer run.

use std::time::Instant;

use mka_memory::{Commit, Embedder, HashedEmbedder, NewTurn, Recall, Role};

use crate::support::{open, prose, trip};

#[test]
fn documents_are_taken_in_fast() {
    let tokens: u64 =
        std::env::var("MKA_INGEST_TOKENS").ok().and_then(|n| n.parse().ok()).unwrap_or(60_000);
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (mut bytes, mut number) = (0, 0);
    let texts: Vec<Vec<NewTurn>> = std::iter::from_fn(|| {
        if bytes >= tokens * 9 / 2 {
            return None;
        }
        let turns = (0..64).map(|_| {
            number += 1;
            NewTurn::new(Role::Document, prose(number, 600))
        });
        let turns: Vec<NewTurn> = turns.collect();
        bytes += turns.iter().map(|turn| turn.text.len() as u64).sum::<u64>();
        Some(turns)
    })
    .collect();
    let start = Instant::now();
    for turns in texts {
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
    }
    let seconds = start.elapsed().as_secs_f64();
    let stats = store.stats();
    let start = Instant::now();
    let hits = store.recall(&trip(), "Note 17 begins", &Recall::default()).unwrap();
    let recall_ms = start.elapsed().as_secs_f64() * 1e3;
    drop(store);
    let start = Instant::now();
    let store = open(folder.path());
    println!(
        "{bytes} bytes in {seconds:.2} s ({:.0} tokens/s at 4.5 bytes), {} chunks, {} vectors; recall {recall_ms:.1} ms, open {:.2} s, {} MB resident",
        bytes as f64 / 4.5 / seconds,
        stats.chunks,
        stats.vectors,
        start.elapsed().as_secs_f64(),
        resident_mb()
    );
    assert_eq!(store.stats().chunks, stats.chunks);
    assert!(hits.iter().any(|hit| hit.text.contains("Note 17 ")));
    assert!(seconds < 60.0, "{seconds} s");
}

#[test]
fn the_built_in_embedder_is_fast() {
    let texts: Vec<String> = (0..500).map(|number| prose(number, 93)).collect();
    let sentences: Vec<&str> = texts.iter().flat_map(|text| text.split_inclusive('.')).collect();
    let start = Instant::now();
    HashedEmbedder::new().embed(&sentences).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{:.0} chunks of 96 words a second", texts.len() as f64 / seconds);
    assert!(seconds < 20.0);
}

#[test]
fn a_commit_of_one_turn_is_quick_and_the_database_stays_small() {
    let commits: u64 =
        std::env::var("MKA_COMMITS").ok().and_then(|n| n.parse().ok()).unwrap_or(100);
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut millis: Vec<f64> = Vec::new();
    for number in 0..commits {
        let turns = vec![NewTurn::new(Role::User, prose(number, 30))];
        let start = Instant::now();
        store.commit(&trip(), Commit { turns, ..Commit::default() }).unwrap();
        millis.push(start.elapsed().as_secs_f64() * 1e3);
    }
    millis.sort_by(f64::total_cmp);
    let bytes = |folder: &str, root: &std::path::Path| -> u64 {
        let files = crate::support::files(&root.join(folder));
        files.iter().map(|file| file.metadata().unwrap().len()).sum()
    };
    let (database, segments) = (bytes("db", folder.path()), bytes("segments", folder.path()));
    println!(
        "{commits} commits: median {:.1} ms, worst {:.1} ms; database {database} bytes, segments {segments} bytes",
        millis[millis.len() / 2],
        millis[millis.len() - 1]
    );
    assert!(database < 4_000_000 + commits * 2_000);
}

fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

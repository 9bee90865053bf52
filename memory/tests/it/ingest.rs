//! How fast text is taken in. Printed, with a generous bound; set `MKA_INGEST_TOKENS` for a longer run.

use std::time::Instant;

use mka_memory::{Commit, Embedder, ErrorKind, HashedEmbedder, NewTurn, Recall, Role, Store};

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

#[test]
fn ready_vectors_are_taken_as_they_are_one_a_turn() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let turn = |text: &str| NewTurn::new(Role::Document, text);
    let texts =
        ["Herons nest by the lake.", "  The bridge is closed.\n", "Herons nest by the lake."];
    let mut vectors = store.embed(&texts.map(str::trim)).unwrap();
    // Any length will do, and the text's own vector need not be it: the second gets that of the first.
    let dim = store.dim();
    vectors.iter_mut().for_each(|number| *number *= 3.0);
    vectors.copy_within(..dim, dim);
    let mut turns: Vec<NewTurn> = texts.iter().map(|text| turn(text)).collect();
    let done = store.commit_embedded(&trip(), turns.clone(), &vectors).unwrap();
    assert_eq!((done.chunks_added, done.chunks_deduplicated, done.turns), (2, 1, vec![0, 1, 2]));
    turns[0].remember = false;
    turns[1] = NewTurn::new(Role::Recalled, "");
    store.commit_embedded(&trip(), turns[..2].to_vec(), &vectors[..2 * dim]).unwrap();
    let check = |store: &Store| {
        let hits = store.recall(&trip(), "Herons nest by the lake.", &Recall::default()).unwrap();
        let found: Vec<(&str, f32)> = hits.iter().map(|it| (&*it.text, it.why.cosine)).collect();
        assert_eq!((found.len(), found[0].0, found[1].0), (2, texts[0], texts[1].trim()));
        assert!(found.iter().all(|(_, cosine)| (cosine - 1.0).abs() < 1e-5), "{found:?}");
        assert_eq!((hits[0].count, hits[1].source.bytes.clone()), (2, 2..23));
        assert_eq!((store.stats().turns, store.stats().vectors), (5, 2));
    };
    check(&store);
    drop(store);
    let store = open(folder.path());
    check(&store);
    let refused = |turns: &[NewTurn], vectors: &[f32]| {
        let error = store.commit_embedded(&trip(), turns.to_vec(), vectors).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    };
    refused(&turns[..2], &vectors[..dim]);
    refused(&[turn("x")], &vec![f32::NAN; dim]);
    refused(&[turn(" ")], &vectors[..dim]);
    assert!(store.commit_embedded(&trip(), Vec::new(), &[]).unwrap().turns.is_empty());
    assert_eq!(store.stats().turns, 5);
}

//! Measures a whole store: taking text in with the built-in embedder, its size, opening it again, and recall from it.
//! Knows the crate's public API only. Tables and commands are in docs/index.md.
//!
//! ```sh
//! cargo run --release -p mka-memory --example bench_store -- --prose ../shared/data/prose --vectors 1000000 --folder /tmp/store
//! ```
//!
//! Sentences of the books come once as they are; after that one word in four is another word of the books, so that no
//! chunk is one that is stored.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use flate2::read::GzDecoder;
use mka_memory::{
    Commit, Filter, HashedEmbedder, NewTurn, Recall, Role, Scope, Store, StoreOptions,
};
use unicode_segmentation::UnicodeSegmentation;

/// Sentences of one turn, and turns of one commit.
const TURN_SENTENCES: usize = 40;
const COMMIT_TURNS: usize = 8;
/// Turns of one commit where vectors are ready.
const READY_TURNS: usize = 1_000;
/// Questions, each asked twice.
const NUM_QUERIES: usize = 100;

fn main() {
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("expected a value after {name}"));
        given.insert(name, value);
    }
    let mut take = |name: &str, default: &str| given.remove(name).unwrap_or(default.to_owned());
    let number =
        |text: String| text.parse().unwrap_or_else(|_| panic!("expected a number: {text}"));
    let prose = PathBuf::from(take("--prose", "../shared/data/prose"));
    let num_vectors: usize = number(take("--vectors", "100000"));
    let folder = PathBuf::from(take("--folder", ""));
    let graph_vectors: usize = number(take("--graph-from", &usize::MAX.to_string()));
    let image_vectors: usize = number(take("--image-from", "4096"));
    let ready = take("--ready", "");
    let labels = take("--texts", "sentences") == "labels";
    assert!(given.is_empty(), "unknown arguments: {given:?}");
    assert!(
        !folder.as_os_str().is_empty(),
        "expected --folder, for a store of about 2 KB a vector"
    );

    let sentences = sentences(&prose);
    println!("{} sentences of the books", sentences.len());
    if !ready.is_empty() {
        let mut number = 0;
        let mut label = move || {
            number += 1;
            format!("item {number}")
        };
        let mut sentence = texts(&sentences);
        let text: &mut dyn FnMut() -> String = if labels { &mut label } else { &mut sentence };
        return insert_ready(&folder, text, Path::new(&ready), num_vectors);
    }
    if !folder.exists() {
        fill(&folder, &sentences, num_vectors);
    }
    let options =
        StoreOptions { graph_vectors, image_vectors, scan_threads: 1, ..StoreOptions::default() };
    let open = || {
        let embedder = Arc::new(HashedEmbedder::new());
        Store::open(&folder, embedder, options.clone()).expect("a store")
    };
    let scope = Scope::user("bench");
    let query = "how far is the ship from the harbour in the evening";
    let mut store = open();
    for round in ["first", "again"] {
        drop(store);
        let (start, cpu) = (Instant::now(), process_ns());
        store = open();
        let (wall, opened) = (start.elapsed(), process_ns() - cpu);
        let hits = store.recall(&scope, query, &Recall::default()).expect("a recall");
        println!(
            "open, {round}: {:.2} s wall, {:.2} s of processor; first recall after {:.2} s, {:.2} s of processor, {} hits, {} vectors unread",
            wall.as_secs_f64(),
            opened as f64 / 1e9,
            start.elapsed().as_secs_f64(),
            (process_ns() - cpu) as f64 / 1e9,
            hits.len(),
            store.stats().vectors_unread
        );
    }
    if graph_vectors < usize::MAX {
        let start = Instant::now();
        store.finish_indexing();
        println!("graphs: {:.0} s wall", start.elapsed().as_secs_f64());
    }
    let stats = store.stats();
    println!(
        "{} turns, {} chunks, {} vectors, {} of them in graphs, {} terms",
        stats.turns, stats.chunks, stats.vectors, stats.vectors_in_graphs, stats.terms
    );
    println!("{:?}", store.disk_usage().expect("sizes"));
    let queries: Vec<String> = (0..NUM_QUERIES)
        .map(|number| {
            let sentence = &sentences[number * sentences.len() / NUM_QUERIES];
            sentence.split_whitespace().skip(2).take(10).collect::<Vec<_>>().join(" ")
        })
        .collect();
    println!("| filter keeps | recall, µs of one thread, median |\n|---|---|");
    for (name, filter) in [
        ("all", None),
        ("10 %", Some(Filter::eq("tenth", 3))),
        ("1 %", Some(Filter::eq("hundredth", 33))),
        ("0.1 %", Some(Filter::eq("thousandth", 333))),
    ] {
        let options = Recall { filter, follow_up: false, ..Recall::default() };
        let mut micros = Vec::new();
        for round in 0..2 {
            for query in &queries {
                let start = thread_ns();
                store.recall(&scope, query, &options).expect("a recall");
                if round > 0 {
                    micros.push((thread_ns() - start) as f64 / 1e3);
                }
            }
        }
        micros.sort_by(f64::total_cmp);
        println!("| {name} | {:.0} |", micros[micros.len() / 2]);
    }
}

/// Fills a new store, and says how fast that was.
fn fill(folder: &Path, sentences: &[String], num_vectors: usize) {
    let options = StoreOptions { graph_vectors: usize::MAX, ..StoreOptions::default() };
    let store = Store::open(folder, Arc::new(HashedEmbedder::new()), options).expect("a store");
    let mut text = texts(sentences);
    let mut turn = |number: usize| {
        let text = (0..TURN_SENTENCES).map(|_| text()).collect::<String>();
        let mut turn = NewTurn::new(Role::Document, text);
        for (key, one_of) in [("tenth", 10), ("hundredth", 100), ("thousandth", 1_000)] {
            turn.metadata.insert(key.into(), ((number % one_of) as i32).into());
        }
        turn
    };
    // The processor time of all threads, less what making texts and counting takes.
    let (start, cpu, mut making) = (Instant::now(), process_ns(), 0);
    let (mut chunks, mut num_turns, mut is_full) = (0, 0usize, false);
    while !is_full {
        let before = thread_ns();
        let turns: Vec<NewTurn> = (num_turns..num_turns + COMMIT_TURNS).map(&mut turn).collect();
        num_turns += turns.len();
        let scope = Scope::user("bench").session(format!("session {}", num_turns / 800));
        making += thread_ns() - before;
        let done = store.commit(&scope, Commit { turns, ..Commit::default() }).expect("a commit");
        chunks += done.chunks_added;
        let before = thread_ns();
        // Counting takes a while in a large store.
        is_full = num_turns.is_multiple_of(400) && store.stats().vectors >= num_vectors;
        making += thread_ns() - before;
    }
    let cpu = process_ns() - cpu - making;
    println!(
        "filled: {chunks} chunks in {:.0} s wall, {:.1} s of processor in commits: {:.0} chunks/s of one core",
        start.elapsed().as_secs_f64(),
        cpu as f64 / 1e9,
        chunks as f64 / (cpu as f64 / 1e9)
    );
}

/// Puts vectors of a file into a new store, each with a text, and says how fast that was.
fn insert_ready(folder: &Path, text: &mut dyn FnMut() -> String, rows: &Path, num_vectors: usize) {
    let options = StoreOptions { graph_vectors: usize::MAX, ..StoreOptions::default() };
    let store = Store::open(folder, Arc::new(HashedEmbedder::new()), options).expect("a store");
    let dim = store.dim();
    let mut file = std::fs::File::open(rows).expect("a file of vectors");
    // The processor time of all threads, less what making texts and reading vectors takes.
    let (start, cpu, mut making, mut num) = (Instant::now(), process_ns(), 0, 0);
    while num < num_vectors {
        let before = thread_ns();
        let mut bytes = vec![0; READY_TURNS.min(num_vectors - num) * dim * 4];
        file.read_exact(&mut bytes).expect("as many vectors");
        let number = |four: &[u8]| f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let vectors: Vec<f32> = bytes.chunks_exact(4).map(number).collect();
        let turns: Vec<NewTurn> =
            (0..vectors.len() / dim).map(|_| NewTurn::new(Role::Document, text())).collect();
        num += turns.len();
        let scope = Scope::user("bench").session(format!("session {}", num / 50_000));
        making += thread_ns() - before;
        store.commit_embedded(&scope, turns, &vectors).expect("a commit");
    }
    store.finish_indexing();
    let cpu = process_ns() - cpu - making;
    let stats = store.stats();
    println!(
        "{num} ready vectors in {} a commit: {} chunks, {} vectors, {:.0} s wall, {:.2} s of processor, images included: {:.0} vectors/s of one core",
        READY_TURNS,
        stats.chunks,
        stats.vectors,
        start.elapsed().as_secs_f64(),
        cpu as f64 / 1e9,
        num as f64 / (cpu as f64 / 1e9)
    );
    let before = process_ns();
    drop(store);
    println!("closing: {:.2} s of processor", (process_ns() - before) as f64 / 1e9);
}

/// The sentences of the books, and after those the same with one word in four changed.
fn texts(sentences: &[String]) -> impl FnMut() -> String {
    let words: Vec<&str> = sentences.iter().flat_map(|s| s.split_whitespace()).collect();
    let (mut random, mut at) = (Random(7), 0);
    move || {
        let mut text = String::new();
        for word in sentences[at % sentences.len()].split_whitespace() {
            let changes = at >= sentences.len() && random.next().is_multiple_of(4);
            let other = words[random.next() as usize % words.len()];
            text.push_str(if changes { other } else { word });
            text.push(' ');
        }
        at += 1;
        text
    }
}

fn sentences(folder: &Path) -> Vec<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("a folder of prose")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut sentences = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "gz")) {
        let mut text = String::new();
        GzDecoder::new(std::fs::File::open(file).expect("a file"))
            .read_to_string(&mut text)
            .expect("text");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let long = |sentence: &&str| sentence.split_whitespace().count() >= 15;
        sentences.extend(text.unicode_sentences().filter(long).map(|s| s.trim().to_owned()));
    }
    sentences
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

fn thread_ns() -> u64 {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn process_ns() -> u64 {
    clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of this frame.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

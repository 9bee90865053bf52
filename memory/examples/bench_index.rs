//! Measures the vector index: recall and latency by size, filters, inserts; writes the vectors out for other libraries.
//! Knows the crate's public API only. Tables and commands are in docs/index.md.
//!
//! ```sh
//! cargo run --release -p mka-memory --example bench_index -- --data prose --prose ../shared/data/prose \
//!     --sizes 1000,10000,100000 --out /tmp/vectors
//! ```
//!
//! `--data FOLDER` reads `rows.f32` and `queries.f32`, and makes more rows between three close ones where there are too few.
//! Times are of the calling thread's processor clock, so that other work on the machine does not count; `--threads` are
//! for making rows, exact answers and graphs alone. `--again yes` measures the graph once more for each line of the
//! standard input: a graph of a million takes long to build, and the machine may be quieter later.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use flate2::read::GzDecoder;
use mka_memory::{Embedder, HashedEmbedder, RowSet, VectorIndex};
use unicode_segmentation::UnicodeSegmentation;

const DIM: usize = 384;
const K: usize = 10;

struct Options {
    data: String,
    prose: PathBuf,
    sizes: Vec<usize>,
    num_queries: usize,
    graph_from: usize,
    threads: usize,
    again: bool,
    out: Option<PathBuf>,
}

fn options() -> Options {
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("expected a value after {name}"));
        given.insert(name, value);
    }
    let mut take = |name: &str, default: &str| given.remove(name).unwrap_or(default.to_owned());
    let number =
        |text: String| text.parse().unwrap_or_else(|_| panic!("expected a number: {text}"));
    let options = Options {
        data: take("--data", "clustered"),
        prose: take("--prose", "../shared/data/prose").into(),
        sizes: take("--sizes", "1000,10000,100000")
            .split(',')
            .map(|n| number(n.to_owned()))
            .collect(),
        num_queries: number(take("--queries", "200")),
        graph_from: number(take("--graph-from", "250000")),
        threads: number(take("--threads", "1")),
        again: take("--again", "no") == "yes",
        out: Some(take("--out", "")).filter(|out| !out.is_empty()).map(PathBuf::from),
    };
    assert!(given.is_empty(), "unknown arguments: {given:?}");
    options
}

fn main() {
    let options = options();
    let most = options.sizes.iter().copied().max().unwrap_or(0);
    let (rows, queries) = match options.data.as_str() {
        "clustered" => clustered(most, options.num_queries),
        "prose" => prose(&options.prose, most, options.num_queries),
        folder => {
            let rows = read_rows(&Path::new(folder).join("rows.f32"), most);
            let queries = read_rows(&Path::new(folder).join("queries.f32"), options.num_queries);
            (between(rows, most, options.threads), queries)
        }
    };
    println!(
        "data {}, {} rows, {} queries, dim {DIM}, k {K}",
        options.data,
        rows.len() / DIM,
        queries.len() / DIM
    );
    println!(
        "| rows | structure | rows/s in | recall_at_10 | µs | 10 % | recall | 1 % | recall | 0.1 % | recall |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for &size in &options.sizes {
        measure(&options, &rows[..size * DIM], &queries);
    }
}

fn measure(options: &Options, rows: &[f32], queries: &[f32]) {
    let size = rows.len() / DIM;
    let mut index = VectorIndex::new(DIM).expect("a valid dimension");
    let start = cpu_ns();
    for batch in rows.chunks(1_000 * DIM) {
        index.add(batch).expect("finite rows");
    }
    let inserts = size as f64 / ((cpu_ns() - start) as f64 / 1e9);
    let kept_rows: Vec<(f64, Vec<u32>)> = [1.0, 0.1, 0.01, 0.001]
        .into_iter()
        .map(|share| (share, (0..size as u32).filter(|&row| keeps(row, share)).collect()))
        .collect();
    let exact: Vec<Vec<Vec<u32>>> = kept_rows
        .iter()
        .map(|(_, kept)| {
            let query = |at: usize| &queries[at * DIM..][..DIM];
            spread(queries.len() / DIM, options.threads, |at| nearest(query(at), rows, kept, K))
        })
        .collect();
    if let Some(out) = &options.out {
        write_out(&out.join(size.to_string()), rows, queries, &exact[0]);
    }
    print_row(size, "scan", inserts, &index, queries, &kept_rows, &exact);
    if size >= options.graph_from {
        let (start, cpu) = (Instant::now(), process_ns());
        index.set_threads(options.threads);
        index.build_graph().expect("a sound graph");
        index.set_threads(1);
        let (wall, cpu) = (start.elapsed().as_secs_f64(), (process_ns() - cpu) as f64 / 1e9);
        let rate = size as f64 / cpu;
        print_row(size, "graph", rate, &index, queries, &kept_rows, &exact);
        println!("graph of {size} rows: {wall:.0} s wall, {cpu:.0} s of processor");
        if options.again {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                println!("again: {line}");
                print_row(size, "graph", rate, &index, queries, &kept_rows, &exact);
            }
        }
    }
}

fn print_row(
    size: usize,
    name: &str,
    inserts: f64,
    index: &VectorIndex,
    queries: &[f32],
    kept: &[(f64, Vec<u32>)],
    exact: &[Vec<Vec<u32>>],
) {
    let mut line = format!("| {size} | {name} | {inserts:.0} |");
    for ((share, rows), exact) in kept.iter().zip(exact) {
        let allowed: Option<RowSet> = (*share < 1.0).then(|| rows.iter().copied().collect());
        let (micros, recall) = search_all(index, queries, allowed.as_ref(), exact);
        if *share == 1.0 {
            line += &format!(" {recall:.4} | {micros:.1} |");
        } else {
            line += &format!(" {micros:.1} | {recall:.4} |");
        }
    }
    println!("{line}");
}

/// Median microseconds of one query, and the share of the exact nearest that were found.
fn search_all(
    index: &VectorIndex,
    queries: &[f32],
    allowed: Option<&RowSet>,
    exact: &[Vec<u32>],
) -> (f64, f64) {
    let mut micros = Vec::new();
    let (mut found, mut wanted) = (0, 0);
    for round in 0..3 {
        for (query, exact) in queries.chunks_exact(DIM).zip(exact) {
            let start = cpu_ns();
            let nearest = index.search(query, K, allowed).expect("a valid query");
            let taken = (cpu_ns() - start) as f64 / 1e3;
            if round > 0 {
                micros.push(taken);
                let nearest: HashSet<u32> = nearest.into_iter().map(|(row, _)| row).collect();
                found += exact.iter().filter(|row| nearest.contains(row)).count();
                wanted += exact.len();
            }
        }
    }
    micros.sort_by(f64::total_cmp);
    (micros[micros.len() / 2], found as f64 / wanted.max(1) as f64)
}

/// Whether a filter that keeps this share of all rows keeps this one: spread without a pattern.
fn keeps(row: u32, share: f64) -> bool {
    let mixed = u64::from(row).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    share >= 1.0 || ((mixed >> 20) as f64 / (1u64 << 44) as f64) < share
}

fn nearest(query: &[f32], rows: &[f32], kept: &[u32], k: usize) -> Vec<u32> {
    let dot = |row: u32| -> f32 {
        let row = &rows[row as usize * DIM..][..DIM];
        let mut sums = [0.0f32; 16];
        for (x, y) in query.chunks_exact(16).zip(row.chunks_exact(16)) {
            for lane in 0..16 {
                sums[lane] += x[lane] * y[lane];
            }
        }
        sums.iter().sum()
    };
    let mut scored: Vec<(f32, u32)> = kept.iter().map(|&row| (dot(row), row)).collect();
    let k = k.min(scored.len());
    if k < scored.len() {
        scored.select_nth_unstable_by(k, |a, b| b.0.total_cmp(&a.0));
    }
    scored.truncate(k);
    scored.into_iter().map(|(_, row)| row).collect()
}

/// Rows around centres that lie around centres themselves, each within a few directions: about 20 intrinsic dimensions.
fn clustered(num_rows: usize, num_queries: usize) -> (Vec<f32>, Vec<f32>) {
    let mut random = Random(7);
    let directions: Vec<f32> =
        (0..24 * DIM).map(|_| random.normal() / (DIM as f32).sqrt()).collect();
    let topics: Vec<f32> = (0..200 * DIM).map(|_| random.normal() / (DIM as f32).sqrt()).collect();
    let mut row = |out: &mut Vec<f32>| {
        let topic = (random.next() % 200) as usize;
        let mut row = topics[topic * DIM..][..DIM].to_vec();
        for direction in directions.chunks_exact(DIM) {
            let along = 0.35 * random.normal();
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += along * d);
        }
        row.iter_mut().for_each(|x| *x += 0.25 * random.normal() / (DIM as f32).sqrt());
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        out.extend(row.iter().map(|x| x / length));
    };
    let mut rows = Vec::with_capacity(num_rows * DIM);
    (0..num_rows).for_each(|_| row(&mut rows));
    let mut queries = Vec::with_capacity(num_queries * DIM);
    (0..num_queries).for_each(|_| row(&mut queries));
    (rows, queries)
}

/// Sentences of real books by the built-in embedder; beyond their number, means of two neighbours at random weights.
/// Queries are pieces of 8 to 14 words of sentences that are held out.
fn prose(folder: &Path, num_rows: usize, num_queries: usize) -> (Vec<f32>, Vec<f32>) {
    let mut sentences = Vec::new();
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("a folder of prose")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "gz")) {
        let mut text = String::new();
        GzDecoder::new(File::open(file).expect("a file")).read_to_string(&mut text).expect("text");
        let text = text.replace("\r\n", "\n").replace('\n', " ");
        let long = |sentence: &&str| sentence.unicode_words().count() >= 14;
        sentences.extend(text.unicode_sentences().filter(long).map(str::to_owned));
    }
    let mut random = Random(7);
    for at in (1..sentences.len()).rev() {
        sentences.swap(at, (random.next() % (at as u64 + 1)) as usize);
    }
    let held_out = sentences.split_off(sentences.len() - num_queries);
    let pieces: Vec<String> = held_out
        .iter()
        .map(|sentence| {
            let words: Vec<&str> = sentence.split_whitespace().collect();
            let len = (8 + random.next() as usize % 7).min(words.len());
            let start = random.next() as usize % (words.len() - len + 1);
            words[start..start + len].join(" ")
        })
        .collect();
    sentences.truncate(num_rows);
    let num_real = sentences.len();
    let embed = |texts: &[String]| {
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        HashedEmbedder::new().embed(&texts).expect("the built-in embedder")
    };
    let mut rows = embed(&sentences);
    while rows.len() < num_rows * DIM {
        let at = random.next() as usize % num_real;
        let other = (at + 1 + random.next() as usize % 100) % num_real;
        let weight = 0.3 + 0.4 * random.unit();
        let (a, b) = (at * DIM, other * DIM);
        let mixed: Vec<f32> =
            (0..DIM).map(|i| weight * rows[a + i] + (1.0 - weight) * rows[b + i]).collect();
        let length = mixed.iter().map(|x| x * x).sum::<f32>().sqrt();
        rows.extend(mixed.iter().map(|x| x / length));
    }
    println!("{num_real} real sentences");
    (rows, embed(&pieces))
}

fn read_rows(path: &Path, num_rows: usize) -> Vec<f32> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take((num_rows * DIM * 4) as u64).read_to_end(&mut bytes))
        .expect("rows of f32");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Rows, and from their number on points between one of them and two of its 30 nearest, at random weights.
fn between(mut rows: Vec<f32>, num_rows: usize, threads: usize) -> Vec<f32> {
    let num_real = rows.len() / DIM;
    if num_real >= num_rows {
        return rows;
    }
    let all: Vec<u32> = (0..num_real as u32).collect();
    let near: Vec<Vec<u32>> =
        spread(num_real, threads, |at| nearest(&rows[at * DIM..][..DIM], &rows, &all, 31));
    let more = spread(num_rows - num_real, threads, |number| {
        let mut random = Random(number as u64);
        let at = random.next() as usize % num_real;
        let mut close = || near[at][random.next() as usize % near[at].len()] as usize;
        let corners = [at, close(), close()];
        let weights = corners.map(|_| -random.unit().max(1e-7).ln());
        let mut row = [0.0f32; DIM];
        for (corner, weight) in corners.into_iter().zip(weights) {
            row.iter_mut().zip(&rows[corner * DIM..][..DIM]).for_each(|(x, y)| *x += weight * y);
        }
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.map(|x| x / length)
    });
    println!("{num_real} real rows");
    rows.reserve_exact(more.len() * DIM);
    more.iter().for_each(|row| rows.extend_from_slice(row));
    rows
}

/// The results for 0 to `count`, in order, computed on so many threads.
fn spread<T: Send>(count: usize, threads: usize, each: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let part = count.div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let each = &each;
        let start = |from: usize| {
            scope.spawn(move || (from..(from + part).min(count)).map(each).collect::<Vec<T>>())
        };
        let running: Vec<_> = (0..count).step_by(part).map(start).collect();
        running.into_iter().flat_map(|part| part.join().expect("no panic")).collect()
    })
}

/// `rows.f32`, `queries.f32` and the exact answers `exact.u32`, for other libraries to be measured on.
fn write_out(folder: &Path, rows: &[f32], queries: &[f32], exact: &[Vec<u32>]) {
    std::fs::create_dir_all(folder).expect("a folder to write to");
    let write = |name: &str, numbers: &mut dyn Iterator<Item = [u8; 4]>| {
        let mut out = BufWriter::new(File::create(folder.join(name)).expect("a file to write"));
        numbers.for_each(|bytes| out.write_all(&bytes).expect("room on the disk"));
        out.flush().expect("room on the disk");
    };
    write("rows.f32", &mut rows.iter().map(|x| x.to_le_bytes()));
    write("queries.f32", &mut queries.iter().map(|x| x.to_le_bytes()));
    write("exact.u32", &mut exact.iter().flatten().map(|row| row.to_le_bytes()));
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal: the sum of twelve uniform numbers has variance 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
}

fn cpu_ns() -> u64 {
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

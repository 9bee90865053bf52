//! Measures what a store's recall finds: facts buried in books, asked for in other words and by keywords, and questions
//! that nothing answers. Prints every single method beside the fused score.
//! Knows the crate's public API only. Tables and commands are in docs/index.md.
//!
//! ```sh
//! cargo run --release -p mka-memory --example bench_recall -- --prose ../shared/data/prose
//! # With another embedder: write the sentences out, embed them, read the vectors back.
//! cargo run --release -p mka-memory --example bench_recall -- --prose ../shared/data/prose --texts-to texts.txt
//! python3 memory/docs/peers/minilm.py MODEL texts.txt vectors.f32 # another set of facts: --facts mixed with both
//! cargo run --release -p mka-memory --example bench_recall -- --prose ../shared/data/prose \
//!     --texts texts.txt --vectors vectors.f32
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use flate2::read::GzDecoder;
use mka_memory::{
    Commit, Embedder, HashedEmbedder, Hit, NewTurn, Recall, Result, Role, Scope, Store,
    StoreOptions,
};

/// Facts with what is asked about them; the form is in their first lines.
const PEOPLE: &str = include_str!("facts/people.tsv");
const MIXED: &str = include_str!("facts/mixed.tsv");

/// Of [`PEOPLE`].
const NUM_TUNING: usize = 10;
const NAMES: [&str; 12] = [
    "Marta", "Oleg", "Priya", "Jonas", "Amina", "Felix", "Ingrid", "Tomas", "Leila", "Conrad",
    "Yuki", "Esther",
];
/// Of [`MIXED`].
const OTHER_NAMES: [[&str; 2]; 12] = [
    ["Bruno", "Larkspur"],
    ["Chiara", "Basalt"],
    ["Dmitri", "Quokka"],
    ["Farah", "Meridian"],
    ["Gwen", "Tundra"],
    ["Hassan", "Falcon"],
    ["Ilse", "Saffron"],
    ["Kofi", "Orchid"],
    ["Nadia", "Cobalt"],
    ["Pavel", "Juniper"],
    ["Rosa", "Zephyr"],
    ["Soren", "Granite"],
];

/// Questions that neither a fact nor a book answers; `{n}` is a name of the facts.
const UNANSWERABLE: [&str; 20] = [
    "what is the wifi code of the office printer?",
    "how many gigabytes does the new laptop have?",
    "which streaming service did {n} subscribe to?",
    "what is {n}'s favourite programming language?",
    "who won the basketball final yesterday?",
    "when does the software licence expire?",
    "how do I reset the router?",
    "what did {n} post on social media?",
    "which airline lost {n}'s suitcase?",
    "what is the boiling point of ethanol?",
    "does {n} own any cryptocurrency?",
    "which vaccine did {n} receive last autumn?",
    "how tall is {n}?",
    "what is {n}'s shoe size?",
    "where did {n} study chemistry?",
    "which video game does {n} play online?",
    "what is the exchange rate of the yen?",
    "who designed the logo of the website?",
    "how many kilometres did {n}'s electric scooter run?",
    "what colour is {n}'s yoga mat?",
];

struct Case {
    fact: String,
    /// In other words, and by keywords.
    questions: [String; 2],
    tuning: bool,
}

fn cases(is_mixed: bool) -> Vec<Case> {
    let mut cases = Vec::new();
    let lines = if is_mixed { MIXED } else { PEOPLE }.lines();
    for (at, line) in lines.filter(|line| !line.starts_with('#')).enumerate() {
        let parts: Vec<&str> = line.split('\t').collect();
        let [fact, other, keywords] = parts[..] else { panic!("expected three parts: {line}") };
        let num_names = if fact.contains('{') { NAMES.len() } else { 1 };
        for number in 0..num_names {
            let value = (11 + (at * 37 + number * 13) % 80).to_string();
            let [person, system] = OTHER_NAMES[number];
            let fill = |text: &str| {
                let text = text.replace("{n}", NAMES[number]).replace("{v}", &value);
                text.replace("{p}", person).replace("{s}", system)
            };
            cases.push(Case {
                fact: fill(fact),
                questions: [fill(other), fill(keywords)],
                tuning: is_mixed || at < NUM_TUNING,
            });
        }
    }
    cases
}

fn main() {
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        given.insert(name, arguments.next().expect("a value after each name"));
    }
    let prose = PathBuf::from(given.get("--prose").map_or("../shared/data/prose", String::as_str));
    let num_chunks: usize =
        given.get("--chunks").map_or(1_200, |text| text.parse().expect("a number"));
    let is_mixed = match given.get("--facts").map(String::as_str) {
        None | Some("people") => false,
        Some("mixed") => true,
        Some(other) => panic!("expected people or mixed after --facts, got {other}"),
    };
    let hay = paragraphs(&prose, num_chunks, is_mixed);
    let cases = cases(is_mixed);
    if let Some(path) = given.get("--texts-to") {
        let recorder = Arc::new(Recorder::default());
        let store = fill(recorder.clone(), &hay, &cases);
        ask_all(&store.1, &cases, &*recorder);
        let texts =
            recorder.texts.lock().expect("no panic so far").keys().cloned().collect::<Vec<_>>();
        std::fs::write(path, texts.join("\n") + "\n").expect("a file to write");
        println!("{} texts", texts.len());
        return;
    }
    let embedder: Arc<dyn Embedder> = match (given.get("--texts"), given.get("--vectors")) {
        (Some(texts), Some(vectors)) => Arc::new(Stored::read(texts, vectors)),
        _ => Arc::new(HashedEmbedder::new()),
    };
    println!("embedder {}", embedder.identity());
    let (_folder, store) = fill(embedder.clone(), &hay, &cases);
    println!(
        "{} chunks, {} vectors, {} facts",
        store.stats().chunks,
        store.stats().vectors,
        cases.len()
    );
    ask_all(&store, &cases, &*embedder);
}

/// Stretches of real books of about 70 words; each fact stands in the middle of one. `is_mixed` takes other stretches.
fn paragraphs(folder: &Path, num: usize, is_mixed: bool) -> Vec<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("a folder of prose")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let mut texts = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "gz")) {
        let mut text = String::new();
        GzDecoder::new(std::fs::File::open(file).expect("a file"))
            .read_to_string(&mut text)
            .expect("text");
        let words: Vec<&str> = text.split_whitespace().collect();
        let step = words.len() / (num / 3 + 1);
        let first = if is_mixed { step / 2 } else { 0 };
        let stretch = |at: usize| words[first + at * step..][..70].join(" ");
        texts.extend((0..num / 3).map(stretch));
    }
    texts
}

/// A paragraph with a fact between two of its words that end a sentence, or in its middle.
fn bury(hay: &str, fact: &str) -> String {
    let middle = hay.len() / 2;
    let ends = hay.match_indices(". ").map(|(at, _)| at + 2);
    let at = ends.min_by_key(|at| at.abs_diff(middle)).unwrap_or_else(|| {
        hay.char_indices()
            .map(|(at, _)| at)
            .find(|&at| at >= middle && hay[at..].starts_with(' '))
            .unwrap_or(0)
    });
    format!("{} {fact} {}", hay[..at].trim(), hay[at..].trim())
}

fn fill(embedder: Arc<dyn Embedder>, hay: &[String], cases: &[Case]) -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Store::open(folder.path(), embedder, StoreOptions::default()).expect("a store");
    let scope = Scope::user("bench").session("bench");
    for (number, text) in hay.iter().enumerate() {
        // Facts are spread over the whole of the books.
        let step = hay.len() / cases.len();
        let case = (number % step == 0).then(|| cases.get(number / step)).flatten();
        let text = case.map_or_else(|| text.clone(), |case| bury(text, &case.fact));
        let turns = vec![NewTurn::new(Role::Document, text)];
        store.commit(&scope, Commit { turns, ..Commit::default() }).expect("a commit");
    }
    (folder, store)
}

/// Where a needle stood, by one method.
#[derive(Default)]
struct Tally {
    at_1: usize,
    at_5: usize,
}

impl Tally {
    fn add(&mut self, place: Option<usize>) {
        self.at_1 += usize::from(place == Some(0));
        self.at_5 += usize::from(place.is_some_and(|place| place < 5));
    }
}

/// `words` is BM25 by that of a chunk that holds every word of the question, or by the best one, if that is more.
const METHODS: [&str; 14] = [
    "BM25",
    "one vector a chunk",
    "best sentence",
    "RRF(60) of BM25 and chunk",
    "RRF(60) of BM25 and sentence",
    "RRF(10) of BM25 and sentence",
    "recall (what a user gets)",
    "0.2 BM25 by the best chunk, 0.8 sentence by its theoretical minimum",
    "0.2 / 0.8 of z-scores",
    "0.5 BM25 by the best chunk + 0.5 sentence",
    "0.5 words + 0.5 sentence",
    "0.5 words^2 + 0.5 sentence",
    "0.5 words^3 + 0.5 sentence",
    "0.3 words^2 + 0.7 sentence",
];

fn ask_all(store: &Store, cases: &[Case], embedder: &dyn Embedder) {
    let scope = Scope::user("bench").session("bench");
    let all = store.chunks(&scope, 0..usize::MAX, None).expect("chunks");
    let texts: Vec<&str> = all.iter().map(|chunk| chunk.text.as_str()).collect();
    let dim = embedder.dim();
    let mut chunk_rows = Vec::new();
    texts.chunks(256).for_each(|batch| chunk_rows.extend(embedder.embed(batch).expect("vectors")));
    for tuning in [true, false] {
        let asked: Vec<&Case> = cases.iter().filter(|case| case.tuning == tuning).collect();
        if asked.is_empty() {
            return;
        }
        println!(
            "\n{} questions of each kind, {}\n",
            asked.len(),
            if tuning { "for choosing weights" } else { "held out" }
        );
        println!("| method | paraphrase @5 | @1 | keywords @5 | @1 |\n|---|---|---|---|---|");
        let mut tallies: Vec<[Tally; 2]> = METHODS.iter().map(|_| Default::default()).collect();
        for case in &asked {
            for (kind, question) in case.questions.iter().enumerate() {
                let options = Recall { k: 2_000, follow_up: false, ..Recall::default() };
                let hits = store.recall(&scope, question, &options).expect("a recall");
                let query = embedder.embed(&[question]).expect("a vector");
                let by_chunk = order(&texts, |at| dot(&query, &chunk_rows[at * dim..][..dim]));
                for (method, tally) in tallies.iter_mut().enumerate() {
                    tally[kind].add(place(method, &hits, &by_chunk, &texts, &case.fact));
                }
            }
        }
        for (method, tally) in METHODS.iter().zip(&tallies) {
            let share = |count: usize| count as f64 / asked.len() as f64;
            println!(
                "| {method} | {:.3} | {:.3} | {:.3} | {:.3} |",
                share(tally[0].at_5),
                share(tally[0].at_1),
                share(tally[1].at_5),
                share(tally[1].at_1)
            );
        }
    }
    abstain(store, &scope, cases);
}

/// The place of the chunk with the fact, from 0.
fn place(
    method: usize,
    hits: &[Hit],
    by_chunk: &[usize],
    texts: &[&str],
    fact: &str,
) -> Option<usize> {
    let holds = |text: &str| text.contains(fact);
    let rank_by_chunk: HashMap<&str, usize> =
        by_chunk.iter().enumerate().map(|(place, &at)| (texts[at], place + 1)).collect();
    let chunk_rank =
        |hit: &Hit| rank_by_chunk.get(hit.text.as_str()).copied().unwrap_or(usize::MAX) as f32;
    let word_rank = |hit: &Hit| hit.why.bm25_rank.map_or(f32::MAX, |rank| rank as f32);
    let best = hits.iter().map(|hit| hit.why.bm25).fold(f32::MIN_POSITIVE, f32::max);
    // BM25 of a chunk that holds every word once, from any that holds some.
    let attainable = |hit: &Hit| hit.why.bm25 / hit.why.coverage;
    let some = |hit: &&Hit| hit.why.coverage > 0.0 && hit.why.coverage < 1.0;
    let attainable = hits.iter().find(some).map_or(best, attainable).max(best);
    let by = |score: &dyn Fn(&Hit) -> f32| {
        let mut ordered: Vec<&Hit> = hits.iter().collect();
        ordered.sort_by(|a, b| score(b).total_cmp(&score(a)));
        ordered.iter().position(|hit| holds(&hit.text))
    };
    let fused = |share: f32, most: f32, power: i32| {
        by(&|hit| {
            share * (hit.why.bm25 / most).powi(power) + (1.0 - share) * hit.why.cosine.max(0.0)
        })
    };
    let rrf = |k: f32, rank: &dyn Fn(&Hit) -> f32| {
        by(&|hit| 1.0 / (k + word_rank(hit)) + 1.0 / (k + rank(hit)))
    };
    let sentence_rank = |hit: &Hit| hit.why.cosine_rank as f32;
    match method {
        0 => by(&|hit| hit.why.bm25),
        1 => by_chunk.iter().position(|&at| holds(texts[at])),
        2 => by(&|hit| hit.why.cosine),
        3 => rrf(60.0, &chunk_rank),
        4 => rrf(60.0, &sentence_rank),
        5 => rrf(10.0, &sentence_rank),
        6 => hits.iter().position(|hit| holds(&hit.text)),
        7 => {
            let most = hits.iter().map(|hit| hit.why.cosine).fold(-1.0, f32::max);
            by(&|hit| 0.2 * hit.why.bm25 / best + 0.8 * (hit.why.cosine + 1.0) / (most + 1.0))
        }
        8 => {
            let (words, cosine) =
                (spread(hits, |hit| hit.why.bm25), spread(hits, |h| h.why.cosine));
            by(&|hit| 0.2 * hit.why.bm25 / words + 0.8 * hit.why.cosine / cosine)
        }
        9 => fused(0.5, best, 1),
        10 => fused(0.5, attainable, 1),
        11 => fused(0.5, attainable, 2),
        12 => fused(0.5, attainable, 3),
        _ => fused(0.3, attainable, 2),
    }
}

/// Standard deviation: what a z-score divides by; its mean moves all hits alike.
fn spread(hits: &[Hit], value: impl Fn(&Hit) -> f32) -> f32 {
    let num = hits.len().max(1) as f32;
    let mean = hits.iter().map(&value).sum::<f32>() / num;
    let variance = hits.iter().map(|hit| (value(hit) - mean).powi(2)).sum::<f32>() / num;
    variance.sqrt().max(f32::MIN_POSITIVE)
}

/// How well `relevance` tells questions with an answer from those without, on the held-out facts.
fn abstain(store: &Store, scope: &Scope, cases: &[Case]) {
    let top = |question: &str| {
        let options = Recall { k: 1, follow_up: false, ..Recall::default() };
        let hits = store.recall(scope, question, &options).expect("a recall");
        hits.first()
            .map_or((0.0, 0.0, 0.0), |hit| (hit.relevance, hit.why.coverage, hit.why.cosine))
    };
    let nothing: Vec<String> = UNANSWERABLE
        .iter()
        .flat_map(|question| match question.contains("{n}") {
            true => NAMES.iter().map(|name| question.replace("{n}", name)).collect(),
            false => vec![(*question).to_owned()],
        })
        .collect();
    let split = |questions: &mut dyn Iterator<Item = (usize, String)>| {
        let mut halves = [Vec::new(), Vec::new()];
        questions.for_each(|(half, question)| halves[half].push(top(&question)));
        halves
    };
    let mut answerable = cases
        .iter()
        .flat_map(|case| case.questions.iter().map(|q| (usize::from(!case.tuning), q.clone())));
    let yes = split(&mut answerable);
    // Every other question without an answer is for choosing.
    let no = split(&mut nothing.into_iter().enumerate().map(|(at, question)| (at % 2, question)));
    println!("\n| relevance at least | answered kept | unanswerable kept |\n|---|---|---|");
    for threshold in [0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] {
        let kept = |found: &[(f32, f32, f32)]| {
            found.iter().filter(|found| found.0 >= threshold).count() as f64 / found.len() as f64
        };
        println!("| {threshold} | {:.3} | {:.3} |", kept(&yes[1]), kept(&no[1]));
    }
    let fitted = fit(&yes[0], &no[0]);
    println!(
        "best weights on the questions for choosing: coverage {:.2}, cosine {:.2}, constant {:.2}",
        fitted[0], fitted[1], fitted[2]
    );
}

/// Logistic regression of coverage and cosine, classes weighted equally.
fn fit(yes: &[(f32, f32, f32)], no: &[(f32, f32, f32)]) -> [f64; 3] {
    let mut weights = [0.0f64; 3];
    for _ in 0..20_000 {
        let mut slope = [0.0f64; 3];
        for (found, label) in [(yes, 1.0), (no, 0.0)] {
            for &(_, coverage, cosine) in found {
                let x = [f64::from(coverage), f64::from(cosine), 1.0];
                let score: f64 = x.iter().zip(weights).map(|(x, w)| x * w).sum();
                let error = label - 1.0 / (1.0 + (-score).exp());
                (0..3).for_each(|at| slope[at] += error * x[at] / found.len() as f64);
            }
        }
        (0..3).for_each(|at| weights[at] += slope[at]);
    }
    weights
}

fn order(texts: &[&str], score: impl Fn(usize) -> f32) -> Vec<usize> {
    let scores: Vec<f32> = (0..texts.len()).map(score).collect();
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Notes every text that a store wants embedded.
#[derive(Default)]
struct Recorder {
    texts: Mutex<BTreeMap<String, ()>>,
}

impl Embedder for Recorder {
    fn identity(&self) -> String {
        "recorder".into()
    }

    fn dim(&self) -> usize {
        4
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        let mut known = self.texts.lock().expect("no panic so far");
        texts.iter().for_each(|text| {
            known.insert(line(text), ());
        });
        Ok([1.0, 0.0, 0.0, 0.0].repeat(texts.len()))
    }
}

/// Vectors that another program made.
struct Stored {
    rows: HashMap<String, Vec<f32>>,
    dim: usize,
}

impl Stored {
    fn read(texts: &str, vectors: &str) -> Self {
        let texts = std::fs::read_to_string(texts).expect("texts");
        let bytes = std::fs::read(vectors).expect("vectors");
        let numbers: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let lines: Vec<&str> = texts.trim_end_matches('\n').split('\n').collect();
        let dim = numbers.len() / lines.len();
        Self {
            rows: lines
                .iter()
                .map(|line| (*line).to_owned())
                .zip(numbers.chunks_exact(dim).map(<[f32]>::to_vec))
                .collect(),
            dim,
        }
    }
}

impl Embedder for Stored {
    fn identity(&self) -> String {
        "stored".into()
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn embed(&self, texts: &[&str]) -> Result<Vec<f32>> {
        Ok(texts.iter().flat_map(|text| self.rows[&line(text)].clone()).collect())
    }
}

fn line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

//! Measures what a store's recall finds: facts buried in books, asked for in other words and by keywords, and questions
//! that nothing answers. Prints every single method beside the fused score.
//! Knows the crate's public API only. Tables and commands are in docs/index.md.
//!
//! ```sh
//! cargo run --release -p mka-memory --example bench_recall -- --prose ../shared/data/prose
//! # With another embedder: write the sentences out, embed them, read the vectors back.
//! cargo run --release -p mka-memory --example bench_recall -- --prose ../shared/data/prose --texts-to texts.txt
//! python3 memory/docs/peers/minilm.py MODEL texts.txt vectors.f32
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

/// A fact, a question in other words, and keywords of the fact; `{n}` is a name, `{v}` a value.
/// The first ten are for choosing weights; the rest are measured and were never looked at.
const TEMPLATES: [[&str; 3]; 36] = [
    [
        "{n} keeps the spare key to the cabin under the third flowerpot, number {v}.",
        "where did {n} hide the extra key for the cottage?",
        "{n} spare key cabin flowerpot",
    ],
    [
        "The dentist moved {n}'s appointment to the afternoon of the {v}th.",
        "when will {n} get their teeth checked?",
        "{n} dentist appointment",
    ],
    [
        "{n} is allergic to cashews and carries an injector with batch {v}.",
        "which food makes {n} ill?",
        "{n} allergic cashews injector",
    ],
    [
        "For the anniversary {n} reserved table {v} at the harbour restaurant.",
        "where is {n} going to celebrate the wedding day?",
        "{n} anniversary table harbour restaurant",
    ],
    [
        "{n} pays {v} euros a month for the flat above the bakery.",
        "how much rent does {n} owe?",
        "{n} euros month flat bakery",
    ],
    [
        "The doctor told {n} to swim {v} lengths a week because of the bad back.",
        "what exercise was {n} advised to do for spinal pain?",
        "{n} swim lengths week back",
    ],
    [
        "{n} sold the old motorcycle to a neighbour for {v} pounds.",
        "what did {n} get for the used bike?",
        "{n} sold motorcycle neighbour pounds",
    ],
    [
        "{n}'s train to Lisbon leaves from platform {v} just after dawn.",
        "from which track does {n} depart for Portugal early in the morning?",
        "{n} train Lisbon platform",
    ],
    [
        "{n} wrote the password for the archive, walnut{v}, on a yellow card.",
        "what are {n}'s login credentials for the records?",
        "{n} password archive yellow card",
    ],
    [
        "The choir elected {n} treasurer with {v} votes in March.",
        "who looks after the singers' money, and was {n} chosen?",
        "{n} choir elected treasurer votes",
    ],
    [
        "{n} adopted a deaf terrier from the shelter, tag {v}.",
        "what kind of pet did {n} take home?",
        "{n} adopted deaf terrier shelter",
    ],
    [
        "Since the accident {n} drives a blue van with the plate ending in {v}.",
        "which vehicle does {n} use now?",
        "{n} blue van plate",
    ],
    [
        "{n} grows {v} kinds of tomato on the roof of the school.",
        "what vegetables does {n} cultivate, and how many varieties?",
        "{n} tomato kinds roof school",
    ],
    [
        "{n} learned to play the cello at the age of {v}.",
        "how old was {n} when taking up a string instrument?",
        "{n} learned cello age",
    ],
    [
        "The bank refused {n} a loan of {v} thousand in spring.",
        "was {n}'s request for credit turned down?",
        "{n} bank refused loan thousand",
    ],
    [
        "{n} broke the left wrist on the ice and wore a cast for {v} days.",
        "which bone did {n} fracture in winter?",
        "{n} broke left wrist ice cast",
    ],
    [
        "{n} proposed to call the new product Heron, and {v} colleagues agreed.",
        "what name for the product was {n}'s idea?",
        "{n} product Heron colleagues agreed",
    ],
    [
        "The plumber will come to {n}'s house on Thursday at {v} past nine.",
        "when is the leaking pipe at {n}'s home being repaired?",
        "{n} plumber house Thursday",
    ],
    [
        "{n} donated {v} books on astronomy to the village library.",
        "what did {n} give away for readers in the community?",
        "{n} donated books astronomy library",
    ],
    [
        "{n} missed the exam because the ferry was {v} minutes late.",
        "why was {n} absent from the test?",
        "{n} missed exam ferry late",
    ],
    [
        "{n}'s grandmother emigrated from Trieste in 19{v}.",
        "which city did {n}'s ancestors come from?",
        "{n} grandmother emigrated Trieste",
    ],
    [
        "The recipe that {n} won with needs {v} grams of rye flour and caraway.",
        "what ingredients are in the bread that got {n} the prize?",
        "{n} recipe grams rye flour caraway",
    ],
    [
        "{n} rents out the boathouse to students from May, {v} a week.",
        "what does {n} let to young people in summer?",
        "{n} rents boathouse students May",
    ],
    [
        "{n} has been taking iron tablets since the blood test showed {v}.",
        "what medication is {n} on?",
        "{n} iron tablets blood test",
    ],
    [
        "The court fined {n} {v} dollars for fishing without a licence.",
        "what penalty did {n} get from the judge?",
        "{n} court fined dollars fishing licence",
    ],
    [
        "{n} mended the greenhouse with {v} panes from the old cinema.",
        "how was the glass building repaired by {n}?",
        "{n} mended greenhouse panes cinema",
    ],
    [
        "{n} teaches evening classes in welding, room {v}, every Tuesday.",
        "what craft does {n} instruct after work?",
        "{n} evening classes welding room Tuesday",
    ],
    [
        "On the ridge {n} saw {v} cranes flying south before the storm.",
        "which birds did {n} observe on the mountain?",
        "{n} ridge cranes flying south storm",
    ],
    [
        "{n} prefers to be called by the second name, and signs as agent {v}.",
        "how does {n} want to be addressed?",
        "{n} prefers called second name signs agent",
    ],
    [
        "{n}'s company lost the contract for the bridge, worth {v} million.",
        "what deal slipped away from {n}'s firm?",
        "{n} company lost contract bridge million",
    ],
    [
        "{n} quit smoking {v} weeks ago with the help of hypnosis.",
        "how did {n} give up cigarettes?",
        "{n} quit smoking weeks hypnosis",
    ],
    [
        "{n} stores the winter tyres in cellar {v} behind the bicycles.",
        "where are {n}'s wheels for the snow?",
        "{n} winter tyres cellar bicycles",
    ],
    [
        "The orchestra's tour takes {n} through {v} towns in Bohemia.",
        "where is {n} travelling to give concerts?",
        "{n} orchestra tour towns Bohemia",
    ],
    [
        "{n} inherited a violin and {v} hectares of vineyard from an uncle.",
        "what was left to {n} by a relative?",
        "{n} inherited violin hectares vineyard uncle",
    ],
    [
        "{n} set the thermostat to {v} because the baby sleeps badly in the heat.",
        "why did {n} lower the temperature indoors?",
        "{n} thermostat baby sleeps heat",
    ],
    [
        "{n} found a wallet with {v} crowns and brought it to the police.",
        "what lost property did {n} hand in?",
        "{n} found wallet crowns police",
    ],
];

const NUM_TUNING: usize = 10;
const NAMES: [&str; 12] = [
    "Marta", "Oleg", "Priya", "Jonas", "Amina", "Felix", "Ingrid", "Tomas", "Leila", "Conrad",
    "Yuki", "Esther",
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

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (at, [fact, other, keywords]) in TEMPLATES.iter().enumerate() {
        for (number, name) in NAMES.iter().enumerate() {
            let value = (11 + (at * 37 + number * 13) % 80).to_string();
            let fill = |text: &str| text.replace("{n}", name).replace("{v}", &value);
            cases.push(Case {
                fact: fill(fact),
                questions: [fill(other), fill(keywords)],
                tuning: at < NUM_TUNING,
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
    let hay = paragraphs(&prose, num_chunks);
    let cases = cases();
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

/// Stretches of real books of about 70 words; each fact stands in the middle of one.
fn paragraphs(folder: &Path, num: usize) -> Vec<String> {
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
        texts.extend((0..num / 3).map(|at| words[at * step..at * step + 70].join(" ")));
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

const METHODS: [&str; 12] = [
    "BM25",
    "one vector a chunk",
    "best sentence",
    "RRF(60) of BM25 and chunk",
    "RRF(60) of BM25 and sentence",
    "recall (what a user gets)",
    "0.5 / 0.5, words by the best chunk",
    "0.3 / 0.7, words by the best chunk",
    "0.5 / 0.5, words by what can be had",
    "0.3 / 0.7, words by what can be had",
    "0.5 / 0.5, the square of that",
    "0.3 / 0.7, the square of that",
];

fn ask_all(store: &Store, cases: &[Case], embedder: &dyn Embedder) {
    let scope = Scope::user("bench").session("bench");
    let all = store.chunks(&scope, 0..usize::MAX).expect("chunks");
    let texts: Vec<&str> = all.iter().map(|chunk| chunk.text.as_str()).collect();
    let dim = embedder.dim();
    let mut chunk_rows = Vec::new();
    texts.chunks(256).for_each(|batch| chunk_rows.extend(embedder.embed(batch).expect("vectors")));
    for tuning in [true, false] {
        let asked: Vec<&Case> = cases.iter().filter(|case| case.tuning == tuning).collect();
        println!(
            "\n{} questions of each kind, {}\n",
            asked.len(),
            if tuning { "for choosing weights" } else { "held out" }
        );
        println!("| method | paraphrase @5 | @1 | keywords @5 | @1 |\n|---|---|---|---|---|");
        let mut tallies: Vec<[Tally; 2]> = METHODS.iter().map(|_| Default::default()).collect();
        for case in &asked {
            for (kind, question) in case.questions.iter().enumerate() {
                let options = Recall { k: 400, follow_up: false, ..Recall::default() };
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
    let fused = |words: f32, most: f32| {
        by(&|hit| words * hit.why.bm25 / most + (1.0 - words) * hit.why.cosine.max(0.0))
    };
    let square = |words: f32| {
        by(&|hit| {
            words * (hit.why.bm25 / attainable).powi(2) + (1.0 - words) * hit.why.cosine.max(0.0)
        })
    };
    match method {
        0 => by(&|hit| hit.why.bm25),
        1 => by_chunk.iter().position(|&at| holds(texts[at])),
        2 => by(&|hit| hit.why.cosine),
        3 => by(&|hit| 1.0 / (60.0 + word_rank(hit)) + 1.0 / (60.0 + chunk_rank(hit))),
        4 => by(&|hit| 1.0 / (60.0 + word_rank(hit)) + 1.0 / (60.0 + hit.why.cosine_rank as f32)),
        5 => hits.iter().position(|hit| holds(&hit.text)),
        6 => fused(0.5, best),
        7 => fused(0.3, best),
        8 => fused(0.5, attainable),
        9 => fused(0.3, attainable),
        10 => square(0.5),
        _ => square(0.3),
    }
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

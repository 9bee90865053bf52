//! Measures scans of landmarks over the keys of a real model against the scan of all of them; opt-in, by
//! `MKA_SCAN_FOLDER`.
//! Knows the index and its scans, no store's budget.

mod choice;
mod intake;
mod opening;

use super::index::{HeadIndex, SPAN};
use super::scan::{Scan, Taken, span_of};
use super::selection::{OVER_FETCH, OVER_FETCH_BY_CODES};
use super::signs::Planes;
use super::tests::{cache, run_blocks};
use super::vote::{Ballot, Queries};
use super::{LandmarkScan, PageConfig};
use crate::models::config::DecoderConfig;
use crate::models::decoder::Decoder;
use crate::models::weights::Weights;
use candle_core::Device;
use mka_kernels::key_codes::Rotation;
use mka_kernels::{PAGE_TOKENS, rows};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Layers whose keys and queries are measured: the first that chooses, and others up to the last.
const LAYERS: [usize; 5] = [3, 8, 15, 22, 29];
/// Tokens at the end of a text whose queries are kept, and how many of them ask.
const QUERIES: usize = 512;
const ASKED: usize = 24;
/// The default model's shape, and its angles' base.
const NUM_KV_HEADS: usize = 3;
const GROUP: usize = 3;
const D: usize = 64;
const BASE: f64 = 1e5;
const SCANS: [LandmarkScan; 4] =
    [LandmarkScan::Flat, LandmarkScan::TwoLevel, LandmarkScan::SignHash, LandmarkScan::KeyCodes];
/// Landmarks for each that is taken: of 262,144 tokens 2,048 are recalled, by 1,024 landmarks.
const MARKS_FOR_ONE: usize = 32;

/// Texts of the folder, ascending by name.
fn texts(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let mut texts: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|it| it == "txt")).collect();
    texts.sort();
    texts
}

/// Writes the keys of each text that has none yet beside it, as bf16 by layer, head and token, and the queries of its
/// end; each text is read with sinks and a window of 1,024 tokens. `most` texts at once.
fn write_keys(folder: &Path, most: usize) {
    let path = crate::hub::cache_folder().unwrap().join("models").join(crate::hub::DEFAULT_FILE);
    let (weights, gguf) = Weights::open_gguf(&path).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let decoder = Decoder::load(config, &weights, &Device::Cpu).unwrap();
    let tokenizer = crate::tokenizer::Tokenizer::from_gguf(&gguf).unwrap();
    let missing = texts(folder).into_iter().filter(|text| !text.with_extension("keys").exists());
    for text in missing.take(most) {
        let tokens = tokenizer.encode(&std::fs::read_to_string(&text).unwrap(), false).unwrap();
        let config = PageConfig { first_layer: 99, bytes: 400 << 20, ..PageConfig::default() };
        let mut cache = cache(&decoder, 1024, Some(config));
        cache.pages_mut().unwrap().active = false;
        let mut keys: Vec<Vec<u8>> = Vec::new();
        let mut next = 0;
        let started = Instant::now();
        let (body, end) = tokens.split_at(tokens.len() - QUERIES);
        let parts = body.chunks(8192).map(|part| (part, false)).chain([(end, true)]);
        for (part, is_end) in parts {
            if is_end {
                cache.pages_mut().unwrap().asked = Some(Vec::new());
            }
            run_blocks(&decoder, &mut cache, part, &[512]);
            let store = cache.pages_mut().unwrap();
            let shape = store.shape;
            keys.resize(LAYERS.len() * shape.num_kv_heads, Vec::new());
            let fresh: Vec<u64> =
                store.order.iter().copied().filter(|page| *page >= next).collect();
            for page in fresh {
                next = page + 1;
                for (at, out) in keys.iter_mut().enumerate() {
                    let (layer, head) = (LAYERS[at / shape.num_kv_heads], at % shape.num_kv_heads);
                    let mut own = vec![0f32; PAGE_TOKENS * shape.head_dim];
                    assert!(store.read_rows(page, layer, 0, head, 0, &mut own));
                    let number = |x: &f32| half::bf16::from_f32(*x).to_le_bytes();
                    out.extend(own.iter().flat_map(number));
                }
            }
        }
        let asked = cache.pages_mut().unwrap().asked.take().unwrap();
        let mut queries = Vec::new();
        for layer in LAYERS {
            for (_, q) in asked.iter().filter(|(own, _)| *own == layer) {
                let q = q.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                queries.extend(q.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        std::fs::write(text.with_extension("queries"), queries).unwrap();
        std::fs::write(text.with_extension("keys"), keys.concat()).unwrap();
        println!("{}: {} tokens in {:?}", text.display(), tokens.len(), started.elapsed());
    }
}

#[test]
fn scans_over_a_real_models_keys() {
    let Some(folder) = std::env::var_os("MKA_SCAN_FOLDER").map(PathBuf::from) else { return };
    let most =
        std::env::var("MKA_SCAN_TEXTS").ok().and_then(|n| n.parse().ok()).unwrap_or(usize::MAX);
    write_keys(&folder, most);
    let texts: Vec<PathBuf> =
        texts(&folder).into_iter().filter(|text| text.with_extension("keys").exists()).collect();
    let keys = Keys::read(&texts);
    compare(&keys, &texts[0].with_extension("queries"));
    for tokens in [1 << 17, 1 << 18, 1 << 19, 1 << 20] {
        time(&keys, &texts[0].with_extension("queries"), tokens);
    }
}

/// Keys of texts one behind the other: by layer and head (tokens, D), f32.
struct Keys(Vec<Vec<f32>>);

impl Keys {
    fn read(texts: &[PathBuf]) -> Self {
        let mut keys = vec![Vec::new(); LAYERS.len() * NUM_KV_HEADS];
        for text in texts {
            let bytes = std::fs::read(text.with_extension("keys")).unwrap();
            let each = bytes.len() / keys.len();
            for (keys, bytes) in keys.iter_mut().zip(bytes.chunks_exact(each)) {
                let from = keys.len();
                keys.resize(from + each / 2, 0.0);
                rows::widen_bf16(bytes, &mut keys[from..]);
            }
        }
        Self(keys)
    }

    /// The heads of one layer, `tokens` long, the keys again and again.
    fn index(&self, layer: usize, tokens: usize) -> Vec<HeadIndex> {
        let heads = &self.0[layer * NUM_KV_HEADS..][..NUM_KV_HEADS];
        let page = PAGE_TOKENS * D;
        let rotation = Rotation::new(D);
        let head = |keys: &Vec<f32>| {
            let mut index = HeadIndex::default();
            let pages = keys.chunks_exact(page).cycle().take(tokens / PAGE_TOKENS);
            pages.for_each(|page| {
                index.push(page, D);
                index.push_codes(page, &rotation);
            });
            let place = |mark: usize| mark * SPAN * D % (keys.len() / page * page);
            let keys_of = |mark: usize| Some(keys[place(mark)..][..SPAN * D].to_vec());
            index.name_outliers(&index.least_agreeing(usize::MAX), D, keys_of);
            let planes = Planes::new(D);
            let coarse = [LandmarkScan::TwoLevel, LandmarkScan::SignHash];
            coarse.iter().for_each(|scan| index.prepare(*scan, &planes, D));
            index
        };
        heads.iter().map(head).collect()
    }
}

/// Queries of one layer, as a choice has them: a window of 1,024 behind the keys, scaled.
fn queries(path: &Path, layer: usize) -> Vec<Queries> {
    let bytes = std::fs::read(path).unwrap();
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut numbers: Vec<f32> = numbers.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let angle = |i: usize| 1024.0 * BASE.powf(-2.0 * i as f64 / D as f64);
    let cos: Vec<f32> = (0..D / 2).map(|i| angle(i).cos() as f32).collect();
    let sin: Vec<f32> = (0..D / 2).map(|i| angle(i).sin() as f32).collect();
    for row in numbers.chunks_exact_mut(D) {
        rows::rotate_row(row, &cos, &sin);
        row.iter_mut().for_each(|x| *x /= (D as f32).sqrt());
    }
    let own = &numbers[layer * numbers.len() / LAYERS.len()..][..numbers.len() / LAYERS.len()];
    let tokens = own.chunks_exact(NUM_KV_HEADS * GROUP * D).step_by(QUERIES / ASKED);
    let queries = tokens.map(|token| {
        let heads = token.chunks_exact(GROUP * D).map(<[f32]>::to_vec).collect();
        Queries { heads, count: 1, group: GROUP, d: D }
    });
    queries.collect()
}

/// Marks to take for a choice of `budget` tokens.
fn wanted(scan: LandmarkScan, budget: usize) -> usize {
    match scan {
        LandmarkScan::KeyCodes => OVER_FETCH_BY_CODES * budget,
        _ => OVER_FETCH * budget / SPAN,
    }
}

fn take(heads: &[HeadIndex], budget: usize, scan: LandmarkScan, queries: &Queries) -> Vec<Taken> {
    let (planes, rotation) = (Planes::new(D), Rotation::new(D));
    let (pages, rotation) = (heads[0].len(), Some(&rotation));
    let wanted = wanted(scan, budget);
    Scan::plain(heads, (pages, wanted), &planes, rotation).take(
        scan,
        queries,
        &mut Ballot::default(),
    )
}

/// Each query head's attention to every token, (GROUP, tokens).
fn attention(query: &[f32], keys: &[f32]) -> Vec<f32> {
    let count = keys.len() / D;
    let mut weights = vec![0f32; GROUP * count];
    rows::score_rows(query, keys, D, &mut weights, count);
    for weights in weights.chunks_exact_mut(count) {
        let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum = rows::exponentiate(weights, max);
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    weights
}

/// The `budget` tokens of most votes among those of `marks`, ascending: what the exact scores leave.
fn chosen(taken: &Taken, span: usize, weights: &[f32], budget: usize) -> Vec<u32> {
    let (count, span) = (weights.len() / GROUP, span as u32);
    let tokens: Vec<u32> =
        taken.marks.iter().flat_map(|(mark, _)| mark * span..(mark + 1) * span).collect();
    let mut votes = vec![0f32; tokens.len()];
    for weights in weights.chunks_exact(count) {
        let all: f32 = tokens.iter().map(|token| weights[*token as usize]).sum();
        let own = tokens.iter().map(|token| weights[*token as usize] / all);
        votes.iter_mut().zip(own).for_each(|(vote, own)| *vote += own);
    }
    rows::largest(&votes, budget).iter().map(|i| tokens[*i as usize]).collect()
}

/// The attention that `tokens` hold, the mean over a group's heads.
fn held(weights: &[f32], tokens: &[u32]) -> f32 {
    let of = |weights: &[f32]| tokens.iter().map(|token| weights[*token as usize]).sum::<f32>();
    weights.chunks_exact(weights.len() / GROUP).map(of).sum::<f32>() / GROUP as f32
}

/// The share of `b` (ascending) that is in `a`.
fn common(a: &[u32], b: &[u32]) -> f32 {
    let both = a.iter().filter(|x| b.binary_search(x).is_ok()).count();
    both as f32 / b.len() as f32
}

/// First keys of the landmarks that were taken or, of keys, whose keys were.
fn marks(taken: &Taken, span: usize) -> Vec<u32> {
    let mut marks: Vec<u32> =
        taken.marks.iter().map(|(mark, _)| mark * span as u32 / SPAN as u32).collect();
    marks.dedup();
    marks
}

/// What each scan finds of what the flat one does, by layer.
fn compare(keys: &Keys, asked: &Path) {
    let tokens = keys.0[0].len() / D / PAGE_TOKENS * PAGE_TOKENS;
    let taken = tokens / SPAN / MARKS_FOR_ONE;
    let budget = taken * SPAN / OVER_FETCH;
    println!("{tokens} tokens, {taken} landmarks taken, {budget} tokens recalled");
    println!("| scan | layer | landmarks | tokens | attention held | of the flat scan's | least |");
    let mut means = [[0f32; 4]; SCANS.len()];
    for (layer, name) in LAYERS.iter().enumerate() {
        let heads = keys.index(layer, tokens);
        let mut sums = [[0f32; 4]; SCANS.len()];
        let mut least = [f32::INFINITY; SCANS.len()];
        let mut best = 0.0;
        let queries = queries(asked, layer);
        let cases = (queries.len() * NUM_KV_HEADS) as f32;
        for query in &queries {
            let taken = SCANS.map(|scan| take(&heads, budget, scan, query));
            for head in 0..NUM_KV_HEADS {
                let own = &keys.0[layer * NUM_KV_HEADS + head][..tokens * D];
                let weights = attention(&query.heads[head], own);
                let mut votes = vec![0f32; tokens];
                for weights in weights.chunks_exact(tokens) {
                    votes.iter_mut().zip(weights).for_each(|(vote, weight)| *vote += weight);
                }
                best += held(&weights, &rows::largest(&votes, budget)) / cases;
                let flat = chosen(&taken[0][head], SPAN, &weights, budget);
                let (flat_marks, flat_held) = (marks(&taken[0][head], SPAN), held(&weights, &flat));
                for (scan, taken) in taken.iter().enumerate() {
                    let span = span_of(SCANS[scan]);
                    let tokens = chosen(&taken[head], span, &weights, budget);
                    let own = held(&weights, &tokens);
                    least[scan] = least[scan].min(own / flat_held);
                    let found = common(&marks(&taken[head], span), &flat_marks);
                    let numbers = [found, common(&tokens, &flat), own, own / flat_held];
                    sums[scan].iter_mut().zip(numbers).for_each(|(sum, x)| *sum += x / cases);
                }
            }
        }
        for (scan, (sums, least)) in sums.iter().zip(least).enumerate() {
            let [marks, tokens, held, share] = sums;
            let name = format!("{:?} | {name}", SCANS[scan]);
            println!("| {name} | {marks:.3} | {tokens:.3} | {held:.3} | {share:.3} | {least:.2} |");
            let all = means[scan].iter_mut().zip(sums);
            all.for_each(|(mean, sum)| *mean += sum / LAYERS.len() as f32);
        }
        println!("| the tokens of most attention | {name} | | | {best:.3} | | |");
    }
    for (scan, [marks, tokens, held, share]) in SCANS.iter().zip(means) {
        println!("| {scan:?} | all | {marks:.3} | {tokens:.3} | {held:.3} | {share:.3} | |");
    }
}

/// How long each scan takes for one layer's query against the flat one, the shortest of several turns of each.
fn time(keys: &Keys, asked: &Path, tokens: usize) {
    let heads = keys.index(2, tokens);
    let queries = queries(asked, 2);
    let (planes, rotation) = (Planes::new(D), Rotation::new(D));
    let mut shortest = [Duration::MAX; SCANS.len()];
    let mut ballot = Ballot::default();
    for turn in 0..6 {
        for (scan, shortest) in SCANS.iter().zip(&mut shortest) {
            let (pages, wanted) = (heads[0].len(), wanted(*scan, 2048));
            let (planes, rotation) = (&planes, Some(&rotation));
            let scanned = Scan::plain(&heads, (pages, wanted), planes, rotation);
            let started = Instant::now();
            queries[turn..turn + 4].iter().for_each(|query| {
                std::hint::black_box(scanned.take(*scan, query, &mut ballot));
            });
            *shortest = (*shortest).min(started.elapsed() / 4);
        }
    }
    let flat = shortest[0].as_secs_f64();
    for (scan, took) in SCANS.iter().zip(shortest) {
        let ratio = flat / took.as_secs_f64();
        println!("| {tokens} tokens | {scan:?} | {took:?} a layer | {ratio:.2} times as fast |");
    }
}

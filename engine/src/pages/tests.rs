//! Recall inside attention against dense attention, against itself however the stream is cut, and within its budget.

mod layers;
mod mirror;

use super::device::choice::Request;
use super::store::WAITING_PART;
use super::{
    LandmarkScan, PageConfig, PagePrecision, PageRule, PageShape, PageSource, PageStore, Prefill,
    RecallScope, Together,
};
use crate::attention::AttentionSeam;
use crate::cache::{Cache, CacheShape};
use crate::models::config::DecoderConfig;
use crate::models::decoder::Decoder;
use crate::models::weights::Weights;
use candle_core::{Device, Tensor};
use mka_kernels::{Landing, PAGE_TOKENS, PagePool, PageRef};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Every family of tests/data/golden.
const FOLDERS: &[&str] = &[
    "llama3",
    "llama_yarn",
    "llama_linear",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm2",
    "fastmka",
    "phi3",
    "phi3_plain",
    "granite",
    "smollm3",
    "gemma3",
];

pub(super) fn load(name: &str) -> Decoder {
    load_on(name, &Device::Cpu)
}

fn load_on(name: &str, device: &Device) -> Decoder {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name);
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let config = DecoderConfig::from_json(&text).unwrap();
    Decoder::load(config, &Weights::open_folder(&folder).unwrap(), device).unwrap()
}

pub(super) fn config() -> PageConfig {
    PageConfig {
        tokens: 1 << 20,
        precision: PagePrecision::F32,
        first_layer: 0,
        lexical: false,
        ..PageConfig::default()
    }
}

pub(super) fn cache(decoder: &Decoder, window: usize, pages: Option<PageConfig>) -> Cache {
    cache_with(decoder, (window, 1), pages)
}

fn cache_with(
    decoder: &Decoder,
    (window, sink_pages): (usize, u64),
    pages: Option<PageConfig>,
) -> Cache {
    let shape = CacheShape { sink_pages, ..decoder.cache_shape(window, 512) };
    let mut cache = Cache::new(shape, decoder.device()).unwrap();
    if let Some(config) = pages {
        cache.keep_pages(PageStore::new(shape.pages(), config, decoder.device()));
    }
    cache
}

pub(super) fn tokens(count: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i * 31 + i * 7 + 3) % 128).collect()
}

/// Queries (count, heads, head_dim) that are the same in every run.
pub(super) fn queries(store: &PageStore, count: usize) -> Tensor {
    let (heads, d) = (2 * store.shape.num_kv_heads, store.shape.head_dim);
    let numbers = (0..count * heads * d).map(|i| (i as f32 * 0.7).sin()).collect();
    Tensor::from_vec(numbers, (count, heads, d), &Device::Cpu).unwrap()
}

/// What `count` queries ask for that choose `budget` tokens among the first `rows` pages, on the compact axis.
pub(super) fn request(layer: usize, rows: usize, budget: usize, count: usize) -> Request {
    let (before_page, compact, sliding, is_prompt) = (u64::MAX, true, false, count > 1);
    let scope = RecallScope { before_page, compact, sliding, is_prompt };
    Request { layer, rows, budget, all: false, scope }
}

/// Logits of every token, run in blocks of `blocks` in turn.
pub(super) fn run(
    decoder: &Decoder,
    cache: &mut Cache,
    tokens: &[u32],
    blocks: &[usize],
) -> Vec<Vec<f32>> {
    let hidden = run_blocks(decoder, cache, tokens, blocks);
    let logits = hidden.iter().map(|x| decoder.logits(x).unwrap().to_vec2::<f32>().unwrap());
    logits.flatten().collect()
}

/// Hidden states of every token, block by block.
pub(super) fn run_blocks(
    decoder: &Decoder,
    cache: &mut Cache,
    tokens: &[u32],
    blocks: &[usize],
) -> Vec<Tensor> {
    let mut states = Vec::new();
    let mut rest = tokens;
    for block in blocks.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let config = decoder.seam_config().over(cache);
        let count = config.block_limit(cache.position(), *block).min(rest.len());
        let (now, after) = rest.split_at(count);
        let position = cache.position();
        if let Some(pages) = cache.pages_mut() {
            pages.note_tokens(position, now);
        }
        let mut seam = AttentionSeam::open(config, cache, count).unwrap();
        let hidden = decoder.forward(now, &mut seam).unwrap();
        seam.finish();
        states.push(hidden);
        rest = after;
    }
    states
}

fn difference(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

const CUTS: &[&[usize]] = &[&[512], &[1], &[7, 1, 30], &[64], &[63, 65]];

#[test]
fn with_room_for_every_token_recall_equals_dense_attention_on_every_family() {
    for name in FOLDERS {
        let decoder = load(name);
        let trained = decoder.config.trained_tokens;
        let tokens = tokens(trained as u32 - 3);
        let dense = run(&decoder, &mut cache(&decoder, trained, None), &tokens, &[512]);
        let windowed = run(&decoder, &mut cache(&decoder, 64, None), &tokens, &[512]);
        // Where each layer has a short window of its own, that is enough; and sinks and window hold all that 125 tokens are.
        let sees_all = decoder.config.sliding_window.iter().any(Option::is_none);
        if sees_all && trained > 128 {
            assert!(difference(&dense, &windowed) > 0.01, "{name}: the window alone is not enough");
        }
        for blocks in CUTS {
            let recalled = run(&decoder, &mut cache(&decoder, 64, Some(config())), &tokens, blocks);
            let off = difference(&dense, &recalled);
            assert!(off <= 1e-4, "{name} in blocks of {blocks:?}: off by {off}");
        }
    }
}

#[test]
fn more_sinks_are_seen_by_every_token_and_stored_nowhere() {
    for name in FOLDERS {
        let decoder = load(name);
        let trained = decoder.config.trained_tokens;
        let tokens = tokens(trained as u32 - 3);
        let dense = run(&decoder, &mut cache(&decoder, trained, None), &tokens, &[512]);
        for blocks in CUTS {
            let mut own = cache_with(&decoder, (64, 3), Some(config()));
            let off = difference(&dense, &run(&decoder, &mut own, &tokens, blocks));
            assert!(off <= 1e-4, "{name} in blocks of {blocks:?}: off by {off}");
            assert!(own.pages().unwrap().order.first().is_none_or(|page| *page == 3), "{name}");
        }
    }
    // Far behind the trained length, with recall and without.
    let decoder = load("smollm2");
    let told = tokens(1400);
    let mut other = told.clone();
    other[150] += 1;
    for pages in [None, Some(PageConfig { tokens: 64, ..config() })] {
        let last = |sink_pages: u64, tokens: &[u32], blocks: &[usize]| {
            let mut own = cache_with(&decoder, (64, sink_pages), pages.clone());
            run(&decoder, &mut own, tokens, blocks).split_off(tokens.len() - 1)
        };
        let seen = last(3, &told, &[64]);
        assert!(difference(&seen, &last(3, &other, &[64])) > 1e-2);
        // What is chosen depends on the cut, and what was chosen on all that stood before.
        if pages.is_none() {
            assert!(difference(&seen, &last(3, &told, &[1])) <= 1e-3);
            assert_eq!(last(1, &told, &[64]), last(1, &other, &[64]));
        }
    }
}

#[test]
fn a_layers_own_window_hides_the_sinks_wherever_it_is_not_the_longer_one() {
    // Both of its layers see 16 tokens, or the 64 of the window, so that 600 tokens are far beyond what two of them reach.
    for (name, own) in [("phi3_plain", 16), ("mistral", 16), ("phi3_plain", 64), ("mistral", 64)] {
        let mut decoder = load(name);
        assert!(decoder.config.sliding_window.iter().all(|own| *own == Some(16)));
        decoder.config.sliding_window.fill(Some(own));
        assert!(decoder.config.trained_tokens < 600);
        let told = tokens(600);
        let mut other = told.clone();
        other[3] += 1;
        let last = |tokens: &[u32]| {
            let mut own = cache(&decoder, 64, Some(config()));
            run(&decoder, &mut own, tokens, &[64]).split_off(tokens.len() - 1)
        };
        assert_eq!(last(&told), last(&other), "{name}, {own} tokens");
    }
}

/// The default model, its weights decoded to f32 so that no rounding of an activation hides or makes a difference, and
/// the ids of some prose; None, with a line that says so, where the model is not in the cache.
fn real_model(test: &str) -> Option<(Decoder, Vec<u32>)> {
    let path = crate::hub::cache_folder().unwrap().join("models").join(crate::hub::DEFAULT_FILE);
    if !path.exists() {
        println!("{test}: skipped: {} is not there", path.display());
        return None;
    }
    let (weights, gguf) = Weights::open_gguf(&path).unwrap();
    let config = DecoderConfig::from_gguf(&gguf).unwrap();
    let decoder = Decoder::load(config, &weights.decoded(), &Device::Cpu).unwrap();
    let tokenizer = crate::tokenizer::Tokenizer::from_gguf(&gguf).unwrap();
    let tokens = tokenizer.encode(include_str!("../../docs/recall.md"), false).unwrap();
    Some((decoder, tokens))
}

/// Mean divergence of the next token's distribution in nats, and the share of equal first choices.
fn divergence(expected: &[Vec<f32>], got: &[Vec<f32>]) -> (f64, f64) {
    let logs = |row: &[f32]| -> Vec<f64> {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - max).exp()).sum();
        row.iter().map(|x| f64::from(x - max) - sum.ln()).collect()
    };
    let first = |row: &[f32]| mka_kernels::rows::largest(row, 1);
    let (mut nats, mut equal) = (0.0, 0.0);
    for (expected, got) in expected.iter().zip(got) {
        let pairs = logs(expected).into_iter().zip(logs(got));
        nats += pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        equal += f64::from(u8::from(first(expected) == first(got)));
    }
    (nats / expected.len() as f64, equal / expected.len() as f64)
}

/// One test for all that takes a real model, which is loaded once.
#[test]
fn a_real_model_recalls_exactly_with_room_for_all_and_loses_little_by_precision() {
    let Some((decoder, tokens)) = real_model("recall on a real model") else { return };
    let tokens = &tokens[..320];
    let tail = |logits: Vec<Vec<f32>>| logits[logits.len() - 64..].to_vec();
    let dense = tail(run(&decoder, &mut cache(&decoder, 320, None), tokens, &[320]));
    let recalled = |config: PageConfig| {
        tail(run(&decoder, &mut cache(&decoder, 64, Some(config)), tokens, &[200, 56, 1]))
    };
    let exact = recalled(config());
    let off = difference(&dense, &exact);
    println!("every stored token recalled, f32: logits differ by {off} at most");
    assert!(off <= 1e-4, "off by {off}");
    println!("against it, of 64 tokens: nats, share of equal first choices, largest difference");
    let measure = |name: &str, config: PageConfig| {
        let logits = recalled(config);
        let (nats, equal) = divergence(&dense, &logits);
        println!("| {name} | {nats:.6} | {equal:.3} | {:.4} |", difference(&dense, &logits));
        nats
    };
    for (precision, most) in
        [(PagePrecision::Bf16, 1e-3), (PagePrecision::Int8, 1e-2), (PagePrecision::Int4, 0.3)]
    {
        let nats = measure(&format!("{precision:?}"), PageConfig { precision, ..config() });
        assert!(nats <= most, "{precision:?}: {nats}");
    }
    let some = PageConfig { tokens: 64, first_layer: 3, compact: false, ..config() };
    measure("64 tokens", some.clone());
    measure("64 tokens and the estimation zone", PageConfig { estimate: true, ..some });
    let windowed = tail(run(&decoder, &mut cache(&decoder, 64, None), tokens, &[320]));
    let (nats, equal) = divergence(&dense, &windowed);
    println!("| window alone | {nats:.6} | {equal:.3} | {:.4} |", difference(&dense, &windowed));
    assert!(nats > 0.01, "the window alone is not enough");
}

#[test]
fn a_dense_prefill_equals_dense_attention_whatever_is_chosen_later() {
    let mut decoder = load("llama3");
    decoder.config.trained_tokens = 1 << 10;
    let tokens = tokens(700);
    let dense = run(&decoder, &mut cache(&decoder, 704, None), &tokens, &[512]);
    let config = PageConfig { tokens: 64, prefill: Prefill::Dense, first_layer: 3, ..config() };
    // The last run of a block of whole pages is of one query.
    for blocks in [&[100, 50][..], &[64], &[512]] {
        let mut cache = cache(&decoder, 64, Some(config.clone()));
        let off = difference(&dense, &run(&decoder, &mut cache, &tokens, blocks));
        assert!(off <= 1e-4, "in blocks of {blocks:?}: off by {off}");
    }
}

#[test]
fn with_room_for_every_token_the_cut_of_the_stream_changes_nothing_past_the_trained_length() {
    for name in ["qwen3", "fastmka"] {
        let decoder = load(name);
        let tokens = tokens(500);
        let mut by_cut = CUTS.iter().map(|blocks| {
            run(&decoder, &mut cache(&decoder, 128, Some(config())), &tokens, blocks)
        });
        let first = by_cut.next().unwrap();
        for other in by_cut {
            let off = difference(&first, &other);
            assert!(off <= 2e-3, "{name}: off by {off}");
        }
    }
}

#[test]
fn every_rule_recalls_its_tokens_and_streaming_is_the_window_alone() {
    let decoder = load("llama3");
    let tokens = tokens(700);
    let windowed = run(&decoder, &mut cache(&decoder, 64, None), &tokens, &[100]);
    for rule in [
        PageRule::Mka,
        PageRule::Streaming,
        PageRule::InfLlm,
        PageRule::Quest,
        PageRule::TokenSelect,
    ] {
        let config = PageConfig { rule, tokens: 128, ..config() };
        let mut recalling = cache(&decoder, 64, Some(config.clone()));
        let logits = run(&decoder, &mut recalling, &tokens, &[100, 1]);
        let again = run(&decoder, &mut cache(&decoder, 64, Some(config)), &tokens, &[100, 1]);
        assert_eq!(logits, again, "{rule:?}");
        assert!(logits.iter().flatten().all(|x| x.is_finite()), "{rule:?}");
        let off = difference(&windowed, &logits);
        match rule {
            PageRule::Streaming => assert!(off <= 1e-4, "{off}"),
            _ => assert!(off > 0.01, "{rule:?}: {off}"),
        }
    }
}

/// Positions are compact from where not every token is recalled, as those of a model that was trained up to there.
#[test]
fn compact_positions_begin_where_something_is_left_out() {
    let [mut long, mut short] = [load("llama3"), load("llama3")];
    (long.config.trained_tokens, short.config.trained_tokens) = (1 << 12, 64 + 128 + 64);
    let config = PageConfig { tokens: 128, ..config() };
    let logits = |decoder: &Decoder, compact: bool| {
        let mut cache = cache(decoder, 64, Some(PageConfig { compact, ..config.clone() }));
        run(decoder, &mut cache, &tokens(600), &[100, 1, 37])
    };
    let (exact, compact) = (logits(&long, false), logits(&long, true));
    assert_eq!(compact, logits(&short, false));
    let all = 64 + 128 + 64;
    assert!(difference(&exact[..all], &compact[..all]) < 1e-4);
    assert!(difference(&exact[all + 64..], &compact[all + 64..]) > 1e-2);
    // A model that is trained on less is not asked for more.
    short.config.trained_tokens = 200;
    assert_eq!(logits(&short, true), logits(&short, false));
}

#[test]
fn a_rewound_stream_recalls_as_if_nothing_had_followed() {
    let decoder = load("fastmka");
    for (scan, recalled, told) in [
        (LandmarkScan::Flat, 128, 500),
        (LandmarkScan::KeyCodes, 64, 1000),
        (LandmarkScan::TwoLevel, 64, 5000),
        (LandmarkScan::SignHash, 64, 5000),
    ] {
        let config = PageConfig { tokens: recalled, scan, ..config() };
        let mut cache = cache(&decoder, 128, Some(config));
        run(&decoder, &mut cache, &tokens(told), &[64]);
        cache.pages_mut().unwrap().forget_choices();
        let checkpoint = cache.checkpoint();
        let next = tokens(130);
        let first = run(&decoder, &mut cache, &next, &[40, 1]);
        let stored = cache.pages().unwrap().stored_tokens();
        assert!(cache.rewind(&checkpoint));
        assert!(cache.pages().unwrap().stored_tokens() < stored);
        assert_eq!(run(&decoder, &mut cache, &next, &[40, 1]), first, "{scan:?}");
    }
}

#[test]
fn a_stream_scanned_in_any_way_is_opened_and_forked_bit_for_bit() {
    let decoder = load("llama3");
    for (scan, told) in [
        (LandmarkScan::Flat, 1000),
        (LandmarkScan::KeyCodes, 1000),
        (LandmarkScan::TwoLevel, 5000),
        (LandmarkScan::SignHash, 5000),
    ] {
        let config = PageConfig { tokens: 64, precision: PagePrecision::Bf16, scan, ..config() };
        let elsewhere = Arc::new(Elsewhere::default());
        let mut straight = cache(&decoder, 64, Some(config.clone()));
        run(&decoder, &mut straight, &tokens(told), &[64]);
        // Whatever was looked at before, a session that is opened again finds the same.
        run(&decoder, &mut straight, &tokens(90), &[30, 1]);
        commit(&mut straight, &elsewhere);
        let mut restored = reopened(&decoder, &straight, &config, &elsewhere);
        let mut fork = straight.fork().unwrap();
        let asked = tokens(150);
        let went_on = run(&decoder, &mut straight, &asked, &[50, 1]);
        assert_eq!(run(&decoder, &mut restored, &asked, &[50, 1]), went_on, "{scan:?}");
        assert_eq!(run(&decoder, &mut fork, &asked, &[50, 1]), went_on, "{scan:?}");
        let usage = straight.pages().unwrap().usage().unwrap();
        let estimates = usage.recovered.iter().any(|share| *share > 0.0);
        assert_eq!(estimates, scan != LandmarkScan::SignHash, "{scan:?}: {usage:?}");
    }
}

#[test]
fn representatives_are_opened_as_the_queries_that_are_gone_chose_them() {
    let decoder = load("llama3");
    let rule = PageRule::InfLlm;
    let config = PageConfig { tokens: 128, rule, first_layer: 1, ..config() };
    let elsewhere = Arc::new(Elsewhere::default());
    let mut straight = cache(&decoder, 64, Some(config.clone()));
    for part in [900, 330] {
        run(&decoder, &mut straight, &tokens(part), &[64]);
        commit(&mut straight, &elsewhere);
    }
    let restored = reopened(&decoder, &straight, &config, &elsewhere);
    assert_eq!(elsewhere.num_read.load(Ordering::Relaxed), 0);
    let mut count = 0;
    for layer in 1..decoder.config.num_layers {
        for first in (1..straight.first_window_page(straight.position())).step_by(2) {
            let [was, is] = [&straight, &restored]
                .map(|cache| cache.pages().unwrap().following.as_ref().unwrap().mean(layer, first));
            assert_eq!(was, is, "layer {layer}, block of page {first}");
            count += usize::from(was.is_some_and(|mean| mean.iter().any(|x| *x != 0.0)));
        }
    }
    assert!(count > 8, "{count}");
}

#[test]
fn codes_that_were_not_written_are_made_from_the_pages_and_unneeded_ones_are_passed_over() {
    let decoder = load("llama3");
    let with = |scan| PageConfig { tokens: 64, precision: PagePrecision::Bf16, scan, ..config() };
    for (written, read) in
        [(LandmarkScan::Flat, LandmarkScan::KeyCodes), (LandmarkScan::KeyCodes, LandmarkScan::Flat)]
    {
        let elsewhere = Arc::new(Elsewhere::default());
        let mut first = cache(&decoder, 64, Some(with(written)));
        run(&decoder, &mut first, &tokens(1000), &[64]);
        commit(&mut first, &elsewhere);
        let mut expected = cache(&decoder, 64, Some(with(read)));
        expected.pages_mut().unwrap().active = false;
        run(&decoder, &mut expected, &tokens(1000), &[64]);
        let mut opened = reopened(&decoder, &first, &with(read), &elsewhere);
        let [of_opened, of_expected] = [&opened, &expected].map(|cache| {
            let pages = cache.pages().unwrap();
            let scans = pages.index.iter().flatten();
            scans.map(|head| head.key_codes_len()).collect::<Vec<_>>()
        });
        assert_eq!(of_opened, of_expected, "{written:?} {read:?}");
        assert!(
            run(&decoder, &mut opened, &tokens(30), &[30]).iter().flatten().all(|x| x.is_finite())
        );
    }
}

#[test]
fn a_forked_stream_shares_its_pages_and_goes_on_as_if_it_were_alone() {
    for (name, rule) in [("fastmka", PageRule::Mka), ("smollm2", PageRule::InfLlm)] {
        let decoder = load(name);
        let config = PageConfig { tokens: 128, rule, ..config() };
        let told = || {
            let mut cache = cache(&decoder, 128, Some(config.clone()));
            run(&decoder, &mut cache, &tokens(500), &[64]);
            cache.absorb_all().unwrap();
            cache.pages_mut().unwrap().forget_choices();
            cache
        };
        let mut cache = told();
        let mut fork = cache.fork().unwrap();
        let bytes = |cache: &Cache| -> Vec<_> {
            let pages = cache.pages().unwrap().pages.values();
            pages.map(|stored| Arc::as_ptr(stored.bytes.as_ref().unwrap())).collect()
        };
        assert!(bytes(&cache).len() > 3);
        assert_eq!(bytes(&cache), bytes(&fork), "{name}: bytes were copied");
        let (left, right) = (tokens(130), tokens(200).split_off(70));
        for (cache, next) in [(&mut cache, &left), (&mut fork, &right)] {
            let expected = run(&decoder, &mut told(), next, &[40, 1]);
            assert_eq!(run(&decoder, cache, next, &[40, 1]), expected, "{name}");
        }
    }
}

/// Pages that were sent away and their landmarks, kept in maps.
#[derive(Default)]
struct Elsewhere {
    pages: Mutex<HashMap<u64, Vec<u8>>>,
    landmarks: Mutex<HashMap<u64, Vec<u8>>>,
    num_read: AtomicUsize,
}

impl PageSource for Elsewhere {
    fn page(&self, page: u64) -> crate::Result<Option<Vec<u8>>> {
        self.num_read.fetch_add(1, Ordering::Relaxed);
        Ok(self.pages.lock().unwrap().get(&page).cloned())
    }

    fn landmarks(&self, page: u64) -> crate::Result<Option<Vec<u8>>> {
        match self.landmarks.lock().unwrap().get(&page) {
            // As the store says of bytes that do not match their checksum.
            Some(bytes) if bytes.is_empty() => {
                Err(crate::Error::new(crate::ErrorKind::Corrupted, "checksum does not match"))
            }
            other => Ok(other.cloned()),
        }
    }
}

/// Two ways of the same pages into a store: all layers at once, rounded on the device, and layer by layer, rounded on the
/// host.
#[test]
fn pages_taken_in_together_are_those_taken_in_layer_by_layer() {
    let shape =
        PageShape { num_layers: 3, num_kv_heads: 2, head_dim: 8, sink_pages: 1, window_tokens: 64 };
    let numbers = |seed: usize| -> Tensor {
        let number = |i: usize| ((i * 7919 + seed * 131) % 8191) as f32 / 1024.0 - 4.0;
        let numbers = (0..2 * PAGE_TOKENS * 8).map(number).collect();
        Tensor::from_vec(numbers, (2, PAGE_TOKENS, 8), &Device::Cpu).unwrap()
    };
    let pools: Vec<PagePool> = (0..3)
        .map(|layer| {
            let pool = PagePool::new(90, 2, 8, &Device::Cpu).unwrap();
            for slot in 0..90 {
                let [keys, raw, values] = [0, 1, 2].map(|i| numbers(3 * (90 * layer + slot) + i));
                pool.write(slot, 0, &keys, &raw, &values).unwrap();
            }
            pool
        })
        .collect();
    let config = PageConfig { first_layer: 1, estimate: true, ..PageConfig::default() };
    let [mut together, mut apart] =
        [0, 1].map(|_| PageStore::new(shape, config.clone(), &Device::Cpu));
    // 84 pages: enough for outliers to be named, and named anew.
    for (first, slots) in [(1, vec![5, 6, 8, 2]), (5, (3..83).collect())] {
        let pages = first..first + slots.len() as u64;
        let mut landing = Landing::default();
        let numbers = PagePool::download::<half::bf16>(&pools, &slots, &mut landing).unwrap();
        together.absorb(0..3, pages.clone(), &numbers);
        for layer in 0..3 {
            let (own, mut landing) = (&pools[layer..layer + 1], Landing::default());
            let numbers = PagePool::download::<f32>(own, &slots, &mut landing).unwrap();
            apart.absorb(layer..layer + 1, pages.clone(), &numbers);
        }
    }
    assert!(together.heads(1).iter().all(|head| !head.all_outliers().is_empty()));
    assert_eq!(together.fresh_landmarks(), apart.fresh_landmarks());
    let bytes = |store: &PageStore| -> Vec<(u64, Vec<u8>)> {
        store.fresh_pages().iter().map(|(page, fresh)| (*page, fresh.to_new().to_vec())).collect()
    };
    assert_eq!(bytes(&together).len(), 84);
    assert!(bytes(&together) == bytes(&apart));
    // A commit that failed gave the disk nothing.
    let given = together.hand_over();
    assert!(together.fresh_pages().is_empty() && together.fresh_bytes() == 0);
    together.not_handed_over(&given);
    assert!(bytes(&together) == bytes(&apart));
    assert_eq!(together.fresh_landmarks(), apart.fresh_landmarks());
}

/// Hands fresh pages to `elsewhere`, as a commit does.
fn commit(cache: &mut Cache, elsewhere: &Elsewhere) {
    cache.absorb_all().unwrap();
    let pages = cache.pages_mut().unwrap();
    let sorted = |held: &HashMap<u64, Vec<u8>>| {
        let mut keys: Vec<u64> = held.keys().copied().collect();
        keys.sort_unstable();
        keys
    };
    let mut landmarks = elsewhere.landmarks.lock().unwrap();
    landmarks.extend(pages.fresh_landmarks());
    let mut held = elsewhere.pages.lock().unwrap();
    held.extend(
        pages.fresh_pages().into_iter().map(|(page, fresh)| (page, fresh.to_new().to_vec())),
    );
    pages.hand_over();
    pages.set_durable(&sorted(&held), &sorted(&landmarks));
    assert!(pages.fresh_landmarks().is_empty());
    pages.forget_choices();
}

/// A session that stands where `straight` does, as it is opened again.
fn reopened(
    decoder: &Decoder,
    straight: &Cache,
    config: &PageConfig,
    elsewhere: &Arc<Elsewhere>,
) -> Cache {
    let position = straight.position();
    let window = straight.first_window_page(position);
    let noted = straight.pages().unwrap().noted_tokens(window, position);
    let pages = straight.page_bytes(&straight.window_pages(position)).unwrap();
    let ema = straight.ema_bytes().unwrap();
    let angles = |positions| decoder.frequencies.angles(positions);
    let restored = Cache::new(decoder.cache_shape(64, 512), &Device::Cpu).unwrap();
    let mut restored = restored.restored(position, &ema, &pages, angles).unwrap();
    let shape = decoder.cache_shape(64, 512).pages();
    restored.keep_pages(PageStore::new(shape, config.clone(), &Device::Cpu));
    let mut stored: Vec<u64> = elsewhere.pages.lock().unwrap().keys().copied().collect();
    stored.sort_unstable();
    let store = restored.pages_mut().unwrap();
    store.set_source(elsewhere.clone());
    elsewhere.num_read.store(0, Ordering::Relaxed);
    store.restore(&stored, window, &noted);
    restored
}

#[test]
fn a_restored_store_recalls_bit_for_bit_by_its_landmarks_and_without_them() {
    let decoder = load("llama3");
    // Among 3,000 tokens there are outliers.
    for (precision, told) in [
        (PagePrecision::F32, 600),
        (PagePrecision::Bf16, 3000),
        (PagePrecision::Int8, 600),
        (PagePrecision::Int4, 600),
    ] {
        let (told, asked) = (tokens(told), tokens(300));
        let config = PageConfig { tokens: 128, precision, ..config() };
        let elsewhere = Arc::new(Elsewhere::default());
        let mut straight = cache(&decoder, 64, Some(config.clone()));
        for part in told.chunks(150) {
            run(&decoder, &mut straight, part, &[64]);
            commit(&mut straight, &elsewhere);
        }
        let num_pages = elsewhere.pages.lock().unwrap().len();
        let whole = elsewhere.landmarks.lock().unwrap().clone();
        assert_eq!(whole.len(), num_pages);
        let some = |page: u64| whole.iter().filter(move |(other, _)| **other != page);
        let cut = |len: usize| {
            let mut cut = whole.clone();
            cut.get_mut(&5).unwrap().truncate(len);
            cut
        };
        // Whole; of a store that had none yet; the last one, which may have outliers' keys, lost; one damaged, and one cut.
        let last = whole.keys().copied().max().unwrap();
        let stores = [
            (whole.clone(), 0),
            (HashMap::new(), num_pages),
            (some(last).map(|(page, bytes)| (*page, bytes.clone())).collect(), 1),
            (cut(0), 1),
            (cut(100), 1),
        ];
        let mut restored: Vec<Cache> = Vec::new();
        for (landmarks, num_missing) in stores {
            *elsewhere.landmarks.lock().unwrap() = landmarks;
            let cache = reopened(&decoder, &straight, &config, &elsewhere);
            let num_read = elsewhere.num_read.load(Ordering::Relaxed);
            let store = cache.pages().unwrap();
            match num_missing {
                0 => assert_eq!(num_read, 0, "{precision:?}"),
                // Outliers whose keys were lost with a record have their pages read, too.
                _ => assert!(num_read >= num_missing, "{precision:?}: {num_read} pages read"),
            }
            let remade = store.fresh_landmarks();
            assert_eq!(remade.len(), num_missing, "{precision:?}");
            for (page, bytes) in remade {
                // Behind the landmarks come outliers, which another record may hold.
                let len = whole[&page].len().min(bytes.len()) / 2;
                assert_eq!(bytes[..len], whole[&page][..len], "{precision:?}");
            }
            restored.push(cache);
        }
        let outliers = straight.pages().unwrap().heads(1)[0].all_outliers().to_vec();
        assert_eq!(outliers.is_empty(), told.len() < 3000);
        let went_on = run(&decoder, &mut straight, &asked, &[50, 1]);
        for mut restored in restored {
            assert_eq!(restored.pages().unwrap().heads(1)[0].all_outliers(), outliers);
            assert_eq!(run(&decoder, &mut restored, &asked, &[50, 1]), went_on, "{precision:?}");
        }
    }
}

#[test]
fn a_page_that_was_sent_away_comes_back_as_it_was() {
    let decoder = load("llama3");
    let roomy = PageConfig { tokens: 64, precision: PagePrecision::Int8, ..config() };
    let page = cache(&decoder, 64, Some(roomy.clone())).pages().unwrap().page_bytes() as u64;
    // Room for the index of all pages and for a third of them.
    let tight = PageConfig { bytes: page * 6, ..roomy.clone() };
    let [roomy, mut tight] = [roomy, tight].map(|config| {
        let elsewhere = Arc::new(Elsewhere::default());
        let mut cache = cache(&decoder, 64, Some(config));
        let pages = cache.pages_mut().unwrap();
        pages.set_source(elsewhere.clone());
        // What is recalled depends on what there is room for; the pages of one attention are compared.
        pages.active = false;
        for part in tokens(900).chunks(64) {
            run(&decoder, &mut cache, part, &[64]);
            commit(&mut cache, &elsewhere);
        }
        cache
    });
    let (roomy, tight) = (roomy.pages().unwrap(), tight.pages_mut().unwrap());
    assert_eq!((roomy.order.len(), tight.order.len()), (12, 12));
    for row in 0..12 {
        tight.bring(&[row]);
        let rows = |store: &super::PageStore| {
            let mut rows = vec![0f32; 64 * store.shape.head_dim];
            assert!(store.read_rows(store.order[row], 1, 0, 1, 0, &mut rows));
            rows
        };
        assert_eq!(rows(roomy), rows(tight), "row {row}");
        assert!(tight.bytes_with(0, 0) <= page * 6);
    }
    // The most wanted first, each once, also in the place of what is there and wanted less.
    let all = || (0..12).rev().flat_map(|row| [row, row]);
    for wanted in [all().collect::<Vec<_>>(), all().rev().collect()] {
        tight.bring(&wanted);
        let held = |row: &usize| tight.pages[&tight.order[*row]].bytes.is_some();
        let there: Vec<usize> = wanted.iter().copied().step_by(2).filter(held).collect();
        assert!((1..12).contains(&there.len()), "{there:?}");
        assert!(wanted.iter().step_by(2).take(there.len()).eq(&there), "{there:?} of {wanted:?}");
        assert_eq!(tight.resident_bytes, there.len() as u64 * page);
    }
}

#[test]
fn pages_that_wait_for_the_disk_push_out_no_landmarks_of_an_index_within_its_share() {
    let decoder = load("llama3");
    let roomy = PageConfig { tokens: 64, ..config() };
    let page = cache(&decoder, 64, Some(roomy.clone())).pages().unwrap().page_bytes() as u64;
    // The landmarks of nine pages take as much as one page.
    let budget = 10 * page;
    let mut cache = cache(&decoder, 64, Some(PageConfig { bytes: budget, ..roomy }));
    let elsewhere = Arc::new(Elsewhere::default());
    let pages = cache.pages_mut().unwrap();
    pages.set_source(elsewhere.clone());
    pages.active = false;
    let mut feed = |count: u32, is_committed: bool| {
        for part in tokens(count).chunks(64) {
            run(&decoder, &mut cache, part, &[64]);
            if is_committed {
                commit(&mut cache, &elsewhere);
            }
        }
        cache.absorb_all().unwrap();
        let pages = cache.pages().unwrap();
        assert!(pages.bytes_with(0, 0) <= budget);
        assert!(pages.index_bytes(pages.order.len()) <= budget - budget / WAITING_PART);
        assert_eq!(pages.heads(1)[0].len(), pages.order.len());
        let newest = cache.first_window_page(cache.position()) - 1;
        (pages.order.clone(), pages.is_short_of_room(), newest)
    };
    let (told, is_short, _) = feed(900, true);
    assert!(told.len() == 12 && !is_short, "{told:?}");
    // Far more than there is room for until the next commit: what comes last is lost.
    let (burst, is_short, newest) = feed(1300, false);
    assert_eq!(burst[..told.len()], told);
    assert!(is_short && burst.len() > told.len() && !burst.contains(&newest), "{burst:?}");
    // The stream goes on, and once the index is over its share the oldest go.
    let (long, is_short, newest) = feed(5000, true);
    assert!(long[0] > burst[0] && long.last() == Some(&newest) && !is_short, "{long:?}");
    assert!(long.len() > 40, "{long:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn the_budget_is_never_exceeded(
        pages in 0u64..12,
        extra in 0u64..4000,
        parts in prop::collection::vec((1usize..200, any::<bool>()), 1..6),
    ) {
        let decoder = load("smollm2");
        let page = cache(&decoder, 64, Some(config())).pages().unwrap().page_bytes() as u64;
        let bytes = pages * page + extra;
        let mut cache = cache(&decoder, 64, Some(PageConfig { tokens: 64, bytes, ..config() }));
        let elsewhere = Arc::new(Elsewhere::default());
        cache.pages_mut().unwrap().set_source(elsewhere.clone());
        for (count, is_committed) in parts {
            let checkpoint = cache.checkpoint();
            run(&decoder, &mut cache, &tokens(count as u32), &[100]);
            prop_assert!(cache.pages().unwrap().bytes_with(0, 0) <= bytes);
            match is_committed {
                true => commit(&mut cache, &elsewhere),
                false => { cache.rewind(&checkpoint); }
            }
            prop_assert!(cache.pages().unwrap().bytes_with(0, 0) <= bytes);
        }
        // A fork counts what it shares as its own.
        let mut fork = cache.fork().unwrap();
        run(&decoder, &mut fork, &tokens(150), &[100]);
        prop_assert!(fork.pages().unwrap().bytes_with(0, 0) <= bytes);
    }
}

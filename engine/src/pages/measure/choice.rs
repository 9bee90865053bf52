//! Times a decoded token's choice by codes of keys on the processor, part by part; opt-in, by `MKA_CHOICE_TOKENS`, the
//! number of stored tokens.
//! Knows the store and its scan, no model; keys, values and queries are made up.

use crate::models::frequencies::{Frequencies, LayerFrequencies, RopeScaling};
use crate::pages::device::choice::Request;
use crate::pages::gather::RecallScope;
use crate::pages::scan::Scan;
use crate::pages::selection::{OVER_FETCH_BY_CODES, POOLED};
use crate::pages::store::{PageShape, PageStore};
use crate::pages::vote::{Ballot, vote_by_scores};
use crate::pages::{LandmarkScan, PageConfig};
use candle_core::{Device, Tensor};
use mka_kernels::key_codes::CodeScorer;
use mka_kernels::{PAGE_TOKENS, rows};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::{Duration, Instant};

/// The default model's, but for layers: three that choose nothing, and one that does.
const SHAPE: PageShape =
    PageShape { num_layers: 4, num_kv_heads: 3, head_dim: 64, sink_pages: 1, window_tokens: 2048 };
const GROUP: usize = 3;
const TURNS: usize = 24;

/// A store of `pages` pages: keys have a part in common, as a model's do, and noise.
fn store(pages: u64) -> PageStore {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let config = PageConfig { bytes: 32 << 30, ..PageConfig::default() };
    let mut store = PageStore::new(SHAPE, config, &Device::Cpu);
    let count = SHAPE.num_layers * 2 * SHAPE.num_kv_heads * PAGE_TOKENS * SHAPE.head_dim;
    let mut numbers: Vec<f32> = (0..count + 997)
        .map(|i| (i % SHAPE.head_dim) as f32 / 32.0 - 1.0 + rng.random_range(-1.5f32..1.5))
        .collect();
    for page in 1..=pages {
        numbers.rotate_left(SHAPE.head_dim * (page as usize % 13) + 1);
        store.absorb(0..SHAPE.num_layers, page..page + 1, &numbers[..count]);
    }
    let frequencies = Frequencies::new(1e5, SHAPE.head_dim, &RopeScaling::None);
    let frequencies = LayerFrequencies::uniform(frequencies, SHAPE.num_layers);
    store.need_angles(8192, |positions| frequencies.angles(positions));
    store
}

/// The shortest of a part's turns.
struct Part(&'static str, Duration);

fn shortest(part: &'static str, mut work: impl FnMut(usize)) -> Part {
    let turn = |turn| {
        let started = Instant::now();
        work(turn);
        started.elapsed()
    };
    Part(part, (0..TURNS).map(turn).min().unwrap())
}

#[test]
fn a_choice_by_codes_part_by_part() {
    let Some(tokens) = std::env::var("MKA_CHOICE_TOKENS").ok().and_then(|n| n.parse().ok()) else {
        return;
    };
    let tokens: usize = tokens;
    let (pages, layer, d) = (tokens / PAGE_TOKENS, SHAPE.num_layers - 1, SHAPE.head_dim);
    let mut store = store(pages as u64);
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let asked: Vec<Tensor> = (0..TURNS)
        .map(|_| {
            let count = SHAPE.num_kv_heads * GROUP * d;
            let q = (0..count).map(|_| rng.random_range(-3f32..3.0)).collect();
            Tensor::from_vec(q, (1, SHAPE.num_kv_heads * GROUP, d), &Device::Cpu).unwrap()
        })
        .collect();
    let queries: Vec<_> = asked.iter().map(|q| store.queries(layer, q, POOLED).unwrap()).collect();
    let budget = store.config.tokens;
    let (before_page, compact, sliding, is_prompt) = (u64::MAX, true, false, false);
    let scope = RecallScope { before_page, compact, sliding, is_prompt };
    let request = Request { layer, rows: pages, budget, all: false, scope };
    let mut parts = Vec::new();
    {
        let rotation = store.rotation.as_ref().unwrap();
        let (heads, planes) = (&store.index[layer][..], &store.planes);
        let wanted = OVER_FETCH_BY_CODES * budget;
        let tables = |turn: usize| -> Vec<CodeScorer> {
            let own = queries[turn].heads.iter();
            own.map(|own| CodeScorer::new(&rotation.turned(own), d)).collect()
        };
        let mut ballot = Ballot::default();
        let every = vec![tokens; SHAPE.num_kv_heads];
        parts.push(shortest("tables", |turn| drop(std::hint::black_box(tables(turn)))));
        let mut scores = vec![0f32; GROUP * 512];
        parts.push(shortest("scores, one thread", |turn| {
            for (head, table) in tables(turn).iter().enumerate() {
                for first in (0..pages).step_by(8) {
                    let codes = heads[head].key_codes(first, 8.min(pages - first), d);
                    table.score(&queries[turn].heads[head], codes, &mut scores, 512);
                }
            }
        }));
        parts.push(shortest("scores and votes", |turn| {
            let tables = tables(turn);
            let votes = vote_by_scores(&queries[turn], &every, &mut ballot, |scored, _| {
                let (first, count) = (scored.first / PAGE_TOKENS, scored.len / PAGE_TOKENS);
                let codes = heads[scored.head].key_codes(first, count, d);
                tables[scored.head].score(scored.queries, codes, scored.scores, scored.len);
            });
            std::hint::black_box(votes[0].rows.len());
        }));
        let mut votes: Vec<f32> = (0..tokens).map(|_| rng.random_range(0f32..1.0)).collect();
        votes.iter_mut().for_each(|vote| *vote = vote.powi(8));
        parts.push(shortest("selection of one head, one thread", |_| {
            std::hint::black_box(rows::largest(&votes, wanted));
        }));
        parts.push(shortest("scan", |turn| {
            let rotation = Some(rotation);
            let scan = Scan::plain(heads, (pages, wanted), planes, rotation);
            let taken = scan.take(LandmarkScan::KeyCodes, &queries[turn], &mut ballot);
            drop(std::hint::black_box(taken));
        }));
    }
    parts.push(shortest("scan and exact scores", |turn| {
        drop(std::hint::black_box(store.select(&asked[turn], request).unwrap()));
    }));
    parts.push(shortest("all, with the copy", |turn| {
        store.forget_choices();
        assert!(store.recall(layer, &asked[turn], scope).unwrap().is_some());
    }));
    for Part(part, took) in parts {
        println!("| {tokens} tokens | {part} | {:.3} ms a layer |", took.as_secs_f64() * 1e3);
    }
}

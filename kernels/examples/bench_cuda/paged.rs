//! Attention over pages: decode against the copy's rate and in µs, prefill against the matrix product, selection, gather.

use crate::timing::Bench;
use candle_core::{DType, Result, Tensor};
use mka_kernels::{
    AttentionParams, PAGE_TOKENS, PageRef, gather_pages, paged_attention, score_landmarks, top_k,
};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Query heads, key/value heads, head dimension.
type Heads = (usize, usize, usize);

struct Problem {
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    params: AttentionParams,
}

impl Problem {
    /// `t` queries at the end of a stream of `tokens`, its pages in random slots.
    fn new(bench: &Bench, t: usize, (h, g, d): Heads, tokens: usize, dtype: DType) -> Result<Self> {
        let pages = tokens.div_ceil(PAGE_TOKENS);
        let device = bench.device();
        // Written in parts: random f32 of a large pool at once would take twice its room.
        let pool = || -> Result<Tensor> {
            let pool = Tensor::zeros((pages, g, PAGE_TOKENS, d), dtype, device)?;
            for first in (0..pages).step_by(256) {
                let count = (pages - first).min(256);
                let part = Tensor::randn(0f32, 1.0, (count, g, PAGE_TOKENS, d), device)?;
                pool.slice_set(&part.to_dtype(dtype)?, 0, first)?;
            }
            Ok(pool)
        };
        let mut slots: Vec<usize> = (0..pages).collect();
        slots.shuffle(&mut ChaCha8Rng::seed_from_u64(1));
        let pages = slots
            .into_iter()
            .enumerate()
            .map(|(i, slot)| PageRef {
                slot,
                start: (i * PAGE_TOKENS) as u64,
                len: (tokens - i * PAGE_TOKENS).min(PAGE_TOKENS),
                bias: 0.0,
            })
            .collect();
        Ok(Self {
            q: Tensor::randn(0f32, 1.0, (t, h, d), device)?.to_dtype(dtype)?,
            keys: pool()?,
            values: pool()?,
            params: AttentionParams {
                scale: 1.0 / (d as f32).sqrt(),
                query_start: (tokens - t) as u64,
                pages,
                window_tokens: None,
                sliding_window: None,
            },
        })
    }

    fn seconds(&self, bench: &Bench) -> Result<f64> {
        bench.median(|| paged_attention(&self.q, &self.keys, &self.values, &self.params).map(drop))
    }
}

/// Decode of one token: bytes of K and V against the copy, then the latency at 4K keys.
pub(crate) fn decode(bench: &Bench) -> Result<()> {
    println!(
        "| heads | type | K+V MB | tokens | µs | GB/s | of copy |\n|---|---|---|---|---|---|---|"
    );
    for heads in [(32, 8, 128), (32, 8, 64)] {
        for megabytes in [16, 128, 512] {
            decode_row(bench, heads, DType::BF16, megabytes << 20)?;
        }
    }
    decode_row(bench, (32, 8, 128), DType::F32, 128 << 20)?;
    println!("\n| heads | type | keys | µs |\n|---|---|---|---|");
    for (h, g, d) in [(32, 8, 128), (9, 3, 64)] {
        for dtype in [DType::BF16, DType::F32] {
            for tokens in [1024, 4096, 65_536] {
                let problem = Problem::new(bench, 1, (h, g, d), tokens, dtype)?;
                let seconds = problem.seconds(bench)?;
                println!("| {h}/{g} x {d} | {dtype:?} | {tokens} | {:.1} |", seconds * 1e6);
            }
        }
    }
    Ok(())
}

fn decode_row(bench: &Bench, (h, g, d): Heads, dtype: DType, bytes: usize) -> Result<()> {
    let tokens = bytes / (2 * g * d * dtype.size_in_bytes());
    let problem = Problem::new(bench, 1, (h, g, d), tokens, dtype)?;
    let row = bench.memory_row(problem.seconds(bench)?, bytes);
    println!("| {h}/{g} x {d} | {dtype:?} | {} | {tokens} | {row}", bytes >> 20);
    Ok(())
}

/// 2,048 new tokens over 8,192 in pages, themselves included.
pub(crate) fn prefill(bench: &Bench) -> Result<()> {
    println!("| heads | type | µs | TFLOP/s | of product |\n|---|---|---|---|---|");
    let (t, tokens) = (2048usize, 8192usize);
    for (h, g, d) in [(32, 8, 128), (32, 8, 64), (9, 3, 64), (8, 2, 256)] {
        for dtype in [DType::BF16, DType::F32] {
            let problem = Problem::new(bench, t, (h, g, d), tokens, dtype)?;
            let pairs = (t * (tokens - t) + t * (t + 1) / 2) as f64;
            let flops = 4.0 * pairs * (h * d) as f64;
            let row = bench.compute_row(problem.seconds(bench)?, flops);
            println!("| {h}/{g} x {d} | {dtype:?} | {row}");
        }
    }
    Ok(())
}

/// Votes over n landmarks and the 2,048 best of them, as one decoded token asks; then the gather of pages.
pub(crate) fn select(bench: &Bench) -> Result<()> {
    println!("| landmarks | heads | score µs | top-k µs | both µs |\n|---|---|---|---|---|");
    let (h, g, d) = (32, 8, 128);
    let k = 2048;
    for n in [16_384, 131_072] {
        let device = bench.device();
        let marks = Tensor::randn(0f32, 1.0, (n, g, d), device)?.to_dtype(DType::BF16)?;
        let q = Tensor::randn(0f32, 1.0, (1, h, d), device)?.to_dtype(DType::BF16)?;
        let scale = 1.0 / (d as f32).sqrt();
        let votes = score_landmarks(&q, &marks, scale)?;
        let score = bench.median(|| score_landmarks(&q, &marks, scale).map(drop))?;
        let best = bench.median(|| top_k(&votes, k).map(drop))?;
        let both = bench.median(|| top_k(&score_landmarks(&q, &marks, scale)?, k).map(drop))?;
        println!(
            "| {n} | {h}/{g} x {d} | {:.1} | {:.1} | {:.1} |",
            score * 1e6,
            best * 1e6,
            both * 1e6
        );
    }
    println!("\n| gathered pages | of | type | µs | GB/s | of copy |\n|---|---|---|---|---|---|");
    for count in [16, 512] {
        let slots = 1024;
        let pool = Tensor::zeros((slots, g, PAGE_TOKENS, d), DType::BF16, bench.device())?;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let list: Vec<u32> = (0..count).map(|_| rng.random_range(0..slots as u32)).collect();
        let seconds = bench.median(|| gather_pages(&pool, &list).map(drop))?;
        let bytes = 2 * count * g * PAGE_TOKENS * d * 2;
        println!("| {count} | {g} x 64 x {d} | BF16 | {}", bench.memory_row(seconds, bytes));
    }
    Ok(())
}

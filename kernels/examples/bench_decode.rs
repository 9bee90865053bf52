//! Times what a decoded token attends to on the processor, beside a read of as many bytes in the same run: window, sinks and
//! recalled tokens of the default model, one part after the other and at once, recalled keys in f32 and in f16.
//! Knows the public API only; keys and values are synthetic. `RAYON_NUM_THREADS` threads; see `evals/docs/recall.md`.

use candle_core::{DType, Device, Result, Tensor};
use mka_kernels::{
    AttentionParams, AttentionPart, PAGE_TOKENS, PageRef, paged_attention, paged_attention_union,
};
use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Layers that recall, query heads, key/value heads, head_dim.
const MODEL: (usize, usize, usize, usize) = (27, 9, 3, 64);
/// Pages of the window and of what is recalled.
const WINDOW: usize = 33;
const RECALLED: usize = 32;
const TURNS: usize = 40;

fn params(pages: usize) -> AttentionParams {
    let start = |slot: usize| (slot * PAGE_TOKENS) as u64;
    let page = |slot| PageRef { slot, start: start(slot), len: PAGE_TOKENS, bias: 0.0 };
    AttentionParams {
        scale: 0.125,
        query_start: 1 << 20,
        pages: (0..pages).map(page).collect(),
        ..AttentionParams::default()
    }
}

/// The fastest of [`TURNS`] turns over all layers, ms: other work on the machine only adds time.
fn fastest(mut layer: impl FnMut(usize) -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..TURNS {
        let started = Instant::now();
        (0..MODEL.0).try_for_each(&mut layer)?;
        best = best.min(started.elapsed().as_secs_f64() * 1e3);
    }
    Ok(best)
}

fn main() -> Result<()> {
    let (layers, heads, kv_heads, d) = MODEL;
    let pool =
        |pages: usize| Tensor::randn(0f32, 1.0, (pages, kv_heads, PAGE_TOKENS, d), &Device::Cpu);
    let pools = |pages: usize, keys: DType, values: DType| -> Result<Vec<(Tensor, Tensor)>> {
        let layer = |_| Ok((pool(pages)?.to_dtype(keys)?, pool(pages)?.to_dtype(values)?));
        (0..layers).map(layer).collect()
    };
    let window = pools(WINDOW, DType::F32, DType::F32)?;
    let [wide, short] = [DType::F32, DType::F16].map(|keys| pools(RECALLED, keys, DType::BF16));
    let (wide, short) = (wide?, short?);
    let q = Tensor::randn(0f32, 1.0, (1, heads, d), &Device::Cpu)?;
    let (near, sinks, far) = (params(WINDOW), params(1), params(RECALLED));
    let own = AttentionPart { q: &q, keys: &window[0].0, values: &window[0].1, params: &near };
    let parts = |layer: usize,
                 recalled: &[(Tensor, Tensor)],
                 of: &dyn Fn(&[AttentionPart<'_>]) -> Result<()>| {
        let ((keys, values), (far_keys, far_values)) = (&window[layer], &recalled[layer]);
        let near = AttentionPart { keys, values, ..own };
        let far = AttentionPart { keys: far_keys, values: far_values, params: &far, ..own };
        of(&[near, AttentionPart { params: &sinks, ..near }, far])
    };
    let union = |parts: &[AttentionPart<'_>]| paged_attention_union(parts, None).map(drop);
    let each = |part: &AttentionPart<'_>| {
        paged_attention(part.q, part.keys, part.values, part.params).map(drop)
    };
    let alone = fastest(|layer| parts(layer, &wide, &|parts| union(&parts[..2])))?;
    let in_turn = fastest(|layer| parts(layer, &wide, &|parts| parts.iter().try_for_each(each)))?;
    let [at_once, in_f16] =
        [&wide, &short].map(|recalled| fastest(|layer| parts(layer, recalled, &union)));
    let row = |what: &str, ms: f64, bytes: usize| -> Result<()> {
        let numbers = vec![1f32; bytes / 4 / layers];
        let copies: Vec<Vec<f32>> = (0..layers).map(|_| numbers.clone()).collect();
        let read = fastest(|layer| {
            let share = copies[layer].len().div_ceil(rayon::current_num_threads());
            let sum = |part: &[f32]| {
                let mut lanes = [0f32; 64];
                for numbers in part.as_chunks::<64>().0 {
                    lanes.iter_mut().zip(numbers).for_each(|(lane, x)| *lane += x);
                }
                lanes.iter().sum::<f32>()
            };
            black_box(copies[layer].par_chunks(share).map(sum).sum::<f32>());
            Ok(())
        })?;
        let megabytes = bytes as f64 / 1e6;
        println!(
            "| {what} | {megabytes:.0} | {ms:.2} | {:.1} | {read:.2} | {:.2} |",
            megabytes / ms,
            ms / read
        );
        Ok(())
    };
    println!("| a token, {layers} layers | MB | ms | GB/s | a read of as much, ms | ratio |");
    println!("|---|---|---|---|---|---|");
    let rows = layers * kv_heads * PAGE_TOKENS * d;
    let (of_window, of_recalled) = (rows * WINDOW * 8, rows * RECALLED * 6);
    let of_keys = rows * RECALLED * 2;
    row("window and sinks", alone, of_window)?;
    row("window, sinks, recalled: one after the other", in_turn, of_window + of_recalled)?;
    row("at once", at_once?, of_window + of_recalled)?;
    row("the same, recalled keys in f16", in_f16?, of_window + of_recalled - of_keys)
}

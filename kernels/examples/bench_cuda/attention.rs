//! Dense attention forward and backward, by FlashAttention's count of operations.

use super::timing::Bench;
use candle_core::{DType, Result, Tensor};
use mka_kernels::{DenseAttentionParams, attention_backward, attention_forward};

/// Tokens of every row of the table: batch times length.
const TOKENS: usize = 32_768;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;

/// 4·b·h·pairs·d forward, pairs the visible (query, key) pairs of one head: t²/2 under a causal mask.
fn forward_flops(t: usize, d: usize, window: Option<usize>) -> f64 {
    let pairs = match window {
        Some(window) if window < t => {
            (window * (window + 1) / 2) as f64 + ((t - window) * window) as f64
        }
        _ => (t * t) as f64 / 2.0,
    };
    4.0 * (TOKENS / t * HEADS * d) as f64 * pairs
}

pub(crate) fn table(bench: &Bench) -> Result<()> {
    println!(
        "bf16, causal, {HEADS} query heads on {KV_HEADS}; backward counts 2.5 times the forward\n"
    );
    println!(
        "| d | b x t | window | pass | µs | TFLOP/s | of product |\n|---|---|---|---|---|---|---|"
    );
    for d in [64, 128] {
        for (t, window) in [
            (4_096, None),
            (8_192, None),
            (16_384, None),
            (32_768, None),
            (16_384, Some(1_024)),
            (16_384, Some(4_096)),
        ] {
            row(bench, d, t, window)?;
        }
    }
    Ok(())
}

fn row(bench: &Bench, d: usize, t: usize, window: Option<usize>) -> Result<()> {
    let b = TOKENS / t;
    let random =
        |h: usize| Tensor::randn(0f32, 1.0, (b, t, h, d), bench.device())?.to_dtype(DType::BF16);
    let (q, k, v, dout) = (random(HEADS)?, random(KV_HEADS)?, random(KV_HEADS)?, random(HEADS)?);
    let params = DenseAttentionParams { scale: 1.0 / (d as f32).sqrt(), causal: true, window };
    let (out, lse) = attention_forward(&q, &k, &v, &params)?;
    let flops = forward_flops(t, d, window);
    let label = window.map_or("-".to_owned(), |window| window.to_string());
    let seconds = bench.median(|| attention_forward(&q, &k, &v, &params).map(drop))?;
    println!("| {d} | {b} x {t} | {label} | forward | {}", bench.compute_row(seconds, flops));
    let seconds = bench
        .median(|| attention_backward(&q, &k, &v, &out, &lse, &dout, None, &params).map(drop))?;
    println!(
        "| {d} | {b} x {t} | {label} | backward | {}",
        bench.compute_row(seconds, 2.5 * flops)
    );
    Ok(())
}

//! The route's scan and the projected route, forward and backward, against the copy's rate.

use crate::timing::Bench;
use candle_core::{DType, Result, Tensor};
use mka_kernels::{
    RotaryAngles, RouteInputs, RouteParams, ema_scan, route, route_backward, route_forward,
};

const RATES: [f32; 3] = [0.9, 0.99, 0.999];

/// Bytes that must move: every input read once, every output written once.
pub(crate) fn table(bench: &Bench) -> Result<()> {
    println!(
        "rates {RATES:?}\n\n| op | b x t x (2, g, d) | type | pass | µs | GB/s | of copy |\n|---|---|---|---|---|---|---|"
    );
    for (b, t, g, d) in [
        (1, 16_384, 8, 64),
        (1, 32_768, 8, 64),
        (4, 16_384, 8, 64),
        (1, 131_072, 8, 64),
        (2, 16_384, 8, 128),
        (4, 32_768, 4, 128),
    ] {
        projected(bench, (b, t, g, d), DType::BF16)?;
    }
    projected(bench, (2, 8_192, 8, 128), DType::F32)?;
    for (t, c) in [(8_192, 2_048), (32_768, 2_048)] {
        let x = Tensor::randn(0f32, 1.0, (t, c), bench.device())?.to_dtype(DType::BF16)?;
        let state = Tensor::zeros((RATES.len(), c), DType::F32, bench.device())?;
        let seconds = bench.median(|| ema_scan(&x, &state, &RATES, 0, true).map(drop))?;
        let bytes = t * c * (2 + 4 * RATES.len());
        println!("| ema_scan | {t} x {c} | BF16 | forward | {}", bench.memory_row(seconds, bytes));
    }
    Ok(())
}

fn projected(
    bench: &Bench,
    (b, t, g, d): (usize, usize, usize, usize),
    dtype: DType,
) -> Result<()> {
    let device = bench.device();
    let m = RATES.len();
    let kv = Tensor::randn(0f32, 1.0, (b, t, 2, g, d), device)?.to_dtype(dtype)?;
    let logits = Tensor::randn(0f32, 1.0, (b, t, 1 + m), device)?;
    let state = Tensor::zeros((b, m, 2, g, d), DType::F32, device)?;
    let gate = Tensor::full(0.5f32, 1, device)?;
    let frequencies: Vec<f64> =
        (0..d / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / d as f64)).collect();
    let angles = RotaryAngles::new(0..t as u64, &frequencies, 1.0);
    let params =
        RouteParams { rates: &RATES, seen: 0, bias_correction: true, eps: 1e-6, angles: &angles };
    let size = kv.elem_count() * dtype.size_in_bytes();
    let tables = t * d * 4;
    let label = format!("{b} x {t} x (2, {g}, {d}) | {dtype:?}");

    let inputs = RouteInputs {
        kv: &kv,
        logits: &logits,
        state: &state,
        gate: &gate,
        bias: None,
        norm: None,
    };
    let seconds = bench.median(|| route(&inputs, &params).map(drop))?;
    let bytes = 2 * size + tables + 4 * logits.elem_count();
    println!("| route | {label} | forward | {}", bench.memory_row(seconds, bytes));

    let (_, carries) = route_forward(&inputs, &params)?;
    let gradient = || Tensor::randn(0f32, 1.0, (b, t, g, d), device)?.to_dtype(dtype);
    let (dkeys, dvalues) = (gradient()?, gradient()?);
    let seconds =
        bench.median(|| route_backward(&inputs, &params, &carries, &dkeys, &dvalues).map(drop))?;
    let bytes = 3 * size + tables + 8 * logits.elem_count();
    println!("| route | {label} | backward | {}", bench.memory_row(seconds, bytes));
    Ok(())
}

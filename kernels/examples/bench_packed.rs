//! Times packed products against candle's quantised ones in the same run, and the sums that matter for SmolLM2-135M.
//! Knows the public API only; weights are synthetic. Run with `--release`; see `docs/packed.md`.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Result, Tensor};
use mka_kernels::packed::{PackedMatrix, PackedType, SimdLevel, linear};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TYPES: [(PackedType, GgmlDType); 9] = [
    (PackedType::Q4_0, GgmlDType::Q4_0),
    (PackedType::Q4_1, GgmlDType::Q4_1),
    (PackedType::Q5_0, GgmlDType::Q5_0),
    (PackedType::Q8_0, GgmlDType::Q8_0),
    (PackedType::Q4K, GgmlDType::Q4K),
    (PackedType::Q6K, GgmlDType::Q6K),
    (PackedType::F32, GgmlDType::F32),
    (PackedType::F16, GgmlDType::F16),
    (PackedType::BF16, GgmlDType::BF16),
];

/// The products of one SmolLM2-135M layer: (rows, cols).
const LAYER: [(usize, usize); 7] =
    [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)];

fn main() -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let levels = SimdLevel::available();
    println!("threads {}, levels {levels:?}", rayon::current_num_threads());
    let what = std::env::args().nth(1);
    let wants = |name: &str| what.as_deref().is_none_or(|what| what == name);
    if wants("shapes") {
        shapes(&mut rng)?;
    }
    if wants("levels") {
        level_times(&mut rng)?;
    }
    if wants("model") {
        whole_model(&mut rng)?;
    }
    Ok(())
}

fn values(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1f32..1.0)).collect()
}

fn weight(
    rng: &mut ChaCha8Rng,
    (ty, candle_ty): (PackedType, GgmlDType),
    (rows, cols): (usize, usize),
) -> Result<(PackedMatrix, QMatMul)> {
    let values = Tensor::from_vec(values(rng, rows * cols), (rows, cols), &Device::Cpu)?;
    let candle = QTensor::quantize(&values, candle_ty)?;
    let bytes = candle.data()?.to_vec();
    let range = 0..bytes.len();
    let ours = PackedMatrix::new(ty, rows, cols, Arc::new(bytes), range)
        .map_err(candle_core::Error::wrap)?;
    Ok((ours, QMatMul::QTensor(Arc::new(candle))))
}

/// The fastest of many runs, in microseconds: other work on the machine only adds time.
fn fastest(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut best, started) = (f64::INFINITY, Instant::now());
    let mut runs = 0;
    while runs < 3 || (started.elapsed().as_millis() < 150 && runs < 2000) {
        let start = Instant::now();
        f()?;
        best = best.min(start.elapsed().as_secs_f64() * 1e6);
        runs += 1;
    }
    Ok(best)
}

fn shapes(rng: &mut ChaCha8Rng) -> Result<()> {
    println!("| type | rows x cols | m | us | GB/s | GFLOP/s | candle us | candle / ours |");
    println!("|---|---|---|---|---|---|---|---|");
    let quick = std::env::args().nth(2);
    for types in TYPES {
        if quick.as_deref().is_some_and(|only| format!("{:?}", types.0) != only) {
            continue;
        }
        // The K types need rows in whole blocks of 256.
        let wide = if types.0.block_len() == 256 { 768 } else { 576 };
        for (rows, cols) in [(192, wide), (576, wide), (1536, wide), (576, 1536)] {
            let (w, candle) = weight(rng, types, (rows, cols))?;
            let bytes = (rows * w.row_bytes()) as f64;
            for m in [1, 2, 4, 5, 8, 16, 64, 256, 512] {
                if rows == 192 && m > 1 {
                    continue;
                }
                let x = Tensor::from_vec(values(rng, m * cols), (m, cols), &Device::Cpu)?;
                let us = fastest(|| linear(&x, &w).map(|out| drop(black_box(out))))?;
                let candle_us = fastest(|| candle.forward(&x).map(|out| drop(black_box(out))))?;
                println!(
                    "| {:?} | {rows} x {cols} | {m} | {us:.1} | {:.1} | {:.1} | {candle_us:.1} | {:.2} |",
                    types.0,
                    bytes / us / 1e3,
                    2e-3 * (m * rows * cols) as f64 / us,
                    candle_us / us
                );
            }
        }
    }
    Ok(())
}

fn level_times(rng: &mut ChaCha8Rng) -> Result<()> {
    println!("| type | 1536 x 768, m 1: us by level | m 256: us by level |");
    println!("|---|---|---|");
    for types in TYPES {
        let (w, _) = weight(rng, types, (1536, 768))?;
        let mut cells = Vec::new();
        for m in [1, 256] {
            let x = values(rng, m * w.cols());
            let mut out = vec![0.0; m * w.rows()];
            let mut times = Vec::new();
            for level in SimdLevel::available() {
                let us = fastest(|| {
                    w.matmul_at(level, &x, m, &mut out).map_err(candle_core::Error::wrap)
                })?;
                times.push(format!("{level:?} {us:.1}"));
            }
            cells.push(times.join(", "));
        }
        println!("| {:?} | {} |", types.0, cells.join(" | "));
    }
    Ok(())
}

/// Thirty layers with their own weights, then the head; the sum of the fastest time of each product.
fn whole_model(rng: &mut ChaCha8Rng) -> Result<()> {
    let layer_type = (PackedType::Q4_1, GgmlDType::Q4_1);
    let mut layers = Vec::new();
    for _ in 0..30 {
        for shape in LAYER {
            layers.push(weight(rng, layer_type, shape)?);
        }
    }
    let head = weight(rng, (PackedType::Q8_0, GgmlDType::Q8_0), (49152, 576))?;
    for (name, m) in [("whole SmolLM2 decode token", 1), ("whole prefill of 512 tokens", 512)] {
        let mut x = std::collections::HashMap::new();
        for cols in [576, 1536] {
            x.insert(cols, Tensor::from_vec(values(rng, m * cols), (m, cols), &Device::Cpu)?);
        }
        let last = x[&576].narrow(0, m - 1, 1)?.contiguous()?;
        let input = |cols: usize| &x[&cols];
        let (mut ours, mut candle) = (0.0, 0.0);
        for (sum, by_candle) in [(&mut ours, false), (&mut candle, true)] {
            // candle takes half a minute for one prefill.
            let passes = if m == 1 {
                40
            } else if by_candle {
                1
            } else {
                4
            };
            // The fastest of each product over passes through the whole model: noise goes, cache misses stay.
            let mut best = vec![f64::INFINITY; layers.len() + 1];
            for _ in 0..passes {
                for (i, best) in best.iter_mut().enumerate() {
                    let (w, quantised) = layers.get(i).unwrap_or(&head);
                    let x = if i < layers.len() { input(w.cols()) } else { &last };
                    let start = Instant::now();
                    black_box(if by_candle { quantised.forward(x)? } else { linear(x, w)? });
                    *best = best.min(start.elapsed().as_secs_f64() * 1e6);
                }
            }
            *sum = best.iter().sum();
        }
        println!(
            "{name}: {:.2} ms, candle {:.2} ms, ratio {:.2}",
            ours / 1e3,
            candle / 1e3,
            candle / ours
        );
    }
    Ok(())
}

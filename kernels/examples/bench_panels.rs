//! Times linear layers in panels against candle's f32 product in the same run, on one thread, for the layers of MiniLM.
//! Knows the public API only; weights are synthetic. `RAYON_NUM_THREADS=1`; see `docs/panels.md`.

use candle_core::{Device, Result, Tensor};
use mka_kernels::{PanelForm, PanelLinear};
use std::hint::black_box;
use std::time::Instant;

/// Rows of x, out_features, in_features.
const SHAPES: [(usize, usize, usize); 6] = [
    (1, 1536, 384),
    (12, 1536, 384),
    (96, 1152, 384),
    (96, 384, 384),
    (96, 1536, 384),
    (96, 384, 1536),
];

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

/// The fastest of many runs, in seconds: other work on the machine only adds time.
fn fastest(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let (mut best, started, mut runs) = (f64::INFINITY, Instant::now(), 0);
    while runs < 5 || started.elapsed().as_millis() < 300 {
        let start = Instant::now();
        f()?;
        best = best.min(start.elapsed().as_secs_f64());
        runs += 1;
    }
    Ok(best)
}

fn main() -> Result<()> {
    println!("| rows of x | out | in | candle f32 | panels f32 | panels int8 | ratios |");
    println!("|---|---|---|---|---|---|---|");
    for (m, rows, cols) in SHAPES {
        let (weights, bias) = (wave(rows * cols, 0.37), wave(rows, 0.11));
        let x = wave(m * cols, 0.73);
        let products = (m * rows * cols) as f64 / 1e9;
        let tensor = Tensor::from_slice(&x, (m, cols), &Device::Cpu)?;
        let transposed = Tensor::from_slice(&weights, (rows, cols), &Device::Cpu)?.t()?;
        let candle = products
            / fastest(|| {
                black_box(tensor.matmul(&transposed)?);
                Ok(())
            })?;
        let mut out = vec![0.0; m * rows];
        let mut rate = |form| -> Result<f64> {
            let layer = PanelLinear::new(form, &weights, &bias, (rows, cols))
                .map_err(candle_core::Error::wrap)?;
            let seconds = fastest(|| {
                layer.apply(black_box(&x), &mut out);
                Ok(())
            })?;
            Ok(products / seconds)
        };
        let (f32, int8) = (rate(PanelForm::F32)?, rate(PanelForm::Int8)?);
        println!(
            "| {m} | {rows} | {cols} | {candle:.1} | {f32:.1} | {int8:.1} | {:.2}, {:.2} |",
            f32 / candle,
            int8 / candle
        );
    }
    println!("\n10^9 products a second; ratios to candle's f32.");
    Ok(())
}

//! Every CUDA op against the ceilings of the same run: device copy and matrix product.
//!
//! `bench_cuda [--rows TEXT] [--tokens N] [OP ..]` prints one Markdown table per op; without arguments, all of them. With
//! `--rows` a layer's table has the rows alone whose layer, size and pass contain the text, with `--tokens` rows of so many
//! tokens in the place of 32,768.

mod attention;
mod layer;
mod paged;
mod route;
mod timing;

use candle_core::{DType, Result, Tensor};
use timing::Bench;

/// Prints the rows of one op.
type Table = fn(&Bench) -> Result<()>;

/// The tables by name.
const TABLES: &[(&str, Table)] = &[
    ("attention", attention::table),
    ("rope", rope),
    ("route", route::table),
    ("layer", layer::table),
    ("paged_decode", paged::decode),
    ("paged_prefill", paged::prefill),
    ("select", paged::select),
];

fn main() -> Result<()> {
    let device = match mka_kernels::cuda::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: no CUDA device: {error}");
            return Ok(());
        }
    };
    let mut asked: Vec<String> = std::env::args().skip(1).collect();
    let mut option = |name: &str| -> Option<String> {
        let i = asked.iter().position(|argument| argument == name)?;
        asked.drain(i..asked.len().min(i + 2)).nth(1)
    };
    let (rows, tokens) = (option("--rows").unwrap_or_default(), option("--tokens"));
    let tokens = tokens.map_or(Ok(32_768), |tokens| tokens.parse());
    let tokens = tokens.map_err(|e| candle_core::Error::Msg(format!("--tokens: {e}")))?;
    let bench = Bench::new(device, rows, tokens)?;
    for (name, table) in TABLES {
        if asked.is_empty() || asked.iter().any(|a| a == name) {
            println!("\n## {name}\n");
            table(&bench)?;
        }
    }
    Ok(())
}

fn rope(bench: &Bench) -> Result<()> {
    println!("| shape | type | µs | GB/s | of copy |\n|---|---|---|---|---|");
    for dtype in [DType::BF16, DType::F32] {
        let (t, h, d) = (16_384, 32, 128);
        let x = Tensor::randn(0f32, 1.0, (t, h, d), bench.device())?.to_dtype(dtype)?;
        let frequencies: Vec<f64> =
            (0..d / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / d as f64)).collect();
        let angles = mka_kernels::RotaryAngles::new(0..t as u64, &frequencies, 1.0);
        let seconds = bench.median(|| mka_kernels::rotate(&x, &angles).map(drop))?;
        let bytes = 2 * x.elem_count() * dtype.size_in_bytes();
        println!("| {t} x {h} x {d} | {dtype:?} | {}", bench.memory_row(seconds, bytes));
    }
    Ok(())
}

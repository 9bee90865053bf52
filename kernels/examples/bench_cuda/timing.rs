//! Medians of device times, and the ceilings they are held against.

use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::{DType, Device, Result, Tensor};

/// Rounds of a measurement of microseconds; the median is reported.
const ROUNDS: usize = 21;
/// Written, then read between rounds: more than the 50 MiB of an H100's L2.
const FLUSH_FLOATS: usize = 32 << 20;

/// A device with its measured ceilings.
pub(crate) struct Bench {
    device: Device,
    flush: Tensor,
    copy_bytes_per_s: f64,
    matmul_flops: f64,
    /// What the name of a row must contain to be measured.
    rows: String,
    /// Tokens of a layer's row: batch times length.
    tokens: usize,
}

impl Bench {
    /// Measures both ceilings and prints them.
    pub(crate) fn new(device: Device, rows: String, tokens: usize) -> Result<Self> {
        let flush = Tensor::zeros(FLUSH_FLOATS, DType::F32, &device)?;
        let mut bench =
            Self { device, flush, copy_bytes_per_s: 1.0, matmul_flops: 1.0, rows, tokens };
        let stream = bench.device.as_cuda_device()?.cuda_stream();
        let source = stream.alloc_zeros::<u8>(256 << 20).map_err(candle_core::Error::wrap)?;
        let mut to = stream.alloc_zeros::<u8>(256 << 20).map_err(candle_core::Error::wrap)?;
        let copy = bench
            .median(|| stream.memcpy_dtod(&source, &mut to).map_err(candle_core::Error::wrap))?;
        bench.copy_bytes_per_s = (512 << 20) as f64 / copy;
        let n = 8192;
        let a = Tensor::randn(0f32, 1.0, (n, n), &bench.device)?.to_dtype(DType::BF16)?;
        let b = Tensor::randn(0f32, 1.0, (n, n), &bench.device)?.to_dtype(DType::BF16)?;
        let product = bench.median(|| a.matmul(&b).map(drop))?;
        bench.matmul_flops = 2.0 * (n as f64).powi(3) / product;
        println!(
            "ceilings: copy {:.0} GB/s (256 MiB, read and written), bf16 product {:.0} TFLOP/s ({n}³)",
            bench.copy_bytes_per_s / 1e9,
            bench.matmul_flops / 1e12
        );
        Ok(bench)
    }

    pub(crate) fn wants(&self, row: &str) -> bool {
        row.contains(&self.rows)
    }

    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Median device seconds of `work` over the rounds, L2 flushed before each, after three rounds of warm-up.
    pub(crate) fn median(&self, work: impl FnMut() -> Result<()>) -> Result<f64> {
        self.median_of(ROUNDS, work)
    }

    /// [`Bench::median`] of `rounds` rounds.
    pub(crate) fn median_of(
        &self,
        rounds: usize,
        mut work: impl FnMut() -> Result<()>,
    ) -> Result<f64> {
        let stream = self.device.as_cuda_device()?.cuda_stream();
        let event = || {
            stream
                .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(candle_core::Error::wrap)
        };
        let mut seconds = Vec::with_capacity(rounds);
        for round in 0..rounds + 3 {
            // Long enough on the device that the host has enqueued all of `work` before the first event passes. The
            // read comes last: lines that were only read leave the cache without being written back during `work`.
            for _ in 0..2 {
                self.flush.zero_set()?;
            }
            let _ = self.flush.sum_all()?;
            let begin = event()?;
            work()?;
            let end = event()?;
            self.device.synchronize()?;
            if round >= 3 {
                let ms = begin.elapsed_ms(&end).map_err(candle_core::Error::wrap)?;
                seconds.push(f64::from(ms) / 1e3);
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[rounds / 2])
    }

    /// Cells of an op bound by memory, `bytes` read and written: µs, GB/s, share of the copy's rate.
    pub(crate) fn memory_row(&self, seconds: f64, bytes: usize) -> String {
        let rate = bytes as f64 / seconds;
        format!("{:.1} | {:.0} | {:.2} |", seconds * 1e6, rate / 1e9, rate / self.copy_bytes_per_s)
    }

    /// Cells of an op bound by arithmetic: µs, TFLOP/s, share of the matrix product's rate.
    pub(crate) fn compute_row(&self, seconds: f64, flops: f64) -> String {
        let rate = flops / seconds;
        format!("{:.1} | {:.0} | {:.2} |", seconds * 1e6, rate / 1e12, rate / self.matmul_flops)
    }
}

//! Selection on a CUDA device: the parameters of the kernels and their launch.
//! Knows no rule: the kernels of `cuda/landmarks.cu`, `cuda/select.cu` and `cuda/gather_pages.cu` hold them.

use crate::cuda::{self, Launch};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};

/// Landmarks of one block of `score_landmarks`; as in `cuda/landmarks.cu`, like the two limits.
const BLOCK_LANDMARKS: usize = 256;
const MAX_ROWS: usize = 512;
const MAX_DIM: usize = 256;
/// Votes of one block of a row that several share, threads of a block, digits of a vote's key and values of one; as in
/// `cuda/select.cu`.
const BLOCK_VOTES: usize = 8192;
const SELECT_THREADS: u32 = 1024;
const PASSES: usize = 3;
const BINS: usize = 2048;

#[repr(C)]
#[derive(Clone, Copy)]
struct LandmarkParams {
    keys: u64,
    lens: u64,
    means: u64,
    elements: u64,
    g: u32,
    d: u32,
    span: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for LandmarkParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct ScoreParams {
    q: u64,
    landmarks: u64,
    logits: u64,
    stats: u64,
    votes: u64,
    n: u64,
    rows: u32,
    h: u32,
    g: u32,
    group: u32,
    d: u32,
    blocks: u32,
    scale: f32,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for ScoreParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct SelectParams {
    votes: u64,
    indices: u64,
    n: u32,
    k: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for SelectParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct LongParams {
    votes: u64,
    indices: u64,
    histograms: u64,
    found: u64,
    counts: u64,
    n: u32,
    k: u32,
    pass: u32,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for LongParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherParams {
    from: u64,
    to: u64,
    slots: u64,
    page: u64,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for GatherParams {}

/// [`super::landmarks`] on `device`; shapes are checked.
pub(super) fn landmarks(
    device: &CudaDevice,
    keys: &Tensor,
    span: usize,
    lens: &[usize],
) -> Result<Tensor> {
    let (s, g, _, d) = keys.dims4()?;
    let suffix = cuda::suffix("landmarks", keys.dtype())?;
    let means = cuda::output_tensor(device, keys.dtype(), (s, g, PAGE_TOKENS / span, d))?;
    let elements = means.elem_count();
    if elements == 0 {
        return Ok(means);
    }
    let lens: Vec<u32> = lens.iter().map(|len| *len as u32).collect();
    let lens = Tensor::from_slice(&lens, s, keys.device())?;
    let params = LandmarkParams {
        keys: cuda::address(keys)?,
        lens: cuda::address(&lens)?,
        means: cuda::address(&means)?,
        elements: elements as u64,
        g: g as u32,
        d: d as u32,
        span: span as u32,
    };
    let blocks = elements.div_ceil(256).min(65_536) as u32;
    let launch = Launch { grid: (blocks, 1, 1), block: 256, shared_bytes: 0 };
    cuda::launch(device, "landmarks", &format!("landmarks_{suffix}"), launch, &params)?;
    Ok(means)
}

/// [`super::score_landmarks`] on `device`; shapes are checked, neither is empty, both are contiguous.
pub(super) fn score_landmarks(
    device: &CudaDevice,
    q: &Tensor,
    landmarks: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    let (t, h, d) = q.dims3()?;
    let (n, g, _) = landmarks.dims3()?;
    let suffix = cuda::suffix("score_landmarks", q.dtype())?;
    let rows = t * (h / g);
    if rows > MAX_ROWS || d > MAX_DIM || d % 8 != 0 || g > 65_535 {
        bail!(
            "score_landmarks: {rows} query rows a head of {d}, expected up to {MAX_ROWS} and a multiple of 8 up to {MAX_DIM}"
        );
    }
    if h == 0 {
        return Tensor::zeros((g, n), DType::F32, q.device());
    }
    let blocks = n.div_ceil(BLOCK_LANDMARKS);
    let logits = cuda::output_tensor(device, DType::F32, (g, rows, n))?;
    let stats = cuda::output_tensor(device, DType::F32, (g, blocks, rows, 2))?;
    let votes = cuda::output_tensor(device, DType::F32, (g, n))?;
    let params = ScoreParams {
        q: cuda::address(q)?,
        landmarks: cuda::address(landmarks)?,
        logits: cuda::address(&logits)?,
        stats: cuda::address(&stats)?,
        votes: cuda::address(&votes)?,
        n: n as u64,
        rows: rows as u32,
        h: h as u32,
        g: g as u32,
        group: (h / g) as u32,
        d: d as u32,
        blocks: blocks as u32,
        scale: scale * std::f32::consts::LOG2_E,
    };
    let launch = Launch { grid: (blocks as u32, g as u32, 1), block: 256, shared_bytes: 0 };
    cuda::launch(device, "landmarks", &format!("score_landmarks_{suffix}"), launch, &params)?;
    // Each block joins the statistics of all: 1,024 votes a block keep that a small share.
    let launch = Launch { grid: (n.div_ceil(1024) as u32, g as u32, 1), ..launch };
    cuda::launch(device, "landmarks", "vote_landmarks", launch, &params)?;
    Ok(votes)
}

/// [`super::top_k`] on `device`; `votes` (g, n) is contiguous, 0 < k ≤ n.
pub(super) fn top_k(device: &CudaDevice, votes: &Tensor, k: usize) -> Result<Tensor> {
    let (g, n) = votes.dims2()?;
    let indices = cuda::output_tensor(device, DType::U32, (g, k))?;
    if n > 2 * BLOCK_VOTES && g <= 65_535 {
        top_k_of_long(device, votes, &indices)?;
        return Ok(indices);
    }
    let params = SelectParams {
        votes: cuda::address(votes)?,
        indices: cuda::address(&indices)?,
        n: n as u32,
        k: k as u32,
    };
    let launch = Launch { grid: (g as u32, 1, 1), block: SELECT_THREADS, shared_bytes: 0 };
    cuda::launch(device, "select", "top_k", launch, &params)?;
    Ok(indices)
}

/// [`top_k`] into `indices` (g, k) with several blocks a row: one alone reads a row of 131,072 votes in 0.2 ms.
fn top_k_of_long(device: &CudaDevice, votes: &Tensor, indices: &Tensor) -> Result<()> {
    let (g, n) = votes.dims2()?;
    let blocks = n.div_ceil(BLOCK_VOTES);
    let histograms = g * PASSES * BINS;
    let found = g * PASSES * 2;
    let state = Tensor::zeros(histograms + found + g * blocks * 2, DType::U32, votes.device())?;
    let at = |element: usize| -> Result<u64> {
        Ok(cuda::address(&state)? + (element * size_of::<u32>()) as u64)
    };
    let mut params = LongParams {
        votes: cuda::address(votes)?,
        indices: cuda::address(indices)?,
        histograms: at(0)?,
        found: at(histograms)?,
        counts: at(histograms + found)?,
        n: n as u32,
        k: indices.dim(1)? as u32,
        pass: 0,
    };
    let grid = (blocks as u32, g as u32, 1);
    let launch = Launch { grid, block: SELECT_THREADS, shared_bytes: 0 };
    for pass in 0..PASSES {
        params.pass = pass as u32;
        cuda::launch(device, "select", "top_k_count", launch, &params)?;
    }
    cuda::launch(device, "select", "top_k_tally", launch, &params)?;
    cuda::launch(device, "select", "top_k_write", launch, &params)
}

/// Writes the pages `from` (n, g, PAGE_TOKENS, d) into their slots of `into` (s, g, PAGE_TOKENS, d), both contiguous.
pub(super) fn scatter_pages(
    device: &CudaDevice,
    from: &Tensor,
    slots: &[u32],
    into: &Tensor,
) -> Result<()> {
    let page_bytes = from.elem_count() / slots.len().max(1) * from.dtype().size_in_bytes();
    let (from, to) = (cuda::address(from)?, cuda::address(into)?);
    copy_pages(device, "scatter_pages", from, to, slots, page_bytes)
}

/// Runs `kernel` (`gather_pages` or `scatter_pages`) over pages of `page_bytes` at two device addresses.
pub(super) fn copy_pages(
    device: &CudaDevice,
    kernel: &str,
    from: u64,
    to: u64,
    slots: &[u32],
    page_bytes: usize,
) -> Result<()> {
    // 64 tokens of 2 bytes: always a multiple of 16.
    const UNIT: usize = 16;
    const BLOCK_UNITS: usize = 256 * 4;
    const MAX_PAGES: usize = 65_535;
    let gather = kernel == "gather_pages";
    let table = if slots.is_empty() {
        return Ok(());
    } else {
        Tensor::from_slice(slots, slots.len(), &Device::Cuda(device.clone()))?
    };
    let table_address = cuda::address(&table)?;
    for first in (0..slots.len()).step_by(MAX_PAGES) {
        let count = (slots.len() - first).min(MAX_PAGES);
        let skipped = (first * page_bytes) as u64;
        let params = GatherParams {
            from: if gather { from } else { from + skipped },
            to: if gather { to + skipped } else { to },
            slots: table_address + (first * size_of::<u32>()) as u64,
            page: (page_bytes / UNIT) as u64,
        };
        let grid = ((page_bytes / UNIT).div_ceil(BLOCK_UNITS) as u32, count as u32, 1);
        let launch = Launch { grid, block: 256, shared_bytes: 0 };
        cuda::launch(device, "gather_pages", kernel, launch, &params)?;
    }
    Ok(())
}

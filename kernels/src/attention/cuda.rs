//! Attention over pages, and the merge of its states, on a CUDA device: the parameters of the kernels and their launch.
//! Knows no masks beyond their encoding: the kernels of `cuda/paged*.cu` apply them.

mod any_dim;

use super::{AttentionParams, AttentionRun, AttentionState, MergeGradients, PageRef};
use crate::cuda::{self, Launch};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::DeviceId;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use std::sync::{Mutex, PoisonError};

/// Pages that travel in the launch itself, without an upload; as in `cuda/paged.cuh`, like all numbers here.
const INLINE_PAGES: usize = 200;
/// Query rows (tokens · heads of the group) of one decode tile.
const DECODE_ROWS: usize = 8;
/// Up to this many query rows of a key/value head the pages are split over the device instead of the queries.
const MAX_DECODE_ROWS: usize = 16;
const MAX_SPLITS: usize = 256;
/// Pages of the smallest split: fewer would not outweigh the merge of one more part.
const MIN_SPLIT_PAGES: usize = 2;
/// Runs of queries of one launch; as in `cuda/paged_prefill_f32.cu`.
const MAX_RUNS: usize = 16;
/// Query rows of one tile of the f32 prefill.
const PREFILL_ROWS: usize = 64;
/// Tiles whose arrivals are counted: key/value heads times decode tiles.
const MAX_COUNTERS: usize = 4096;

#[repr(C, align(16))]
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Page {
    slot: u32,
    start: i32,
    len: u32,
    bias: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PagedParams {
    q: u64,
    keys: u64,
    values: u64,
    out: u64,
    lse: u64,
    partial: u64,
    counters: u64,
    table: u64,
    query_start: u64,
    window_tokens: u64,
    sliding_window: u64,
    t: u32,
    h: u32,
    g: u32,
    group: u32,
    num_pages: u32,
    tiles: u32,
    splits: u32,
    scale: f32,
    pages: [Page; INLINE_PAGES],
}

const _: () = assert!(size_of::<PagedParams>() == 128 + INLINE_PAGES * 16);

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for PagedParams {}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Run {
    first: u32,
    queries: u32,
    first_page: u32,
    end_page: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PrefillParams {
    all: PagedParams,
    runs: [Run; MAX_RUNS],
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for PrefillParams {}

/// [`super::paged_attention`] on `device`; shapes, slots and biases are checked, `q` is contiguous.
pub(super) fn paged_attention(
    device: &CudaDevice,
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: &AttentionParams,
) -> Result<AttentionState> {
    let (t, h, d) = q.dims3()?;
    let g = keys.dim(1)?;
    let dtype = q.dtype();
    check_pools(q, keys, values)?;
    let suffix = cuda::suffix("paged_attention", dtype)?;
    let small = dtype == DType::F32 && matches!(d, 16 | 32);
    if !small && !matches!(d, 64 | 96 | 128 | 256) {
        if dtype == DType::F32 {
            return any_dim::paged_attention(device, q, keys, values, params);
        }
        bail!("paged_attention: head_dim {d} of {dtype:?} on CUDA, expected 64, 96, 128 or 256");
    }
    if t.saturating_mul(h) > i32::MAX as usize / 2 {
        bail!("paged_attention: {t} query tokens of {h} heads, expected below 2^30 rows");
    }
    let pages = visible_pages(params, t)?;
    if t == 0 || h == 0 {
        let out = cuda::output_tensor(device, dtype, (t, h, d))?;
        let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
        return Ok(AttentionState { out, lse });
    }
    if pages.is_empty() {
        return Ok(AttentionState {
            out: Tensor::zeros((t, h, d), dtype, q.device())?,
            lse: Tensor::full(f32::NEG_INFINITY, (t, h), q.device())?,
        });
    }
    let out = cuda::output_tensor(device, dtype, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    let group = h / g;
    let rows = t * group;
    let decode = rows <= MAX_DECODE_ROWS && !small && g * rows <= MAX_COUNTERS;
    let tiles = rows.div_ceil(DECODE_ROWS);
    let splits = if decode { num_splits(device, dtype, d, g * tiles, pages.len())? } else { 1 };
    // (parts, 8, d) and the maximum and sum of each row.
    let parts = if decode { g * tiles * splits } else { 0 };
    let partial = cuda::output_tensor(device, DType::F32, parts * DECODE_ROWS * (d + 2))?;
    let counters = counters(device)?;
    let table = table(device, &pages)?;
    let paged = PagedParams {
        partial: cuda::address(&partial)?,
        counters: cuda::address(&counters)?,
        tiles: tiles as u32,
        splits: splits as u32,
        ..paged_params((q, keys, values), (&out, &lse), params, (&pages, table.as_ref()))?
    };
    let half = dtype != DType::F32;
    let (source, kernel, launch) = if decode {
        let source = if half { "paged_decode_sm80" } else { "paged_decode_f32" };
        let grid = (g as u32, splits as u32, tiles as u32);
        // f32: two pages of keys, rows of d + 4.
        let shared_bytes = if half { 0 } else { 2 * PAGE_TOKENS * (d + 4) * 4 };
        let block = if half { 128 } else { d };
        (
            source,
            "paged_decode",
            Launch { grid, block: block as u32, shared_bytes: shared_bytes as u32 },
        )
    } else if half {
        let block = if d == 256 { 256 } else { 128 };
        let shared_bytes = ((128 + 4 * PAGE_TOKENS) * (d + 8) * 2) as u32;
        let grid = (rows.div_ceil(128) as u32, g as u32, 1);
        ("paged_prefill_sm80", "paged_prefill", Launch { grid, block, shared_bytes })
    } else {
        let run = Run { first: 0, queries: t as u32, first_page: 0, end_page: paged.num_pages };
        prefill_f32(device, paged, d, &[run])?;
        return Ok(AttentionState { out, lse });
    };
    cuda::launch(device, source, &format!("{kernel}_{suffix}_{d}"), launch, &paged)?;
    Ok(AttentionState { out, lse })
}

/// [`super::paged_attention_runs`] on `device` in one launch; shapes, slots, biases and runs are checked, `q` is
/// contiguous. None where one launch does not do it.
pub(super) fn paged_attention_runs(
    device: &CudaDevice,
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: &AttentionParams,
    runs: &[AttentionRun],
) -> Result<Option<AttentionState>> {
    let (t, h, d) = q.dims3()?;
    if q.dtype() != DType::F32
        || !matches!(d, 16 | 32 | 64 | 96 | 128 | 256)
        || runs.len() > MAX_RUNS
        || t == 0
        || t.saturating_mul(h) > i32::MAX as usize / 2
    {
        return Ok(None);
    }
    check_pools(q, keys, values)?;
    let pages: Vec<Page> =
        params.pages.iter().map(|page| encoded(page, params, t)).collect::<Result<_>>()?;
    let out = cuda::output_tensor(device, DType::F32, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    let table = table(device, &pages)?;
    let all = paged_params((q, keys, values), (&out, &lse), params, (&pages, table.as_ref()))?;
    let mut first = 0;
    let of = |run: &AttentionRun| {
        let (first_page, end_page) = (run.pages.start as u32, run.pages.end as u32);
        let own = Run { first, queries: run.queries as u32, first_page, end_page };
        first += own.queries;
        own
    };
    let runs: Vec<Run> = runs.iter().map(of).collect();
    prefill_f32(device, all, d, &runs)?;
    Ok(Some(AttentionState { out, lse }))
}

/// Launches the f32 prefill over `runs`, at most [`MAX_RUNS`].
fn prefill_f32(device: &CudaDevice, all: PagedParams, d: usize, runs: &[Run]) -> Result<()> {
    let mut params = PrefillParams { all, runs: [Run::default(); MAX_RUNS] };
    params.runs[..runs.len()].copy_from_slice(runs);
    let longest = runs.iter().map(|run| run.queries).max().unwrap_or(0) * all.group;
    let floats = PAGE_TOKENS * (3 * d + 4 + PAGE_TOKENS);
    let grid = (longest.div_ceil(PREFILL_ROWS as u32), all.g, runs.len() as u32);
    let launch = Launch { grid, block: 256, shared_bytes: (floats * 4) as u32 };
    cuda::launch(device, "paged_prefill_f32", &format!("paged_prefill_f32_{d}"), launch, &params)
}

/// Whether keys and values are of the type of `q`, and beside it.
fn check_pools(q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<()> {
    for (name, pool) in [("keys", keys), ("values", values)] {
        if pool.dtype() != q.dtype() || !pool.device().same_device(q.device()) {
            bail!(
                "paged_attention: {name} {:?} on {:?}, expected {:?} on {:?} as q",
                pool.dtype(),
                pool.device().location(),
                q.dtype(),
                q.device().location()
            );
        }
    }
    Ok(())
}

/// What every kernel is told, of one split without partial sums.
fn paged_params(
    (q, keys, values): (&Tensor, &Tensor, &Tensor),
    (out, lse): (&Tensor, &Tensor),
    params: &AttentionParams,
    (pages, table): (&[Page], Option<&Tensor>),
) -> Result<PagedParams> {
    let (t, h, _) = q.dims3()?;
    let g = keys.dim(1)?;
    let mut paged = PagedParams {
        q: cuda::address(q)?,
        keys: cuda::address(keys)?,
        values: cuda::address(values)?,
        out: cuda::address(out)?,
        lse: cuda::address(lse)?,
        partial: 0,
        counters: 0,
        table: table.map_or(Ok(0), cuda::address)?,
        query_start: params.query_start,
        window_tokens: params.window_tokens.unwrap_or(u64::MAX),
        sliding_window: params.sliding_window.unwrap_or(u64::MAX),
        t: t as u32,
        h: h as u32,
        g: g as u32,
        group: (h / g) as u32,
        num_pages: pages.len() as u32,
        tiles: 0,
        splits: 1,
        scale: params.scale * std::f32::consts::LOG2_E,
        pages: [Page::default(); INLINE_PAGES],
    };
    if table.is_none() {
        paged.pages[..pages.len()].copy_from_slice(pages);
    }
    Ok(paged)
}

/// The page list on `device` where a launch has no room for it.
fn table(device: &CudaDevice, pages: &[Page]) -> Result<Option<Tensor>> {
    (pages.len() > INLINE_PAGES).then(|| uploaded_table(device, pages)).transpose()
}

/// The pages that some query sees, as the kernels read them.
fn visible_pages(params: &AttentionParams, t: usize) -> Result<Vec<Page>> {
    let from = params.first_visible(params.query_start);
    let to = params.query_start + t as u64;
    let seen = |page: &&PageRef| {
        page.len > 0
            && page.start < to
            && page.start + page.len as u64 > from
            && page.bias > f32::NEG_INFINITY
    };
    params.pages.iter().filter(seen).map(|page| encoded(page, params, t)).collect()
}

/// A page as the kernels read it, for `t` queries.
fn encoded(page: &PageRef, params: &AttentionParams, t: usize) -> Result<Page> {
    // A page this far back must be visible to all queries alike, so that its distance need not be exact.
    const FAR: i64 = 1 << 30;
    let last = (params.query_start + t as u64).saturating_sub(1);
    let start = page.start as i64 - params.query_start as i64;
    if start <= -FAR && params.first_visible(last) > page.start {
        bail!(
            "paged_attention: {page:?} at the edge of a window, expected windows below 2^30 tokens"
        );
    }
    Ok(Page {
        slot: u32::try_from(page.slot).map_err(candle_core::Error::wrap)?,
        // Above every clamped `first_visible`, below every query where the page begins behind all of them.
        start: start.clamp(1 - FAR, FAR) as i32,
        len: page.len as u32,
        bias: page.bias * std::f32::consts::LOG2_E,
    })
}

/// Parts that the pages are split into: one wave of blocks, each of at least two pages.
fn num_splits(
    device: &CudaDevice,
    dtype: DType,
    d: usize,
    tiles: usize,
    pages: usize,
) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let processors =
        device.cuda_stream().context().attribute(attribute).map_err(candle_core::Error::wrap)?
            as usize;
    // Blocks that fit an SM at once, by the registers of the 16-bit kernels and the shared memory of the f32 ones; at
    // head_dim 128 two of the three that fit (128 MB of K and V on an H100: 54.6 µs in 32 splits, 56.3 in 49).
    let resident = match (dtype, d) {
        (DType::F32, 64) => 4,
        (DType::F32, 256) => 1,
        (DType::F32, _) => 2,
        (_, 64 | 96) => 4,
        _ => 2,
    };
    let wave = processors * resident / tiles.max(1);
    Ok(wave.min(pages / MIN_SPLIT_PAGES).clamp(1, MAX_SPLITS))
}

/// The arrival counters of `device`: zero, and left at zero by every launch.
fn counters(device: &CudaDevice) -> Result<Tensor> {
    static COUNTERS: Mutex<Vec<(DeviceId, Tensor)>> = Mutex::new(Vec::new());
    let mut counters = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, tensor)) = counters.iter().find(|(id, _)| *id == device.id()) {
        return Ok(tensor.clone());
    }
    let tensor = Tensor::zeros(MAX_COUNTERS, DType::U32, &Device::Cuda(device.clone()))?;
    counters.push((device.id(), tensor.clone()));
    Ok(tensor)
}

/// The page list on `device`. The last one of each device is kept: the layers of a model ask for the same in turn.
fn uploaded_table(device: &CudaDevice, pages: &[Page]) -> Result<Tensor> {
    static LAST: Mutex<Vec<(DeviceId, Vec<Page>, Tensor)>> = Mutex::new(Vec::new());
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let known = last.iter().position(|(id, ..)| *id == device.id());
    if let Some((_, _, table)) = known.map(|i| &last[i]).filter(|(_, list, _)| list == pages) {
        return Ok(table.clone());
    }
    let words: Vec<u32> = pages
        .iter()
        .flat_map(|page| [page.slot, page.start as u32, page.len, page.bias.to_bits()])
        .collect();
    let table = Tensor::from_slice(&words, words.len(), &Device::Cuda(device.clone()))?;
    let entry = (device.id(), pages.to_vec(), table.clone());
    match known {
        Some(i) => last[i] = entry,
        None => last.push(entry),
    }
    Ok(table)
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeParams {
    a: u64,
    b: u64,
    a_lse: u64,
    b_lse: u64,
    out: u64,
    lse: u64,
    rows: u64,
    d: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for MergeParams {}

#[repr(C)]
#[derive(Clone, Copy)]
struct MergeBackwardParams {
    a: u64,
    b: u64,
    dout: u64,
    a_lse: u64,
    b_lse: u64,
    dlse: u64,
    da: u64,
    db: u64,
    da_lse: u64,
    db_lse: u64,
    rows: u64,
    d: u32,
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for MergeBackwardParams {}

/// One warp a row, eight rows a block of 256 threads.
fn row_launch(rows: usize) -> Launch {
    Launch { grid: (rows.div_ceil(8).min(65_536) as u32, 1, 1), block: 256, shared_bytes: 0 }
}

/// [`super::merge_states`] on `device`; shapes and types are checked.
pub(super) fn merge_states(
    device: &CudaDevice,
    a: &AttentionState,
    b: &AttentionState,
) -> Result<AttentionState> {
    let (t, h, d) = a.out.dims3()?;
    let dtype = a.out.dtype();
    let (a_out, b_out) = (a.out.contiguous()?, b.out.contiguous()?);
    let (a_lse, b_lse) = (a.lse.contiguous()?, b.lse.contiguous()?);
    let out = cuda::output_tensor(device, dtype, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    let params = MergeParams {
        a: cuda::address(&a_out)?,
        b: cuda::address(&b_out)?,
        a_lse: cuda::address(&a_lse)?,
        b_lse: cuda::address(&b_lse)?,
        out: cuda::address(&out)?,
        lse: cuda::address(&lse)?,
        rows: (t * h) as u64,
        d: d as u32,
    };
    let kernel = format!("merge_states_{}", cuda::suffix("merge_states", dtype)?);
    cuda::launch(device, "merge_states", &kernel, row_launch(t * h), &params)?;
    Ok(AttentionState { out, lse })
}

/// [`super::merge_states_backward`] on `device`; shapes and types are checked.
pub(super) fn merge_states_backward(
    device: &CudaDevice,
    a: &AttentionState,
    b: &AttentionState,
    dout: &Tensor,
    dlse: Option<&Tensor>,
) -> Result<MergeGradients> {
    let (t, h, d) = a.out.dims3()?;
    let dtype = a.out.dtype();
    let (a_out, b_out, dout) = (a.out.contiguous()?, b.out.contiguous()?, dout.contiguous()?);
    let (a_lse, b_lse) = (a.lse.contiguous()?, b.lse.contiguous()?);
    let dlse = dlse.map(Tensor::contiguous).transpose()?;
    let gradients = MergeGradients {
        a_out: cuda::output_tensor(device, dtype, (t, h, d))?,
        a_lse: cuda::output_tensor(device, DType::F32, (t, h))?,
        b_out: cuda::output_tensor(device, dtype, (t, h, d))?,
        b_lse: cuda::output_tensor(device, DType::F32, (t, h))?,
    };
    let params = MergeBackwardParams {
        a: cuda::address(&a_out)?,
        b: cuda::address(&b_out)?,
        dout: cuda::address(&dout)?,
        a_lse: cuda::address(&a_lse)?,
        b_lse: cuda::address(&b_lse)?,
        dlse: dlse.as_ref().map_or(Ok(0), cuda::address)?,
        da: cuda::address(&gradients.a_out)?,
        db: cuda::address(&gradients.b_out)?,
        da_lse: cuda::address(&gradients.a_lse)?,
        db_lse: cuda::address(&gradients.b_lse)?,
        rows: (t * h) as u64,
        d: d as u32,
    };
    let kernel = format!("merge_states_backward_{}", cuda::suffix("merge_states_backward", dtype)?);
    cuda::launch(device, "merge_states", &kernel, row_launch(t * h), &params)?;
    Ok(gradients)
}

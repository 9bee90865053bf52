//! Attention over pages, and the merge of its states, on a CUDA device: which kernel, its parameters and its launch.
//! Knows no masks beyond their encoding: the kernels of `cuda/paged*.cu` apply them.

mod any_dim;
mod decode;
mod merge;
mod pages;
mod union;

pub(super) use merge::{merge_states, merge_states_backward};
pub(super) use union::paged_attention_union;

use super::{AttentionParams, AttentionRun, AttentionState};
use crate::cuda::{self, Launch, Words};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};
use pages::{INLINE_PAGES, Page, encoded, visible_pages};

/// Runs of queries of one launch; as in `cuda/paged_prefill_f32.cu`.
const MAX_RUNS: usize = 16;
/// Query rows of one tile of the f32 prefill.
const PREFILL_ROWS: usize = 64;

/// One call: tensors, what is attended to, and the list that the kernels read.
#[derive(Clone, Copy)]
struct Call<'a> {
    /// (t, h, d), contiguous.
    q: &'a Tensor,
    /// (s, g, 64, d), of the type of `q`.
    keys: &'a Tensor,
    /// (s, g, 64, d), of the type of `q`.
    values: &'a Tensor,
    /// (t, h, d), of the type of `q`; written.
    out: &'a Tensor,
    /// (t, h), f32; written.
    lse: &'a Tensor,
    params: &'a AttentionParams,
    pages: &'a [Page],
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

impl PagedParams {
    /// What every kernel is told, of one split without partial sums.
    fn new(call: &Call, table: Option<&Words>) -> Result<Self> {
        let (t, h, _) = call.q.dims3()?;
        let g = call.keys.dim(1)?;
        let params = call.params;
        Ok(Self {
            q: cuda::address(call.q)?,
            keys: cuda::address(call.keys)?,
            values: cuda::address(call.values)?,
            out: cuda::address(call.out)?,
            lse: cuda::address(call.lse)?,
            partial: 0,
            counters: 0,
            table: table.map_or(0, Words::address),
            query_start: params.query_start,
            window_tokens: params.window_tokens.unwrap_or(u64::MAX),
            sliding_window: params.sliding_window.unwrap_or(u64::MAX),
            t: t as u32,
            h: h as u32,
            g: g as u32,
            group: (h / g) as u32,
            num_pages: call.pages.len() as u32,
            tiles: 0,
            splits: 1,
            scale: params.scale * std::f32::consts::LOG2_E,
            pages: pages::inline(if table.is_none() { call.pages } else { &[] }),
        })
    }
}

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
    let rows = t * (h / g);
    let is_few = !small && decode::takes(g, rows);
    let is_tiled = small || matches!(d, 64 | 96 | 128 | 256);
    if dtype == DType::F32
        && !(is_tiled && has_room_f32(d, is_few, cuda::max_shared_bytes(device)?))
    {
        return any_dim::paged_attention(device, q, keys, values, params);
    }
    if !is_tiled {
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
    let call = Call { q, keys, values, out: &out, lse: &lse, params, pages: &pages };
    if is_few {
        decode::launch(device, &call)?;
    } else if dtype == DType::F32 {
        let run = Run { first: 0, queries: t as u32, first_page: 0, end_page: pages.len() as u32 };
        prefill_f32(device, &call, &[run])?;
    } else {
        let table = pages::table(device, &pages)?;
        let launch = Launch {
            grid: (rows.div_ceil(128) as u32, g as u32, 1),
            block: if d == 256 { 256 } else { 128 },
            shared_bytes: ((128 + 4 * PAGE_TOKENS) * (d + 8) * 2) as u32,
        };
        let kernel = format!("paged_prefill_{suffix}_{d}");
        let params = PagedParams::new(&call, table.as_ref())?;
        cuda::launch(device, "paged_prefill_sm80", &kernel, launch, &params)?;
    }
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
        || !has_room_f32(d, false, cuda::max_shared_bytes(device)?)
    {
        return Ok(None);
    }
    check_pools(q, keys, values)?;
    let pages: Vec<Page> =
        params.pages.iter().map(|page| encoded(page, params, t)).collect::<Result<_>>()?;
    let out = cuda::output_tensor(device, DType::F32, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    let mut first = 0;
    let of = |run: &AttentionRun| {
        let (first_page, end_page) = (run.pages.start as u32, run.pages.end as u32);
        let own = Run { first, queries: run.queries as u32, first_page, end_page };
        first += own.queries;
        own
    };
    let runs: Vec<Run> = runs.iter().map(of).collect();
    let call = Call { q, keys, values, out: &out, lse: &lse, params, pages: &pages };
    prefill_f32(device, &call, &runs)?;
    Ok(Some(AttentionState { out, lse }))
}

/// Launches the f32 prefill over `runs`, at most [`MAX_RUNS`].
fn prefill_f32(device: &CudaDevice, call: &Call, runs: &[Run]) -> Result<()> {
    let d = call.q.dim(2)?;
    let table = pages::table(device, call.pages)?;
    let all = PagedParams::new(call, table.as_ref())?;
    let mut params = PrefillParams { all, runs: [Run::default(); MAX_RUNS] };
    params.runs[..runs.len()].copy_from_slice(runs);
    let longest = runs.iter().map(|run| run.queries).max().unwrap_or(0) * all.group;
    let grid = (longest.div_ceil(PREFILL_ROWS as u32), all.g, runs.len() as u32);
    let launch = Launch { grid, block: 256, shared_bytes: prefill_bytes_f32(d) as u32 };
    cuda::launch(device, "paged_prefill_f32", &format!("paged_prefill_f32_{d}"), launch, &params)
}

/// Shared memory of a block of the f32 prefill in bytes: queries, keys and values of d channels and a tile of scores.
const fn prefill_bytes_f32(d: usize) -> usize {
    PAGE_TOKENS * (3 * d + 4 + PAGE_TOKENS) * 4
}

/// Whether a block of the f32 kernels has room in the `card_bytes` of shared memory that a card gives it: of those for few
/// query rows, or of the prefill. Where it has none, the kernel for any head_dim works, which needs 4 KiB.
const fn has_room_f32(d: usize, is_few: bool, card_bytes: usize) -> bool {
    let bytes = if is_few { decode::shared_bytes_f32(d) } else { prefill_bytes_f32(d) };
    bytes <= card_bytes
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{self, AttentionPart, PageRef, ShareSums};
    use candle_core::Device;

    #[test]
    fn a_card_runs_the_tiled_f32_kernels_that_its_shared_memory_has_room_for() {
        let fit = |is_few: bool, kib: usize| -> Vec<usize> {
            let dims: &[usize] =
                if is_few { &[64, 96, 128, 256] } else { &[16, 32, 64, 96, 128, 256] };
            dims.iter().copied().filter(|d| has_room_f32(*d, is_few, kib * 1024)).collect()
        };
        // sm_86, sm_89 and sm_120; sm_80; sm_90.
        assert_eq!((fit(true, 99), fit(false, 99)), (vec![64, 96, 128], vec![16, 32, 64, 96]));
        assert_eq!(fit(true, 163), [64, 96, 128, 256]);
        assert_eq!(fit(false, 163), [16, 32, 64, 96, 128]);
        assert_eq!(fit(true, 227), [64, 96, 128, 256]);
        assert_eq!(fit(false, 227), [16, 32, 64, 96, 128, 256]);
    }

    /// Shared memory that every card gives a block.
    const LEAST_SHARED_BYTES: usize = 48 * 1024;

    /// What `t` queries of 8 heads over 2 attend to in seven pages, at once, in two runs and as a union, on `device`: every
    /// result. On a card none of the last two is one launch.
    fn attended(device: &Device, t: usize, d: usize) -> Result<Vec<Tensor>> {
        let (h, g, total) = (8, 2, 6 * PAGE_TOKENS + 50);
        let wave = |frequency: f32, shape: &[usize]| {
            let count = shape.iter().product::<usize>();
            let numbers: Vec<f32> = (0..count).map(|i| (i as f32 * frequency).sin()).collect();
            Tensor::from_vec(numbers, shape, &Device::Cpu)?.to_device(device)
        };
        let (q, pool) = (wave(0.37, &[t, h, d])?, [8, g, PAGE_TOKENS, d]);
        let (keys, values) = (wave(0.11, &pool)?, wave(0.23, &pool)?);
        let page = |i: usize| PageRef {
            slot: 7 - i,
            start: (i * PAGE_TOKENS) as u64,
            len: PAGE_TOKENS.min(total - i * PAGE_TOKENS),
            bias: [0.0, 0.5][i % 2],
        };
        let over = |pages: std::ops::Range<usize>| AttentionParams {
            scale: 1.0 / (d as f32).sqrt(),
            query_start: (total - t) as u64,
            pages: pages.map(page).collect(),
            ..AttentionParams::default()
        };
        let (all, first, second) = (over(0..7), over(0..3), over(3..7));
        let at_once = attention::paged_attention(&q, &keys, &values, &all)?;
        let mut results = vec![at_once.out, at_once.lse];
        if t > 1 {
            let runs = [
                AttentionRun { queries: t / 3, pages: 0..4 },
                AttentionRun { queries: t - t / 3, pages: 1..7 },
            ];
            let apart = attention::paged_attention_runs(&q, &keys, &values, &all, &runs)?;
            results.extend([apart.out, apart.lse]);
            if let Device::Cuda(device) = device {
                let launched = paged_attention_runs(device, &q, &keys, &values, &all, &runs)?;
                assert!(launched.is_none());
            }
        }
        let part = |params| AttentionPart { q: &q, keys: &keys, values: &values, params };
        let parts = [part(&first), part(&second)];
        let sums = Tensor::zeros(h + 1, DType::F32, device)?;
        let shares = ShareSums { part: 1, sums: &sums, recovered: None };
        let union = attention::paged_attention_union(&parts, (t == 1).then_some(&shares))?;
        if let Device::Cuda(device) = device {
            assert!(paged_attention_union(device, &parts, None)?.is_none());
        }
        results.extend([union.state.out, union.state.lse]);
        results.extend(union.part_lses);
        results.push(sums);
        Ok(results)
    }

    #[test]
    fn a_card_of_little_shared_memory_attends_by_the_kernel_for_any_head_dim() -> Result<()> {
        cuda::poison_outputs(true);
        let gpu = match cuda::open(0) {
            Ok(gpu) => gpu,
            Err(error) => {
                println!("little shared memory: skipped: no CUDA device: {error}");
                return Ok(());
            }
        };
        let flat = |x: &Tensor| x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
        for d in [96, 128, 256] {
            // Few rows, then such that a row's pages are split, and such that they are not.
            for t in [1, 40, 300] {
                assert!(!has_room_f32(d, t == 1, LEAST_SHARED_BYTES));
                let results = cuda::with_shared_bytes(LEAST_SHARED_BYTES, || attended(&gpu, t, d))?;
                let expected = attended(&Device::Cpu, t, d)?;
                assert_eq!(results.len(), expected.len());
                for (i, (own, expected)) in results.iter().zip(&expected).enumerate() {
                    let (own, expected) = (flat(own)?, flat(expected)?);
                    let is_near =
                        |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 2e-5 * (1.0 + b.abs());
                    assert!(
                        own.len() == expected.len() && own.iter().zip(&expected).all(is_near),
                        "result {i} of {t} queries of {d}"
                    );
                }
            }
        }
        Ok(())
    }
}

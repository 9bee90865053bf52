//! Few query rows over pages: the pages are split over the device instead of the queries. Which kernel, how many splits.
//! Knows no page but its place in the list.

use super::pages::{self, INLINE_PAGES, Page};
use super::{Call, PagedParams};
use crate::cuda::{self, Launch, PerDevice, Words};
use crate::pages::PAGE_TOKENS;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result};

/// Query rows (tokens · heads of the group) of one tile; as in `cuda/paged.cuh` and `cuda/decode_params.cuh`, like all
/// numbers here.
pub(super) const DECODE_ROWS: usize = 8;
/// Query rows of a key/value head that a decode takes, so also its tokens.
const MAX_DECODE_ROWS: usize = 16;
/// Splits that the end through memory adds.
pub(super) const MAX_SPLITS: usize = 256;
/// Pages of the smallest split that ends through memory: fewer would not outweigh the merge of one more part.
const MIN_SPLIT_PAGES: usize = 2;
/// Splits that meet in a cluster.
const CLUSTER: usize = 8;
/// Keys and values of a call, in bytes, up to which clusters are faster: on an H200 22.0 µs for 24.4 at 48 MiB, 28.0 for
/// 26.4 at 64 MiB.
const MAX_CLUSTER_BYTES: usize = 48 << 20;
/// Tiles, or rows where clusters count them, whose arrivals are counted.
const MAX_COUNTERS: usize = 4096;

/// Parameters of the 16-bit kernels whose list is a table.
#[repr(C)]
#[derive(Clone, Copy)]
struct DecodeParams {
    q: u64,
    keys: u64,
    values: u64,
    out: u64,
    lse: u64,
    partial: u64,
    counters: u64,
    table: u64,
    first: [i32; MAX_DECODE_ROWS],
    t: u32,
    h: u32,
    g: u32,
    group: u32,
    num_pages: u32,
    tiles: u32,
    splits: u32,
    scale: f32,
    group_inverse: u32,
    split_pages: u32,
    longer_splits: u32,
}

const _: () = assert!(size_of::<DecodeParams>() == 176);

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for DecodeParams {}

/// The same with the list.
#[repr(C)]
#[derive(Clone, Copy)]
struct InlineParams {
    call: DecodeParams,
    pages: [Page; INLINE_PAGES],
}

const _: () = assert!(size_of::<InlineParams>() == 176 + INLINE_PAGES * 16);

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for InlineParams {}

/// Shared memory of a block of the f32 kernels in bytes: two pages of keys, rows of d + 4.
pub(super) const fn shared_bytes_f32(d: usize) -> usize {
    2 * PAGE_TOKENS * (d + 4) * 4
}

/// Whether `rows` query rows of each of `g` key/value heads are few enough for the kernels here.
pub(super) fn takes(g: usize, rows: usize) -> bool {
    rows <= MAX_DECODE_ROWS && g * rows <= MAX_COUNTERS
}

/// Attention of a call that [`takes`] admits, of head_dim 64, 96, 128 or 256, over at least one page.
pub(super) fn launch(device: &CudaDevice, call: &Call) -> Result<()> {
    let (t, h, d) = call.q.dims3()?;
    let g = call.keys.dim(1)?;
    let dtype = call.q.dtype();
    let tiles = (t * (h / g)).div_ceil(DECODE_ROWS);
    let plan = Plan::new(device, dtype, d, (g, tiles), call.pages.len())?;
    // (parts, 8, d) and the maximum and sum of each row.
    let parts = g * tiles * if plan.clusters { plan.splits / CLUSTER } else { plan.splits };
    let partial = cuda::output_tensor(device, DType::F32, parts * DECODE_ROWS * (d + 2))?;
    let counters = counters(device)?;
    let table = pages::table(device, call.pages)?;
    let grid = (g as u32, plan.splits as u32, tiles as u32);
    let suffix = cuda::suffix("paged_attention", dtype)?;
    if dtype == DType::F32 {
        let params = PagedParams {
            partial: cuda::address(&partial)?,
            counters: counters.address(),
            tiles: tiles as u32,
            splits: plan.splits as u32,
            ..PagedParams::new(call, table.as_ref())?
        };
        let shared_bytes = shared_bytes_f32(d) as u32;
        let launch = Launch { grid, block: d as u32, shared_bytes };
        let kernel = format!("paged_decode_{suffix}_{d}");
        return cuda::launch(device, "paged_decode_f32", &kernel, launch, &params);
    }
    let params = DecodeParams {
        partial: cuda::address(&partial)?,
        counters: counters.address(),
        table: table.as_ref().map_or(0, Words::address),
        ..DecodeParams::new(call, tiles, plan.splits)?
    };
    let source = if plan.clusters { "paged_decode_sm90" } else { "paged_decode_sm80" };
    let launch = Launch { grid, block: 128, shared_bytes: 0 };
    if table.is_some() {
        let kernel = format!("paged_decode_table_{suffix}_{d}");
        cuda::launch(device, source, &kernel, launch, &params)
    } else {
        let kernel = format!("paged_decode_inline_{suffix}_{d}");
        let params = InlineParams { call: params, pages: pages::inline(call.pages) };
        cuda::launch(device, source, &kernel, launch, &params)
    }
}

impl DecodeParams {
    /// What the kernels are told of a call but the memory of their parts and the list.
    fn new(call: &Call, tiles: usize, splits: usize) -> Result<Self> {
        let (t, h, _) = call.q.dims3()?;
        let g = call.keys.dim(1)?;
        let (group, num_pages) = (h / g, call.pages.len());
        let mut first = [0; MAX_DECODE_ROWS];
        for (i, first) in first.iter_mut().enumerate().take(t) {
            let start = call.params.query_start;
            let relative = call.params.first_visible(start + i as u64) as i64 - start as i64;
            // Pages further back are visible to all queries alike, or refused.
            *first = relative.max(-(1 << 30)) as i32;
        }
        Ok(Self {
            q: cuda::address(call.q)?,
            keys: cuda::address(call.keys)?,
            values: cuda::address(call.values)?,
            out: cuda::address(call.out)?,
            lse: cuda::address(call.lse)?,
            partial: 0,
            counters: 0,
            table: 0,
            first,
            t: t as u32,
            h: h as u32,
            g: g as u32,
            group: group as u32,
            num_pages: num_pages as u32,
            tiles: tiles as u32,
            splits: splits as u32,
            scale: call.params.scale * std::f32::consts::LOG2_E,
            group_inverse: (65_536 / group + 1) as u32,
            split_pages: (num_pages / splits) as u32,
            longer_splits: (num_pages % splits) as u32,
        })
    }
}

/// How the pages are split, and where the splits meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// In clusters of [`CLUSTER`] blocks, or else in memory.
    clusters: bool,
    /// A multiple of [`CLUSTER`] where they meet there.
    splits: usize,
}

impl Plan {
    /// For `pages` of `g` key/value heads with `tiles` tiles each.
    fn new(
        device: &CudaDevice,
        dtype: DType,
        d: usize,
        (g, tiles): (usize, usize),
        pages: usize,
    ) -> Result<Self> {
        if dtype == DType::F32 {
            let splits = splits_f32(wave_f32(device, d, g * tiles)?, pages).max(1);
            return Ok(Self { clusters: false, splits });
        }
        let processors = cuda::multiprocessors(device)?;
        let bytes = pages * PAGE_TOKENS * g * d * 4;
        if d <= 128 && bytes <= MAX_CLUSTER_BYTES && cuda::is_sm90(device)? {
            // Blocks of an SM, one below what fits: clusters stay within a GPC and leave some of it. At head_dim 64 and
            // 65,536 keys on an H200 128 splits of three heads take 22.0 µs, 88 23.5 and 176 25.4.
            let resident = if d == 128 { 2 } else { 3 };
            let wave = processors * resident / (g * tiles) / CLUSTER;
            if wave > 0 {
                let splits = wave.min(pages / CLUSTER).max(1) * CLUSTER;
                let splits = even_splits(pages, splits).next_multiple_of(CLUSTER);
                return Ok(Self { clusters: true, splits });
            }
        }
        // Blocks that fit an SM at once, by their registers; at head_dim 128 two of the three that fit (128 MB of K and
        // V on an H200: 42.5 µs in 32 splits, 43.2 in 48). More than 128 splits cost more at their end than they save,
        // once there are two blocks an SM (three heads of 64, 65,536 keys: 24.4 µs in 128, 25.5 in 176).
        let resident = if matches!(d, 64 | 96) { 4 } else { 2 };
        let wave = processors * resident / (g * tiles);
        let enough = (2 * processors / (g * tiles)).max(128);
        let splits = wave.min(enough).min(pages / MIN_SPLIT_PAGES).clamp(1, MAX_SPLITS);
        Ok(Self { clusters: false, splits: even_splits(pages, splits) })
    }
}

/// Splits of which a card works on all at once, for each of `tiles` tiles of all heads, f32: as many blocks as fit its SMs
/// by their shared memory.
pub(super) fn wave_f32(device: &CudaDevice, d: usize, tiles: usize) -> Result<usize> {
    let resident = match d {
        64 => 4,
        256 => 1,
        _ => 2,
    };
    Ok(cuda::multiprocessors(device)? * resident / tiles)
}

/// Splits of `pages` pages where there may be `wave`; none of no page.
pub(super) fn splits_f32(wave: usize, pages: usize) -> usize {
    wave.min(pages / MIN_SPLIT_PAGES).clamp(pages.min(1), MAX_SPLITS)
}

/// The fewest splits whose longest is no longer than that of `splits`.
fn even_splits(pages: usize, splits: usize) -> usize {
    pages.div_ceil(pages.div_ceil(splits))
}

/// The arrival counters of `device`: zero, and left at zero by every launch.
pub(super) fn counters(device: &CudaDevice) -> Result<Words> {
    static COUNTERS: PerDevice<Option<Words>> = PerDevice::new();
    COUNTERS.with(device, |counters| match counters {
        Some(counters) => Ok(counters.clone()),
        None => Ok(counters.insert(Words::zeros(device, MAX_COUNTERS)?).clone()),
    })
}

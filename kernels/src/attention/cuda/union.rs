//! Few query rows over several page lists with one softmax: one launch in the place of one a list and their merges.
//! Knows no page but its place in a list.

use super::decode::{self, DECODE_ROWS, MAX_SPLITS};
use super::pages::{self, INLINE_PAGES, Page, visible_pages};
use crate::attention::{AttentionPart, AttentionState, AttentionUnion, ShareSums};
use crate::cuda::{self, Launch, Words};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result};
use std::mem::offset_of;

/// Lists of one launch; as in `cuda/paged_union_f32.cu`, like all numbers here.
const MAX_PARTS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Part {
    q: u64,
    keys: u64,
    values: u64,
    query_start: u64,
    window_tokens: u64,
    sliding_window: u64,
    first_page: u32,
    num_pages: u32,
    first_split: u32,
    splits: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UnionParams {
    out: u64,
    lse: u64,
    partial: u64,
    counters: u64,
    table: u64,
    sums: u64,
    recovered: u64,
    t: u32,
    h: u32,
    g: u32,
    group: u32,
    tiles: u32,
    splits: u32,
    parts: u32,
    counted: u32,
    scale: f32,
    part: [Part; MAX_PARTS],
    pages: [Page; INLINE_PAGES],
}

const _: () = {
    assert!(offset_of!(UnionParams, part) == 96 && size_of::<Part>() == 64);
    assert!(offset_of!(UnionParams, pages) == 96 + MAX_PARTS * 64);
    assert!(size_of::<UnionParams>() == 96 + MAX_PARTS * 64 + INLINE_PAGES * 16);
};

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for UnionParams {}

/// [`super::super::paged_attention_union`] on `device` in one launch; every part is checked by itself, and against the
/// others. None where one launch does not do it.
pub(in super::super) fn paged_attention_union(
    device: &CudaDevice,
    parts: &[AttentionPart<'_>],
    shares: Option<&ShareSums<'_>>,
) -> Result<Option<AttentionUnion>> {
    let Some(first) = parts.first() else { return Ok(None) };
    let (t, h, d) = first.q.dims3()?;
    let g = first.keys.dim(1)?;
    let takes = |part: &AttentionPart<'_>| {
        let scale = part.params.scale;
        part.keys.dims()[1] == g && scale == first.params.scale && part.q.dtype() == DType::F32
    };
    if !(2..=MAX_PARTS).contains(&parts.len())
        || !parts.iter().all(takes)
        || !matches!(d, 64 | 96 | 128 | 256)
        || t == 0
        || h == 0
        || !decode::takes(g, t * (h / g))
        || !super::has_room_f32(d, true, cuda::max_shared_bytes(device)?)
    {
        return Ok(None);
    }
    let mut queries = Vec::with_capacity(parts.len());
    let mut lists: Vec<Vec<Page>> = Vec::with_capacity(parts.len());
    for part in parts {
        super::check_pools(part.q, part.keys, part.values)?;
        queries.push(part.q.contiguous()?);
        lists.push(visible_pages(part.params, t)?);
    }
    let listed: usize = lists.iter().map(Vec::len).sum();
    if listed == 0 {
        return Ok(None);
    }
    let tiles = (t * (h / g)).div_ceil(DECODE_ROWS);
    let wave = decode::wave_f32(device, d, g * tiles)?.min(MAX_SPLITS - MAX_PARTS);
    let mut encoded = [Part::default(); MAX_PARTS];
    let (mut first_page, mut splits) = (0, 0);
    for (own, ((part, q), list)) in encoded.iter_mut().zip(parts.iter().zip(&queries).zip(&lists)) {
        let params = part.params;
        // Rounded up, one more a part at most: within MAX_SPLITS.
        let own_splits = decode::splits_f32((wave * list.len()).div_ceil(listed), list.len());
        *own = Part {
            q: cuda::address(q)?,
            keys: cuda::address(part.keys)?,
            values: cuda::address(part.values)?,
            query_start: params.query_start,
            window_tokens: params.window_tokens.unwrap_or(u64::MAX),
            sliding_window: params.sliding_window.unwrap_or(u64::MAX),
            first_page: first_page as u32,
            num_pages: list.len() as u32,
            first_split: splits as u32,
            splits: own_splits as u32,
        };
        first_page += list.len();
        splits += own_splits;
    }
    let list = lists.concat();
    let table = pages::table(device, &list)?;
    let out = cuda::output_tensor(device, DType::F32, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (1 + parts.len(), t, h))?;
    // (parts, 8, d) and the maximum and sum of each row.
    let partial =
        cuda::output_tensor(device, DType::F32, g * tiles * splits * DECODE_ROWS * (d + 2))?;
    let counters = decode::counters(device)?;
    let recovered = shares.and_then(|shares| shares.recovered);
    let params = UnionParams {
        out: cuda::address(&out)?,
        lse: cuda::address(&lse)?,
        partial: cuda::address(&partial)?,
        counters: counters.address(),
        table: table.as_ref().map_or(0, Words::address),
        sums: shares.map_or(Ok(0), |shares| cuda::address(shares.sums))?,
        recovered: recovered.map_or(Ok(0), cuda::address)?,
        t: t as u32,
        h: h as u32,
        g: g as u32,
        group: (h / g) as u32,
        tiles: tiles as u32,
        splits: splits as u32,
        parts: parts.len() as u32,
        counted: shares.map_or(0, |shares| shares.part) as u32,
        scale: first.params.scale * std::f32::consts::LOG2_E,
        part: encoded,
        pages: pages::inline(if table.is_none() { &list } else { &[] }),
    };
    let grid = (g as u32, splits as u32, tiles as u32);
    let shared_bytes = decode::shared_bytes_f32(d) as u32;
    let launch = Launch { grid, block: d as u32, shared_bytes };
    cuda::launch(device, "paged_union_f32", &format!("paged_union_f32_{d}"), launch, &params)?;
    let lse_of = |i: usize| lse.narrow(0, i, 1)?.reshape((t, h));
    let part_lses = (1..=parts.len()).map(lse_of).collect::<Result<_>>()?;
    Ok(Some(AttentionUnion { state: AttentionState { out, lse: lse_of(0)? }, part_lses }))
}

//! Paged attention in f32 on a CUDA device for the head dimensions that the tiled kernels do not take.
//! Knows no more of a stream than the CPU's version; shapes were checked before.

use crate::attention::{AttentionParams, AttentionState};
use crate::cuda::{self, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

/// As in `cuda/paged_any_f32.cu`.
const MAX_DIM: usize = 256;
const MAX_INLINE_PAGES: usize = 128;
const WARPS: usize = 4;
/// Warps that keep an H100's 132 multiprocessors busy with some to spare: 16 each.
const ENOUGH_WARPS: usize = 2112;
/// Pages below which a split costs more than it saves.
const MIN_SPLIT_PAGES: usize = 2;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Page {
    start: u64,
    slot: u32,
    len: u32,
    bias: f32,
    unused: u32,
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
    pages: u64,
    query_start: u64,
    window: u64,
    sliding: u64,
    t: u32,
    h: u32,
    g: u32,
    d: u32,
    num_pages: u32,
    splits: u32,
    scale: f32,
    unused: u32,
    inline_pages: [Page; MAX_INLINE_PAGES],
}

// SAFETY: plain numbers in C layout, as the kernel declares them.
unsafe impl DeviceRepr for PagedParams {}

/// [`crate::paged_attention`] on `device`; shapes, slots, biases and types are checked, `q` is contiguous.
pub(super) fn paged_attention(
    device: &CudaDevice,
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: &AttentionParams,
) -> Result<AttentionState> {
    let (t, h, d) = q.dims3()?;
    let g = keys.dim(1)?;
    if d > MAX_DIM {
        bail!("paged_attention: head_dim {d}, expected at most {MAX_DIM} on CUDA");
    }
    let rows = t * h;
    let out = cuda::output_tensor(device, DType::F32, (t, h, d))?;
    let lse = cuda::output_tensor(device, DType::F32, (t, h))?;
    if rows == 0 {
        return Ok(AttentionState { out, lse });
    }
    let num_pages = params.pages.len();
    let splits = (ENOUGH_WARPS / rows).clamp(1, (num_pages / MIN_SPLIT_PAGES).max(1));
    let partial = match splits {
        1 => None,
        _ => Some(cuda::output_tensor(device, DType::F32, (splits, rows, d + 2))?),
    };
    let pages: Vec<Page> = params
        .pages
        .iter()
        .map(|page| Page {
            start: page.start,
            slot: page.slot as u32,
            len: page.len as u32,
            bias: page.bias,
            unused: 0,
        })
        .collect();
    let mut inline_pages = [Page::default(); MAX_INLINE_PAGES];
    let uploaded = match inline_pages.get_mut(..num_pages) {
        Some(inline) => {
            inline.copy_from_slice(&pages);
            None
        }
        None => {
            let words = pages.iter().flat_map(|page| {
                [
                    page.start as u32,
                    (page.start >> 32) as u32,
                    page.slot,
                    page.len,
                    page.bias.to_bits(),
                    0,
                ]
            });
            Some(Tensor::from_iter(words, q.device())?)
        }
    };
    let address = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Ok(0), cuda::address);
    let kernel_params = PagedParams {
        q: cuda::address(q)?,
        keys: cuda::address(keys)?,
        values: cuda::address(values)?,
        out: cuda::address(&out)?,
        lse: cuda::address(&lse)?,
        partial: address(&partial)?,
        pages: address(&uploaded)?,
        query_start: params.query_start,
        window: params.window_tokens.unwrap_or(u64::MAX),
        sliding: params.sliding_window.unwrap_or(u64::MAX),
        t: t as u32,
        h: h as u32,
        g: g as u32,
        d: d as u32,
        num_pages: num_pages as u32,
        splits: splits as u32,
        scale: params.scale,
        unused: 0,
        inline_pages,
    };
    let blocks = rows.div_ceil(WARPS) as u32;
    let launch =
        |splits| Launch { grid: (blocks, splits, 1), block: 32 * WARPS as u32, shared_bytes: 0 };
    let source = "paged_any_f32";
    cuda::launch(device, source, source, launch(splits as u32), &kernel_params)?;
    if splits > 1 {
        cuda::launch(device, source, "paged_any_join_f32", launch(1), &kernel_params)?;
    }
    Ok(AttentionState { out, lse })
}

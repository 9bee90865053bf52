//! Causal attention of new tokens over a list of pages, and the merge of two such attentions.
//! Knows no stream: which pages, and what of them a query may see, are arguments.

#[cfg(feature = "cuda")]
mod cuda;
mod merge;
mod portable;
mod union;

pub use merge::{MergeGradients, merge_states, merge_states_backward};
pub use union::{AttentionUnion, ShareSums, paged_attention_union};

use crate::pages::PAGE_TOKENS;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{Result, Tensor};
use std::ops::Range;

/// One page of the key/value pool as a query sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PageRef {
    /// Index of the page in the pool.
    pub slot: usize,
    /// Stream position of the page's first token.
    pub start: u64,
    /// Tokens in the page, at most [`PAGE_TOKENS`].
    pub len: usize,
    /// Added to every score of the page: the log of its level's gate, 0 for none, -inf for a page that no query sees.
    pub bias: f32,
}

/// What one call attends to.
#[derive(Debug, Clone, Default)]
pub struct AttentionParams {
    /// Factor on q·k, 1/√head_dim for the models here.
    pub scale: f32,
    /// Stream position of the first query token; the others follow it.
    pub query_start: u64,
    /// Pages to attend, ascending by `start`; keys after the query's own position are masked.
    pub pages: Vec<PageRef>,
    /// A query at position `t` sees whole pages from the one that holds `t + 1 - window_tokens` on. None: all pages.
    pub window_tokens: Option<u64>,
    /// A query at `t` sees keys later than `t - sliding_window` only: the model's own token-exact window.
    pub sliding_window: Option<u64>,
}

impl AttentionParams {
    /// First stream position that a query at `position` may see.
    #[inline(always)]
    fn first_visible(&self, position: u64) -> u64 {
        let page = PAGE_TOKENS as u64;
        let by_page =
            self.window_tokens.map_or(0, |w| (position + 1).saturating_sub(w) / page * page);
        let by_token = self.sliding_window.map_or(0, |w| (position + 1).saturating_sub(w));
        by_page.max(by_token)
    }
}

/// Query tokens that attend to pages of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionRun {
    /// Tokens, the next ones of the queries.
    pub queries: usize,
    /// Of [`AttentionParams::pages`]; empty for none.
    pub pages: Range<usize>,
}

/// The result of attending to one set of keys, mergeable with that of another set.
///
/// On the CPU a query that is not a number gives NaN; on CUDA its `lse` is -inf, and `out` NaN or 0, as the kernel has it.
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// (t, h, d), f32, or the 16-bit type of the pages on CUDA: the softmax-weighted mean of the values; 0 for a query that saw no key.
    pub out: Tensor,
    /// (t, h), f32: log of the sum of e^score; -inf for a query that saw no key.
    pub lse: Tensor,
}

/// One of several sets of keys that queries attend to, each for itself.
#[derive(Debug, Clone, Copy)]
pub struct AttentionPart<'a> {
    /// (t, h, d), rotated.
    pub q: &'a Tensor,
    /// (s, g, PAGE_TOKENS, d), rotated.
    pub keys: &'a Tensor,
    /// The same shape.
    pub values: &'a Tensor,
    /// Which pages, and what of them is seen.
    pub params: &'a AttentionParams,
}

/// Attention of `q` over the pages of one layer, with one online softmax in f32.
///
/// Shapes: `q` (t, h, d), rotated; `keys`, `values` (s, g, PAGE_TOKENS, d), contiguous; h a multiple of g, head i
/// reading key/value head i / (h / g). Nothing of the pool is copied.
/// Types: on the CPU f32, keys and values also bf16 or f16; on CUDA f32, bf16 or f16, all three alike, where d is 64, 96,
/// 128 or 256, for f32 also 16 or 32.
///
/// The split of the work depends on the shapes alone, so that equal inputs give equal bits on any number of threads.
///
/// Source: FlashAttention-2 (arXiv 2307.08691) algorithm 1; pages as in PagedAttention (arXiv 2309.06180) section 4.
///
/// # Errors
/// If shapes, types or devices disagree, a page lies outside the pool, or a bias is NaN or +inf.
pub fn paged_attention(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: &AttentionParams,
) -> Result<AttentionState> {
    let part = AttentionPart { q, keys, values, params };
    let states = paged_attention_parts(&[part])?;
    states.into_iter().next().ok_or_else(|| candle_core::Error::msg("paged_attention: no state"))
}

/// [`paged_attention`] of each part, one state each; on the CPU they are worked on side by side, so that a token that
/// attends to several sets of keys waits for its threads once.
///
/// The states are those of each part by itself, bit for bit.
///
/// # Errors
/// As [`paged_attention`].
pub fn paged_attention_parts(parts: &[AttentionPart<'_>]) -> Result<Vec<AttentionState>> {
    for part in parts {
        check(part.q, part.keys, part.values, part.params)?;
    }
    #[cfg(feature = "cuda")]
    if parts.iter().any(|part| part.q.device().is_cuda()) {
        let alone = |part: &AttentionPart<'_>| match part.q.device() {
            Device::Cuda(device) => {
                let q = part.q.contiguous()?;
                cuda::paged_attention(device, &q, part.keys, part.values, part.params)
            }
            _ => paged_attention(part.q, part.keys, part.values, part.params),
        };
        return parts.iter().map(alone).collect();
    }
    portable::solve(parts)
}

/// Whether shapes agree and pages lie in the pool.
fn check(q: &Tensor, keys: &Tensor, values: &Tensor, params: &AttentionParams) -> Result<()> {
    let (_, h, d) = q.dims3()?;
    if h == 0 || d == 0 {
        candle_core::bail!(
            "paged_attention: q {:?}, expected some heads of some channels",
            q.shape()
        );
    }
    let (slots, g, page_tokens, key_dim) = keys.dims4()?;
    if keys.dims() != values.dims() || page_tokens != PAGE_TOKENS || key_dim != d {
        candle_core::bail!(
            "paged_attention: keys {:?}, values {:?}, expected two of (s, g, {PAGE_TOKENS}, {d})",
            keys.shape(),
            values.shape()
        );
    }
    if g == 0 || h % g != 0 {
        candle_core::bail!("paged_attention: {h} query heads, expected a multiple of {g}");
    }
    if let Some(page) = params.pages.iter().find(|p| p.slot >= slots || p.len > PAGE_TOKENS) {
        candle_core::bail!("paged_attention: {page:?}, expected a slot below {slots}");
    }
    if let Some(page) = params.pages.iter().find(|p| p.bias.is_nan() || p.bias == f32::INFINITY) {
        candle_core::bail!("paged_attention: {page:?}, expected a bias that is a number or -inf");
    }
    Ok(())
}

/// [`paged_attention`] for runs of queries that see different pages of `params`, side by side.
///
/// The result is that of each run by itself, its first query at its place behind `params.query_start`, one after the
/// other. On CUDA runs of f32 queries go in one launch, others one by one.
///
/// # Errors
/// As [`paged_attention`], and if the runs are not all queries, or name pages that are not listed.
pub fn paged_attention_runs(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    params: &AttentionParams,
    runs: &[AttentionRun],
) -> Result<AttentionState> {
    let (t, ..) = q.dims3()?;
    let listed = params.pages.len();
    if runs.iter().map(|run| run.queries).sum::<usize>() != t
        || runs.iter().any(|run| run.pages.start > run.pages.end || run.pages.end > listed)
    {
        candle_core::bail!(
            "paged_attention_runs: {runs:?}, expected runs of {t} queries over {listed} pages"
        );
    }
    if t == 0 || matches!(runs, [run] if run.pages == (0..listed)) {
        return paged_attention(q, keys, values, params);
    }
    check(q, keys, values, params)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = q.device()
        && let Some(state) =
            cuda::paged_attention_runs(device, &q.contiguous()?, keys, values, params, runs)?
    {
        return Ok(state);
    }
    let (mut first, mut outs, mut lses) = (0, Vec::new(), Vec::new());
    for run in runs {
        let own = AttentionParams {
            query_start: params.query_start + first as u64,
            pages: params.pages[run.pages.clone()].to_vec(),
            ..*params
        };
        let q = q.narrow(0, first, run.queries)?;
        let state = paged_attention(&q, keys, values, &own)?;
        first += run.queries;
        outs.push(state.out);
        lses.push(state.lse);
    }
    Ok(AttentionState { out: Tensor::cat(&outs, 0)?, lse: Tensor::cat(&lses, 0)? })
}

/// dst (m, n), rows `dst_stride` apart, = keep · dst + a (m, k) b (k, n), each with (row, column) strides; one thread.
#[allow(clippy::too_many_arguments)]
pub(crate) fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    (m, n, k): (usize, usize, usize),
    keep: f32,
) {
    let reach = |(row, column): (usize, usize), rows: usize, columns: usize| {
        (rows - 1) * row + (columns - 1) * column
    };
    assert!(m > 0 && n > 0 && k > 0);
    assert!(reach((dst_stride, 1), m, n) < dst.len());
    assert!(reach(a_strides, m, k) < a.len() && reach(b_strides, k, n) < b.len());
    // SAFETY: the three asserts above bound every element that the strides reach.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            dst_stride as isize,
            keep != 0.0,
            a.as_ptr(),
            a_strides.1 as isize,
            a_strides.0 as isize,
            b.as_ptr(),
            b_strides.1 as isize,
            b_strides.0 as isize,
            keep,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

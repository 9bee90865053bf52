//! Causal attention of new tokens over a list of pages, and the merge of two such attentions.
//! Knows no stream: which pages, and what of them a query may see, are arguments.

#[cfg(feature = "cuda")]
mod cuda;
mod merge;

pub use merge::{MergeGradients, merge_states, merge_states_backward};

use crate::pages::PAGE_TOKENS;
use crate::rows::{add_bf16_rows, add_rows, dot_rows, widen_halves};
use crate::simd::{self, multiversion};
use crate::storage::contiguous_range;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{DType, Layout, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;
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
#[derive(Debug, Clone)]
pub struct AttentionState {
    /// (t, h, d), f32, or the 16-bit type of the pages on CUDA: the softmax-weighted mean of the values; 0 for a query that saw no key.
    pub out: Tensor,
    /// (t, h), f32: log of the sum of e^score; -inf for a query that saw no key.
    pub lse: Tensor,
}

/// Attention of `q` over the pages of one layer, with one online softmax in f32.
///
/// Shapes: `q` (t, h, d), rotated; `keys`, `values` (s, g, PAGE_TOKENS, d), contiguous; h a multiple of g, head i
/// reading key/value head i / (h / g). Nothing of the pool is copied.
/// Types: on the CPU f32, the values also bf16; on CUDA f32, bf16 or f16, all three alike, where d is 64, 96, 128 or
/// 256, for f32 also 16 or 32.
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
    let (t, h, d) = q.dims3()?;
    let g = keys.dim(1)?;
    check(q, keys, values, params)?;
    let q = q.contiguous()?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = q.device() {
        return cuda::paged_attention(device, &q, keys, values, params);
    }
    let (q_storage, q_layout) = q.storage_and_layout();
    let (k_storage, k_layout) = keys.storage_and_layout();
    let (v_storage, v_layout) = values.storage_and_layout();
    let problem = Problem {
        q: cpu_slice(&q_storage, q_layout, "paged_attention: q")?,
        keys: cpu_slice(&k_storage, k_layout, "paged_attention: keys")?,
        values: match values.dtype() {
            DType::BF16 => {
                Values::Bf16(cpu_slice(&v_storage, v_layout, "paged_attention: values")?)
            }
            _ => Values::F32(cpu_slice(&v_storage, v_layout, "paged_attention: values")?),
        },
        t,
        h,
        g,
        d,
        params,
    };
    let (out, lse) = problem.solve();
    Ok(AttentionState {
        out: Tensor::from_vec(out, (t, h, d), q.device())?,
        lse: Tensor::from_vec(lse, (t, h), q.device())?,
    })
}

/// Whether shapes agree and pages lie in the pool.
fn check(q: &Tensor, keys: &Tensor, values: &Tensor, params: &AttentionParams) -> Result<()> {
    let (_, h, d) = q.dims3()?;
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
    if let [run] = runs
        && run.pages == (0..listed)
    {
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

fn cpu_slice<'a, T: WithDType>(
    storage: &'a Storage,
    layout: &Layout,
    name: &str,
) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(cpu) => Ok(&cpu.as_slice::<T>()?[contiguous_range(name, layout)?]),
        _ => candle_core::bail!("{name}: expected {:?} on the CPU", T::DTYPE),
    }
}

/// Values as they are held.
#[derive(Clone, Copy)]
enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [half::bf16]),
}

/// The inputs as slices: q (t, h, d); keys, values (s, g, PAGE_TOKENS, d).
struct Problem<'a> {
    q: &'a [f32],
    keys: &'a [f32],
    values: Values<'a>,
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    params: &'a AttentionParams,
}

/// Queries of one tile, over one key/value head: 32 tokens x 3 heads x 64 floats are 24 KiB, and their scores against
/// one page as much again, so that a tile and a page (16 KiB each of keys and values) stay in a 512 KiB L2.
const TILE_TOKENS: usize = 32;
/// Pages of one split when there are few queries: enough splits to keep every core busy on a window of 2,048 tokens.
const SPLIT_PAGES: usize = 8;
/// From this many query rows on, a page is scored by matrix products instead of row by row.
const GEMM_ROWS: usize = 8;

/// One unit of work: some query tokens of one key/value head over some pages.
struct Task {
    head: usize,
    tokens: Range<usize>,
    pages: Range<usize>,
}

/// Unnormalised running softmax of one task, rows ordered (token, head of the group).
struct Partial {
    /// (rows, d): Σ e^(s - max) v.
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl Problem<'_> {
    fn group(&self) -> usize {
        self.h / self.g
    }

    fn solve(&self) -> (Vec<f32>, Vec<f32>) {
        let split = if self.t * self.group() >= GEMM_ROWS { usize::MAX } else { SPLIT_PAGES };
        let num_pages = self.params.pages.len();
        let mut tasks = Vec::new();
        for head in 0..self.g {
            for first in (0..self.t).step_by(TILE_TOKENS) {
                let tokens = first..(first + TILE_TOKENS).min(self.t);
                for page in (0..num_pages).step_by(split.min(num_pages.max(1))) {
                    let pages = page..page.saturating_add(split).min(num_pages);
                    tasks.push(Task { head, tokens: tokens.clone(), pages });
                }
            }
        }
        let partials: Vec<Partial> = tasks.par_iter().map(|task| self.run(task)).collect();

        let (d, group) = (self.d, self.group());
        let mut out = vec![0f32; self.t * self.h * d];
        let mut lse = vec![f32::NEG_INFINITY; self.t * self.h];
        let mut at = 0;
        while at < tasks.len() {
            let task = &tasks[at];
            let same = |other: &Task| other.head == task.head && other.tokens == task.tokens;
            let splits = tasks[at..].iter().take_while(|other| same(other)).count();
            let parts = &partials[at..at + splits];
            for row in 0..task.tokens.len() * group {
                let index =
                    (task.tokens.start + row / group) * self.h + task.head * group + row % group;
                let max = parts.iter().fold(f32::NEG_INFINITY, |max, p| max.max(p.max[row]));
                if max == f32::NEG_INFINITY {
                    continue;
                }
                let into = &mut out[index * d..(index + 1) * d];
                let mut sum = 0f32;
                for part in parts {
                    let weight = (part.max[row] - max).exp();
                    sum += part.sum[row] * weight;
                    for (o, a) in into.iter_mut().zip(&part.acc[row * d..(row + 1) * d]) {
                        *o += a * weight;
                    }
                }
                into.iter_mut().for_each(|o| *o /= sum);
                lse[index] = max + sum.ln();
            }
            at += splits;
        }
        (out, lse)
    }

    fn run(&self, task: &Task) -> Partial {
        let (d, group) = (self.d, self.group());
        let rows = task.tokens.len() * group;
        let mut partial = Partial {
            acc: vec![0f32; rows * d],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0f32; rows],
        };
        let mut queries = Vec::with_capacity(rows * d);
        for token in task.tokens.clone() {
            let start = (token * self.h + task.head * group) * d;
            queries.extend(self.q[start..start + group * d].iter().map(|x| x * self.params.scale));
        }
        let mut scores = vec![0f32; rows * PAGE_TOKENS];
        let mut wide = Vec::new();
        let last = self.params.query_start + (task.tokens.end as u64).saturating_sub(1);
        let first = self.params.query_start + task.tokens.start as u64;
        for page in &self.params.pages[task.pages.clone()] {
            // Skip pages that no query of the tile sees.
            let page_end = page.start + page.len as u64;
            if page.len == 0 || page.start > last || page_end <= self.params.first_visible(first) {
                continue;
            }
            let at = (page.slot * self.g + task.head) * PAGE_TOKENS * d;
            let keys = &self.keys[at..at + page.len * d];
            let page_values = at..at + page.len * d;
            let visible = |row: usize| -> Range<usize> {
                let position = self.params.query_start + (task.tokens.start + row / group) as u64;
                let from = self.params.first_visible(position).saturating_sub(page.start);
                let to = (position + 1).saturating_sub(page.start).min(page.len as u64);
                (from as usize).min(to as usize)..to as usize
            };
            if rows >= GEMM_ROWS {
                let shape = (rows, page.len, d);
                matmul(&mut scores, PAGE_TOKENS, &queries, (d, 1), keys, (1, d), shape, 0.0);
                for row in 0..rows {
                    let row_scores = &mut scores[row * PAGE_TOKENS..row * PAGE_TOKENS + page.len];
                    let range = visible(row);
                    if page.bias != 0.0 {
                        row_scores.iter_mut().for_each(|score| *score += page.bias);
                    }
                    row_scores[..range.start].fill(f32::NEG_INFINITY);
                    row_scores[range.end..].fill(f32::NEG_INFINITY);
                    let acc = &mut partial.acc[row * d..(row + 1) * d];
                    softmax_row(row_scores, acc, &mut partial.max[row], &mut partial.sum[row]);
                }
                let values = match self.values {
                    Values::F32(values) => &values[page_values],
                    Values::Bf16(values) => {
                        wide.resize(page.len * d, 0.0);
                        widen_halves(&values[page_values], &mut wide);
                        &wide
                    }
                };
                let shape = (rows, d, page.len);
                matmul(&mut partial.acc, d, &scores, (PAGE_TOKENS, 1), values, (d, 1), shape, 1.0);
            } else {
                for token in 0..task.tokens.len() {
                    let range = visible(token * group);
                    if range.is_empty() {
                        continue;
                    }
                    let part = range.start * d..range.end * d;
                    let own = &queries[token * group * d..(token + 1) * group * d];
                    dot_rows(own, &keys[part.clone()], d, &mut scores, PAGE_TOKENS);
                    let rows = token * group..(token + 1) * group;
                    for (row, row_scores) in rows.clone().zip(scores.chunks_mut(PAGE_TOKENS)) {
                        let row_scores = &mut row_scores[..range.len()];
                        if page.bias != 0.0 {
                            row_scores.iter_mut().for_each(|score| *score += page.bias);
                        }
                        let acc = &mut partial.acc[row * d..(row + 1) * d];
                        softmax_row(row_scores, acc, &mut partial.max[row], &mut partial.sum[row]);
                    }
                    let acc = &mut partial.acc[rows.start * d..rows.end * d];
                    let part = page_values.start + part.start..page_values.start + part.end;
                    match self.values {
                        Values::F32(values) => {
                            add_rows(&scores, PAGE_TOKENS, &values[part], d, acc);
                        }
                        Values::Bf16(values) => {
                            add_bf16_rows(&scores, PAGE_TOKENS, &values[part], d, acc);
                        }
                    }
                }
            }
        }
        partial
    }
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

/// Turns scores into e^(s - max) in place, rescaling what was accumulated under the former maximum.
#[inline(always)]
fn softmax_row_body(scores: &mut [f32], acc: &mut [f32], max: &mut f32, sum: &mut f32) {
    let mut new_max = *max;
    for s in scores.iter() {
        new_max = if *s > new_max { *s } else { new_max };
    }
    if new_max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return;
    }
    if new_max > *max {
        let rescale = simd::exp(*max - new_max);
        acc.iter_mut().for_each(|a| *a *= rescale);
        *sum *= rescale;
        *max = new_max;
    }
    for s in scores.iter_mut() {
        *s = simd::exp(*s - new_max);
    }
    let mut sums = [0f32; simd::LANES];
    let (chunks, rest) = scores.as_chunks::<{ simd::LANES }>();
    for chunk in chunks {
        for lane in 0..simd::LANES {
            sums[lane] += chunk[lane];
        }
    }
    *sum += sums.iter().sum::<f32>() + rest.iter().sum::<f32>();
}

multiversion! {
    fn softmax_row = softmax_row_body(scores: &mut [f32], acc: &mut [f32], max: &mut f32, sum: &mut f32)
}

//! Attention over pages on the processor: tiles of queries against pages, split so that every core has work.
//! Knows slices and which of them a query sees; several calls' work is spread over the threads at once.

use super::{AttentionParams, AttentionPart, AttentionState, PageRef, matmul};
use crate::pages::PAGE_TOKENS;
use crate::rows::{Number, Soon, add_rows, dot_rows, exponentiate, maximum};
use crate::simd;
use crate::storage::contiguous_range;
use candle_core::{DType, Layout, Result, Storage, Tensor, WithDType};
use rayon::prelude::*;
use std::ops::Range;

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

/// Keys or values as they are held.
#[derive(Clone, Copy)]
enum Pool<'a> {
    F32(&'a [f32]),
    Bf16(&'a [half::bf16]),
    F16(&'a [half::f16]),
}

/// `$of` of the rows in `$range` of a pool, whichever type they have.
macro_rules! rows_of {
    ($pool:expr, $range:expr, $rows:ident => $of:expr) => {
        match $pool {
            Pool::F32(all) => {
                let $rows = &all[$range];
                $of
            }
            Pool::Bf16(all) => {
                let $rows = &all[$range];
                $of
            }
            Pool::F16(all) => {
                let $rows = &all[$range];
                $of
            }
        }
    };
}

impl<'a> Pool<'a> {
    fn new(storage: &'a Storage, layout: &Layout, name: &str) -> Result<Self> {
        Ok(match storage.dtype() {
            DType::BF16 => Self::Bf16(cpu_slice(storage, layout, name)?),
            DType::F16 => Self::F16(cpu_slice(storage, layout, name)?),
            _ => Self::F32(cpu_slice(storage, layout, name)?),
        })
    }

    /// The rows in `range` as what is read soon.
    fn soon(self, range: Range<usize>) -> Soon<'a> {
        rows_of!(self, range, rows => Soon::of(rows))
    }
}

/// The inputs as slices: q (t, h, d); keys, values (s, g, PAGE_TOKENS, d).
struct Problem<'a> {
    q: &'a [f32],
    keys: Pool<'a>,
    values: Pool<'a>,
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
    /// Whose queries they are.
    part: usize,
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

/// The attention of each part, all work side by side.
pub(super) fn solve(parts: &[AttentionPart<'_>]) -> Result<Vec<AttentionState>> {
    let queries = parts.iter().map(|part| part.q.contiguous());
    let queries: Vec<Tensor> = queries.collect::<Result<_>>()?;
    let held: Vec<_> = parts
        .iter()
        .zip(&queries)
        .map(|(part, q)| [q, part.keys, part.values].map(Tensor::storage_and_layout))
        .collect();
    let mut problems = Vec::with_capacity(parts.len());
    for (part, [q, keys, values]) in parts.iter().zip(&held) {
        let (t, h, d) = part.q.dims3()?;
        let keys = Pool::new(&keys.0, keys.1, "paged_attention: keys")?;
        let values = Pool::new(&values.0, values.1, "paged_attention: values")?;
        let q = cpu_slice(&q.0, q.1, "paged_attention: q")?;
        let (g, params) = (part.keys.dim(1)?, part.params);
        problems.push(Problem { q, keys, values, t, h, g, d, params });
    }
    let tasks: Vec<Task> = problems.iter().enumerate().flat_map(|(at, p)| p.tasks(at)).collect();
    let partials: Vec<Partial> =
        tasks.par_iter().map(|task| problems[task.part].run(task)).collect();
    let mut first = 0;
    let mut states = Vec::with_capacity(problems.len());
    for (at, problem) in problems.iter().enumerate() {
        let count = tasks[first..].iter().take_while(|task| task.part == at).count();
        let own = first..first + count;
        let (out, lse) = problem.joined(&tasks[own.clone()], &partials[own]);
        first += count;
        let (Problem { t, h, d, .. }, device) = (problem, parts[at].q.device());
        states.push(AttentionState {
            out: Tensor::from_vec(out, (*t, *h, *d), device)?,
            lse: Tensor::from_vec(lse, (*t, *h), device)?,
        });
    }
    Ok(states)
}

impl Problem<'_> {
    fn group(&self) -> usize {
        self.h / self.g
    }

    /// Where the keys and values of one head of `page` lie.
    fn rows_of(&self, page: &PageRef, head: usize) -> Range<usize> {
        let at = (page.slot * self.g + head) * PAGE_TOKENS * self.d;
        at..at + page.len * self.d
    }

    /// The work of this part, which is number `part`.
    fn tasks(&self, part: usize) -> Vec<Task> {
        let split = if self.t * self.group() >= GEMM_ROWS { usize::MAX } else { SPLIT_PAGES };
        let num_pages = self.params.pages.len();
        let mut tasks = Vec::new();
        for head in 0..self.g {
            for first in (0..self.t).step_by(TILE_TOKENS) {
                let tokens = first..(first + TILE_TOKENS).min(self.t);
                for page in (0..num_pages).step_by(split.min(num_pages.max(1))) {
                    let pages = page..page.saturating_add(split).min(num_pages);
                    tasks.push(Task { part, head, tokens: tokens.clone(), pages });
                }
            }
        }
        tasks
    }

    /// The softmax over all pages out of those over each task's: out (t, h, d), lse (t, h).
    fn joined(&self, tasks: &[Task], partials: &[Partial]) -> (Vec<f32>, Vec<f32>) {
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
        let mut pages = self.params.pages[task.pages.clone()].iter().peekable();
        while let Some(page) = pages.next() {
            // Skip pages that no query of the tile sees.
            let page_end = page.start + page.len as u64;
            if page.len == 0 || page.start > last || page_end <= self.params.first_visible(first) {
                continue;
            }
            let own_rows = self.rows_of(page, task.head);
            let visible = |row: usize| -> Range<usize> {
                let position = self.params.query_start + (task.tokens.start + row / group) as u64;
                let from = self.params.first_visible(position).saturating_sub(page.start);
                let to = (position + 1).saturating_sub(page.start).min(page.len as u64);
                (from as usize).min(to as usize)..to as usize
            };
            if rows >= GEMM_ROWS {
                let keys =
                    rows_of!(self.keys, own_rows.clone(), rows => Number::wide(rows, &mut wide));
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
                let values = rows_of!(self.values, own_rows, rows => Number::wide(rows, &mut wide));
                let shape = (rows, d, page.len);
                matmul(&mut partial.acc, d, &scores, (PAGE_TOKENS, 1), values, (d, 1), shape, 1.0);
            } else {
                for token in 0..task.tokens.len() {
                    let range = visible(token * group);
                    if range.is_empty() {
                        continue;
                    }
                    let part = own_rows.start + range.start * d..own_rows.start + range.end * d;
                    let own = &queries[token * group * d..(token + 1) * group * d];
                    // Values are fetched while their keys are scored, the next page's keys while values are added.
                    let soon = match token {
                        0 => self.values.soon(part.clone()),
                        _ => Soon::default(),
                    };
                    rows_of!(self.keys, part.clone(), keys => {
                        dot_rows(own, keys, d, &mut scores, PAGE_TOKENS, soon);
                    });
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
                    let soon = match pages.peek() {
                        Some(next) if token + 1 == task.tokens.len() => {
                            self.keys.soon(self.rows_of(next, task.head))
                        }
                        _ => Soon::default(),
                    };
                    rows_of!(self.values, part, values => {
                        add_rows(&scores, PAGE_TOKENS, values, d, acc, soon);
                    });
                }
            }
        }
        partial
    }
}

/// Turns scores into e^(s - max) in place, rescaling what was accumulated under the former maximum.
fn softmax_row(scores: &mut [f32], acc: &mut [f32], max: &mut f32, sum: &mut f32) {
    let new_max = max.max(maximum(scores));
    if new_max == f32::NEG_INFINITY {
        // Scores that are no numbers have no maximum either: the row is none from here on.
        if scores.iter().any(|score| score.is_nan()) {
            acc.fill(f32::NAN);
            (*max, *sum) = (0.0, f32::NAN);
        }
        scores.fill(0.0);
        return;
    }
    if new_max > *max {
        let rescale = simd::exp(*max - new_max);
        acc.iter_mut().for_each(|a| *a *= rescale);
        *sum *= rescale;
        *max = new_max;
    }
    *sum += exponentiate(scores, new_max);
}

//! Other systems' rules over the pages on the model's device: the same choices as in host memory, without a word to it.
//! Knows what each rule keeps beside the keys; TokenSelect's is a vote that the kernels know.

use super::{BLOCK_PAGES, FIRST_BLOCK_PAGE, Following, QUEST_TOKENS, first_of_block};
use crate::error::Result;
use crate::pages::PageRule;
use candle_core::{DType, Device, IndexOp, Tensor};
use mka_kernels::recall::{Choice, StoredPages};
use mka_kernels::{PAGE_TOKENS, top_k};
use std::ops::Range;

/// Runs of a page that Quest bounds.
const RUNS: usize = PAGE_TOKENS / QUEST_TOKENS;
/// Rows that a table has room for at first.
const FIRST_ROWS: usize = 64;

/// Pages whose keys are widened at once.
const WIDENED_PAGES: usize = 256;

/// What a rule compares queries with, in stream order, made from pages and means once they are asked for.
#[derive(Debug, Default)]
pub(in crate::pages) struct Table {
    /// (g, capacity, width), f32: of Quest the largest and the least entries of each run, of InfLLM (one head) the mean of
    /// each block's representatives.
    rows: Option<Tensor>,
    /// The page, or block, of the stream that it begins with, and how many it has.
    first: u64,
    len: usize,
    /// The first page or block that was asked for last: those before it are gone.
    live: u64,
}

/// A layer's pages on the device, and the first of them that can be chosen from; no page between them is missing.
#[derive(Clone, Copy)]
pub(in crate::pages) struct Choosable<'a> {
    pub(in crate::pages) pages: &'a StoredPages,
    /// Number in the stream of the first one.
    pub(in crate::pages) first: u64,
    /// How many can be chosen from.
    pub(in crate::pages) rows: usize,
}

impl Table {
    /// Bytes of a page's rows by `rule`; there is room for twice as many at most.
    pub(in crate::pages) fn page_bytes(rule: PageRule, g: usize, d: usize) -> usize {
        match rule {
            PageRule::Quest => RUNS * g * 2 * d * DType::F32.size_in_bytes(),
            PageRule::InfLlm => g * d * DType::F32.size_in_bytes() / BLOCK_PAGES,
            _ => 0,
        }
    }

    /// Rows that there is room for.
    #[cfg(test)]
    pub(in crate::pages) fn capacity(&self) -> usize {
        self.rows.as_ref().map_or(0, |rows| rows.dim(1).unwrap())
    }

    /// Forgets what was made of page `end` and of those behind it.
    pub(in crate::pages) fn truncate(&mut self, rule: PageRule, end: u64) {
        let end = if rule == PageRule::InfLlm { blocks_before(end) } else { end };
        self.len = self.len.min(end.saturating_sub(self.first) as usize);
    }

    /// Quest's rows of every page of `stored` that has none.
    pub(in crate::pages) fn bound(&mut self, stored: Choosable<'_>) -> Result<()> {
        let count = stored.pages.len();
        let Some(fresh) = self.fresh(stored.first, count) else { return Ok(()) };
        for first in (count - fresh..count).step_by(WIDENED_PAGES) {
            let pages = WIDENED_PAGES.min(count - first);
            let keys = stored.pages.keys()?.narrow(0, first, pages)?.to_dtype(DType::F32)?;
            let (_, g, _, d) = keys.dims4()?;
            let keys = keys.reshape((pages, g, RUNS, QUEST_TOKENS, d))?;
            let bounds = Tensor::cat(&[keys.max(3)?, keys.min(3)?], 3)?.transpose(0, 1)?;
            self.push(&bounds.contiguous()?.reshape((g, pages * RUNS, 2 * d))?, pages)?;
        }
        Ok(())
    }

    /// InfLLM's rows of every block of `layer` whose pages lie in `pages`.
    pub(in crate::pages) fn represent(
        &mut self,
        following: &Following,
        layer: usize,
        pages: Range<u64>,
        device: &Device,
    ) -> Result<()> {
        let blocks = blocks_from(pages.start)..blocks_before(pages.end);
        let Some(count) = blocks.end.checked_sub(blocks.start) else { return Ok(()) };
        let Some(fresh) = self.fresh(blocks.start, count as usize) else { return Ok(()) };
        let means: Vec<f32> = (blocks.end - fresh as u64..blocks.end)
            .map_while(|block| following.mean(layer, FIRST_BLOCK_PAGE + block * BLOCK_PAGES as u64))
            .flatten()
            .copied()
            .collect();
        // A block without representatives ends the table: the processor chooses.
        let width = following.width();
        let made = means.len() / width;
        match made {
            0 => Ok(()),
            _ => self.push(&Tensor::from_vec(means, (1, made, width), device)?, made),
        }
    }

    /// How many pages or blocks of `count` from `first` on have no rows; None for none. Rows that begin later than `first`
    /// are forgotten.
    fn fresh(&mut self, first: u64, count: usize) -> Option<usize> {
        let (end, have) = (first + count as u64, self.first + self.len as u64);
        if self.len == 0 || first < self.first || have < first {
            *self = Self::default();
            (self.first, self.live) = (first, first);
            return (count > 0).then_some(count);
        }
        self.live = first;
        usize::try_from(end.checked_sub(have)?).ok().filter(|fresh| *fresh > 0)
    }

    /// Adds the rows (g, n, width) of `count` pages or blocks.
    fn push(&mut self, rows: &Tensor, count: usize) -> Result<()> {
        let (g, n, width) = rows.dims3()?;
        let each = n / count;
        let capacity = self.rows.as_ref().map_or(Ok(0), |rows| rows.dim(1))?;
        if self.len * each + n > capacity {
            let gone = ((self.live - self.first) as usize).min(self.len);
            let kept = self.len - gone;
            let capacity = (kept * each + n).next_power_of_two().max(FIRST_ROWS);
            let room = Tensor::zeros((g, capacity, width), DType::F32, rows.device())?;
            if let Some(before) = self.rows.as_ref().filter(|_| kept > 0) {
                let before = before.narrow(1, gone * each, kept * each)?;
                room.slice_set(&before.contiguous()?, 1, 0)?;
            }
            (self.rows, self.len) = (Some(room), kept);
            self.first += gone as u64;
        }
        if let Some(all) = &self.rows {
            all.slice_set(rows, 1, self.len * each)?;
        }
        self.len += count;
        Ok(())
    }

    /// Rows of `count` pages or blocks from `first` on, each of `each` rows; None where it has not all of them.
    fn rows(&self, first: u64, count: usize, each: usize) -> Result<Option<Tensor>> {
        let Some(rows) = &self.rows else { return Ok(None) };
        let before = first.checked_sub(self.first).map(|before| before as usize);
        let Some(before) = before.filter(|before| before + count <= self.len) else {
            return Ok(None);
        };
        Ok(Some(rows.narrow(1, before * each, count * each)?))
    }

    /// Quest: the runs whose bound Σ max(q · least, q · largest), the largest over the rows of a group's queries, is most;
    /// `queries` (m, h, d), pooled. None where rows are missing.
    pub(in crate::pages) fn by_bounds(
        &self,
        queries: &Tensor,
        stored: Choosable<'_>,
        budget: usize,
    ) -> Result<Option<Choice>> {
        let Some(bounds) = self.rows(stored.first, stored.rows, RUNS)? else { return Ok(None) };
        let (m, h, d) = queries.dims3()?;
        let g = bounds.dim(0)?;
        // An entry above 0 asks for the largest, one below for the least.
        let above = queries.relu()?;
        let both = Tensor::cat(&[&above, &(queries - &above)?], 2)?;
        let both = both.reshape((m, g, h / g, 2 * d))?.transpose(0, 1)?.contiguous()?;
        let scores = both.reshape((g, m * (h / g), 2 * d))?.matmul(&bounds.transpose(1, 2)?)?;
        let runs = top_k(&scores.max(1)?, budget / QUEST_TOKENS)?;
        Ok(Some(stored.pages.choice_of(&tokens_of(&runs, QUEST_TOKENS, 0)?)?))
    }

    /// InfLLM: the blocks whose mean representative has the largest product with the sum of the queries, all heads side by
    /// side, and a last page that waits for the other half of its block; `queries` (m, h, d), pooled. None where rows are
    /// missing or there is nothing to choose.
    pub(in crate::pages) fn by_blocks(
        &self,
        queries: &Tensor,
        stored: Choosable<'_>,
        g: usize,
        budget: usize,
    ) -> Result<Option<Choice>> {
        let (first, stop) = (blocks_from(stored.first), stored.first + stored.rows as u64);
        let count = blocks_before(stop).saturating_sub(first) as usize;
        let taken = count.min(budget / (BLOCK_PAGES * PAGE_TOKENS));
        let mut parts = Vec::new();
        if taken > 0 {
            let Some(means) = self.rows(first, count, 1)? else { return Ok(None) };
            let (_, h, d) = queries.dims3()?;
            let query = queries.sum(0)?.reshape((g, h / g, d))?.sum(1)?.reshape((1, g * d))?;
            let blocks = top_k(&query.matmul(&means.i(0)?.t()?)?, taken)?;
            let before = (FIRST_BLOCK_PAGE + first * BLOCK_PAGES as u64 - stored.first) as usize;
            parts.push(tokens_of(&blocks, BLOCK_PAGES * PAGE_TOKENS, before * PAGE_TOKENS)?);
        }
        if first_of_block(stop - 1) == stop - 1 {
            let tokens = ((stored.rows - 1) * PAGE_TOKENS) as u32;
            let end = tokens + PAGE_TOKENS as u32;
            parts.push(Tensor::arange(tokens, end, queries.device())?.unsqueeze(0)?);
        }
        if parts.is_empty() {
            return Ok(None);
        }
        let tokens = Tensor::cat(&parts, 1)?;
        let count = tokens.dim(1)?;
        Ok(Some(stored.pages.choice_of(&tokens.broadcast_as((g, count))?)?))
    }
}

/// The first block of which no page stands before `page`.
fn blocks_from(page: u64) -> u64 {
    page.saturating_sub(FIRST_BLOCK_PAGE).div_ceil(BLOCK_PAGES as u64)
}

/// Blocks of which every page stands before `page`.
fn blocks_before(page: u64) -> u64 {
    page.saturating_sub(FIRST_BLOCK_PAGE) / BLOCK_PAGES as u64
}

/// The tokens of runs (g, n), u32, of `each` tokens, the first of which begins at token `before`: (g, n · each).
fn tokens_of(runs: &Tensor, each: usize, before: usize) -> Result<Tensor> {
    let (g, n) = runs.dims2()?;
    let firsts = runs.affine(each as f64, before as f64)?.unsqueeze(2)?;
    let within = Tensor::arange(0, each as u32, runs.device())?.reshape((1, 1, each))?;
    Ok(firsts.broadcast_add(&within)?.reshape((g, n * each))?)
}

/// Queries (t, h, d) before RoPE as if they stood at the position of `angles` (cosines and sines), each `pooled` of them
/// as their mean: (⌈t / pooled⌉, h, d).
pub(in crate::pages) fn pooled_queries(
    q: &Tensor,
    (cosines, sines): (&[f32], &[f32]),
    pooled: usize,
) -> Result<Tensor> {
    let (t, h, d) = q.dims3()?;
    let half = d / 2;
    let [cos, sin] = [cosines, sines].map(|x| Tensor::from_slice(x, (1, 1, half), q.device()));
    let (cos, sin) = (cos?, sin?);
    let (low, high) = (q.narrow(2, 0, half)?, q.narrow(2, half, half)?);
    let rotated = Tensor::cat(
        &[
            (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?,
            (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?,
        ],
        2,
    )?;
    let whole = t / pooled * pooled;
    let mut means = Vec::new();
    if whole > 0 {
        let tokens = rotated.narrow(0, 0, whole)?.reshape((whole / pooled, pooled, h, d))?;
        means.push(tokens.mean(1)?);
    }
    if whole < t {
        means.push(rotated.narrow(0, whole, t - whole)?.mean_keepdim(0)?);
    }
    Ok(Tensor::cat(&means, 0)?)
}

//! Other systems' rules over the same stored pages: InfLLM, Quest, TokenSelect. For comparison, not for speed.
//! Knows the store's rows; in host memory each rule reads the keys that it needs for every choice.
//!
//! What differs from the systems themselves is the cache that they run over, which is ours: window, sinks, positions,
//! the layers that choose nothing and the decoded tokens that a choice serves are the same for every rule, and queries
//! are compared at the window's distance.

pub(super) mod device;

use super::PageRule;
use super::selection::POOLED;
use super::store::{PageShape, PageStore};
use super::vote::{Ballot, Queries, soft_vote};
use crate::error::Result;
use crate::models::frequencies::LayerAngles;
use candle_core::Tensor;
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Tokens of an InfLLM block, two pages, and the keys that represent it (arXiv 2402.04617, section 3.2 and 4.1).
const BLOCK_PAGES: usize = 2;
const REPRESENTATIVES: usize = 4;
/// Tokens of a Quest page (arXiv 2406.10774, section 4.1).
const QUEST_TOKENS: usize = 16;

/// Queries that wait at most for a page to leave: at 4,096 numbers a token 16 MB a layer.
const WAITING_TOKENS: usize = 1024;

/// Where blocks begin: behind the first page, which every query sees. Instructions of more pages leave half a block at most
/// out of reach.
const FIRST_BLOCK_PAGE: u64 = 1;

/// The first page of the block of `page`.
pub(super) fn first_of_block(page: u64) -> u64 {
    let pages = BLOCK_PAGES as u64;
    FIRST_BLOCK_PAGE + page.saturating_sub(FIRST_BLOCK_PAGE) / pages * pages
}

/// What InfLLM keeps beside the keys: the queries that followed them, and the keys that these asked for most.
#[derive(Clone)]
pub(super) struct Following {
    shape: PageShape,
    /// By layer and page: sums over the page's tokens of the queries of each key/value head's group, (g · d).
    sums: Vec<BTreeMap<u64, Vec<f32>>>,
    /// By layer, queries (t, h, d) before RoPE that are not summed yet, and the position of the first: on a device they
    /// are fetched once a page leaves, so that no token waits for them.
    waiting: Vec<Vec<(u64, Tensor)>>,
    /// Angles up to the window's length, the position that queries are rotated to, once there were some.
    angles: Option<LayerAngles>,
    /// By layer and block's first page: the mean of the representative keys, (g · d).
    means: Vec<BTreeMap<u64, Vec<f32>>>,
}

impl Following {
    pub(super) fn new(shape: PageShape) -> Self {
        let layers = || (0..shape.num_layers).map(|_| BTreeMap::new()).collect();
        let waiting = vec![Vec::new(); shape.num_layers];
        Self { shape, sums: layers(), waiting, angles: None, means: layers() }
    }

    /// Has queries (t, h, d) that begin at `position` wait; `angles` are those from position 0 on, as far as there are any.
    fn note(
        &mut self,
        layer: usize,
        position: u64,
        q: &Tensor,
        angles: Option<&LayerAngles>,
    ) -> Result<()> {
        if self.angles.is_none() {
            let reaches = |angles: &&LayerAngles| self.shape.window_tokens < angles.len();
            self.angles = angles.filter(reaches).cloned();
        }
        self.waiting[layer].push((position, q.clone()));
        let counts = self.waiting[layer].iter().map(|(_, q)| q.dim(0));
        match counts.sum::<candle_core::Result<usize>>()? > WAITING_TOKENS {
            true => self.sum_waiting(layer),
            false => Ok(()),
        }
    }

    /// Sums the waiting queries of `layer`, rotated.
    pub(super) fn sum_waiting(&mut self, layer: usize) -> Result<()> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let waiting = std::mem::take(&mut self.waiting[layer]);
        let Some((_, first)) = waiting.first() else { return Ok(()) };
        let h = first.dim(1)?;
        let all: Vec<&Tensor> = waiting.iter().map(|(_, q)| q).collect();
        let mut values = Tensor::cat(&all, 0)?.flatten_all()?.to_vec1::<f32>()?;
        if let Some(angles) = &self.angles {
            let (cos, sin) = angles.of(layer).at(self.shape.window_tokens);
            values.chunks_exact_mut(d).for_each(|row| rows::rotate_row(row, cos, sin));
        }
        let counts = waiting.iter().map(|(first, q)| Ok((*first, q.dim(0)? as u64)));
        let counts: Vec<(u64, u64)> = counts.collect::<Result<_>>()?;
        let positions = counts.into_iter().flat_map(|(first, count)| first..first + count);
        for (position, token) in positions.zip(values.chunks_exact(h * d)) {
            let page = position / PAGE_TOKENS as u64;
            let sums = self.sums[layer].entry(page).or_insert_with(|| vec![0f32; g * d]);
            for (head, query) in token.chunks_exact(d).enumerate() {
                let at = head / (h / g) * d;
                sums[at..at + d].iter_mut().zip(query).for_each(|(sum, x)| *sum += x);
            }
        }
        Ok(())
    }

    /// Chooses the representatives of the block that ends with `page`, once the page has left the window.
    pub(super) fn choose(
        &mut self,
        layer: usize,
        page: u64,
        keys_of: &dyn Fn(u64, usize, &mut [f32]) -> bool,
    ) {
        let first = first_of_block(page);
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let mut followed = vec![0f32; g * d];
        for sums in self.sums[layer].range(first..).map(|(_, sums)| sums) {
            followed.iter_mut().zip(sums).for_each(|(all, sum)| *all += sum);
        }
        let mut means = Vec::with_capacity(g * d);
        for (head, followed) in followed.chunks_exact(d).enumerate() {
            let mut keys = Vec::new();
            for page in first..=page {
                let mut own = vec![0f32; PAGE_TOKENS * d];
                if keys_of(page, head, &mut own) {
                    keys.append(&mut own);
                }
            }
            let mut scores = vec![0f32; keys.len() / d];
            let num_keys = scores.len();
            rows::score_rows(followed, &keys, d, &mut scores, num_keys);
            // Where the queries are gone, all keys stand for the block.
            let is_known = followed.iter().any(|x| *x != 0.0);
            let best = rows::largest(&scores, if is_known { REPRESENTATIVES } else { num_keys });
            let mut mean = vec![0f32; d];
            for key in &best {
                let key = &keys[*key as usize * d..][..d];
                mean.iter_mut().zip(key).for_each(|(m, k)| *m += k / best.len() as f32);
            }
            means.append(&mut mean);
        }
        // A block of one page so far is replaced when its second page leaves.
        self.means[layer].insert(first, means);
        self.sums[layer] = self.sums[layer].split_off(&first);
    }

    /// Numbers of a block's mean representative.
    pub(super) fn width(&self) -> usize {
        self.shape.num_kv_heads * self.shape.head_dim
    }

    /// The mean representative of the block that begins with page `first`, (g · d).
    pub(super) fn mean(&self, layer: usize, first: u64) -> Option<&[f32]> {
        self.means[layer].get(&first).map(Vec::as_slice)
    }

    /// Of each layer from `first_layer` on the mean representative of the block of `page`, side by side: what the disk
    /// keeps with it.
    pub(super) fn means_of(&self, page: u64, first_layer: usize) -> Vec<f32> {
        let first = first_of_block(page);
        let none = vec![0f32; self.width()];
        let layers = self.means.iter().skip(first_layer);
        layers.flat_map(|blocks| blocks.get(&first).unwrap_or(&none)).copied().collect()
    }

    /// Takes what [`Following::means_of`] gave for `page`.
    pub(super) fn restore(&mut self, page: u64, means: &[f32]) {
        let first = first_of_block(page);
        let width = self.width();
        // The last layers are those that choose.
        let layers = self.means.iter_mut().rev();
        for (blocks, mean) in layers.zip(means.chunks_exact(width).rev()) {
            blocks.insert(first, mean.to_vec());
        }
    }

    /// Forgets the blocks from page `end` on, and the queries from `position` on.
    pub(super) fn truncate(&mut self, end: u64, position: u64) {
        for means in &mut self.means {
            means.split_off(&first_of_block(end));
        }
        self.sums.iter_mut().for_each(|sums| {
            sums.split_off(&position.div_ceil(PAGE_TOKENS as u64));
        });
        self.waiting.iter_mut().for_each(|waiting| waiting.retain(|(first, _)| *first < position));
    }
}

impl PageRule {
    /// Queries of a run of `count` whose mean stands for them: of a block its mean query in InfLLM and TokenSelect
    /// (arXiv 2411.02886, section 3.3).
    pub(super) fn pooled(self, count: usize) -> usize {
        match self {
            Self::InfLlm | Self::TokenSelect => count.max(1),
            Self::Mka | Self::Streaming | Self::Quest => POOLED,
        }
    }

    /// Factor on q · k: TokenSelect's votes are a softmax of the products themselves, as its authors' code has them.
    pub(super) fn scale(self, head_dim: usize) -> f32 {
        match self {
            Self::TokenSelect => 1.0,
            _ => 1.0 / (head_dim as f32).sqrt(),
        }
    }
}

impl PageStore {
    /// Notes the queries q (t, h, d), before RoPE, that begin at `position`; only InfLLM's rule asks for them.
    pub(crate) fn note_queries(&mut self, layer: usize, position: u64, q: &Tensor) -> Result<()> {
        #[cfg(test)]
        if let Some(asked) = &mut self.asked {
            asked.push((layer, q.clone()));
        }
        let Some(mut following) = self.following.take() else { return Ok(()) };
        let mut summed = Ok(());
        if layer >= self.config.first_layer {
            summed = following.note(layer, position, q, self.angles.as_ref());
        }
        self.following = Some(following);
        summed
    }

    /// Tokens for each key/value head by `rule`, as index row · PAGE_TOKENS + offset, ascending.
    pub(super) fn select_by_rival(
        &self,
        rule: PageRule,
        layer: usize,
        queries: &Queries,
        rows: usize,
        budget: usize,
    ) -> Vec<Vec<u32>> {
        match rule {
            PageRule::InfLlm => self.by_blocks(layer, queries, rows, budget),
            PageRule::Quest => self.by_bounds(layer, queries, rows, budget),
            PageRule::TokenSelect => self.by_tokens(layer, queries, rows, budget),
            PageRule::Mka | PageRule::Streaming => Vec::new(),
        }
    }

    /// InfLLM: the mean query of the block against one vector a block of tokens, all heads side by side; a last page that
    /// waits for the other half of its block comes beside them.
    fn by_blocks(
        &self,
        layer: usize,
        queries: &Queries,
        rows: usize,
        budget: usize,
    ) -> Vec<Vec<u32>> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let mut query = vec![0f32; g * d];
        for (own, head) in query.chunks_exact_mut(d).zip(&queries.heads) {
            for row in head.chunks_exact(d) {
                own.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
            }
        }
        let order = &self.order[..rows];
        // Blocks whose two pages are both there.
        let Some(following) = &self.following else { return Vec::new() };
        let blocks: Vec<(usize, &Vec<f32>)> = following.means[layer]
            .iter()
            .filter_map(|(page, mean)| {
                let row = order.binary_search(page).ok()?;
                (order.get(row + 1) == Some(&(page + 1))).then_some((row, mean))
            })
            .collect();
        let dot = |mean: &[f32]| query.iter().zip(mean).map(|(x, y)| x * y).sum::<f32>();
        let scores: Vec<f32> = blocks.iter().map(|(_, mean)| dot(mean)).collect();
        let count = budget / (BLOCK_PAGES * PAGE_TOKENS);
        let mut tokens: Vec<u32> = rows::largest(&scores, count)
            .into_iter()
            .flat_map(|block| {
                let first = (blocks[block as usize].0 * PAGE_TOKENS) as u32;
                first..first + (BLOCK_PAGES * PAGE_TOKENS) as u32
            })
            .collect();
        if order.last().is_some_and(|last| first_of_block(*last) == *last) {
            tokens.extend(((rows - 1) * PAGE_TOKENS) as u32..(rows * PAGE_TOKENS) as u32);
        }
        vec![tokens; g]
    }

    /// Quest: for each head, Σ max(q · least, q · largest) over the entries of a run's keys bounds its scores.
    fn by_bounds(
        &self,
        layer: usize,
        queries: &Queries,
        rows: usize,
        budget: usize,
    ) -> Vec<Vec<u32>> {
        let d = queries.d;
        let runs = PAGE_TOKENS / QUEST_TOKENS;
        let there = self.bytes_by_row(rows);
        (0..self.shape.num_kv_heads)
            .into_par_iter()
            .map(|head| {
                let reader = self.reader(layer, 0, head);
                let bounds: Vec<f32> = there
                    .par_iter()
                    .flat_map_iter(|bytes| {
                        let mut keys = vec![0f32; PAGE_TOKENS * d];
                        reader.read(bytes.unwrap_or_default(), 0, &mut keys);
                        let bound = |run: &[f32]| {
                            let (mut least, mut largest) = (run[..d].to_vec(), run[..d].to_vec());
                            for key in run.chunks_exact(d).skip(1) {
                                least.iter_mut().zip(key).for_each(|(l, k)| *l = l.min(*k));
                                largest.iter_mut().zip(key).for_each(|(l, k)| *l = l.max(*k));
                            }
                            let of = |query: &[f32]| -> f32 {
                                let entries = query.iter().zip(least.iter().zip(&largest));
                                entries.map(|(q, (low, high))| (q * low).max(q * high)).sum()
                            };
                            let own = queries.heads[head].chunks_exact(d);
                            own.map(of).fold(f32::NEG_INFINITY, f32::max)
                        };
                        keys.chunks_exact(QUEST_TOKENS * d).map(bound).collect::<Vec<f32>>()
                    })
                    .collect();
                debug_assert_eq!(bounds.len(), rows * runs);
                rows::largest(&bounds, budget / QUEST_TOKENS)
                    .into_iter()
                    .flat_map(|run| (run * QUEST_TOKENS as u32..).take(QUEST_TOKENS))
                    .collect()
            })
            .collect()
    }

    /// TokenSelect: every token, every head; the sum over all heads names one set for all.
    fn by_tokens(
        &self,
        layer: usize,
        queries: &Queries,
        rows: usize,
        budget: usize,
    ) -> Vec<Vec<u32>> {
        let (g, d) = (self.shape.num_kv_heads, queries.d);
        let there = self.bytes_by_row(rows);
        let mut ballot = Ballot::default();
        let votes =
            soft_vote(queries, &vec![rows * PAGE_TOKENS; g], &mut ballot, |head, first, out| {
                let reader = self.reader(layer, 0, head);
                let pages = there[first / PAGE_TOKENS..].iter();
                for (bytes, out) in pages.zip(out.chunks_mut(PAGE_TOKENS * d)) {
                    reader.read(bytes.unwrap_or_default(), 0, out);
                }
            });
        let mut sums = vec![0f32; rows * PAGE_TOKENS];
        for head in &votes {
            sums.iter_mut().zip(head.rows).for_each(|(sum, vote)| *sum += vote);
        }
        vec![rows::largest(&sums, budget); g]
    }
}

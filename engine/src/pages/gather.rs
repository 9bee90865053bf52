//! From a choice of tokens to pages that attention reads: copied, rotated to their positions, laid side by side.
//! Knows which tokens were chosen, not why.

use super::store::{PageStore, Recalled};
use super::{PageRule, Prefill, selection::Selection};
use crate::cache::SINK_PAGES;
use crate::error::Result;
use candle_core::Tensor;
use mka_kernels::{PAGE_TOKENS, rows};
use rayon::prelude::*;
use std::sync::Arc;

/// What queries recall for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RecallScope {
    /// Pages before this one can be recalled: those that the first query's window does not hold.
    pub(crate) before_page: u64,
    /// Positions are compact: counted over what is attended, not over the stream.
    pub(crate) compact: bool,
    /// The layer attends to near tokens alone, by training: it recalls whole pages in stream order, or nothing.
    pub(crate) sliding: bool,
}

/// Steps that a choice is used for at most.
const REUSE_STEPS: usize = 8;
/// Cosine of a query with the one that a choice was made for, above which the choice is used again
/// (TokenSelect, arXiv 2411.02886, section 3.3).
const REUSE_COSINE: f32 = 0.9;

impl PageStore {
    /// What queries `q` (t, h, d), before RoPE, of `layer` recall; None for nothing.
    pub(crate) fn recall(
        &mut self,
        layer: usize,
        q: &Tensor,
        scope: RecallScope,
    ) -> Result<Option<Arc<Recalled>>> {
        let rows = self.order.partition_point(|page| *page < scope.before_page);
        if !self.active || rows == 0 || self.config.rule == PageRule::Streaming {
            return Ok(None);
        }
        let num_queries = q.dim(0)?;
        let budget = self.config.tokens.next_multiple_of(PAGE_TOKENS);
        let dense = self.config.prefill == Prefill::Dense && num_queries > 1 && !scope.compact;
        let all = rows * PAGE_TOKENS <= budget || dense;
        if scope.sliding && (scope.compact || !all) || !all && layer < self.config.first_layer {
            return Ok(None);
        }
        let made_under = (rows, self.order.first().copied(), scope.compact);
        let query = match all || num_queries > 1 {
            true => Vec::new(),
            false => q.flatten_all()?.to_vec1::<f32>()?,
        };
        if let Some(recalled) = self.reuse(layer, made_under, &query, all) {
            return Ok(Some(recalled));
        }
        let selection = match all {
            true => {
                self.bring(&(0..rows).collect::<Vec<_>>());
                let bytes = self.bytes_by_row(rows);
                let there = (0..rows as u32).filter(|row| bytes[*row as usize].is_some());
                let tokens = there.flat_map(|row| row * 64..(row + 1) * 64).collect();
                Selection { heads: vec![tokens; self.shape.num_kv_heads], recovered: Some(1.0) }
            }
            false => self.select(layer, q, rows, budget)?,
        };
        if selection.heads.first().is_none_or(Vec::is_empty) {
            return Ok(None);
        }
        let mut recalled = self.gather(layer, &selection, all, scope.compact)?;
        if self.config.estimate && !all {
            recalled.left = Some(left_out(&selection, rows));
        }
        let recalled = Arc::new(recalled);
        let held = &mut self.held[layer];
        held.recalled = (all || num_queries == 1).then(|| recalled.clone());
        (held.query, held.steps, held.made_under) = (query, 0, made_under);
        Ok(Some(recalled))
    }

    /// The layer's last choice, if it serves this query as well.
    fn reuse(
        &mut self,
        layer: usize,
        made_under: (usize, Option<u64>, bool),
        query: &[f32],
        all: bool,
    ) -> Option<Arc<Recalled>> {
        let held = &mut self.held[layer];
        if held.made_under != made_under || all != held.query.is_empty() {
            return None;
        }
        if !all {
            if held.steps + 1 >= REUSE_STEPS || query.len() != held.query.len() {
                return None;
            }
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
            let lengths = dot(query, query) * dot(&held.query, &held.query);
            if dot(query, &held.query) <= REUSE_COSINE * lengths.sqrt() {
                return None;
            }
            held.steps += 1;
        }
        held.recalled.clone()
    }

    /// Copies and rotates the chosen tokens.
    fn gather(
        &self,
        layer: usize,
        selection: &Selection,
        all: bool,
        compact: bool,
    ) -> Result<Recalled> {
        let (g, d) = (self.shape.num_kv_heads, self.shape.head_dim);
        let num_tokens = selection.heads[0].len();
        let num_pages = num_tokens.div_ceil(PAGE_TOKENS);
        let sinks = SINK_PAGES * PAGE_TOKENS as u64;
        let mut keys = vec![0f32; num_pages * g * PAGE_TOKENS * d];
        let mut values = keys.clone();
        keys.par_chunks_mut(PAGE_TOKENS * d)
            .zip(values.par_chunks_mut(PAGE_TOKENS * d))
            .enumerate()
            .for_each(|(at, (keys, values))| {
                let (first, head) = (at / g * PAGE_TOKENS, at % g);
                let chosen = &selection.heads[head][first..num_tokens.min(first + PAGE_TOKENS)];
                let rows = keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d));
                for (i, (token, (key, value))) in chosen.iter().zip(rows).enumerate() {
                    let (row, offset) =
                        (*token as usize / PAGE_TOKENS, *token as usize % PAGE_TOKENS);
                    let page = self.order[row];
                    self.read_rows(page, layer, 0, head, offset, key);
                    self.read_rows(page, layer, 1, head, offset, value);
                    let position = match compact {
                        true => sinks + (first + i) as u64,
                        false => page * PAGE_TOKENS as u64 + offset as u64,
                    };
                    if let Some((cos, sin)) = self.angles_at(position) {
                        rows::rotate_row(key, cos, sin);
                    }
                }
            });
        let shape = (num_pages, g, PAGE_TOKENS, d);
        let starts = all.then(|| {
            let firsts = selection.heads[0].iter().step_by(PAGE_TOKENS);
            firsts.map(|token| self.order[*token as usize / 64] * PAGE_TOKENS as u64).collect()
        });
        Ok(Recalled {
            keys: Tensor::from_vec(keys, shape, self.device())?,
            values: Tensor::from_vec(values, shape, self.device())?,
            tokens: num_tokens,
            starts,
            recovered: selection.recovered,
            left: None,
        })
    }
}

/// For each head, how many tokens of each of the first `rows` pages were not chosen.
fn left_out(selection: &Selection, rows: usize) -> Vec<Vec<u8>> {
    let of_head = |tokens: &Vec<u32>| {
        let mut left = vec![PAGE_TOKENS as u8; rows];
        tokens.iter().for_each(|token| left[*token as usize / PAGE_TOKENS] -= 1);
        left
    };
    selection.heads.iter().map(of_head).collect()
}

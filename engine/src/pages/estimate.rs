//! The estimation zone: what was not recalled enters the same softmax through the means of its pages.
//! Knows the index's means and how many tokens of each page were left out, not why.
//!
//! Source: RetroInfer (arXiv 2505.02922), whose clusters are our pages; scores are those of queries a window behind
//! the keys, whatever the positions of what is recalled.

use super::recalled::Recalled;
use super::store::PageStore;
use crate::error::Result;
use candle_core::Tensor;
use mka_kernels::{AttentionState, rows};
use rayon::prelude::*;

impl PageStore {
    /// Attention of queries `q` (t, h, d), before RoPE, to the tokens that `recalled` left out: each page stands with
    /// its mean key and mean value for as many tokens as were left. None where nothing was, or nothing is asked for.
    pub(crate) fn estimate(
        &self,
        layer: usize,
        q: &Tensor,
        recalled: &Recalled,
    ) -> Result<Option<AttentionState>> {
        let Some(left) = &recalled.left else { return Ok(None) };
        let (t, h, d) = q.dims3()?;
        let group = h / self.shape.num_kv_heads;
        let scale = 1.0 / (d as f32).sqrt();
        let mut queries = q.flatten_all()?.to_vec1::<f32>()?;
        if let Some((cos, sin)) = self.angles_at(layer, self.shape.window_tokens as u64) {
            queries.chunks_exact_mut(d).for_each(|row| rows::rotate_row(row, cos, sin));
        }
        queries.iter_mut().for_each(|x| *x *= scale);
        let by_head: Vec<Vec<(Vec<f32>, f32)>> = self
            .heads(layer)
            .par_iter()
            .zip(left)
            .enumerate()
            .map(|(head, (index, left))| {
                let (keys, values) = index.means(left.len(), d);
                let of_head = queries.chunks_exact(h * d).flat_map(|token| {
                    token[head * group * d..(head + 1) * group * d].chunks_exact(d)
                });
                of_head.map(|query| attend(query, &keys, &values, left)).collect()
            })
            .collect();
        let (mut out, mut lse) = (Vec::with_capacity(t * h * d), Vec::with_capacity(t * h));
        for token in 0..t {
            for head in &by_head {
                for (own, own_lse) in &head[token * group..(token + 1) * group] {
                    out.extend_from_slice(own);
                    lse.push(*own_lse);
                }
            }
        }
        Ok(Some(AttentionState {
            out: Tensor::from_vec(out, (t, h, d), q.device())?,
            lse: Tensor::from_vec(lse, (t, h), q.device())?,
        }))
    }
}

/// One query over means: `keys`, `values` (pages, d), each counting for `left` tokens.
fn attend(query: &[f32], keys: &[f32], values: &[f32], left: &[u8]) -> (Vec<f32>, f32) {
    let d = query.len();
    let mut scores = vec![0f32; left.len()];
    let stride = scores.len();
    rows::score_rows(query, keys, d, &mut scores, stride);
    // ln 0 is -inf: a page of which every token was recalled is not counted.
    scores.iter_mut().zip(left).for_each(|(score, left)| *score += f32::from(*left).ln());
    let max = rows::maximum(&scores);
    let mut out = vec![0f32; d];
    if max == f32::NEG_INFINITY {
        return (out, max);
    }
    let sum = rows::exponentiate(&mut scores, max);
    for (weight, value) in scores.iter().zip(values.chunks_exact(d)) {
        out.iter_mut().zip(value).for_each(|(o, v)| *o += weight / sum * v);
    }
    (out, max + sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_equal_tokens_are_estimated_exactly() {
        let d = 8;
        let number = |i: usize| ((i * 37) % 11) as f32 / 5.0 - 1.0;
        let query: Vec<f32> = (0..d).map(number).collect();
        let keys: Vec<f32> = (0..3 * d).map(|i| number(i + 3)).collect();
        let values: Vec<f32> = (0..3 * d).map(|i| number(i + 5)).collect();
        let left = [64u8, 0, 7];
        let (out, lse) = attend(&query, &keys, &values, &left);
        let (mut sum, mut expected) = (0f64, vec![0f64; d]);
        for page in 0..3 {
            let row = |x: &[f32]| x[page * d..(page + 1) * d].to_vec();
            let score: f32 = row(&keys).iter().zip(&query).map(|(k, q)| k * q).sum();
            for _ in 0..left[page] {
                sum += f64::from(score).exp();
                let value = row(&values);
                expected
                    .iter_mut()
                    .zip(value)
                    .for_each(|(e, v)| *e += f64::from(score).exp() * f64::from(v));
            }
        }
        assert!((f64::from(lse) - sum.ln()).abs() < 1e-5);
        for (x, y) in out.iter().zip(expected) {
            assert!((f64::from(*x) - y / sum).abs() < 1e-5);
        }
        assert_eq!(attend(&query, &keys, &values, &[0; 3]).1, f32::NEG_INFINITY);
    }
}

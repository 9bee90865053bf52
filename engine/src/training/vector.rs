//! The recalled memory vector: of the chunks behind a query's window the mean of their stored vectors, weighted by the
//! query (`docs/training.md`). Knows no gate and no router: it is one more level that they mix in.
//!
//! A chunk is 64 tokens, its stored vector the mean of the layer's projected keys and values, without bias. The weights
//! are shared by all heads, so that the mean commutes with the projections as the summary does:
//! w = softmax over chunks of the mean over query heads of q · mean key / sqrt(d), before norm and rotation.

use crate::error::Result;
use candle_core::{DType, Tensor};

/// Tokens of a chunk.
pub(super) const CHUNK: usize = 64;
/// On the score of a chunk that a query does not recall: its e^score is 0 beside any other.
const HIDDEN: f32 = -1e30;

/// The vector of every token: q (n, h · d), kv (n, 2 · g · d) of `b` sequences -> (n, 1, 2 · g · d), f32.
///
/// A query recalls the chunks that end before its window of `window` tokens begins; where there is none, the vector is
/// the token's own, which adds nothing.
pub(super) fn recalled(
    q: &Tensor,
    kv: &Tensor,
    b: usize,
    window: usize,
    head_dim: usize,
) -> Result<Tensor> {
    let (n, c) = kv.dims2()?;
    let (t, width) = (n / b, c / 2);
    let kv = kv.to_dtype(DType::F32)?.reshape((b, t, c))?;
    let chunks = t.saturating_sub(window) / CHUNK;
    if chunks == 0 {
        return Ok(kv.reshape((n, 1, c))?);
    }
    let stored = kv.narrow(1, 0, chunks * CHUNK)?.contiguous()?;
    let stored = stored.reshape((b, chunks, CHUNK, c))?.mean(2)?;
    let (heads, kv_heads) = (q.dim(1)? / head_dim, width / head_dim);
    let group = heads / kv_heads;
    // The heads of a group meet one key: the mean over heads is a product with the sum of their queries.
    let queries = q.to_dtype(DType::F32)?.reshape((b, t, kv_heads, group, head_dim))?.sum(3)?;
    let queries = queries.reshape((b, t, width))?;
    let keys = stored.narrow(2, 0, width)?.contiguous()?;
    let scale = 1.0 / (heads as f64 * (head_dim as f64).sqrt());
    let scores = (queries.matmul(&keys.t()?)? * scale)?;
    let score = |i: usize, chunk: usize| match (chunk + 1) * CHUNK + window <= i + 1 {
        true => 0.0,
        false => HIDDEN,
    };
    let hidden: Vec<f32> =
        (0..t).flat_map(|i| (0..chunks).map(move |chunk| score(i, chunk))).collect();
    let hidden = Tensor::from_vec(hidden, (1, t, chunks), kv.device())?;
    let weights = super::operations::softmax(&scores.broadcast_add(&hidden)?)?;
    let mean = weights.matmul(&stored)?;
    // The first query with a chunk behind its window.
    let first = window + CHUNK - 1;
    let parts = [kv.narrow(1, 0, first)?, mean.narrow(1, first, t - first)?];
    Ok(Tensor::cat(&parts, 1)?.reshape((n, 1, c))?)
}

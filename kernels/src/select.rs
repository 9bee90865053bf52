//! Which pages a query should see: landmarks of pages, their scores, the best of them, and the copy of pages.
//! Knows no stream and no policy: how many are taken, and of which layers, is the caller's matter.

#[cfg(feature = "cuda")]
mod cuda;
mod gather;

pub use gather::{gather_pages, gather_pages_backward};

use crate::pages::PAGE_TOKENS;
use crate::storage::zeros;
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

/// Mean of every `span` keys (8 or 16) of each page, over those that are there.
///
/// Shapes: `raw_keys` (s, g, PAGE_TOKENS, d), contiguous; `lens` (s): tokens of each page. The result is
/// (s, g, PAGE_TOKENS / span, d), in the type of the keys; a span without tokens is 0, and is no landmark.
/// Types: f32 on the CPU; f32, bf16 or f16 on CUDA.
///
/// # Errors
/// If a shape disagrees, `span` does not divide a page or a page has more tokens than it holds.
pub fn landmarks(raw_keys: &Tensor, span: usize, lens: &[usize]) -> Result<Tensor> {
    let (s, g, page_tokens, d) = raw_keys.dims4()?;
    if page_tokens != PAGE_TOKENS || lens.len() != s || lens.iter().any(|len| *len > PAGE_TOKENS) {
        bail!(
            "landmarks: keys {:?} with {} lengths, expected (s, g, {PAGE_TOKENS}, d) with s lengths up to {PAGE_TOKENS}",
            raw_keys.shape(),
            lens.len()
        );
    }
    if !matches!(span, 8 | 16) {
        bail!("landmarks: a span of {span} keys, expected 8 or 16");
    }
    let marks = PAGE_TOKENS / span;
    let shape = (s, g, marks, d);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = raw_keys.device() {
        return cuda::landmarks(device, raw_keys, span, lens);
    }
    let keys = raw_keys.flatten_all()?.to_vec1::<f32>()?;
    let mut means = vec![0f32; s * g * marks * d];
    for (at, mean) in means.chunks_exact_mut(d.max(1)).enumerate() {
        let (page_head, mark) = (at / marks, at % marks);
        let end = lens[page_head / g].min((mark + 1) * span);
        let tokens = (mark * span).min(end)..end;
        let count = tokens.len() as f32;
        for token in tokens {
            let key = &keys[(page_head * PAGE_TOKENS + token) * d..][..d];
            mean.iter_mut().zip(key).for_each(|(m, k)| *m += k);
        }
        if count > 0.0 {
            mean.iter_mut().for_each(|m| *m /= count);
        }
    }
    Tensor::from_vec(means, shape, raw_keys.device())
}

/// How much each landmark is asked for: the softmax of every query head over all landmarks, summed over the heads of
/// the group and the query tokens.
///
/// votes[j, i] = Σ over tokens and heads of group j of softmax_i(q · landmarkᵢ · scale): each head has one vote to
/// give, so that a head of large scores does not outvote the others.
///
/// Shapes: `q` (t, h, d), `landmarks` (n, g, d); the result is (g, n), f32. h is a multiple of g.
/// Types: f32 on the CPU; f32, bf16 or f16, both alike, on CUDA, where d is a multiple of 8 up to 256 and t · h / g at
/// most 512.
///
/// # Errors
/// If shapes, types or devices disagree.
pub fn score_landmarks(q: &Tensor, landmarks: &Tensor, scale: f32) -> Result<Tensor> {
    let (t, h, d) = q.dims3()?;
    let (n, g, key_dim) = landmarks.dims3()?;
    if key_dim != d
        || g == 0
        || h % g != 0
        || q.dtype() != landmarks.dtype()
        || !q.device().same_device(landmarks.device())
    {
        bail!("score_landmarks: landmarks {landmarks:?}, expected (n, g, {d}) as q {q:?}");
    }
    if n == 0 || t == 0 {
        return zeros((g, n), DType::F32, q.device());
    }
    let (q, landmarks) = (q.contiguous()?, landmarks.contiguous()?);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = q.device() {
        return cuda::score_landmarks(device, &q, &landmarks, scale);
    }
    let group = h / g;
    let queries = q.flatten_all()?.to_vec1::<f32>()?;
    let keys = landmarks.flatten_all()?.to_vec1::<f32>()?;
    let mut votes = vec![0f32; g * n];
    votes.par_chunks_mut(n).enumerate().for_each(|(head, votes)| {
        let mut scores = vec![0f32; n];
        for row in 0..t * group {
            let query = &queries[((row / group) * h + head * group + row % group) * d..][..d];
            let mut max = f32::NEG_INFINITY;
            for (i, score) in scores.iter_mut().enumerate() {
                let key = &keys[(i * g + head) * d..][..d];
                *score = crate::simd::dot(query, key) * scale;
                max = max.max(*score);
            }
            scores.iter_mut().for_each(|score| *score = (*score - max).exp());
            // In f64: a million terms of f32 lose three digits.
            let sum = scores.iter().map(|score| f64::from(*score)).sum::<f64>() as f32;
            votes.iter_mut().zip(&scores).for_each(|(vote, score)| *vote += score / sum);
        }
    });
    Tensor::from_vec(votes, (g, n), q.device())
}

/// Indices of the `k` largest of each row of `votes`, ascending by index; of equal values those of lower index.
///
/// Shapes: `votes` (g, n), f32; the result is (g, k), u32. Values are compared in the total order of f32 (-0 below 0,
/// NaN at the ends). Exact and deterministic.
///
/// # Errors
/// If `k` exceeds n, or n 2^31.
pub fn top_k(votes: &Tensor, k: usize) -> Result<Tensor> {
    let (g, n) = votes.dims2()?;
    if k > n || n > i32::MAX as usize || votes.dtype() != DType::F32 {
        bail!("top_k: {k} of votes {votes:?}, expected f32 and at most {n}, below 2^31");
    }
    if k == 0 || g == 0 {
        return zeros((g, k), DType::U32, votes.device());
    }
    let votes = votes.contiguous()?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = votes.device() {
        return cuda::top_k(device, &votes, k);
    }
    let values = votes.flatten_all()?.to_vec1::<f32>()?;
    let mut indices = Vec::with_capacity(g * k);
    for row in values.chunks_exact(n) {
        let mut order: Vec<u32> = (0..n as u32).collect();
        let by_value =
            |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then_with(|| a.cmp(b));
        if k < n {
            order.select_nth_unstable_by(k - 1, by_value);
            order.truncate(k);
        }
        order.sort_unstable();
        indices.extend(order);
    }
    Tensor::from_vec(indices, (g, k), votes.device())
}

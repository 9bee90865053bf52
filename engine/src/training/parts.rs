//! Attention in parts under one softmax: merging by log-sum-exp, and the parts of a window with sinks.
//! Knows no layer. With the result of the whole softmax each part's probabilities are its own, so that gradients add up.

use candle_core::{DType, Result, Tensor};
use mka_kernels::{DenseAttentionParams, attention_backward, attention_forward};

/// What gives the gradients of q, k and v from that of the result.
pub(super) type Backward = Box<dyn Fn(&Tensor) -> Result<[Tensor; 3]> + Send + Sync>;

/// `count` tokens of x (b, t, ..) from `start` on.
pub(super) fn tokens(x: &Tensor, start: usize, count: usize) -> Result<Tensor> {
    x.narrow(1, start, count)?.contiguous()
}

/// Attention to two parts as one: out (b, t, h, d) and lse (b, h, t) of each -> out in f32, and lse.
///
/// Each query sees a key of `near`; it may see none of `far` (lse -inf).
pub(super) fn merge(near: (Tensor, Tensor), far: (Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
    let ((near, near_lse), (far, far_lse)) = (near, far);
    let max = near_lse.maximum(&far_lse)?;
    let (near_weight, far_weight) = ((near_lse - &max)?.exp()?, (far_lse - &max)?.exp()?);
    let sum = (&near_weight + &far_weight)?;
    let share = |weight: Tensor| (weight / &sum)?.transpose(1, 2)?.unsqueeze(3);
    let out = (near.to_dtype(DType::F32)?.broadcast_mul(&share(near_weight)?)?
        + far.to_dtype(DType::F32)?.broadcast_mul(&share(far_weight)?)?)?;
    Ok((out, (max + sum.log()?)?))
}

/// The parts of attention over a window and sinks: rows of queries, the sinks that they see beyond their window.
///
/// The query at position i >= `window` sees the sinks j <= i - window besides its window: the first `sinks` such
/// queries as a causal triangle, all later ones every sink.
pub(super) struct SinkParts {
    window: DenseAttentionParams,
    /// (first query, queries, sinks, parameters).
    beyond: Vec<(usize, usize, usize, DenseAttentionParams)>,
}

impl SinkParts {
    pub(super) fn new(t: usize, window: usize, sinks: usize, scale: f32) -> Self {
        let rows = t - window;
        let triangle = rows.min(sinks);
        let params = |causal| DenseAttentionParams { scale, causal, window: None };
        let mut beyond = vec![(window, triangle, triangle, params(true))];
        if rows > triangle {
            beyond.push((window + triangle, rows - triangle, sinks, params(false)));
        }
        let window = DenseAttentionParams { scale, causal: true, window: Some(window) };
        Self { window, beyond }
    }

    /// (out (b, t, h, d), lse (b, h, t)) of the one softmax over all parts.
    pub(super) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (out, lse) = attention_forward(q, k, v, &self.window)?;
        let first = self.beyond[0].0;
        let (mut outs, mut lses) = (vec![out.narrow(1, 0, first)?], vec![lse.narrow(2, 0, first)?]);
        for (start, rows, sinks, params) in &self.beyond {
            let far = attention_forward(
                &tokens(q, *start, *rows)?,
                &tokens(k, 0, *sinks)?,
                &tokens(v, 0, *sinks)?,
                params,
            )?;
            let near = (out.narrow(1, *start, *rows)?, lse.narrow(2, *start, *rows)?);
            let (out, lse) = merge(near, far)?;
            outs.push(out.to_dtype(q.dtype())?);
            lses.push(lse);
        }
        Ok((Tensor::cat(&outs, 1)?, Tensor::cat(&lses, 2)?.contiguous()?))
    }

    /// (dq, dk, dv); `out` and `lse` are what [`SinkParts::forward`] gave.
    pub(super) fn backward(
        &self,
        [q, k, v]: [&Tensor; 3],
        out: &Tensor,
        lse: &Tensor,
        grad: &Tensor,
    ) -> Result<[Tensor; 3]> {
        let (dq, dk, dv) = attention_backward(q, k, v, out, lse, grad, None, &self.window)?;
        let t = q.dim(1)?;
        let (mut dqs, mut dk_sinks, mut dv_sinks) = (Vec::new(), Vec::new(), Vec::new());
        for (start, rows, sinks, params) in &self.beyond {
            let (dq_part, dk_part, dv_part) = attention_backward(
                &tokens(q, *start, *rows)?,
                &tokens(k, 0, *sinks)?,
                &tokens(v, 0, *sinks)?,
                &tokens(out, *start, *rows)?,
                &lse.narrow(2, *start, *rows)?.contiguous()?,
                &tokens(grad, *start, *rows)?,
                None,
                params,
            )?;
            dqs.push((dq.narrow(1, *start, *rows)? + dq_part)?);
            let padded = |x: Tensor| x.pad_with_zeros(1, 0, t - sinks);
            dk_sinks.push(padded(dk_part)?);
            dv_sinks.push(padded(dv_part)?);
        }
        dqs.insert(0, dq.narrow(1, 0, self.beyond[0].0)?);
        let total = |whole: Tensor, parts: Vec<Tensor>| {
            parts.into_iter().try_fold(whole, |sum, part| sum + part)
        };
        Ok([Tensor::cat(&dqs, 1)?, total(dk, dk_sinks)?, total(dv, dv_sinks)?])
    }
}

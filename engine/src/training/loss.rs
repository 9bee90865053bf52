//! The head and the loss: cross-entropy with the text and divergence from a teacher, with closed-form gradients.
//! Knows no layer; logits exist for some tokens at a time only.

use crate::error::Result;
use candle_core::{DType, Tensor};

/// Tokens whose logits exist at once: at 49,152 words 192 MiB in f32.
pub(super) const CHUNK: usize = 1024;

/// What the head gives for some tokens.
pub(super) struct HeadResult {
    /// Sum over tokens of the mixed loss.
    pub(super) loss: f64,
    /// Gradient of the hidden states: (n, c).
    pub(super) hidden: Tensor,
    /// Gradient of the head's weight, f32, where it is trained: (vocab, c).
    pub(super) weight: Option<Tensor>,
}

/// log Σ e^logit of each row: (n, 1).
fn log_sum_exp(logits: &Tensor) -> candle_core::Result<Tensor> {
    let max = logits.max_keepdim(1)?;
    logits.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()? + max
}

/// Loss in nats of every token: hidden (n, c) after the last norm, weight (vocab, c), targets (n) -> n values.
pub(super) fn token_losses(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let mut losses = Vec::with_capacity(targets.len());
    for (start, targets) in chunks(targets) {
        let logits = logits(&hidden.narrow(0, start, targets.len())?, weight)?;
        let ids = Tensor::from_slice(targets, (targets.len(), 1), hidden.device())?;
        let loss = (log_sum_exp(&logits)? - logits.gather(&ids, 1)?)?;
        losses.extend(loss.flatten_all()?.to_vec1::<f32>()?);
    }
    Ok(losses)
}

/// hidden (n, c) -> logits (n, vocab), f32.
pub(super) fn logits(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(hidden.detach().matmul(&weight.detach().t()?)?.to_dtype(DType::F32)?)
}

/// `targets` in pieces of [`CHUNK`], each with the index of its first.
pub(super) fn chunks(targets: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    targets.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk))
}

/// Loss of a chunk and its gradients times `scale`: hidden (n, c), weight (vocab, c), targets (n).
///
/// The loss of a token is (1 - share) · -log p(target) + share · KL(teacher ‖ p), with the teacher's logits and the
/// share in `teacher`. With p = softmax(logits) its gradient is p - (1 - share) · one-hot(target) - share · teacher.
pub(super) fn head(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    teacher: Option<(&Tensor, f64)>,
    scale: f64,
) -> Result<HeadResult> {
    let logits = logits(hidden, weight)?;
    let n = targets.len();
    let ids = Tensor::from_slice(targets, (n, 1), hidden.device())?;
    let lse = log_sum_exp(&logits)?;
    let share = teacher.map_or(0.0, |(_, share)| share);
    let text = (&lse - logits.gather(&ids, 1)?)?.sum_all()?;
    let mut loss = f64::from(text.to_scalar::<f32>()?) * (1.0 - share);
    let log_p = logits.broadcast_sub(&lse)?;
    let one = Tensor::full((share - 1.0) as f32, (n, 1), hidden.device())?;
    let mut dlogits = log_p.exp()?.scatter_add(&ids, &one, 1)?;
    if let Some((teacher, share)) = teacher {
        let log_teacher = teacher.broadcast_sub(&log_sum_exp(teacher)?)?;
        let teacher = log_teacher.exp()?;
        let divergence = (&teacher * (log_teacher - log_p)?)?.sum_all()?;
        loss += share * f64::from(divergence.to_scalar::<f32>()?);
        dlogits = (dlogits - (teacher * share)?)?;
    }
    let dlogits = (dlogits * scale)?.to_dtype(hidden.dtype())?;
    let dweight = match weight.is_variable() {
        true => Some(dlogits.t()?.matmul(&hidden.detach())?.to_dtype(DType::F32)?),
        false => None,
    };
    Ok(HeadResult { loss, hidden: dlogits.matmul(&weight.detach())?, weight: dweight })
}

//! The head and the loss: cross-entropy with the text and divergence from a teacher, with closed-form gradients.
//! Knows no layer; logits exist for some tokens at a time only.

use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use mka_kernels::{ProductOptions, cross_entropy, product};

/// Tokens whose logits exist at once: at 49,152 words 192 MiB in f32.
pub(super) const CHUNK: usize = 1024;

/// What the head gives for some tokens.
pub(super) struct HeadResult {
    /// The mixed loss of tokens or of parts of them, f32, still where it was computed: its sum counts.
    pub(super) losses: Tensor,
    /// Gradient of the hidden states: (n, c).
    pub(super) hidden: Tensor,
    /// Gradient of the head's weight, f32, where it is trained, with what was given: (vocab, c).
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
        let logits = plain_logits(&hidden.narrow(0, start, targets.len())?, weight)?;
        let ids = Tensor::from_slice(targets, targets.len(), hidden.device())?;
        losses.extend(cross_entropy(&logits, &ids, None)?.0.to_vec1::<f32>()?);
    }
    Ok(losses)
}

/// hidden (n, c) -> logits (n, vocab), in the type of both.
fn plain_logits(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(product(hidden, &weight.detach().t()?, ProductOptions::default())?)
}

/// hidden (n, c) -> logits (n, vocab), f32.
pub(super) fn logits(hidden: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(plain_logits(hidden, weight)?.to_dtype(DType::F32)?)
}

/// `targets` in pieces of [`CHUNK`], each with the index of its first.
pub(super) fn chunks(targets: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    targets.chunks(CHUNK).enumerate().map(|(i, chunk)| (i * CHUNK, chunk))
}

/// Loss of a chunk and its gradients times `scale`: hidden (n, c), weight (vocab, c), targets (n); the weight's gradient
/// is added to `dweight`.
///
/// The loss of a token is (1 - share) · -log p(target) + share · KL(teacher ‖ p), with the teacher's logits and the
/// share in `teacher`. With p = softmax(logits) its gradient is p - (1 - share) · one-hot(target) - share · teacher.
pub(super) fn head(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[u32],
    teacher: Option<(&Tensor, f64)>,
    scale: f64,
    dweight: Option<Tensor>,
) -> Result<HeadResult> {
    let hidden = hidden.detach();
    let ids = Tensor::from_slice(targets, targets.len(), hidden.device())?;
    let (losses, dlogits) = match teacher {
        Some(teacher) => taught(&logits(&hidden, weight)?, &ids, teacher, scale)?,
        None => {
            let logits = plain_logits(&hidden, weight)?;
            let (losses, dlogits) = cross_entropy(&logits, &ids, Some(scale as f32))?;
            (losses, dlogits.ok_or_else(|| Error::model("train: expected a gradient of logits"))?)
        }
    };
    let dlogits = dlogits.to_dtype(hidden.dtype())?;
    let weight_gradient = match weight.is_variable() {
        true => {
            let dtype = Some(DType::F32);
            let options = ProductOptions { onto: dweight, dtype, ..ProductOptions::default() };
            Some(product(&dlogits.t()?, &hidden, options)?)
        }
        false => None,
    };
    let dhidden = product(&dlogits, &weight.detach(), ProductOptions::default())?;
    Ok(HeadResult { losses, hidden: dhidden, weight: weight_gradient })
}

/// Losses of the text and of the teacher, and the gradient of the logits (n, vocab), f32.
fn taught(
    logits: &Tensor,
    ids: &Tensor,
    (teacher, share): (&Tensor, f64),
    scale: f64,
) -> candle_core::Result<(Tensor, Tensor)> {
    let ids = ids.unsqueeze(1)?;
    let lse = log_sum_exp(logits)?;
    let text = (&lse - logits.gather(&ids, 1)?)?;
    let log_p = logits.broadcast_sub(&lse)?;
    let one = Tensor::full((share - 1.0) as f32, ids.shape(), logits.device())?;
    let dlogits = log_p.exp()?.scatter_add(&ids, &one, 1)?;
    let log_teacher = teacher.broadcast_sub(&log_sum_exp(teacher)?)?;
    let teacher = log_teacher.exp()?;
    let divergence = (&teacher * (log_teacher - log_p)?)?.sum_keepdim(1)?;
    let losses = ((text * (1.0 - share))? + (divergence * share)?)?.squeeze(1)?;
    Ok((losses, ((dlogits - (teacher * share)?)? * scale)?))
}

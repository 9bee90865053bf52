//! Operations with gradients that training needs beside candle's: norm, products with frozen weights, attention by what
//! it reaches, the mix of levels.
//! Knows no layer and no parameter by name.

use super::parts::{Backward, SinkParts};
use super::recall::{self, Recall};
use crate::error::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, D, DType, Layout, Shape, Storage, Tensor,
};
use mka_kernels::tape::{Value, ops, record_one};
use mka_kernels::{DenseAttentionParams, rms_norm_backward, rms_norm_forward};

type Gradients = [Option<Tensor>; 3];
type Pull = dyn Fn(&Tensor) -> candle_core::Result<Gradients> + Send + Sync;

/// A result that was computed outside the graph, and the gradients of its three inputs.
struct Computed {
    out: Tensor,
    backward: Box<Pull>,
}

/// Hangs `out`, a function of `inputs` computed without history, into the graph; costs one copy of it.
pub(super) fn with_gradient(
    inputs: [&Tensor; 3],
    out: Tensor,
    backward: impl Fn(&Tensor) -> candle_core::Result<Gradients> + Send + Sync + 'static,
) -> Result<Tensor> {
    let op = Computed { out: out.force_contiguous()?, backward: Box::new(backward) };
    let contiguous = inputs.map(Tensor::contiguous);
    let [a, b, c] = contiguous;
    Ok(a?.apply_op3(&b?, &c?, op)?)
}

impl CustomOp3 for Computed {
    fn name(&self) -> &'static str {
        "computed"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.out.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, self.out.shape().clone())),
            _ => candle_core::bail!("computed: inputs on the CPU, result elsewhere"),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.out.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, self.out.shape().clone())),
            _ => candle_core::bail!("computed: inputs on a CUDA device, result elsewhere"),
        }
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.backward)(grad)?;
        Ok((a, b, c))
    }
}

/// x / rms(x) · weight over the last dimension: x (.., c), weight (c), both of one type; sums in f32.
pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let frozen = weight.detach();
    let outputs = rms_norm_forward(x, None, Some(&frozen), eps as f32)?;
    let trained = weight.is_variable();
    let (sum, inverse) = (outputs.sum, outputs.inverse);
    with_gradient([x, weight, weight], outputs.out, move |grad| {
        let out = rms_norm_backward((&sum, &inverse), Some(&frozen), grad, None, trained)?;
        let dweight = out.dweight.map(|dweight| dweight.to_dtype(frozen.dtype())).transpose()?;
        Ok([Some(out.dx), dweight, None])
    })
}

/// x (n, in) times the transpose of a weight (out, in) that has no gradient.
struct FrozenProduct {
    weight: Tensor,
}

impl FrozenProduct {
    /// Shape of the result and the arguments of the product: (batch, rows, columns, inner).
    fn shape(&self, layout: &Layout) -> candle_core::Result<(Shape, (usize, usize, usize, usize))> {
        let (n, inner) = layout.shape().dims2()?;
        let (columns, weight_inner) = self.weight.dims2()?;
        if inner != weight_inner {
            candle_core::bail!("product: x ({n}, {inner}), expected ({n}, {weight_inner})");
        }
        Ok((Shape::from((n, columns)), (1, n, columns, inner)))
    }
}

impl CustomOp1 for FrozenProduct {
    fn name(&self) -> &'static str {
        "frozen-product"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (shape, sizes) = self.shape(layout)?;
        let (storage, weight_layout) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(weight) => {
                Ok((x.matmul(weight, sizes, layout, &weight_layout.transpose(0, 1)?)?, shape))
            }
            _ => candle_core::bail!("product: x on the CPU, weight elsewhere"),
        }
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let (shape, sizes) = self.shape(layout)?;
        let (storage, weight_layout) = self.weight.storage_and_layout();
        match &*storage {
            Storage::Cuda(weight) => {
                Ok((x.matmul(weight, sizes, layout, &weight_layout.transpose(0, 1)?)?, shape))
            }
            _ => candle_core::bail!("product: x on a CUDA device, weight elsewhere"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(grad.matmul(&self.weight)?))
    }
}

/// x (n, in) Wᵀ for W (out, in); a W that is no variable costs no gradient of its own.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    match weight.is_variable() {
        true => Ok(x.matmul(&weight.t()?)?),
        false => Ok(x.apply_op1(FrozenProduct { weight: weight.clone() })?),
    }
}

/// Which keys a query sees.
#[derive(Debug, Clone)]
pub(super) enum Reach {
    /// All before it.
    Causal,
    /// The last `window` tokens, itself included.
    Window(usize),
    /// Those and the first `sinks`.
    WindowAndSinks { window: usize, sinks: usize },
    /// Those and recalled ones.
    Recall(Recall),
}

impl Reach {
    /// What one call of the kernels shows of `t` tokens; none where it takes more than one.
    fn params(&self, t: usize, scale: f32) -> Option<DenseAttentionParams> {
        let window = match self {
            Self::WindowAndSinks { window, sinks } if *window < t && *sinks > 0 => return None,
            Self::Recall(recall) if recall.first_choosing() < t => return None,
            Self::Window(window) | Self::WindowAndSinks { window, .. } if *window < t => {
                Some(*window)
            }
            _ => None,
        };
        Some(DenseAttentionParams { scale, causal: true, window })
    }
}

/// Attention in one softmax over what `reach` shows: q (b, t, h, d), k and v (b, t, g, d) -> (b, t, h, d).
pub(super) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, reach: &Reach) -> Result<Tensor> {
    let scale = scale_of(q)?;
    if let Some(params) = reach.params(q.dim(1)?, scale) {
        return Ok(mka_kernels::attention(q, k, v, &params)?);
    }
    let (out, backward) = attend_in_parts([q, k, v], reach, scale)?;
    with_gradient([q, k, v], out, move |grad| {
        let [dq, dk, dv] = backward(grad)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    })
}

/// [`attend`] on the tape.
pub(super) fn attend_on_tape(q: &Value, k: &Value, v: &Value, reach: &Reach) -> Result<Value> {
    let scale = scale_of(q.tensor())?;
    if let Some(params) = reach.params(q.tensor().dim(1)?, scale) {
        return Ok(ops::attention(q, k, v, &params)?);
    }
    let (out, backward) = attend_in_parts([q, k, v].map(Value::tensor), reach, scale)?;
    let targets = [q, k, v].map(Value::target);
    Ok(record_one(&[q, k, v], out, move |grad, gradients| {
        let parts = targets.iter().zip(backward(&grad)?);
        parts.into_iter().try_for_each(|(target, gradient)| gradients.give(target, gradient))
    }))
}

fn scale_of(q: &Tensor) -> Result<f32> {
    Ok(1.0 / (q.dim(3)? as f32).sqrt())
}

/// Attention over a window with sinks, or with what is recalled too, and what gives the gradients of q, k and v.
fn attend_in_parts(inputs: [&Tensor; 3], reach: &Reach, scale: f32) -> Result<(Tensor, Backward)> {
    let [q, k, v] = inputs.map(|x| x.detach().contiguous());
    let (q, k, v) = (q?, k?, v?);
    let (window, sinks) = match reach {
        Reach::Recall(recall) => return Ok(recall::attend([q, k, v], recall, scale)?),
        Reach::WindowAndSinks { window, sinks } => (*window, *sinks),
        _ => {
            return Err(Error::invalid("attend: one part, expected a window with sinks or recall"));
        }
    };
    let parts = SinkParts::new(q.dim(1)?, window, sinks, scale);
    let (out, lse) = parts.forward(&q, &k, &v)?;
    let saved = out.clone();
    let backward =
        move |grad: &Tensor| parts.backward([&q, &k, &v], &saved, &lse, &grad.contiguous()?);
    Ok((out, Box::new(backward)))
}

/// x + gate · Σ_l λ_l (L_l - x) in f32, in x's type: x (n, c), levels (n, m, c), weights (n, 1 + m), gate (1).
///
/// A gate of 0 is x bit for bit.
pub(super) fn mix(x: &Tensor, levels: &Tensor, weights: &Tensor, gate: &Tensor) -> Result<Tensor> {
    let m = levels.dim(1)?;
    let x32 = x.to_dtype(DType::F32)?;
    let memory = weights.narrow(1, 1, m)?; // (n, m)
    let recalled = levels.to_dtype(DType::F32)?.broadcast_mul(&memory.unsqueeze(2)?)?.sum(1)?;
    let shift = (recalled - x32.broadcast_mul(&memory.sum_keepdim(1)?)?)?;
    Ok((x32 + shift.broadcast_mul(gate)?)?.to_dtype(x.dtype())?)
}

/// softmax over the last dimension with a gradient: (.., n).
pub(super) fn softmax(x: &Tensor) -> Result<Tensor> {
    Ok(candle_nn::ops::softmax(x, D::Minus1)?)
}

/// The gradient of an embedding (vocab, c): the sum of `gradient` (n, c) over the tokens of each id, ids (n).
///
/// In f32 whatever the type of the gradient: in bf16 a sum of ones ends at 256, and common tokens come more often.
pub(super) fn sum_by_token(ids: &Tensor, gradient: &Tensor, vocab_size: usize) -> Result<Tensor> {
    let gradient = gradient.detach().to_dtype(DType::F32)?.contiguous()?;
    let sums = Tensor::zeros((vocab_size, gradient.dim(1)?), DType::F32, gradient.device())?;
    Ok(sums.index_add(ids, &gradient, 0)?)
}

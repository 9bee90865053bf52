//! Dense attention over contiguous keys and values, forward and backward: what training and whole-prompt prefill run.
//! Knows no pages and no cache; positions follow from the shapes alone.

use crate::storage::{aligned, contiguous_range};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor, bail,
};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::OnceLock;

/// Tokens that a call may have: the kernels' index sums stay in 32 bits.
const MAX_TOKENS: usize = 1 << 28;

/// Which keys a query sees in dense attention, and the scale of the scores.
///
/// Queries are aligned to the end of the keys: query i has position i + tk - tq.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DenseAttentionParams {
    /// Factor on q·k, positive; 1/√head_dim for the models here.
    pub scale: f32,
    /// A query at position i sees the keys j <= i only.
    pub causal: bool,
    /// A query at position i sees the keys i - window < j <= i only, in tokens; implies `causal`. None: no window.
    pub window: Option<usize>,
}

impl DenseAttentionParams {
    /// Keys that query `i` sees.
    fn visible(&self, i: usize, shape: &AttentionShape) -> Range<usize> {
        let (tq, tk) = (shape.query_tokens, shape.key_tokens);
        // Keys at or before the query's own position; none for a query before the first key.
        let until_own = (i + 1 + tk).saturating_sub(tq);
        let causal = self.causal || self.window.is_some();
        let end = if causal { until_own.min(tk) } else { tk };
        let start = self.window.map_or(0, |window| until_own.saturating_sub(window));
        start.min(end)..end
    }
}

/// The checked shape of one call.
#[derive(Debug, Clone, Copy)]
struct AttentionShape {
    batch: usize,
    query_tokens: usize,
    key_tokens: usize,
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl AttentionShape {
    fn check(
        op: &str,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        params: &DenseAttentionParams,
    ) -> Result<Self> {
        let (batch, query_tokens, query_heads, head_dim) = q.dims4()?;
        let (key_batch, key_tokens, kv_heads, key_dim) = k.dims4()?;
        if k.dims() != v.dims() || key_batch != batch || key_dim != head_dim {
            bail!(
                "{op}: k {:?}, v {:?}, expected two of ({batch}, tk, g, {head_dim})",
                k.shape(),
                v.shape()
            );
        }
        if head_dim == 0 || kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            bail!(
                "{op}: {query_heads} query heads of {head_dim} on {kv_heads} key/value heads, expected a multiple of them"
            );
        }
        for (name, tensor) in [("k", k), ("v", v)] {
            if tensor.dtype() != q.dtype() {
                bail!("{op}: {name} of {:?}, expected q's {:?}", tensor.dtype(), q.dtype());
            }
            if !tensor.device().same_device(q.device()) {
                bail!(
                    "{op}: {name} on {:?}, expected q's {:?}",
                    tensor.device().location(),
                    q.device().location()
                );
            }
        }
        if !matches!(q.dtype(), DType::F32 | DType::BF16 | DType::F16) {
            bail!("{op}: elements of {:?}, expected f32, bf16 or f16", q.dtype());
        }
        if query_tokens > MAX_TOKENS || key_tokens > MAX_TOKENS {
            bail!(
                "{op}: {query_tokens} queries and {key_tokens} keys, expected at most {MAX_TOKENS}"
            );
        }
        if !(params.scale.is_finite() && params.scale > 0.0) {
            bail!("{op}: scale {}, expected a positive number", params.scale);
        }
        Ok(Self { batch, query_tokens, key_tokens, query_heads, kv_heads, head_dim })
    }

    fn out(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.query_tokens, self.query_heads, self.head_dim)
    }

    fn keys(&self) -> (usize, usize, usize, usize) {
        (self.batch, self.key_tokens, self.kv_heads, self.head_dim)
    }

    fn lse(&self) -> (usize, usize, usize) {
        (self.batch, self.query_heads, self.query_tokens)
    }

    #[cfg(feature = "cuda")]
    fn has_no_query(&self) -> bool {
        self.batch * self.query_tokens * self.query_heads == 0
    }

    /// Bytes of q, dout, k and v in 16 bits.
    #[cfg(feature = "cuda")]
    fn walked_bytes(&self) -> usize {
        let heads = self.query_tokens * self.query_heads + self.key_tokens * self.kv_heads;
        2 * 2 * self.batch * heads * self.head_dim
    }

    /// Query heads that share a key/value head.
    fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Index in (b, tq, h) of a query row.
    fn row(&self, batch: usize, i: usize, head: usize) -> usize {
        (batch * self.query_tokens + i) * self.query_heads + head
    }

    /// Index in (b, tk, g) of a key.
    fn key(&self, batch: usize, j: usize, kv_head: usize) -> usize {
        (batch * self.key_tokens + j) * self.kv_heads + kv_head
    }
}

/// softmax(q kᵀ · scale) v and the log of each row's sum of e^score: (out, lse), without history for gradients.
///
/// Shapes: `q` (b, tq, h, d); `k`, `v` (b, tk, g, d), h a multiple of g, query head i reading key/value head i / (h / g).
/// `out` (b, tq, h, d) in q's type; `lse` (b, h, tq), f32. A query that sees no key: out 0, lse -inf.
/// f32, bf16 or f16, computed in f32. On CUDA: head_dim 64, 96, 128 or 256 in bf16 and f16, multiples of 32 up to 256
/// in f32. Inputs that are not contiguous are copied first.
///
/// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
///
/// # Errors
/// If shapes, types or devices disagree, the scale is not positive, no kernel has the head_dim, or it asks for more shared
/// memory than the card has (`kernels/docs/cuda.md`).
pub fn attention_forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &DenseAttentionParams,
) -> Result<(Tensor, Tensor)> {
    let op = "attention_forward";
    let shape = AttentionShape::check(op, q, k, v, params)?;
    match q.device() {
        Device::Cpu => {
            let (out, lse) = cpu::forward([&values(q)?, &values(k)?, &values(v)?], &shape, params);
            let out = Tensor::from_vec(out, shape.out(), &Device::Cpu)?.to_dtype(q.dtype())?;
            Ok((out, Tensor::from_vec(lse, shape.lse(), &Device::Cpu)?))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let (q, k, v) = (aligned(q)?, aligned(k)?, aligned(v)?);
            let inputs =
                [crate::cuda::address(&q)?, crate::cuda::address(&k)?, crate::cuda::address(&v)?];
            let (out, lse) = cuda::forward(device, q.dtype(), inputs, &shape, params)?;
            Ok((crate::cuda::tensor(out, shape.out()), lse))
        }
        other => bail!("{op}: tensors on {:?}, expected the CPU or CUDA", other.location()),
    }
}

/// Gradients of [`attention_forward`]: (dq, dk, dv), each of its input's shape and type.
///
/// `out` and `lse` are the forward's results, `dout` (b, tq, h, d) the gradient of out, `dlse` (b, h, tq), f32, that of
/// lse if something depends on it. With P the probabilities, dP = dout vᵀ and delta = rowsum(dout ∘ out):
/// dS = P ∘ (dP - delta + dlse), dq = scale · dS k, dk = scale · dSᵀ q, dv = Pᵀ dout, all summed in f32.
/// A query that sees no key has gradient 0.
///
/// Equal inputs give equal bits: no sum is made by atomics.
///
/// Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2; the term of dlse follows from d lse / d score = P.
///
/// # Errors
/// As [`attention_forward`], and if a result or gradient does not have its shape and type.
#[allow(clippy::too_many_arguments, reason = "the arguments of the formula")]
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    lse: &Tensor,
    dout: &Tensor,
    dlse: Option<&Tensor>,
    params: &DenseAttentionParams,
) -> Result<(Tensor, Tensor, Tensor)> {
    let op = "attention_backward";
    let shape = AttentionShape::check(op, q, k, v, params)?;
    let like_out = [("out", out), ("dout", dout)];
    let like_lse = [("lse", lse), ("dlse", dlse.unwrap_or(lse))];
    let expected = like_out
        .map(|(name, x)| (name, x, Shape::from(shape.out()), q.dtype()))
        .into_iter()
        .chain(like_lse.map(|(name, x)| (name, x, Shape::from(shape.lse()), DType::F32)));
    for (name, tensor, dims, dtype) in expected {
        if *tensor.shape() != dims
            || tensor.dtype() != dtype
            || !tensor.device().same_device(q.device())
        {
            bail!(
                "{op}: {name} {:?} of {:?} on {:?}, expected {dims:?} of {dtype:?} on q's device",
                tensor.shape(),
                tensor.dtype(),
                tensor.device().location()
            );
        }
    }
    match q.device() {
        Device::Cpu => {
            let dlse = dlse.map(values).transpose()?;
            let (dq, dk, dv) = cpu::backward(
                [&values(q)?, &values(k)?, &values(v)?],
                [&values(out)?, &values(lse)?, &values(dout)?],
                dlse.as_deref(),
                &shape,
                params,
            );
            let tensor = |values: Vec<f32>, dims: (usize, usize, usize, usize)| {
                Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(q.dtype())
            };
            Ok((tensor(dq, shape.out())?, tensor(dk, shape.keys())?, tensor(dv, shape.keys())?))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => {
            let inputs = [aligned(q)?, aligned(k)?, aligned(v)?, aligned(out)?, aligned(dout)?];
            let lse = lse.contiguous()?;
            let dlse = dlse.map(Tensor::contiguous).transpose()?;
            cuda::backward(device, &inputs, &lse, dlse.as_ref(), &shape, params)
        }
        other => bail!("{op}: tensors on {:?}, expected the CPU or CUDA", other.location()),
    }
}

/// [`attention_forward`]'s out with gradients for q, k and v.
///
/// # Errors
/// As [`attention_forward`].
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    params: &DenseAttentionParams,
) -> Result<Tensor> {
    let shape = AttentionShape::check("attention", q, k, v, params)?;
    let op = Attention { shape, params: *params, lse: OnceLock::new() };
    aligned(q)?.apply_op3(&aligned(k)?, &aligned(v)?, op)
}

/// The op of one call: its backward needs the lse of its forward.
struct Attention {
    shape: AttentionShape,
    params: DenseAttentionParams,
    lse: OnceLock<Tensor>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [
            &stored_values(q, q_layout)?[..],
            &stored_values(k, k_layout)?,
            &stored_values(v, v_layout)?,
        ];
        let (out, lse) = cpu::forward(inputs, &self.shape, &self.params);
        let _ = self.lse.set(Tensor::from_vec(lse, self.shape.lse(), &Device::Cpu)?);
        let out = match q {
            CpuStorage::BF16(_) => CpuStorage::BF16(out.into_iter().map(bf16::from_f32).collect()),
            CpuStorage::F16(_) => CpuStorage::F16(out.into_iter().map(f16::from_f32).collect()),
            _ => CpuStorage::F32(out),
        };
        Ok((out, self.shape.out().into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q: &candle_core::CudaStorage,
        q_layout: &Layout,
        k: &candle_core::CudaStorage,
        k_layout: &Layout,
        v: &candle_core::CudaStorage,
        v_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [
            crate::cuda::address_of(q, q_layout)?,
            crate::cuda::address_of(k, k_layout)?,
            crate::cuda::address_of(v, v_layout)?,
        ];
        let (out, lse) = cuda::forward(q.device(), q.dtype(), inputs, &self.shape, &self.params)?;
        let _ = self.lse.set(lse);
        Ok((out, self.shape.out().into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        dout: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(lse) = self.lse.get() else {
            bail!("attention: backward without its forward, expected lse from it")
        };
        let (dq, dk, dv) = attention_backward(q, k, v, out, lse, dout, None, &self.params)?;
        Ok((Some(dq), Some(dk), Some(dv)))
    }
}

/// The elements of a CPU tensor as f32, in row-major order.
fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => stored_values(storage, layout),
        _ => bail!("attention: tensor on {:?}, expected the CPU", tensor.device().location()),
    }
}

fn stored_values(storage: &CpuStorage, layout: &Layout) -> Result<Vec<f32>> {
    let range = contiguous_range("attention", layout)?;
    Ok(match storage {
        CpuStorage::F32(x) => x[range].to_vec(),
        CpuStorage::BF16(x) => x[range].iter().map(|x| x.to_f32()).collect(),
        CpuStorage::F16(x) => x[range].iter().map(|x| x.to_f32()).collect(),
        _ => bail!("attention: elements of {:?}, expected f32, bf16 or f16", storage.dtype()),
    })
}

/// The plain version in f32, one thread a (batch, key/value head).
mod cpu {
    use super::{AttentionShape, DenseAttentionParams};
    use rayon::prelude::*;

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += factor * x;
        }
    }

    /// (out, lse) of (b, tq, h, d) and (b, h, tq).
    pub(super) fn forward(
        [q, k, v]: [&[f32]; 3],
        shape: &AttentionShape,
        params: &DenseAttentionParams,
    ) -> (Vec<f32>, Vec<f32>) {
        let (h, d) = (shape.query_heads, shape.head_dim);
        let mut out = vec![0f32; q.len()];
        let mut lse = vec![f32::NEG_INFINITY; q.len() / d];
        let rows: Vec<f32> = out
            .par_chunks_mut(d)
            .enumerate()
            .map(|(row, out)| {
                let (token, head) = (row / h, row % h);
                let (batch, i) = (token / shape.query_tokens, token % shape.query_tokens);
                let key = |j| shape.key(batch, j, head / shape.group()) * d;
                let visible = params.visible(i, shape);
                let mut weights: Vec<f32> = visible
                    .clone()
                    .map(|j| dot(&q[row * d..][..d], &k[key(j)..][..d]) * params.scale)
                    .collect();
                if weights.is_empty() {
                    return f32::NEG_INFINITY;
                }
                let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                weights.iter_mut().for_each(|w| *w = (*w - max).exp());
                let sum: f32 = weights.iter().sum();
                for (j, weight) in visible.zip(&weights) {
                    add_scaled(out, weight / sum, &v[key(j)..][..d]);
                }
                max + sum.ln()
            })
            .collect();
        for (row, value) in rows.into_iter().enumerate() {
            let (token, head) = (row / h, row % h);
            let (batch, i) = (token / shape.query_tokens, token % shape.query_tokens);
            lse[(batch * h + head) * shape.query_tokens + i] = value;
        }
        (out, lse)
    }

    /// (dq, dk, dv) of the shapes of q, k and v.
    pub(super) fn backward(
        [q, k, v]: [&[f32]; 3],
        [out, lse, dout]: [&[f32]; 3],
        dlse: Option<&[f32]>,
        shape: &AttentionShape,
        params: &DenseAttentionParams,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (tq, tk, d, group) =
            (shape.query_tokens, shape.key_tokens, shape.head_dim, shape.group());
        // Per (batch, key/value head): dq (group, tq, d), dk (tk, d), dv (tk, d).
        let one = |part: usize| {
            let (batch, kv_head) = (part / shape.kv_heads, part % shape.kv_heads);
            let mut dq = vec![0f32; group * tq * d];
            let (mut dk, mut dv) = (vec![0f32; tk * d], vec![0f32; tk * d]);
            for (member, i) in (0..group).flat_map(|member| (0..tq).map(move |i| (member, i))) {
                let head = kv_head * group + member;
                let at = shape.row(batch, i, head) * d;
                let stat = (batch * shape.query_heads + head) * tq + i;
                let (query, dout) = (&q[at..at + d], &dout[at..at + d]);
                let delta = dot(&out[at..at + d], dout) - dlse.map_or(0.0, |dlse| dlse[stat]);
                for j in params.visible(i, shape) {
                    let key = shape.key(batch, j, kv_head) * d;
                    let (key, value) = (&k[key..key + d], &v[key..key + d]);
                    let weight = (dot(query, key) * params.scale - lse[stat]).exp();
                    let dscore = weight * (dot(dout, value) - delta) * params.scale;
                    add_scaled(&mut dv[j * d..(j + 1) * d], weight, dout);
                    add_scaled(&mut dk[j * d..(j + 1) * d], dscore, query);
                    add_scaled(&mut dq[(member * tq + i) * d..][..d], dscore, key);
                }
            }
            (dq, dk, dv)
        };
        let parts: Vec<_> = (0..shape.batch * shape.kv_heads).into_par_iter().map(one).collect();
        let (mut dq, mut dk, mut dv) =
            (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
        for (part, (part_dq, part_dk, part_dv)) in parts.iter().enumerate() {
            let (batch, kv_head) = (part / shape.kv_heads, part % shape.kv_heads);
            for (row, values) in part_dq.chunks_exact(d).enumerate() {
                let at = shape.row(batch, row % tq, kv_head * group + row / tq) * d;
                dq[at..at + d].copy_from_slice(values);
            }
            for j in 0..tk {
                let at = shape.key(batch, j, kv_head) * d;
                dk[at..at + d].copy_from_slice(&part_dk[j * d..(j + 1) * d]);
                dv[at..at + d].copy_from_slice(&part_dv[j * d..(j + 1) * d]);
            }
        }
        (dq, dk, dv)
    }
}

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(any(feature = "cuda", test))]
mod tile;

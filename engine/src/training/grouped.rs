//! Attention with grouped heads: plain, over fused keys and values (FastMKA), or one attention a level (MKA).
//! Knows no MLP and no loss.

use super::cache::{Cached, Kept, LayerCache};
use super::config::MemoryKind;
use super::layers::{Linear, Pass, forward_all};
use super::operations::{attend, attend_on_tape, mix, rms_norm};
use super::summary::Summary;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use mka_kernels::tape::{Value, ops};
use mka_kernels::{DenseAttentionParams, attention_forward, rotate};

/// Attention with grouped heads, and the memory beside it.
pub(super) struct GroupedAttention {
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    pub(super) memory: Option<Summary>,
    /// Its number.
    pub(super) layer: usize,
    pub(super) sliding_window: Option<u64>,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) eps: f64,
}

impl GroupedAttention {
    /// x (n, hidden) -> (n, hidden) without the bias of `o`, of this process's heads; with a cache, one sequence that goes
    /// on from what is in it.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        mut cached: Option<&mut Cached<'_>>,
    ) -> Result<Tensor> {
        let adapters = pass.adapters;
        let q = self.q.forward(x, adapters)?;
        let (k, v) = (self.k.project(x, adapters)?, self.v.project(x, adapters)?);
        let Some(memory) = self.memory.as_ref().filter(|_| pass.memory) else {
            let attended = self.attend(&q, &k, &v, pass, cached.map(|cached| (cached, 0)))?;
            return self.o.project(&attended, adapters);
        };
        let width = k.dim(1)?;
        let kv = Tensor::cat(&[&k, &v], 1)?;
        let levels = memory.levels(&q, &kv, self.head_dim, pass, cached.as_deref_mut())?;
        let weights = memory.weights(&q)?;
        let attended = match memory.kind {
            MemoryKind::Mka => {
                let at = cached.as_deref_mut().map(|cached| (cached, 0));
                let first = self.attend(&q, &k, &v, pass, at)?;
                let mut others = Vec::new();
                for level in 0..levels.dim(1)? {
                    let kv = levels.narrow(1, level, 1)?.squeeze(1)?.to_dtype(k.dtype())?;
                    let (k, v) = (kv.narrow(1, 0, width)?, kv.narrow(1, width, width)?);
                    let at = cached.as_deref_mut().map(|cached| (cached, level + 1));
                    others.push(self.attend(&q, &k, &v, pass, at)?.unsqueeze(1)?);
                }
                mix(&first, &Tensor::cat(&others, 1)?, &weights, &memory.gate)?
            }
            _ => {
                let mixed = mix(&kv, &levels, &weights, &memory.gate)?;
                let (k, v) = (mixed.narrow(1, 0, width)?, mixed.narrow(1, width, width)?);
                self.attend(&q, &k, &v, pass, cached.map(|cached| (cached, 0)))?
            }
        };
        self.o.project(&attended, adapters)
    }

    /// Whether the tape's ops are all that this pass needs: without memory, or with one whose keys and values the kernels'
    /// route makes. Else candle's graph is what runs.
    pub(super) fn is_on_tape(&self, pass: &Pass) -> bool {
        let memory = self.memory.as_ref().filter(|_| pass.memory);
        memory.is_none_or(|memory| memory.is_fused(self.k.weight().device(), self.head_dim))
    }

    /// [`GroupedAttention::forward`] on the tape, without cache.
    pub(super) fn forward_on_tape(&self, x: &Value, pass: &Pass) -> Result<Value> {
        let (b, t, g, d) = (pass.b, pass.t, self.kv_heads, self.head_dim);
        let adapters = pass.adapters;
        let normed = |x: Value, weight: &Tensor| ops::norm(&x, None, Some(weight), self.eps as f32);
        let (q, k, v) = match self.memory.as_ref().filter(|_| pass.memory) {
            Some(memory) => {
                let [q, k, v] = [&self.q, &self.k, &self.v].map(|x| x.projection(adapters));
                let mut projected = ops::project(x, &[&[q], &[k, v]])?;
                let (Some(kv), Some(q)) = (projected.pop(), projected.pop()) else {
                    return Err(Error::model("attention: expected queries, and keys with values"));
                };
                let q = self.q.biased(q)?;
                let kv = ops::reshape(&kv, (b, t, 2, g, d))?;
                let bias = self.key_value_bias()?;
                let norm = self.qk_norm.as_ref().map(|(_, k)| ops::cast(&Value::of(k), DType::F32));
                let norm = norm.transpose()?;
                let small = (bias.as_ref(), norm.as_ref());
                let (k, v) = memory.fused(&q, &kv, small, self.eps, pass)?;
                (q, k, v)
            }
            None => {
                let [q, k, v] = forward_all(x, [&self.q, &self.k, &self.v], adapters)?;
                let mut k = ops::reshape(&k, (b * t, g, d))?;
                if let Some((_, weight)) = &self.qk_norm {
                    k = normed(k, weight)?.1;
                }
                let k = ops::reshape(&ops::rotated(&k, &pass.angles)?, (b, t, g, d))?;
                (q, k, ops::reshape(&v, (b, t, g, d))?)
            }
        };
        let mut q = ops::reshape(&q, (b * t, self.heads, d))?;
        if let Some((weight, _)) = &self.qk_norm {
            q = normed(q, weight)?.1;
        }
        let q = ops::reshape(&ops::rotated(&q, &pass.angles)?, (b, t, self.heads, d))?;
        let out = attend_on_tape(&q, &k, &v, &pass.reach(self.layer, self.sliding_window)?)?;
        let out = ops::reshape(&out, (b * t, self.heads * d))?;
        Ok(ops::project_one(&out, self.o.projection(adapters))?)
    }

    /// Bias of keys and values, f32: (2, g, d).
    fn key_value_bias(&self) -> Result<Option<Value>> {
        let (Some(k), Some(v)) = (self.k.bias(), self.v.bias()) else { return Ok(None) };
        let single = |bias| ops::cast(&Value::of(bias), DType::F32);
        let both = ops::concat(&[&single(k)?, &single(v)?])?;
        Ok(Some(ops::reshape(&both, (2, self.kv_heads, self.head_dim))?))
    }

    /// Normed and rotated queries: q (n, h · d) -> (b, t, h, d).
    fn queries(&self, q: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (b, t, d) = (pass.b, pass.t, self.head_dim);
        let mut q = q.reshape((b * t, self.heads, d))?;
        if let Some((norm, _)) = &self.qk_norm {
            q = rms_norm(&q, norm, self.eps)?;
        }
        Ok(rotate(&q, &pass.angles)?.reshape((b, t, self.heads, d))?)
    }

    /// q (n, h · d); k, v (n, g · d) without bias -> (n, h · d); with a cache, of the level that is named.
    fn attend(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        pass: &Pass,
        cached: Option<(&mut Cached<'_>, usize)>,
    ) -> Result<Tensor> {
        let (b, t, d) = (pass.b, pass.t, self.head_dim);
        let n = b * t;
        let mut k = self.k.with_bias(k.contiguous()?)?.reshape((n, self.kv_heads, d))?;
        let mut v = self.v.with_bias(v.contiguous()?)?.reshape((b, t, self.kv_heads, d))?;
        if let Some((_, norm)) = &self.qk_norm {
            k = rms_norm(&k, norm, self.eps)?;
        }
        let q = self.queries(q, pass)?;
        let mut k = rotate(&k, &pass.angles)?.reshape((b, t, self.kv_heads, d))?;
        let out = match cached {
            None => attend(&q, &k, &v, &pass.reach(self.layer, self.sliding_window)?)?,
            Some((Cached { cache, seen }, level)) => {
                let (keys, values) = &cache.levels[level];
                (k, v) = (keys.append(&k, *seen)?, values.append(&v, *seen)?);
                let params = DenseAttentionParams {
                    scale: 1.0 / (d as f32).sqrt(),
                    causal: true,
                    window: self.sliding_window.map(|window| window as usize),
                };
                attention_forward(&q.detach(), &k, &v, &params)?.0
            }
        };
        Ok(out.reshape((n, self.heads * d))?)
    }

    pub(super) fn cache(&self, capacity: usize) -> Result<LayerCache> {
        let like = self.k.weight();
        let room = || -> Result<Kept> {
            let shape = (1, capacity, self.kv_heads, self.head_dim);
            Ok(Kept::new(Tensor::zeros(shape, like.dtype(), like.device())?))
        };
        let count = match &self.memory {
            Some(Summary { kind: MemoryKind::Mka, rates, .. }) => 1 + rates.values()?.dim(0)?,
            _ => 1,
        };
        let levels = (0..count).map(|_| Ok((room()?, room()?))).collect::<Result<_>>()?;
        Ok(LayerCache::new(levels))
    }
}

//! Attention with grouped heads: plain, over fused keys and values (FastMKA), or one attention a level (MKA).
//! Knows no MLP and no loss.

use super::cache::{Cached, Kept, LayerCache};
use super::config::MemoryKind;
use super::layers::{Linear, Pass};
use super::operations::{attend, mix, rms_norm};
use super::summary::Summary;
use crate::error::Result;
use candle_core::Tensor;
use mka_kernels::{DenseAttentionParams, attention_forward, rotate};

/// Attention with grouped heads, and the memory beside it.
pub(super) struct GroupedAttention {
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    pub(super) qk_norm: Option<(Tensor, Tensor)>,
    pub(super) memory: Option<Summary>,
    pub(super) sliding_window: Option<u64>,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) eps: f64,
}

impl GroupedAttention {
    /// x (n, hidden) -> (n, hidden); with a cache, one sequence that goes on from what is in it.
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
            return self.o.forward(&attended, adapters);
        };
        let width = k.dim(1)?;
        let kv = Tensor::cat(&[&k, &v], 1)?;
        let levels = memory.levels(&kv, pass, cached.as_deref_mut())?;
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
        self.o.forward(&attended, adapters)
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
        let mut q = q.reshape((n, self.heads, d))?;
        let mut k = self.k.with_bias(k.contiguous()?)?.reshape((n, self.kv_heads, d))?;
        let mut v = self.v.with_bias(v.contiguous()?)?.reshape((b, t, self.kv_heads, d))?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (rms_norm(&q, q_norm, self.eps)?, rms_norm(&k, k_norm, self.eps)?);
        }
        let q = rotate(&q, &pass.angles)?.reshape((b, t, self.heads, d))?;
        let mut k = rotate(&k, &pass.angles)?.reshape((b, t, self.kv_heads, d))?;
        let out = match cached {
            None => attend(&q, &k, &v, pass.reach(self.sliding_window)?)?,
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

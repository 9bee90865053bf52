//! Multi-head latent attention: keys and values from one latent vector a token, a shared rotary key beside it.
//! Knows no memory and no window.
//!
//! Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1, equations 9 to 19 without the compression of queries.

use super::cache::{Cached, Kept, LayerCache};
use super::config::LatentSettings;
use super::layers::{Linear, Pass};
use super::operations::{Reach, attend, rms_norm, softmax};
use super::parameters::Builder;
use crate::error::Result;
use crate::models::config::DecoderConfig;
use crate::models::frequencies::{Frequencies, RopeScaling};
use candle_core::{DType, Tensor};
use mka_kernels::{RotaryAngles, rotate};

/// One layer's projections.
pub(super) struct LatentAttention {
    q: Linear,
    /// hidden -> latent and rotary key.
    down: Linear,
    norm: Tensor,
    /// latent -> keys and values of every head.
    up: Linear,
    o: Linear,
    heads: usize,
    /// Width of a head's key without its rotary part, and of its value.
    head_dim: usize,
    settings: LatentSettings,
    frequencies: Frequencies,
    eps: f64,
}

impl LatentAttention {
    pub(super) fn new(
        builder: &mut Builder<'_>,
        c: &DecoderConfig,
        settings: LatentSettings,
        layer: usize,
    ) -> Result<Self> {
        let at = |part: &str| format!("model.layers.{layer}.self_attn.{part}.weight");
        let (h, d, LatentSettings { rank, rope_dim }) = (c.num_heads, c.head_dim, settings);
        let matrix = |builder: &mut Builder<'_>, part: &str, rows: usize, cols: usize| {
            Ok::<_, crate::Error>(Linear::plain(builder.matrix(&at(part), rows, cols)?))
        };
        Ok(Self {
            q: matrix(builder, "q_proj", h * (d + rope_dim), c.hidden_size)?,
            down: matrix(builder, "kv_a_proj_with_mqa", rank + rope_dim, c.hidden_size)?,
            norm: builder.vector(&at("kv_a_layernorm"), rank, 1.0)?,
            up: matrix(builder, "kv_b_proj", h * 2 * d, rank)?,
            o: matrix(builder, "o_proj", c.hidden_size, h * d)?,
            heads: h,
            head_dim: d,
            settings,
            frequencies: Frequencies::new(c.rope_theta, rope_dim, &RopeScaling::None),
            eps: c.rms_norm_eps,
        })
    }

    /// x (n, hidden) -> (n, hidden).
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (b, t, h, d) = (pass.b, pass.t, self.heads, self.head_dim);
        let n = b * t;
        let rope_dim = self.settings.rope_dim;
        let positions = (0..b).flat_map(|_| 0..t as u64);
        let angles = self.frequencies.angles(positions);
        let (latent, key_rope) = self.latent(x, &angles)?;
        let (q, q_rope) = self.queries(x, &angles)?;
        let kv = self.up.forward(&latent, true)?.reshape((n, h, 2 * d))?;
        let key_rope = key_rope.broadcast_as((n, h, rope_dim))?;
        let k = Tensor::cat(&[&kv.narrow(2, 0, d)?, &key_rope], 2)?;
        let q = Tensor::cat(&[&q, &q_rope], 2)?;
        // The kernels want values as wide as keys.
        let v = kv.narrow(2, d, d)?.pad_with_zeros(2, 0, rope_dim)?;
        let heads = |x: Tensor| x.reshape((b, t, h, d + rope_dim));
        let out = attend(&heads(q)?, &heads(k)?, &heads(v)?, &Reach::Causal)?;
        let out = out.narrow(3, 0, d)?.reshape((n, h * d))?;
        self.o.forward(&out, true)
    }

    /// What the cache holds of each token: the normed latent (n, rank) and the rotated key (n, 1, rope_dim).
    fn latent(&self, x: &Tensor, angles: &RotaryAngles) -> Result<(Tensor, Tensor)> {
        let LatentSettings { rank, rope_dim } = self.settings;
        let down = self.down.forward(x, true)?;
        let latent = rms_norm(&down.narrow(1, 0, rank)?, &self.norm, self.eps)?;
        let key = down.narrow(1, rank, rope_dim)?.unsqueeze(1)?;
        Ok((latent, rotate(&key, angles)?))
    }

    /// Queries without and with rotation: (n, h, head_dim), (n, h, rope_dim).
    fn queries(&self, x: &Tensor, angles: &RotaryAngles) -> Result<(Tensor, Tensor)> {
        let (d, rope_dim) = (self.head_dim, self.settings.rope_dim);
        let q = self.q.forward(x, true)?.reshape(((), self.heads, d + rope_dim))?;
        Ok((q.narrow(2, 0, d)?, rotate(&q.narrow(2, d, rope_dim)?, angles)?))
    }

    /// An empty cache for `capacity` tokens.
    pub(super) fn cache(&self, capacity: usize) -> Result<LayerCache> {
        let like = self.down.weight();
        let room = |width: usize| -> Result<Kept> {
            Ok(Kept::new(Tensor::zeros((1, capacity, width), like.dtype(), like.device())?))
        };
        let (latent, key) = (room(self.settings.rank)?, room(self.settings.rope_dim)?);
        Ok(LayerCache::new(vec![(latent, key)]))
    }

    /// [`LatentAttention::forward`] of one sequence that goes on from the cache, with the up-projection absorbed into
    /// queries and outputs: no key or value of a head is formed (section 2.1.2 of the paper).
    pub(super) fn forward_cached(
        &self,
        x: &Tensor,
        pass: &Pass,
        cached: &mut Cached<'_>,
    ) -> Result<Tensor> {
        let (t, h, d) = (pass.t, self.heads, self.head_dim);
        let LatentSettings { rank, rope_dim } = self.settings;
        let seen = cached.seen;
        let angles = self.frequencies.angles(seen as u64..(seen + t) as u64);
        let (latent, key) = self.latent(x, &angles)?;
        let (latents, keys) = &cached.cache.levels[0];
        let latents = latents.append(&latent.unsqueeze(0)?, seen)?.squeeze(0)?; // (n, rank)
        let keys = keys.append(&key.reshape((1, t, rope_dim))?, seen)?.squeeze(0)?; // (n, rope_dim)
        let n = seen + t;
        let (q, q_rope) = self.queries(x, &angles)?;
        let up = self.up.weight().detach().reshape((h, 2 * d, rank))?;
        let by_head = |x: Tensor| x.detach().transpose(0, 1)?.contiguous(); // (t, h, ..) -> (h, t, ..)
        let q = by_head(q)?.matmul(&up.narrow(1, 0, d)?.contiguous()?)?; // (h, t, rank)
        let q = Tensor::cat(&[&q, &by_head(q_rope)?], 2)?.reshape((h * t, rank + rope_dim))?;
        let all = Tensor::cat(&[&latents, &keys], 1)?; // (n, rank + rope_dim)
        let scale = 1.0 / ((d + rope_dim) as f64).sqrt();
        let scores = (q.matmul(&all.t()?)?.to_dtype(DType::F32)? * scale)?.reshape((h, t, n))?;
        let hidden: Vec<f32> = (0..t)
            .flat_map(|i| (0..n).map(move |j| if j > seen + i { f32::NEG_INFINITY } else { 0.0 }))
            .collect();
        let mask = Tensor::from_vec(hidden, (1, t, n), x.device())?;
        let weights = softmax(&scores.broadcast_add(&mask)?)?.to_dtype(x.dtype())?;
        let mixed =
            weights.reshape((h * t, n))?.matmul(&latents.contiguous()?)?.reshape((h, t, rank))?;
        let values = up.narrow(1, d, d)?.transpose(1, 2)?.contiguous()?; // (h, rank, d)
        let out = mixed.matmul(&values)?.transpose(0, 1)?.reshape((t, h * d))?;
        self.o.forward(&out.contiguous()?, true)
    }
}

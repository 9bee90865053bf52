//! The layers of the decoder with gradients: projections with adapters, grouped attention with its memory, gated MLP.
//! Knows no loss and no optimizer. The forward pass of a session is `models/decoder.rs`; tests hold the two together.

use super::config::{LoraSettings, MemoryKind, MemorySettings};
use super::decode::Kept;
use super::latent::LatentAttention;
use super::operations::{Reach, attend, mix, product, rms_norm, softmax};
use super::parameters::{Builder, Init};
use crate::error::{Error, Result};
use crate::models::config::DecoderConfig;
use candle_core::{DType, Tensor};
use mka_kernels::{
    DenseAttentionParams, RotaryAngles, attention_forward, ema_scan_learned, rotate, silu_mul,
};

/// What a forward pass runs over: `b` sequences of `t` tokens, n = b · t rows.
pub(super) struct Pass {
    pub(super) b: usize,
    pub(super) t: usize,
    /// Of every row.
    pub(super) angles: RotaryAngles,
    /// Whether the gates are as trained, or shut.
    pub(super) memory: bool,
    /// Whether adapters count.
    pub(super) adapters: bool,
    /// Tokens that a query sees; 0: all.
    pub(super) window_tokens: usize,
    pub(super) sink_tokens: usize,
}

impl Pass {
    /// What a layer with a window of its own sees.
    fn reach(&self, sliding_window: Option<u64>) -> Result<Reach> {
        let own = sliding_window.map(|window| window as usize);
        let window = Some(self.window_tokens).filter(|window| *window > 0);
        match (own, window) {
            (None, None) => Ok(Reach::Causal),
            (Some(own), None) => Ok(Reach::Window(own)),
            (None, Some(window)) => {
                Ok(Reach::WindowAndSinks { window, sinks: self.sink_tokens.min(window) })
            }
            (Some(own), Some(window)) if window >= own => Ok(Reach::Window(own)),
            (Some(own), Some(window)) => Err(Error::invalid(format!(
                "memory.window_tokens: {window}, expected at least the model's own window of {own}"
            ))),
        }
    }
}

/// A low-rank adapter: scale · B A.
struct Adapter {
    a: Tensor,
    b: Tensor,
    scale: f64,
}

/// y = x Wᵀ + b, with an adapter.
pub(super) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    adapter: Option<Adapter>,
}

impl Linear {
    pub(super) fn weight(&self) -> &Tensor {
        &self.weight
    }

    pub(super) fn plain(weight: Tensor) -> Self {
        Self { weight, bias: None, adapter: None }
    }

    /// Without the bias: x (n, in) -> (n, out).
    pub(super) fn project(&self, x: &Tensor, adapters: bool) -> Result<Tensor> {
        let y = product(x, &self.weight)?;
        match &self.adapter {
            Some(Adapter { a, b, scale }) if adapters => {
                Ok((y + (product(&product(x, a)?, b)? * *scale)?)?)
            }
            _ => Ok(y),
        }
    }

    /// x (n, in) -> (n, out).
    pub(super) fn forward(&self, x: &Tensor, adapters: bool) -> Result<Tensor> {
        self.with_bias(self.project(x, adapters)?)
    }

    fn with_bias(&self, y: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// Gate and router of one layer (design 3.4).
struct Memory {
    kind: MemoryKind,
    bias_correction: bool,
    /// (1), f32.
    gate: Tensor,
    down: (Tensor, Tensor),
    up: (Tensor, Tensor),
    rates: Rates,
}

/// The rates of the EMA, shared by all layers.
#[derive(Clone)]
pub(super) enum Rates {
    Fixed(Tensor),
    /// Logits of a sigmoid.
    Learned(Tensor),
}

impl Rates {
    /// (m), f32.
    pub(super) fn values(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Fixed(rates) => rates.clone(),
            Self::Learned(logits) => ((logits.neg()?.exp()? + 1.0)?).recip()?,
        })
    }
}

impl Memory {
    fn new(
        builder: &mut Builder<'_>,
        layer: usize,
        q_size: usize,
        settings: &MemorySettings,
        rates: &Rates,
    ) -> Result<Self> {
        let at = |part: &str| format!("layers.{layer}.{part}");
        let rank = if settings.router_rank > 0 { settings.router_rank } else { q_size / 2 };
        let levels = settings.rates.len() + 1;
        // The levels start even, whatever the query: the last matrix is zero, so that the gate opens first.
        let spread = Init::Normal(1.0 / (q_size as f32).sqrt());
        Ok(Self {
            kind: settings.kind,
            bias_correction: settings.bias_correction,
            gate: builder.memory(&at("gate"), &[1], Init::Constant(settings.initial_gate))?,
            down: (
                builder.memory(&at("router.down.weight"), &[rank, q_size], spread)?,
                builder.memory(&at("router.down.bias"), &[rank], Init::Constant(0.0))?,
            ),
            up: (
                builder.memory(&at("router.up.weight"), &[levels, rank], Init::Constant(0.0))?,
                builder.memory(&at("router.up.bias"), &[levels], Init::Constant(0.0))?,
            ),
            rates: rates.clone(),
        })
    }

    /// λ = softmax(MLP(q)): (n, h · d) -> (n, 1 + m), f32.
    fn weights(&self, q: &Tensor) -> Result<Tensor> {
        let q = q.to_dtype(DType::F32)?;
        let inner = product(&q, &self.down.0)?.broadcast_add(&self.down.1)?;
        // x · σ(x), in candle's ops: the gradient of its silu is exact.
        let inner = inner.silu()?;
        softmax(&product(&inner, &self.up.0)?.broadcast_add(&self.up.1)?)
    }

    /// The levels of projected keys and values: kv (n, c) -> (n, m, c), f32.
    ///
    /// A rate that is one number commutes with the projections, and the projections are narrower than the hidden state.
    fn levels(&self, kv: &Tensor, pass: &Pass, cached: Option<&mut Cached<'_>>) -> Result<Tensor> {
        let c = kv.dim(1)?;
        let rates = self.rates.values()?;
        let m = rates.dim(0)?;
        let kv = kv.reshape((pass.b, pass.t, c))?;
        let levels = match cached {
            None => {
                let state = Tensor::zeros((pass.b, m, c), DType::F32, kv.device())?;
                ema_scan_learned(&kv, &state, &rates, 0, self.bias_correction)?.0
            }
            Some(Cached { cache, seen }) => {
                let state = match &cache.ema {
                    Some(state) => state.clone(),
                    None => Tensor::zeros((pass.b, m, c), DType::F32, kv.device())?,
                };
                let seen = *seen as u64;
                let (levels, state) =
                    ema_scan_learned(&kv, &state, &rates, seen, self.bias_correction)?;
                cache.ema = Some(state.detach());
                levels
            }
        };
        Ok(levels.reshape((pass.b * pass.t, m, c))?)
    }
}

/// Attention with grouped heads, and the memory beside it.
pub(super) struct GroupedAttention {
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    qk_norm: Option<(Tensor, Tensor)>,
    memory: Option<Memory>,
    sliding_window: Option<u64>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f64,
}

impl GroupedAttention {
    /// x (n, hidden) -> (n, hidden); with a cache, one sequence that goes on from what is in it.
    fn forward(
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

    fn cache(&self, capacity: usize) -> Result<LayerCache> {
        let like = &self.k.weight;
        let room = || -> Result<Kept> {
            let shape = (1, capacity, self.kv_heads, self.head_dim);
            Ok(Kept::new(Tensor::zeros(shape, like.dtype(), like.device())?))
        };
        let count = match &self.memory {
            Some(Memory { kind: MemoryKind::Mka, rates, .. }) => 1 + rates.values()?.dim(0)?,
            _ => 1,
        };
        let levels = (0..count).map(|_| Ok((room()?, room()?))).collect::<Result<_>>()?;
        Ok(LayerCache { levels, ema: None })
    }
}

/// What one layer keeps of a stream.
pub(super) struct LayerCache {
    /// Keys and values, of each level of full MKA; of latent attention the latent and the rotary key.
    pub(super) levels: Vec<(Kept, Kept)>,
    /// After the last token: (1, m, 2 · g · d).
    ema: Option<Tensor>,
}

impl LayerCache {
    pub(super) fn latent(latent: Kept, key: Kept) -> Self {
        Self { levels: vec![(latent, key)], ema: None }
    }

    /// Bytes a token, and bytes whatever the length.
    pub(super) fn bytes(&self) -> (usize, usize) {
        let kept = self.levels.iter().map(|(a, b)| a.bytes_per_token() + b.bytes_per_token()).sum();
        (kept, self.ema.as_ref().map_or(0, |ema| 4 * ema.elem_count()))
    }
}

/// A layer's cache as one pass sees it.
pub(super) struct Cached<'a> {
    pub(super) cache: &'a mut LayerCache,
    /// Tokens before the pass.
    pub(super) seen: usize,
}

/// What mixes tokens in a layer.
pub(super) enum Attention {
    Grouped(Box<GroupedAttention>),
    Latent(Box<LatentAttention>),
}

/// One layer of the decoder.
pub(super) struct Layer {
    attention_norm: Tensor,
    attention: Attention,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    eps: f64,
}

/// What the layers of a model are made of.
pub(super) struct Blueprint<'a> {
    pub(super) config: &'a DecoderConfig,
    pub(super) memory: &'a MemorySettings,
    pub(super) lora: Option<&'a LoraSettings>,
    pub(super) latent: Option<super::config::LatentSettings>,
    pub(super) rates: Rates,
}

impl Blueprint<'_> {
    fn adapter(
        &self,
        builder: &mut Builder<'_>,
        layer: usize,
        part: &str,
        (rows, cols): (usize, usize),
    ) -> Result<Option<Adapter>> {
        let Some(lora) = self.lora.filter(|lora| lora.targets.iter().any(|target| target == part))
        else {
            return Ok(None);
        };
        let at = |tensor: &str| format!("layers.{layer}.lora.{part}.{tensor}");
        let spread = Init::Normal(1.0 / (cols as f32).sqrt());
        Ok(Some(Adapter {
            a: builder.adapter(&at("a"), &[lora.rank, cols], spread)?,
            b: builder.adapter(&at("b"), &[rows, lora.rank], Init::Constant(0.0))?,
            scale: lora.alpha / lora.rank as f64,
        }))
    }

    pub(super) fn layer(&self, builder: &mut Builder<'_>, i: usize) -> Result<Layer> {
        let c = self.config;
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let linear = |builder: &mut Builder<'_>, part: &str, name: &str, rows, cols, bias| {
            let weight = builder.matrix(&at(&format!("{name}.weight")), rows, cols)?;
            let bias = match bias {
                true => Some(builder.vector(&at(&format!("{name}.bias")), rows, 0.0)?),
                false => None,
            };
            let adapter = self.adapter(builder, i, part, (rows, cols))?;
            Ok::<_, Error>(Linear { weight, bias, adapter })
        };
        let attention_norm = builder.vector(&at("input_layernorm.weight"), hidden, 1.0)?;
        let attention = match self.latent {
            Some(latent) => {
                Attention::Latent(Box::new(LatentAttention::new(builder, c, latent, i)?))
            }
            None => {
                let q_size = c.num_heads * c.head_dim;
                let kv_size = c.num_kv_heads * c.head_dim;
                let heads = |builder: &mut Builder<'_>, part: &str, rows: usize| -> Result<_> {
                    let name = at(&format!("self_attn.{part}_proj"));
                    let weight =
                        builder.heads(&format!("{name}.weight"), rows, hidden, c.head_dim)?;
                    let bias = match c.qkv_bias {
                        true => {
                            Some(builder.head_vector(&format!("{name}.bias"), rows, c.head_dim)?)
                        }
                        false => None,
                    };
                    let adapter = self.adapter(builder, i, part, (rows, hidden))?;
                    Ok(Linear { weight, bias, adapter })
                };
                let qk_norm = match c.qk_norm {
                    true => Some((
                        builder.vector(&at("self_attn.q_norm.weight"), c.head_dim, 1.0)?,
                        builder.vector(&at("self_attn.k_norm.weight"), c.head_dim, 1.0)?,
                    )),
                    false => None,
                };
                let memory = match self.memory.kind {
                    MemoryKind::None => None,
                    _ => Some(Memory::new(builder, i, q_size, self.memory, &self.rates)?),
                };
                Attention::Grouped(Box::new(GroupedAttention {
                    q: heads(builder, "q", q_size)?,
                    k: heads(builder, "k", kv_size)?,
                    v: linear(builder, "v", "self_attn.v_proj", kv_size, hidden, c.qkv_bias)?,
                    o: linear(builder, "o", "self_attn.o_proj", hidden, q_size, c.output_bias)?,
                    qk_norm,
                    memory,
                    sliding_window: c.sliding_window[i],
                    heads: c.num_heads,
                    kv_heads: c.num_kv_heads,
                    head_dim: c.head_dim,
                    eps: c.rms_norm_eps,
                }))
            }
        };
        Ok(Layer {
            attention_norm,
            attention,
            mlp_norm: builder.vector(&at("post_attention_layernorm.weight"), hidden, 1.0)?,
            gate: linear(builder, "gate", "mlp.gate_proj", inner, hidden, c.mlp_bias)?,
            up: linear(builder, "up", "mlp.up_proj", inner, hidden, c.mlp_bias)?,
            down: linear(builder, "down", "mlp.down_proj", hidden, inner, c.mlp_bias)?,
            eps: c.rms_norm_eps,
        })
    }
}

impl Layer {
    /// hidden (n, hidden) -> (n, hidden).
    pub(super) fn forward(&self, hidden: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.run(hidden, pass, None)
    }

    /// [`Layer::forward`] of one sequence that goes on from what is in the cache; no gradient flows.
    pub(super) fn forward_cached(
        &self,
        hidden: &Tensor,
        pass: &Pass,
        cached: &mut Cached<'_>,
    ) -> Result<Tensor> {
        self.run(hidden, pass, Some(cached))
    }

    /// An empty cache for `capacity` tokens.
    pub(super) fn cache(&self, capacity: usize) -> Result<LayerCache> {
        match &self.attention {
            Attention::Grouped(attention) => attention.cache(capacity),
            Attention::Latent(attention) => attention.cache(capacity),
        }
    }

    fn run(&self, hidden: &Tensor, pass: &Pass, cached: Option<&mut Cached<'_>>) -> Result<Tensor> {
        let x = rms_norm(hidden, &self.attention_norm, self.eps)?;
        let attended = match (&self.attention, cached) {
            (Attention::Grouped(attention), cached) => attention.forward(&x, pass, cached)?,
            (Attention::Latent(attention), None) => attention.forward(&x, pass)?,
            (Attention::Latent(attention), Some(cached)) => {
                attention.forward_cached(&x, pass, cached)?
            }
        };
        let hidden = (hidden + attended)?;
        let x = rms_norm(&hidden, &self.mlp_norm, self.eps)?;
        let adapters = pass.adapters;
        let inner = silu_mul(&self.gate.forward(&x, adapters)?, &self.up.forward(&x, adapters)?)?;
        Ok((hidden + self.down.forward(&inner, adapters)?)?)
    }
}

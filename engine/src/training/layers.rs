//! The layers of the decoder with gradients: projections with adapters, what mixes tokens, gated MLP.
//! Knows no loss and no optimizer. The forward pass of a session is `models/decoder.rs`; tests hold the two together.

use super::cache::{Cached, LayerCache};
use super::config::{LatentSettings, LoraSettings, MemoryKind, MemorySettings};
use super::grouped::GroupedAttention;
use super::latent::LatentAttention;
use super::operations::{Reach, product};
use super::parameters::{Builder, Init};
use super::recall::Recall;
use super::summary::{Rates, Summary};
use crate::error::{Error, Result};
use crate::models::config::DecoderConfig;
use crate::parallel::TensorGroup;
use candle_core::Tensor;
use mka_kernels::RotaryAngles;
use mka_kernels::tape::ops::{self, Projection};
use mka_kernels::tape::{self, Value};

/// What a forward pass runs over: `b` sequences of `t` tokens, n = b · t rows.
pub(super) struct Pass {
    pub(super) b: usize,
    pub(super) t: usize,
    /// Of every row.
    pub(super) angles: RotaryAngles,
    /// Of the rows of one sequence.
    pub(super) row_angles: RotaryAngles,
    /// Whether the gates are as trained, or shut.
    pub(super) memory: bool,
    /// Whether adapters count.
    pub(super) adapters: bool,
    /// Tokens that a query sees; 0: all.
    pub(super) window_tokens: usize,
    pub(super) sink_tokens: usize,
    /// What is recalled from behind the window, if anything.
    pub(super) recall: Option<PassRecall>,
}

/// What a pass recalls, the same for all layers.
#[derive(Clone)]
pub(super) struct PassRecall {
    /// By each key/value head; whole pages.
    pub(super) tokens: usize,
    /// Layers below this one choose nothing.
    pub(super) first_layer: usize,
    /// Of the position as far as the window is long.
    pub(super) window_angles: RotaryAngles,
}

impl Pass {
    /// What layer `layer` sees, with a window of its own if it has one: it then recalls nothing.
    pub(super) fn reach(&self, layer: usize, sliding_window: Option<u64>) -> Result<Reach> {
        let own = sliding_window.map(|window| window as usize);
        let window = Some(self.window_tokens).filter(|window| *window > 0);
        match (own, window) {
            (None, None) => Ok(Reach::Causal),
            (Some(own), None) => Ok(Reach::Window(own)),
            (None, Some(window)) => {
                let sinks = self.sink_tokens.min(window);
                let Some(recall) = &self.recall else {
                    return Ok(Reach::WindowAndSinks { window, sinks });
                };
                Ok(Reach::Recall(Recall {
                    window,
                    sinks,
                    tokens: recall.tokens,
                    chooses: layer >= recall.first_layer,
                    angles: self.angles.clone(),
                    window_angles: recall.window_angles.clone(),
                }))
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

    /// Without the bias, as the tape's products take it.
    pub(super) fn projection(&self, adapters: bool) -> Projection<'_> {
        let adapter = self.adapter.as_ref().filter(|_| adapters);
        let adapter = adapter.map(|Adapter { a, b, scale }| (a, b, *scale as f32));
        Projection { weight: &self.weight, adapter, tf32: false }
    }

    /// [`Linear::with_bias`] on the tape.
    pub(super) fn biased(&self, y: Value) -> Result<Value> {
        Ok(match &self.bias {
            Some(bias) => ops::add_bias(&y, bias)?,
            None => y,
        })
    }

    pub(super) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    pub(super) fn with_bias(&self, y: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// What each of `linears` makes of x (n, in), on the tape.
pub(super) fn forward_all<const N: usize>(
    x: &Value,
    linears: [&Linear; N],
    adapters: bool,
) -> Result<[Value; N]> {
    let projections = linears.map(|linear| [linear.projection(adapters)]);
    let groups = projections.each_ref().map(|projection| projection.as_slice());
    let outputs = ops::project(x, &groups)?;
    let biased = outputs.into_iter().zip(linears).map(|(y, linear)| linear.biased(y));
    let outputs: Vec<Value> = biased.collect::<Result<_>>()?;
    outputs.try_into().map_err(|_| Error::model("project: expected a result of each projection"))
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
    group: TensorGroup,
}

/// What the layers of a model are made of.
pub(super) struct Blueprint<'a> {
    pub(super) config: &'a DecoderConfig,
    pub(super) memory: &'a MemorySettings,
    pub(super) lora: Option<&'a LoraSettings>,
    pub(super) latent: Option<LatentSettings>,
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
                    _ => Some(Summary::new(builder, i, q_size, self.memory, &self.rates)?),
                };
                Attention::Grouped(Box::new(GroupedAttention {
                    q: heads(builder, "q", q_size)?,
                    k: heads(builder, "k", kv_size)?,
                    v: linear(builder, "v", "self_attn.v_proj", kv_size, hidden, c.qkv_bias)?,
                    o: linear(builder, "o", "self_attn.o_proj", hidden, q_size, c.output_bias)?,
                    qk_norm,
                    memory,
                    layer: i,
                    sliding_window: c.sliding_window[i],
                    heads: c.num_heads / builder.group().size(),
                    kv_heads: c.num_kv_heads / builder.group().size(),
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
            group: builder.group().clone(),
        })
    }
}

impl Layer {
    /// hidden (n, hidden) -> (n, hidden).
    pub(super) fn forward(&self, hidden: &Value, pass: &Pass) -> Result<Value> {
        self.run(hidden, pass, None)
    }

    /// [`Layer::forward`] of one sequence that goes on from what is in the cache; no gradient flows.
    pub(super) fn forward_cached(
        &self,
        hidden: &Tensor,
        pass: &Pass,
        cached: &mut Cached<'_>,
    ) -> Result<Tensor> {
        Ok(self.run(&Value::constant(hidden), pass, Some(cached))?.tensor().clone())
    }

    /// An empty cache for `capacity` tokens.
    pub(super) fn cache(&self, capacity: usize) -> Result<LayerCache> {
        match &self.attention {
            Attention::Grouped(attention) => attention.cache(capacity),
            Attention::Latent(attention) => attention.cache(capacity),
        }
    }

    fn run(&self, hidden: &Value, pass: &Pass, cached: Option<&mut Cached<'_>>) -> Result<Value> {
        let eps = self.eps as f32;
        let (hidden, x) = ops::norm(hidden, None, Some(&self.attention_norm), eps)?;
        let x = self.group.copied(&x);
        let attended = match (&self.attention, cached) {
            (Attention::Grouped(attention), None) if attention.is_on_tape(pass) => {
                attention.forward_on_tape(&x, pass)?
            }
            (Attention::Grouped(attention), cached) => {
                tape::segment(&x, |x| attention.forward(x, pass, cached))?
            }
            (Attention::Latent(attention), None) => {
                tape::segment(&x, |x| attention.forward(x, pass))?
            }
            (Attention::Latent(attention), Some(cached)) => {
                tape::segment(&x, |x| attention.forward_cached(x, pass, cached))?
            }
        };
        // What has a bias adds it to the sum, once.
        let attended = match &self.attention {
            Attention::Grouped(attention) => attention.o.biased(self.group.summed(&attended)?)?,
            Attention::Latent(_) => attended,
        };
        let (hidden, x) = ops::norm(&hidden, Some(&attended), Some(&self.mlp_norm), eps)?;
        let x = self.group.copied(&x);
        let [gate, up] = forward_all(&x, [&self.gate, &self.up], pass.adapters)?;
        let inner = ops::silu_mul(&gate, &up)?;
        let down = ops::project_one(&inner, self.down.projection(pass.adapters))?;
        let down = self.down.biased(self.group.summed(&down)?)?;
        Ok(ops::add(&hidden, &down)?)
    }
}

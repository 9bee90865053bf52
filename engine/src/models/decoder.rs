//! The decoder of the Llama layout: embedding, layers of attention and gated MLP, head.
//! Knows no session, window or page: the attention seam is the only way from here to memory.
//!
//! Source: LLaMA (arXiv 2302.13971) section 2.2 with the reference of `transformers` modeling_llama.py; q/k norm as in
//! modeling_qwen3.py, biases as in modeling_qwen2.py; what `families` lists as in modeling_phi3.py, modeling_granite.py,
//! modeling_smollm3.py and modeling_gemma3.py.

use super::config::DecoderConfig;
use super::device::ModelDevice;
use super::families::LayerRope;
use super::frequencies::{Frequencies, LayerFrequencies, RopeScaling};
use super::weights::Weights;
use crate::attention::{AttentionSeam, Route, SeamConfig};
use crate::cache::CacheShape;
use crate::error::{Error, Result};
use crate::parallel::TensorGroup;
use candle_core::{Device, Tensor};
use mka_kernels::{PackedMatrix, gelu_mul, linear, silu_mul};
use xxhash_rust::xxh3::xxh3_64;

/// y = x Wᵀ + b.
pub(crate) struct Linear {
    weight: PackedMatrix,
    bias: Option<Tensor>,
}

impl Linear {
    pub(crate) fn new(weight: PackedMatrix, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.to_device(device)).transpose()?;
        Ok(Self { weight: self.weight.to_device(device)?, bias })
    }

    /// x (t, in) -> (t, out).
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = linear(x, &self.weight)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// y = Σ x Wᵀ + b, summed over the processes that share the model, each with its columns of W and of x.
pub(crate) struct SummedLinear {
    part: Linear,
    group: TensorGroup,
}

impl SummedLinear {
    /// x (t, its columns) -> (t, out), the same on every process.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.group.sum(&self.part.forward(x)?)
    }
}

/// Loads projections as far as this process has them, to `device`.
pub(crate) struct Loader<'a> {
    pub(crate) weights: &'a Weights,
    pub(crate) group: &'a TensorGroup,
    pub(crate) device: &'a Device,
    /// Of the whole model.
    config: &'a DecoderConfig,
}

impl Loader<'_> {
    /// The projection `name` (rows, cols), of which this process may have some rows.
    pub(crate) fn linear(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        bias: bool,
    ) -> Result<Linear> {
        let matrix = self.matrix(&format!("{name}.weight"), rows, cols)?;
        let bias = bias.then(|| self.weights.vector(&format!("{name}.bias"), rows)).transpose()?;
        self.part(name, matrix, bias)
    }

    /// The query or key projection `name`, its rows as RoPE turns them.
    fn heads(&self, name: &str, rows: usize, cols: usize, bias: bool) -> Result<Linear> {
        let (head_dim, rotary_dim) = (self.config.head_dim, self.config.rotary_dim());
        let weight = format!("{name}.weight");
        let matrix = self.matrix(&weight, rows, cols)?;
        let matrix = self.weights.head_matrix(&weight, matrix, head_dim, rotary_dim)?;
        let name_of_bias = format!("{name}.bias");
        let bias = bias
            .then(|| self.weights.head_vector(&name_of_bias, rows, head_dim, rotary_dim))
            .transpose()?;
        self.part(name, matrix, bias)
    }

    /// The matrix `name`: its own, or rows of one that has others too, over the same bytes.
    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<PackedMatrix> {
        let Some(stored) = self.config.stored_rows(name) else {
            return self.weights.matrix(name, rows, cols);
        };
        let whole = self.weights.matrix(&stored.name, stored.num_rows, cols)?;
        whole.select_rows(stored.rows).map_err(|source| {
            Error::model(format!("{name} in {}: {source}", stored.name)).with_source(source)
        })
    }

    /// The projection `name`, of which this process may have some columns.
    pub(crate) fn summed(
        &self,
        name: &str,
        rows: usize,
        cols: usize,
        bias: bool,
    ) -> Result<SummedLinear> {
        // The first process adds the bias: once is enough.
        let part = self.linear(name, rows, cols, bias && self.group.index() == 0)?;
        Ok(SummedLinear { part, group: self.group.clone() })
    }

    fn part(&self, name: &str, matrix: PackedMatrix, bias: Option<Tensor>) -> Result<Linear> {
        let weight = self.group.part_of_matrix(&format!("{name}.weight"), matrix)?;
        let bias = bias.map(|bias| self.group.part(&format!("{name}.bias"), &bias)).transpose()?;
        Linear::new(weight, bias).to_device(self.device)
    }
}

struct Norm {
    weight: Tensor,
    eps: f32,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::rms_norm(&x.contiguous()?, &self.weight, self.eps)?)
    }
}

struct Layer {
    attention_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: SummedLinear,
    qk_norm: Option<(Norm, Norm)>,
    route: Route,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: SummedLinear,
    /// Of what attention and MLP add.
    post_norms: Option<(Norm, Norm)>,
}

/// A loaded model: weights in their stored type, everything computed in f32.
///
/// Where processes share it, this one has its heads and its part of the MLP's inner width (Megatron-LM, arXiv 1909.08053,
/// section 3): a layer sums over them after o and after down, and in the router where a gate is open.
pub(crate) struct Decoder {
    /// Heads and inner width are those of this process.
    pub(crate) config: DecoderConfig,
    /// The processes that share the model.
    pub(crate) group: TensorGroup,
    pub(crate) frequencies: LayerFrequencies,
    /// See [`DecoderConfig::query_scale`].
    query_scale: Option<f64>,
    pub(crate) fingerprint: [u8; 16],
    /// On the CPU, whatever the device: a row a token is decoded and uploaded.
    embedding: PackedMatrix,
    layers: Vec<Layer>,
    norm: Norm,
    head: PackedMatrix,
    device: ModelDevice,
}

impl Decoder {
    /// The whole model, of one process.
    ///
    /// # Errors
    /// As [`Decoder::load_part`].
    #[cfg(test)]
    pub(crate) fn load(config: DecoderConfig, weights: &Weights, device: &Device) -> Result<Self> {
        Self::load_part(config, weights, device, &TensorGroup::alone())
    }

    /// Binds every weight that `config` implies, as far as it is this process's of `group`.
    ///
    /// # Errors
    /// Names the first tensor that is missing or has another shape: what was expected, what was found; `InvalidArgument`
    /// if the processes do not divide heads and inner width, `Incompatible` if they load different models.
    pub(crate) fn load_part(
        mut config: DecoderConfig,
        weights: &Weights,
        device: &Device,
        group: &TensorGroup,
    ) -> Result<Self> {
        // First of all: the card may fail while weights come to it.
        let owned = ModelDevice::new(device);
        let c = &config;
        group.check(c, None)?;
        let whole = weights.fingerprint(c);
        group.agree(&[("the model", xxh3_64(&whole))])?;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q_size, kv_size) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let norm = |name: &str, len: usize| -> Result<Norm> {
            let weight = weights.vector(&format!("{name}.weight"), len)?;
            let weight = if c.variant.has_offset_norms { (weight + 1.0)? } else { weight };
            Ok(Norm { weight: weight.to_device(device)?, eps: c.rms_norm_eps as f32 })
        };
        let loader = Loader { weights, group, device, config: c };
        let heads = |name: String, rows: usize| loader.heads(&name, rows, hidden, c.qkv_bias);
        let mlp_norm = match c.variant.has_post_norms {
            true => "pre_feedforward_layernorm",
            false => "post_attention_layernorm",
        };
        let mut layers = Vec::with_capacity(c.num_layers);
        for i in 0..c.num_layers {
            let at = |part: &str| format!("model.layers.{i}.{part}");
            let qk_norm = match c.qk_norm {
                true => Some((
                    norm(&at("self_attn.q_norm"), c.head_dim)?,
                    norm(&at("self_attn.k_norm"), c.head_dim)?,
                )),
                false => None,
            };
            let post_norms = match c.variant.has_post_norms {
                true => Some((
                    norm(&at("post_attention_layernorm"), hidden)?,
                    norm(&at("post_feedforward_layernorm"), hidden)?,
                )),
                false => None,
            };
            layers.push(Layer {
                attention_norm: norm(&at("input_layernorm"), hidden)?,
                q: heads(at("self_attn.q_proj"), q_size)?,
                k: heads(at("self_attn.k_proj"), kv_size)?,
                v: loader.linear(&at("self_attn.v_proj"), kv_size, hidden, c.qkv_bias)?,
                o: loader.summed(&at("self_attn.o_proj"), hidden, q_size, c.output_bias)?,
                qk_norm,
                route: Route::load(i, q_size, c.mka.rates.len(), &loader)?,
                mlp_norm: norm(&at(mlp_norm), hidden)?,
                gate: loader.linear(&at("mlp.gate_proj"), inner, hidden, c.mlp_bias)?,
                up: loader.linear(&at("mlp.up_proj"), inner, hidden, c.mlp_bias)?,
                down: loader.summed(&at("mlp.down_proj"), hidden, inner, c.mlp_bias)?,
                post_norms,
            });
        }
        let embedding = weights.matrix("model.embed_tokens.weight", c.vocab_size, hidden)?;
        let head = match c.tied_embeddings && !weights.contains("lm_head.weight") {
            true => embedding.clone(),
            false => weights.matrix("lm_head.weight", c.vocab_size, hidden)?,
        };
        let head = head.to_device(device)?;
        let (frequencies, query_scale) = (layer_frequencies(c, weights)?, c.query_scale());
        let (hidden_norm, fingerprint) = (norm("model.norm", hidden)?, group.part_of_id(whole));
        config.num_heads /= group.size();
        config.num_kv_heads /= group.size();
        config.intermediate_size /= group.size();
        Ok(Self {
            fingerprint,
            group: group.clone(),
            frequencies,
            query_scale,
            embedding,
            layers,
            norm: hidden_norm,
            head,
            device: owned,
            config,
        })
    }

    /// Runs `tokens` through the layers, appending their keys and values through `seam`: (t, hidden), before the
    /// last norm.
    ///
    /// # Errors
    /// If a token is outside the vocabulary.
    pub(crate) fn forward(&self, tokens: &[u32], seam: &mut AttentionSeam<'_>) -> Result<Tensor> {
        let c = &self.config;
        let t = tokens.len();
        let mut rows = vec![0f32; t * c.hidden_size];
        for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(c.hidden_size)) {
            let token = *token as usize;
            if token >= c.vocab_size {
                return Err(Error::invalid(format!(
                    "forward: token {token}, expected below the vocabulary of {}",
                    c.vocab_size
                )));
            }
            self.embedding
                .dequantize_rows(token..token + 1, row)
                .map_err(|e| Error::model(format!("forward: embedding: {e}")).with_source(e))?;
        }
        if c.variant.embedding_scale != 1.0 {
            let scale = c.variant.embedding_scale as f32;
            rows.iter_mut().for_each(|x| *x *= scale);
        }
        let mut hidden = Tensor::from_vec(rows, (t, c.hidden_size), &self.device)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let x = layer.attention_norm.forward(&hidden)?;
            let attended = self.attend(i, layer, &x, seam)?;
            let post_norms = layer.post_norms.as_ref();
            let added = layer.o.forward(&attended)?;
            hidden = self.add(hidden, added, post_norms.map(|(norm, _)| norm))?;
            let x = layer.mlp_norm.forward(&hidden)?;
            let (gate, up) = (layer.gate.forward(&x)?, layer.up.forward(&x)?);
            let inner = match c.variant.has_gelu {
                true => gelu_mul(&gate, &up)?,
                false => silu_mul(&gate, &up)?,
            };
            let added = layer.down.forward(&inner)?;
            hidden = self.add(hidden, added, post_norms.map(|(_, norm)| norm))?;
        }
        Ok(hidden)
    }

    /// The stream `hidden` (t, hidden) with what a part of a layer adds to it.
    fn add(&self, hidden: Tensor, added: Tensor, norm: Option<&Norm>) -> Result<Tensor> {
        let added = match norm {
            Some(norm) => norm.forward(&added)?,
            None => added,
        };
        let scale = self.config.variant.residual_scale;
        let added = if scale == 1.0 { added } else { (added * scale)? };
        Ok((hidden + added)?)
    }

    /// x (t, hidden) -> (t, num_heads · head_dim).
    fn attend(
        &self,
        index: usize,
        layer: &Layer,
        x: &Tensor,
        seam: &mut AttentionSeam<'_>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let t = x.dim(0)?;
        let q = layer.q.forward(x)?;
        let fused = seam.fuse(index, &layer.route, x, &q)?;
        let mut q = q.reshape((t, c.num_heads, c.head_dim))?;
        let mut k = layer.k.forward(&fused)?.reshape((t, c.num_kv_heads, c.head_dim))?;
        let v = layer.v.forward(&fused)?.reshape((t, c.num_kv_heads, c.head_dim))?;
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            q = q_norm.forward(&q)?;
            k = k_norm.forward(&k)?;
        }
        // The seam scales by 1/√head_dim wherever it scores; what else the family has is in the queries.
        if let Some(scale) = self.query_scale {
            q = (q * scale)?;
        }
        let out = seam.attend(index, c.sliding_window[index], &q, &k, &v)?;
        Ok(out.reshape((t, c.num_heads * c.head_dim))?)
    }

    /// What the attention seam must know of this model.
    pub(crate) fn seam_config(&self) -> SeamConfig<'_> {
        SeamConfig {
            frequencies: &self.frequencies,
            rates: &self.config.mka.rates,
            bias_correction: self.config.mka.bias_correction,
            trained_tokens: self.config.trained_tokens as u64,
            exact_tokens: self.config.trained_tokens as u64,
        }
    }

    /// Where the model runs.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// The cache that a stream of this model needs.
    pub(crate) fn cache_shape(&self, window_tokens: usize, block_tokens: usize) -> CacheShape {
        let c = &self.config;
        CacheShape {
            num_layers: c.num_layers,
            num_kv_heads: c.num_kv_heads,
            head_dim: c.head_dim,
            hidden_size: c.hidden_size,
            num_rates: c.mka.rates.len(),
            sink_pages: 1,
            window_tokens,
            block_tokens,
        }
    }

    /// Logits of hidden states (t, hidden): (t, vocab).
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = linear(&self.norm.forward(hidden)?, &self.head)?;
        let divisor = self.config.variant.logits_divisor;
        Ok(if divisor == 1.0 { logits } else { (logits / divisor)? })
    }
}

/// What each layer rotates by.
///
/// # Errors
/// Names a tensor of the checkpoint's own factors that is missing or has another length.
fn layer_frequencies(c: &DecoderConfig, weights: &Weights) -> Result<LayerFrequencies> {
    let rotary_dim = c.rotary_dim();
    let model = Frequencies::new(c.rope_theta, rotary_dim, &c.rope_scaling);
    // llama.cpp folds llama3 scaling into a divisor per frequency, and has LongRoPE's factors as tensors.
    let divisors = match &c.rope_scaling {
        RopeScaling::LongRope { factors, is_long, .. } if factors.is_empty() => match is_long {
            true => Some("rope_factors_long.weight"),
            false => Some("rope_factors_short.weight"),
        },
        _ => Some("rope_freqs.weight").filter(|name| weights.contains(name)),
    };
    let model = match divisors {
        Some(name) => {
            let divisors = weights.values(name, rotary_dim / 2)?;
            model.divided(divisors.into_iter().map(f64::from))
        }
        None => model,
    };
    let mut sets: Vec<Frequencies> = Vec::new();
    let mut of_layer = Vec::with_capacity(c.num_layers);
    for layer in 0..c.num_layers {
        let set = match c.variant.rope_of(layer) {
            LayerRope::Model => model.clone(),
            LayerRope::Local { theta } => Frequencies::new(theta, rotary_dim, &RopeScaling::None),
            LayerRope::Off => Frequencies { inv_freq: Vec::new(), scale: 1.0 },
        };
        let set = set.over(c.head_dim);
        let known = sets.iter().position(|other| *other == set);
        of_layer.push(known.unwrap_or(sets.len()));
        if known.is_none() {
            sets.push(set);
        }
    }
    Ok(LayerFrequencies::new(sets, of_layer))
}

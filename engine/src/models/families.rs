//! What a family changes in the Llama layout, and the settings of config.json and GGUF metadata that say so.
//! Knows no tensor: the decoder acts on what is read here.
//!
//! Source: `configuration_*.py` and `modeling_*.py` of `transformers` for phi3, granite, smollm3 and gemma3; for what a GGUF
//! file has no key for, `load_hparams` of llama.cpp.

use super::config::{DecoderConfig, Fields, Rope, rope_scaling, rotary_dim};
use super::frequencies::RopeScaling;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use serde_json::Value;
use std::ops::Range;

/// What differs from the plain layout; the default changes nothing and costs nothing.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Variant {
    /// Channels of a head that RoPE turns, the first ones; None for all.
    pub(crate) rotary_dim: Option<usize>,
    /// By layer; empty where all are turned alike.
    pub(crate) layer_rope: Vec<LayerRope>,
    /// Whether q, k and v lie in one matrix, and gate and up in another.
    pub(crate) is_fused: bool,
    /// On what the embedding gives.
    pub(crate) embedding_scale: f64,
    /// On q kᵀ in place of 1/√head_dim.
    pub(crate) attention_scale: Option<f64>,
    /// On what attention and MLP add to the stream.
    pub(crate) residual_scale: f64,
    pub(crate) logits_divisor: f64,
    /// Whether a norm multiplies by 1 more than its weight.
    pub(crate) has_offset_norms: bool,
    /// Whether what attention and MLP add is normed too.
    pub(crate) has_post_norms: bool,
    /// Whether the MLP's gate is a GELU (by tanh), not a SiLU.
    pub(crate) has_gelu: bool,
}

/// How one layer rotates queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum LayerRope {
    /// By the model's base and scaling.
    Model,
    /// By a base of its own, without scaling.
    Local { theta: f64 },
    /// Not at all.
    Off,
}

impl Default for Variant {
    fn default() -> Self {
        Self {
            rotary_dim: None,
            layer_rope: Vec::new(),
            is_fused: false,
            embedding_scale: 1.0,
            attention_scale: None,
            residual_scale: 1.0,
            logits_divisor: 1.0,
            has_offset_norms: false,
            has_post_norms: false,
            has_gelu: false,
        }
    }
}

/// Layers of SmolLM3 from one that is not rotated to the next.
const NO_ROPE_INTERVAL: usize = 4;
/// Layers of Gemma 3 from one that sees everything to the next.
const GLOBAL_INTERVAL: usize = 6;
/// RoPE's base of the layers of Gemma 3 that see a window.
const LOCAL_THETA: f64 = 10_000.0;

impl Variant {
    /// What config.json says of the model `c`, whose heads are turned over `rotary_dim` channels.
    pub(super) fn from_json(
        fields: &Fields<'_>,
        c: &DecoderConfig,
        rotary_dim: usize,
    ) -> Result<Self> {
        let plain = Self {
            rotary_dim: (rotary_dim != c.head_dim).then_some(rotary_dim),
            ..Self::default()
        };
        let factor = |key: &str, default: f64| match fields.opt_f64(key)? {
            None => Ok(default),
            Some(factor) if factor > 0.0 => Ok(factor),
            Some(factor) => Err(fields.wrong(key, "a number above 0", &Value::from(factor))),
        };
        Ok(match c.family.as_str() {
            "phi3" => Self { is_fused: true, ..plain },
            "granite" => Self {
                embedding_scale: factor("embedding_multiplier", 1.0)?,
                attention_scale: Some(factor("attention_multiplier", 1.0)?),
                residual_scale: factor("residual_multiplier", 1.0)?,
                logits_divisor: factor("logits_scaling", 1.0)?,
                ..plain
            },
            "smollm3" => Self { layer_rope: smollm3_rope(fields, c.num_layers)?, ..plain },
            "gemma3_text" => {
                for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    if let Some(found) = fields.value(key) {
                        return Err(fields.wrong(key, "null", found));
                    }
                }
                if fields.opt_bool("use_bidirectional_attention")? == Some(true) {
                    let found = Value::Bool(true);
                    return Err(fields.wrong("use_bidirectional_attention", "false", &found));
                }
                let scalar = factor("query_pre_attn_scalar", 256.0)?;
                Self {
                    attention_scale: Some(scalar.powf(-0.5)),
                    has_offset_norms: true,
                    ..plain.gemma3(c, gemma3_local_theta(fields)?)
                }
            }
            _ => plain,
        })
    }

    /// What the metadata of a GGUF file say of the model `c`, whose heads are turned over `rotary_dim` channels.
    pub(super) fn from_gguf(gguf: &Gguf, c: &DecoderConfig, rotary_dim: usize) -> Result<Self> {
        let plain = Self {
            rotary_dim: (rotary_dim != c.head_dim).then_some(rotary_dim),
            ..Self::default()
        };
        let factor = |name: &str| -> Result<Option<f64>> {
            let key = format!("{}.{name}", c.family);
            if !gguf.contains(&key) {
                return Ok(None);
            }
            match f64::from(gguf.f32(&key)?) {
                factor if factor > 0.0 && factor.is_finite() => Ok(Some(factor)),
                factor => Err(Error::model(format!(
                    "gguf: {key} {factor}, expected a finite number above 0"
                ))),
            }
        };
        Ok(match c.family.as_str() {
            "phi3" => Self { is_fused: true, ..plain },
            "granite" => {
                // llama.cpp's switch for models of this architecture without RoPE.
                let key = "granite.rope.scaling.finetuned";
                if gguf.contains(key) && !gguf.bool(key)? {
                    return Err(Error::model(format!("gguf: {key} false, expected true")));
                }
                Self {
                    embedding_scale: factor("embedding_scale")?.unwrap_or(1.0),
                    attention_scale: factor("attention.scale")?,
                    residual_scale: factor("residual_scale")?.unwrap_or(1.0),
                    logits_divisor: factor("logit_scale")?.unwrap_or(1.0),
                    ..plain
                }
            }
            "smollm3" => Self { layer_rope: off_every(NO_ROPE_INTERVAL, c.num_layers), ..plain },
            "gemma3" => {
                for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
                    let key = format!("gemma3.{name}");
                    if gguf.contains(&key) {
                        return Err(Error::model(format!("gguf: {key}, expected none")));
                    }
                }
                // The one size of Gemma 3 whose queries are not scaled by their head dimension, which no key says.
                let is_27b = c.num_layers == 62;
                let per_head = c.hidden_size as f64 / c.num_heads as f64;
                Self {
                    attention_scale: is_27b.then(|| per_head.powf(-0.5)),
                    // The 1 is in the weights that the file has.
                    ..plain.gemma3(c, factor("rope.freq_base_swa")?.unwrap_or(LOCAL_THETA))
                }
            }
            _ => plain,
        })
    }

    /// With what every model of Gemma 3 has; the layers that see a window rotate by `local_theta`.
    fn gemma3(self, c: &DecoderConfig, local_theta: f64) -> Self {
        let rope = |window: &Option<u64>| match window {
            Some(_) => LayerRope::Local { theta: local_theta },
            None => LayerRope::Model,
        };
        Self {
            layer_rope: c.sliding_window.iter().map(rope).collect(),
            embedding_scale: (c.hidden_size as f64).sqrt(),
            has_post_norms: true,
            has_gelu: true,
            ..self
        }
    }

    /// How layer `index` rotates.
    pub(super) fn rope_of(&self, index: usize) -> LayerRope {
        self.layer_rope.get(index).copied().unwrap_or(LayerRope::Model)
    }
}

/// Rows of a stored matrix.
pub(super) struct StoredRows {
    /// Of the matrix.
    pub(super) name: String,
    pub(super) num_rows: usize,
    pub(super) rows: Range<usize>,
}

impl DecoderConfig {
    /// Channels of a head that RoPE turns.
    pub(crate) fn rotary_dim(&self) -> usize {
        self.variant.rotary_dim.unwrap_or(self.head_dim)
    }

    /// Factor on queries that makes attention's scale, 1/√head_dim, the family's own; None where it is 1.
    pub(super) fn query_scale(&self) -> Option<f64> {
        let scale = self.variant.attention_scale? * (self.head_dim as f64).sqrt();
        // In f32, where queries are: a root that was rounded is no reason to multiply.
        (scale as f32 != 1.0).then_some(scale)
    }

    /// Where the matrix `name` lies in a checkpoint that has it in one with others; None where it has one of its own.
    pub(super) fn stored_rows(&self, name: &str) -> Option<StoredRows> {
        if !self.variant.is_fused {
            return None;
        }
        let (place, projection) = name.strip_suffix(".weight")?.rsplit_once('.')?;
        let q = self.num_heads.saturating_mul(self.head_dim);
        let kv = self.num_kv_heads.saturating_mul(self.head_dim);
        let inner = self.intermediate_size;
        let (fused, parts, index) = match projection {
            "q_proj" => ("qkv_proj", [q, kv, kv], 0),
            "k_proj" => ("qkv_proj", [q, kv, kv], 1),
            "v_proj" => ("qkv_proj", [q, kv, kv], 2),
            "gate_proj" => ("gate_up_proj", [inner, inner, 0], 0),
            "up_proj" => ("gate_up_proj", [inner, inner, 0], 1),
            _ => return None,
        };
        let sum =
            |parts: &[usize]| parts.iter().fold(0, |sum: usize, rows| sum.saturating_add(*rows));
        Some(StoredRows {
            name: format!("{place}.{fused}.weight"),
            num_rows: sum(&parts),
            rows: sum(&parts[..index])..sum(&parts[..=index]),
        })
    }
}

/// Refuses an activation of the MLP's gate that is not the family's.
pub(super) fn check_activation(fields: &Fields<'_>, family: &str) -> Result<()> {
    let expected = if family == "gemma3_text" { "gelu_pytorch_tanh" } else { "silu" };
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(found) = fields.opt_str(key)?
            && found != expected
        {
            return Err(Error::model(format!(
                "config.json: {key} {found:?}, expected {expected:?}"
            )));
        }
    }
    Ok(())
}

/// RoPE's scaling of Phi-3: `rope` has its settings, `fields` is config.json.
pub(super) fn phi3_scaling(
    rope: &Fields<'_>,
    fields: &Fields<'_>,
    rotary_dim: usize,
) -> Result<RopeScaling> {
    const ORIGINAL: &str = "original_max_position_embeddings";
    match rope.rope_type()? {
        None | Some("default") => return Ok(RopeScaling::None),
        // Its name in the first files.
        Some("longrope" | "su") => {}
        Some(other) => {
            return Err(Error::model(format!(
                "{}: rope_type {other:?}, expected default or longrope",
                rope.place
            )));
        }
    }
    let trained = fields.positive("max_position_embeddings")?;
    let place = if fields.value(ORIGINAL).is_some() { fields } else { rope };
    let original = place.positive(ORIGINAL)?;
    let long = rope.numbers("long_factor", rotary_dim / 2)?;
    let short = rope.numbers("short_factor", rotary_dim / 2)?;
    // A session has no end: where streams may be longer than the original length, all are rotated as those are, as
    // llama.cpp and vLLM do. `transformers` takes the short factors until a prompt is longer.
    let is_long = trained > original;
    let stretch = match rope.opt_f64("factor")? {
        Some(factor) => factor,
        None => trained as f64 / original as f64,
    };
    let scale = match rope.opt_f64("attention_factor")? {
        Some(scale) => scale,
        None if stretch > 1.0 => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
        None => 1.0,
    };
    if !(scale > 0.0 && scale.is_finite()) {
        return Err(Error::model(format!(
            "{}: longrope scales by {scale}, expected a finite number above 0",
            rope.place
        )));
    }
    Ok(RopeScaling::LongRope { factors: if is_long { long } else { short }, is_long, scale })
}

/// Which layers of SmolLM3 rotate.
fn smollm3_rope(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<LayerRope>> {
    const KEY: &str = "no_rope_layers";
    const INTERVAL: &str = "no_rope_layer_interval";
    if fields.opt_bool("use_sliding_window")? == Some(true) {
        return Err(fields.wrong("use_sliding_window", "false", &Value::Bool(true)));
    }
    let Some(value) = fields.value(KEY) else {
        let interval = match fields.value(INTERVAL) {
            Some(_) => fields.positive(INTERVAL)?,
            None => NO_ROPE_INTERVAL,
        };
        return Ok(off_every(interval, num_layers));
    };
    // 1 is a layer that rotates, whatever the key's name suggests.
    let rope = |entry: &Value| match entry.as_u64() {
        Some(1) => Some(LayerRope::Model),
        Some(0) => Some(LayerRope::Off),
        _ => None,
    };
    let layers: Option<Vec<LayerRope>> =
        value.as_array().and_then(|entries| entries.iter().map(rope).collect());
    layers
        .filter(|layers| layers.len() == num_layers)
        .ok_or_else(|| fields.wrong(KEY, &format!("{num_layers} entries of 0 or 1"), value))
}

/// Every layer rotates but the last of each `interval`.
fn off_every(interval: usize, num_layers: usize) -> Vec<LayerRope> {
    let rope = |number: usize| match number.is_multiple_of(interval) {
        true => LayerRope::Off,
        false => LayerRope::Model,
    };
    (1..=num_layers).map(rope).collect()
}

/// RoPE's settings of Gemma 3 for the layers of `kind`, where they are given by kind (transformers 5).
fn of_layer_kind<'a>(
    fields: &'a Fields<'_>,
    kind: &str,
    place: &'a str,
) -> Result<Option<Fields<'a>>> {
    let Some(object) = fields.value("rope_parameters") else { return Ok(None) };
    let object = object.get(kind).filter(|settings| settings.is_object()).ok_or_else(|| {
        Error::model(format!("config.json: rope_parameters.{kind}, expected an object, found none"))
    })?;
    Ok(Some(Fields { object, place }))
}

/// RoPE's settings of Gemma 3 for the layers that see everything.
pub(super) fn gemma3_rope(fields: &Fields<'_>, head_dim: usize) -> Result<Rope> {
    let by_kind =
        of_layer_kind(fields, "full_attention", "config.json: rope_parameters.full_attention")?;
    let settings = match by_kind {
        Some(settings) => Some(settings),
        None => fields
            .value("rope_scaling")
            .map(|object| Fields { object, place: "config.json: rope_scaling" }),
    };
    let (theta, scaling) = match &settings {
        Some(settings) => {
            settings.check_object()?;
            let trained = fields.positive("max_position_embeddings")?;
            (settings.opt_f64("rope_theta")?, rope_scaling(settings, trained)?)
        }
        None => (None, RopeScaling::None),
    };
    let theta = theta.or(fields.opt_f64("rope_theta")?).unwrap_or(1_000_000.0);
    let rotary_dim = rotary_dim(settings.as_ref(), fields, "gemma3_text", head_dim)?;
    Ok(Rope { theta, scaling, rotary_dim })
}

/// RoPE's base of Gemma 3 for the layers that see a window.
fn gemma3_local_theta(fields: &Fields<'_>) -> Result<f64> {
    let place = "config.json: rope_parameters.sliding_attention";
    let theta = match of_layer_kind(fields, "sliding_attention", place)? {
        None => fields.opt_f64("rope_local_base_freq")?,
        Some(settings) => {
            let trained = fields.positive("max_position_embeddings")?;
            if rope_scaling(&settings, trained)? != RopeScaling::None {
                return Err(Error::model(format!("{place}: scaled, expected rope_type default")));
            }
            settings.opt_f64("rope_theta")?
        }
    };
    match theta.unwrap_or(LOCAL_THETA) {
        theta if theta > 0.0 => Ok(theta),
        theta => Err(Error::model(format!(
            "config.json: RoPE's base of local layers {theta}, expected above 0"
        ))),
    }
}

/// Windows of Gemma 3 where `layer_types` does not name them.
pub(super) fn gemma3_windows(
    fields: &Fields<'_>,
    window: u64,
    num_layers: usize,
) -> Result<Vec<Option<u64>>> {
    let keys = ["sliding_window_pattern", "_sliding_window_pattern"];
    let interval = match keys.into_iter().find(|key| fields.value(key).is_some()) {
        Some(key) => fields.positive(key)?,
        None => GLOBAL_INTERVAL,
    };
    Ok(all_but_every(interval, window, num_layers))
}

/// `window` for every layer but the last of each `interval`.
fn all_but_every(interval: usize, window: u64, num_layers: usize) -> Vec<Option<u64>> {
    (1..=num_layers)
        .map(|number| Some(window).filter(|_| !number.is_multiple_of(interval)))
        .collect()
}

/// Whether a window is none for a model trained on `trained_tokens` at once: Phi-3 of 128 K tokens names one of 256 K, and
/// layers with a window recall nothing from before it.
pub(super) fn hides_nothing(window: u64, trained_tokens: usize) -> bool {
    window >= trained_tokens as u64
}

/// The token-exact window of each layer that the metadata of a GGUF file give.
pub(super) fn gguf_sliding_windows(
    gguf: &Gguf,
    arch: &str,
    num_layers: usize,
    trained_tokens: usize,
) -> Result<Vec<Option<u64>>> {
    let key = format!("{arch}.attention.sliding_window");
    let window = match arch {
        "phi3" | "gemma3" if gguf.contains(&key) => Some(u64::from(gguf.u32(&key)?)),
        _ => None,
    };
    // 0 is how converters write none.
    match (arch, window.filter(|window| *window > 0)) {
        ("gemma3", None) => Err(Error::model(format!("gguf: {key}, expected above 0, found none"))),
        ("gemma3", Some(window)) => {
            let key = "gemma3.attention.sliding_window_pattern";
            let interval = match gguf.contains(key) {
                true => gguf.u32(key)? as usize,
                false => GLOBAL_INTERVAL,
            };
            match interval {
                0 => Err(Error::model(format!("gguf: {key} 0, expected above 0"))),
                interval => Ok(all_but_every(interval, window, num_layers)),
            }
        }
        (_, window) => {
            let window = window.filter(|window| !hides_nothing(*window, trained_tokens));
            Ok(vec![window; num_layers])
        }
    }
}

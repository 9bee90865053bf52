//! What a checkpoint says of itself: config.json in its old and new form, or GGUF metadata, as one description.
//! Knows no tensor. A setting that is not understood is an error, never a default.

use super::families::{self, Variant};
use super::frequencies::RopeScaling;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use serde_json::Value;
use std::fmt;

/// A decoder of the Llama layout, whatever family it came from.
#[derive(Clone, PartialEq)]
pub(crate) struct DecoderConfig {
    /// Family as the checkpoint names it: one of `FAMILIES`, or of `ARCHITECTURES` from a GGUF file.
    pub(crate) family: String,
    pub(crate) vocab_size: usize,
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_layers: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) rope_theta: f64,
    pub(crate) rope_scaling: RopeScaling,
    /// Tokens that the model was trained on at once.
    pub(crate) trained_tokens: usize,
    pub(crate) tied_embeddings: bool,
    pub(crate) qkv_bias: bool,
    pub(crate) output_bias: bool,
    pub(crate) mlp_bias: bool,
    pub(crate) qk_norm: bool,
    /// Token-exact attention window of each layer, where the model was trained with one.
    pub(crate) sliding_window: Vec<Option<u64>>,
    pub(crate) eos_token_ids: Vec<u32>,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) mka: MkaConfig,
    /// What the family changes in the layout.
    pub(crate) variant: Variant,
}

/// Its text is hashed into the fingerprint of a model (`Weights::fingerprint`), which pages on users' disks carry: a model
/// of the plain layout has the text that it always had, and only what changes the layout adds to it.
impl fmt::Debug for DecoderConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Taken apart, so that no field can be forgotten.
        let Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            rms_norm_eps,
            rope_theta,
            rope_scaling,
            trained_tokens,
            tied_embeddings,
            qkv_bias,
            output_bias,
            mlp_bias,
            qk_norm,
            sliding_window,
            eos_token_ids,
            bos_token_id,
            mka,
            variant,
        } = self;
        let mut text = f.debug_struct("DecoderConfig");
        text.field("family", family)
            .field("vocab_size", vocab_size)
            .field("hidden_size", hidden_size)
            .field("intermediate_size", intermediate_size)
            .field("num_layers", num_layers)
            .field("num_heads", num_heads)
            .field("num_kv_heads", num_kv_heads)
            .field("head_dim", head_dim)
            .field("rms_norm_eps", rms_norm_eps)
            .field("rope_theta", rope_theta)
            .field("rope_scaling", rope_scaling)
            .field("trained_tokens", trained_tokens)
            .field("tied_embeddings", tied_embeddings)
            .field("qkv_bias", qkv_bias)
            .field("output_bias", output_bias)
            .field("mlp_bias", mlp_bias)
            .field("qk_norm", qk_norm)
            .field("sliding_window", sliding_window)
            .field("eos_token_ids", eos_token_ids)
            .field("bos_token_id", bos_token_id)
            .field("mka", mka);
        if *variant != Variant::default() {
            text.field("variant", variant);
        }
        text.finish()
    }
}

/// The `mka` block of config.json: how the EMA levels of FastMKA are formed (`docs/training.md`).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MkaConfig {
    pub(crate) rates: Vec<f32>,
    pub(crate) bias_correction: bool,
}

impl Default for MkaConfig {
    fn default() -> Self {
        // Half-lives of 6.6, 69 and 693 tokens.
        Self { rates: vec![0.9, 0.99, 0.999], bias_correction: true }
    }
}

/// Values of `model_type` in config.json.
const FAMILIES: &[&str] =
    &["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gemma3_text"];

/// Values of `general.architecture` in a GGUF file; llama is Mistral and SmolLM2 too.
const ARCHITECTURES: &[&str] = &["llama", "qwen2", "qwen3", "phi3", "granite", "smollm3", "gemma3"];

/// Most layers of a model, some thirty times those of the deepest one published: memory is set aside for each layer that a
/// file names, before its weights are looked for.
const MAX_LAYERS: usize = 4096;

/// Typed access to one JSON object, with errors that name the key, what was expected and what was found.
pub(super) struct Fields<'a> {
    pub(super) object: &'a Value,
    pub(super) place: &'a str,
}

impl Fields<'_> {
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::model(format!("{}: {key}, expected {expected}, found {found}", self.place))
    }

    pub(super) fn opt_f64(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, "a number", value)),
        }
    }

    pub(super) fn opt_usize(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_u64() {
            // 2^32 bounds every count of a model, so that products of two stay inside a usize.
            Some(number) if number < 1 << 32 => Ok(Some(number as usize)),
            _ => Err(self.wrong(key, "a whole number below 2^32", value)),
        }
    }

    pub(super) fn opt_bool(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false", value))
    }

    pub(super) fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// The kind of RoPE's scaling, under either of its names.
    pub(super) fn rope_type(&self) -> Result<Option<&str>> {
        match self.opt_str("rope_type")? {
            Some(kind) => Ok(Some(kind)),
            None => self.opt_str("type"),
        }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::model(format!("{}: {key}, expected, found none", self.place))
    }

    pub(super) fn positive(&self, key: &str) -> Result<usize> {
        match self.opt_usize(key)? {
            Some(0) => Err(self.wrong(key, "a count above 0", &Value::from(0))),
            Some(count) => Ok(count),
            None => Err(self.missing(key)),
        }
    }

    pub(super) fn check_object(&self) -> Result<()> {
        match self.object.is_object() {
            true => Ok(()),
            false => Err(Error::model(format!(
                "{}: expected an object, found {}",
                self.place, self.object
            ))),
        }
    }

    /// `len` numbers above 0.
    pub(super) fn numbers(&self, key: &str, len: usize) -> Result<Vec<f64>> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        let entries: &[Value] = value.as_array().map_or(&[], Vec::as_slice);
        let numbers: Vec<f64> = entries.iter().filter_map(Value::as_f64).collect();
        let are_factors = numbers.iter().all(|x| *x > 0.0 && x.is_finite());
        match are_factors && numbers.len() == len && entries.len() == len {
            true => Ok(numbers),
            false => Err(self.wrong(key, &format!("{len} numbers above 0"), value)),
        }
    }
}

/// Reads a token id or a list of them.
pub(crate) fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(ids)) => ids.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

impl DecoderConfig {
    /// Reads the text of a HuggingFace config.json.
    pub(crate) fn from_json(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text)
            .map_err(|source| Error::model(format!("config.json: {source}")).with_source(source))?;
        let fields = Fields { object: &json, place: "config.json" };
        let family = fields.opt_str("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
        if !FAMILIES.contains(&family) {
            let instead = match family {
                "gemma3" => {
                    ": of Gemma 3 its text models are read, whose model_type is \"gemma3_text\""
                }
                _ => "",
            };
            return Err(Error::model(format!(
                "config.json: model_type {family:?}, expected one of {FAMILIES:?}{instead}"
            )));
        }
        families::check_activation(&fields, family)?;
        let hidden_size = fields.positive("hidden_size")?;
        let num_layers = bounded_layers(
            "config.json: num_hidden_layers",
            fields.positive("num_hidden_layers")?,
        )?;
        let num_heads = fields.positive("num_attention_heads")?;
        let attention_bias = fields.opt_bool("attention_bias")?.unwrap_or(false);
        let head_dim = match fields.opt_usize("head_dim")? {
            Some(dim) => dim,
            // What the family's own configuration leaves out and means.
            None if family == "gemma3_text" => 256,
            None => hidden_size / num_heads,
        };
        let is_tied = matches!(family, "smollm3" | "gemma3_text");
        let rope = rope(&fields, family, head_dim)?;
        let mut config = Self {
            vocab_size: fields.positive("vocab_size")?,
            hidden_size,
            intermediate_size: fields.positive("intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads: fields.opt_usize("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            rms_norm_eps: fields
                .opt_f64("rms_norm_eps")?
                .ok_or_else(|| fields.missing("rms_norm_eps"))?,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            trained_tokens: fields.positive("max_position_embeddings")?,
            tied_embeddings: fields.opt_bool("tie_word_embeddings")?.unwrap_or(is_tied),
            qkv_bias: attention_bias || family == "qwen2",
            output_bias: attention_bias,
            mlp_bias: fields.opt_bool("mlp_bias")?.unwrap_or(false),
            qk_norm: matches!(family, "qwen3" | "gemma3_text"),
            sliding_window: sliding_windows(&json, &fields, family, num_layers)?,
            eos_token_ids: token_ids(json.get("eos_token_id")),
            bos_token_id: token_ids(json.get("bos_token_id")).first().copied(),
            mka: mka_block(json.get("mka"))?,
            family: family.to_owned(),
            variant: Variant::default(),
        };
        config.variant = Variant::from_json(&fields, &config, rope.rotary_dim)?;
        config.check("config.json")
    }

    /// Reads GGUF metadata.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self> {
        let arch = gguf.str("general.architecture")?.to_owned();
        if !ARCHITECTURES.contains(&arch.as_str()) {
            return Err(Error::model(format!(
                "gguf: general.architecture {arch:?}, expected one of {ARCHITECTURES:?}"
            )));
        }
        let key = |name: &str| format!("{arch}.{name}");
        let count = |name: &str| gguf.u32(&key(name)).map(|value| value as usize);
        let optional = |name: &str| gguf.contains(&key(name)).then(|| count(name)).transpose();
        let number = |name: &str| gguf.f32(&key(name)).map(f64::from);
        let hidden_size = count("embedding_length")?;
        let num_layers =
            bounded_layers(&format!("gguf: {}", key("block_count")), count("block_count")?)?;
        let num_heads = count("attention.head_count")?;
        let head_dim = match optional("attention.key_length")? {
            Some(dim) => dim,
            None => hidden_size.checked_div(num_heads).unwrap_or(0),
        };
        let rotary_dim = optional("rope.dimension_count")?.unwrap_or(head_dim);
        if rotary_dim != head_dim && arch != "phi3" {
            return Err(Error::model(format!(
                "gguf: {arch}.rope.dimension_count {rotary_dim}, expected the head dimension {head_dim}"
            )));
        }
        // The llama architecture may leave the base out and means 10,000 by it (ggml documentation, `rope.freq_base`), and so do
        // Phi-3's files.
        let rope_theta = match gguf.contains(&key("rope.freq_base")) {
            true => number("rope.freq_base")?,
            false if matches!(arch.as_str(), "llama" | "phi3") => 10_000.0,
            false => return Err(Error::model(format!("gguf: {arch}.rope.freq_base, found none"))),
        };
        let vocab_size = gguf
            .tensors
            .get("token_embd.weight")
            .and_then(|tensor| tensor.shape.first().copied())
            .ok_or_else(|| Error::model("gguf: tensor token_embd.weight, found none"))?;
        let trained_tokens = count("context_length")?;
        let mut config = Self {
            vocab_size,
            hidden_size,
            intermediate_size: count("feed_forward_length")?,
            num_layers,
            num_heads,
            num_kv_heads: optional("attention.head_count_kv")?.unwrap_or(num_heads),
            head_dim,
            rms_norm_eps: number("attention.layer_norm_rms_epsilon")?,
            rope_theta,
            rope_scaling: gguf_rope_scaling(gguf, &arch, trained_tokens)?,
            trained_tokens,
            tied_embeddings: !gguf.tensors.contains_key("output.weight"),
            qkv_bias: gguf.tensors.contains_key("blk.0.attn_q.bias"),
            output_bias: gguf.tensors.contains_key("blk.0.attn_output.bias"),
            mlp_bias: gguf.tensors.contains_key("blk.0.ffn_up.bias"),
            qk_norm: gguf.tensors.contains_key("blk.0.attn_q_norm.weight"),
            sliding_window: families::gguf_sliding_windows(
                gguf,
                &arch,
                num_layers,
                trained_tokens,
            )?,
            eos_token_ids: Vec::new(),
            bos_token_id: None,
            mka: MkaConfig::default(),
            family: arch,
            variant: Variant::default(),
        };
        config.variant = Variant::from_gguf(gguf, &config, rotary_dim)?;
        config.check("gguf")
    }

    /// Refuses shapes that no forward pass could use.
    fn check(self, place: &str) -> Result<Self> {
        let fail = |what: String| Err(Error::model(format!("{place}: {what}")));
        if self.num_kv_heads == 0 || !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return fail(format!(
                "num_key_value_heads {}, expected a divisor of {} heads",
                self.num_kv_heads, self.num_heads
            ));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return fail(format!("head_dim {}, expected an even number above 0", self.head_dim));
        }
        let rotary_dim = self.rotary_dim();
        if rotary_dim == 0 || rotary_dim > self.head_dim || !rotary_dim.is_multiple_of(2) {
            return fail(format!(
                "{rotary_dim} rotated channels of a head, expected an even number of its {}",
                self.head_dim
            ));
        }
        if self.num_layers == 0 || self.trained_tokens == 0 || self.hidden_size == 0 {
            return fail("layers, trained length and hidden size, expected above 0".into());
        }
        if !(self.rope_theta > 0.0 && self.rms_norm_eps >= 0.0) {
            return fail(format!(
                "rope_theta {} and rms_norm_eps {}, expected above 0",
                self.rope_theta, self.rms_norm_eps
            ));
        }
        Ok(self)
    }
}

/// The layers that `place` names, where they are few enough for memory to be set aside for each.
fn bounded_layers(place: &str, num_layers: usize) -> Result<usize> {
    match num_layers <= MAX_LAYERS {
        true => Ok(num_layers),
        false => {
            Err(Error::model(format!("{place} {num_layers}, expected at most {MAX_LAYERS} layers")))
        }
    }
}

/// RoPE's settings.
pub(super) struct Rope {
    pub(super) theta: f64,
    pub(super) scaling: RopeScaling,
    /// Channels of a head that are turned.
    pub(super) rotary_dim: usize,
}

/// RoPE settings in either form: `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling`.
fn rope(fields: &Fields<'_>, family: &str, head_dim: usize) -> Result<Rope> {
    if family == "gemma3_text" {
        return families::gemma3_rope(fields, head_dim);
    }
    let inner = |key, place| fields.value(key).map(|object| Fields { object, place });
    let parameters = inner("rope_parameters", "config.json: rope_parameters");
    let settings = match parameters {
        Some(_) => None,
        None => inner("rope_scaling", "config.json: rope_scaling"),
    };
    let settings = parameters.as_ref().or(settings.as_ref());
    if let Some(settings) = settings {
        settings.check_object()?;
    }
    let rotary_dim = rotary_dim(settings, fields, family, head_dim)?;
    let scaling = match settings {
        None => RopeScaling::None,
        Some(settings) if family == "phi3" => families::phi3_scaling(settings, fields, rotary_dim)?,
        Some(settings) => rope_scaling(settings, fields.positive("max_position_embeddings")?)?,
    };
    let inner_theta = match &parameters {
        Some(parameters) => parameters.opt_f64("rope_theta")?,
        None => None,
    };
    let theta = match (inner_theta, fields.opt_f64("rope_theta")?) {
        (Some(theta), _) | (None, Some(theta)) => theta,
        // Llama 1 and 2 were published before the key existed; 10,000 is the constant of their paper's RoPE.
        _ if family == "llama" && parameters.is_none() && scaling == RopeScaling::None => 10_000.0,
        _ => return Err(parameters.as_ref().unwrap_or(fields).missing("rope_theta")),
    };
    Ok(Rope { theta, scaling, rotary_dim })
}

/// Channels of a head that RoPE turns, from `partial_rotary_factor` among its settings or beside them.
pub(super) fn rotary_dim(
    settings: Option<&Fields<'_>>,
    fields: &Fields<'_>,
    family: &str,
    head_dim: usize,
) -> Result<usize> {
    const KEY: &str = "partial_rotary_factor";
    let place = settings.filter(|settings| settings.value(KEY).is_some()).unwrap_or(fields);
    match place.opt_f64(KEY)?.unwrap_or(1.0) {
        1.0 => Ok(head_dim),
        // Whole channels, as transformers counts them.
        part if family == "phi3" && part > 0.0 && part < 1.0 => {
            Ok((head_dim as f64 * part) as usize)
        }
        part => {
            let expected = if family == "phi3" { "above 0 and at most 1" } else { "1" };
            Err(Error::model(format!("{}: {KEY} {part}, expected {expected}", place.place)))
        }
    }
}

pub(super) fn rope_scaling(fields: &Fields<'_>, trained: usize) -> Result<RopeScaling> {
    let kind = fields.rope_type()?;
    let need =
        |key: &str| fields.opt_f64(key)?.filter(|x| *x > 0.0).ok_or_else(|| fields.missing(key));
    let original = fields.opt_usize("original_max_position_embeddings")?;
    match kind {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: need("factor")? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_tokens: original
                .ok_or_else(|| fields.missing("original_max_position_embeddings"))?,
        }),
        Some("yarn") => {
            let mut yarn = RopeScaling::yarn(need("factor")?, original.unwrap_or(trained));
            if let RopeScaling::Yarn {
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate,
                ..
            } = &mut yarn
            {
                *beta_fast = fields.opt_f64("beta_fast")?.unwrap_or(*beta_fast);
                *beta_slow = fields.opt_f64("beta_slow")?.unwrap_or(*beta_slow);
                *attention_factor = fields.opt_f64("attention_factor")?;
                *mscale = fields.opt_f64("mscale")?;
                *mscale_all_dim = fields.opt_f64("mscale_all_dim")?;
                *truncate = fields.opt_bool("truncate")?.unwrap_or(true);
            }
            Ok(yarn)
        }
        Some(other) => Err(Error::model(format!(
            "{}: rope_type {other:?}, expected default, linear, llama3 or yarn",
            fields.place
        ))),
    }
}

/// RoPE's scaling in GGUF metadata, read as llama.cpp reads it (`load_hparams` in `llama-model.cpp`): a factor without a
/// type divides positions, YaRN's ramp has keys of its own, and LongRoPE's factors are tensors.
fn gguf_rope_scaling(gguf: &Gguf, arch: &str, trained: usize) -> Result<RopeScaling> {
    let key = |name: &str| format!("{arch}.rope.{name}");
    let number = |name: &str| -> Result<Option<f64>> {
        let key = key(name);
        gguf.contains(&key).then(|| gguf.f32(&key).map(f64::from)).transpose()
    };
    let positive = |name: &str| -> Result<Option<f64>> {
        match number(name)? {
            Some(value) if !(value > 0.0 && value.is_finite()) => Err(Error::model(format!(
                "gguf: {} {value}, expected a finite number above 0",
                key(name)
            ))),
            value => Ok(value),
        }
    };
    let kind_key = key("scaling.type");
    let kind = gguf.contains(&kind_key).then(|| gguf.str(&kind_key)).transpose()?;
    let is_long_rope = arch == "phi3" && gguf.tensors.contains_key("rope_factors_long.weight");
    if kind == Some("none") && !is_long_rope {
        return Ok(RopeScaling::None);
    }
    // What else llama.cpp applies: each at the value that changes nothing, or the file is refused by its name.
    let extrapolation = if kind == Some("yarn") { 1.0 } else { 0.0 };
    for (name, neutral) in [
        ("scaling.attn_factor", 1.0),
        ("scaling.yarn_attn_factor", 1.0),
        ("scaling.yarn_ext_factor", extrapolation),
        ("scaling.yarn_log_multiplier", 0.0),
    ] {
        let Some(found) = number(name)? else { continue };
        // An extrapolation factor below 0 is llama.cpp's way of writing none.
        let is_unset = name == "scaling.yarn_ext_factor" && found < 0.0;
        let is_read = name == "scaling.attn_factor" && is_long_rope;
        if found != neutral && !is_unset && !is_read {
            return Err(Error::model(format!("gguf: {} {found}, expected {neutral}", key(name))));
        }
    }
    let factor = match positive("scaling.factor")? {
        Some(factor) => Some(factor),
        // The key's name in older files.
        None => positive("scale_linear")?,
    };
    let needed = || {
        let missing = || Error::model(format!("gguf: {}, found none", key("scaling.factor")));
        factor.ok_or_else(missing)
    };
    if is_long_rope {
        if !matches!(kind, None | Some("longrope")) || factor.is_some_and(|factor| factor != 1.0) {
            return Err(Error::model(format!(
                "gguf: {kind_key} {kind:?} of factor {factor:?}, expected longrope by rope_factors_long alone"
            )));
        }
        let original_key = key("scaling.original_context_length");
        let original = match gguf.contains(&original_key) {
            true => gguf.u32(&original_key)? as usize,
            false => trained,
        };
        return Ok(RopeScaling::LongRope {
            factors: Vec::new(),
            is_long: trained > original,
            scale: positive("scaling.attn_factor")?.unwrap_or(1.0),
        });
    }
    match kind {
        None => Ok(match factor {
            Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        }),
        Some("linear") => Ok(RopeScaling::Linear { factor: needed()? }),
        Some("yarn") => {
            let original = gguf.u32(&key("scaling.original_context_length"))?;
            let mut yarn = RopeScaling::yarn(needed()?, original as usize);
            if let RopeScaling::Yarn { beta_fast, beta_slow, .. } = &mut yarn {
                *beta_fast = positive("scaling.yarn_beta_fast")?.unwrap_or(*beta_fast);
                *beta_slow = positive("scaling.yarn_beta_slow")?.unwrap_or(*beta_slow);
            }
            Ok(yarn)
        }
        Some(other) => {
            Err(Error::model(format!("gguf: {kind_key} {other:?}, expected none, linear or yarn")))
        }
    }
}

/// The token-exact window of each layer, from `sliding_window` and the keys that say where it applies.
fn sliding_windows(
    json: &Value,
    fields: &Fields<'_>,
    family: &str,
    num_layers: usize,
) -> Result<Vec<Option<u64>>> {
    let window = fields.opt_usize("sliding_window")?.map(|window| window as u64);
    if window == Some(0) {
        return Err(Error::model("config.json: sliding_window 0, expected above 0 or null"));
    }
    if let Some(types) = json.get("layer_types").and_then(Value::as_array) {
        if types.len() != num_layers {
            return Err(Error::model(format!(
                "config.json: layer_types of {} entries, expected {num_layers}",
                types.len()
            )));
        }
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") if window.is_some() => Ok(window),
                _ => Err(Error::model(format!(
                    "config.json: layer_types {kind}, expected full_attention or sliding_attention"
                ))),
            })
            .collect();
    }
    if family == "gemma3_text" {
        let window = window.ok_or_else(|| fields.missing("sliding_window"))?;
        return families::gemma3_windows(fields, window, num_layers);
    }
    let trained = fields.positive("max_position_embeddings")?;
    let from = match family {
        "mistral" => 0,
        "phi3" if window.is_none_or(|window| !families::hides_nothing(window, trained)) => 0,
        "qwen2" | "qwen3" if fields.opt_bool("use_sliding_window")?.unwrap_or(false) => {
            fields.opt_usize("max_window_layers")?.unwrap_or(0)
        }
        _ => num_layers,
    };
    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= from)).collect())
}

fn mka_block(block: Option<&Value>) -> Result<MkaConfig> {
    let Some(block) = block.filter(|value| !value.is_null()) else {
        return Ok(MkaConfig::default());
    };
    let fields = Fields { object: block, place: "config.json: mka" };
    if fields.opt_usize("version")? != Some(1) {
        return Err(Error::model(format!(
            "config.json: mka.version {}, expected 1",
            block.get("version").unwrap_or(&Value::Null)
        )));
    }
    if let Some(kind) = fields.opt_str("kind")?
        && kind != "fastmka"
    {
        return Err(Error::model(format!(
            "config.json: mka.kind {kind:?}, expected \"fastmka\": sessions do not run other kinds"
        )));
    }
    if fields.opt_bool("recalled_vector")? == Some(true) {
        return Err(Error::model(
            "config.json: mka.recalled_vector true, expected false: sessions do not run it",
        ));
    }
    let mut config = MkaConfig::default();
    if let Some(rates) = fields.value("rates") {
        let parsed: Option<Vec<f32>> = rates
            .as_array()
            .map(|rates| rates.iter().filter_map(Value::as_f64).map(|x| x as f32).collect());
        match parsed {
            Some(parsed)
                if parsed.iter().all(|rate| *rate > 0.0 && *rate < 1.0)
                    && rates.as_array().map(Vec::len) == Some(parsed.len()) =>
            {
                config.rates = parsed;
            }
            _ => return Err(fields.wrong("rates", "numbers between 0 and 1", rates)),
        }
    }
    config.bias_correction = fields.opt_bool("bias_correction")?.unwrap_or(true);
    Ok(config)
}

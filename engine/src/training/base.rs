//! What training starts from: a folder, a GGUF file or a shape; and the files that go with a trained model.
//! Knows no parameter and no gradient.

use super::config::{MemoryKind, MemorySettings, ScratchSettings, TrainingConfig};
use super::corpus::Vocabulary;
use crate::error::{Error, ErrorKind, Result};
use crate::gguf::Gguf;
use crate::hub::{ModelFiles, ModelSource, resolve};
use crate::models::config::{DecoderConfig, MkaConfig};
use crate::models::families::Variant;
use crate::models::frequencies::RopeScaling;
use crate::models::weights::Weights;
use crate::tokenizer::Tokenizer;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A model before training.
pub(super) struct Base {
    pub(super) decoder: DecoderConfig,
    pub(super) weights: Option<Weights>,
    /// Of the untouched weights, or of shape and seed.
    pub(super) fingerprint: String,
    pub(super) vocabulary: Vocabulary,
    files: Files,
}

enum Files {
    Folder(PathBuf),
    Gguf(Box<Gguf>),
    Scratch { tokenizer: Option<PathBuf> },
}

/// The families whose layout training has: `model_type`, or a GGUF file's architecture.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// Beside config.json and the weights: what a folder's tokenizer and chat consist of.
const COMPANIONS: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

impl Base {
    /// Finds and reads what `config` names.
    ///
    /// # Errors
    /// As loading a model, and if the tokenizer has more words than the model.
    pub(super) fn open(config: &TrainingConfig) -> Result<Self> {
        let base = match (&config.model.source, &config.model.scratch) {
            (Some(source), _) => Self::pretrained(source, config)?,
            (None, Some(shape)) => Self::scratch(shape, config)?,
            (None, None) => return Err(Error::invalid("model: expected source or scratch")),
        };
        let (spoken, embedded) = (base.vocabulary.spoken_size(), base.decoder.vocab_size);
        if spoken > embedded {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "train: tokenizer of {spoken} tokens, expected at most the model's {embedded}"
                ),
            ));
        }
        let (length, trained) = (config.data.sequence_tokens, base.decoder.trained_tokens);
        if length > trained {
            return Err(Error::invalid(format!(
                "data.sequence_tokens: {length}, expected at most the model's trained length of {trained}"
            )));
        }
        Ok(base)
    }

    /// Refuses a summary that the model's own gate and router were not trained with.
    ///
    /// # Errors
    /// `Incompatible` with what `settings` and the model say.
    pub(super) fn check_memory(&self, settings: &MemorySettings) -> Result<()> {
        let has_gate = |weights: &Weights| {
            (0..self.decoder.num_layers)
                .any(|layer| weights.contains(&format!("layers.{layer}.gate")))
        };
        if settings.kind == MemoryKind::None || !self.weights.as_ref().is_some_and(has_gate) {
            return Ok(());
        }
        let own = &self.decoder.mka;
        let refused = |name: &str, found: String, expected: String| {
            let what = format!("memory.{name}: {found}, expected {expected} as the model's memory");
            Err(Error::new(ErrorKind::Incompatible, what))
        };
        if settings.rates != own.rates {
            let (found, expected) = (&settings.rates, &own.rates);
            return refused("rates", format!("{found:?}"), format!("{expected:?}"));
        }
        if settings.bias_correction != own.bias_correction {
            let (found, expected) = (settings.bias_correction, own.bias_correction);
            return refused("bias_correction", found.to_string(), expected.to_string());
        }
        Ok(())
    }

    fn pretrained(source: &str, config: &TrainingConfig) -> Result<Self> {
        let source: ModelSource = source.parse()?;
        match resolve(&source, &mut |_| ())? {
            ModelFiles::Folder(folder) => {
                let named = config.data.tokenizer.as_deref();
                Self::folder(&folder, named.map(|name| named_vocabulary(name, None)).transpose()?)
            }
            ModelFiles::Gguf(path) => {
                let (weights, gguf) = Weights::open_gguf(&path)?;
                if weights.contains("rope_freqs.weight") {
                    return Err(Error::model(format!(
                        "train {}: RoPE's scaling is folded into rope_freqs, expected the HuggingFace folder of this model",
                        path.display()
                    )));
                }
                let decoder = DecoderConfig::from_gguf(&gguf)?;
                let vocabulary = match &config.data.tokenizer {
                    Some(name) => named_vocabulary(name, None)?,
                    None => {
                        let tokenizer = Tokenizer::from_gguf(&gguf)?;
                        let end = tokenizer.special_ids().eos;
                        Vocabulary::Model { tokenizer, end }
                    }
                };
                Self::new(decoder, weights, vocabulary, Files::Gguf(Box::new(gguf)))
            }
        }
    }

    /// The model of a HuggingFace folder, with its own vocabulary or another.
    pub(super) fn folder(folder: &Path, vocabulary: Option<Vocabulary>) -> Result<Self> {
        let decoder = DecoderConfig::from_json(&read(&folder.join("config.json"))?)?;
        let weights = Weights::open_folder(folder)?;
        let vocabulary = match vocabulary {
            Some(vocabulary) => vocabulary,
            None => {
                let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json"))?;
                Vocabulary::Model { tokenizer, end: decoder.eos_token_ids.first().copied() }
            }
        };
        Self::new(decoder, weights, vocabulary, Files::Folder(folder.to_owned()))
    }

    /// The base of what `files` holds.
    ///
    /// # Errors
    /// `Model` for a family that sessions run and training does not.
    fn new(
        decoder: DecoderConfig,
        weights: Weights,
        vocabulary: Vocabulary,
        files: Files,
    ) -> Result<Self> {
        if !FAMILIES.contains(&decoder.family.as_str()) {
            return Err(Error::model(format!(
                "training: model_type {:?}, expected one of {FAMILIES:?}: sessions run it, training does not",
                decoder.family
            )));
        }
        let fingerprint = hex(&weights.fingerprint(&decoder));
        Ok(Self { decoder, weights: Some(weights), fingerprint, vocabulary, files })
    }

    fn scratch(shape: &ScratchSettings, config: &TrainingConfig) -> Result<Self> {
        let name = config.data.tokenizer.as_deref().unwrap_or("bytes");
        let vocabulary = named_vocabulary(name, None)?;
        let tokenizer = (name != "bytes").then(|| PathBuf::from(name));
        let decoder = DecoderConfig {
            family: "llama".into(),
            // A multiple of 64, as the products like it.
            vocab_size: vocabulary.size().next_multiple_of(64),
            hidden_size: shape.hidden,
            intermediate_size: shape.intermediate,
            num_layers: shape.layers,
            num_heads: shape.heads,
            num_kv_heads: shape.kv_heads,
            head_dim: shape.head_dim(),
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::None,
            trained_tokens: config.data.sequence_tokens,
            tied_embeddings: true,
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: vec![None; shape.layers],
            eos_token_ids: match vocabulary {
                Vocabulary::Bytes => vec![256],
                Vocabulary::Model { .. } => Vec::new(),
            },
            bos_token_id: None,
            mka: MkaConfig::default(),
            variant: Variant::default(),
        };
        let identity = format!("{decoder:?} {shape:?} {}", config.seed);
        let fingerprint = hex(&xxhash_rust::xxh3::xxh3_128(identity.as_bytes()).to_le_bytes());
        Ok(Self {
            decoder,
            weights: None,
            fingerprint,
            vocabulary,
            files: Files::Scratch { tokenizer },
        })
    }

    /// config.json of the trained model: the base's own, with the block of the memory.
    pub(super) fn config_json(&self, config: &TrainingConfig, rates: &[f32]) -> Result<String> {
        let mut json = match &self.files {
            Files::Folder(folder) => serde_json::from_str(&read(&folder.join("config.json"))?)
                .map_err(|source| {
                    Error::model(format!("config.json: {source}")).with_source(source)
                })?,
            // The decoder's own description of a GGUF file, whose fingerprint runs hold to, knows no tokenizer.
            Files::Gguf(gguf) => {
                let tokenizer = Tokenizer::from_gguf(gguf)?;
                let special = tokenizer.special_ids();
                // Those that the engine finds by name in a GGUF file it looks for in no other.
                let named = tokenizer.ends_by_name().into_iter();
                let mut ends: Vec<u32> = Vec::new();
                for end in [special.eos, special.eot].into_iter().flatten().chain(named) {
                    if !ends.contains(&end) {
                        ends.push(end);
                    }
                }
                huggingface_config(&DecoderConfig { eos_token_ids: ends, ..self.decoder.clone() })?
            }
            Files::Scratch { .. } => huggingface_config(&self.decoder)?,
        };
        if let Some(object) = json.as_object_mut() {
            // Weights are written in f32, whatever they came in; either version of transformers finds its key.
            object.remove("quantization_config");
            object.insert("torch_dtype".into(), json!("float32"));
            object.insert("dtype".into(), json!("float32"));
            if let Some(LatentShape { rank, rope_dim }) = latent(config) {
                object.insert("model_type".into(), json!("mka_latent"));
                object.insert("kv_lora_rank".into(), json!(rank));
                object.insert("qk_rope_head_dim".into(), json!(rope_dim));
            }
            let memory = &config.memory;
            if memory.kind != MemoryKind::None {
                let kind = if memory.kind == MemoryKind::Mka { "mka" } else { "fastmka" };
                let mut block = json!({
                    "version": 1, "kind": kind, "rates": rates,
                    "bias_correction": memory.bias_correction,
                    "trained_window_tokens": memory.window_tokens,
                    "trained_sink_tokens": memory.sink_tokens,
                });
                if memory.recalled_vector {
                    block["recalled_vector"] = json!(true);
                }
                object.insert("mka".into(), block);
            }
        }
        serde_json::to_string_pretty(&json)
            .map_err(|source| Error::model(format!("config.json: {source}")).with_source(source))
    }

    /// Writes tokenizer and chat template into `folder`.
    pub(super) fn write_companions(&self, folder: &Path) -> Result<()> {
        let copy = |from: &Path, name: &str| -> Result<()> {
            let to = folder.join(name);
            std::fs::copy(from, &to).map_err(|e| Error::io("copy model file", from, e))?;
            Ok(())
        };
        let write = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(|e| Error::io("write model file", &path, e))
        };
        match &self.files {
            Files::Folder(source) => {
                for name in COMPANIONS.iter().filter(|name| source.join(name).exists()) {
                    copy(&source.join(name), name)?;
                }
                Ok(())
            }
            Files::Scratch { tokenizer } => match tokenizer {
                Some(path) if is_gguf(path) => {
                    write("tokenizer.json", &Tokenizer::gguf_json(&Weights::open_gguf(path)?.1)?)
                }
                Some(path) => copy(path, "tokenizer.json"),
                None => Ok(()),
            },
            Files::Gguf(gguf) => {
                write("tokenizer.json", &Tokenizer::gguf_json(gguf)?)?;
                let tokens = gguf.strs("tokenizer.ggml.tokens")?;
                let token = |key: &str| {
                    let id = gguf.u32(&format!("tokenizer.ggml.{key}_token_id")).ok()?;
                    tokens.get(id as usize).cloned()
                };
                let template = gguf.str("tokenizer.chat_template").ok();
                let settings = json!({
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "bos_token": token("bos"), "eos_token": token("eos"),
                    "chat_template": template,
                    "model_max_length": self.decoder.trained_tokens,
                });
                write("tokenizer_config.json", &settings.to_string())
            }
        }
    }
}

struct LatentShape {
    rank: usize,
    rope_dim: usize,
}

fn latent(config: &TrainingConfig) -> Option<LatentShape> {
    let latent = config.model.scratch.as_ref()?.latent?;
    Some(LatentShape { rank: latent.rank, rope_dim: latent.rope_dim })
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io("read model file", path, e))
}

fn named_vocabulary(name: &str, end: Option<u32>) -> Result<Vocabulary> {
    if name == "bytes" {
        return Ok(Vocabulary::Bytes);
    }
    let path = Path::new(name);
    let tokenizer = match is_gguf(path) {
        true => Tokenizer::from_gguf(&Weights::open_gguf(path)?.1)?,
        false => Tokenizer::from_file(path)?,
    };
    let end = end.or(tokenizer.special_ids().eos);
    Ok(Vocabulary::Model { tokenizer, end })
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// config.json as `transformers` reads it, for a model that came without one.
fn huggingface_config(c: &DecoderConfig) -> Result<Value> {
    let class = match c.family.as_str() {
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "mistral" => "MistralForCausalLM",
        _ => "LlamaForCausalLM",
    };
    if c.family == "llama" && c.qkv_bias != c.output_bias {
        return Err(Error::model(
            "config.json: biases on some projections of attention alone, expected all or none in the llama family",
        ));
    }
    let scaling = match &c.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_tokens } => {
            json!({
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor, "original_max_position_embeddings": original_tokens,
            })
        }
        RopeScaling::Yarn {
            factor,
            original_tokens,
            beta_fast,
            beta_slow,
            attention_factor,
            mscale,
            mscale_all_dim,
            truncate,
        } => {
            let mut yarn = json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_tokens,
                "beta_fast": beta_fast, "beta_slow": beta_slow, "attention_factor": attention_factor,
                "mscale": mscale, "mscale_all_dim": mscale_all_dim, "truncate": truncate,
            });
            if let Some(object) = yarn.as_object_mut() {
                object.retain(|_, value| !value.is_null());
            }
            yarn
        }
        RopeScaling::LongRope { .. } => {
            return Err(Error::model(
                "config.json: longrope, expected a scaling of the families that are trained",
            ));
        }
    };
    let mut json = json!({
        "architectures": [class], "model_type": c.family, "hidden_act": "silu",
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta,
        "max_position_embeddings": c.trained_tokens, "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tied_embeddings, "attention_bias": c.output_bias,
        "mlp_bias": c.mlp_bias, "rope_scaling": scaling,
    });
    if let Some(object) = json.as_object_mut() {
        object.retain(|_, value| !value.is_null());
        let eos = match c.eos_token_ids.as_slice() {
            [] => None,
            [eos] => Some(json!(eos)),
            several => Some(json!(several)),
        };
        if let Some(eos) = eos {
            object.insert("eos_token_id".into(), eos);
        }
        if let Some(bos) = c.bos_token_id {
            object.insert("bos_token_id".into(), json!(bos));
        }
    }
    Ok(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_that_only_sessions_run_are_refused_by_name() {
        for (name, family) in [("phi3", "phi3"), ("granite", "granite"), ("gemma3", "gemma3_text")]
        {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name);
            let error = Base::folder(&folder, Some(Vocabulary::Bytes)).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Model);
            let expected = format!(
                "training: model_type {family:?}, expected one of [\"llama\", \"mistral\", \"qwen2\", \"qwen3\"]"
            );
            assert!(error.to_string().contains(&expected), "{error}");
        }
    }

    #[test]
    fn every_setting_of_yarn_is_in_the_config_that_is_written() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/llama_yarn");
        let mut config =
            DecoderConfig::from_json(&read(&folder.join("config.json")).unwrap()).unwrap();
        let published = RopeScaling::yarn(4.0, 64);
        let set = RopeScaling::Yarn {
            factor: 4.0,
            original_tokens: 64,
            beta_fast: 24.0,
            beta_slow: 2.0,
            attention_factor: Some(1.25),
            mscale: Some(0.5),
            mscale_all_dim: Some(0.75),
            truncate: false,
        };
        for scaling in [published, set] {
            config.rope_scaling = scaling.clone();
            let written = huggingface_config(&config).unwrap().to_string();
            assert_eq!(DecoderConfig::from_json(&written).unwrap().rope_scaling, scaling);
        }
    }
}

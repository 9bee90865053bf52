//! Sentence vectors by a BERT encoder of the MiniLM family, in candle.
//! Knows no store and no language model.
//!
//! Source: BERT (arXiv 1810.04805), MiniLM (arXiv 2002.10957); mean pooling and normalisation as in the model card of
//! sentence-transformers/all-MiniLM-L6-v2.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use candle_core::{D, DType, Device, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, Module, VarBuilder, embedding, layer_norm, linear};
use mka_memory::Embedder;
use serde::Deserialize;
use std::path::Path;

#[derive(Debug, Clone, Deserialize)]
struct Config {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    max_position_embeddings: usize,
    type_vocab_size: usize,
    layer_norm_eps: f64,
    hidden_act: String,
}

/// The longest input of all-MiniLM-L6-v2: it was trained on no more (model card, `max_seq_length`).
const MAX_TOKENS: usize = 256;

struct Layer {
    query: Linear,
    key: Linear,
    value: Linear,
    attention_out: Linear,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

/// A sentence encoder: mean of the last layer's hidden states, unit length.
pub(super) struct MiniLm {
    identity: String,
    config: Config,
    tokenizer: Tokenizer,
    words: Embedding,
    positions: Embedding,
    kinds: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

impl MiniLm {
    pub(super) fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        let config: Config = serde_json::from_str(&text)
            .map_err(|e| Error::model(format!("{}: {e}", path.display())).with_source(e))?;
        if config.model_type != "bert" || config.hidden_act != "gelu" {
            return Err(Error::model(format!(
                "{}: model_type {:?} with {:?}, expected \"bert\" with \"gelu\"",
                path.display(),
                config.model_type,
                config.hidden_act
            )));
        }
        if config.num_attention_heads == 0
            || !config.hidden_size.is_multiple_of(config.num_attention_heads)
        {
            return Err(Error::model(format!(
                "{}: {} heads, expected a divisor of {}",
                path.display(),
                config.num_attention_heads,
                config.hidden_size
            )));
        }
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let hash = xxhash_rust::xxh3::xxh3_128(&bytes);
        let tensors = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)
            .map_err(|e| Error::model(format!("{}: {e}", path.display())).with_source(e))?;
        let tensors = match tensors.contains_tensor("bert.embeddings.word_embeddings.weight") {
            true => tensors.pp("bert"),
            false => tensors,
        };
        let (hidden, eps) = (config.hidden_size, config.layer_norm_eps);
        let at = tensors.pp("embeddings");
        let layers = (0..config.num_hidden_layers).map(|i| {
            let at = tensors.pp(format!("encoder.layer.{i}"));
            let attention = at.pp("attention.self");
            Ok(Layer {
                query: linear(hidden, hidden, attention.pp("query"))?,
                key: linear(hidden, hidden, attention.pp("key"))?,
                value: linear(hidden, hidden, attention.pp("value"))?,
                attention_out: linear(hidden, hidden, at.pp("attention.output.dense"))?,
                attention_norm: layer_norm(hidden, eps, at.pp("attention.output.LayerNorm"))?,
                intermediate: linear(
                    hidden,
                    config.intermediate_size,
                    at.pp("intermediate.dense"),
                )?,
                output: linear(config.intermediate_size, hidden, at.pp("output.dense"))?,
                output_norm: layer_norm(hidden, eps, at.pp("output.LayerNorm"))?,
            })
        });
        Ok(Self {
            identity: format!("bert-mean:{hash:032x}"),
            tokenizer: Tokenizer::from_file(&folder.join("tokenizer.json"))?,
            words: embedding(config.vocab_size, hidden, at.pp("word_embeddings"))?,
            positions: embedding(
                config.max_position_embeddings,
                hidden,
                at.pp("position_embeddings"),
            )?,
            kinds: embedding(config.type_vocab_size, hidden, at.pp("token_type_embeddings"))?,
            norm: layer_norm(hidden, eps, at.pp("LayerNorm"))?,
            layers: layers.collect::<candle_core::Result<_>>()?,
            config,
        })
    }

    /// ids (t) -> unit vector (hidden).
    fn encode(&self, ids: &[u32]) -> candle_core::Result<Vec<f32>> {
        let (t, heads) = (ids.len(), self.config.num_attention_heads);
        let head_dim = self.config.hidden_size / heads;
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let positions = Tensor::arange(0u32, t as u32, &Device::Cpu)?;
        let kinds = Tensor::zeros(t, DType::U32, &Device::Cpu)?;
        let sum = (self.words.forward(&ids)? + self.positions.forward(&positions)?)?;
        let mut x = self.norm.forward(&(sum + self.kinds.forward(&kinds)?)?)?; // (t, hidden)
        for layer in &self.layers {
            // (t, hidden) -> (heads, t, head_dim)
            let split = |y: Tensor| y.reshape((t, heads, head_dim))?.transpose(0, 1)?.contiguous();
            let query = split(layer.query.forward(&x)?)?;
            let key = split(layer.key.forward(&x)?)?;
            let value = split(layer.value.forward(&x)?)?;
            let scores = (query.matmul(&key.t()?)? / (head_dim as f64).sqrt())?;
            let weights = candle_nn::ops::softmax(&scores, D::Minus1)?;
            let mixed = weights.matmul(&value)?.transpose(0, 1)?.reshape((t, heads * head_dim))?;
            let attended = (layer.attention_out.forward(&mixed)? + &x)?;
            x = layer.attention_norm.forward(&attended)?;
            let inner = layer.intermediate.forward(&x)?.gelu_erf()?;
            x = layer.output_norm.forward(&(layer.output.forward(&inner)? + &x)?)?;
        }
        let mean = x.mean(0)?;
        let norm = mean.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?.max(1e-12);
        (mean / f64::from(norm))?.to_vec1()
    }
}

/// Cuts a framed document, `[CLS] .. [SEP]`, to `longest` tokens, its last token kept.
fn framed(mut ids: Vec<u32>, longest: usize) -> Vec<u32> {
    if ids.len() > longest && longest > 0 {
        let last = ids.last().copied();
        ids.truncate(longest - 1);
        ids.extend(last);
    }
    ids
}

impl Embedder for MiniLm {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn dim(&self) -> usize {
        self.config.hidden_size
    }

    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        let longest = MAX_TOKENS.min(self.config.max_position_embeddings);
        let mut vectors = Vec::with_capacity(texts.len() * self.dim());
        for text in texts {
            let vector = self
                .tokenizer
                .encode_document(text)
                .and_then(|ids| Ok(self.encode(&framed(ids, longest))?))
                .map_err(|e| {
                    mka_memory::Error::new(
                        mka_memory::ErrorKind::InvalidArgument,
                        format!("embed: {e}"),
                    )
                })?;
            vectors.extend(vector);
        }
        Ok(vectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[derive(Deserialize)]
    struct Golden {
        texts: Vec<String>,
        vectors: Vec<Vec<f32>>,
    }

    fn golden_folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden")
    }

    fn check(model: &Path, golden: &Path) {
        let golden: Golden =
            serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        let model = MiniLm::load(model).unwrap();
        let texts: Vec<&str> = golden.texts.iter().map(String::as_str).collect();
        let vectors = model.embed(&texts).unwrap();
        for (i, (found, expected)) in vectors.chunks(model.dim()).zip(&golden.vectors).enumerate() {
            assert_eq!(found.len(), expected.len());
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{:?}: off by {worst}", texts[i]);
        }
        assert_eq!(vectors.len(), golden.vectors.len() * model.dim());
    }

    #[test]
    fn vectors_of_a_tiny_encoder_are_those_of_transformers() {
        let folder = golden_folder().join("bert");
        check(&folder, &folder.join("golden.json"));
    }

    #[test]
    fn vectors_of_all_minilm_l6_v2_are_those_of_transformers() {
        let Some(folder) = crate::testing::minilm_folder() else { return };
        check(&folder, &golden_folder().join("minilm_l6_v2.json"));
    }

    #[test]
    fn an_encoder_of_another_kind_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = MiniLm::load(folder.path()).err().unwrap();
        assert!(error.to_string().contains("config.json"), "{error}");
        let config = std::fs::read_to_string(golden_folder().join("bert/config.json")).unwrap();
        let other = config.replace("\"bert\"", "\"roberta\"");
        std::fs::write(folder.path().join("config.json"), other).unwrap();
        let error = MiniLm::load(folder.path()).err().unwrap();
        assert!(error.to_string().contains("roberta"), "{error}");
    }
}

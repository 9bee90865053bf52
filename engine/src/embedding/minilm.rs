//! Sentence vectors by a BERT encoder of the MiniLM family, in candle.
//! Knows no store and no language model.
//!
//! Source: BERT (arXiv 1810.04805), MiniLM (arXiv 2002.10957); mean pooling and normalisation as in the model card of
//! sentence-transformers/all-MiniLM-L6-v2.

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device, Tensor};
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
/// Tokens that go through the matrices together, whatever texts they are of: enough that packing the weights for the
/// GEMM costs little, few enough that the widest activations (384 * 1536 f32, 2.3 MB) stay in the caches.
const BATCH_TOKENS: usize = 384;

struct Layer {
    /// Query, key and value, one above the other.
    inputs: Linear,
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
            let inputs = ["query", "key", "value"].map(|name| attention.pp(name));
            let weights = inputs.iter().map(|at| at.get((hidden, hidden), "weight"));
            let biases = inputs.iter().map(|at| at.get(hidden, "bias"));
            Ok(Layer {
                inputs: Linear::new(
                    Tensor::cat(&weights.collect::<candle_core::Result<Vec<_>>>()?, 0)?,
                    Some(Tensor::cat(&biases.collect::<candle_core::Result<Vec<_>>>()?, 0)?),
                ),
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

    /// The ids of some texts -> their unit vectors, one after another.
    ///
    /// Every token goes through the matrices with all others; only attention and the mean are a text's own. So texts of
    /// any lengths share a batch without padding.
    fn encode(&self, texts: &[Vec<u32>]) -> candle_core::Result<Vec<f32>> {
        let (hidden, heads) = (self.config.hidden_size, self.config.num_attention_heads);
        let head_dim = hidden / heads;
        let ids = texts.concat();
        let positions: Vec<u32> = texts.iter().flat_map(|ids| 0..ids.len() as u32).collect();
        let kinds = Tensor::zeros(ids.len(), DType::U32, &Device::Cpu)?;
        let tokens = self.words.forward(&Tensor::new(ids, &Device::Cpu)?)?;
        let places = self.positions.forward(&Tensor::new(positions, &Device::Cpu)?)?;
        let sum = ((tokens + places)? + self.kinds.forward(&kinds)?)?;
        let mut x = self.norm.forward(&sum)?; // (tokens, hidden)
        for layer in &self.layers {
            let inputs = layer.inputs.forward(&x)?; // (tokens, 3 * hidden)
            let mut start = 0;
            let mut mixed = Vec::with_capacity(texts.len());
            for ids in texts {
                let t = ids.len();
                // (t, 3 * hidden) -> three of (heads, t, head_dim)
                let own = inputs.narrow(0, start, t)?.reshape((t, 3, heads, head_dim))?;
                let own = own.permute((1, 2, 0, 3))?.contiguous()?;
                let (query, key, value) = (own.get(0)?, own.get(1)?, own.get(2)?);
                let scores = (query.matmul(&key.t()?)? * (head_dim as f64).powf(-0.5))?;
                let weights = candle_nn::ops::softmax_last_dim(&scores)?;
                mixed.push(weights.matmul(&value)?.transpose(0, 1)?.reshape((t, hidden))?);
                start += t;
            }
            let attended = (layer.attention_out.forward(&Tensor::cat(&mixed, 0)?)? + &x)?;
            x = layer.attention_norm.forward(&attended)?;
            let inner = mka_kernels::gelu(&layer.intermediate.forward(&x)?)?;
            x = layer.output_norm.forward(&(layer.output.forward(&inner)? + &x)?)?;
        }
        let mut start = 0;
        let mut vectors = Vec::with_capacity(texts.len() * hidden);
        for ids in texts {
            let mean = x.narrow(0, start, ids.len())?.mean(0)?;
            let norm = mean.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?.max(1e-12);
            vectors.extend((mean / f64::from(norm))?.to_vec1::<f32>()?);
            start += ids.len();
        }
        Ok(vectors)
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
        let fail = |e: Error| {
            mka_memory::Error::new(mka_memory::ErrorKind::InvalidArgument, format!("embed: {e}"))
        };
        let mut vectors = Vec::with_capacity(texts.len() * self.dim());
        let mut batch: Vec<Vec<u32>> = Vec::new();
        let mut num_tokens = 0;
        for text in texts {
            let ids = framed(self.tokenizer.encode_document(text).map_err(fail)?, longest);
            if !batch.is_empty() && num_tokens + ids.len() > BATCH_TOKENS {
                vectors.extend(self.encode(&batch).map_err(|e| fail(e.into()))?);
                batch.clear();
                num_tokens = 0;
            }
            num_tokens += ids.len();
            batch.push(ids);
        }
        if !batch.is_empty() {
            vectors.extend(self.encode(&batch).map_err(|e| fail(e.into()))?);
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
    fn a_text_has_one_vector_whatever_it_is_embedded_with() {
        let model = MiniLm::load(&golden_folder().join("bert")).unwrap();
        let texts: Vec<String> =
            (0..60).map(|at| "the quick brown fox jumps ".repeat(1 + at * 7 % 13)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let together = model.embed(&texts).unwrap();
        for (text, found) in texts.iter().zip(together.chunks(model.dim())) {
            let alone = model.embed(&[text]).unwrap();
            let worst = found.iter().zip(&alone).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{text:?}: off by {worst}");
        }
        assert!(model.embed(&[]).unwrap().is_empty());
    }

    /// `MKA_EMBED_TEXTS=FILE RAYON_NUM_THREADS=1`: one text a line, taken in batches of 64 as a store does.
    #[test]
    fn a_file_of_texts_is_embedded_at_a_rate() {
        let Some(path) = std::env::var_os("MKA_EMBED_TEXTS") else {
            return eprintln!("skipped: MKA_EMBED_TEXTS names no file");
        };
        let Some(folder) = crate::testing::minilm_folder() else { return };
        let model = MiniLm::load(&folder).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        let texts: Vec<&str> = text.lines().collect();
        let now = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the pointer is to a timespec of this frame.
            unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let start = now();
        texts.chunks(64).for_each(|batch| assert!(model.embed(batch).is_ok()));
        let rate = texts.len() as f64 / (now() - start);
        println!("{} texts, {rate:.1} a second of one core", texts.len());
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

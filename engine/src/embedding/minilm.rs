//! Sentence vectors by a BERT encoder of the MiniLM family: its files, its tokenizer, and batches of texts.
//! Knows no store and no language model.
//!
//! Source: MiniLM (arXiv 2002.10957); beside the model's own files those of sentence-transformers, which say how its
//! states are pooled and how long a text may be.

use super::EmbedderPrecision;
use super::encoder::{Encoder, Layer, Norm, Pooling, Room};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device, Shape};
use candle_nn::VarBuilder;
use mka_kernels::{PanelForm, PanelLinear};
use mka_memory::Embedder;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::Value;
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
    position_embedding_type: Option<String>,
}

/// The longest input where the folder does not say, that of all-MiniLM-L6-v2: it was trained on no more (model card,
/// `max_seq_length`).
const MAX_TOKENS: usize = 256;
/// Tokens that go through the matrices together, whatever texts they are of: enough that streaming the weights past them
/// costs little, few enough that the widest activations (64 * 1536 f32, 390 KB) stay in an L2 cache.
const BATCH_TOKENS: usize = 64;

/// A sentence encoder: the last layer's hidden states, pooled, of unit length.
pub(super) struct MiniLm {
    identity: String,
    config: Config,
    /// A longer text is cut.
    max_tokens: usize,
    tokenizer: Tokenizer,
    encoder: Encoder,
}

impl MiniLm {
    /// Reads the encoder of a folder: config.json, tokenizer.json and model.safetensors; of sentence-transformers
    /// 1_Pooling/config.json and sentence_bert_config.json, where they are there.
    ///
    /// # Errors
    /// `NotFound` or `Storage` where a file cannot be read; `Model` for an encoder of another kind, by what it differs in.
    pub(super) fn load(folder: &Path, precision: EmbedderPrecision) -> Result<Self> {
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
        if let Some(positions) = config.position_embedding_type.as_deref()
            && positions != "absolute"
        {
            return Err(Error::model(format!(
                "{}: position_embedding_type {positions:?}, expected \"absolute\"",
                path.display()
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
        let sizes = [config.hidden_size, config.max_position_embeddings, config.type_vocab_size];
        if sizes.contains(&0) {
            return Err(Error::model(format!(
                "{}: hidden_size, max_position_embeddings and type_vocab_size {sizes:?}, expected at least 1 each",
                path.display()
            )));
        }
        let (pooling, max_tokens) = (pooling(folder)?, max_tokens(folder, &config)?);
        let path = folder.join("model.safetensors");
        let bytes = std::fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let hash = xxhash_rust::xxh3::xxh3_128(&bytes);
        let tensors = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)
            .map_err(|e| Error::model(format!("{}: {e}", path.display())).with_source(e))?;
        let tensors = match tensors.contains_tensor("bert.embeddings.word_embeddings.weight") {
            true => tensors.pp("bert"),
            false => tensors,
        };
        // What changes vectors is in the name, so that a store keeps them apart.
        let (form, rounded) = match precision {
            EmbedderPrecision::F32 => (PanelForm::F32, ""),
            EmbedderPrecision::Int8 => (PanelForm::Int8, "-int8"),
        };
        let pooled = match pooling {
            Pooling::Mean => "mean",
            Pooling::Cls => "cls",
        };
        let cut = match max_tokens == default_max_tokens(&config) {
            true => String::new(),
            false => format!("-{max_tokens}"),
        };
        Ok(Self {
            identity: format!("bert-{pooled}{rounded}{cut}:{hash:032x}"),
            tokenizer: Tokenizer::from_file(&folder.join("tokenizer.json"))?,
            encoder: encoder(&config, &tensors, form, pooling)?,
            config,
            max_tokens,
        })
    }
}

/// A JSON file that a folder may lack.
fn optional_json(path: &Path) -> Result<Option<Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read", path, error)),
    };
    let json = serde_json::from_str(&text)
        .map_err(|e| Error::model(format!("{}: {e}", path.display())).with_source(e))?;
    Ok(Some(json))
}

/// How the folder pools hidden states: by its 1_Pooling/config.json, or else their mean.
fn pooling(folder: &Path) -> Result<Pooling> {
    let path = folder.join("1_Pooling").join("config.json");
    let Some(json) = optional_json(&path)? else { return Ok(Pooling::Mean) };
    let switches = json.as_object().into_iter().flatten();
    let mut modes: Vec<&str> = switches
        .filter(|(_, value)| value.as_bool() == Some(true))
        .filter_map(|(key, _)| key.strip_prefix("pooling_mode_"))
        .collect();
    // Or one key with the mode's name.
    modes.extend(json.get("pooling_mode").and_then(Value::as_str));
    // For the text of the error: a map of JSON has its keys in the file's order, or in theirs.
    modes.sort_unstable();
    match modes[..] {
        ["mean_tokens" | "mean"] => Ok(Pooling::Mean),
        ["cls_token" | "cls"] => Ok(Pooling::Cls),
        _ => Err(Error::model(format!(
            "{}: pooling modes {modes:?}, expected mean_tokens or cls_token alone",
            path.display()
        ))),
    }
}

fn default_max_tokens(config: &Config) -> usize {
    MAX_TOKENS.min(config.max_position_embeddings)
}

/// The longest text by the folder's sentence_bert_config.json, of no more tokens than there are positions.
fn max_tokens(folder: &Path, config: &Config) -> Result<usize> {
    let path = folder.join("sentence_bert_config.json");
    let json = optional_json(&path)?.unwrap_or_default();
    let value = match json.get("max_seq_length") {
        None | Some(Value::Null) => return Ok(default_max_tokens(config)),
        Some(value) => value,
    };
    // Two tokens frame a text.
    match value.as_u64().and_then(|tokens| usize::try_from(tokens).ok()) {
        Some(tokens) if tokens > 2 => Ok(tokens.min(config.max_position_embeddings)),
        _ => Err(Error::model(format!(
            "{}: max_seq_length {value}, expected a count above 2",
            path.display()
        ))),
    }
}

fn encoder(
    config: &Config,
    tensors: &VarBuilder<'_>,
    form: PanelForm,
    pooling: Pooling,
) -> Result<Encoder> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let linear = |parts: &[VarBuilder<'_>], rows: usize, cols: usize| -> Result<PanelLinear> {
        let (mut weights, mut bias) = (Vec::new(), Vec::new());
        for at in parts {
            weights.extend(values(at, (rows / parts.len(), cols), "weight")?);
            bias.extend(values(at, rows / parts.len(), "bias")?);
        }
        Ok(PanelLinear::new(form, &weights, &bias, (rows, cols))
            .map_err(candle_core::Error::wrap)?)
    };
    let norm = |at: VarBuilder<'_>| -> Result<Norm> {
        Ok(Norm { weight: values(&at, hidden, "weight")?, bias: values(&at, hidden, "bias")? })
    };
    let layers = (0..config.num_hidden_layers).map(|i| {
        let at = tensors.pp(format!("encoder.layer.{i}"));
        let attention = at.pp("attention.self");
        Ok(Layer {
            inputs: linear(
                &["query", "key", "value"].map(|name| attention.pp(name)),
                3 * hidden,
                hidden,
            )?,
            attention_out: linear(&[at.pp("attention.output.dense")], hidden, hidden)?,
            attention_norm: norm(at.pp("attention.output.LayerNorm"))?,
            intermediate: linear(&[at.pp("intermediate.dense")], inner, hidden)?,
            output: linear(&[at.pp("output.dense")], hidden, inner)?,
            output_norm: norm(at.pp("output.LayerNorm"))?,
        })
    });
    let layers = layers.collect::<Result<_>>()?;
    let at = tensors.pp("embeddings");
    let table = |name: &str, rows: usize| values(&at.pp(name), (rows, hidden), "weight");
    let mut kind = table("token_type_embeddings", config.type_vocab_size)?;
    kind.truncate(hidden);
    Ok(Encoder {
        heads: config.num_attention_heads,
        eps: config.layer_norm_eps as f32,
        words: table("word_embeddings", config.vocab_size)?,
        positions: table("position_embeddings", config.max_position_embeddings)?,
        kind,
        norm: norm(at.pp("LayerNorm"))?,
        layers,
        pooling,
    })
}

/// The numbers of a tensor, row-major.
fn values(at: &VarBuilder<'_>, shape: impl Into<Shape>, name: &str) -> Result<Vec<f32>> {
    Ok(at.get(shape.into(), name)?.flatten_all()?.to_vec1()?)
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

/// Texts one after another, as many as have no more than [`BATCH_TOKENS`] together, but at least one.
fn batches(texts: &[Vec<u32>]) -> Vec<&[Vec<u32>]> {
    let mut batches = Vec::new();
    let (mut start, mut num_tokens) = (0, 0);
    for (at, ids) in texts.iter().enumerate() {
        if at > start && num_tokens + ids.len() > BATCH_TOKENS {
            batches.push(&texts[start..at]);
            (start, num_tokens) = (at, 0);
        }
        num_tokens += ids.len();
    }
    if start < texts.len() {
        batches.push(&texts[start..]);
    }
    batches
}

impl Embedder for MiniLm {
    fn identity(&self) -> String {
        self.identity.clone()
    }

    fn dim(&self) -> usize {
        self.config.hidden_size
    }

    fn embed(&self, texts: &[&str]) -> mka_memory::Result<Vec<f32>> {
        let fail = |e: Error| {
            mka_memory::Error::new(mka_memory::ErrorKind::InvalidArgument, format!("embed: {e}"))
        };
        let ids = |text: &&str| {
            let ids = framed(self.tokenizer.encode_document(text)?, self.max_tokens);
            match ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
                Some(id) => Err(Error::model(format!(
                    "token {id} of the tokenizer, expected one below the model's {}",
                    self.config.vocab_size
                ))),
                None => Ok(ids),
            }
        };
        let texts = texts.iter().map(ids).collect::<Result<Vec<_>>>().map_err(fail)?;
        let encode = |room: &mut Room, batch: &&[Vec<u32>]| self.encoder.encode(batch, room);
        // A question alone is not handed to another thread.
        let vectors = match &batches(&texts)[..] {
            [batch] => return Ok(encode(&mut Room::default(), batch)),
            batches => batches.par_iter().map_init(Room::default, encode).collect::<Vec<_>>(),
        };
        Ok(vectors.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[derive(Deserialize)]
    struct Golden {
        texts: Vec<String>,
        /// By the mean.
        vectors: Vec<Vec<f32>>,
        /// By the first token.
        #[serde(default)]
        cls: Vec<Vec<f32>>,
    }

    fn golden_folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden")
    }

    fn load(folder: &Path, precision: EmbedderPrecision) -> MiniLm {
        MiniLm::load(folder, precision).unwrap()
    }

    fn cosine(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    fn check(folder: &Path, golden: &Path) {
        let golden: Golden =
            serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
        let model = load(folder, EmbedderPrecision::F32);
        let texts: Vec<&str> = golden.texts.iter().map(String::as_str).collect();
        let vectors = model.embed(&texts).unwrap();
        for (i, (found, expected)) in vectors.chunks(model.dim()).zip(&golden.vectors).enumerate() {
            assert_eq!(found.len(), expected.len());
            let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{:?}: off by {worst}", texts[i]);
        }
        assert_eq!(vectors.len(), golden.vectors.len() * model.dim());
        let model = load(folder, EmbedderPrecision::Int8);
        let vectors = model.embed(&texts).unwrap();
        for (i, (found, expected)) in vectors.chunks(model.dim()).zip(&golden.vectors).enumerate() {
            let cosine = cosine(found, expected);
            assert!(cosine > 0.99, "{:?} in integers: cosine {cosine}", texts[i]);
        }
    }

    #[test]
    fn vectors_of_a_tiny_encoder_are_those_of_transformers() {
        let folder = golden_folder().join("bert");
        check(&folder, &folder.join("golden.json"));
    }

    /// The tiny encoder with files of sentence-transformers beside it, each by its path and its text.
    fn tiny_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json", "model.safetensors"] {
            let from = golden_folder().join("bert").join(name);
            std::fs::copy(from, folder.path().join(name)).unwrap();
        }
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    const POOLING: &str = "1_Pooling/config.json";
    const LENGTH: &str = "sentence_bert_config.json";

    #[test]
    fn states_are_pooled_as_the_folder_says() {
        let golden = std::fs::read_to_string(golden_folder().join("bert/golden.json")).unwrap();
        let golden: Golden = serde_json::from_str(&golden).unwrap();
        let texts: Vec<&str> = golden.texts.iter().map(String::as_str).collect();
        let of = |mean: bool, cls: bool| {
            serde_json::json!({
                "word_embedding_dimension": 32, "include_prompt": true,
                "pooling_mode_mean_tokens": mean, "pooling_mode_cls_token": cls,
                "pooling_mode_max_tokens": false,
            })
            .to_string()
        };
        let plain = load(&golden_folder().join("bert"), EmbedderPrecision::F32);
        for (config, expected, name) in [
            (of(true, false), &golden.vectors, "bert-mean:"),
            (of(false, true), &golden.cls, "bert-cls:"),
        ] {
            let folder = tiny_with(&[(POOLING, config.as_str())]);
            let model = load(folder.path(), EmbedderPrecision::F32);
            let found = model.embed(&texts).unwrap();
            assert_eq!(found.len(), expected.len() * model.dim());
            let pairs = found.iter().zip(expected.iter().flatten());
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-5, "{name} off by {worst}");
            assert!(model.identity().starts_with(name), "{}", model.identity());
            assert_eq!(model.identity() == plain.identity(), name == "bert-mean:");
            let rounded = load(folder.path(), EmbedderPrecision::Int8).identity();
            assert!(rounded.starts_with(&name.replace(':', "-int8:")), "{rounded}");
        }
        for (config, named) in [
            (of(true, true), "mean_tokens"),
            (of(false, false), "[]"),
            (of(false, true).replace("cls_token", "lasttoken"), "lasttoken"),
        ] {
            let folder = tiny_with(&[(POOLING, config.as_str())]);
            let error = MiniLm::load(folder.path(), EmbedderPrecision::F32).err().unwrap();
            let text = error.to_string();
            assert!(text.contains(named) && text.contains("expected mean_tokens or cls"), "{text}");
        }
    }

    #[test]
    fn a_text_is_cut_at_the_length_that_the_folder_says() {
        let long = "the cat ".repeat(40);
        let short = "the cat ".repeat(3);
        let load = |folder: &Path| load(folder, EmbedderPrecision::F32);
        let plain = load(&golden_folder().join("bert"));
        let folder = tiny_with(&[(LENGTH, r#"{"max_seq_length": 8, "do_lower_case": false}"#)]);
        let cut = load(folder.path());
        // Six words between the two tokens that frame a text.
        assert_eq!(cut.embed(&[&long]).unwrap(), plain.embed(&[&short]).unwrap());
        assert_ne!(plain.embed(&[&long]).unwrap(), plain.embed(&[&short]).unwrap());
        assert!(cut.identity().starts_with("bert-mean-8:"), "{}", cut.identity());
        // No more than there are positions, 32, which is what the encoder takes without the file.
        for same in [r#"{"max_seq_length": 512}"#, r#"{"max_seq_length": null}"#, "{}"] {
            let folder = tiny_with(&[(LENGTH, same)]);
            assert_eq!(load(folder.path()).identity(), plain.identity(), "{same}");
        }
        for wrong in [r#"{"max_seq_length": 0}"#, r#"{"max_seq_length": "x"}"#] {
            let folder = tiny_with(&[(LENGTH, wrong)]);
            let error = MiniLm::load(folder.path(), EmbedderPrecision::F32).err().unwrap();
            assert!(error.to_string().contains("max_seq_length"), "{error}");
        }
    }

    #[test]
    fn vectors_of_all_minilm_l6_v2_are_those_of_transformers() {
        let Some(folder) = crate::testing::minilm_folder() else { return };
        check(&folder, &golden_folder().join("minilm_l6_v2.json"));
    }

    #[test]
    fn a_text_has_one_vector_whatever_it_is_embedded_with() {
        let texts: Vec<String> =
            (0..60).map(|at| "the quick brown fox jumps ".repeat(1 + at * 7 % 13)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        for precision in [EmbedderPrecision::F32, EmbedderPrecision::Int8] {
            let model = load(&golden_folder().join("bert"), precision);
            let together = model.embed(&texts).unwrap();
            assert_eq!(together.len(), texts.len() * model.dim());
            for (text, found) in texts.iter().zip(together.chunks(model.dim())) {
                let alone = model.embed(&[text]).unwrap();
                assert!(found == alone, "{precision:?} {text:?}");
            }
            assert!(model.embed(&[]).unwrap().is_empty());
        }
    }

    #[test]
    fn the_two_forms_have_names_of_their_own() {
        let folder = golden_folder().join("bert");
        let [exact, rounded] = [EmbedderPrecision::F32, EmbedderPrecision::Int8]
            .map(|precision| load(&folder, precision).identity());
        assert!(exact.starts_with("bert-mean:") && rounded.starts_with("bert-mean-int8:"));
    }

    /// `MKA_EMBED_TEXTS=FILE RAYON_NUM_THREADS=1`: one text a line, taken in batches of 64 as a store does, five times by
    /// either form in turn. With `MKA_EMBED_VECTORS=FOLDER` once, and the vectors are written there for `bench_recall`.
    #[test]
    fn a_file_of_texts_is_embedded_at_a_rate() {
        let Some(path) = std::env::var_os("MKA_EMBED_TEXTS") else {
            return eprintln!("skipped: MKA_EMBED_TEXTS names no file");
        };
        let Some(folder) = crate::testing::minilm_folder() else { return };
        let to = std::env::var_os("MKA_EMBED_VECTORS");
        let text = std::fs::read_to_string(path).unwrap();
        let texts: Vec<&str> = text.lines().collect();
        let now = || {
            let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the pointer is to a timespec of this frame.
            unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
            time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
        };
        let forms = [(EmbedderPrecision::F32, "f32"), (EmbedderPrecision::Int8, "int8")];
        let models = forms.map(|(precision, _)| load(&folder, precision));
        let (mut rates, mut vectors) = ([vec![], vec![]], [vec![], vec![]]);
        for _ in 0..if to.is_some() { 1 } else { 5 } {
            for (at, model) in models.iter().enumerate() {
                let start = now();
                let rows = texts.chunks(64).flat_map(|batch| model.embed(batch).unwrap());
                vectors[at] = rows.collect::<Vec<f32>>();
                rates[at].push(texts.len() as f64 / (now() - start));
            }
        }
        let dim = models[0].dim();
        for (at, (_, name)) in forms.iter().enumerate() {
            let pairs = vectors[at].chunks(dim).zip(vectors[0].chunks(dim));
            let cosines: Vec<f32> = pairs.map(|(a, b)| cosine(a, b)).collect();
            let mean = cosines.iter().sum::<f32>() / texts.len() as f32;
            let worst = cosines.iter().copied().fold(1.0, f32::min);
            rates[at].sort_by(f64::total_cmp);
            println!(
                "{name}: {} texts, {:.1} a second of one core ({:.1} to {:.1}), cosine with f32 {mean:.4}, at least {worst:.4}",
                texts.len(),
                rates[at][rates[at].len() / 2],
                rates[at][0],
                rates[at][rates[at].len() - 1]
            );
            if let Some(folder) = &to {
                let bytes: Vec<u8> = vectors[at].iter().flat_map(|x| x.to_le_bytes()).collect();
                std::fs::write(Path::new(folder).join(format!("{name}.f32")), bytes).unwrap();
            }
        }
    }

    #[test]
    fn an_encoder_of_another_kind_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = MiniLm::load(folder.path(), EmbedderPrecision::F32).err().unwrap();
        assert!(error.to_string().contains("config.json"), "{error}");
        let config = std::fs::read_to_string(golden_folder().join("bert/config.json")).unwrap();
        let other = config.replace("\"bert\"", "\"roberta\"");
        std::fs::write(folder.path().join("config.json"), other).unwrap();
        let error = MiniLm::load(folder.path(), EmbedderPrecision::F32).err().unwrap();
        assert!(error.to_string().contains("roberta"), "{error}");
        let other = config.replacen('{', "{\"position_embedding_type\": \"relative_key\",", 1);
        std::fs::write(folder.path().join("config.json"), other).unwrap();
        let error = MiniLm::load(folder.path(), EmbedderPrecision::F32).err().unwrap();
        assert!(error.to_string().contains("relative_key"), "{error}");
    }
}

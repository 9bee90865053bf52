//! Which embedder a store uses, and the ones that need a model file.
//! Knows no store; an embedder is text in, unit vectors out.

mod encoder;
mod minilm;

use crate::error::Result;
use crate::hub::Progress;
use minilm::MiniLm;
use mka_memory::{Embedder, HashedEmbedder};
use std::path::PathBuf;
use std::sync::Arc;

/// What turns sentences into vectors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EmbedderSource {
    /// Hashed words and character n-grams: built in, needs no file, tens of thousands of tokens a second.
    #[default]
    Hashed,
    /// all-MiniLM-L6-v2, fetched like a model: understands paraphrases, tens of sentences a second on a processor core.
    MiniLm,
    /// A folder with a BERT sentence encoder: config.json, tokenizer.json, model.safetensors. Where 1_Pooling/config.json and
    /// sentence_bert_config.json are there, they say whether the mean or the first token is taken, and how long a text is.
    Folder(PathBuf),
}

/// How a sentence encoder multiplies by its weights. The vectors of the two differ a little: a store takes them for
/// those of two embedders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum EmbedderPrecision {
    /// In f32, as the model was trained.
    #[default]
    F32,
    /// In 8-bit integers: weights with a scale an output, activations with a scale and a zero point a token. Twice as
    /// many sentences a second where the processor has AVX2, fewer where it does not.
    Int8,
}

impl EmbedderSource {
    pub(crate) fn load(
        &self,
        precision: EmbedderPrecision,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Arc<dyn Embedder>> {
        let folder = match self {
            Self::Hashed => return Ok(Arc::new(HashedEmbedder::new())),
            Self::MiniLm => &crate::hub::resolve_minilm(progress)?,
            Self::Folder(folder) => folder,
        };
        Ok(Arc::new(MiniLm::load(folder, precision)?))
    }
}

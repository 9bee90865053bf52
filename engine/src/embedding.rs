//! Which embedder a store uses, and the ones that need a model file.
//! Knows no store; an embedder is text in, unit vectors out.

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
    /// A folder with a BERT sentence encoder: config.json, tokenizer.json, model.safetensors.
    Folder(PathBuf),
}

impl EmbedderSource {
    pub(crate) fn load(&self, progress: &mut dyn FnMut(Progress)) -> Result<Arc<dyn Embedder>> {
        Ok(match self {
            Self::Hashed => Arc::new(HashedEmbedder::new()),
            Self::MiniLm => Arc::new(MiniLm::load(&crate::hub::resolve_minilm(progress)?)?),
            Self::Folder(folder) => Arc::new(MiniLm::load(folder)?),
        })
    }
}

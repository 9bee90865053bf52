//! How a foreign caller opens an engine: every field may be left out, and the engine's defaults hold.
//! Knows no default value; the docs repeat the engine's.

use crate::error::MkaError;
use crate::mirrored::{count, mirrored, set};

/// Which model to load.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum ModelSource {
    /// A repository of the HuggingFace hub.
    Hub {
        /// `owner/name`.
        id: String,
    },
    /// A HuggingFace folder or a GGUF file.
    Path {
        /// Where it is.
        path: String,
    },
    /// A path if it exists, or else the id of a repository.
    Named {
        /// Path or `owner/name`.
        name: String,
    },
}

impl TryFrom<ModelSource> for mka::ModelSource {
    type Error = MkaError;

    fn try_from(source: ModelSource) -> Result<Self, MkaError> {
        Ok(match source {
            ModelSource::Hub { id } => Self::hub(id),
            ModelSource::Path { path } => Self::path(path),
            ModelSource::Named { name } => name.parse()?,
        })
    }
}

/// What turns sentences into vectors.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum EmbedderSource {
    /// Hashed words and character n-grams: built in.
    Hashed,
    /// all-MiniLM-L6-v2, fetched like a model.
    MiniLm,
    /// A BERT sentence encoder.
    Folder {
        /// Folder with config.json, tokenizer.json and model.safetensors.
        path: String,
    },
}

impl From<EmbedderSource> for mka::EmbedderSource {
    fn from(source: EmbedderSource) -> Self {
        match source {
            EmbedderSource::Hashed => Self::Hashed,
            EmbedderSource::MiniLm => Self::MiniLm,
            EmbedderSource::Folder { path } => Self::Folder(path.into()),
        }
    }
}

mirrored! {
    /// How a sentence encoder multiplies by its weights; a store takes the two for different embedders.
    pub enum EmbedderPrecision for mka::EmbedderPrecision {
        /// In f32.
        F32,
        /// In 8-bit integers.
        Int8,
    }
}

mirrored! {
    /// How much of a recalled passage a session quotes to its model.
    pub enum Quote for mka::Quote {
        /// The sentences that share the message's words.
        Sentences,
        /// The whole passage.
        Passage,
    }
}

mirrored! {
    /// How older tokens come back into a turn.
    pub enum RecallPolicy for mka::RecallPolicy {
        /// Not at all: the window is attended, and the first page of the stream or those of its instructions.
        Off,
        /// As text put before the message.
        Text,
        /// As keys and values inside attention.
        Pages,
        /// As text and inside attention.
        Both,
    }
}

mirrored! {
    /// How stored keys and values are held.
    pub enum PagePrecision for mka::PagePrecision {
        /// As computed.
        F32,
        /// Rounded to bf16.
        Bf16,
        /// Eight bits, a scale a row.
        Int8,
        /// Four bits, a scale and a least value for every 32 numbers.
        Int4,
    }
}

mirrored! {
    /// How tokens are chosen for recall inside attention.
    pub enum PageRule for mka::PageRule {
        /// Every key or its code, or landmarks, as the scan says; then exact scores token by token.
        Mka,
        /// Nothing: sinks and window, as StreamingLLM does.
        Streaming,
        /// Blocks by their representative keys, as InfLLM does.
        InfLlm,
        /// Runs of tokens by an upper bound, as Quest does.
        Quest,
        /// Tokens by one vote of all heads, as TokenSelect does.
        TokenSelect,
    }
}

mirrored! {
    /// What is scored on the processor for a choice before keys are.
    pub enum LandmarkScan for mka::LandmarkScan {
        /// Every key by its code, where the processor chooses from the start.
        Auto,
        /// Every landmark, the mean of 8 keys.
        Flat,
        /// The means of pages first, then the landmarks of the best pages.
        TwoLevel,
        /// The landmarks whose sign codes are nearest to the query's.
        SignHash,
        /// Every key, by a code of one bit a number.
        KeyCodes,
    }
}

mirrored! {
    /// What a block of a prompt attends to while the stream fits the model's trained length.
    pub enum Prefill for mka::Prefill {
        /// Sinks, window and what is chosen for the block.
        Selected,
        /// Every stored token.
        Dense,
    }
}

/// Recall inside attention: budgets and rules.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct PageConfig {
    /// Tokens that each key/value head recalls; 2048 if left out.
    #[uniffi(default)]
    pub tokens: Option<u64>,
    /// Bytes of host memory for the stored pages of one session and their index; 2 GiB if left out.
    #[uniffi(default)]
    pub bytes: Option<u64>,
    /// Bytes of device memory for them, where the model runs on a device; 4 GiB if left out.
    #[uniffi(default)]
    pub device_bytes: Option<u64>,
    /// How stored keys and values are held; bf16 if left out.
    #[uniffi(default)]
    pub precision: Option<PagePrecision>,
    /// How tokens are chosen; by mka's rule if left out.
    #[uniffi(default)]
    pub rule: Option<PageRule>,
    /// What is scored for a choice before keys are; `Auto` if left out.
    #[uniffi(default)]
    pub scan: Option<LandmarkScan>,
    /// What a prompt's blocks attend to; `Selected` if left out.
    #[uniffi(default)]
    pub prefill: Option<Prefill>,
    /// Decoded tokens that one choice serves; left out, 4 on a card and for other systems' rules, and 16 to 64 on the
    /// processor.
    #[uniffi(default)]
    pub reuse_steps: Option<u64>,
    /// Layers below this one choose nothing; 3 if left out.
    #[uniffi(default)]
    pub first_layer: Option<u64>,
    /// Tokens to either side of a stored one whose votes count for it; 16 if left out.
    #[uniffi(default)]
    pub vote_reach: Option<u64>,
    /// Whether what a message's queries asked for stays asked for while it is answered; true if left out.
    #[uniffi(default)]
    pub keep_votes: Option<bool>,
    /// Whether the rare words of a message pin the places where they stand; true if left out.
    #[uniffi(default)]
    pub lexical: Option<bool>,
    /// Whether tokens that are not recalled enter the softmax too, each page as its means; false if left out.
    #[uniffi(default)]
    pub estimate: Option<bool>,
    /// Whether positions are counted over what is attended as soon as not every stored token is recalled (the default); else
    /// from the model's trained length on.
    #[uniffi(default)]
    pub compact: Option<bool>,
}

impl From<PageConfig> for mka::PageConfig {
    fn from(from: PageConfig) -> Self {
        let mut pages = Self::default();
        set(&mut pages.tokens, from.tokens.map(count));
        set(&mut pages.bytes, from.bytes);
        set(&mut pages.device_bytes, from.device_bytes);
        set(&mut pages.precision, from.precision.map(Into::into));
        set(&mut pages.rule, from.rule.map(Into::into));
        set(&mut pages.scan, from.scan.map(Into::into));
        set(&mut pages.prefill, from.prefill.map(Into::into));
        set(&mut pages.reuse_steps, from.reuse_steps.map(count).map(Some));
        set(&mut pages.first_layer, from.first_layer.map(count));
        set(&mut pages.vote_reach, from.vote_reach.map(count));
        set(&mut pages.keep_votes, from.keep_votes);
        set(&mut pages.lexical, from.lexical);
        set(&mut pages.estimate, from.estimate);
        set(&mut pages.compact, from.compact);
        pages
    }
}

mirrored! {
    /// Which database keeps the small records of a new store.
    pub enum Backend for mka::Backend {
        /// sled 0.34, a log-structured tree.
        Sled,
        /// redb 4, a copy-on-write B-tree in one file.
        Redb,
    }
}

mirrored! {
    /// What to do with a turn that holds something sensitive.
    pub enum Policy for mka::Policy {
        /// Nothing; it is not looked for.
        Ignore,
        /// It is stored, and named in what `remember` returns.
        Flag,
        /// It stands in the log, is named, and is never recalled.
        Withhold,
        /// The call is refused, and nothing of it is stored.
        Refuse,
    }
}

/// What memory does not store twice, and what it does not store at all.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct Hygiene {
    /// Counts text with the words of text that the session holds instead of storing it; true if left out.
    #[uniffi(default)]
    pub near_duplicates: Option<bool>,
    /// What to do with passwords, keys and tokens; `Flag` if left out.
    #[uniffi(default)]
    pub secrets: Option<Policy>,
    /// What to do with addresses of mail, phone, card, account and social security numbers; `Flag` if left out.
    #[uniffi(default)]
    pub personal: Option<Policy>,
}

impl From<Hygiene> for mka::Hygiene {
    fn from(from: Hygiene) -> Self {
        let mut hygiene = Self::default();
        set(&mut hygiene.near_duplicates, from.near_duplicates);
        set(&mut hygiene.secrets, from.secrets.map(Into::into));
        set(&mut hygiene.personal, from.personal.map(Into::into));
        hygiene
    }
}

/// How an engine is opened.
// Not `Debug`: it may hold a key.
#[derive(Clone, Default, uniffi::Record)]
pub struct EngineConfig {
    /// The language model; without one, memory alone works.
    #[uniffi(default)]
    pub model: Option<ModelSource>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; `auto` if left out, or the process's own where several share the model.
    #[uniffi(default)]
    pub device: Option<String>,
    /// What turns sentences into vectors; `Hashed` if left out.
    #[uniffi(default)]
    pub embedder: Option<EmbedderSource>,
    /// How a sentence encoder multiplies; in f32 if left out.
    #[uniffi(default)]
    pub embedder_precision: Option<EmbedderPrecision>,
    /// Recent tokens attended exactly; 2048 if left out.
    #[uniffi(default)]
    pub window_tokens: Option<u64>,
    /// Most tokens of one forward pass while a prompt is read; 512 if left out.
    #[uniffi(default)]
    pub block_tokens: Option<u64>,
    /// Memories looked up for each message; 8 if left out, and 0 recalls nothing.
    #[uniffi(default)]
    pub recall_k: Option<u64>,
    /// Most tokens of recalled text put before a message; 768 if left out, and never more than half the window.
    #[uniffi(default)]
    pub recall_tokens: Option<u64>,
    /// How much of each recalled passage is quoted; `Sentences` if left out.
    #[uniffi(default)]
    pub quote: Option<Quote>,
    /// Bytes of evicted key/value pages kept on disk for each session, 2 GiB by default; with 0 a session that is opened again
    /// recalls none of them inside attention.
    #[uniffi(default)]
    pub evicted_page_bytes: Option<u64>,
    /// How older tokens come back; `Text` if left out.
    #[uniffi(default)]
    pub recall: Option<RecallPolicy>,
    /// Recall inside attention.
    #[uniffi(default)]
    pub pages: Option<PageConfig>,
    /// Which database keeps the small records of a new store; sled if left out.
    #[uniffi(default)]
    pub backend: Option<Backend>,
    /// 32 bytes that encrypt everything that memory writes.
    #[uniffi(default)]
    pub encryption_key: Option<Vec<u8>>,
    /// What memory does not store twice, and what it does not store at all.
    #[uniffi(default)]
    pub hygiene: Option<Hygiene>,
    /// Takes another embedder over than the one that the store was made with, working this share of the time, more than 0 and
    /// at most 1; left out, another one is refused.
    #[uniffi(default)]
    pub reembed: Option<f32>,
    /// Shares the model with the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name: all
    /// of them make the same calls in the same order.
    #[uniffi(default)]
    pub tensor_parallel: bool,
    /// Shows no progress bar while files are fetched.
    #[uniffi(default)]
    pub quiet: bool,
}

impl EngineConfig {
    pub(crate) fn builder(self, path: String) -> Result<mka::EngineBuilder, MkaError> {
        let mut memory = mka::MemoryConfig::default();
        set(&mut memory.window_tokens, self.window_tokens.map(count));
        set(&mut memory.block_tokens, self.block_tokens.map(count));
        set(&mut memory.recall_k, self.recall_k.map(count));
        set(&mut memory.recall_tokens, self.recall_tokens.map(count));
        set(&mut memory.evicted_page_bytes, self.evicted_page_bytes);
        set(&mut memory.quote, self.quote.map(Into::into));
        set(&mut memory.recall, self.recall.map(Into::into));
        set(&mut memory.pages, self.pages.map(Into::into));
        let mut builder = mka::Engine::builder(path).memory(memory).quiet(self.quiet);
        if let Some(model) = self.model {
            builder = builder.model(model.try_into()?);
        }
        if let Some(device) = self.device {
            builder = builder.device(device.parse()?);
        }
        if let Some(embedder) = self.embedder {
            builder = builder.embedder(embedder.into());
        }
        if let Some(precision) = self.embedder_precision {
            builder = builder.embedder_precision(precision.into());
        }
        if let Some(backend) = self.backend {
            builder = builder.backend(backend.into());
        }
        if let Some(key) = self.encryption_key {
            builder = builder.encryption_key(encryption_key(&key)?);
        }
        if let Some(hygiene) = self.hygiene {
            builder = builder.hygiene(hygiene.into());
        }
        if let Some(share) = self.reembed {
            builder = builder.reembed(share);
        }
        if self.tensor_parallel {
            builder = builder.tensor_parallel_from_env();
        }
        Ok(builder)
    }
}

fn encryption_key(bytes: &[u8]) -> Result<mka::EncryptionKey, MkaError> {
    let bytes = bytes.try_into().map_err(|_| {
        MkaError::InvalidArgument(format!(
            "open: encryption_key of {} bytes, expected 32",
            bytes.len()
        ))
    })?;
    Ok(mka::EncryptionKey::new(bytes))
}

#[cfg(test)]
mod tests {
    /// A default that changes is to be changed in the docs of its field.
    #[test]
    fn the_engines_defaults_are_those_that_the_docs_repeat() {
        let memory = mka::MemoryConfig::default();
        let tokens = [memory.window_tokens, memory.block_tokens, memory.recall_tokens];
        assert_eq!((tokens, memory.recall_k), ([2048, 512, 768], 8));
        assert_eq!(memory.evicted_page_bytes, 2u64 << 30);
        assert_eq!((memory.quote, memory.recall), (mka::Quote::Sentences, mka::RecallPolicy::Text));
        let pages = memory.pages;
        assert_eq!((pages.tokens, pages.first_layer, pages.vote_reach), (2048, 3, 16));
        assert_eq!((pages.bytes, pages.device_bytes), (2u64 << 30, 4u64 << 30));
        assert_eq!((pages.precision, pages.rule), (mka::PagePrecision::Bf16, mka::PageRule::Mka));
        assert_eq!((pages.scan, pages.prefill), (mka::LandmarkScan::Auto, mka::Prefill::Selected));
        assert!(pages.keep_votes && pages.lexical && pages.compact && !pages.estimate);
        assert_eq!(pages.reuse_steps, None);
        let hygiene = mka::Hygiene::default();
        assert!(hygiene.near_duplicates);
        assert_eq!((hygiene.secrets, hygiene.personal), (mka::Policy::Flag, mka::Policy::Flag));
        assert_eq!(mka::EmbedderSource::default(), mka::EmbedderSource::Hashed);
        assert_eq!(mka::EmbedderPrecision::default(), mka::EmbedderPrecision::F32);
        assert_eq!(mka::Backend::default(), mka::Backend::Sled);
    }
}

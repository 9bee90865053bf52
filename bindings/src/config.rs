//! What a foreign caller passes in: options of which every field may be left out, and the engine's defaults hold.
//! Knows no default value.

use crate::error::MkaError;

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

/// How much of a recalled passage a session quotes to its model.
#[derive(Debug, Clone, Copy, uniffi::Enum)]
pub enum Quote {
    /// The sentences that share the message's words.
    Sentences,
    /// The whole passage.
    Passage,
}

/// How an engine is opened.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct EngineConfig {
    /// The language model; without one, memory alone works.
    #[uniffi(default)]
    pub model: Option<ModelSource>,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    #[uniffi(default)]
    pub device: Option<String>,
    /// What turns sentences into vectors.
    #[uniffi(default)]
    pub embedder: Option<EmbedderSource>,
    /// Recent tokens attended exactly.
    #[uniffi(default)]
    pub window_tokens: Option<u64>,
    /// Most tokens of one forward pass while a prompt is read.
    #[uniffi(default)]
    pub block_tokens: Option<u64>,
    /// Memories looked up for each message.
    #[uniffi(default)]
    pub recall_k: Option<u64>,
    /// Most tokens of recalled text put before a message.
    #[uniffi(default)]
    pub recall_tokens: Option<u64>,
    /// How much of each recalled passage is quoted.
    #[uniffi(default)]
    pub quote: Option<Quote>,
    /// Bytes of evicted key/value pages kept on disk for each session.
    #[uniffi(default)]
    pub evicted_page_bytes: Option<u64>,
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
        let quote = self.quote.map(|quote| match quote {
            Quote::Sentences => mka::Quote::Sentences,
            Quote::Passage => mka::Quote::Passage,
        });
        set(&mut memory.quote, quote);
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
        Ok(builder)
    }
}

/// How one message is answered.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct SendOptions {
    /// 0 takes the most likely token.
    #[uniffi(default)]
    pub temperature: Option<f32>,
    /// Keep the k most likely tokens; 0 keeps all.
    #[uniffi(default)]
    pub top_k: Option<u64>,
    /// Keep the smallest set of tokens whose probability reaches this.
    #[uniffi(default)]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this share of the most likely one.
    #[uniffi(default)]
    pub min_p: Option<f32>,
    /// What the logits of recent tokens are divided by.
    #[uniffi(default)]
    pub repetition_penalty: Option<f32>,
    /// Two runs with one seed draw the same.
    #[uniffi(default)]
    pub seed: Option<u64>,
    /// Most tokens to generate.
    #[uniffi(default)]
    pub max_new_tokens: Option<u64>,
    /// The answer ends before the first of these.
    #[uniffi(default)]
    pub stop: Vec<String>,
    /// Words that the answer begins with.
    #[uniffi(default)]
    pub answer_prefix: Option<String>,
    /// Whether the message is the prompt as it stands, without the chat template.
    #[uniffi(default)]
    pub completion: bool,
    /// Whether the message goes on in the message of the document fed before it.
    #[uniffi(default)]
    pub joined: bool,
    /// Instructions that stand before the first message of a session.
    #[uniffi(default)]
    pub system: Option<String>,
    /// Memories to look up.
    #[uniffi(default)]
    pub recall_k: Option<u64>,
    /// Whether other sessions of the same user are searched too.
    #[uniffi(default)]
    pub across_sessions: bool,
    /// When the message was said, milliseconds since 1970; now if left out.
    #[uniffi(default)]
    pub time_ms: Option<i64>,
}

impl From<SendOptions> for mka::SendOptions {
    fn from(from: SendOptions) -> Self {
        let mut sampling = mka::Sampling::default();
        set(&mut sampling.temperature, from.temperature);
        set(&mut sampling.top_k, from.top_k.map(count));
        set(&mut sampling.top_p, from.top_p);
        set(&mut sampling.min_p, from.min_p);
        set(&mut sampling.repetition_penalty, from.repetition_penalty);
        set(&mut sampling.seed, from.seed);
        let mut options = Self::default();
        options.sampling = sampling;
        options.max_new_tokens = from.max_new_tokens.map(count);
        options.stop = from.stop;
        options.answer_prefix = from.answer_prefix.unwrap_or_default();
        options.completion = from.completion;
        options.joined = from.joined;
        options.system = from.system;
        options.recall_k = from.recall_k.map(count);
        options.across_sessions = from.across_sessions;
        options.time_ms = from.time_ms;
        options
    }
}

/// What of a document the model reads.
#[derive(Debug, Clone, Copy, uniffi::Enum)]
pub enum FeedMode {
    /// By length.
    Auto,
    /// Every token runs through the model.
    Model,
    /// The text is remembered; the model reads its end.
    Text,
}

/// How a document is taken in.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct FeedOptions {
    /// What the model reads.
    #[uniffi(default)]
    pub mode: Option<FeedMode>,
    /// Name of the document, shown beside what is recalled from it.
    #[uniffi(default)]
    pub name: Option<String>,
    /// Whether the text stands outside the chat template.
    #[uniffi(default)]
    pub completion: bool,
    /// When the document was given, milliseconds since 1970; now if left out.
    #[uniffi(default)]
    pub time_ms: Option<i64>,
}

impl From<FeedOptions> for mka::FeedOptions {
    fn from(from: FeedOptions) -> Self {
        let mut options = Self::default();
        let mode = from.mode.map(|mode| match mode {
            FeedMode::Auto => mka::FeedMode::Auto,
            FeedMode::Model => mka::FeedMode::Model,
            FeedMode::Text => mka::FeedMode::Text,
        });
        set(&mut options.mode, mode);
        options.name = from.name;
        options.completion = from.completion;
        options.time_ms = from.time_ms;
        options
    }
}

/// Whose memory a call touches.
#[derive(Debug, Clone, PartialEq, Eq, Hash, uniffi::Record)]
pub struct Scope {
    /// The user.
    pub user: String,
    /// The agent, if one is meant.
    #[uniffi(default)]
    pub agent: Option<String>,
    /// The session, if one is meant.
    #[uniffi(default)]
    pub session: Option<String>,
}

impl From<Scope> for mka::Scope {
    fn from(from: Scope) -> Self {
        let mut scope = Self::user(from.user);
        if let Some(agent) = from.agent {
            scope = scope.agent(agent);
        }
        if let Some(session) = from.session {
            scope = scope.session(session);
        }
        scope
    }
}

impl From<&mka::Scope> for Scope {
    fn from(scope: &mka::Scope) -> Self {
        Self {
            user: scope.user_id().to_owned(),
            agent: scope.agent_id().map(str::to_owned),
            session: scope.session_id().map(str::to_owned),
        }
    }
}

/// Who produced a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, uniffi::Enum)]
pub enum Role {
    /// Instructions of the host.
    System,
    /// A human's message.
    User,
    /// The model's answer.
    Assistant,
    /// A document fed to the session.
    Document,
    /// Text that memory gave back to the model: logged, never recalled again.
    Recalled,
}

impl From<Role> for mka::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::System => Self::System,
            Role::User => Self::User,
            Role::Assistant => Self::Assistant,
            Role::Document => Self::Document,
            Role::Recalled => Self::Recalled,
        }
    }
}

impl From<mka::Role> for Role {
    fn from(role: mka::Role) -> Self {
        match role {
            mka::Role::System => Self::System,
            mka::Role::User => Self::User,
            mka::Role::Assistant => Self::Assistant,
            mka::Role::Recalled => Self::Recalled,
            // A role that this surface does not know yet is text from somewhere: trusted least.
            _ => Self::Document,
        }
    }
}

/// How to recall.
#[derive(Debug, Clone, Default, uniffi::Record)]
pub struct RecallOptions {
    /// The most hits to return.
    #[uniffi(default)]
    pub k: Option<u64>,
    /// In the scope's own session, only chunks of turns before this one.
    #[uniffi(default)]
    pub before_turn: Option<u64>,
    /// Also look into the other sessions of the scope's user.
    #[uniffi(default)]
    pub across_sessions: bool,
    /// Only turns in these roles; all if empty.
    #[uniffi(default)]
    pub roles: Vec<Role>,
    /// Only turns at this time or later, milliseconds since 1970.
    #[uniffi(default)]
    pub since_ms: Option<i64>,
    /// Only turns before this time, milliseconds since 1970: memory as of then.
    #[uniffi(default)]
    pub until_ms: Option<i64>,
    /// Hits that score less are left out.
    #[uniffi(default)]
    pub min_score: Option<f32>,
    /// Let a short question lean on what its session was about just now.
    #[uniffi(default)]
    pub follow_up: Option<bool>,
}

impl From<RecallOptions> for mka::Recall {
    fn from(from: RecallOptions) -> Self {
        let mut recall = Self::default();
        set(&mut recall.k, from.k.map(count));
        recall.before_turn = from.before_turn;
        recall.across_sessions = from.across_sessions;
        recall.roles = from.roles.into_iter().map(Into::into).collect();
        recall.since_ms = from.since_ms;
        recall.until_ms = from.until_ms;
        set(&mut recall.min_score, from.min_score);
        set(&mut recall.follow_up, from.follow_up);
        recall
    }
}

/// A turn to be remembered.
#[derive(Debug, Clone, uniffi::Record)]
pub struct NewTurn {
    /// Who produced it.
    pub role: Role,
    /// Its text.
    pub text: String,
    /// When, milliseconds since 1970.
    pub time_ms: i64,
    /// Where the text comes from: a file name, a URL.
    #[uniffi(default)]
    pub source: Option<String>,
    /// Whether it can be recalled later; by role if left out.
    #[uniffi(default)]
    pub remember: Option<bool>,
}

impl From<NewTurn> for mka::NewTurn {
    fn from(from: NewTurn) -> Self {
        let mut turn = Self::new(from.role.into(), from.text);
        turn.time_ms = from.time_ms;
        turn.source = from.source;
        set(&mut turn.remember, from.remember);
        turn
    }
}

/// What to erase within a scope.
#[derive(Debug, Clone, uniffi::Enum)]
pub enum Forget {
    /// Every turn whose text or source name contains this text, letter case aside.
    Matching {
        /// The text.
        text: String,
    },
    /// One turn of the scope's session.
    Turn {
        /// Its number.
        turn: u64,
    },
    /// Every turn before a time.
    Before {
        /// Milliseconds since 1970.
        time_ms: i64,
    },
    /// The scope's session.
    Session,
    /// Every session of the scope.
    Everything,
}

impl From<Forget> for mka::Forget {
    fn from(forget: Forget) -> Self {
        match forget {
            Forget::Matching { text } => Self::matching(text),
            Forget::Turn { turn } => Self::turn(turn),
            Forget::Before { time_ms } => Self::before(time_ms),
            Forget::Session => Self::session(),
            Forget::Everything => Self::everything(),
        }
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

/// A count from outside; one beyond this machine's reach is the largest there is.
fn count(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

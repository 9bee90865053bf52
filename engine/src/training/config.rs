//! What a training run is: one TOML file, checked before anything is loaded.
//! Knows no tensor; files are named here and opened elsewhere.

use crate::error::{Error, Result};
use mka_kernels::PAGE_TOKENS;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Everything that fixes a run; the same file, seed and device give the same curve.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainingConfig {
    /// Folder of the run: log, checkpoints and the trained model. Required.
    pub output: PathBuf,
    /// Seed of initial values and of the order of the data.
    pub seed: u64,
    /// `auto`, `cpu`, `cuda` or `cuda:N`; empty is `cpu`.
    pub device: String,
    /// Type of activations and of the weights that the products read.
    pub precision: Precision,
    /// Which model.
    pub model: ModelSettings,
    /// What it reads.
    pub data: DataSettings,
    /// What stands beside attention: summary, gate, router, window.
    pub memory: MemorySettings,
    /// What is trained, and how long.
    pub train: TrainSettings,
    /// Low-rank adapters, with `train.mode = "lora"`.
    pub lora: LoraSettings,
    /// AdamW, its schedule and clipping.
    pub optimizer: OptimizerSettings,
}

/// Type of activations and of the weights that the products read; state and sums are f32 in either.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Precision {
    /// 32 bits.
    #[default]
    F32,
    /// bfloat16 beside f32 master weights: CUDA devices alone.
    Bf16,
}

/// Which model: one from a path or the hub, or a new one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ModelSettings {
    /// Folder, GGUF file or repository id of a pretrained model.
    pub source: Option<String>,
    /// Shape of a model that starts from random weights.
    pub scratch: Option<ScratchSettings>,
}

/// Shape of a decoder of the Llama layout that starts from random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ScratchSettings {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads of grouped attention: `heads` is MHA, 1 is MQA.
    pub kv_heads: usize,
    /// Width of the gated MLP.
    pub intermediate: usize,
    /// Multi-head latent attention in place of grouped.
    pub latent: Option<LatentSettings>,
}

impl Default for ScratchSettings {
    /// The size of GPT-2: 12 layers of 768, 12 heads.
    fn default() -> Self {
        Self { hidden: 768, layers: 12, heads: 12, kv_heads: 12, intermediate: 2048, latent: None }
    }
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from one latent vector a
/// token, and a rotary key of its own that all heads share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentSettings {
    /// Width of the latent vector, which the cache holds.
    pub rank: usize,
    /// Width of the shared rotary key, which the cache holds too.
    pub rope_dim: usize,
}

/// What a run reads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DataSettings {
    /// Text files to train on, each a document.
    pub train: Vec<PathBuf>,
    /// Text files that the loss is measured on and that are never trained on.
    pub held_out: Vec<PathBuf>,
    /// `bytes`, or a tokenizer.json; none: the model's own.
    pub tokenizer: Option<String>,
    /// Tokens of one sequence.
    pub sequence_tokens: usize,
}

impl Default for DataSettings {
    fn default() -> Self {
        Self { train: Vec::new(), held_out: Vec::new(), tokenizer: None, sequence_tokens: 1024 }
    }
}

/// Which memory a layer mixes in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MemoryKind {
    /// The plain decoder.
    None,
    /// Keys and values from one mix of the token and its summaries.
    #[default]
    Fastmka,
    /// One attention a level, mixed by the router of the query.
    Mka,
}

/// Gate, router and summary of every layer (`docs/training.md`), and the window of attention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct MemorySettings {
    /// Which memory.
    pub kind: MemoryKind,
    /// Rates of the EMA, each in (0, 1).
    pub rates: Vec<f32>,
    /// Whether the rates are trained too.
    pub learn_rates: bool,
    /// Whether levels are divided by 1 - b^n.
    pub bias_correction: bool,
    /// Width inside the router; 0 is half of the queries' width.
    pub router_rank: usize,
    /// Gate before training: 0 is the pretrained model, 1 the published FastMKA.
    pub initial_gate: f32,
    /// Whether the mean of older chunks that a query recalls is one more level of the router.
    pub recalled_vector: bool,
    /// Tokens that attention sees exactly; 0 sees the whole sequence.
    pub window_tokens: usize,
    /// First tokens of the sequence that stay visible beyond the window.
    pub sink_tokens: usize,
    /// Tokens that each key/value head recalls from everything older than its window, chosen as a session chooses them;
    /// whole pages of 64, 0 recalls nothing.
    pub recall_tokens: usize,
    /// Layers below this one recall nothing but what fits whole, as in a session.
    pub recall_first_layer: usize,
}

impl Default for MemorySettings {
    fn default() -> Self {
        Self {
            kind: MemoryKind::default(),
            rates: vec![0.9, 0.99, 0.999],
            learn_rates: false,
            bias_correction: true,
            router_rank: 0,
            initial_gate: 0.0,
            recalled_vector: false,
            window_tokens: 0,
            sink_tokens: 64,
            recall_tokens: 0,
            recall_first_layer: 3,
        }
    }
}

impl MemorySettings {
    fn check_recall(&self) -> Result<()> {
        let tokens = self.recall_tokens;
        let whole = tokens.is_multiple_of(PAGE_TOKENS) && tokens < 1 << 28;
        let pages = format!("whole pages of {PAGE_TOKENS} tokens, below 2^28");
        expect(whole, "memory.recall_tokens", &tokens, &pages)?;
        let windowed = tokens == 0 || self.window_tokens > 0;
        expect(windowed, "memory.window_tokens", &0, "a window for memory.recall_tokens to add to")
    }

    /// Refuses what no model of `layers` layers could use.
    ///
    /// # Errors
    /// The setting by name: what was expected, what was found.
    pub(super) fn check_layers(&self, layers: usize) -> Result<()> {
        let first = self.recall_first_layer;
        let fits = self.recall_tokens == 0 || first < layers;
        expect(fits, "memory.recall_first_layer", &first, &format!("below the {layers} layers"))
    }
}

/// Which parameters are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum TrainMode {
    /// All of them.
    Full,
    /// Gate, router and learned rates.
    Gate,
    /// Those, and low-rank adapters of the projections.
    #[default]
    Lora,
}

/// What is trained and how long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainSettings {
    /// Which parameters.
    pub mode: TrainMode,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences of one forward pass, on each process.
    pub batch: usize,
    /// Passes whose gradients one step adds up.
    pub accumulate: usize,
    /// Neighbouring processes that share one model, each with its heads and its part of the MLP; 1: each has its own.
    #[serde(skip_serializing_if = "is_one")]
    pub tensor_parallel: usize,
    /// Forget activations and compute them again in the backward pass: a layer's worth of memory, a third more time.
    pub checkpoint_activations: bool,
    /// Share of the loss that is the divergence from the same model with dense attention; the rest is the text's.
    pub distill: f64,
    /// Steps between measurements of the held-out loss; 0 measures at the end alone.
    pub evaluate_every: u64,
    /// Held-out sequences measured.
    pub evaluate_sequences: usize,
    /// Steps between checkpoints; 0 writes one at the end.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
}

impl Default for TrainSettings {
    fn default() -> Self {
        Self {
            mode: TrainMode::default(),
            steps: 100,
            batch: 1,
            accumulate: 1,
            tensor_parallel: 1,
            checkpoint_activations: false,
            distill: 0.0,
            evaluate_every: 0,
            evaluate_sequences: 8,
            save_every: 0,
            keep: 2,
        }
    }
}

/// A run in which no model is shared is written as it always was: its checkpoints go on.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands out a reference")]
fn is_one(number: &usize) -> bool {
    *number == 1
}

/// Low-rank adapters (arXiv 2106.09685): W + alpha / rank · B A, B zero at the start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LoraSettings {
    /// Rank of A and B.
    pub rank: usize,
    /// Scale of their product, over the rank.
    pub alpha: f64,
    /// Projections that have one: of q, k, v, o, gate, up, down.
    pub targets: Vec<String>,
}

impl Default for LoraSettings {
    fn default() -> Self {
        let targets = ["q", "k", "v", "o"].map(str::to_owned).to_vec();
        Self { rank: 16, alpha: 32.0, targets }
    }
}

/// AdamW (arXiv 1711.05101) with linear warm-up and a cosine to `final_ratio` of the learning rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct OptimizerSettings {
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Factor on the learning rate of gate, router and rates.
    pub memory_ratio: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Learning rate of the last step over the highest.
    pub final_ratio: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Under the root.
    pub eps: f64,
    /// Decay of matrices; vectors, gates and rates have none.
    pub weight_decay: f64,
    /// Largest norm of all gradients together; 0 does not clip.
    pub clip_norm: f64,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        Self {
            learning_rate: 3e-4,
            memory_ratio: 1.0,
            warmup_steps: 10,
            final_ratio: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.0,
            clip_norm: 1.0,
        }
    }
}

/// The projections that an adapter can stand on.
pub(super) const LORA_TARGETS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

impl TrainingConfig {
    /// Reads a TOML file; relative paths in it are relative to the working folder.
    ///
    /// # Errors
    /// If the file cannot be read, has a key that is not known, or a value outside its range: by name.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|e| Error::io("read training file", path, e))?;
        let config: Self = toml::from_str(&text).map_err(|source| {
            Error::invalid(format!("training file {}: {}", path.display(), source.message()))
                .with_source(source)
        })?;
        config.check()?;
        Ok(config)
    }

    /// The configuration as TOML.
    pub(super) fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|source| {
            Error::invalid(format!("training configuration: {source}")).with_source(source)
        })
    }

    /// Where the run is to be; an empty name is the processor.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no device's.
    pub fn device(&self) -> Result<crate::Device> {
        match self.device.as_str() {
            "" => Ok(crate::Device::Cpu),
            name => name.parse(),
        }
    }

    /// Refuses values that no run could use.
    ///
    /// # Errors
    /// The first such value: what was expected, what was found.
    pub(super) fn check(&self) -> Result<()> {
        let above_zero = [
            ("train.steps", self.train.steps as usize),
            ("train.batch", self.train.batch),
            ("train.accumulate", self.train.accumulate),
            ("train.tensor_parallel", self.train.tensor_parallel),
            ("train.keep", self.train.keep),
            ("train.evaluate_sequences", self.train.evaluate_sequences),
            ("lora.rank", self.lora.rank),
        ];
        for (name, value) in above_zero {
            expect(value > 0, name, &value, "above 0")?;
        }
        expect(!self.output.as_os_str().is_empty(), "output", &"none", "a folder")?;
        let tokens = self.data.sequence_tokens;
        expect(tokens >= 2, "data.sequence_tokens", &tokens, "at least 2")?;
        expect(!self.data.train.is_empty(), "data.train", &"none", "text files")?;
        expect(!self.data.held_out.is_empty(), "data.held_out", &"none", "text files")?;
        let twice = self.data.train.iter().find(|path| self.data.held_out.contains(path));
        if let Some(path) = twice {
            return Err(Error::invalid(format!(
                "data.held_out: {} is trained on too, expected other files",
                path.display()
            )));
        }
        if self.model.source.is_some() == self.model.scratch.is_some() {
            return Err(Error::invalid("model: expected one of source and scratch"));
        }
        if let Some(scratch) = &self.model.scratch {
            scratch.check(self)?;
        }
        let memory = &self.memory;
        for rate in &memory.rates {
            expect(*rate > 0.0 && *rate < 1.0, "memory.rates", rate, "between 0 and 1")?;
        }
        if memory.kind != MemoryKind::None {
            let number = memory.rates.len();
            let fits = (1..=mka_kernels::MAX_RATES).contains(&number);
            let most = format!("1 to {}", mka_kernels::MAX_RATES);
            expect(fits, "memory.rates: number", &number, &most)?;
        } else if self.train.mode != TrainMode::Full {
            expect(self.train.mode == TrainMode::Lora, "train.mode", &"gate", "a memory to train")?;
        }
        memory.check_recall()?;
        let fits =
            !memory.recalled_vector || memory.kind != MemoryKind::None && memory.window_tokens > 0;
        let expected = "false without a memory (memory.kind) and a window (memory.window_tokens)";
        expect(fits, "memory.recalled_vector", &memory.recalled_vector, expected)?;
        expect(
            memory.initial_gate.is_finite(),
            "memory.initial_gate",
            &memory.initial_gate,
            "a number",
        )?;
        for target in &self.lora.targets {
            let known = LORA_TARGETS.contains(&target.as_str());
            expect(known, "lora.targets", target, &format!("one of {LORA_TARGETS:?}"))?;
        }
        let share = self.train.distill;
        expect((0.0..=1.0).contains(&share), "train.distill", &share, "between 0 and 1")?;
        self.optimizer.check()
    }
}

impl OptimizerSettings {
    fn check(&self) -> Result<()> {
        let positive =
            [("optimizer.learning_rate", self.learning_rate), ("optimizer.eps", self.eps)];
        for (name, value) in positive {
            expect(value > 0.0 && value.is_finite(), name, &value, "above 0")?;
        }
        let fractions = [("optimizer.beta1", self.beta1), ("optimizer.beta2", self.beta2)];
        for (name, value) in fractions {
            expect((0.0..1.0).contains(&value), name, &value, "in [0, 1)")?;
        }
        let others = [
            ("optimizer.memory_ratio", self.memory_ratio),
            ("optimizer.final_ratio", self.final_ratio),
            ("optimizer.weight_decay", self.weight_decay),
            ("optimizer.clip_norm", self.clip_norm),
        ];
        for (name, value) in others {
            expect(value >= 0.0 && value.is_finite(), name, &value, "0 or above")?;
        }
        Ok(())
    }
}

impl ScratchSettings {
    /// Width of a head.
    pub(super) fn head_dim(&self) -> usize {
        self.hidden / self.heads.max(1)
    }

    fn check(&self, config: &TrainingConfig) -> Result<()> {
        let positive = [
            ("model.scratch.hidden", self.hidden),
            ("model.scratch.layers", self.layers),
            ("model.scratch.heads", self.heads),
            ("model.scratch.kv_heads", self.kv_heads),
            ("model.scratch.intermediate", self.intermediate),
        ];
        for (name, value) in positive {
            expect(value > 0 && value < 1 << 20, name, &value, "above 0 and below 2^20")?;
        }
        let grouped = self.heads.is_multiple_of(self.kv_heads);
        expect(grouped, "model.scratch.kv_heads", &self.kv_heads, "a divisor of heads")?;
        let even = self.hidden.is_multiple_of(self.heads) && self.head_dim().is_multiple_of(2);
        expect(even, "model.scratch.heads", &self.heads, "hidden / heads a whole, even number")?;
        let mode = config.train.mode == TrainMode::Full;
        expect(mode, "train.mode", &"gate or lora", "full for a model from scratch")?;
        if let Some(latent) = self.latent {
            let name = "model.scratch.latent";
            let fits = latent.rank > 0 && latent.rope_dim > 0 && latent.rope_dim.is_multiple_of(2);
            expect(fits, name, &format!("{latent:?}"), "a rank above 0, an even rope_dim above 0")?;
            let plain = config.memory.kind == MemoryKind::None && config.memory.window_tokens == 0;
            expect(plain, name, &"a memory or window", "memory.kind = \"none\" and no window")?;
        }
        Ok(())
    }
}

fn expect(holds: bool, name: &str, found: &dyn std::fmt::Display, expected: &str) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Error::invalid(format!("{name}: {found}, expected {expected}"))),
    }
}

//! Training: a pretrained model becomes a memory model, or a new one is trained to compare kinds of attention.
//! Knows no session: what it writes, the engine loads as any other model.
//!
//! A [`TrainingConfig`] is one TOML file; a [`Trainer`] runs it and goes on where it stopped. `engine/docs/training.md`
//! says how, with what was measured.

mod base;
mod checkpoint;
mod collective;
mod config;
mod corpus;
mod decode;
mod device;
mod export;
mod inspect;
mod latent;
mod layers;
mod loss;
mod model;
mod operations;
mod optimizer;
mod parameters;
mod reduce;
mod trainer;

#[cfg(test)]
mod tests;

pub use collective::{Collective, TcpCollective};
pub use config::{
    DataSettings, LatentSettings, LoraSettings, MemoryKind, MemorySettings, ModelSettings,
    OptimizerSettings, Precision, ScratchSettings, TrainMode, TrainSettings, TrainingConfig,
};
pub use decode::DecodeReport;
pub use device::peak_device_bytes;
pub use inspect::{Inspection, inspect};
pub use trainer::{Comparison, Evaluation, StepReport, Trainer, merge, read_log};

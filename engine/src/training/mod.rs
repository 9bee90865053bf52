//! Training: a pretrained model becomes a memory model, or a new one is trained to compare kinds of attention.
//! Knows no session: what it writes, the engine loads as any other model.
//!
//! A [`TrainingConfig`] is one TOML file; a [`Trainer`] runs it and goes on where it stopped. `engine/docs/training.md`
//! says how, with what was measured.

mod base;
mod cache;
mod checkpoint;
mod choice;
mod config;
mod corpus;
mod decode;
mod device;
mod export;
mod grouped;
mod held_out;
mod inspect;
mod latent;
mod layers;
mod log;
mod loss;
mod model;
mod operations;
mod optimizer;
mod parameters;
mod parts;
mod recall;
mod reduce;
mod seen;
mod summary;
mod tensor_group;
mod trainer;
mod vector;

#[cfg(test)]
mod tests;

pub use config::{
    DataSettings, LatentSettings, LoraSettings, MemoryKind, MemorySettings, ModelSettings,
    OptimizerSettings, Precision, ScratchSettings, TrainMode, TrainSettings, TrainingConfig,
};
pub use decode::DecodeReport;
pub use device::peak_device_bytes;
pub use held_out::{Comparison, Evaluation};
pub use inspect::{Inspection, inspect};
pub use log::{StepReport, read_log};
pub use trainer::{Trainer, merge};

//! What a model folder or a run holds, without running it.
//! Knows no forward pass.

use super::checkpoint::{self, Checkpoint};
use crate::error::{Error, ErrorKind, Result};
use crate::models::config::DecoderConfig;
use crate::models::weights::Weights;
use std::fmt;
use std::path::Path;

/// What [`inspect`] found.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// Family and shape of a model folder; none of a run.
    pub model: Option<String>,
    /// Steps of the run's newest whole checkpoint; none of a model folder.
    pub step: Option<u64>,
    /// Numbers in the weights, or in the run's trained tensors.
    pub parameters: usize,
    /// Rates of the EMA; none without memory, and of a run that does not learn them.
    pub rates: Vec<f32>,
    /// The gate of every layer that has one, in their order.
    pub gates: Vec<f32>,
    /// Width inside the router.
    pub router_rank: Option<usize>,
}

/// Reads a HuggingFace folder, with its memory if it has one, or the newest checkpoint of a run.
///
/// # Errors
/// `NotFound` if the folder is neither; else as loading a model or going on with a run.
pub fn inspect(folder: &Path) -> Result<Inspection> {
    if !checkpoint::list(folder)?.is_empty() {
        return run(folder);
    }
    if !folder.join("config.json").exists() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "inspect {}: expected config.json or checkpoints, found neither",
                folder.display()
            ),
        ));
    }
    let path = folder.join("config.json");
    let text =
        std::fs::read_to_string(&path).map_err(|e| Error::io("read model file", &path, e))?;
    let c = DecoderConfig::from_json(&text)?;
    let weights = Weights::open_folder(folder)?;
    let gate = |layer: usize| format!("layers.{layer}.gate");
    let layers: Vec<usize> =
        (0..c.num_layers).filter(|layer| weights.contains(&gate(*layer))).collect();
    let gates = layers
        .iter()
        .map(|layer| Ok(weights.values(&gate(*layer), 1)?[0]))
        .collect::<Result<Vec<f32>>>()?;
    let router = layers.first().map(|layer| format!("layers.{layer}.router.down.weight"));
    Ok(Inspection {
        model: Some(format!(
            "{}, {} layers of {}, {} query and {} key/value heads of {}, {} tokens long",
            c.family,
            c.num_layers,
            c.hidden_size,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.trained_tokens
        )),
        step: None,
        parameters: weights.num_values(),
        rates: if gates.is_empty() { Vec::new() } else { c.mka.rates },
        gates,
        router_rank: router.and_then(|name| weights.rows(&name)),
    })
}

fn run(folder: &Path) -> Result<Inspection> {
    let checkpoint = Checkpoint::newest(folder)?.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("inspect {}: no checkpoint", folder.display()))
    })?;
    let trained = checkpoint.trained();
    let values = |name: &str| -> Result<Option<Vec<f32>>> {
        Ok(trained.get(name).map(|tensor| tensor.flatten_all()?.to_vec1()).transpose()?)
    };
    let mut gates = Vec::new();
    while let Some(gate) = values(&format!("layers.{}.gate", gates.len()))? {
        gates.extend(gate);
    }
    let logits = values(crate::parallel::RATES)?.unwrap_or_default();
    let router = trained.get("layers.0.router.down.weight");
    Ok(Inspection {
        model: None,
        step: Some(checkpoint.state.step),
        parameters: trained.values().map(|tensor| tensor.elem_count()).sum(),
        rates: logits.into_iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect(),
        gates,
        router_rank: router.map(|tensor| tensor.dims()[0]),
    })
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(model) = &self.model {
            writeln!(f, "model: {model}")?;
        }
        if let Some(step) = self.step {
            writeln!(f, "checkpoint of step: {step}")?;
        }
        let what = if self.step.is_some() { "trained parameters" } else { "parameters" };
        writeln!(f, "{what}: {}", self.parameters)?;
        if !self.rates.is_empty() {
            writeln!(f, "rates: {:?}", self.rates)?;
        }
        if let Some(rank) = self.router_rank {
            writeln!(f, "router rank: {rank}")?;
        }
        let gates: Vec<String> = self.gates.iter().map(|gate| format!("{gate:.4}")).collect();
        match gates.is_empty() {
            true => write!(f, "gates: none"),
            false => write!(f, "gates by layer: {}", gates.join(" ")),
        }
    }
}

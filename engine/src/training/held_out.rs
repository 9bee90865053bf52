//! The loss on text that is never trained on, inside the window and beyond it.
//! Knows no optimizer and no file.

use super::corpus::Corpus;
use super::model::{Batch, TrainModel, View};
use crate::error::Result;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Loss over held-out sequences.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Evaluation {
    /// Mean over tokens, in nats.
    pub loss: f64,
    /// e^loss.
    pub perplexity: f64,
    /// Mean over the tokens whose whole past is inside the window; all without a window.
    pub inside_window: f64,
    /// Mean over the others; none without a window.
    pub beyond_window: Option<f64>,
    /// Tokens measured.
    pub tokens: usize,
    /// Time it took.
    pub seconds: f64,
}

/// The held-out loss of the trained model beside what it lies between.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The untouched model with the whole sequence.
    pub dense: Evaluation,
    /// The untouched model behind the window and the sinks.
    pub windowed: Evaluation,
    /// The same with what is recalled; none in a run that recalls nothing.
    pub recalled: Option<Evaluation>,
    /// The trained model.
    pub trained: Evaluation,
    /// The trained model with every gate shut: what adapters, and recall where the run has it, do alone.
    pub without_memory: Evaluation,
}

impl Comparison {
    /// Share of the gap between windowed and dense that is closed beyond the window; none without a window.
    pub fn gap_closed(&self, of: &Evaluation) -> Option<f64> {
        let (windowed, dense) = (self.windowed.beyond_window?, self.dense.beyond_window?);
        Some((windowed - of.beyond_window?) / (windowed - dense))
    }
}

/// Loss of `model` as `view` over `count` sequences of `corpus`, spread over the whole text.
pub(super) fn measure(
    model: &TrainModel,
    view: View,
    corpus: &Corpus,
    count: usize,
    window: usize,
) -> Result<Evaluation> {
    let started = Instant::now();
    let count = count.min(corpus.len());
    let (mut inside, mut beyond) = ((0.0, 0usize), (0.0, 0usize));
    for i in 0..count {
        let (inputs, targets) = corpus.sequence(i * corpus.len() / count);
        let batch = Batch { inputs: inputs.to_vec(), targets: targets.to_vec(), sequences: 1 };
        for (position, loss) in model.losses(&batch, view)?.into_iter().enumerate() {
            let (sum, tokens) = if position < window { &mut inside } else { &mut beyond };
            *sum += f64::from(loss);
            *tokens += 1;
        }
    }
    let loss = (inside.0 + beyond.0) / (inside.1 + beyond.1) as f64;
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        inside_window: inside.0 / inside.1 as f64,
        beyond_window: (beyond.1 > 0).then(|| beyond.0 / beyond.1 as f64),
        tokens: inside.1 + beyond.1,
        seconds: started.elapsed().as_secs_f64(),
    })
}

//! AdamW with decoupled decay, its schedule, and clipping by the norm of all gradients.
//! Knows no model: parameters, gradients and a step number.

use super::config::OptimizerSettings;
use super::model::Gradients;
use super::parameters::Parameter;
use crate::error::Result;
use candle_core::{DType, Tensor};

/// First and second moments of every parameter, f32.
pub(super) struct AdamW {
    pub(super) first: Vec<Tensor>,
    pub(super) second: Vec<Tensor>,
}

impl AdamW {
    pub(super) fn new(parameters: &[Parameter]) -> Result<Self> {
        let zeros = || -> Result<Vec<Tensor>> {
            parameters
                .iter()
                .map(|parameter| {
                    let like = parameter.master();
                    Ok(Tensor::zeros(like.shape(), DType::F32, like.device())?)
                })
                .collect()
        };
        Ok(Self { first: zeros()?, second: zeros()? })
    }

    /// Applies `gradients` as step `step` (from 1) of `steps`; returns their norm before clipping, and the learning rate.
    ///
    /// A norm that is no number changes nothing: the caller sees it and stops.
    pub(super) fn step(
        &mut self,
        settings: &OptimizerSettings,
        parameters: &[Parameter],
        gradients: &Gradients,
        (step, steps): (u64, u64),
    ) -> Result<(f64, f64)> {
        let norm = norm(parameters, gradients)?;
        let rate = learning_rate(settings, step, steps);
        if !norm.is_finite() {
            return Ok((norm, rate));
        }
        let clip = settings.clip_norm;
        let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let (beta1, beta2) = (settings.beta1, settings.beta2);
        let power = step.min(i32::MAX as u64) as i32;
        let (correct1, correct2) = (1.0 - beta1.powi(power), 1.0 - beta2.powi(power));
        for (i, parameter) in parameters.iter().enumerate() {
            let Some(gradient) = gradients.get(i) else { continue };
            let gradient = (gradient * scale)?;
            let first = ((&self.first[i] * beta1)? + (&gradient * (1.0 - beta1))?)?;
            let second = ((&self.second[i] * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let root = ((&second / correct2)?.sqrt()? + settings.eps)?;
            let mut change = ((&first / correct1)? / root)?;
            let master = parameter.master();
            let memory = parameter.is_memory();
            if settings.weight_decay > 0.0 && master.rank() > 1 && !memory {
                change = (change + (master * settings.weight_decay)?)?;
            }
            let rate = if memory { rate * settings.memory_ratio } else { rate };
            parameter.set(&(master - (change * rate)?)?)?;
            (self.first[i], self.second[i]) = (first, second);
        }
        Ok((norm, rate))
    }
}

/// Norm of all gradients together, summed in f64 in the order of the parameters.
fn norm(parameters: &[Parameter], gradients: &Gradients) -> Result<f64> {
    let squares: Vec<Tensor> = (0..parameters.len())
        .filter_map(|i| gradients.get(i))
        .map(|gradient| Ok(gradient.sqr()?.sum_all()?))
        .collect::<Result<_>>()?;
    if squares.is_empty() {
        return Ok(0.0);
    }
    let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
    Ok(squares.iter().map(|square| f64::from(*square)).sum::<f64>().sqrt())
}

/// Linear warm-up, then half a cosine down to `final_ratio` at the last step.
pub(super) fn learning_rate(settings: &OptimizerSettings, step: u64, steps: u64) -> f64 {
    let highest = settings.learning_rate;
    let warmup = settings.warmup_steps.min(steps);
    if step <= warmup {
        return highest * step as f64 / warmup.max(1) as f64;
    }
    let progress = (step - warmup) as f64 / (steps - warmup).max(1) as f64;
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
    highest * (settings.final_ratio + (1.0 - settings.final_ratio) * cosine)
}

//! AdamW with decoupled decay, its schedule, and clipping by the norm of all gradients.
//! Knows no model: parameters, gradients and a step number.

use super::config::OptimizerSettings;
use super::model::Gradients;
use super::parameters::Parameter;
use crate::error::Result;
use crate::parallel::{Placement, TensorGroup};
use candle_core::{DType, Tensor};

/// First and second moments of every parameter, f32.
///
/// Parameters with the same settings are updated as one long vector: a model has hundreds of small ones, and on a card
/// an operation on each would cost its launch many times over.
pub(super) struct AdamW {
    groups: Vec<Group>,
    /// The processes that share the model: moments are of this one's parts.
    sharing: TensorGroup,
}

/// Parameters that are updated alike.
struct Group {
    /// Index and shape of each, in order.
    members: Vec<(usize, Vec<usize>)>,
    decays: bool,
    memory: bool,
    /// (values of all members).
    first: Tensor,
    second: Tensor,
}

impl Group {
    /// The group's own learning rate where the model's is `rate`.
    fn rate(&self, settings: &OptimizerSettings, rate: f64) -> f64 {
        if self.memory { rate * settings.memory_ratio } else { rate }
    }

    /// Where `flat` (values of all members) holds each member, with its shape.
    fn split<'a>(
        &'a self,
        flat: &'a Tensor,
    ) -> impl Iterator<Item = (usize, candle_core::Result<Tensor>)> + 'a {
        let mut start = 0;
        self.members.iter().map(move |(index, shape)| {
            let len = shape.iter().product();
            let part = flat.narrow(0, start, len).and_then(|part| part.reshape(shape.as_slice()));
            start += len;
            (*index, part)
        })
    }

    /// What `of` gives for each member, as one vector.
    fn join(&self, mut of: impl FnMut(usize, &[usize]) -> Result<Tensor>) -> Result<Tensor> {
        let parts: Vec<Tensor> = self
            .members
            .iter()
            .map(|(index, shape)| Ok(of(*index, shape)?.flatten_all()?))
            .collect::<Result<_>>()?;
        Ok(Tensor::cat(&parts, 0)?)
    }
}

impl AdamW {
    pub(super) fn new(parameters: &[Parameter], sharing: &TensorGroup) -> Result<Self> {
        let mut groups = Vec::new();
        for (decays, memory) in [(true, false), (false, false), (false, true)] {
            let members: Vec<_> = parameters
                .iter()
                .enumerate()
                .map(|(index, parameter)| (index, parameter, parameter.master().dims().to_vec()))
                .filter(|(_, parameter, shape)| {
                    parameter.is_memory() == memory && (shape.len() > 1 && !memory) == decays
                })
                .map(|(index, _, shape)| (index, shape))
                .collect();
            let Some((index, _)) = members.first() else { continue };
            let device = parameters[*index].master().device();
            let len: usize = members.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
            let first = Tensor::zeros(len, DType::F32, device)?;
            // Not a clone, which would be the same memory: a card's update writes in place.
            let second = Tensor::zeros(len, DType::F32, device)?;
            groups.push(Group { members, decays, memory, first, second });
        }
        Ok(Self { groups, sharing: sharing.clone() })
    }

    /// First and second moment of every parameter, by its index.
    pub(super) fn moments(&self) -> Result<Vec<(usize, Tensor, Tensor)>> {
        let mut all = Vec::new();
        for group in &self.groups {
            for ((index, first), (_, second)) in
                group.split(&group.first).zip(group.split(&group.second))
            {
                all.push((index, first?, second?));
            }
        }
        Ok(all)
    }

    /// Puts back what [`AdamW::moments`] gave: `of` is asked for the first and the second moment of each parameter.
    pub(super) fn restore(
        &mut self,
        mut of: impl FnMut(usize, &str) -> Result<Tensor>,
    ) -> Result<()> {
        for group in &mut self.groups {
            let first = group.join(|index, _| of(index, "first"))?;
            let second = group.join(|index, _| of(index, "second"))?;
            (group.first, group.second) = (first, second);
        }
        Ok(())
    }

    /// Applies `gradients` as step `step` (from 1) of `steps`; returns their norm before clipping, and the learning rate.
    ///
    /// A parameter without a gradient has one of 0. A norm that is no number changes nothing: the caller sees it and
    /// stops.
    pub(super) fn step(
        &mut self,
        settings: &OptimizerSettings,
        parameters: &[Parameter],
        gradients: &Gradients,
        (step, steps): (u64, u64),
    ) -> Result<(f64, f64)> {
        #[cfg(feature = "cuda")]
        if self.groups.first().is_some_and(|group| group.first.device().is_cuda()) {
            return self.step_on_card(settings, parameters, gradients, (step, steps));
        }
        let mut flat = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            let device = group.first.device();
            flat.push(group.join(|index, shape| match gradients.get(index) {
                Some(gradient) => Ok(gradient.clone()),
                None => Ok(Tensor::zeros(shape, DType::F32, device)?),
            })?);
        }
        let squares = self.squares(parameters, gradients, |some| {
            some.iter().map(|gradient| square_sum(&gradient.flatten_all()?)).sum()
        })?;
        let (norm, rate) = (squares.sqrt(), learning_rate(settings, step, steps));
        if !norm.is_finite() {
            return Ok((norm, rate));
        }
        let scale = clip_scale(settings, norm);
        let (beta1, beta2) = (settings.beta1, settings.beta2);
        let (correct1, correct2) = corrections(settings, step);
        for (group, gradient) in self.groups.iter_mut().zip(flat) {
            let gradient = (gradient * scale)?;
            let first = ((&group.first * beta1)? + (&gradient * (1.0 - beta1))?)?;
            let second = ((&group.second * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let root = ((&second / correct2)?.sqrt()? + settings.eps)?;
            let mut change = ((&first / correct1)? / root)?;
            let master = group.join(|index, _| Ok(parameters[index].master().clone()))?;
            if settings.weight_decay > 0.0 && group.decays {
                change = (change + (&master * settings.weight_decay)?)?;
            }
            let rate = group.rate(settings, rate);
            let master = (master - (change * rate)?)?;
            for (index, value) in group.split(&master) {
                parameters[index].set(&value?)?;
            }
            (group.first, group.second) = (first, second);
        }
        Ok((norm, rate))
    }

    /// Sum of the squares of the whole model's gradients, `of` giving that of some.
    ///
    /// What every process has counts once, the parts of what is divided all count.
    fn squares(
        &self,
        parameters: &[Parameter],
        gradients: &Gradients,
        of: impl Fn(&[Tensor]) -> Result<f64>,
    ) -> Result<f64> {
        let (mut parts, mut whole) = (Vec::new(), Vec::new());
        for (index, parameter) in parameters.iter().enumerate() {
            let divided = Placement::of(&parameter.name).split().is_some();
            let some = if divided && !self.sharing.is_alone() { &mut parts } else { &mut whole };
            some.extend(gradients.get(index).cloned());
        }
        let mut mine = of(&parts)?;
        if self.sharing.index() == 0 {
            mine += of(&whole)?;
        }
        self.sharing.total(mine)
    }

    /// [`AdamW::step`] as one launch a parameter, in place.
    #[cfg(feature = "cuda")]
    fn step_on_card(
        &mut self,
        settings: &OptimizerSettings,
        parameters: &[Parameter],
        gradients: &Gradients,
        (step, steps): (u64, u64),
    ) -> Result<(f64, f64)> {
        let norm =
            self.squares(parameters, gradients, |some| Ok(mka_kernels::square_sum(some)?))?.sqrt();
        let rate = learning_rate(settings, step, steps);
        if !norm.is_finite() {
            return Ok((norm, rate));
        }
        let (correct1, correct2) = corrections(settings, step);
        for group in &self.groups {
            let numbers = mka_kernels::AdamWStep {
                scale: clip_scale(settings, norm) as f32,
                betas: (settings.beta1 as f32, settings.beta2 as f32),
                corrections: (correct1 as f32, correct2 as f32),
                eps: settings.eps as f32,
                weight_decay: if group.decays { settings.weight_decay as f32 } else { 0.0 },
                rate: group.rate(settings, rate) as f32,
            };
            let moments = group.split(&group.first).zip(group.split(&group.second));
            for ((index, first), (_, second)) in moments {
                let parameter = &parameters[index];
                let moments = (&first?, &second?);
                let (gradient, value) = (gradients.get(index), parameter.rounded());
                mka_kernels::adamw(gradient, parameter.master(), value, moments, &numbers)?;
            }
        }
        Ok((norm, rate))
    }
}

/// Factor on the gradients so that their norm is at most `clip_norm`.
fn clip_scale(settings: &OptimizerSettings, norm: f64) -> f64 {
    let clip = settings.clip_norm;
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

/// 1 - beta^step of both moments.
fn corrections(settings: &OptimizerSettings, step: u64) -> (f64, f64) {
    let power = step.min(i32::MAX as u64) as i32;
    (1.0 - settings.beta1.powi(power), 1.0 - settings.beta2.powi(power))
}

/// Sum of the squares of a vector: rows in f32, and the rows in f64 in their order.
fn square_sum(flat: &Tensor) -> Result<f64> {
    /// Values of a row: short enough for a sum in f32, long enough that few sums travel.
    const ROW: usize = 4096;
    let squares = flat.sqr()?;
    let whole = flat.elem_count() / ROW * ROW;
    let mut sums = Vec::new();
    if whole > 0 {
        let rows = squares.narrow(0, 0, whole)?.reshape((whole / ROW, ROW))?;
        sums = rows.sum(1)?.to_vec1::<f32>()?;
    }
    let rest = squares.narrow(0, whole, flat.elem_count() - whole)?;
    if rest.elem_count() > 0 {
        sums.push(rest.sum_all()?.to_scalar()?);
    }
    Ok(sums.into_iter().map(f64::from).sum())
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

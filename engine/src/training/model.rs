//! The decoder in training: layers, head, and gradients of one batch, a layer at a time.
//! Knows no optimizer and no file; a gradient is handed out as soon as its layer is done.

use super::config::{MemoryKind, MemorySettings, TrainMode, TrainingConfig};
use super::decode;
use super::layers::{Blueprint, Layer, Pass, PassRecall};
use super::loss::{self, CHUNK};
use super::operations::{rms_norm, sum_by_token};
use super::parameters::{Builder, Parameter, Source};
use super::summary::Rates;
use crate::error::{Error, ErrorKind, Result};
use crate::models::config::DecoderConfig;
use crate::models::device::ModelDevice;
use crate::models::frequencies::Frequencies;
use crate::models::weights::Weights;
use crate::parallel::{Placement, RATES, TensorGroup};
use candle_core::{DType, Device, Tensor};
use mka_kernels::RotaryAngles;
use mka_kernels::tape::{self, Value, ops};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// As what the model reads: what is measured, and what a student is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// All that is trained.
    Trained,
    /// The same with every gate shut.
    WithoutMemory,
    /// The untouched model behind the window and the sinks.
    Windowed,
    /// The same with what is recalled.
    Recalled,
    /// The untouched model with the whole sequence: the teacher.
    Dense,
}

/// Some sequences: inputs and targets row after row.
pub(super) struct Batch {
    pub(super) inputs: Vec<u32>,
    pub(super) targets: Vec<u32>,
    pub(super) sequences: usize,
}

/// Gradients by index of the parameter, f32, added up over passes.
pub(super) struct Gradients {
    sums: Vec<Option<Tensor>>,
}

impl Gradients {
    pub(super) fn new(parameters: usize) -> Self {
        Self { sums: vec![None; parameters] }
    }

    fn add(&mut self, index: usize, gradient: &Tensor) -> Result<()> {
        let gradient = gradient.to_dtype(DType::F32)?;
        let sum = &mut self.sums[index];
        *sum = Some(match sum.take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        });
        Ok(())
    }

    pub(super) fn get(&self, index: usize) -> Option<&Tensor> {
        self.sums[index].as_ref()
    }

    /// The sum so far, which is then the caller's alone.
    fn take(&mut self, index: usize) -> Option<Tensor> {
        self.sums[index].take()
    }

    pub(super) fn replace(&mut self, index: usize, gradient: Tensor) {
        self.sums[index] = Some(gradient);
    }

    /// Those of `indexes` end to end, as one vector; `indexes` are of parameters with a gradient.
    pub(super) fn joined(&self, indexes: &[usize]) -> Result<Tensor> {
        let values: Vec<Tensor> = indexes
            .iter()
            .filter_map(|index| self.get(*index))
            .map(Tensor::flatten_all)
            .collect::<candle_core::Result<_>>()?;
        Ok(Tensor::cat(&values, 0)?)
    }

    /// Puts back what [`Gradients::joined`] gave of the same `indexes`.
    pub(super) fn replace_joined(&mut self, indexes: &[usize], joined: &Tensor) -> Result<()> {
        let mut start = 0;
        for index in indexes {
            let Some(gradient) = self.get(*index) else { continue };
            let mine = joined.narrow(0, start, gradient.elem_count())?;
            start += gradient.elem_count();
            let mine = mine.reshape(gradient.shape())?;
            self.replace(*index, mine);
        }
        Ok(())
    }
}

/// Hears which parameters have their whole gradient of a batch.
pub(super) type Finished<'a> = dyn FnMut(&mut Gradients, &[usize]) -> Result<()> + 'a;

/// A decoder whose trained tensors are variables.
pub(super) struct TrainModel {
    pub(super) config: DecoderConfig,
    frequencies: Frequencies,
    pub(super) group: TensorGroup,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Tensor,
    rates: Rates,
    pub(super) parameters: Vec<Parameter>,
    /// Every tensor by name, trained or not; of one that is divided this process's part.
    pub(super) tensors: BTreeMap<String, Tensor>,
    window_tokens: usize,
    sink_tokens: usize,
    recall: Option<PassRecall>,
    /// Of the last batch: every batch of a run has its shape.
    angles: Mutex<Option<(usize, usize, [RotaryAngles; 2])>>,
    device: ModelDevice,
}

impl TrainModel {
    /// The model that `config` trains, or with `frozen` its untouched twin.
    pub(super) fn load(
        decoder: DecoderConfig,
        weights: Option<&Weights>,
        config: &TrainingConfig,
        device: &Device,
        frozen: bool,
    ) -> Result<Self> {
        Self::load_part(decoder, weights, config, (device, &TensorGroup::alone()), frozen)
    }

    /// [`TrainModel::load`] of the part that this process of a tensor group has.
    ///
    /// # Errors
    /// As [`TrainModel::load`], and `InvalidArgument` for a model that the group cannot divide.
    pub(super) fn load_part(
        decoder: DecoderConfig,
        weights: Option<&Weights>,
        config: &TrainingConfig,
        (device, group): (&Device, &TensorGroup),
        frozen: bool,
    ) -> Result<Self> {
        // First of all: the card may fail while weights come to it.
        let owned = ModelDevice::new(device);
        let c = &decoder;
        config.memory.check_layers(c.num_layers)?;
        let scratch = config.model.scratch.as_ref();
        let latent = scratch.and_then(|scratch| scratch.latent);
        let undivided = match (latent, config.memory.recalled_vector) {
            (Some(_), _) => Some("latent attention"),
            // Its weights are the mean over every head.
            (None, true) => Some("memory.recalled_vector"),
            (None, false) => None,
        };
        group.check(c, undivided)?;
        let source = match weights {
            Some(weights) => Source::Pretrained(weights),
            None => Source::Scratch(config.seed),
        };
        let mode = (!frozen).then_some(config.train.mode);
        let builder = Builder::new(source, mode, config.precision, config.seed, device)?;
        let mut builder = builder.divided(group);
        let plain = MemorySettings { kind: MemoryKind::None, ..config.memory.clone() };
        let memory = if frozen { &plain } else { &config.memory };
        let rates = match memory.learn_rates && memory.kind != MemoryKind::None {
            true => {
                let logit = |rate: &f32| (rate / (1.0 - rate)).ln();
                let logits = memory.rates.iter().map(logit).collect();
                Rates::Learned(builder.given(RATES, logits)?)
            }
            false => Rates::Fixed {
                tensor: Tensor::from_slice(&memory.rates, memory.rates.len(), device)?,
                values: memory.rates.clone(),
            },
        };
        let blueprint = Blueprint {
            config: c,
            memory,
            lora: Some(&config.lora).filter(|_| mode == Some(TrainMode::Lora)),
            latent,
            rates: rates.clone(),
        };
        let embedding = builder.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size)?;
        let layers =
            (0..c.num_layers).map(|i| blueprint.layer(&mut builder, i)).collect::<Result<_>>()?;
        let norm = builder.vector("model.norm.weight", c.hidden_size, 1.0)?;
        let separate = weights.is_some_and(|weights| weights.contains("lm_head.weight"));
        let head = match c.tied_embeddings && !separate {
            true => embedding.clone(),
            false => builder.matrix("lm_head.weight", c.vocab_size, c.hidden_size)?,
        };
        let (parameters, tensors) = builder.finish()?;
        let frequencies = Frequencies::new(c.rope_theta, c.head_dim, &c.rope_scaling);
        let recall = (config.memory.recall_tokens > 0).then(|| PassRecall {
            tokens: config.memory.recall_tokens,
            first_layer: config.memory.recall_first_layer,
            window_angles: frequencies.angles([config.memory.window_tokens as u64]),
        });
        Ok(Self {
            frequencies,
            recall,
            device: owned,
            group: group.clone(),
            embedding,
            layers,
            norm,
            head,
            rates,
            parameters,
            tensors,
            window_tokens: config.memory.window_tokens,
            sink_tokens: config.memory.sink_tokens,
            angles: Mutex::new(None),
            config: decoder,
        })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// The rates of the EMA as they are now.
    pub(super) fn rates(&self) -> Result<Vec<f32>> {
        Ok(self.rates.values()?.to_vec1()?)
    }

    /// Every tensor by name, whole, f32, on the processor, trained ones as the optimizer keeps them: every process of the
    /// tensor group gives its parts, the first gets all, the others nothing.
    pub(super) fn whole(&self) -> Result<BTreeMap<String, Tensor>> {
        let masters: BTreeMap<&str, &Tensor> =
            self.parameters.iter().map(|p| (p.name.as_str(), p.master())).collect();
        let mut all = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let part = masters.get(name.as_str()).copied().unwrap_or(tensor);
            let whole = self.group.whole(name, part)?;
            if self.group.index() == 0 {
                all.insert(name.clone(), whole);
            }
        }
        Ok(all)
    }

    fn pass(&self, batch: &Batch, view: View) -> Pass {
        let b = batch.sequences;
        let t = batch.inputs.len() / b;
        let [row_angles, angles] = self.angles(b, t);
        Pass {
            b,
            t,
            angles,
            row_angles,
            memory: view == View::Trained,
            adapters: matches!(view, View::Trained | View::WithoutMemory),
            window_tokens: if view == View::Dense { 0 } else { self.window_tokens },
            sink_tokens: self.sink_tokens,
            recall: self.recall.clone().filter(|_| view != View::Windowed),
        }
    }

    /// Angles of one sequence of `t` tokens, and of `b` of them.
    fn angles(&self, b: usize, t: usize) -> [RotaryAngles; 2] {
        let mut last = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((sequences, tokens, angles)) if (*sequences, *tokens) == (b, t) => angles.clone(),
            _ => {
                let row = self.frequencies.angles(0..t as u64);
                let all = match b {
                    1 => row.clone(),
                    _ => self.frequencies.angles((0..b).flat_map(|_| 0..t as u64)),
                };
                *last = Some((b, t, [row.clone(), all.clone()]));
                [row, all]
            }
        }
    }

    /// The inputs of `batch` on the device: (n).
    fn ids(&self, batch: &Batch) -> Result<Tensor> {
        if let Some(id) = batch
            .inputs
            .iter()
            .chain(&batch.targets)
            .find(|id| **id as usize >= self.config.vocab_size)
        {
            return Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "train: token {id}, expected below the model's vocabulary of {}",
                    self.config.vocab_size
                ),
            ));
        }
        Ok(Tensor::from_slice(&batch.inputs, batch.inputs.len(), &self.device)?)
    }

    /// Hidden states before the first layer, without history: ids (n) -> (n, hidden).
    fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        Ok(self.embedding.index_select(ids, 0)?.detach())
    }

    pub(super) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// A pass over `t` tokens of one sequence after `start` others.
    pub(super) fn pass_from(&self, start: usize, t: usize) -> Pass {
        let positions = start as u64..(start + t) as u64;
        decode::pass(self.frequencies.angles(positions), t)
    }

    /// Hidden states before the first layer, without history: (n, hidden).
    pub(super) fn embed_ids(&self, ids: &[u32]) -> Result<Tensor> {
        let batch = Batch { inputs: ids.to_vec(), targets: Vec::new(), sequences: 1 };
        self.embed(&self.ids(&batch)?)
    }

    /// Logits of hidden states before the last norm: (n, vocab), f32.
    pub(super) fn logits_of(&self, hidden: &Tensor) -> Result<Tensor> {
        loss::logits(&rms_norm(hidden, &self.norm, self.config.rms_norm_eps)?, &self.head)
    }

    /// Hidden states after the last norm, without history: (n, hidden).
    fn hidden(&self, batch: &Batch, view: View) -> Result<Tensor> {
        let pass = self.pass(batch, view);
        let mut hidden = self.embed(&self.ids(batch)?)?;
        for layer in &self.layers {
            hidden = layer.forward(&Value::constant(&hidden), &pass)?.tensor().clone();
        }
        Ok(rms_norm(&hidden, &self.norm, self.config.rms_norm_eps)?.detach())
    }

    /// Loss in nats of every target, in the order of the batch.
    pub(super) fn losses(&self, batch: &Batch, view: View) -> Result<Vec<f32>> {
        loss::token_losses(&self.hidden(batch, view)?, &self.head, &batch.targets)
    }

    /// Logits of every token: (n, vocab), f32.
    #[cfg(test)]
    pub(super) fn logits(&self, batch: &Batch, view: View) -> Result<Tensor> {
        loss::logits(&self.hidden(batch, view)?, &self.head)
    }

    /// Adds the gradients of the mean loss over `total_tokens` tokens, of which `batch` holds a part; returns the sum
    /// of the losses of its tokens.
    ///
    /// Runs a layer at a time, so that with `recompute` only the layers' inputs are kept between forward and backward;
    /// the gradients are the same bits with and without.
    pub(super) fn backward(
        &self,
        batch: &Batch,
        total_tokens: usize,
        teacher: Option<(&TrainModel, f64)>,
        recompute: bool,
        gradients: &mut Gradients,
        finished: &mut Finished<'_>,
    ) -> Result<f64> {
        let pass = self.pass(batch, View::Trained);
        let ids = self.ids(batch)?;
        let mut hidden = self.embed(&ids)?;
        let mut segments = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let input = hidden;
            let out = layer.forward(&Value::leaf(&input), &pass)?;
            hidden = out.tensor().clone();
            segments.push((input, (!recompute).then_some(out)));
        }
        let (losses, mut dhidden) = self.head(batch, &hidden, total_tokens, teacher, gradients)?;
        drop(hidden);
        // What is trained in more than one place is whole at the end alone.
        let mut done = Vec::new();
        for (layer, (input, out)) in self.layers.iter().zip(segments).rev() {
            let out = match out {
                Some(out) => out,
                None => layer.forward(&Value::leaf(&input), &pass)?,
            };
            let mut store = tape::backward(&out, &dhidden)?;
            dhidden = store.remove(&input).ok_or_else(|| {
                Error::model("train: a layer without a gradient of its input, expected one")
            })?;
            let touched = self.collect(&mut store, gradients)?;
            let whole: Vec<usize> = touched
                .into_iter()
                .filter(|i| self.parameters[*i].name.contains("layers."))
                .collect();
            finished(gradients, &whole)?;
            done.extend(whole);
        }
        if let Some(index) = self.index_of(&self.embedding) {
            gradients.add(index, &sum_by_token(&ids, &dhidden, self.config.vocab_size)?)?;
        }
        let rest: Vec<usize> = (0..self.parameters.len())
            .filter(|i| !done.contains(i) && gradients.get(*i).is_some())
            .collect();
        finished(gradients, &rest)?;
        // Read last: the device has had its work by now.
        let losses = Tensor::cat(&losses, 0)?.to_vec1::<f32>()?;
        Ok(losses.into_iter().map(f64::from).sum())
    }

    /// Losses whose sum is that of all tokens, and the gradient of the hidden states before the last norm.
    fn head(
        &self,
        batch: &Batch,
        hidden: &Tensor,
        total_tokens: usize,
        teacher: Option<(&TrainModel, f64)>,
        gradients: &mut Gradients,
    ) -> Result<(Vec<Tensor>, Tensor)> {
        let eps = self.config.rms_norm_eps as f32;
        let (_, normed) = ops::norm(&Value::leaf(hidden), None, Some(&self.norm), eps)?;
        let taught = match teacher {
            Some((model, _)) => Some(model.hidden(batch, View::Dense)?),
            None => None,
        };
        let (mut losses, mut dnormed) = (Vec::new(), Vec::new());
        for (start, targets) in loss::chunks(&batch.targets) {
            let part = |x: &Tensor| x.narrow(0, start, targets.len());
            let logits = match (&taught, teacher) {
                (Some(taught), Some((model, share))) => {
                    Some((loss::logits(&part(taught)?, &model.head)?, share))
                }
                _ => None,
            };
            let teacher = logits.as_ref().map(|(logits, share)| (logits, *share));
            let scale = 1.0 / total_tokens as f64;
            let index = self.index_of(&self.head);
            let dweight = index.and_then(|index| gradients.take(index));
            let hidden = part(normed.tensor())?;
            let result = loss::head(&hidden, &self.head, targets, teacher, scale, dweight)?;
            losses.push(result.losses);
            dnormed.push(result.hidden);
            if let (Some(dweight), Some(index)) = (result.weight, index) {
                gradients.replace(index, dweight);
            }
        }
        debug_assert!(dnormed.len() == batch.targets.len().div_ceil(CHUNK));
        let mut store = tape::backward(&normed, &Tensor::cat(&dnormed, 0)?)?;
        let dhidden = store.remove(hidden).ok_or_else(|| {
            Error::model("train: the last norm without a gradient of its input, expected one")
        })?;
        self.collect(&mut store, gradients)?;
        Ok((losses, dhidden))
    }

    /// Adds up, over the tensor group, the gradients of which each process has the part that its own heads and columns
    /// give: once, when all passes are added up.
    pub(super) fn sum_shared(&self, gradients: &mut Gradients) -> Result<()> {
        let is_shared = |i: &usize| Placement::of(&self.parameters[*i].name) == Placement::Shared;
        let shared: Vec<usize> = (0..self.parameters.len())
            .filter(|i| is_shared(i) && gradients.get(*i).is_some())
            .collect();
        if self.group.is_alone() || shared.is_empty() {
            return Ok(());
        }
        let sum = self.group.sum(&gradients.joined(&shared)?)?;
        gradients.replace_joined(&shared, &sum)
    }

    fn index_of(&self, tensor: &Tensor) -> Option<usize> {
        self.parameters.iter().position(|parameter| parameter.value.as_tensor().id() == tensor.id())
    }

    /// Moves the parameters' gradients out of `store`; returns which had one.
    fn collect(
        &self,
        store: &mut tape::Gradients,
        gradients: &mut Gradients,
    ) -> Result<Vec<usize>> {
        let mut touched = Vec::new();
        for (i, parameter) in self.parameters.iter().enumerate() {
            if let Some(gradient) = store.remove(parameter.value.as_tensor()) {
                gradients.add(i, &gradient)?;
                touched.push(i);
            }
        }
        Ok(touched)
    }
}

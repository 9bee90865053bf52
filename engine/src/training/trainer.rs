//! A training run: data in order, steps, measurements, checkpoints, the log; from the start or from where it stopped.
//! Knows no terminal and no plot: it reports, and whoever runs it shows.

use super::base::Base;
use super::checkpoint::{self, Checkpoint, Contents, State};
use super::config::{Precision, TrainMode, TrainSettings, TrainingConfig};
use super::corpus::Corpus;
use super::decode::{self, DecodeReport};
use super::export;
use super::held_out::{self, Comparison, Evaluation};
use super::log::{self, StepReport};
use super::model::{Batch, Gradients, TrainModel, View};
use super::optimizer::AdamW;
use super::reduce::Reducer;
use super::tensor_group;
use crate::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::parallel::{Alone, Collective, agree};
use std::path::{Path, PathBuf};
use std::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

/// A training run.
///
/// ```no_run
/// use mka::training::{Trainer, TrainingConfig};
/// use std::path::Path;
///
/// # fn run() -> mka::Result<()> {
/// let config = TrainingConfig::load(Path::new("train.toml"))?;
/// let mut trainer = Trainer::open(config)?; // goes on where a run in the same folder stopped
/// trainer.run(&mut |report| println!("{} {:.3}", report.step, report.loss))?;
/// # Ok(())
/// # }
/// ```
pub struct Trainer {
    config: TrainingConfig,
    base: Base,
    model: TrainModel,
    /// The teacher, where the model's own weights are trained.
    twin: Option<TrainModel>,
    train: Corpus,
    held_out: Corpus,
    optimizer: AdamW,
    step: u64,
    reducer: Reducer,
    device: Device,
}

impl std::fmt::Debug for Trainer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer").field("step", &self.step).field("config", &self.config).finish()
    }
}

impl Trainer {
    /// Loads model and text, and the newest checkpoint of `config.output` if there is one.
    ///
    /// # Errors
    /// `InvalidArgument` for a setting outside its range or a corpus shorter than a sequence; `Incompatible` for a
    /// checkpoint of another model, text or setting, for a tokenizer that does not fit the model, and for rates or a bias
    /// correction that the model's own memory was not trained with; `Corrupted` if there are checkpoints and none is whole;
    /// else as loading a model.
    pub fn open(config: TrainingConfig) -> Result<Self> {
        Self::open_with(config, Box::new(Alone))
    }

    /// [`Trainer::open`] as one process of several: each trains on its share of every step, gradients are summed.
    ///
    /// With `train.tensor_parallel` above 1 that many neighbours share one model, and every method that runs the model or
    /// writes it is called by all of them; the first one writes.
    ///
    /// # Errors
    /// As [`Trainer::open`]; `InvalidArgument` for processes or a model that `train.tensor_parallel` does not divide;
    /// `Incompatible`, naming what differs, for processes that are not at one step of one run, and for a checkpoint of
    /// another number of replicas.
    pub fn open_with(config: TrainingConfig, collective: Box<dyn Collective>) -> Result<Self> {
        config.check()?;
        let (group, mut replicas) = tensor_group::divide(collective, config.train.tensor_parallel)?;
        let device = config.device()?;
        let opened = device.open()?;
        let base = Base::open(&config)?;
        base.check_memory(&config.memory)?;
        let read = |name: &str, files: &[PathBuf]| {
            Corpus::read(name, files, &base.vocabulary, config.data.sequence_tokens)
        };
        let train = read("data.train", &config.data.train)?;
        let held_out = read("data.held_out", &config.data.held_out)?;
        let load = |frozen| {
            let (decoder, place) = (base.decoder.clone(), (&opened, &group));
            TrainModel::load_part(decoder, base.weights.as_ref(), &config, place, frozen)
        };
        let model = load(false)?;
        if model.parameters.is_empty() {
            return Err(Error::invalid(
                "train: nothing to train, expected a memory, adapters or train.mode = \"full\"",
            ));
        }
        let taught = config.train.distill > 0.0 && base.weights.is_some();
        let twin = match taught && config.train.mode == TrainMode::Full {
            true => Some(load(true)?),
            false => None,
        };
        if config.train.distill > 0.0 && base.weights.is_none() {
            return Err(Error::invalid(
                "train.distill: a model from scratch, expected a pretrained one to learn from",
            ));
        }
        let mut optimizer = AdamW::new(&model.parameters, &group)?;
        let mut step = 0;
        if let Some(checkpoint) = Checkpoint::newest(&config.output)? {
            let place = (checkpoint.state.step, replicas.world_size());
            let expected = state(&config, &base, &train, place)?;
            compatible(&checkpoint, &expected)?;
            checkpoint.restore(&model, Some(&mut optimizer))?;
            step = checkpoint.state.step;
        }
        let here = state(&config, &base, &train, (step, replicas.world_size()))?.identity();
        let TrainSettings { evaluate_every, evaluate_sequences, save_every, .. } = &config.train;
        // Those that share a model measure and write it together.
        let when = format!("{evaluate_every} {evaluate_sequences} {save_every}");
        let mut shared = here.to_vec();
        shared.push(("when the run is measured or written", xxh3_64(when.as_bytes())));
        // Both are asked whatever the first says, so that no process waits for one that has ended.
        let (shared, replicated) = (group.agree(&shared), agree(replicas.as_mut(), &here));
        shared.and(replicated)?;
        let reducer = Reducer::new(replicas);
        let trainer =
            Self { config, base, model, twin, train, held_out, optimizer, step, reducer, device };
        if trainer.is_first() {
            log::cut(&trainer.config.output, step)?;
        }
        Ok(trainer)
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Whether this is the process of all that writes.
    fn is_first(&self) -> bool {
        self.reducer.rank() == 0 && self.model.group.index() == 0
    }

    /// Whether this process and those that share its model have what is written.
    fn is_kept(&self) -> bool {
        self.reducer.rank() == 0
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// Numbers that are trained.
    pub fn trained_parameters(&self) -> usize {
        let parameters = self.model.parameters.iter();
        parameters.map(|parameter| self.numbers(&parameter.name, &parameter.value)).sum()
    }

    /// Numbers of the whole model.
    pub fn parameters(&self) -> usize {
        self.model.tensors.iter().map(|(name, tensor)| self.numbers(name, tensor)).sum()
    }

    fn numbers(&self, name: &str, part: &candle_core::Tensor) -> usize {
        self.model.group.whole_shape(name, part.dims()).iter().product()
    }

    /// Tokens of one step, over all processes.
    pub fn step_tokens(&self) -> usize {
        let train = &self.config.train;
        self.config.data.sequence_tokens
            * train.batch
            * train.accumulate
            * self.reducer.world_size()
    }

    /// Runs to the last step, writing log and checkpoints, then the trained model into `output/model`.
    ///
    /// # Errors
    /// As [`Trainer::step`] and [`Trainer::save`]; checkpoints written before are kept.
    pub fn run(&mut self, on_step: &mut dyn FnMut(&StepReport)) -> Result<()> {
        self.run_for(None, on_step)
    }

    /// [`Trainer::run`], which ends with the step that is under way after `seconds`.
    ///
    /// # Errors
    /// As [`Trainer::run`], and for a limit in one process of several, which would not end at the same step.
    pub fn run_for(
        &mut self,
        seconds: Option<f64>,
        on_step: &mut dyn FnMut(&StepReport),
    ) -> Result<()> {
        if seconds.is_some() && self.reducer.world_size() * self.model.group.size() > 1 {
            return Err(Error::invalid(
                "run: a time limit in one of several processes, expected none",
            ));
        }
        let started = Instant::now();
        let first = self.is_first();
        if first {
            let output = &self.config.output;
            std::fs::create_dir_all(output).map_err(|e| Error::io("make run folder", output, e))?;
            let path = output.join("config.toml");
            std::fs::write(&path, self.config.to_toml()?)
                .map_err(|e| Error::io("write run file", &path, e))?;
        }
        let steps = self.config.train.steps;
        while self.step < steps {
            let mut report = self.step()?;
            let late = seconds.is_some_and(|limit| started.elapsed().as_secs_f64() > limit);
            let last = late || report.step == steps;
            let due = |every: u64| last || (every > 0 && report.step.is_multiple_of(every));
            if due(self.config.train.evaluate_every) {
                report.held_out = Some(self.evaluate()?);
            }
            if first {
                log::append(&self.config.output, &report)?;
            }
            if self.is_kept() && due(self.config.train.save_every) {
                self.save()?;
            }
            on_step(&report);
            if last {
                break;
            }
        }
        if self.is_kept() {
            self.export(&self.config.output.join("model"))?;
        }
        Ok(())
    }

    /// One optimizer step.
    ///
    /// # Errors
    /// `Model` if loss or gradient is no finite number: parameters are then as before, and the last checkpoint stands.
    pub fn step(&mut self) -> Result<StepReport> {
        let started = Instant::now();
        let train = &self.config.train;
        let total_tokens = self.step_tokens();
        let mut gradients = Gradients::new(self.model.parameters.len());
        let mut loss = 0.0;
        let share = train.distill;
        let teacher = (share > 0.0).then(|| (self.twin.as_ref().unwrap_or(&self.model), share));
        // Sums over a tensor group are part of the backward pass. Sums over the data beside them would be two groups on one
        // card, which may wait for each other in another order on each process: these come after the pass.
        let (alone, mut later) = (self.model.group.is_alone(), Vec::new());
        for pass in 0..train.accumulate {
            let batch = self.batch(pass);
            let last = pass + 1 == train.accumulate;
            let reducer = &mut self.reducer;
            let mut finished = |gradients: &mut Gradients, whole: &[usize]| {
                match (last, alone) {
                    (true, true) => reducer.send(gradients, whole)?,
                    (true, false) => later.push(whole.to_vec()),
                    (false, _) => {}
                }
                Ok(())
            };
            let recompute = train.checkpoint_activations;
            loss += self.model.backward(
                &batch,
                total_tokens,
                teacher,
                recompute,
                &mut gradients,
                &mut finished,
            )?;
        }
        later.iter().try_for_each(|whole| self.reducer.send(&gradients, whole))?;
        loss = self.reducer.finish(&mut gradients, loss)? / total_tokens as f64;
        self.model.sum_shared(&mut gradients)?;
        let step = self.step + 1;
        let not_finite = |what: &str, value: f64| {
            let last =
                match checkpoint::list(&self.config.output).ok().and_then(|mut all| all.pop()) {
                    Some(path) => format!("the last checkpoint is {}", path.display()),
                    None => "there is no checkpoint".into(),
                };
            Error::model(format!(
                "train: {what} {value} at step {step}, expected a finite number; {last}"
            ))
        };
        if !loss.is_finite() {
            return Err(not_finite("loss", loss));
        }
        let (gradient_norm, learning_rate) = self.optimizer.step(
            &self.config.optimizer,
            &self.model.parameters,
            &gradients,
            (step, train.steps),
        )?;
        if !gradient_norm.is_finite() {
            return Err(not_finite("gradient norm", gradient_norm));
        }
        self.step = step;
        Ok(StepReport {
            step,
            loss,
            learning_rate,
            gradient_norm,
            tokens: total_tokens,
            seconds: started.elapsed().as_secs_f64(),
            held_out: None,
        })
    }

    /// The sequences of this process in pass `pass` of the next step.
    fn batch(&self, pass: usize) -> Batch {
        let train = &self.config.train;
        let (rank, world) = (self.reducer.rank(), self.reducer.world_size());
        let each = train.batch * train.accumulate;
        let first = self.step * (each * world) as u64 + (rank * each + pass * train.batch) as u64;
        let mut batch = Batch { inputs: Vec::new(), targets: Vec::new(), sequences: train.batch };
        for number in first..first + train.batch as u64 {
            let index = self.train.shuffled(number, self.config.seed);
            let (inputs, targets) = self.train.sequence(index);
            batch.inputs.extend(inputs);
            batch.targets.extend(targets);
        }
        batch
    }

    /// The held-out loss of the model as it is.
    ///
    /// # Errors
    /// If a tensor operation fails.
    pub fn evaluate(&self) -> Result<Evaluation> {
        self.evaluate_as(&self.model, View::Trained)
    }

    /// The held-out loss of the model beside the untouched one, dense and behind the window.
    ///
    /// # Errors
    /// `InvalidArgument` for a model from scratch, which has no untouched one.
    pub fn compare(&self) -> Result<Comparison> {
        if self.base.weights.is_none() {
            return Err(Error::invalid("compare: a model from scratch, expected a pretrained one"));
        }
        let loaded = match &self.twin {
            None if self.config.train.mode == TrainMode::Full => Some(TrainModel::load_part(
                self.base.decoder.clone(),
                self.base.weights.as_ref(),
                &self.config,
                (self.model.device(), &self.model.group),
                true,
            )?),
            _ => None,
        };
        let untouched = loaded.as_ref().or(self.twin.as_ref()).unwrap_or(&self.model);
        Ok(Comparison {
            dense: self.evaluate_as(untouched, View::Dense)?,
            windowed: self.evaluate_as(untouched, View::Windowed)?,
            recalled: (self.config.memory.recall_tokens > 0)
                .then(|| self.evaluate_as(untouched, View::Recalled))
                .transpose()?,
            trained: self.evaluate()?,
            without_memory: self.evaluate_as(&self.model, View::WithoutMemory)?,
        })
    }

    fn evaluate_as(&self, model: &TrainModel, view: View) -> Result<Evaluation> {
        let window = match self.config.memory.window_tokens {
            0 => usize::MAX,
            window => window,
        };
        let count = self.config.train.evaluate_sequences;
        held_out::measure(model, view, &self.held_out, count, window)
    }

    /// Speed of one stream of the model as it is: a prompt of held-out text, then greedy decoding.
    ///
    /// Attention sees the whole stream, whatever window the model is trained behind.
    ///
    /// # Errors
    /// `InvalidArgument` if prompt and decoded tokens are more than the model's trained length.
    pub fn measure_decoding(&self, prompt_tokens: usize, tokens: usize) -> Result<DecodeReport> {
        let trained = self.base.decoder.trained_tokens;
        if prompt_tokens == 0 || prompt_tokens + tokens > trained {
            return Err(Error::invalid(format!(
                "decode: {prompt_tokens} tokens and {tokens} more, expected 1 to {trained} together"
            )));
        }
        let mut prompt = Vec::new();
        for i in 0.. {
            if prompt.len() >= prompt_tokens {
                break;
            }
            prompt.extend(self.held_out.sequence(i).0);
        }
        decode::measure(&self.model, &prompt[..prompt_tokens], tokens)
    }

    /// Writes a checkpoint and returns its folder.
    ///
    /// # Errors
    /// `Storage`; the checkpoints before it are then untouched.
    pub fn save(&self) -> Result<PathBuf> {
        let place = (self.step, self.reducer.world_size());
        let state = state(&self.config, &self.base, &self.train, place)?;
        let (output, keep) = (&self.config.output, self.config.train.keep);
        match Contents::gather(&self.model, &self.optimizer)? {
            Some(contents) => checkpoint::write(output, state, &contents, keep),
            None => Ok(checkpoint::folder(output, self.step)),
        }
    }

    /// Writes the model as a HuggingFace folder: adapters merged, `mka.safetensors` beside.
    ///
    /// # Errors
    /// `Storage` if a file cannot be written.
    pub fn export(&self, folder: &Path) -> Result<()> {
        export::write(&self.base, &self.model, &self.config, folder)
    }
}

/// Merges the newest checkpoint of the run in `run` into its base and writes the HuggingFace folder `out`.
///
/// # Errors
/// `NotFound` if the run has no checkpoint, `Incompatible` if the base is not the one that it was trained from.
pub fn merge(run: &Path, out: &Path) -> Result<()> {
    let mut config = TrainingConfig::load(&run.join("config.toml"))?;
    // A checkpoint holds f32 masters whatever the run computed in, and the processor knows nothing narrower.
    config.precision = Precision::F32;
    let checkpoint = Checkpoint::newest(run)?.ok_or_else(|| {
        Error::new(
            ErrorKind::NotFound,
            format!("merge {}: no checkpoint, expected one", run.display()),
        )
    })?;
    let base = Base::open(&config)?;
    same("base model", &checkpoint, &checkpoint.state.base, &base.fingerprint)?;
    let model = TrainModel::load(
        base.decoder.clone(),
        base.weights.as_ref(),
        &config,
        &candle_core::Device::Cpu,
        false,
    )?;
    checkpoint.restore(&model, None)?;
    export::write(&base, &model, &config, out)
}

fn state(
    config: &TrainingConfig,
    base: &Base,
    train: &Corpus,
    (step, replicas): (u64, usize),
) -> Result<State> {
    // What may differ between the parts of one run: where, how often it looks, how long it keeps. Model and text are
    // held to their fingerprints.
    let mut fixed = config.clone();
    fixed.model.source = None;
    fixed.output = PathBuf::new();
    fixed.device = String::new();
    fixed.data.train.clear();
    fixed.data.held_out.clear();
    let defaults = TrainingConfig::default().train;
    fixed.train.keep = defaults.keep;
    fixed.train.tensor_parallel = defaults.tensor_parallel;
    fixed.train.save_every = defaults.save_every;
    fixed.train.evaluate_every = defaults.evaluate_every;
    fixed.train.evaluate_sequences = defaults.evaluate_sequences;
    Ok(State {
        version: 1,
        step,
        base: base.fingerprint.clone(),
        corpus: train.fingerprint(),
        settings: fixed.to_toml()?,
        replicas,
        hashes: [0; 2],
    })
}

fn compatible(checkpoint: &Checkpoint, expected: &State) -> Result<()> {
    let found = &checkpoint.state;
    same("base model", checkpoint, &found.base, &expected.base)?;
    same("training text", checkpoint, &found.corpus.to_string(), &expected.corpus.to_string())?;
    if found.replicas > 0 {
        let (found, expected) = (found.replicas.to_string(), expected.replicas.to_string());
        same("number of replicas", checkpoint, &found, &expected)?;
    }
    for (found, expected) in found.settings.lines().zip(expected.settings.lines()) {
        same("setting", checkpoint, found, expected)?;
    }
    same("settings", checkpoint, &found.settings, &expected.settings)
}

fn same(what: &str, checkpoint: &Checkpoint, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Incompatible,
        format!("checkpoint {}: {what} {found}, expected {expected}", checkpoint.path.display()),
    ))
}

//! The tensors of a model in training, by name: frozen, or a variable with an f32 master.
//! Knows no layer; where a value comes from is a source's matter.

use super::config::{Precision, TrainMode};
use crate::error::{Error, Result};
use crate::models::weights::Weights;
use crate::parallel::{RATES, TensorGroup};
use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

/// One trained tensor.
pub(super) struct Parameter {
    pub(super) name: String,
    /// What the forward pass reads.
    pub(super) value: Var,
    /// In f32 where `value` is narrower.
    master: Option<Var>,
}

impl Parameter {
    /// The f32 values that the optimizer keeps.
    pub(super) fn master(&self) -> &Tensor {
        self.master.as_ref().unwrap_or(&self.value).as_tensor()
    }

    /// What the forward pass reads, where that is not the master itself.
    #[cfg(feature = "cuda")]
    pub(super) fn rounded(&self) -> Option<&Tensor> {
        self.master.as_ref().map(|_| self.value.as_tensor())
    }

    /// Replaces master and value.
    ///
    /// # Errors
    /// If the shape differs.
    pub(super) fn set(&self, master: &Tensor) -> Result<()> {
        if let Some(kept) = &self.master {
            kept.set(&master.contiguous()?)?;
        }
        Ok(self.value.set(&master.to_dtype(self.value.dtype())?.contiguous()?)?)
    }

    /// Whether it is a gate, a router or the rates, not a weight of the decoder.
    pub(super) fn is_memory(&self) -> bool {
        is_memory(&self.name)
    }
}

/// Names of mka.safetensors, and of adapters, begin with `layers.`; those of the decoder with `model.`.
fn is_memory(name: &str) -> bool {
    (name.starts_with("layers.") && !is_adapter(name)) || name == RATES
}

pub(super) fn is_adapter(name: &str) -> bool {
    name.contains(".lora.")
}

/// How a new tensor starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum Init {
    Constant(f32),
    /// Normal, by standard deviation.
    Normal(f32),
}

/// Where the tensors of the decoder come from.
pub(super) enum Source<'a> {
    Pretrained(&'a Weights),
    /// Random, of this seed.
    Scratch(u64),
}

/// Makes the tensors of a model and remembers the trained ones.
pub(super) struct Builder<'a> {
    source: Source<'a>,
    mode: Option<TrainMode>,
    seed: u64,
    device: Device,
    dtype: DType,
    group: TensorGroup,
    trained: Vec<Parameter>,
    all: BTreeMap<String, Tensor>,
}

impl<'a> Builder<'a> {
    /// With no `mode` every tensor is frozen.
    pub(super) fn new(
        source: Source<'a>,
        mode: Option<TrainMode>,
        precision: Precision,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let dtype = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 if device.is_cuda() => DType::BF16,
            Precision::Bf16 => {
                return Err(Error::invalid(
                    "precision: bf16 on the processor, expected f32 there or a CUDA device",
                ));
            }
        };
        let (device, trained, all) = (device.clone(), Vec::new(), BTreeMap::new());
        let group = TensorGroup::alone();
        Ok(Self { source, mode, seed, device, dtype, group, trained, all })
    }

    /// Makes this process's part of the tensors that the processes of `group` share.
    pub(super) fn divided(self, group: &TensorGroup) -> Self {
        Self { group: group.clone(), ..self }
    }

    /// The processes that share the model.
    pub(super) fn group(&self) -> &TensorGroup {
        &self.group
    }

    /// A matrix of the decoder (rows, cols), in the type of the products.
    pub(super) fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        self.decoder(name, &[rows, cols], None, Init::Normal(0.02))
    }

    /// A query or key projection, whose rows a GGUF file may hold in another order.
    pub(super) fn heads(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        head_dim: usize,
    ) -> Result<Tensor> {
        self.decoder(name, &[rows, cols], Some(head_dim), Init::Normal(0.02))
    }

    /// A vector of the decoder, which starts as `value` where there is none.
    pub(super) fn vector(&mut self, name: &str, len: usize, value: f32) -> Result<Tensor> {
        self.decoder(name, &[len], None, Init::Constant(value))
    }

    /// The bias of a query or key projection.
    pub(super) fn head_vector(
        &mut self,
        name: &str,
        len: usize,
        head_dim: usize,
    ) -> Result<Tensor> {
        self.decoder(name, &[len], Some(head_dim), Init::Constant(0.0))
    }

    fn decoder(
        &mut self,
        name: &str,
        shape: &[usize],
        head_dim: Option<usize>,
        init: Init,
    ) -> Result<Tensor> {
        let values = match (&self.source, shape) {
            (Source::Scratch(seed), _) => random(name, shape, init, *seed),
            (Source::Pretrained(weights), [len]) => match head_dim {
                Some(dim) => weights.head_vector(name, *len, dim, dim)?.to_vec1()?,
                None => weights.values(name, *len)?,
            },
            (Source::Pretrained(weights), _) => {
                let (rows, cols) = (shape[0], shape[1]);
                let matrix = weights.matrix(name, rows, cols)?;
                let matrix = match head_dim {
                    Some(dim) => weights.head_matrix(name, matrix, dim, dim)?,
                    None => matrix,
                };
                let mut values = vec![0f32; rows * cols];
                matrix.dequantize_rows(0..rows, &mut values).map_err(|source| {
                    Error::model(format!("tensor {name}: {source}")).with_source(source)
                })?;
                values
            }
        };
        let trained = self.mode == Some(TrainMode::Full);
        self.keep(name, values, shape, self.dtype, trained)
    }

    /// A tensor of the memory, f32, trained in every mode: what the checkpoint holds, or `init`.
    pub(super) fn memory(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let stored = match &self.source {
            Source::Pretrained(weights) if weights.contains(name) => match shape {
                [len] => Some(weights.values(name, *len)?),
                [rows, cols] => {
                    let mut values = vec![0f32; rows * cols];
                    weights
                        .matrix(name, *rows, *cols)?
                        .dequantize_rows(0..*rows, &mut values)
                        .map_err(|source| {
                            Error::model(format!("tensor {name}: {source}")).with_source(source)
                        })?;
                    Some(values)
                }
                _ => None,
            },
            _ => None,
        };
        let values = stored.unwrap_or_else(|| random(name, shape, init, self.seed));
        self.keep(name, values, shape, DType::F32, self.mode.is_some())
    }

    /// An adapter's tensor, trained with `mode = "lora"`.
    pub(super) fn adapter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let values = random(name, shape, init, self.seed);
        self.keep(name, values, shape, self.dtype, self.mode == Some(TrainMode::Lora))
    }

    /// Values that a tensor starts with and that training replaces, f32: the logits of learned rates.
    pub(super) fn given(&mut self, name: &str, values: Vec<f32>) -> Result<Tensor> {
        let shape = [values.len()];
        self.keep(name, values, &shape, DType::F32, self.mode.is_some())
    }

    fn keep(
        &mut self,
        name: &str,
        values: Vec<f32>,
        shape: &[usize],
        dtype: DType,
        trained: bool,
    ) -> Result<Tensor> {
        let whole = Tensor::from_vec(values, shape, &Device::Cpu)?;
        let tensor = self.group.part(name, &whole)?.to_device(&self.device)?;
        if !trained {
            let tensor = tensor.to_dtype(dtype)?;
            self.all.insert(name.to_owned(), tensor.clone());
            return Ok(tensor);
        }
        let value = Var::from_tensor(&tensor.to_dtype(dtype)?)?;
        let master = match dtype {
            DType::F32 => None,
            _ => Some(Var::from_tensor(&tensor)?),
        };
        let read = value.as_tensor().clone();
        self.all.insert(name.to_owned(), read.clone());
        self.trained.push(Parameter { name: name.to_owned(), value, master });
        Ok(read)
    }

    /// The trained parameters, and every tensor by name.
    ///
    /// # Errors
    /// If the checkpoint has a tensor that nothing read: a part of a model that this decoder does not have.
    pub(super) fn finish(self) -> Result<(Vec<Parameter>, BTreeMap<String, Tensor>)> {
        if let Source::Pretrained(weights) = self.source {
            let known = |name: &str| {
                // Tied heads are stored twice by some, and old checkpoints carry RoPE's frequencies.
                name == "lm_head.weight" || name.ends_with("rotary_emb.inv_freq") || is_memory(name)
            };
            let extra = weights.names().find(|name| !self.all.contains_key(*name) && !known(name));
            if let Some(extra) = extra {
                return Err(Error::model(format!(
                    "train: tensor {extra} in the checkpoint, expected none that the decoder does not read"
                )));
            }
        }
        Ok((self.trained, self.all))
    }
}

/// Seeded values, the same for a name whatever else the model has.
fn random(name: &str, shape: &[usize], init: Init, seed: u64) -> Vec<f32> {
    let len = shape.iter().product();
    let std = match init {
        Init::Constant(value) => return vec![value; len],
        Init::Normal(std) => std,
    };
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ xxhash_rust::xxh3::xxh3_64(name.as_bytes()));
    // Box and Muller's normal numbers, in f64 so that platforms agree but for the last bit of f32.
    (0..len)
        .map(|_| {
            let (u, v): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
            ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos() * f64::from(std)) as f32
        })
        .collect()
}

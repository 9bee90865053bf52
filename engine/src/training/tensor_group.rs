//! Tensor parallelism: processes that share one model, each with its heads and its part of the MLP's inner width.
//! Knows no layer; which part of a tensor is whose follows from its name (`placement.rs`).
//!
//! Source: Megatron-LM (arXiv 1909.08053), section 3. Its f is [`TensorGroup::copied`], its g [`TensorGroup::summed`].

use super::collective::{Alone, Collective};
use super::operations::with_gradient;
use super::placement::Placement;
use crate::error::{Error, ErrorKind, Result};
use crate::models::config::DecoderConfig;
use candle_core::{DType, Device, Tensor};
use mka_kernels::tape::{Value, record_one};
use std::sync::{Arc, Mutex, PoisonError};

/// The processes that share one model, and this one's place among them.
///
/// All of them call the same operations in the same order. Sums are f32, and the same bits on each.
#[derive(Clone)]
pub(super) struct TensorGroup {
    index: usize,
    size: usize,
    /// None for a process alone, and after a failure: the connections are then closed, which the others see at once.
    collective: Arc<Mutex<Option<Box<dyn Collective>>>>,
}

/// Divides the processes of `world` into groups of `size` neighbours that share one model: this process's group, and the
/// processes that hold the same part of the model and train it on other data.
///
/// # Errors
/// `InvalidArgument` if `size` does not divide the number of processes; else as [`Collective::split`].
pub(super) fn divide(
    mut world: Box<dyn Collective>,
    size: usize,
) -> Result<(TensorGroup, Box<dyn Collective>)> {
    let (rank, processes) = (world.rank(), world.world_size());
    if !processes.is_multiple_of(size) {
        return Err(refused(size, &format!("a divisor of the number of processes, {processes}")));
    }
    if size == 1 {
        return Ok((TensorGroup::alone(), world));
    }
    if size == processes {
        return Ok((TensorGroup::new(world), Box::new(Alone)));
    }
    let tensor = world.split(rank / size)?;
    let data = world.split(rank % size)?;
    Ok((TensorGroup::new(tensor), data))
}

fn refused(size: usize, expected: &str) -> Error {
    Error::invalid(format!("train.tensor_parallel: {size}, expected {expected}"))
}

impl TensorGroup {
    /// The processes of `collective`.
    pub(super) fn new(collective: Box<dyn Collective>) -> Self {
        let (index, size) = (collective.rank(), collective.world_size());
        Self { index, size, collective: Arc::new(Mutex::new(Some(collective))) }
    }

    /// One process with the whole model.
    pub(super) fn alone() -> Self {
        Self { index: 0, size: 1, collective: Arc::new(Mutex::new(None)) }
    }

    /// This process, from 0.
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Processes.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Whether this process has the whole model.
    pub(super) fn is_alone(&self) -> bool {
        self.size == 1
    }

    /// Refuses a model that cannot be divided.
    ///
    /// # Errors
    /// `InvalidArgument`: what the number of processes does not divide.
    pub(super) fn check(&self, c: &DecoderConfig, undivided: Option<&str>) -> Result<()> {
        if let Some(what) = undivided.filter(|_| !self.is_alone()) {
            return Err(refused(self.size, &format!("1 with {what}")));
        }
        for (number, what) in [
            (c.num_kv_heads, "key/value heads"),
            (c.num_heads, "query heads"),
            (c.intermediate_size, "columns inside the MLP"),
        ] {
            if !number.is_multiple_of(self.size) {
                return Err(refused(self.size, &format!("a divisor of the {number} {what}")));
            }
        }
        Ok(())
    }

    /// Runs `call` on the collective; a failure ends the group for this process and so for the others.
    fn call<T>(&self, call: impl FnOnce(&mut dyn Collective) -> Result<T>) -> Result<T> {
        let mut collective = self.collective.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = collective.as_mut() else {
            return Err(Error::new(
                ErrorKind::Device,
                "tensor group: it has ended, expected every process to go on",
            ));
        };
        let result = call(open.as_mut());
        if result.is_err() {
            *collective = None;
        }
        result
    }

    /// The sum of x over the processes, in x's type, without history.
    ///
    /// # Errors
    /// If another process is gone or sends another number of values.
    pub(super) fn sum(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_alone() {
            return Ok(x.detach());
        }
        let flat = x.detach().flatten_all()?.to_dtype(DType::F32)?;
        let sum = self.call(|collective| {
            let sum = collective.all_reduce_tensor(flat)?;
            collective.settle()?;
            Ok(sum)
        })?;
        Ok(sum.reshape(x.shape())?.to_dtype(x.dtype())?)
    }

    /// x as what each process goes on with its own part from: the gradient is the sum of theirs.
    pub(super) fn copied(&self, x: &Value) -> Value {
        if self.is_alone() {
            return x.clone();
        }
        let (target, group) = (x.target(), self.clone());
        record_one(&[x], x.tensor().clone(), move |gradient, gradients| {
            let sum = group.sum(&gradient).map_err(candle_core::Error::wrap)?;
            gradients.give(&target, sum)
        })
    }

    /// The sum of the processes' parts of x; its gradient is that of each part.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(super) fn summed(&self, x: &Value) -> Result<Value> {
        if self.is_alone() {
            return Ok(x.clone());
        }
        let target = x.target();
        Ok(record_one(&[x], self.sum(x.tensor())?, move |gradient, gradients| {
            gradients.give(&target, gradient)
        }))
    }

    /// [`TensorGroup::copied`] in candle's graph.
    pub(super) fn copied_in_graph(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_alone() {
            return Ok(x.clone());
        }
        let group = self.clone();
        with_gradient([x; 3], x.detach(), move |gradient| {
            Ok([Some(group.sum(gradient).map_err(candle_core::Error::wrap)?), None, None])
        })
    }

    /// [`TensorGroup::summed`] in candle's graph.
    pub(super) fn summed_in_graph(&self, x: &Tensor) -> Result<Tensor> {
        if self.is_alone() {
            return Ok(x.clone());
        }
        with_gradient([x; 3], self.sum(x)?, |gradient| Ok([Some(gradient.clone()), None, None]))
    }

    /// What each process has, end to end in their order: every process gives as many values.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(super) fn gather(&self, mine: &[f32]) -> Result<Vec<f32>> {
        if self.is_alone() {
            return Ok(mine.to_vec());
        }
        // A sum with -0 keeps every bit, the sign of a zero too.
        let mut all = vec![-0.0; mine.len() * self.size];
        all[mine.len() * self.index..][..mine.len()].copy_from_slice(mine);
        self.call(|collective| collective.all_reduce_sum(&mut all))?;
        Ok(all)
    }

    /// The sum of `value` over the processes, to the precision of two f32.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(super) fn total(&self, value: f64) -> Result<f64> {
        if self.is_alone() {
            return Ok(value);
        }
        let high = value as f32;
        // The rest of what is infinite is no number, and adds nothing.
        let low = if high.is_finite() { (value - f64::from(high)) as f32 } else { 0.0 };
        Ok(self.gather(&[high, low])?.into_iter().map(f64::from).sum())
    }

    /// Holds that every process has the same: names, and hashes of what they stand for.
    ///
    /// # Errors
    /// `Incompatible` with the first name whose hashes differ; as [`TensorGroup::sum`].
    pub(super) fn agree(&self, what: &[(&str, u64)]) -> Result<()> {
        // 16 bits are one number in f32.
        let mine: Vec<f32> = what
            .iter()
            .flat_map(|(_, hash)| (0..4).map(move |i| f32::from((hash >> (16 * i)) as u16)))
            .collect();
        let all = self.gather(&mine)?;
        let others = || all.chunks(mine.len().max(1));
        let differs = |i: usize| others().any(|other| other[4 * i..][..4] != mine[4 * i..][..4]);
        match (0..what.len()).find(|i| differs(*i)) {
            Some(i) => Err(Error::new(
                ErrorKind::Incompatible,
                format!(
                    "tensor group: {} differs between processes, expected the same on each: one build, file and kind of device",
                    what[i].0
                ),
            )),
            None => Ok(()),
        }
    }

    /// This process's part of the tensor `name`.
    ///
    /// # Errors
    /// If the tensor cannot be cut.
    pub(super) fn part(&self, name: &str, whole: &Tensor) -> Result<Tensor> {
        match Placement::of(name).split() {
            Some(dim) if !self.is_alone() => {
                let len = whole.dim(dim)? / self.size;
                Ok(whole.narrow(dim, self.index * len, len)?.force_contiguous()?)
            }
            _ => Ok(whole.clone()),
        }
    }

    /// The tensor `name` of which each process has a part, f32, on the processor.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(super) fn whole(&self, name: &str, part: &Tensor) -> Result<Tensor> {
        let part = part.detach().contiguous()?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        match Placement::of(name).split() {
            Some(dim) if !self.is_alone() => {
                let all = self.gather(&part.flatten_all()?.to_vec1::<f32>()?)?;
                let parts: Vec<Tensor> = all
                    .chunks(part.elem_count())
                    .map(|values| Tensor::from_slice(values, part.shape(), &Device::Cpu))
                    .collect::<candle_core::Result<_>>()?;
                Ok(Tensor::cat(&parts, dim)?)
            }
            _ => Ok(part),
        }
    }

    /// Shape of the whole tensor `name`, of whose part this is the shape.
    pub(super) fn whole_shape(&self, name: &str, part: &[usize]) -> Vec<usize> {
        let mut shape = part.to_vec();
        if let Some(dim) = Placement::of(name).split() {
            shape[dim] *= self.size;
        }
        shape
    }
}

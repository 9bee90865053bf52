//! Tensor parallelism in training: who shares a model and who its data, and sums that carry gradients.
//! Knows no layer.
//!
//! Source: Megatron-LM (arXiv 1909.08053), section 3. Its f is [`TensorGroup::copied`], its g [`TensorGroup::summed`].

use super::operations::with_gradient;
use crate::error::{Error, Result};
use crate::parallel::{Alone, Collective, TensorGroup};
use candle_core::Tensor;
use mka_kernels::tape::{Value, record_one};

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
        return Err(Error::invalid(format!(
            "train.tensor_parallel: {size}, expected a divisor of the number of processes, {processes}"
        )));
    }
    if size == 1 {
        return Ok((TensorGroup::alone(), world));
    }
    if size == processes {
        return Ok((TensorGroup::new(world)?, Box::new(Alone)));
    }
    let tensor = world.split(rank / size)?;
    let data = world.split(rank % size)?;
    Ok((TensorGroup::new(tensor)?, data))
}

impl TensorGroup {
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
}

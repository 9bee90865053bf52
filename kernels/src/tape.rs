//! Gradients by a list of the ops that were run: values, and the walk back from them.
//! Knows no op; those of a decoder's layer are in `tape/ops.rs`.
//!
//! Beside candle's own graph for two reasons. There, a gradient starts as zeros that the first one is added to, and an
//! op has one result: a layer of a decoder spends more time on such passes over memory than on its products. Here the
//! first gradient is taken as it comes, an op has as many results as it likes, and what an op keeps is freed as soon as
//! its gradient is known.

pub mod ops;
mod project;

use candle_core::{DType, Result, Tensor, TensorId, Var, bail};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A tensor, and where it came from if a gradient is wanted of that.
///
/// Cost: a clone copies pointers.
#[derive(Debug, Clone)]
pub struct Value {
    tensor: Tensor,
    target: Target,
}

/// Where the gradient of a [`Value`] goes; nowhere, for a constant.
#[derive(Debug, Clone)]
pub struct Target(Option<Source>);

#[derive(Debug, Clone)]
enum Source {
    Leaf(TensorId),
    Output(Arc<Node>, usize),
}

/// Gives gradients on to an op's inputs, from those of its results that have one.
type Pull = Box<dyn FnOnce(Vec<Option<Tensor>>, &mut Gradients) -> Result<()> + Send>;

/// One op that was run.
struct Node {
    /// Larger than that of every op before it: what depends on an op has a larger one.
    number: u64,
    outputs: usize,
    pull: Mutex<Option<Pull>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "op {} of {} results", self.number, self.outputs)
    }
}

impl Value {
    /// A value whose gradient is asked for under the id of `tensor`.
    pub fn leaf(tensor: &Tensor) -> Self {
        Self { tensor: tensor.detach(), target: Target(Some(Source::Leaf(tensor.id()))) }
    }

    /// A value without gradient.
    pub fn constant(tensor: &Tensor) -> Self {
        Self { tensor: tensor.detach(), target: Target(None) }
    }

    /// A leaf if candle calls the tensor a variable, else a constant.
    pub fn of(tensor: &Tensor) -> Self {
        if tensor.is_variable() { Self::leaf(tensor) } else { Self::constant(tensor) }
    }

    /// The tensor, without history.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Where its gradient goes.
    pub fn target(&self) -> Target {
        self.target.clone()
    }
}

impl Target {
    /// Whether a gradient is of use.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }
}

/// Gradients on their way back, and those of leaves.
#[derive(Debug, Default)]
pub struct Gradients {
    leaves: HashMap<TensorId, Tensor>,
    waiting: BTreeMap<u64, (Arc<Node>, Vec<Option<Tensor>>)>,
}

impl Gradients {
    /// Adds `gradient` to what `target` has so far.
    ///
    /// # Errors
    /// If the shapes of two gradients differ.
    pub fn give(&mut self, target: &Target, gradient: Tensor) -> Result<()> {
        match &target.0 {
            None => Ok(()),
            Some(Source::Leaf(id)) => self.give_leaf(*id, gradient),
            Some(Source::Output(node, output)) => {
                let (_, outputs) = self
                    .waiting
                    .entry(node.number)
                    .or_insert_with(|| (node.clone(), vec![None; node.outputs]));
                let sum = outputs[*output].take();
                outputs[*output] = Some(added(sum, gradient)?);
                Ok(())
            }
        }
    }

    fn give_leaf(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        let sum = self.leaves.remove(&id);
        self.leaves.insert(id, added(sum, gradient)?);
        Ok(())
    }

    /// Takes the gradient of the leaf that was made of `tensor`; none if nothing depends on it.
    pub fn remove(&mut self, tensor: &Tensor) -> Option<Tensor> {
        self.leaves.remove(&tensor.id())
    }
}

/// Of two types the sum is f32: a weight's gradient is, whatever the weight's type.
fn added(sum: Option<Tensor>, gradient: Tensor) -> Result<Tensor> {
    match sum {
        Some(sum) if sum.dtype() == gradient.dtype() => sum + gradient.detach(),
        Some(sum) => sum.to_dtype(DType::F32)? + gradient.detach().to_dtype(DType::F32)?,
        None => Ok(gradient.detach()),
    }
}

/// Puts an op on the tape: `outputs` were computed from `inputs`, and `pull` gives their gradients on, by the inputs'
/// [`Target`]s, from those of the outputs that have one. Nothing is kept if no input wants a gradient.
pub fn record(
    inputs: &[&Value],
    outputs: Vec<Tensor>,
    pull: impl FnOnce(Vec<Option<Tensor>>, &mut Gradients) -> Result<()> + Send + 'static,
) -> Vec<Value> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    if !inputs.iter().any(|input| input.target.is_wanted()) {
        return outputs.iter().map(Value::constant).collect();
    }
    let node = Arc::new(Node {
        number: NUMBER.fetch_add(1, Ordering::Relaxed),
        outputs: outputs.len(),
        pull: Mutex::new(Some(Box::new(pull))),
    });
    let value = |(i, tensor): (usize, Tensor)| Value {
        tensor: tensor.detach(),
        target: Target(Some(Source::Output(node.clone(), i))),
    };
    outputs.into_iter().enumerate().map(value).collect()
}

/// [`record`] for one result, whose gradient `pull` is given.
pub fn record_one(
    inputs: &[&Value],
    output: Tensor,
    pull: impl FnOnce(Tensor, &mut Gradients) -> Result<()> + Send + 'static,
) -> Value {
    let mut values =
        record(inputs, vec![output], |mut outputs, gradients| match outputs.pop().flatten() {
            Some(gradient) => pull(gradient, gradients),
            None => Ok(()),
        });
    values.remove(0)
}

/// Gradients of all leaves that `out` depends on, given its own.
///
/// A tape is walked once: an op gives away what it kept.
///
/// # Errors
/// If `gradient` is not of out's shape, if the tape was walked before, or as the ops' own gradients.
pub fn backward(out: &Value, gradient: &Tensor) -> Result<Gradients> {
    if gradient.shape() != out.tensor.shape() {
        bail!("backward: gradient {:?}, expected {:?}", gradient.shape(), out.tensor.shape());
    }
    let mut gradients = Gradients::default();
    gradients.give(&out.target, gradient.clone())?;
    while let Some((_, (node, outputs))) = gradients.waiting.pop_last() {
        let pull = node.pull.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(pull) = pull else {
            bail!("backward: {node:?} was walked before, expected a new forward pass")
        };
        pull(outputs, &mut gradients)?;
    }
    Ok(gradients)
}

/// A part of candle's own graph on the tape: what `run` makes of x, with gradients for x and for every variable it reads.
///
/// Of a constant x nothing is recorded, and the variables get no gradient either: where theirs are wanted, x is a leaf.
///
/// # Errors
/// Those of `run`; in the walk back, candle's.
pub fn segment<E: From<candle_core::Error>>(
    x: &Value,
    run: impl FnOnce(&Tensor) -> std::result::Result<Tensor, E>,
) -> std::result::Result<Value, E> {
    if !x.target.is_wanted() {
        return Ok(Value::constant(&run(&x.tensor)?));
    }
    let input = Var::from_tensor(&x.tensor)?;
    let out = run(input.as_tensor())?;
    let target = x.target();
    Ok(record_one(&[x], out.clone(), move |gradient, gradients| {
        // candle starts from ones of the shape of what it is asked for.
        let mut store = (&out * gradient)?.backward()?;
        if let Some(gradient) = store.remove(input.as_tensor()) {
            gradients.give(&target, gradient)?;
        }
        // What is left belongs to variables, or to constants that nobody asks for.
        let ids: Vec<TensorId> = store.get_ids().copied().collect();
        for id in ids {
            if let Some(gradient) = store.get_id(id) {
                gradients.give_leaf(id, gradient.clone())?;
            }
        }
        Ok(())
    }))
}

//! Tensor parallelism: processes that share one model, each with its heads and its part of the MLP's inner width.
//! Knows no layer; which part of a tensor is whose follows from its name (`placement.rs`).
//!
//! Source: Megatron-LM (arXiv 1909.08053), section 3.

use super::collective::Collective;
use super::placement::Placement;
use crate::error::{Error, ErrorKind, Result};
use crate::models::config::DecoderConfig;
use candle_core::{DType, Device, Tensor};
use mka_kernels::PackedMatrix;
use std::sync::{Arc, Mutex, PoisonError};
use xxhash_rust::xxh3::Xxh3;

/// The processes that share one model, and this one's place among them.
///
/// All of them call the same operations in the same order. Sums are f32, and the same bits on each.
#[derive(Clone)]
pub(crate) struct TensorGroup {
    index: usize,
    size: usize,
    /// None for a process alone, and after a failure: the connections are then closed, which the others see at once.
    collective: Arc<Mutex<Option<Box<dyn Collective>>>>,
}

/// What processes ask each other.
#[derive(Clone, Copy)]
enum Question {
    GoOn,
    Range,
    First,
}

fn parted() -> Error {
    Error::new(
        ErrorKind::Incompatible,
        "tensor group: the processes are not at the same place, expected the same calls in the same order on each",
    )
}

/// 16 bits are one number in f32; the lowest first.
fn words(value: u64) -> [f32; 4] {
    std::array::from_fn(|i| f32::from((value >> (16 * i)) as u16))
}

/// What [`words`] says.
fn number(words: &[f32; 4]) -> u64 {
    words.iter().rev().fold(0, |number, word| number << 16 | *word as u64)
}

fn hashes(what: &[(&str, u64)]) -> Vec<f32> {
    what.iter().flat_map(|(_, hash)| words(*hash)).collect()
}

/// What each process of `collective` has, end to end in their order: every process gives as many values.
fn gathered(collective: &mut dyn Collective, mine: &[f32]) -> Result<Vec<f32>> {
    let (rank, processes) = (collective.rank(), collective.world_size());
    // A sum with -0 keeps every bit, the sign of a zero too.
    let mut all = vec![-0.0; mine.len() * processes];
    all[mine.len() * rank..][..mine.len()].copy_from_slice(mine);
    collective.all_reduce_sum(&mut all)?;
    Ok(all)
}

/// Whether `all`, the hashes of every process, are those of `what`.
fn same_in_all(group: &str, what: &[(&str, u64)], all: &[f32]) -> Result<()> {
    let mine = hashes(what);
    let others = || all.chunks(mine.len().max(1));
    let differs = |i: usize| others().any(|other| other[4 * i..][..4] != mine[4 * i..][..4]);
    match (0..what.len()).find(|i| differs(*i)) {
        Some(i) => Err(Error::new(
            ErrorKind::Incompatible,
            format!(
                "{group}: {} differs between processes, expected the same on each: one build, files, settings and kind of device",
                what[i].0
            ),
        )),
        None => Ok(()),
    }
}

/// [`TensorGroup::agree`] of processes that share no model.
///
/// # Errors
/// As there, and `InvalidArgument` if this process is none of them.
pub(crate) fn agree(collective: &mut dyn Collective, what: &[(&str, u64)]) -> Result<()> {
    let (rank, processes) = (collective.rank(), collective.world_size());
    if rank >= processes {
        return Err(Error::invalid(format!(
            "processes: rank {rank}, expected below the {processes} processes"
        )));
    }
    same_in_all("processes", what, &gathered(collective, &hashes(what))?)
}

fn refused(size: usize, expected: &str) -> Error {
    Error::invalid(format!("tensor_parallel: {size}, expected {expected}"))
}

impl TensorGroup {
    /// The processes of `collective`.
    ///
    /// # Errors
    /// `InvalidArgument` if this process is none of them.
    pub(crate) fn new(collective: Box<dyn Collective>) -> Result<Self> {
        let (index, size) = (collective.rank(), collective.world_size());
        if index >= size {
            return Err(Error::invalid(format!(
                "tensor group: rank {index}, expected below the {size} processes"
            )));
        }
        Ok(Self { index, size, collective: Arc::new(Mutex::new(Some(collective))) })
    }

    /// One process with the whole model.
    pub(crate) fn alone() -> Self {
        Self { index: 0, size: 1, collective: Arc::new(Mutex::new(None)) }
    }

    /// This process, from 0.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Processes.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Whether this process has the whole model.
    pub(crate) fn is_alone(&self) -> bool {
        self.size == 1
    }

    /// Refuses a model that cannot be divided.
    ///
    /// # Errors
    /// `InvalidArgument`: what the number of processes does not divide.
    pub(crate) fn check(&self, c: &DecoderConfig, undivided: Option<&str>) -> Result<()> {
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
    pub(crate) fn sum(&self, x: &Tensor) -> Result<Tensor> {
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

    /// What each process has, end to end in their order: every process gives as many values.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn gather(&self, mine: &[f32]) -> Result<Vec<f32>> {
        if self.is_alone() {
            return Ok(mine.to_vec());
        }
        self.call(|collective| gathered(collective, mine))
    }

    /// Ends the group for this process and so for the others, which see at once that its connections close.
    pub(crate) fn end(&self) {
        *self.collective.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What each process says to `question`, in their order.
    ///
    /// # Errors
    /// `Incompatible` if one is at another question: the group has then ended. As [`TensorGroup::sum`].
    fn answers(&self, question: Question, mine: u64) -> Result<Vec<u64>> {
        let mut said = vec![question as u8 as f32];
        said.extend(words(mine));
        let all = self.gather(&said)?;
        let answers = all.as_chunks::<5>().0;
        if answers.iter().any(|answer| answer[0] != said[0]) {
            self.end();
            return Err(parted());
        }
        Ok(answers.iter().map(|[_, words @ ..]| number(words)).collect())
    }

    /// Whether every process says yes, and is about to do the same: `what` is a hash of it.
    ///
    /// # Errors
    /// `Incompatible` in all if one is about to do something else; as [`TensorGroup::sum`].
    pub(crate) fn all(&self, yes: bool, what: impl FnOnce() -> u64) -> Result<bool> {
        if self.is_alone() {
            return Ok(yes);
        }
        // The hash's last bit gives way to the answer, so that one exchange does for both.
        let what = what() >> 1;
        let said = self.answers(Question::GoOn, what << 1 | u64::from(yes))?;
        if said.iter().any(|other| other >> 1 != what) {
            return Err(parted());
        }
        Ok(said.iter().all(|said| said & 1 == 1))
    }

    /// Whether every process has the same `value`.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn same(&self, value: u64) -> Result<bool> {
        let (least, most) = self.range(value)?;
        Ok(least == most)
    }

    /// The least and the greatest `value` of any process.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn range(&self, value: u64) -> Result<(u64, u64)> {
        if self.is_alone() {
            return Ok((value, value));
        }
        let all = self.answers(Question::Range, value)?;
        Ok(all.into_iter().fold((value, value), |(least, most), x| (least.min(x), most.max(x))))
    }

    /// The first process's `value`.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn first(&self, value: u64) -> Result<u64> {
        if self.is_alone() {
            return Ok(value);
        }
        Ok(self.answers(Question::First, value)?[0])
    }

    /// The first process's `text`.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn first_text(&self, text: String) -> Result<String> {
        if self.is_alone() {
            return Ok(text);
        }
        let len = self.first(text.len() as u64)?;
        let len = usize::try_from(len).map_err(|_| parted())?;
        let mut bytes = vec![0.0; len];
        if self.index == 0 {
            bytes.iter_mut().zip(text.bytes()).for_each(|(byte, own)| *byte = f32::from(own));
        }
        self.call(|collective| collective.all_reduce_sum(&mut bytes))?;
        let bytes = bytes.into_iter().map(|byte| byte as u8).collect();
        String::from_utf8(bytes).map_err(|_| parted())
    }

    /// The sum of `value` over the processes, to the precision of two f32.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn total(&self, value: f64) -> Result<f64> {
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
    pub(crate) fn agree(&self, what: &[(&str, u64)]) -> Result<()> {
        let all = self.gather(&hashes(what))?;
        same_in_all("tensor group", what, &all)
    }

    /// This process's part of the tensor `name`.
    ///
    /// # Errors
    /// If the tensor cannot be cut.
    pub(crate) fn part(&self, name: &str, whole: &Tensor) -> Result<Tensor> {
        match Placement::of(name).split() {
            Some(dim) if !self.is_alone() => {
                let len = whole.dim(dim)? / self.size;
                Ok(whole.narrow(dim, self.index * len, len)?.force_contiguous()?)
            }
            _ => Ok(whole.clone()),
        }
    }

    /// This process's part of the matrix `name`.
    ///
    /// # Errors
    /// If the matrix cannot be cut.
    pub(crate) fn part_of_matrix(&self, name: &str, whole: PackedMatrix) -> Result<PackedMatrix> {
        let part =
            |len: usize| self.index * (len / self.size)..(self.index + 1) * (len / self.size);
        let cut = match Placement::of(name).split() {
            Some(0) if !self.is_alone() => whole.select_rows(part(whole.rows())),
            Some(_) if !self.is_alone() => whole.select_columns(part(whole.cols())),
            _ => return Ok(whole),
        };
        cut.map_err(|source| {
            Error::model(format!("tensor group: cut {name}: {source}")).with_source(source)
        })
    }

    /// The identity of this process's part of the model `whole`.
    pub(crate) fn part_of_id(&self, whole: [u8; 16]) -> [u8; 16] {
        if self.is_alone() {
            return whole;
        }
        let mut hash = Xxh3::new();
        hash.update(&whole);
        hash.update(format!("part {} of {}", self.index, self.size).as_bytes());
        hash.digest128().to_le_bytes()
    }

    /// The tensor `name` of which each process has a part, f32, on the processor.
    ///
    /// # Errors
    /// As [`TensorGroup::sum`].
    pub(crate) fn whole(&self, name: &str, part: &Tensor) -> Result<Tensor> {
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
    pub(crate) fn whole_shape(&self, name: &str, part: &[usize]) -> Vec<usize> {
        let mut shape = part.to_vec();
        if let Some(dim) = Placement::of(name).split() {
            shape[dim] *= self.size;
        }
        shape
    }
}

//! The memory that recalled tokens are copied to: the types that it has, and taking it over from the last choice.
//! Knows no token.

use candle_core::{CpuStorage, InplaceOp1, Layout, Tensor};
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use mka_kernels::rows;
use std::sync::Mutex;

/// A type of recalled numbers.
pub(super) trait Memory: Sized {
    /// Zeros, of integers: the allocator has them without anybody writing.
    fn zeros(count: usize) -> Vec<Self>;

    /// The memory of a tensor of this type.
    fn memory(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

macro_rules! memory {
    ($number:ty, $variant:ident, $zeros:expr) => {
        impl Memory for $number {
            fn zeros(count: usize) -> Vec<Self> {
                $zeros(count)
            }

            fn memory(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
                if let CpuStorage::$variant(memory) = storage { Some(memory) } else { None }
            }
        }
    };
}

memory!(f32, F32, |count| vec![0.0; count]);
memory!(bf16, BF16, |count| vec![0u16; count].reinterpret_into());
memory!(f16, F16, |count| vec![0u16; count].reinterpret_into());

/// What takes the memory out of a tensor, which has none after it.
struct TakeOver<T>(Mutex<Vec<T>>);

impl<T: Memory + Send> InplaceOp1 for TakeOver<T> {
    fn name(&self) -> &'static str {
        "take the memory of recalled numbers"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        if let (Some(memory), Ok(mut taken)) = (T::memory(storage), self.0.lock()) {
            *taken = std::mem::take(memory);
        }
        Ok(())
    }
}

/// `count` numbers that are there to be written over: those of `last`, which nobody else holds, or zeros.
pub(super) fn numbers<T: Memory + Send>(count: usize, last: Option<Tensor>) -> Vec<T> {
    let taken = TakeOver(Mutex::default());
    let last = last.filter(|last| last.device().is_cpu() && last.elem_count() == count);
    match last.map(|last| last.inplace_op1(&taken)).and_then(|_| taken.0.into_inner().ok()) {
        Some(memory) if memory.len() == count => memory,
        _ => T::zeros(count),
    }
}

/// A type that rotated keys are kept in.
pub(super) trait Key: Memory + Send {
    /// Writes a row; false if a number is too large.
    fn write(row: &[f32], out: &mut [Self]) -> bool;
}

impl Key for f32 {
    fn write(row: &[f32], out: &mut [Self]) -> bool {
        out.copy_from_slice(row);
        true
    }
}

impl Key for f16 {
    fn write(row: &[f32], out: &mut [Self]) -> bool {
        rows::shorten_row(row, out)
    }
}

//! Host memory that numbers lie in on their way to a device.
//! Knows no op. On CUDA it is page-locked: the card copies from it at the speed of its bus, while the host goes on.

#[cfg(feature = "cuda")]
mod cuda;

use bytemuck::Pod;
use candle_core::{Device, Result, Tensor, WithDType};
use half::bf16;

/// A type that can be staged, and read into as the bytes that it is: f32 and bf16.
#[cfg(not(feature = "cuda"))]
pub trait Staged: WithDType + Pod {}

/// A type that can be staged, and read into as the bytes that it is: f32 and bf16.
#[cfg(feature = "cuda")]
pub trait Staged: WithDType + Pod + cuda::OnCard {}

impl Staged for f32 {}
impl Staged for bf16 {}

/// Room for numbers that are uploaded again and again.
#[derive(Debug)]
pub struct Staging<T: Staged> {
    device: Device,
    memory: Memory<T>,
}

#[derive(Debug)]
enum Memory<T: Staged> {
    Plain(Vec<T>),
    #[cfg(feature = "cuda")]
    Locked(cuda::Locked<T>),
}

impl<T: Staged> Staging<T> {
    /// Room for `len` numbers, all zero, that go to `device`. Memory that the driver does not lock is used as it is.
    pub fn new(len: usize, device: &Device) -> Self {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(card) = device
            && let Ok(locked) = cuda::Locked::new(len, card)
        {
            return Self { device: device.clone(), memory: Memory::Locked(locked) };
        }
        Self { device: device.clone(), memory: Memory::Plain(vec![T::zero(); len]) }
    }

    /// The numbers, once no copy of them is under way.
    ///
    /// # Errors
    /// If the device fails.
    pub fn numbers(&mut self) -> Result<&mut [T]> {
        match &mut self.memory {
            Memory::Plain(numbers) => Ok(numbers),
            #[cfg(feature = "cuda")]
            Memory::Locked(numbers) => numbers.numbers(),
        }
    }

    /// All of them as a tensor (len) on the device; the copy may be under way when this returns.
    ///
    /// # Errors
    /// If the device has no room or fails.
    pub fn upload(&mut self) -> Result<Tensor> {
        match &mut self.memory {
            Memory::Plain(numbers) => Tensor::from_slice(numbers, numbers.len(), &self.device),
            #[cfg(feature = "cuda")]
            Memory::Locked(numbers) => numbers.upload(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged<T: Staged + PartialEq + std::fmt::Debug>(device: &Device) {
        let mut staging = Staging::<T>::new(3000, device);
        assert!(staging.numbers().unwrap().iter().all(|x| *x == T::zero()));
        let mut uploads = Vec::new();
        // The second is written while the first may be under way.
        for round in 0..4 {
            let numbers = staging.numbers().unwrap();
            let own = |i: usize| T::from_f64(((i * 7 + round * 13) % 61) as f64);
            numbers.iter_mut().enumerate().for_each(|(i, x)| *x = own(i));
            uploads.push((numbers.to_vec(), staging.upload().unwrap()));
        }
        drop(staging);
        for (expected, uploaded) in uploads {
            assert_eq!(uploaded.dims(), [3000]);
            assert_eq!(uploaded.to_vec1::<T>().unwrap(), expected);
        }
    }

    #[test]
    fn what_is_uploaded_is_what_was_written_before_whatever_is_written_after() {
        staged::<f32>(&Device::Cpu);
        staged::<bf16>(&Device::Cpu);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn what_is_uploaded_to_a_card_is_what_was_written_before() {
        match crate::cuda::open(0) {
            Ok(device) => {
                staged::<f32>(&device);
                staged::<bf16>(&device);
            }
            Err(error) => println!("staging: skipped: no CUDA device: {error}"),
        }
    }
}

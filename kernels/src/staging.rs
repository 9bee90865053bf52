//! Host memory that numbers lie in on their way to a device, and on their way back.
//! Knows no op. On CUDA it is page-locked, so that the card reads and writes it at the speed of its bus. Other memory the
//! driver copies through some of its own, and what has just been asked for the system clears first.

#[cfg(feature = "cuda")]
mod cuda;

use bytemuck::Pod;
use candle_core::{Device, Result, Tensor, WithDType};
use half::bf16;
use std::borrow::Cow;

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

/// Bytes that a landing locks at most: what is fetched beyond comes to memory of its own.
#[cfg(any(test, feature = "cuda"))]
const MOST_LOCKED: usize = 32 << 20;

/// Room for numbers that come from a device again and again; it grows with what is fetched, up to 32 MiB.
#[derive(Debug, Default)]
pub struct Landing {
    #[cfg(feature = "cuda")]
    bytes: Option<cuda::Locked<u8>>,
}

impl Landing {
    /// The numbers of `tensor` in its order, once they are here.
    ///
    /// # Errors
    /// If `tensor` is of another type, or the device fails.
    pub fn fetch<T: Staged>(&mut self, tensor: &Tensor) -> Result<Cow<'_, [T]>> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(card) = tensor.device() {
            let bytes = tensor.elem_count() * size_of::<T>();
            if tensor.dtype() == T::DTYPE
                && tensor.is_contiguous()
                && (1..=MOST_LOCKED).contains(&bytes)
                && let Some(room) = cuda::room(&mut self.bytes, bytes, card)
            {
                return Ok(Cow::Borrowed(bytemuck::cast_slice(room.fetch(tensor)?)));
            }
        }
        tensor.flatten_all()?.to_vec1().map(Cow::Owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetched(device: &Device) {
        let mut landing = Landing::default();
        // It grows, holds less than there is room for, and leaves out what is more than it locks.
        for len in [5, 0, 3000, 70_000, 12, MOST_LOCKED / 4 + 1] {
            let numbers: Vec<f32> = (0..len).map(|i| (i * 7 % 61) as f32).collect();
            let tensor = Tensor::from_slice(&numbers, len, device).unwrap();
            assert_eq!(*landing.fetch::<f32>(&tensor).unwrap(), numbers);
            let expected: Vec<bf16> = numbers.iter().map(|x| bf16::from_f32(*x)).collect();
            // Rounded before it goes there: a cast of no number is one that a card does not launch.
            let rounded = Tensor::from_slice(&expected, len, device).unwrap();
            assert_eq!(*landing.fetch::<bf16>(&rounded).unwrap(), expected);
            assert!(landing.fetch::<f32>(&rounded).is_err());
        }
        let parts = Tensor::arange(0f32, 12.0, device).unwrap().reshape((3, 4)).unwrap();
        let middle = parts.narrow(0, 1, 1).unwrap();
        assert_eq!(*landing.fetch::<f32>(&middle).unwrap(), [4.0, 5.0, 6.0, 7.0]);
        let columns = parts.narrow(1, 1, 2).unwrap();
        assert_eq!(*landing.fetch::<f32>(&columns).unwrap(), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    }

    #[test]
    fn what_is_fetched_is_what_the_tensor_holds() {
        fetched(&Device::Cpu);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn what_is_fetched_from_a_card_is_what_the_tensor_holds() {
        match crate::cuda::open(0) {
            Ok(device) => fetched(&device),
            Err(error) => println!("landing: skipped: no CUDA device: {error}"),
        }
    }

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

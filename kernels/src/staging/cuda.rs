//! Page-locked memory of one CUDA device, and the copies out of it and into it on the device's one stream.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, DeviceRepr, DriverError, PinnedHostSlice, ValidAsZeroBits, result,
};
use candle_core::{CudaDevice, CudaStorage, Error, Result, Tensor};

/// A type that a card takes as it lies in memory.
pub trait OnCard: CudaDType + DeviceRepr + ValidAsZeroBits {}

impl<T: CudaDType + DeviceRepr + ValidAsZeroBits> OnCard for T {}

#[derive(Debug)]
pub(super) struct Locked<T: OnCard> {
    device: CudaDevice,
    numbers: PinnedHostSlice<T>,
    /// Behind the last copy: with candle's events off (`cuda::open`) none other says when it is done.
    copied: Option<CudaEvent>,
}

fn failed(error: DriverError) -> Error {
    crate::cuda::failed("staging", error)
}

impl<T: OnCard> Locked<T> {
    pub(super) fn new(len: usize, device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        // SAFETY: the memory is unset, and set to zero before anything reads it. No flag: the host may read it too.
        let numbers = unsafe { stream.context().alloc_pinned_with_flags::<T>(len, 0) };
        let mut numbers = numbers.map_err(failed)?;
        let first = numbers.as_mut_ptr().map_err(failed)?;
        // SAFETY: `first` begins `len` numbers that were just allocated, and zero bytes are a number (`ValidAsZeroBits`).
        unsafe { std::ptr::write_bytes(first, 0, len) };
        Ok(Self { device: device.clone(), numbers, copied: None })
    }

    pub(super) fn numbers(&mut self) -> Result<&mut [T]> {
        if let Some(event) = self.copied.take() {
            event.synchronize().map_err(failed)?;
        }
        self.numbers.as_mut_slice().map_err(failed)
    }

    pub(super) fn upload(&mut self) -> Result<Tensor> {
        let (stream, len) = (self.device.cuda_stream(), self.numbers.len());
        // SAFETY: the copy sets every number, and what reads the tensor comes behind it on the same stream.
        let mut on_card = unsafe { self.device.alloc::<T>(len) }?;
        // From here on the memory is read beside the host, until the event behind the copy.
        let copied = stream.memcpy_htod(&self.numbers, &mut on_card);
        let event = stream.record_event(None);
        match copied.and(event) {
            Ok(event) => self.copied = Some(event),
            Err(error) => {
                stream.synchronize().map_err(failed)?;
                return Err(failed(error));
            }
        }
        let storage = CudaStorage::wrap_cuda_slice(on_card, self.device.clone());
        Ok(crate::cuda::tensor(storage, len))
    }
}

impl Locked<u8> {
    /// The bytes of `tensor`, a contiguous one of at least one number for which there is room, once they are here.
    pub(super) fn fetch(&mut self, tensor: &Tensor) -> Result<&[u8]> {
        let len = tensor.elem_count() * tensor.dtype().size_in_bytes();
        let (address, stream) = (crate::cuda::address(tensor)?, self.device.cuda_stream());
        let bytes = &mut self.numbers()?[..len];
        stream.context().bind_to_thread().map_err(failed)?;
        // SAFETY: `address` begins as many bytes, which were written before on the same stream and which `tensor` holds; the
        // copy is waited for before anyone else has the memory.
        let copied = unsafe { result::memcpy_dtoh_async(bytes, address, stream.cu_stream()) };
        copied.and(stream.synchronize()).map_err(failed)?;
        Ok(bytes)
    }
}

/// Room for `len` bytes from `device` in `kept`, which is made anew where it has less; None where the driver gives none.
pub(super) fn room<'a>(
    kept: &'a mut Option<Locked<u8>>,
    len: usize,
    device: &CudaDevice,
) -> Option<&'a mut Locked<u8>> {
    let has_room = |own: &Locked<u8>| own.numbers.len() >= len && own.device.same_device(device);
    if !kept.as_ref().is_some_and(has_room) {
        // Doubled, so that what grows bit by bit is not locked anew each time.
        *kept = Locked::new(len.next_power_of_two(), device).ok();
    }
    kept.as_mut()
}

impl<T: OnCard> Drop for Locked<T> {
    fn drop(&mut self) {
        if let Some(event) = self.copied.take() {
            // A device that failed copies nothing any more.
            let _ = event.synchronize();
        }
    }
}

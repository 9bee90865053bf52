//! How much memory a device has given to this process.
//! Knows no tensor.

use crate::Device;

/// Most bytes that this process has held on a CUDA device at once; none on the processor or where the driver does not
/// say.
pub fn peak_device_bytes(device: Device) -> Option<u64> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(ordinal) => cuda(ordinal),
        _ => None,
    }
}

#[cfg(feature = "cuda")]
fn cuda(ordinal: usize) -> Option<u64> {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    let device = result::device::get(ordinal as i32).ok()?;
    // SAFETY: `device` is one that the driver has just named.
    let pool = unsafe { result::device::get_default_mem_pool(device) }.ok()?;
    let mut bytes = 0u64;
    // SAFETY: this attribute is one 64-bit number, and `bytes` is one.
    let status = unsafe {
        sys::cuMemPoolGetAttribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH,
            std::ptr::from_mut(&mut bytes).cast(),
        )
    };
    (status == sys::CUresult::CUDA_SUCCESS).then_some(bytes)
}

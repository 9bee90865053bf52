//! What every op does with a tensor's memory: the range of a contiguous one, and zeros of any shape on any device.
//! Knows no operation.

use candle_core::{DType, Device, Layout, Result, Shape, Tensor, bail};
use std::ops::Range;

/// The elements that `layout` names in its storage.
///
/// # Errors
/// If they do not lie side by side; `op` is named.
pub(crate) fn contiguous_range(op: &str, layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("{op}: layout {layout:?}, expected a contiguous one"),
    }
}

/// [`Tensor::zeros`], of nothing too: the driver of a CUDA device refuses to fill it.
pub(crate) fn zeros(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    let shape = shape.into();
    #[cfg(feature = "cuda")]
    if let (Device::Cuda(device), 0) = (device, shape.elem_count()) {
        return crate::cuda::output_tensor(device, dtype, shape);
    }
    Tensor::zeros(shape, dtype, device)
}

/// Contiguous, with its first element at a multiple of 16 bytes, as the kernels load; else a copy that is.
pub(crate) fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    if (tensor.layout().start_offset() * tensor.dtype().size_in_bytes()).is_multiple_of(16) {
        Ok(tensor)
    } else {
        tensor.force_contiguous()
    }
}

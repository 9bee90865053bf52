//! One step of AdamW on one tensor in place, on a CUDA device: a launch a tensor, and nothing else.
//! Knows no schedule and no clipping: it is told the factors.

use crate::cuda::{Launch, address, device_of, launch, output_tensor, suffix};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Device, Result, Tensor, bail};

/// The numbers of one step.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// Factor on the gradient.
    pub scale: f32,
    /// Decay of the first and of the second moment.
    pub betas: (f32, f32),
    /// 1 - beta^step of both.
    pub corrections: (f32, f32),
    /// Beside the root of the second moment.
    pub eps: f32,
    /// Decay of the values themselves.
    pub weight_decay: f32,
    /// Learning rate.
    pub rate: f32,
}

/// As in `cuda/adamw.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Update {
    gradient: u64,
    master: u64,
    first: u64,
    second: u64,
    value: u64,
    len: u64,
    scale: f32,
    betas: [f32; 2],
    corrections: [f32; 2],
    eps: f32,
    decay: f32,
    rate: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SquareSum {
    x: u64,
    sums: u64,
    len: u64,
}

// SAFETY: plain numbers in C layout, as the kernels declare them.
unsafe impl DeviceRepr for Update {}
// SAFETY: as above.
unsafe impl DeviceRepr for SquareSum {}

const THREADS: usize = 256;

/// first = β1 first + (1 - β1) g, second = β2 second + (1 - β2) g²,
/// master -= rate · (first / c1 / (√(second / c2) + eps) + weight_decay · master), with g = scale · gradient.
///
/// All f32 of one length, contiguous; no gradient is one of 0. `value` of another type gets the rounded master. Moments,
/// master and value are overwritten: whoever shares their memory sees the new ones.
///
/// Source: AdamW, arXiv 1711.05101, algorithm 2.
///
/// # Errors
/// If a tensor is not on the CUDA device of `master` or not of its length and type.
pub fn adamw(
    gradient: Option<&Tensor>,
    master: &Tensor,
    value: Option<&Tensor>,
    (first, second): (&Tensor, &Tensor),
    step: &AdamWStep,
) -> Result<()> {
    let len = master.elem_count();
    let device = device_of("adamw", master)?;
    for (name, x) in [
        ("gradient", gradient.unwrap_or(master)),
        ("master", master),
        ("first moment", first),
        ("second moment", second),
    ] {
        let known = x.elem_count() == len && x.dtype() == DType::F32;
        if !known || !x.device().same_device(master.device()) {
            bail!("adamw: {name} {:?} of {:?}, expected {len} of f32", x.shape(), x.dtype());
        }
    }
    if let Some(value) = value
        && value.elem_count() != len
    {
        bail!("adamw: value {:?}, expected {len} elements", value.shape());
    }
    let gradient = gradient.map(|x| x.detach().contiguous()).transpose()?;
    let params = Update {
        gradient: gradient.as_ref().map(address).transpose()?.unwrap_or(0),
        master: address(master)?,
        first: address(first)?,
        second: address(second)?,
        value: value.map(address).transpose()?.unwrap_or(0),
        len: len as u64,
        scale: step.scale,
        betas: step.betas.into(),
        corrections: step.corrections.into(),
        eps: step.eps,
        decay: step.weight_decay,
        rate: step.rate,
    };
    let dtype = value.map_or(DType::F32, Tensor::dtype);
    let kernel = format!("adamw_{}", suffix("adamw", dtype)?);
    let blocks = len.div_ceil(THREADS).min(8192) as u32;
    let shape = Launch { grid: (blocks, 1, 1), block: THREADS as u32, shared_bytes: 0 };
    launch(&device, "adamw", &kernel, shape, &params)
}

/// Σ x² over all of `tensors`, f32 on one CUDA device: parts of each in f32, the parts in f64 in their order.
///
/// # Errors
/// If a tensor is of another type or device.
pub fn square_sum(tensors: &[Tensor]) -> Result<f64> {
    /// Values of a part at least, and most parts of a tensor.
    const VALUES: usize = 4096;
    const PARTS: usize = 512;
    let Some(first) = tensors.first() else { return Ok(0.0) };
    let parts = |x: &Tensor| x.elem_count().div_ceil(VALUES).min(PARTS);
    let device = device_of("square_sum", first)?;
    let total = tensors.iter().map(parts).sum::<usize>();
    let sums = output_tensor(&device, DType::F32, total)?;
    let mut at = address(&sums)?;
    for x in tensors {
        if x.dtype() != DType::F32 || !x.device().same_device(first.device()) {
            bail!("square_sum: {:?} on {:?}, expected f32 on one device", x.dtype(), x.device());
        }
        let (x, blocks) = (x.detach().contiguous()?, parts(x));
        let params = SquareSum { x: address(&x)?, sums: at, len: x.elem_count() as u64 };
        let shape = Launch { grid: (blocks as u32, 1, 1), block: THREADS as u32, shared_bytes: 0 };
        launch(&device, "adamw", "square_sum", shape, &params)?;
        at += (blocks * size_of::<f32>()) as u64;
    }
    let sums = sums.to_device(&Device::Cpu)?.to_vec1::<f32>()?;
    Ok(sums.into_iter().map(f64::from).sum())
}

//! Cross-entropy of logits with targets, and the gradient of the logits, a row at a time.
//! Knows no head and no chunking.

use crate::storage::aligned;
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

/// Loss in nats of every row (n), f32, and with `scale` the gradient of the logits: scale · (softmax - one-hot).
///
/// logits (n, words), f32, on CUDA also bf16 and f16; targets (n), u32, each below `words`, which on CUDA the caller
/// checks; the gradient has the logits' type. Computed in f32. No gradient flows.
///
/// # Errors
/// If shapes, types or devices disagree, or on the CPU if a target is not below `words`.
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    scale: Option<f32>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (n, words) = logits.dims2()?;
    let type_known = logits.device().is_cuda() || logits.dtype() == DType::F32;
    let same = logits.device().same_device(targets.device());
    if targets.dims() != [n] || targets.dtype() != DType::U32 || !type_known || !same || words == 0
    {
        bail!(
            "cross_entropy: logits {:?} of {:?}, targets {:?} of {:?}, expected (n, words), f32 on the CPU, and (n) of u32 on one device",
            logits.shape(),
            logits.dtype(),
            targets.shape(),
            targets.dtype()
        );
    }
    let (logits, targets) = (aligned(&logits.detach())?, targets.contiguous()?);
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return cuda::cross_entropy(&logits, &targets, scale, (n, words));
    }
    let mut values = logits.flatten_all()?.to_vec1::<f32>()?;
    let targets = targets.to_vec1::<u32>()?;
    if let Some(target) = targets.iter().find(|target| **target as usize >= words) {
        bail!("cross_entropy: target {target}, expected one below {words}");
    }
    let losses: Vec<f32> = values
        .par_chunks_mut(words)
        .zip(&targets)
        .map(|(row, target)| {
            let target = *target as usize;
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            // In f64: one sum in f32 over a vocabulary is off by 6e-5.
            let sum = row.iter().map(|x| f64::from((x - max).exp())).sum::<f64>() as f32;
            let loss = max + sum.ln() - row[target];
            if let Some(scale) = scale {
                row.iter_mut().for_each(|x| *x = (*x - max).exp() / sum * scale);
                row[target] -= scale;
            }
            loss
        })
        .collect();
    let gradient = scale.map(|_| Tensor::from_vec(values, (n, words), logits.device()));
    Ok((Tensor::from_vec(losses, n, logits.device())?, gradient.transpose()?))
}

#[cfg(feature = "cuda")]
mod cuda {
    use crate::cuda::{Launch, address, device_of, launch, output_tensor, suffix};
    use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
    use candle_core::{DType, Result, Tensor, bail};

    /// As in `cuda/cross_entropy.cu`.
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct CrossEntropy {
        logits: u64,
        targets: u64,
        losses: u64,
        dlogits: u64,
        words: u64,
        scale: f32,
    }

    // SAFETY: plain numbers in C layout, as the kernel declares them.
    unsafe impl DeviceRepr for CrossEntropy {}

    pub(super) fn cross_entropy(
        logits: &Tensor,
        targets: &Tensor,
        scale: Option<f32>,
        (n, words): (usize, usize),
    ) -> Result<(Tensor, Option<Tensor>)> {
        if n > i32::MAX as usize || words > u32::MAX as usize {
            bail!("cross_entropy: {n} rows of {words}, expected fewer than 2^31 of 2^32");
        }
        let device = device_of("cross_entropy", logits)?;
        let losses = output_tensor(&device, DType::F32, n)?;
        let dlogits = scale.map(|_| output_tensor(&device, logits.dtype(), (n, words)));
        let dlogits = dlogits.transpose()?;
        let params = CrossEntropy {
            logits: address(logits)?,
            targets: address(targets)?,
            losses: address(&losses)?,
            dlogits: dlogits.as_ref().map(address).transpose()?.unwrap_or(0),
            words: words as u64,
            scale: scale.unwrap_or(0.0),
        };
        let kernel = format!("cross_entropy_{}", suffix("cross_entropy", logits.dtype())?);
        let shape = Launch { grid: (n as u32, 1, 1), block: 512, shared_bytes: 0 };
        launch(&device, "cross_entropy", &kernel, shape, &params)?;
        Ok((losses, dlogits))
    }
}
